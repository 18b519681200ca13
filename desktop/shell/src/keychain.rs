//! Where refresh tokens and device tokens are kept: the system's keychain, one entry of each for each server. There is
//! no other place; without a keychain a session ends with the app, and the device is a new one at every sign-in.

use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};

/// The keychain's name for us.
pub const SERVICE: &str = "rs.quota.desktop";

/// A keychain may ask its owner for a password first.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the keychain does not answer")]
pub struct NoKeychain;

/// Blocks while the system asks its owner.
pub trait Keychain: Send + Sync + 'static {
    fn get(&self, server: &str) -> Result<Option<SecretString>, NoKeychain>;
    fn set(&self, server: &str, token: &SecretString) -> Result<(), NoKeychain>;
    fn delete(&self, server: &str) -> Result<(), NoKeychain>;
}

/// Secret Service, Keychain Services or Credential Manager.
#[derive(Debug, Clone, Copy, Default)]
pub struct OfSystem;

impl OfSystem {
    fn entry(server: &str) -> Result<keyring::Entry, NoKeychain> {
        keyring::Entry::new(SERVICE, server).map_err(|error| unavailable(&error))
    }
}

fn unavailable(error: &keyring::Error) -> NoKeychain {
    tracing::warn!(error = error as &dyn std::error::Error, "keychain");
    NoKeychain
}

impl Keychain for OfSystem {
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

/// Asks the keychain without holding up others, and not for ever.
#[expect(
    clippy::disallowed_methods,
    reason = "one person's keychain is asked one question at a time"
)]
pub async fn ask<T: Send + 'static>(
    question: impl FnOnce() -> Result<T, NoKeychain> + Send + 'static,
) -> Result<T, NoKeychain> {
    match tokio::time::timeout(PATIENCE, tokio::task::spawn_blocking(question)).await {
        Ok(Ok(answer)) => answer,
        _ => Err(NoKeychain),
    }
}
