//! Calls to the quota ledger: batched, limited in number, and retried where that is safe.
//!
//! Calls that arrive while all workers are busy share the next batch, so a few connections are enough even if the day
//! begins at the same time for a thousand keys. Every call notifies its block when it ends, even if the call panics or
//! the runtime shuts down.
//!
//! Calls that take tokens (*takes*) are not retried: if one fails or is abandoned after the ledger has granted tokens,
//! the tokens are lost until their window ends. Tokens to be returned are kept until the ledger has confirmed the
//! return. A batch of returns is retried with the same ID and applied at most once, so an outage or an ambiguous
//! failure neither loses these tokens nor credits them twice. Tokens to be returned can be lost only when the process
//! exits: if it is killed, or if draining runs out of time.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore, SemaphorePermit},
    time,
};
use uuid::Uuid;

use super::{
    handle::KeyHandle,
    ledger_queue::{Call, Queue, Target, row},
    state::KeyState,
};
use crate::{
    clock::{Clock, UnixNanos},
    limiter::{
        policy::Policy,
        quota::{
            block::Need,
            calendar,
            ledger::{LedgerError, LedgerRow, QuotaLedger, Taken},
        },
    },
    spans,
};

/// Quota tokens that a drain has returned to the ledger, or failed to return. Does not include rate tokens, which are
/// returned to the shared counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReturnedQuota {
    /// Tokens whose return was confirmed.
    pub given_back: u64,
    /// Tokens whose return was not confirmed. These tokens may be unavailable until their window ends.
    pub lost: u64,
}

/// The ledger did not respond in time.
#[derive(Debug, thiserror::Error)]
#[error("no response within {0:?}")]
pub(in crate::limiter) struct TooSlow(pub(in crate::limiter) Duration);

/// The connections to the ledger, shared by all key tables whose settings contain a clone of this value. Batches get
/// connections in the order in which they request them, so no table can starve another.
#[derive(Debug, Clone)]
pub struct LedgerConnections {
    count: usize,
    all: Arc<Semaphore>,
    /// Permits for batches of returns. If there are several connections, one is reserved for takes.
    returns: Arc<Semaphore>,
}

impl LedgerConnections {
    /// Creates the permits for `count` connections. A count of zero is treated as 1.
    pub fn new(count: usize) -> Self {
        let count = count.max(1);
        Self {
            count,
            all: Arc::new(Semaphore::new(count)),
            returns: Arc::new(Semaphore::new((count - 1).max(1))),
        }
    }

    /// Waits for a connection for a batch of takes. Dropping the result frees the connection.
    pub(super) async fn for_takes(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphores are never closed, so this never returns `None`.
        self.all.acquire().await.ok()
    }

    /// Waits for a connection for a batch of returns.
    pub(super) async fn for_returns(&self) -> Option<[SemaphorePermit<'_>; 2]> {
        let first = self.returns.acquire().await.ok()?;
        Some([first, self.all.acquire().await.ok()?])
    }
}

/// A call ended without a response.
#[derive(Debug, thiserror::Error)]
#[error("the call was canceled")]
pub(super) struct Canceled;

/// The queue of ledger calls and the workers that make them. See the module documentation.
#[derive(Debug)]
pub(in crate::limiter) struct LedgerCalls {
    pub(super) clock: Arc<dyn Clock>,
    pub(super) ledger: Arc<dyn QuotaLedger>,
    pub(super) deadline: Duration,
    pub(super) connections: LedgerConnections,
    /// The maximum number of concurrent batches of takes.
    pub(super) max_takers: usize,
    /// The maximum number of concurrent batches of returns.
    pub(super) max_returners: usize,
    pub(super) queue: Mutex<Queue>,
    pub(super) idle: Notify,
    draining: AtomicBool,
    /// Tokens whose return is not confirmed yet.
    pub(super) unconfirmed: AtomicU64,
    /// Tokens returned since draining began.
    pub(super) given_back: AtomicU64,
}

