use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_types::{BigInt, Bool, Bytea, Integer, Nullable, Text, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use quota_common::TenantId;
use uuid::Uuid;

use super::{Rows, Slice};
use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::webhooks,
};

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = webhooks, check_for_backend(diesel::pg::Pg))]
pub struct WebhookRow {
    pub id: Uuid,
    pub name: String,
    pub url: String,
    pub is_active: bool,
    pub disabled_reason: Option<String>,
    pub failing_since: Option<DateTime<Utc>>,
    pub previous_secret_expires_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

#[derive(Debug, Insertable)]
#[diesel(table_name = webhooks)]
pub struct NewWebhook<'a> {
    pub tenant_id: Uuid,
    pub id: Uuid,
    pub name: &'a str,
    pub url: &'a str,
    /// The encrypted secret.
    pub secret: &'a [u8],
}

#[derive(Debug, Default, AsChangeset)]
#[diesel(table_name = webhooks)]
pub struct WebhookChange<'a> {
    pub name: Option<&'a str>,
    pub url: Option<&'a str>,
    pub is_active: Option<bool>,
    pub disabled_reason: Option<Option<String>>,
    pub failing_since: Option<Option<DateTime<Utc>>>,
}

pub async fn insert(tx: &mut TenantTx, webhook: &NewWebhook<'_>) -> Result<WebhookRow, DbError> {
    let query = diesel::insert_into(webhooks::table)
        .values(webhook)
        .returning(WebhookRow::as_returning());
    Ok(query.get_result(&mut **tx).await?)
}

pub async fn list(tx: &mut TenantTx, slice: Slice) -> Result<Rows<WebhookRow>, DbError> {
    let tenant = tx.tenant().0;
    let total = webhooks::table
        .filter(webhooks::tenant_id.eq(tenant))
        .count()
        .get_result(&mut **tx)
        .await?;
    let rows = webhooks::table
        .filter(webhooks::tenant_id.eq(tenant))
        .filter(webhooks::id.lt(slice.before()))
        .order(webhooks::id.desc())
        .limit(slice.fetch())
        .select(WebhookRow::as_select())
        .load(&mut **tx)
        .await?;
    Ok(Rows::new(rows, slice.limit, total))
}

find_by_id!(
    pub fn find in webhooks -> WebhookRow
);
find_by_id!(
    /// Finds a webhook, and locks it against changes until the transaction ends.
    pub fn lock in webhooks -> WebhookRow, for_update
);
update_by_id!(
    pub fn update in webhooks, WebhookChange -> WebhookRow
);
delete_by_id!(
    /// Deletes a webhook. Returns the webhook's last state. The webhook's deliveries may be numerous, so they are
    /// deleted [later](super::sweep::Expired::DeletedWebhooks).
    pub fn delete in webhooks -> WebhookRow
);

/// Replaces the secret. The old secret remains valid for `grace_seconds`. An even older secret is deleted.
pub async fn rotate_secret(
    tx: &mut TenantTx,
    id: Uuid,
    secret: &[u8],
    grace_seconds: i32,
) -> Result<Option<WebhookRow>, DbError> {
    #[derive(QueryableByName)]
    struct Rotated {
        #[diesel(sql_type = Bool)]
        #[expect(dead_code, reason = "a row is returned if there is such a webhook")]
        rotated: bool,
    }
    let tenant = tx.tenant().0;
    let rotated: Option<Rotated> = diesel::sql_query(
        "UPDATE webhooks SET secret = $3, \
             previous_secret = CASE WHEN $4 > 0 THEN secret END, \
             previous_secret_expires_at = CASE WHEN $4 > 0 THEN now() + $4 * interval '1 second' END \
         WHERE tenant_id = $1 AND id = $2 RETURNING true AS rotated",
    )
    .bind::<SqlUuid, _>(tenant)
    .bind::<SqlUuid, _>(id)
    .bind::<Bytea, _>(secret)
    .bind::<Integer, _>(grace_seconds)
    .get_result(&mut **tx)
    .await
    .optional()?;
    match rotated {
        Some(_) => find(tx, id).await,
        None => Ok(None),
    }
}

/// Returns the tenant's active webhooks, and prevents them from being disabled until the transaction ends.
pub async fn lock_active(tx: &mut SystemTx, tenant: TenantId) -> Result<Vec<Uuid>, DbError> {
    let active = webhooks::table
        .filter(webhooks::tenant_id.eq(tenant.0))
        .filter(webhooks::is_active)
        .order(webhooks::id.asc())
        .select(webhooks::id)
        .for_share();
    Ok(active.load(&mut **tx).await?)
}

