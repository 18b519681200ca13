//! The layer in an axum application, with a substitute for Quota that misbehaves on demand.

mod fake_quota;

use std::time::Duration;

use axum::{
    Extension, Router,
    body::{Body, to_bytes},
    routing::{get, post},
};
use http::{HeaderName, HeaderValue, Request, StatusCode, header};
use quota_tower::{Code, Decision, OnUnavailable, QuotaLayer, QuotaLayerBuilder};
use serde_json::{Value, json};
use tower_service::Service as _;

use self::fake_quota::FakeQuota;

const KEY: &str = "qk_secret-of-the-consumer";
const TOKEN: &str = "qs_secret-of-the-service";
const LONG: Duration = Duration::from_secs(60);

/// Allows more time than by default, because a busy machine may pause the test for seconds.
fn builder(quota: &FakeQuota) -> QuotaLayerBuilder {
    QuotaLayer::builder(&quota.url, TOKEN).timeout(LONG)
}

/// An application whose handlers respond with the decision that they receive.
fn app(layer: QuotaLayerBuilder) -> Router {
    let handler = async |Extension(decision): Extension<Decision>| {
        format!("{:?} {:?}", decision.code, decision.plan)
    };
    Router::new()
        .route("/orders/{id}", get(handler))
        .route("/orders", post(handler))
        .layer(layer.build().expect("the settings are valid"))
}

fn request(path: &str) -> http::request::Builder {
    Request::get(path).header("x-api-key", KEY)
}

struct Received {
    status: u16,
    headers: http::HeaderMap,
    body: String,
}

impl Received {
    fn header(&self, name: &str) -> Option<&str> {
        let value = self.headers.get(name)?;
        Some(value.to_str().expect("it is text"))
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("a problem")
    }
}

async fn send(app: &Router, request: http::request::Builder) -> Received {
    let request = request.body(Body::empty()).expect("a request");
    let mut app = app.clone();
    let Ok(response) = app.call(request).await;
    let (parts, body) = response.into_parts();
    let body = to_bytes(body, usize::MAX).await.expect("a body");
    Received {
        status: parts.status.as_u16(),
        headers: parts.headers,
        body: String::from_utf8(body.to_vec()).expect("text"),
    }
}

fn allowed() -> Value {
    json!({
        "allowed": true, "code": "allowed", "key_id": "k-1", "plan": "Starter", "retry_after": null,
        "limits": [{"policy": "rpm", "limit": 10, "remaining": 9, "reset_at": "2026-11-27T00:00:00Z"}],
        "headers": {"X-RateLimit-Remaining": "9", "RateLimit": "\"rpm\";r=9;t=6"},
    })
}

fn denied(code: &str, retry_after: Option<u64>) -> Value {
    json!({
        "allowed": false, "code": code, "key_id": "k-1", "plan": "Starter", "retry_after": retry_after,
        "limits": [
            {"policy": "rpm", "limit": 10, "remaining": 2, "reset_at": "2026-11-27T00:00:00Z"},
            {"policy": "daily", "limit": 20, "remaining": 1, "reset_at": "2026-11-28T00:00:00Z"},
        ],
        "headers": {"X-RateLimit-Remaining": "2", "Retry-After": "7", "Cache-Control": "no-store"},
    })
}

#[tokio::test]
async fn several_request_ids_are_not_forwarded() {
    let quota = FakeQuota::answering(|_| allowed()).await;
    let app = app(builder(&quota));
    let ids = request("/orders/7")
        .header("x-request-id", "r-1")
        .header("x-request-id", "r-2");
    assert_eq!(send(&app, ids).await.status, 200);
    let seen = quota.checks().pop().expect("a check");
    assert_eq!(seen.header("x-request-id"), None);
}

