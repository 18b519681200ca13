//! Key records that replicas share through Redis, as a layer between memory and PostgreSQL. These records save
//! PostgreSQL from looking up every key when a replica starts or a plan with many keys is edited.
//!
//! **Current entries.** Outdated entries do not have to be deleted: a replica determines whether an entry is current
//! when it reads the entry. PostgreSQL numbers invalidations in commit order. A statement that reads a record also
//! reads the highest number, so both come from the same snapshot. Therefore, only invalidations with higher numbers can
//! make an entry outdated. An entry is used only if the last poll for invalidations is recent, and only if this replica
//! does not know of a later invalidation for its key, plan, or tenant ([`Recent`]). The entry then counts as confirmed
//! at the time of the poll, not at the time when the entry was read. This has several consequences:
//! - If a load starts before a change but writes its entry after the change, the entry has a lower number than the
//!   change. Replicas that know of the change reject the entry. Other replicas learn of the change with their next
//!   poll, as they do for records in memory.
//! - Losing an invalidation message or the connection to Redis is safe.
//! - A change to a plan invalidates the entries of all its keys without listing them.
//!
//! Negative results are also cached: an invalid secret is remembered for a few seconds. These entries do not need a
//! number: secrets are random, so a secret is never looked up before it is created.
//!
//! **Trust.** Anyone with access to Redis could write entries. Each entry is stored under the hash of its secret, and
//! sealed for that hash with a key of this installation ([`Seal`]). Therefore, writing to Redis can make entries
//! unreadable, but cannot give a key more access. An entry also contains the time when it was written. An entry is
//! rejected soon after its lifetime ends, so that an old copy cannot be written back later. Unreadable entries, and
//! entries that are too old or from the future, are treated as missing. Entries from a different database history are
//! also ignored: after PostgreSQL has been restored from a backup, the same numbers are assigned a second time.
//!
//! While Redis is unreachable, every lookup is an immediate miss. If Redis does not respond, lookups in progress wait
//! for up to `QUOTA_REDIS_TIMEOUT`, and lookups during the next second skip Redis.

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
    clock::{Clock, Monotonic, Nanos},
    invalidations::Recent,
    redis::{CallError, Redis},
    repo::api_key::KeyFacts,
    seal::Seal,
    secret_text::Hash,
    spans,
    telemetry::metrics::Metrics,
};

/// Increment this number with every change to [`KeyFacts`] or to the meaning of one of its fields.
const VERSION: u8 = 3;
/// The maximum difference between the clocks of two replicas, in seconds.
const SKEW: u64 = 120;
/// How long an entry for a valid secret is kept.
const PRESENT: Duration = Duration::from_mins(5);
/// How long an entry for an invalid secret is kept.
const ABSENT: Duration = Duration::from_secs(10);
/// The maximum number of entries for invalid secrets that a replica writes per second.
const ABSENT_PER_SECOND: u64 = 200;
/// How long Redis is skipped after a failure.
const PAUSE: Nanos = Nanos::from_secs(1);

/// The shared records. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct SharedKeys(Arc<SharedState>);

/// The dependencies of [`SharedKeys`].
#[derive(Debug)]
pub struct SharedKeysContext {
    pub redis: Redis,
    pub seal: Seal,
    pub clock: Arc<dyn Clock>,
    pub recent: Arc<Recent>,
    pub freshness: Arc<Freshness>,
    pub metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct SharedState {
    context: SharedKeysContext,
    /// The monotonic time until which Redis is skipped.
    paused_until: AtomicU64,
    /// The last second in which entries for invalid secrets were written, and the number of entries in that second.
    absent_written: AtomicU64,
}

/// The content of an entry, and the monotonic time when it was known to be current.
#[derive(Debug)]
pub struct SharedRecord {
    pub facts: Option<KeyFacts>,
    /// The number of the newest invalidation when the data was read.
    pub as_of: i64,
    pub current_at: Monotonic,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry<F> {
    as_of: i64,
    /// When the entry was written, in seconds since the Unix epoch, on the clock of the replica that wrote it.
    at: u64,
    facts: Option<F>,
}

impl SharedKeys {
    pub fn new(context: SharedKeysContext) -> Self {
        Self(Arc::new(SharedState {
            context,
            paused_until: AtomicU64::new(0),
            absent_written: AtomicU64::new(0),
        }))
    }

