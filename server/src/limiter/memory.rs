//! The store of a single replica: buckets in this process, calendar quotas in blocks from the ledger.
//!
//! A decision takes the key's own lock, for some tens of nanoseconds; keys do not wait for one another. When
//! the ledger is away, keys without calendar quotas notice nothing, and keys with them are served from what
//! is in hand, then refused with [`LimiterError::Ledger`].

use std::{
    collections::HashMap,
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use quota_common::{ApiKeyId, TenantId};
use tokio::sync::Notify;

use super::{
    calendar::{Period, Window},
    decision::{Decision, PolicyState, Verdict},
    gcra::{Fit, Gcra},
    ledger::{Account, LedgerUnavailable, QuotaCell, QuotaLedger, Stock},
    policy::{Policies, Policy, PolicySet},
    store::{Attempt, LimitStore, LimiterError},
};
use crate::clock::{Clock, UnixNanos};

/// How many independent maps the cells are spread over.
const SHARDS: usize = 16;
/// A key that was not asked about for so long gives its blocks back.
const IDLE: u64 = 60_000_000_000;
/// How long a decision waits for the ledger.
const DEADLINE: Duration = Duration::from_millis(1500);
/// How many refills a caller waits for. More than one is needed only when others spend what was fetched.
const ROUNDS: usize = 1000;

/// The state of one key.
#[derive(Debug)]
pub struct KeyCell {
    tenant: TenantId,
    key: ApiKeyId,
    state: Mutex<State>,
    /// Woken when a refill has ended, well or not.
    refilled: Notify,
}

#[derive(Debug)]
struct State {
    gcra: Option<Gcra>,
    tat: u64,
    quotas: [Option<QuotaCell>; 2],
    /// Of windows and limits that are over: to be given back.
    surrendered: Vec<(Account, NonZeroU64)>,
    last_asked: UnixNanos,
    /// Counts refills that failed, so that those who waited for one know.
    failures: u64,
    drained: bool,
}

/// What to do about a calendar quota after looking at it.
#[derive(Debug, Clone, Copy)]
struct Refill {
    period: Period,
    limit: u64,
    cost: u64,
}

enum Outcome {
    Decided(Decision, [Option<Refill>; 2]),
    MustWait([Option<Refill>; 2]),
    Stopped,
}

impl KeyCell {
    fn new(tenant: TenantId, key: ApiKeyId) -> Self {
        Self {
            tenant,
            key,
            state: Mutex::new(State {
                gcra: None,
                tat: 0,
                quotas: [None, None],
                surrendered: Vec::new(),
                last_asked: UnixNanos::default(),
                failures: 0,
                drained: false,
            }),
            refilled: Notify::new(),
        }
    }

    fn account(&self, period: Period, window: Window) -> Account {
        Account {
            tenant: self.tenant,
            key: self.key,
            policy: period.policy(),
            window_start: window.start,
        }
    }

    /// The whole decision, under the key's lock.
    fn decide(&self, policies: &Policies, cost: u32, now: UnixNanos) -> Outcome {
        let mut state = self.state.lock();
        let state = &mut *state;
        if state.drained {
            return Outcome::Stopped;
        }
        state.last_asked = now;

        if let Some(old) = state.gcra
            && old != policies.gcra
        {
            state.tat = policies.gcra.converted(old, state.tat, now);
        }
        state.gcra = Some(policies.gcra);

        // Kept even when the request is denied: after a clock that jumped back the bucket refills from now.
        state.tat = policies.gcra.clamped(state.tat, now);

        let mut violated = PolicySet::EMPTY;
        let mut retry_at = Some(now);
        let tat_if_taken = match policies.gcra.fit(state.tat, now, cost) {
            Fit::Now(tat) => tat,
            Fit::After(wait) => {
                violated = violated.with(Policy::Rpm);
                retry_at = later(retry_at, Some(now.saturating_add(wait)));
                state.tat
            }
            Fit::Never => {
                violated = violated.with(Policy::Rpm);
                retry_at = None;
                state.tat
            }
        };

        let mut refills = [None, None];
        let mut unknown = false;
        for (slot, period) in [Period::Day, Period::Month].into_iter().enumerate() {
            let Some(limit) = policies.limit(period.policy()) else {
                self.surrender(state, slot, period);
                continue;
            };
            if !state.quotas[slot]
                .as_ref()
                .is_some_and(|quota| quota.is_for(now, limit))
            {
                self.surrender(state, slot, period);
                let window = Window::at(period, &policies.zone, now);
                state.quotas[slot] = Some(QuotaCell::new(window, limit));
            }
            let Some(quota) = &mut state.quotas[slot] else {
                continue;
            };
            let refill = Refill {
                period,
                limit,
                cost: u64::from(cost),
            };
            let mut fetch = false;
            match quota.stock(u64::from(cost), now) {
                Stock::There { low } => fetch = low,
                Stock::Gone { stale } => {
                    violated = violated.with(period.policy());
                    retry_at = later(retry_at, Some(quota.window.end));
                    fetch = stale;
                }
                Stock::Never => {
                    violated = violated.with(period.policy());
                    retry_at = None;
                }
                // Denied anyway: what is known of the quota is enough to say whether it denies too, and nothing
                // is taken out of the ledger that would only lie in hand.
                Stock::Unknown if !violated.is_empty() && quota.is_known() => {
                    if u64::from(cost) > quota.remaining() {
                        violated = violated.with(period.policy());
                        retry_at = later(retry_at, Some(quota.window.end));
                    }
                }
                Stock::Unknown => {
                    unknown = true;
                    fetch = true;
                }
            }
            if fetch && !quota.refilling {
                quota.refilling = true;
                refills[slot] = Some(refill);
            }
        }
        if unknown {
            return Outcome::MustWait(refills);
        }

        let verdict = if violated.is_empty() {
            state.tat = tat_if_taken;
            for quota in state.quotas.iter_mut().flatten() {
                quota.spend(u64::from(cost));
            }
            Verdict::Allowed
        } else {
            Verdict::Denied { violated, retry_at }
        };
        let mut states = [None; Policy::COUNT];
        states[Policy::Rpm.index()] = Some(PolicyState {
            limit: u64::from(policies.burst.get()),
            remaining: policies.gcra.remaining(state.tat, now),
            reset_at: policies.gcra.full_at(state.tat, now),
        });
        for (period, limit) in policies.quotas() {
            let slot = period as usize;
            if let Some(quota) = &state.quotas[slot] {
                states[period.policy().index()] = Some(PolicyState {
                    limit,
                    remaining: quota.remaining(),
                    reset_at: quota.window.end,
                });
            }
        }
        Outcome::Decided(
            Decision {
                verdict,
                states,
                rpm: policies.rpm.get(),
                now,
            },
            refills,
        )
    }

    fn surrender(&self, state: &mut State, slot: usize, period: Period) {
        if let Some(mut old) = state.quotas[slot].take()
            && let Some(amount) = old.surrender()
        {
            state
                .surrendered
                .push((self.account(period, old.window), amount));
        }
    }

    /// Whether forgetting the cell would lose nothing.
    fn says_nothing(&self, now: UnixNanos) -> bool {
        let state = self.state.lock();
        state.tat <= now.0
            && state.surrendered.is_empty()
            && state
                .quotas
                .iter()
                .flatten()
                .all(|quota| !quota.refilling && quota.is_empty_handed())
    }

    fn collect(&self, empty_hands: bool, stop: bool) -> Vec<(Account, NonZeroU64)> {
        let mut state = self.state.lock();
        if empty_hands {
            for (slot, period) in [Period::Day, Period::Month].into_iter().enumerate() {
                if stop
                    || !state.quotas[slot]
                        .as_ref()
                        .is_some_and(|quota| quota.refilling)
                {
                    self.surrender(&mut state, slot, period);
                }
            }
        }
        state.drained |= stop;
        std::mem::take(&mut state.surrendered)
    }
}

/// The later of two times, where `None` is never.
fn later(a: Option<UnixNanos>, b: Option<UnixNanos>) -> Option<UnixNanos> {
    Some(a?.max(b?))
}

/// See the module.
#[derive(Debug, Clone)]
pub struct MemoryStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shards: [Mutex<HashMap<ApiKeyId, Arc<KeyCell>>>; SHARDS],
    cells: AtomicUsize,
    capacity: usize,
    ledger: Arc<dyn QuotaLedger>,
    clock: Arc<dyn Clock>,
    stopped: AtomicBool,
}