#[tokio::test]
async fn allowed_request_reaches_the_handler_with_its_decision() {
    let quota = FakeQuota::answering(|_| allowed()).await;
    let app = app(builder(&quota));
    let id = request("/orders/7?secret=1").header("x-request-id", "r-1");
    let response = send(&app, id).await;
    assert_eq!(
        (response.status, &*response.body),
        (200, "Allowed Some(\"Starter\")")
    );
    assert_eq!(response.header("x-ratelimit-remaining"), Some("9"));
    assert_eq!(response.header("ratelimit"), Some("\"rpm\";r=9;t=6"));
    let seen = quota.checks().pop().expect("a check");
    assert_eq!(seen.line, "POST /v1/check HTTP/1.1");
    assert_eq!(
        seen.header("authorization"),
        Some("Bearer qs_secret-of-the-service")
    );
    assert_eq!(seen.header("content-type"), Some("application/json"));
    assert_eq!(seen.header("x-request-id"), Some("r-1"));
    assert_eq!(
        seen.body,
        json!({"key": KEY, "cost": 1, "endpoint": "GET /orders/{id}"})
    );
    assert_eq!(quota.checks().len(), 1);
}

#[tokio::test]
async fn key_cost_and_endpoint_can_be_chosen() {
    let quota = FakeQuota::answering(|_| allowed()).await;
    let header = HeaderName::from_static("x-own-key");
    let own = app(builder(&quota)
        .key_header(header)
        .cost(|parts| {
            parts
                .uri
                .query()
                .map_or(0, |it| it.len().try_into().unwrap())
        })
        .endpoint(|_| Some("a\nb".repeat(100))));
    for (query, cost) in [("", 1), ("?abcde", 5)] {
        let request = Request::get(format!("/orders/7{query}")).header("x-own-key", "other");
        assert_eq!(send(&own, request).await.status, 200);
        let seen = quota.checks().pop().expect("a check").body;
        let endpoint = "ab".repeat(64);
        assert_eq!(
            seen,
            json!({"key": "other", "cost": cost, "endpoint": endpoint})
        );
    }
    assert_eq!(send(&own, request("/orders/7")).await.status, 401);
    let none = app(builder(&quota)
        .key(|parts| parts.uri.query().map(str::to_owned))
        .endpoint(|_| None));
    assert_eq!(
        send(&none, Request::get("/orders/7?qk_1")).await.status,
        200
    );
    let seen = quota.checks().pop().expect("a check").body;
    assert_eq!(seen, json!({"key": "qk_1", "cost": 1}));
    // Quota would reject this cost, so the request is denied without a check.
    let costly = app(builder(&quota).cost(|_| 1_000_001));
    let response = send(&costly, request("/orders/7")).await;
    assert_eq!(response.status, 429);
    assert_eq!(response.header("retry-after"), None);
    assert_eq!(quota.checks().len(), 3);
}

#[tokio::test]
async fn denial_becomes_a_problem_with_quotas_headers() {
    let quota_exceeded = "https://iana.org/assignments/http-problem-types#quota-exceeded";
    let reduced = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity";
    for (code, status, kind, violated) in [
        ("quota_exceeded", 429, quota_exceeded, Some("daily")),
        ("reduced_capacity", 429, reduced, None),
        ("unknown_key", 401, "about:blank", None),
        ("inactive_key", 401, "about:blank", None),
        ("expired_key", 401, "about:blank", None),
        ("payment_required", 402, "about:blank", None),
        ("a_new_reason", 429, quota_exceeded, None),
    ] {
        let quota = FakeQuota::answering(move |_| denied(code, Some(7))).await;
        // A request with this cost violates only the daily quota.
        let app = app(builder(&quota).cost(|_| 2));
        let response = send(&app, request("/orders/7")).await;
        assert_eq!(response.status, status, "{code}");
        assert_eq!(
            response.header("content-type"),
            Some("application/problem+json")
        );
        assert_eq!(response.header("cache-control"), Some("no-store"));
        assert_eq!(response.header("x-ratelimit-remaining"), Some("2"));
        assert_eq!(response.header("retry-after"), Some("7"));
        let problem = response.json();
        assert_eq!(problem["status"], status);
        assert_eq!(problem["type"], kind, "{code}");
        assert_eq!(problem["request_id"], "quota-1");
        let violated = violated.map_or(Value::Null, |policy| json!([policy]));
        assert_eq!(problem["violated-policies"], violated, "{code}");
        assert!(!response.body.contains(KEY), "{}", response.body);
    }
}

