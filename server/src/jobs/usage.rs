//! Maintains the usage tables: creates partitions in advance, drops old partitions, and regularly compares all tables
//! that count the same requests.
//!
//! A row whose partition is missing is stored in the default partition. So if creating a partition fails, the only
//! consequences are a warning and a retry.

use std::time::Duration;

use chrono::{Days, NaiveDate};
use tokio::{sync::watch, time::timeout};

use super::{every, next, stopped};
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
/// How many days ahead partitions are created.
const AHEAD: u64 = 7;
/// The maximum number of endpoints removed per transaction.
const ENDPOINTS: i64 = 1000;
/// The pause before a retry. In most cases, the cause of the failure is a table that is locked for a moment.
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
        tokio::select! {
            biased;
            () = stopped(&mut stopping) => return,
            () = maintain_with_retries(&state) => {}
        }
    }
}

async fn maintain_with_retries(state: &AppState) {
    for attempt in 1..=TRIES {
        let Err(error) = maintain_once(state).await else {
            return;
        };
        state.metrics.usage_partition_errors.inc();
        if attempt == TRIES {
            tracing::warn!(
                error = %db::chain(&error),
                "cannot create or drop usage partitions, retrying later"
            );
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Creates and drops partitions, and removes outdated rows. Continues after errors, and returns the first error.
async fn maintain_once(state: &AppState) -> Result<(), DbError> {
    let today = state.db.within_limit(today(state)).await?;
    let created = create_all(state, today).await;
    let log_before = before(today, state.config.usage_retention);
    let rollups_before = before(today, state.config.usage_rollup_retention);
    let mut failed = created.err();
    for table in Partitioned::ALL {
        let before = match table {
            Partitioned::Log => log_before,
            Partitioned::Quarters | Partitioned::Days => rollups_before,
        };
        if let Err(error) = drop_all(state, table, before).await {
            failed.get_or_insert(error);
        }
    }
    let forgotten = forget(state).await;
    failed.or(forgotten.err()).map_or(Ok(()), Err)
}

/// Returns the current day on PostgreSQL's clock.
async fn today(state: &AppState) -> Result<NaiveDate, DbError> {
    let mut tx = state.db.system().await?;
    let now = usage_shipper::times(&mut tx).await?.now;
    tx.commit().await?;
    Ok(now.date_naive())
}

/// Creates partitions for the coming days first, because this does not require moving rows out of the default
/// partition. Then creates those for today and yesterday, since records may arrive after their day has ended. If a
/// table's partition cannot be created, the other tables still get theirs.
async fn create_all(state: &AppState, today: NaiveDate) -> Result<(), DbError> {
    let coming = (1..=AHEAD).filter_map(|days| today.checked_add_days(Days::new(days)));
    let days = coming.chain([today]).chain(today.pred_opt());
    let days = days.collect::<Vec<_>>();
    let (mut created, mut failed) = (0_u32, None);
    for table in Partitioned::ALL {
        for day in &days {
            let done = timeout(usage_partition::CREATE, create(state, table, *day))
                .await
                .unwrap_or_else(|_| {
                    Err(DbError::Unavailable(
                        "creating a partition took too long".into(),
                    ))
                });
            match done {
                Ok(is_new) => created += u32::from(is_new),
                Err(error) => {
                    failed.get_or_insert(error);
                    break;
                }
            }
        }
    }
    if created > 0 {
        tracing::info!(created, "created usage partitions");
    }
    failed.map_or(Ok(()), Err)
}

async fn create(state: &AppState, table: Partitioned, day: NaiveDate) -> Result<bool, DbError> {
    let mut tx = state.db.system().await?;
    let is_new = usage_partition::create(&mut tx, table, day).await?;
    tx.commit().await?;
    Ok(is_new)
}

async fn drop_all(state: &AppState, table: Partitioned, before: NaiveDate) -> Result<(), DbError> {
    let dropping = || state.db.within_limit(drop_oldest(state, table, before));
    while dropping().await? {}
    let deleting = || {
        state
            .db
            .within_limit(delete_unpartitioned(state, table, before))
    };
    while deleting().await? {}
    Ok(())
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

async fn delete_unpartitioned(
    state: &AppState,
    table: Partitioned,
    before: NaiveDate,
) -> Result<bool, DbError> {
    let mut tx = state.db.system().await?;
    let has_more = usage_partition::delete_unpartitioned(&mut tx, table, before).await?;
    tx.commit().await?;
    Ok(has_more)
}

async fn forget(state: &AppState) -> Result<(), DbError> {
    state.db.within_limit(forget_segments(state)).await?;
    while state.db.within_limit(forget_endpoints(state)).await? {}
    Ok(())
}

async fn forget_segments(state: &AppState) -> Result<(), DbError> {
    let days = i64::try_from(days(state.config.usage_retention)).unwrap_or(i64::MAX);
    let mut tx = state.db.system().await?;
    usage_partition::forget_segments(&mut tx, days).await?;
    tx.commit().await
}

/// Removes endpoints without recent requests. Returns whether there may be more such endpoints.
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
        let compared = tokio::select! {
            biased;
            () = stopped(&mut stopping) => return,
            compared = compare_once(&state) => compared,
        };
        if let Err(error) = compared {
            tracing::warn!(error = %db::chain(&error), "cannot compare the usage log, the rollups and the quota ledger");
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
            "the usage log, the rollups and the quota ledger disagree"
        );
    }
    Ok(())
}
