//! One decision: from tokens held here, by a call to the counters, or without them.
//!
//! Owns the order of these, and that quotas and rate are taken together or not at all. Does not know how the
//! counters are called. While they are unavailable, carries out the plan's choice.
//!
//! A denial names the rate as violated only when the counters said so, at most a moment ago. When there is no answer,
//! the rate has not been shown to be exceeded: [`OnRedisFailure::Share`] then denies without naming a policy, and
//! [`OnRedisFailure::Closed`] fails.

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::Arc,
};

use quota_common::plan::OnRedisFailure;

use super::{
    A_MOMENT, A_SECOND, Inner,
    flight::{FetchOutcome, GrantGuard, Waiter},
    lease::Terms,
};
use crate::{
    clock::UnixNanos,
    limiter::{
        cell::{CellState, Denial, Lacking, Unasked},
        decision::{Decision, Outcome, PolicyState},
        ledger_calls::DemandGuard,
        policy::{Policies, Policy, PolicySet},
        store::{KeyCell, LimiterError},
    },
};

/// What the numbers on this replica allow.
pub(super) enum LocalOutcome {
    Done(Decision),
    /// The quotas allow it. The rate must be taken from the counters.
    Fetch,
    /// The quotas deny it, or it costs more than the bucket can hold. The counters are asked only so that the denial
    /// can say where the rate stands.
    Peek,
}

impl Inner {
    /// Decides from the numbers on this replica, if they suffice. If the counters must be asked, first sets the quota
    /// tokens of `demand` apart.
    #[inline]
    pub(super) fn look(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        demand: Option<&mut DemandGuard<'_>>,
    ) -> Result<LocalOutcome, Lacking> {
        let (mut state, now) = self.cells.current(cell, policies);
        let monotonic = self.clock.monotonic();
        let tokens = u64::from(cost.get());
        if !state.quotas_fit(tokens) {
            self.cells.after(cell, &mut state, None);
            return match state.quotas(tokens, now).lacking(false, Unasked::Wait) {
                Some(lacking) => Err(lacking),
                None => Ok(LocalOutcome::Peek),
            };
        }
        let lease = state.lease();
        lease.expire(monotonic);
        let decision = if lease.spend(tokens) {
            let low = lease.is_low(monotonic);
            state.spend_quotas(tokens, now);
            self.metrics.lease_tokens_spent.inc_by(tokens);
            if low {
                self.fetch_ahead(cell, &mut state, policies);
            }
            decision(&mut state, policies, (now, monotonic), Outcome::Allowed)
        } else if let Some(until) = lease.held(tokens, monotonic)
            && !self.partition(cell).is_away()
        {
            let mut denial = Denial::default();
            // Until the counters may be asked again, and until there are enough tokens for this request.
            denial.add(Policy::Rpm, NonZeroU64::new(until - monotonic));
            let gcra = policies.gcra();
            let debt = lease.debt(gcra, monotonic);
            denial.add_rate(gcra.decide(now.0.saturating_add(debt), now, cost));
            let outcome = denial.outcome();
            decision(&mut state, policies, (now, monotonic), outcome)
        } else {
            let never = policies.gcra().price(cost) > policies.gcra().tau();
            if let Some(demand) = demand
                && !never
            {
                demand.reserve(&mut state, now);
            }
            self.cells.after(cell, &mut state, None);
            return Ok(if never {
                LocalOutcome::Peek
            } else {
                LocalOutcome::Fetch
            });
        };
        self.cells.after(cell, &mut state, Some(&decision));
        Ok(LocalOutcome::Done(decision))
    }

    /// Requests the next lease while the present one is being spent.
    #[cold]
    fn fetch_ahead(&self, cell: &Arc<KeyCell>, state: &mut CellState, policies: &Policies) {
        if !self.partition(cell).is_away() {
            state.lease().adopt(Terms::new(policies, self.ttl));
            self.begin_fetch(cell, state, true);
        }
    }

