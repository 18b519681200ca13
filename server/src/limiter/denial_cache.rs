//! A cache of denials in front of a remote store, so that repeating a denial does not need a round trip.
//!
//! Two mechanisms deny requests here: a `governor` limiter with the plan's rate, and the store's last denial, which is
//! repeated until the plan, or the state behind the denial, may have changed. Both mechanisms only repeat what the
//! store would decide. A denial by the cache does not consume tokens, and neither does a denial by the store. So
//! `governor` gets a state store that reports what would happen without changing anything, and the limiter is charged
//! only for requests that the store has allowed. (Charging first and refunding denied requests is not equivalent: the
//! bucket may have been full between the two steps, and the refund would then credit tokens that were never taken.)
//! Degraded decisions are not recorded, because they do not show what the shared counters would decide: a request that
//! the counters would allow must not be denied.
//!
//! The local store keeps its state in the same handle, so a cache in front of the local store would only add cost. The
//! limiter skips the cache if [`LimitStore::is_local`].
//!
//! The cache uses monotonic time, so that setting the system clock back does not lock out any key.
//!
//! [`LimitStore::is_local`]: super::store::LimitStore::is_local

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use governor::{
    Quota, RateLimiter,
    middleware::NoOpMiddleware,
    state::{NotKeyed, StateStore},
};
use parking_lot::Mutex;

use super::{
    decision::{Decision, Outcome, PolicyState},
    limits::Policies,
    policy::{Policy, PolicySet, RatePolicy},
    rate::gcra::{Gcra, Verdict},
};
use crate::clock::{Clock, GovernorClock, Instant, Monotonic, Nanos, UnixNanos};

/// Converts a rate for `governor`, with the interval rounded up as in [`Gcra`].
fn governor_quota(rate: RatePolicy) -> Quota {
    let gcra = Gcra::new(rate);
    // Cap the burst as `Gcra` does, because governor does not check for overflow.
    let burst = gcra.tokens(gcra.tau()).max(1);
    let burst = u32::try_from(burst)
        .ok()
        .and_then(NonZeroU32::new)
        .unwrap_or(NonZeroU32::MAX);
    Quota::with_period(gcra.emission().into())
        .unwrap_or_else(|| Quota::per_second(NonZeroU32::MIN))
        .allow_burst(burst)
}

/// Monotonic time since the governor limiter was created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
#[repr(transparent)]
struct Elapsed(u64);

impl Elapsed {
    const ZERO: Self = Self(0);
}

impl Instant for Elapsed {
    fn saturating_add(self, time: Nanos) -> Self {
        Self(self.0.saturating_add(time.0))
    }

