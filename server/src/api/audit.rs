//! `/admin/audit`.

use poem::Result;
use poem_openapi::{OpenApi, param::Query};
use quota_common::{
    AuditEventId, Page, UserId,
    audit::{AuditAction, AuditEvent, AuditTarget},
};

use super::{Tag, json::Json, page, problem::ApiError, tenant_rights::ReadingTenant};
use crate::{
    repo::audit::{self, AuditRow, Filter},
    state::AppState,
};

pub struct AuditApi {
    pub state: AppState,
}

fn show((row, email): (AuditRow, Option<String>)) -> AuditEvent {
    // Of an event from before there were names, what it tells by itself.
    let name = row.target_name.or_else(|| {
        let fields = [&row.after, &row.before].into_iter().flatten();
        let mut names = fields.filter_map(|it| it.get("name")?.as_str());
        names.next().map(str::to_owned)
    });
    AuditEvent {
        id: AuditEventId(row.id),
        at: row.at.into(),
        user_id: row.user_id.map(UserId),
        user_email: email,
        action: row.action,
        target_type: row.target_type,
        target_id: row.target_id,
        target_name: name,
        ip: row.ip.map(|ip| ip.addr().to_string()),
        before: row.before,
        after: row.after,
    }
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::Audit")]
impl AuditApi {
    /// List audit events
    ///
    /// Returns configuration changes, newest first: who changed what, when and from which address.
    #[oai(path = "/audit", method = "get", operation_id = "list_audit_events")]
    async fn list(
        &self,
        caller: ReadingTenant,
        /// Only events with this action.
        action: Query<Option<AuditAction>>,
        /// Only changes to resources of this type.
        target_type: Query<Option<AuditTarget>>,
        /// Only changes to the resource with this ID.
        #[oai(validator(max_length = 64))]
        target_id: Query<Option<String>>,
        /// Page size, 1–100. Default 20.
        #[oai(validator(minimum(value = "1"), maximum(value = "100")))]
        limit: Query<Option<u32>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<AuditEvent>>, ApiError> {
        let slice = page::slice(limit.0, cursor.0.as_deref())?;
        let target_id = target_id.0.filter(|text| !text.is_empty());
        if target_id.as_ref().is_some_and(|text| text.contains('\0')) {
            return Err(ApiError::invalid(
                "target_id",
                "must not contain NUL characters",
            ));
        }
        let filter = Filter {
            action: action.0.map(AuditAction::as_str),
            target_type: target_type.0.map(AuditTarget::as_str),
            target_id: target_id.as_deref(),
        };
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let rows = audit::list(&mut tx, &filter, slice).await?;
        tx.commit().await?;
        Ok(Json(page::page(rows, |(row, _)| row.id, show)))
    }
}
