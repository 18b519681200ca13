//! `/admin/webhooks`.

use poem::{Result, http::StatusCode};
use poem_openapi::{
    OpenApi,
    param::{Header, Path, Query},
};
use quota_common::{
    Page, WebhookDeliveryId, WebhookId,
    audit::AuditAction,
    bounds::GRACE_DEFAULT,
    field::WebhookUrl,
    webhook::{
        CreateWebhook, CreatedWebhook, RotateWebhookSecret, UpdateWebhook, Webhook,
        WebhookDelivery, WebhookDeliveryStatus,
    },
};
use uuid::Uuid;

use super::{
    Tag,
    change::{Edit, change_turn, read, read_turn},
    creation::create,
    idempotency::IdempotencyGuard,
    json::{Created, Json, NoContent},
    page::{self, PageSize},
    problem::{ApiError, OrNotFound},
    tenant_rights::{ManagingTenant, ReadingTenant},
};
use crate::{
    db::TenantTx,
    repo::{
        webhook::{self, NewWebhook, WebhookChange, WebhookRow},
        webhook_delivery::{self, DeliveryRow, NewDelivery},
    },
    state::AppState,
    tenant_queue::Turn,
    webhooks::event::Event,
};

pub struct WebhookApi {
    pub state: AppState,
}

impl From<WebhookRow> for Webhook {
    fn from(row: WebhookRow) -> Self {
        Self {
            id: WebhookId(row.id),
            name: row.name,
            url: row.url,
            is_active: row.is_active,
            disabled_reason: row.disabled_reason,
            failing_since: row.failing_since.map(Into::into),
            previous_secret_expires_at: row.previous_secret_expires_at.map(Into::into),
            created_at: row.created_at.into(),
            updated_at: row.updated_at.into(),
        }
    }
}

impl From<DeliveryRow> for WebhookDelivery {
    fn from(row: DeliveryRow) -> Self {
        Self {
            id: WebhookDeliveryId(row.id),
            webhook_id: WebhookId(row.webhook_id),
            event_id: row.event_id,
            event_type: row.event_type,
            // The database allows only the statuses of [`WebhookDeliveryStatus`].
            status: WebhookDeliveryStatus::of(&row.status).unwrap_or(WebhookDeliveryStatus::Failed),
            attempts: u32::try_from(row.attempts).unwrap_or(0),
            response_status: row.response_status.and_then(|it| u32::try_from(it).ok()),
            error: row.error,
            last_attempt_at: row.last_attempt_at.map(Into::into),
            next_attempt_at: row.due_at.map(Into::into),
            payload: serde_json::from_str(&row.payload).unwrap_or_default(),
            created_at: row.created_at.into(),
        }
    }
}

impl WebhookApi {
    fn check_url(&self, url: &WebhookUrl) -> Result<(), ApiError> {
        let checked = self.state.webhooks.check_url(url);
        checked
            .map(drop)
            .map_err(|message| ApiError::invalid("url", message))
    }

