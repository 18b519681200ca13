//! Every key's cell on this replica, and the calendar quotas in them.
//!
//! Owns the cells, their number and their pruning, and the wait for blocks of quotas, for every store. Knows no
//! SQL: the ledger is a trait. When the ledger is down or slow, keys without calendar quotas are not affected.
//! Keys with quotas spend the blocks held here and are then refused with [`LimiterError::LedgerUnavailable`].
//!
//! A cell is a short lock around plain numbers, rather than one atomic per number: all policies are decided
//! together, and with several atomics a request could be denied by tokens that another, itself denied, was
//! just putting back.
//!
//! Calls of the ledger run in workers, one at a time per key and policy. A request waits for one only when no
//! tokens are held, and may be dropped while it waits without losing what was granted.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{BuildHasher, RandomState},
    num::NonZeroU32,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use quota_common::id::{ApiKeyId, TenantId};
use tokio::time;

use super::{
    blocks::{Need, QuotaLedger},
    cell::{CellState, Lacking, Unasked},
    decision::Decision,
    ledger_calls::{DemandGuard, LedgerCalls, TooSlow},
    policy::{Policies, Policy},
    shared::Roster,
    store::{Drained, KeyCell, LimiterError},
};
use crate::clock::{Clock, UnixNanos};

/// Enough that two cores seldom meet in one, few enough that walking them costs nothing.
const SHARDS: usize = 64;

/// Nanoseconds between two walks through a full shard in search of cells to forget.
const CROWDED_PRUNE: u64 = 1_000_000_000;

/// How many cells are kept, and how long the ledger may take.
#[derive(Debug, Clone)]
pub struct CellSettings {
    /// The most cells at once; about 600 bytes each. A key beyond them gets [`LimiterError::TooManyKeys`],
    /// since dropping another key's bucket would fill it again.
    pub max_cells: usize,
    /// How long a request waits for one call of the ledger. A decision waits for two at most.
    pub ledger_deadline: Duration,
    /// After how long a call of the ledger is given up. Later than requests give up, since what a late answer
    /// grants can still be spent, and what is given up is lost.
    pub flight_deadline: Duration,
    /// How many calls of the ledger may be under way at once. As many as it has connections.
    pub ledger_calls: usize,
    /// How long a drain goes on trying to return blocks to a ledger that does not answer.
    pub drain_deadline: Duration,
}

impl Default for CellSettings {
    fn default() -> Self {
        Self {
            max_cells: 1_000_000,
            ledger_deadline: Duration::from_secs(1),
            flight_deadline: Duration::from_secs(10),
            ledger_calls: 3,
            drain_deadline: Duration::from_secs(20),
        }
    }
}

#[derive(Debug, Default)]
struct Shard {
    cells: HashMap<(TenantId, ApiKeyId), Arc<KeyCell>>,
    /// When it was last walked because it was full.
    crowded_at: UnixNanos,
}

/// How long one decision waits for the ledger: the deadline of a call each time, and of two calls in all.
#[derive(Debug)]
pub(super) struct Patience {
    one: Duration,
    until: Option<time::Instant>,
}

