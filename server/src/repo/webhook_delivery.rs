//! An outbox of deliveries to webhooks, from which replicas claim deliveries that are due.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Bool, Bytea, Integer, Nullable, Text, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use super::{COUNTED_MAX, Counted, Rows, Slice};
use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::webhook_deliveries,
};

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = webhook_deliveries, check_for_backend(diesel::pg::Pg))]
pub struct DeliveryRow {
    pub id: Uuid,
    pub webhook_id: Uuid,
    pub event_id: String,
    pub event_type: String,
    pub payload: String,
    pub status: String,
    pub attempts: i32,
    pub due_at: Option<DateTime<Utc>>,
    pub last_attempt_at: Option<DateTime<Utc>>,
    pub response_status: Option<i32>,
    pub error: Option<String>,
    pub created_at: DateTime<Utc>,
}

#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = webhook_deliveries)]
pub struct NewDelivery<'a> {
    pub tenant_id: Uuid,
    pub id: Uuid,
    pub webhook_id: Uuid,
    pub event_id: &'a str,
    pub event_type: &'a str,
    pub payload: &'a str,
}

/// Inserts a delivery that the tenant requested.
pub async fn insert(tx: &mut TenantTx, delivery: &NewDelivery<'_>) -> Result<DeliveryRow, DbError> {
    let query = diesel::insert_into(webhook_deliveries::table)
        .values(delivery)
        .returning(DeliveryRow::as_returning());
    Ok(query.get_result(&mut **tx).await?)
}

/// The maximum number of pending deliveries per webhook. Limits the cost of an endpoint that is down for a long time.
pub const PENDING_MAX: i64 = 1000;
/// Why a delivery was not sent.
const NO_ROOM: &str = "Not sent, because the webhook had 1,000 pending deliveries.";

/// Returns the number of pending deliveries of each webhook. If the caller has locked a webhook, the number for this
/// webhook cannot increase until the transaction ends.
async fn pending(
    conn: &mut AsyncPgConnection,
    tenant: Uuid,
    webhooks: &[Uuid],
) -> Result<HashMap<Uuid, i64>, DbError> {
    #[derive(QueryableByName)]
    struct Pending {
        #[diesel(sql_type = SqlUuid)]
        webhook_id: Uuid,
        #[diesel(sql_type = BigInt)]
        count: i64,
    }
    let pending: Vec<Pending> = sql_query(
        "SELECT webhook_id, count(*) AS count FROM webhook_deliveries \
         WHERE tenant_id = $1 AND webhook_id = ANY($2) AND due_at IS NOT NULL GROUP BY webhook_id",
    )
    .bind::<SqlUuid, _>(tenant)
    .bind::<Array<SqlUuid>, _>(webhooks)
    .get_results(conn)
    .await?;
    Ok(pending
        .into_iter()
        .map(|it| (it.webhook_id, it.count))
        .collect())
}

/// Returns whether a webhook may have one more pending delivery. The caller must have locked the webhook.
pub async fn has_room(tx: &mut TenantTx, webhook: Uuid) -> Result<bool, DbError> {
    let tenant = tx.tenant().0;
    let pending = pending(tx, tenant, &[webhook]).await?;
    Ok(pending.get(&webhook).is_none_or(|it| *it < PENDING_MAX))
}

