//! The ledger of calendar quotas, stored in PostgreSQL.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, Datelike, Days, Months, NaiveTime, TimeDelta, Utc};
use quota_common::{ApiKeyId, TenantId};

use crate::{
    clock::{Nanos, UnixNanos},
    db::{self, Db, DbError, SystemTx},
    limiter::{
        LedgerError, LedgerRow, Policy, QuotaLedger, QuotaWindow, ReturnBatch, TakeRequest, Taken,
        Window, window_at,
    },
    repo::quota_usage::{self, Ask, KeyQuota, Row, StatedWindow},
    telemetry::metrics::Metrics,
};

/// The maximum number of requests per transaction. A transaction locks the windows that it opens, and by default
/// PostgreSQL reserves space for 64 such locks per connection.
const TAKES: usize = 50;

#[derive(Debug, Clone)]
pub struct PostgresLedger {
    db: Db,
    metrics: Arc<Metrics>,
}

#[derive(Debug, thiserror::Error)]
#[error("the key does not exist")]
struct NoSuchKey;

impl PostgresLedger {
    pub fn new(db: Db, metrics: Arc<Metrics>) -> Self {
        Self { db, metrics }
    }

    fn failed(&self, error: DbError) -> LedgerError {
        self.metrics.ledger_errors.inc();
        tracing::warn!(error = %db::chain(&error), "a call to the quota ledger failed");
        Arc::new(error)
    }

    /// Takes tokens for all requests in one transaction. `requests` must be sorted.
    async fn take_together(
        &self,
        from: Windows,
        requests: &[TakeRequest],
    ) -> Result<Vec<Option<Taken>>, DbError> {
        let asks: Vec<Ask> = requests.iter().map(ask).collect();
        let mut tx = self.db.system().await?;
        let taken = match from {
            Windows::Used => quota_usage::take(&mut tx, &asks, None).await?,
            Windows::Opened => open_and_take(&mut tx, requests, &asks).await?,
        };
        // Tokens may be spent only after the commit.
        tx.commit().await?;
        Ok(taken.into_iter().map(|it| it.map(granted)).collect())
    }

    /// Takes tokens for all requests in one transaction. If one request causes the transaction to fail, retries the
    /// requests one at a time.
    async fn take_from(
        &self,
        from: Windows,
        requests: &[TakeRequest],
    ) -> Vec<Result<Option<Taken>, LedgerError>> {
        match self.take_together(from, requests).await {
            Ok(taken) => taken.into_iter().map(Ok).collect(),
            Err(error @ (DbError::Query(_) | DbError::Constraint(_))) if requests.len() > 1 => {
                tracing::debug!(error = %db::chain(&error), "a call to the quota ledger failed; retrying its requests one at a time");
                let mut results = Vec::with_capacity(requests.len());
                for request in requests {
                    let taken = self
                        .take_together(from, std::slice::from_ref(request))
                        .await;
                    results.push(match taken {
                        Ok(taken) => Ok(taken.into_iter().next().flatten()),
                        Err(error) => Err(self.failed(error)),
                    });
                }
                results
            }
            Err(error) => {
                let error = self.failed(error);
                vec![Err(error); requests.len()]
            }
        }
    }

    /// Takes tokens from windows in use. In a second transaction, opens missing windows and takes tokens from these
    /// windows. The transactions are separate, because the second one may have to wait for a key that is being deleted,
    /// and must not hold locks that other calls need while it waits.
    async fn take_sorted(&self, requests: &[TakeRequest]) -> Vec<Result<Taken, LedgerError>> {
        let mut results = self.take_from(Windows::Used, requests).await;
        let missing: Vec<usize> = (0..results.len())
            .filter(|i| matches!(results[*i], Ok(None)))
            .collect();
        if !missing.is_empty() {
            let requests: Vec<_> = missing.iter().map(|i| requests[*i]).collect();
            let opened = self.take_from(Windows::Opened, &requests).await;
            for (i, opened) in missing.into_iter().zip(opened) {
                results[i] = opened;
            }
        }
        let gone = || Arc::new(NoSuchKey) as LedgerError;
        results
            .into_iter()
            .map(|it| it.and_then(|taken| taken.ok_or_else(gone)))
            .collect()
    }
}

/// The windows to take tokens from.
#[derive(Debug, Clone, Copy)]
enum Windows {
    /// The windows with usage.
    Used,
    /// The window that contains the time of the request, opened if necessary.
    Opened,
}

async fn open_and_take(
    tx: &mut SystemTx,
    requests: &[TakeRequest],
    asks: &[Ask],
) -> Result<Vec<Option<quota_usage::Taken>>, DbError> {
    let since: Vec<_> = requests.iter().map(|it| time(it.calendar.start)).collect();
    // Until the commit, no other replica can open a window for these keys. A window may become unused in the meantime,
    // but no other window can come into use.
    quota_usage::lock(tx, asks).await?;
    let used = quota_usage::used_windows(tx, asks, &since).await?;
    let windows: Vec<_> = requests
        .iter()
        .zip(used)
        .map(|(request, used)| {
            let used: Vec<_> = used.iter().map(|row| stated(row, request)).collect();
            let window = window_at(request.at, request.calendar, &used);
            let seconds = i64::try_from(window.period.0 / 1_000_000_000).unwrap_or(i64::MAX);
            (time(window.span.start), time(window.span.end), seconds)
        })
        .collect();
    quota_usage::open(tx, asks, &windows).await?;
    let starts: Vec<_> = windows.iter().map(|window| window.0).collect();
    quota_usage::take(tx, asks, Some(&starts)).await
}

