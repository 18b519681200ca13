//! Telling other replicas what was changed, and remembering what they told.
//!
//! A change that others remember leaves a row in `revocations`, written in its own transaction. Each replica reads
//! the new rows at least every 250 ms: that alone keeps the contract. After the commit the change is also published in
//! Redis, so that most learn of it within milliseconds. A message can be lost, and is nothing to rely on; without
//! Redis, or when it is away, none is sent.
//!
//! Knows what a row says, and nothing of who forgets what. [`Recent`] is what this replica has learnt lately.

mod recent;

use std::{collections::HashSet, sync::Arc};

use chrono::DateTime;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use self::recent::Recent;
use crate::{
    redis::{Redis, Subscription},
    repo::revocation::{Revocation, Target},
    telemetry::metrics::Metrics,
};

/// Read by servers of other versions: fields may be added, none changes its meaning.
#[derive(Serialize, Deserialize)]
struct Message<'a> {
    seq: i64,
    tenant: Uuid,
    target: &'a str,
    id: Uuid,
    /// Microseconds since 1970, by PostgreSQL's clock.
    at: i64,
}

/// Publishes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Announcer {
    redis: Option<Redis>,
    channel: Arc<str>,
    metrics: Arc<Metrics>,
}

/// The channel on which every replica listens.
pub fn channel(prefix: &str) -> String {
    format!("{prefix}:revoked")
}

impl Announcer {
    pub fn new(redis: Option<Redis>, metrics: Arc<Metrics>) -> Self {
        Self {
            channel: channel(redis.as_ref().map_or("", Redis::prefix)).into(),
            redis,
            metrics,
        }
    }

    /// Tells the others of what was committed. In the background: whoever made the change does not wait.
    pub fn tell(&self, revocation: &Revocation) {
        let (Some(redis), Some(message)) = (self.redis.clone(), write(revocation)) else {
            return;
        };
        let announcer = self.clone();
        tokio::spawn(async move {
            let mut publish = redis::cmd("PUBLISH");
            publish.arg(&*announcer.channel).arg(message);
            match redis.query(&announcer.channel, &publish).await {
                Ok(_) => {
                    announcer.metrics.revocations_published.inc();
                }
                Err(error) => {
                    announcer.metrics.revocation_publish_errors.inc();
                    tracing::debug!(error = %error, "a revocation was not published");
                }
            }
        });
    }

    /// What the others tell. `None` without Redis.
    pub fn listen(&self) -> Option<Subscription> {
        let redis = self.redis.as_ref()?;
        Some(redis.subscribe(self.channel.to_string()))
    }
}

fn write(revocation: &Revocation) -> Option<Vec<u8>> {
    let target = revocation.target?;
    let message = Message {
        seq: revocation.seq,
        tenant: revocation.tenant,
        target: target.name(),
        id: target.id(revocation.tenant),
        at: revocation.at.timestamp_micros(),
    };
    serde_json::to_vec(&message).ok()
}

/// What a message says; `None` if that cannot be told.
pub fn read(message: &[u8]) -> Option<Revocation> {
    let message = serde_json::from_slice::<Message<'_>>(message).ok()?;
    Some(Revocation {
        seq: message.seq,
        tenant: message.tenant,
        target: Target::read(message.target, message.id),
        at: DateTime::from_timestamp_micros(message.at)?,
    })
}

/// All that some revocations make untrue, to go through a cache but once.
#[derive(Debug, Default)]
pub struct Gone {
    tenants: HashSet<Uuid>,
    plans: HashSet<Uuid>,
    keys: HashSet<Uuid>,
    tokens: HashSet<Uuid>,
    sessions: HashSet<Uuid>,
}

impl<'a> FromIterator<&'a Revocation> for Gone {
    fn from_iter<I: IntoIterator<Item = &'a Revocation>>(revocations: I) -> Self {
        let mut gone = Self::default();
        for revocation in revocations {
            match revocation.target {
                None | Some(Target::Tenant) => gone.tenants.insert(revocation.tenant),
                Some(Target::Plan(id)) => gone.plans.insert(id),
                Some(Target::ApiKey(id)) => gone.keys.insert(id),
                Some(Target::ServiceToken(id)) => gone.tokens.insert(id),
                Some(Target::Session(id)) => gone.sessions.insert(id),
            };
        }
        gone
    }
}

impl Gone {
    pub fn any_key(&self) -> bool {
        !(self.tenants.is_empty() && self.plans.is_empty() && self.keys.is_empty())
    }

    /// The ids of tenants, plans and keys: what a cached key belongs to.
    pub fn owners_of_keys(&self) -> impl Iterator<Item = &Uuid> {
        self.tenants.iter().chain(&self.plans).chain(&self.keys)
    }

    pub fn any_token(&self) -> bool {
        !(self.tenants.is_empty() && self.tokens.is_empty())
    }

    pub fn token(&self, tenant: Uuid, token: Uuid) -> bool {
        self.tenants.contains(&tenant) || self.tokens.contains(&token)
    }

    pub fn any_session(&self) -> bool {
        !(self.tenants.is_empty() && self.sessions.is_empty())
    }

    pub fn session(&self, tenant: Uuid, session: Uuid) -> bool {
        self.tenants.contains(&tenant) || self.sessions.contains(&session)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let id = Uuid::now_v7();
        for target in [
            Target::Tenant,
            Target::Plan(id),
            Target::ApiKey(id),
            Target::ServiceToken(id),
            Target::Session(id),
        ] {
            let revocation = Revocation {
                seq: 7,
                tenant: Uuid::now_v7(),
                target: Some(target),
                at: DateTime::from_timestamp_micros(1_785_738_360_123_456).unwrap(),
            };
            assert_eq!(read(&write(&revocation).unwrap()), Some(revocation));
        }
    }

    #[test]
    fn a_message_of_a_newer_version_is_for_the_whole_tenant_and_nonsense_for_nobody() {
        let tenant = Uuid::now_v7();
        let message = format!(
            r#"{{"seq":1,"tenant":"{tenant}","target":"ring","id":"{tenant}","at":5,"x":1}}"#
        );
        let read_one = read(message.as_bytes()).unwrap();
        assert_eq!((read_one.tenant, read_one.target), (tenant, None));
        for nonsense in [&b""[..], b"{}", b"\xff", b"[1,2]"] {
            assert_eq!(read(nonsense), None);
        }
    }
}
