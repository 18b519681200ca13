//! The store of a single replica: every number in this process, calendar quotas by blocks from a ledger.
//!
//! Owns the cells, their bound and their pruning, and the flights that fetch and return blocks. Knows no SQL:
//! the ledger is a trait. When the ledger is down or slow, keys without calendar quotas do not notice, keys
//! with some spend what is in hand and are then refused as [`LimiterError::LedgerUnavailable`].
//!
//! A cell is a short lock around plain numbers, rather than one atomic per number: all policies are decided
//! together, and with several atomics a request could be denied by tokens that another, itself denied, was
//! just putting back.
//!
//! Calls to the ledger run in tasks of their own, one at a time per key and policy. A request waits for one
//! only when nothing is in hand, and may be dropped while it waits without losing what was granted.

use std::{
    collections::{HashMap, hash_map::Entry},
    error::Error,
    hash::{BuildHasher, RandomState},
    num::{NonZeroU32, NonZeroU64},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use quota_common::id::{ApiKeyId, TenantId};
use tokio::{runtime::Handle, sync::Notify, time};

use super::{
    blocks::{Block, LedgerRow, Need, Order, QuotaLedger, Standing},
    calendar,
    decision::{Decision, Outcome, PolicyState},
    gcra::{Gcra, Verdict},
    policy::{Policies, Policy, PolicySet},
    store::{Drained, KeyCell, LimitStore, LimiterError},
};
use crate::clock::{Clock, UnixNanos};

/// Enough that two cores seldom meet in one, few enough that walking them costs nothing.
const SHARDS: usize = 64;

/// Nanoseconds between two walks through a full shard in search of cells to forget.
const CROWDED_PRUNE: u64 = 1_000_000_000;

/// How a memory store is set up.
#[derive(Debug, Clone)]
pub struct MemorySettings {
    /// The most cells held at once; about 500 bytes each. A key beyond them is answered
    /// [`LimiterError::TooManyKeys`], since forgetting another's bucket would fill it again.
    pub max_cells: usize,
    /// How long a request waits for the ledger.
    pub ledger_deadline: Duration,
    /// After how long a call of the ledger is given up. Later than requests do, since what a late answer
    /// grants can still be spent and what is given up is lost.
    pub flight_deadline: Duration,
}

impl Default for MemorySettings {
    fn default() -> Self {
        Self {
            max_cells: 1_000_000,
            ledger_deadline: Duration::from_secs(1),
            flight_deadline: Duration::from_secs(10),
        }
    }
}

/// The numbers of one key.
#[derive(Debug)]
pub(super) struct CellState {
    /// Of the policies that the numbers below follow; zero before the first.
    fingerprint: u64,
    gcra: Gcra,
    tat: u64,
    daily: Block,
    monthly: Block,
    /// The cost of all requests that wait for the ledger.
    waited_for: u64,
}

/// How far a decision got.
enum Step {
    Done(Decision),
    /// These policies' blocks are needed first.
    Wait(PolicySet),
}

/// What to do about policies that the ledger has not been asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unasked {
    /// Ask first.
    Wait,
    /// It cannot be asked: deny if another policy denies anyhow.
    PassOver,
}

impl CellState {
    pub(super) fn new() -> Self {
        Self {
            fingerprint: 0,
            gcra: Gcra::NONE,
            tat: 0,
            daily: Block::new(),
            monthly: Block::new(),
            waited_for: 0,
        }
    }

    fn block(&mut self, policy: Policy) -> Option<&mut Block> {
        match policy {
            Policy::Rpm => None,
            Policy::Daily => Some(&mut self.daily),
            Policy::Monthly => Some(&mut self.monthly),
        }
    }

    /// Brings the numbers to these policies and this time.
    fn follow(&mut self, policies: &Policies, now: UnixNanos) {
        if self.fingerprint != policies.fingerprint() {
            let gcra = policies.gcra();
            if self.fingerprint != 0 {
                self.tat = gcra.carry_over(self.gcra, self.tat, now);
            }
            self.gcra = gcra;
            self.fingerprint = policies.fingerprint();
            self.daily.adopt(policies.daily());
            self.monthly.adopt(policies.monthly());
            // The zone may be another: then today is, too.
            for policy in [Policy::Daily, Policy::Monthly] {
                self.enter(policy, policies, now);
            }
        }
        if self.daily.is_outdated(now) {
            self.enter(Policy::Daily, policies, now);
        }
        if self.monthly.is_outdated(now) {
            self.enter(Policy::Monthly, policies, now);
        }
        self.tat = self.gcra.settled(self.tat, now);
    }

