//! `/admin/service-tokens`.

use poem::Result;
use poem_openapi::{
    OpenApi,
    param::{Header, Path, Query},
};
use quota_common::{
    Page, ServiceTokenId,
    service_token::{CreateServiceToken, CreatedServiceToken, ServiceToken},
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
        revocation::{self, Target},
        service_token::{self, NewServiceToken, ServiceTokenRow},
    },
    secret_text::{Kind, SecretText},
    state::AppState,
};

pub struct ServiceTokenApi {
    pub state: AppState,
}

fn show(row: ServiceTokenRow) -> ServiceToken {
    ServiceToken {
        id: ServiceTokenId(row.id),
        name: row.name,
        prefix: row.prefix,
        last_used_at: row.last_used_at.map(Into::into),
        created_at: row.created_at.into(),
    }
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::ServiceTokens")]
impl ServiceTokenApi {
    /// List service tokens
    ///
    /// Returns tokens newest first. The token itself is never returned.
    #[oai(
        path = "/service-tokens",
        method = "get",
        operation_id = "list_service_tokens"
    )]
    async fn list(
        &self,
        caller: ReadingTenant,
        /// Page size, 1–100. Default 20.
        #[oai(validator(minimum(value = "1"), maximum(value = "100")))]
        limit: Query<Option<u32>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<ServiceToken>>, ApiError> {
        let slice = page::slice(limit.0, cursor.0.as_deref())?;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let rows = service_token::list(&mut tx, slice).await?;
        tx.commit().await?;
        Ok(Json(page::page(rows, |row| row.id, show)))
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
        /// Makes the request safe to retry: the same key and body within 24 hours return the first response again,
        /// without the token.
        #[oai(name = "Idempotency-Key")]
        idempotency_key: Header<Option<String>>,
        body: Json<CreateServiceToken>,
    ) -> Result<Created<CreatedServiceToken>, ApiError> {
        let once = Once::new("create_service_token", idempotency_key.0, &body.0)?;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        if let Some(answer) = once.replay(&mut tx).await? {
            return Ok(Created(answer));
        }
        let text = SecretText::generate(Kind::ServiceToken)?;
        let new = NewServiceToken {
            tenant_id: caller.tenant().0,
            id: Uuid::now_v7(),
            name: body.0.name.trim(),
            prefix: &text.prefix(),
            token_hash: &text.hash(),
        };
        let row = service_token::insert(&mut tx, &new).await?;
        let mut made = CreatedServiceToken {
            token: None,
            service_token: show(row),
        };
        let event = Change {
            action: "service_token.create",
            target_type: "service_token",
            target: &made.service_token.id,
            name: &made.service_token.name,
            before: None,
            after: change::whole(&made.service_token),
        };
        change::record(&mut tx, &caller, event).await?;
        once.keep(&mut tx, &made).await?;
        tx.commit().await?;
        self.state.keys.made(&text);
        made.token = Some(text.reveal());
        Ok(Created(made))
    }

    /// Get a service token
    ///
    /// The token itself is never returned.
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
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let row = service_token::find(&mut tx, token_id.0.0)
            .await?
            .ok_or_else(ApiError::not_found)?;
        tx.commit().await?;
        Ok(Json(show(row)))
    }

    /// Delete a service token
    ///
    /// The token stops working immediately. This cannot be undone.
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
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let before = service_token::delete(&mut tx, id)
            .await?
            .ok_or_else(ApiError::not_found)?;
        let before = show(before);
        let event = Change {
            action: "service_token.delete",
            target_type: "service_token",
            target: &before.id,
            name: &before.name,
            before: change::whole(&before),
            after: None,
        };
        change::record(&mut tx, &caller, event).await?;
        let revoked = revocation::insert(&mut tx, Target::ServiceToken(id)).await?;
        tx.commit().await?;
        self.state.revoked(&revoked);
        Ok(NoContent)
    }
}