#[tokio::test]
async fn requests_without_a_possible_key_are_not_checked() {
    let quota = FakeQuota::answering(|_| allowed()).await;
    let app = app(builder(&quota).on_unavailable(OnUnavailable::Allow));
    let missing = "Bearer realm=\"quota\"";
    let invalid = "Bearer realm=\"quota\", error=\"invalid_token\"";
    let long = "k".repeat(257);
    for (request, challenge) in [
        (Request::get("/orders/7"), missing),
        (request("/orders/7").header("x-api-key", KEY), missing),
        (
            request("/orders/7").header("authorization", "Bearer qk_2"),
            missing,
        ),
        (Request::get("/orders/7").header("x-api-key", ""), invalid),
        (
            Request::get("/orders/7").header("x-api-key", &long),
            invalid,
        ),
        (
            Request::get("/orders/7").header(
                "x-api-key",
                HeaderValue::from_bytes("qk_ü".as_bytes()).unwrap(),
            ),
            invalid,
        ),
    ] {
        let shown = format!("{request:?}");
        let response = send(&app, request).await;
        assert_eq!(response.status, 401, "{shown}");
        assert_eq!(
            response.header("www-authenticate"),
            Some(challenge),
            "{shown}"
        );
        assert_eq!(response.json()["status"], 401);
    }
    assert!(quota.checks().is_empty());
    let bearer = Request::get("/orders/7").header(header::AUTHORIZATION, format!("Bearer {KEY}"));
    assert_eq!(send(&app, bearer).await.status, 200);
}

/// Sends a request for which Quota makes no decision, once with each [`OnUnavailable`] setting. Returns the statuses.
async fn undecided(quota: &FakeQuota) -> [u16; 2] {
    undecided_within(LONG, quota).await
}

/// Works like [`undecided`], with a time limit for each check.
async fn undecided_within(limit: Duration, quota: &FakeQuota) -> [u16; 2] {
    let mut statuses = [0; 2];
    let settings = [OnUnavailable::Deny, OnUnavailable::Allow];
    for (status, on_unavailable) in statuses.iter_mut().zip(settings) {
        let app = app(builder(quota).timeout(limit).on_unavailable(on_unavailable));
        let response = send(&app, request("/orders/7")).await;
        *status = response.status;
        if response.status == 200 {
            assert_eq!(on_unavailable, OnUnavailable::Allow);
            assert_eq!(response.body, format!("{:?} None", Code::Unchecked));
            assert_eq!(response.header("x-quota-degraded"), Some("unchecked"));
        } else {
            assert_eq!(response.header("retry-after"), Some("1"));
            assert_eq!(response.header("cache-control"), Some("no-store"));
            assert_eq!(response.json()["status"], 503);
        }
        assert_eq!(response.header("x-ratelimit-remaining"), None);
        assert_eq!(send(&app, Request::get("/orders/7")).await.status, 401);
    }
    statuses
}

#[tokio::test]
async fn without_a_decision_the_setting_applies() {
    let huge = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: 9999999\r\n\r\n{}",
        " ".repeat(99_999)
    );
    for response in [
        "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>",
        "HTTP/1.1 200 OK\r\ncontent-length: 16\r\n\r\n{\"allowed\":true}",
        "HTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.1 307 Temporary Redirect\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
        "not HTTP\r\n\r\n",
        &huge,
    ] {
        let quota = FakeQuota::raw(response).await;
        assert_eq!(undecided(&quota).await, [503, 200], "{response:.60}");
        assert_eq!(quota.checks().len(), 2, "{response:.60}");
    }
    let body = r#"{"allowed":true,"code":"quota_exceeded","limits":[],"headers":{}}"#;
    let length = body.len();
    let contradiction = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
    let quota = FakeQuota::raw(&contradiction).await;
    assert_eq!(undecided(&quota).await, [503, 200]);
    let (short, silent) = (Duration::from_millis(300), FakeQuota::silent().await);
    assert_eq!(undecided_within(short, &silent).await, [503, 200]);
    assert_eq!(undecided(&FakeQuota::absent().await).await, [503, 200]);
}