impl Patience {
    fn next_deadline(&mut self) -> time::Instant {
        let now = time::Instant::now();
        let until = *self.until.get_or_insert(now + 2 * self.one);
        until.min(now + self.one)
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Cells {
    pub(super) clock: Arc<dyn Clock>,
    settings: CellSettings,
    /// Who else takes blocks of the same quotas.
    roster: Arc<Roster>,
    hasher: RandomState,
    shards: Box<[Mutex<Shard>]>,
    calls: Arc<LedgerCalls>,
}

impl Cells {
    pub(super) fn new(
        clock: Arc<dyn Clock>,
        ledger: Arc<dyn QuotaLedger>,
        settings: CellSettings,
        roster: Arc<Roster>,
    ) -> Self {
        Self {
            calls: LedgerCalls::new(
                Arc::clone(&clock),
                ledger,
                settings.flight_deadline,
                settings.ledger_calls,
            ),
            clock,
            settings,
            roster,
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }

    /// How many cells are held.
    pub(super) fn len(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| shard.lock().cells.len())
            .sum()
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the remainder is below the number of shards"
    )]
    fn shard(&self, id: &(TenantId, ApiKeyId)) -> &Mutex<Shard> {
        &self.shards[(self.hasher.hash_one(id) % SHARDS as u64) as usize]
    }

    /// See [`LimitStore::cell`](super::LimitStore::cell).
    pub(super) fn cell(
        &self,
        tenant: TenantId,
        key: ApiKeyId,
    ) -> Result<Arc<KeyCell>, LimiterError> {
        let id = (tenant, key);
        let mut shard = self.shard(&id).lock();
        if let Some(cell) = shard.cells.get(&id) {
            return Ok(Arc::clone(cell));
        }
        let room = self.settings.max_cells.div_ceil(SHARDS);
        if shard.cells.len() >= room {
            let now = self.clock.now();
            if now.0.abs_diff(shard.crowded_at.0) >= CROWDED_PRUNE {
                shard.crowded_at = now;
                self.prune_shard(&mut shard, now);
            }
            if shard.cells.len() >= room {
                return Err(LimiterError::TooManyKeys);
            }
        }
        Ok(match shard.cells.entry(id) {
            Entry::Occupied(cell) => Arc::clone(cell.get()),
            Entry::Vacant(place) => Arc::clone(place.insert(Arc::new(KeyCell::new(tenant, key)))),
        })
    }

    /// All cells held now, in parts.
    pub(super) fn by_shard(&self) -> impl Iterator<Item = Vec<Arc<KeyCell>>> {
        let cells = |shard: &Mutex<Shard>| shard.lock().cells.values().map(Arc::clone).collect();
        self.shards.iter().map(cells)
    }

    fn prune_shard(&self, shard: &mut Shard, now: UnixNanos) {
        shard.cells.retain(|_, cell| {
            let mut state = cell.state.lock();
            // If the map's own reference is the last, no other can appear while the shard is locked.
            let is_shared = Arc::strong_count(cell) > 1;
            if is_shared || state.tat > now.0 {
                // So that a block fetched ahead goes back too if no request comes.
                state.enter_windows(now, self.roster.sharers());
                for policy in [Policy::Daily, Policy::Monthly] {
                    self.calls.return_unneeded(cell, &mut state, policy, now);
                    self.calls.start_next(cell, &mut state, policy, now);
                }
            } else {
                // Dropped the next time, when the ledger counts them as unused: the next request of the key
                // would find less than there is.
                let released = [Policy::Daily, Policy::Monthly]
                    .map(|policy| self.calls.release(cell, &mut state, policy));
                if released.contains(&true) {
                    return true;
                }
            }
            is_shared || !state.is_forgettable(now, self.clock.monotonic())
        });
    }

    /// The numbers of a key, brought to these policies and the time that is answered too.
    #[inline]
    pub(super) fn current<'a>(
        &self,
        cell: &'a KeyCell,
        policies: &Policies,
    ) -> (MutexGuard<'a, CellState>, UnixNanos) {
        let mut state = cell.state.lock();
        // Read with the lock held, so that readings come in the order of decisions. A thread that read the
        // time and then was kept waiting would look like a clock set back, and be given the time again.
        let now = self.clock.now();
        state.follow(policies, now, self.roster.sharers());
        (state, now)
    }

    /// Follow-up work after a decision, or an attempt that led to none: returns what is too much, fetches what
    /// is too little.
    #[inline]
    pub(super) fn after(
        &self,
        cell: &Arc<KeyCell>,
        state: &mut CellState,
        decision: Option<&Decision>,
    ) {
        state.tidy();
        if let Some(decision) = decision
            && let Some(needs) = state.errands(decision, decision.at)
        {
            for (policy, need) in [Policy::Daily, Policy::Monthly].into_iter().zip(needs) {
                if let Some(need) = need {
                    self.calls.start(cell, state, policy, need);
                }
            }
        }
    }

    pub(super) fn is_draining(&self) -> bool {
        self.calls.is_draining()
    }