    fn saturating_since(self, earlier: Self) -> Nanos {
        Nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A TAT that `governor` can read but not change.
#[derive(Debug, Clone, Default)]
struct SharedTat(Arc<AtomicU64>);

impl SharedTat {
    fn load(&self) -> Elapsed {
        Elapsed(self.0.load(Ordering::Acquire))
    }

    fn store(&self, tat: Elapsed) {
        self.0.store(tat.0, Ordering::Release);
    }
}

impl StateStore for SharedTat {
    type Key = NotKeyed;

    fn measure_and_replace<T, F, E>(&self, _: &NotKeyed, decide: F) -> Result<T, E>
    where
        F: Fn(Option<governor::nanos::Nanos>) -> Result<(T, governor::nanos::Nanos), E>,
    {
        decide(Some(self.load().0.into())).map(|(answer, _)| answer)
    }
}

/// A key's denial cache. Empty until the first decision by a remote store.
#[derive(Debug, Default)]
pub(super) struct DenialCache(Mutex<Option<Box<LocalBucket>>>);

#[derive(Debug)]
struct LocalBucket {
    fingerprint: u64,
    gcra: Gcra,
    limiter:
        RateLimiter<NotKeyed, SharedTat, GovernorClock, NoOpMiddleware<governor::nanos::Nanos>>,
    tat: SharedTat,
    /// When the limiter was created.
    start: Monotonic,
    /// The store's last decision, and when it was recorded.
    last: Option<(Decision, Elapsed)>,
    denied: Option<Denied>,
}

/// The maximum time for which a denial by a quota is cached. The time is short, because other replicas may return
/// tokens.
const QUOTA_DENIAL: Nanos = Nanos::from_secs(1);

/// A denial by the store, to be repeated for requests with the same cost.
#[derive(Debug, Clone, Copy)]
struct Denied {
    cost: NonZeroU32,
    /// When the denial was recorded.
    at: Elapsed,
    /// When to stop repeating the denial.
    believed_until: Elapsed,
    /// When the request would be allowed, according to the store.
    retry_at: Elapsed,
    decision: Decision,
}

impl Denied {
    fn new(
        gcra: Gcra,
        cost: NonZeroU32,
        elapsed: Elapsed,
        decision: &Decision,
        rate_memory: Option<Nanos>,
    ) -> Option<Self> {
        let retry_after = Nanos(decision.retry_after()?);
        // The time until the reason for the denial may change.
        let mut believed = retry_after;
        if decision.violated().contains(Policy::Rpm) {
            // Another replica may return tokens.
            believed = believed.min(rate_memory.unwrap_or(Nanos::MAX));
            let missing = decision.rate.reset_at.saturating_since(decision.at);
            let tat = Elapsed::ZERO.saturating_add(missing);
            match gcra.decide(tat, Elapsed::ZERO, cost) {
                Verdict::Wait { wait } => believed = believed.min(Nanos(wait.get())),
                // The bucket refilled while the response was in transit, so the request now fits.
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
            at: elapsed,
            believed_until: elapsed.saturating_add(believed),
            retry_at: elapsed.saturating_add(retry_after),
            decision: *decision,
        })
    }
}

/// Returns the time until the bucket is full, according to a decision that was recorded earlier. Uses the monotonic
/// times `recorded` and `elapsed`, because the calendar clock that the decision uses may have been set since.
fn debt_left(decision: &Decision, recorded: Elapsed, elapsed: Elapsed) -> Nanos {
    let debt = decision.rate.reset_at.saturating_since(decision.at);
    debt.saturating_sub(elapsed.saturating_since(recorded))
}

impl LocalBucket {
    fn new(policies: &Policies, clock: &Arc<dyn Clock>) -> Self {
        let tat = SharedTat::default();
        let clock = GovernorClock(Arc::clone(clock));
        let start = clock.0.monotonic();
        Self {
            fingerprint: policies.fingerprint(),
            gcra: policies.gcra(),
            limiter: RateLimiter::new(governor_quota(policies.rate()), tat.clone(), clock),
            tat,
            start,
            last: None,
            denied: None,
        }
    }

    /// Applies edited policies and discards the cached decisions. If the rate was edited, the local bucket starts full.
    /// The local bucket never allows a request, since the store decides every request that is not denied here. The
    /// store keeps the usage, but the cache does not know when the store learned of the edit, and therefore does not
    /// know how far the store's bucket has refilled. A request that the store would allow must not be denied here.
    fn apply_edit(&mut self, policies: &Policies, clock: &Arc<dyn Clock>) {
        if self.gcra == policies.gcra() {
            self.fingerprint = policies.fingerprint();
            (self.last, self.denied) = (None, None);
        } else {
            *self = Self::new(policies, clock);
        }
    }

    fn at(&self, time: Monotonic) -> Elapsed {
        Elapsed(time.saturating_since(self.start).0)
    }

    /// Returns the time until the bucket is full: the longer of the local estimate and the store's last report, which
    /// includes other replicas' usage.
    fn debt(&self, last: &Decision, recorded: Elapsed, elapsed: Elapsed) -> Nanos {
        let here = self.tat.load().saturating_since(elapsed);
        here.max(debt_left(last, recorded, elapsed))
    }

    fn remembered(&self, cost: NonZeroU32, elapsed: Elapsed, now: UnixNanos) -> Option<Decision> {
        let denied = self
            .denied
            .filter(|denied| denied.cost == cost && elapsed < denied.believed_until)?;
        let left = NonZeroU64::new(denied.retry_at.saturating_since(elapsed).0)?;
        let mut decision = denied.decision;
        let Outcome::Denied { violated, .. } = decision.outcome else {
            return None;
        };
        // The bucket has been refilling since the denial.
        let full_in = debt_left(&decision, denied.at, elapsed);
        let tat = Elapsed::ZERO.saturating_add(full_in);
        decision.rate.remaining = self.gcra.remaining(tat, Elapsed::ZERO);
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
        elapsed: Elapsed,
        now: UnixNanos,
    ) -> Option<Decision> {
        // If the store has not decided since the last edit, or the cost exceeds the burst, the store decides.
        let (last, recorded) = self.last?;
        self.limiter.check_n(cost).ok()?.err()?;
        let debt = self.debt(&last, recorded, elapsed);
        let tat = Elapsed::ZERO.saturating_add(debt);
        let Verdict::Wait { wait } = self.gcra.decide(tat, Elapsed::ZERO, cost) else {
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
            // If the window has ended, or the cost exceeds the quota, the store decides.
            let left = NonZeroU64::new(known.reset_at.saturating_since(now).0)?;
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
                remaining: self.gcra.remaining(tat, Elapsed::ZERO),
                reset_at: now.saturating_add(debt),
                shortened_to: None,
            },
            daily: quotas[0],
            monthly: quotas[1],
            tenant_monthly: None,
            degraded: false,
        })
    }
}

impl DenialCache {
    /// Returns a denial if the cache has one for this request.
    pub(super) fn find(
        &self,
        policies: &Policies,
        cost: NonZeroU32,
        clock: &Arc<dyn Clock>,
    ) -> Option<Decision> {
        let mut known = self.0.lock();
        let known = current(&mut known, policies, clock);
        let elapsed = known.at(clock.monotonic());
        let now = clock.now();
        known
            .remembered(cost, elapsed, now)
            .or_else(|| known.over_rate(policies, cost, elapsed, now))
    }

    /// Records a decision by the store, unless the decision is degraded. A denial by the rate limit is cached for at
    /// most `rate_memory`. The bucket is assumed to have been refilling since the call started at `asked_at`: the store
    /// may have decided at any time after that, and a request that the store would allow must not be denied here.
    pub(super) fn record(
        &self,
        policies: &Policies,
        cost: NonZeroU32,
        clock: &Arc<dyn Clock>,
        asked_at: Monotonic,
        decision: &Decision,
        rate_memory: impl FnOnce() -> Option<Nanos>,
    ) {
        if decision.degraded {
            return;
        }
        let mut known = self.0.lock();
        let known = current(&mut known, policies, clock);
        let elapsed = known.at(clock.monotonic());
        known.last = Some((*decision, elapsed));
        match decision.outcome {
            Outcome::Allowed => {
                known.denied = None;
                let price = known.gcra.price(cost);
                let charged = known.tat.load().max(known.at(asked_at));
                // At most the whole burst can be missing.
                let tat = known.gcra.settled(charged.saturating_add(price), elapsed);
                known.tat.store(tat);
            }
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
            old.apply_edit(policies, clock);
        }
        _ => {}
    }
    known.get_or_insert_with(|| Box::new(LocalBucket::new(policies, clock)))
}
