//! `/admin/service-tokens`.

use poem::Result;
use poem_openapi::{
    OpenApi,
    param::{Header, Path, Query},
};
use quota_common::{
    Page, ServiceTokenId,
    audit::AuditAction,
    service_token::{CreateServiceToken, CreatedServiceToken, ServiceToken},
};
use uuid::Uuid;

use super::{
    Tag,
    change::{Edit, read},
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
        invalidation::Target,
        service_token::{self, NewServiceToken, ServiceTokenRow},
    },
    secret_text::{Kind, SecretText},
    state::AppState,
};

pub struct ServiceTokenApi {
    pub state: AppState,
}

impl From<ServiceTokenRow> for ServiceToken {
    fn from(row: ServiceTokenRow) -> Self {
        Self {
            id: ServiceTokenId(row.id),
            name: row.name,
            prefix: row.prefix,
            last_used_at: row.last_used_at.map(Into::into),
            created_at: row.created_at.into(),
        }
    }
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::ServiceTokens")]
impl ServiceTokenApi {
    /// List service tokens
    ///
    /// Returns service tokens, newest first, without their secrets.
    #[oai(
        path = "/service-tokens",
        method = "get",
        operation_id = "list_service_tokens"
    )]
    async fn list(
        &self,
        caller: ReadingTenant,
        /// Page size, 1–100. Default: 20.
        limit: Query<Option<PageSize>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<ServiceToken>>, ApiError> {
        let slice = page::slice(limit.0, cursor.0.as_deref())?;
        let list = async |tx: &mut TenantTx| service_token::list(tx, slice).await;
        let rows = read(&self.state, &caller, list).await?;
        Ok(Json(page::page(rows, |row| row.id, ServiceToken::from)))
    }

    /// Create a service token
    ///
    /// Returns the full token. This is the only time it is available: a replay with the same `Idempotency-Key` returns
    /// everything except the token.
    #[oai(
        path = "/service-tokens",
        method = "post",
        operation_id = "create_service_token"
    )]
    async fn create(
        &self,
        caller: ManagingTenant,
        /// Makes the request safe to retry: repeating it with the same `Idempotency-Key` and body within 24 hours
        /// returns the original response, without the token.
        #[oai(name = "Idempotency-Key")]
        idempotency_key: Header<Option<String>>,
        body: Json<CreateServiceToken>,
    ) -> Result<Created<CreatedServiceToken>, ApiError> {
        let idempotency =
            IdempotencyGuard::new("create_service_token", idempotency_key.0, &body.0)?;
        let mut secret = None;
        let insert = async |tx: &mut TenantTx| {
            let generated = SecretText::generate(Kind::ServiceToken)?;
            let new = NewServiceToken {
                tenant_id: caller.tenant().0,
                id: Uuid::now_v7(),
                name: body.0.name.trim(),
                prefix: &generated.prefix(),
                token_hash: &generated.hash(),
            };
            let row = service_token::insert(tx, &new).await?;
            secret = Some(generated);
            Ok(CreatedServiceToken {
                token: None,
                service_token: row.into(),
            })
        };
        let mut created = create(&self.state, &caller, idempotency, insert).await?;
        // A replayed response does not contain the secret.
        if let Some(secret) = secret {
            self.state.keys.created(&secret);
            created.token = Some(secret.reveal());
        }
        Ok(Created(created))
    }

    /// Get a service token
    ///
    /// Returns the service token without its secret.
    #[oai(
        path = "/service-tokens/:token_id",
        method = "get",
        operation_id = "get_service_token"
    )]
    async fn get(
        &self,
        caller: ReadingTenant,
        token_id: Path<ServiceTokenId>,
    ) -> Result<Json<ServiceToken>, ApiError> {
        let find = async |tx: &mut TenantTx| service_token::find(tx, token_id.0.0).await;
        let row = read(&self.state, &caller, find).await.or_not_found()?;
        Ok(Json(row.into()))
    }

    /// Delete a service token
    ///
    /// The token stops working on all replicas within one second. This cannot be undone.
    #[oai(
        path = "/service-tokens/:token_id",
        method = "delete",
        operation_id = "delete_service_token"
    )]
    async fn delete(
        &self,
        caller: ManagingTenant,
        token_id: Path<ServiceTokenId>,
    ) -> Result<NoContent, ApiError> {
        let id = token_id.0.0;
        let mut edit = Edit::begin(&self.state, &caller).await?;
        let last = service_token::delete(&mut edit, id).await.or_not_found()?;
        let last = ServiceToken::from(last);
        let action = AuditAction::ServiceTokenDelete;
        edit.deleted(action, &last, Some(Target::ServiceToken(id)))
            .await?;
        Ok(NoContent)
    }
}
