//! The calls of the quota ledger that are under way.
//!
//! Owns the tasks that fetch and return blocks, and their counting at the end of the process. However such a
//! task ends, the block that it flew for hears of it.

use std::{
    error::Error,
    num::NonZeroU32,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Handle, sync::Notify, time};

use super::{
    blocks::{LedgerRow, Need, Order, QuotaLedger},
    cell::CellState,
    policy::Policy,
    store::{Drained, KeyCell},
};
use crate::clock::{Clock, UnixNanos};

/// A request that waits for the ledger. While it does, what is fetched for it stays in hand.
pub(super) struct Claim<'a> {
    flights: &'a Arc<Flights>,
    cell: &'a Arc<KeyCell>,
    cost: u64,
}

impl<'a> Claim<'a> {
    pub(super) fn new(flights: &'a Arc<Flights>, cell: &'a Arc<KeyCell>, cost: NonZeroU32) -> Self {
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
pub(super) struct TooSlow(pub(super) Duration);

/// The task that asked the ledger ended without an answer.
#[derive(Debug, thiserror::Error)]
#[error("the call was broken off")]
struct BrokenOff;

/// The calls of the ledger that are under way.
#[derive(Debug)]
pub(super) struct Flights {
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
    pub(super) fn new(
        clock: Arc<dyn Clock>,
        ledger: Arc<dyn QuotaLedger>,
        deadline: Duration,
    ) -> Arc<Self> {
        Arc::new(Self {
            clock,
            ledger,
            deadline,
            draining: AtomicBool::new(false),
            under_way: AtomicUsize::new(0),
            all_landed: Notify::new(),
            given_back: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        })
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    pub(super) fn begin_draining(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Waits for every call under way, and tells what became of the tokens since the draining began.
    pub(super) async fn drained(&self) -> Drained {
        loop {
            let mut all_landed = pin!(self.all_landed.notified());
            all_landed.as_mut().enable();
            if self.under_way.load(Ordering::SeqCst) == 0 {
                break;
            }
            all_landed.await;
        }
        Drained {
            given_back: self.given_back.load(Ordering::SeqCst),
            lost: self.lost.load(Ordering::SeqCst),
        }
    }

    /// Starts asking for tokens, unless somebody does already. Outside a runtime, where nothing can be
    /// asked, a request will have to.
    #[cold]
    pub(super) fn start(
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
    pub(super) fn surrender(
        self: &Arc<Self>,
        cell: &Arc<KeyCell>,
        state: &mut CellState,
        policy: Policy,
    ) {
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
