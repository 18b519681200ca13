//! `/admin/audit`.

use poem::Result;
use poem_openapi::{OpenApi, param::Query};
use quota_common::{AuditEventId, Page, UserId, audit::AuditEvent};

use super::{Tag, admitted::AdmittedTenant, json::Json, page, problem::ApiError};
use crate::{
    repo::audit::{self, AuditRow},
    state::AppState,
};

pub struct AuditApi {
    pub state: AppState,
}

fn show((row, email): (AuditRow, Option<String>)) -> AuditEvent {
    AuditEvent {
        id: AuditEventId(row.id),
        at: row.at.into(),
        user_id: row.user_id.map(UserId),
        user_email: email,
        action: row.action,
        target_type: row.target_type,
        target_id: row.target_id,
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
        /// How many at most, 1 to 100.
        #[oai(validator(minimum(value = "1"), maximum(value = "100")))]
        limit: Query<Option<u32>>,
        /// The `next_cursor` of the page before.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<AuditEvent>>, ApiError> {
        let slice = page::slice(limit.0, cursor.0.as_deref())?;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let rows = audit::list(&mut tx, slice).await?;
        tx.commit().await?;
        Ok(Json(page::page(rows, |(row, _)| row.id, show)))
    }
}
