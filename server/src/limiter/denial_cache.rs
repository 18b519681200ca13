//! Denials that a replica remembers, in front of a remote store, so that repeated denials need no round trip.
//!
//! Two things deny requests here: a `governor` limiter with the plan's full rate, and the store's last denial, until
//! the state it was based on or the plan changes. Both only repeat what the store would decide. A denial here consumes
//! nothing anywhere, and a denial by the store must consume nothing here. So `governor` gets a state store that reports
//! what would happen without changing anything, and only what the store allowed is charged to it. (Charging first and
//! refunding later is not equivalent: the bucket may have been full in between, and a refund would then credit tokens
//! that nobody took.)
//!
//! In front of the local store, this would only add cost, because its state is in the same handle. So the limiter skips
//! it if [`LimitStore::is_local`].
//!
//! Uses monotonic time: setting the clock back must not lock anyone out.
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
    limits::Policies,
    policy::{Policy, PolicySet, RatePolicy},
    rate::gcra::{Gcra, Verdict},
};
use crate::clock::{Clock, GovernorClock, UnixNanos};

/// Converts a rate for `governor`, with the interval rounded up as in [`Gcra`].
fn governor_quota(rate: RatePolicy) -> Quota {
    let gcra = Gcra::new(rate);
    // Limited as in `Gcra`: governor does not check for overflow.
    let burst = (gcra.tau() / gcra.emission()).max(1);
    let burst = u32::try_from(burst)
        .ok()
        .and_then(NonZeroU32::new)
        .unwrap_or(NonZeroU32::MAX);
    Quota::with_period(Duration::from_nanos(gcra.emission()))
        .unwrap_or_else(|| Quota::per_second(NonZeroU32::MIN))
        .allow_burst(burst)
}

/// A state that `governor` can read but not change: the TAT, in nanoseconds since the limiter was created.
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

/// A key's denial cache. Empty until the first decision of a remote store.
#[derive(Debug, Default)]
pub(super) struct DenialCache(Mutex<Option<Box<LocalBucket>>>);

#[derive(Debug)]
struct LocalBucket {
    fingerprint: u64,
    gcra: Gcra,
    limiter: RateLimiter<NotKeyed, SharedTat, GovernorClock, NoOpMiddleware<Nanos>>,
    tat: SharedTat,
    /// Some charged requests were allowed without the store.
    degraded: bool,
    /// The limiter's zero, in monotonic time.
    start: u64,
    /// The store's last decision.
    last: Option<Decision>,
    denied: Option<Denied>,
}

/// How long a denial by a quota is trusted, in nanoseconds. Other replicas may return tokens.
const QUOTA_DENIAL: u64 = 1_000_000_000;

/// A denial of a cost, with monotonic times since the limiter's zero.
#[derive(Debug, Clone, Copy)]
struct Denied {
    cost: NonZeroU32,
    /// Until then, the same request is denied.
    believed_until: u64,
    /// After that, it is allowed.
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
        // The time at which its reason may change.
        let mut believed = retry_after;
        if decision.violated().contains(Policy::Rpm) {
            // Another replica may return tokens.
            believed = believed.min(rate_memory.unwrap_or(u64::MAX));
            let missing = decision.rate.reset_at.saturating_since(decision.at);
            match gcra.decide(missing, UnixNanos(0), cost) {
                Verdict::Wait { wait } => believed = believed.min(wait.get()),
                // The bucket has refilled while the response was in transit.
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
        let clock = GovernorClock(Arc::clone(clock));
        let start = governor::clock::Clock::now(&clock).as_u64();
        Self {
            fingerprint: policies.fingerprint(),
            gcra: policies.gcra(),
            limiter: RateLimiter::new(governor_quota(policies.rate()), tat.clone(), clock),
            tat,
            degraded: false,
            start,
            last: None,
            denied: None,
        }
    }

    /// Updates the state to edited policies, and discards cached decisions. If the rate was edited, the local bucket
    /// starts full again. It is unknown when the store learned of the edit, so it may have refilled by any amount
    /// since, and a request that the store would grant must not be denied here.
    fn follow(&mut self, policies: &Policies, clock: &Arc<dyn Clock>) {
        if self.gcra == policies.gcra() {
            self.fingerprint = policies.fingerprint();
            (self.last, self.denied) = (None, None);
        } else {
            *self = Self::new(policies, clock);
        }
    }

    fn elapsed(&self, clock: &Arc<dyn Clock>) -> UnixNanos {
        UnixNanos(clock.monotonic().saturating_sub(self.start))
    }

    /// Returns the number of nanoseconds until the bucket is full at `now`: as computed here or, if that is longer, as
    /// last reported by the store, since other replicas use the bucket too.
    fn debt(&self, last: &Decision, elapsed: UnixNanos, now: UnixNanos) -> u64 {
        let here = self.tat.0.load(Ordering::Acquire).saturating_sub(elapsed.0);
        here.max(last.rate.reset_at.saturating_since(now))
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
        // The bucket has refilled in the meantime.
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
        // After an edit, the store decides first. It also reports costs above the burst.
        let last = self.last?;
        self.limiter.check_n(cost).ok()?.err()?;
        let debt = self.debt(&last, elapsed, now);
        let Verdict::Wait { wait } = self.gcra.decide(debt, UnixNanos(0), cost) else {
            return None;
        };
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
            // Windows that have ended do not count, and the store reports costs above the quota.
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
            rate: PolicyState {
                policy: Policy::Rpm,
                limit: u64::from(policies.rate().burst.get()),
                remaining: self.gcra.remaining(debt, UnixNanos(0)),
                reset_at: now.saturating_add(debt),
                shortened_to: None,
            },
            daily: quotas[0],
            monthly: quotas[1],
            degraded: self.degraded,
        })
    }
}

impl DenialCache {
    /// Returns a denial if one is known without calling the store.
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

    /// Records a decision of the store. A denial by the rate is cached for `rate_memory` nanoseconds at most. The store
    /// decided after it was called, so usage has refilled at most since the call. Nothing that the store would allow
    /// may be denied here.
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
                // Replicas that decide without the counters may together allow more than the bucket contains. No more
                // than the whole burst can be missing.
                let charged = tat.max(asked).saturating_add(price);
                let tat = known.gcra.settled(charged, elapsed);
                known.tat.0.store(tat, Ordering::Release);
            }
            // A decision without the store does not show what the store would decide.
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
