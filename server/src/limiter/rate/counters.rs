//! The protocol of the shared counters: one call and its reply.
//!
//! Both the Redis script and the model in the tests implement it. Does not depend on connections or the state of keys.

use std::{error::Error, sync::Arc};

use async_trait::async_trait;
use quota_common::id::{ApiKeyId, TenantId};

use crate::clock::Nanos;

/// Microseconds since the Unix epoch, by the clock of the counters. Zero means that there is no time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct CounterMicros(pub u64);

impl CounterMicros {
    pub const NONE: Self = Self(0);

    pub const fn saturating_add(self, micros: u64) -> Self {
        Self(self.0.saturating_add(micros))
    }
}

/// See [`TakeCall::away_since`].
pub const NEVER_HEARD: CounterMicros = CounterMicros(1);

/// The owner of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BucketName {
    Key(TenantId, ApiKeyId),
    /// The owner to use for heartbeats, which do not refer to a key's bucket.
    Heartbeat,
}

/// One call: credits `back` unspent tokens to a bucket, then takes up to `want` tokens from it, or none if it holds
/// fewer than `need`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeCall {
    /// Buckets of one partition are kept together and lose their state together.
    pub partition: u16,
    pub bucket: BucketName,
    /// The time in which one token refills.
    pub emission: Nanos,
    /// The time from empty to full.
    pub tau: Nanos,
    /// Version of the plan. The counters use the newest version.
    pub version: u64,
    pub need: u64,
    /// Tokens that requests are waiting for now. Granted up to what the bucket holds.
    pub waiting: u64,
    /// The number of tokens to take, at least `waiting`. The rest is for later use, and is granted up to half of what
    /// the bucket holds. If zero, the call only reads the state.
    pub want: u64,
    /// Tokens taken before and not spent.
    pub back: u64,
    /// When the oldest of them was taken.
    pub back_taken_at: CounterMicros,
    /// The bucket's generation when they were taken. They are worthless in a later generation.
    pub back_generation: u64,
    /// How long granted tokens remain valid, in microseconds. Unspent ones are returned soon after.
    pub lease: u64,
    /// The counters' time in the latest reply from this partition that the caller received in time.
    pub last_heard: CounterMicros,
    /// When the caller started to serve without the counters; zero if it has not. Since then, it may have admitted
    /// requests that the counters do not know of. [`NEVER_HEARD`] if it has never had a reply and others may have
    /// admitted some.
    pub away_since: CounterMicros,
    /// Start of the new epoch that was promised to the caller's previous call, if it has served nothing since the epoch
    /// started; zero otherwise. It is valid for calls that arrive soon after that start. A call that arrives before it
    /// confirms that the caller knows the start, which is put off until somebody does.
    pub promised: CounterMicros,
}

/// The reply to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeReply {
    pub at: CounterMicros,
    pub state: BucketState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BucketState {
    /// The counters have lost their state. A new epoch starts in `wait` microseconds with every bucket empty. Until
    /// then, nothing is granted.
    Initializing { wait: u64 },
    Active {
        granted: u64,
        /// The time until the bucket is full, after the call.
        debt: Nanos,
        /// Changes when tokens granted before can no longer be credited.
        generation: u64,
    },
}

/// Why there was no reply. Tokens may have been taken anyway; they are lost until the bucket refills.
pub type CounterError = Arc<dyn Error + Send + Sync>;

/// The buckets that all replicas share.
///
/// A call is atomic and uses the counters' own clock: tokens granted by a reply were in the bucket at
/// [`TakeReply::at`]. Returned tokens make the bucket no fuller than if they had never been taken.
#[async_trait]
pub trait SharedCounters: std::fmt::Debug + Send + Sync + 'static {
    /// The number of partitions of the buckets. Each can lose its state separately.
    fn partitions(&self) -> u16;

    async fn take(&self, call: TakeCall) -> Result<TakeReply, CounterError>;

    /// Deletes buckets of one partition, which count as full from then on. For keys that no longer exist.
    async fn delete(&self, partition: u16, buckets: &[BucketName]) -> Result<(), CounterError>;
}
