//! `/admin/api-keys`.

use chrono::{DateTime, TimeDelta, Utc};
use poem::{Result, http::StatusCode};
use poem_openapi::{
    OpenApi,
    param::{Header, Path, Query},
};
use quota_common::{
    ApiKeyId, FieldError, Page, PlanId, ProblemCode, Timestamp,
    api_key::{ApiKey, ApiKeyStatus, CreateApiKey, CreatedApiKey, RotateApiKey, UpdateApiKey},
    audit::AuditAction,
    bounds::GRACE_DEFAULT,
    field::Metadata,
    page::ApiKeyOrder,
};
use serde_json::Value;
use uuid::Uuid;

use super::{
    Tag, allowance,
    change::{Edit, read, read_turn},
    creation::create,
    fill_time,
    idempotency::IdempotencyGuard,
    json::{Created, Json, NoContent},
    page::{self, PageSize},
    problem::{ApiError, OrNotFound},
    tenant_rights::{ManagingTenant, ReadingTenant},
};
use crate::{
    db::{DbError, TenantTx},
    repo::{
        Order, SortBy,
        api_key::{self, ApiKeyChange, ApiKeyRow, NewApiKey},
        api_key_list::{self, Filter},
        invalidation::Target,
    },
    secret_text::{Kind, SecretText},
    state::AppState,
};

pub struct ApiKeyApi {
    pub state: AppState,
}

impl From<ApiKeyRow> for ApiKey {
    fn from(row: ApiKeyRow) -> Self {
        Self {
            id: ApiKeyId(row.id),
            name: row.name,
            plan_id: PlanId(row.plan_id),
            prefix: row.prefix,
            is_active: row.is_active,
            expires_at: row.expires_at.map(Into::into),
            rpm_override: row.rpm_override.and_then(|rpm| u32::try_from(rpm).ok()),
            external_id: row.external_id,
            metadata: serde_json::from_value(row.metadata).unwrap_or_default(),
            last_used_at: row.last_used_at.map(Into::into),
            previous_expires_at: row.previous_expires_at.map(Into::into),
            created_at: row.created_at.into(),
            updated_at: row.updated_at.into(),
        }
    }
}

fn order(sort: ApiKeyOrder) -> Order {
    let (by, descending) = match sort {
        ApiKeyOrder::Newest => (SortBy::CreatedAt, true),
        ApiKeyOrder::Oldest => (SortBy::CreatedAt, false),
        ApiKeyOrder::Name => (SortBy::Name, false),
        ApiKeyOrder::NameReversed => (SortBy::Name, true),
        ApiKeyOrder::LastUsed => (SortBy::LastUsed, true),
        ApiKeyOrder::LeastRecentlyUsed => (SortBy::LastUsed, false),
    };
    Order { by, descending }
}

/// Converts metadata to its stored form.
fn stored(metadata: &Metadata) -> Value {
    metadata
        .iter()
        .map(|(name, value)| (name.clone(), Value::from(value.as_str())))
        .collect()
}

/// Returns the time at which the previous secret expires: at the end of its grace period or together with the key,
/// whichever is earlier.
fn previous_expiry(key: &ApiKey) -> Option<Timestamp> {
    let grace = key.previous_expires_at?;
    Some(key.expires_at.map_or(grace, |own| own.min(grace)))
}

fn previous_key_active(until: Timestamp) -> ApiError {
    let detail = format!(
        "The previous secret is valid until {until}. Rotate again after that, or send replace_previous: true to revoke that secret now."
    );
    ApiError {
        errors: vec![FieldError {
            field: "replace_previous".into(),
            message: "must be true to revoke the previous secret".into(),
        }],
        ..ApiError::new(ProblemCode::PreviousKeyActive, detail)
    }
}

/// Converts a database error. If the plan does not exist or belongs to another tenant, the error is 404 and names
/// `plan_id`.
fn plan_not_found(error: DbError) -> ApiError {
    let not_found = || {
        let mut problem = ApiError::not_found();
        problem.errors.push(FieldError {
            field: "plan_id".into(),
            message: "no such plan".into(),
        });
        problem
    };
    ApiError::on_constraint(error, &[("api_keys_plan_fkey", not_found)])
}

impl ApiKeyApi {
    fn now(&self) -> DateTime<Utc> {
        DateTime::from_timestamp_nanos(i64::try_from(self.state.clock.now().0).unwrap_or(i64::MAX))
    }

