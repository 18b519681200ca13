//! `/admin/audit`.

use poem::Result;
use poem_openapi::{OpenApi, param::Query};
use quota_common::{
    AuditEventId, Page, UserId,
    audit::{AuditAction, AuditEvent, AuditTarget},
};

use super::{Tag, admitted::AdmittedTenant, json::Json, page, problem::ApiError};
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
    /// Who changed what, when, from where; newest first.
    #[oai(path = "/audit", method = "get", operation_id = "list_audit_events")]
    async fn list(
        &self,
        caller: AdmittedTenant,
        /// Only events of this action.
        action: Query<Option<AuditAction>>,
        /// Only what was done to things of this type.
        target_type: Query<Option<AuditTarget>>,
        /// Only what was done to the thing with this id.
        #[oai(validator(max_length = 64))]
        target_id: Query<Option<String>>,
        /// How many at most, 1 to 100.
        #[oai(validator(minimum(value = "1"), maximum(value = "100")))]
        limit: Query<Option<u32>>,
        /// The `next_cursor` of the page before.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<AuditEvent>>, ApiError> {
        let slice = page::slice(limit.0, cursor.0.as_deref())?;
        let target_id = target_id.0.filter(|text| !text.is_empty());
        if target_id.as_ref().is_some_and(|text| text.contains('\0')) {
            return Err(ApiError::invalid("target_id", "must not contain NUL"));
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
