//! Calendar quotas that outlive the process: the ledger holds the truth and hands it out in blocks.
//!
//! A block is tokens that the ledger has already counted as used, so spending them needs nobody's leave, and
//! a crash can strand them but never spend them twice. Owns the rules of one key's block of one policy: how
//! large it may be, when to ask for more, what is over when a plan changes. Knows no SQL and starts no task;
//! the store does the asking. When the ledger is down, what is in hand is spent and then nothing more is
//! admitted.

use std::{error::Error, num::NonZeroU64, sync::Arc};

use async_trait::async_trait;
use quota_common::id::{ApiKeyId, TenantId};

use super::{calendar::Window, policy::Policy};
use crate::clock::UnixNanos;

/// A block is at most this many tokens, and at most one hundredth of its quota.
const BLOCK_MAX: u64 = 10_000;

/// Nanoseconds until a ledger that had nothing left is asked again, at first. Somebody else may have given
/// tokens back. Doubles with each answer of nothing, up to [`PATIENCE_MAX`].
const PATIENCE: u64 = 1_000_000_000;
const PATIENCE_MAX: u64 = 64 * PATIENCE;

/// Nanoseconds until a ledger that failed is asked again. Within them requests are answered at once that it
/// is not available, so that a ledger in trouble is not asked once per request.
const COOLING: u64 = 100_000_000;

/// The row of a ledger: what one key has used of one policy in one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LedgerRow {
    pub tenant: TenantId,
    pub key: ApiKeyId,
    /// [`Policy::Daily`] or [`Policy::Monthly`].
    pub policy: Policy,
    pub window_start: UnixNanos,
}

/// What a ledger handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    pub granted: u64,
    /// All that is used of the row, after this grant and with it.
    pub used: u64,
}

/// Why a ledger could not answer. The caller is told no more than that it could not.
pub type LedgerError = Box<dyn Error + Send + Sync>;

/// The durable truth about calendar quotas.
#[async_trait]
pub trait QuotaLedger: std::fmt::Debug + Send + Sync + 'static {
    /// Counts up to `want` more tokens as used and grants them: `min(want, limit - used)`, in one atomic
    /// step. `limit` is the policy's limit of now, which may be below what is used already; then nothing is
    /// granted. An error may leave them counted: they are lost to the window, never spent twice.
    async fn take(&self, row: LedgerRow, limit: u64, want: u64) -> Result<Taken, LedgerError>;

    /// Counts `n` tokens as unused again. Called at most once for a token: a second try after an unclear
    /// failure could credit it twice.
    async fn give_back(&self, row: LedgerRow, n: u64) -> Result<(), LedgerError>;
}

/// The largest block of a quota in the hands of one of `sharers` replicas: all of theirs together are one
/// hundredth of it, and 10,000, where that is at least one for each.
pub(super) const fn block_size(limit: u64, sharers: u64) -> u64 {
    let hundredth = limit / 100 / sharers;
    if hundredth < 1 {
        1
    } else if hundredth > BLOCK_MAX / sharers {
        BLOCK_MAX / sharers
    } else {
        hundredth
    }
}

/// How a block stands to a cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// The policy does not limit this key.
    Unlimited,
    /// In hand.
    Fits,
    /// Not in hand, but the ledger should have it.
    Short,
    /// The ledger has not been asked in this window.
    Unknown,
    /// Not in this window any more.
    Exhausted,
    /// Above the quota.
    NeverFits,
}

/// What to ask of the ledger, in this order: give back, then take.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) give_back: Vec<(UnixNanos, u64)>,
    pub(super) window_start: UnixNanos,
    pub(super) limit: u64,
    /// Zero: only give back.
    pub(super) want: u64,
}

/// Why tokens are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// A request of this cost waits.
    Cost(u64),
    /// None yet, but soon.
    Ahead,
    /// The ledger had nothing left; perhaps it has now.
    Again,
}

/// The tokens in hand of one policy, and what is known of the rest.
#[derive(Debug)]
pub(super) struct Block {
    /// Zero: no quota.
    limit: u64,
    /// How many replicas take blocks of it. At least 1.
    sharers: u64,
    window: Window,
    /// The ledger has answered in this window.
    known: bool,
    in_hand: u64,
    /// As the ledger counts it: with what is in hand, without what is owed.
    used: u64,
    asked_at: UnixNanos,
    patience: u64,
    in_flight: bool,
    failure: Option<Arc<dyn Error + Send + Sync>>,
    failures: u64,
    /// Tokens of windows to give back with the next flight.
    owed: Vec<(UnixNanos, u64)>,
}

