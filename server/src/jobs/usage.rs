//! Maintains the usage tables: creates partitions ahead of need, deletes old ones, and regularly compares everything
//! that counts the same requests.
//!
//! Without its partition, a row goes to the default partition. So a failure here is a warning and is retried.

use std::time::Duration;

use chrono::{Days, NaiveDate};
use tokio::sync::watch;

use super::{every, next};
use crate::{
    db::{self, DbError},
    repo::{
        usage_check, usage_endpoint,
        usage_partition::{self, Partitioned},
        usage_shipper,
    },
    state::AppState,
};

const EVERY: Duration = Duration::from_mins(10);
const COMPARE_EVERY: Duration = Duration::from_hours(6);
/// The number of days for which partitions are created ahead.
const AHEAD: u64 = 7;
/// The maximum number of endpoints to remove per transaction.
const ENDPOINTS: i64 = 1000;
/// The wait before a retry. Often, a table was just busy.
const RETRY: Duration = Duration::from_secs(2);
const TRIES: u32 = 5;

fn days(retention: Duration) -> u64 {
    retention.as_secs() / (24 * 60 * 60)
}

fn before(today: NaiveDate, retention: Duration) -> NaiveDate {
    let days = Days::new(days(retention));
    today.checked_sub_days(days).unwrap_or(NaiveDate::MIN)
}

pub(super) async fn maintain(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut ticks = every(EVERY);
    while next(&mut ticks, &mut stopping).await {
        for attempt in 1..=TRIES {
            match maintain_once(&state, &stopping).await {
                Ok(()) => break,
                Err(error) => {
                    state.metrics.usage_partition_errors.inc();
                    if attempt == TRIES {
                        tracing::warn!(
                            error = %db::chain(&error),
                            "usage partitions could not be created or dropped; retrying later"
                        );
                        break;
                    }
                    tokio::time::sleep(RETRY).await;
                }
            }
            if *stopping.borrow() {
                return;
            }
        }
    }
}

async fn maintain_once(state: &AppState, stopping: &watch::Receiver<bool>) -> Result<(), DbError> {
    let today = state.db.within_limit(create(state)).await?;
    let log_before = before(today, state.config.usage_retention);
    let rollups_before = before(today, state.config.usage_rollup_retention);
    for table in Partitioned::ALL {
        let before = match table {
            Partitioned::Log => log_before,
            Partitioned::Quarters | Partitioned::Days => rollups_before,
        };
        while state
            .db
            .within_limit(drop_oldest(state, table, before))
            .await?
        {
            if *stopping.borrow() {
                return Ok(());
            }
        }
    }
    state.db.within_limit(forget_segments(state)).await?;
    while state.db.within_limit(forget_endpoints(state)).await? {
        if *stopping.borrow() {
            return Ok(());
        }
    }
    Ok(())
}

/// Creates partitions, starting with yesterday's since records may be late. Returns the day, by PostgreSQL's clock.
async fn create(state: &AppState) -> Result<NaiveDate, DbError> {
    let mut tx = state.db.system().await?;
    let today = usage_shipper::times(&mut tx).await?.now.date_naive();
    let first = today.pred_opt().unwrap_or(today);
    let last = today.checked_add_days(Days::new(AHEAD)).unwrap_or(today);
    let created = usage_partition::create(&mut tx, first, last).await?;
    tx.commit().await?;
    if created > 0 {
        tracing::info!(created, until = %last, "created usage partitions");
    }
    Ok(today)
}

async fn drop_oldest(
    state: &AppState,
    table: Partitioned,
    before: NaiveDate,
) -> Result<bool, DbError> {
    let mut tx = state.db.system().await?;
    let dropped = usage_partition::drop_oldest(&mut tx, table, before).await?;
    tx.commit().await?;
    if dropped {
        tracing::info!(table = table.name(), %before, "dropped a usage partition");
    }
    Ok(dropped)
}

async fn forget_segments(state: &AppState) -> Result<(), DbError> {
    let days = i64::try_from(days(state.config.usage_retention)).unwrap_or(i64::MAX);
    let mut tx = state.db.system().await?;
    usage_partition::forget_segments(&mut tx, days).await?;
    tx.commit().await
}

/// Returns whether there may be more.
async fn forget_endpoints(state: &AppState) -> Result<bool, DbError> {
    let days = i64::try_from(days(state.config.usage_rollup_retention)).unwrap_or(i64::MAX);
    let mut tx = state.db.system().await?;
    let forgotten = usage_endpoint::forget(&mut tx, days, ENDPOINTS).await?;
    tx.commit().await?;
    Ok(i64::try_from(forgotten).is_ok_and(|it| it == ENDPOINTS))
}

pub(super) async fn compare(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut ticks = every(COMPARE_EVERY);
    while next(&mut ticks, &mut stopping).await {
        let stopped = async {
            let _ = stopping.clone().wait_for(|stop| *stop).await;
        };
        let compared = tokio::select! {
            biased;
            () = stopped => return,
            compared = compare_once(&state) => compared,
        };
        if let Err(error) = compared {
            tracing::warn!(error = %db::chain(&error), "cannot compare log, rollups and quota ledger");
        }
    }
}

async fn compare_once(state: &AppState) -> Result<(), DbError> {
    let mut tx = state.db.system().await?;
    let now = usage_shipper::times(&mut tx).await?.now;
    let today = now.date_naive();
    let yesterday = today.pred_opt().unwrap_or(today);
    let found = usage_check::differences(&mut tx, yesterday).await?;
    tx.commit().await?;
    let Some(found) = found else { return Ok(()) };
    let metrics = &state.metrics;
    metrics
        .usage_log_rollup_difference
        .set(found.log_and_rollups);
    metrics.usage_ledger_excess.set(found.ledger_excess);
    metrics.usage_rollup_excess.set(found.rollup_excess);
    metrics.usage_reconciled_at.set(now.timestamp());
    if found.log_and_rollups != 0 || found.rollup_excess != 0 {
        tracing::error!(
            day = %yesterday,
            log_and_rollups = found.log_and_rollups,
            rollup_excess = found.rollup_excess,
            "log, rollups and quota ledger disagree"
        );
    }
    Ok(())
}
