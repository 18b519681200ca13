//! The audit log in PostgreSQL.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel_async::RunQueryDsl;
use ipnet::IpNet;
use serde_json::Value;
use uuid::Uuid;

use super::{Rows, Slice};
use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::{audit_events, users},
};

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = audit_events, check_for_backend(diesel::pg::Pg))]
pub struct AuditRow {
    pub id: Uuid,
    pub at: DateTime<Utc>,
    pub user_id: Option<Uuid>,
    pub action: String,
    pub target_type: String,
    pub target_id: Option<String>,
    pub ip: Option<IpNet>,
    pub before: Option<Value>,
    pub after: Option<Value>,
}

#[derive(Debug, Insertable)]
#[diesel(table_name = audit_events)]
pub struct NewAuditEvent<'a> {
    pub tenant_id: Uuid,
    pub id: Uuid,
    pub user_id: Option<Uuid>,
    pub action: &'a str,
    pub target_type: &'a str,
    pub target_id: Option<String>,
    pub ip: Option<IpNet>,
    pub before: Option<Value>,
    pub after: Option<Value>,
}

pub async fn insert(tx: &mut TenantTx, event: &NewAuditEvent<'_>) -> Result<(), DbError> {
    diesel::insert_into(audit_events::table)
        .values(event)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// For what happens before a tenant is acted for: registering, signing in.
pub async fn insert_system(tx: &mut SystemTx, event: &NewAuditEvent<'_>) -> Result<(), DbError> {
    diesel::insert_into(audit_events::table)
        .values(event)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// The events with the address that each user has now.
pub async fn list(
    tx: &mut TenantTx,
    slice: Slice,
) -> Result<Rows<(AuditRow, Option<String>)>, DbError> {
    let tenant = tx.tenant().0;
    let total = audit_events::table
        .filter(audit_events::tenant_id.eq(tenant))
        .count()
        .get_result(&mut **tx)
        .await?;
    let rows = audit_events::table
        .left_join(users::table)
        .filter(audit_events::tenant_id.eq(tenant))
        .filter(audit_events::id.lt(slice.before()))
        .order(audit_events::id.desc())
        .limit(slice.fetch())
        .select((AuditRow::as_select(), users::email.nullable()))
        .load(&mut **tx)
        .await?;
    Ok(Rows::new(rows, slice.limit, total))
}
