//! Webhooks from Stripe. Each webhook is stored once, and processed until its outcome is known.

use diesel::{dsl::sql, prelude::*, sql_query, sql_types};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::{
    db::{DbError, SystemTx},
    schema::billing_events,
};

#[derive(Debug, Insertable)]
#[diesel(table_name = billing_events)]
pub struct NewEvent<'a> {
    pub id: &'a str,
    pub kind: &'a str,
    pub object_id: Option<&'a str>,
    pub customer_id: Option<&'a str>,
    pub api_version: Option<&'a str>,
    pub livemode: bool,
    pub body: &'a str,
}

/// Stores an event for processing. Returns `false` if it was already stored.
pub async fn insert(tx: &mut SystemTx, event: &NewEvent<'_>) -> Result<bool, DbError> {
    let inserted = diesel::insert_into(billing_events::table)
        .values(event)
        .on_conflict_do_nothing()
        .execute(&mut **tx)
        .await?;
    Ok(inserted == 1)
}

#[derive(Debug, Clone, QueryableByName)]
pub struct DueEvent {
    #[diesel(sql_type = sql_types::Text)]
    pub id: String,
    #[diesel(sql_type = sql_types::Text)]
    pub kind: String,
    #[diesel(sql_type = sql_types::Nullable<sql_types::Text>)]
    pub object_id: Option<String>,
    #[diesel(sql_type = sql_types::Nullable<sql_types::Text>)]
    pub customer_id: Option<String>,
    #[diesel(sql_type = sql_types::Bool)]
    pub livemode: bool,
    /// The number of attempts, including the current one.
    #[diesel(sql_type = sql_types::Integer)]
    pub attempts: i32,
}

/// Returns the events that have been due the longest, up to `limit`, in no particular order. Counts an attempt for each
/// event. The next attempt is due after a delay that doubles each time, from 4 seconds to an hour, minus a random part
/// of up to half. Until then, no other replica processes the event. If this process exits, the event is retried at that
/// time.
pub async fn claim(tx: &mut SystemTx, limit: i64) -> Result<Vec<DueEvent>, DbError> {
    let claimed = sql_query(
        "UPDATE billing_events SET attempts = attempts + 1, \
             due_at = now() + least(interval '1 hour', interval '4 seconds' * power(2, least(attempts, 20))) \
                 * (0.5 + random() * 0.5) \
         WHERE id = ANY(ARRAY( \
             SELECT id FROM billing_events WHERE due_at <= now() \
             ORDER BY due_at LIMIT $1 FOR UPDATE SKIP LOCKED)) \
         RETURNING id, kind, object_id, customer_id, livemode, attempts",
    )
    .bind::<sql_types::BigInt, _>(limit)
    .get_results(&mut **tx)
    .await?;
    Ok(claimed)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The customer's subscriptions were read after the event was received, or the usage problems described in the
    /// event were recorded.
    Applied,
    /// The event does not affect a customer of this server, or no longer exists in Stripe.
    Ignored,
    /// The event was abandoned after the maximum number of attempts.
    Failed,
}

impl Outcome {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Ignored => "ignored",
            Self::Failed => "failed",
        }
    }
}

pub async fn finish(
    tx: &mut SystemTx,
    ids: &[&str],
    outcome: Outcome,
    error: Option<&str>,
) -> Result<(), DbError> {
    diesel::update(billing_events::table.filter(billing_events::id.eq_any(ids)))
        .set((
            billing_events::outcome.eq(outcome.name()),
            billing_events::error.eq(error),
            billing_events::due_at.eq(sql("NULL")),
        ))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Records why events could not be processed. The events will be retried.
pub async fn postpone(tx: &mut SystemTx, ids: &[&str], error: &str) -> Result<(), DbError> {
    diesel::update(billing_events::table.filter(billing_events::id.eq_any(ids)))
        .set(billing_events::error.eq(error))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Records a problem that Stripe found in a tenant's usage. Ignores duplicates, and tenants without an account.
pub async fn insert_meter_error(
    tx: &mut SystemTx,
    event: &str,
    tenant: Uuid,
    code: &str,
) -> Result<(), DbError> {
    sql_query(
        "INSERT INTO billing_meter_errors (event_id, tenant_id, code) \
         SELECT $1, tenant_id, $3 FROM billing_accounts WHERE tenant_id = $2 ON CONFLICT DO NOTHING",
    )
    .bind::<sql_types::Text, _>(event)
    .bind::<sql_types::Uuid, _>(tenant)
    .bind::<sql_types::Text, _>(code)
    .execute(&mut **tx)
    .await?;
    Ok(())
}
