//! A tenant's transactions: reads, and changes that record an audit event.

use std::ops::{Deref, DerefMut};

use quota_common::{
    api_key::ApiKey,
    audit::{AuditAction, AuditTarget},
    auth::Tenant,
    plan::Plan,
    service_token::ServiceToken,
    webhook::Webhook,
};
use serde::Serialize;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{admitted::SignedInTenant, problem::ApiError};
use crate::{
    db::{DbError, TenantTx},
    repo::{
        audit::{self, NewAuditEvent},
        invalidation::{self, Target},
    },
    state::AppState,
    tenant_queue::{Busy, Turn},
};

/// Runs a query in a transaction of the caller's tenant.
pub async fn read<T>(
    state: &AppState,
    caller: &SignedInTenant,
    query: impl AsyncFnOnce(&mut TenantTx) -> Result<T, DbError>,
) -> Result<T, DbError> {
    let mut tx = state.db.tenant(caller.tenant()).await?;
    let result = query(&mut tx).await?;
    tx.commit().await?;
    Ok(result)
}

/// Waits for the tenant's turn to read a potentially large number of rows; see [`tenant_queue`](crate::tenant_queue).
/// Call before taking a database connection, and hold the turn until the connection has been returned.
pub async fn read_turn(state: &AppState, caller: &SignedInTenant) -> Result<Turn, ApiError> {
    let turn = state.reads.turn(caller.tenant()).await;
    turn.map_err(|_| {
        state.metrics.guard_rejections.inc();
        ApiError::too_many_reads()
    })
}

/// Waits for the tenant's other changes on this replica; see [`tenant_queue`](crate::tenant_queue). Call before taking
/// a database connection, and hold the turn until the connection has been returned.
pub async fn change_turn(state: &AppState, caller: &SignedInTenant) -> Result<Turn, ApiError> {
    let turn = state.changes.turn(caller.tenant()).await;
    let turn = turn.inspect_err(|busy| {
        if *busy == Busy::QueueFull {
            state.metrics.guard_rejections.inc();
        }
    })?;
    Ok(turn)
}

/// A resource whose changes are recorded in the audit log.
pub trait Audited: Serialize {
    const TARGET: AuditTarget;

    fn id(&self) -> Uuid;
    fn name(&self) -> &str;
}

macro_rules! audited {
    ($($resource:ty => $target:ident),+ $(,)?) => {$(
        impl Audited for $resource {
            const TARGET: AuditTarget = AuditTarget::$target;

            fn id(&self) -> Uuid {
                self.id.0
            }

            fn name(&self) -> &str {
                &self.name
            }
        }
    )+};
}
audited!(
    Plan => Plan,
    ApiKey => ApiKey,
    ServiceToken => ServiceToken,
    Tenant => Tenant,
    Webhook => Webhook,
);

/// A change in progress: a transaction of the caller's tenant. Only [`created`](Self::created),
/// [`updated`](Self::updated), and [`deleted`](Self::deleted) can commit it. They record the audit event, commit the
/// transaction, and then publish which cached records replicas must drop. Therefore, every edit is recorded. Dropping
/// the edit rolls back the transaction.
pub struct Edit<'a> {
    tx: TenantTx,
    state: &'a AppState,
    caller: &'a SignedInTenant,
    // Dropped after the transaction, so that the tenant's next change starts only when this one has ended.
    _turn: Turn,
}

impl<'a> Edit<'a> {
    /// Waits for the tenant's other changes on this replica, and then takes a database connection; see
    /// [`tenant_queue`](crate::tenant_queue).
    pub async fn begin(state: &'a AppState, caller: &'a SignedInTenant) -> Result<Self, ApiError> {
        let turn = change_turn(state, caller).await?;
        Ok(Self {
            tx: state.db.tenant(caller.tenant()).await?,
            state,
            caller,
            _turn: turn,
        })
    }

    /// Commits the creation of a resource.
    pub async fn created<T: Audited>(self, action: AuditAction, new: &T) -> Result<(), ApiError> {
        self.commit(action, new, (None, whole(new)), None).await
    }

    /// Commits an update. Replicas then drop `stale` from their caches.
    pub async fn updated<T: Audited>(
        self,
        action: AuditAction,
        before: &T,
        after: &T,
        stale: impl Into<Option<Target>>,
    ) -> Result<(), ApiError> {
        let changes = difference(before, after);
        self.commit(action, after, changes, stale.into()).await
    }

    /// Commits a deletion. Replicas then drop `stale` from their caches.
    pub async fn deleted<T: Audited>(
        self,
        action: AuditAction,
        last: &T,
        stale: Option<Target>,
    ) -> Result<(), ApiError> {
        self.commit(action, last, (whole(last), None), stale).await
    }

    async fn commit<T: Audited>(
        mut self,
        action: AuditAction,
        resource: &T,
        (before, after): (Option<Value>, Option<Value>),
        stale: Option<Target>,
    ) -> Result<(), ApiError> {
        let (tenant, user) = (self.caller.tenant(), self.caller.user());
        let target = resource.id().to_string();
        let event = NewAuditEvent {
            target_name: Some(resource.name()),
            before,
            after,
            ..NewAuditEvent::new(tenant.0, action, T::TARGET, &target)
                .by(user.0, self.caller.origin.network())
        };
        audit::insert(&mut self.tx, &event).await?;
        // Insert the invalidation last: until this transaction ends, other transactions that insert invalidations wait.
        let invalidation = match stale {
            Some(stale) => Some(invalidation::insert(&mut self.tx, stale).await?),
            None => None,
        };
        self.tx.commit().await?;
        if let Some(invalidation) = &invalidation {
            self.state.invalidate(invalidation);
        }
        tracing::info!(action = action.as_str(), tenant = %tenant, user = %user, target, "resource changed");
        Ok(())
    }
}

impl Deref for Edit<'_> {
    type Target = TenantTx;

    fn deref(&self) -> &TenantTx {
        &self.tx
    }
}

impl DerefMut for Edit<'_> {
    fn deref_mut(&mut self) -> &mut TenantTx {
        &mut self.tx
    }
}

/// Returns the fields that differ, except `updated_at`, with their values before and after the change.
fn difference<T: Serialize>(before: &T, after: &T) -> (Option<Value>, Option<Value>) {
    let (Some(Value::Object(before)), Some(Value::Object(after))) = (whole(before), whole(after))
    else {
        return (None, None);
    };
    let changed = |own: &Map<String, Value>, other: &Map<String, Value>| {
        let fields = own
            .iter()
            .filter(|(name, value)| *name != "updated_at" && other.get(*name) != Some(value));
        Some(Value::Object(
            fields
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect(),
        ))
    };
    (changed(&before, &after), changed(&after, &before))
}

fn whole<T: Serialize>(value: &T) -> Option<Value> {
    serde_json::to_value(value).ok()
}
