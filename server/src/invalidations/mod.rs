//! Invalidations: publishes changes to other replicas, and keeps track of the changes received.
//!
//! A transaction that changes cached data also inserts a row into `revocations`. Each replica polls for new rows every
//! 150 ms. Polling alone is sufficient for correctness. After the commit, the change is also published through Redis,
//! so that most replicas learn of the change within milliseconds. Messages may be lost. If Redis is not configured or
//! is unreachable, no messages are sent.
//!
//! Messages are authenticated with a [`Seal`], because anyone with access to Redis can publish messages. Messages that
//! cannot be opened, are more than a few minutes old, or do not contain a new change are counted but otherwise ignored.
//!
//! This module knows the owners of cached rows, but not the caches. [`Recent`] contains the recent changes that this
//! replica knows of.

mod recent;

use std::{sync::Arc, time::Duration};

use chrono::DateTime;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use self::recent::Recent;
use crate::{
    cache::Owner,
    clock::UnixNanos,
    redis::{Redis, Subscription},
    repo::invalidation::{Invalidation, Target},
    seal::Seal,
    spans,
    telemetry::metrics::Metrics,
};

/// The context in which messages are sealed. Must be changed whenever the meaning of a field changes.
const CONTEXT: &[&[u8]] = &[b"invalidation 1"];
/// The maximum difference between a message's time and this replica's time. The clocks of a replica and PostgreSQL may
/// differ by up to two minutes, and messages arrive quickly. Older changes have already been found by polling.
const MAX_AGE: Duration = Duration::from_mins(5);

/// A message. Other versions of the server also read messages, so fields may be added, but the meaning of existing
/// fields must not change unless [`CONTEXT`] changes too.
#[derive(Serialize, Deserialize)]
struct Message<'a> {
    seq: i64,
    tenant: Uuid,
    target: &'a str,
    id: Uuid,
    /// Microseconds since the Unix epoch, on PostgreSQL's clock.
    at: i64,
}

/// Publishes changes, and receives changes from other replicas. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Publisher {
    redis: Option<Redis>,
    channel: Arc<str>,
    seal: Arc<Seal>,
    metrics: Arc<Metrics>,
}

/// Returns the channel that every replica subscribes to.
pub fn channel(prefix: &str) -> String {
    format!("{prefix}:revoked")
}

impl Publisher {
    pub fn new(redis: Option<Redis>, seal: Seal, metrics: Arc<Metrics>) -> Self {
        Self {
            channel: channel(redis.as_ref().map_or("", Redis::prefix)).into(),
            redis,
            seal: Arc::new(seal),
            metrics,
        }
    }

    /// Publishes a committed change. Does not block: the message is sent in the background.
    pub fn publish(&self, invalidation: &Invalidation) {
        let (Some(redis), Some(message)) = (self.redis.clone(), write(&self.seal, invalidation))
        else {
            return;
        };
        let publisher = self.clone();
        let publishing = async move {
            let mut publish = redis::cmd("PUBLISH");
            publish.arg(&*publisher.channel).arg(message);
            match redis.query(&publisher.channel, &publish).await {
                Ok(_) => {
                    publisher.metrics.invalidations_published.inc();
                }
                Err(error) => {
                    publisher.metrics.invalidation_publish_errors.inc();
                    tracing::debug!(error = %error, "cannot publish an invalidation");
                }
            }
        };
        tokio::spawn(spans::within(spans::current(), publishing));
    }

    /// Subscribes to published changes. Returns `None` if Redis is not configured.
    pub fn listen(&self) -> Option<Subscription> {
        let redis = self.redis.as_ref()?;
        Some(redis.subscribe(self.channel.to_string()))
    }

    /// Parses a message. Returns `None` unless a replica of this installation sealed the message recently.
    pub fn read(&self, message: &[u8], now: UnixNanos) -> Option<Invalidation> {
        read(&self.seal, message, now)
    }
}

fn write(seal: &Seal, invalidation: &Invalidation) -> Option<Vec<u8>> {
    let target = invalidation.target?;
    let message = Message {
        seq: invalidation.seq,
        tenant: invalidation.tenant,
        target: target.name(),
        id: target.id(invalidation.tenant),
        at: invalidation.at.timestamp_micros(),
    };
    let content = serde_json::to_vec(&message).ok()?;
    Some(seal.close(CONTEXT, &content))
}

