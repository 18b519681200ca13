//! Calls from a browser: to the server that the page is from, with the session in cookies that no script reads.
//!
//! An access token that has run out is renewed and the call sent again, without anyone noticing; however many
//! calls find it so at once, one refresh is sent. When that is refused the session is over, which a 401 tells.
//!
//! Windows of a browser share its cookies: when somebody signs in as another in one of them, the others hold pages of
//! the account before. They are known by what their session's readable cookie held, and send nothing from then on.

use std::cell::RefCell;

use futures_channel::oneshot;
use quota_common::{
    Problem, TenantId, UserId,
    auth::Me,
    call::{Call, LIMIT_FIELDS},
};
use wasm_bindgen::JsCast;
use wasm_bindgen_futures::JsFuture;
use web_sys::{HtmlDocument, RequestCredentials, RequestInit, Response, window};

use super::{Answer, Failure, Tried};
use crate::model::address::Query;

/// Cookies reach the server only over TLS, or on this machine.
pub fn is_reachable_securely() -> bool {
    window().is_some_and(|window| window.is_secure_context())
}

/// The server's address.
pub fn origin() -> String {
    window()
        .and_then(|window| window.location().origin().ok())
        .unwrap_or_default()
}

fn csrf() -> Option<String> {
    let document = window()?.document()?.dyn_into::<HtmlDocument>().ok()?;
    let cookies = document.cookie().ok()?;
    cookies.split(';').find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        matches!(name, "__Host-quota_csrf" | "quota_csrf").then(|| value.to_owned())
    })
}

/// Whose page this is.
struct Own {
    csrf: Option<String>,
    account: (UserId, TenantId),
}

thread_local! {
    static OWN: RefCell<Option<Own>> = const { RefCell::new(None) };
}

/// The account that the page is of, when the browser's session is another by now: of the same person, maybe. Where there
/// is no session left, the server says so.
fn stranger() -> Option<(UserId, TenantId)> {
    let now = csrf()?;
    OWN.with_borrow(|own| {
        let own = own.as_ref()?;
        (own.csrf.as_ref() != Some(&now)).then_some(own.account)
    })
}

/// Sends a call with these header fields. By hand, since a crate for it would be a fiftieth of what a browser loads.
async fn exchange(
    call: &Call,
    credentials: RequestCredentials,
    fields: &[(&str, &str)],
) -> Answer<Response> {
    let sent = call.sent();
    let query = sent
        .query
        .iter()
        .fold(Query::default(), |query, (name, value)| {
            query.with(name, value)
        });
    let request = RequestInit::new();
    request.set_method(sent.method);
    request.set_credentials(credentials);
    let headers = web_sys::Headers::new().map_err(|_| Failure::Unreadable)?;
    let set = |name: &str, value: &str| headers.set(name, value).map_err(|_| Failure::Unreadable);
    for (name, value) in fields {
        set(name, value)?;
    }
    if let Some(body) = sent.body {
        set("content-type", "application/json")?;
        let body = serde_json::to_string(&body).map_err(|_| Failure::Unreadable)?;
        request.set_body(&body.into());
    }
    request.set_headers(&headers);
    let window = window().ok_or(Failure::Unreachable)?;
    let path = format!("{}{query}", sent.path);
    JsFuture::from(window.fetch_with_str_and_init(&path, &request))
        .await
        .and_then(JsCast::dyn_into)
        .map_err(|_| Failure::Unreachable)
}

async fn fetch(call: &Call) -> Answer<Response> {
    let csrf = csrf();
    let mut fields = vec![("x-quota-session", "cookie")];
    fields.extend(csrf.as_deref().map(|csrf| ("x-quota-csrf", csrf)));
    exchange(call, RequestCredentials::SameOrigin, &fields).await
}

async fn read(response: Response) -> Answer<String> {
    let text = response.text().map_err(|_| Failure::Unreachable)?;
    let text = JsFuture::from(text)
        .await
        .map_err(|_| Failure::Unreachable)?;
    let body = text.as_string().unwrap_or_default();
    if response.ok() {
        return Ok(body);
    }
    match serde_json::from_str::<Problem>(&body) {
        Ok(problem) => Err(Failure::Problem(Box::new(problem))),
        // A proxy in between answers for a server that is away.
        Err(_) if response.status() >= 500 => Err(Failure::Unreachable),
        Err(_) => Err(Failure::Unreadable),
    }
}

/// The body of the answer.
pub async fn send(call: &Call) -> Answer<String> {
    let is_own = matches!(
        call,
        Call::Me | Call::Login(_) | Call::Register(_) | Call::Echo
    );
    let before = stranger().filter(|_| !is_own);
    let mut turn = if before.is_some() { &Call::Me } else { call };
    loop {
        let csrf = csrf();
        let body = send_as_is(turn).await?;
        if matches!(turn, Call::Me) {
            let me: Me = serde_json::from_str(&body).map_err(|_| Failure::Unreadable)?;
            let account = (me.user.id, me.tenant.id);
            // The page is theirs from now on.
            OWN.set(Some(Own { csrf, account }));
            if before.is_some_and(|before| before != account) {
                return Err(Failure::Elsewhere);
            }
        }
        if std::ptr::eq(turn, call) {
            return Ok(body);
        }
        turn = call;
    }
}

async fn send_as_is(call: &Call) -> Answer<String> {
    let response = fetch(call).await?;
    if response.status() == 401 && call.is_of_session() && refresh().await? {
        return read(fetch(call).await?).await;
    }
    read(response).await
}

thread_local! {
    /// Those who wait for the refresh that is under way.
    static WAITING: RefCell<Option<Vec<oneshot::Sender<Answer<bool>>>>> = const { RefCell::new(None) };
}

/// Renews the session; `false` when it is over.
async fn refresh() -> Answer<bool> {
    let turn = WAITING.with_borrow_mut(|waiting| match waiting {
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
    if let Some(receiver) = turn {
        return receiver.await.unwrap_or(Err(Failure::Unreachable));
    }
    let renewed = match fetch(&Call::Refresh).await {
        Ok(response) if response.ok() => Ok(true),
        // Without its cookies, or with those of another session, there is nothing to renew.
        Ok(response) if matches!(response.status(), 401 | 403) => Ok(false),
        Ok(response) => read(response).await.map(|_| true),
        Err(failure) => Err(failure),
    };
    for waiting in WAITING.take().into_iter().flatten() {
        let _ = waiting.send(renewed.clone());
    }
    renewed
}

/// Sends a request as a consumer would: with the key and nothing of the session.
pub async fn try_key(key: &str) -> Answer<Tried> {
    let fields = [("x-api-key", key)];
    let response = exchange(&Call::Echo, RequestCredentials::Omit, &fields).await?;
    let headers = response.headers();
    Ok(Tried {
        status: response.status(),
        headers: LIMIT_FIELDS
            .iter()
            .filter_map(|name| Some((*name, headers.get(name).ok()??)))
            .collect(),
    })
}

/// Puts text on the clipboard; whether the browser let us.
pub async fn copy(text: &str) -> bool {
    let Some(window) = window() else { return false };
    JsFuture::from(window.navigator().clipboard().write_text(text))
        .await
        .is_ok()
}
