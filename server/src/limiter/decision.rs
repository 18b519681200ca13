//! A decision: whether a request is allowed or denied, by which policies, and when a denied request may be retried.
//!
//! A decision contains everything that response headers and bodies report, but this module does not depend on HTTP.

use std::num::{NonZeroU32, NonZeroU64};

use super::policy::{Policy, PolicySet};
use crate::clock::{Monotonic, UnixNanos};

/// Whether the request was allowed. A denial consumes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The cost was taken from every policy. If the decision is degraded, this replica's share or separate bucket was
    /// used instead of the shared bucket.
    Allowed,
    Denied {
        /// The violated policies. Empty only if the decision is degraded: this replica's share has too few tokens, but
        /// the limit itself may not have been reached.
        violated: PolicySet,
        /// Nanoseconds until the same request would be allowed if no other request took tokens: the longest wait among
        /// the violated policies. `None` if the request can never be allowed because its cost exceeds a limit.
        retry_after: Option<NonZeroU64>,
    },
}

/// The state of a policy after the decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyState {
    pub policy: Policy,
    /// The burst for [`Policy::Rpm`], otherwise the quota of the current window.
    pub limit: u64,
    /// The number of requests with a cost of 1 that can be made now.
    pub remaining: u64,
    /// When all of `limit` is available again: when the bucket is full, or when the quota's window ends.
    pub reset_at: UnixNanos,
    /// The window's length in seconds, if a change of time zone shortened it.
    pub shortened_to: Option<NonZeroU32>,
}

impl PolicyState {
    /// Returns whether `self` is closer to exhaustion than `other`: a smaller fraction of the limit is left or, if the
    /// fractions are equal, the policy resets later.
    fn is_nearer_exhaustion(self, other: Self) -> bool {
        let mine = u128::from(self.remaining) * u128::from(other.limit);
        let theirs = u128::from(other.remaining) * u128::from(self.limit);
        mine < theirs || (mine == theirs && self.reset_at > other.reset_at)
    }
}

/// A decision about one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// When the decision was made.
    pub at: UnixNanos,
    /// The same time on the monotonic clock. If a tenant's quota was applied too, when that was done.
    pub monotonic: Monotonic,
    pub outcome: Outcome,
    /// The sustained rate per minute. The burst is `rate.limit`.
    pub rpm: NonZeroU32,
    pub rate: PolicyState,
    pub daily: Option<PolicyState>,
    pub monthly: Option<PolicyState>,
    /// The quota that all keys of the tenant share.
    pub tenant_monthly: Option<PolicyState>,
    /// Whether this replica decided without the shared counters because they were unavailable.
    pub degraded: bool,
}

impl Decision {
    pub fn is_allowed(&self) -> bool {
        self.outcome == Outcome::Allowed
    }

    /// Returns the violated policies, or an empty set if the request was allowed.
    pub fn violated(&self) -> PolicySet {
        match self.outcome {
            Outcome::Allowed => PolicySet::EMPTY,
            Outcome::Denied { violated, .. } => violated,
        }
    }

    /// Returns the nanoseconds until the same request would be allowed, or `None` if the request was allowed or will
    /// never be allowed.
    pub fn retry_after(&self) -> Option<u64> {
        match self.outcome {
            Outcome::Allowed => None,
            Outcome::Denied { retry_after, .. } => retry_after.map(NonZeroU64::get),
        }
    }

    /// Returns [`retry_after`](Self::retry_after) in seconds, rounded up, at least 1.
    pub fn retry_after_secs(&self) -> Option<u64> {
        self.retry_after()
            .map(|nanos| nanos.div_ceil(1_000_000_000).max(1))
    }

    /// Returns the state of each policy that applies, in the order of [`Policy::ALL`].
    pub fn states(&self) -> impl Iterator<Item = PolicyState> {
        [
            Some(self.rate),
            self.daily,
            self.monthly,
            self.tenant_monthly,
        ]
        .into_iter()
        .flatten()
    }

    /// Returns whether any quota applies.
    fn has_quotas(&self) -> bool {
        self.daily.is_some() || self.monthly.is_some() || self.tenant_monthly.is_some()
    }

    /// Returns the policy closest to exhaustion. If any policies are violated, returns one of these.
    pub fn nearest(&self) -> PolicyState {
        if !self.has_quotas() {
            return self.rate;
        }
        let violated = self.violated();
        let mut nearest = None::<PolicyState>;
        for state in self.states() {
            let counts = violated.is_empty() || violated.contains(state.policy);
            if counts && nearest.is_none_or(|other| state.is_nearer_exhaustion(other)) {
                nearest = Some(state);
            }
        }
        nearest.unwrap_or(self.rate)
    }

    /// Returns the number of seconds from the decision until `state` resets, rounded up.
    pub fn seconds_to_reset(&self, state: PolicyState) -> u64 {
        state
            .reset_at
            .saturating_since(self.at)
            .0
            .div_ceil(1_000_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(policy: Policy, limit: u64, remaining: u64, reset: u64) -> PolicyState {
        PolicyState {
            policy,
            limit,
            remaining,
            reset_at: UnixNanos(reset),
            shortened_to: None,
        }
    }

    fn decision(outcome: Outcome) -> Decision {
        Decision {
            at: UnixNanos(1),
            monotonic: Monotonic(0),
            outcome,
            rpm: NonZeroU32::new(600).unwrap(),
            rate: state(Policy::Rpm, 600, 412, 18_800_000_001),
            daily: Some(state(Policy::Daily, 50_000, 48_000, 1 << 50)),
            monthly: Some(state(Policy::Monthly, 1_000_000, 999_000, 1 << 51)),
            tenant_monthly: None,
            degraded: false,
        }
    }

    #[test]
    fn smallest_remaining_share_is_closest_to_exhaustion() {
        let mut decision = decision(Outcome::Allowed);
        assert_eq!(decision.nearest().policy, Policy::Rpm);
        assert_eq!(decision.seconds_to_reset(decision.rate), 19);
        decision.monthly = Some(state(Policy::Monthly, 1_000_000, 500, 1 << 51));
        assert_eq!(decision.nearest().policy, Policy::Monthly);
        // Of two exhausted policies, the policy that resets later counts as closer to exhaustion.
        decision.daily = Some(state(Policy::Daily, 50_000, 0, 1 << 50));
        decision.monthly = Some(state(Policy::Monthly, 1_000_000, 0, 1 << 51));
        assert_eq!(decision.nearest().policy, Policy::Monthly);
    }

    #[test]
    fn denial_reports_a_violated_policy() {
        let mut decision = decision(Outcome::Denied {
            violated: PolicySet::EMPTY.with(Policy::Daily),
            retry_after: NonZeroU64::new(1),
        });
        decision.rate.remaining = 0;
        assert_eq!(decision.nearest().policy, Policy::Daily);
    }

    #[test]
    fn retry_after_is_rounded_up_and_at_least_a_second() {
        for (nanos, secs) in [
            (1, 1),
            (1_000_000_000, 1),
            (1_000_000_001, 2),
            (59_999_999_999, 60),
        ] {
            let decision = decision(Outcome::Denied {
                violated: PolicySet::EMPTY.with(Policy::Rpm),
                retry_after: NonZeroU64::new(nanos),
            });
            assert_eq!(decision.retry_after_secs(), Some(secs));
        }
        assert_eq!(decision(Outcome::Allowed).retry_after_secs(), None);
    }
}
