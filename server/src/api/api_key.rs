//! `/admin/api-keys`.

use chrono::{DateTime, TimeDelta, Utc};
use poem::Result;
use poem_openapi::{
    OpenApi,
    param::{Header, Path, Query},
};
use quota_common::{
    ApiKeyId, Page, PlanId, Timestamp,
    api_key::{ApiKey, CreateApiKey, CreatedApiKey, GRACE_DEFAULT, RotateApiKey, UpdateApiKey},
    page::ApiKeyOrder,
};
use uuid::Uuid;

use super::{
    Tag,
    change::{self, Change},
    idempotency::Once,
    json::{Created, Json, NoContent},
    page,
    problem::ApiError,
    tenant_rights::{ManagingTenant, ReadingTenant},
};
use crate::{
    repo::{
        By, Mark, Order,
        api_key::{self, ApiKeyChange, ApiKeyRow, Filter, NewApiKey},
        revocation::{self, Target},
    },
    secret_text::{Kind, SecretText},
    state::AppState,
};

pub struct ApiKeyApi {
    pub state: AppState,
}

fn show(row: ApiKeyRow) -> ApiKey {
    ApiKey {
        id: ApiKeyId(row.id),
        name: row.name,
        plan_id: PlanId(row.plan_id),
        prefix: row.prefix,
        is_active: row.is_active,
        expires_at: row.expires_at.map(Into::into),
        rpm_override: row.rpm_override.and_then(|rpm| u32::try_from(rpm).ok()),
        last_used_at: row.last_used_at.map(Into::into),
        previous_expires_at: row.previous_expires_at.map(Into::into),
        created_at: row.created_at.into(),
        updated_at: row.updated_at.into(),
    }
}

fn order(sort: ApiKeyOrder) -> Order {
    let (by, descending) = match sort {
        ApiKeyOrder::Newest => (By::Made, true),
        ApiKeyOrder::Oldest => (By::Made, false),
        ApiKeyOrder::Name => (By::Name, false),
        ApiKeyOrder::NameReversed => (By::Name, true),
        ApiKeyOrder::LastUsed => (By::LastUsed, true),
        ApiKeyOrder::LeastRecentlyUsed => (By::LastUsed, false),
    };
    Order { by, descending }
}

/// The problem for a plan that does not exist or belongs to another tenant.
fn no_such_plan() -> ApiError {
    let mut error = ApiError::not_found();
    error.errors.push(quota_common::FieldError {
        field: "plan_id".into(),
        message: "no such plan".into(),
    });
    error
}

impl ApiKeyApi {
    fn now(&self) -> DateTime<Utc> {
        DateTime::from_timestamp_nanos(i64::try_from(self.state.clock.now().0).unwrap_or(i64::MAX))
    }