    #[cold]
    fn enter(&mut self, policy: Policy, policies: &Policies, now: UnixNanos) {
        if let Some(block) = self.block(policy)
            && block.limit().is_some()
        {
            block.enter(calendar::window(policy, policies.zone(), now));
        }
    }

    /// Takes `cost` from every policy or from none. The numbers [follow](Self::follow) `now` already.
    fn step(
        &mut self,
        policies: &Policies,
        cost: NonZeroU32,
        now: UnixNanos,
        unasked: Unasked,
    ) -> Step {
        let tokens = u64::from(cost.get());
        let daily = self.daily.standing(tokens);
        let monthly = self.monthly.standing(tokens);
        let rate = self.gcra.decide(self.tat, now, cost);
        if let (
            Verdict::Fits { tat },
            Standing::Fits | Standing::Unlimited,
            Standing::Fits | Standing::Unlimited,
        ) = (rate, daily, monthly)
        {
            self.tat = tat;
            self.daily.spend(tokens);
            self.monthly.spend(tokens);
            return Step::Done(self.decision(policies, now, Outcome::Allowed));
        }

        let mut denial = Denial::default();
        match rate {
            Verdict::Fits { .. } => {}
            Verdict::Wait { wait } => denial.add(Policy::Rpm, Some(wait)),
            Verdict::NeverFits => denial.add(Policy::Rpm, None),
        }
        let mut unknown = PolicySet::EMPTY;
        let mut short = PolicySet::EMPTY;
        for (policy, standing, block) in [
            (Policy::Daily, daily, &self.daily),
            (Policy::Monthly, monthly, &self.monthly),
        ] {
            match standing {
                Standing::Unlimited | Standing::Fits => {}
                Standing::Short => short = short.with(policy),
                Standing::Unknown => unknown = unknown.with(policy),
                Standing::NeverFits => denial.add(policy, None),
                Standing::Exhausted => {
                    let wait = block.window().end.saturating_since(now).max(1);
                    denial.add(policy, NonZeroU64::new(wait));
                }
            }
        }
        // A quota that was not asked for may be the one that makes the wait longest.
        let denied = !denial.violated.is_empty();
        if denied && (unknown.is_empty() || unasked == Unasked::PassOver) {
            Step::Done(self.decision(policies, now, denial.outcome()))
        } else {
            let short = if denied { PolicySet::EMPTY } else { short };
            Step::Wait(unknown.iter().chain(short.iter()).collect())
        }
    }

    fn decision(&self, policies: &Policies, now: UnixNanos, outcome: Outcome) -> Decision {
        let quota = |policy, block: &Block| {
            block.limit().map(|limit| PolicyState {
                policy,
                limit,
                remaining: block.remaining(),
                reset_at: block.window().end,
            })
        };
        Decision {
            at: now,
            outcome,
            rpm: policies.rate().rpm,
            rate: PolicyState {
                policy: Policy::Rpm,
                limit: u64::from(policies.rate().burst.get()),
                remaining: self.gcra.remaining(self.tat, now),
                reset_at: UnixNanos(self.tat.max(now.0)),
            },
            daily: quota(Policy::Daily, &self.daily),
            monthly: quota(Policy::Monthly, &self.monthly),
            degraded: false,
        }
    }

    /// What to ask the ledger for although nobody waits.
    fn errands(&self, decision: &Decision, now: UnixNanos) -> Option<[Option<Need>; 2]> {
        let violated = decision.violated();
        let may_pass_later = decision.retry_after().is_some();
        let need = |policy, block: &Block| {
            if block.is_low(now) || block.has_debts() {
                Some(Need::Ahead)
            } else if violated.contains(policy)
                && may_pass_later
                && block.is_worth_asking_again(now)
            {
                Some(Need::Again)
            } else {
                None
            }
        };
        let needs = [
            need(Policy::Daily, &self.daily),
            need(Policy::Monthly, &self.monthly),
        ];
        (needs != [None, None]).then_some(needs)
    }

    fn tidy(&mut self) {
        self.daily.tidy(self.waited_for);
        self.monthly.tidy(self.waited_for);
    }

