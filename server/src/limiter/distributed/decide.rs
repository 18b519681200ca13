//! Makes a decision: with local tokens, with a call to the counters, or without the counters.
//!
//! The cost is taken from the quotas and the rate together, or from neither. While the counters are unavailable, the
//! plan's fallback setting applies.
//!
//! With the counters, a denial names the rate as violated only if their last response shows that the rate is exceeded,
//! or if the cost exceeds the burst. Without the counters, it is unknown whether the rate is exceeded:
//! [`OnRedisFailure::Share`] denies without naming a policy, [`OnRedisFailure::Closed`] returns an error, and
//! [`OnRedisFailure::Open`] names the rate if the request exceeds this replica's separate limit.

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::Arc,
};

use quota_common::plan::OnRedisFailure;

use super::core::StoreCore;
use crate::{
    clock::{Moment, Monotonic, Nanos, UnixNanos},
    deadline,
    limiter::{
        decision::{Decision, Outcome, PolicyState},
        error::LimiterError,
        key::{
            demand::DemandGuard,
            handle::KeyHandle,
            state::{Denial, KeyState, MissingBlocks, OnUnknown},
        },
        limits::Policies,
        policy::{Policy, PolicySet},
        rate::waiter::{FetchOutcome, Grant, Waiter},
    },
};

/// The wait to report if the actual wait is unknown.
const A_SECOND: NonZeroU64 = NonZeroU64::new(1_000_000_000).unwrap();

/// The wait to report if the actual wait is known to be short.
const A_MOMENT: NonZeroU64 = NonZeroU64::new(1_000_000).unwrap();

/// The outcome of deciding with the state on this replica.
pub(super) enum LocalOutcome {
    Done(Decision),
    /// The quotas allow the request. Its rate tokens must be taken from the counters.
    Fetch,
    /// The quotas deny the request, or its cost exceeds the burst. The counters are called only so that the denial can
    /// report the state of the bucket.
    Peek,
}

impl StoreCore {
    /// Decides on a request with the state on this replica, if possible. If the counters must be called, first reserves
    /// the quota tokens of `demand`.
    #[inline]
    pub(super) fn decide_locally(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
        demand: Option<&mut DemandGuard<'_>>,
    ) -> Result<LocalOutcome, MissingBlocks> {
        let (mut state, at) = self.keys.lock_state(handle, policies);
        let (now, monotonic) = (at.calendar, at.monotonic);
        let tokens = u64::from(cost.get());
        if !state.quotas_fit(tokens) {
            self.keys.follow_up(handle, &mut state, None);
            return match state.quotas(tokens, now).missing(false, OnUnknown::Wait) {
                Some(missing) => Err(missing),
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
                self.fetch_ahead(handle, &mut state, policies);
            }
            decision(&mut state, policies, at, Outcome::Allowed)
        } else if let Some(until) = lease.denied_until(tokens, monotonic)
            && !self.breaker(handle).is_open()
        {
            lease.record_denied(tokens);
            let mut denial = Denial::default();
            // The longer of two waits applies: until the counters may be called again, and until the bucket has enough
            // tokens.
            denial.add(Policy::Rpm, left(until, monotonic));
            let gcra = policies.gcra();
            let debt = lease.debt(gcra, monotonic);
            denial.add_rate(gcra.decide(now.saturating_add(debt), now, cost));
            let outcome = denial.outcome();
            decision(&mut state, policies, at, outcome)
        } else {
            let never = policies.gcra().price(cost) > policies.gcra().tau();
            if let Some(demand) = demand
                && !never
            {
                demand.reserve(&mut state, now);
            }
            self.keys.follow_up(handle, &mut state, None);
            return Ok(if never {
                LocalOutcome::Peek
            } else {
                LocalOutcome::Fetch
            });
        };
        self.keys.follow_up(handle, &mut state, Some(&decision));
        Ok(LocalOutcome::Done(decision))
    }

    /// Requests the next lease while the current lease is being spent.
    #[cold]
    fn fetch_ahead(&self, handle: &Arc<KeyHandle>, state: &mut KeyState, policies: &Policies) {
        if !self.breaker(handle).is_open() {
            state.lease().set_terms(policies.terms(self.ttl));
            self.begin_fetch(handle, state, true);
        }
    }