/// Inserts deliveries of a tenant's events to these webhooks. The caller must have locked the webhooks. If a webhook
/// already has [`PENDING_MAX`] pending deliveries, further deliveries are inserted as failed.
pub async fn insert_all(
    tx: &mut SystemTx,
    tenant: Uuid,
    webhooks: &[Uuid],
    deliveries: &[NewDelivery<'_>],
) -> Result<(), DbError> {
    let mut pending = pending(tx, tenant, webhooks).await?;
    let mut is_sent = Vec::with_capacity(deliveries.len());
    for delivery in deliveries {
        let pending = pending.entry(delivery.webhook_id).or_default();
        is_sent.push(*pending < PENDING_MAX);
        *pending += 1;
    }
    // The list is split to keep each message to PostgreSQL small.
    for (part, is_sent) in deliveries.chunks(1000).zip(is_sent.chunks(1000)) {
        sql_query(
            "INSERT INTO webhook_deliveries \
                 (tenant_id, id, webhook_id, event_id, event_type, payload, status, due_at, error) \
             SELECT $1, d.id, d.webhook_id, d.event_id, d.event_type, d.payload, \
                 CASE WHEN d.is_sent THEN 'pending' ELSE 'failed' END, CASE WHEN d.is_sent THEN now() END, \
                 CASE WHEN NOT d.is_sent THEN $8 END \
             FROM unnest($2, $3, $4, $5, $6, $7) \
                 AS d (id, webhook_id, event_id, event_type, payload, is_sent)",
        )
        .bind::<SqlUuid, _>(tenant)
        .bind::<Array<SqlUuid>, _>(part.iter().map(|it| it.id).collect::<Vec<_>>())
        .bind::<Array<SqlUuid>, _>(part.iter().map(|it| it.webhook_id).collect::<Vec<_>>())
        .bind::<Array<Text>, _>(part.iter().map(|it| it.event_id).collect::<Vec<_>>())
        .bind::<Array<Text>, _>(part.iter().map(|it| it.event_type).collect::<Vec<_>>())
        .bind::<Array<Text>, _>(part.iter().map(|it| it.payload).collect::<Vec<_>>())
        .bind::<Array<Bool>, _>(is_sent)
        .bind::<Text, _>(NO_ROOM)
        .execute(&mut **tx)
        .await?;
    }
    Ok(())
}

find_by_id!(
    pub fn find in webhook_deliveries -> DeliveryRow
);

pub async fn list(
    tx: &mut TenantTx,
    webhook: Uuid,
    status: Option<&str>,
    slice: Slice,
) -> Result<Rows<DeliveryRow>, DbError> {
    let tenant = tx.tenant().0;
    let counted: Counted = sql_query(
        "SELECT count(*) AS total FROM ( \
             SELECT FROM webhook_deliveries \
             WHERE tenant_id = $1 AND webhook_id = $2 AND ($3 IS NULL OR status = $3) LIMIT $4) counted",
    )
    .bind::<SqlUuid, _>(tenant)
    .bind::<SqlUuid, _>(webhook)
    .bind::<Nullable<Text>, _>(status)
    .bind::<BigInt, _>(COUNTED_MAX)
    .get_result(&mut **tx)
    .await?;
    let mut filtered = webhook_deliveries::table
        .filter(webhook_deliveries::tenant_id.eq(tenant))
        .filter(webhook_deliveries::webhook_id.eq(webhook))
        .into_boxed::<diesel::pg::Pg>();
    if let Some(status) = status {
        filtered = filtered.filter(webhook_deliveries::status.eq(status));
    }
    let rows = filtered
        .filter(webhook_deliveries::id.lt(slice.before()))
        .order(webhook_deliveries::id.desc())
        .limit(slice.fetch())
        .select(DeliveryRow::as_select())
        .load(&mut **tx)
        .await?;
    Ok(Rows::new(rows, slice.limit, counted.total))
}

/// Resets a delivery, so that it is sent as if for the first time.
pub async fn redeliver(tx: &mut TenantTx, id: Uuid) -> Result<Option<DeliveryRow>, DbError> {
    let query = diesel::update(webhook_deliveries::table.find((tx.tenant().0, id)))
        .set((
            webhook_deliveries::status.eq("pending"),
            webhook_deliveries::attempts.eq(0),
            webhook_deliveries::due_at.eq(diesel::dsl::now),
        ))
        .returning(DeliveryRow::as_returning());
    Ok(query.get_result(&mut **tx).await.optional()?)
}

/// Cancels the pending deliveries of a webhook that the tenant has disabled.
pub async fn cancel(tx: &mut TenantTx, webhook: Uuid, error: &str) -> Result<usize, DbError> {
    let tenant = tx.tenant().0;
    cancel_on(tx, tenant, webhook, error).await
}

/// Cancels the pending deliveries of a webhook that the server has disabled.
pub async fn cancel_system(
    tx: &mut SystemTx,
    tenant: Uuid,
    webhook: Uuid,
    error: &str,
) -> Result<usize, DbError> {
    cancel_on(tx, tenant, webhook, error).await
}

/// The maximum number of deliveries per statement, so that no statement takes long. There may be more than
/// [`PENDING_MAX`] pending deliveries if an earlier version stored them.
const CANCELED_AT_ONCE: i64 = 500;

async fn cancel_on(
    conn: &mut AsyncPgConnection,
    tenant: Uuid,
    webhook: Uuid,
    error: &str,
) -> Result<usize, DbError> {
    let mut total = 0;
    loop {
        let canceled = sql_query(
            "UPDATE webhook_deliveries SET status = 'failed', due_at = NULL, error = $3 \
             WHERE tenant_id = $1 AND id = ANY(ARRAY( \
                 SELECT id FROM webhook_deliveries \
                 WHERE tenant_id = $1 AND webhook_id = $2 AND due_at IS NOT NULL LIMIT $4))",
        )
        .bind::<SqlUuid, _>(tenant)
        .bind::<SqlUuid, _>(webhook)
        .bind::<Text, _>(error)
        .bind::<BigInt, _>(CANCELED_AT_ONCE)
        .execute(conn)
        .await?;
        if canceled == 0 {
            return Ok(total);
        }
        total += canceled;
    }
}

/// A due delivery and the data of its webhook.
#[derive(Debug, Clone, QueryableByName)]
pub struct DueDelivery {
    #[diesel(sql_type = SqlUuid)]
    pub tenant_id: Uuid,
    #[diesel(sql_type = SqlUuid)]
    pub id: Uuid,
    #[diesel(sql_type = SqlUuid)]
    pub webhook_id: Uuid,
    #[diesel(sql_type = Text)]
    pub event_id: String,
    #[diesel(sql_type = Text)]
    pub payload: String,
    /// The number of attempts, including the current one.
    #[diesel(sql_type = Integer)]
    pub attempts: i32,
    /// The time of the attempt, in seconds since the Unix epoch.
    #[diesel(sql_type = BigInt)]
    pub at: i64,
    #[diesel(sql_type = Text)]
    pub url: String,
    /// The encrypted secret.
    #[diesel(sql_type = Bytea)]
    pub secret: Vec<u8>,
    /// The encrypted previous secret. Set only while it is still used for signing.
    #[diesel(sql_type = Nullable<Bytea>)]
    pub previous_secret: Option<Vec<u8>>,
}

/// Limits on the deliveries that can be claimed.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    pub limit: i64,
    /// The maximum number of this replica's concurrent attempts per tenant.
    pub per_tenant: i64,
    /// The maximum number of this replica's concurrent attempts per webhook.
    pub per_webhook: i64,
    /// The tenant of each of this replica's attempts in progress.
    pub running_tenants: &'a [Uuid],
    /// The webhook of each of this replica's attempts in progress.
    pub running_webhooks: &'a [Uuid],
    /// Tenants take turns, starting with the tenant after this one.
    pub after_tenant: Uuid,
    /// A delivery fails after this many attempts.
    pub attempts_max: i32,
    pub lease_seconds: i32,
}

