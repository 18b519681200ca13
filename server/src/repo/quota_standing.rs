//! How much of each quota is used, according to the ledger and the rollups.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, Utc};
use diesel::{
    QueryableByName, sql_query,
    sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use quota_common::TenantId;
use uuid::Uuid;

use super::paid_access::IS_CURRENT;
use crate::db::{DbError, SystemTx};

/// The time limit for reading the usage in windows.
pub const USAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The usage of a quota in one window.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct QuotaStanding {
    /// The nil UUID if the quota applies to the whole tenant.
    #[diesel(sql_type = SqlUuid)]
    pub key_id: Uuid,
    #[diesel(sql_type = Nullable<Text>)]
    pub key_name: Option<String>,
    #[diesel(sql_type = Text)]
    pub policy: String,
    /// The quota of the window.
    #[diesel(sql_type = BigInt)]
    pub quota: i64,
    /// The number of tokens that replicas have taken, which is at least the number of spent tokens.
    #[diesel(sql_type = BigInt)]
    pub taken: i64,
    /// The cost of allowed requests.
    #[diesel(sql_type = BigInt)]
    pub spent: i64,
    /// Whether this quota denied a request.
    #[diesel(sql_type = Bool)]
    pub has_denials: bool,
    #[diesel(sql_type = Timestamptz)]
    pub window_start: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    pub window_end: DateTime<Utc>,
}

/// How old the checked usage is. Usage is recorded late if a replica cannot reach PostgreSQL.
#[derive(Debug, Clone, Default)]
pub struct Lateness {
    /// The time of each key's oldest usage.
    oldest: HashMap<Uuid, DateTime<Utc>>,
    /// Whether the age of the usage is unknown, because reading the time of every record would take too long. If so,
    /// the usage may be up to a day old.
    is_unknown: bool,
}

impl Lateness {
    pub fn unknown() -> Self {
        Self {
            is_unknown: true,
            ..Self::default()
        }
    }

    /// Returns the time of each key's oldest usage in this part of the log.
    pub async fn of_records(
        tx: &mut SystemTx,
        tenant: TenantId,
        (after, until): (i64, i64),
    ) -> Result<Self, DbError> {
        #[derive(QueryableByName)]
        struct Oldest {
            #[diesel(sql_type = SqlUuid)]
            key_id: Uuid,
            #[diesel(sql_type = Timestamptz)]
            at: DateTime<Utc>,
        }
        let oldest = sql_query(
            "SELECT key_id, min(\"timestamp\") AS at FROM usage_log \
             WHERE tenant_id = $1 AND seq > $2 AND seq <= $3 GROUP BY key_id",
        )
        .bind::<SqlUuid, _>(tenant.0)
        .bind::<BigInt, _>(after)
        .bind::<BigInt, _>(until);
        let oldest: Vec<Oldest> = oldest.get_results(&mut **tx).await?;
        Ok(Self {
            oldest: oldest.into_iter().map(|it| (it.key_id, it.at)).collect(),
            is_unknown: false,
        })
    }
}

/// Returns these keys' quota windows with at least `percent` percent of the quota taken, unless an alert already says
/// that the quota is used up. Considers current windows, windows that ended in the last 15 minutes, and windows in
/// which the usage being checked occurred. Omits windows of the last kind if the key or its plan has been edited since
/// they ended, because their quota is unknown. Calculates the quota of a shortened window in the same way as
/// [`quota_usage::take`](super::quota_usage::take).
pub async fn of_keys(
    tx: &mut SystemTx,
    tenant: TenantId,
    keys: &[Uuid],
    percent: i32,
    lateness: &Lateness,
) -> Result<Vec<QuotaStanding>, DbError> {
    let limit = format!(
        "SET LOCAL statement_timeout = {}",
        USAGE_TIMEOUT.as_millis()
    );
    tx.batch_execute(&limit).await?;
    let since: Vec<_> = keys.iter().map(|key| lateness.oldest.get(key)).collect();
    // The rollups are read only for the windows that are returned, because a month's rollups have many rows.
    let standings = sql_query(
        r"WITH windows AS MATERIALIZED (
              SELECT k.id AS key_id, k.name AS key_name, v.policy, w.quota, w.used AS taken, w.window_start, w.window_end
              FROM unnest($2, $4) AS checked (key_id, since)
              JOIN api_keys k ON k.tenant_id = $1 AND k.id = checked.key_id
              JOIN plans p ON p.tenant_id = k.tenant_id AND p.id = k.plan_id
              CROSS JOIN LATERAL (VALUES ('daily', p.daily_quota), ('monthly', p.monthly_quota)) v (policy, quota)
              CROSS JOIN LATERAL (
                  SELECT q.used, q.window_start, q.window_end, greatest(1, ceil(v.quota
                      * extract(epoch FROM q.window_end - q.window_start) / q.period_seconds)::bigint) AS quota
                  FROM quota_usage q
                  WHERE q.tenant_id = k.tenant_id AND q.key_id = k.id AND q.policy = v.policy AND q.used > 0
                      AND q.window_start <= now() AND q.window_end > least(now() - interval '15 minutes', checked.since,
                          CASE WHEN $5 THEN now() - interval '1 day' END)
              ) w
              WHERE v.quota IS NOT NULL
                  AND w.used::numeric * 100 >= w.quota::numeric * $3
                  AND (w.window_end > now() - interval '15 minutes'
                      OR (k.updated_at = k.created_at OR k.updated_at < w.window_end)
                      AND (p.updated_at = p.created_at OR p.updated_at < w.window_end))
                  AND NOT EXISTS (
                      SELECT FROM quota_alerts a
                      WHERE a.tenant_id = $1 AND a.key_id = k.id AND a.policy = v.policy AND a.threshold = 100
                          AND a.window_end > w.window_start AND a.window_start < w.window_end)
          )
          SELECT w.*, u.spent, u.has_denials
          FROM windows w
          CROSS JOIN LATERAL (
              SELECT coalesce(sum(u.cost) FILTER (WHERE u.policy = ''), 0)::bigint AS spent,
                  coalesce(bool_or(u.policy = w.policy), false) AS has_denials
              FROM usage_quarters u
              WHERE u.tenant_id = $1 AND u.endpoint = E'\x01' AND u.key_id = w.key_id
                  AND u.start >= w.window_start AND u.start < w.window_end
                  AND u.policy IN ('', w.policy)
          ) u",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Array<SqlUuid>, _>(keys)
    .bind::<Integer, _>(percent)
    .bind::<Array<Nullable<Timestamptz>>, _>(since)
    .bind::<Bool, _>(lateness.is_unknown);
    Ok(standings.get_results(&mut **tx).await?)
}

/// A quota for a calendar month (UTC) that all keys of a tenant share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TenantQuota {
    pub quota: i64,
    /// Whether tenants with access to paid plans are exempt.
    pub is_lifted_by_access: bool,
}

