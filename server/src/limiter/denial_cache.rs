//! What this replica refuses by itself, in front of a store that is elsewhere.
//!
//! Owns the `governor` limiter of a key and the memory of its denials. Knows no store and no HTTP. Depends on nothing that
//! can be down.
//!
//! A denial should not cost a round trip. Two things refuse here: a `governor` limiter
//! that holds this replica to the plan's whole rate, and the memory of the store's last denial until one of
//! its facts changes or the plan does. Both only ever repeat what the store would say, so a denial here takes nothing
//! anywhere; and a denial by the store must take nothing here. That is arranged by looking first and charging
//! later: the state store given to `governor` answers what would happen and keeps what is, and only what the
//! store admitted is charged to it. (Admitting and refunding is not the same: between the two the bucket may
//! have been full, and a refund would credit what was never taken from anybody.)
//!
//! In front of the *memory* store this could only cost: the same numbers lie in the same handle, one lock and a
//! few additions away. So the limiter passes it by where [`LimitStore::is_local`] says so.
//!
//! It runs on the monotonic clock: a calendar set back must not lock anybody out.
//!
//! [`LimitStore::is_local`]: super::store::LimitStore::is_local

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use governor::{
    Quota, RateLimiter,
    middleware::NoOpMiddleware,
    nanos::Nanos,
    state::{NotKeyed, StateStore},
};
use parking_lot::Mutex;

use super::{
    decision::{Decision, Outcome, PolicyState},
    policy::{Policies, Policy, PolicySet, RatePolicy},
    rate::gcra::{Gcra, Verdict},
};
use crate::clock::{Clock, UnixNanos};

/// Our clock as `governor` reads one.
#[derive(Debug, Clone)]
pub(super) struct Monotonic(pub(super) Arc<dyn Clock>);

impl governor::clock::Clock for Monotonic {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Nanos::new(self.0.monotonic())
    }
}

/// `rate` as `governor` reads it, with the interval rounded up as ours is.
fn governor_quota(rate: RatePolicy) -> Quota {
    let gcra = Gcra::new(rate);
    // Cut as `Gcra` cuts it: governor multiplies unchecked.
    let burst = (gcra.tau() / gcra.emission()).max(1);
    let burst = u32::try_from(burst)
        .ok()
        .and_then(NonZeroU32::new)
        .unwrap_or(NonZeroU32::MAX);
    Quota::with_period(Duration::from_nanos(gcra.emission()))
        .unwrap_or_else(|| Quota::per_second(NonZeroU32::MIN))
        .allow_burst(burst)
}

/// A state that `governor` may look at and not change: the TAT, in nanoseconds since the limiter was made.
#[derive(Debug, Clone, Default)]
struct SharedTat(Arc<AtomicU64>);

impl StateStore for SharedTat {
    type Key = NotKeyed;

    fn measure_and_replace<T, F, E>(&self, _: &NotKeyed, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let tat = self.0.load(Ordering::Acquire);
        decide(Some(Nanos::new(tat))).map(|(answer, _)| answer)
    }
}

/// One key's local limiter and memory of denials. Empty until the first decision of a remote store.
#[derive(Debug, Default)]
pub(super) struct DenialCache(Mutex<Option<Box<LocalBucket>>>);

#[derive(Debug)]
struct LocalBucket {
    fingerprint: u64,
    gcra: Gcra,
    limiter: RateLimiter<NotKeyed, SharedTat, Monotonic, NoOpMiddleware<Nanos>>,
    tat: SharedTat,
    /// Nanoseconds of refill missing beyond an empty bucket, from before the burst was made smaller.
    beyond: u64,
    /// When tokens were last charged, or the plan was edited, since the limiter's zero.
    used_at: u64,
    /// Some of what is charged was admitted without the store.
    degraded: bool,
    /// The limiter's zero, on the monotonic clock.
    start: u64,
    /// What the store last said, and what it admitted since.
    last: Option<Decision>,
    denied: Option<Denied>,
}

/// How long a denial by a quota is believed, in nanoseconds: somebody may give tokens back.
const QUOTA_DENIAL: u64 = 1_000_000_000;

/// A denial of this cost, and what is known of its end. On the monotonic clock, since the limiter's zero.
#[derive(Debug, Clone, Copy)]
struct Denied {
    cost: NonZeroU32,
    /// Until then the same request gets the same answer.
    believed_until: u64,
    /// Then it is admitted.
    retry_at: u64,
    decision: Decision,
}

