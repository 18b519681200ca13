//! The durable count of calendar quotas, for the limiter.

use std::{num::NonZeroU64, sync::Arc};

use async_trait::async_trait;
use chrono::DateTime;

use crate::{
    db::{Db, DbError},
    limiter::{Account, Grant, LedgerUnavailable, QuotaLedger},
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

    fn failed(&self, error: DbError) -> LedgerUnavailable {
        self.metrics.ledger_errors.inc();
        LedgerUnavailable(Box::new(error))
    }
}

fn row(account: &Account) -> Row<'_> {
    let nanos = i64::try_from(account.window_start.0).unwrap_or(i64::MAX);
    Row {
        tenant: account.tenant.0,
        key: account.key.0,
        policy: account.policy.as_str(),
        window_start: DateTime::from_timestamp_nanos(nanos),
    }
}

fn amount(amount: NonZeroU64) -> i64 {
    i64::try_from(amount.get()).unwrap_or(i64::MAX)
}

#[async_trait]
impl QuotaLedger for PostgresLedger {
    async fn take(
        &self,
        account: Account,
        limit: u64,
        want: NonZeroU64,
    ) -> Result<Grant, LedgerUnavailable> {
        self.metrics.ledger_takes.inc();
        let taken = async {
            let mut tx = self.db.system().await?;
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let taken = quota_usage::take(&mut tx, row(&account), limit, amount(want)).await?;
            // Spent only after this: what is not committed was not taken.
            tx.commit().await?;
            Ok(taken)
        };
        match taken.await {
            Ok((granted, used)) => Ok(Grant {
                granted: u64::try_from(granted).unwrap_or(0),
                used: u64::try_from(used).unwrap_or(u64::MAX),
            }),
            Err(error) => Err(self.failed(error)),
        }
    }

    async fn give_back(&self, account: Account, back: NonZeroU64) -> Result<(), LedgerUnavailable> {
        let given = async {
            let mut tx = self.db.system().await?;
            quota_usage::give_back(&mut tx, row(&account), amount(back)).await?;
            tx.commit().await
        };
        given.await.map_err(|error| self.failed(error))
    }
}
