//! The contract that every limit store fulfills.
//!
//! While the quota ledger is unavailable, a store spends the blocks that it holds, and then returns a [`LimiterError`].
//! While the shared counters are unavailable, the plan's fallback setting applies: with `closed`, the store returns a
//! [`LimiterError`]; with `share` and `open`, the store decides, and marks the decision as degraded.

use std::{num::NonZeroU32, sync::Arc};

use async_trait::async_trait;
use quota_common::id::{ApiKeyId, TenantId};

use super::{
    decision::Decision,
    error::LimiterError,
    key::{handle::KeyHandle, ledger_calls::ReturnedQuota},
    limits::Policies,
    rate::counters::CounterError,
};
use crate::clock::Nanos;

/// Tracks usage of rates and quotas, and decides on requests.
///
/// Every store guarantees the following, for each key and all its policies together:
///
/// - *Atomic.* The cost is taken from every policy or from none. A denial consumes nothing.
/// - *Rate.* In any window of `T` seconds on the store's clock, at most `burst + rpm/60 * T` tokens are granted. With
///   leases, the lease TTL is added to `T`. The rate limit denies a request only if the bucket has too few tokens, with
///   one exception. After a replica has found too few tokens, it may deny requests for a while without calling the
///   counters again, although other replicas may have returned tokens. With leases, this lasts for up to two lease
///   TTLs; without leases, for at most the wait that was reported. While the clock stands still, buckets do not refill.
///   If the clock is set back, a request waits at most as long as its cost takes to refill. While the shared counters
///   are unavailable, the fallback setting determines what is allowed instead.
/// - *Quotas.* In any calendar window, at most `daily` and `monthly` tokens are granted, across restarts and crashes. A
///   crash loses at most one block, the tokens that requests were waiting for, and tokens that were being returned. A
///   block is at most a hundredth of the quota and at most 10,000 tokens, but at least one token. Draining returns all
///   unused tokens, unless the ledger does not confirm the return in time. A failed ledger call may lose the tokens
///   that it was supposed to take. A replica does not keep an unused block for long while other replicas may need it. A
///   change of time zone takes effect when the current window ends, or immediately if nothing was used in that window.
///   The next window lasts until the end of the day or month in the new zone, with a proportional quota. Windows never
///   overlap.
/// - *Edits.* Usage is kept when policies change: an edit does not refill a bucket or a quota. But a bucket that has
///   been idle until it was full under its last plan may be forgotten, and is then full under any plan.
/// - *Failure.* If no decision can be made, the result is a [`LimiterError`]; the request is never allowed.
#[async_trait]
pub trait LimitStore: std::fmt::Debug + Send + Sync + 'static {
    /// Returns a key's handle, which stays the same as long as the handle is in use or has state to keep.
    fn handle(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyHandle>, LimiterError>;

    /// Decides on a request without blocking. Returns `None` if a decision would require waiting.
    fn try_take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision>;

    /// Decides on a request, and waits if necessary. Dropping the future does not lose tokens.
    async fn take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError>;

    /// Returns the key's state as known to this replica, without taking tokens.
    fn peek(&self, handle: &KeyHandle, policies: &Policies) -> Decision;

    /// Returns the key's state without taking tokens. The state of the bucket comes from the shared counters. If there
    /// are no shared counters, or if they do not respond in time, returns the same as [`peek`](Self::peek).
    async fn inspect(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        self.peek(handle, policies)
    }

    /// Returns whether the buckets are in this process. If so, the limiter does not use the denial cache.
    fn is_local(&self) -> bool;

    /// Returns the maximum time for which a denial by the rate limit may be cached. The time is limited if other
    /// replicas may return leased tokens. `None` means that the denial may be cached for as long as any other denial.
    fn denial_memory(&self, _policies: &Policies) -> Option<Nanos> {
        None
    }

    /// Drops unreferenced keys whose state is equivalent to the state of a new key. If only a key's blocks prevent
    /// that, returns the blocks to the ledger, so that the next call can drop the key. If other replicas share the
    /// quotas, also returns other keys' blocks that have not been used for ten seconds. For keys in use, fetches the
    /// first block of the next day or month shortly before that day or month begins. Returns the number of remaining
    /// keys.
    fn prune(&self) -> usize;

    /// Deletes the state of deleted keys, on this replica and in the shared counters. On this replica, a key that is
    /// still referenced keeps its state until it is unreferenced and its bucket is full. Call only after every replica
    /// has stopped accepting the keys: another request would get a full bucket.
    async fn delete(&self, keys: &[(TenantId, ApiKeyId)]) -> Result<(), CounterError>;

    /// Returns all unused tokens to the ledger and the shared counters, if they respond in time, and stops taking
    /// tokens. Call before the process exits.
    async fn drain(&self) -> ReturnedQuota;
}
