//! Calls from a browser: to the server that the page is from, with the session in cookies that no script reads.
//!
//! An access token that has run out is renewed and the call sent again, without anyone noticing; however many
//! calls find it so at once, one refresh is sent. When that is refused the session is over, which a 401 tells.

use std::cell::RefCell;

use futures_channel::oneshot;
use gloo_net::http::{Method, Request, RequestBuilder, Response};
use quota_common::{Problem, call::Call};
use wasm_bindgen::JsCast;
use web_sys::{HtmlDocument, RequestCredentials, window};

use super::{Answer, Failure};

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

fn builder(call: &Call) -> (RequestBuilder, Option<serde_json::Value>) {
    let sent = call.sent();
    let method = match sent.method {
        "POST" => Method::POST,
        "PATCH" => Method::PATCH,
        "DELETE" => Method::DELETE,
        _ => Method::GET,
    };
    let builder = RequestBuilder::new(&sent.path).method(method).query(
        sent.query
            .iter()
            .map(|(name, value)| (*name, value.as_str())),
    );
    (builder, sent.body)
}

fn finished(builder: RequestBuilder, body: Option<&serde_json::Value>) -> Answer<Request> {
    match body {
        Some(body) => builder.json(body),
        None => builder.build(),
    }
    .map_err(|_| Failure::Unreadable)
}

async fn fetch(call: &Call) -> Answer<Response> {
    let (builder, body) = builder(call);
    let mut builder = builder
        .credentials(RequestCredentials::SameOrigin)
        .header("x-quota-session", "cookie");
    if let Some(csrf) = csrf() {
        builder = builder.header("x-quota-csrf", &csrf);
    }
    finished(builder, body.as_ref())?
        .send()
        .await
        .map_err(|_| Failure::Unreachable)
}

async fn read(response: Response) -> Answer<String> {
    let body = response.text().await.map_err(|_| Failure::Unreachable)?;
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

/// What a try of a key came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Tried {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
}

impl Tried {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(it, _)| *it == name)
            .map(|(_, value)| value.as_str())
    }
}

/// The fields of an answer that tell of limits.
const TOLD: [&str; 7] = [
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
    "RateLimit-Policy",
    "RateLimit",
    "Retry-After",
    "WWW-Authenticate",
];

/// Sends a request as a consumer would: with the key and nothing of the session.
pub async fn try_key(key: &str) -> Answer<Tried> {
    let (builder, body) = builder(&Call::Echo);
    let builder = builder
        .credentials(RequestCredentials::Omit)
        .header("x-api-key", key);
    let response = finished(builder, body.as_ref())?
        .send()
        .await
        .map_err(|_| Failure::Unreachable)?;
    let headers = response.headers();
    Ok(Tried {
        status: response.status(),
        headers: TOLD
            .iter()
            .filter_map(|name| Some((*name, headers.get(name)?)))
            .collect(),
    })
}
