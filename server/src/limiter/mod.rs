//! The decision: may this key do this now?
//!
//! Owns rates, calendar quotas and what is spent of them. Knows no HTTP, no SQL, no key text: a caller brings
//! the key's handle and its policies, both kept in the key's cached record, and gets a [`Decision`]. When the
//! ledger of calendar quotas is down, keys without such quotas do not notice; others are served from what is in
//! hand and then answered with an error, never admitted.
//!
//! ```text
//! what is in hand -> gate (remote stores only) -> store (all policies, or none) -> decision
//! ```

mod client_guard;
mod decision;
mod denial_cache;
mod distributed;
mod key;
mod local;
mod membership;
mod policy;
mod quota;
mod rate;
mod store;

use std::{num::NonZeroU32, sync::Arc};

use quota_common::id::{ApiKeyId, TenantId};

pub use self::{
    client_guard::{ClientNetwork, ClientRateLimiter, TooManyRequests},
    decision::{Decision, Outcome, PolicyState},
    distributed::{DistributedSettings, DistributedStore, RedisCounters},
    key::table::KeyTableSettings,
    local::LocalStore,
    membership::{COUNTED_EVERY, FORGOTTEN, Membership, ReplicaSlot},
    policy::{Policies, Policy, PolicySet, RatePolicy},
    quota::{
        block::{LedgerError, LedgerRow, QuotaLedger, ReturnBatch, TakeRequest, Taken},
        calendar::{QuotaWindow, UnknownZone, Window, Zone, hour_end, window, window_at},
    },
    rate::{
        counters::{
            BucketName, BucketState, CounterError, CounterMicros, SharedCounters, TakeCall,
            TakeReply,
        },
        gcra::{Gcra, Verdict},
    },
    store::{Drained, KeyHandle, LimitStore, LimiterError},
};
use crate::clock::Clock;

/// How often [`Limiter::prune`] is to be called.
pub const PRUNE_EVERY: std::time::Duration = std::time::Duration::from_secs(10);

/// Decides requests by a store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Limiter {
    store: Arc<dyn LimitStore>,
    clock: Arc<dyn Clock>,
    /// Of the store; asked once.
    is_local: bool,
}

impl Limiter {
    pub fn new(store: Arc<dyn LimitStore>, clock: Arc<dyn Clock>) -> Self {
        Self {
            is_local: store.is_local(),
            store,
            clock,
        }
    }

    /// The handle of a key, to be kept in its cached record. The same key gets the same handle for as long as
    /// anybody keeps it, so a record that is loaded again finds what was spent.
    pub fn handle(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyHandle>, LimiterError> {
        self.store.handle(tenant, key)
    }

    /// Decides from memory: no waiting, no allocation, one look at the clock. `None` when it would have to
    /// wait: ask [`admit`](Self::admit).
    #[inline]
    pub fn try_admit(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision> {
        if self.is_local {
            return self.store.try_take(handle, policies, cost);
        }
        let Some(decision) = self.store.try_take(handle, policies, cost) else {
            return handle.denials.find(policies, cost, &self.clock);
        };
        self.remember(handle, policies, cost, &decision, self.clock.monotonic());
        Some(decision)
    }

    /// Decides, waiting for the store if it must. A caller may go away while it waits: then nothing was
    /// taken, or what was taken is spent by the key's next request.
    pub async fn admit(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        if let Some(decision) = self.try_admit(handle, policies, cost) {
            return Ok(decision);
        }
        if self.is_local {
            return self.store.take(handle, policies, cost).await;
        }
        let asked_at = self.clock.monotonic();
        let decision = self.store.take(handle, policies, cost).await?;
        self.remember(handle, policies, cost, &decision, asked_at);
        Ok(decision)
    }

    fn remember(
        &self,
        handle: &KeyHandle,
        policies: &Policies,
        cost: NonZeroU32,
        decision: &Decision,
        asked_at: u64,
    ) {
        let remembered = || self.store.denial_memory(policies);
        let times = (&self.clock, asked_at);
        handle
            .denials
            .record(policies, cost, times, decision, remembered);
    }

    /// Where the key stands, by what is known here. Takes nothing, asks nobody, and reads as
    /// [`Outcome::Allowed`]. A quota not asked for in its window yet reads as full.
    pub fn peek(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        self.store.peek(handle, policies)
    }

    /// Where the key stands, with its rate by what all replicas have taken. Takes nothing; asks the shared counters, if
    /// there are any. A quota not asked for in its window yet reads as full.
    pub async fn inspect(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        self.store.inspect(handle, policies).await
    }

    /// Call every ten seconds or so. Drops keys that cannot be told from new ones, and fetches quotas for
    /// the next day or month ahead of need. Returns how many keys are left.
    pub fn prune(&self) -> usize {
        self.store.prune()
    }

    /// Gives back what is in hand and takes nothing more: after the last request, before the process ends.
    pub async fn drain(&self) -> Drained {
        self.store.drain().await
    }
}
