//! What every change by a tenant's user has in common: an audit event in its transaction, and a log line.

use serde::Serialize;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{admitted::AdmittedTenant, problem::ApiError};
use crate::{
    db::TenantTx,
    repo::audit::{self, NewAuditEvent},
};

/// A change to something: what it was and what it is.
pub struct Change<'a> {
    /// `noun.verb`.
    pub action: &'static str,
    pub target_type: &'static str,
    pub target: &'a (dyn std::fmt::Display + Sync),
    /// What it is called since, or was last.
    pub name: &'a str,
    pub before: Option<Value>,
    pub after: Option<Value>,
}

/// Records it in the transaction that makes it.
pub async fn record(
    tx: &mut TenantTx,
    caller: &AdmittedTenant,
    change: Change<'_>,
) -> Result<(), ApiError> {
    let target = change.target.to_string();
    let event = NewAuditEvent {
        tenant_id: caller.tenant().0,
        id: Uuid::now_v7(),
        user_id: Some(caller.user().0),
        action: change.action,
        target_type: change.target_type,
        target_id: Some(target.clone()),
        target_name: Some(change.name),
        ip: caller.origin.network(),
        before: change.before,
        after: change.after,
    };
    audit::insert(tx, &event).await?;
    tracing::info!(
        action = change.action,
        tenant = %caller.tenant(),
        user = %caller.user(),
        target,
        "changed"
    );
    Ok(())
}

/// Only the fields that differ: as they were, and as they are.
pub fn difference<T: Serialize>(before: &T, after: &T) -> (Option<Value>, Option<Value>) {
    let (Ok(Value::Object(before)), Ok(Value::Object(after))) =
        (serde_json::to_value(before), serde_json::to_value(after))
    else {
        return (None, None);
    };
    let changed = |own: &Map<String, Value>, other: &Map<String, Value>| {
        let fields = own
            .iter()
            .filter(|(name, value)| *name != "updated_at" && other.get(*name) != Some(value));
        Value::Object(
            fields
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect(),
        )
    };
    (
        Some(changed(&before, &after)),
        Some(changed(&after, &before)),
    )
}

/// All of it.
pub fn whole<T: Serialize>(value: &T) -> Option<Value> {
    serde_json::to_value(value).ok()
}
