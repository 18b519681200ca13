//! Billing information for tenants: how many resources they have, and their usage in the current month and in the
//! current billing period.

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_query,
    sql_types::{BigInt, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;

use crate::db::{DbError, TenantTx};

/// How many resources a tenant has, and its usage in the current month.
#[derive(Debug, Clone, Copy, PartialEq, Eq, QueryableByName)]
pub struct Counts {
    #[diesel(sql_type = BigInt)]
    pub plans: i64,
    #[diesel(sql_type = BigInt)]
    pub api_keys: i64,
    #[diesel(sql_type = BigInt)]
    pub paid_plans: i64,
    /// Active, unexpired keys on paid plans.
    #[diesel(sql_type = BigInt)]
    pub paid_keys: i64,
    /// The end of the current calendar month (UTC).
    #[diesel(sql_type = Timestamptz)]
    pub month_end: DateTime<Utc>,
    /// The cost of requests allowed in the current month. Requests are included after about a second. 0 without
    /// metering.
    #[diesel(sql_type = BigInt)]
    pub counted: i64,
    /// The tokens that replicas have taken from the tenant's monthly quota, spent or not. `None` if no tokens have been
    /// taken.
    #[diesel(sql_type = Nullable<BigInt>)]
    pub taken: Option<i64>,
}

pub async fn counts(tx: &mut TenantTx) -> Result<Counts, DbError> {
    let tenant = tx.tenant().0;
    let counts = sql_query(
        "WITH month AS ( \
             SELECT date_trunc('month', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' AS start, \
                 (date_trunc('month', now() AT TIME ZONE 'UTC') + interval '1 month') AT TIME ZONE 'UTC' AS until) \
         SELECT (SELECT count(*) FROM plans WHERE tenant_id = $1) AS plans, \
             (SELECT count(*) FROM api_keys WHERE tenant_id = $1) AS api_keys, \
             (SELECT count(*) FROM plans WHERE tenant_id = $1 AND billing = 'paid') AS paid_plans, \
             (SELECT count(*) FROM api_keys k JOIN plans p ON p.tenant_id = k.tenant_id AND p.id = k.plan_id \
                 WHERE k.tenant_id = $1 AND p.billing = 'paid' AND k.is_active \
                     AND (k.expires_at IS NULL OR k.expires_at > now())) AS paid_keys, \
             month.until AS month_end, \
             (SELECT coalesce(sum(u.cost), 0)::bigint FROM usage_days u WHERE u.tenant_id = $1 \
                 AND u.endpoint = E'\\x01' AND u.key_id = '00000000-0000-0000-0000-000000000000' \
                 AND u.plan_id = '00000000-0000-0000-0000-000000000000' AND u.policy = '' \
                 AND u.start >= month.start) AS counted, \
             (SELECT q.used FROM tenant_quota_usage q \
                 WHERE q.tenant_id = $1 AND q.window_start = month.start) AS taken \
         FROM month",
    )
    .bind::<SqlUuid, _>(tenant)
    .get_result(&mut **tx)
    .await?;
    Ok(counts)
}

/// Usage on paid plans in a billing period, and the problems with charging it.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct PeriodUsage {
    /// The cost of allowed requests.
    #[diesel(sql_type = BigInt)]
    pub used: i64,
    /// The part of the usage that should have been charged but cannot be.
    #[diesel(sql_type = BigInt)]
    pub not_charged: i64,
    /// The start of the oldest usage, in any period, that has yet to be reported to Stripe. `None` if there is no such
    /// usage.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub unreported_from: Option<DateTime<Utc>>,
    /// The latest problem that Stripe has reported in this period.
    #[diesel(sql_type = Nullable<Text>)]
    pub error_code: Option<String>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub error_at: Option<DateTime<Utc>>,
}

/// Returns the usage since the start of a billing period. If the period started in the middle of an hour, all usage
/// from that hour is included until the hour has been divided into reports.
pub async fn usage_since(
    tx: &mut TenantTx,
    period_start: DateTime<Utc>,
) -> Result<PeriodUsage, DbError> {
    let tenant = tx.tenant().0;
    let usage = sql_query(
        "WITH reports AS ( \
             SELECT coalesce(sum(value) FILTER (WHERE start >= $2), 0)::bigint AS planned, \
                 coalesce(sum(value) FILTER (WHERE start >= $2 \
                     AND reason IN ('too_old', 'finalized', 'rejected', 'unclear')), 0)::bigint AS not_charged, \
                 min(start) FILTER (WHERE state = 'pending') AS pending_from \
             FROM billing_reports WHERE tenant_id = $1 AND (start >= $2 OR state = 'pending') \
         ), hours AS ( \
             SELECT coalesce(sum(cost - planned) FILTER (WHERE start > $2 - interval '1 hour'), 0)::bigint AS unplanned, \
                 min(start) AS unplanned_from \
             FROM billing_usage WHERE tenant_id = $1 AND cost <> planned \
         ) \
         SELECT reports.planned + hours.unplanned AS used, reports.not_charged, \
             least(reports.pending_from, hours.unplanned_from) AS unreported_from, \
             error.code AS error_code, error.received_at AS error_at \
         FROM reports CROSS JOIN hours LEFT JOIN LATERAL ( \
             SELECT code, received_at FROM billing_meter_errors \
             WHERE tenant_id = $1 AND received_at >= $2 ORDER BY received_at DESC, code LIMIT 1) error ON true",
    )
    .bind::<SqlUuid, _>(tenant)
    .bind::<Timestamptz, _>(period_start)
    .get_result(&mut **tx)
    .await?;
    Ok(usage)
}
