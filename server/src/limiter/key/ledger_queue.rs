//! Calls to the quota ledger that wait for a worker.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use super::handle::KeyHandle;
use crate::{
    clock::UnixNanos,
    limiter::{
        policy::Policy,
        quota::{
            block::LedgerOrder,
            calendar::Window,
            ledger::{LedgerRow, ReturnBatch, TakeRequest},
        },
    },
    spans::Parent,
};

/// Which of a policy's blocks a call is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Current,
    Next,
}

/// A call that waits for a batch.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) handle: Arc<KeyHandle>,
    pub(super) policy: Policy,
    pub(super) target: Target,
    pub(super) at: UnixNanos,
    pub(super) calendar: Window,
    pub(super) order: LedgerOrder,
    /// The span of the request that started the call, if the request is traced.
    pub(super) span: Option<Parent>,
}

impl Call {
    pub(super) fn row(&self, window_start: UnixNanos) -> LedgerRow {
        row(&self.handle, self.policy, window_start)
    }

    pub(super) fn request(&self) -> TakeRequest {
        TakeRequest {
            tenant: self.handle.name.tenant,
            key: self.handle.name.key,
            policy: self.policy,
            at: self.at,
            calendar: self.calendar,
            limit: self.order.limit,
            want: self.order.want,
        }
    }
}

pub(super) fn row(handle: &KeyHandle, policy: Policy, window_start: UnixNanos) -> LedgerRow {
    LedgerRow {
        tenant: handle.name.tenant,
        key: handle.name.key,
        policy,
        window_start,
    }
}

/// Waiting calls, and the number of workers. If both are needed, lock a key's state before the queue.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) urgent: VecDeque<Call>,
    /// Calls for the first block of a key's next window. Processed one batch at a time, while no urgent call is
    /// waiting.
    pub(super) ahead: VecDeque<Call>,
    pub(super) is_ahead_running: bool,
    pub(super) takers: usize,
    pub(super) returns: BTreeMap<LedgerRow, u64>,
    /// Failed batches of returns. The batches keep their IDs, since the ledger may have applied them.
    pub(super) retries: VecDeque<ReturnBatch>,
    pub(super) returners: usize,
}

impl Queue {
    pub(super) fn is_idle(&self) -> bool {
        self.takers == 0 && self.returners == 0
    }

    /// Returns whether a batch of takes can be formed.
    pub(super) fn has_takes(&self) -> bool {
        !self.urgent.is_empty() || (!self.ahead.is_empty() && !self.is_ahead_running)
    }

    /// Returns whether a batch of returns can be formed.
    pub(super) fn has_returns(&self) -> bool {
        !self.retries.is_empty() || !self.returns.is_empty()
    }
}