    /// Takes `tokens` from the counters, in one call with all other waiting requests of this key. If `tokens` is zero,
    /// only reads the state of the bucket.
    async fn fetch(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        tokens: u64,
    ) -> FetchOutcome {
        if self.breaker(handle).is_open() {
            return FetchOutcome::Unanswered;
        }
        let (waiter, outcome) = Waiter::new(tokens);
        {
            let mut state = handle.state.lock();
            let lease = state.lease();
            lease.set_terms(policies.terms(self.ttl));
            lease.wait(waiter);
            self.begin_fetch(handle, &mut state, false);
        }
        // A response that is late by up to one deadline still counts.
        match deadline::within(2 * self.settings.deadline, outcome).await {
            Ok(Ok(outcome)) => outcome,
            _ => FetchOutcome::Unanswered,
        }
    }

    /// Spends the granted tokens and the request's reserved quota tokens. Returns `None` if the window of the reserved
    /// tokens has ended and too few tokens of the current window are available.
    fn spend(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
        demand: &mut DemandGuard<'_>,
        grant: Grant,
    ) -> Option<Decision> {
        let (mut state, at) = self.keys.lock_state(handle, policies);
        if !demand.spend(&mut state, at.calendar) {
            // Dropping `grant` takes the lock to return its tokens, so the lock is released first.
            drop(state);
            return None;
        }
        grant.spend();
        self.metrics
            .lease_tokens_spent
            .inc_by(u64::from(cost.get()));
        let decision = decision(&mut state, policies, at, Outcome::Allowed);
        self.keys.follow_up(handle, &mut state, Some(&decision));
        Some(decision)
    }

    /// Denies a request based on the state on this replica. If `wait` is set, the rate limit denies the request, and
    /// the reported wait is at least `wait`. Returns `None` if neither the rate limit nor a quota denies the request.
    fn denial(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
        demand: &mut DemandGuard<'_>,
        wait: Option<NonZeroU64>,
    ) -> Option<Decision> {
        let (mut state, at) = self.keys.lock_state(handle, policies);
        let (now, monotonic) = (at.calendar, at.monotonic);
        demand.release(&mut state);
        let mut denial = state.quotas(u64::from(cost.get()), now).denial;
        let gcra = policies.gcra();
        let lease = state.lease();
        let debt = lease.debt(gcra, monotonic);
        denial.add_rate(gcra.decide(now.saturating_add(debt), now, cost));
        let denied_until = lease.denied_until(u64::from(cost.get()), monotonic);
        let denied_for = denied_until.and_then(|until| left(until, monotonic));
        if wait.is_some() || denied_for.is_some() {
            denial.add(Policy::Rpm, wait.max(denied_for));
        }
        if denial.violated.is_empty() {
            return None;
        }
        let outcome = denial.outcome();
        let decision = decision(&mut state, policies, at, outcome);
        self.keys.follow_up(handle, &mut state, Some(&decision));
        Some(decision)
    }

    /// Decides on a request without the counters, according to the plan's fallback setting. Returns `None` if too few
    /// quota tokens are available locally.
    pub(super) fn without_counters(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
        demand: Option<&mut DemandGuard<'_>>,
    ) -> Result<Option<Decision>, LimiterError> {
        let on_failure = policies.on_failure().unwrap_or(self.settings.on_failure);
        let outage = self.breaker(handle).outage();
        let (mut state, at) = self.keys.lock_state(handle, policies);
        let (now, monotonic) = (at.calendar, at.monotonic);
        let tokens = u64::from(cost.get());
        if let Some(demand) = demand {
            demand.release(&mut state);
        }
        if !state.quotas_fit(tokens) {
            return Ok(None);
        }
        let gcra = policies.gcra();
        let (outcome, rate) = match on_failure {
            OnRedisFailure::Closed => return Err(LimiterError::CountersUnavailable),
            // Decide as if this were the only replica.
            OnRedisFailure::Open => {
                let mut denial = Denial::default();
                denial.add_rate(state.take_rate(policies, cost, now));
                let outcome = if denial.violated.is_empty() {
                    Outcome::Allowed
                } else {
                    denial.outcome()
                };
                let debt = state.tat.saturating_since(now);
                (outcome, rate(policies, now, debt))
            }
            OnRedisFailure::Share => {
                let slot = self.membership.slot(monotonic);
                let share = state.lease().share();
                let (verdict, rate) = match (outage, slot) {
                    (Some(outage), Some((slot, since))) => {
                        let since = outage
                            .since
                            .saturating_add(self.max_detection_delay())
                            .max(since);
                        let verdict = if outage.is_paused(monotonic) {
                            Err(A_MOMENT)
                        } else {
                            share.take(gcra, slot, since, cost, monotonic)
                        };
                        let debt = share.tat.saturating_since(monotonic);
                        (verdict, rate(policies, now, debt.min(gcra.tau())))
                    }
                    // There is no outage (only this call failed), or this replica has no slot. Treat the replica's
                    // share as empty.
                    _ => (Err(A_SECOND), rate(policies, now, gcra.tau())),
                };
                let outcome = match verdict {
                    Ok(()) => Outcome::Allowed,
                    // This replica's share is exhausted. Only the counters know whether the limit itself is exhausted.
                    Err(wait) => Outcome::Denied {
                        violated: PolicySet::EMPTY,
                        retry_after: Some(wait),
                    },
                };
                (outcome, rate)
            }
        };
        if outcome == Outcome::Allowed {
            state.spend_quotas(tokens, now);
            self.metrics.allowed_degraded.inc();
        }
        let mut decision = state.decision_with(policies, at, outcome, rate);
        decision.degraded = true;
        self.keys.follow_up(handle, &mut state, Some(&decision));
        Ok(Some(decision))
    }

