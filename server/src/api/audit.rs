//! `/admin/audit`.

use poem::Result;
use poem_openapi::{OpenApi, param::Query};
use quota_common::{
    AuditEventId, Page, Timestamp, UserId,
    audit::{AuditAction, AuditEvent, AuditTarget},
};

use super::{
    Tag,
    change::{read, read_turn},
    json::Json,
    page::{self, PageSize},
    problem::ApiError,
    tenant_rights::ReadingTenant,
};
use crate::{
    db::TenantTx,
    repo::audit::{self, AuditEntry, Filter},
    state::AppState,
};

pub struct AuditApi {
    pub state: AppState,
}

impl From<AuditEntry> for AuditEvent {
    fn from(AuditEntry { event, user_email }: AuditEntry) -> Self {
        // Older events do not store the name separately, but their fields may contain it.
        let target_name = event.target_name.or_else(|| {
            let fields = [&event.after, &event.before].into_iter().flatten();
            let mut names = fields.filter_map(|it| it.get("name")?.as_str());
            names.next().map(str::to_owned)
        });
        Self {
            id: AuditEventId(event.id),
            at: event.at.into(),
            user_id: event.user_id.map(UserId),
            user_email,
            action: event.action,
            target_type: event.target_type,
            target_id: event.target_id,
            target_name,
            ip: event.ip.map(|ip| ip.addr().to_string()),
            before: event.before,
            after: event.after,
        }
    }
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::Audit")]
impl AuditApi {
    /// List audit events
    ///
    /// Returns audit events, newest first: who did what, when, and from which IP address.
    #[oai(path = "/audit", method = "get", operation_id = "list_audit_events")]
    #[expect(
        clippy::too_many_arguments,
        reason = "a handler has one argument per parameter"
    )]
    async fn list(
        &self,
        caller: ReadingTenant,
        /// Include only events with this action.
        action: Query<Option<AuditAction>>,
        /// Include only events about resources of this type.
        target_type: Query<Option<AuditTarget>>,
        /// Include only events about the resource with this ID.
        #[oai(validator(max_length = 64))]
        target_id: Query<Option<String>>,
        /// Include only events caused by users whose email contains this string.
        #[oai(validator(max_length = 200))]
        actor: Query<Option<String>>,
        /// Include only events about resources whose name contains this string.
        #[oai(validator(max_length = 200))]
        search: Query<Option<String>>,
        /// Include only events at or after this time.
        from: Query<Option<Timestamp>>,
        /// Include only events before this time.
        to: Query<Option<Timestamp>>,
        /// Page size, 1–100. Default: 20.
        limit: Query<Option<PageSize>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<AuditEvent>>, ApiError> {
        let slice = page::slice(limit.0, cursor.0.as_deref())?;
        let target_id = page::filter("target_id", target_id.0)?;
        let actor = page::filter("actor", actor.0)?;
        let search = page::filter("search", search.0)?;
        if let (Some(from), Some(to)) = (from.0, to.0)
            && to <= from
        {
            return Err(ApiError::invalid("to", "must be after `from`"));
        }
        let filter = Filter {
            action: action.0.map(AuditAction::as_str),
            target_type: target_type.0.map(AuditTarget::as_str),
            target_id: target_id.as_deref(),
            actor: actor.as_deref(),
            search: search.as_deref(),
            from: from.0.map(Timestamp::inner),
            to: to.0.map(Timestamp::inner),
        };
        let list = async |tx: &mut TenantTx| audit::list(tx, &filter, slice).await;
        let _turn = read_turn(&self.state, &caller).await?;
        let rows = read(&self.state, &caller, list).await?;
        Ok(Json(page::page(rows, |it| it.event.id, AuditEvent::from)))
    }
}
