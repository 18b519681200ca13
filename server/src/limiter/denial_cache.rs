//! A cache of denials in front of a remote store, so that repeating a denial does not need a round trip.
//!
//! The cache denies requests by two mechanisms: a local bucket with the key's rate, and the store's last denial, which
//! is repeated until the limits, or the state behind the denial, may have changed. Both mechanisms deny only requests
//! that the store would deny. A denial by the cache does not consume tokens, and neither does a denial by the store. So
//! the local bucket is charged only for requests that the store has allowed. (Charging first and refunding denied
//! requests is not equivalent: the bucket may have been full between the two steps, and the refund would then credit
//! tokens that were never taken.) Degraded decisions must not be recorded, because they do not show what the shared
//! counters would decide: a request that the counters would allow must not be denied.
//!
//! The local store decides without a round trip, so a cache in front of it would only add cost. The limiter skips the
//! cache if [`LimitStore::is_local`].
//!
//! The cache uses monotonic time, so that setting the system clock back does not lock out any key.
//!
//! [`LimitStore::is_local`]: super::store::LimitStore::is_local

use std::num::{NonZeroU32, NonZeroU64};

use super::{
    decision::{Decision, Outcome, PolicyState},
    limits::Policies,
    policy::{Policy, PolicySet},
    rate::gcra::{Gcra, Verdict},
};
use crate::clock::{Clock, Moment, Monotonic, Nanos};

/// A key's denial cache. Empty until the first decision by a remote store.
#[derive(Debug, Default)]
pub(super) struct DenialCache {
    /// The fingerprint of the policies that the store's last decision applied. `None` before the first decision.
    /// Decisions under other policies are neither used nor kept.
    fingerprint: Option<u64>,
    /// The TAT of the local bucket. This bucket never allows a request, since the store decides every request that the
    /// cache does not deny. After an edit, the local bucket starts full. The store keeps the earlier usage, but the
    /// cache does not know when the store learned of the edit, and therefore does not know how much the store's bucket
    /// has refilled. The cache must not deny a request that the store would allow.
    tat: Monotonic,
    /// When the store's bucket is full, according to its last decision, which includes other replicas' usage.
    full_at: Monotonic,
    /// The daily and the monthly quota in the store's last decision. `None` if the key has no quotas.
    quotas: Option<Box<[Option<PolicyState>; 2]>>,
    denied: Option<Box<Denied>>,
}

/// The times of a decision by the store.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// When the call to the store began.
    pub(super) asked_at: Monotonic,
    /// When the call to the store returned.
    pub(super) now: Monotonic,
}

/// The maximum time for which a denial is cached. The time is short, because the tokens of canceled requests are
/// returned, and other replicas may return unused tokens.
const DENIAL: Nanos = Nanos::from_secs(1);

/// A denial by the store, to be repeated for requests with the same cost.
#[derive(Debug, Clone, Copy)]
struct Denied {
    cost: NonZeroU32,
    /// When to stop repeating the denial.
    believed_until: Monotonic,
    /// When the request would be allowed, according to the store.
    retry_at: Monotonic,
    decision: Decision,
}

impl Denied {
    fn new(
        gcra: Gcra,
        cost: NonZeroU32,
        now: Monotonic,
        decision: &Decision,
        rate_memory: Option<Nanos>,
    ) -> Option<Self> {
        let retry_after = Nanos(decision.retry_after()?);
        // The time until the reason for the denial may change.
        let mut believed = retry_after.min(DENIAL);
        if decision.violated().contains(Policy::Rpm) {
            // Another replica may return tokens, so the denial is trusted for at most `rate_memory`.
            believed = believed.min(rate_memory.unwrap_or(Nanos::MAX));
            match gcra.decide(now.saturating_add(debt(decision)), now, cost) {
                Verdict::Wait { wait } => believed = believed.min(Nanos(wait.get())),
                // The request fits into the bucket as reported, for example because the bucket refilled while the
                // response was in transit.
                Verdict::Fits { .. } => return None,
                Verdict::NeverFits => {}
            }
        }
        for quota in [decision.daily, decision.monthly].into_iter().flatten() {
            believed = believed.min(quota.reset_at.saturating_since(decision.at));
        }
        Some(Self {
            cost,
            believed_until: now.saturating_add(believed),
            retry_at: now.saturating_add(retry_after),
            decision: *decision,
        })
    }
}

/// Returns the time from a decision until the bucket is full.
fn debt(decision: &Decision) -> Nanos {
    decision.rate.reset_at.saturating_since(decision.at)
}

