//! The tasks that call the quota ledger.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{runtime::Handle, time};
use uuid::Uuid;

use super::{
    ledger_calls::{Canceled, LedgerCalls, TooSlow},
    ledger_queue::{Call, Queue},
};
use crate::{
    limiter::quota::ledger::{LedgerError, LedgerRow, ReturnBatch},
    spans,
};

/// The maximum number of calls per batch of takes.
const TAKES: usize = 50;
/// The maximum number of rows per batch of returns.
const RETURNS: usize = 1000;
/// If more rows than this number are waiting, a second worker for returns starts.
const RETURNS_FOR_ONE: usize = 2 * RETURNS;

/// The initial and the maximum pause after a failed return.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

impl LedgerCalls {
    /// Starts another worker for returns if one is needed.
    pub(super) fn start_returner(self: &Arc<Self>) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let is_missing = {
            let mut queue = self.queue.lock();
            let is_missing = (queue.has_returns() && queue.returners == 0)
                || (queue.returners < self.max_returners && queue.returns.len() > RETURNS_FOR_ONE);
            queue.returners += usize::from(is_missing);
            is_missing
        };
        // The lock must be released first: a runtime that is shutting down drops the worker immediately, and dropping
        // the worker takes the lock.
        if is_missing {
            runtime.spawn(return_all(Worker::new(self, Role::Returner)));
        }
    }

    /// Starts another worker for takes if one is needed.
    pub(super) fn start_taker(self: &Arc<Self>) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let is_missing = {
            let mut queue = self.queue.lock();
            let is_missing = queue.has_takes() && queue.takers < self.max_takers;
            queue.takers += usize::from(is_missing);
            is_missing
        };
        if is_missing {
            runtime.spawn(take_all(Worker::new(self, Role::Taker)));
        }
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

/// A running worker. If a worker ends early, because of a panic or because the runtime drops it, another worker takes
/// its place if there is still work.
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

    /// Returns whether there is work. If there is no work, ends the worker.
    fn has_work(&mut self) -> bool {
        self.has_begun = true;
        let calls = Arc::clone(&self.calls);
        let mut queue = calls.queue.lock();
        let has_work = match self.role {
            Role::Taker => queue.has_takes(),
            Role::Returner => queue.has_returns(),
        };
        if !has_work {
            self.end(&mut queue);
        }
        has_work
    }

    /// Removes the next batch of takes from the queue. Returns `None` if other workers have left no batch for this
    /// worker.
    fn next_takes(&self) -> Option<Takes> {
        let mut queue = self.calls.queue.lock();
        let is_ahead =
            queue.urgent.is_empty() && !queue.ahead.is_empty() && !queue.is_ahead_running;
        let from = if is_ahead {
            &mut queue.ahead
        } else {
            &mut queue.urgent
        };
        let list: Vec<_> = from.drain(..from.len().min(TAKES)).collect();
        if list.is_empty() {
            return None;
        }
        queue.is_ahead_running |= is_ahead;
        Some(Takes {
            calls: Arc::clone(&self.calls),
            list,
            is_ahead,
        })
    }

    /// Removes the next batch of returns from the queue. Returns `None` if other workers have already removed all
    /// returns.
    fn next_returns(&self) -> Option<Returns> {
        let mut queue = self.calls.queue.lock();
        let batch = queue.retries.pop_front().or_else(|| {
            let mut rows = BTreeMap::new();
            while rows.len() < RETURNS
                && let Some((row, n)) = queue.returns.pop_first()
            {
                rows.insert(row, n);
            }
            (!rows.is_empty()).then(|| new_batch(rows))
        });
        Some(Returns {
            calls: Arc::clone(&self.calls),
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
        // If a worker never ran, the runtime dropped it while shutting down, and would drop the next worker too.
        if self.has_begun {
            match self.role {
                Role::Taker => calls.start_taker(),
                Role::Returner => calls.start_returner(),
            }
        }
    }
}

/// A batch of takes in flight.
struct Takes {
    calls: Arc<LedgerCalls>,
    /// Calls that have not ended.
    list: Vec<Call>,
    is_ahead: bool,
}

impl Takes {
    /// Makes the calls. Calls that only take tokens come first, because a return may have to wait for a key that is
    /// being deleted.
    async fn run(mut self) {
        let (owing, list) = std::mem::take(&mut self.list)
            .into_iter()
            .partition(|call| !call.order.give_back.is_empty());
        self.list = list;
        let mut owing = Self {
            calls: Arc::clone(&self.calls),
            list: owing,
            is_ahead: false,
        };
        self.take().await;
        owing.give_back().await;
        owing.take().await;
    }

    /// Gives back the tokens that the calls owe to the ledger. If that fails, ends the calls with the error.
    async fn give_back(&mut self) {
        let mut owed = BTreeMap::new();
        for call in &mut self.list {
            for (window_start, n) in std::mem::take(&mut call.order.give_back) {
                *owed.entry(call.row(window_start)).or_default() += n;
            }
        }
        if owed.is_empty() {
            return;
        }
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
        }
    }

    async fn take(&mut self) {
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
        // A batch can belong to only one trace, so the first traced call in the batch is used.
        let span = self.list.iter().find_map(|call| call.span.clone());
        let take = spans::within(span, self.calls.ledger.take(&requests));
        let answer = time::timeout(deadline, take).await;
        let results = answer.unwrap_or_else(|_| {
            let error: LedgerError = Arc::new(TooSlow(deadline));
            vec![Err(error); requests.len()]
        });
        let answered = results.len().min(self.list.len());
        for (call, taken) in self.list.drain(..answered).zip(results) {
            self.calls.finish(&call, Some(taken));
        }
        // Calls without a result have failed.
        self.cancel();
    }

    fn cancel(&mut self) {
        for call in std::mem::take(&mut self.list) {
            self.calls.finish(&call, Some(Err(Arc::new(Canceled))));
        }
    }
}

impl Drop for Takes {
    fn drop(&mut self) {
        for call in &self.list {
            self.calls.give_back_of(call);
        }
        self.cancel();
        if self.is_ahead {
            self.calls.queue.lock().is_ahead_running = false;
        }
    }
}

/// A batch of returns in flight. The batch is retried until the ledger confirms it.
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

// Both of the following loops form a batch only once they have a connection, so that calls that arrive during the wait
// join the batch.

async fn take_all(mut worker: Worker) {
    let calls = Arc::clone(&worker.calls);
    while worker.has_work() {
        let _connection = calls.connections.for_takes().await;
        if let Some(takes) = worker.next_takes() {
            takes.run().await;
        }
    }
}

async fn return_all(mut worker: Worker) {
    let calls = Arc::clone(&worker.calls);
    let mut pause = Duration::ZERO;
    while worker.has_work() {
        let connection = calls.connections.for_returns().await;
        let Some(mut returns) = worker.next_returns() else {
            continue;
        };
        let returned = returns.run().await;
        drop(connection);
        match returned {
            Ok(()) => pause = Duration::ZERO,
            Err(error) => {
                if pause.is_zero() {
                    tracing::warn!(
                        error = %error,
                        "cannot return unused quota tokens, retrying"
                    );
                }
                pause = (pause * 2).clamp(PAUSE, PAUSE_MAX);
                drop(returns);
                time::sleep(pause).await;
            }
        }
    }
}
