//! Charged usage and its reports to the Stripe meter, in PostgreSQL.

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

/// An hour in which a tenant has usage that is not in a report yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, QueryableByName)]
pub struct OpenHour {
    #[diesel(sql_type = SqlUuid)]
    pub tenant_id: Uuid,
    #[diesel(sql_type = Timestamptz)]
    pub start: DateTime<Utc>,
    /// Whether the tenant's subscriptions were read after the hour ended, so that the limits of billing periods in it
    /// are known. Also true if there is nothing to read.
    #[diesel(sql_type = Bool)]
    pub is_read: bool,
}

/// Returns the oldest completed hour of each tenant, in random order, so that tenants whose hours cannot be planned do
/// not delay others. An hour is included once every server has delivered its records of it, or 15 minutes after its
/// end. Usage that arrives later becomes another revision.
pub async fn open_hours(tx: &mut SystemTx, limit: i64) -> Result<Vec<OpenHour>, DbError> {
    let hours = sql_query(
        "WITH complete AS ( \
             SELECT least(now(), coalesce(min(coalesce(oldest_pending_at, reported_at)), now())) AS until \
             FROM usage_shippers) \
         SELECT * FROM (SELECT DISTINCT ON (u.tenant_id) u.tenant_id, u.start, \
             coalesce(a.customer_id IS NULL OR a.read_at >= u.start + interval '1 hour', true) AS is_read \
         FROM billing_usage u LEFT JOIN billing_accounts a USING (tenant_id) \
         WHERE u.cost <> u.planned AND u.start + interval '1 hour' \
             <= greatest((SELECT until FROM complete), now() - interval '15 minutes') \
         ORDER BY u.tenant_id, u.start) oldest ORDER BY random() LIMIT $1",
    )
    .bind::<BigInt, _>(limit)
    .get_results(&mut **tx)
    .await?;
    Ok(hours)
}

/// The parts of a subscription that matter for charging usage.
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

/// An hour whose row is locked, so that no usage is added to it until the transaction ends.
#[derive(Debug)]
pub struct LockedHour {
    pub cost: i64,
    pub planned: i64,
    pub subscriptions: Vec<ChargedBy>,
}

