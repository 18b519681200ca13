//! Webhooks: sends events to tenants' endpoints.
//!
//! The transaction that causes an event stores a delivery for each webhook that gets the event. Deliveries are sent
//! after that transaction has been committed ([`deliver`]). An endpoint may receive an event more than once, and can
//! recognize duplicates by the event's ID. The deliveries to an endpoint are not ordered.
//!
//! While PostgreSQL is unreachable, nothing is sent. Deliveries that are already stored are sent later.

pub mod deliver;
pub mod event;
mod send;
mod signature;
mod target;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::sync::Notify;
use url::Url;
use uuid::Uuid;

use self::send::Sender;
pub use self::{
    signature::{SECRET_LENGTH, shown},
    target::{Lookup, Scheme, SystemLookup, Targets},
};
use crate::{
    db::{Db, DbError},
    encryption::Encryption,
    repo::webhook::{self, StoredSecrets},
};

/// The number of webhooks whose secrets are re-encrypted per transaction.
const BATCH: i64 = 100;

/// Sends webhooks. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Webhooks(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    db: Db,
    encryption: Encryption,
    targets: Targets,
    sender: Sender,
    stored: Notify,
    /// The last tenant whose deliveries were claimed. The next claim starts with the tenant after it.
    last_tenant: Mutex<Uuid>,
}

/// Why a secret could not be encrypted or decrypted.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("the operating system has no random bytes")]
    NoRandomBytes,
    #[error("a secret was encrypted with a QUOTA_SECRET that is not configured")]
    UnknownKey,
}

pub struct NewSecret {
    /// The secret in the form shown to the tenant.
    pub shown: String,
    /// The secret in the form stored in the database.
    pub encrypted: Vec<u8>,
}

/// Returns the encryption context for a webhook's secrets.
fn context(tenant: Uuid, webhook: Uuid) -> Vec<u8> {
    [tenant.as_bytes().as_slice(), webhook.as_bytes()].concat()
}

impl Webhooks {
    /// Creates the sender. In the networks in `private`, webhooks may be sent to any address. Outside these networks,
    /// no webhooks are sent to the host of `public_url`.
    ///
    /// # Errors
    ///
    /// Fails if an HTTP client cannot be created.
    pub fn new(
        db: Db,
        encryption: Encryption,
        private: &[IpNet],
        public_url: &str,
        lookup: &Arc<dyn Lookup>,
    ) -> Result<Self, reqwest::Error> {
        let targets = Targets::new(private).without_host_of(public_url);
        let sender = Sender::new(&targets, lookup)?;
        Ok(Self(Arc::new(Inner {
            db,
            encryption,
            targets,
            sender,
            stored: Notify::new(),
            last_tenant: Mutex::new(Uuid::nil()),
        })))
    }

    /// Checks a URL as far as possible without a DNS lookup.
    ///
    /// # Errors
    ///
    /// Returns a message that says what is wrong with the URL, for use as a field's error.
    pub fn check_url(&self, text: &str) -> Result<Url, &'static str> {
        self.0.targets.parse(text).map(|(url, _)| url)
    }

    /// Generates a signing secret for a webhook.
    pub fn generate_secret(&self, tenant: Uuid, webhook: Uuid) -> Result<NewSecret, SecretError> {
        let mut secret = [0; SECRET_LENGTH];
        getrandom::fill(&mut secret).map_err(|_| SecretError::NoRandomBytes)?;
        Ok(NewSecret {
            shown: shown(&secret),
            encrypted: self.encrypt(tenant, webhook, &secret)?,
        })
    }

    fn encrypt(&self, tenant: Uuid, webhook: Uuid, secret: &[u8]) -> Result<Vec<u8>, SecretError> {
        let encrypted = self.0.encryption.encrypt(&context(tenant, webhook), secret);
        encrypted.map_err(|_| SecretError::NoRandomBytes)
    }

    /// Starts sending stored deliveries without waiting for the next round.
    pub fn wake(&self) {
        self.0.stored.notify_one();
    }

    /// Completes once [`wake`](Self::wake) has been called.
    pub async fn woken(&self) {
        self.0.stored.notified().await;
    }

    /// Re-encrypts all stored secrets with the current key, so that the previous `QUOTA_SECRET` can be removed. Returns
    /// the number of webhooks whose current secret could not be re-encrypted.
    pub async fn reencrypt(&self) -> Result<usize, DbError> {
        let mut after = (Uuid::nil(), Uuid::nil());
        let mut unreadable = 0;
        loop {
            let batch = self.0.db.in_system(async |tx| {
                let batch = webhook::stored_secrets(tx, after, BATCH).await?;
                let mut unreadable = 0;
                for stored in &batch {
                    match self.reencrypted(stored) {
                        Ok(None) => {}
                        Ok(Some((secret, previous))) => {
                            webhook::replace_secrets(tx, stored, &secret, previous.as_deref())
                                .await?;
                        }
                        Err(error) => {
                            unreadable += 1;
                            tracing::debug!(webhook = %stored.id, %error, "cannot encrypt a secret again");
                        }
                    }
                }
                Ok((batch.last().map(|it| (it.tenant_id, it.id)), unreadable))
            });
            let (last, more) = batch.await?;
            unreadable += more;
            match last {
                Some(last) => after = last,
                None => return Ok(unreadable),
            }
        }
    }

    /// Returns the secrets encrypted with the current key. Returns `None` if they are already encrypted with that key.
    #[expect(clippy::type_complexity, reason = "the two columns of a row")]
    fn reencrypted(
        &self,
        stored: &StoredSecrets,
    ) -> Result<Option<(Vec<u8>, Option<Vec<u8>>)>, SecretError> {
        let (tenant, id) = (stored.tenant_id, stored.id);
        let decrypt = |secret: &[u8]| {
            let decrypted = self.0.encryption.decrypt(&context(tenant, id), secret);
            decrypted.ok_or(SecretError::UnknownKey)
        };
        let secret = decrypt(&stored.secret)?;
        // A previous secret that cannot be decrypted is kept unchanged. Deliveries are not signed with it.
        let previous = stored.previous_secret.as_deref().map(decrypt);
        let previous = previous.and_then(Result::ok);
        if secret.is_current && previous.as_ref().is_none_or(|it| it.is_current) {
            return Ok(None);
        }
        let previous = match previous {
            Some(previous) => Some(self.encrypt(tenant, id, &previous.secret)?),
            None => stored.previous_secret.clone(),
        };
        Ok(Some((self.encrypt(tenant, id, &secret.secret)?, previous)))
    }
}
