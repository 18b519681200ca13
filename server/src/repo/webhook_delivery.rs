//! Deliveries to webhooks in PostgreSQL: an outbox, from which replicas claim what is due.

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Bytea, Integer, Nullable, Text, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use super::{Rows, Slice};
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

/// Inserts a delivery that a tenant requested.
pub async fn insert(tx: &mut TenantTx, delivery: &NewDelivery<'_>) -> Result<DeliveryRow, DbError> {
    let query = diesel::insert_into(webhook_deliveries::table)
        .values(delivery)
        .returning(DeliveryRow::as_returning());
    Ok(query.get_result(&mut **tx).await?)
}

/// Inserts the deliveries of events.
pub async fn insert_all(tx: &mut SystemTx, deliveries: &[NewDelivery<'_>]) -> Result<(), DbError> {
    // PostgreSQL allows 65,535 parameters per statement.
    for part in deliveries.chunks(1000) {
        diesel::insert_into(webhook_deliveries::table)
            .values(part)
            .execute(&mut **tx)
            .await?;
    }
    Ok(())
}

/// Returns a page of a webhook's deliveries.
pub async fn list(
    tx: &mut TenantTx,
    webhook: Uuid,
    status: Option<&str>,
    slice: Slice,
) -> Result<Rows<DeliveryRow>, DbError> {
    let tenant = tx.tenant().0;
    let of_webhook = || {
        let all = webhook_deliveries::table
            .filter(webhook_deliveries::tenant_id.eq(tenant))
            .filter(webhook_deliveries::webhook_id.eq(webhook))
            .into_boxed::<diesel::pg::Pg>();
        match status {
            Some(status) => all.filter(webhook_deliveries::status.eq(status.to_owned())),
            None => all,
        }
    };
    let total = of_webhook().count().get_result(&mut **tx).await?;
    let rows = of_webhook()
        .filter(webhook_deliveries::id.lt(slice.before()))
        .order(webhook_deliveries::id.desc())
        .limit(slice.fetch())
        .select(DeliveryRow::as_select())
        .load(&mut **tx)
        .await?;
    Ok(Rows::new(rows, slice.limit, total))
}

/// Makes a delivery due, as if it had never been sent.
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

/// Ends the pending deliveries of a webhook that the tenant disabled.
pub async fn cancel(tx: &mut TenantTx, webhook: Uuid, error: &str) -> Result<usize, DbError> {
    let tenant = tx.tenant().0;
    cancel_on(tx, tenant, webhook, error).await
}

/// Ends the pending deliveries of a webhook that the server disabled.
pub async fn cancel_system(
    tx: &mut SystemTx,
    tenant: Uuid,
    webhook: Uuid,
    error: &str,
) -> Result<usize, DbError> {
    cancel_on(tx, tenant, webhook, error).await
}

async fn cancel_on(
    conn: &mut diesel_async::AsyncPgConnection,
    tenant: Uuid,
    webhook: Uuid,
    error: &str,
) -> Result<usize, DbError> {
    let pending = webhook_deliveries::table
        .filter(webhook_deliveries::tenant_id.eq(tenant))
        .filter(webhook_deliveries::webhook_id.eq(webhook))
        .filter(webhook_deliveries::status.eq("pending"));
    let canceled = diesel::update(pending)
        .set((
            webhook_deliveries::status.eq("failed"),
            webhook_deliveries::due_at.eq(None::<DateTime<Utc>>),
            webhook_deliveries::error.eq(error),
        ))
        .execute(conn)
        .await?;
    Ok(canceled)
}

/// A delivery to send, with its webhook.
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
    /// The number of attempts, including this one.
    #[diesel(sql_type = Integer)]
    pub attempts: i32,
    /// The time of the attempt, in seconds since 1970.
    #[diesel(sql_type = BigInt)]
    pub at: i64,
    #[diesel(sql_type = Text)]
    pub url: String,
    /// Encrypted.
    #[diesel(sql_type = Bytea)]
    pub secret: Vec<u8>,
    /// Encrypted. Only while it still signs.
    #[diesel(sql_type = Nullable<Bytea>)]
    pub previous_secret: Option<Vec<u8>>,
}

/// Returns deliveries that are due, and counts an attempt. Each becomes due again after `lease_seconds`: so it is
/// retried if this process ends, and no other replica sends it in the meantime.
///
/// Takes at most `per_webhook` of each webhook, and none of the `busy` ones, so that a slow endpoint does not delay the
/// others.
pub async fn claim(
    tx: &mut SystemTx,
    limit: i64,
    per_webhook: i64,
    busy: &[Uuid],
    lease_seconds: i32,
) -> Result<Vec<DueDelivery>, DbError> {
    let claimed = sql_query(
        "WITH due AS ( \
             SELECT tenant_id, id FROM ( \
                 SELECT tenant_id, id, due_at, row_number() OVER (PARTITION BY webhook_id ORDER BY due_at) AS n \
                 FROM webhook_deliveries WHERE due_at <= now() AND webhook_id <> ALL($3) \
             ) ranked \
             WHERE n <= $2 ORDER BY n, due_at LIMIT $1 \
         ), claimed AS ( \
             SELECT d.tenant_id, d.id FROM webhook_deliveries d JOIN due USING (tenant_id, id) \
             WHERE d.due_at <= now() FOR UPDATE OF d SKIP LOCKED \
         ) \
         UPDATE webhook_deliveries d \
         SET attempts = d.attempts + 1, last_attempt_at = now(), due_at = now() + $4 * interval '1 second' \
         FROM claimed c JOIN webhook_deliveries o USING (tenant_id, id) \
             JOIN webhooks w ON w.tenant_id = o.tenant_id AND w.id = o.webhook_id \
         WHERE d.tenant_id = c.tenant_id AND d.id = c.id \
         RETURNING d.tenant_id, d.id, d.webhook_id, d.event_id, d.payload, d.attempts, \
             extract(epoch FROM now())::bigint AS at, w.url, w.secret, \
             CASE WHEN w.previous_secret_expires_at > now() THEN w.previous_secret END AS previous_secret",
    )
    .bind::<BigInt, _>(limit)
    .bind::<BigInt, _>(per_webhook)
    .bind::<Array<SqlUuid>, _>(busy)
    .bind::<Integer, _>(lease_seconds)
    .get_results(&mut **tx)
    .await?;
    Ok(claimed)
}

/// The result of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptResult<'a> {
    pub response_status: Option<i32>,
    /// `None`: it was delivered.
    pub error: Option<&'a str>,
    /// Seconds until the next attempt. `None`: it was delivered, or is not retried.
    pub retry_after: Option<i64>,
}

/// Records the result of an attempt. Returns `false` if the delivery has been canceled, redelivered or claimed again in
/// the meantime.
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

/// Returns how long the delivery that is due the longest has been due, in seconds; 0 if none is due.
pub async fn overdue_seconds(tx: &mut SystemTx) -> Result<i64, DbError> {
    #[derive(QueryableByName)]
    struct Backlog {
        #[diesel(sql_type = BigInt)]
        overdue_seconds: i64,
    }
    let backlog: Backlog = sql_query(
        "SELECT coalesce(extract(epoch FROM now() - min(due_at)), 0)::bigint AS overdue_seconds \
         FROM webhook_deliveries WHERE due_at <= now()",
    )
    .get_result(&mut **tx)
    .await?;
    Ok(backlog.overdue_seconds)
}
