//! Calendar quotas that outlive the process: a ledger holds the truth and hands it out in blocks.
//!
//! A block is tokens that the ledger already counts as used, so spending them needs no further call. A crash
//! can strand a block but never spend it twice. What requests are waiting for is fetched in one call, whatever the size
//! of a block: it is spent at once. This module owns the rules for one key's block of one policy:
//! how large it is, when to fetch more, which window it belongs to, and what goes back when the plan or the
//! time zone changes. It knows no SQL and starts no task. When the ledger is down, the block is spent and then
//! nothing more is admitted.
//!
//! The ledger decides which window counts. What a block computes from the calendar is provisional until the
//! ledger has answered.

use std::{error::Error, num::NonZeroU64, sync::Arc};

use async_trait::async_trait;
use quota_common::id::{ApiKeyId, TenantId};
use uuid::Uuid;

use super::calendar::{QuotaWindow, Window, window_at};
use crate::{clock::UnixNanos, limiter::policy::Policy};

/// A block is at most this many tokens, and at most one hundredth of its quota.
const BLOCK_MAX: u64 = 10_000;

/// Nanoseconds until an exhausted ledger is queried again, at first: other replicas may have returned tokens.
/// Doubles with each empty answer, up to [`PATIENCE_MAX`].
const PATIENCE: u64 = 1_000_000_000;
const PATIENCE_MAX: u64 = 8 * PATIENCE;

/// Nanoseconds after which a block that was not spent from is returned, where other replicas may need it.
const IDLE: u64 = 10_000_000_000;

/// Nanoseconds until a failed ledger is queried again. Until then requests fail at once, so that a ledger in
/// trouble does not get one call per request.
const COOLING: u64 = 100_000_000;

/// The first block of the next window is fetched this many nanoseconds before the current one ends: at least
/// [`AHEAD_MIN`], and up to [`AHEAD_JITTER`] more, which differs by key.
const AHEAD_MIN: u64 = 120_000_000_000;
const AHEAD_JITTER: u64 = 480_000_000_000;

/// A row of the ledger: what one key has used of one policy in one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LedgerRow {
    pub tenant: TenantId,
    pub key: ApiKeyId,
    /// [`Policy::Daily`] or [`Policy::Monthly`].
    pub policy: Policy,
    pub window_start: UnixNanos,
}

/// A request for tokens of the window that contains `at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeRequest {
    pub tenant: TenantId,
    pub key: ApiKeyId,
    /// [`Policy::Daily`] or [`Policy::Monthly`].
    pub policy: Policy,
    pub at: UnixNanos,
    /// The calendar day or month that contains `at`, in the time zone that the caller knows.
    pub calendar: Window,
    /// The quota of a whole day or month.
    pub limit: u64,
    /// At least 1.
    pub want: u64,
}

/// What a ledger handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The window that the tokens belong to. It contains the `at` of the request.
    pub window: QuotaWindow,
    pub granted: u64,
    /// All that is used of the window, this grant included.
    pub used: u64,
}

/// Unused tokens of several rows, to be credited together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReturnBatch {
    /// Identifies the batch when it is sent again.
    pub id: Uuid,
    /// Each row at most once, in ascending order.
    pub rows: Vec<(LedgerRow, u64)>,
}

/// Why a ledger could not answer. Consumers only see that it is unavailable.
pub type LedgerError = Arc<dyn Error + Send + Sync>;

/// The durable truth about calendar quotas.
#[async_trait]
pub trait QuotaLedger: std::fmt::Debug + Send + Sync + 'static {
    /// Grants up to `want` tokens for each request and counts them as used, atomically for each:
    /// `min(want, quota - used)`, where `quota` is the share of `limit` that the window has. Returns one
    /// result for each request, in order. A batch has at most one request for a key and policy.
    ///
    /// If a window of which something is used contains `at`, it is that window. Otherwise it is the calendar
    /// window of the request, cut so that it overlaps no window of which something is used, and its quota is
    /// in proportion to its length. An error may leave tokens counted: they are lost to the window, and never
    /// spent twice.
    async fn take(&self, requests: &[TakeRequest]) -> Vec<Result<Taken, LedgerError>>;

    /// Counts tokens as unused again: all of the batch or, on an error, possibly all or none. A batch that
    /// was applied before is not applied again, so a caller may retry until it succeeds.
    async fn give_back(&self, batch: &ReturnBatch) -> Result<(), LedgerError>;
}