    fn name(&self, hash: &Hash) -> String {
        let hash = URL_SAFE_NO_PAD.encode(hash);
        format!("{}:key{VERSION}:{hash}", self.0.context.redis.prefix())
    }

    /// Returns a secret's entry if the entry is known to be current.
    pub async fn get(&self, hash: &Hash) -> Option<SharedRecord> {
        let it = &self.0.context;
        let current_at = it.freshness.polled_lately()?;
        let history = it.recent.history()?;
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
        let Some(entry) = open::<KeyFacts>(&it.seal, &history, hash, &bytes) else {
            it.metrics.key_shared_unreadable.inc();
            return None;
        };
        if !entry.is_recent(it.clock.now().secs()) {
            it.metrics.key_shared_outdated.inc();
            return None;
        }
        if let Some(facts) = &entry.facts {
            // Check after Redis has responded, so that invalidations received while waiting are not missed.
            let about = [facts.tenant_id, facts.plan_id, facts.id];
            if !it.recent.unchanged(&about, entry.as_of) {
                it.metrics.key_shared_outdated.inc();
                return None;
            }
            it.metrics.key_shared_hits.inc();
        } else {
            it.metrics.key_shared_negative_hits.inc();
        }
        Some(SharedRecord {
            facts: entry.facts,
            as_of: entry.as_of,
            current_at,
        })
    }

    /// Shares a result from PostgreSQL. `found` contains the key's data and the number of the newest invalidation, or
    /// is `None` for an invalid secret. Does not wait for the entry to be written.
    pub fn put(&self, hash: &Hash, found: Option<(&KeyFacts, i64)>) {
        let it = &self.0.context;
        if self.is_paused() || (found.is_none() && !self.may_write_absent()) {
            return;
        }
        let entry = Entry {
            as_of: found.map_or(0, |(_, as_of)| as_of),
            at: it.clock.now().secs(),
            facts: found.map(|(facts, _)| facts),
        };
        let Some(history) = it.recent.history() else {
            return;
        };
        let Some(bytes) = close(&it.seal, &history, hash, &entry) else {
            return;
        };
        let keep = lifetime(found.is_some());
        let name = self.name(hash);
        let mut set = redis::cmd("SET");
        set.arg(&name).arg(bytes).arg("EX").arg(keep.as_secs());
        let this = self.clone();
        tokio::spawn(spans::within(spans::current(), async move {
            if let Err(failure) = this.0.context.redis.query(&name, &set).await {
                this.failed(&failure);
            }
        }));
    }

    fn is_paused(&self) -> bool {
        self.0.context.freshness.now().0 < self.0.paused_until.load(Ordering::Relaxed)
    }

    fn failed(&self, failure: &CallError) {
        self.0.context.metrics.key_shared_errors.inc();
        // Without a connection, calls fail immediately, so there is no need to pause.
        if !matches!(failure, CallError::NotConnected) {
            let until = self.0.context.freshness.now().saturating_add(PAUSE);
            self.0.paused_until.fetch_max(until.0, Ordering::Relaxed);
        }
    }

