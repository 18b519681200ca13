//! Every key's handle on this replica, and the calendar quotas in them.
//!
//! Owns the keys, their number and their pruning, and the wait for blocks of quotas, for every store. Knows no
//! SQL: the ledger is a trait. When the ledger is down or slow, keys without calendar quotas are not affected.
//! Keys with quotas spend the blocks held here and are then refused with [`LimiterError::LedgerUnavailable`].
//!
//! A handle is a short lock around plain numbers, rather than one atomic per number: all policies are decided
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
    ledger_calls::{DemandGuard, LedgerCalls, TooSlow},
    state::{KeyState, MissingBlocks, OnUnknown},
};
use crate::{
    clock::{Clock, UnixNanos},
    limiter::{
        decision::Decision,
        membership::Membership,
        policy::{Policies, Policy},
        quota::block::{Need, QuotaLedger},
        store::{Drained, KeyHandle, LimiterError},
    },
};

/// Enough that two cores seldom meet in one, few enough that walking them costs nothing.
const SHARDS: usize = 64;

/// Nanoseconds between two walks through a full shard in search of keys to forget.
const CROWDED_PRUNE: u64 = 1_000_000_000;

/// How many keys are kept, and how long the ledger may take.
#[derive(Debug, Clone)]
pub struct KeyTableSettings {
    /// The most keys at once; about 600 bytes each. A key beyond them gets [`LimiterError::TooManyKeys`],
    /// since dropping another key's bucket would fill it again.
    pub max_keys: usize,
    /// How long a request waits for one call of the ledger. A decision waits for two at most.
    pub ledger_deadline: Duration,
    /// After how long a call of the ledger is given up. Later than requests give up, since what a late answer
    /// grants can still be spent, and what is given up is lost.
    pub call_deadline: Duration,
    /// How many calls of the ledger may be under way at once. As many as it has connections.
    pub ledger_calls: usize,
    /// How long a drain goes on trying to return blocks to a ledger that does not answer.
    pub drain_deadline: Duration,
}

impl Default for KeyTableSettings {
    fn default() -> Self {
        Self {
            max_keys: 1_000_000,
            ledger_deadline: Duration::from_secs(1),
            call_deadline: Duration::from_secs(10),
            ledger_calls: 3,
            drain_deadline: Duration::from_secs(20),
        }
    }
}

#[derive(Debug, Default)]
struct Shard {
    keys: HashMap<(TenantId, ApiKeyId), Arc<KeyHandle>>,
    /// When it was last walked because it was full.
    crowded_at: UnixNanos,
}

/// How long one decision waits for the ledger: the deadline of a call each time, and of two calls in all.
#[derive(Debug)]
pub(in crate::limiter) struct Patience {
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
pub(in crate::limiter) struct KeyTable {
    pub(in crate::limiter) clock: Arc<dyn Clock>,
    settings: KeyTableSettings,
    /// Who else takes blocks of the same quotas.
    membership: Arc<Membership>,
    hasher: RandomState,
    shards: Box<[Mutex<Shard>]>,
    calls: Arc<LedgerCalls>,
}

impl KeyTable {
    pub(in crate::limiter) fn new(
        clock: Arc<dyn Clock>,
        ledger: Arc<dyn QuotaLedger>,
        settings: KeyTableSettings,
        membership: Arc<Membership>,
    ) -> Self {
        Self {
            calls: LedgerCalls::new(
                Arc::clone(&clock),
                ledger,
                settings.call_deadline,
                settings.ledger_calls,
            ),
            clock,
            settings,
            membership,
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }

    /// How many keys are held.
    pub(in crate::limiter) fn len(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| shard.lock().keys.len())
            .sum()
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the remainder is below the number of shards"
    )]
    fn shard(&self, id: &(TenantId, ApiKeyId)) -> &Mutex<Shard> {
        &self.shards[(self.hasher.hash_one(id) % SHARDS as u64) as usize]
    }

    /// See [`LimitStore::handle`](super::LimitStore::handle).
    pub(in crate::limiter) fn handle(
        &self,
        tenant: TenantId,
        key: ApiKeyId,
    ) -> Result<Arc<KeyHandle>, LimiterError> {
        let id = (tenant, key);
        let mut shard = self.shard(&id).lock();
        if let Some(handle) = shard.keys.get(&id) {
            return Ok(Arc::clone(handle));
        }
        let room = self.settings.max_keys.div_ceil(SHARDS);
        if shard.keys.len() >= room {
            let now = self.clock.now();
            if now.0.abs_diff(shard.crowded_at.0) >= CROWDED_PRUNE {
                shard.crowded_at = now;
                self.prune_shard(&mut shard, now);
            }
            if shard.keys.len() >= room {
                return Err(LimiterError::TooManyKeys);
            }
        }
        Ok(match shard.keys.entry(id) {
            Entry::Occupied(handle) => Arc::clone(handle.get()),
            Entry::Vacant(place) => Arc::clone(place.insert(Arc::new(KeyHandle::new(tenant, key)))),
        })
    }

    /// All keys held now, in parts.
    pub(in crate::limiter) fn by_shard(&self) -> impl Iterator<Item = Vec<Arc<KeyHandle>>> {
        let keys = |shard: &Mutex<Shard>| shard.lock().keys.values().map(Arc::clone).collect();
        self.shards.iter().map(keys)
    }