#[tokio::test]
async fn requests_that_quota_itself_prevents_are_never_passed_on() {
    for response in [
        "HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 422 Unprocessable Content\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 503 Service Unavailable\r\nx-quota-degraded: redis-away\r\ncontent-length: 0\r\n\r\n",
    ] {
        let quota = FakeQuota::raw(response).await;
        assert_eq!(undecided(&quota).await, [503, 503], "{response}");
    }
}

#[tokio::test]
async fn check_whose_outcome_is_unknown_is_not_repeated() {
    let quota = FakeQuota::raw("").await;
    let app = app(builder(&quota));
    assert_eq!(send(&app, request("/orders/7")).await.status, 503);
    assert_eq!(quota.checks().len(), 1);
    // A check is not repeated on a reused connection either.
    let quota = FakeQuota::answering(|n| if n == 0 { allowed() } else { Value::Null }).await;
    let app = self::app(builder(&quota));
    assert_eq!(send(&app, request("/orders/7")).await.status, 200);
    assert_eq!(send(&app, request("/orders/7")).await.status, 503);
    assert_eq!(quota.checks().len(), 2);
    assert_eq!(quota.connections(), 1);
}

#[tokio::test]
async fn remembered_denial_avoids_checks_until_it_expires() {
    let answer = |n: usize| {
        if n == 0 {
            denied("quota_exceeded", Some(7))
        } else {
            allowed()
        }
    };
    let quota = FakeQuota::answering(answer).await;
    let cost = |parts: &http::request::Parts| parts.uri.query().map_or(2, |it| it.parse().unwrap());
    let app = app(builder(&quota).cost(cost).cache_denials(100));
    let began = std::time::Instant::now();
    let first = send(&app, request("/orders/7")).await;
    let answered = std::time::Instant::now();
    let again = send(&app, request("/orders/7")).await;
    let more = send(&app, request("/orders/7?3")).await;
    if began.elapsed() < Duration::from_secs(1) {
        assert_eq!([first.status, again.status, more.status], [429; 3]);
        assert_eq!(again.body, first.body);
        assert_eq!(again.headers, first.headers);
        assert_eq!(quota.checks().len(), 1);
    }
    // Other keys, and requests that cost less, are checked.
    let before = quota.checks().len();
    let other = Request::get("/orders/7").header("x-api-key", "qk_other");
    assert_eq!(send(&app, other).await.status, 200);
    assert_eq!(send(&app, request("/orders/7?1")).await.status, 200);
    assert_eq!(quota.checks().len(), before + 2);
    tokio::time::sleep_until((answered + Duration::from_secs(1)).into()).await;
    assert_eq!(send(&app, request("/orders/7")).await.status, 200);
}

#[tokio::test]
async fn denied_requests_are_checked_again_by_default_and_if_the_wait_is_short() {
    let quota = FakeQuota::answering(|_| denied("quota_exceeded", Some(60))).await;
    let uncached = app(builder(&quota));
    let short = FakeQuota::answering(|_| denied("quota_exceeded", Some(1))).await;
    let cached = app(builder(&short).cache_denials(100));
    for _ in 0..3 {
        assert_eq!(send(&uncached, request("/orders/7")).await.status, 429);
        assert_eq!(send(&cached, request("/orders/7")).await.status, 429);
    }
    assert_eq!((quota.checks().len(), short.checks().len()), (3, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_requests_share_a_few_connections() {
    let quota = FakeQuota::answering(|_| allowed()).await;
    let app = app(builder(&quota));
    for _ in 0..20 {
        let sent = (0..8).map(|_| {
            let app = app.clone();
            tokio::spawn(async move { send(&app, request("/orders/7")).await.status })
        });
        for status in sent.collect::<Vec<_>>() {
            assert_eq!(status.await.expect("it ends"), StatusCode::OK);
        }
    }
    assert_eq!(quota.checks().len(), 160);
    let connections = quota.connections();
    assert!((1..=16).contains(&connections), "{connections}");
}
