//! One decision: from what is in hand here, by asking the counters, or without them.
//!
//! Owns the order of these, and that the quotas and the rate are taken together or not at all. Knows not how
//! the counters are asked. When they are away the plan's choice is carried out here.

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::Arc,
};

use quota_common::plan::OnRedisFailure;
use tokio::{runtime::Handle, sync::oneshot, time};

use super::{
    A_MOMENT, A_SECOND, Inner, Lease,
    counters::{BucketState, TakeReply},
    flight::{Hand, fly},
    nanos,
};
use crate::{
    clock::UnixNanos,
    deadline,
    limiter::{
        cell::{CellState, Denial, Lacking, Unasked},
        decision::{Decision, Outcome, PolicyState},
        policy::{Policies, Policy},
        store::{KeyCell, LimiterError},
    },
};

/// What a look at the numbers here leads to.
pub(super) enum Look {
    Done(Decision),
    /// The quotas have it, the rate is to be asked for.
    Take,
    /// The quotas deny, or cannot be asked for; what the rate says is to be told too.
    Peek,
}

/// What came of asking for tokens.
enum Asked {
    /// What was granted to this request.
    Granted(Hand),
    /// Something has changed here: look again.
    LookAgain,
    /// The bucket has too few, as was noted.
    Denied,
    /// Others were quicker, for as long as a request may wait.
    Late,
    /// There is no answer.
    Away,
}

