//! The decision: may this key do this now?
//!
//! Owns policies, buckets, calendar quotas and the guards by address. Knows no HTTP and no SQL: the durable
//! count of quotas comes in as a [`QuotaLedger`], the time as a [`Clock`]. When the ledger is away, keys
//! without calendar quotas notice nothing; the others are served from what is in hand and then answered with
//! [`LimiterError`], never admitted on credit.
//!
//! **Why there is no `governor` in front of the memory store.** A local limiter in front pays where the
//! store is a network hop away: what it refuses costs no hop. The memory store *is* in this process and
//! decides in one step under the key's lock; a governor before it would be the same algorithm a second time,
//! and would be charged by requests that a quota then denies. The guards by address are governor's.

mod calendar;
mod decision;
mod gcra;
mod guard;
mod ledger;
mod memory;
mod policy;
mod store;

#[cfg(test)]
mod model;
#[cfg(test)]
mod suite;

use std::{sync::Arc, time::Duration};

use quota_common::{ApiKeyId, TenantId};

pub use self::{
    calendar::{Period, Window, Zone},
    decision::{Decision, PolicyState, Verdict},
    guard::{Caller, Guard, Refused},
    ledger::{Account, Grant, LedgerUnavailable, QuotaLedger},
    memory::{KeyCell, MemoryStore},
    policy::{Policies, Policy, PolicySet},
    store::{Attempt, LimitStore, LimiterError},
};
use crate::clock::Clock;

/// How often [`Limiter::prune`] is to be called.
pub const PRUNE_EVERY: Duration = Duration::from_secs(10);

/// Decides on requests. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Limiter {
    store: Arc<dyn LimitStore>,
    clock: Arc<dyn Clock>,
}

impl Limiter {
    pub fn new(store: Arc<dyn LimitStore>, clock: Arc<dyn Clock>) -> Self {
        Self { store, clock }
    }

    /// The cell of a key, to be kept in its cached record.
    pub fn cell(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyCell>, LimiterError> {
        self.store.cell(tenant, key)
    }

    /// Decides on one request that counts for `cost` requests; admits it by taking them.
    pub async fn admit(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: u32,
    ) -> Result<Decision, LimiterError> {
        match self.store.try_take(cell, policies, cost, self.clock.now()) {
            Attempt::Decided(decision) => Ok(decision),
            Attempt::MustWait => self.store.take(cell, policies, cost).await,
        }
    }

    /// See [`LimitStore::prune`].
    pub async fn prune(&self) -> usize {
        self.store.prune().await
    }

    /// Gives back everything in hand; nothing is admitted after it.
    pub async fn drain(&self) -> Result<(), LimiterError> {
        self.store.drain().await
    }
}
