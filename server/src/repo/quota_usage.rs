//! The ledger of calendar quotas.
//!
//! A row contains one window of one key and policy. Windows with usage never overlap: before opening a window, callers
//! acquire [`lock`] and check [`used_windows`]. Windows without usage are ignored.
//!
//! **Lock order.** Locks are always acquired in this order: first [`lock`], then keys (`api_keys`, `FOR KEY SHARE`),
//! then rows. Deleting a key locks the key first and then its rows, in no particular order, so a row must never be
//! locked before its key.

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use super::in_order;
use crate::db::{DbError, SystemTx};

/// The first argument of this module's advisory locks.
const WINDOWS_LOCK: i32 = 7_226_422;

/// A quota of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyQuota {
    pub tenant: Uuid,
    pub key: Uuid,
    pub policy: &'static str,
}

/// A request for tokens from the quota of one key and policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    pub quota: KeyQuota,
    /// Selects the window that contains this time.
    pub at: DateTime<Utc>,
    /// The quota for a full day or month.
    pub limit: i64,
    pub want: i64,
}

/// A window as stored in its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatedWindow {
    pub start: DateTime<Utc>,
    /// The end of the window, and the length of the full day or month in seconds. `None` in rows from earlier versions.
    pub end: Option<(DateTime<Utc>, i64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, QueryableByName)]
pub struct Taken {
    #[diesel(sql_type = Timestamptz, column_name = "window_start")]
    pub start: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz, column_name = "window_end")]
    pub end: DateTime<Utc>,
    #[diesel(sql_type = BigInt)]
    pub period_seconds: i64,
    #[diesel(sql_type = BigInt)]
    pub granted: i64,
    /// The usage in the window, including `granted`.
    #[diesel(sql_type = BigInt)]
    pub used: i64,
}

/// The primary key of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub quota: KeyQuota,
    pub window_start: DateTime<Utc>,
}