/// Returns the largest block of a quota for one of `replicas` replicas. All their blocks together are at most
/// one hundredth of the quota, and 10,000, where that is at least one token each.
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

/// How a block relates to a cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::limiter) enum BlockStatus {
    /// The policy does not limit this key.
    Unlimited,
    /// The block has enough tokens.
    Fits,
    /// The block has too few, but the ledger should have them, or a request that has set them apart may release them.
    Short,
    /// The ledger has not answered in this window.
    Unknown,
    /// Not in this window any more.
    Exhausted,
    /// Above the quota.
    NeverFits,
}

/// Tokens of one window, set apart for one request.
#[derive(Debug, Clone, Copy)]
pub(in crate::limiter) struct Reservation {
    window: QuotaWindow,
    tokens: u64,
}

/// A call of the ledger for one block: first return, then take.
#[derive(Debug)]
pub(in crate::limiter) struct Order {
    pub(in crate::limiter) give_back: Vec<(UnixNanos, u64)>,
    /// The quota of a whole day or month.
    pub(in crate::limiter) limit: u64,
    /// Zero: only return.
    pub(in crate::limiter) want: u64,
}

/// Why tokens are fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::limiter) enum Need {
    /// Requests of this cost in all are waiting.
    Cost(u64),
    /// No request is waiting, but one may be soon.
    Ahead,
    /// The ledger was exhausted; other replicas may have returned tokens.
    Again,
}

/// Tokens of the window after the current one.
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
    /// Being fetched, for a calendar that has changed since.
    Outdated,
    Held(Box<NextBlock>),
}

