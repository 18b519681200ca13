//! Blocks of quota tokens that the ledger grants.
//!
//! When the ledger grants a block, it counts the block's tokens as used, so spending the tokens does not need another
//! call. A crash can strand a block, but its tokens are never spent twice. Once the ledger has responded in a window,
//! all tokens that requests are waiting for are fetched in one call, regardless of the block size, since they are spent
//! immediately.
//!
//! This module contains the rules for one key's block of one policy: its size, when to fetch more tokens, which window
//! the block belongs to, and which tokens to return when the plan or the time zone changes. This module does not depend
//! on SQL and does not start tasks. While the ledger is unavailable, the block can still be spent.
//!
//! The ledger determines the window. Windows computed from the calendar are provisional until the ledger has responded.

mod refill;

use std::num::NonZeroU64;

use super::{
    calendar::{QuotaWindow, Window, window_at},
    ledger::LedgerError,
};
use crate::clock::{Nanos, UnixNanos};

/// The maximum total size of the blocks of all replicas. The total is also at most one hundredth of the quota, unless
/// each block has only one token.
const BLOCK_MAX: u64 = 10_000;

/// How long to wait before querying the ledger again about an exhausted quota. By then, other replicas may have
/// returned tokens. The wait doubles with each response without tokens, up to [`PATIENCE_MAX`].
const PATIENCE: Nanos = Nanos::from_secs(1);
const PATIENCE_MAX: Nanos = PATIENCE.saturating_mul(8);

/// How long a block may be unused before it is returned, if other replicas may need it.
const IDLE: Nanos = Nanos::from_secs(10);

/// If other replicas may need the rest of the quota, a block lasts for at most `PACED_FOR` times `PACED` at the recent
/// pace.
const PACED: Nanos = Nanos::from_secs(10);
const PACED_FOR: u64 = 6;

/// Returns the block size for each of `replicas` replicas. Together, their blocks are at most one hundredth of the
/// quota and at most [`BLOCK_MAX`] tokens, but each block has at least one token.
pub(in crate::limiter) const fn block_size(limit: u64, replicas: u64) -> u64 {
    let hundredth = limit / 100 / replicas;
    if hundredth < 1 {
        1
    } else if hundredth > BLOCK_MAX / replicas {
        BLOCK_MAX / replicas
    } else {
        hundredth
    }
}

/// Whether a block covers a cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::limiter) enum BlockStatus {
    /// The policy does not limit this key.
    Unlimited,
    /// The block has enough tokens.
    Fits,
    /// The block has too few tokens, but the ledger should have enough, or another request may release reserved tokens.
    Short,
    /// The ledger has not responded yet in this window.
    Unknown,
    /// Too few tokens of the quota are left, until the window ends or other replicas return tokens.
    Exhausted,
    /// The cost exceeds the limit for a full day or month.
    NeverFits,
}

/// Tokens reserved for a request.
#[derive(Debug, Clone, Copy)]
pub(in crate::limiter) struct ReservedTokens {
    window: QuotaWindow,
    tokens: u64,
}

impl ReservedTokens {
    /// The reservation of a key without quotas.
    pub(in crate::limiter) const NONE: Self = Self {
        window: QuotaWindow::NONE,
        tokens: 0,
    };
}

/// A ledger call for a block. The call first returns tokens and then takes tokens.
#[derive(Debug)]
pub(in crate::limiter) struct LedgerOrder {
    pub(in crate::limiter) give_back: Vec<(UnixNanos, u64)>,
    /// The quota for a full day or month.
    pub(in crate::limiter) limit: u64,
    /// The number of tokens to take. If zero, the call only returns tokens.
    pub(in crate::limiter) want: u64,
}

/// Why tokens are fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::limiter) enum Need {
    /// Requests with this total cost are waiting.
    Cost(u64),
    /// No request is waiting yet.
    Ahead,
    /// The quota was exhausted, but other replicas may have returned tokens.
    Again,
}

