//! Decides when to fetch tokens from the ledger, and how many, and applies the ledger's responses to the block.

use std::sync::Arc;

use super::{Block, LedgerOrder, Need, Next, NextBlock, PATIENCE, PATIENCE_MAX, block_size};
use crate::{
    clock::{Nanos, UnixNanos},
    limiter::quota::{
        calendar::{Window, window_at},
        ledger::{LedgerError, Taken},
    },
};

/// How long to wait before calling the ledger again after a failure. Until then, requests fail immediately instead of
/// making one call each.
const COOLING: Nanos = Nanos::from_millis(100);

/// The first block of the next window is fetched [`AHEAD_MIN`] before the current window ends, or up to
/// [`AHEAD_JITTER`] earlier, depending on the key.
const AHEAD_MIN: Nanos = Nanos::from_secs(120);
const AHEAD_JITTER: Nanos = Nanos::from_secs(480);

impl Block {
    /// Returns whether to fetch more tokens before a request has to wait for them. Blocks of one token are fetched in
    /// advance only if no other replica shares the quota; otherwise, each replica would hold a token that it may not
    /// need.
    pub(in crate::limiter) fn is_low(&self, now: UnixNanos) -> bool {
        self.known
            && self.used < self.quota
            && (self.replicas == 1 || self.size() > 1)
            && self.held <= self.size() / 4
            && !self.fetching
            && ((self.failure.is_none() && self.patience == PATIENCE) || self.is_due(now))
    }

    /// Returns whether no call is in flight and tokens are owed to a window that has not ended. Tokens owed to an
    /// ended window can wait for [`take_owed`](Self::take_owed).
    pub(in crate::limiter) fn is_return_due(&self, now: UnixNanos) -> bool {
        !self.fetching && self.owed.iter().any(|(window, _)| now < window.end)
    }

    /// Returns whether to query the ledger again about an exhausted quota.
    pub(in crate::limiter) fn is_worth_asking_again(&self, now: UnixNanos) -> bool {
        !self.fetching && self.is_due(now)
    }

    /// Returns the ledger's last error if it is too early to retry.
    pub(in crate::limiter) fn cooling(&self, now: UnixNanos) -> Option<LedgerError> {
        self.failure
            .as_ref()
            .filter(|_| !self.is_due(now))
            .map(Arc::clone)
    }

    /// Returns the number of ledger calls for this block that have failed.
    pub(in crate::limiter) fn failures(&self) -> u64 {
        self.failures
    }

    pub(in crate::limiter) fn failure(&self) -> Option<LedgerError> {
        self.failure.clone()
    }

    fn is_due(&self, now: UnixNanos) -> bool {
        let patience = if self.failure.is_some() {
            COOLING
        } else {
            self.patience
        };
        // The absolute difference is used, because a clock that was set back must not block a key for hours.
        now.abs_diff(self.answered_at) >= patience
    }

    /// Begins a fetch at `now`, unless a fetch is in flight or there is nothing to do. Each [`LedgerOrder`] must be
    /// followed by a call to [`finish_fetch`](Self::finish_fetch), [`finish_return`](Self::finish_return) or
    /// [`fail`](Self::fail).
    pub(in crate::limiter) fn begin_fetch(
        &mut self,
        need: Need,
        now: UnixNanos,
    ) -> Option<LedgerOrder> {
        if self.fetching {
            return None;
        }
        let size = self.size();
        let left = self.quota.saturating_sub(self.used);
        let want = match need {
            _ if self.limit == 0 => 0,
            // Tokens for waiting requests are fetched in full, since they are spent immediately, but only after the
            // ledger has reported how many tokens are left.
            Need::Cost(cost) if self.known => size.max(cost).saturating_sub(self.held).min(left),
            Need::Cost(_) | Need::Ahead => size.saturating_sub(self.held).min(left),
            Need::Again => size.saturating_sub(self.held).max(1),
        };
        // Owed tokens are returned first, so that `used` does not include these tokens, and so that a window without
        // usage can be replaced with a window in another time zone.
        let give_back: Vec<_> = self
            .owed
            .extract_if(.., |(window, _)| now < window.end)
            .map(|(window, tokens)| (window.start, tokens))
            .collect();
        if want == 0 && give_back.is_empty() {
            return None;
        }
        self.fetching = true;
        Some(LedgerOrder {
            give_back,
            limit: self.limit,
            want,
        })
    }