impl MemoryStore {
    /// `capacity`: how many keys may be in use at once. One takes about 300 bytes.
    pub fn new(ledger: Arc<dyn QuotaLedger>, clock: Arc<dyn Clock>, capacity: usize) -> Self {
        Self {
            inner: Arc::new(Inner {
                shards: Default::default(),
                cells: AtomicUsize::new(0),
                capacity,
                ledger,
                clock,
                stopped: AtomicBool::new(false),
            }),
        }
    }

    fn start(&self, cell: &Arc<KeyCell>, refills: [Option<Refill>; 2]) {
        for refill in refills.into_iter().flatten() {
            // A task of its own: a caller that goes away must not take with it what others wait for, nor lose
            // a grant that is on its way.
            tokio::spawn(self.clone().refill(cell.clone(), refill));
        }
    }

    async fn refill(self, cell: Arc<KeyCell>, refill: Refill) {
        let slot = refill.period as usize;
        let (ask, returns) = {
            let mut state = cell.state.lock();
            // Those of the same quota, so that they are back before it is asked for more.
            let policy = refill.period.policy();
            let returns = state
                .surrendered
                .extract_if(.., |(account, _)| account.policy == policy)
                .collect();
            let ask = state.quotas[slot].as_ref().map(|quota| {
                (
                    cell.account(refill.period, quota.window),
                    quota.want(refill.cost),
                )
            });
            (ask, returns)
        };
        self.give_back(&cell, returns).await;
        // The plan may have lost the quota meanwhile.
        let Some((account, want)) = ask else {
            return cell.refilled.notify_waiters();
        };

        let granted = match want {
            Some(want) => Some((
                want,
                self.inner.ledger.take(account, refill.limit, want).await,
            )),
            None => None,
        };
        {
            let now = self.inner.clock.now();
            let mut state = cell.state.lock();
            let drained = state.drained;
            let current = state.quotas[slot].as_mut().filter(|quota| {
                quota.window.start == account.window_start
                    && quota.limit() == refill.limit
                    && !drained
            });
            match (granted, current) {
                (Some((want, Ok(grant))), Some(quota)) => {
                    quota.refilling = false;
                    quota.granted(grant, want, now);
                }
                // The window or the limit changed while the ledger was asked.
                (Some((_, Ok(grant))), None) => {
                    if let Some(amount) = NonZeroU64::new(grant.granted) {
                        state.surrendered.push((account, amount));
                    }
                }
                (Some((_, Err(error))), quota) => {
                    if let Some(quota) = quota {
                        quota.refilling = false;
                    }
                    state.failures += 1;
                    drop(state);
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "cannot take from the quota ledger"
                    );
                }
                (None, Some(quota)) => quota.refilling = false,
                (None, None) => {}
            }
        }
        let drained = cell.state.lock().drained;
        if drained {
            let late = cell.collect(true, true);
            self.give_back(&cell, late).await;
        }
        cell.refilled.notify_waiters();
    }

    /// Gives back; what the ledger does not take is kept for the next time.
    async fn give_back(&self, cell: &KeyCell, returns: Vec<(Account, NonZeroU64)>) -> bool {
        let mut all = true;
        for (account, amount) in returns {
            if let Err(error) = self.inner.ledger.give_back(account, amount).await {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot give back to the quota ledger"
                );
                cell.state.lock().surrendered.push((account, amount));
                all = false;
            }
        }
        all
    }

    fn shard(&self, key: ApiKeyId) -> &Mutex<HashMap<ApiKeyId, Arc<KeyCell>>> {
        // The last bits of a UUIDv7 are random.
        &self.inner.shards[usize::from(key.0.as_bytes()[15]) % SHARDS]
    }

    fn all_cells(&self) -> Vec<Arc<KeyCell>> {
        self.inner
            .shards
            .iter()
            .flat_map(|shard| shard.lock().values().cloned().collect::<Vec<_>>())
            .collect()
    }
}