/// Records that a delivery to a URL was accepted, if that URL is still the webhook's URL.
pub async fn succeeded(
    tx: &mut SystemTx,
    tenant: Uuid,
    id: Uuid,
    url: &str,
) -> Result<(), DbError> {
    let failing = webhooks::table
        .find((tenant, id))
        .filter(webhooks::url.eq(url))
        .filter(webhooks::failing_since.is_not_null());
    diesel::update(failing)
        .set(webhooks::failing_since.eq(None::<DateTime<Utc>>))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// A webhook with a failed delivery attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, QueryableByName)]
pub struct Failing {
    /// Whether the attempt used the webhook's current URL.
    #[diesel(sql_type = Bool)]
    pub is_current: bool,
    /// For how many seconds every attempt to send to the current URL has failed.
    #[diesel(sql_type = BigInt)]
    pub seconds: i64,
}

/// Records that an attempt to send to a URL failed, if that URL is still the webhook's URL. Locks the webhook. Returns
/// `None` if the webhook no longer exists.
pub async fn failed(
    tx: &mut SystemTx,
    tenant: Uuid,
    id: Uuid,
    url: &str,
) -> Result<Option<Failing>, DbError> {
    let failing = diesel::sql_query(
        "UPDATE webhooks SET failing_since = CASE WHEN url = $3 THEN coalesce(failing_since, now()) \
             ELSE failing_since END \
         WHERE tenant_id = $1 AND id = $2 \
         RETURNING url = $3 AS is_current, \
             coalesce(extract(epoch FROM now() - failing_since), 0)::bigint AS seconds",
    )
    .bind::<SqlUuid, _>(tenant)
    .bind::<SqlUuid, _>(id)
    .bind::<Text, _>(url)
    .get_result(&mut **tx)
    .await
    .optional()?;
    Ok(failing)
}

/// Disables a webhook. Returns its name, or `None` if it was not active.
pub async fn disable(
    tx: &mut SystemTx,
    tenant: Uuid,
    id: Uuid,
    reason: &str,
) -> Result<Option<String>, DbError> {
    let active = webhooks::table
        .find((tenant, id))
        .filter(webhooks::is_active);
    let name = diesel::update(active)
        .set((
            webhooks::is_active.eq(false),
            webhooks::disabled_reason.eq(reason),
        ))
        .returning(webhooks::name)
        .get_result(&mut **tx)
        .await;
    Ok(name.optional()?)
}

/// Locks a webhook if it is disabled. Returns whether it is disabled.
pub async fn lock_disabled(tx: &mut SystemTx, tenant: Uuid, id: Uuid) -> Result<bool, DbError> {
    let disabled = webhooks::table
        .find((tenant, id))
        .filter(diesel::dsl::not(webhooks::is_active))
        .select(webhooks::id)
        .for_update();
    let locked: Option<Uuid> = disabled.first(&mut **tx).await.optional()?;
    Ok(locked.is_some())
}

/// The encrypted secrets of a webhook.
#[derive(Debug, Clone, QueryableByName)]
pub struct StoredSecrets {
    #[diesel(sql_type = SqlUuid)]
    pub tenant_id: Uuid,
    #[diesel(sql_type = SqlUuid)]
    pub id: Uuid,
    #[diesel(sql_type = Bytea)]
    pub secret: Vec<u8>,
    #[diesel(sql_type = Nullable<Bytea>)]
    pub previous_secret: Option<Vec<u8>>,
}

/// Returns the secrets of up to `limit` webhooks that follow `after`, sorted by tenant and ID.
pub async fn stored_secrets(
    tx: &mut SystemTx,
    after: (Uuid, Uuid),
    limit: i64,
) -> Result<Vec<StoredSecrets>, DbError> {
    let rows = diesel::sql_query(
        "SELECT tenant_id, id, secret, previous_secret FROM webhooks \
         WHERE (tenant_id, id) > ($1, $2) ORDER BY tenant_id, id LIMIT $3",
    )
    .bind::<SqlUuid, _>(after.0)
    .bind::<SqlUuid, _>(after.1)
    .bind::<BigInt, _>(limit);
    Ok(rows.load(&mut **tx).await?)
}

/// Replaces stored secrets with the same secrets, re-encrypted under another key, unless they have changed since they
/// were read.
pub async fn replace_secrets(
    tx: &mut SystemTx,
    before: &StoredSecrets,
    secret: &[u8],
    previous_secret: Option<&[u8]>,
) -> Result<(), DbError> {
    diesel::sql_query(
        "UPDATE webhooks SET secret = $3, previous_secret = $4 \
         WHERE tenant_id = $1 AND id = $2 AND secret = $5 AND previous_secret IS NOT DISTINCT FROM $6",
    )
    .bind::<SqlUuid, _>(before.tenant_id)
    .bind::<SqlUuid, _>(before.id)
    .bind::<Bytea, _>(secret)
    .bind::<Nullable<Bytea>, _>(previous_secret)
    .bind::<Bytea, _>(&before.secret)
    .bind::<Nullable<Bytea>, _>(before.previous_secret.as_deref())
    .execute(&mut **tx)
    .await?;
    Ok(())
}
