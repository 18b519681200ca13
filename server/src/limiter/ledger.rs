//! Calendar quotas in blocks: what the durable ledger is asked for, and what is in hand of it.
//!
//! The ledger (PostgreSQL) is the truth. A replica takes a block of a quota from it, spends that from
//! memory, and takes the next one ahead of need. What is taken counts as used, so a quota is never
//! exceeded, over any number of replicas and restarts. A crash strands what was in hand, which is at most a
//! hundredth of the quota; a clean stop gives it back.

use std::{fmt::Debug, num::NonZeroU64};

use async_trait::async_trait;
use quota_common::{ApiKeyId, TenantId};

use super::{calendar::Window, policy::Policy};
use crate::clock::UnixNanos;

/// The most that is in hand of one quota, however large it is.
const BLOCK_MAX: u64 = 10_000;

/// The row of the ledger that a block comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Account {
    pub tenant: TenantId,
    pub key: ApiKeyId,
    pub policy: Policy,
    pub window_start: UnixNanos,
}

/// What the ledger handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// From zero to what was wanted.
    pub granted: u64,
    /// All that was handed out in the window so far, this grant included.
    pub used: u64,
}

/// The ledger does not answer. Nothing may be admitted on its account.
#[derive(Debug, thiserror::Error)]
#[error("the quota ledger is unavailable")]
pub struct LedgerUnavailable(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// The durable count of calendar quotas.
#[async_trait]
pub trait QuotaLedger: Debug + Send + Sync + 'static {
    /// Hands out as much of `want` as is left below `limit`, in one atomic step.
    async fn take(
        &self,
        account: Account,
        limit: u64,
        want: NonZeroU64,
    ) -> Result<Grant, LedgerUnavailable>;

    /// Takes back what was granted and not spent.
    async fn give_back(
        &self,
        account: Account,
        amount: NonZeroU64,
    ) -> Result<(), LedgerUnavailable>;
}

/// What is known and in hand of one calendar quota of one key.
#[derive(Debug)]
pub(super) struct QuotaCell {
    pub(super) window: Window,
    limit: u64,
    in_hand: u64,
    /// What the ledger said last; `None` until it was asked in this window, under this limit.
    used: Option<u64>,
    /// When it last said that nothing is left.
    empty_at: Option<UnixNanos>,
    /// A refill is under way.
    pub(super) refilling: bool,
}

/// Whether a calendar quota has what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stock {
    /// In hand. `low`: the next block should be fetched.
    There { low: bool },
    /// Not in this window. `stale`: the ledger should be asked again, for others may have given back.
    Gone { stale: bool },
    /// More than the quota itself.
    Never,
    /// Only the ledger knows.
    Unknown,
}

/// How long the ledger's "nothing left" is believed before it is asked again in the background.
const EMPTY_FOR: u64 = 1_000_000_000;

impl QuotaCell {
    pub(super) fn new(window: Window, limit: u64) -> Self {
        Self {
            window,
            limit,
            in_hand: 0,
            used: None,
            empty_at: None,
            refilling: false,
        }
    }

    pub(super) fn is_for(&self, window_holds: UnixNanos, limit: u64) -> bool {
        self.window.contains(window_holds) && self.limit == limit
    }

    pub(super) const fn limit(&self) -> u64 {
        self.limit
    }

    /// Whether the ledger was asked in this window, under this limit.
    pub(super) const fn is_known(&self) -> bool {
        self.used.is_some()
    }

    pub(super) const fn is_empty_handed(&self) -> bool {
        self.in_hand == 0
    }

    /// The most that is in hand: a hundredth of the quota.
    fn block(&self) -> u64 {
        (self.limit / 100).clamp(1, BLOCK_MAX)
    }

    pub(super) fn stock(&self, cost: u64, now: UnixNanos) -> Stock {
        if self.used.is_none() {
            return Stock::Unknown;
        }
        if cost > self.limit {
            return Stock::Never;
        }
        if self.in_hand >= cost {
            // A block of one cannot be fetched ahead: two in hand would be more than a hundredth.
            let left = self.in_hand - cost;
            let low =
                self.block() > 1 && left < self.block().div_ceil(4) && self.empty_at.is_none();
            return Stock::There { low };
        }
        match self.empty_at {
            // Asked after a clock that jumped back, too.
            Some(at) => Stock::Gone {
                stale: now.0.abs_diff(at.0) >= EMPTY_FOR,
            },
            None => Stock::Unknown,
        }
    }

    pub(super) fn spend(&mut self, cost: u64) {
        self.in_hand -= cost;
    }

    pub(super) fn remaining(&self) -> u64 {
        self.limit.saturating_sub(self.used.unwrap_or(0)) + self.in_hand
    }

    /// How much to ask the ledger for, so that `cost` fits and a block is in hand.
    pub(super) fn want(&self, cost: u64) -> Option<NonZeroU64> {
        NonZeroU64::new(
            self.block()
                .max(cost.min(self.limit))
                .saturating_sub(self.in_hand),
        )
    }

    pub(super) fn granted(&mut self, grant: Grant, want: NonZeroU64, now: UnixNanos) {
        self.in_hand += grant.granted;
        self.used = Some(grant.used);
        self.empty_at = (grant.granted < want.get()).then_some(now);
    }

    /// Empties the hand, to give back what was in it.
    pub(super) fn surrender(&mut self) -> Option<NonZeroU64> {
        let amount = NonZeroU64::new(std::mem::take(&mut self.in_hand));
        self.used = None;
        self.empty_at = None;
        amount
    }
}