impl Denied {
    fn new(
        gcra: Gcra,
        cost: NonZeroU32,
        elapsed: UnixNanos,
        decision: &Decision,
        rate_memory: Option<u64>,
    ) -> Option<Self> {
        let retry_after = decision.retry_after()?;
        // Until the first of its facts changes.
        let mut believed = retry_after;
        if decision.violated().contains(Policy::Rpm) {
            // Another replica may return tokens.
            believed = believed.min(rate_memory.unwrap_or(u64::MAX));
            let missing = decision.rate.reset_at.saturating_since(decision.at);
            match gcra.decide(missing, UnixNanos(0), cost) {
                Verdict::Wait { wait } => believed = believed.min(wait.get()),
                // The bucket has refilled while the answer was on its way.
                Verdict::Fits { .. } => return None,
                Verdict::NeverFits => {}
            }
        }
        for quota in [decision.daily, decision.monthly].into_iter().flatten() {
            believed = believed.min(quota.reset_at.saturating_since(decision.at));
            if decision.violated().contains(quota.policy) {
                believed = believed.min(QUOTA_DENIAL);
            }
        }
        Some(Self {
            cost,
            believed_until: elapsed.0.saturating_add(believed),
            retry_at: elapsed.0.saturating_add(retry_after),
            decision: *decision,
        })
    }
}

impl LocalBucket {
    fn new(policies: &Policies, clock: &Arc<dyn Clock>) -> Self {
        let tat = SharedTat::default();
        let clock = Monotonic(Arc::clone(clock));
        let start = governor::clock::Clock::now(&clock).as_u64();
        Self {
            fingerprint: policies.fingerprint(),
            gcra: policies.gcra(),
            limiter: RateLimiter::new(governor_quota(policies.rate()), tat.clone(), clock),
            tat,
            beyond: 0,
            used_at: 0,
            degraded: false,
            start,
            last: None,
            denied: None,
        }
    }

    /// Follows edited policies: what was spent stays spent, what was known is forgotten.
    fn follow(&mut self, policies: &Policies, clock: &Arc<dyn Clock>) {
        if self.gcra == policies.gcra() {
            self.fingerprint = policies.fingerprint();
            (self.last, self.denied) = (None, None);
            return;
        }
        let mut next = Self::new(policies, clock);
        next.degraded = self.degraded;
        let now = UnixNanos(next.start.saturating_sub(self.start));
        let bucket = (self.tat.0.load(Ordering::Acquire), self.beyond);
        let used_at = UnixNanos(self.used_at);
        let (carried, beyond) = next.gcra.carry_over(self.gcra, bucket, used_at, now);
        next.beyond = beyond;
        next.tat.0.store(carried - now.0, Ordering::Release);
        *self = next;
    }

    fn elapsed(&self, clock: &Arc<dyn Clock>) -> UnixNanos {
        UnixNanos(clock.monotonic().saturating_sub(self.start))
    }

    /// The rate as it stands here at `now`.
    fn rate(&self, policies: &Policies, elapsed: UnixNanos, now: UnixNanos) -> PolicyState {
        let tat = self.tat.0.load(Ordering::Acquire);
        PolicyState {
            policy: Policy::Rpm,
            limit: u64::from(policies.rate().burst.get()),
            remaining: self.gcra.remaining(tat, elapsed),
            reset_at: now.saturating_add(tat.saturating_sub(elapsed.0)),
            shortened_to: None,
        }
    }

    fn remembered(&self, cost: NonZeroU32, elapsed: UnixNanos, now: UnixNanos) -> Option<Decision> {
        let denied = self
            .denied
            .filter(|denied| denied.cost == cost && elapsed.0 < denied.believed_until)?;
        let left = NonZeroU64::new(denied.retry_at.saturating_sub(elapsed.0))?;
        let mut decision = denied.decision;
        let Outcome::Denied { violated, .. } = decision.outcome else {
            return None;
        };
        // The bucket has filled on meanwhile.
        let full_in = decision.rate.reset_at.saturating_since(now);
        decision.rate.remaining = self.gcra.remaining(full_in, UnixNanos(0));
        decision.rate.reset_at = now.saturating_add(full_in);
        decision.at = now;
        decision.outcome = Outcome::Denied {
            violated,
            retry_after: Some(left),
        };
        Some(decision)
    }

