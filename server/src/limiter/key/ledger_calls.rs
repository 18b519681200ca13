//! Calls of the quota ledger: batched, bounded in number, and repeated where that is safe.
//!
//! Owns the workers that fetch and return blocks. Calls that arrive while all workers are busy share the next
//! batch, so a thousand keys whose day begins at once cost a few transactions on a few connections. However a
//! call ends, also by a panic or with the runtime, its block is notified.
//!
//! Tokens that go back are kept here until the ledger has confirmed them. A batch is repeated under the same
//! id, which the ledger applies once, so neither an outage nor an unclear failure loses tokens or credits them
//! twice. Only the end of the process can: by `kill -9`, or by a drain that runs out of time.

use std::{
    collections::{BTreeMap, VecDeque},
    num::NonZeroU32,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::Notify, time};
use uuid::Uuid;

use super::state::KeyState;
use crate::{
    clock::{Clock, UnixNanos},
    limiter::{
        policy::Policy,
        quota::{
            block::{
                LedgerError, LedgerRow, Need, Order, QuotaLedger, Reservation, ReturnBatch,
                TakeRequest, Taken,
            },
            calendar,
        },
        store::{Drained, KeyHandle},
    },
};

/// Calls in one batch of takes.
const TAKES: usize = 50;
/// Rows in one batch of returns.
const RETURNS: usize = 1000;
/// How many returns of which one batch needs no help.
const RETURNS_FOR_ONE: usize = 2 * RETURNS;

/// How long a returner pauses after a failure: at first, and at most.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// A request that waits. What is fetched for it stays held until it has [set it apart](Self::reserve), and that stays
/// apart until it is spent or released. Dropping the guard loses nothing.
pub(in crate::limiter) struct DemandGuard<'a> {
    calls: &'a Arc<LedgerCalls>,
    handle: &'a Arc<KeyHandle>,
    cost: u64,
    reserved: Option<[Reservation; 2]>,
}

impl<'a> DemandGuard<'a> {
    pub(in crate::limiter) fn new(
        calls: &'a Arc<LedgerCalls>,
        handle: &'a Arc<KeyHandle>,
        cost: NonZeroU32,
    ) -> Self {
        let cost = u64::from(cost.get());
        handle.state.lock().waited_for += cost;
        Self {
            calls,
            handle,
            cost,
            reserved: None,
        }
    }

    /// Sets the request's quota tokens apart, if all its blocks have them, so that no other request is let on to the
    /// rate with the same ones.
    pub(in crate::limiter) fn reserve(&mut self, state: &mut KeyState, now: UnixNanos) -> bool {
        if self.reserved.is_none() {
            self.reserved = state.reserve_quotas(self.cost, now);
            if self.reserved.is_some() {
                state.waited_for -= self.cost;
            }
        }
        self.reserved.is_some()
    }

    /// Spends what was set apart. If the window has ended meanwhile, releases it and tries the current one.
    pub(in crate::limiter) fn spend(&mut self, state: &mut KeyState, now: UnixNanos) -> bool {
        let Some(reserved) = self.reserved.take() else {
            return state.spend_quotas(self.cost, now);
        };
        state.waited_for += self.cost;
        let is_spent = state.spend_reserved(reserved) || state.spend_quotas(self.cost, now);
        // Whoever waits for these tokens to be released waits no longer.
        if !is_spent || (state.waited_for > self.cost && !state.has_reservations()) {
            self.handle.call_ended.notify_waiters();
        }
        is_spent
    }

    /// Releases what was set apart: the request waits again.
    pub(in crate::limiter) fn release(&mut self, state: &mut KeyState) {
        if let Some(reserved) = self.reserved.take() {
            state.waited_for += self.cost;
            state.release_reserved(reserved);
            if state.waited_for > self.cost {
                self.handle.call_ended.notify_waiters();
            }
        }
    }
}

impl Drop for DemandGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.handle.state.lock();
        self.release(&mut state);
        state.waited_for -= self.cost;
        state.tidy();
        if self.calls.is_draining() {
            for policy in [Policy::Daily, Policy::Monthly] {
                self.calls.release(self.handle, &mut state, policy);
            }
            return;
        }
        let now = self.calls.clock.now();
        for policy in [Policy::Daily, Policy::Monthly] {
            if state
                .block(policy)
                .is_some_and(|block| block.has_debts(now))
            {
                self.calls
                    .start(self.handle, &mut state, policy, Need::Ahead);
            }
        }
    }
}

