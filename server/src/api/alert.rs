//! `/admin/alerts` and `/admin/alert-settings`.

use poem::Result;
use poem_openapi::{OpenApi, param::Query};
use quota_common::{
    Page,
    alert::{AlertSettings, QuotaAlert, UpdateAlertSettings},
    audit::{AuditAction, AuditTarget},
    auth::Role,
};
use serde::Serialize;
use uuid::Uuid;

use super::{
    Tag,
    change::{Audited, Edit, read, read_turn},
    json::Json,
    page::{self, PageSize},
    problem::ApiError,
    tenant_rights::{AdministeringTenant, ReadingTenant, UsageTenant},
};
use crate::{
    alerts,
    db::TenantTx,
    repo::alert::{self, SettingsRow},
    state::AppState,
};

pub struct AlertApi {
    pub state: AppState,
}

impl AlertApi {
    fn described(&self, row: &SettingsRow) -> AlertSettings {
        let roles = row.alert_email_roles.iter();
        AlertSettings {
            email: row.alert_email,
            email_roles: roles.filter_map(|it| Role::of(it)).collect(),
            can_email: self.state.mailer.has_server(),
        }
    }
}

/// The alert settings, as recorded in the audit log. The target of the audit event is the tenant.
#[derive(Serialize)]
struct AuditedSettings<'a> {
    #[serde(flatten)]
    settings: &'a AlertSettings,
    #[serde(skip)]
    tenant: Uuid,
    #[serde(skip)]
    name: &'a str,
}

impl Audited for AuditedSettings<'_> {
    const TARGET: AuditTarget = AuditTarget::Tenant;

    fn id(&self) -> Uuid {
        self.tenant
    }

    fn name(&self) -> &str {
        self.name
    }
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::Alerts")]
impl AlertApi {
    /// List quota alerts
    ///
    /// Returns alerts, newest first. An alert is created when 50, 80 or 100% of a quota has been used, at most once per
    /// threshold per day or month. Alerts are kept for 90 days after the quota resets.
    #[oai(path = "/alerts", method = "get", operation_id = "list_alerts")]
    async fn list(
        &self,
        caller: UsageTenant,
        /// Page size, 1–100. Default: 20.
        limit: Query<Option<PageSize>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<QuotaAlert>>, ApiError> {
        let slice = page::slice(limit.0, cursor.0.as_deref())?;
        let _turn = read_turn(&self.state, &caller).await?;
        let list = async |tx: &mut TenantTx| alert::list(tx, slice).await;
        let rows = read(&self.state, &caller, list).await?;
        Ok(Json(page::page(rows, |row| row.id, alerts::described)))
    }

    /// Get the alert settings
    ///
    /// Returns the settings that determine who receives quota alerts by email.
    #[oai(
        path = "/alert-settings",
        method = "get",
        operation_id = "get_alert_settings"
    )]
    async fn settings(&self, caller: ReadingTenant) -> Result<Json<AlertSettings>, ApiError> {
        let find = async |tx: &mut TenantTx| alert::settings(tx, false).await;
        let row = read(&self.state, &caller, find).await?;
        Ok(Json(self.described(&row)))
    }

    /// Update the alert settings
    ///
    /// Emails that are already waiting to be sent are not affected. Alerts that were created while emails were off are
    /// not sent by email later.
    #[oai(
        path = "/alert-settings",
        method = "patch",
        operation_id = "update_alert_settings"
    )]
    async fn update_settings(
        &self,
        caller: AdministeringTenant,
        body: Json<UpdateAlertSettings>,
    ) -> Result<Json<AlertSettings>, ApiError> {
        let body = body.0;
        let mut edit = Edit::begin(&self.state, &caller).await?;
        let row = alert::settings(&mut edit, true).await?;
        let before = self.described(&row);
        if body == UpdateAlertSettings::default() {
            return Ok(Json(before));
        }
        let roles = body.email_roles.unwrap_or(before.email_roles.clone());
        let after = AlertSettings {
            email: body.email.unwrap_or(before.email),
            // Remove duplicates, and sort the roles in the order of `Role::ALL`.
            email_roles: Role::ALL
                .iter()
                .copied()
                .filter(|it| roles.contains(it))
                .collect(),
            can_email: before.can_email,
        };
        let names: Vec<&str> = after.email_roles.iter().map(|it| it.as_str()).collect();
        alert::update_settings(&mut edit, after.email, &names).await?;
        let audited = |settings| AuditedSettings {
            settings,
            tenant: caller.tenant().0,
            name: &row.name,
        };
        let action = AuditAction::TenantUpdateAlerts;
        edit.updated(action, &audited(&before), &audited(&after), None)
            .await?;
        Ok(Json(after))
    }
}