    fn over_rate(
        &self,
        policies: &Policies,
        cost: NonZeroU32,
        elapsed: UnixNanos,
        now: UnixNanos,
    ) -> Option<Decision> {
        // After an edit the store is the first to speak. A cost above the burst is for it to word.
        let last = self.last?;
        let until = self.limiter.check_n(cost).ok()?.err()?;
        let wait = until.earliest_possible().as_u64();
        let wait = NonZeroU64::new(wait.saturating_sub(self.start + elapsed.0))?;
        let mut violated = PolicySet::EMPTY.with(Policy::Rpm);
        let mut retry_after = wait;
        let mut quotas = [None, None];
        for (state, (policy, limit)) in quotas.iter_mut().zip([
            (Policy::Daily, policies.daily()),
            (Policy::Monthly, policies.monthly()),
        ]) {
            let Some(limit) = limit else { continue };
            let known = match policy {
                Policy::Daily => last.daily?,
                _ => last.monthly?,
            };
            // Of a window that has ended nothing is known, and only the store can word what never fits.
            let left = NonZeroU64::new(known.reset_at.saturating_since(now))?;
            if u64::from(cost.get()) > limit.get() {
                return None;
            }
            if known.remaining < u64::from(cost.get()) {
                violated = violated.with(policy);
                retry_after = retry_after.max(left);
            }
            *state = Some(known);
        }
        Some(Decision {
            at: now,
            outcome: Outcome::Denied {
                violated,
                retry_after: Some(retry_after),
            },
            rpm: policies.rate().rpm,
            rate: self.rate(policies, elapsed, now),
            daily: quotas[0],
            monthly: quotas[1],
            degraded: self.degraded,
        })
    }
}

impl DenialCache {
    /// A denial that needs no store, if this replica knows one.
    pub(super) fn find(
        &self,
        policies: &Policies,
        cost: NonZeroU32,
        clock: &Arc<dyn Clock>,
    ) -> Option<Decision> {
        let mut known = self.0.lock();
        let known = current(&mut known, policies, clock);
        let elapsed = known.elapsed(clock);
        let now = clock.now();
        known
            .remembered(cost, elapsed, now)
            .or_else(|| known.over_rate(policies, cost, elapsed, now))
    }

    /// Records what the store decided. A denial by the rate is remembered for `rate_memory` nanoseconds at most. The
    /// store decided some time after it was `asked`: what was spent has been refilling since then at the most, and
    /// nothing must be refused here that the store would admit.
    pub(super) fn record(
        &self,
        policies: &Policies,
        cost: NonZeroU32,
        (clock, asked_at): (&Arc<dyn Clock>, u64),
        decision: &Decision,
        rate_memory: impl FnOnce() -> Option<u64>,
    ) {
        let mut known = self.0.lock();
        let known = current(&mut known, policies, clock);
        let elapsed = known.elapsed(clock);
        known.last = Some(*decision);
        match decision.outcome {
            Outcome::Allowed => {
                known.denied = None;
                let price = known.gcra.price(cost);
                let tat = known.tat.0.load(Ordering::Acquire);
                let asked = asked_at.saturating_sub(known.start);
                known.degraded &= tat > asked;
                known.degraded |= decision.degraded;
                known.beyond = known.gcra.beyond(known.beyond, tat, UnixNanos(asked));
                let tat = tat.max(asked);
                known.used_at = asked;
                known
                    .tat
                    .0
                    .store(tat.saturating_add(price), Ordering::Release);
            }
            // What was decided without the store says nothing of what the store would.
            Outcome::Denied { .. } if decision.degraded => known.denied = None,
            Outcome::Denied { .. } => {
                known.denied = Denied::new(known.gcra, cost, elapsed, decision, rate_memory());
            }
        }
    }
}

fn current<'a>(
    known: &'a mut Option<Box<LocalBucket>>,
    policies: &Policies,
    clock: &Arc<dyn Clock>,
) -> &'a mut LocalBucket {
    match known {
        Some(old) if old.fingerprint != policies.fingerprint() => {
            old.follow(policies, clock);
        }
        _ => {}
    }
    known.get_or_insert_with(|| Box::new(LocalBucket::new(policies, clock)))
}
