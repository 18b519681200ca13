//! Creates partitions of the usage tables in advance, drops them after the retention period, and deletes old rows from
//! the default partitions.
//!
//! Database functions do this, because only the tables' owner has the necessary rights. The migrations define these
//! functions. Rows for a day without a partition are in the default partition until a partition for that day is
//! created.

use std::time::Duration;

use chrono::NaiveDate;
use diesel::{
    prelude::*,
    sql_types::{BigInt, Bool, Date, Integer, Text},
};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};

use crate::db::{DbError, SystemTx};

/// A table with one partition per day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Partitioned {
    Log,
    Quarters,
    Days,
}

impl Partitioned {
    pub const ALL: [Self; 3] = [Self::Log, Self::Quarters, Self::Days];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Log => "usage_log",
            Self::Quarters => "usage_quarters",
            Self::Days => "usage_days",
        }
    }
}

/// How long creating a partition may take, including moving the day's rows from the default partition.
pub const CREATE: Duration = Duration::from_mins(5);

/// The maximum number of rows to delete per transaction.
const DELETED_ROWS: i32 = 10_000;

#[derive(QueryableByName)]
struct Flag {
    #[diesel(sql_type = Bool)]
    flag: bool,
}

#[derive(QueryableByName)]
struct Number {
    #[diesel(sql_type = Integer)]
    number: i32,
}

/// Creates a day's partition if it does not exist. Returns whether the partition was created. May take as long as
/// [`CREATE`].
pub async fn create(
    tx: &mut SystemTx,
    table: Partitioned,
    day: NaiveDate,
) -> Result<bool, DbError> {
    let limit = format!("SET LOCAL statement_timeout = {}", CREATE.as_millis());
    tx.batch_execute(&limit).await?;
    let created = diesel::sql_query("SELECT usage_create_partition($1, $2) AS flag")
        .bind::<Text, _>(table.name())
        .bind::<Date, _>(day)
        .get_result::<Flag>(&mut **tx)
        .await?;
    Ok(created.flag)
}

/// Drops the oldest partition if its day is before `before`. Returns whether a partition was dropped. If so, there may
/// be more to drop.
pub async fn drop_oldest(
    tx: &mut SystemTx,
    table: Partitioned,
    before: NaiveDate,
) -> Result<bool, DbError> {
    let dropped = diesel::sql_query("SELECT usage_drop_partitions($1, $2) AS number")
        .bind::<Text, _>(table.name())
        .bind::<Date, _>(before)
        .get_result::<Number>(&mut **tx)
        .await?;
    Ok(dropped.number > 0)
}

/// Deletes a batch of the default partition's rows for days before `before`. Returns whether there may be more such
/// rows.
pub async fn delete_unpartitioned(
    tx: &mut SystemTx,
    table: Partitioned,
    before: NaiveDate,
) -> Result<bool, DbError> {
    let deleted = diesel::sql_query("SELECT usage_delete_unpartitioned($1, $2, $3) AS number")
        .bind::<Text, _>(table.name())
        .bind::<Date, _>(before)
        .bind::<Integer, _>(DELETED_ROWS)
        .get_result::<Number>(&mut **tx)
        .await?;
    Ok(deleted.number >= DELETED_ROWS)
}

/// Deletes the cursors of segments whose records are too old to be accepted, except cursors that have moved in the last
/// two days. These segments remain rejected even if the retention period is extended later. Also deletes replicas'
/// reports about unshipped usage that are at least two days older than the retention period. `days` is the retention
/// period of the log.
pub async fn forget_segments(tx: &mut SystemTx, days: i64) -> Result<(), DbError> {
    diesel::sql_query(
        "WITH deleted AS ( \
             DELETE FROM usage_segments WHERE started_at < now() - ($1 + 2) * interval '1 day' \
             AND updated_at < now() - interval '2 days' RETURNING started_at) \
         INSERT INTO usage_forgotten_segments AS forgotten (started_at) \
             SELECT max(started_at) FROM deleted HAVING count(*) > 0 \
         ON CONFLICT (is_only_row) DO UPDATE \
             SET started_at = greatest(forgotten.started_at, excluded.started_at)",
    )
    .bind::<BigInt, _>(days)
    .execute(&mut **tx)
    .await?;
    diesel::sql_query(
        "DELETE FROM usage_shippers WHERE reported_at < now() - ($1 + 2) * interval '1 day'",
    )
    .bind::<BigInt, _>(days)
    .execute(&mut **tx)
    .await?;
    Ok(())
}
