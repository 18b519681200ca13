//! The table of all keys on this replica.
//!
//! Every store uses this table. It owns the handles, prunes them, and fetches missing blocks. The ledger is a trait, so
//! this module does not depend on SQL. If the ledger is slow or fails, keys without calendar quotas are not affected;
//! keys with quotas spend their blocks and then get [`LimiterError::LedgerUnavailable`].
//!
//! Each handle has one lock, which is held only briefly. Atomics would not be enough, because all policies are decided
//! together: with atomics, a request could be denied because of tokens that another denied request is about to return.
//!
//! Workers call the ledger, with at most one call at a time for each block. A request waits only if too few tokens are
//! available locally. If the request is canceled while it waits, no tokens are lost.

use std::{
    collections::HashSet,
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
    demand::DemandGuard,
    handle::{KeyHandle, KeyName, NamedHandle},
    ledger_calls::{LedgerCalls, LedgerConnections, ReturnedQuota, TooSlow},
    state::{KeyState, MissingBlocks, OnUnknown},
};
use crate::{
    clock::{Clock, Moment, Nanos, UnixNanos},
    limiter::{
        decision::Decision,
        error::LimiterError,
        limits::Policies,
        membership::Membership,
        policy::Policy,
        quota::{block::Need, ledger::QuotaLedger},
    },
};

/// The number of shards: enough that threads rarely contend for a shard, and few enough to iterate over.
const SHARDS: usize = 64;

/// The minimum time between two searches of a full shard for keys that can be dropped.
const CROWDED_PRUNE: Nanos = Nanos::from_secs(1);

/// Limits of the table, and timeouts for the ledger.
#[derive(Debug, Clone)]
pub struct KeyTableSettings {
    /// The maximum number of keys, divided evenly among the shards. If a shard is full, requests with a new key of the
    /// shard get [`LimiterError::TooManyKeys`], because dropping another key to make room would refill the dropped
    /// key's bucket.
    pub max_keys: usize,
    /// How long a request waits for one ledger call. A decision waits for at most two calls.
    pub ledger_deadline: Duration,
    /// The time after which a ledger call is abandoned. This time is longer than the time for which requests wait,
    /// because tokens granted by a late response can still be spent. Tokens granted by an abandoned call are lost until
    /// their window ends.
    pub call_deadline: Duration,
    /// The connections to the ledger, which limit the number of concurrent calls.
    pub connections: LedgerConnections,
    /// How long draining keeps trying to return blocks to a ledger that does not respond.
    pub drain_deadline: Duration,
}

impl Default for KeyTableSettings {
    fn default() -> Self {
        Self {
            max_keys: 1_000_000,
            ledger_deadline: Duration::from_secs(1),
            call_deadline: Duration::from_secs(10),
            connections: LedgerConnections::new(3),
            drain_deadline: Duration::from_secs(20),
        }
    }
}

#[derive(Debug, Default)]
struct Shard {
    keys: HashSet<NamedHandle>,
    /// When the shard was last pruned because it was full.
    crowded_at: UnixNanos,
}

/// How long a decision waits for the ledger: at most one deadline for each call, and at most two deadlines in total.
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

