//! Decides whether a key may make a request now.
//!
//! This module owns rates, calendar quotas and their usage. It does not depend on HTTP, SQL or secrets: the caller
//! passes a key's handle and policies, both from the key's cached record, and gets a [`Decision`]. If the quota ledger
//! fails, only keys with calendar quotas (their own or their tenant's) are affected. These keys spend the tokens that
//! are available locally, and then their requests get an error. A request is allowed only if its cost has been taken
//! from each policy. In degraded decisions, the plan's fallback setting determines which rate limit applies.
//!
//! ```text
//! local tokens -> denial cache (remote stores only) -> store (all policies, or none) -> decision
//! ```

mod decision;
mod denial_cache;
mod distributed;
mod error;
mod key;
mod limits;
mod local;
mod membership;
mod policy;
mod quota;
mod rate;
mod store;
mod tenant;

use std::{num::NonZeroU32, sync::Arc};

use quota_common::id::{ApiKeyId, TenantId};

use self::denial_cache::Times;
pub use self::{
    decision::{Decision, Outcome, PolicyState},
    distributed::{DistributedStore, RedisCounters, core::DistributedSettings},
    error::LimiterError,
    key::{
        handle::KeyHandle,
        ledger_calls::{LedgerConnections, ReturnedQuota},
        table::KeyTableSettings,
    },
    limits::Policies,
    local::LocalStore,
    membership::{COUNTED_EVERY, FORGOTTEN, Membership, REMEMBERED, ReplicaSlot},
    policy::{Policy, PolicySet, RatePolicy},
    quota::{
        calendar::{QuotaWindow, UnknownZone, Window, Zone, hour_end, window, window_at},
        ledger::{LedgerError, LedgerRow, QuotaLedger, ReturnBatch, TakeRequest, Taken},
    },
    rate::{
        counters::{
            BucketName, BucketState, CounterError, CounterMicros, SharedCounters, TakeCall,
            TakeReply,
        },
        gcra::{Gcra, Level, Verdict},
    },
    store::LimitStore,
    tenant::{TenantQuota, TenantQuotas},
};
use crate::clock::Clock;

/// How often to call [`Limiter::prune`].
pub const PRUNE_EVERY: std::time::Duration = std::time::Duration::from_secs(10);

/// Decides whether requests are allowed. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Limiter {
    store: Arc<dyn LimitStore>,
    clock: Arc<dyn Clock>,
    /// Cached value of [`LimitStore::is_local`].
    is_local: bool,
    /// `None` if there are no tenant quotas.
    tenants: Option<Arc<TenantQuotas>>,
}

impl Limiter {
    pub fn new(store: Arc<dyn LimitStore>, clock: Arc<dyn Clock>) -> Self {
        Self {
            is_local: store.is_local(),
            store,
            clock,
            tenants: None,
        }
    }

    /// Adds a monthly quota for each tenant, which all of the tenant's keys share.
    #[must_use]
    pub fn with_tenant_quotas(self, quotas: TenantQuotas) -> Self {
        Self {
            tenants: Some(Arc::new(quotas)),
            ..self
        }
    }

    /// Returns the quota that all keys of the tenant share, if there is one. Store the quota in the cached records of
    /// these keys.
    pub fn tenant_quota(&self, tenant: TenantId) -> Result<Option<TenantQuota>, LimiterError> {
        let quotas = self.tenants.as_ref();
        quotas.map(|quotas| quotas.of(tenant)).transpose()
    }

    /// Returns a key's handle. Store the handle in the key's cached record. While the handle is in use anywhere, the
    /// same key always gets the same handle, so the key's usage is kept when its record is reloaded.
    pub fn handle(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyHandle>, LimiterError> {
        self.store.handle(tenant, key)
    }

    /// Decides on a request from memory, without blocking. Returns `None` if the decision may require waiting. In that
    /// case, call [`admit`](Self::admit).
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
            let state = handle.state.lock();
            return state.existing_denials()?.find(policies, cost, &*self.clock);
        };
        // A denial without a call only repeats the store's last denial. If such a denial were recorded, repeated
        // requests would prolong it.
        if decision.is_allowed() {
            let now = decision.monotonic;
            let times = Times { asked_at: now, now };
            self.remember(handle, policies, cost, &decision, times);
        }
        Some(decision)
    }

    /// Decides on a request, and waits for the store if necessary. Cancel safe: tokens taken for a canceled request are
    /// used for other requests or returned.
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
        let now = self.clock.monotonic();
        self.remember(handle, policies, cost, &decision, Times { asked_at, now });
        Ok(decision)
    }

    /// Decides on a request like [`admit`](Self::admit), and also takes the cost from the tenant's quota.
    pub async fn admit_within(
        &self,
        quota: &TenantQuota,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        let Some(quotas) = &self.tenants else {
            return self.admit(handle, policies, cost).await;
        };
        let peek = || self.peek(handle, policies);
        let admit = self.admit(handle, policies, cost);
        let mut decision = quotas.admit(quota, cost, peek, admit).await?;
        // Since the decision about the key, this may have waited for other requests of the tenant.
        decision.monotonic = self.clock.monotonic();
        Ok(decision)
    }

    fn remember(
        &self,
        handle: &KeyHandle,
        policies: &Policies,
        cost: NonZeroU32,
        decision: &Decision,
        times: Times,
    ) {
        // A degraded decision does not show what the shared counters would decide.
        if decision.degraded {
            return;
        }
        let remembered = || self.store.denial_memory(policies);
        let mut state = handle.state.lock();
        let denials = state.denials();
        denials.record(policies, cost, times, decision, remembered);
    }

    /// Returns the key's state as known to this replica, with [`Outcome::Allowed`]. Does not take tokens or make calls.
    /// Until the ledger has responded in the current window, quotas are reported as unused.
    pub fn peek(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        self.store.peek(handle, policies)
    }

    /// Returns the key's state without taking tokens. Calls the shared counters, if there are any, for the state of the
    /// bucket. Until the ledger has responded in the current window, quotas are reported as unused.
    pub async fn inspect(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        self.store.inspect(handle, policies).await
    }

    /// Drops unused keys whose state is equivalent to the state of a new key, returns quota tokens that are not needed
    /// soon, and prefetches quotas for the next day or month. Call every [`PRUNE_EVERY`]. Returns the number of
    /// remaining keys.
    pub fn prune(&self) -> usize {
        if let Some(quotas) = &self.tenants {
            quotas.prune();
        }
        self.store.prune()
    }

    /// Deletes the state of deleted keys. Call only after every replica has stopped accepting the keys: another request
    /// would get a full bucket.
    pub async fn delete(&self, keys: &[(TenantId, ApiKeyId)]) -> Result<(), CounterError> {
        self.store.delete(keys).await
    }

    /// Returns all unused tokens to the ledger and the shared counters, if they respond in time, and stops taking
    /// tokens. Call after the last request, before the process exits.
    pub async fn drain(&self) -> ReturnedQuota {
        let Some(quotas) = &self.tenants else {
            return self.store.drain().await;
        };
        let (keys, tenants) = tokio::join!(self.store.drain(), quotas.drain());
        ReturnedQuota {
            given_back: keys.given_back + tenants.given_back,
            lost: keys.lost + tenants.lost,
        }
    }
}