impl Block {
    pub(super) const fn new() -> Self {
        Self {
            limit: 0,
            sharers: 1,
            window: Window::NONE,
            known: false,
            in_hand: 0,
            used: 0,
            asked_at: UnixNanos(0),
            patience: PATIENCE,
            in_flight: false,
            failure: None,
            failures: 0,
            owed: Vec::new(),
        }
    }

    /// So many replicas take blocks of the same quota.
    #[inline]
    pub(super) fn share_among(&mut self, sharers: u64) {
        self.sharers = sharers;
    }

    fn size(&self) -> u64 {
        block_size(self.limit, self.sharers)
    }

    pub(super) fn window(&self) -> Window {
        self.window
    }

    /// Whether [`enter`](Self::enter) is due: the policy limits, and `now` is in another window.
    pub(super) fn is_outdated(&self, now: UnixNanos) -> bool {
        self.limit != 0 && !self.window.contains(now)
    }

    /// The policy's limit is now `limit`. What was consumed stays consumed; what is in hand beyond the new
    /// limit, or beyond the new size of a block, goes back unspent.
    pub(super) fn adopt(&mut self, limit: Option<NonZeroU64>) {
        let limit = limit.map_or(0, NonZeroU64::get);
        if limit != self.limit {
            self.limit = limit;
            self.patience = PATIENCE;
            self.trim();
        }
    }

    /// The clock is in `window` now. What is in hand of another goes back: that one may not have ended (the
    /// clock went back, the zone was edited), and if it has, its row tells what was really used.
    pub(super) fn enter(&mut self, window: Window) {
        if window == self.window {
            return;
        }
        self.surrender();
        self.window = window;
        self.known = false;
        self.in_hand = 0;
        self.used = 0;
        self.patience = PATIENCE;
    }

    pub(super) fn standing(&self, cost: u64) -> Standing {
        if self.limit == 0 {
            Standing::Unlimited
        } else if !self.known {
            Standing::Unknown
        } else if cost > self.limit {
            Standing::NeverFits
        } else if self.in_hand >= cost {
            Standing::Fits
        } else if self.remaining() >= cost {
            Standing::Short
        } else {
            Standing::Exhausted
        }
    }

    /// Spends `cost`, which [fits](Standing::Fits).
    pub(super) fn spend(&mut self, cost: u64) {
        if self.limit != 0 {
            self.in_hand -= cost;
        }
    }

    pub(super) fn limit(&self) -> Option<u64> {
        (self.limit != 0).then_some(self.limit)
    }

    /// What is left of the quota: all of it while the ledger has not been asked.
    pub(super) fn remaining(&self) -> u64 {
        self.limit
            .saturating_sub(self.used.saturating_sub(self.in_hand))
    }

    /// Whether to ask for more before anybody has to wait. Not token by token where others share the quota: each
    /// would hold one that it may never need, until it is used up before it is spent.
    pub(super) fn is_low(&self, now: UnixNanos) -> bool {
        self.known
            && self.used < self.limit
            && (self.sharers == 1 || self.size() > 1)
            && self.in_hand <= self.size() / 4
            && !self.in_flight
            && ((self.failure.is_none() && self.patience == PATIENCE) || self.is_due(now))
    }

    /// Whether there is something to give back and nobody does.
    pub(super) fn has_debts(&self) -> bool {
        !self.owed.is_empty() && !self.in_flight
    }

    /// Whether to ask a ledger again that had nothing left.
    pub(super) fn is_worth_asking_again(&self, now: UnixNanos) -> bool {
        !self.in_flight && self.is_due(now)
    }

    /// The error by which the ledger failed just now, while it is not to be asked again.
    pub(super) fn cooling(&self, now: UnixNanos) -> Option<Arc<dyn Error + Send + Sync>> {
        self.failure
            .as_ref()
            .filter(|_| !self.is_due(now))
            .map(Arc::clone)
    }

    /// How often the ledger has failed, and how it did last.
    pub(super) fn failures(&self) -> u64 {
        self.failures
    }

    pub(super) fn failure(&self) -> Option<Arc<dyn Error + Send + Sync>> {
        self.failure.clone()
    }

    fn is_due(&self, now: UnixNanos) -> bool {
        let patience = if self.failure.is_some() {
            COOLING
        } else {
            self.patience
        };
        // Either way round: a clock that went back must not silence a key for hours.
        now.0.abs_diff(self.asked_at.0) >= patience
    }