    /// Nobody could tell this cell from a new one.
    fn is_forgettable(&self, now: UnixNanos) -> bool {
        self.tat <= now.0 && self.daily.is_forgettable() && self.monthly.is_forgettable()
    }
}

/// A denial in the making.
#[derive(Default)]
struct Denial {
    violated: PolicySet,
    wait: Option<NonZeroU64>,
    never: bool,
}

impl Denial {
    fn add(&mut self, policy: Policy, wait: Option<NonZeroU64>) {
        self.violated = self.violated.with(policy);
        self.never |= wait.is_none();
        self.wait = self.wait.max(wait);
    }

    fn outcome(self) -> Outcome {
        Outcome::Denied {
            violated: self.violated,
            retry_after: if self.never { None } else { self.wait },
        }
    }
}

type Cells = HashMap<(TenantId, ApiKeyId), Arc<KeyCell>>;

#[derive(Debug, Default)]
struct Shard {
    cells: Cells,
    /// When it was last walked because it was full.
    crowded_at: UnixNanos,
}

/// Limits in this process's memory.
#[derive(Debug)]
pub struct MemoryStore {
    clock: Arc<dyn Clock>,
    settings: MemorySettings,
    hasher: RandomState,
    shards: Box<[Mutex<Shard>]>,
    flights: Arc<Flights>,
}

impl MemoryStore {
    pub fn new(
        clock: Arc<dyn Clock>,
        ledger: Arc<dyn QuotaLedger>,
        settings: MemorySettings,
    ) -> Arc<Self> {
        Arc::new(Self {
            flights: Arc::new(Flights {
                clock: Arc::clone(&clock),
                ledger,
                deadline: settings.flight_deadline,
                draining: AtomicBool::new(false),
                under_way: AtomicUsize::new(0),
                all_landed: Notify::new(),
                given_back: AtomicU64::new(0),
                lost: AtomicU64::new(0),
            }),
            clock,
            settings,
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        })
    }

    /// How many cells are held.
    pub fn len(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| shard.lock().cells.len())
            .sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the remainder is below the number of shards"
    )]
    fn shard(&self, id: &(TenantId, ApiKeyId)) -> &Mutex<Shard> {
        &self.shards[(self.hasher.hash_one(id) % SHARDS as u64) as usize]
    }

    fn prune_shard(&self, shard: &mut Shard, now: UnixNanos) {
        shard.cells.retain(|_, cell| {
            // The map's own reference is the last: with the shard locked nobody can get another.
            if Arc::strong_count(cell) > 1 {
                return true;
            }
            let mut state = cell.state.lock();
            if state.tat <= now.0 {
                for policy in [Policy::Daily, Policy::Monthly] {
                    self.flights.surrender(cell, &mut state, policy);
                }
            }
            !state.is_forgettable(now)
        });
    }

    /// One look at the numbers, and what to do next.
    fn attempt(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        unasked: Unasked,
    ) -> Step {
        let mut state = cell.state.lock();
        // Read with the lock held, so that readings come in the order of decisions. A thread that read the
        // time and then was kept waiting would look like a clock set back, and be given the time again.
        let now = self.clock.now();
        state.follow(policies, now);
        let step = state.step(policies, cost, now, unasked);
        state.tidy();
        if let Step::Done(decision) = &step
            && let Some(needs) = state.errands(decision, now)
        {
            for (policy, need) in [Policy::Daily, Policy::Monthly].into_iter().zip(needs) {
                if let Some(need) = need {
                    self.flights.start(cell, &mut state, policy, need);
                }
            }
        }
        step
    }

    /// Denies if a policy does so without the ledger.
    fn without_ledger(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        otherwise: LimiterError,
    ) -> Result<Decision, LimiterError> {
        match self.attempt(cell, policies, cost, Unasked::PassOver) {
            Step::Done(decision) => Ok(decision),
            Step::Wait(_) => Err(otherwise),
        }
    }
}

/// A request that waits for the ledger. While it does, what is fetched for it stays in hand.
struct Claim<'a> {
    flights: &'a Arc<Flights>,
    cell: &'a Arc<KeyCell>,
    cost: u64,
}

