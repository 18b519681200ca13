//! Replicas' reports about usage that they have not shipped.
//!
//! A replica reports on each of its usage directories about once per second. If a report is much older, the replica is
//! slow, has lost its connection to PostgreSQL, or has stopped without shipping all records.

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_types::{BigInt, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::db::{DbError, SystemTx};

/// The report on one usage directory.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct ShipperReport {
    #[diesel(sql_type = SqlUuid)]
    pub directory_id: Uuid,
    #[diesel(sql_type = Text)]
    pub host: String,
    /// The age of the report according to PostgreSQL's clock.
    #[diesel(sql_type = BigInt)]
    pub seconds_since_report: i64,
    #[diesel(sql_type = BigInt)]
    pub pending_records: i64,
    #[diesel(sql_type = BigInt)]
    pub pending_bytes: i64,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub oldest_pending_at: Option<DateTime<Utc>>,
}

/// Returns all reports, oldest first.
pub async fn reports(tx: &mut SystemTx) -> Result<Vec<ShipperReport>, DbError> {
    Ok(diesel::sql_query(
        "SELECT directory_id, host, extract(epoch FROM now() - reported_at)::bigint AS seconds_since_report, \
         pending_records, pending_bytes, oldest_pending_at \
         FROM usage_shippers ORDER BY reported_at",
    )
    .load(&mut **tx)
    .await?)
}

/// Returns the report on a directory, and locks the report until the transaction ends.
pub async fn report_of(
    tx: &mut SystemTx,
    directory: Uuid,
) -> Result<Option<ShipperReport>, DbError> {
    Ok(diesel::sql_query(
        "SELECT directory_id, host, extract(epoch FROM now() - reported_at)::bigint AS seconds_since_report, \
         pending_records, pending_bytes, oldest_pending_at \
         FROM usage_shippers WHERE directory_id = $1 FOR UPDATE",
    )
    .bind::<SqlUuid, _>(directory)
    .get_result(&mut **tx)
    .await
    .optional()?)
}

/// Times on PostgreSQL's clock. The times of usage records are based on the same clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, QueryableByName)]
pub struct Times {
    #[diesel(sql_type = Timestamptz)]
    pub now: DateTime<Utc>,
    /// All requests before this time are counted. No replica still has an older record to ship.
    #[diesel(sql_type = Timestamptz)]
    pub complete_until: DateTime<Utc>,
}

pub async fn times(tx: &mut SystemTx) -> Result<Times, DbError> {
    Ok(diesel::sql_query(
        "SELECT now() AS now, least(now(), coalesce(min(coalesce(oldest_pending_at, reported_at)), now())) \
             AS complete_until \
         FROM usage_shippers",
    )
    .get_result(&mut **tx)
    .await?)
}
