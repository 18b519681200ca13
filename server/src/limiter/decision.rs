//! The answer of the limiter: admitted, or denied by which policies and until when.
//!
//! A plain value, `Copy`, made without an allocation. Owns the facts that headers and bodies are written
//! from; knows nothing of HTTP, so it rounds nothing and names no field.

use std::num::{NonZeroU32, NonZeroU64};

use super::policy::{Policy, PolicySet};
use crate::clock::UnixNanos;

/// Admitted or denied. A denial took nothing from any policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The cost was taken from every policy.
    Allowed,
    Denied {
        /// Every policy that stood in the way. Empty only if the decision is degraded: then this replica has no
        /// tokens left to give, and nobody knows whether a limit was reached.
        violated: PolicySet,
        /// Nanoseconds after which the same request is admitted if nobody else takes anything: the longest
        /// wait of the violated policies. `None` when no wait helps, because the cost is above a limit.
        retry_after: Option<NonZeroU64>,
    },
}

/// Where one policy stands after the decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyState {
    pub policy: Policy,
    /// The burst of [`Policy::Rpm`], the quota of the current window of the others.
    pub limit: u64,
    /// How many requests of cost 1 are left now.
    pub remaining: u64,
    /// When all of `limit` is there again: the bucket full, the next day or month begun.
    pub reset_at: UnixNanos,
    /// Whole seconds of the window, if a change of time zone made it shorter than its day or month.
    pub shortened_to: Option<NonZeroU32>,
}

impl PolicyState {
    /// Whether `self` is nearer its end than `other`: the smaller share of its limit left, and with equal
    /// shares the one that stays short for longer.
    fn is_nearer_exhaustion(self, other: Self) -> bool {
        let mine = u128::from(self.remaining) * u128::from(other.limit);
        let theirs = u128::from(other.remaining) * u128::from(self.limit);
        mine < theirs || (mine == theirs && self.reset_at > other.reset_at)
    }
}

/// The answer to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// The time it was decided at.
    pub at: UnixNanos,
    pub outcome: Outcome,
    /// The sustained rate a minute; its burst is `rate.limit`.
    pub rpm: NonZeroU32,
    pub rate: PolicyState,
    pub daily: Option<PolicyState>,
    pub monthly: Option<PolicyState>,
    /// The shared counters could not be asked; this replica decided by its own share.
    pub degraded: bool,
}

impl Decision {
    pub fn is_allowed(&self) -> bool {
        self.outcome == Outcome::Allowed
    }

    /// Empty when allowed.
    pub fn violated(&self) -> PolicySet {
        match self.outcome {
            Outcome::Allowed => PolicySet::EMPTY,
            Outcome::Denied { violated, .. } => violated,
        }
    }

    /// Nanoseconds until the same request is admitted; `None` when it was, or never will be.
    pub fn retry_after(&self) -> Option<u64> {
        match self.outcome {
            Outcome::Allowed => None,
            Outcome::Denied { retry_after, .. } => retry_after.map(NonZeroU64::get),
        }
    }

    /// [`retry_after`](Self::retry_after) in whole seconds, rounded up, at least 1.
    pub fn retry_after_secs(&self) -> Option<u64> {
        self.retry_after()
            .map(|nanos| nanos.div_ceil(1_000_000_000).max(1))
    }

    /// Every policy the key has, in the order of [`Policy::ALL`].
    pub fn states(&self) -> impl Iterator<Item = PolicyState> {
        [Some(self.rate), self.daily, self.monthly]
            .into_iter()
            .flatten()
    }

    /// The policy nearest exhaustion; of a denial, among those that denied.
    pub fn nearest(&self) -> PolicyState {
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

    /// Whole seconds from the decision until `state` is reset, rounded up.
    pub fn seconds_to_reset(&self, state: PolicyState) -> u64 {
        state
            .reset_at
            .saturating_since(self.at)
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
            outcome,
            rpm: NonZeroU32::new(600).unwrap(),
            rate: state(Policy::Rpm, 600, 412, 18_800_000_001),
            daily: Some(state(Policy::Daily, 50_000, 48_000, 1 << 50)),
            monthly: Some(state(Policy::Monthly, 1_000_000, 999_000, 1 << 51)),
            degraded: false,
        }
    }

    #[test]
    fn the_smallest_share_left_is_nearest() {
        let mut decision = decision(Outcome::Allowed);
        assert_eq!(decision.nearest().policy, Policy::Rpm);
        assert_eq!(decision.seconds_to_reset(decision.rate), 19);
        decision.monthly = Some(state(Policy::Monthly, 1_000_000, 500, 1 << 51));
        assert_eq!(decision.nearest().policy, Policy::Monthly);
        // Of two that are used up, the one that stays so for longer.
        decision.daily = Some(state(Policy::Daily, 50_000, 0, 1 << 50));
        decision.monthly = Some(state(Policy::Monthly, 1_000_000, 0, 1 << 51));
        assert_eq!(decision.nearest().policy, Policy::Monthly);
    }

    #[test]
    fn a_denial_shows_a_policy_that_denied() {
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