    /// Takes `tokens` from the counters, in one call with all other requests of this key that wait. Zero only
    /// asks how full the bucket is.
    async fn fetch(&self, cell: &Arc<KeyCell>, policies: &Policies, tokens: u64) -> FetchOutcome {
        if self.partition(cell).is_away() {
            return FetchOutcome::Unanswered;
        }
        let (waiter, outcome) = Waiter::new(tokens);
        {
            let mut state = cell.state.lock();
            let lease = state.lease();
            lease.adopt(Terms::new(policies, self.ttl));
            lease.wait(waiter);
            self.begin_fetch(cell, &mut state, false);
        }
        outcome.await.unwrap_or(FetchOutcome::Unanswered)
    }

    /// Spends what was granted to this request, and the quota tokens set apart for it. `None` if the window has ended
    /// meanwhile and the current one has none.
    fn spend(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        demand: &mut DemandGuard<'_>,
        grant: GrantGuard,
    ) -> Option<Decision> {
        let (mut state, now) = self.cells.current(cell, policies);
        if !demand.spend(&mut state, now) {
            // The guard takes the lock to return its tokens.
            drop(state);
            return None;
        }
        grant.spend();
        self.metrics
            .lease_tokens_spent
            .inc_by(u64::from(cost.get()));
        let times = (now, self.clock.monotonic());
        let decision = decision(&mut state, policies, times, Outcome::Allowed);
        self.cells.after(cell, &mut state, Some(&decision));
        Some(decision)
    }

    /// Denies a request for what is known on this replica, for at least `wait` by the rate. `None` if nothing denies
    /// it.
    fn denial(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        demand: &mut DemandGuard<'_>,
        wait: Option<NonZeroU64>,
    ) -> Option<Decision> {
        let (mut state, now) = self.cells.current(cell, policies);
        demand.release(&mut state);
        let monotonic = self.clock.monotonic();
        let mut denial = state.quotas(u64::from(cost.get()), now).denial;
        let gcra = policies.gcra();
        let lease = state.lease();
        let debt = lease.debt(gcra, monotonic);
        denial.add_rate(gcra.decide(now.0.saturating_add(debt), now, cost));
        let held = lease.held(u64::from(cost.get()), monotonic);
        let held = held.and_then(|until| NonZeroU64::new(until - monotonic));
        if wait.is_some() || held.is_some() {
            denial.add(Policy::Rpm, wait.max(held));
        }
        if denial.violated.is_empty() {
            return None;
        }
        let outcome = denial.outcome();
        let decision = decision(&mut state, policies, (now, monotonic), outcome);
        self.cells.after(cell, &mut state, Some(&decision));
        Some(decision)
    }

    /// Decides without the counters, by the plan's choice. `None` if the quotas must be looked at again.
    pub(super) fn without_counters(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        demand: Option<&mut DemandGuard<'_>>,
    ) -> Result<Option<Decision>, LimiterError> {
        let on_failure = policies.on_failure().unwrap_or(self.settings.on_failure);
        let outage = self.partition(cell).outage();
        let (mut state, now) = self.cells.current(cell, policies);
        let monotonic = self.clock.monotonic();
        let tokens = u64::from(cost.get());
        if let Some(demand) = demand {
            demand.release(&mut state);
        }
        if !state.quotas_fit(tokens) {
            return Ok(None);
        }
        let gcra = policies.gcra();
        let (verdict, rate) = match on_failure {
            OnRedisFailure::Closed => return Err(LimiterError::CountersAway),
            OnRedisFailure::Open => (Ok(()), rate(policies, now, 0)),
            OnRedisFailure::Share => {
                let place = self.roster.place(monotonic);
                let share = &mut state.lease().share;
                match (outage, place) {
                    (Some(outage), Some((place, since))) => {
                        let since = outage
                            .since
                            .saturating_add(self.noticed_by_all())
                            .max(since);
                        let verdict = if outage.is_paused(monotonic) {
                            Err(A_MOMENT)
                        } else {
                            share.take(gcra, place, since, cost, monotonic)
                        };
                        let debt = share.tat.saturating_sub(monotonic);
                        (verdict, rate(policies, now, debt.min(gcra.tau())))
                    }
                    // A single call failed, or the number of replicas is unknown: as if the share had just begun,
                    // empty.
                    _ => (Err(A_SECOND), rate(policies, now, gcra.tau())),
                }
            }
        };
        let outcome = match verdict {
            Ok(()) => {
                state.spend_quotas(tokens, now);
                self.metrics.admitted_degraded.inc();
                Outcome::Allowed
            }
            // This replica's part is used up. Whether the limit is, only the counters know.
            Err(wait) => Outcome::Denied {
                violated: PolicySet::EMPTY,
                retry_after: Some(wait),
            },
        };
        let mut decision = state.decision_with(policies, now, outcome, rate);
        decision.degraded = true;
        self.cells.after(cell, &mut state, Some(&decision));
        Ok(Some(decision))
    }