impl DenialCache {
    /// Returns a denial if the cache has one for this request.
    pub(super) fn find(
        &self,
        policies: &Policies,
        cost: NonZeroU32,
        clock: &dyn Clock,
    ) -> Option<Decision> {
        // If the store has not decided a request since the last edit, it must decide this one.
        if self.fingerprint != Some(policies.fingerprint()) {
            return None;
        }
        let at = clock.moment();
        self.remembered(policies, cost, at)
            .or_else(|| self.over_rate(policies, cost, at))
    }

    /// Records a decision by the store, which must not be degraded. A denial is cached for at most [`DENIAL`], and a
    /// denial by the rate limit also for at most `rate_memory`. The store may have decided at any time after the call
    /// started, so the bucket is assumed to have been refilling since then. Otherwise, the cache could deny a request
    /// that the store would allow.
    pub(super) fn record(
        &mut self,
        policies: &Policies,
        cost: NonZeroU32,
        Times { asked_at, now }: Times,
        decision: &Decision,
        rate_memory: impl FnOnce() -> Option<Nanos>,
    ) {
        if self.fingerprint != Some(policies.fingerprint()) {
            *self = Self {
                fingerprint: Some(policies.fingerprint()),
                ..Self::default()
            };
        }
        self.full_at = now.saturating_add(debt(decision));
        let quotas = [decision.daily, decision.monthly];
        if quotas == [None, None] {
            self.quotas = None;
        } else {
            **self.quotas.get_or_insert_default() = quotas;
        }
        let gcra = policies.gcra();
        match decision.outcome {
            Outcome::Allowed => {
                self.denied = None;
                let charged = self.tat.max(asked_at).saturating_add(gcra.price(cost));
                // A bucket cannot be more than empty.
                self.tat = gcra.settled(charged, now);
            }
            Outcome::Denied { .. } => {
                let denied = Denied::new(gcra, cost, now, decision, rate_memory());
                self.denied = denied.map(Box::new);
            }
        }
    }

    /// Returns whether a new cache would find the same denials.
    pub(super) fn is_like_new(&self, now: Monotonic) -> bool {
        let is_over = |denied: &Denied| denied.believed_until <= now;
        self.tat <= now && self.full_at <= now && self.denied.as_deref().is_none_or(is_over)
    }

    fn remembered(&self, policies: &Policies, cost: NonZeroU32, at: Moment) -> Option<Decision> {
        let (now, monotonic) = (at.calendar, at.monotonic);
        let denied = self
            .denied
            .as_deref()
            .filter(|denied| denied.cost == cost && monotonic < denied.believed_until)?;
        let left = NonZeroU64::new(denied.retry_at.saturating_since(monotonic).0)?;
        let mut decision = denied.decision;
        let Outcome::Denied { violated, .. } = decision.outcome else {
            return None;
        };
        // The bucket has been refilling since the denial. This uses monotonic times, because the calendar clock, which
        // the decision uses, may have been adjusted since.
        decision.rate.remaining = policies.gcra().remaining(self.full_at, monotonic);
        decision.rate.reset_at = now.saturating_add(self.full_at.saturating_since(monotonic));
        decision.at = now;
        decision.monotonic = monotonic;
        decision.outcome = Outcome::Denied {
            violated,
            retry_after: Some(left),
        };
        Some(decision)
    }

    fn over_rate(&self, policies: &Policies, cost: NonZeroU32, at: Moment) -> Option<Decision> {
        let (now, monotonic) = (at.calendar, at.monotonic);
        let gcra = policies.gcra();
        // If the request fits into the local bucket, or its cost exceeds the burst, the store decides.
        let Verdict::Wait { .. } = gcra.decide(self.tat, monotonic, cost) else {
            return None;
        };
        let tat = self.tat.max(self.full_at);
        let Verdict::Wait { wait } = gcra.decide(tat, monotonic, cost) else {
            return None;
        };
        let mut violated = PolicySet::EMPTY.with(Policy::Rpm);
        let mut retry_after = wait;
        let known = self.quotas.as_deref().copied().unwrap_or_default();
        let mut quotas = [None, None];
        for ((state, known), (policy, limit)) in quotas.iter_mut().zip(known).zip([
            (Policy::Daily, policies.daily()),
            (Policy::Monthly, policies.monthly()),
        ]) {
            let Some(limit) = limit else { continue };
            let known = known?;
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
            monotonic,
            outcome: Outcome::Denied {
                violated,
                retry_after: Some(retry_after),
            },
            rpm: policies.rate().rpm,
            rate: PolicyState {
                policy: Policy::Rpm,
                limit: u64::from(policies.rate().burst.get()),
                remaining: gcra.remaining(tat, monotonic),
                reset_at: now.saturating_add(tat.saturating_since(monotonic)),
                shortened_to: None,
            },
            daily: quotas[0],
            monthly: quotas[1],
            tenant_monthly: None,
            degraded: false,
        })
    }
}