    /// Waits for the tenant's turn to request a delivery. Fails if the tenant has recently requested too many
    /// deliveries.
    async fn request_turn(&self, caller: &ManagingTenant) -> Result<Turn, ApiError> {
        let admitted = self.state.webhook_requests.admit(caller.tenant());
        admitted.map_err(|wait| {
            self.state.metrics.guard_rejections.inc();
            ApiError::too_many_webhook_requests(wait)
        })?;
        change_turn(&self.state, caller).await
    }
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::Webhooks")]
impl WebhookApi {
    /// List webhooks
    ///
    /// Returns webhooks, newest first, without their signing secrets.
    #[oai(path = "/webhooks", method = "get", operation_id = "list_webhooks")]
    async fn list(
        &self,
        caller: ReadingTenant,
        /// Page size, 1–100. Default: 20.
        limit: Query<Option<PageSize>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<Webhook>>, ApiError> {
        let slice = page::slice(limit.0, cursor.0.as_deref())?;
        let list = async |tx: &mut TenantTx| webhook::list(tx, slice).await;
        let rows = read(&self.state, &caller, list).await?;
        Ok(Json(page::page(rows, |row| row.id, Webhook::from)))
    }

    /// Create a webhook
    ///
    /// Returns the webhook and its signing secret. This is the only time the secret is available: a replay with the
    /// same `Idempotency-Key` returns everything except the secret. Events that occur after the webhook is created are
    /// sent to its URL.
    #[oai(path = "/webhooks", method = "post", operation_id = "create_webhook")]
    async fn create(
        &self,
        caller: ManagingTenant,
        /// Makes the request safe to retry: repeating it with the same `Idempotency-Key` and body within 24 hours
        /// returns the original response, without the secret.
        #[oai(name = "Idempotency-Key")]
        idempotency_key: Header<Option<String>>,
        body: Json<CreateWebhook>,
    ) -> Result<Created<CreatedWebhook>, ApiError> {
        let body = body.0;
        let idempotency = IdempotencyGuard::new("create_webhook", idempotency_key.0, &body)?;
        self.check_url(&body.url)?;
        let mut secret = None;
        let insert = async |tx: &mut TenantTx| {
            let (tenant, id) = (caller.tenant().0, Uuid::now_v7());
            let generated = self.state.webhooks.generate_secret(tenant, id);
            let generated = generated.map_err(ApiError::internal)?;
            let new = NewWebhook {
                tenant_id: tenant,
                id,
                name: body.name.trim(),
                url: &body.url,
                secret: &generated.encrypted,
            };
            let row = webhook::insert(tx, &new).await?;
            secret = Some(generated.shown);
            Ok(CreatedWebhook {
                secret: None,
                webhook: row.into(),
            })
        };
        let mut created = create(&self.state, &caller, idempotency, insert).await?;
        // A replayed response does not contain the secret.
        created.secret = secret;
        Ok(Created(created))
    }

    /// Get a webhook
    ///
    /// Returns the webhook without its signing secret.
    #[oai(
        path = "/webhooks/:webhook_id",
        method = "get",
        operation_id = "get_webhook"
    )]
    async fn get(
        &self,
        caller: ReadingTenant,
        webhook_id: Path<WebhookId>,
    ) -> Result<Json<Webhook>, ApiError> {
        let find = async |tx: &mut TenantTx| webhook::find(tx, webhook_id.0.0).await;
        let row = read(&self.state, &caller, find).await.or_not_found()?;
        Ok(Json(row.into()))
    }