    pub(super) async fn take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        let mut demand = self.cells.claim(cell, cost);
        let mut patience = self.cells.patience();
        loop {
            let look = match self.look(cell, policies, cost, Some(&mut demand)) {
                Ok(look) => look,
                Err(_) => {
                    let again = || self.look(cell, policies, cost, Some(&mut demand));
                    match self.cells.fetch(cell, cost, &mut patience, again).await {
                        Ok(look) => look,
                        // The rate may deny it anyway.
                        Err(error) => {
                            self.fetch(cell, policies, 0).await;
                            return self
                                .denial(cell, policies, cost, &mut demand, None)
                                .ok_or(error);
                        }
                    }
                }
            };
            match look {
                LocalOutcome::Done(decision) => return Ok(decision),
                LocalOutcome::Peek => {
                    self.fetch(cell, policies, 0).await;
                    if let Some(decision) = self.denial(cell, policies, cost, &mut demand, None) {
                        return Ok(decision);
                    }
                }
                LocalOutcome::Fetch => {
                    match self.fetch(cell, policies, u64::from(cost.get())).await {
                        FetchOutcome::Granted(grant) => {
                            if let Some(decision) =
                                self.spend(cell, policies, cost, &mut demand, grant)
                            {
                                return Ok(decision);
                            }
                        }
                        FetchOutcome::TooFew => {
                            let denial = self.denial(cell, policies, cost, &mut demand, None);
                            // The bucket may have refilled since, or the counters may follow another version of the
                            // plan.
                            let soon =
                                || self.denial(cell, policies, cost, &mut demand, Some(A_MOMENT));
                            if let Some(decision) = denial.or_else(soon) {
                                return Ok(decision);
                            }
                        }
                        FetchOutcome::Unanswered => {
                            if let Some(decision) =
                                self.without_counters(cell, policies, cost, Some(&mut demand))?
                            {
                                return Ok(decision);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The decision, with the rate as it is known here.
pub(super) fn decision(
    state: &mut CellState,
    policies: &Policies,
    (now, monotonic): (UnixNanos, u64),
    outcome: Outcome,
) -> Decision {
    let gcra = policies.gcra();
    let debt = state.lease().debt(gcra, monotonic);
    state.decision_with(policies, now, outcome, rate(policies, now, debt))
}

/// The rate as it stands with so many nanoseconds to a full bucket.
pub(super) fn rate(policies: &Policies, now: UnixNanos, debt: u64) -> PolicyState {
    let gcra = policies.gcra();
    PolicyState {
        policy: Policy::Rpm,
        limit: u64::from(policies.rate().burst.get()),
        remaining: gcra.tau().saturating_sub(debt) / gcra.emission(),
        reset_at: now.saturating_add(debt),
        shortened_to: None,
    }
}