/// Tokens of the window after the current window.
#[derive(Debug)]
struct NextBlock {
    window: QuotaWindow,
    held: u64,
    used: u64,
}

/// The block of the next window.
#[derive(Debug)]
enum Next {
    None,
    Fetching,
    /// A block is being fetched, but is no longer wanted.
    Outdated,
    Held(Box<NextBlock>),
}

/// How fast a block is spent.
#[derive(Debug)]
struct Pace {
    /// Tokens spent since `since`.
    spent: u64,
    /// Tokens spent in the previous period, which ended at `since` and lasted for at least [`PACED`]. `u64::MAX` if
    /// unknown.
    before: u64,
    since: UnixNanos,
}

impl Pace {
    const UNKNOWN: Self = Self {
        spent: 0,
        before: u64::MAX,
        since: UnixNanos(0),
    };

    /// Returns the largest block to hold at this pace.
    fn largest_block(&self) -> u64 {
        let pace = self.spent.max(self.before);
        pace.saturating_mul(PACED_FOR).max(1)
    }

    fn measure(&mut self, now: UnixNanos) {
        if now.abs_diff(self.since) < PACED {
            return;
        }
        if self.since != UnixNanos(0) {
            self.before = self.spent;
        }
        self.spent = 0;
        self.since = now;
    }
}

/// The tokens held for a policy, and what is known about the rest of the quota.
#[derive(Debug)]
pub(in crate::limiter) struct Block {
    /// The limit for a full day or month. Zero means that there is no quota.
    limit: u64,
    /// The quota for the current window.
    quota: u64,
    /// The number of replicas that take blocks of the quota. At least 1.
    replicas: u64,
    window: QuotaWindow,
    /// Whether the ledger has responded in this window.
    known: bool,
    held: u64,
    /// Tokens reserved for requests whose other policies are still being checked. These tokens are not part of `held`,
    /// and count as consumed.
    reserved: u64,
    /// The ledger's count of used tokens. Includes `held`, but not the tokens that are owed.
    used: u64,
    /// When the block was last used or filled, or the window was entered.
    spent_at: UnixNanos,
    pace: Pace,
    /// When the ledger last responded or failed.
    answered_at: UnixNanos,
    /// How long to wait before querying the ledger again about an exhausted quota.
    patience: Nanos,
    fetching: bool,
    failure: Option<LedgerError>,
    failures: u64,
    /// Tokens to return, by window.
    owed: Vec<(Window, u64)>,
    next: Next,
}

impl Block {
    pub(in crate::limiter) const fn new() -> Self {
        Self {
            limit: 0,
            quota: 0,
            replicas: 1,
            window: QuotaWindow::NONE,
            known: false,
            held: 0,
            reserved: 0,
            used: 0,
            spent_at: UnixNanos(0),
            pace: Pace::UNKNOWN,
            answered_at: UnixNanos(0),
            patience: PATIENCE,
            fetching: false,
            failure: None,
            failures: 0,
            owed: Vec::new(),
            next: Next::None,
        }
    }

    /// Sets the number of replicas that take blocks of the same quota.
    #[inline]
    pub(in crate::limiter) fn share_among(&mut self, replicas: u64) {
        self.replicas = replicas;
    }

    fn size(&self) -> u64 {
        let size = block_size(self.quota, self.replicas);
        if self.replicas == 1 {
            size
        } else {
            size.min(self.pace.largest_block())
        }
    }

    pub(in crate::limiter) fn window(&self) -> QuotaWindow {
        self.window
    }

    /// Returns whether [`enter`](Self::enter) must be called: the policy has a limit, and `now` is outside the current
    /// window.
    pub(in crate::limiter) fn is_outdated(&self, now: UnixNanos) -> bool {
        self.limit != 0 && !self.window.span.contains(now)
    }

    fn set_window(&mut self, window: QuotaWindow) {
        if window != self.window {
            self.reserved = 0;
        }
        self.window = window;
        self.quota = window.quota(self.limit);
    }

