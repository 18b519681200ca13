//! Tests the rate limit service for Envoy with a gRPC client. `gateways` tests the service with Envoy.

use std::{sync::Arc, time::Duration};

use prost::Message as _;
use quota_server::{
    api::grpc::message::{Code, Entry, RateLimit, RateLimitRequest, Unit},
    clock::{Clock as _, SystemClock, TestClock},
    secret_text::{Kind, SecretText},
};
use quota_testkit::{proxy::Fault, redis::free_port};
use reqwest::Client;
use serde_json::{Value, json};

use crate::{
    outage::through_proxy,
    support::{
        app::{Account, Key, PASSWORD, Setup, TestApp},
        grpc::{GrpcClient, Reply, descriptor, framed, request},
        quota::{Quota, data_dir},
        stripe::TestStripe,
    },
};

const LISTEN: &str = "--grpc-listen=127.0.0.1:0";
const INVALID_ARGUMENT: Option<u32> = Some(3);
const UNIMPLEMENTED: Option<u32> = Some(12);
const UNAVAILABLE: Option<u32> = Some(14);
const UNAUTHENTICATED: Option<u32> = Some(16);

/// A server with a tenant, and a connection to its gRPC listener.
struct World {
    app: TestApp,
    account: Account,
    token: String,
    client: GrpcClient,
}

impl World {
    async fn with(setup: Setup) -> Self {
        let app = setup.flag(LISTEN).start().await;
        let account = app.register().await;
        let token = app.service_token(&account).await;
        let client = GrpcClient::connect(app.grpc_addr.expect("gRPC is on")).await;
        Self {
            app,
            account,
            token,
            client,
        }
    }

    async fn start() -> Self {
        Self::with(TestApp::setup()).await
    }

    /// Starts a server with a clock that only the test advances.
    async fn still() -> (Self, TestClock) {
        let clock = TestClock::at(SystemClock::new().now());
        let setup = TestApp::setup().clock(Arc::new(clock.clone()));
        (Self::with(setup).await, clock)
    }

    async fn key(&self, plan: Value) -> Key {
        let plan = self.app.plan(&self.account, plan).await;
        self.app.key(&self.account, &plan).await
    }

    async fn call(&self, request: &RateLimitRequest) -> Reply {
        self.client.call(&self.token, request).await
    }

    async fn check(&self, key: &str) -> Reply {
        self.call(&request(key)).await
    }

    /// Returns the number of decisions so far.
    async fn decisions(&self) -> f64 {
        self.app.metric("quota_decisions_allowed_total").await
            + self.app.metric("quota_decisions_denied_total").await
    }
}

fn cost(key: &str, hits_addend: u32) -> RateLimitRequest {
    RateLimitRequest {
        hits_addend,
        ..request(key)
    }
}

fn remaining(reply: &Reply) -> u32 {
    reply.response.statuses[0].limit_remaining
}