/// The tokens held of one policy, and what is known of the rest.
#[derive(Debug)]
pub(in crate::limiter) struct Block {
    /// Of a whole day or month. Zero: no quota.
    limit: u64,
    /// What the window has of it.
    quota: u64,
    /// How many replicas take blocks of it. At least 1.
    replicas: u64,
    window: QuotaWindow,
    /// The ledger has answered in this window.
    known: bool,
    held: u64,
    /// Set apart for requests that wait for their rate. Not in `held`, and counted as consumed.
    reserved: u64,
    /// As the ledger counts it: with `held`, without what is owed.
    used: u64,
    /// When it was last spent from, or filled.
    spent_at: UnixNanos,
    asked_at: UnixNanos,
    patience: u64,
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
            asked_at: UnixNanos(0),
            patience: PATIENCE,
            fetching: false,
            failure: None,
            failures: 0,
            owed: Vec::new(),
            next: Next::None,
        }
    }

    /// Sets how many replicas take blocks of the same quota.
    #[inline]
    pub(in crate::limiter) fn share_among(&mut self, replicas: u64) {
        self.replicas = replicas;
    }

    fn size(&self) -> u64 {
        block_size(self.quota, self.replicas)
    }

    pub(in crate::limiter) fn window(&self) -> QuotaWindow {
        self.window
    }

    /// Whether [`enter`](Self::enter) is due: the policy limits, and `now` is in another window.
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

    /// Sets the policy's limit. What was consumed stays consumed. Tokens beyond the new limit, or beyond the
    /// new size of a block, are owed to the ledger.
    pub(in crate::limiter) fn adopt(&mut self, limit: Option<NonZeroU64>) {
        let limit = limit.map_or(0, NonZeroU64::get);
        if limit != self.limit {
            self.limit = limit;
            self.quota = self.window.quota(limit);
            self.patience = PATIENCE;
            self.drop_next();
            self.trim_to(self.size());
        }
    }

    /// The time zone has changed. A window that was used keeps its end. One that nobody has used, as far as is
    /// known here, is given up, and the ledger decides.
    pub(in crate::limiter) fn rezone(&mut self) {
        self.drop_next();
        if !self.known || self.used <= self.held {
            self.surrender();
            self.known = false;
            self.used = 0;
            self.set_window(QuotaWindow::NONE);
        }
    }

    /// Moves to the window of `now`, which is not the current one. `calendar` is the day or month of `now`.
    /// Tokens of the old window are owed: it may not have ended (the clock was set back), and if it has, its
    /// row says what was really used.
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

    /// Spends `cost`, which [fits](BlockStatus::Fits).
    pub(in crate::limiter) fn spend(&mut self, cost: u64, now: UnixNanos) {
        if self.limit != 0 {
            self.held -= cost;
            self.spent_at = now;
        }
    }

    /// Sets `cost`, which [fits](BlockStatus::Fits), apart for one request. Followed by [`settle`](Self::settle).
    pub(in crate::limiter) fn reserve(&mut self, cost: u64, now: UnixNanos) -> Reservation {
        let tokens = if self.limit == 0 { 0 } else { cost };
        self.held -= tokens;
        self.reserved += tokens;
        self.spent_at = now;
        Reservation {
            window: self.window,
            tokens,
        }
    }

    /// Whether a reservation is of the current window, and so can be spent.
    pub(in crate::limiter) fn is_current(&self, reservation: Reservation) -> bool {
        reservation.window == self.window && (self.limit != 0) == (reservation.tokens != 0)
    }

    /// Ends a reservation: its tokens are consumed, or held again. Those of another window are owed to it, since it may
    /// not have ended.
    pub(in crate::limiter) fn settle(&mut self, reservation: Reservation, is_spent: bool) {
        let Reservation { window, tokens } = reservation;
        if window == self.window {
            self.reserved = self.reserved.saturating_sub(tokens);
        }
        if is_spent {
            return;
        }
        if window == self.window && self.limit != 0 {
            self.held += tokens;
            self.trim_to(u64::MAX);
        } else {
            self.owe(window.span, tokens);
        }
    }

    /// Whether requests have set tokens of the current window apart.
    pub(in crate::limiter) fn has_reservations(&self) -> bool {
        self.reserved > 0
    }

    /// Gives up what is held if none of it was spent for a while and other replicas share the quota. Returns whether
    /// anything was given up.
    pub(in crate::limiter) fn give_up_idle(&mut self, now: UnixNanos) -> bool {
        let is_idle = now.0.abs_diff(self.spent_at.0) >= IDLE
            && self.replicas > 1
            && self.held > 0
            && !self.fetching;
        if is_idle {
            self.surrender();
        }
        is_idle
    }

    /// Returns the quota of the current window, if the policy limits this key.
    pub(in crate::limiter) fn quota(&self) -> Option<u64> {
        (self.limit != 0).then_some(self.quota)
    }

    /// Returns what is left of the quota: all of it until the ledger has answered.
    pub(in crate::limiter) fn remaining(&self) -> u64 {
        self.quota
            .saturating_sub(self.used.saturating_sub(self.held))
    }

    /// Whether to fetch more before a request has to wait. Not token by token where other replicas share the
    /// quota: each would hold one that it may never need, until all are used up before they are spent.
    pub(in crate::limiter) fn is_low(&self, now: UnixNanos) -> bool {
        self.known
            && self.used < self.quota
            && (self.replicas == 1 || self.size() > 1)
            && self.held <= self.size() / 4
            && !self.fetching
            && ((self.failure.is_none() && self.patience == PATIENCE) || self.is_due(now))
    }

    /// Whether tokens of a window that has not ended are owed and no call is under way. Those of an ended
    /// window can wait for [`take_owed`](Self::take_owed).
    pub(in crate::limiter) fn has_debts(&self, now: UnixNanos) -> bool {
        !self.fetching && self.owed.iter().any(|(window, _)| now < window.end)
    }

    /// Whether to query a ledger again that was exhausted.
    pub(in crate::limiter) fn is_worth_asking_again(&self, now: UnixNanos) -> bool {
        !self.fetching && self.is_due(now)
    }

    /// Returns the last error of the ledger while it is too early to try again.
    pub(in crate::limiter) fn cooling(&self, now: UnixNanos) -> Option<LedgerError> {
        self.failure
            .as_ref()
            .filter(|_| !self.is_due(now))
            .map(Arc::clone)
    }

    /// Returns how often the ledger has failed.
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
        // In both directions: a clock that went back must not silence a key for hours.
        now.0.abs_diff(self.asked_at.0) >= patience
    }

    /// Begins a fetch at `now`, unless one is under way or there is nothing to do. Every order is followed by
    /// [`finish_fetch`](Self::finish_fetch), [`finish_return`](Self::finish_return) or [`fail`](Self::fail).
    pub(in crate::limiter) fn begin_fetch(&mut self, need: Need, now: UnixNanos) -> Option<Order> {
        if self.fetching {
            return None;
        }
        let size = self.size();
        let left = self.quota.saturating_sub(self.used);
        let want = match need {
            _ if self.limit == 0 => 0,
            // What requests wait for is fetched in full, since it is spent at once, but only where the tokens are
            // known to exist.
            Need::Cost(cost) if self.known => size.max(cost).saturating_sub(self.held).min(left),
            Need::Cost(_) | Need::Ahead => size.saturating_sub(self.held).min(left),
            Need::Again => size.saturating_sub(self.held).max(1),
        };
        // Before the take, so that `used` does not count them, and so that a window that nobody has used can
        // give way to one in another time zone.
        let give_back: Vec<_> = self
            .owed
            .extract_if(.., |(window, _)| now < window.end)
            .map(|(window, tokens)| (window.start, tokens))
            .collect();
        if want == 0 && give_back.is_empty() {
            return None;
        }
        self.fetching = true;
        Some(Order {
            give_back,
            limit: self.limit,
            want,
        })
    }

    /// The ledger answered a fetch.
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
        self.asked_at = now;
        self.patience = if taken.granted > 0 {
            PATIENCE
        } else {
            (self.patience * 2).min(PATIENCE_MAX)
        };
        self.trim_to(u64::MAX);
    }

    /// A call that only returned tokens has ended.
    pub(in crate::limiter) fn finish_return(&mut self) {
        self.fetching = false;
    }

    /// The ledger did not answer.
    pub(in crate::limiter) fn fail(&mut self, error: LedgerError, now: UnixNanos) {
        self.fetching = false;
        self.failure = Some(error);
        self.failures += 1;
        self.asked_at = now;
    }

    /// Begins to fetch the first block of the next window, if it is time for `key_hash` and the key was used
    /// in this one. Returns when the next window starts. Followed by [`finish_next`](Self::finish_next).
    pub(in crate::limiter) fn begin_next(
        &mut self,
        now: UnixNanos,
        key_hash: u64,
    ) -> Option<UnixNanos> {
        let end = self.window.span.end;
        let is_time = now.0.saturating_add(AHEAD_MIN + key_hash % AHEAD_JITTER) >= end.0;
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

    /// Returns the limit and the number of tokens to take of a window in which `calendar` is the day or month.
    pub(in crate::limiter) fn next_order(&self, calendar: Window) -> Order {
        let window = window_at(self.window.span.end, calendar, &[self.window]);
        Order {
            give_back: Vec::new(),
            limit: self.limit,
            want: block_size(window.quota(self.limit), self.replicas),
        }
    }

    /// The fetch of the next block ended; `None` if it failed.
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
            // The window has begun meanwhile.
            self.receive(taken, now);
        }
    }

    fn drop_next(&mut self) {
        match std::mem::replace(&mut self.next, Next::None) {
            Next::None => {}
            Next::Fetching | Next::Outdated => self.next = Next::Outdated,
            Next::Held(next) => self.owe(next.window.span, next.held),
        }
    }

    /// Owes what is held beyond a block and beyond what waiting requests need: the rest of what was fetched
    /// for a costly request that then was denied or canceled.
    pub(in crate::limiter) fn tidy(&mut self, waited_for: u64) {
        let size = self.size().max(waited_for);
        if self.held > size {
            self.trim_to(size);
        }
    }

    /// Owes everything that is held.
    fn surrender(&mut self) {
        let n = std::mem::take(&mut self.held);
        self.used = self.used.saturating_sub(n);
        self.owe(self.window.span, n);
    }

    /// Gives up everything that is held, and takes all that is owed out of the block.
    pub(in crate::limiter) fn release(&mut self) -> impl Iterator<Item = (UnixNanos, u64)> {
        self.surrender();
        self.drop_next();
        self.take_owed(UnixNanos(u64::MAX))
    }

    /// Takes what is owed to windows that end by `now` out of the block.
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

    /// Whether the block can be dropped: no tokens held, none owed, no call under way.
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