    /// Sets the policy's limit. Usage is kept. Tokens in excess of the new limit or block size are owed to the ledger.
    pub(in crate::limiter) fn set_limit(&mut self, limit: Option<NonZeroU64>) {
        let limit = limit.map_or(0, NonZeroU64::get);
        if limit != self.limit {
            self.limit = limit;
            self.quota = self.window.quota(limit);
            self.patience = PATIENCE;
            self.drop_next();
            self.trim_to(self.size());
        }
    }

    /// Applies a change of time zone. A window with usage keeps its end. A window without known usage is discarded, so
    /// that the ledger determines a new window.
    pub(in crate::limiter) fn rezone(&mut self) {
        self.drop_next();
        if !self.known || self.used <= self.held {
            self.surrender();
            self.known = false;
            self.used = 0;
            self.set_window(QuotaWindow::NONE);
        }
    }

    /// Switches to the window that contains `now`. `calendar` is the day or month that contains `now`. Tokens of the
    /// old window are returned to it, for two reasons. If the clock was set back, the old window has not ended, and the
    /// tokens may still be needed. If the old window has ended, its row then shows the actual usage.
    pub(in crate::limiter) fn enter(&mut self, calendar: Window, now: UnixNanos) {
        let before = (self.known && self.used > self.held).then_some(self.window);
        self.surrender();
        self.patience = PATIENCE;
        self.spent_at = now;
        if let Next::Held(next) = &self.next
            && next.window.span.contains(now)
        {
            let (window, held, used) = (next.window, next.held, next.used);
            self.next = Next::None;
            self.set_window(window);
            (self.known, self.held, self.used) = (true, held, used);
            return;
        }
        if matches!(self.next, Next::Held(_)) {
            self.drop_next();
        }
        self.set_window(window_at(now, calendar, before.as_slice()));
        (self.known, self.used) = (false, 0);
    }

    pub(in crate::limiter) fn status(&self, cost: u64) -> BlockStatus {
        if self.limit == 0 {
            BlockStatus::Unlimited
        } else if !self.known {
            BlockStatus::Unknown
        } else if cost > self.limit {
            BlockStatus::NeverFits
        } else if self.held >= cost {
            BlockStatus::Fits
        } else if self.remaining().saturating_add(self.reserved) >= cost {
            BlockStatus::Short
        } else {
            BlockStatus::Exhausted
        }
    }

    /// Spends `cost`, which must [fit](BlockStatus::Fits).
    pub(in crate::limiter) fn spend(&mut self, cost: u64, now: UnixNanos) {
        if self.limit != 0 {
            self.held -= cost;
            self.spent_at = now;
            self.pace.spent = self.pace.spent.saturating_add(cost);
        }
    }

    /// Reserves `cost`, which must [fit](BlockStatus::Fits), for a request. Must be followed by
    /// [`settle`](Self::settle).
    pub(in crate::limiter) fn reserve(&mut self, cost: u64, now: UnixNanos) -> ReservedTokens {
        let tokens = if self.limit == 0 { 0 } else { cost };
        self.held -= tokens;
        self.reserved += tokens;
        self.spent_at = now;
        ReservedTokens {
            window: self.window,
            tokens,
        }
    }

    /// Returns whether a reservation belongs to the current window and can be spent.
    pub(in crate::limiter) fn is_current(&self, reservation: ReservedTokens) -> bool {
        reservation.window == self.window && (self.limit != 0) == (reservation.tokens != 0)
    }

    /// Ends a reservation: its tokens are consumed or held again. Unspent tokens of another window are owed to that
    /// window, since it may not have ended.
    pub(in crate::limiter) fn settle(&mut self, reservation: ReservedTokens, is_spent: bool) {
        let ReservedTokens { window, tokens } = reservation;
        if window == self.window {
            self.reserved = self.reserved.saturating_sub(tokens);
        }
        if is_spent {
            self.pace.spent = self.pace.spent.saturating_add(tokens);
            return;
        }
        if window == self.window && self.limit != 0 {
            self.held += tokens;
            self.trim_to(u64::MAX);
        } else {
            self.owe(window.span, tokens);
        }
    }

