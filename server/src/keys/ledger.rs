//! The durable count of calendar quotas, for the limiter.

use std::sync::Arc;

use async_trait::async_trait;
use chrono::DateTime;

use crate::{
    db::{self, Db, DbError},
    limiter::{LedgerError, LedgerRow, QuotaLedger, Taken},
    repo::quota_usage::{self, Row},
    telemetry::metrics::Metrics,
};

#[derive(Debug, Clone)]
pub struct PostgresLedger {
    db: Db,
    metrics: Arc<Metrics>,
}

impl PostgresLedger {
    pub fn new(db: Db, metrics: Arc<Metrics>) -> Self {
        Self { db, metrics }
    }

    fn failed(&self, error: DbError) -> LedgerError {
        self.metrics.ledger_errors.inc();
        tracing::warn!(error = %db::chain(&error), "the quota ledger cannot be asked");
        Box::new(error)
    }
}

fn row(row: &LedgerRow) -> Row<'_> {
    let nanos = i64::try_from(row.window_start.0).unwrap_or(i64::MAX);
    Row {
        tenant: row.tenant.0,
        key: row.key.0,
        policy: row.policy.name(),
        window_start: DateTime::from_timestamp_nanos(nanos),
    }
}

fn amount(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[async_trait]
impl QuotaLedger for PostgresLedger {
    async fn take(&self, of: LedgerRow, limit: u64, want: u64) -> Result<Taken, LedgerError> {
        self.metrics.ledger_takes.inc();
        let taken = async {
            let mut tx = self.db.system().await?;
            let taken = quota_usage::take(&mut tx, row(&of), amount(limit), amount(want)).await?;
            // Spent only after this: what is not committed was not taken.
            tx.commit().await?;
            Ok(taken)
        };
        match taken.await {
            Ok((granted, used)) => Ok(Taken {
                granted: u64::try_from(granted).unwrap_or(0),
                used: u64::try_from(used).unwrap_or(u64::MAX),
            }),
            Err(error) => Err(self.failed(error)),
        }
    }

    async fn give_back(&self, of: LedgerRow, n: u64) -> Result<(), LedgerError> {
        let given = async {
            let mut tx = self.db.system().await?;
            quota_usage::give_back(&mut tx, row(&of), amount(n)).await?;
            tx.commit().await
        };
        given.await.map_err(|error| self.failed(error))
    }
}