fn quota(tenant: TenantId, key: ApiKeyId, policy: Policy) -> KeyQuota {
    KeyQuota {
        tenant: tenant.0,
        key: key.0,
        policy: policy.name(),
    }
}

fn ask(request: &TakeRequest) -> Ask {
    Ask {
        quota: quota(request.tenant, request.key, request.policy),
        at: time(request.at),
        limit: amount(request.limit),
        want: amount(request.want),
    }
}

fn seconds(n: i64) -> Nanos {
    Nanos::from(Duration::from_secs(u64::try_from(n).unwrap_or(0)))
}

fn granted(taken: quota_usage::Taken) -> Taken {
    Taken {
        window: QuotaWindow {
            span: Window {
                start: nanos(taken.start),
                end: nanos(taken.end),
            },
            period: seconds(taken.period_seconds),
        },
        granted: u64::try_from(taken.granted).unwrap_or(0),
        used: u64::try_from(taken.used).unwrap_or(u64::MAX),
    }
}

/// Returns the window of a row. Rows from earlier versions have no end; in that case, uses the end of the calendar day
/// or month.
fn stated(row: &StatedWindow, request: &TakeRequest) -> QuotaWindow {
    let start = nanos(row.start);
    match row.end {
        Some((end, length)) => QuotaWindow {
            span: Window {
                start,
                end: nanos(end),
            },
            period: seconds(length),
        },
        None if start == request.calendar.start => QuotaWindow::whole(request.calendar),
        None => QuotaWindow::whole(Window {
            start,
            end: nanos(usual_end(row.start, request.policy)),
        }),
    }
}

/// Returns the end of a day or month that started at `start` in an unknown time zone. Ignores daylight saving time.
fn usual_end(start: DateTime<Utc>, policy: Policy) -> DateTime<Utc> {
    if policy != Policy::Monthly {
        return start + Days::new(1);
    }
    // Depending on the time zone, a month starts between 14 hours before and 12 hours after it starts in UTC.
    let first = (start + TimeDelta::hours(14))
        .date_naive()
        .with_day(1)
        .unwrap_or_else(|| start.date_naive());
    let offset = start - first.and_time(NaiveTime::MIN).and_utc();
    (first + Months::new(1)).and_time(NaiveTime::MIN).and_utc() + offset
}

fn row((row, n): &(LedgerRow, u64)) -> (Row, i64) {
    let row = Row {
        quota: quota(row.tenant, row.key, row.policy),
        window_start: time(row.window_start),
    };
    (row, amount(*n))
}

pub(super) fn time(at: UnixNanos) -> DateTime<Utc> {
    DateTime::from_timestamp_nanos(i64::try_from(at.0).unwrap_or(i64::MAX))
}

fn nanos(at: DateTime<Utc>) -> UnixNanos {
    let nanos = at.timestamp_nanos_opt().unwrap_or(i64::MAX);
    UnixNanos(u64::try_from(nanos).unwrap_or(0))
}

pub(super) fn amount(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[async_trait]
impl QuotaLedger for PostgresLedger {
    async fn take(&self, requests: &[TakeRequest]) -> Vec<Result<Taken, LedgerError>> {
        self.metrics.ledger_takes.inc_by(requests.len() as u64);
        // All transactions must lock rows in the same order, so that they do not deadlock.
        let mut order: Vec<usize> = (0..requests.len()).collect();
        order.sort_unstable_by_key(|i| {
            let request = &requests[*i];
            (request.tenant, request.key, request.policy)
        });
        let mut results: Vec<Option<Result<Taken, LedgerError>>> = vec![None; requests.len()];
        for part in order.chunks(TAKES) {
            let sorted: Vec<_> = part.iter().map(|i| requests[*i]).collect();
            for (i, taken) in part.iter().zip(self.take_sorted(&sorted).await) {
                results[*i] = Some(taken);
            }
        }
        results
            .into_iter()
            .map(|it| it.unwrap_or_else(|| Err(Arc::new(NoSuchKey))))
            .collect()
    }

    async fn give_back(&self, batch: &ReturnBatch) -> Result<(), LedgerError> {
        let rows: Vec<_> = batch.rows.iter().map(row).collect();
        let given = async {
            let mut tx = self.db.system().await?;
            quota_usage::give_back(&mut tx, batch.id, &rows).await?;
            tx.commit().await
        };
        given.await.map_err(|error| self.failed(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn month_of_an_unknown_zone_ends_where_the_next_begins() {
        for (start, end) in [
            ("2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z"),
            // Tokyo
            ("2026-10-31T15:00:00Z", "2026-11-30T15:00:00Z"),
            ("2026-02-28T15:00:00Z", "2026-03-31T15:00:00Z"),
            // Kiritimati and Pago Pago, the inhabited places farthest from UTC
            ("2026-01-31T10:00:00Z", "2026-02-28T10:00:00Z"),
            ("2026-02-01T11:00:00Z", "2026-03-01T11:00:00Z"),
        ] {
            let start: DateTime<Utc> = start.parse().unwrap();
            let end: DateTime<Utc> = end.parse().unwrap();
            assert_eq!(usual_end(start, Policy::Monthly), end);
        }
    }
}
