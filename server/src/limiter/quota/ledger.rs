//! The contract of the quota ledger.

use std::{error::Error, sync::Arc};

use async_trait::async_trait;
use quota_common::id::{ApiKeyId, TenantId};
use uuid::Uuid;

use super::calendar::{QuotaWindow, Window};
use crate::{clock::UnixNanos, limiter::policy::Policy};

/// A row of the ledger: the usage of one key and policy in one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LedgerRow {
    pub tenant: TenantId,
    pub key: ApiKeyId,
    /// [`Policy::Daily`] or [`Policy::Monthly`].
    pub policy: Policy,
    pub window_start: UnixNanos,
}

/// A request for tokens of the window that contains `at`.
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

/// The number of tokens that the ledger granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The window to which the tokens belong. It contains the `at` of the request.
    pub window: QuotaWindow,
    pub granted: u64,
    /// Total usage of the window, including this grant.
    pub used: u64,
}

/// Unused tokens of several rows, to be returned together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReturnBatch {
    /// Identifies the batch when it is retried.
    pub id: Uuid,
    /// The rows, in ascending order. Each occurs at most once.
    pub rows: Vec<(LedgerRow, u64)>,
}

/// Why a ledger call failed. API consumers see only that the ledger is unavailable.
pub type LedgerError = Arc<dyn Error + Send + Sync>;

/// The durable record of calendar quotas.
#[async_trait]
pub trait QuotaLedger: std::fmt::Debug + Send + Sync + 'static {
    /// Grants up to `want` tokens for each request and counts them as used, atomically for each request: `min(want,
    /// quota - used)`, where `quota` is the window's share of `limit`. Returns one result per request, in order. A
    /// batch has at most one request per key and policy.
    ///
    /// The tokens come from the window with usage that contains `at`. If there is none, they come from the calendar
    /// window of the request, shortened so that it overlaps no window with usage, with a proportional quota. After an
    /// error, tokens may have been counted. They are lost for the window, but are never spent twice.
    async fn take(&self, requests: &[TakeRequest]) -> Vec<Result<Taken, LedgerError>>;

    /// Credits the tokens in a batch. After an error, either all or none of them were credited. A batch is applied only once, so a
    /// caller may retry until it succeeds.
    async fn give_back(&self, batch: &ReturnBatch) -> Result<(), LedgerError>;
}