/// The ledger did not answer in time.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {0:?}")]
pub(in crate::limiter) struct TooSlow(pub(in crate::limiter) Duration);

/// A call ended without an answer.
#[derive(Debug, thiserror::Error)]
#[error("the call was canceled")]
struct Canceled;

/// Which block of a policy a call is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Current,
    Next,
}

/// A call that waits for its batch.
#[derive(Debug)]
struct Call {
    handle: Arc<KeyHandle>,
    policy: Policy,
    target: Target,
    at: UnixNanos,
    calendar: calendar::Window,
    order: Order,
}

impl Call {
    fn row(&self, window_start: UnixNanos) -> LedgerRow {
        row(&self.handle, self.policy, window_start)
    }

    fn request(&self) -> TakeRequest {
        TakeRequest {
            tenant: self.handle.tenant,
            key: self.handle.key,
            policy: self.policy,
            at: self.at,
            calendar: self.calendar,
            limit: self.order.limit,
            want: self.order.want,
        }
    }
}

fn row(handle: &KeyHandle, policy: Policy, window_start: UnixNanos) -> LedgerRow {
    LedgerRow {
        tenant: handle.tenant,
        key: handle.key,
        policy,
        window_start,
    }
}

/// What waits for a worker, and how many workers there are. Locked after a key's state, never before it.
#[derive(Debug, Default)]
struct Queue {
    urgent: VecDeque<Call>,
    /// First blocks of next windows: only while nothing is urgent, one batch at a time.
    ahead: VecDeque<Call>,
    is_ahead_running: bool,
    takers: usize,
    returns: BTreeMap<LedgerRow, u64>,
    /// Batches that failed. Their ids stay, since the ledger may have applied them.
    retries: VecDeque<ReturnBatch>,
    returners: usize,
}

impl Queue {
    fn is_idle(&self) -> bool {
        self.takers == 0 && self.returners == 0
    }
}

/// See the module.
#[derive(Debug)]
pub(in crate::limiter) struct LedgerCalls {
    clock: Arc<dyn Clock>,
    ledger: Arc<dyn QuotaLedger>,
    deadline: Duration,
    /// Batches of takes under way at once, at most.
    takers: usize,
    /// Batches of returns under way at once, at most.
    returners: usize,
    queue: Mutex<Queue>,
    idle: Notify,
    draining: AtomicBool,
    /// Tokens that are to be returned and are not confirmed.
    unconfirmed: AtomicU64,
    /// Since draining began.
    given_back: AtomicU64,
}

impl LedgerCalls {
    /// Calls are given up after `deadline`. At most `at_once` are under way, of which returns leave one to takes.
    pub(in crate::limiter) fn new(
        clock: Arc<dyn Clock>,
        ledger: Arc<dyn QuotaLedger>,
        deadline: Duration,
        at_once: usize,
    ) -> Arc<Self> {
        let returners = (at_once / 2).clamp(1, 2);
        Arc::new(Self {
            clock,
            ledger,
            deadline,
            takers: at_once.saturating_sub(returners).clamp(1, 3),
            returners,
            queue: Mutex::default(),
            idle: Notify::new(),
            draining: AtomicBool::new(false),
            unconfirmed: AtomicU64::new(0),
            given_back: AtomicU64::new(0),
        })
    }

    pub(in crate::limiter) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Starts no more takes, and cancels those that no worker has begun.
    pub(in crate::limiter) fn begin_draining(self: &Arc<Self>) {
        self.draining.store(true, Ordering::SeqCst);
        let waiting: Vec<_> = {
            let mut queue = self.queue.lock();
            let urgent = std::mem::take(&mut queue.urgent);
            let ahead = std::mem::take(&mut queue.ahead);
            urgent.into_iter().chain(ahead).collect()
        };
        for call in waiting {
            for (window_start, n) in &call.order.give_back {
                self.give_back(call.row(*window_start), *n);
            }
            self.finish(&call, Some(Err(Arc::new(Canceled))));
        }
    }

