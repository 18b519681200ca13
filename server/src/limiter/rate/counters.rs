//! The protocol of the shared counters: one call and its reply.
//!
//! The Redis script and, in tests, a model of the script implement this protocol. The protocol does not depend on
//! connections or the state of keys.

use std::{error::Error, sync::Arc};

use async_trait::async_trait;
use quota_common::id::{ApiKeyId, TenantId};

use crate::clock::Nanos;

/// A time on the counters' clock, in microseconds since the Unix epoch. Zero means that there is no such time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct CounterMicros(pub u64);

impl CounterMicros {
    pub const NONE: Self = Self(0);

    pub const fn saturating_add(self, micros: u64) -> Self {
        Self(self.0.saturating_add(micros))
    }
}

/// See [`TakeCall::outage_since`].
pub const NEVER_HEARD: CounterMicros = CounterMicros(1);

/// Identifies a bucket in a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BucketName {
    Key(TenantId, ApiKeyId),
    /// Used for heartbeats, which do not affect any key's bucket.
    Heartbeat,
}

/// One call: credits `back` unspent tokens to a bucket, then takes up to `want` tokens from the bucket, or none if the
/// bucket holds fewer than `need`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeCall {
    /// All buckets of a partition are stored together and lose their state together.
    pub partition: u16,
    pub bucket: BucketName,
    /// How long one token takes to refill.
    pub emission: Nanos,
    /// How long an empty bucket takes to refill completely.
    pub tau: Nanos,
    /// The plan's version. If callers send different versions, the counters use the newest one that is in use.
    pub version: u64,
    pub need: u64,
    /// The number of tokens that requests are waiting for, or that should be granted as if requests were waiting for
    /// them. If the bucket holds fewer tokens, all of them are granted.
    pub waiting: u64,
    /// The total number of tokens to take, at least `waiting`. Tokens in excess of `waiting` are for later. A grant
    /// that includes such tokens is at most half of what the bucket holds. If `want` is zero, no tokens are taken.
    pub want: u64,
    /// The number of unspent tokens to return.
    pub back: u64,
    /// When the oldest of the returned tokens was taken.
    pub back_taken_at: CounterMicros,
    /// The bucket's generation when the returned tokens were taken. In a later generation, the tokens are not credited.
    pub back_generation: u64,
    /// The lease TTL in microseconds. Unspent tokens are returned soon after this time.
    pub lease: u64,
    /// Microseconds from a loss of state, or an outage of all callers, to the start of a new epoch.
    pub epoch_delay: u64,
    /// Microseconds after which the caller counts the response as late.
    pub deadline: u64,
    /// The counters' time in the latest timely reply from this partition.
    pub last_heard: CounterMicros,
    /// When the caller began to decide without the counters, or zero if the call does not report an outage. Since that
    /// time, the caller may have allowed requests that the counters do not know of. [`NEVER_HEARD`] if the caller has
    /// never received a reply and other replicas may have allowed such requests.
    pub outage_since: CounterMicros,
    /// Start of the epoch that the previous reply promised, if the caller has not allowed any request since that start;
    /// zero otherwise. A call that arrives before the start confirms that the caller knows the start. The counters
    /// postpone the start until a caller has confirmed the start. A call that arrives soon after the start uses the
    /// promised epoch instead of starting another epoch.
    pub promised: CounterMicros,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeReply {
    pub at: CounterMicros,
    pub state: BucketState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BucketState {
    /// The counters have lost their state, or callers have decided requests without the counters. A new epoch starts in
    /// `wait` microseconds with every bucket empty. Until then, no tokens are granted. (A caller that would start
    /// another epoch while the current one has just begun also gets this state, and may call again after `wait`.)
    Initializing { wait: u64 },
    Active {
        granted: u64,
        /// The time until the bucket is full, as of the end of the call.
        debt: Nanos,
        /// Changes when tokens granted earlier can no longer be credited.
        generation: u64,
    },
}

/// Why a call failed. Tokens may have been taken anyway. In that case, the tokens are unavailable until the bucket
/// refills.
pub type CounterError = Arc<dyn Error + Send + Sync>;

/// The buckets that all replicas share.
///
/// A call is atomic and uses the counters' own clock: the granted tokens were in the bucket at [`TakeReply::at`].
/// Returning tokens never makes the bucket fuller than if they had not been taken.
#[async_trait]
pub trait SharedCounters: std::fmt::Debug + Send + Sync + 'static {
    /// Returns the number of partitions. Each partition can lose its state separately.
    fn partitions(&self) -> u16;

    async fn take(&self, call: TakeCall) -> Result<TakeReply, CounterError>;

    /// Deletes buckets of one partition because their keys no longer exist. A deleted bucket counts as full.
    async fn delete(&self, partition: u16, buckets: &[BucketName]) -> Result<(), CounterError>;
}
