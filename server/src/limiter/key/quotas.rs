//! The calendar quotas of one key: their blocks, and whether they allow a request.

use std::{num::NonZeroU64, sync::Arc};

use tokio::sync::Notify;

use crate::limiter::{
    decision::Outcome,
    policy::{Policy, PolicySet},
    quota::block::Block,
    rate::gcra::Verdict,
};

/// The blocks of a key's calendar quotas.
#[derive(Debug)]
pub(super) struct QuotaBlocks {
    pub(super) daily: Block,
    pub(super) monthly: Block,
    /// Notified when requests that wait for quota tokens should check again: when a ledger call for this key or a
    /// reservation has ended. `None` if no requests are waiting.
    pub(super) call_ended: Option<Arc<Notify>>,
}

impl QuotaBlocks {
    pub(super) fn new() -> Self {
        Self {
            daily: Block::new(),
            monthly: Block::new(),
            call_ended: None,
        }
    }

    pub(super) fn blocks(&self) -> [(Policy, &Block); 2] {
        [
            (Policy::Daily, &self.daily),
            (Policy::Monthly, &self.monthly),
        ]
    }
}

/// The policies whose blocks must be fetched before a decision.
pub(in crate::limiter) type MissingBlocks = PolicySet;

/// What to do about policies for which the ledger has not responded yet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::limiter) enum OnUnknown {
    /// Fetch a block first.
    Wait,
    /// Blocks cannot be fetched, so deny the request if another policy denies it anyway.
    PassOver,
}

/// Whether the calendar quotas allow a cost.
pub(in crate::limiter) struct Quotas {
    pub(in crate::limiter) denial: Denial,
    /// Policies for which the ledger has not responded in this window.
    pub(in crate::limiter) unknown: PolicySet,
    /// Policies whose block has too few tokens, although the ledger may have enough, or another request may release
    /// reserved tokens.
    pub(in crate::limiter) short: PolicySet,
}

impl Quotas {
    /// Returns the policies whose blocks must be fetched before a decision. If the request is denied anyway, a block is
    /// worth fetching only if its quota may prolong the wait. `denied` means that the rate limit denies the request.
    pub(in crate::limiter) fn missing(
        &self,
        denied: bool,
        on_unknown: OnUnknown,
    ) -> Option<MissingBlocks> {
        if denied || !self.denial.violated.is_empty() {
            return (!self.unknown.is_empty() && on_unknown == OnUnknown::Wait)
                .then_some(self.unknown);
        }
        let missing: PolicySet = self.unknown.iter().chain(self.short.iter()).collect();
        (!missing.is_empty()).then_some(missing)
    }
}

/// A denial that is being assembled.
#[derive(Default)]
pub(in crate::limiter) struct Denial {
    pub(in crate::limiter) violated: PolicySet,
    wait: Option<NonZeroU64>,
    never: bool,
}

impl Denial {
    pub(in crate::limiter) fn add(&mut self, policy: Policy, wait: Option<NonZeroU64>) {
        self.violated = self.violated.with(policy);
        self.never |= wait.is_none();
        self.wait = self.wait.max(wait);
    }

    pub(in crate::limiter) fn add_rate<T: Copy>(&mut self, rate: Verdict<T>) {
        match rate {
            Verdict::Fits { .. } => {}
            Verdict::Wait { wait } => self.add(Policy::Rpm, Some(wait)),
            Verdict::NeverFits => self.add(Policy::Rpm, None),
        }
    }

    pub(in crate::limiter) fn outcome(self) -> Outcome {
        Outcome::Denied {
            violated: self.violated,
            retry_after: if self.never { None } else { self.wait },
        }
    }
}