    /// Waits for every call under way, for at most `within`, and reports what became of the tokens since the
    /// draining began.
    pub(in crate::limiter) async fn drained(self: &Arc<Self>, within: Duration) -> Drained {
        self.start_returner();
        let all = async {
            loop {
                let mut idle = pin!(self.idle.notified());
                idle.as_mut().enable();
                if self.queue.lock().is_idle() {
                    return;
                }
                idle.await;
            }
        };
        let _ = time::timeout(within, all).await;
        Drained {
            given_back: self.given_back.load(Ordering::SeqCst),
            lost: self.unconfirmed.load(Ordering::SeqCst),
        }
    }

    /// Starts to fetch tokens, unless a call is under way. Outside a runtime, where no call can be made, the
    /// next request has to.
    #[cold]
    pub(in crate::limiter) fn start(
        self: &Arc<Self>,
        handle: &Arc<KeyHandle>,
        state: &mut KeyState,
        policy: Policy,
        need: Need,
    ) {
        if self.is_draining() || Handle::try_current().is_err() {
            return;
        }
        let now = self.clock.now();
        if let Some(block) = state.block(policy)
            && let Some(order) = block.begin_fetch(need, now)
        {
            self.enqueue(Call {
                handle: Arc::clone(handle),
                policy,
                target: Target::Current,
                at: now,
                calendar: calendar::window(policy, state.zone(), now),
                order,
            });
        }
    }

    /// Starts to fetch the first block of the next window, if it is time.
    pub(in crate::limiter) fn start_next(
        self: &Arc<Self>,
        handle: &Arc<KeyHandle>,
        state: &mut KeyState,
        policy: Policy,
        now: UnixNanos,
    ) {
        if self.is_draining() || Handle::try_current().is_err() {
            return;
        }
        let hash = spread(handle.key.0);
        let Some(at) = state
            .block(policy)
            .and_then(|block| block.begin_next(now, hash))
        else {
            return;
        };
        let calendar = calendar::window(policy, state.zone(), at);
        if let Some(block) = state.block(policy) {
            self.enqueue(Call {
                handle: Arc::clone(handle),
                policy,
                target: Target::Next,
                at,
                calendar,
                order: block.next_order(calendar),
            });
        }
    }

    /// Starts to return everything that the block of a policy holds. Returns whether there was anything.
    pub(in crate::limiter) fn release(
        self: &Arc<Self>,
        handle: &KeyHandle,
        state: &mut KeyState,
        policy: Policy,
    ) -> bool {
        let mut any = false;
        if Handle::try_current().is_ok()
            && let Some(block) = state.block(policy)
        {
            for (window_start, n) in block.release() {
                self.give_back(row(handle, policy, window_start), n);
                any = true;
            }
        }
        any
    }

    /// Starts to return a block that was not spent from for a while, and what is left of windows that have ended.
    pub(in crate::limiter) fn return_unneeded(
        self: &Arc<Self>,
        handle: &KeyHandle,
        state: &mut KeyState,
        policy: Policy,
        now: UnixNanos,
    ) {
        if Handle::try_current().is_ok()
            && let Some(block) = state.block(policy)
        {
            // An idle block goes back with others in one batch, not in a call of its own.
            let until = if block.give_up_idle(now) {
                UnixNanos(u64::MAX)
            } else {
                now
            };
            for (window_start, n) in block.take_owed(until) {
                self.give_back(row(handle, policy, window_start), n);
            }
        }
    }

    fn give_back(self: &Arc<Self>, row: LedgerRow, n: u64) {
        self.unconfirmed.fetch_add(n, Ordering::SeqCst);
        *self.queue.lock().returns.entry(row).or_default() += n;
        self.start_returner();
    }

