//! An outbox of emails, from which replicas claim emails that are due.

use diesel::{
    prelude::*,
    sql_query,
    sql_types::{BigInt, Integer, Nullable, Text, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use quota_common::TenantId;
use uuid::Uuid;

use super::alert::AlertRow;
use crate::{
    db::{DbError, SystemTx},
    schema::{mails, quota_alerts},
};

#[derive(Debug, Clone, Insertable)]
#[diesel(table_name = mails)]
pub struct NewMail<'a> {
    pub tenant_id: Uuid,
    pub id: Uuid,
    pub recipient: &'a str,
    pub subject: &'a str,
    pub text_body: &'a str,
    pub html_body: &'a str,
}

pub async fn insert_all(tx: &mut SystemTx, new: &[NewMail<'_>]) -> Result<(), DbError> {
    diesel::insert_into(mails::table)
        .values(new)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[derive(QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    count: i64,
}

/// Returns the number of emails created in the last hour, for all tenants.
pub async fn count_of_last_hour(tx: &mut SystemTx) -> Result<i64, DbError> {
    let sql = "SELECT count(*) AS count FROM mails WHERE created_at > now() - interval '1 hour'";
    let count: Count = sql_query(sql).get_result(&mut **tx).await?;
    Ok(count.count)
}

#[derive(QueryableByName)]
struct Tenant {
    #[diesel(sql_type = SqlUuid)]
    tenant_id: Uuid,
}

/// Returns tenants with alerts to send. Skips tenants for which alert emails were created at `per_hour` or more
/// different times in the last hour. Emails to several recipients are created at the same time.
pub async fn tenants_with_alerts(
    tx: &mut SystemTx,
    per_hour: i64,
    limit: i64,
) -> Result<Vec<Uuid>, DbError> {
    let tenants: Vec<Tenant> = sql_query(
        "SELECT a.tenant_id FROM (SELECT DISTINCT tenant_id FROM quota_alerts WHERE email_pending) a \
         WHERE (SELECT count(DISTINCT m.created_at) FROM mails m \
             WHERE m.tenant_id = a.tenant_id AND m.created_at > now() - interval '1 hour') < $1 \
         ORDER BY random() LIMIT $2",
    )
    .bind::<BigInt, _>(per_hour)
    .bind::<BigInt, _>(limit)
    .get_results(&mut **tx)
    .await?;
    Ok(tenants.into_iter().map(|it| it.tenant_id).collect())
}

/// Returns up to `limit` of a tenant's alerts to send, oldest first, and locks them. Skips alerts that another replica
/// has locked.
pub async fn lock_alerts(
    tx: &mut SystemTx,
    tenant: TenantId,
    limit: i64,
) -> Result<Vec<AlertRow>, DbError> {
    let pending = quota_alerts::table
        .filter(quota_alerts::tenant_id.eq(tenant.0))
        .filter(quota_alerts::email_pending)
        .order(quota_alerts::id.asc())
        .limit(limit)
        .select(AlertRow::as_select())
        .for_update()
        .skip_locked();
    Ok(pending.load(&mut **tx).await?)
}

/// Marks alerts as sent.
pub async fn alerts_are_sent(
    tx: &mut SystemTx,
    tenant: TenantId,
    ids: &[Uuid],
) -> Result<(), DbError> {
    let sent = quota_alerts::table
        .filter(quota_alerts::tenant_id.eq(tenant.0))
        .filter(quota_alerts::id.eq_any(ids));
    diesel::update(sent)
        .set(quota_alerts::email_pending.eq(false))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// A member who receives alerts by email.
#[derive(Debug, Clone, QueryableByName)]
pub struct RecipientRow {
    #[diesel(sql_type = Text)]
    pub email: String,
    /// The tenant's name.
    #[diesel(sql_type = Text)]
    pub tenant: String,
}

/// Returns the members who receive a tenant's alerts. Returns an empty list if alert emails are off.
pub async fn recipients(
    tx: &mut SystemTx,
    tenant: TenantId,
    limit: i64,
) -> Result<Vec<RecipientRow>, DbError> {
    let recipients = sql_query(
        "SELECT u.email, t.name AS tenant FROM tenants t JOIN memberships m ON m.tenant_id = t.id \
             JOIN users u ON u.id = m.user_id \
         WHERE t.id = $1 AND t.alert_email AND m.role = ANY(t.alert_email_roles) \
         ORDER BY m.created_at, u.id LIMIT $2",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<BigInt, _>(limit);
    Ok(recipients.get_results(&mut **tx).await?)
}

#[derive(Debug, Clone, QueryableByName)]
pub struct DueMail {
    #[diesel(sql_type = SqlUuid)]
    pub tenant_id: Uuid,
    #[diesel(sql_type = SqlUuid)]
    pub id: Uuid,
    #[diesel(sql_type = Text)]
    pub recipient: String,
    #[diesel(sql_type = Text)]
    pub subject: String,
    #[diesel(sql_type = Text)]
    pub text_body: String,
    #[diesel(sql_type = Text)]
    pub html_body: String,
    /// The number of attempts, including the current one.
    #[diesel(sql_type = Integer)]
    pub attempts: i32,
}

/// Returns an email that is due, and counts an attempt. Tenants take turns, starting with the tenant after
/// `after_tenant`. Unless the result of this attempt is recorded first, the next attempt is due after `lease_seconds`.
/// Until then, no other replica sends the email. If this process exits, the email is retried at that time.
pub async fn claim(
    tx: &mut SystemTx,
    after_tenant: Uuid,
    lease_seconds: i32,
) -> Result<Option<DueMail>, DbError> {
    for first in ["tenant_id > $2", "tenant_id <= $2"] {
        let claimed = sql_query(format!(
            "UPDATE mails SET attempts = attempts + 1, due_at = now() + $1 * interval '1 second' \
             WHERE (tenant_id, id) = ( \
                 SELECT tenant_id, id FROM mails WHERE due_at <= now() AND {first} \
                 ORDER BY tenant_id, due_at LIMIT 1 FOR UPDATE SKIP LOCKED) \
             RETURNING tenant_id, id, recipient, subject, text_body, html_body, attempts"
        ))
        .bind::<Integer, _>(lease_seconds)
        .bind::<SqlUuid, _>(after_tenant)
        .get_result(&mut **tx)
        .await
        .optional()?;
        if claimed.is_some() {
            return Ok(claimed);
        }
    }
    Ok(None)
}

/// Records the result of an attempt. `error` is `None` if the email was sent. `retry_after` is the number of seconds
/// until the next attempt, if there is one.
pub async fn finish(
    tx: &mut SystemTx,
    mail: &DueMail,
    error: Option<&str>,
    retry_after: Option<i64>,
) -> Result<(), DbError> {
    let status = match (error, retry_after) {
        (None, _) => "sent",
        (Some(_), Some(_)) => "pending",
        (Some(_), None) => "failed",
    };
    sql_query(
        "UPDATE mails SET status = $4, error = $5, \
             due_at = CASE WHEN $4 = 'pending' THEN now() + $6 * interval '1 second' END \
         WHERE tenant_id = $1 AND id = $2 AND attempts = $3 AND status = 'pending'",
    )
    .bind::<SqlUuid, _>(mail.tenant_id)
    .bind::<SqlUuid, _>(mail.id)
    .bind::<Integer, _>(mail.attempts)
    .bind::<Text, _>(status)
    .bind::<Nullable<Text>, _>(error)
    .bind::<Nullable<BigInt>, _>(retry_after)
    .execute(&mut **tx)
    .await?;
    Ok(())
}
