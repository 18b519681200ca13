//! Partitions of the usage tables: created in advance, dropped after the retention period.
//!
//! Functions of the database do both, with the rights of the tables' owner; see the migration. Rows of a day that has
//! no partition are in the default partition until one is created.

use chrono::NaiveDate;
use diesel::{
    prelude::*,
    sql_types::{BigInt, Date, Integer, Text},
};
use diesel_async::RunQueryDsl;

use crate::db::{DbError, SystemTx};

/// A table with a partition for each day.
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

#[derive(QueryableByName)]
struct Number {
    #[diesel(sql_type = Integer)]
    number: i32,
}

/// Creates the missing partitions of the days from `first` to `last`. Returns the number of partitions created.
pub async fn create(
    tx: &mut SystemTx,
    first: NaiveDate,
    last: NaiveDate,
) -> Result<usize, DbError> {
    let created = diesel::sql_query("SELECT usage_create_partitions($1, $2) AS number")
        .bind::<Date, _>(first)
        .bind::<Date, _>(last)
        .get_result::<Number>(&mut **tx)
        .await?;
    Ok(usize::try_from(created.number).unwrap_or(0))
}

/// Drops the oldest partition if its day is before `before`. Returns whether there was one, in which case there may be
/// more.
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

/// Deletes cursors of segments whose records would be rejected because of their age, and reports of servers that have
/// been silent for as long. `days` is the retention of the log.
pub async fn forget_segments(tx: &mut SystemTx, days: i64) -> Result<usize, DbError> {
    let segments = diesel::sql_query(
        "DELETE FROM usage_segments WHERE started_at < now() - ($1 + 2) * interval '1 day' \
         AND updated_at < now() - interval '2 days'",
    )
    .bind::<BigInt, _>(days)
    .execute(&mut **tx)
    .await?;
    let reports = diesel::sql_query(
        "DELETE FROM usage_shippers WHERE reported_at < now() - ($1 + 2) * interval '1 day'",
    )
    .bind::<BigInt, _>(days)
    .execute(&mut **tx)
    .await?;
    Ok(segments + reports)
}