    /// Starts a worker for returns if one is missing.
    fn start_returner(self: &Arc<Self>) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let is_missing = {
            let mut queue = self.queue.lock();
            let has_work = !queue.retries.is_empty() || !queue.returns.is_empty();
            // The second one only where the first has more than a batch to do.
            let is_missing = (has_work && queue.returners == 0)
                || (queue.returners < self.returners && queue.returns.len() > RETURNS_FOR_ONE);
            queue.returners += usize::from(is_missing);
            is_missing
        };
        // Without the lock: a runtime that is shutting down drops the worker at once.
        if is_missing {
            runtime.spawn(return_all(Worker::new(self, Role::Returner)));
        }
    }

    fn enqueue(self: &Arc<Self>, call: Call) {
        {
            let mut queue = self.queue.lock();
            match call.target {
                Target::Current => queue.urgent.push_back(call),
                Target::Next => queue.ahead.push_back(call),
            }
        }
        self.start_taker();
    }

    /// Starts a worker for takes if one is missing.
    fn start_taker(self: &Arc<Self>) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let is_missing = {
            let mut queue = self.queue.lock();
            let has_work =
                !queue.urgent.is_empty() || (!queue.ahead.is_empty() && !queue.is_ahead_running);
            let is_missing = has_work && queue.takers < self.takers;
            queue.takers += usize::from(is_missing);
            is_missing
        };
        if is_missing {
            runtime.spawn(take_all(Worker::new(self, Role::Taker)));
        }
    }

    /// The call has ended: `None` if it only returned tokens.
    fn finish(self: &Arc<Self>, call: &Call, taken: Option<Result<Taken, LedgerError>>) {
        let now = self.clock.now();
        let mut state = call.handle.state.lock();
        let Some(block) = state.block(call.policy) else {
            return;
        };
        match (call.target, taken) {
            (Target::Current, None) => block.finish_return(),
            (Target::Current, Some(Ok(taken))) => block.finish_fetch(taken, now),
            (Target::Current, Some(Err(error))) => {
                tracing::debug!(error = %error, key = %call.handle.key, "no block from the quota ledger");
                block.fail(error, now);
            }
            (Target::Next, taken) => block.finish_next(taken.and_then(Result::ok), now),
        }
        if self.is_draining() {
            self.release(&call.handle, &mut state, call.policy);
        } else {
            // Whoever waited for it may be gone, and what was released meanwhile had to wait for this call to end.
            state.tidy();
            if state
                .block(call.policy)
                .is_some_and(|block| block.has_debts(now))
            {
                self.start(&call.handle, &mut state, call.policy, Need::Ahead);
            }
        }
        drop(state);
        call.handle.call_ended.notify_waiters();
    }

    async fn return_once(&self, batch: &ReturnBatch) -> Result<(), LedgerError> {
        let answer = time::timeout(self.deadline, self.ledger.give_back(batch)).await;
        answer.unwrap_or_else(|_| Err(Arc::new(TooSlow(self.deadline))))?;
        let n = batch.rows.iter().map(|(_, n)| n).sum();
        self.unconfirmed.fetch_sub(n, Ordering::SeqCst);
        if self.is_draining() {
            self.given_back.fetch_add(n, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// Spreads keys evenly, whatever their ids look like.
fn spread(id: Uuid) -> u64 {
    let (high, low) = id.as_u64_pair();
    (high ^ low)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .rotate_left(32)
}

fn new_batch(rows: BTreeMap<LedgerRow, u64>) -> ReturnBatch {
    ReturnBatch {
        id: Uuid::now_v7(),
        rows: rows.into_iter().collect(),
    }
}

#[derive(Debug, Clone, Copy)]
enum Role {
    Taker,
    Returner,
}

/// A running worker. Dropped by a panic or with the runtime, it is replaced if there is work left.
struct Worker {
    calls: Arc<LedgerCalls>,
    role: Role,
    has_begun: bool,
    has_ended: bool,
}

impl Worker {
    fn new(calls: &Arc<LedgerCalls>, role: Role) -> Self {
        Self {
            calls: Arc::clone(calls),
            role,
            has_begun: false,
            has_ended: false,
        }
    }

    fn end(&mut self, queue: &mut Queue) {
        self.has_ended = true;
        match self.role {
            Role::Taker => queue.takers -= 1,
            Role::Returner => queue.returners -= 1,
        }
        if queue.is_idle() {
            self.calls.idle.notify_waiters();
        }
    }

    /// Takes the next batch of takes, or ends the worker.
    fn next_takes(&mut self) -> Option<Takes> {
        self.has_begun = true;
        let calls = Arc::clone(&self.calls);
        let mut queue = calls.queue.lock();
        let is_ahead =
            queue.urgent.is_empty() && !queue.ahead.is_empty() && !queue.is_ahead_running;
        let from = if is_ahead {
            &mut queue.ahead
        } else {
            &mut queue.urgent
        };
        let list: Vec<_> = from.drain(..from.len().min(TAKES)).collect();
        if list.is_empty() {
            self.end(&mut queue);
            return None;
        }
        queue.is_ahead_running |= is_ahead;
        Some(Takes {
            calls: Arc::clone(&calls),
            list,
            is_ahead,
        })
    }

    /// Takes the next batch of returns, or ends the worker.
    fn next_returns(&mut self) -> Option<Returns> {
        self.has_begun = true;
        let calls = Arc::clone(&self.calls);
        let mut queue = calls.queue.lock();
        let batch = queue.retries.pop_front().or_else(|| {
            let mut rows = BTreeMap::new();
            while rows.len() < RETURNS
                && let Some((row, n)) = queue.returns.pop_first()
            {
                rows.insert(row, n);
            }
            (!rows.is_empty()).then(|| new_batch(rows))
        });
        if batch.is_none() {
            self.end(&mut queue);
        }
        Some(Returns {
            calls: Arc::clone(&calls),
            batch: Some(batch?),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        let calls = Arc::clone(&self.calls);
        self.end(&mut calls.queue.lock());
        // One that never ran was refused by a runtime that is shutting down, as the next one would be.
        if self.has_begun {
            match self.role {
                Role::Taker => calls.start_taker(),
                Role::Returner => calls.start_returner(),
            }
        }
    }
}

/// A batch of takes under way.
struct Takes {
    calls: Arc<LedgerCalls>,
    /// Those that have not ended.
    list: Vec<Call>,
    is_ahead: bool,
}

impl Takes {
    async fn run(mut self) {
        let mut owed = BTreeMap::new();
        for call in &self.list {
            for (window_start, n) in &call.order.give_back {
                *owed.entry(call.row(*window_start)).or_default() += n;
            }
        }
        if !owed.is_empty() {
            let n: u64 = owed.values().sum();
            self.calls.unconfirmed.fetch_add(n, Ordering::SeqCst);
            let mut returns = Returns {
                calls: Arc::clone(&self.calls),
                batch: Some(new_batch(owed)),
            };
            if let Err(error) = returns.run().await {
                for call in std::mem::take(&mut self.list) {
                    self.calls.finish(&call, Some(Err(Arc::clone(&error))));
                }
                return;
            }
        }
        let (takes, rest) = std::mem::take(&mut self.list)
            .into_iter()
            .partition(|call| call.order.want > 0);
        self.list = takes;
        for call in rest {
            self.calls.finish(&call, None);
        }
        if self.list.is_empty() {
            return;
        }
        let requests: Vec<_> = self.list.iter().map(Call::request).collect();
        let deadline = self.calls.deadline;
        let answer = time::timeout(deadline, self.calls.ledger.take(&requests)).await;
        let results = answer.unwrap_or_else(|_| {
            let error: LedgerError = Arc::new(TooSlow(deadline));
            vec![Err(error); requests.len()]
        });
        let answered = results.len().min(self.list.len());
        for (call, taken) in self.list.drain(..answered).zip(results) {
            self.calls.finish(&call, Some(taken));
        }
    }
}

impl Drop for Takes {
    fn drop(&mut self) {
        for call in std::mem::take(&mut self.list) {
            self.calls.finish(&call, Some(Err(Arc::new(Canceled))));
        }
        if self.is_ahead {
            self.calls.queue.lock().is_ahead_running = false;
        }
    }
}

/// A batch of returns under way. Unless it is confirmed it goes to the retries.
struct Returns {
    calls: Arc<LedgerCalls>,
    batch: Option<ReturnBatch>,
}

impl Returns {
    async fn run(&mut self) -> Result<(), LedgerError> {
        if let Some(batch) = &self.batch {
            self.calls.return_once(batch).await?;
        }
        self.batch = None;
        Ok(())
    }
}

impl Drop for Returns {
    fn drop(&mut self) {
        if let Some(batch) = self.batch.take() {
            self.calls.queue.lock().retries.push_back(batch);
            self.calls.start_returner();
        }
    }
}

async fn take_all(mut worker: Worker) {
    while let Some(takes) = worker.next_takes() {
        takes.run().await;
    }
}

async fn return_all(mut worker: Worker) {
    let mut pause = Duration::ZERO;
    while let Some(mut returns) = worker.next_returns() {
        match returns.run().await {
            Ok(()) => pause = Duration::ZERO,
            Err(error) => {
                if pause.is_zero() {
                    tracing::warn!(
                        error = %error,
                        "unused quota tokens cannot be returned; trying again"
                    );
                }
                pause = (pause * 2).clamp(PAUSE, PAUSE_MAX);
                drop(returns);
                time::sleep(pause).await;
            }
        }
    }
}