impl<'a> Claim<'a> {
    fn new(flights: &'a Arc<Flights>, cell: &'a Arc<KeyCell>, cost: NonZeroU32) -> Self {
        let cost = u64::from(cost.get());
        cell.state.lock().waited_for += cost;
        Self {
            flights,
            cell,
            cost,
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.cell.state.lock();
        state.waited_for -= self.cost;
        state.tidy();
        for policy in [Policy::Daily, Policy::Monthly] {
            if state.block(policy).is_some_and(|block| block.has_debts()) {
                self.flights
                    .start(self.cell, &mut state, policy, Need::Ahead);
            }
        }
    }
}

/// The ledger did not answer within the time that a request waits.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {0:?}")]
struct TooSlow(Duration);

/// The task that asked the ledger ended without an answer.
#[derive(Debug, thiserror::Error)]
#[error("the call was broken off")]
struct BrokenOff;

#[async_trait]
impl LimitStore for MemoryStore {
    fn cell(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyCell>, LimiterError> {
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

    #[inline]
    fn try_take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision> {
        match self.attempt(cell, policies, cost, Unasked::Wait) {
            Step::Done(decision) => Some(decision),
            Step::Wait(_) => None,
        }
    }

    async fn take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        let deadline = time::Instant::now() + self.settings.ledger_deadline;
        let mut failures_before = None;
        let _claim = Claim::new(&self.flights, cell, cost);
        loop {
            let mut landed = pin!(cell.landed.notified());
            // From here on an answer is heard, also one that comes before the wait below.
            landed.as_mut().enable();
            let lacking = match self.attempt(cell, policies, cost, Unasked::Wait) {
                Step::Done(decision) => return Ok(decision),
                Step::Wait(lacking) => lacking,
            };
            if self.flights.draining.load(Ordering::SeqCst) {
                return self.without_ledger(cell, policies, cost, LimiterError::Draining);
            }
            let failure = {
                let mut state = cell.state.lock();
                let now = self.clock.now();
                let failures = (state.daily.failures(), state.monthly.failures());
                let seen = *failures_before.get_or_insert(failures);
                let mut failure = None;
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
                    if error.is_some() {
                        failure = error;
                    } else {
                        let need = Need::Cost(u64::from(cost.get()));
                        self.flights.start(cell, &mut state, policy, need);
                    }
                }
                failure
            };
            if let Some(error) = failure {
                let error = LimiterError::LedgerUnavailable(error);
                return self.without_ledger(cell, policies, cost, error);
            }
            if time::timeout_at(deadline, landed).await.is_err() {
                let error = Arc::new(TooSlow(self.settings.ledger_deadline));
                let error = LimiterError::LedgerUnavailable(error);
                return self.without_ledger(cell, policies, cost, error);
            }
        }
    }

    fn peek(&self, cell: &KeyCell, policies: &Policies) -> Decision {
        let mut state = cell.state.lock();
        let now = self.clock.now();
        state.follow(policies, now);
        state.decision(policies, now, Outcome::Allowed)
    }

    fn is_local(&self) -> bool {
        true
    }

    fn prune(&self) -> usize {
        let now = self.clock.now();
        let mut left = 0;
        for shard in &self.shards {
            let mut shard = shard.lock();
            self.prune_shard(&mut shard, now);
            left += shard.cells.len();
        }
        left
    }

    async fn drain(&self) -> Drained {
        // Seen by every flight that lands later, and by every request that would start one.
        self.flights.draining.store(true, Ordering::SeqCst);
        for shard in &self.shards {
            let cells: Vec<_> = shard.lock().cells.values().map(Arc::clone).collect();
            for cell in cells {
                let mut state = cell.state.lock();
                for policy in [Policy::Daily, Policy::Monthly] {
                    self.flights.surrender(&cell, &mut state, policy);
                }
            }
        }
        loop {
            let mut all_landed = pin!(self.flights.all_landed.notified());
            all_landed.as_mut().enable();
            if self.flights.under_way.load(Ordering::SeqCst) == 0 {
                break;
            }
            all_landed.await;
        }
        Drained {
            given_back: self.flights.given_back.load(Ordering::SeqCst),
            lost: self.flights.lost.load(Ordering::SeqCst),
        }
    }
}

/// The calls of the ledger that are under way.
#[derive(Debug)]
struct Flights {
    clock: Arc<dyn Clock>,
    ledger: Arc<dyn QuotaLedger>,
    deadline: Duration,
    draining: AtomicBool,
    under_way: AtomicUsize,
    all_landed: Notify,
    /// Since draining began.
    given_back: AtomicU64,
    lost: AtomicU64,
}

impl Flights {
    /// Starts asking for tokens, unless somebody does already. Outside a runtime, where nothing can be
    /// asked, a request will have to.
    #[cold]
    fn start(
        self: &Arc<Self>,
        cell: &Arc<KeyCell>,
        state: &mut CellState,
        policy: Policy,
        need: Need,
    ) {
        if self.draining.load(Ordering::SeqCst) {
            return;
        }
        if let Ok(runtime) = Handle::try_current()
            && let Some(block) = state.block(policy)
            && let Some(order) = block.order(need)
        {
            self.spawn(&runtime, cell, policy, order);
        }
    }