    /// If other replicas share the quota, finds held tokens that are probably not needed soon, and marks them as owed.
    /// These are all held tokens if none were used recently, and otherwise the tokens that [`tidy`](Self::tidy) marks.
    /// Returns whether any tokens were marked.
    pub(in crate::limiter) fn owe_unneeded(&mut self, now: UnixNanos, waited_for: u64) -> bool {
        self.pace.measure(now);
        if self.replicas == 1 || self.held == 0 || self.fetching {
            return false;
        }
        let before = self.held;
        if now.abs_diff(self.spent_at) >= IDLE {
            self.surrender();
            self.pace = Pace::UNKNOWN;
        } else {
            self.tidy(waited_for);
        }
        self.held < before
    }

    /// Returns the current window's quota, if the policy limits this key.
    pub(in crate::limiter) fn quota(&self) -> Option<u64> {
        (self.limit != 0).then_some(self.quota)
    }

    /// Returns the remaining quota. Until the ledger has responded, the entire quota counts as remaining.
    pub(in crate::limiter) fn remaining(&self) -> u64 {
        self.quota
            .saturating_sub(self.used.saturating_sub(self.held))
    }

    fn drop_next(&mut self) {
        match std::mem::replace(&mut self.next, Next::None) {
            Next::None => {}
            Next::Fetching | Next::Outdated => self.next = Next::Outdated,
            Next::Held(next) => self.owe(next.window.span, next.held),
        }
    }

    /// Marks tokens as owed if they exceed both the block size and what waiting requests need. Such tokens were fetched
    /// at a higher pace, or for a request that was then denied or canceled.
    pub(in crate::limiter) fn tidy(&mut self, waited_for: u64) {
        let size = self.size().max(waited_for);
        if self.held > size {
            self.trim_to(size);
        }
    }

    /// Marks all held tokens as owed.
    fn surrender(&mut self) {
        let n = std::mem::take(&mut self.held);
        self.used = self.used.saturating_sub(n);
        self.owe(self.window.span, n);
    }

    /// Marks all held tokens as owed, and takes everything that is owed.
    pub(in crate::limiter) fn take_all(&mut self) -> impl Iterator<Item = (UnixNanos, u64)> {
        self.surrender();
        self.drop_next();
        self.take_owed(UnixNanos(u64::MAX))
    }

    /// Takes the tokens owed to windows that end by `now`.
    pub(in crate::limiter) fn take_owed(
        &mut self,
        now: UnixNanos,
    ) -> impl Iterator<Item = (UnixNanos, u64)> + use<> {
        let owed: Vec<_> = self
            .owed
            .extract_if(.., |(window, _)| window.end <= now)
            .collect();
        owed.into_iter().map(|(window, n)| (window.start, n))
    }

    /// Returns whether the block can be dropped: it neither holds nor owes tokens, and no call is in flight.
    pub(in crate::limiter) fn is_forgettable(&self) -> bool {
        self.held == 0 && self.owed.is_empty() && !self.fetching && matches!(self.next, Next::None)
    }

    fn trim_to(&mut self, size: u64) {
        let consumed = self.used.saturating_sub(self.held);
        let keep = self.held.min(self.quota.saturating_sub(consumed)).min(size);
        let over = self.held - keep;
        self.held = keep;
        self.used = self.used.saturating_sub(over);
        self.owe(self.window.span, over);
        if self.limit == 0 {
            self.known = false;
            self.used = 0;
            self.set_window(QuotaWindow::NONE);
        }
    }

    fn owe(&mut self, window: Window, n: u64) {
        if n == 0 {
            return;
        }
        match self
            .owed
            .iter_mut()
            .find(|(owed, _)| owed.start == window.start)
        {
            Some((_, owed)) => *owed += n,
            None => self.owed.push((window, n)),
        }
    }
}
