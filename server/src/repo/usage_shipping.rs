//! The progress of shipping each usage segment, and the records that each replica has left to ship.
//!
//! A cursor moves in the transaction that inserts the shipped records, and only if it is still at the position that the
//! shipper read from. So each record is inserted exactly once, even if several processes ship the same segment or the
//! outcome of a COMMIT is unknown.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{
    OptionalExtension, QueryableByName,
    sql_types::{BigInt, Interval, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::{
    clock::UnixNanos,
    db::{DbError, SystemTx},
};

#[derive(QueryableByName)]
struct Position {
    #[diesel(sql_type = BigInt)]
    position: i64,
}

/// Returns the position of a segment's cursor, and creates the cursor at `first` if there is none. Returns `None`
/// instead of creating the cursor if the segment is older than `retention`, or not newer than a segment whose cursor
/// has been deleted. In both cases, the records of the segment may already have been shipped and deleted.
pub async fn open_cursor(
    tx: &mut SystemTx,
    segment: Uuid,
    first: i64,
    started_at: DateTime<Utc>,
    retention: Duration,
) -> Result<Option<i64>, DbError> {
    let retention = i64::try_from(retention.as_micros()).unwrap_or(i64::MAX);
    diesel::sql_query(
        "INSERT INTO usage_segments (segment_id, position, started_at) \
         SELECT $1, $2, $3 WHERE $3 > now() - $4 \
             AND NOT EXISTS (SELECT FROM usage_forgotten_segments WHERE started_at >= $3) \
         ON CONFLICT (segment_id) DO NOTHING",
    )
    .bind::<SqlUuid, _>(segment)
    .bind::<BigInt, _>(first)
    .bind::<Timestamptz, _>(started_at)
    .bind::<Interval, _>(diesel::data_types::PgInterval::from_microseconds(retention))
    .execute(&mut **tx)
    .await?;
    let found = diesel::sql_query("SELECT position FROM usage_segments WHERE segment_id = $1")
        .bind::<SqlUuid, _>(segment)
        .get_result::<Position>(&mut **tx)
        .await
        .optional()?;
    Ok(found.map(|it| it.position))
}

/// Advances a segment's cursor. Returns `false` if the cursor was not at `from`. Call this first, and then insert the
/// records in the same transaction.
pub async fn move_cursor(
    tx: &mut SystemTx,
    segment: Uuid,
    from: i64,
    to: i64,
) -> Result<bool, DbError> {
    let moved = diesel::sql_query(
        "UPDATE usage_segments SET position = $3, updated_at = now() \
         WHERE segment_id = $1 AND position = $2",
    )
    .bind::<SqlUuid, _>(segment)
    .bind::<BigInt, _>(from)
    .bind::<BigInt, _>(to)
    .execute(&mut **tx)
    .await?;
    Ok(moved == 1)
}

/// The unshipped records in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pending {
    pub records: i64,
    pub bytes: i64,
    /// All records before this time have been shipped. `None` if no records are left.
    pub oldest: Option<DateTime<Utc>>,
}

/// Stores a replica's report about the unshipped records in a directory, as of `at`.
pub async fn report(
    tx: &mut SystemTx,
    directory: Uuid,
    host: &str,
    pending: &Pending,
    at: DateTime<Utc>,
) -> Result<(), DbError> {
    diesel::sql_query(
        "INSERT INTO usage_shippers \
             (directory_id, host, reported_at, pending_records, pending_bytes, oldest_pending_at) \
         VALUES ($1, $2, least(now(), $6), $3, $4, $5) \
         ON CONFLICT (directory_id) DO UPDATE SET host = excluded.host, reported_at = excluded.reported_at, \
             pending_records = excluded.pending_records, pending_bytes = excluded.pending_bytes, \
             oldest_pending_at = excluded.oldest_pending_at",
    )
    .bind::<SqlUuid, _>(directory)
    .bind::<Text, _>(host)
    .bind::<BigInt, _>(pending.records)
    .bind::<BigInt, _>(pending.bytes)
    .bind::<Nullable<Timestamptz>, _>(pending.oldest)
    .bind::<Timestamptz, _>(at)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Deletes the report on a directory that no longer exists or has been lost.
pub async fn remove_report(tx: &mut SystemTx, directory: Uuid) -> Result<(), DbError> {
    diesel::sql_query("DELETE FROM usage_shippers WHERE directory_id = $1")
        .bind::<SqlUuid, _>(directory)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Returns the time on PostgreSQL's clock.
pub async fn now(tx: &mut SystemTx) -> Result<UnixNanos, DbError> {
    #[derive(QueryableByName)]
    struct Now {
        #[diesel(sql_type = Timestamptz)]
        now: DateTime<Utc>,
    }
    let read = diesel::sql_query("SELECT clock_timestamp() AS now")
        .get_result::<Now>(&mut **tx)
        .await?;
    let nanos = read.now.timestamp_nanos_opt();
    Ok(UnixNanos(
        nanos.and_then(|it| u64::try_from(it).ok()).unwrap_or(0),
    ))
}