type Columns = (Vec<Uuid>, Vec<Uuid>, Vec<&'static str>);

fn columns<T>(items: &[T], quota: impl Fn(&T) -> KeyQuota) -> Columns {
    let mut columns = Columns::default();
    for quota in items.iter().map(quota) {
        columns.0.push(quota.tenant);
        columns.1.push(quota.key);
        columns.2.push(quota.policy);
    }
    columns
}

impl Ask {
    /// Returns the second argument of the advisory lock. If the arguments of two keys are equal, the only effect is
    /// that their transactions wait for each other.
    fn lock(&self) -> i32 {
        let (high, low) = self.quota.key.as_u64_pair();
        let mixed =
            (high ^ low ^ self.quota.policy.len() as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        // The upper 31 bits always fit.
        i32::try_from(mixed >> 33).unwrap_or(0)
    }
}

/// Grants each request as many tokens as it wants, up to the number left in its window. Returns `None` for a request if
/// no window with usage contains its `at`, if its key does not exist, or if another transaction is changing or deleting
/// its key. This function does not wait for such a transaction, because that may take a long time and would delay the
/// requests for other keys. If `opened` is set, takes the tokens from the windows that start at the times in `opened`,
/// whether or not they have usage.
///
/// Requests must be in ascending order, so that all transactions lock rows in the same order. Each grant is atomic:
/// `used` is read and increased while the quota's row is locked.
pub async fn take(
    tx: &mut SystemTx,
    asks: &[Ask],
    opened: Option<&[DateTime<Utc>]>,
) -> Result<Vec<Option<Taken>>, DbError> {
    #[derive(QueryableByName)]
    struct Row {
        #[diesel(sql_type = BigInt)]
        n: i64,
        #[diesel(embed)]
        taken: Taken,
    }
    let (tenants, keys, policies) = columns(asks, |ask| ask.quota);
    let starts: Vec<_> = match opened {
        None => vec![None; asks.len()],
        Some(starts) => starts.iter().copied().map(Some).collect(),
    };
    // The quota of a window is proportional to the window's length, rounded up. PostgreSQL calculates the quotient with
    // enough digits to round it correctly.
    let rows = diesel::sql_query(
        "WITH keys AS MATERIALIZED ( \
             SELECT a.* FROM unnest($1, $2, $3, $4, $5, $6, $7) WITH ORDINALITY \
                 AS a (tenant_id, key_id, policy, at, opened, quota, want, n) \
             JOIN api_keys k ON k.tenant_id = a.tenant_id AND k.id = a.key_id \
             ORDER BY a.n FOR KEY SHARE OF k SKIP LOCKED \
         ), held AS ( \
             SELECT a.n, q.tenant_id, q.key_id, q.policy, q.window_start, greatest(0, least(a.want, ceil( \
                 a.quota * extract(epoch FROM q.window_end - q.window_start) / q.period_seconds \
             )::bigint - q.used)) AS granted \
             FROM keys a \
             CROSS JOIN LATERAL ( \
                 SELECT * FROM quota_usage w \
                 WHERE w.tenant_id = a.tenant_id AND w.key_id = a.key_id AND w.policy = a.policy \
                     AND w.window_end IS NOT NULL AND ( \
                         w.window_start = a.opened \
                         OR (a.opened IS NULL AND w.used > 0 AND w.window_start <= a.at AND a.at < w.window_end) \
                     ) \
                 ORDER BY w.window_start DESC LIMIT 1 FOR UPDATE \
             ) q \
         ) \
         UPDATE quota_usage q SET used = q.used + held.granted, updated_at = now() \
         FROM held \
         WHERE q.tenant_id = held.tenant_id AND q.key_id = held.key_id AND q.policy = held.policy \
             AND q.window_start = held.window_start \
         RETURNING held.n, q.window_start, q.window_end, q.period_seconds, held.granted, q.used",
    )
    .bind::<Array<SqlUuid>, _>(tenants)
    .bind::<Array<SqlUuid>, _>(keys)
    .bind::<Array<Text>, _>(policies)
    .bind::<Array<Timestamptz>, _>(asks.iter().map(|ask| ask.at).collect::<Vec<_>>())
    .bind::<Array<Nullable<Timestamptz>>, _>(starts)
    .bind::<Array<BigInt>, _>(asks.iter().map(|ask| ask.limit).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(asks.iter().map(|ask| ask.want).collect::<Vec<_>>())
    .load::<Row>(&mut **tx)
    .await?;
    let numbered = rows.into_iter().map(|row| (row.n, row.taken));
    Ok(in_order(asks.len(), numbered))
}

/// Waits until no other transaction is opening windows for these keys and policies, and blocks such transactions until
/// this one ends. The number of requests must not exceed the number of locks that PostgreSQL allows per transaction (64
/// by default).
pub async fn lock(tx: &mut SystemTx, asks: &[Ask]) -> Result<(), DbError> {
    let mut locks: Vec<i32> = asks.iter().map(Ask::lock).collect();
    // Locks are acquired in ascending order everywhere.
    locks.sort_unstable();
    locks.dedup();
    diesel::sql_query("SELECT count(pg_advisory_xact_lock($1, n)) FROM unnest($2) AS n")
        .bind::<Integer, _>(WINDOWS_LOCK)
        .bind::<Array<Integer>, _>(locks)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// For each request, returns the windows with usage that end after the request's time in `since`, or whose end is not
/// stored.
pub async fn used_windows(
    tx: &mut SystemTx,
    asks: &[Ask],
    since: &[DateTime<Utc>],
) -> Result<Vec<Vec<StatedWindow>>, DbError> {
    #[derive(QueryableByName)]
    struct Row {
        #[diesel(sql_type = BigInt)]
        n: i64,
        #[diesel(sql_type = Timestamptz)]
        window_start: DateTime<Utc>,
        #[diesel(sql_type = Nullable<Timestamptz>)]
        window_end: Option<DateTime<Utc>>,
        #[diesel(sql_type = Nullable<BigInt>)]
        period_seconds: Option<i64>,
    }
    let (tenants, keys, policies) = columns(asks, |ask| ask.quota);
    let rows = diesel::sql_query(
        "SELECT a.n, q.window_start, q.window_end, q.period_seconds \
         FROM unnest($1, $2, $3, $4) WITH ORDINALITY AS a (tenant_id, key_id, policy, since, n) \
         JOIN quota_usage q USING (tenant_id, key_id, policy) \
         WHERE q.used > 0 AND (q.window_end > a.since OR q.window_end IS NULL)",
    )
    .bind::<Array<SqlUuid>, _>(tenants)
    .bind::<Array<SqlUuid>, _>(keys)
    .bind::<Array<Text>, _>(policies)
    .bind::<Array<Timestamptz>, _>(since)
    .load::<Row>(&mut **tx)
    .await?;
    let mut windows = vec![Vec::new(); asks.len()];
    for row in rows {
        let index = usize::try_from(row.n - 1).unwrap_or(usize::MAX);
        if let Some(windows) = windows.get_mut(index) {
            windows.push(StatedWindow {
                start: row.window_start,
                end: row.window_end.zip(row.period_seconds),
            });
        }
    }
    Ok(windows)
}

/// Opens windows. Inserts a row for each window. If a row with the same start exists, updates its end, but only if the
/// row has no usage or no end. Skips keys that do not exist. The other keys cannot be deleted until the transaction
/// ends.
pub async fn open(
    tx: &mut SystemTx,
    asks: &[Ask],
    windows: &[(DateTime<Utc>, DateTime<Utc>, i64)],
) -> Result<(), DbError> {
    let (tenants, keys, policies) = columns(asks, |ask| ask.quota);
    diesel::sql_query(
        "WITH opened AS MATERIALIZED ( \
             SELECT a.* FROM unnest($1, $2, $3, $4, $5, $6) WITH ORDINALITY \
                 AS a (tenant_id, key_id, policy, window_start, window_end, period_seconds, n) \
             JOIN api_keys k ON k.tenant_id = a.tenant_id AND k.id = a.key_id \
             ORDER BY a.n FOR KEY SHARE OF k \
         ) \
         INSERT INTO quota_usage (tenant_id, key_id, policy, window_start, used, window_end, period_seconds) \
         SELECT tenant_id, key_id, policy, window_start, 0, window_end, period_seconds FROM opened \
         ON CONFLICT ON CONSTRAINT quota_usage_pkey DO UPDATE \
         SET window_end = excluded.window_end, period_seconds = excluded.period_seconds \
         WHERE quota_usage.used = 0 OR quota_usage.window_end IS NULL",
    )
    .bind::<Array<SqlUuid>, _>(tenants)
    .bind::<Array<SqlUuid>, _>(keys)
    .bind::<Array<Text>, _>(policies)
    .bind::<Array<Timestamptz>, _>(windows.iter().map(|it| it.0).collect::<Vec<_>>())
    .bind::<Array<Timestamptz>, _>(windows.iter().map(|it| it.1).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(windows.iter().map(|it| it.2).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Credits unused tokens, unless the batch `id` has already been applied. Returns whether this call applied the batch.
/// `rows` must be distinct and in ascending order.
pub async fn give_back(tx: &mut SystemTx, id: Uuid, rows: &[(Row, i64)]) -> Result<bool, DbError> {
    #[derive(QueryableByName)]
    struct Applied {
        #[diesel(sql_type = Bool)]
        applied: bool,
    }
    let (tenants, keys, policies) = columns(rows, |(row, _)| row.quota);
    let applied = diesel::sql_query(
        "WITH applied AS ( \
             INSERT INTO quota_returns (id) VALUES ($1) \
             ON CONFLICT ON CONSTRAINT quota_returns_pkey DO NOTHING RETURNING id \
         ), keys AS MATERIALIZED ( \
             SELECT a.* FROM unnest($2, $3, $4, $5, $6) WITH ORDINALITY \
                 AS a (tenant_id, key_id, policy, window_start, amount, n) \
             JOIN api_keys k ON k.tenant_id = a.tenant_id AND k.id = a.key_id \
             WHERE EXISTS (SELECT FROM applied) \
             ORDER BY a.n FOR KEY SHARE OF k \
         ), held AS ( \
             SELECT a.n, q.tenant_id, q.key_id, q.policy, q.window_start, a.amount \
             FROM keys a \
             CROSS JOIN LATERAL ( \
                 SELECT * FROM quota_usage w \
                 WHERE w.tenant_id = a.tenant_id AND w.key_id = a.key_id AND w.policy = a.policy \
                     AND w.window_start = a.window_start \
                 FOR UPDATE \
             ) q \
         ), returned AS ( \
             UPDATE quota_usage q SET used = greatest(0, q.used - held.amount), updated_at = now() \
             FROM held \
             WHERE q.tenant_id = held.tenant_id AND q.key_id = held.key_id AND q.policy = held.policy \
                 AND q.window_start = held.window_start \
         ) \
         SELECT EXISTS (SELECT FROM applied) AS applied",
    )
    .bind::<SqlUuid, _>(id)
    .bind::<Array<SqlUuid>, _>(tenants)
    .bind::<Array<SqlUuid>, _>(keys)
    .bind::<Array<Text>, _>(policies)
    .bind::<Array<Timestamptz>, _>(rows.iter().map(|it| it.0.window_start).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(rows.iter().map(|it| it.1).collect::<Vec<_>>())
    .get_result::<Applied>(&mut **tx)
    .await?;
    Ok(applied.applied)
}