fn read(seal: &Seal, message: &[u8], now: UnixNanos) -> Option<Invalidation> {
    let content = seal.open(CONTEXT, message)?;
    let message = serde_json::from_slice::<Message<'_>>(content).ok()?;
    let now = i64::try_from(now.0 / 1000).ok()?;
    if u128::from(now.abs_diff(message.at)) > MAX_AGE.as_micros() {
        return None;
    }
    Some(Invalidation {
        seq: message.seq,
        tenant: message.tenant,
        target: Target::read(message.target, message.id),
        at: DateTime::from_timestamp_micros(message.at)?,
    })
}

impl From<&Invalidation> for Owner {
    /// Returns the owner of the cached rows that a change affects. An unknown target affects the whole tenant.
    fn from(invalidation: &Invalidation) -> Self {
        match invalidation.target {
            None | Some(Target::Tenant) => Self::Tenant(invalidation.tenant),
            Some(Target::Plan(id)) => Self::Plan(id),
            Some(Target::ApiKey(id)) => Self::Key(id),
            Some(Target::ServiceToken(id)) => Self::ServiceToken(id),
            Some(Target::Session(id)) => Self::Session(id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: i64 = 1_785_738_360_123_456;
    const NOW: UnixNanos = UnixNanos::from_secs(1_785_738_360);

    fn seal(byte: u8) -> Seal {
        Seal::new(&[byte; 32], None)
    }

    fn invalidation(target: Target) -> Invalidation {
        Invalidation {
            seq: 7,
            tenant: Uuid::from_u128(1),
            target: Some(target),
            at: DateTime::from_timestamp_micros(AT).unwrap(),
        }
    }

    fn after(secs: u64) -> UnixNanos {
        UnixNanos::from_secs(NOW.secs() + secs)
    }

    #[test]
    fn message_round_trips() {
        let id = Uuid::now_v7();
        for target in [
            Target::Tenant,
            Target::Plan(id),
            Target::ApiKey(id),
            Target::ServiceToken(id),
            Target::Session(id),
        ] {
            let invalidation = invalidation(target);
            let message = write(&seal(1), &invalidation).unwrap();
            assert_eq!(read(&seal(1), &message, NOW), Some(invalidation));
            assert_eq!(read(&seal(2), &message, NOW), None, "another installation");
        }
    }

    #[test]
    fn old_message_or_one_from_the_future_is_ignored() {
        let message = write(&seal(1), &invalidation(Target::Tenant)).unwrap();
        let is_accepted = |now| read(&seal(1), &message, now).is_some();
        assert!(is_accepted(after(120)) && is_accepted(UnixNanos::from_secs(NOW.secs() - 120)));
        assert!(!is_accepted(after(301)) && !is_accepted(UnixNanos::from_secs(NOW.secs() - 301)));
    }

    #[test]
    fn truncated_or_unsealed_message_is_ignored() {
        let message = write(&seal(1), &invalidation(Target::Tenant)).unwrap();
        for at in 0..message.len() {
            assert_eq!(read(&seal(1), &message[..at], NOW), None, "{at}");
        }
        let (_, content) = message.split_at(crate::seal::TAG);
        assert_eq!(read(&seal(1), content, NOW), None);
    }

    #[test]
    fn unknown_target_invalidates_the_whole_tenant_and_nonsense_nothing() {
        let tenant = Uuid::now_v7();
        let message = format!(
            r#"{{"seq":1,"tenant":"{tenant}","target":"ring","id":"{tenant}","at":{AT},"x":1}}"#
        );
        let sealed = |content: &[u8]| seal(1).close(CONTEXT, content);
        let read_one = read(&seal(1), &sealed(message.as_bytes()), NOW).unwrap();
        assert_eq!((read_one.tenant, read_one.target), (tenant, None));
        assert_eq!(Owner::from(&read_one), Owner::Tenant(tenant));
        for nonsense in [&b""[..], b"{}", b"\xff", b"[1,2]"] {
            assert_eq!(read(&seal(1), &sealed(nonsense), NOW), None);
        }
    }
}
