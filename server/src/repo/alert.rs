//! Quota alerts, and the settings that determine who receives them by email.

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use quota_common::TenantId;
use uuid::Uuid;

use super::{COUNTED_MAX, Counted, Rows, Slice, quota_standing::QuotaStanding};
use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::quota_alerts,
};

#[derive(Debug, Clone, Queryable, Selectable, QueryableByName)]
#[diesel(table_name = quota_alerts, check_for_backend(diesel::pg::Pg))]
pub struct AlertRow {
    pub id: Uuid,
    /// The nil UUID if the quota applies to the whole tenant.
    pub key_id: Uuid,
    pub key_name: Option<String>,
    pub policy: String,
    pub threshold: i32,
    pub quota: i64,
    pub used: i64,
    pub window_start: DateTime<Utc>,
    pub window_end: DateTime<Utc>,
    pub email_pending: bool,
    pub created_at: DateTime<Utc>,
}

pub async fn list(tx: &mut TenantTx, slice: Slice) -> Result<Rows<AlertRow>, DbError> {
    let tenant = tx.tenant().0;
    let counted: Counted = sql_query(
        "SELECT count(*) AS total FROM (SELECT FROM quota_alerts WHERE tenant_id = $1 LIMIT $2) counted",
    )
    .bind::<SqlUuid, _>(tenant)
    .bind::<BigInt, _>(COUNTED_MAX)
    .get_result(&mut **tx)
    .await?;
    let rows = quota_alerts::table
        .filter(quota_alerts::tenant_id.eq(tenant))
        .filter(quota_alerts::id.lt(slice.before()))
        .order(quota_alerts::id.desc())
        .limit(slice.fetch())
        .select(AlertRow::as_select())
        .load(&mut **tx)
        .await?;
    Ok(Rows::new(rows, slice.limit, counted.total))
}

/// Who receives alerts by email.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct SettingsRow {
    #[diesel(sql_type = Bool)]
    pub alert_email: bool,
    #[diesel(sql_type = Array<Text>)]
    pub alert_email_roles: Vec<String>,
    /// The tenant's name.
    #[diesel(sql_type = Text)]
    pub name: String,
}

/// Returns the tenant's alert settings. If `for_update` is set, locks them until the transaction ends.
pub async fn settings(tx: &mut TenantTx, for_update: bool) -> Result<SettingsRow, DbError> {
    let lock = if for_update { "FOR NO KEY UPDATE" } else { "" };
    let tenant = tx.tenant().0;
    let settings = sql_query(format!(
        "SELECT alert_email, alert_email_roles, name FROM tenants WHERE id = $1 {lock}"
    ))
    .bind::<SqlUuid, _>(tenant);
    Ok(settings.get_result(&mut **tx).await?)
}

pub async fn update_settings(
    tx: &mut TenantTx,
    email: bool,
    roles: &[&str],
) -> Result<(), DbError> {
    let tenant = tx.tenant().0;
    sql_query("UPDATE tenants SET alert_email = $2, alert_email_roles = $3 WHERE id = $1")
        .bind::<SqlUuid, _>(tenant)
        .bind::<Bool, _>(email)
        .bind::<Array<Text>, _>(roles)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// A threshold that has been reached.
#[derive(Debug, Clone, Copy)]
pub struct NewAlert<'a> {
    pub id: Uuid,
    pub standing: &'a QuotaStanding,
    pub threshold: i32,
    pub used: i64,
}

/// Inserts the alerts that do not exist yet, and returns them. Alerts for the same quota and threshold count as the
/// same alert if their windows overlap.
pub async fn insert_new(
    tx: &mut SystemTx,
    tenant: TenantId,
    alerts: &[NewAlert<'_>],
) -> Result<Vec<AlertRow>, DbError> {
    let column = |of: &dyn Fn(&NewAlert<'_>) -> i64| alerts.iter().map(of).collect::<Vec<_>>();
    let rows = sql_query(
        "INSERT INTO quota_alerts (tenant_id, id, key_id, key_name, policy, threshold, quota, used, window_start, \
             window_end, email_pending) \
         SELECT $1, a.id, a.key_id, a.key_name, a.policy, a.threshold, a.quota, a.used, a.window_start, a.window_end, \
             false \
         FROM unnest($2, $3, $4, $5, $6, $7, $8, $9, $10) \
             AS a (id, key_id, key_name, policy, threshold, quota, used, window_start, window_end) \
         WHERE NOT EXISTS ( \
             SELECT FROM quota_alerts o WHERE o.tenant_id = $1 AND o.key_id = a.key_id AND o.policy = a.policy \
                 AND o.threshold = a.threshold AND o.window_end > a.window_start AND o.window_start < a.window_end) \
         ORDER BY a.id \
         ON CONFLICT ON CONSTRAINT quota_alerts_once DO NOTHING \
         RETURNING id, key_id, key_name, policy, threshold, quota, used, window_start, window_end, email_pending, \
             created_at",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Array<SqlUuid>, _>(alerts.iter().map(|it| it.id).collect::<Vec<_>>())
    .bind::<Array<SqlUuid>, _>(
        alerts
            .iter()
            .map(|it| it.standing.key_id)
            .collect::<Vec<_>>(),
    )
    .bind::<Array<Nullable<Text>>, _>(
        alerts
            .iter()
            .map(|it| it.standing.key_name.as_deref())
            .collect::<Vec<_>>(),
    )
    .bind::<Array<Text>, _>(
        alerts
            .iter()
            .map(|it| it.standing.policy.as_str())
            .collect::<Vec<_>>(),
    )
    .bind::<Array<Integer>, _>(alerts.iter().map(|it| it.threshold).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(column(&|it| it.standing.quota))
    .bind::<Array<BigInt>, _>(column(&|it| it.used))
    .bind::<Array<Timestamptz>, _>(
        alerts
            .iter()
            .map(|it| it.standing.window_start)
            .collect::<Vec<_>>(),
    )
    .bind::<Array<Timestamptz>, _>(
        alerts
            .iter()
            .map(|it| it.standing.window_end)
            .collect::<Vec<_>>(),
    )
    .get_results(&mut **tx)
    .await?;
    Ok(rows)
}

/// Includes alerts in the tenant's next email, if alert emails are on.
pub async fn mark_for_email(
    tx: &mut SystemTx,
    tenant: TenantId,
    alerts: &[Uuid],
) -> Result<(), DbError> {
    sql_query(
        "UPDATE quota_alerts SET email_pending = true WHERE tenant_id = $1 AND id = ANY($2) \
             AND (SELECT alert_email FROM tenants WHERE id = $1)",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Array<SqlUuid>, _>(alerts)
    .execute(&mut **tx)
    .await?;
    Ok(())
}
