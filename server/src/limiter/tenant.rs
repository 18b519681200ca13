//! Monthly quotas (in UTC) that all keys of a tenant share.
//!
//! A tenant's quota is checked before the store decides on the key's policies. A request first reserves its cost from
//! the tenant's quota, and spends or releases the reservation after the store's decision. So the cost is taken from
//! both the tenant and the key, or from neither. Each replica holds a block of the quota, as for a key's own quotas, in
//! a [`KeyTable`] with one entry per tenant, with the same guarantees.
//!
//! A request counts toward the quota of the month in which its tokens were reserved, even if the request is decided at
//! the beginning of the next month.
//!
//! A request that waits for the store may have reserved the last token. Other requests then wait for the outcome of
//! that request instead of being denied, since the token may be released.

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::Arc,
};

use quota_common::id::{ApiKeyId, TenantId};

use super::{
    decision::{Decision, Outcome, PolicyState},
    error::LimiterError,
    key::{
        demand::DemandGuard,
        handle::KeyHandle,
        ledger_calls::ReturnedQuota,
        state::OnUnknown,
        table::{KeyTable, KeyTableSettings},
    },
    limits::Policies,
    membership::Membership,
    policy::{Policy, PolicySet, RatePolicy},
    quota::{calendar::Zone, ledger::QuotaLedger},
};
use crate::clock::Clock;

/// A tenant's quota. Stored in the cached record of each of the tenant's keys.
#[derive(Debug, Clone)]
pub struct TenantQuota {
    handle: Arc<KeyHandle>,
    /// The quota, expressed as the policies of a key. The rate of these policies is never used.
    policies: Policies,
    limit: NonZeroU64,
}

impl TenantQuota {
    pub fn limit(&self) -> NonZeroU64 {
        self.limit
    }
}

/// The monthly quotas of all tenants. See the module documentation.
#[derive(Debug)]
pub struct TenantQuotas {
    keys: KeyTable,
    limit: NonZeroU64,
}

impl TenantQuotas {
    /// Creates the quotas. `limit` is the quota per month. In ledger calls, the tenant's ID replaces the key's ID, and
    /// the policy is [`Policy::Monthly`].
    pub fn new(
        clock: Arc<dyn Clock>,
        ledger: Arc<dyn QuotaLedger>,
        settings: KeyTableSettings,
        membership: Arc<Membership>,
        limit: NonZeroU64,
    ) -> Self {
        Self {
            keys: KeyTable::new(clock, ledger, settings, membership),
            limit,
        }
    }

    pub(super) fn of(&self, tenant: TenantId) -> Result<TenantQuota, LimiterError> {
        let rate = RatePolicy {
            rpm: NonZeroU32::MAX,
            burst: NonZeroU32::MAX,
        };
        Ok(TenantQuota {
            handle: self.keys.handle(tenant, ApiKeyId(tenant.0))?,
            policies: Policies::new(rate, None, Some(self.limit), Zone::utc(), false),
            limit: self.limit,
        })
    }

    /// Reserves `cost` from the tenant's quota and then decides with `decide`. If the quota has too few tokens, returns
    /// a denial with the key's state from `peek`.
    pub(super) async fn admit(
        &self,
        quota: &TenantQuota,
        cost: NonZeroU32,
        peek: impl Fn() -> Decision,
        decide: impl Future<Output = Result<Decision, LimiterError>>,
    ) -> Result<Decision, LimiterError> {
        let mut demand = self.keys.register_demand(&quota.handle, cost);
        if let Err(denied) = self.reserve(quota, cost, &mut demand).await? {
            return Ok(denial(peek(), &denied, cost));
        }
        let mut decision = decide.await?;
        if !decision.is_allowed() {
            decision.tenant_monthly = self.release(quota, &mut demand);
            return Ok(decision);
        }
        decision.tenant_monthly = self.spend(quota, &mut demand);
        Ok(decision)
    }

    /// Reserves tokens, and waits for the ledger if this replica has too few tokens. The inner error is a denial.
    async fn reserve(
        &self,
        quota: &TenantQuota,
        cost: NonZeroU32,
        demand: &mut DemandGuard<'_>,
    ) -> Result<Result<(), Decision>, LimiterError> {
        let tokens = u64::from(cost.get());
        let mut attempt = || {
            let (mut state, at) = self.keys.lock_state(&quota.handle, &quota.policies);
            if demand.reserve(&mut state, at.calendar) {
                return Ok(Ok(()));
            }
            let quotas = state.quotas(tokens, at.calendar);
            if let Some(missing) = quotas.missing(false, OnUnknown::Wait) {
                self.keys.follow_up(&quota.handle, &mut state, None);
                return Err(missing);
            }
            let denied = state.decision(&quota.policies, at, quotas.denial.outcome());
            self.keys
                .follow_up(&quota.handle, &mut state, Some(&denied));
            Ok(Err(denied))
        };
        if let Ok(done) = attempt() {
            return Ok(done);
        }
        let mut patience = self.keys.patience();
        self.keys
            .fetch(&quota.handle, cost, &mut patience, attempt)
            .await
    }

    /// Spends the reserved tokens, even if their month has ended: the key's own tokens are already spent, so the
    /// request can no longer be denied.
    fn spend(&self, quota: &TenantQuota, demand: &mut DemandGuard<'_>) -> Option<PolicyState> {
        let (mut state, at) = self.keys.lock_state(&quota.handle, &quota.policies);
        demand.spend_in_any_window(&mut state);
        let spent = state.decision(&quota.policies, at, Outcome::Allowed);
        self.keys.follow_up(&quota.handle, &mut state, Some(&spent));
        shared_state(&spent)
    }

    fn release(&self, quota: &TenantQuota, demand: &mut DemandGuard<'_>) -> Option<PolicyState> {
        let (mut state, at) = self.keys.lock_state(&quota.handle, &quota.policies);
        demand.release(&mut state);
        let released = state.decision(&quota.policies, at, Outcome::Allowed);
        shared_state(&released)
    }

    pub(super) fn prune(&self) -> usize {
        self.keys.prune()
    }

    pub(super) async fn drain(&self) -> ReturnedQuota {
        self.keys.drain().await
    }
}

/// Converts a decision about the tenant's quota to the state of that quota.
fn shared_state(decision: &Decision) -> Option<PolicyState> {
    decision.monthly.map(|state| PolicyState {
        policy: Policy::TenantMonthly,
        ..state
    })
}

/// Returns the decision for a request that its tenant's quota denies. `key` is the key's state. The key's own quotas
/// that also have too few tokens for the request are reported as violated too.
fn denial(key: Decision, tenant: &Decision, cost: NonZeroU32) -> Decision {
    let cost = u64::from(cost.get());
    let exhausted = [key.daily, key.monthly].into_iter().flatten();
    let exhausted = exhausted.filter(|it| it.remaining < cost);
    let mut violated = PolicySet::EMPTY.with(Policy::TenantMonthly);
    let mut wait = tenant.retry_after();
    for state in exhausted {
        violated = violated.with(state.policy);
        let left = state.reset_at.saturating_since(key.at).0;
        wait = wait.filter(|_| cost <= state.limit).map(|it| it.max(left));
    }
    Decision {
        outcome: Outcome::Denied {
            violated,
            retry_after: wait.and_then(NonZeroU64::new),
        },
        tenant_monthly: shared_state(tenant),
        ..key
    }
}

#[cfg(test)]
mod tests;
