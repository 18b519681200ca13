//! Creates resources: once per `Idempotency-Key`, within the tenant's limits, and with an audit event.

use poem::http::StatusCode;
use quota_common::{
    api_key::CreatedApiKey, audit::AuditAction, plan::Plan, service_token::CreatedServiceToken,
    webhook::CreatedWebhook,
};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    admitted::SignedInTenant,
    allowance,
    change::{Audited, Edit},
    idempotency::IdempotencyGuard,
    problem::ApiError,
};
use crate::{db::TenantTx, repo::allowance::Resource, state::AppState};

pub trait Creation: Serialize + DeserializeOwned {
    const RESOURCE: Resource;
    const ACTION: AuditAction;

    fn resource(&self) -> &impl Audited;
}

impl Creation for Plan {
    const RESOURCE: Resource = Resource::Plans;
    const ACTION: AuditAction = AuditAction::PlanCreate;

    fn resource(&self) -> &impl Audited {
        self
    }
}

impl Creation for CreatedApiKey {
    const RESOURCE: Resource = Resource::ApiKeys;
    const ACTION: AuditAction = AuditAction::ApiKeyCreate;

    fn resource(&self) -> &impl Audited {
        &self.api_key
    }
}

impl Creation for CreatedServiceToken {
    const RESOURCE: Resource = Resource::ServiceTokens;
    const ACTION: AuditAction = AuditAction::ServiceTokenCreate;

    fn resource(&self) -> &impl Audited {
        &self.service_token
    }
}

impl Creation for CreatedWebhook {
    const RESOURCE: Resource = Resource::Webhooks;
    const ACTION: AuditAction = AuditAction::WebhookCreate;

    fn resource(&self) -> &impl Audited {
        &self.webhook
    }
}

/// Creates a resource with `insert`. If the request is a replay, returns the original response instead. The value that
/// `insert` returns is stored for replays, so it must not contain a secret.
pub async fn create<T: Creation>(
    state: &AppState,
    caller: &SignedInTenant,
    idempotency: IdempotencyGuard,
    insert: impl AsyncFnOnce(&mut TenantTx) -> Result<T, ApiError>,
) -> Result<T, ApiError> {
    let mut edit = Edit::begin(state, caller).await?;
    if let Some(first) = idempotency.replay(&mut edit).await? {
        return Ok(first);
    }
    allowance::one_more(&state.config, &mut edit, T::RESOURCE).await?;
    let created = insert(&mut edit).await?;
    let status = StatusCode::CREATED;
    idempotency.keep(&mut edit, status, &created).await?;
    edit.created(T::ACTION, created.resource()).await?;
    Ok(created)
}