    /// Ends a fetch with the ledger's response.
    pub(in crate::limiter) fn finish_fetch(&mut self, taken: Taken, now: UnixNanos) {
        self.fetching = false;
        self.failure = None;
        self.receive(taken, now);
    }

    fn receive(&mut self, taken: Taken, now: UnixNanos) {
        if self.limit == 0 || !taken.window.span.contains(now) {
            self.owe(taken.window.span, taken.granted);
            return;
        }
        if taken.window != self.window {
            self.surrender();
            self.set_window(taken.window);
        }
        let owed: u64 = self
            .owed
            .iter()
            .filter(|(window, _)| window.start == taken.window.span.start)
            .map(|(_, n)| n)
            .sum();
        self.known = true;
        self.held += taken.granted;
        if taken.granted > 0 {
            self.spent_at = now;
        }
        self.used = taken.used.saturating_sub(owed);
        self.answered_at = now;
        self.patience = if taken.granted > 0 {
            PATIENCE
        } else {
            self.patience.saturating_mul(2).min(PATIENCE_MAX)
        };
        self.trim_to(u64::MAX);
    }

    /// Ends a call that only returned tokens.
    pub(in crate::limiter) fn finish_return(&mut self) {
        self.fetching = false;
    }

    /// Ends a call that failed.
    pub(in crate::limiter) fn fail(&mut self, error: LedgerError, now: UnixNanos) {
        self.fetching = false;
        self.failure = Some(error);
        self.failures += 1;
        self.answered_at = now;
    }

    /// Begins to fetch the first block of the next window if that window begins soon and the key was used in the
    /// current window. Blocks of one token are fetched only if no other replica shares the quota. `key_hash` spreads
    /// the fetches of different keys over time. Returns the start of the next window, or `None` if there is nothing to
    /// fetch. Must be followed by [`finish_next`](Self::finish_next).
    pub(in crate::limiter) fn begin_next(
        &mut self,
        now: UnixNanos,
        key_hash: u64,
    ) -> Option<UnixNanos> {
        let end = self.window.span.end;
        let ahead = AHEAD_MIN.saturating_add(Nanos(key_hash % AHEAD_JITTER.0));
        let is_time = now.saturating_add(ahead) >= end;
        let is_wanted = self.limit != 0
            && self.known
            && self.used > self.held
            && (self.replicas == 1 || self.size() > 1)
            && matches!(self.next, Next::None);
        if !is_wanted || !is_time || !self.window.span.contains(now) {
            return None;
        }
        self.next = Next::Fetching;
        Some(end)
    }

    /// Returns the order for the next window, whose day or month is `calendar`.
    pub(in crate::limiter) fn next_order(&self, calendar: Window) -> LedgerOrder {
        let window = window_at(self.window.span.end, calendar, &[self.window]);
        LedgerOrder {
            give_back: Vec::new(),
            limit: self.limit,
            want: block_size(window.quota(self.limit), self.replicas),
        }
    }

    /// Ends the fetch of the next block. `taken` is `None` if the fetch failed.
    pub(in crate::limiter) fn finish_next(&mut self, taken: Option<Taken>, now: UnixNanos) {
        let is_outdated = matches!(self.next, Next::Outdated);
        self.next = Next::None;
        let Some(taken) = taken else {
            return;
        };
        if is_outdated || self.limit == 0 || taken.granted == 0 {
            self.owe(taken.window.span, taken.granted);
        } else if taken.window.span.start >= self.window.span.end && now < taken.window.span.start {
            self.next = Next::Held(Box::new(NextBlock {
                window: taken.window,
                held: taken.granted,
                used: taken.used,
            }));
        } else {
            // The window has started since the fetch began.
            self.receive(taken, now);
        }
    }
}
