//! Key records that replicas share through Redis, between each one's own memory and PostgreSQL: when a replica
//! starts, or a plan with many keys is changed, PostgreSQL does not have to answer a look-up for every key.
//!
//! **Whether an entry is true** does not depend on its having been deleted in time, nor on who wrote it when.
//! PostgreSQL numbers revocations in the order of their commits, and a record is read in one statement, so in one
//! snapshot, together with the highest number there is. An entry with number `n` is then true except for what was
//! revoked above `n`. It is used only while the poll for revocations is fresh, and only if none above `n` concerns its
//! key, plan or tenant, as far as this replica has learnt ([`Recent`]); and it is believed from the time of that poll
//! on, not from when it was found. So:
//! - a load that began before a change and writes after it writes a number below the change's: readers who know of
//!   the change refuse it, and those who do not yet learn of it within a poll, as with any copy in memory;
//! - an invalidation that is lost, or a Redis that was unreachable while one was sent, changes nothing;
//! - a change makes the entries of all of a plan's keys untrue at once, without naming them.
//!
//! That a secret is invalid is remembered too, for a few seconds. This needs no number: secrets are random, so
//! nobody looks one up before it is created.
//!
//! **Who may write entries.** Anyone who can write to Redis. Entries are found by the hash of the key's secret. They
//! are sealed for that hash, under a key of this installation ([`Seal`]): whoever writes to Redis can make an entry
//! unreadable, but cannot make a key do what it may not. An entry also holds the time at which it was written, and is
//! refused once Redis should have forgotten it, so that a saved entry cannot be put back later. Entries that are
//! unreadable, too old or from the future count as misses.
//!
//! While Redis is unreachable everything is a miss, immediately; while it is slow, one look-up waits for
//! QUOTA_REDIS_TIMEOUT and those of the next second do not ask.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use redis::Value;
use serde::{Deserialize, Serialize};

use crate::{
    cache::Freshness,
    clock::Clock,
    redis::{Failure, Redis},
    repo::api_key::KeyFacts,
    revocations::Recent,
    seal::Seal,
    secret_text::Hash,
    telemetry::metrics::Metrics,
};

/// Raise it with every change of [`KeyFacts`] or of what a field of it means.
const VERSION: u8 = 2;
/// How far the clocks of two replicas may differ, in seconds.
const SKEW: u64 = 120;
/// How long an entry is kept.
const PRESENT: Duration = Duration::from_mins(5);
const ABSENT: Duration = Duration::from_secs(10);
/// How many entries about texts that open nothing a replica writes in a second.
const ABSENT_A_SECOND: u64 = 200;
/// How long Redis is not asked after it failed.
const PAUSE: u64 = 1_000_000_000;

/// What the other replicas have read, and are told. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SharedKeys(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    redis: Redis,
    seal: Seal,
    clock: Arc<dyn Clock>,
    recent: Arc<Recent>,
    freshness: Arc<Freshness>,
    metrics: Arc<Metrics>,
    /// Monotonic time before which Redis is not asked.
    paused_until: AtomicU64,
    /// The second in which entries about nothing were last written, and how many.
    absent_written: AtomicU64,
}

/// What an entry says of a text, and of when it is known to be so by the monotonic clock.
#[derive(Debug)]
pub struct Found {
    pub facts: Option<KeyFacts>,
    /// The number that the facts were read with.
    pub as_of: i64,
    pub true_at: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry<F> {
    as_of: i64,
    /// Seconds since 1970, by the clock of the replica that wrote it.
    at: u64,
    facts: Option<F>,
}

impl SharedKeys {
    pub fn new(
        redis: Redis,
        seal: Seal,
        clock: Arc<dyn Clock>,
        recent: Arc<Recent>,
        freshness: Arc<Freshness>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self(Arc::new(Parts {
            redis,
            seal,
            clock,
            recent,
            freshness,
            metrics,
            paused_until: AtomicU64::new(0),
            absent_written: AtomicU64::new(0),
        }))
    }

    fn name(&self, hash: &Hash) -> String {
        let hash = URL_SAFE_NO_PAD.encode(hash);
        format!("{}:key{VERSION}:{hash}", self.0.redis.prefix())
    }

