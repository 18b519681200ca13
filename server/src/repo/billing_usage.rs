//! Usage to charge, and its reports to Stripe's meter.

use chrono::{DateTime, TimeDelta, Utc};
use diesel::{
    prelude::*,
    sql_query,
    sql_types::{BigInt, Bool, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use quota_common::TenantId;
use uuid::Uuid;

use crate::db::{DbError, SystemTx};

/// An hour with usage that is not part of a report yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, QueryableByName)]
pub struct OpenHour {
    #[diesel(sql_type = SqlUuid)]
    pub tenant_id: Uuid,
    #[diesel(sql_type = Timestamptz)]
    pub start: DateTime<Utc>,
    /// The end of the time range to plan: the end of the hour, or a boundary of a billing period within the hour.
    #[diesel(sql_type = Timestamptz)]
    pub until: DateTime<Utc>,
    /// Whether the tenant's subscriptions were read after `until`. If so, all boundaries of billing periods before
    /// `until` are known. Also true if the tenant has no customer in Stripe, or if its subscriptions have never been
    /// read.
    #[diesel(sql_type = Bool)]
    pub is_read: bool,
}

/// Returns each tenant's oldest hour whose usage is ready to be planned, that is, to be put into reports. The order is
/// random, so that tenants whose hours cannot be planned do not delay others. An hour is ready once every replica has
/// shipped its records from that hour, and at the latest 15 minutes after its end. Usage that arrives later becomes
/// another revision. If a billing period starts or ends during an hour that is not ready yet, the part of the hour
/// before that time is returned separately, but only once. Its usage can then be reported before the invoice is final.
pub async fn open_hours(tx: &mut SystemTx, limit: i64) -> Result<Vec<OpenHour>, DbError> {
    let hours = sql_query(
        "WITH complete AS ( \
             SELECT greatest(least(now(), coalesce(min(coalesce(oldest_pending_at, reported_at)), now())), \
                 now() - interval '15 minutes') AS until \
             FROM usage_shippers \
         ), open AS ( \
             SELECT u.tenant_id, u.start, u.start + interval '1 hour' AS until \
             FROM billing_usage u, complete c \
             WHERE u.cost <> u.planned AND u.start + interval '1 hour' <= c.until \
             UNION ALL \
             SELECT u.tenant_id, u.start, e.edge \
             FROM complete c CROSS JOIN billing_usage u JOIN billing_subscriptions s USING (tenant_id) \
             CROSS JOIN LATERAL unnest(ARRAY[s.started_at, s.ended_at, s.period_start, s.period_end]) AS e (edge) \
             WHERE u.cost <> u.planned AND u.start + interval '1 hour' > c.until AND u.start < c.until \
                 AND e.edge > u.start AND e.edge <= c.until AND (u.divided_at IS NULL OR u.divided_at < e.edge) \
         ) \
         SELECT * FROM (SELECT DISTINCT ON (o.tenant_id) o.tenant_id, o.start, o.until, \
             coalesce(a.customer_id IS NULL OR a.read_at >= o.until, true) AS is_read \
         FROM open o LEFT JOIN billing_accounts a USING (tenant_id) \
         ORDER BY o.tenant_id, o.start, o.until) oldest ORDER BY random() LIMIT $1",
    )
    .bind::<BigInt, _>(limit)
    .get_results(&mut **tx)
    .await?;
    Ok(hours)
}

/// The data of a subscription that is needed to charge usage.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct ChargedBy {
    #[diesel(sql_type = Text)]
    pub id: String,
    #[diesel(sql_type = Bool)]
    pub is_metered: bool,
    #[diesel(sql_type = Timestamptz)]
    pub started_at: DateTime<Utc>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub ended_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub period_start: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub period_end: Option<DateTime<Utc>>,
}

/// The usage in one hour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, QueryableByName)]
pub struct HourSums {
    #[diesel(sql_type = BigInt)]
    pub cost: i64,
    /// The part of `cost` that is in reports.
    #[diesel(sql_type = BigInt)]
    pub planned: i64,
}

/// Returns the usage in an hour. If `is_locked` is set, no usage can be added to the hour until the transaction ends.
pub async fn hour(
    tx: &mut SystemTx,
    tenant: TenantId,
    start: DateTime<Utc>,
    is_locked: bool,
) -> Result<HourSums, DbError> {
    let query = "SELECT cost, planned FROM billing_usage WHERE tenant_id = $1 AND start = $2";
    let query = if is_locked {
        format!("{query} FOR UPDATE")
    } else {
        query.to_owned()
    };
    let sums = sql_query(query)
        .bind::<SqlUuid, _>(tenant.0)
        .bind::<Timestamptz, _>(start)
        .get_result(&mut **tx)
        .await?;
    Ok(sums)
}

/// Records that the usage in an hour has been planned up to `edge`, the boundary of a billing period.
pub async fn set_divided(
    tx: &mut SystemTx,
    tenant: TenantId,
    start: DateTime<Utc>,
    edge: DateTime<Utc>,
) -> Result<(), DbError> {
    sql_query("UPDATE billing_usage SET divided_at = $3 WHERE tenant_id = $1 AND start = $2")
        .bind::<SqlUuid, _>(tenant.0)
        .bind::<Timestamptz, _>(start)
        .bind::<Timestamptz, _>(edge)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Raises the statement timeout, because scanning a large tenant's log takes a long time.
pub async fn allow_scan(tx: &mut SystemTx) -> Result<(), DbError> {
    sql_query("SET LOCAL statement_timeout = '5min'")
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Returns the tenant's subscriptions, oldest first. Omits subscriptions whose first payment never succeeded
/// (`incomplete_expired`).
pub async fn subscriptions(tx: &mut SystemTx, tenant: TenantId) -> Result<Vec<ChargedBy>, DbError> {
    let subscriptions = sql_query(
        "SELECT id, is_metered, started_at, ended_at, period_start, period_end FROM billing_subscriptions \
         WHERE tenant_id = $1 AND status <> 'incomplete_expired' ORDER BY started_at, id",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .get_results(&mut **tx)
    .await?;
    Ok(subscriptions)
}

#[derive(QueryableByName)]
struct Sum {
    #[diesel(sql_type = BigInt)]
    sum: i64,
}

/// Returns the cost of requests allowed on paid plans, according to the log.
pub async fn logged(
    tx: &mut SystemTx,
    tenant: TenantId,
    from: DateTime<Utc>,
    until: DateTime<Utc>,
) -> Result<i64, DbError> {
    let found: Sum = sql_query(
        "SELECT coalesce(sum(cost), 0)::bigint AS sum FROM usage_log \
         WHERE tenant_id = $1 AND \"timestamp\" >= $2 AND \"timestamp\" < $3 \
             AND billing = 'paid' AND NOT was_rejected",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Timestamptz, _>(from)
    .bind::<Timestamptz, _>(until)
    .get_result(&mut **tx)
    .await?;
    Ok(found.sum)
}

/// Returns the total value of reports that start in a time range. If `only_sent` is set, includes only reports that
/// Stripe has received.
pub async fn reported(
    tx: &mut SystemTx,
    tenant: TenantId,
    from: DateTime<Utc>,
    until: DateTime<Utc>,
    only_sent: bool,
) -> Result<i64, DbError> {
    let found: Sum = sql_query(
        "SELECT coalesce(sum(value), 0)::bigint AS sum FROM billing_reports \
         WHERE tenant_id = $1 AND start >= $2 AND start < $3 AND (state = 'sent' OR NOT $4)",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Timestamptz, _>(from)
    .bind::<Timestamptz, _>(until)
    .bind::<Bool, _>(only_sent)
    .get_result(&mut **tx)
    .await?;
    Ok(found.sum)
}

#[derive(Debug, Clone, Copy)]
pub struct NewReport<'a> {
    pub start: DateTime<Utc>,
    pub until: DateTime<Utc>,
    pub subscription: Option<&'a str>,
    pub value: i64,
    /// Why the report will not be charged. `None` if it will be charged.
    pub unbilled: Option<Unbilled>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unbilled {
    /// The tenant had no subscription at the time of the usage, or its subscription belonged to a Stripe account that
    /// has been [replaced](super::stripe_account::switch).
    NoSubscription,
    /// The subscription has no price for usage.
    NotMetered,
    /// Stripe accepts only usage from the last 35 days.
    TooOld,
    /// The invoice for the billing period is final.
    Finalized,
    /// Stripe rejected the report.
    Rejected,
    /// No response arrived while Stripe still recognized the report's identifier, and the total in Stripe does not show
    /// whether the report was received.
    Unclear,
}

impl Unbilled {
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoSubscription => "no_subscription",
            Self::NotMetered => "not_metered",
            Self::TooOld => "too_old",
            Self::Finalized => "finalized",
            Self::Rejected => "rejected",
            Self::Unclear => "unclear",
        }
    }
}

/// Adds a report as the next revision for its start time, and counts its value as planned.
pub async fn plan(
    tx: &mut SystemTx,
    tenant: TenantId,
    hour: DateTime<Utc>,
    report: &NewReport<'_>,
) -> Result<(), DbError> {
    sql_query(
        "INSERT INTO billing_reports (tenant_id, start, revision, until, subscription_id, value, state, reason, due_at) \
         SELECT $1, $2, coalesce(max(revision) + 1, 0), $3, $4, $5, \
             CASE WHEN $6 IS NULL THEN 'pending' ELSE 'unbilled' END, $6, CASE WHEN $6 IS NULL THEN now() END \
         FROM billing_reports WHERE tenant_id = $1 AND start = $2",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Timestamptz, _>(report.start)
    .bind::<Timestamptz, _>(report.until)
    .bind::<Nullable<Text>, _>(report.subscription)
    .bind::<BigInt, _>(report.value)
    .bind::<Nullable<Text>, _>(report.unbilled.map(Unbilled::name))
    .execute(&mut **tx)
    .await?;
    sql_query(
        "UPDATE billing_usage SET planned = planned + $3 WHERE tenant_id = $1 AND start = $2",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Timestamptz, _>(hour)
    .bind::<BigInt, _>(report.value)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

#[derive(QueryableByName)]
struct OfTenant {
    #[diesel(sql_type = SqlUuid)]
    tenant_id: Uuid,
}

/// Assigns tenants with due reports to `owner`. For two minutes, other replicas do not send these tenants' reports.
/// Each attempt to send a report extends this time.
pub async fn claim_senders(
    tx: &mut SystemTx,
    owner: Uuid,
    limit: i64,
) -> Result<Vec<TenantId>, DbError> {
    let claimed: Vec<OfTenant> = sql_query(
        "INSERT INTO billing_senders AS s (tenant_id, until, owner) \
         SELECT r.tenant_id, now() + interval '2 minutes', $2 FROM billing_reports r \
         WHERE r.due_at <= now() AND NOT EXISTS ( \
             SELECT FROM billing_senders o WHERE o.tenant_id = r.tenant_id AND o.until > now()) \
         GROUP BY r.tenant_id ORDER BY min(r.due_at) LIMIT $1 \
         ON CONFLICT (tenant_id) DO UPDATE SET until = excluded.until, owner = excluded.owner WHERE s.until <= now() \
         RETURNING tenant_id",
    )
    .bind::<BigInt, _>(limit)
    .bind::<SqlUuid, _>(owner)
    .get_results(&mut **tx)
    .await?;
    Ok(claimed
        .into_iter()
        .map(|it| TenantId(it.tenant_id))
        .collect())
}

/// Allows other replicas to send the tenant's reports. Does nothing if another replica has already taken over.
pub async fn release_sender(
    tx: &mut SystemTx,
    tenant: TenantId,
    owner: Uuid,
) -> Result<(), DbError> {
    sql_query("DELETE FROM billing_senders WHERE tenant_id = $1 AND owner = $2")
        .bind::<SqlUuid, _>(tenant.0)
        .bind::<SqlUuid, _>(owner)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[derive(Debug, Clone, QueryableByName)]
pub struct DueReport {
    #[diesel(sql_type = Timestamptz)]
    pub start: DateTime<Utc>,
    #[diesel(sql_type = Integer)]
    pub revision: i32,
    #[diesel(sql_type = Timestamptz)]
    pub until: DateTime<Utc>,
    #[diesel(sql_type = BigInt)]
    pub value: i64,
    #[diesel(sql_type = Text)]
    pub customer_id: String,
    #[diesel(sql_type = Nullable<Text>)]
    pub subscription_id: Option<String>,
    /// Whether the billing period or the subscription has ended.
    #[diesel(sql_type = Bool)]
    pub is_of_earlier_period: bool,
    /// Seconds since the start of the time range that the report covers.
    #[diesel(sql_type = BigInt)]
    pub age: i64,
    /// Seconds since the first attempt. `None` if this is the first attempt.
    #[diesel(sql_type = Nullable<BigInt>)]
    pub sent_ago: Option<i64>,
}

/// Returns the tenant's next due report, and counts an attempt. The next attempt is due after a delay that doubles each
/// time, from 4 seconds to an hour, minus a random part of up to half. So the report is sent again if the response is
/// lost or this process exits. Returns `None` if no report is due, if the tenant has no customer, or if another replica
/// has taken over from `owner`.
pub async fn begin_attempt(
    tx: &mut SystemTx,
    tenant: TenantId,
    owner: Uuid,
) -> Result<Option<DueReport>, DbError> {
    let due = sql_query(
        "WITH claim AS ( \
             UPDATE billing_senders SET until = now() + interval '2 minutes' \
             WHERE tenant_id = $1 AND owner = $2 RETURNING tenant_id \
         ), next AS ( \
             SELECT tenant_id, start, revision, first_attempt_at FROM billing_reports \
             WHERE tenant_id = (SELECT tenant_id FROM claim) AND due_at <= now() \
             ORDER BY due_at, start, revision LIMIT 1 FOR UPDATE) \
         UPDATE billing_reports r SET attempts = r.attempts + 1, first_attempt_at = coalesce(r.first_attempt_at, now()), \
             due_at = now() + least(interval '1 hour', interval '4 seconds' * power(2, least(r.attempts, 20))) \
                 * (0.5 + random() * 0.5) \
         FROM next n JOIN billing_accounts a ON a.tenant_id = n.tenant_id \
         WHERE r.tenant_id = n.tenant_id AND r.start = n.start AND r.revision = n.revision AND a.customer_id IS NOT NULL \
         RETURNING r.start, r.revision, r.until, r.value, a.customer_id, r.subscription_id, \
             coalesce((SELECT r.until <= s.period_start OR s.ended_at IS NOT NULL FROM billing_subscriptions s \
                 WHERE s.tenant_id = r.tenant_id AND s.id = r.subscription_id), false) AS is_of_earlier_period, \
             extract(epoch FROM now() - r.start)::bigint AS age, \
             extract(epoch FROM now() - n.first_attempt_at)::bigint AS sent_ago",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<SqlUuid, _>(owner)
    .get_result(&mut **tx)
    .await
    .optional()?;
    Ok(due)
}

/// Makes the current attempt count as the first one, because Stripe no longer recognizes the identifier from earlier
/// attempts.
pub async fn restart_attempts(
    tx: &mut SystemTx,
    tenant: TenantId,
    report: &DueReport,
) -> Result<(), DbError> {
    sql_query(
        "UPDATE billing_reports SET first_attempt_at = now() WHERE tenant_id = $1 AND start = $2 AND revision = $3",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Timestamptz, _>(report.start)
    .bind::<Integer, _>(report.revision)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Records that Stripe has received a report, or why it will not be charged.
pub async fn finish(
    tx: &mut SystemTx,
    tenant: TenantId,
    report: &DueReport,
    unbilled: Option<Unbilled>,
) -> Result<(), DbError> {
    sql_query(
        "UPDATE billing_reports SET state = CASE WHEN $4 IS NULL THEN 'sent' ELSE 'unbilled' END, reason = $4, due_at = NULL \
         WHERE tenant_id = $1 AND start = $2 AND revision = $3 AND state = 'pending'",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Timestamptz, _>(report.start)
    .bind::<Integer, _>(report.revision)
    .bind::<Nullable<Text>, _>(unbilled.map(Unbilled::name))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// A customer's usage on one day, according to the reports that Stripe has received.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct SentOfDay {
    #[diesel(sql_type = SqlUuid)]
    pub tenant_id: Uuid,
    #[diesel(sql_type = Text)]
    pub customer_id: String,
    #[diesel(sql_type = BigInt)]
    pub sent: i64,
}

/// Returns the usage that was reported for a UTC day. Includes only customers without a pending report for that day.
pub async fn sent_of_day(tx: &mut SystemTx, day: DateTime<Utc>) -> Result<Vec<SentOfDay>, DbError> {
    let sent = sql_query(
        "SELECT r.tenant_id, a.customer_id, coalesce(sum(r.value) FILTER (WHERE r.state = 'sent'), 0)::bigint AS sent \
         FROM billing_reports r JOIN billing_accounts a USING (tenant_id) \
         WHERE r.start >= $1 AND r.start < $2 AND a.customer_id IS NOT NULL \
         GROUP BY r.tenant_id, a.customer_id HAVING bool_and(r.state <> 'pending') ORDER BY r.tenant_id",
    )
    .bind::<Timestamptz, _>(day)
    .bind::<Timestamptz, _>(day + TimeDelta::days(1))
    .get_results(&mut **tx)
    .await?;
    Ok(sent)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, QueryableByName)]
pub struct Uncharged {
    /// The cost that should have been charged but will not be.
    #[diesel(sql_type = BigInt)]
    pub lost: i64,
    /// The age in seconds of the oldest usage that has yet to be reported to Stripe: the time since its report was
    /// created or, if it has no report, since its hour ended. 0 if there is no such usage.
    #[diesel(sql_type = BigInt)]
    pub oldest_pending: i64,
    #[diesel(sql_type = Timestamptz)]
    pub now: DateTime<Utc>,
}

/// Returns the cost that should have been charged but will not be, in reports from the last 40 days. Also returns the
/// age of the oldest usage that has yet to be reported to Stripe.
pub async fn uncharged(tx: &mut SystemTx) -> Result<Uncharged, DbError> {
    let uncharged = sql_query(
        "SELECT coalesce(sum(value) FILTER (WHERE reason IN ('too_old', 'finalized', 'rejected', 'unclear')), 0)::bigint \
             AS lost, \
             coalesce(extract(epoch FROM now() - least( \
                 (SELECT min(created_at) FROM billing_reports WHERE due_at IS NOT NULL), \
                 (SELECT min(start) + interval '1 hour' FROM billing_usage \
                     WHERE cost <> planned AND start <= now() - interval '1 hour'))), 0)::bigint \
             AS oldest_pending, now() AS now \
         FROM billing_reports WHERE created_at > now() - interval '40 days'",
    )
    .get_result(&mut **tx)
    .await?;
    Ok(uncharged)
}