/// The maximum number of deliveries considered per claim.
const CONSIDERED: i64 = 256;

/// Returns deliveries that are due, and counts an attempt for each. Unless an attempt's result is recorded first, the
/// next attempt is due after `lease_seconds`. Until then, no other replica sends the delivery. If this process exits,
/// the delivery is retried at that time. Due deliveries that have already had `attempts_max` attempts are not returned,
/// but marked as failed.
///
/// The cost grows with the number of tenants that have pending deliveries, and with the number of these tenants'
/// webhooks: each webhook takes one index probe. The cost does not grow with the number of deliveries.
pub async fn claim(tx: &mut SystemTx, claim: &Claim<'_>) -> Result<Vec<DueDelivery>, DbError> {
    let claimed = sql_query(
        "WITH RECURSIVE later AS ( \
             (SELECT tenant_id FROM webhook_deliveries WHERE due_at IS NOT NULL AND tenant_id > $6 \
              ORDER BY tenant_id, webhook_id, due_at LIMIT 1) \
             UNION ALL \
             SELECT next.tenant_id FROM later CROSS JOIN LATERAL ( \
                 SELECT d.tenant_id FROM webhook_deliveries d \
                 WHERE d.due_at IS NOT NULL AND d.tenant_id > later.tenant_id \
                 ORDER BY d.tenant_id, d.webhook_id, d.due_at LIMIT 1) next \
         ), earlier AS ( \
             (SELECT tenant_id FROM webhook_deliveries WHERE due_at IS NOT NULL AND tenant_id <= $6 \
              ORDER BY tenant_id, webhook_id, due_at LIMIT 1) \
             UNION ALL \
             SELECT next.tenant_id FROM earlier CROSS JOIN LATERAL ( \
                 SELECT d.tenant_id FROM webhook_deliveries d \
                 WHERE d.due_at IS NOT NULL AND d.tenant_id > earlier.tenant_id AND d.tenant_id <= $6 \
                 ORDER BY d.tenant_id, d.webhook_id, d.due_at LIMIT 1) next \
         ), considered AS MATERIALIZED ( \
             SELECT t.tenant_id, d.id, \
                 d.n + (SELECT count(*) FROM unnest($4) AS r (id) WHERE r.id = t.tenant_id) AS n \
             FROM (SELECT tenant_id FROM later UNION ALL SELECT tenant_id FROM earlier) t \
             CROSS JOIN LATERAL ( \
                 SELECT ranked.id, row_number() OVER (ORDER BY ranked.n, ranked.due_at) AS n FROM ( \
                     SELECT due.id, due.due_at, row_number() OVER (PARTITION BY w.id ORDER BY due.due_at) AS n \
                     FROM webhooks w CROSS JOIN LATERAL ( \
                         SELECT d.id, d.due_at FROM webhook_deliveries d \
                         WHERE d.tenant_id = t.tenant_id AND d.webhook_id = w.id AND d.due_at <= now() \
                         ORDER BY d.due_at \
                         LIMIT greatest(0, $3 - (SELECT count(*) FROM unnest($5) AS r (id) WHERE r.id = w.id)) \
                     ) due \
                     WHERE w.tenant_id = t.tenant_id \
                 ) ranked \
                 ORDER BY ranked.n, ranked.due_at \
                 LIMIT greatest(0, $2 - (SELECT count(*) FROM unnest($4) AS r (id) WHERE r.id = t.tenant_id)) \
             ) d \
             LIMIT $9 \
         ), due AS ( \
             SELECT tenant_id, id FROM considered ORDER BY n, tenant_id <= $6, tenant_id LIMIT $1 \
         ), locked AS ( \
             SELECT d.tenant_id, d.id, d.webhook_id, d.attempts >= $7 AS is_exhausted \
             FROM webhook_deliveries d JOIN due USING (tenant_id, id) \
             WHERE d.due_at <= now() FOR UPDATE OF d SKIP LOCKED \
         ), claimed AS ( \
             UPDATE webhook_deliveries d \
             SET attempts = CASE WHEN l.is_exhausted THEN d.attempts ELSE d.attempts + 1 END, \
                 last_attempt_at = CASE WHEN l.is_exhausted THEN d.last_attempt_at ELSE now() END, \
                 due_at = CASE WHEN NOT l.is_exhausted THEN now() + $8 * interval '1 second' END, \
                 status = CASE WHEN l.is_exhausted THEN 'failed' ELSE d.status END, \
                 error = CASE WHEN l.is_exhausted THEN 'The last attempt did not finish.' ELSE d.error END \
             FROM locked l JOIN webhooks w ON w.tenant_id = l.tenant_id AND w.id = l.webhook_id \
             WHERE d.tenant_id = l.tenant_id AND d.id = l.id \
             RETURNING d.tenant_id, d.id, d.webhook_id, d.event_id, d.payload, d.attempts, w.url, w.secret, \
                 CASE WHEN w.previous_secret_expires_at > now() THEN w.previous_secret END AS previous_secret, \
                 l.is_exhausted \
         ) \
         SELECT tenant_id, id, webhook_id, event_id, payload, attempts, extract(epoch FROM now())::bigint AS at, \
             url, secret, previous_secret \
         FROM claimed WHERE NOT is_exhausted",
    )
    .bind::<BigInt, _>(claim.limit)
    .bind::<BigInt, _>(claim.per_tenant)
    .bind::<BigInt, _>(claim.per_webhook)
    .bind::<Array<SqlUuid>, _>(claim.running_tenants)
    .bind::<Array<SqlUuid>, _>(claim.running_webhooks)
    .bind::<SqlUuid, _>(claim.after_tenant)
    .bind::<Integer, _>(claim.attempts_max)
    .bind::<Integer, _>(claim.lease_seconds)
    .bind::<BigInt, _>(CONSIDERED)
    .get_results(&mut **tx)
    .await?;
    Ok(claimed)
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptResult<'a> {
    pub response_status: Option<i32>,
    /// `None` if the event was delivered.
    pub error: Option<&'a str>,
    /// Seconds until the next attempt. `None` if the event was delivered or will not be retried.
    pub retry_after: Option<i64>,
}

