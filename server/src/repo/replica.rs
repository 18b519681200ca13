//! Running replicas, and whether shared counters have ever been used.

use std::{num::NonZeroU64, time::Duration};

use diesel::{prelude::*, sql_query, sql_types};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::{
    db::{DbError, SystemTx},
    schema::{replicas, shared_counters},
};

#[derive(QueryableByName)]
struct Place {
    #[diesel(sql_type = sql_types::BigInt)]
    rank: i64,
    #[diesel(sql_type = sql_types::BigInt)]
    count: i64,
    #[diesel(sql_type = sql_types::Nullable<sql_types::Double>)]
    oldest_other: Option<f64>,
}

/// Replicas with recent heartbeats.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// This replica's rank among these replicas, starting at 0. Replicas are ranked by ID, and therefore by start time.
    pub rank: u64,
    pub count: NonZeroU64,
    /// The time since the first heartbeat of the oldest other replica. Replicas that stopped recently also count.
    pub oldest_other: Option<Duration>,
}

/// Updates this replica's heartbeat. Counts the replicas whose last heartbeat is at most `forgotten` ago.
/// For `oldest_other`, replicas whose last heartbeat is at most `remembered` ago also count.
pub async fn seen(
    tx: &mut SystemTx,
    id: Uuid,
    forgotten: Duration,
    remembered: Duration,
) -> Result<Seen, DbError> {
    diesel::insert_into(replicas::table)
        .values(replicas::id.eq(id))
        .on_conflict(replicas::id)
        .do_update()
        .set(replicas::seen_at.eq(diesel::dsl::now))
        .execute(&mut **tx)
        .await?;
    let place: Place = sql_query(
        "SELECT count(*) FILTER (WHERE id < $1 AND is_counted) AS rank, count(*) FILTER (WHERE is_counted) AS count, \
         (extract(epoch FROM now() - min(joined_at) FILTER (WHERE id <> $1)))::float8 AS oldest_other \
         FROM (SELECT id, joined_at, id = $1 OR seen_at > now() - make_interval(secs => $2) AS is_counted \
             FROM replicas WHERE id = $1 OR seen_at > now() - make_interval(secs => $3)) r",
    )
    .bind::<sql_types::Uuid, _>(id)
    .bind::<sql_types::Double, _>(forgotten.as_secs_f64())
    .bind::<sql_types::Double, _>(remembered.max(forgotten).as_secs_f64())
    .get_result(&mut **tx)
    .await?;
    Ok(Seen {
        rank: place.rank.unsigned_abs(),
        count: NonZeroU64::new(place.count.unsigned_abs()).unwrap_or(NonZeroU64::MIN),
        oldest_other: place
            .oldest_other
            .map(|age| Duration::try_from_secs_f64(age.max(0.0)).unwrap_or(Duration::MAX)),
    })
}

/// Removes a replica that is shutting down.
pub async fn leave(tx: &mut SystemTx, id: Uuid) -> Result<(), DbError> {
    diesel::delete(replicas::table.find(id))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

pub async fn counters_have_begun(tx: &mut SystemTx) -> Result<bool, DbError> {
    let begun = diesel::select(diesel::dsl::exists(
        shared_counters::table.select(shared_counters::single),
    ))
    .get_result(&mut **tx)
    .await?;
    Ok(begun)
}

/// Records that shared counters are or will be in use. Returns `true` only the first time.
pub async fn begin_counters(tx: &mut SystemTx) -> Result<bool, DbError> {
    let inserted = diesel::insert_into(shared_counters::table)
        .values(shared_counters::single.eq(true))
        .on_conflict_do_nothing()
        .execute(&mut **tx)
        .await?;
    Ok(inserted == 1)
}