    /// What is known of a text, if it can be told to be true.
    pub async fn get(&self, hash: &Hash) -> Option<Found> {
        let it = &*self.0;
        let true_at = it.freshness.polled_lately()?;
        if self.is_paused() {
            return None;
        }
        let name = self.name(hash);
        let mut get = redis::cmd("GET");
        get.arg(&name);
        let bytes = match it.redis.query(&name, &get).await {
            Ok(Value::BulkString(bytes)) => bytes,
            Ok(_) => {
                it.metrics.key_shared_misses.inc();
                return None;
            }
            Err(failure) => {
                self.failed(&failure);
                return None;
            }
        };
        let Some(entry) = open::<KeyFacts>(&it.seal, hash, &bytes) else {
            it.metrics.key_shared_unreadable.inc();
            return None;
        };
        if !entry.is_recent(it.clock.now().secs()) {
            it.metrics.key_shared_outdated.inc();
            return None;
        }
        if let Some(facts) = &entry.facts {
            // After the answer, so that nothing that was learnt meanwhile is overlooked.
            let about = [facts.tenant_id, facts.plan_id, facts.id];
            if !it.recent.unchanged(&about, entry.as_of) {
                it.metrics.key_shared_outdated.inc();
                return None;
            }
            it.metrics.key_shared_hits.inc();
        } else {
            it.metrics.key_shared_negative_hits.inc();
        }
        Some(Found {
            facts: entry.facts,
            as_of: entry.as_of,
            true_at,
        })
    }

    /// Tells the others what PostgreSQL said, in the background: facts, with the number that they were read with.
    pub fn put(&self, hash: &Hash, found: Option<(&KeyFacts, i64)>) {
        let it = &*self.0;
        if self.is_paused() || (found.is_none() && !self.may_write_absent()) {
            return;
        }
        let entry = Entry {
            as_of: found.map_or(0, |(_, as_of)| as_of),
            at: it.clock.now().secs(),
            facts: found.map(|(facts, _)| facts),
        };
        let Some(bytes) = close(&it.seal, hash, &entry) else {
            return;
        };
        let keep = lifetime(found.is_some());
        let name = self.name(hash);
        let mut set = redis::cmd("SET");
        set.arg(&name).arg(bytes).arg("EX").arg(keep.as_secs());
        let this = self.clone();
        tokio::spawn(async move {
            if let Err(failure) = this.0.redis.query(&name, &set).await {
                this.failed(&failure);
            }
        });
    }

    fn is_paused(&self) -> bool {
        self.0.freshness.now() < self.0.paused_until.load(Ordering::Relaxed)
    }

    fn failed(&self, failure: &Failure) {
        self.0.metrics.key_shared_errors.inc();
        // Without a connection the failure costs nothing.
        if !matches!(failure, Failure::Away) {
            let until = self.0.freshness.now() + PAUSE;
            self.0.paused_until.fetch_max(until, Ordering::Relaxed);
        }
    }

