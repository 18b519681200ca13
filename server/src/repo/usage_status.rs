//! The state of a tenant's keys: how many there are, how much of their quotas is used, and which of them need
//! attention.

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_types::{BigInt, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::db::{DbError, TenantTx};

/// The maximum number of rows for each reason why a key needs attention (`AttentionKind`).
const ATTENTION: i64 = 20;
/// The maximum number of quotas whose usage is read to find those closest to their limit. Larger than [`ATTENTION`],
/// because these quotas are chosen by the tokens that replicas have taken. Replicas may hold a large unused part of a
/// small quota.
const CANDIDATES: i64 = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq, QueryableByName)]
pub struct Numbers {
    #[diesel(sql_type = BigInt)]
    total_keys: i64,
    #[diesel(sql_type = BigInt)]
    active_keys: i64,
    #[diesel(sql_type = BigInt)]
    unused_keys: i64,
    #[diesel(sql_type = BigInt)]
    total_plans: i64,
}

fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

impl Numbers {
    pub fn total_keys(&self) -> u64 {
        count(self.total_keys)
    }

    pub fn active_keys(&self) -> u64 {
        count(self.active_keys)
    }

    pub fn unused_keys(&self) -> u64 {
        count(self.unused_keys)
    }

    pub fn total_plans(&self) -> u64 {
        count(self.total_plans)
    }
}

pub async fn numbers(tx: &mut TenantTx) -> Result<Numbers, DbError> {
    let tenant = tx.tenant().0;
    Ok(diesel::sql_query(
        "SELECT count(*) AS total_keys, \
             count(*) FILTER (WHERE is_active AND (expires_at IS NULL OR expires_at > now())) AS active_keys, \
             count(*) FILTER (WHERE last_used_at IS NULL) AS unused_keys, \
             (SELECT count(*) FROM plans WHERE tenant_id = $1) AS total_plans \
         FROM api_keys WHERE tenant_id = $1",
    )
    .bind::<SqlUuid, _>(tenant)
    .get_result(&mut **tx)
    .await?)
}

/// The usage of a quota in its current window.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct QuotaRow {
    #[diesel(sql_type = SqlUuid)]
    pub key_id: Uuid,
    #[diesel(sql_type = Text)]
    pub key_name: String,
    /// `daily` or `monthly`.
    #[diesel(sql_type = Text)]
    pub policy: String,
    #[diesel(sql_type = BigInt)]
    pub used: i64,
    /// The quota of the window.
    #[diesel(sql_type = BigInt)]
    pub quota: i64,
    #[diesel(sql_type = Timestamptz)]
    pub window_start: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    pub window_end: DateTime<Utc>,
}

/// Selects the current windows of keys' quotas. Omits windows without usage. A shortened window has the same
/// proportional quota as in [`quota_usage::take`](super::quota_usage::take).
const QUOTAS: &str = "\
    SELECT k.id AS key_id, k.name AS key_name, v.policy, least(w.used, w.quota) AS used, w.quota, w.window_start, \
        w.window_end \
    FROM api_keys k \
    JOIN plans p ON p.tenant_id = k.tenant_id AND p.id = k.plan_id \
    CROSS JOIN LATERAL (VALUES ('daily', p.daily_quota), ('monthly', p.monthly_quota)) v (policy, quota) \
    CROSS JOIN LATERAL ( \
        SELECT q.used, q.window_start, q.window_end, greatest(1, ceil(v.quota \
            * extract(epoch FROM q.window_end - q.window_start) / q.period_seconds)::bigint) AS quota \
        FROM quota_usage q \
        WHERE q.tenant_id = k.tenant_id AND q.key_id = k.id AND q.policy = v.policy AND q.used > 0 \
            AND q.window_start <= now() AND q.window_end > now() \
        ORDER BY q.window_start DESC LIMIT 1 \
    ) w \
    WHERE k.tenant_id = $1 AND v.quota IS NOT NULL";