    /// Starts giving back all that is in hand.
    fn surrender(self: &Arc<Self>, cell: &Arc<KeyCell>, state: &mut CellState, policy: Policy) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        if let Some(block) = state.block(policy) {
            block.surrender();
            if let Some(order) = block.order_return() {
                self.spawn(&runtime, cell, policy, order);
            }
        }
    }

    fn spawn(
        self: &Arc<Self>,
        runtime: &Handle,
        cell: &Arc<KeyCell>,
        policy: Policy,
        order: Order,
    ) {
        self.under_way.fetch_add(1, Ordering::SeqCst);
        let flight = Flight {
            flights: Arc::clone(self),
            cell: Arc::clone(cell),
            policy,
            landed: false,
        };
        runtime.spawn(flight.run(order));
    }
}

/// One call of the ledger. However it ends, also by a panic or with the runtime, the block hears of it.
struct Flight {
    flights: Arc<Flights>,
    cell: Arc<KeyCell>,
    policy: Policy,
    landed: bool,
}

impl Flight {
    async fn run(mut self, order: Order) {
        let mut next = Some(order);
        while let Some(order) = next {
            for (window_start, n) in order.give_back {
                self.give_back(window_start, n).await;
            }
            let taken =
                if order.want > 0 {
                    let row = self.row(order.window_start);
                    let ledger = &self.flights.ledger;
                    let call = ledger.take(row, order.limit, order.want);
                    Some(match time::timeout(self.flights.deadline, call).await {
                        Ok(Ok(taken)) => Ok(taken),
                        Ok(Err(error)) => Err(Arc::from(error)),
                        Err(_) => Err(Arc::new(TooSlow(self.flights.deadline))
                            as Arc<dyn Error + Send + Sync>),
                    })
                } else {
                    None
                };
            let now = self.flights.clock.now();
            let mut state = self.cell.state.lock();
            let Some(block) = state.block(self.policy) else {
                return;
            };
            match taken {
                Some(Ok(taken)) => block.land(order.window_start, taken, now),
                Some(Err(error)) => {
                    tracing::debug!(error = %error, key = %self.cell.key, "no block from the quota ledger");
                    block.fail(error, now);
                }
                None => block.land_empty(),
            }
            if self.flights.draining.load(Ordering::SeqCst) {
                block.surrender();
            }
            next = block.order_return();
            drop(state);
            self.cell.landed.notify_waiters();
        }
        self.landed = true;
    }

    async fn give_back(&self, window_start: UnixNanos, n: u64) {
        let call = self.flights.ledger.give_back(self.row(window_start), n);
        let error = match time::timeout(self.flights.deadline, call).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(TooSlow(self.flights.deadline).to_string()),
        };
        let count = match error {
            None => &self.flights.given_back,
            Some(error) => {
                tracing::warn!(
                    error,
                    key = %self.cell.key,
                    policy = self.policy.name(),
                    tokens = n,
                    "tokens could not be given back and stay unserved in their window"
                );
                &self.flights.lost
            }
        };
        if self.flights.draining.load(Ordering::SeqCst) {
            count.fetch_add(n, Ordering::SeqCst);
        }
    }

    fn row(&self, window_start: UnixNanos) -> LedgerRow {
        LedgerRow {
            tenant: self.cell.tenant,
            key: self.cell.key,
            policy: self.policy,
            window_start,
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if !self.landed {
            let now = self.flights.clock.now();
            if let Some(block) = self.cell.state.lock().block(self.policy) {
                block.fail(Arc::new(BrokenOff), now);
            }
            self.cell.landed.notify_waiters();
        }
        if self.flights.under_way.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.flights.all_landed.notify_waiters();
        }
    }
}
