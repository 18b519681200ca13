//! All calls that the console makes to the server. Only this module converts a call to a method, path, query, and body.
//! The desktop app accepts no other calls from the console.

use serde::{Deserialize, Serialize};

use crate::{
    alert::UpdateAlertSettings,
    api_key::{ApiKeyStatus, CreateApiKey, RotateApiKey, UpdateApiKey},
    audit::{AuditAction, AuditTarget},
    auth::{ChangePassword, Login, Refresh, Register, UpdateMe},
    decision::DecisionOutcome,
    id::{ApiKeyId, PlanId, ServiceTokenId, SessionId, WebhookDeliveryId, WebhookId},
    limit::PolicyName,
    page::{ApiKeyOrder, PlanOrder},
    plan::{CreatePlan, UpdatePlan},
    service_token::CreateServiceToken,
    time::Timestamp,
    usage::{UsageBucketSize, UsageGroupBy},
    webhook::{CreateWebhook, RotateWebhookSecret, UpdateWebhook, WebhookDeliveryStatus},
};

/// Selects a page of a list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageOf {
    /// If `None`, the server uses its default page size.
    pub limit: Option<u32>,
    /// `next_cursor` of the previous page.
    pub cursor: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyFilter {
    pub plan_id: Option<PlanId>,
    pub status: Option<ApiKeyStatus>,
    /// Part of the name, or the beginning of the key's prefix or external ID.
    pub search: Option<String>,
    pub sort: Option<ApiKeyOrder>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditFilter {
    pub action: Option<AuditAction>,
    pub target_type: Option<AuditTarget>,
    pub target_id: Option<String>,
    /// Text that the actor's email address must contain.
    pub actor: Option<String>,
    /// Text that the resource's name must contain.
    pub search: Option<String>,
    pub from: Option<Timestamp>,
    /// The end of the range, exclusive.
    pub to: Option<Timestamp>,
}

/// Selects which usage to count and how to group it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageFilter {
    pub from: Option<Timestamp>,
    /// The end of the range, exclusive.
    pub to: Option<Timestamp>,
    pub bucket: Option<UsageBucketSize>,
    /// The time zone that determines when hours and days start.
    pub tz: Option<String>,
    pub key_id: Option<ApiKeyId>,
    pub endpoint: Option<String>,
    pub group_by: Option<UsageGroupBy>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecisionFilter {
    pub key_id: Option<ApiKeyId>,
    pub endpoint: Option<String>,
    pub outcome: Option<DecisionOutcome>,
    pub request_id: Option<String>,
}

/// A call to the server. In the desktop app, the console passes each call as JSON to the app's main process (the
/// *host*), which sends the request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    Register(Register),
    Login(Login),
    /// In the desktop app, the host adds the refresh token to this call and to `Logout`. In a browser, the token is in
    /// a cookie.
    Refresh,
    Logout,
    Me,
    UpdateMe(UpdateMe),
    ChangePassword(ChangePassword),
    ListSessions(PageOf),
    EndSession(SessionId),
    ListPlans(Option<PlanOrder>, PageOf),
    CreatePlan(CreatePlan),
    UpdatePlan(PlanId, UpdatePlan),
    DeletePlan(PlanId),
    ListApiKeys(KeyFilter, PageOf),
    GetApiKey(ApiKeyId),
    CreateApiKey(CreateApiKey),
    UpdateApiKey(ApiKeyId, UpdateApiKey),
    RotateApiKey(ApiKeyId, RotateApiKey),
    DeleteApiKey(ApiKeyId),
    ListServiceTokens(PageOf),
    CreateServiceToken(CreateServiceToken),
    DeleteServiceToken(ServiceTokenId),
    ListWebhooks(PageOf),
    GetWebhook(WebhookId),
    CreateWebhook(CreateWebhook),
    UpdateWebhook(WebhookId, UpdateWebhook),
    RotateWebhookSecret(WebhookId, RotateWebhookSecret),
    TestWebhook(WebhookId),
    DeleteWebhook(WebhookId),
    ListDeliveries(WebhookId, Option<WebhookDeliveryStatus>, PageOf),
    Redeliver(WebhookDeliveryId),
    ListAlerts(PageOf),
    AlertSettings,
    UpdateAlertSettings(UpdateAlertSettings),
    ListAudit(AuditFilter, PageOf),
    Stats,
    Usage(UsageFilter),
    ListDecisions(DecisionFilter, PageOf),
    KeyLimits(ApiKeyId),
    BurnDown(ApiKeyId, PolicyName),
    Billing,
    StartCheckout,
    OpenBillingPortal,
    /// This call is sent with an API key in `X-API-Key` instead of the session's credentials.
    Echo,
}

/// Response headers that the console shows when the user tests a key.
pub const LIMIT_FIELDS: [&str; 7] = [
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
    "RateLimit-Policy",
    "RateLimit",
    "Retry-After",
    "WWW-Authenticate",
];

#[derive(Debug, Clone, PartialEq)]
pub struct Sent {
    pub method: &'static str,
    pub path: String,
    pub query: Vec<(&'static str, String)>,
    /// The body, as JSON.
    pub body: Option<String>,
}

impl Sent {
    fn new(method: &'static str, path: impl Into<String>) -> Self {
        Self {
            method,
            path: path.into(),
            query: Vec::new(),
            body: None,
        }
    }

    fn body(mut self, body: &impl Serialize) -> Self {
        self.body = serde_json::to_string(body).ok();
        self
    }

    fn with(mut self, name: &'static str, value: Option<impl ToString>) -> Self {
        self.query
            .extend(value.map(|value| (name, value.to_string())));
        self
    }

