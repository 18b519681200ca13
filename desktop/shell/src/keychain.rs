//! Stores a refresh token and a device token for each server in the system keychain, and nowhere else. Without a
//! keychain, users have to sign in again after each restart, and every sign-in counts as a sign-in from a new device.

use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};

/// The app's name in the keychain.
pub const SERVICE: &str = "rs.quota.desktop";

/// The time limit for a keychain operation: long enough for the user to unlock the keychain.
const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no keychain is available")]
pub struct NoKeychain;

/// Stores tokens by name: a server's refresh token under the server's address, and its device token under the address
/// followed by `(device)`. All methods block while the system asks the user to unlock the keychain.
pub trait Keychain: Send + Sync + 'static {
    fn get(&self, server: &str) -> Result<Option<SecretString>, NoKeychain>;
    fn set(&self, server: &str, token: &SecretString) -> Result<(), NoKeychain>;
    fn delete(&self, server: &str) -> Result<(), NoKeychain>;
}

/// Uses Secret Service, Keychain Services, or Credential Manager, depending on the system.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemKeychain;

impl SystemKeychain {
    fn entry(server: &str) -> Result<keyring::Entry, NoKeychain> {
        keyring::Entry::new(SERVICE, server).map_err(|error| unavailable(&error))
    }
}

fn unavailable(error: &keyring::Error) -> NoKeychain {
    tracing::warn!(
        error = error as &dyn std::error::Error,
        "keychain unavailable"
    );
    NoKeychain
}

impl Keychain for SystemKeychain {
    fn get(&self, server: &str) -> Result<Option<SecretString>, NoKeychain> {
        match Self::entry(server)?.get_password() {
            Ok(token) => Ok(Some(token.into())),
            Err(keyring::Error::NoEntry) => Ok(None),
            Err(error) => Err(unavailable(&error)),
        }
    }

    fn set(&self, server: &str, token: &SecretString) -> Result<(), NoKeychain> {
        Self::entry(server)?
            .set_password(token.expose_secret())
            .map_err(|error| unavailable(&error))
    }

    fn delete(&self, server: &str) -> Result<(), NoKeychain> {
        match Self::entry(server)?.delete_credential() {
            Ok(()) | Err(keyring::Error::NoEntry) => Ok(()),
            Err(error) => Err(unavailable(&error)),
        }
    }
}

/// Runs a keychain operation on another thread, with a timeout.
#[expect(
    clippy::disallowed_methods,
    reason = "calls to a user's keychain are rare and sequential"
)]
pub async fn call<T: Send + 'static>(
    operation: impl FnOnce() -> Result<T, NoKeychain> + Send + 'static,
) -> Result<T, NoKeychain> {
    match tokio::time::timeout(TIMEOUT, tokio::task::spawn_blocking(operation)).await {
        Ok(Ok(result)) => result,
        _ => Err(NoKeychain),
    }
}
