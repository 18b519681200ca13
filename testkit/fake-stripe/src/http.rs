//! The HTTP server: credentials, idempotency keys, faults, and pages.

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{AUTHORIZATION, CONTENT_TYPE},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::net::TcpListener;

use crate::{
    api::{Call, visible},
    document, form, page,
    state::{Failure, State},
};

/// Whether a request fails before or after it takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    Before,
    After,
}

/// How a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Stripe itself returns an error with this status. Requests with the same idempotency key get the same status
    /// again, unless it is 409 or 429: Stripe returns these two before it processes a request.
    Status(u16),
    /// A proxy returns 502 with an HTML page.
    Html,
    /// The connection is closed without a response.
    Drop,
    /// The response takes this long.
    Slow(Duration),
}

/// A fault that affects one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    pub when: When,
    pub how: How,
}

impl Fault {
    pub const fn before(how: How) -> Self {
        let when = When::Before;
        Self { when, how }
    }

    pub const fn after(how: How) -> Self {
        let when = When::After;
        Self { when, how }
    }

    /// Returns every kind of fault, both before and after the request takes effect (409 and 429: only before). Slow
    /// responses take `slow`.
    pub fn all(slow: Duration) -> Vec<Self> {
        let before = [409, 429, 500, 503].map(How::Status).to_vec();
        let after = [500, 503].map(How::Status).to_vec();
        let either = [How::Html, How::Drop, How::Slow(slow)];
        let before = before.into_iter().chain(either).map(Self::before);
        let after = after.into_iter().chain(either).map(Self::after);
        before.chain(after).collect()
    }
}

#[derive(Debug, Clone)]
pub struct Received {
    pub method: String,
    /// The path, including `/v1`.
    pub path: String,
    /// The operation as Stripe names it, such as `GET /v1/customers/{customer}`.
    pub operation: Option<&'static str>,
    pub params: Value,
    pub idempotency_key: Option<String>,
    /// The requested API version.
    pub version: Option<String>,
    /// The status of the response, if one was sent.
    pub status: Option<u16>,
}

/// The first request with an idempotency key, and its response.
struct Kept {
    request: (String, String, Value),
    /// `None` while the request is being handled.
    response: Option<(u16, Value)>,
    at: i64,
}

type Choose = Box<dyn FnMut(&str, &str) -> Option<Fault> + Send>;

#[derive(Default)]
pub struct Shared {
    pub state: Mutex<State>,
    pub received: Mutex<Vec<Received>>,
    /// What was wrong with requests, according to Stripe's description of its API.
    pub invalid: Mutex<Vec<String>>,
    /// Faults of upcoming requests, each with a prefix of the request's path.
    pub faults: Mutex<Vec<(String, Fault)>>,
    /// Called with the method and path of every valid `/v1` request without a fault in `faults`.
    pub choose: Mutex<Option<Choose>>,
    kept: Mutex<HashMap<String, Kept>>,
    /// The meter and the customer of each meter event in progress.
    metering: Mutex<Vec<(String, String)>>,
    pub base: String,
}

/// The secret key that requests must contain.
pub const SECRET_KEY: &str = "sk_test_fake";

/// How many seconds an idempotency key is kept.
const KEPT_FOR: i64 = 86_400;

pub async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((stream, _)): Result<(_, SocketAddr), _> = listener.accept().await else {
            return;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let shared = shared.clone();
                async move {
                    // A request takes effect even if the client does not wait for the response.
                    let answer = tokio::spawn(async move { answer(&shared, request).await });
                    answer.await.map_err(io::Error::other)?
                }
            });
            // If the service returns an error, the connection is closed, which looks like a dropped response.
            drop(
                http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await,
            );
        });
    }
}

