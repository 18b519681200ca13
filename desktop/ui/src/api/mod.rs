//! One typed function per call to the server. The transport is chosen at compile time: a build sends its calls either
//! from a browser or through the desktop app.

#[cfg(not(feature = "desktop"))]
#[path = "browser.rs"]
mod transport;
#[cfg(feature = "desktop")]
#[path = "desktop.rs"]
mod transport;

mod error;

use std::{cell::RefCell, pin::Pin};

use quota_common::{
    ApiKeyId, Page, PlanId, ProblemCode, ServiceTokenId, SessionId, WebhookDeliveryId, WebhookId,
    alert::{AlertSettings, QuotaAlert, UpdateAlertSettings},
    api_key::{ApiKey, CreateApiKey, CreatedApiKey, RotateApiKey, UpdateApiKey},
    audit::AuditEvent,
    auth::{ChangePassword, Login, Me, Register, Session, SignedIn, UpdateMe},
    billing::BillingState,
    call::{AuditFilter, Call, DecisionFilter, KeyFilter, PageOf, UsageFilter},
    decision::DecisionPage,
    json::{self, FromJson},
    limit::PolicyName,
    page::PlanOrder,
    plan::{CreatePlan, Plan, UpdatePlan},
    service_token::{CreateServiceToken, CreatedServiceToken, ServiceToken},
    usage::{BurnDown, KeyLimits, Stats, Usage},
    webhook::{
        CreateWebhook, CreatedWebhook, RotateWebhookSecret, UpdateWebhook, Webhook,
        WebhookDelivery, WebhookDeliveryStatus,
    },
};
use wasm_bindgen::JsCast;
use wasm_bindgen_futures::JsFuture;

pub use error::{CallError, CallResult, TestResponse};
#[cfg(feature = "desktop")]
pub use transport::{add_server, forget_server, host_status, ready, use_server};
pub use transport::{copy, is_secure, notify, open_billing, origin, quit, save_file, try_key};

/// A call in progress. The future is boxed, because otherwise each page would contain a copy of the call's state
/// machine.
pub type PendingCall<T> = Pin<Box<dyn Future<Output = CallResult<T>>>>;

type Listener = Box<dyn Fn(&CallError)>;

thread_local! {
    static ON_SESSION_END: RefCell<Option<Listener>> = const { RefCell::new(None) };
}

/// Sets the callback for calls that find the session revoked, expired, or replaced by another account's session.
pub fn on_session_end(listener: impl Fn(&CallError) + 'static) {
    ON_SESSION_END.set(Some(Box::new(listener)));
}

fn send(call: Call) -> PendingCall<String> {
    Box::pin(async move {
        let result = transport::send(&call).await;
        if let Err(error) = &result
            && (*error == CallError::AccountChanged
                || (call.is_of_session() && error.is(ProblemCode::Unauthorized)))
        {
            ON_SESSION_END
                .with_borrow(|listener| listener.as_ref().map(|listener| listener(error)));
        }
        result
    })
}

/// Sends a call whose response has a body.
fn fetch<T: FromJson + 'static>(call: Call) -> PendingCall<T> {
    let body = send(call);
    Box::pin(async move { json::read(&body.await?).map_err(|_| CallError::Unreadable) })
}

/// Sends a call whose response has no body.
fn execute(call: Call) -> PendingCall<()> {
    let body = send(call);
    Box::pin(async move { body.await.map(drop) })
}

pub fn register(body: Register) -> PendingCall<SignedIn> {
    fetch(Call::Register(body))
}

pub fn login(body: Login) -> PendingCall<SignedIn> {
    fetch(Call::Login(body))
}

pub fn logout() -> PendingCall<()> {
    execute(Call::Logout)
}

pub fn me() -> PendingCall<Me> {
    fetch(Call::Me)
}

pub fn update_me(body: UpdateMe) -> PendingCall<Me> {
    fetch(Call::UpdateMe(body))
}

pub fn change_password(body: ChangePassword) -> PendingCall<()> {
    execute(Call::ChangePassword(body))
}

pub fn list_sessions(page: PageOf) -> PendingCall<Page<Session>> {
    fetch(Call::ListSessions(page))
}

pub fn revoke_session(id: SessionId) -> PendingCall<()> {
    execute(Call::EndSession(id))
}

pub fn list_plans(sort: Option<PlanOrder>, page: PageOf) -> PendingCall<Page<Plan>> {
    fetch(Call::ListPlans(sort, page))
}

pub fn create_plan(body: CreatePlan) -> PendingCall<Plan> {
    fetch(Call::CreatePlan(body))
}

pub fn update_plan(id: PlanId, body: UpdatePlan) -> PendingCall<Plan> {
    fetch(Call::UpdatePlan(id, body))
}

pub fn delete_plan(id: PlanId) -> PendingCall<()> {
    execute(Call::DeletePlan(id))
}

pub fn list_api_keys(filter: KeyFilter, page: PageOf) -> PendingCall<Page<ApiKey>> {
    fetch(Call::ListApiKeys(filter, page))
}

