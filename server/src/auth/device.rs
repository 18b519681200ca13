//! Known devices: devices from which a user has already signed in to an account.
//!
//! A successful sign-in returns a device token. Browsers store it in a cookie, and the desktop app stores it in the
//! keychain. A later sign-in to the same account with this token is not subject to the limits that other people can
//! exhaust. The token is not a credential: without the password, it only allows a few separate attempts.
//!
//! A token contains a random ID, the time it was issued, and a tag derived from the account's password. A MAC covers
//! this content and the account's email address. Changing the password makes all devices unknown. The server does not
//! store tokens. The value that a device stores may contain tokens for several accounts, newest first.

use std::{sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use super::{
    AuthError,
    secret::{SecretPair, Secrets},
};
use crate::clock::UnixNanos;

/// How long a device remains known after its last sign-in.
pub const LIFETIME: Duration = Duration::from_hours(180 * 24);
/// The maximum number of accounts for which a device stores tokens.
const ACCOUNTS: usize = 4;
/// The length of a device token, in characters.
const TOKEN: usize = 86;
/// The maximum length of the value that a device stores, in characters.
pub const LENGTH_MAX: usize = ACCOUNTS * (TOKEN + 1) - 1;
const ID: usize = 16;
const MARK: usize = 8;
const CONTENT: usize = ID + 8 + MARK;
const SEPARATOR: char = '.';

pub type DeviceId = [u8; ID];

/// A device from which a user has signed in to an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    pub id: DeviceId,
    mark: [u8; MARK],
}

/// Issues and recognizes device tokens. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Devices(Arc<SecretPair>);

impl Devices {
    pub fn new(secrets: Arc<SecretPair>) -> Self {
        Self(secrets)
    }

    /// Returns this account's device in `value`, if this installation issued its token and the token has not expired.
    /// The device is known only if it [signed in with the current password](Self::is_of_password).
    pub fn find(&self, email: &str, value: &str, now: UnixNanos) -> Option<Device> {
        self.parse(email, value, now).map(|(_, device)| device)
    }

    /// Returns whether the account still has the password that the device last signed in with.
    pub fn is_of_password(&self, device: &Device, hash: &str) -> bool {
        let is_same = |secrets: &Secrets| {
            let mark = secrets.password_mark(hash);
            aws_lc_rs::constant_time::verify_slices_are_equal(&mark, &device.mark).is_ok()
        };
        self.0.accepted().any(is_same)
    }

    fn parse<'a>(&self, email: &str, value: &'a str, now: UnixNanos) -> Option<(&'a str, Device)> {
        if value.len() > LENGTH_MAX {
            return None;
        }
        value.split(SEPARATOR).find_map(|token| {
            let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
            let (content, tag) = bytes.split_at_checked(CONTENT)?;
            let (id, at) = content.split_first_chunk::<ID>()?;
            let (at, mark) = at.split_first_chunk()?;
            let at = u64::from_be_bytes(*at);
            let mark = mark.try_into().ok()?;
            let expired = now.secs().saturating_sub(at) > LIFETIME.as_secs();
            let message = message(content, email);
            let genuine = self
                .0
                .accepted()
                .any(|secrets| secrets.is_device(&message, tag));
            (genuine && !expired).then_some((token, Device { id: *id, mark }))
        })
    }

    /// Returns the value to store after a sign-in. It starts with a new token for this account, followed by the other
    /// tokens in `value`. A known device keeps its ID. `hash` is the hash of the password used.
    pub fn remember(
        &self,
        (email, hash): (&str, &str),
        value: Option<&str>,
        now: UnixNanos,
    ) -> Result<String, AuthError> {
        let known = value.and_then(|value| self.parse(email, value, now));
        let id = match known {
            Some((_, device)) => device.id,
            None => {
                let mut id = [0; ID];
                getrandom::fill(&mut id)?;
                id
            }
        };
        let mark = self.0.current.password_mark(hash);
        let content = [&id[..], &now.secs().to_be_bytes(), &mark].concat();
        let tag = self.0.current.device(&message(&content, email));
        let mut value_now = URL_SAFE_NO_PAD.encode([&content[..], &tag].concat());
        let others = value
            .filter(|value| value.len() <= LENGTH_MAX)
            .into_iter()
            .flat_map(|value| value.split(SEPARATOR))
            .filter(|token| {
                let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                token.len() == TOKEN
                    && token.chars().all(plain)
                    && known.is_none_or(|(own, _)| own != *token)
            });
        for other in others.take(ACCOUNTS - 1) {
            value_now.push(SEPARATOR);
            value_now.push_str(other);
        }
        Ok(value_now)
    }
}