    /// A key that is made to be expired is a mistake.
    fn in_the_future(&self, at: Option<Timestamp>) -> Result<(), ApiError> {
        match at {
            Some(at) if at.inner() <= self.now() => {
                Err(ApiError::invalid("expires_at", "must be in the future"))
            }
            _ => Ok(()),
        }
    }
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::ApiKeys")]
impl ApiKeyApi {
    /// List API keys
    ///
    /// Returns keys newest first, or as `sort` says. The key itself is never returned. A cursor is only valid with the
    /// sort it was issued for; when sorting by last use, a key that is used between two pages may move.
    #[oai(path = "/api-keys", method = "get", operation_id = "list_api_keys")]
    #[expect(
        clippy::too_many_arguments,
        reason = "an operation has as many arguments as it has parameters"
    )]
    async fn list(
        &self,
        caller: ReadingTenant,
        /// Only keys on this plan.
        plan_id: Query<Option<PlanId>>,
        /// Only active keys (`true`) or only inactive keys (`false`).
        is_active: Query<Option<bool>>,
        /// Only expired keys (`true`) or only keys that have not expired (`false`).
        is_expired: Query<Option<bool>>,
        /// Substring of the name, or prefix of the key.
        #[oai(validator(max_length = 200))]
        search: Query<Option<String>>,
        /// Sort field; prefix with `-` for descending. Names are compared case-insensitively; keys that were never
        /// used sort as the least recently used. Default: `-created_at`.
        sort: Query<Option<ApiKeyOrder>>,
        /// Page size, 1–100. Default 20.
        #[oai(validator(minimum(value = "1"), maximum(value = "100")))]
        limit: Query<Option<u32>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<ApiKey>>, ApiError> {
        let order = order(sort.0.unwrap_or_default());
        let slice = page::sorted(order, limit.0, cursor.0.as_deref())?;
        let search = search.0.filter(|text| !text.is_empty());
        if search.as_ref().is_some_and(|text| text.contains('\0')) {
            return Err(ApiError::invalid(
                "search",
                "must not contain NUL characters",
            ));
        }
        let filter = Filter {
            plan_id: plan_id.0.map(Uuid::from),
            is_active: is_active.0,
            is_expired: is_expired.0.map(|it| (it, self.now())),
            search: search.as_deref(),
        };
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let rows = api_key::list(&mut tx, &filter, &slice).await?;
        tx.commit().await?;
        let at = |row: &ApiKeyRow, by| {
            let mark = match by {
                By::Made => Mark::Made,
                By::Name => Mark::Name(row.name.clone()),
                By::LastUsed => Mark::LastUsed(row.last_used_at),
            };
            (mark, row.id)
        };
        Ok(Json(page::sorted_page(rows, order, at, show)))
    }

    /// Create an API key
    ///
    /// Returns the full key. This is the only time it is available: a replay with the same `Idempotency-Key` returns
    /// everything except the key.
    #[oai(path = "/api-keys", method = "post", operation_id = "create_api_key")]
    async fn create(
        &self,
        caller: ManagingTenant,
        /// Makes the request safe to retry: the same key and body within 24 hours return the first response again,
        /// without the API key.
        #[oai(name = "Idempotency-Key")]
        idempotency_key: Header<Option<String>>,
        body: Json<CreateApiKey>,
    ) -> Result<Created<CreatedApiKey>, ApiError> {
        let body = body.0;
        let once = Once::new("create_api_key", idempotency_key.0, &body)?;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        if let Some(answer) = once.replay(&mut tx).await? {
            return Ok(Created(answer));
        }
        self.in_the_future(body.expires_at)?;
        let text = SecretText::generate(Kind::ApiKey)?;
        let new = NewApiKey {
            tenant_id: caller.tenant().0,
            id: Uuid::now_v7(),
            plan_id: body.plan_id.0,
            name: body.name.trim(),
            prefix: &text.prefix(),
            key_hash: &text.hash(),
            expires_at: body.expires_at.map(Into::into),
            rpm_override: body.rpm_override.and_then(|rpm| i32::try_from(rpm).ok()),
        };
        let row = api_key::insert(&mut tx, &new).await.map_err(|error| {
            ApiError::on_constraint(error, &[("api_keys_plan_fkey", no_such_plan)])
        })?;
        let mut made = CreatedApiKey {
            key: None,
            api_key: show(row),
        };
        let event = Change {
            action: "api_key.create",
            target_type: "api_key",
            target: &made.api_key.id,
            name: &made.api_key.name,
            before: None,
            after: change::whole(&made.api_key),
        };
        change::record(&mut tx, &caller, event).await?;
        once.keep(&mut tx, &made).await?;
        tx.commit().await?;
        self.state.keys.made(&text);
        made.key = Some(text.reveal());
        Ok(Created(made))
    }

    /// Get an API key
    ///
    /// The key itself is never returned.
    #[oai(
        path = "/api-keys/:key_id",
        method = "get",
        operation_id = "get_api_key"
    )]
    async fn get(
        &self,
        caller: ReadingTenant,
        key_id: Path<ApiKeyId>,
    ) -> Result<Json<ApiKey>, ApiError> {
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let row = api_key::find(&mut tx, key_id.0.0)
            .await?
            .ok_or_else(ApiError::not_found)?;
        tx.commit().await?;
        Ok(Json(show(row)))
    }

    /// Update an API key
    ///
    /// Renames the key, moves it to another plan, disables it, or changes its expiry or rate. Takes effect on all
    /// replicas within one second.
    #[oai(
        path = "/api-keys/:key_id",
        method = "patch",
        operation_id = "update_api_key"
    )]
    async fn update(
        &self,
        caller: ManagingTenant,
        key_id: Path<ApiKeyId>,
        body: Json<UpdateApiKey>,
    ) -> Result<Json<ApiKey>, ApiError> {
        let id = key_id.0.0;
        let body = body.0;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let before = show(
            api_key::lock(&mut tx, id)
                .await?
                .ok_or_else(ApiError::not_found)?,
        );
        if body == UpdateApiKey::default() {
            return Ok(Json(before));
        }
        self.in_the_future(body.expires_at.flatten())?;
        let set = ApiKeyChange {
            name: body.name.as_deref().map(str::trim),
            plan_id: body.plan_id.map(Uuid::from),
            is_active: body.is_active,
            expires_at: body.expires_at.map(|at| at.map(Into::into)),
            rpm_override: body
                .rpm_override
                .map(|rpm| rpm.and_then(|rpm| i32::try_from(rpm).ok())),
        };
        let row = api_key::update(&mut tx, id, &set)
            .await
            .map_err(|error| {
                ApiError::on_constraint(error, &[("api_keys_plan_fkey", no_such_plan)])
            })?
            .ok_or_else(ApiError::not_found)?;
        let after = show(row);
        let (was, is) = change::difference(&before, &after);
        let event = Change {
            action: "api_key.update",
            target_type: "api_key",
            target: &after.id,
            name: &after.name,
            before: was,
            after: is,
        };
        change::record(&mut tx, &caller, event).await?;
        let revoked = revocation::insert(&mut tx, Target::ApiKey(id)).await?;
        tx.commit().await?;
        self.state.revoked(&revoked);
        Ok(Json(after))
    }

    /// Delete an API key
    ///
    /// The key stops working immediately and its quota usage is discarded. This cannot be undone.
    #[oai(
        path = "/api-keys/:key_id",
        method = "delete",
        operation_id = "delete_api_key"
    )]
    async fn delete(
        &self,
        caller: ManagingTenant,
        key_id: Path<ApiKeyId>,
    ) -> Result<NoContent, ApiError> {
        let id = key_id.0.0;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let before = show(
            api_key::lock(&mut tx, id)
                .await?
                .ok_or_else(ApiError::not_found)?,
        );
        api_key::delete(&mut tx, id).await?;
        let event = Change {
            action: "api_key.delete",
            target_type: "api_key",
            target: &before.id,
            name: &before.name,
            before: change::whole(&before),
            after: None,
        };
        change::record(&mut tx, &caller, event).await?;
        let revoked = revocation::insert(&mut tx, Target::ApiKey(id)).await?;
        tx.commit().await?;
        self.state.revoked(&revoked);
        Ok(NoContent)
    }

    /// Rotate an API key
    ///
    /// Returns a new key. This is the only time it is available. The previous key keeps working for `grace_seconds`;
    /// both count against the same limits.
    #[oai(
        path = "/api-keys/:key_id/rotate",
        method = "post",
        operation_id = "rotate_api_key"
    )]
    async fn rotate(
        &self,
        caller: ManagingTenant,
        key_id: Path<ApiKeyId>,
        body: Json<RotateApiKey>,
    ) -> Result<Json<CreatedApiKey>, ApiError> {
        let id = key_id.0.0;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let before = show(
            api_key::lock(&mut tx, id)
                .await?
                .ok_or_else(ApiError::not_found)?,
        );
        let text = SecretText::generate(Kind::ApiKey)?;
        let grace = i64::from(body.0.grace_seconds.unwrap_or(GRACE_DEFAULT));
        let until = (grace > 0).then(|| self.now() + TimeDelta::seconds(grace));
        let row = api_key::rotate(&mut tx, id, &text.prefix(), &text.hash(), until)
            .await?
            .ok_or_else(ApiError::not_found)?;
        let after = show(row);
        let (was, is) = change::difference(&before, &after);
        let event = Change {
            action: "api_key.rotate",
            target_type: "api_key",
            target: &after.id,
            name: &after.name,
            before: was,
            after: is,
        };
        change::record(&mut tx, &caller, event).await?;
        let revoked = revocation::insert(&mut tx, Target::ApiKey(id)).await?;
        tx.commit().await?;
        self.state.revoked(&revoked);
        self.state.keys.made(&text);
        Ok(Json(CreatedApiKey {
            key: Some(text.reveal()),
            api_key: after,
        }))
    }
}