/// Records the result of an attempt. Returns `false` if the delivery has been canceled, redelivered, or claimed again
/// since the attempt started.
pub async fn finish(
    tx: &mut SystemTx,
    delivery: &DueDelivery,
    result: &AttemptResult<'_>,
) -> Result<bool, DbError> {
    let status = match (result.error, result.retry_after) {
        (None, _) => "delivered",
        (Some(_), Some(_)) => "pending",
        (Some(_), None) => "failed",
    };
    let finished = sql_query(
        "UPDATE webhook_deliveries SET status = $4, response_status = $5, error = $6, \
             due_at = CASE WHEN $4 = 'pending' THEN now() + $7 * interval '1 second' END \
         WHERE tenant_id = $1 AND id = $2 AND attempts = $3 AND status = 'pending'",
    )
    .bind::<SqlUuid, _>(delivery.tenant_id)
    .bind::<SqlUuid, _>(delivery.id)
    .bind::<Integer, _>(delivery.attempts)
    .bind::<Text, _>(status)
    .bind::<Nullable<Integer>, _>(result.response_status)
    .bind::<Nullable<Text>, _>(result.error)
    .bind::<Nullable<BigInt>, _>(result.retry_after)
    .execute(&mut **tx)
    .await?;
    Ok(finished == 1)
}

/// Returns how many seconds ago the oldest due delivery became due, or 0 if none is due.
pub async fn overdue_seconds(tx: &mut SystemTx) -> Result<i64, DbError> {
    #[derive(QueryableByName)]
    struct Backlog {
        #[diesel(sql_type = BigInt)]
        overdue_seconds: i64,
    }
    let backlog: Backlog = sql_query(
        "SELECT coalesce(extract(epoch FROM now() - ( \
             SELECT d.due_at FROM webhook_deliveries d \
             WHERE d.due_at <= now() \
                 AND EXISTS (SELECT FROM webhooks w WHERE w.tenant_id = d.tenant_id AND w.id = d.webhook_id) \
             ORDER BY d.due_at LIMIT 1)), 0)::bigint AS overdue_seconds",
    )
    .get_result(&mut **tx)
    .await?;
    Ok(backlog.overdue_seconds)
}