    /// Rejects an expiration time in the past, which is most likely a mistake.
    fn check_expiry(&self, at: Option<Timestamp>) -> Result<(), ApiError> {
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
    /// Returns keys, without their secrets, in the order given by `sort` (default: newest first). A cursor is valid
    /// only with the `sort` for which it was issued. When sorting by last use, a key that is used while you page
    /// through the list may be skipped or repeated.
    #[oai(path = "/api-keys", method = "get", operation_id = "list_api_keys")]
    #[expect(
        clippy::too_many_arguments,
        reason = "a handler has one argument per parameter"
    )]
    async fn list(
        &self,
        caller: ReadingTenant,
        /// Include only keys on this plan.
        plan_id: Query<Option<PlanId>>,
        /// Include only keys with this status. Every key has exactly one status.
        status: Query<Option<ApiKeyStatus>>,
        /// Include only keys whose `is_active` has this value, whether or not they have expired. To exclude expired
        /// keys, use `status=active`.
        is_active: Query<Option<bool>>,
        /// Include only expired keys (`true`) or only keys that have not expired (`false`), whether or not they are
        /// deactivated.
        is_expired: Query<Option<bool>>,
        /// Include only keys with this external ID.
        #[oai(validator(min_length = 1, max_length = 200))]
        external_id: Query<Option<String>>,
        /// Include only keys whose `prefix` or external ID starts with this string, or whose name contains it.
        #[oai(validator(max_length = 200))]
        search: Query<Option<String>>,
        /// Sort field; prefix with `-` for descending. Names are compared case-insensitively. Keys that have never been
        /// used count as the least recently used. Default: `-created_at`.
        sort: Query<Option<ApiKeyOrder>>,
        /// Page size, 1–100. Default: 20.
        limit: Query<Option<PageSize>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<ApiKey>>, ApiError> {
        let order = order(sort.0.unwrap_or_default());
        let slice = page::sorted(order, limit.0, cursor.0.as_deref())?;
        let external_id = page::filter("external_id", external_id.0)?;
        let search = page::filter("search", search.0)?;
        let filter = Filter {
            plan_id: plan_id.0.map(Uuid::from),
            status: status.0,
            is_active: is_active.0,
            is_expired: is_expired.0,
            now: self.now(),
            external_id: external_id.as_deref(),
            search: search.as_deref(),
        };
        let _turn = read_turn(&self.state, &caller).await?;
        let matches = match filter.search {
            None => None,
            Some(_) => {
                let mut tx = self.state.db.system().await?;
                let matches = api_key_list::search(&mut tx, caller.tenant(), &filter).await?;
                tx.commit().await?;
                Some(matches)
            }
        };
        let list = async |tx: &mut TenantTx| {
            api_key_list::list(tx, &filter, matches.as_ref(), &slice).await
        };
        let rows = read(&self.state, &caller, list).await?;
        Ok(Json(page::sorted_page(rows, order)))
    }

    /// Create an API key
    ///
    /// Returns the full key. This is the only time it is available: a replay with the same `Idempotency-Key` returns
    /// everything except the key.
    #[oai(path = "/api-keys", method = "post", operation_id = "create_api_key")]
    async fn create(
        &self,
        caller: ManagingTenant,
        /// Makes the request safe to retry: repeating it with the same `Idempotency-Key` and body within 24 hours
        /// returns the original response, without the API key.
        #[oai(name = "Idempotency-Key")]
        idempotency_key: Header<Option<String>>,
        body: Json<CreateApiKey>,
    ) -> Result<Created<CreatedApiKey>, ApiError> {
        let body = body.0;
        let idempotency = IdempotencyGuard::new("create_api_key", idempotency_key.0, &body)?;
        let mut secret = None;
        let insert = async |tx: &mut TenantTx| {
            self.check_expiry(body.expires_at)?;
            let generated = SecretText::generate(Kind::ApiKey)?;
            let new = NewApiKey {
                tenant_id: caller.tenant().0,
                id: Uuid::now_v7(),
                plan_id: body.plan_id.0,
                name: body.name.trim(),
                prefix: &generated.prefix(),
                key_hash: &generated.hash(),
                expires_at: body.expires_at.map(Into::into),
                rpm_override: body.rpm_override.map(Into::into),
                external_id: body.external_id.as_deref(),
                metadata: stored(&body.metadata.clone().unwrap_or_default()),
            };
            let row = api_key::insert(tx, &new).await.map_err(plan_not_found)?;
            let api_key = ApiKey::from(row);
            allowance::check_key(&self.state.config, tx, &api_key, None).await?;
            fill_time::check_key(tx, &api_key).await?;
            secret = Some(generated);
            Ok(CreatedApiKey { key: None, api_key })
        };
        let mut created = create(&self.state, &caller, idempotency, insert).await?;
        // A replayed response does not contain the secret.
        if let Some(secret) = secret {
            self.state.keys.created(&secret);
            created.key = Some(secret.reveal());
        }
        Ok(Created(created))
    }

    /// Get an API key
    ///
    /// Returns the key's settings, without its secret.
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
        let find = async |tx: &mut TenantTx| api_key::find(tx, key_id.0.0).await;
        let row = read(&self.state, &caller, find).await.or_not_found()?;
        Ok(Json(row.into()))
    }

    /// Update an API key
    ///
    /// Renames the key, moves it to another plan, activates or deactivates it, or changes its expiration time, rate,
    /// external ID or metadata. Takes effect on all replicas within one second.
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
        let config = &self.state.config;
        let mut edit = Edit::begin(&self.state, &caller).await?;
        allowance::lock_rates(config, &mut edit).await?;
        let before = ApiKey::from(api_key::lock(&mut edit, id).await.or_not_found()?);
        if body == UpdateApiKey::default() {
            return Ok(Json(before));
        }
        self.check_expiry(body.expires_at.flatten())?;
        let change = ApiKeyChange {
            name: body.name.as_deref().map(str::trim),
            plan_id: body.plan_id.map(Uuid::from),
            is_active: body.is_active,
            expires_at: body.expires_at.map(|at| at.map(Into::into)),
            rpm_override: body.rpm_override.map(|rpm| rpm.map(Into::into)),
            external_id: body.external_id.map(|it| it.map(Into::into)),
            metadata: body.metadata.as_ref().map(stored),
        };
        let row = api_key::update(&mut edit, id, &change)
            .await
            .map_err(plan_not_found)?
            .ok_or_else(ApiError::not_found)?;
        let after = ApiKey::from(row);
        if (before.plan_id, before.rpm_override) != (after.plan_id, after.rpm_override) {
            allowance::check_key(config, &mut edit, &after, Some(&before)).await?;
            fill_time::check_key(&mut edit, &after).await?;
        }
        let action = AuditAction::ApiKeyUpdate;
        edit.updated(action, &before, &after, Target::ApiKey(id))
            .await?;
        Ok(Json(after))
    }

    /// Delete an API key
    ///
    /// The key stops working on all replicas within one second, and its quota usage is discarded. This cannot be
    /// undone.
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
        let mut edit = Edit::begin(&self.state, &caller).await?;
        let last = ApiKey::from(api_key::delete(&mut edit, id).await.or_not_found()?);
        edit.deleted(AuditAction::ApiKeyDelete, &last, Some(Target::ApiKey(id)))
            .await?;
        Ok(NoContent)
    }

    /// Rotate an API key
    ///
    /// Returns the full key with a new secret. This is the only time it is available: a replay with the same
    /// `Idempotency-Key` returns everything except the key. The previous secret keeps working for `grace_seconds`;
    /// requests with either secret count against the same limits. During this time, another rotation fails with 409
    /// unless `replace_previous` is true, because there can be only one previous secret.
    #[oai(
        path = "/api-keys/:key_id/rotate",
        method = "post",
        operation_id = "rotate_api_key"
    )]
    async fn rotate(
        &self,
        caller: ManagingTenant,
        key_id: Path<ApiKeyId>,
        /// Makes the request safe to retry: repeating it with the same `Idempotency-Key` and body within 24 hours
        /// returns the original response, without the API key.
        #[oai(name = "Idempotency-Key")]
        idempotency_key: Header<Option<String>>,
        body: Json<RotateApiKey>,
    ) -> Result<Json<CreatedApiKey>, ApiError> {
        let id = key_id.0.0;
        let body = body.0;
        let idempotency = IdempotencyGuard::new("rotate_api_key", idempotency_key.0, &(id, &body))?;
        let mut edit = Edit::begin(&self.state, &caller).await?;
        if let Some(first) = idempotency.replay(&mut edit).await? {
            return Ok(Json(first));
        }
        let before = ApiKey::from(api_key::lock(&mut edit, id).await.or_not_found()?);
        let now = Timestamp::from(self.now());
        if let Some(until) = previous_expiry(&before).filter(|until| *until > now)
            && body.replace_previous != Some(true)
        {
            return Err(previous_key_active(until));
        }
        let secret = SecretText::generate(Kind::ApiKey)?;
        let grace = body.grace_seconds.map_or(GRACE_DEFAULT, Into::into);
        let until = (grace > 0).then(|| self.now() + TimeDelta::seconds(grace.into()));
        let (prefix, hash) = (secret.prefix(), secret.hash());
        let row = api_key::rotate(&mut edit, id, &prefix, &hash, until).await;
        let mut rotated = CreatedApiKey {
            key: None,
            api_key: ApiKey::from(row.or_not_found()?),
        };
        // The stored response must not contain the secret.
        idempotency
            .keep(&mut edit, StatusCode::OK, &rotated)
            .await?;
        let action = AuditAction::ApiKeyRotate;
        edit.updated(action, &before, &rotated.api_key, Target::ApiKey(id))
            .await?;
        self.state.keys.created(&secret);
        rotated.key = Some(secret.reveal());
        Ok(Json(rotated))
    }
}