fn message(content: &[u8], email: &str) -> Vec<u8> {
    [content, email.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "$argon2id$v=19$m=64,t=1,p=1$c2FsdA$aGFzaA";
    const NOW: UnixNanos = UnixNanos::from_secs(1_785_738_360);

    fn devices(current: u8, previous: Option<u8>) -> Devices {
        let previous = previous.map(|byte| [byte; 32]);
        let secrets = SecretPair::new(&[current; 32], previous.as_ref().map(<[u8; 32]>::as_slice));
        Devices::new(Arc::new(secrets))
    }

    #[test]
    fn device_is_known_to_its_own_account_only() {
        let devices = devices(1, None);
        let value = devices
            .remember(("ada@example.com", HASH), None, NOW)
            .unwrap();
        let id = devices.find("ada@example.com", &value, NOW);
        assert!(id.is_some());
        assert_eq!(devices.find("eve@example.com", &value, NOW), None);
        assert_eq!(devices.find("ada@example.co", &value, NOW), None);
        // Another account signs in from the same device, and then the first account signs in again.
        let both = devices
            .remember(("eve@example.com", HASH), Some(&value), NOW)
            .unwrap();
        assert_eq!(devices.find("ada@example.com", &both, NOW), id);
        assert!(devices.find("eve@example.com", &both, NOW).is_some());
        let again = devices
            .remember(("ada@example.com", HASH), Some(&both), NOW)
            .unwrap();
        assert_eq!(again.split('.').count(), 2);
        assert_eq!(devices.find("ada@example.com", &again, NOW), id);
    }

    #[test]
    fn device_expires_after_its_lifetime() {
        let devices = devices(1, None);
        let value = devices
            .remember(("a@example.com", HASH), None, NOW)
            .unwrap();
        let known = |secs| {
            let at = UnixNanos::from_secs(NOW.secs() + secs);
            devices.find("a@example.com", &value, at).is_some()
        };
        assert!(known(LIFETIME.as_secs()) && !known(LIFETIME.as_secs() + 1));
    }

    #[test]
    fn device_is_known_only_with_its_password() {
        let old = devices(1, None);
        let value = old.remember(("a@example.com", HASH), None, NOW).unwrap();
        for devices in [&old, &devices(2, Some(1))] {
            let device = devices.find("a@example.com", &value, NOW).unwrap();
            assert!(devices.is_of_password(&device, HASH));
            let changed = HASH.replace("aGFzaA", "bmV3");
            assert!(!devices.is_of_password(&device, &changed));
        }
        // The MAC also covers the password's tag.
        let mut bytes = URL_SAFE_NO_PAD.decode(&value).unwrap();
        bytes[CONTENT - 1] ^= 1;
        let forged = URL_SAFE_NO_PAD.encode(bytes);
        assert!(old.find("a@example.com", &forged, NOW).is_none());
    }

    #[test]
    fn forged_or_damaged_token_is_no_device() {
        let one = devices(1, None);
        let value = one.remember(("a@example.com", HASH), None, NOW).unwrap();
        assert!(
            devices(2, Some(1))
                .find("a@example.com", &value, NOW)
                .is_some()
        );
        assert!(
            devices(2, None)
                .find("a@example.com", &value, NOW)
                .is_none()
        );
        for at in 0..value.len() {
            assert!(one.find("a@example.com", &value[..at], NOW).is_none());
        }
        for nonsense in [
            "",
            ".",
            "....",
            "ä",
            &"A".repeat(75),
            &"A".repeat(TOKEN),
            &"A".repeat(10_000),
        ] {
            assert!(one.find("a@example.com", nonsense, NOW).is_none());
            let kept = one
                .remember(("a@example.com", HASH), Some(nonsense), NOW)
                .unwrap();
            assert!(kept.len() <= LENGTH_MAX && kept.is_ascii());
            assert!(one.find("a@example.com", &kept, NOW).is_some());
        }
    }

    #[test]
    fn value_contains_the_newest_accounts() {
        let devices = devices(1, None);
        let mut value = None;
        for n in 0..6 {
            let email = format!("{n}@example.com");
            value = Some(
                devices
                    .remember((&email, HASH), value.as_deref(), NOW)
                    .unwrap(),
            );
        }
        let value = value.unwrap();
        assert!(value.len() <= LENGTH_MAX);
        for n in 0..6 {
            let known = devices.find(&format!("{n}@example.com"), &value, NOW);
            assert_eq!(known.is_some(), n >= 2, "{n}");
        }
    }
}
