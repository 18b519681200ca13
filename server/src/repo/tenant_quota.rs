//! The ledger of monthly quotas that all keys of a tenant share.
//!
//! A row is for one tenant and one calendar month (UTC). Each transaction locks its rows in ascending order, in a
//! single statement.

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_types::{Array, BigInt, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use super::in_order;
use crate::db::{DbError, SystemTx};

/// A request for tokens from a tenant's quota for one month.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    pub tenant: Uuid,
    pub window_start: DateTime<Utc>,
    pub limit: i64,
    pub want: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, QueryableByName)]
pub struct Taken {
    #[diesel(sql_type = BigInt)]
    pub granted: i64,
    /// The usage in the month, including `granted`.
    #[diesel(sql_type = BigInt)]
    pub used: i64,
}

/// Unused tokens to return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unused {
    pub tenant: Uuid,
    pub window_start: DateTime<Utc>,
    pub amount: i64,
}

/// Grants each request as many tokens as it wants, up to the number left in its month. Returns `None` for a request
/// whose month has no row. Requests must be in ascending order. Each grant is atomic: `used` is read and increased
/// while the row is locked.
pub async fn take(tx: &mut SystemTx, asks: &[Ask]) -> Result<Vec<Option<Taken>>, DbError> {
    #[derive(QueryableByName)]
    struct Row {
        #[diesel(sql_type = BigInt)]
        n: i64,
        #[diesel(embed)]
        taken: Taken,
    }
    let rows = diesel::sql_query(
        "WITH asked AS MATERIALIZED ( \
             SELECT * FROM unnest($1, $2, $3, $4) WITH ORDINALITY AS a (tenant_id, window_start, quota, want, n) \
             ORDER BY n \
         ), held AS ( \
             SELECT a.n, q.tenant_id, q.window_start, greatest(0, least(a.want, a.quota - q.used)) AS granted \
             FROM asked a CROSS JOIN LATERAL ( \
                 SELECT * FROM tenant_quota_usage w \
                 WHERE w.tenant_id = a.tenant_id AND w.window_start = a.window_start FOR UPDATE \
             ) q \
         ) \
         UPDATE tenant_quota_usage q SET used = q.used + held.granted, updated_at = now() \
         FROM held WHERE q.tenant_id = held.tenant_id AND q.window_start = held.window_start \
         RETURNING held.n, held.granted, q.used",
    )
    .bind::<Array<SqlUuid>, _>(asks.iter().map(|ask| ask.tenant).collect::<Vec<_>>())
    .bind::<Array<Timestamptz>, _>(asks.iter().map(|ask| ask.window_start).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(asks.iter().map(|ask| ask.limit).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(asks.iter().map(|ask| ask.want).collect::<Vec<_>>())
    .load::<Row>(&mut **tx)
    .await?;
    let numbered = rows.into_iter().map(|row| (row.n, row.taken));
    Ok(in_order(asks.len(), numbered))
}

/// Adds missing rows. Skips tenants that do not exist.
pub async fn open(tx: &mut SystemTx, asks: &[Ask]) -> Result<(), DbError> {
    diesel::sql_query(
        "INSERT INTO tenant_quota_usage (tenant_id, window_start, used) \
         SELECT a.tenant_id, a.window_start, 0 FROM unnest($1, $2) AS a (tenant_id, window_start) \
         JOIN tenants t ON t.id = a.tenant_id ORDER BY a.tenant_id, a.window_start \
         ON CONFLICT ON CONSTRAINT tenant_quota_usage_pkey DO NOTHING",
    )
    .bind::<Array<SqlUuid>, _>(asks.iter().map(|ask| ask.tenant).collect::<Vec<_>>())
    .bind::<Array<Timestamptz>, _>(asks.iter().map(|ask| ask.window_start).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Credits unused tokens, unless the batch `id` has already been applied. `rows` must be distinct and in ascending
/// order.
pub async fn give_back(tx: &mut SystemTx, id: Uuid, rows: &[Unused]) -> Result<(), DbError> {
    diesel::sql_query(
        "WITH applied AS ( \
             INSERT INTO quota_returns (id) VALUES ($1) \
             ON CONFLICT ON CONSTRAINT quota_returns_pkey DO NOTHING RETURNING id \
         ), unused AS MATERIALIZED ( \
             SELECT * FROM unnest($2, $3, $4) WITH ORDINALITY AS a (tenant_id, window_start, amount, n) \
             WHERE EXISTS (SELECT FROM applied) ORDER BY n \
         ), held AS ( \
             SELECT q.tenant_id, q.window_start, a.amount \
             FROM unused a CROSS JOIN LATERAL ( \
                 SELECT * FROM tenant_quota_usage w \
                 WHERE w.tenant_id = a.tenant_id AND w.window_start = a.window_start FOR UPDATE \
             ) q \
         ) \
         UPDATE tenant_quota_usage q SET used = greatest(0, q.used - held.amount), updated_at = now() \
         FROM held WHERE q.tenant_id = held.tenant_id AND q.window_start = held.window_start",
    )
    .bind::<SqlUuid, _>(id)
    .bind::<Array<SqlUuid>, _>(rows.iter().map(|row| row.tenant).collect::<Vec<_>>())
    .bind::<Array<Timestamptz>, _>(rows.iter().map(|row| row.window_start).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(rows.iter().map(|row| row.amount).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}