    pub(super) async fn take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        let mut demand = self.keys.register_demand(handle, cost);
        let mut patience = self.keys.patience();
        loop {
            let outcome = match self.decide_locally(handle, policies, cost, Some(&mut demand)) {
                Ok(outcome) => outcome,
                Err(_) => {
                    let again = || self.decide_locally(handle, policies, cost, Some(&mut demand));
                    match self.keys.fetch(handle, cost, &mut patience, again).await {
                        Ok(outcome) => outcome,
                        // If the request is denied anyway, the denial is returned instead of the error.
                        Err(error) => {
                            self.fetch(handle, policies, 0).await;
                            return self
                                .denial(handle, policies, cost, &mut demand, None)
                                .ok_or(error);
                        }
                    }
                }
            };
            match outcome {
                LocalOutcome::Done(decision) => return Ok(decision),
                LocalOutcome::Peek => {
                    self.fetch(handle, policies, 0).await;
                    if let Some(decision) = self.denial(handle, policies, cost, &mut demand, None) {
                        return Ok(decision);
                    }
                }
                LocalOutcome::Fetch => {
                    match self.fetch(handle, policies, u64::from(cost.get())).await {
                        FetchOutcome::Granted(grant) => {
                            if let Some(decision) =
                                self.spend(handle, policies, cost, &mut demand, grant)
                            {
                                return Ok(decision);
                            }
                        }
                        FetchOutcome::TooFew => {
                            let denial = self.denial(handle, policies, cost, &mut demand, None);
                            // If nothing denies the request any longer, the bucket has refilled since the response, or
                            // the counters use another version of the plan. A retry may then succeed soon.
                            let soon =
                                || self.denial(handle, policies, cost, &mut demand, Some(A_MOMENT));
                            if let Some(decision) = denial.or_else(soon) {
                                return Ok(decision);
                            }
                        }
                        FetchOutcome::Unanswered => {
                            if let Some(decision) =
                                self.without_counters(handle, policies, cost, Some(&mut demand))?
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

/// Returns a decision that reports the state of the bucket as known to this replica.
pub(super) fn decision(
    state: &mut KeyState,
    policies: &Policies,
    at: Moment,
    outcome: Outcome,
) -> Decision {
    let gcra = policies.gcra();
    let debt = state.lease().debt(gcra, at.monotonic);
    state.decision_with(policies, at, outcome, rate(policies, at.calendar, debt))
}

fn left(until: Monotonic, now: Monotonic) -> Option<NonZeroU64> {
    NonZeroU64::new(until.saturating_since(now).0)
}

/// Returns the state of the rate limit, given the time until the bucket is full.
pub(super) fn rate(policies: &Policies, now: UnixNanos, debt: Nanos) -> PolicyState {
    let gcra = policies.gcra();
    PolicyState {
        policy: Policy::Rpm,
        limit: u64::from(policies.rate().burst.get()),
        remaining: gcra.tokens(gcra.tau().saturating_sub(debt)),
        reset_at: now.saturating_add(debt),
        shortened_to: None,
    }
}