impl LedgerCalls {
    /// Creates the queue. A call that the ledger does not respond to within `deadline` fails.
    pub(in crate::limiter) fn new(
        clock: Arc<dyn Clock>,
        ledger: Arc<dyn QuotaLedger>,
        deadline: Duration,
        connections: LedgerConnections,
    ) -> Arc<Self> {
        let max_returners = (connections.count / 2).clamp(1, 2);
        Arc::new(Self {
            clock,
            ledger,
            deadline,
            max_takers: connections.count.saturating_sub(max_returners).clamp(1, 3),
            connections,
            max_returners,
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

    /// Prevents new calls that take tokens, and cancels those that are queued.
    pub(in crate::limiter) fn begin_draining(self: &Arc<Self>) {
        self.draining.store(true, Ordering::SeqCst);
        let waiting: Vec<_> = {
            let mut queue = self.queue.lock();
            let urgent = std::mem::take(&mut queue.urgent);
            let ahead = std::mem::take(&mut queue.ahead);
            urgent.into_iter().chain(ahead).collect()
        };
        for call in waiting {
            self.give_back_of(&call);
            self.finish(&call, Some(Err(Arc::new(Canceled))));
        }
    }

    /// Waits until no call is queued or in flight, for at most `within`. Call [`begin_draining`](Self::begin_draining)
    /// first.
    pub(in crate::limiter) async fn finish_draining(
        self: &Arc<Self>,
        within: Duration,
    ) -> ReturnedQuota {
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
        ReturnedQuota {
            given_back: self.given_back.load(Ordering::SeqCst),
            lost: self.unconfirmed.load(Ordering::SeqCst),
        }
    }

    /// Starts to fetch tokens, and to return tokens owed to windows that have not ended, unless a call is in flight.
    /// While draining, does nothing. Outside a runtime, does nothing either; the next request tries again.
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
            let calendar = calendar::window(policy, &state.zone(), now);
            self.enqueue(Call {
                handle: Arc::clone(handle),
                policy,
                target: Target::Current,
                at: now,
                calendar,
                order,
                span: spans::current(),
            });
        }
    }

    /// Starts to fetch the first block of the next window, if that window begins soon.
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
        let hash = spread(handle.name.key.0);
        let Some(at) = state
            .block(policy)
            .and_then(|block| block.begin_next(now, hash))
        else {
            return;
        };
        let calendar = calendar::window(policy, &state.zone(), at);
        if let Some(block) = state.block(policy) {
            self.enqueue(Call {
                handle: Arc::clone(handle),
                policy,
                target: Target::Next,
                at,
                calendar,
                order: block.next_order(calendar),
                span: None,
            });
        }
    }

    /// Starts to return all tokens of a policy's block. Returns whether there were any tokens.
    pub(in crate::limiter) fn return_block(
        self: &Arc<Self>,
        handle: &KeyHandle,
        state: &mut KeyState,
        policy: Policy,
    ) -> bool {
        let mut any = false;
        if Handle::try_current().is_ok()
            && let Some(block) = state.block(policy)
        {
            for (window_start, n) in block.take_all() {
                self.give_back(row(handle, policy, window_start), n);
                any = true;
            }
        }
        any
    }

    /// Starts to return tokens that are not needed soon, and tokens owed to ended windows.
    pub(in crate::limiter) fn return_unneeded(
        self: &Arc<Self>,
        handle: &KeyHandle,
        state: &mut KeyState,
        policy: Policy,
        now: UnixNanos,
    ) {
        let waited_for = state.waited_for;
        if Handle::try_current().is_ok()
            && let Some(block) = state.block(policy)
        {
            // Tokens that are not needed soon are returned in a batch with other keys' tokens, not in a separate call.
            let until = if block.owe_unneeded(now, waited_for) {
                UnixNanos(u64::MAX)
            } else {
                now
            };
            for (window_start, n) in block.take_owed(until) {
                self.give_back(row(handle, policy, window_start), n);
            }
        }
    }

    /// Starts to return the tokens that `call` was supposed to return but has not returned.
    pub(super) fn give_back_of(self: &Arc<Self>, call: &Call) {
        for (window_start, n) in &call.order.give_back {
            self.give_back(call.row(*window_start), *n);
        }
    }

    fn give_back(self: &Arc<Self>, row: LedgerRow, n: u64) {
        self.unconfirmed.fetch_add(n, Ordering::SeqCst);
        *self.queue.lock().returns.entry(row).or_default() += n;
        self.start_returner();
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

    /// Ends a call. `taken` is `None` if the call only returned tokens.
    pub(super) fn finish(self: &Arc<Self>, call: &Call, taken: Option<Result<Taken, LedgerError>>) {
        let now = self.clock.now();
        let mut state = call.handle.state.lock();
        let Some(block) = state.block(call.policy) else {
            return;
        };
        match (call.target, taken) {
            (Target::Current, None) => block.finish_return(),
            (Target::Current, Some(Ok(taken))) => block.finish_fetch(taken, now),
            (Target::Current, Some(Err(error))) => {
                tracing::debug!(error = %error, key = %call.handle.name.key, "cannot fetch a block from the quota ledger");
                block.fail(error, now);
            }
            (Target::Next, taken) => block.finish_next(taken.and_then(Result::ok), now),
        }
        if self.is_draining() {
            self.return_block(&call.handle, &mut state, call.policy);
        } else {
            // Requests that waited for these tokens may have been canceled, so some of the tokens may be surplus.
            // Tokens that became owed during the call can be returned now.
            state.tidy();
            if state
                .block(call.policy)
                .is_some_and(|block| block.is_return_due(now))
            {
                self.start(&call.handle, &mut state, call.policy, Need::Ahead);
            }
        }
        let call_ended = state.existing_call_ended();
        drop(state);
        if let Some(call_ended) = call_ended {
            call_ended.notify_waiters();
        }
    }
}

/// Returns a hash that distributes keys evenly, even if their IDs are similar.
fn spread(id: Uuid) -> u64 {
    let (high, low) = id.as_u64_pair();
    (high ^ low)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .rotate_left(32)
}
