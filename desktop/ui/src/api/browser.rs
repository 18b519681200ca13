//! Sends calls from a browser to the server that served the page. Scripts cannot read the cookies that contain the
//! session's tokens.
//!
//! When the access token has expired, this module refreshes the token and sends the call again. Concurrent calls share
//! one refresh. If the server rejects the refresh, the session has ended, and the call returns the server's 401.
//!
//! All windows of a browser share its cookies. If the user signs in to another account in one window, the other windows
//! still show the previous account. They notice that the session's CSRF cookie, which scripts can read, has changed,
//! and stop sending calls.

use std::cell::RefCell;

use futures_channel::oneshot;
use quota_common::{
    Problem, TenantId, UserId,
    auth::Me,
    billing::PortalPage,
    call::{Call, LIMIT_FIELDS},
    ipc::BillingPage,
    json,
};
use wasm_bindgen::{JsCast, JsValue};
use wasm_bindgen_futures::JsFuture;
use web_sys::{
    AbortSignal, Blob, BlobPropertyBag, HtmlAnchorElement, HtmlDocument, RequestCredentials,
    RequestInit, Response, Url, window,
};

use super::error::{CallError, CallResult, TestResponse};
use crate::model::address::Query;

/// Returns whether the browser sends session cookies to this server. Browsers do so only over TLS or to the local
/// computer.
pub fn is_secure() -> bool {
    window().is_some_and(|window| window.is_secure_context())
}

pub fn origin() -> String {
    window()
        .and_then(|window| window.location().origin().ok())
        .unwrap_or_default()
}

fn csrf_token() -> Option<String> {
    let document = window()?.document()?.dyn_into::<HtmlDocument>().ok()?;
    let cookies = document.cookie().ok()?;
    cookies.split(';').find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        matches!(name, "__Host-quota_csrf" | "quota_csrf").then(|| value.to_owned())
    })
}

/// The account whose data the page shows, and the CSRF token of the session with which the page was loaded.
struct PageOwner {
    csrf_token: Option<String>,
    account: (UserId, TenantId),
}

thread_local! {
    static PAGE_OWNER: RefCell<Option<PageOwner>> = const { RefCell::new(None) };
}

/// If another session has replaced the session with which the page was loaded, returns the account whose data the page
/// shows. The other session may belong to the same account. Returns `None` if the browser has no session at all,
/// because the server then responds with 401.
fn account_before_replacement() -> Option<(UserId, TenantId)> {
    let now = csrf_token()?;
    PAGE_OWNER.with_borrow(|owner| {
        let owner = owner.as_ref()?;
        (owner.csrf_token.as_ref() != Some(&now)).then_some(owner.account)
    })
}

/// How long a response may take, in milliseconds: longer than the server's default limit.
const RESPONSE_MS: u32 = 30_000;

/// Returns why `fetch` failed. After a timeout, a change may still take effect.
fn fetch_error(error: &JsValue, call: &Call) -> CallError {
    let name = js_sys::Reflect::get(error, &"name".into()).ok();
    let is_late = name.and_then(|it| it.as_string()).as_deref() == Some("TimeoutError");
    if is_late && call.is_change() {
        CallError::NoResponse
    } else {
        CallError::Unreachable
    }
}

/// Sends a request. Uses `fetch` directly, because an HTTP crate would make the download 2% larger.
async fn request(
    call: &Call,
    credentials: RequestCredentials,
    fields: &[(&str, &str)],
) -> CallResult<Response> {
    let sent = call.sent();
    let query = sent
        .query
        .iter()
        .fold(Query::default(), |query, (name, value)| {
            query.with(name, value)
        });
    let init = RequestInit::new();
    init.set_method(sent.method);
    init.set_credentials(credentials);
    let headers = web_sys::Headers::new().map_err(|_| CallError::Unreadable)?;
    let set = |name: &str, value: &str| headers.set(name, value).map_err(|_| CallError::Unreadable);
    for (name, value) in fields {
        set(name, value)?;
    }
    if let Some(body) = sent.body {
        set("content-type", "application/json")?;
        init.set_body(&body.into());
    }
    init.set_headers(&headers);
    init.set_signal(Some(&AbortSignal::timeout_with_u32(RESPONSE_MS)));
    let window = window().ok_or(CallError::Unreachable)?;
    let path = format!("{}{query}", sent.path);
    JsFuture::from(window.fetch_with_str_and_init(&path, &init))
        .await
        .and_then(JsCast::dyn_into)
        .map_err(|error| fetch_error(&error, call))
}

async fn request_with_session(call: &Call) -> CallResult<Response> {
    let csrf_token = csrf_token();
    let mut fields = vec![("x-quota-session", "cookie")];
    fields.extend(csrf_token.as_deref().map(|token| ("x-quota-csrf", token)));
    request(call, RequestCredentials::SameOrigin, &fields).await
}