    fn prune_shard(&self, shard: &mut Shard, now: UnixNanos) {
        shard.keys.retain(|_, handle| {
            let mut state = handle.state.lock();
            // If the map's own reference is the last, no other can appear while the shard is locked.
            let is_shared = Arc::strong_count(handle) > 1;
            if is_shared || state.tat > now.0 {
                // So that a block fetched ahead goes back too if no request comes.
                state.enter_windows(now, self.membership.replica_count());
                for policy in [Policy::Daily, Policy::Monthly] {
                    self.calls.return_unneeded(handle, &mut state, policy, now);
                    self.calls.start_next(handle, &mut state, policy, now);
                }
            } else {
                // Dropped the next time, when the ledger counts them as unused: the next request of the key
                // would find less than there is.
                let released = [Policy::Daily, Policy::Monthly]
                    .map(|policy| self.calls.release(handle, &mut state, policy));
                if released.contains(&true) {
                    return true;
                }
            }
            is_shared || !state.is_forgettable(now, self.clock.monotonic())
        });
    }

    /// The numbers of a key, brought to these policies and the time that is answered too.
    #[inline]
    pub(in crate::limiter) fn current<'a>(
        &self,
        handle: &'a KeyHandle,
        policies: &Policies,
    ) -> (MutexGuard<'a, KeyState>, UnixNanos) {
        let mut state = handle.state.lock();
        // Read with the lock held, so that readings come in the order of decisions. A thread that read the
        // time and then was kept waiting would look like a clock set back, and be given the time again.
        let now = self.clock.now();
        state.follow(policies, now, self.membership.replica_count());
        (state, now)
    }

    /// Follow-up work after a decision, or an attempt that led to none: returns what is too much, fetches what
    /// is too little.
    #[inline]
    pub(in crate::limiter) fn after(
        &self,
        handle: &Arc<KeyHandle>,
        state: &mut KeyState,
        decision: Option<&Decision>,
    ) {
        state.tidy();
        if let Some(decision) = decision
            && let Some(needs) = state.pending_refills(decision, decision.at)
        {
            for (policy, need) in [Policy::Daily, Policy::Monthly].into_iter().zip(needs) {
                if let Some(need) = need {
                    self.calls.start(handle, state, policy, need);
                }
            }
        }
    }

    pub(in crate::limiter) fn is_draining(&self) -> bool {
        self.calls.is_draining()
    }

    /// Repeats `attempt` until it lacks no block, fetching those that it lacks. When they cannot be had, it
    /// is asked once more whether it can do without.
    pub(in crate::limiter) async fn with_blocks<T>(
        &self,
        handle: &Arc<KeyHandle>,
        cost: NonZeroU32,
        attempt: impl Fn(OnUnknown) -> Result<T, MissingBlocks>,
    ) -> Result<T, LimiterError> {
        if let Ok(done) = attempt(OnUnknown::Wait) {
            return Ok(done);
        }
        let _claim = self.claim(handle, cost);
        let mut patience = self.patience();
        match self
            .fetch(handle, cost, &mut patience, || attempt(OnUnknown::Wait))
            .await
        {
            Ok(done) => Ok(done),
            Err(error) => attempt(OnUnknown::PassOver).map_err(|_| error),
        }
    }

    /// Until the guard is dropped, what is fetched for a request of this cost stays held.
    pub(in crate::limiter) fn claim<'a>(
        &'a self,
        handle: &'a Arc<KeyHandle>,
        cost: NonZeroU32,
    ) -> DemandGuard<'a> {
        DemandGuard::new(&self.calls, handle, cost)
    }

    /// How long a decision may wait for the ledger.
    pub(in crate::limiter) fn patience(&self) -> Patience {
        Patience {
            one: self.settings.ledger_deadline,
            until: None,
        }
    }

    /// Fetches the blocks that `attempt` lacks until it lacks none.
    pub(in crate::limiter) async fn fetch<T>(
        &self,
        handle: &Arc<KeyHandle>,
        cost: NonZeroU32,
        patience: &mut Patience,
        mut attempt: impl FnMut() -> Result<T, MissingBlocks>,
    ) -> Result<T, LimiterError> {
        let deadline = patience.next_deadline();
        let mut failures_before = None;
        loop {
            if self.is_draining() {
                return Err(LimiterError::Draining);
            }
            let mut call_ended = pin!(handle.call_ended.notified());
            // From here on an answer is heard, also one that comes before the wait below.
            call_ended.as_mut().enable();
            let missing = match attempt() {
                Ok(done) => return Ok(done),
                Err(missing) => missing,
            };
            {
                let mut state = handle.state.lock();
                let now = self.clock.now();
                let failures = state.failures();
                let seen = *failures_before.get_or_insert(failures);
                let need = Need::Cost(state.waited_for.max(u64::from(cost.get())));
                for policy in missing.iter() {
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
                    self.calls.start(handle, &mut state, policy, need);
                }
            }
            if time::timeout_at(deadline, call_ended).await.is_err() {
                let error = Arc::new(TooSlow(self.settings.ledger_deadline));
                return Err(LimiterError::LedgerUnavailable(error));
            }
        }
    }

    /// See [`LimitStore::prune`](super::LimitStore::prune).
    pub(in crate::limiter) fn prune(&self) -> usize {
        let now = self.clock.now();
        let mut left = 0;
        for shard in &self.shards {
            let mut shard = shard.lock();
            self.prune_shard(&mut shard, now);
            left += shard.keys.len();
        }
        left
    }

    /// See [`LimitStore::drain`](super::LimitStore::drain).
    pub(in crate::limiter) async fn drain(&self) -> Drained {
        // Seen by every call that ends later, and by every request that would start one.
        self.calls.begin_draining();
        for shard in &self.shards {
            let keys: Vec<_> = shard.lock().keys.values().map(Arc::clone).collect();
            for handle in keys {
                let mut state = handle.state.lock();
                for policy in [Policy::Daily, Policy::Monthly] {
                    self.calls.release(&handle, &mut state, policy);
                }
            }
        }
        self.calls.drained(self.settings.drain_deadline).await
    }
}