/// The table of all keys on this replica. See the module documentation.
#[derive(Debug)]
pub(in crate::limiter) struct KeyTable {
    pub(in crate::limiter) clock: Arc<dyn Clock>,
    settings: KeyTableSettings,
    /// The replicas that take blocks of the same quotas.
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
                settings.connections.clone(),
            ),
            clock,
            settings,
            membership,
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }

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
    fn shard(&self, name: &KeyName) -> &Mutex<Shard> {
        &self.shards[(self.hasher.hash_one(name) % SHARDS as u64) as usize]
    }

    /// See [`LimitStore::handle`](crate::limiter::LimitStore::handle).
    pub(in crate::limiter) fn handle(
        &self,
        tenant: TenantId,
        key: ApiKeyId,
    ) -> Result<Arc<KeyHandle>, LimiterError> {
        let name = KeyName { tenant, key };
        let mut shard = self.shard(&name).lock();
        if let Some(NamedHandle(handle)) = shard.keys.get(&name) {
            return Ok(Arc::clone(handle));
        }
        let room = self.settings.max_keys.div_ceil(SHARDS);
        if shard.keys.len() >= room {
            let now = self.clock.now();
            if now.abs_diff(shard.crowded_at) >= CROWDED_PRUNE {
                shard.crowded_at = now;
                self.prune_shard(&mut shard, now);
            }
            if shard.keys.len() >= room {
                return Err(LimiterError::TooManyKeys);
            }
        }
        let handle = Arc::new(KeyHandle::new(name));
        shard.keys.insert(NamedHandle(Arc::clone(&handle)));
        Ok(handle)
    }

    /// Returns all current keys, shard by shard.
    pub(in crate::limiter) fn by_shard(&self) -> impl Iterator<Item = Vec<Arc<KeyHandle>>> {
        self.shards.iter().map(handles)
    }

    fn prune_shard(&self, shard: &mut Shard, now: UnixNanos) {
        let monotonic = self.clock.monotonic();
        shard.keys.retain(|NamedHandle(handle)| {
            let mut state = handle.state.lock();
            state.free_remote(monotonic);
            // If the shard has the only reference to the handle, no other reference can be created while the shard is
            // locked.
            let is_shared = Arc::strong_count(handle) > 1;
            if is_shared || state.tat > now {
                // Once the state has entered a new window, the prefetched block of that window can be returned even if
                // no request arrives.
                state.enter_windows(now, self.membership.replica_count());
                for policy in [Policy::Daily, Policy::Monthly] {
                    self.calls.return_unneeded(handle, &mut state, policy, now);
                    self.calls.start_next(handle, &mut state, policy, now);
                }
            } else {
                // The next prune drops the key, after the ledger has credited its tokens. If the key were dropped now,
                // its next request could find too few tokens in the ledger.
                let released = [Policy::Daily, Policy::Monthly]
                    .map(|policy| self.calls.return_block(handle, &mut state, policy));
                if released.contains(&true) {
                    return true;
                }
            }
            is_shared || !state.is_forgettable(now, monotonic)
        });
    }

    /// Locks a key's state, and applies the policies and the current time to the state. Also returns the time.
    #[inline]
    pub(in crate::limiter) fn lock_state<'a>(
        &self,
        handle: &'a KeyHandle,
        policies: &Policies,
    ) -> (MutexGuard<'a, KeyState>, Moment) {
        let mut state = handle.state.lock();
        // The time is read under the lock, so that the time does not decrease from one decision to the next. If a
        // thread read the time and then waited for the lock, the clock would seem to have been set back.
        let at = self.clock.moment();
        state.apply_policies(policies, at.calendar, self.membership.replica_count());
        (state, at)
    }

    /// Does the follow-up work after a decision, or after an attempt that could not make one: marks surplus tokens to
    /// be returned. After a decision, also starts the ledger calls that are needed.
    #[inline]
    pub(in crate::limiter) fn follow_up(
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
                // Waiting requests fetch everything that they need. A separate, smaller call would delay these
                // requests.
                if let Some(need) = need
                    && (need != Need::Ahead || state.waited_for == 0)
                {
                    self.calls.start(handle, state, policy, need);
                }
            }
        }
    }

    pub(in crate::limiter) fn is_draining(&self) -> bool {
        self.calls.is_draining()
    }

    /// Repeats `attempt`, fetching missing blocks in between, until it succeeds. If a fetch fails, calls `attempt` once
    /// more with [`OnUnknown::PassOver`].
    pub(in crate::limiter) async fn with_blocks<T>(
        &self,
        handle: &Arc<KeyHandle>,
        cost: NonZeroU32,
        attempt: impl Fn(OnUnknown) -> Result<T, MissingBlocks>,
    ) -> Result<T, LimiterError> {
        if let Ok(done) = attempt(OnUnknown::Wait) {
            return Ok(done);
        }
        let _demand = self.register_demand(handle, cost);
        let mut patience = self.patience();
        match self
            .fetch(handle, cost, &mut patience, || attempt(OnUnknown::Wait))
            .await
        {
            Ok(done) => Ok(done),
            Err(error) => attempt(OnUnknown::PassOver).map_err(|_| error),
        }
    }

    /// Registers a waiting request. Tokens fetched for the request are kept until the request reserves them or the
    /// guard is dropped.
    pub(in crate::limiter) fn register_demand<'a>(
        &'a self,
        handle: &'a Arc<KeyHandle>,
        cost: NonZeroU32,
    ) -> DemandGuard<'a> {
        DemandGuard::new(&self.calls, handle, cost)
    }

    /// Returns how long a decision may wait for the ledger.
    pub(in crate::limiter) fn patience(&self) -> Patience {
        Patience {
            one: self.settings.ledger_deadline,
            until: None,
        }
    }

    /// Fetches missing blocks until `attempt` succeeds. Returns an error if a call to the ledger fails or takes too
    /// long, or if the table is draining.
    pub(in crate::limiter) async fn fetch<T>(
        &self,
        handle: &Arc<KeyHandle>,
        cost: NonZeroU32,
        patience: &mut Patience,
        mut attempt: impl FnMut() -> Result<T, MissingBlocks>,
    ) -> Result<T, LimiterError> {
        let deadline = patience.next_deadline();
        let mut failures_before = None;
        // A block is missing, so the key has a quota and a notification. The key keeps the notification while requests
        // use it.
        let notify = handle.state.lock().call_ended().unwrap_or_default();
        loop {
            if self.is_draining() {
                return Err(LimiterError::Draining);
            }
            let mut call_ended = pin!(notify.notified());
            // From here on, no notification is missed, even one that arrives before the wait begins.
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
                        Policy::Daily => failures[0] != seen[0],
                        _ => failures[1] != seen[1],
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

    /// See [`LimitStore::prune`](crate::limiter::LimitStore::prune).
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

    /// See [`LimitStore::delete`](crate::limiter::LimitStore::delete).
    pub(in crate::limiter) fn delete(&self, keys: &[(TenantId, ApiKeyId)]) {
        for (tenant, key) in keys {
            let name = KeyName {
                tenant: *tenant,
                key: *key,
            };
            let mut shard = self.shard(&name).lock();
            let is_unreferenced = |it: &NamedHandle| Arc::strong_count(&it.0) == 1;
            if shard.keys.get(&name).is_some_and(is_unreferenced) {
                // The ledger's rows were deleted with the key, so there is nothing to return blocks to.
                shard.keys.remove(&name);
            }
        }
    }

    /// See [`LimitStore::drain`](crate::limiter::LimitStore::drain).
    pub(in crate::limiter) async fn drain(&self) -> ReturnedQuota {
        // From now on, calls that end return their tokens, and requests do not start calls.
        self.calls.begin_draining();
        for shard in &self.shards {
            for handle in handles(shard) {
                let mut state = handle.state.lock();
                for policy in [Policy::Daily, Policy::Monthly] {
                    self.calls.return_block(&handle, &mut state, policy);
                }
            }
        }
        let within = self.settings.drain_deadline;
        self.calls.finish_draining(within).await
    }
}

fn handles(shard: &Mutex<Shard>) -> Vec<Arc<KeyHandle>> {
    let shard = shard.lock();
    shard.keys.iter().map(|it| Arc::clone(&it.0)).collect()
}