/// Returns the body of the response to a call. If the body ends early, a change may nevertheless take effect.
async fn read_body(response: Response, call: &Call) -> CallResult<String> {
    let incomplete = |_| {
        if call.is_change() {
            CallError::NoResponse
        } else {
            CallError::Incomplete
        }
    };
    let text = response.text().map_err(incomplete)?;
    let text = JsFuture::from(text).await.map_err(incomplete)?;
    let body = text.as_string().unwrap_or_default();
    if response.ok() {
        return Ok(body);
    }
    match json::read::<Problem>(&body) {
        Ok(problem) => Err(CallError::Problem(Box::new(problem))),
        // A proxy responded on behalf of an unreachable server.
        Err(_) if response.status() >= 500 => Err(CallError::Unreachable),
        Err(_) => Err(CallError::Unreadable),
    }
}

pub async fn send(call: &Call) -> CallResult<String> {
    let needs_no_owner = matches!(
        call,
        Call::Me | Call::Login(_) | Call::Register(_) | Call::Echo
    );
    let before = account_before_replacement().filter(|_| !needs_no_owner);
    let mut next = if before.is_some() { &Call::Me } else { call };
    loop {
        let csrf_token = csrf_token();
        let body = send_once(next).await?;
        if matches!(next, Call::Me) {
            let me: Me = json::read(&body).map_err(|_| CallError::Unreadable)?;
            let account = (me.user.id, me.tenant.id);
            PAGE_OWNER.set(Some(PageOwner {
                csrf_token,
                account,
            }));
            if before.is_some_and(|before| before != account) {
                return Err(CallError::AccountChanged);
            }
        }
        if std::ptr::eq(next, call) {
            return Ok(body);
        }
        next = call;
    }
}

async fn send_once(call: &Call) -> CallResult<String> {
    let response = request_with_session(call).await?;
    if response.status() == 401 && call.is_of_session() && refresh().await? {
        return read_body(request_with_session(call).await?, call).await;
    }
    read_body(response, call).await
}

thread_local! {
    /// The calls that are waiting for the current refresh. `None` if no refresh is in progress.
    static WAITING: RefCell<Option<Vec<oneshot::Sender<CallResult<bool>>>>> = const { RefCell::new(None) };
}

/// Refreshes the session, or waits for a refresh in progress. Returns `false` if the session has ended.
async fn refresh() -> CallResult<bool> {
    let receiver = WAITING.with_borrow_mut(|waiting| match waiting {
        Some(others) => {
            let (sender, receiver) = oneshot::channel();
            others.push(sender);
            Some(receiver)
        }
        None => {
            *waiting = Some(Vec::new());
            None
        }
    });
    if let Some(receiver) = receiver {
        return receiver.await.unwrap_or(Err(CallError::Unreachable));
    }
    let refreshed = match request_with_session(&Call::Refresh).await {
        Ok(response) if response.ok() => Ok(true),
        // If the cookies are missing or belong to another session, this session cannot be refreshed.
        Ok(response) if matches!(response.status(), 401 | 403) => Ok(false),
        Ok(response) => read_body(response, &Call::Refresh).await.map(|_| true),
        Err(error) => Err(error),
    };
    for waiting in WAITING.take().into_iter().flatten() {
        let _ = waiting.send(refreshed.clone());
    }
    refreshed
}

/// Sends a request as an API client would: with the key and without the session.
pub async fn try_key(key: &str) -> CallResult<TestResponse> {
    let fields = [("x-api-key", key)];
    let response = request(&Call::Echo, RequestCredentials::Omit, &fields).await?;
    let (status, headers) = (response.status(), response.headers());
    let problem = match read_body(response, &Call::Echo).await {
        Err(CallError::Problem(problem)) => Some(problem),
        _ => None,
    };
    Ok(TestResponse {
        status,
        headers: LIMIT_FIELDS
            .iter()
            .filter_map(|name| Some((*name, headers.get(name).ok()??)))
            .collect(),
        problem,
    })
}

/// Copies text to the clipboard. Returns whether the browser allowed this.
pub async fn copy(text: &str) -> bool {
    let Some(window) = window() else { return false };
    JsFuture::from(window.navigator().clipboard().write_text(text))
        .await
        .is_ok()
}

/// Downloads the file. The browser chooses the folder and shows the download.
pub async fn save_file(name: &str, text: &str) -> CallResult<Option<String>> {
    start_download(name, text).ok_or(CallError::Unreadable)?;
    Ok(None)
}

fn start_download(name: &str, text: &str) -> Option<()> {
    let kind = BlobPropertyBag::new();
    kind.set_type("text/csv;charset=utf-8");
    let blob = Blob::new_with_str_sequence_and_options(&js_sys::Array::of1(&text.into()), &kind);
    let address = Url::create_object_url_with_blob(&blob.ok()?).ok()?;
    let link = window()?.document()?.create_element("a").ok()?;
    let link = link.dyn_into::<HtmlAnchorElement>().ok()?;
    link.set_href(&address);
    link.set_download(name);
    link.click();
    Url::revoke_object_url(&address).ok()
}

/// Does nothing: a web page cannot close its window.
pub async fn quit() {}

/// Does nothing: in a browser, only toasts announce alerts.
pub async fn notify(_text: &str) {}

pub async fn open_billing(page: BillingPage) -> CallResult<()> {
    let body = super::send(page.call()).await?;
    let url = json::read::<PortalPage>(&body)
        .map_err(|_| CallError::Unreadable)?
        .url;
    let location = window().ok_or(CallError::Unreadable)?.location();
    location.assign(&url).map_err(|_| CallError::Unreadable)
}