pub async fn lock_hour(
    tx: &mut SystemTx,
    tenant: TenantId,
    start: DateTime<Utc>,
) -> Result<LockedHour, DbError> {
    #[derive(QueryableByName)]
    struct Sums {
        #[diesel(sql_type = BigInt)]
        cost: i64,
        #[diesel(sql_type = BigInt)]
        planned: i64,
    }
    let sums: Sums = sql_query(
        "SELECT cost, planned FROM billing_usage WHERE tenant_id = $1 AND start = $2 FOR UPDATE",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Timestamptz, _>(start)
    .get_result(&mut **tx)
    .await?;
    let subscriptions = sql_query(
        "SELECT id, is_metered, started_at, ended_at, period_start, period_end FROM billing_subscriptions \
         WHERE tenant_id = $1 AND status <> 'incomplete_expired' ORDER BY started_at, id",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .get_results(&mut **tx)
    .await?;
    Ok(LockedHour {
        cost: sums.cost,
        planned: sums.planned,
        subscriptions,
    })
}

#[derive(QueryableByName)]
struct Sum {
    #[diesel(sql_type = BigInt)]
    sum: i64,
}

/// Returns the cost of admitted requests on plans marked `paid`, from the log.
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

/// Returns the sum of the reports that start in the span: all of them, or only those that Stripe has received.
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

/// The data of a planned report.
#[derive(Debug, Clone, Copy)]
pub struct NewReport<'a> {
    pub start: DateTime<Utc>,
    pub until: DateTime<Utc>,
    pub subscription: Option<&'a str>,
    pub value: i64,
    /// The reason if it will not be charged.
    pub unbilled: Option<Unbilled>,
}

/// Why usage is not charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unbilled {
    /// The tenant had no subscription at that time.
    NoSubscription,
    /// The subscription has no price for usage.
    NotMetered,
    /// Stripe accepts usage of the last 35 days.
    TooOld,
    /// The invoice of its period is final.
    Finalized,
    /// Stripe rejected it.
    Rejected,
    /// It was sent a day ago without a response, and the total in Stripe matches neither outcome.
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

/// Adds a report as the next revision of its span, and counts its value as planned.
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

/// Returns tenants with reports that are due, for this replica to send within a minute. Other replicas do not get them
/// in the meantime.
pub async fn claim_senders(tx: &mut SystemTx, limit: i64) -> Result<Vec<TenantId>, DbError> {
    let claimed: Vec<OfTenant> = sql_query(
        "INSERT INTO billing_senders AS s (tenant_id, until) \
         SELECT tenant_id, now() + interval '60 seconds' FROM billing_reports \
         WHERE due_at <= now() GROUP BY tenant_id ORDER BY min(due_at) LIMIT $1 \
         ON CONFLICT (tenant_id) DO UPDATE SET until = excluded.until WHERE s.until <= now() \
         RETURNING tenant_id",
    )
    .bind::<BigInt, _>(limit)
    .get_results(&mut **tx)
    .await?;
    Ok(claimed
        .into_iter()
        .map(|it| TenantId(it.tenant_id))
        .collect())
}

/// Allows other replicas to send the tenant's reports.
pub async fn release_sender(tx: &mut SystemTx, tenant: TenantId) -> Result<(), DbError> {
    sql_query("DELETE FROM billing_senders WHERE tenant_id = $1")
        .bind::<SqlUuid, _>(tenant.0)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// A report that is about to be sent.
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
    /// Whether it belongs to a period or a subscription that has ended.
    #[diesel(sql_type = Bool)]
    pub is_of_earlier_period: bool,
    /// Time since the usage, in seconds.
    #[diesel(sql_type = BigInt)]
    pub age: i64,
    /// Time since it was first sent, in seconds. `None` if it was never sent.
    #[diesel(sql_type = Nullable<BigInt>)]
    pub sent_ago: Option<i64>,
}

/// Returns the tenant's next report that is due, and counts an attempt. It becomes due again after a delay that doubles
/// each time, from 4 seconds to an hour, minus a random part of up to half of it: it is then sent again if its response
/// was lost or this process has ended.
pub async fn begin_attempt(
    tx: &mut SystemTx,
    tenant: TenantId,
) -> Result<Option<DueReport>, DbError> {
    let due = sql_query(
        "WITH next AS ( \
             SELECT tenant_id, start, revision, first_attempt_at FROM billing_reports \
             WHERE tenant_id = $1 AND due_at <= now() ORDER BY due_at, start, revision LIMIT 1 FOR UPDATE) \
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
    .get_result(&mut **tx)
    .await
    .optional()?;
    Ok(due)
}

/// Restarts the time during which Stripe recognizes the report's identifier.
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

/// A customer's usage on a day, according to the reports that Stripe has received.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct SentOfDay {
    #[diesel(sql_type = SqlUuid)]
    pub tenant_id: Uuid,
    #[diesel(sql_type = Text)]
    pub customer_id: String,
    #[diesel(sql_type = BigInt)]
    pub sent: i64,
}

/// Returns the usage that was reported for a UTC day, for customers without a pending report for that day.
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

/// Usage that has not been charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, QueryableByName)]
pub struct Uncharged {
    /// Cost that should have been charged but will not be.
    #[diesel(sql_type = BigInt)]
    pub lost: i64,
    /// Age of the oldest report that Stripe has not received yet, in seconds; 0 if there is none.
    #[diesel(sql_type = BigInt)]
    pub oldest_pending: i64,
    #[diesel(sql_type = Timestamptz)]
    pub now: DateTime<Utc>,
}

/// Returns the usage of the last 40 days that has not been charged.
pub async fn uncharged(tx: &mut SystemTx) -> Result<Uncharged, DbError> {
    let uncharged = sql_query(
        "SELECT coalesce(sum(value) FILTER (WHERE reason IN ('too_old', 'finalized', 'rejected', 'unclear')), 0)::bigint \
             AS lost, \
             coalesce(extract(epoch FROM now() - min(created_at) FILTER (WHERE state = 'pending')), 0)::bigint \
             AS oldest_pending, now() AS now \
         FROM billing_reports WHERE created_at > now() - interval '40 days'",
    )
    .get_result(&mut **tx)
    .await?;
    Ok(uncharged)
}