/// Returns the quotas of active keys that are closest to their limit, closest first. Without metering, `used` includes
/// tokens that replicas hold.
///
/// With metering, the quotas are chosen by the ledger, because a month's rollups have many rows. Then `used` is read
/// from the rollups of these quotas. Rollups may include requests from before the quota was set, so `used` is capped at
/// the number in the ledger.
pub async fn quotas(tx: &mut TenantTx, is_metered: bool) -> Result<Vec<QuotaRow>, DbError> {
    const CAN_BE_USED: &str = "k.is_active AND (k.expires_at IS NULL OR k.expires_at > now())";
    const CLOSEST: &str = "used::double precision / quota DESC, window_end DESC, key_id";
    let tenant = tx.tenant().0;
    let taken =
        format!("SELECT * FROM ({QUOTAS} AND {CAN_BE_USED}) taken ORDER BY {CLOSEST} LIMIT $2");
    let query = if is_metered {
        format!(
            "WITH taken AS MATERIALIZED ({taken}), \
             used AS ( \
                 SELECT t.key_id, t.key_name, t.policy, least(t.used, u.spent) AS used, t.quota, t.window_start, \
                     t.window_end \
                 FROM taken t \
                 CROSS JOIN LATERAL ( \
                     SELECT coalesce(sum(u.cost), 0)::bigint AS spent FROM usage_quarters u \
                     WHERE u.tenant_id = $1 AND u.endpoint = E'\\x01' AND u.key_id = t.key_id AND u.policy = '' \
                         AND u.start >= t.window_start AND u.start < t.window_end \
                 ) u \
             ) \
             SELECT * FROM used WHERE used > 0 ORDER BY {CLOSEST} LIMIT $3"
        )
    } else {
        format!("SELECT * FROM ({taken}) taken LIMIT $3")
    };
    Ok(diesel::sql_query(query)
        .bind::<SqlUuid, _>(tenant)
        .bind::<BigInt, _>(CANDIDATES)
        .bind::<BigInt, _>(ATTENTION)
        .load(&mut **tx)
        .await?)
}

/// Returns the current windows of a key's quotas. Omits windows without usage.
pub async fn quotas_of(tx: &mut TenantTx, key: Uuid) -> Result<Vec<QuotaRow>, DbError> {
    let tenant = tx.tenant().0;
    Ok(diesel::sql_query(format!("{QUOTAS} AND k.id = $2"))
        .bind::<SqlUuid, _>(tenant)
        .bind::<SqlUuid, _>(key)
        .load(&mut **tx)
        .await?)
}

/// A key that needs attention for a reason other than a quota.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct Standing {
    /// `expiring`, `grace_ending`, or `idle`.
    #[diesel(sql_type = Text)]
    pub kind: String,
    #[diesel(sql_type = SqlUuid)]
    pub key_id: Uuid,
    #[diesel(sql_type = Text)]
    pub key_name: String,
    #[diesel(sql_type = Timestamptz)]
    pub at: DateTime<Utc>,
}

/// Returns active keys that need attention: keys that expire within 7 days, keys whose previous secret stops working
/// within a day, and keys that have not been used for 30 days. Returns at most [`ATTENTION`] keys of each kind.
pub async fn standings(tx: &mut TenantTx) -> Result<Vec<Standing>, DbError> {
    let tenant = tx.tenant().0;
    Ok(diesel::sql_query(
        "(SELECT 'expiring' AS kind, id AS key_id, name AS key_name, expires_at AS at FROM api_keys \
             WHERE tenant_id = $1 AND is_active AND expires_at > now() AND expires_at < now() + interval '7 days' \
             ORDER BY expires_at LIMIT $2) \
         UNION ALL \
         (SELECT 'grace_ending', id, name, previous_expires_at FROM api_keys \
             WHERE tenant_id = $1 AND is_active AND (expires_at IS NULL OR expires_at > now()) \
                 AND previous_expires_at > now() AND previous_expires_at < now() + interval '1 day' \
             ORDER BY previous_expires_at LIMIT $2) \
         UNION ALL \
         (SELECT 'idle', id, name, coalesce(last_used_at, created_at) FROM api_keys \
             WHERE tenant_id = $1 AND is_active AND (expires_at IS NULL OR expires_at > now()) \
                 AND coalesce(last_used_at, created_at) < now() - interval '30 days' \
             ORDER BY coalesce(last_used_at, created_at) LIMIT $2)",
    )
    .bind::<SqlUuid, _>(tenant)
    .bind::<BigInt, _>(ATTENTION)
    .load(&mut **tx)
    .await?)
}
