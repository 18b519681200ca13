//! What the shared counters are asked and answer, whoever keeps them.
//!
//! Owns the words of one call, which the Redis script and the model in the simulation both speak. Knows no
//! connection and no key's cell.

use std::{error::Error, sync::Arc};

use async_trait::async_trait;
use quota_common::id::{ApiKeyId, TenantId};

/// Microseconds since the Unix epoch by the counters' own clock.
pub type CounterMicros = u64;

/// Whose bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BucketName {
    Key(TenantId, ApiKeyId),
    /// Nobody's: asked for to see whether the counters answer.
    Beat,
}

/// One call: take `want` tokens of a bucket, or as many as there are but no fewer than `need`, or none; and
/// give others back before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeCall {
    /// Buckets of one partition are kept together and lose their state together.
    pub partition: u16,
    pub bucket: BucketName,
    /// Nanoseconds a token takes to come back.
    pub emission: u64,
    /// Nanoseconds from empty to full.
    pub tau: u64,
    /// Of the plan; the counters keep to the newest that they have seen.
    pub version: u64,
    pub need: u64,
    /// Zero: only look.
    pub want: u64,
    /// Tokens taken before and not spent.
    pub back: u64,
    /// When the earliest of them was taken.
    pub back_taken_at: CounterMicros,
    /// For how many microseconds tokens may be spent; they come back soon after.
    pub lease: CounterMicros,
    /// The counters' time in the last answer that the caller had of this partition.
    pub last_heard: CounterMicros,
    /// Since when the caller has served without the counters; zero when it has not. Tokens may have been
    /// sold since that the counters know nothing of.
    pub away_since: CounterMicros,
    /// The new beginning that the caller was told of since then; zero when it was not.
    pub promised: CounterMicros,
}

/// The answer to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeReply {
    pub at: CounterMicros,
    pub state: BucketState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BucketState {
    /// The counters have lost what they knew; they begin anew, with every bucket empty, in so many
    /// microseconds. Until then nothing is granted.
    Beginning { wait: u64 },
    Known {
        /// How many tokens were taken.
        granted: u64,
        /// Nanoseconds until the bucket is full, after the call.
        debt: u64,
    },
}

/// Why there was no answer. Tokens may have been taken all the same: they are lost to the bucket.
pub type CounterError = Arc<dyn Error + Send + Sync>;

/// Buckets that all replicas share.
///
/// A call is atomic, and its time is the counters' own. Where [`TakeReply::at`] says `t`, the tokens granted
/// were in the bucket at `t`. What is given back makes the bucket no fuller than if it had never been taken.
#[async_trait]
pub trait SharedCounters: std::fmt::Debug + Send + Sync + 'static {
    /// In how many parts the buckets are kept, each with a state to lose of its own.
    fn partitions(&self) -> u16;

    async fn take(&self, call: TakeCall) -> Result<TakeReply, CounterError>;
}
