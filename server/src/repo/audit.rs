use chrono::{DateTime, Utc};
use diesel::{pg::Pg, prelude::*};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use ipnet::IpNet;
use quota_common::audit::{AuditAction, AuditTarget};
use serde_json::Value;
use uuid::Uuid;

use super::{Rows, Slice, UpToTotalMax, containing};
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
    pub target_name: Option<String>,
}

/// An event, and the current email address of the user who caused it.
#[derive(Debug, Clone, Queryable)]
pub struct AuditEntry {
    pub event: AuditRow,
    pub user_email: Option<String>,
}

#[derive(Debug, Default)]
pub struct Filter<'a> {
    pub action: Option<&'a str>,
    pub target_type: Option<&'a str>,
    pub target_id: Option<&'a str>,
    /// Text that the actor's email address must contain.
    pub actor: Option<&'a str>,
    /// Text that the resource's name must contain.
    pub search: Option<&'a str>,
    pub from: Option<DateTime<Utc>>,
    /// The end of the time range (exclusive).
    pub to: Option<DateTime<Utc>>,
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
    pub target_name: Option<&'a str>,
    pub ip: Option<IpNet>,
    pub before: Option<Value>,
    pub after: Option<Value>,
}

impl NewAuditEvent<'_> {
    /// Returns an event that is not attributed to a user. The event has no changed fields, and its resource has no
    /// name.
    pub fn new(
        tenant_id: Uuid,
        action: AuditAction,
        target: AuditTarget,
        target_id: &impl ToString,
    ) -> Self {
        Self {
            tenant_id,
            id: Uuid::now_v7(),
            user_id: None,
            action: action.as_str(),
            target_type: target.as_str(),
            target_id: Some(target_id.to_string()),
            target_name: None,
            ip: None,
            before: None,
            after: None,
        }
    }

    /// Attributes the event to a user at an IP address.
    pub fn by(self, user: Uuid, ip: Option<IpNet>) -> Self {
        Self {
            user_id: Some(user),
            ip,
            ..self
        }
    }
}

pub async fn insert(tx: &mut TenantTx, event: &NewAuditEvent<'_>) -> Result<(), DbError> {
    insert_on(tx, event).await
}

pub async fn insert_system(tx: &mut SystemTx, event: &NewAuditEvent<'_>) -> Result<(), DbError> {
    insert_on(tx, event).await
}

async fn insert_on(conn: &mut AsyncPgConnection, event: &NewAuditEvent<'_>) -> Result<(), DbError> {
    diesel::insert_into(audit_events::table)
        .values(event)
        .execute(conn)
        .await?;
    Ok(())
}

pub async fn list(
    tx: &mut TenantTx,
    filter: &Filter<'_>,
    slice: Slice,
) -> Result<Rows<AuditEntry>, DbError> {
    let tenant = tx.tenant().0;
    let filtered = || {
        let mut query = audit_events::table
            .left_join(users::table)
            .filter(audit_events::tenant_id.eq(tenant))
            .into_boxed::<Pg>();
        if let Some(action) = filter.action {
            query = query.filter(audit_events::action.eq(action));
        }
        if let Some(target_type) = filter.target_type {
            query = query.filter(audit_events::target_type.eq(target_type));
        }
        if let Some(target_id) = filter.target_id {
            query = query.filter(audit_events::target_id.eq(target_id));
        }
        if let Some(actor) = filter.actor {
            query = query.filter(users::email.ilike(containing(actor)));
        }
        if let Some(search) = filter.search {
            query = query.filter(audit_events::target_name.ilike(containing(search)));
        }
        if let Some(from) = filter.from {
            query = query.filter(audit_events::at.ge(from));
        }
        if let Some(to) = filter.to {
            query = query.filter(audit_events::at.lt(to));
        }
        query
    };
    let all = filtered().select(audit_events::id);
    let total = UpToTotalMax(all).get_result(&mut **tx).await?;
    let rows = filtered()
        .filter(audit_events::id.lt(slice.before()))
        .order(audit_events::id.desc())
        .limit(slice.fetch())
        .select((AuditRow::as_select(), users::email.nullable()))
        .load::<AuditEntry>(&mut **tx)
        .await?;
    Ok(Rows::new(rows, slice.limit, total))
}