    fn page(self, page: &PageOf) -> Self {
        self.with("limit", page.limit)
            .with("cursor", page.cursor.as_ref())
    }
}

impl Call {
    pub fn sent(&self) -> Sent {
        let get = |path: &str| Sent::new("GET", path);
        let post = |path: &str| Sent::new("POST", path);
        let no_token = Refresh {
            refresh_token: None,
        };
        match self {
            Self::Register(body) => post("/auth/register").body(body),
            Self::Login(body) => post("/auth/login").body(body),
            Self::Refresh => post("/auth/refresh").body(&no_token),
            Self::Logout => post("/auth/logout").body(&no_token),
            Self::Me => get("/auth/me"),
            Self::UpdateMe(body) => Sent::new("PATCH", "/auth/me").body(body),
            Self::ChangePassword(body) => post("/auth/password").body(body),
            Self::ListSessions(page) => get("/auth/sessions").page(page),
            Self::EndSession(id) => Sent::new("DELETE", format!("/auth/sessions/{id}")),
            Self::ListPlans(sort, page) => get("/admin/plans").with("sort", *sort).page(page),
            Self::CreatePlan(body) => post("/admin/plans").body(body),
            Self::UpdatePlan(id, body) => {
                Sent::new("PATCH", format!("/admin/plans/{id}")).body(body)
            }
            Self::DeletePlan(id) => Sent::new("DELETE", format!("/admin/plans/{id}")),
            Self::ListApiKeys(filter, page) => get("/admin/api-keys")
                .with("plan_id", filter.plan_id)
                .with("status", filter.status)
                .with("search", filter.search.as_ref())
                .with("sort", filter.sort)
                .page(page),
            Self::GetApiKey(id) => get(&format!("/admin/api-keys/{id}")),
            Self::CreateApiKey(body) => post("/admin/api-keys").body(body),
            Self::UpdateApiKey(id, body) => {
                Sent::new("PATCH", format!("/admin/api-keys/{id}")).body(body)
            }
            Self::RotateApiKey(id, body) => {
                post(&format!("/admin/api-keys/{id}/rotate")).body(body)
            }
            Self::DeleteApiKey(id) => Sent::new("DELETE", format!("/admin/api-keys/{id}")),
            Self::ListServiceTokens(page) => get("/admin/service-tokens").page(page),
            Self::CreateServiceToken(body) => post("/admin/service-tokens").body(body),
            Self::DeleteServiceToken(id) => {
                Sent::new("DELETE", format!("/admin/service-tokens/{id}"))
            }
            Self::ListWebhooks(page) => get("/admin/webhooks").page(page),
            Self::GetWebhook(id) => get(&format!("/admin/webhooks/{id}")),
            Self::CreateWebhook(body) => post("/admin/webhooks").body(body),
            Self::UpdateWebhook(id, body) => {
                Sent::new("PATCH", format!("/admin/webhooks/{id}")).body(body)
            }
            Self::RotateWebhookSecret(id, body) => {
                post(&format!("/admin/webhooks/{id}/rotate-secret")).body(body)
            }
            Self::TestWebhook(id) => post(&format!("/admin/webhooks/{id}/test")),
            Self::DeleteWebhook(id) => Sent::new("DELETE", format!("/admin/webhooks/{id}")),
            Self::ListDeliveries(id, status, page) => {
                get(&format!("/admin/webhooks/{id}/deliveries"))
                    .with("status", *status)
                    .page(page)
            }
            Self::Redeliver(id) => post(&format!("/admin/webhooks/deliveries/{id}/redeliver")),
            Self::ListAlerts(page) => get("/admin/alerts").page(page),
            Self::AlertSettings => get("/admin/alert-settings"),
            Self::UpdateAlertSettings(body) => {
                Sent::new("PATCH", "/admin/alert-settings").body(body)
            }
            Self::ListAudit(filter, page) => get("/admin/audit")
                .with("action", filter.action)
                .with("target_type", filter.target_type)
                .with("target_id", filter.target_id.as_ref())
                .with("actor", filter.actor.as_ref())
                .with("search", filter.search.as_ref())
                .with("from", filter.from)
                .with("to", filter.to)
                .page(page),
            Self::Stats => get("/admin/stats"),
            Self::Usage(filter) => get("/admin/usage")
                .with("from", filter.from)
                .with("to", filter.to)
                .with("bucket", filter.bucket)
                .with("tz", filter.tz.as_ref())
                .with("key_id", filter.key_id)
                .with("endpoint", filter.endpoint.as_ref())
                .with("group_by", filter.group_by),
            Self::ListDecisions(filter, page) => get("/admin/decisions")
                .with("key_id", filter.key_id)
                .with("endpoint", filter.endpoint.as_ref())
                .with("outcome", filter.outcome)
                .with("request_id", filter.request_id.as_ref())
                .page(page),
            Self::KeyLimits(id) => get(&format!("/admin/api-keys/{id}/limits")),
            Self::BurnDown(id, policy) => get(&format!("/admin/api-keys/{id}/burn-down"))
                .with("policy", Some(policy.as_str())),
            Self::Billing => get("/billing"),
            Self::StartCheckout => post("/billing/checkout"),
            Self::OpenBillingPortal => post("/billing/portal"),
            Self::Echo => get("/v1/echo"),
        }
    }

    /// Returns whether a 401 response can mean that the session must be refreshed.
    pub const fn is_of_session(&self) -> bool {
        !matches!(
            self,
            Self::Register(_) | Self::Login(_) | Self::Refresh | Self::Logout | Self::Echo
        )
    }

    /// Returns whether the call may change data on behalf of a session. If such a call gets no response, the change may
    /// still take effect.
    pub fn is_change(&self) -> bool {
        self.is_of_session() && self.sent().method != "GET"
    }
}