    fn may_write_absent(&self) -> bool {
        let second = self.0.context.freshness.now().0 / 1_000_000_000;
        is_within_rate(&self.0.absent_written, second)
    }
}

/// Counts an entry for an invalid secret, and returns whether the entry may be written. The upper bits of `written`
/// contain the second, and the lower 16 bits contain the count.
fn is_within_rate(written: &AtomicU64, second: u64) -> bool {
    let before = written.update(Ordering::Relaxed, Ordering::Relaxed, |old| {
        if old >> 16 == second {
            (old + 1).min(old | 0xffff)
        } else {
            (second << 16) | 1
        }
    });
    before >> 16 != second || before & 0xffff < ABSENT_PER_SECOND
}

const fn lifetime(has_facts: bool) -> Duration {
    if has_facts { PRESENT } else { ABSENT }
}

impl<F> Entry<F> {
    /// Returns whether the entry is within its lifetime, allowing for differences between clocks.
    fn is_recent(&self, now: u64) -> bool {
        let oldest = now.saturating_sub(lifetime(self.facts.is_some()).as_secs() + SKEW);
        (oldest..=now + SKEW).contains(&self.at)
    }
}

fn context<'a>(history: &'a str, hash: &'a Hash) -> [&'a [u8]; 4] {
    [b"key record", &[VERSION], history.as_bytes(), hash]
}

fn close<F: Serialize>(
    seal: &Seal,
    history: &str,
    hash: &Hash,
    entry: &Entry<F>,
) -> Option<Vec<u8>> {
    let content = serde_json::to_vec(entry).ok()?;
    Some(seal.close(&context(history, hash), &content))
}

fn open<F: for<'a> Deserialize<'a>>(
    seal: &Seal,
    history: &str,
    hash: &Hash,
    bytes: &[u8],
) -> Option<Entry<F>> {
    serde_json::from_slice(seal.open(&context(history, hash), bytes)?).ok()
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
            has_paid_access: true,
            paid_access_until: at(1_785_738_361),
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

    /// Entries can outlive the server that wrote them, and a newer version must not misread them.
    #[test]
    fn format_of_an_entry_changes_only_with_its_version() {
        assert_eq!(
            (VERSION, serde_json::to_value(entry()).unwrap()),
            (
                3,
                serde_json::json!({"as_of": 9, "at": AT, "facts": {
                    "tenant_id": "00000000-0000-0000-0000-000000000001",
                    "id": "00000000-0000-0000-0000-000000000002",
                    "plan_id": "00000000-0000-0000-0000-000000000003",
                    "prefix": "qk_abcd1234", "is_active": true, "expires_at": "2026-08-03T06:26:00.123456Z",
                    "rpm_override": 7, "plan_name": "Größe \u{1F600}", "default_rpm": 600, "burst": 60,
                    "daily_quota": 5, "monthly_quota": null, "strict": false,
                    "on_redis_failure": "closed", "billing": "paid", "has_paid_access": true,
                    "paid_access_until": "2026-08-03T06:26:01.123456Z", "time_zone": "Europe/Berlin",
                }})
            ),
            "raise VERSION"
        );
    }

    #[test]
    fn sealed_entry_opens_only_with_its_own_hash_and_key() {
        let bytes = close(&key(1), "a", &[7; 32], &entry()).unwrap();
        let opened = open::<KeyFacts>(&key(1), "a", &[7; 32], &bytes).unwrap();
        assert_eq!((opened.as_of, opened.facts), (9, Some(facts())));
        assert!(open::<KeyFacts>(&key(2), "a", &[7; 32], &bytes).is_none());
        assert!(open::<KeyFacts>(&key(1), "a", &[8; 32], &bytes).is_none());
        // PostgreSQL was restored, so the history is different.
        assert!(open::<KeyFacts>(&key(1), "b", &[7; 32], &bytes).is_none());
    }

    #[test]
    fn damaged_entry_is_none() {
        let entry = Entry {
            as_of: 0,
            at: AT,
            facts: None::<KeyFacts>,
        };
        let whole = close(&key(1), "a", &[7; 32], &entry).unwrap();
        assert!(open::<KeyFacts>(&key(1), "a", &[7; 32], &whole).is_some());
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            assert!(open::<KeyFacts>(&key(1), "a", &[7; 32], &bytes).is_none());
            assert!(open::<KeyFacts>(&key(1), "a", &[7; 32], &whole[..at]).is_none());
        }
    }

    #[test]
    fn entries_for_invalid_secrets_are_limited_in_every_second() {
        let written = AtomicU64::new(0);
        for second in [0, 1, 2, 7] {
            let counted = (0..70_000).filter(|_| is_within_rate(&written, second));
            assert_eq!(counted.count(), 200, "in second {second}");
        }
    }

    /// After an entry has expired in Redis, someone could write back an old copy of it.
    #[test]
    fn entries_from_the_past_or_future_are_rejected() {
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