impl Inner {
    /// One look at what is here.
    #[inline]
    pub(super) fn look(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Look, Lacking> {
        let (mut state, now) = self.cells.current(cell, policies);
        let monotonic = self.clock.monotonic();
        let tokens = u64::from(cost.get());
        if !state.quotas_fit(tokens) {
            self.cells.after(cell, &mut state, None);
            return match state.quotas(tokens, now).lacking(false, Unasked::Wait) {
                Some(lacking) => Err(lacking),
                None => Ok(Look::Peek),
            };
        }
        let lease = state.lease();
        lease.expire(monotonic);
        let decision = if lease.spend(tokens) {
            let low = lease.is_low(monotonic);
            let size = if low {
                lease.pace(monotonic, self.ttl, Lease::largest(policies.gcra()))
            } else {
                0
            };
            state.spend_quotas(tokens);
            self.metrics.lease_tokens_spent.inc_by(tokens);
            if low && !self.partition(cell).is_away() {
                self.take_off(cell, &mut state, policies, (1, size));
            }
            decision(&mut state, policies, (now, monotonic), Outcome::Allowed)
        } else if let Some(until) = lease.held(tokens, monotonic)
            && !self.partition(cell).is_away()
        {
            let mut denial = Denial::default();
            // Until the counters may be asked again, and until as many are there as this one needs.
            denial.add(Policy::Rpm, NonZeroU64::new(until - monotonic));
            let gcra = policies.gcra();
            let debt = lease.debt(gcra, monotonic);
            denial.add_rate(gcra.decide(now.0.saturating_add(debt), now, cost));
            let outcome = denial.outcome();
            decision(&mut state, policies, (now, monotonic), outcome)
        } else {
            self.cells.after(cell, &mut state, None);
            let never = policies.gcra().price(cost) > policies.gcra().tau();
            return Ok(if never { Look::Peek } else { Look::Take });
        };
        self.cells.after(cell, &mut state, Some(&decision));
        Ok(Look::Done(decision))
    }

    /// Starts fetching the next lease, of `size` with what is in hand, unless it is being fetched.
    #[cold]
    fn take_off(
        &self,
        cell: &Arc<KeyCell>,
        state: &mut CellState,
        policies: &Policies,
        (need, size): (u64, u64),
    ) {
        let (Ok(runtime), Some(inner)) = (Handle::try_current(), self.me.upgrade()) else {
            return;
        };
        let lease = state.lease();
        if lease.is_flying() || self.cells.is_draining() {
            return;
        }
        let want = size.saturating_sub(lease.in_hand()).max(need);
        let back = lease.unspent();
        lease.take_off();
        let call = self.call(cell, policies, (need, want), back);
        runtime.spawn(fly(inner, Arc::clone(cell), call));
    }

    /// Asks for the rate of one request, by a call of its own or by the flight that all wait for.
    async fn ask_rate(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        (began, until): (u64, time::Instant),
    ) -> Asked {
        if self.partition(cell).is_away() {
            return Asked::Away;
        }
        if time::Instant::now() >= until {
            return Asked::Late;
        }
        let tokens = u64::from(cost.get());
        let landed = {
            let mut landed = Box::pin(cell.taken.notified());
            let mut state = cell.state.lock();
            let monotonic = self.clock.monotonic();
            let lease = state.lease();
            let failures = lease.failures();
            if !self.leases(policies) {
                None
            } else if lease.is_flying() {
                lease.count(tokens);
                landed.as_mut().enable();
                Some((landed, failures))
            } else {
                let size = lease.pace(monotonic, self.ttl, Lease::largest(policies.gcra()));
                if size < 2 || tokens >= size {
                    lease.count(tokens);
                    // What is in hand is too little for this one. It is of more use in the bucket that it asks.
                    lease.surrender_all();
                    None
                } else {
                    landed.as_mut().enable();
                    self.take_off(cell, &mut state, policies, (tokens, size));
                    Some((landed, failures))
                }
            }
        };
        if let Some((landed, failures)) = landed {
            return match deadline::by(until, landed).await {
                // Not again at once what has just failed.
                Ok(()) if cell.state.lock().lease().failures() != failures => Asked::Away,
                Ok(()) => Asked::LookAgain,
                // There were answers for this key, but others were quicker.
                Err(_) if cell.state.lock().lease().seen_at() > began => Asked::Late,
                Err(_) => Asked::Away,
            };
        }
        let Some((hand, reply)) = self.ask_once(cell, policies, (tokens, tokens), until).await
        else {
            return Asked::Away;
        };
        match reply.state {
            BucketState::Beginning { .. } => Asked::Away,
            BucketState::Known { granted: 0, .. } => Asked::Denied,
            BucketState::Known { .. } => Asked::Granted(hand),
        }
    }

    /// A call for one request. What it grants is in the hand that comes with the answer, and goes back with it if it is
    /// not spent.
    async fn ask_once(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        (need, want): (u64, u64),
        until: time::Instant,
    ) -> Option<(Hand, TakeReply)> {
        let inner = self.me.upgrade()?;
        let back = cell.state.lock().lease().unspent();
        let call = self.call(cell, policies, (need, want), back);
        let (tell, told) = oneshot::channel();
        let cell = Arc::clone(cell);
        // A task of its own: the caller may go away, and the answer must be heard all the same.
        tokio::spawn(async move {
            let Some(reply) = inner.ask(call).await else {
                return;
            };
            let mut granted = 0;
            if let BucketState::Known { debt, granted: n } = reply.state {
                granted = n;
                let mut state = cell.state.lock();
                state.lease().saw(debt, inner.clock.monotonic());
            }
            let hand = Hand {
                inner,
                call,
                granted,
                taken_at: reply.at,
            };
            let _ = tell.send((hand, reply));
        });
        deadline::by(until, told).await.ok()?.ok()
    }

    /// Spends what was granted to this request, if the quotas still have it.
    fn spend(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        mut hand: Hand,
    ) -> Option<Decision> {
        let (mut state, now) = self.cells.current(cell, policies);
        if !state.spend_quotas(u64::from(cost.get())) {
            drop(state);
            return None;
        }
        hand.granted = 0;
        self.metrics
            .lease_tokens_spent
            .inc_by(u64::from(cost.get()));
        let times = (now, self.clock.monotonic());
        let decision = decision(&mut state, policies, times, Outcome::Allowed);
        self.cells.after(cell, &mut state, Some(&decision));
        Some(decision)
    }

    /// The denial of a request as things are known here, for at least `wait` by the rate; `None` if nothing
    /// denies it.
    fn denial(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        wait: Option<NonZeroU64>,
    ) -> Option<Decision> {
        let (mut state, now) = self.cells.current(cell, policies);
        let monotonic = self.clock.monotonic();
        let mut denial = state.quotas(u64::from(cost.get()), now).denial;
        let gcra = policies.gcra();
        let debt = state.lease().debt(gcra, monotonic);
        denial.add_rate(gcra.decide(now.0.saturating_add(debt), now, cost));
        if wait.is_some() {
            denial.add(Policy::Rpm, wait);
        }
        if denial.violated.is_empty() {
            return None;
        }
        let outcome = denial.outcome();
        let decision = decision(&mut state, policies, (now, monotonic), outcome);
        self.cells.after(cell, &mut state, Some(&decision));
        Some(decision)
    }

    /// Decides without the counters, by the plan's choice; `None` if the quotas must be looked at again.
    pub(super) fn without_counters(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Option<Decision>, LimiterError> {
        let on_failure = policies.on_failure().unwrap_or(self.settings.on_failure);
        let outage = self.partition(cell).outage();
        let (mut state, now) = self.cells.current(cell, policies);
        let monotonic = self.clock.monotonic();
        let tokens = u64::from(cost.get());
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
                        let since = outage.since.max(since);
                        let verdict = share.take(gcra, place, since, cost, monotonic);
                        let debt = share.tat.saturating_sub(monotonic);
                        (verdict, rate(policies, now, debt.min(gcra.tau())))
                    }
                    // A call that failed while others do not, or nobody knows how many share: as if the
                    // share had just begun, empty.
                    _ => (Err(A_SECOND), rate(policies, now, gcra.tau())),
                }
            }
        };
        let outcome = match verdict {
            Ok(()) => {
                state.spend_quotas(tokens);
                self.metrics.admitted_degraded.inc();
                Outcome::Allowed
            }
            Err(wait) => {
                let mut denial = Denial::default();
                denial.add(Policy::Rpm, Some(wait));
                denial.outcome()
            }
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
        // When the counters are first needed, and until when they are waited for.
        let from_now = || {
            let until = time::Instant::now() + self.settings.deadline;
            (self.clock.monotonic(), until)
        };
        let mut times = from_now();
        let _claim = self.cells.claim(cell, cost);
        loop {
            let look = match self.look(cell, policies, cost) {
                Ok(look) => look,
                Err(_) => {
                    let again = || self.look(cell, policies, cost);
                    let fetched = self.cells.fetch(cell, cost, again).await;
                    // What the ledger took its time for is not the counters' delay.
                    times = from_now();
                    match fetched {
                        Ok(look) => look,
                        // Deny if the rate does so anyhow.
                        Err(error) => {
                            self.refresh(cell, policies, times.1).await;
                            return self.denial(cell, policies, cost, None).ok_or(error);
                        }
                    }
                }
            };
            match look {
                Look::Done(decision) => return Ok(decision),
                Look::Peek => {
                    self.refresh(cell, policies, times.1).await;
                    if let Some(decision) = self.denial(cell, policies, cost, None) {
                        return Ok(decision);
                    }
                }
                Look::Take => match self.ask_rate(cell, policies, cost, times).await {
                    Asked::LookAgain => {}
                    Asked::Granted(hand) => {
                        if let Some(decision) = self.spend(cell, policies, cost, hand) {
                            return Ok(decision);
                        }
                    }
                    Asked::Denied => {
                        let denial = self.denial(cell, policies, cost, None);
                        // Tokens may have come meanwhile, or the counters know another version of the plan.
                        let soon = || self.denial(cell, policies, cost, Some(A_MOMENT));
                        if let Some(decision) = denial.or_else(soon) {
                            return Ok(decision);
                        }
                    }
                    Asked::Late => {
                        // Nothing says that there are none: soon it may be tried again.
                        let soon = policies.gcra().price(cost).min(self.deadline());
                        let wait = NonZeroU64::new(soon);
                        if let Some(decision) = self.denial(cell, policies, cost, wait) {
                            return Ok(decision);
                        }
                    }
                    Asked::Away => {
                        if let Some(decision) = self.without_counters(cell, policies, cost)? {
                            return Ok(decision);
                        }
                    }
                },
            }
        }
    }

    /// In nanoseconds.
    fn deadline(&self) -> u64 {
        nanos(self.settings.deadline).max(1)
    }

    /// Asks how full the bucket is, and takes nothing.
    async fn refresh(&self, cell: &Arc<KeyCell>, policies: &Policies, until: time::Instant) {
        if !self.partition(cell).is_away() {
            self.ask_once(cell, policies, (0, 0), until).await;
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
fn rate(policies: &Policies, now: UnixNanos, debt: u64) -> PolicyState {
    let gcra = policies.gcra();
    PolicyState {
        policy: Policy::Rpm,
        limit: u64::from(policies.rate().burst.get()),
        remaining: gcra.tau().saturating_sub(debt) / gcra.emission(),
        reset_at: now.saturating_add(debt),
        shortened_to: None,
    }
}