#[async_trait]
impl LimitStore for MemoryStore {
    fn cell(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyCell>, LimiterError> {
        if self.inner.stopped.load(Ordering::Acquire) {
            return Err(LimiterError::Stopped);
        }
        let mut shard = self.shard(key).lock();
        if let Some(cell) = shard.get(&key) {
            return Ok(cell.clone());
        }
        // A cell with something spent cannot be thrown out for a new one: its key would get a fresh bucket.
        if self.inner.cells.load(Ordering::Relaxed) >= self.inner.capacity {
            return Err(LimiterError::Full);
        }
        let cell = Arc::new(KeyCell::new(tenant, key));
        shard.insert(key, cell.clone());
        self.inner.cells.fetch_add(1, Ordering::Relaxed);
        Ok(cell)
    }

    fn try_take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: u32,
        now: UnixNanos,
    ) -> Attempt {
        match cell.decide(policies, cost, now) {
            Outcome::Decided(decision, refills) => {
                self.start(cell, refills);
                Attempt::Decided(decision)
            }
            Outcome::MustWait(refills) => {
                self.start(cell, refills);
                Attempt::MustWait
            }
            Outcome::Stopped => Attempt::MustWait,
        }
    }

    async fn take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: u32,
    ) -> Result<Decision, LimiterError> {
        let wait = async {
            let failures = cell.state.lock().failures;
            for _ in 0..ROUNDS {
                // Registered before looking, so that a refill that ends in between is not missed.
                let refilled = cell.refilled.notified();
                tokio::pin!(refilled);
                refilled.as_mut().enable();
                match cell.decide(policies, cost, self.inner.clock.now()) {
                    Outcome::Decided(decision, refills) => {
                        self.start(cell, refills);
                        return Ok(decision);
                    }
                    Outcome::Stopped => return Err(LimiterError::Stopped),
                    Outcome::MustWait(refills) => self.start(cell, refills),
                }
                refilled.await;
                if cell.state.lock().failures != failures {
                    return Err(LedgerUnavailable("a refill failed".into()).into());
                }
            }
            Err(LimiterError::Deadline)
        };
        tokio::time::timeout(DEADLINE, wait)
            .await
            .unwrap_or(Err(LimiterError::Deadline))
    }

    async fn prune(&self) -> usize {
        let now = self.inner.clock.now();
        for cell in self.all_cells() {
            let idle = now.saturating_since(cell.state.lock().last_asked) >= IDLE;
            let returns = cell.collect(idle, false);
            if !returns.is_empty() {
                self.give_back(&cell, returns).await;
            }
        }
        for shard in &self.inner.shards {
            let mut shard = shard.lock();
            let before = shard.len();
            // One count is the map's own. Cells are handed out under this lock, so none appears meanwhile.
            shard.retain(|_, cell| Arc::strong_count(cell) > 1 || !cell.says_nothing(now));
            self.inner
                .cells
                .fetch_sub(before - shard.len(), Ordering::Relaxed);
        }
        self.inner.cells.load(Ordering::Relaxed)
    }

    async fn drain(&self) -> Result<(), LimiterError> {
        self.inner.stopped.store(true, Ordering::Release);
        let mut all = true;
        for cell in self.all_cells() {
            let returns = cell.collect(true, true);
            all &= self.give_back(&cell, returns).await;
            cell.refilled.notify_waiters();
        }
        if all {
            Ok(())
        } else {
            Err(LedgerUnavailable("some blocks could not be given back".into()).into())
        }
    }
}
