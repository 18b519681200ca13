//! Responses to requests that are not passed on: problem details (RFC 9457).

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{Either, Full};
use serde::Serialize;

use crate::decision::{Code, Decision};

/// The body of a response: the service's own, or the layer's problem details.
pub type ResponseBody<B> = Either<B, Full<Bytes>>;

const QUOTA_EXCEEDED: &str = "https://iana.org/assignments/http-problem-types#quota-exceeded";
const REDUCED_CAPACITY: &str =
    "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity";
/// The problem type for problems that the status describes sufficiently.
const BLANK: &str = "about:blank";

#[derive(Serialize)]
struct Problem<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    title: &'a str,
    status: u16,
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<&'a str>,
    #[serde(rename = "violated-policies", skip_serializing_if = "Vec::is_empty")]
    violated_policies: Vec<&'a str>,
}

/// Returns a response that caches must not store, with the problem as its body.
fn respond(problem: &Problem<'_>) -> Response<Full<Bytes>> {
    let body = serde_json::to_vec(problem).unwrap_or_default();
    let mut response = Response::new(Full::from(body));
    *response.status_mut() =
        StatusCode::from_u16(problem.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, "application/problem+json"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Returns the response to a request without a key.
pub(crate) fn key_missing() -> Response<Full<Bytes>> {
    let mut response = respond(&Problem {
        kind: BLANK,
        title: "Unauthorized",
        status: 401,
        detail: "Send an API key.",
        request_id: None,
        violated_policies: vec![],
    });
    let challenge = HeaderValue::from_static("Bearer realm=\"quota\"");
    response
        .headers_mut()
        .insert(header::WWW_AUTHENTICATE, challenge);
    response
}

/// Returns the response to a request with a string that cannot be a key.
pub(crate) fn key_malformed() -> Response<Full<Bytes>> {
    let mut decision = Decision::local(Code::UnknownKey);
    let challenge = HeaderValue::from_static("Bearer realm=\"quota\", error=\"invalid_token\"");
    decision.headers.insert(header::WWW_AUTHENTICATE, challenge);
    denied(&decision, 1)
}

/// Returns the response to a request that was denied. `cost` is the request's cost.
pub(crate) fn denied(decision: &Decision, cost: u32) -> Response<Full<Bytes>> {
    let wait;
    let (status, kind, title, detail) = match decision.code {
        Code::UnknownKey | Code::InactiveKey | Code::ExpiredKey => (
            401,
            BLANK,
            "Unauthorized",
            "This API key is invalid, inactive or expired.",
        ),
        Code::PaymentRequired => (
            402,
            BLANK,
            "Payment Required",
            "This API key requires a valid subscription.",
        ),
        Code::ReducedCapacity => (
            429,
            REDUCED_CAPACITY,
            "Temporarily reduced capacity",
            "Rate limits can't be checked right now. Try again in a few seconds.",
        ),
        _ => {
            wait = match decision.retry_after {
                Some(1) => {
                    "A limit of this API key has been reached. Retry in 1 second.".to_owned()
                }
                Some(secs) => {
                    format!("A limit of this API key has been reached. Retry in {secs} seconds.")
                }
                None => {
                    "A limit of this API key is lower than the cost of this request.".to_owned()
                }
            };
            (429, QUOTA_EXCEEDED, "Rate limit or quota exceeded", &*wait)
        }
    };
    let is_violated = |remaining: u64| remaining < u64::from(cost);
    let violated = decision
        .limits
        .iter()
        .filter(|it| decision.code == Code::QuotaExceeded && is_violated(it.remaining))
        .map(|it| it.policy.as_str());
    let mut response = respond(&Problem {
        kind,
        title,
        status,
        detail,
        request_id: decision.request_id.as_ref().and_then(|id| id.to_str().ok()),
        violated_policies: violated.collect(),
    });
    for (name, value) in &decision.headers {
        response.headers_mut().insert(name, value.clone());
    }
    response
}

/// Returns the response to a request for which there is no decision.
pub(crate) fn unavailable() -> Response<Full<Bytes>> {
    let mut response = respond(&Problem {
        kind: BLANK,
        title: "Service Unavailable",
        status: 503,
        detail: "Rate limits can't be checked right now. Try again in a few seconds.",
        request_id: None,
        violated_policies: vec![],
    });
    let wait = HeaderValue::from_static("1");
    response.headers_mut().insert(header::RETRY_AFTER, wait);
    response
}
