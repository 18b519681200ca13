//! The store of a single replica: buckets in this process, calendar quotas in blocks from a ledger.
//!
//! Uses the bucket in the key's cell. The cells handle a ledger that is down.

use std::{num::NonZeroU32, sync::Arc};

use async_trait::async_trait;
use quota_common::id::{ApiKeyId, TenantId};

use super::{
    blocks::QuotaLedger,
    cell::{Lacking, Unasked},
    cells::{CellSettings, Cells},
    decision::{Decision, Outcome},
    policy::Policies,
    store::{Drained, KeyCell, LimitStore, LimiterError},
};
use crate::clock::Clock;

/// Limits in this process's memory.
#[derive(Debug)]
pub struct MemoryStore {
    cells: Cells,
}

impl MemoryStore {
    pub fn new(
        clock: Arc<dyn Clock>,
        ledger: Arc<dyn QuotaLedger>,
        settings: CellSettings,
    ) -> Arc<Self> {
        Arc::new(Self {
            cells: Cells::new(clock, ledger, settings, Arc::default()),
        })
    }

    /// Returns how many cells there are.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Decides with what is held, and starts the follow-up work.
    #[inline]
    fn attempt(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        unasked: Unasked,
    ) -> Result<Decision, Lacking> {
        let (mut state, now) = self.cells.current(cell, policies);
        let step = state.step(policies, cost, now, unasked);
        self.cells.after(cell, &mut state, step.as_ref().ok());
        step
    }
}

#[async_trait]
impl LimitStore for MemoryStore {
    fn cell(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyCell>, LimiterError> {
        self.cells.cell(tenant, key)
    }

    #[inline]
    fn try_take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision> {
        self.attempt(cell, policies, cost, Unasked::Wait).ok()
    }

    async fn take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        let attempt = |unasked| self.attempt(cell, policies, cost, unasked);
        self.cells.with_blocks(cell, cost, attempt).await
    }

    fn peek(&self, cell: &KeyCell, policies: &Policies) -> Decision {
        let (state, now) = self.cells.current(cell, policies);
        state.decision(policies, now, Outcome::Allowed)
    }

    fn is_local(&self) -> bool {
        true
    }

    fn prune(&self) -> usize {
        self.cells.prune()
    }

    async fn drain(&self) -> Drained {
        self.cells.drain().await
    }
}