    /// Repeats `attempt` until it lacks no block, fetching those that it lacks. When they cannot be had, it
    /// is asked once more whether it can do without.
    pub(super) async fn with_blocks<T>(
        &self,
        cell: &Arc<KeyCell>,
        cost: NonZeroU32,
        attempt: impl Fn(Unasked) -> Result<T, Lacking>,
    ) -> Result<T, LimiterError> {
        if let Ok(done) = attempt(Unasked::Wait) {
            return Ok(done);
        }
        let _claim = self.claim(cell, cost);
        let mut patience = self.patience();
        match self
            .fetch(cell, cost, &mut patience, || attempt(Unasked::Wait))
            .await
        {
            Ok(done) => Ok(done),
            Err(error) => attempt(Unasked::PassOver).map_err(|_| error),
        }
    }

    /// Until the guard is dropped, what is fetched for a request of this cost stays held.
    pub(super) fn claim<'a>(&'a self, cell: &'a Arc<KeyCell>, cost: NonZeroU32) -> DemandGuard<'a> {
        DemandGuard::new(&self.calls, cell, cost)
    }

    /// How long a decision may wait for the ledger.
    pub(super) fn patience(&self) -> Patience {
        Patience {
            one: self.settings.ledger_deadline,
            until: None,
        }
    }

    /// Fetches the blocks that `attempt` lacks until it lacks none.
    pub(super) async fn fetch<T>(
        &self,
        cell: &Arc<KeyCell>,
        cost: NonZeroU32,
        patience: &mut Patience,
        mut attempt: impl FnMut() -> Result<T, Lacking>,
    ) -> Result<T, LimiterError> {
        let deadline = patience.next_deadline();
        let mut failures_before = None;
        loop {
            if self.is_draining() {
                return Err(LimiterError::Draining);
            }
            let mut landed = pin!(cell.landed.notified());
            // From here on an answer is heard, also one that comes before the wait below.
            landed.as_mut().enable();
            let lacking = match attempt() {
                Ok(done) => return Ok(done),
                Err(lacking) => lacking,
            };
            {
                let mut state = cell.state.lock();
                let now = self.clock.now();
                let failures = state.failures();
                let seen = *failures_before.get_or_insert(failures);
                let need = Need::Cost(state.waited_for.max(u64::from(cost.get())));
                for policy in lacking.iter() {
                    let Some(block) = state.block(policy) else {
                        continue;
                    };
                    let failed_for_us = match policy {
                        Policy::Daily => failures.0 != seen.0,
                        _ => failures.1 != seen.1,
                    };
                    let error = if failed_for_us {
                        block.failure().or_else(|| block.cooling(now))
                    } else {
                        block.cooling(now)
                    };
                    if let Some(error) = error {
                        return Err(LimiterError::LedgerUnavailable(error));
                    }
                    self.calls.start(cell, &mut state, policy, need);
                }
            }
            if time::timeout_at(deadline, landed).await.is_err() {
                let error = Arc::new(TooSlow(self.settings.ledger_deadline));
                return Err(LimiterError::LedgerUnavailable(error));
            }
        }
    }

    /// See [`LimitStore::prune`](super::LimitStore::prune).
    pub(super) fn prune(&self) -> usize {
        let now = self.clock.now();
        let mut left = 0;
        for shard in &self.shards {
            let mut shard = shard.lock();
            self.prune_shard(&mut shard, now);
            left += shard.cells.len();
        }
        left
    }

    /// See [`LimitStore::drain`](super::LimitStore::drain).
    pub(super) async fn drain(&self) -> Drained {
        // Seen by every call that ends later, and by every request that would start one.
        self.calls.begin_draining();
        for shard in &self.shards {
            let cells: Vec<_> = shard.lock().cells.values().map(Arc::clone).collect();
            for cell in cells {
                let mut state = cell.state.lock();
                for policy in [Policy::Daily, Policy::Monthly] {
                    self.calls.release(&cell, &mut state, policy);
                }
            }
        }
        self.calls.drained(self.settings.drain_deadline).await
    }
}
