//! Derives keys from one secret: from `QUOTA_SECRET` if the operator has set it, and otherwise from a random secret
//! that is stored in the database. Each purpose has its own key (HKDF-SHA-256), so no key reveals another one.
//!
//! While the operator rotates `QUOTA_SECRET`, new signatures use the current secret, and signatures made with
//! `QUOTA_SECRET_PREVIOUS` are still accepted. Therefore, browser sessions, access tokens, and known devices remain
//! valid.

use aws_lc_rs::{hkdf, hmac};

use crate::{encryption::Encryption, seal::Seal};

/// Derives the key for one purpose.
fn derive(master: &[u8], purpose: &[&[u8]]) -> [u8; 32] {
    struct Length;
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            32
        }
    }
    let mut key = [0; 32];
    let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, b"quota");
    salt.extract(master)
        .expand(purpose, Length)
        .and_then(|okm| okm.fill(&mut key))
        .expect("HKDF gives up to 255 blocks, and this is one");
    key
}

fn hmac_key(master: &[u8], purpose: &str) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &derive(master, &[purpose.as_bytes()]))
}

/// The keys derived from one secret. They protect data held by clients.
pub struct Secrets {
    /// The seed of the Ed25519 key that signs access tokens.
    pub signing_seed: [u8; 32],
    /// Identifies this secret without revealing anything about it.
    pub id: SecretId,
    refresh: hmac::Key,
    csrf: hmac::Key,
    device: hmac::Key,
    password: hmac::Key,
}

/// Identifies the secret that a session's refresh tokens are derived from.
pub type SecretId = [u8; 16];

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secrets")
    }
}

impl Secrets {
    pub fn new(master: &[u8]) -> Self {
        let mut id = SecretId::default();
        id.copy_from_slice(&derive(master, &[b"session secret id"])[..16]);
        Self {
            signing_seed: derive(master, &[b"access token signature"]),
            id,
            refresh: hmac_key(master, "refresh token successor"),
            csrf: hmac_key(master, "browser session csrf"),
            device: hmac_key(master, "known device"),
            password: hmac_key(master, "password of a known device"),
        }
    }

    /// Returns the bytes of the refresh token that follows `token`. They are derived from `token`, so that two requests
    /// with the same token get the same successor. They are also derived from the secret, so that no one else can
    /// compute them.
    pub fn successor(&self, token: &[u8]) -> [u8; 32] {
        let tag = hmac::sign(&self.refresh, token);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(tag.as_ref());
        bytes
    }

    /// Returns the CSRF value that a page must send to make changes using this session's cookies.
    pub fn csrf(&self, session: &[u8]) -> Vec<u8> {
        hmac::sign(&self.csrf, session).as_ref().to_vec()
    }

    /// Returns whether `tag` is the CSRF value of the session. Compares in constant time.
    pub fn is_csrf(&self, session: &[u8], tag: &[u8]) -> bool {
        hmac::verify(&self.csrf, session, tag).is_ok()
    }

    pub fn device(&self, content: &[u8]) -> Vec<u8> {
        hmac::sign(&self.device, content).as_ref().to_vec()
    }

    /// Returns a value that changes with the account's password.
    pub fn password_mark(&self, hash: &str) -> [u8; 8] {
        let tag = hmac::sign(&self.password, hash.as_bytes());
        let mut mark = [0; 8];
        mark.copy_from_slice(&tag.as_ref()[..8]);
        mark
    }

    /// Returns whether `tag` is the MAC of a device token's content. Compares in constant time.
    pub fn is_device(&self, content: &[u8], tag: &[u8]) -> bool {
        hmac::verify(&self.device, content, tag).is_ok()
    }
}

/// The current secret, and the previous one if it is still accepted.
#[derive(Debug)]
pub struct SecretPair {
    pub current: Secrets,
    pub previous: Option<Secrets>,
}

impl SecretPair {
    pub fn new(current: &[u8], previous: Option<&[u8]>) -> Self {
        Self {
            current: Secrets::new(current),
            previous: previous.map(Secrets::new),
        }
    }

    /// Returns the accepted secrets, starting with the current one.
    pub fn accepted(&self) -> impl Iterator<Item = &Secrets> {
        std::iter::once(&self.current).chain(&self.previous)
    }
}

/// The keys for data that replicas exchange through Redis or store in the database. They are derived from the secret
/// *and* the installation. Therefore, installations with the same secret and Redis prefix but different databases do
/// not trust each other.
#[derive(Debug)]
pub struct Seals {
    pub records: Seal,
    pub invalidations: Seal,
    /// Hashes the names of sign-in counters, so that Redis contains no email or IP addresses.
    pub attempts: [u8; 32],
    /// Encrypts secrets in the database.
    pub stored: Encryption,
}

impl Seals {
    /// Derives the seals. `installation_secret` is a secret that only this database contains.
    pub fn new(current: &[u8], previous: Option<&[u8]>, installation_secret: &[u8]) -> Self {
        // Identify the installation by a derived value, not by its secret: without `QUOTA_SECRET`, the keys that
        // protect data held by clients are derived from that secret.
        let installation = derive(installation_secret, &[b"installation"]);
        let key = |master: &[u8], purpose: &str| {
            derive(master, &[purpose.as_bytes(), b"\0", &installation])
        };
        let stored = |master: &[u8]| key(master, "stored secrets");
        // Data that was stored before `QUOTA_SECRET` was set is encrypted with a key derived from the installation's
        // secret.
        let others = previous.into_iter().chain([installation_secret]);
        let others: Vec<_> = others.map(stored).collect();
        let seal = |purpose: &str| {
            let previous = previous.map(|master| key(master, purpose));
            Seal::new(&key(current, purpose), previous.as_ref())
        };
        Self {
            records: seal("key record seal"),
            invalidations: seal("invalidation seal"),
            attempts: key(current, "sign-in attempts"),
            stored: Encryption::new(&stored(current), &others),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_of_one_installation_open_each_others_seals_and_no_others_do() {
        let it = Seals::new(b"secret", None, b"database");
        let closed = it.records.close(&[], b"x");
        let opens = |seals: &Seals| seals.records.open(&[], &closed).is_some();
        assert!(opens(&Seals::new(b"secret", None, b"database")));
        assert!(opens(&Seals::new(b"next", Some(b"secret"), b"database")));
        assert!(!opens(&Seals::new(b"secret", None, b"another database")));
        assert!(!opens(&Seals::new(b"another", None, b"database")));
        assert!(
            it.invalidations.open(&[], &closed).is_none(),
            "each purpose has its own key"
        );
    }
}