async fn answer(shared: &Shared, request: Request<Incoming>) -> io::Result<Response<Full<Bytes>>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let body = String::from_utf8_lossy(&body);
    let path = head.uri.path().trim_matches('/');
    let segments: Vec<&str> = path.split('/').collect();
    let [version @ ("v1" | "v2"), below @ ..] = &segments[..] else {
        let page = page::answer(
            &mut shared.state.lock(),
            &head.method,
            &segments,
            &form::parse(&body),
        );
        return Ok(
            page.unwrap_or_else(|| page::html(StatusCode::NOT_FOUND, "Not found".to_owned()))
        );
    };
    let header = |name: &str| {
        head.headers
            .get(name)
            .and_then(|it| it.to_str().ok())
            .map(str::to_owned)
    };
    let params = match &head.method {
        &Method::POST => form::parse(&body),
        _ => form::parse(head.uri.query().unwrap_or_default()),
    };
    let key = header("idempotency-key").filter(|_| head.method == Method::POST);
    let full_path = format!("/{path}");
    let (operation, wrong) = document::check(&head.method, &full_path, &head.headers, &params);
    shared.invalid.lock().extend_from_slice(&wrong);
    let number = {
        let mut received = shared.received.lock();
        received.push(Received {
            method: head.method.to_string(),
            path: full_path,
            operation,
            params: params.clone(),
            idempotency_key: key.clone(),
            version: header("stripe-version"),
            status: None,
        });
        received.len() - 1
    };
    let expected = format!("Bearer {SECRET_KEY}");
    let response = if header(AUTHORIZATION.as_str()) != Some(expected) {
        let failure = Failure::new(401, "invalid_request_error", "Invalid API Key provided.");
        Ok((failure.status, failure.body, vec![]))
    } else if let Some(first) = wrong.first() {
        let failure = Failure::invalid(first);
        Ok((failure.status, failure.body, vec![]))
    } else if *version == "v2" {
        Ok(thin_event(shared, below))
    } else {
        let call = Call {
            method: &head.method,
            path: below,
            params: &params,
            base: &shared.base,
        };
        execute(shared, &call, key).await
    };
    let (status, body, headers) = response?;
    shared.received.lock()[number].status = Some(status);
    let content_type = if body.is_string() {
        "text/html"
    } else {
        "application/json"
    };
    let text = body
        .as_str()
        .map_or_else(|| body.to_string(), str::to_owned);
    let mut response = Response::builder()
        .status(status)
        .header(CONTENT_TYPE, content_type);
    for (name, value) in headers {
        response = response.header(name, value);
    }
    response
        .body(Full::new(Bytes::from(text)))
        .map_err(io::Error::other)
}

type Answer = (u16, Value, Vec<(&'static str, &'static str)>);

fn thin_event(shared: &Shared, below: &[&str]) -> Answer {
    let state = shared.state.lock();
    let found = match below {
        ["core", "events", id] => state.find("event", id).cloned(),
        _ => Err(Failure::no_such("path", &below.join("/"))),
    };
    match found {
        Ok(event) => (200, event, vec![]),
        Err(failure) => (failure.status, failure.body, vec![]),
    }
}

fn next_fault(shared: &Shared, call: &Call<'_>) -> Option<Fault> {
    let path = format!("/v1/{}", call.path.join("/"));
    let mut faults = shared.faults.lock();
    if let Some(position) = faults
        .iter()
        .position(|(prefix, _)| path.starts_with(prefix.as_str()))
    {
        return Some(faults.remove(position).1);
    }
    let mut choose = shared.choose.lock();
    choose
        .as_mut()
        .and_then(|choose| choose(call.method.as_str(), &path))
}