pub fn get_api_key(id: ApiKeyId) -> PendingCall<ApiKey> {
    fetch(Call::GetApiKey(id))
}

pub fn create_api_key(body: CreateApiKey) -> PendingCall<CreatedApiKey> {
    fetch(Call::CreateApiKey(body))
}

pub fn update_api_key(id: ApiKeyId, body: UpdateApiKey) -> PendingCall<ApiKey> {
    fetch(Call::UpdateApiKey(id, body))
}

pub fn rotate_api_key(id: ApiKeyId, body: RotateApiKey) -> PendingCall<CreatedApiKey> {
    fetch(Call::RotateApiKey(id, body))
}

pub fn delete_api_key(id: ApiKeyId) -> PendingCall<()> {
    execute(Call::DeleteApiKey(id))
}

pub fn list_service_tokens(page: PageOf) -> PendingCall<Page<ServiceToken>> {
    fetch(Call::ListServiceTokens(page))
}

pub fn create_service_token(body: CreateServiceToken) -> PendingCall<CreatedServiceToken> {
    fetch(Call::CreateServiceToken(body))
}

pub fn delete_service_token(id: ServiceTokenId) -> PendingCall<()> {
    execute(Call::DeleteServiceToken(id))
}

pub fn list_webhooks(page: PageOf) -> PendingCall<Page<Webhook>> {
    fetch(Call::ListWebhooks(page))
}

pub fn get_webhook(id: WebhookId) -> PendingCall<Webhook> {
    fetch(Call::GetWebhook(id))
}

pub fn create_webhook(body: CreateWebhook) -> PendingCall<CreatedWebhook> {
    fetch(Call::CreateWebhook(body))
}

pub fn update_webhook(id: WebhookId, body: UpdateWebhook) -> PendingCall<Webhook> {
    fetch(Call::UpdateWebhook(id, body))
}

pub fn rotate_webhook_secret(
    id: WebhookId,
    body: RotateWebhookSecret,
) -> PendingCall<CreatedWebhook> {
    fetch(Call::RotateWebhookSecret(id, body))
}

pub fn test_webhook(id: WebhookId) -> PendingCall<WebhookDelivery> {
    fetch(Call::TestWebhook(id))
}

pub fn delete_webhook(id: WebhookId) -> PendingCall<()> {
    execute(Call::DeleteWebhook(id))
}

pub fn list_deliveries(
    id: WebhookId,
    status: Option<WebhookDeliveryStatus>,
    page: PageOf,
) -> PendingCall<Page<WebhookDelivery>> {
    fetch(Call::ListDeliveries(id, status, page))
}

pub fn redeliver(id: WebhookDeliveryId) -> PendingCall<WebhookDelivery> {
    fetch(Call::Redeliver(id))
}

pub fn list_alerts(page: PageOf) -> PendingCall<Page<QuotaAlert>> {
    fetch(Call::ListAlerts(page))
}

pub fn alert_settings() -> PendingCall<AlertSettings> {
    fetch(Call::AlertSettings)
}

pub fn update_alert_settings(body: UpdateAlertSettings) -> PendingCall<AlertSettings> {
    fetch(Call::UpdateAlertSettings(body))
}

pub fn list_audit(filter: AuditFilter, page: PageOf) -> PendingCall<Page<AuditEvent>> {
    fetch(Call::ListAudit(filter, page))
}

pub fn stats() -> PendingCall<Stats> {
    fetch(Call::Stats)
}

pub fn usage(filter: UsageFilter) -> PendingCall<Usage> {
    fetch(Call::Usage(filter))
}

pub fn list_decisions(filter: DecisionFilter, page: PageOf) -> PendingCall<DecisionPage> {
    fetch(Call::ListDecisions(filter, page))
}

pub fn key_limits(id: ApiKeyId) -> PendingCall<KeyLimits> {
    fetch(Call::KeyLimits(id))
}

pub fn billing() -> PendingCall<BillingState> {
    fetch(Call::Billing)
}

/// Loads the gateway configurations, which are a static file of the console.
pub fn gateway_files() -> PendingCall<String> {
    Box::pin(async {
        let text = load_text("meta[name=gateways]").await;
        text.ok_or(CallError::Unreachable)
    })
}

/// Loads the file whose URL is in the `content` of a `meta` element.
async fn load_text(selector: &str) -> Option<String> {
    let window = web_sys::window()?;
    let meta = window.document()?.query_selector(selector).ok()??;
    let response = JsFuture::from(window.fetch_with_str(&meta.get_attribute("content")?));
    let response: web_sys::Response = response.await.ok()?.dyn_into().ok()?;
    let text = response.ok().then(|| response.text())?.ok()?;
    JsFuture::from(text).await.ok()?.as_string()
}

pub fn burn_down(id: ApiKeyId, policy: PolicyName) -> PendingCall<BurnDown> {
    fetch(Call::BurnDown(id, policy))
}
