//! The store of a single replica: buckets in memory, and calendar quotas in blocks from the ledger.

use std::{num::NonZeroU32, sync::Arc};

use async_trait::async_trait;
use quota_common::id::{ApiKeyId, TenantId};

use super::{
    decision::{Decision, Outcome},
    error::LimiterError,
    key::{
        handle::KeyHandle,
        ledger_calls::ReturnedQuota,
        state::{MissingBlocks, OnUnknown},
        table::{KeyTable, KeyTableSettings},
    },
    limits::Policies,
    quota::ledger::QuotaLedger,
    rate::counters::CounterError,
    store::LimitStore,
};
use crate::clock::Clock;

#[derive(Debug)]
pub struct LocalStore {
    keys: KeyTable,
}

impl LocalStore {
    pub fn new(
        clock: Arc<dyn Clock>,
        ledger: Arc<dyn QuotaLedger>,
        settings: KeyTableSettings,
    ) -> Arc<Self> {
        Arc::new(Self {
            keys: KeyTable::new(clock, ledger, settings, Arc::default()),
        })
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Decides on a request with the tokens available locally. Starts to fetch or return tokens if necessary.
    #[inline]
    fn attempt(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
        on_unknown: OnUnknown,
    ) -> Result<Decision, MissingBlocks> {
        let (mut state, at) = self.keys.lock_state(handle, policies);
        let step = state.step(policies, cost, at, on_unknown);
        self.keys.follow_up(handle, &mut state, step.as_ref().ok());
        step
    }
}

#[async_trait]
impl LimitStore for LocalStore {
    fn handle(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyHandle>, LimiterError> {
        self.keys.handle(tenant, key)
    }

    #[inline]
    fn try_take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision> {
        self.attempt(handle, policies, cost, OnUnknown::Wait).ok()
    }

    async fn take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        let attempt = |on_unknown| self.attempt(handle, policies, cost, on_unknown);
        self.keys.with_blocks(handle, cost, attempt).await
    }

    fn peek(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        let (state, at) = self.keys.lock_state(handle, policies);
        state.decision(policies, at, Outcome::Allowed)
    }

    fn is_local(&self) -> bool {
        true
    }

    fn prune(&self) -> usize {
        self.keys.prune()
    }

    async fn delete(&self, keys: &[(TenantId, ApiKeyId)]) -> Result<(), CounterError> {
        self.keys.delete(keys);
        Ok(())
    }

    async fn drain(&self) -> ReturnedQuota {
        self.keys.drain().await
    }
}