async fn execute(shared: &Shared, call: &Call<'_>, key: Option<String>) -> io::Result<Answer> {
    let fault = next_fault(shared, call);
    let turned_away = |status: u16, kind: &str, message: &str| {
        let failure = Failure::new(status, kind, message);
        Ok((status, failure.body, vec![("Stripe-Should-Retry", "true")]))
    };
    // Stripe checks rate limits and locks before idempotency keys.
    if let Some(Fault {
        how: How::Status(status @ (409 | 429)),
        ..
    }) = fault
    {
        let code = if status == 429 {
            "rate_limit"
        } else {
            "lock_timeout"
        };
        let mut answer: Answer = turned_away(status, "invalid_request_error", "Try again later.")?;
        answer.1["error"]["code"] = code.into();
        return Ok(answer);
    }
    if let Some(key) = &key {
        let request = (
            call.method.to_string(),
            call.path.join("/"),
            call.params.clone(),
        );
        let now = shared.state.lock().now();
        let mut kept = shared.kept.lock();
        kept.retain(|_, it| now - it.at < KEPT_FOR);
        match kept.get(key) {
            Some(first) if first.request != request => {
                let message = format!(
                    "Keys for idempotent requests can only be used with the same parameters they were first used with. \
                     Try using a key other than '{key}'."
                );
                let failure = Failure::new(400, "idempotency_error", &message);
                return Ok((400, failure.body, vec![]));
            }
            Some(Kept { response: None, .. }) => {
                let message =
                    "There is currently another in-progress request using this idempotency key.";
                let mut answer: Answer = turned_away(409, "idempotency_error", message)?;
                answer.1["error"]["code"] = "idempotency_key_in_use".into();
                return Ok(answer);
            }
            Some(Kept {
                response: Some((status, body)),
                ..
            }) => {
                return Ok((*status, body.clone(), vec![("Idempotent-Replayed", "true")]));
            }
            None => {
                let entry = Kept {
                    request,
                    response: None,
                    at: now,
                };
                kept.insert(key.clone(), entry);
            }
        }
    }
    let Some(_metering) = Metering::begin(shared, call) else {
        shared.forget(key.as_deref());
        return turned_away(
            409,
            "invalid_request_error",
            "Another meter event of this customer is in progress.",
        );
    };
    let error = |status| {
        (
            status,
            Failure::new(status, "api_error", "An unknown error occurred.").body,
        )
    };
    let mut dropped = None;
    if let Some(Fault {
        when: When::Before,
        how,
    }) = fault
    {
        match how {
            How::Status(status) => {
                shared.keep(key.as_deref(), error(status));
                return Ok((status, error(status).1, vec![]));
            }
            How::Html => {
                // The response does not come from Stripe, so Stripe does not store it.
                shared.forget(key.as_deref());
                return Ok((502, "<html><body>Bad Gateway</body></html>".into(), vec![]));
            }
            How::Drop => {
                shared.forget(key.as_deref());
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            How::Slow(time) => tokio::time::sleep(time).await,
        }
    }
    let outcome = {
        let mut state = shared.state.lock();
        let now = state.now();
        state.run_timers(now);
        state.request_key.clone_from(&key);
        let outcome = state.call(call);
        state.request_key = None;
        outcome
    };
    let (mut status, mut body, is_kept) = match outcome {
        Ok(object) => (200, visible(&object), true),
        Err(failure) => (failure.status, failure.body, failure.kept),
    };
    if let Some(Fault {
        when: When::After,
        how,
    }) = fault
    {
        match how {
            How::Status(other) => (status, body) = error(other),
            How::Html => {
                dropped = Some(Ok((
                    502,
                    "<html><body>Bad Gateway</body></html>".into(),
                    vec![],
                )));
            }
            How::Drop => dropped = Some(Err(io::ErrorKind::ConnectionReset.into())),
            How::Slow(_) => {}
        }
    }
    if is_kept {
        shared.keep(key.as_deref(), (status, body.clone()));
    } else {
        shared.forget(key.as_deref());
    }
    if let Some(Fault {
        when: When::After,
        how: How::Slow(time),
    }) = fault
    {
        tokio::time::sleep(time).await;
    }
    dropped.unwrap_or(Ok((status, body, vec![])))
}

impl Shared {
    pub fn new(base: String) -> Self {
        Self {
            base,
            ..Self::default()
        }
    }

    fn keep(&self, key: Option<&str>, response: (u16, Value)) {
        let mut kept = self.kept.lock();
        if let Some(entry) = key.and_then(|key| kept.get_mut(key)) {
            entry.response = Some(response);
        }
    }

    fn forget(&self, key: Option<&str>) {
        if let Some(key) = key {
            self.kept.lock().remove(key);
        }
    }
}

/// A meter event in progress. Stripe accepts one meter event at a time for each customer and meter.
struct Metering<'a>(&'a Shared, Option<(String, String)>);

impl<'a> Metering<'a> {
    fn begin(shared: &'a Shared, call: &Call<'_>) -> Option<Self> {
        if call.path != ["billing", "meter_events"] {
            return Some(Self(shared, None));
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let params = call.params;
        let one = (
            text(&params["event_name"]),
            text(&params["payload"]["stripe_customer_id"]),
        );
        let mut metering = shared.metering.lock();
        if metering.contains(&one) {
            return None;
        }
        metering.push(one.clone());
        Some(Self(shared, Some(one)))
    }
}

impl Drop for Metering<'_> {
    fn drop(&mut self) {
        if let Some(one) = &self.1 {
            self.0.metering.lock().retain(|other| other != one);
        }
    }
}