    /// Begins a flight, unless one is on its way or there is nothing to ask. Every order is followed by
    /// [`land`](Self::land) or [`fail`](Self::fail).
    pub(super) fn order(&mut self, need: Need) -> Option<Order> {
        if self.in_flight {
            return None;
        }
        let size = self.size();
        let left = self.limit.saturating_sub(self.used);
        let want = match need {
            _ if self.limit == 0 => 0,
            // A request that costs more than a block takes what it needs, to spend it at once; but only
            // where it is known to be there.
            Need::Cost(cost) if self.known => size.max(cost).saturating_sub(self.in_hand).min(left),
            Need::Cost(_) | Need::Ahead => size.saturating_sub(self.in_hand).min(left),
            Need::Again => size.saturating_sub(self.in_hand).max(1),
        };
        self.fly(want)
    }

    /// As [`order`](Self::order), for what is owed and nothing else.
    pub(super) fn order_return(&mut self) -> Option<Order> {
        if self.in_flight { None } else { self.fly(0) }
    }

    fn fly(&mut self, want: u64) -> Option<Order> {
        if want == 0 && self.owed.is_empty() {
            return None;
        }
        self.in_flight = true;
        // Somebody may wait for what is taken: what is owed to other windows goes back after it.
        let current = self.window.start;
        let give_back = self
            .owed
            .extract_if(.., |(window, _)| want == 0 || *window == current)
            .collect();
        Some(Order {
            give_back,
            window_start: self.window.start,
            limit: self.limit,
            want,
        })
    }

    /// The ledger answered an order for tokens of the window that started at `window_start`.
    pub(super) fn land(&mut self, window_start: UnixNanos, taken: Taken, now: UnixNanos) {
        self.in_flight = false;
        self.failure = None;
        if self.limit == 0 || window_start != self.window.start {
            self.owe(window_start, taken.granted);
            return;
        }
        let owed: u64 = self
            .owed
            .iter()
            .filter(|(window, _)| *window == window_start)
            .map(|(_, n)| n)
            .sum();
        self.known = true;
        self.in_hand += taken.granted;
        self.used = taken.used.saturating_sub(owed);
        self.asked_at = now;
        self.patience = if taken.granted > 0 {
            PATIENCE
        } else {
            (self.patience * 2).min(PATIENCE_MAX)
        };
        self.trim_to(u64::MAX);
    }

    /// Gives up what is in hand beyond a block and beyond what requests wait for: the rest of what was
    /// fetched for a costly request that then was denied or went away.
    pub(super) fn tidy(&mut self, waited_for: u64) {
        let size = self.size().max(waited_for);
        if self.in_hand > size {
            self.trim_to(size);
        }
    }

    /// A flight that only gave back is over.
    pub(super) fn land_empty(&mut self) {
        self.in_flight = false;
    }

    /// The ledger did not answer.
    pub(super) fn fail(&mut self, error: Arc<dyn Error + Send + Sync>, now: UnixNanos) {
        self.in_flight = false;
        self.failure = Some(error);
        self.failures += 1;
        self.asked_at = now;
    }

    /// Owes all that is in hand.
    pub(super) fn surrender(&mut self) {
        let n = std::mem::take(&mut self.in_hand);
        self.used = self.used.saturating_sub(n);
        self.owe(self.window.start, n);
    }

    /// Nothing in hand, nothing owed, nobody under way: the block can be forgotten.
    pub(super) fn is_forgettable(&self) -> bool {
        self.in_hand == 0 && self.owed.is_empty() && !self.in_flight
    }

    fn trim(&mut self) {
        self.trim_to(self.size());
    }

    fn trim_to(&mut self, size: u64) {
        let consumed = self.used.saturating_sub(self.in_hand);
        let keep = self
            .in_hand
            .min(self.limit.saturating_sub(consumed))
            .min(size);
        let over = self.in_hand - keep;
        self.in_hand = keep;
        self.used = self.used.saturating_sub(over);
        self.owe(self.window.start, over);
        if self.limit == 0 {
            self.known = false;
            self.used = 0;
            self.window = Window::NONE;
        }
    }

    fn owe(&mut self, window_start: UnixNanos, n: u64) {
        if n == 0 {
            return;
        }
        match self
            .owed
            .iter_mut()
            .find(|(window, _)| *window == window_start)
        {
            Some((_, owed)) => *owed += n,
            None => self.owed.push((window_start, n)),
        }
    }
}
