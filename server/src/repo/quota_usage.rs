//! The durable count of calendar quotas.

use chrono::{DateTime, Utc};
use diesel::{
    dsl::now,
    prelude::*,
    sql_types::{BigInt, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::{
    db::{DbError, SystemTx},
    schema::quota_usage,
};

/// One row of the count.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    pub tenant: Uuid,
    pub key: Uuid,
    pub policy: &'a str,
    pub window_start: DateTime<Utc>,
}

/// Hands out as much of `want` as is left below `limit`, in one statement; answers `(granted, used)`.
///
/// The row's lock makes it atomic: `used` is read and raised under it. A key that was deleted meanwhile fails
/// with `quota_usage_key_fkey`.
pub async fn take(
    tx: &mut SystemTx,
    row: Row<'_>,
    limit: i64,
    want: i64,
) -> Result<(i64, i64), DbError> {
    #[derive(QueryableByName)]
    struct Taken {
        #[diesel(sql_type = BigInt)]
        granted: i64,
        #[diesel(sql_type = BigInt)]
        used: i64,
    }
    // Made first, so that there always is a row to lock; then locked, read and raised.
    diesel::sql_query(
        "INSERT INTO quota_usage (tenant_id, key_id, policy, window_start, used) VALUES ($1, $2, $3, $4, 0) \
         ON CONFLICT ON CONSTRAINT quota_usage_pkey DO NOTHING",
    )
    .bind::<SqlUuid, _>(row.tenant)
    .bind::<SqlUuid, _>(row.key)
    .bind::<Text, _>(row.policy)
    .bind::<Timestamptz, _>(row.window_start)
    .execute(&mut **tx)
    .await?;
    let taken = diesel::sql_query(
        "WITH held AS ( \
             SELECT used FROM quota_usage \
             WHERE tenant_id = $1 AND key_id = $2 AND policy = $3 AND window_start = $4 FOR UPDATE \
         ) \
         UPDATE quota_usage q \
         SET used = q.used + greatest(0, least($6, $5 - held.used)), updated_at = now() \
         FROM held \
         WHERE q.tenant_id = $1 AND q.key_id = $2 AND q.policy = $3 AND q.window_start = $4 \
         RETURNING greatest(0, least($6, $5 - held.used)) AS granted, q.used AS used",
    )
    .bind::<SqlUuid, _>(row.tenant)
    .bind::<SqlUuid, _>(row.key)
    .bind::<Text, _>(row.policy)
    .bind::<Timestamptz, _>(row.window_start)
    .bind::<BigInt, _>(limit)
    .bind::<BigInt, _>(want)
    .get_result::<Taken>(&mut **tx)
    .await?;
    Ok((taken.granted, taken.used))
}

/// Takes back what was handed out and not spent.
pub async fn give_back(tx: &mut SystemTx, row: Row<'_>, amount: i64) -> Result<(), DbError> {
    diesel::update(quota_usage::table.find((row.tenant, row.key, row.policy, row.window_start)))
        .set((
            quota_usage::used.eq(quota_usage::used - amount),
            quota_usage::updated_at.eq(now),
        ))
        .execute(&mut **tx)
        .await?;
    Ok(())
}