    /// Update a webhook
    ///
    /// Renames the webhook, changes its URL, disables it, or enables it again. Events that occur while the webhook is
    /// disabled are not sent.
    #[oai(
        path = "/webhooks/:webhook_id",
        method = "patch",
        operation_id = "update_webhook"
    )]
    async fn update(
        &self,
        caller: ManagingTenant,
        webhook_id: Path<WebhookId>,
        body: Json<UpdateWebhook>,
    ) -> Result<Json<Webhook>, ApiError> {
        let id = webhook_id.0.0;
        let body = body.0;
        let mut edit = Edit::begin(&self.state, &caller).await?;
        let before = Webhook::from(webhook::lock(&mut edit, id).await.or_not_found()?);
        if body == UpdateWebhook::default() {
            return Ok(Json(before));
        }
        if let Some(url) = &body.url {
            self.check_url(url)?;
        }
        // A webhook with a new URL, or one that is enabled again, starts without a history of failures.
        let starts_over = body.url.is_some() || body.is_active == Some(true);
        let change = WebhookChange {
            name: body.name.as_deref().map(str::trim),
            url: body.url.as_deref(),
            is_active: body.is_active,
            disabled_reason: (body.is_active == Some(true)).then_some(None),
            failing_since: starts_over.then_some(None),
        };
        let row = webhook::update(&mut edit, id, &change)
            .await
            .or_not_found()?;
        if body.is_active == Some(false) {
            webhook_delivery::cancel(&mut edit, id, "The webhook was disabled.").await?;
        }
        let after = Webhook::from(row);
        let action = AuditAction::WebhookUpdate;
        edit.updated(action, &before, &after, None).await?;
        Ok(Json(after))
    }

    /// Delete a webhook
    ///
    /// Pending deliveries are not sent, and all deliveries are deleted shortly afterward. This cannot be undone.
    #[oai(
        path = "/webhooks/:webhook_id",
        method = "delete",
        operation_id = "delete_webhook"
    )]
    async fn delete(
        &self,
        caller: ManagingTenant,
        webhook_id: Path<WebhookId>,
    ) -> Result<NoContent, ApiError> {
        let mut edit = Edit::begin(&self.state, &caller).await?;
        let last = webhook::delete(&mut edit, webhook_id.0.0)
            .await
            .or_not_found()?;
        edit.deleted(AuditAction::WebhookDelete, &Webhook::from(last), None)
            .await?;
        Ok(NoContent)
    }

    /// Rotate a webhook's signing secret
    ///
    /// Returns a new secret. This is the only time it is available: a replay with the same `Idempotency-Key` returns
    /// everything except the secret. For `grace_seconds`, deliveries are signed with both the previous and the new
    /// secret. If you rotate the secret again during this time, the oldest secret is no longer used.
    #[oai(
        path = "/webhooks/:webhook_id/rotate-secret",
        method = "post",
        operation_id = "rotate_webhook_secret"
    )]
    async fn rotate_secret(
        &self,
        caller: ManagingTenant,
        webhook_id: Path<WebhookId>,
        /// Makes the request safe to retry: repeating it with the same `Idempotency-Key` and body within 24 hours
        /// returns the original response, without the secret.
        #[oai(name = "Idempotency-Key")]
        idempotency_key: Header<Option<String>>,
        body: Json<RotateWebhookSecret>,
    ) -> Result<Json<CreatedWebhook>, ApiError> {
        let id = webhook_id.0.0;
        let body = body.0;
        let idempotency =
            IdempotencyGuard::new("rotate_webhook_secret", idempotency_key.0, &(id, &body))?;
        let mut edit = Edit::begin(&self.state, &caller).await?;
        if let Some(first) = idempotency.replay(&mut edit).await? {
            return Ok(Json(first));
        }
        let before = Webhook::from(webhook::lock(&mut edit, id).await.or_not_found()?);
        let generated = self.state.webhooks.generate_secret(caller.tenant().0, id);
        let generated = generated.map_err(ApiError::internal)?;
        let grace = body
            .grace_seconds
            .unwrap_or_else(|| GRACE_DEFAULT.into())
            .into();
        let row = webhook::rotate_secret(&mut edit, id, &generated.encrypted, grace).await;
        let mut rotated = CreatedWebhook {
            secret: None,
            webhook: Webhook::from(row.or_not_found()?),
        };
        // The stored response must not contain the secret.
        idempotency
            .keep(&mut edit, StatusCode::OK, &rotated)
            .await?;
        let action = AuditAction::WebhookRotateSecret;
        edit.updated(action, &before, &rotated.webhook, None)
            .await?;
        rotated.secret = Some(generated.shown);
        Ok(Json(rotated))
    }

    /// Send a test event
    ///
    /// Sends a `webhook.test` event, even if the webhook is disabled. Returns the delivery before it is sent; list the
    /// deliveries to see the result.
    ///
    /// Each replica accepts at most 30 tests and redeliveries per minute from a tenant.
    #[oai(
        path = "/webhooks/:webhook_id/test",
        method = "post",
        operation_id = "test_webhook"
    )]
    async fn test(
        &self,
        caller: ManagingTenant,
        webhook_id: Path<WebhookId>,
    ) -> Result<Created<WebhookDelivery>, ApiError> {
        let webhook = webhook_id.0.0;
        let event = Event::test(self.state.clock.now());
        let _turn = self.request_turn(&caller).await?;
        let insert = async |tx: &mut TenantTx| {
            // Lock the webhook, so that it cannot be deleted before the insert.
            if webhook::lock(tx, webhook).await?.is_none() {
                return Ok(None);
            }
            if !webhook_delivery::has_room(tx, webhook).await? {
                return Ok(Some(None));
            }
            let new = NewDelivery {
                tenant_id: tx.tenant().0,
                id: Uuid::now_v7(),
                webhook_id: webhook,
                event_id: &event.id,
                event_type: event.kind,
                payload: &event.payload,
            };
            let row = webhook_delivery::insert(tx, &new).await?;
            Ok(Some(Some(row)))
        };
        let row = read(&self.state, &caller, insert).await.or_not_found()?;
        let row = row.ok_or_else(ApiError::too_many_pending)?;
        self.state.webhooks.wake();
        Ok(Created(row.into()))
    }

    /// List a webhook's deliveries
    ///
    /// Returns deliveries, newest first. They are kept for 30 days.
    #[oai(
        path = "/webhooks/:webhook_id/deliveries",
        method = "get",
        operation_id = "list_webhook_deliveries"
    )]
    async fn deliveries(
        &self,
        caller: ReadingTenant,
        webhook_id: Path<WebhookId>,
        /// Include only deliveries with this status.
        status: Query<Option<WebhookDeliveryStatus>>,
        /// Page size, 1–100. Default: 20.
        limit: Query<Option<PageSize>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<WebhookDelivery>>, ApiError> {
        let id = webhook_id.0.0;
        let slice = page::slice(limit.0, cursor.0.as_deref())?;
        let status = status.0.map(WebhookDeliveryStatus::as_str);
        let _turn = read_turn(&self.state, &caller).await?;
        let list = async |tx: &mut TenantTx| {
            if webhook::find(tx, id).await?.is_none() {
                return Ok(None);
            }
            webhook_delivery::list(tx, id, status, slice)
                .await
                .map(Some)
        };
        let rows = read(&self.state, &caller, list).await.or_not_found()?;
        Ok(Json(page::page(rows, |row| row.id, WebhookDelivery::from)))
    }

    /// Redeliver an event
    ///
    /// Sends the event again, regardless of the delivery's status, and even if the webhook is disabled. The event keeps
    /// its ID, so a receiver that has already processed the event can ignore it.
    ///
    /// Each replica accepts at most 30 tests and redeliveries per minute from a tenant.
    #[oai(
        path = "/webhooks/deliveries/:delivery_id/redeliver",
        method = "post",
        operation_id = "redeliver_webhook"
    )]
    async fn redeliver(
        &self,
        caller: ManagingTenant,
        delivery_id: Path<WebhookDeliveryId>,
    ) -> Result<Json<WebhookDelivery>, ApiError> {
        let id = delivery_id.0.0;
        let _turn = self.request_turn(&caller).await?;
        let redeliver = async |tx: &mut TenantTx| {
            let Some(delivery) = webhook_delivery::find(tx, id).await? else {
                return Ok(None);
            };
            // The webhook may no longer exist, because a webhook's deliveries are deleted some time after the webhook.
            if webhook::lock(tx, delivery.webhook_id).await?.is_none() {
                return Ok(None);
            }
            if delivery.due_at.is_none()
                && !webhook_delivery::has_room(tx, delivery.webhook_id).await?
            {
                return Ok(Some(None));
            }
            let row = webhook_delivery::redeliver(tx, id).await?;
            Ok(row.map(Some))
        };
        let row = read(&self.state, &caller, redeliver).await.or_not_found()?;
        let row = row.ok_or_else(ApiError::too_many_pending)?;
        self.state.webhooks.wake();
        Ok(Json(row.into()))
    }
}
