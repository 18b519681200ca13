//! What was decided, as a value: a denial is no error.

use super::policy::{Policy, PolicySet};
use crate::clock::UnixNanos;

/// Where one policy stands after the decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyState {
    /// The burst of the rate, the number of requests of a quota.
    pub limit: u64,
    /// What is left of it.
    pub remaining: u64,
    /// When all of it is there again.
    pub reset_at: UnixNanos,
}

/// Admitted or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Admitted, and taken from every policy.
    Allowed,
    /// Denied, and nothing taken.
    Denied {
        violated: PolicySet,
        /// When the same request would be admitted if no other came before it; `None` when it costs more
        /// than a policy can ever hold.
        retry_at: Option<UnixNanos>,
    },
}

/// A decision on one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    pub verdict: Verdict,
    /// By [`Policy::index`]; `None` for a policy that the key does not have.
    pub states: [Option<PolicyState>; Policy::COUNT],
    pub rpm: u32,
    pub now: UnixNanos,
}

impl Decision {
    pub const fn is_allowed(&self) -> bool {
        matches!(self.verdict, Verdict::Allowed)
    }

    pub const fn state(&self, policy: Policy) -> Option<PolicyState> {
        self.states[policy.index()]
    }

    /// Where the rate stands, which every key has.
    pub fn rate(&self) -> PolicyState {
        self.states[Policy::Rpm.index()].unwrap_or(PolicyState {
            limit: 0,
            remaining: 0,
            reset_at: self.now,
        })
    }

    /// The policy to tell a caller about: on a denial the one that holds longest, else the one with the
    /// smallest part left.
    pub fn nearest(&self) -> (Policy, PolicyState) {
        let violated = match self.verdict {
            Verdict::Allowed => PolicySet::EMPTY,
            Verdict::Denied { violated, .. } => violated,
        };
        let mut nearest = (Policy::Rpm, self.rate());
        for policy in [Policy::Daily, Policy::Monthly] {
            let Some(state) = self.state(policy) else {
                continue;
            };
            let nearer = match (violated.contains(policy), violated.contains(nearest.0)) {
                (true, true) => state.reset_at > nearest.1.reset_at,
                (true, false) => true,
                (false, true) => false,
                (false, false) => {
                    u128::from(state.remaining) * u128::from(nearest.1.limit)
                        < u128::from(nearest.1.remaining) * u128::from(state.limit)
                }
            };
            if nearer {
                nearest = (policy, state);
            }
        }
        nearest
    }

    /// Whole seconds for `Retry-After`: rounded up, at least 1, so never earlier than the request would
    /// really be admitted. `None` when the request is admitted, or never will be.
    pub fn retry_after_secs(&self) -> Option<u64> {
        match self.verdict {
            Verdict::Denied {
                retry_at: Some(at), ..
            } => Some(at.saturating_since(self.now).div_ceil(1_000_000_000).max(1)),
            _ => None,
        }
    }
}