/// Returns the windows of the tenant's quota with at least `percent` percent taken, unless the tenant is exempt. Unlike
/// the quota's ledger, the rollups also contain requests from times when the quota did not apply, so `spent` is capped
/// at `taken`.
pub async fn of_tenant(
    tx: &mut SystemTx,
    tenant: TenantId,
    of: TenantQuota,
    percent: i32,
    lateness: &Lateness,
) -> Result<Vec<QuotaStanding>, DbError> {
    let standing = sql_query(format!(
        r"SELECT '00000000-0000-0000-0000-000000000000'::uuid AS key_id, NULL::text AS key_name,
              'tenant_monthly' AS policy, $2 AS quota, w.used AS taken, least(w.used, u.spent) AS spent,
              u.has_denials, w.window_start, w.window_end
          FROM (
              SELECT *, (window_start AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC' AS window_end
              FROM tenant_quota_usage WHERE tenant_id = $1 AND used > 0
          ) w
          CROSS JOIN LATERAL (
              SELECT coalesce(sum(u.cost) FILTER (WHERE u.policy = ''), 0)::bigint AS spent,
                  coalesce(bool_or(u.policy = 'tenant_monthly'), false) AS has_denials
              FROM usage_quarters u
              WHERE u.tenant_id = $1 AND u.endpoint = E'\x01' AND u.key_id = '00000000-0000-0000-0000-000000000000'
                  AND u.plan_id = '00000000-0000-0000-0000-000000000000'
                  AND u.start >= w.window_start AND u.start < w.window_end
          ) u
          WHERE w.window_start <= now() AND w.window_end > least(now() - interval '15 minutes', $5,
                  CASE WHEN $6 THEN now() - interval '1 day' END)
              AND w.used::numeric * 100 >= $2::numeric * $3
              AND NOT ($4 AND EXISTS (SELECT FROM billing_accounts WHERE tenant_id = $1 AND {IS_CURRENT}))",
    ))
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<BigInt, _>(of.quota)
    .bind::<Integer, _>(percent)
    .bind::<Bool, _>(of.is_lifted_by_access)
    .bind::<Nullable<Timestamptz>, _>(lateness.oldest.values().min())
    .bind::<Bool, _>(lateness.is_unknown);
    Ok(standing.get_results(&mut **tx).await?)
}