    fn may_write_absent(&self) -> bool {
        // The second in the upper bits, the count in the lower ones.
        let second = self.0.freshness.now() / 1_000_000_000;
        let counted = self
            .0
            .absent_written
            .update(Ordering::Relaxed, Ordering::Relaxed, |old| {
                if old >> 16 == second {
                    (old + 1).min(old | 0xffff)
                } else {
                    second << 16
                }
            });
        counted >> 16 != second || counted & 0xffff < ABSENT_A_SECOND
    }
}

/// How long an entry is kept, with facts or without.
const fn lifetime(has_facts: bool) -> Duration {
    if has_facts { PRESENT } else { ABSENT }
}

impl<F> Entry<F> {
    /// Whether Redis may still have it: it was written within its lifetime, as far as clocks agree.
    fn is_recent(&self, now: u64) -> bool {
        let oldest = now.saturating_sub(lifetime(self.facts.is_some()).as_secs() + SKEW);
        (oldest..=now + SKEW).contains(&self.at)
    }
}

fn context(hash: &Hash) -> [&[u8]; 3] {
    [b"key record", &[VERSION], hash]
}

fn close<F: Serialize>(seal: &Seal, hash: &Hash, entry: &Entry<F>) -> Option<Vec<u8>> {
    let content = serde_json::to_vec(entry).ok()?;
    Some(seal.close(&context(hash), &content))
}

fn open<F: for<'a> Deserialize<'a>>(seal: &Seal, hash: &Hash, bytes: &[u8]) -> Option<Entry<F>> {
    serde_json::from_slice(seal.open(&context(hash), bytes)?).ok()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn facts() -> KeyFacts {
        let at = |secs| chrono::DateTime::from_timestamp(secs, 123_456_000);
        KeyFacts {
            tenant_id: Uuid::from_u128(1),
            id: Uuid::from_u128(2),
            plan_id: Uuid::from_u128(3),
            prefix: "qk_abcd1234".into(),
            is_active: true,
            expires_at: at(1_785_738_360),
            rpm_override: Some(7),
            plan_name: "Größe \u{1F600}".into(),
            default_rpm: 600,
            burst: 60,
            daily_quota: Some(5),
            monthly_quota: None,
            strict: false,
            on_redis_failure: Some("closed".into()),
            billing: "paid".into(),
            time_zone: "Europe/Berlin".into(),
        }
    }

    const AT: u64 = 1_785_738_360;

    fn key(byte: u8) -> Seal {
        Seal::new(&[byte; 32], None)
    }

    fn entry() -> Entry<KeyFacts> {
        Entry {
            as_of: 9,
            at: AT,
            facts: Some(facts()),
        }
    }

    /// An entry outlives the server that wrote it: a new one must not read it as something else.
    #[test]
    fn the_form_of_an_entry_changes_with_its_version_alone() {
        assert_eq!(
            (VERSION, serde_json::to_value(entry()).unwrap()),
            (
                2,
                serde_json::json!({"as_of": 9, "at": AT, "facts": {
                    "tenant_id": "00000000-0000-0000-0000-000000000001",
                    "id": "00000000-0000-0000-0000-000000000002",
                    "plan_id": "00000000-0000-0000-0000-000000000003",
                    "prefix": "qk_abcd1234", "is_active": true, "expires_at": "2026-08-03T06:26:00.123456Z",
                    "rpm_override": 7, "plan_name": "Größe \u{1F600}", "default_rpm": 600, "burst": 60,
                    "daily_quota": 5, "monthly_quota": null, "strict": false,
                    "on_redis_failure": "closed", "billing": "paid", "time_zone": "Europe/Berlin",
                }})
            ),
            "raise VERSION"
        );
    }

    #[test]
    fn what_is_closed_can_be_opened_under_its_own_hash_and_key_alone() {
        let bytes = close(&key(1), &[7; 32], &entry()).unwrap();
        let opened = open::<KeyFacts>(&key(1), &[7; 32], &bytes).unwrap();
        assert_eq!((opened.as_of, opened.facts), (9, Some(facts())));
        assert!(open::<KeyFacts>(&key(2), &[7; 32], &bytes).is_none());
        assert!(open::<KeyFacts>(&key(1), &[8; 32], &bytes).is_none());
    }

    #[test]
    fn a_damaged_entry_is_none() {
        let entry = Entry {
            as_of: 0,
            at: AT,
            facts: None::<KeyFacts>,
        };
        let whole = close(&key(1), &[7; 32], &entry).unwrap();
        assert!(open::<KeyFacts>(&key(1), &[7; 32], &whole).is_some());
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            assert!(open::<KeyFacts>(&key(1), &[7; 32], &bytes).is_none());
            assert!(open::<KeyFacts>(&key(1), &[7; 32], &whole[..at]).is_none());
        }
    }

    /// A saved entry that is put back after Redis has forgotten it.
    #[test]
    fn an_entry_is_refused_once_it_should_be_gone_and_before_it_was_written() {
        let recent = |now| entry().is_recent(now);
        assert!(recent(AT) && recent(AT + 300) && recent(AT + 420) && recent(AT - 120));
        assert!(!recent(AT + 421) && !recent(AT + 86_400) && !recent(AT - 121));
        let absent = Entry {
            as_of: 0,
            at: AT,
            facts: None::<KeyFacts>,
        };
        assert!(absent.is_recent(AT + 130) && !absent.is_recent(AT + 131));
    }
}
