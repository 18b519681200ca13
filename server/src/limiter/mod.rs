//! The decision: may this key do this now?
//!
//! Owns rates, calendar quotas and what is spent of them. Knows no HTTP, no SQL, no key text: a caller brings
//! the key's cell and its policies, both kept in the key's cached record, and gets a [`Decision`]. When the
//! ledger of calendar quotas is down, keys without such quotas do not notice; others are served from what is in
//! hand and then answered with an error, never admitted.
//!
//! ```text
//! what is in hand -> gate (remote stores only) -> store (all policies, or none) -> decision
//! ```

mod blocks;
mod calendar;
mod callers;
mod cell;
mod cells;
mod decision;
mod gcra;
mod guard;
mod ledger_calls;
mod memory;
mod policy;
mod shared;
mod store;

use std::{num::NonZeroU32, sync::Arc};

use quota_common::id::{ApiKeyId, TenantId};

pub use self::{
    blocks::{LedgerError, LedgerRow, QuotaLedger, ReturnBatch, TakeRequest, Taken},
    calendar::{QuotaWindow, UnknownZone, Window, Zone, hour_end, window, window_at},
    callers::{Caller, Guard, Refused},
    cells::CellSettings,
    decision::{Decision, Outcome, PolicyState},
    gcra::{Gcra, Verdict},
    memory::MemoryStore,
    policy::{Policies, Policy, PolicySet, RatePolicy},
    shared::{
        BucketName, BucketState, COUNTED_EVERY, CounterError, CounterMicros, FORGOTTEN, Place,
        RedisCounters, Roster, SharedCounters, SharedSettings, SharedStore, TakeCall, TakeReply,
    },
    store::{Drained, KeyCell, LimitStore, LimiterError},
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

    /// The cell of a key, to be kept in its cached record. The same key gets the same cell for as long as
    /// anybody keeps it, so a record that is loaded again finds what was spent.
    pub fn cell(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyCell>, LimiterError> {
        self.store.cell(tenant, key)
    }

    /// Decides from memory: no waiting, no allocation, one look at the clock. `None` when it would have to
    /// wait: ask [`admit`](Self::admit).
    #[inline]
    pub fn try_admit(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision> {
        if self.is_local {
            return self.store.try_take(cell, policies, cost);
        }
        let Some(decision) = self.store.try_take(cell, policies, cost) else {
            return cell.gate.look(policies, cost, &self.clock);
        };
        self.learn(cell, policies, cost, &decision, self.clock.monotonic());
        Some(decision)
    }

    /// Decides, waiting for the store if it must. A caller may go away while it waits: then nothing was
    /// taken, or what was taken is spent by the key's next request.
    pub async fn admit(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        if let Some(decision) = self.try_admit(cell, policies, cost) {
            return Ok(decision);
        }
        if self.is_local {
            return self.store.take(cell, policies, cost).await;
        }
        let asked_at = self.clock.monotonic();
        let decision = self.store.take(cell, policies, cost).await?;
        self.learn(cell, policies, cost, &decision, asked_at);
        Ok(decision)
    }

    fn learn(
        &self,
        cell: &KeyCell,
        policies: &Policies,
        cost: NonZeroU32,
        decision: &Decision,
        asked_at: u64,
    ) {
        let remembered = || self.store.denial_memory(policies);
        let times = (&self.clock, asked_at);
        cell.gate.learn(policies, cost, times, decision, remembered);
    }

    /// Where the key stands, by what is known here. Takes nothing, asks nobody, and reads as
    /// [`Outcome::Allowed`]. A quota not asked for in its window yet reads as full.
    pub fn peek(&self, cell: &KeyCell, policies: &Policies) -> Decision {
        self.store.peek(cell, policies)
    }

    /// Where the key stands, with its rate by what all replicas have taken. Takes nothing; asks the shared counters, if
    /// there are any. A quota not asked for in its window yet reads as full.
    pub async fn inspect(&self, cell: &KeyCell, policies: &Policies) -> Decision {
        self.store.inspect(cell, policies).await
    }

    /// Call every ten seconds or so. Drops cells that cannot be told from new ones, and fetches quotas for
    /// the next day or month ahead of need. Returns how many cells are left.
    pub fn prune(&self) -> usize {
        self.store.prune()
    }

    /// Gives back what is in hand and takes nothing more: after the last request, before the process ends.
    pub async fn drain(&self) -> Drained {
        self.store.drain().await
    }
}
