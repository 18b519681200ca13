//! The ledger of monthly quotas that all keys of a tenant share, stored in PostgreSQL.
//!
//! The limiter takes tokens from these quotas in the same way as from the quotas of keys. The windows are calendar
//! months in UTC, so that a tenant cannot move them by changing its time zone.

use std::sync::Arc;

use async_trait::async_trait;

use super::ledger::{amount, time};
use crate::{
    db::{self, Db, DbError},
    limiter::{LedgerError, LedgerRow, QuotaLedger, QuotaWindow, ReturnBatch, TakeRequest, Taken},
    repo::tenant_quota::{self, Ask, Unused},
    telemetry::metrics::Metrics,
};

/// The maximum number of requests per transaction.
const TAKES: usize = 50;

#[derive(Debug, Clone)]
pub struct TenantLedger {
    db: Db,
    metrics: Arc<Metrics>,
}

#[derive(Debug, thiserror::Error)]
#[error("the tenant does not exist")]
struct NoSuchTenant;

impl TenantLedger {
    pub fn new(db: Db, metrics: Arc<Metrics>) -> Self {
        Self { db, metrics }
    }

    fn failed(&self, error: DbError) -> LedgerError {
        self.metrics.ledger_errors.inc();
        tracing::warn!(error = %db::chain(&error), "a call to the tenant quota ledger failed");
        Arc::new(error)
    }

    async fn take_once(&self, asks: &[Ask]) -> Result<Vec<Option<tenant_quota::Taken>>, DbError> {
        let mut tx = self.db.system().await?;
        let taken = tenant_quota::take(&mut tx, asks).await?;
        // Tokens may be spent only after the commit.
        tx.commit().await?;
        Ok(taken)
    }

    /// Takes tokens from existing rows. Adds missing rows in a second transaction, and takes tokens from these rows in
    /// a third. `asks` must be sorted.
    async fn take_sorted(&self, asks: &[Ask]) -> Vec<Result<tenant_quota::Taken, LedgerError>> {
        let gone = || Arc::new(NoSuchTenant) as LedgerError;
        let mut results: Vec<Result<_, LedgerError>> = match self.take_once(asks).await {
            Ok(taken) => taken.into_iter().map(|it| it.ok_or_else(gone)).collect(),
            Err(error) => {
                let error = self.failed(error);
                return vec![Err(error); asks.len()];
            }
        };
        let missing: Vec<usize> = (0..asks.len()).filter(|i| results[*i].is_err()).collect();
        if missing.is_empty() {
            return results;
        }
        let asks: Vec<Ask> = missing.iter().map(|i| asks[*i]).collect();
        let opened = async {
            let mut tx = self.db.system().await?;
            tenant_quota::open(&mut tx, &asks).await?;
            tx.commit().await?;
            self.take_once(&asks).await
        };
        match opened.await {
            Ok(taken) => {
                for (i, taken) in missing.into_iter().zip(taken) {
                    results[i] = taken.ok_or_else(gone);
                }
            }
            Err(error) => {
                let error = self.failed(error);
                for i in missing {
                    results[i] = Err(error.clone());
                }
            }
        }
        results
    }
}

#[async_trait]
impl QuotaLedger for TenantLedger {
    async fn take(&self, requests: &[TakeRequest]) -> Vec<Result<Taken, LedgerError>> {
        self.metrics.ledger_takes.inc_by(requests.len() as u64);
        // All transactions must lock rows in the same order, so that they do not deadlock.
        let mut order: Vec<usize> = (0..requests.len()).collect();
        order.sort_unstable_by_key(|i| (requests[*i].tenant, requests[*i].calendar.start));
        let mut results: Vec<Option<Result<Taken, LedgerError>>> = vec![None; requests.len()];
        for part in order.chunks(TAKES) {
            let ask = |i: &usize| Ask {
                tenant: requests[*i].tenant.0,
                window_start: time(requests[*i].calendar.start),
                limit: amount(requests[*i].limit),
                want: amount(requests[*i].want),
            };
            let asks: Vec<Ask> = part.iter().map(ask).collect();
            for (i, taken) in part.iter().zip(self.take_sorted(&asks).await) {
                results[*i] = Some(taken.map(|taken| Taken {
                    window: QuotaWindow::whole(requests[*i].calendar),
                    granted: u64::try_from(taken.granted).unwrap_or(0),
                    used: u64::try_from(taken.used).unwrap_or(u64::MAX),
                }));
            }
        }
        results
            .into_iter()
            .map(|it| it.unwrap_or_else(|| Err(Arc::new(NoSuchTenant))))
            .collect()
    }

    async fn give_back(&self, batch: &ReturnBatch) -> Result<(), LedgerError> {
        let unused = |(row, n): &(LedgerRow, u64)| Unused {
            tenant: row.tenant.0,
            window_start: time(row.window_start),
            amount: amount(*n),
        };
        let rows: Vec<Unused> = batch.rows.iter().map(unused).collect();
        let given = async {
            let mut tx = self.db.system().await?;
            tenant_quota::give_back(&mut tx, batch.id, &rows).await?;
            tx.commit().await
        };
        given.await.map_err(|error| self.failed(error))
    }
}
