//! The interface of the quota ledger.

use std::{error::Error, sync::Arc};

use async_trait::async_trait;
use quota_common::id::{ApiKeyId, TenantId};
use uuid::Uuid;

use super::calendar::{QuotaWindow, Window};
use crate::{clock::UnixNanos, limiter::policy::Policy};

/// Identifies a row of the ledger. A row contains the usage of one key and policy in one window. For the quota that all
/// keys of a tenant share, `key` is the tenant's ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LedgerRow {
    pub tenant: TenantId,
    pub key: ApiKeyId,
    /// [`Policy::Daily`] or [`Policy::Monthly`].
    pub policy: Policy,
    pub window_start: UnixNanos,
}

/// A request for tokens from the quota window that contains `at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeRequest {
    pub tenant: TenantId,
    pub key: ApiKeyId,
    /// [`Policy::Daily`] or [`Policy::Monthly`].
    pub policy: Policy,
    pub at: UnixNanos,
    /// The calendar day or month that contains `at`, in the time zone known to the caller.
    pub calendar: Window,
    /// The quota for a full day or month.
    pub limit: u64,
    /// The number of tokens to take, at least 1.
    pub want: u64,
}

/// The ledger's response to a [`TakeRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The window to which the tokens belong. The window contains the request's `at`.
    pub window: QuotaWindow,
    pub granted: u64,
    /// The total usage in the window, including this grant.
    pub used: u64,
}

/// Unused tokens of several rows, to be returned together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReturnBatch {
    /// Identifies the batch when it is retried.
    pub id: Uuid,
    /// The rows and the number of tokens to return to each, in ascending order without duplicates.
    pub rows: Vec<(LedgerRow, u64)>,
}

/// Why a ledger call failed. API consumers see only that the ledger is unavailable.
pub type LedgerError = Arc<dyn Error + Send + Sync>;

/// The durable record of calendar quotas.
#[async_trait]
pub trait QuotaLedger: std::fmt::Debug + Send + Sync + 'static {
    /// Grants each request `min(want, quota - used)` tokens, and counts them as used in the same step. `quota` is the
    /// window's share of `limit`. Returns one result per request, in order. `requests` must not contain the same key
    /// and policy twice.
    ///
    /// The tokens come from the window that contains `at` and already has usage. If there is no such window, the tokens
    /// come from the request's calendar window. The calendar window is shortened if it overlaps a window with usage,
    /// and its quota is reduced in proportion. After an error, tokens may have been counted as used. These tokens are
    /// lost until the window ends, but are never spent twice.
    async fn take(&self, requests: &[TakeRequest]) -> Vec<Result<Taken, LedgerError>>;

    /// Credits either all of the tokens in a batch or none of them. After an error, the tokens may have been credited.
    /// A batch is applied at most once, so the caller may retry until it succeeds.
    async fn give_back(&self, batch: &ReturnBatch) -> Result<(), LedgerError>;
}