#[tokio::test(flavor = "multi_thread")]
async fn decision_and_headers_are_those_of_the_check_api() {
    let (world, clock) = World::still().await;
    let plan = json!({"default_rpm": 60, "burst": 3, "daily_quota": 1000});
    let plan = world.app.plan(&world.account, plan).await;
    let checked = world.app.key(&world.account, &plan).await.text;
    let called = world.app.key(&world.account, &plan).await.text;
    for code in [Code::Ok, Code::Ok, Code::Ok, Code::OverLimit] {
        let check = world.app.post("/v1/check", json!({"key": checked}));
        let check = check.bearer(&world.token).send().await;
        let reply = world.check(&called).await;
        assert_eq!(reply.code(), code);
        assert_eq!(reply.codes(), [code]);
        assert_eq!(check.body["allowed"], json!(code == Code::Ok));
        let headers = check.body["headers"].as_object().expect("headers");
        for (name, value) in headers {
            let name = name.to_lowercase();
            assert_eq!(reply.header(&name), value.as_str(), "{name}");
        }
        let own = if code == Code::Ok { 0 } else { 2 };
        let count = reply.response.response_headers_to_add.len();
        assert_eq!(count, headers.len() + own, "{reply:?}");
    }

    let denied = world.check(&called).await;
    assert_eq!(denied.decision(), "limited");
    assert_eq!(denied.header("x-quota-decision"), Some("limited"));
    assert_eq!(denied.header("retry-after"), Some("1"));
    let problem = denied.problem();
    assert_eq!(problem["status"], 429);
    assert_eq!(problem["violated-policies"], json!(["rpm"]));
    assert_eq!(
        problem["request_id"].as_str(),
        denied.headers["x-request-id"].to_str().ok()
    );
    clock.advance(Duration::from_millis(999));
    assert_eq!(world.check(&called).await.code(), Code::OverLimit);
    clock.advance(Duration::from_millis(1));
    let allowed = world.check(&called).await;
    assert_eq!(allowed.code(), Code::Ok);
    assert_eq!(allowed.decision(), "allowed");
    assert_eq!(allowed.header("x-quota-decision"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_describes_the_limit_closest_to_exhaustion() {
    let (world, _clock) = World::still().await;
    let limit = |requests_per_unit, unit: Unit, name: &str| {
        Some(RateLimit {
            requests_per_unit,
            unit: unit.into(),
            name: name.to_owned(),
        })
    };
    let rate = world.key(json!({"default_rpm": 120, "burst": 4})).await;
    let reply = world.call(&cost(&rate.text, 3)).await;
    let status = &reply.response.statuses[0];
    assert_eq!(status.current_limit, limit(120, Unit::Minute, "rpm"));
    assert_eq!(status.limit_remaining, 1);
    // The three missing tokens refill at two tokens per second.
    let reset = status.duration_until_reset.as_ref().expect("a duration");
    assert_eq!((reset.seconds, reset.nanos), (1, 500_000_000));

    for (field, unit, name) in [
        ("daily_quota", Unit::Day, "daily"),
        ("monthly_quota", Unit::Month, "monthly"),
    ] {
        let key = world.key(json!({"default_rpm": 6000, field: 5})).await;
        for (code, left) in [(Code::Ok, 1), (Code::OverLimit, 1)] {
            let reply = world.call(&cost(&key.text, 4)).await;
            assert_eq!(reply.code(), code);
            let status = &reply.response.statuses[0];
            assert_eq!(status.current_limit, limit(5, unit, name));
            assert_eq!(status.limit_remaining, left);
            let reset = status.duration_until_reset.as_ref().expect("a duration");
            assert!((0..=31 * 86_400).contains(&reset.seconds), "{reset:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn key_that_admits_nothing_is_over_limit_and_charged_nothing() {
    let world = World::start().await;
    let plan = world.app.plan(&world.account, json!({})).await;
    let key = world.app.key(&world.account, &plan).await.text;
    let other = world.app.key(&world.account, &plan).await.text;
    let inactive = world.app.key(&world.account, &plan).await;
    let path = format!("/admin/api-keys/{}", inactive.id);
    let off = json!({"is_active": false});
    let off = world.app.act(&world.account, "PATCH", &path, off).await;
    assert_eq!(off.status, 200);
    let stranger = world.app.register().await;
    let strange_plan = world.app.plan(&stranger, json!({})).await;
    let strange = world.app.key(&stranger, &strange_plan).await.text;
    let unknown = SecretText::generate(Kind::ApiKey).expect("random bytes");
    let mut before = world.decisions().await;

    let bearer = format!("Bearer {other}");
    for (entries, sent) in [
        (&[][..], false),
        (&[("remote_address", "192.0.2.1")], false),
        (&[("api_key", "")], false),
        (&[("api_key", "-")], false),
        (&[("authorization", "Bearer jwt")], false),
        (&[("api_key", &key), ("api_key", &key)], false),
        (&[("api_key", &key), ("authorization", &bearer)], false),
        (&[("api_key", "x")], true),
        (&[("api_key", &unknown.reveal())], true),
        (&[("api_key", &inactive.text)], true),
        (&[("api_key", &strange)], true),
        (&[("api_key", &world.token)], true),
    ] {
        let reply = world
            .call(&RateLimitRequest {
                descriptors: vec![descriptor(entries)],
                hits_addend: 1,
            })
            .await;
        assert_eq!(reply.code(), Code::OverLimit, "{entries:?}");
        assert_eq!(reply.codes(), [Code::OverLimit]);
        assert_eq!(reply.response.statuses[0].current_limit, None);
        assert_eq!(reply.decision(), "unauthorized");
        assert_eq!(reply.header("x-quota-decision"), Some("unauthorized"));
        assert_eq!(reply.header("x-ratelimit-limit"), None);
        let challenge = reply.header("www-authenticate").expect("a challenge");
        assert_eq!(challenge.contains("invalid_token"), sent, "{entries:?}");
        assert_eq!(reply.problem()["status"], 401);
    }
    // Entries are much larger in memory than in the message, so their number is limited.
    for (entries, expected) in [
        (32, Code::Ok),
        (33, Code::OverLimit),
        (60_000, Code::OverLimit),
    ] {
        let mut request = request(&key);
        let empty = Entry::default();
        request.descriptors[0].entries.resize(entries, empty);
        let reply = world.call(&request).await;
        assert_eq!(reply.code(), expected, "{entries}");
        if expected == Code::OverLimit {
            assert_eq!(reply.decision(), "unavailable");
        }
    }
    before += 1.0;
    // Envoy also copies headers that are not UTF-8.
    let mut not_text = request("");
    not_text.descriptors[0].entries[0].value = vec![b'q', 0xff];
    let reply = world.call(&not_text).await;
    assert_eq!(reply.decision(), "unauthorized");
    assert!((world.decisions().await - before).abs() < 0.5);

    // The other tenant's gateway admits that tenant's key, and does not admit the first tenant's key.
    let token = world.app.service_token(&stranger).await;
    let reply = world.client.call(&token, &request(&strange)).await;
    assert_eq!(reply.code(), Code::Ok);
    let reply = world.client.call(&token, &request(&key)).await;
    assert_eq!(reply.decision(), "unauthorized");
    // A key is also accepted as a bearer token.
    for entries in [
        &[("authorization", &*bearer)][..],
        &[("api_key", "-"), ("authorization", &bearer)],
        &[("api_key", &other), ("authorization", &bearer)],
        &[("api_key", &other), ("authorization", "Bearer jwt")],
    ] {
        let request = RateLimitRequest {
            descriptors: vec![descriptor(entries)],
            hits_addend: 1,
        };
        assert_eq!(world.call(&request).await.code(), Code::Ok, "{entries:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paid_plan_without_a_subscription_is_over_limit() {
    let stripe = TestStripe::start().await;
    let world = World::with(stripe.configure(TestApp::setup())).await;
    let paid = world.key(json!({"billing": "paid"})).await;
    let reply = world.check(&paid.text).await;
    assert_eq!(reply.code(), Code::OverLimit);
    assert_eq!(reply.decision(), "payment_required");
    assert_eq!(reply.header("x-quota-decision"), Some("payment_required"));
    assert_eq!(reply.header("www-authenticate"), None);
    assert_eq!(reply.problem()["status"], 402);
    assert!(world.decisions().await < 0.5);
    let free = world.key(json!({})).await;
    assert_eq!(world.check(&free.text).await.code(), Code::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn call_needs_exactly_one_service_token() {
    let world = World::start().await;
    let key = world.key(json!({"default_rpm": 60, "burst": 5})).await;
    let body = framed(&request(&key.text).encode_to_vec());
    let bearer = format!("Bearer {}", world.token);
    let joined = format!("{0},{0}", world.token);
    let unknown = SecretText::generate(Kind::ServiceToken).expect("random bytes");
    for metadata in [
        &[][..],
        &[("authorization", &*bearer)],
        &[("x-service-token", "")],
        &[("x-service-token", "qs_x")],
        &[("x-service-token", &unknown.reveal())],
        &[("x-service-token", &key.text)],
        &[("x-service-token", &joined)],
        &[("x-service-token", &world.token), ("x-service-token", "x")],
        &[
            ("x-service-token", &world.token),
            ("x-service-token", &world.token),
        ],
    ] {
        let reply = world.client.send(metadata, body.clone()).await;
        assert_eq!(reply.status, UNAUTHENTICATED, "{metadata:?}: {reply:?}");
        assert!(reply.message().contains("token") || reply.message().contains("Token"));
        assert!(!reply.message().contains(&world.token));
    }
    assert!(world.decisions().await < 0.5);
    let metric = "quota_http_responses_total{status=\"401\"}";
    assert!((world.app.metric(metric).await - 9.0).abs() < 0.5);
    assert_eq!(world.check(&key.text).await.code(), Code::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn hits_addend_is_the_cost() {
    let (world, _clock) = World::still().await;
    let key = world
        .key(json!({"default_rpm": 60, "burst": 20}))
        .await
        .text;
    for (hits, left) in [(0, 19), (1, 18), (5, 13)] {
        let reply = world.call(&cost(&key, hits)).await;
        assert_eq!((reply.code(), remaining(&reply)), (Code::Ok, left));
    }
    // The descriptor's cost takes precedence. A cost of 0 counts as 1.
    for (hits, left) in [(2, 11), (0, 10)] {
        let mut request = cost(&key, 7);
        request.descriptors[0].hits_addend = Some(hits);
        let reply = world.call(&request).await;
        assert_eq!((reply.code(), remaining(&reply)), (Code::Ok, left));
    }
    // A cost above the burst can never be allowed.
    let never = world.call(&cost(&key, 21)).await;
    assert_eq!(
        (never.code(), never.decision()),
        (Code::OverLimit, "limited")
    );
    assert_eq!(never.header("retry-after"), None);
    // A cost above the check API's maximum is rejected, not clamped.
    for (hits, is_negative) in [
        (1_000_001, false),
        (u64::from(u32::MAX) + 2, false),
        (u64::MAX, false),
        (1, true),
    ] {
        let mut request = request(&key);
        request.descriptors[0].hits_addend = Some(hits);
        request.descriptors[0].is_negative_hits = is_negative;
        let reply = world.call(&request).await;
        assert_eq!(reply.code(), Code::OverLimit, "{hits}");
        assert_eq!(reply.decision(), "unavailable");
        assert_eq!(reply.problem()["status"], 422);
    }
    let rest = world.call(&cost(&key, 10)).await;
    assert_eq!((rest.code(), remaining(&rest)), (Code::Ok, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn descriptors_are_charged_in_order_up_to_the_first_denied_one() {
    let (world, _clock) = World::still().await;
    let plan = json!({"default_rpm": 1, "burst": 3});
    let plan = world.app.plan(&world.account, plan).await;
    let first = world.app.key(&world.account, &plan).await.text;
    let second = world.app.key(&world.account, &plan).await.text;
    let third = world.app.key(&world.account, &plan).await.text;
    let all = |keys: &[&String]| RateLimitRequest {
        descriptors: keys
            .iter()
            .map(|key| descriptor(&[("api_key", key)]))
            .collect(),
        hits_addend: 1,
    };
    let left = |reply: &Reply| {
        let statuses = reply.response.statuses.iter();
        statuses.map(|it| it.limit_remaining).collect::<Vec<_>>()
    };
    let reply = world.call(&all(&[&first, &second])).await;
    assert_eq!(reply.code(), Code::Ok);
    assert_eq!(reply.codes(), [Code::Ok, Code::Ok]);
    assert_eq!(left(&reply), [2, 2]);
    // The headers are those of the first descriptor.
    let reply = world.call(&all(&[&second, &first, &first])).await;
    assert_eq!(left(&reply), [1, 1, 0]);
    assert_eq!(reply.header("x-ratelimit-remaining"), Some("1"));
    // For a denial, the headers are those of the denied descriptor. No tokens are taken from the third key.
    let reply = world.call(&all(&[&second, &first, &third])).await;
    assert_eq!(reply.code(), Code::OverLimit);
    assert_eq!(
        reply.codes(),
        [Code::Ok, Code::OverLimit, Code::Unknown],
        "{reply:?}"
    );
    assert_eq!(left(&reply)[..2], [0, 0]);
    assert_eq!(reply.header("x-ratelimit-remaining"), Some("0"));
    assert!(reply.header("retry-after").is_some());
    assert_eq!(remaining(&world.check(&third).await), 2);
    assert_eq!(world.check(&second).await.code(), Code::OverLimit);

    for count in [0, 17] {
        let reply = world.call(&all(&vec![&third; count])).await;
        assert_eq!(reply.code(), Code::OverLimit, "{count}");
        assert_eq!(reply.decision(), "unavailable");
    }
    assert_eq!(remaining(&world.check(&third).await), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_shows_the_endpoint_and_the_cost() {
    let world = World::start().await;
    let key = world.key(json!({"default_rpm": 1, "burst": 6})).await.text;
    let key = ("api_key", &*key);
    let long = format!("/{}", "x".repeat(60_000));
    for (hits, entries) in [
        (2, &[key, ("endpoint", "GET /orders?secret=1")][..]),
        (1, &[key, ("method", "POST"), ("path", "/a?secret=1")]),
        (1, &[key, ("path", &long)]),
        (1, &[key]),
        (9, &[key, ("endpoint", "denied")]),
    ] {
        let request = RateLimitRequest {
            descriptors: vec![descriptor(entries)],
            hits_addend: hits,
        };
        let reply = world.call(&request).await;
        assert_eq!(reply.code() == Code::Ok, hits < 9, "{reply:?}");
    }
    world.app.ship_usage().await;
    let path = "/admin/decisions?limit=100";
    let log = world
        .app
        .act(&world.account, "GET", path, Value::Null)
        .await;
    let items = log.body["items"].as_array().expect("items").iter();
    let text = |item: &Value, field: &str| item[field].as_str().expect("text").to_owned();
    let mut seen = items
        .map(|item| {
            let endpoint = text(item, "endpoint");
            (
                endpoint.chars().take(20).collect::<String>(),
                text(item, "outcome"),
                item["cost"].as_u64().expect("a number"),
            )
        })
        .collect::<Vec<_>>();
    seen.sort();
    let expected = [
        ("", "allowed", 1),
        ("/xxxxxxxxxxxxxxxxxxx", "allowed", 1),
        ("GET /orders", "allowed", 2),
        ("POST /a", "allowed", 1),
        ("denied", "rejected", 9),
    ];
    let expected = expected.map(|(a, b, cost)| (a.to_owned(), b.to_owned(), cost));
    assert_eq!(seen, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_decision_the_call_fails() {
    let first = TestApp::setup().without_jobs().start().await;
    let (proxy, url) = through_proxy(&first.database).await;
    let setup = TestApp::setup().database(first.database.clone()).url(url);
    let world = World::with(setup).await;
    let key = world.key(json!({})).await;
    let cold = world.key(json!({})).await;
    assert_eq!(world.check(&key.text).await.code(), Code::Ok);
    proxy.set(Fault::Refuse);
    proxy.cut();
    let reply = world.check(&cold.text).await;
    assert_eq!(reply.status, UNAVAILABLE, "{reply:?}");
    // Keys in memory keep working.
    assert_eq!(world.check(&key.text).await.code(), Code::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_the_plan_decides() {
    let setup = TestApp::setup().flag(format!("--redis-url=redis://127.0.0.1:{}", free_port()));
    let world = World::with(setup).await;
    for (mode, status) in [("open", Some(0)), ("closed", UNAVAILABLE)] {
        let plan = json!({"default_rpm": 600, "on_redis_failure": mode});
        let key = world.key(plan).await;
        // Until the circuit breaker opens, calls to Redis fail.
        let mut reply = world.check(&key.text).await;
        for _ in 0..50 {
            let is_denied = reply.status == Some(0) && reply.code() == Code::OverLimit;
            if reply.status == status && !is_denied {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            reply = world.check(&key.text).await;
        }
        assert_eq!(reply.status, status, "{mode}: {reply:?}");
        if mode == "open" {
            assert_eq!(reply.code(), Code::Ok);
            assert_eq!(reply.header("x-quota-degraded"), Some("redis-away"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_get_an_error_and_never_a_panic() {
    let world = World::start().await;
    let key = world.key(json!({"default_rpm": 60_000_000})).await.text;
    let token = [("x-service-token", &*world.token)];
    let whole = RateLimitRequest {
        descriptors: vec![
            descriptor(&[("api_key", &key), ("endpoint", "GET /")]),
            descriptor(&[("api_key", &key)]),
        ],
        hits_addend: 300,
    };
    let whole = framed(&whole.encode_to_vec());
    assert_eq!(
        world.client.send(&token, whole.clone()).await.code(),
        Code::Ok
    );
    let mut random = fastrand::Rng::with_seed(20_261_127);
    let mut statuses = std::collections::BTreeMap::<u32, u32>::new();
    for _ in 0..3000 {
        let mut body = whole.clone();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..body.len());
            match random.u8(..4) {
                0 => body.truncate(at.max(1)),
                1 => body[at] = random.u8(..),
                2 => body.insert(at, random.u8(..)),
                _ => body[at] ^= 1 << random.u8(..8),
            }
        }
        // Most of the altered messages have the wrong length, which is detected before decoding. Therefore, the length
        // is corrected in half of them.
        if random.bool() && body.len() > 5 {
            body = framed(&body[5..]);
        }
        let reply = world.client.send(&token, body).await;
        assert_eq!(reply.http_status, 200);
        *statuses.entry(reply.status.expect("gRPC")).or_default() += 1;
    }
    let expected = [Some(0), INVALID_ARGUMENT, UNIMPLEMENTED];
    assert!(
        statuses.keys().all(|it| expected.contains(&Some(*it))),
        "{statuses:?}"
    );
    assert!(statuses[&3] > 500 && statuses[&0] > 100, "{statuses:?}");
    assert!(world.app.metric("quota_panics_total").await < 0.5);

    // A consumer can cause a message that is too large, so the call succeeds and returns a denial.
    let large = "x".repeat(200 * 1024);
    let reply = world.check(&large).await;
    assert_eq!(reply.code(), Code::OverLimit);
    assert_eq!(reply.decision(), "unavailable");
    assert_eq!(reply.problem()["status"], 413);
    assert_eq!(world.check(&key).await.code(), Code::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_requests_are_rejected() {
    let world = World::start().await;
    let key = world.key(json!({})).await.text;
    let token = [("x-service-token", &*world.token)];
    let body = framed(&request(&key).encode_to_vec());
    for path in [
        "/envoy.service.ratelimit.v3.RateLimitService/Other",
        "/envoy.service.ratelimit.v2.RateLimitService/ShouldRateLimit",
        "/v1/check",
        "/",
    ] {
        let reply = world
            .client
            .send_to(path, "application/grpc", &token, body.clone())
            .await;
        assert_eq!(reply.status, UNIMPLEMENTED, "{path}");
    }
    let path = crate::support::grpc::SHOULD_RATE_LIMIT;
    for media_type in ["application/json", "application/grpc-web", "text/plain"] {
        let reply = world
            .client
            .send_to(path, media_type, &token, body.clone())
            .await;
        assert_eq!(
            (reply.http_status, reply.status),
            (415, None),
            "{media_type}"
        );
    }
    let reply = world
        .client
        .send_to(path, "application/grpc+proto", &token, body.clone())
        .await;
    assert_eq!(reply.code(), Code::Ok);
    // A gRPC call needs HTTP/2.
    let url = format!("http://{}{path}", world.app.grpc_addr.expect("gRPC is on"));
    let response = Client::new()
        .post(url)
        .header("content-type", "application/grpc")
        .header("x-service-token", &world.token)
        .body(body)
        .send()
        .await
        .expect("the server responds");
    assert_eq!(response.status(), 415);
    let decisions = world.decisions().await;
    assert!((decisions - 1.0).abs() < 0.5, "{decisions}");
    // The gRPC listener does not serve the API, and the API's listener does not serve gRPC.
    let api = world.app.post(path, json!({})).send().await;
    assert_eq!(api.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn process_serves_grpc_and_logs_calls_without_secrets() {
    let (data, http) = (data_dir(), Client::new());
    let settings = [("QUOTA_GRPC_LISTEN", "127.0.0.1:0"), ("RUST_LOG", "info")];
    let (quota, out) = Quota::start_unread(data.path(), &settings);
    let reader = std::thread::spawn(move || {
        let lines = std::io::BufRead::lines(out).map_while(Result::ok);
        lines.collect::<Vec<_>>()
    });
    let addr = quota.grpc_addr.expect("gRPC is on");
    let plan = json!({"name": "grpc", "default_rpm": 1, "burst": 1});
    let key = quota.key_on(&http, plan).await;
    let url = |path: &str| format!("http://{}{path}", quota.addr);
    let login = json!({"email": "owner@example.com", "password": PASSWORD});
    let login = http.post(url("/auth/login")).json(&login).send().await;
    let login: Value = login
        .expect("the server responds")
        .json()
        .await
        .expect("JSON");
    let access = login["access_token"].as_str().expect("a token");
    let token = http
        .post(url("/admin/service-tokens"))
        .bearer_auth(access)
        .json(&json!({"name": "Envoy"}));
    let token = token.send().await.expect("the server responds");
    let token: Value = token.json().await.expect("JSON");
    let token = token["token"].as_str().expect("a token");

    let client = GrpcClient::connect(addr).await;
    assert_eq!(client.call(token, &request(&key)).await.code(), Code::Ok);
    let denied = client.call(token, &request(&key)).await;
    assert_eq!(denied.code(), Code::OverLimit);
    let rejected = client.call("qs_x", &request(&key)).await;
    assert_eq!(rejected.status, UNAUTHENTICATED);
    let open = "quota_connections_open{listener=\"grpc\"}";
    assert_eq!(quota.counter(&http, open).await, 1);
    quota.stop();
    let refused = tokio::net::TcpStream::connect(addr).await;
    assert!(refused.is_err(), "the server still listens");

    let lines = reader.join().expect("the log ends");
    let all = lines.join("\n");
    assert!(!all.contains(&key) && !all.contains(token), "{all}");
    let lines = lines.iter().filter(|it| it.contains("ShouldRateLimit"));
    let lines = lines.map(|it| serde_json::from_str::<Value>(it).expect("JSON"));
    let lines = lines.collect::<Vec<_>>();
    let statuses = lines.iter().map(|it| it["status"].as_u64());
    assert_eq!(
        statuses.collect::<Vec<_>>(),
        [Some(200), Some(200), Some(401)]
    );
    for line in &lines[..2] {
        assert_eq!(line["method"], "POST");
        let prefix = line["key"].as_str().unwrap_or_default();
        assert!(prefix.len() > 3 && key.starts_with(prefix), "{line}");
    }
}
