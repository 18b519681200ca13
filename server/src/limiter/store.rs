//! The contract of a store of limits.
//!
//! If the quota ledger fails, a store returns a [`LimiterError`] once the blocks it holds are spent. If the shared
//! counters are unavailable, the plan's fallback setting applies: `closed` is a [`LimiterError`], while `share` and
//! `open` still decide and mark their decisions as degraded.

use std::{num::NonZeroU32, sync::Arc};

use async_trait::async_trait;
use quota_common::id::{ApiKeyId, TenantId};

use super::{
    decision::Decision,
    error::LimiterError,
    key::{handle::KeyHandle, ledger_calls::Drained},
    limits::Policies,
    rate::counters::CounterError,
};
use crate::clock::Nanos;

/// A store of limits.
///
/// Every store makes the same promises, for each key and all its policies together:
///
/// - *Atomic.* The cost is taken from every policy, or from none. A denial consumes nothing.
/// - *Rate.* In any window of `T` seconds of the store's clock, at most `burst + rpm/60 * T` is allowed (with leases,
///   `T` plus the lease TTL), and no request is denied for which the bucket has enough tokens. A stopped clock refills
///   nothing. A clock that is set back delays a request for no longer than its cost takes to refill.
/// - *Quotas.* In any calendar window, at most `daily` and `monthly` are allowed, across restarts and crashes. A crash
///   loses at most one block (a hundredth of the quota, and at most 10,000 tokens) and the tokens that requests were
///   waiting for; draining loses nothing. No replica holds an unused block for long while others need it. A change of
///   time zone takes effect when the window ends, or immediately if nothing was used in it. The next window ends with
///   the first day or month of the new zone, with a proportional quota. Windows never overlap.
/// - *Edits.* Usage survives a change of policies: an edit never grants a new bucket or quota.
/// - *Failure.* If no decision can be made, the result is a [`LimiterError`], never an admission.
#[async_trait]
pub trait LimitStore: std::fmt::Debug + Send + Sync + 'static {
    /// Returns the handle of a key, which stays the same while it is in use or its bucket is not full.
    fn handle(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyHandle>, LimiterError>;

    /// Decides without blocking. Returns `None` if it would have to wait.
    fn try_take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision>;

    /// Decides, and waits if necessary. Dropping the future loses no tokens.
    async fn take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError>;

    /// Returns the key's state as known locally. Consumes nothing.
    fn peek(&self, handle: &KeyHandle, policies: &Policies) -> Decision;

    /// Returns the state of the key, with the rate as used by all replicas. Takes nothing. The same as
    /// [`peek`](Self::peek) if the store is local or the counters do not respond in time.
    async fn inspect(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        self.peek(handle, policies)
    }

    /// Returns whether a decision takes no I/O. If so, no denial cache is used in front of the store.
    fn is_local(&self) -> bool;

    /// Returns how long a denial by the rate may be cached. `None` stands for the wait that the denial states. The time
    /// is shorter if other replicas may return tokens.
    fn denial_memory(&self, _policies: &Policies) -> Option<Nanos> {
        None
    }

    /// Drops unreferenced keys whose state equals that of a new one. Returns the blocks of other unreferenced keys, so
    /// that they can be dropped next time and, if other replicas share the quotas, the blocks of referenced keys that
    /// were not used for ten seconds. Fetches the first block of the next day or month for keys in use. Returns the
    /// number of remaining keys.
    fn prune(&self) -> usize;

    /// Deletes the state of deleted keys, on this replica and in the shared counters. On this replica, a key that is
    /// still referenced keeps its state until it is unreferenced and its bucket is full. Call only after every replica
    /// has stopped accepting the keys: another request would get a full bucket.
    async fn delete(&self, keys: &[(TenantId, ApiKeyId)]) -> Result<(), CounterError>;

    /// Returns all unused tokens and takes no more, before the process exits.
    async fn drain(&self) -> Drained;
}
