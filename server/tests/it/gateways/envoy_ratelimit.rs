//! Tests Envoy's rate limit filter, which calls Quota's gRPC listener.

use std::time::Duration;

use quota_testkit::{
    gateways::{Checked, Gateway, Program},
    redis::free_port,
};
use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};

use super::{field, has_limits, tools, upstreams::Api, with_forgeries};
use crate::support::{
    app::{Account, Setup, TestApp},
    stripe::TestStripe,
};

/// A server with a tenant, and Envoy between a consumer and an API.
struct Setting {
    app: TestApp,
    account: Account,
    gateway: Gateway,
    api: Api,
    http: Client,
}

pub(super) async fn envoy(quota_port: u16, token: &str, api: &Api) -> Gateway {
    let checked = Checked {
        quota_port,
        root: None,
        token,
        api: api.addr,
        script_fault: None,
    };
    Program::EnvoyRateLimit.start(&checked, tools()).await
}

impl Setting {
    async fn with(setup: Setup) -> Self {
        let app = setup.flag("--grpc-listen=127.0.0.1:0").start().await;
        let account = app.register().await;
        let token = app.service_token(&account).await;
        let api = Api::start().await;
        let port = app.grpc_addr.expect("gRPC is on").port();
        Self {
            gateway: envoy(port, &token, &api).await,
            app,
            account,
            api,
            http: Client::new(),
        }
    }

    async fn key(&self, plan: Value) -> String {
        let plan = self.app.plan(&self.account, plan).await;
        self.app.key(&self.account, &plan).await.text
    }

    fn get(&self, path: &str) -> RequestBuilder {
        self.http.get(format!("{}{path}", self.gateway.url()))
    }

    /// Sends a request with headers that a consumer might forge to be admitted.
    async fn forged(&self, key: &str) -> Response {
        let request = self.get("/orders?a=b").header("x-api-key", key);
        let response = with_forgeries(request).send().await;
        response.expect("Envoy responds")
    }
}

async fn problem(response: Response) -> Value {
    assert_eq!(
        field(&response, "content-type"),
        Some("application/problem+json")
    );
    response.json().await.expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn enforces_decisions() {
    let setting = Setting::with(TestApp::setup()).await;
    let key = setting.key(json!({"default_rpm": 1, "burst": 3})).await;
    let stranger = setting.app.register().await;
    let strange = setting.app.plan(&stranger, json!({})).await;
    let strange = setting.app.key(&stranger, &strange).await.text;

    let missing = with_forgeries(setting.get("/orders")).send().await;
    let missing = missing.expect("Envoy responds");
    assert_eq!(missing.status(), 401);
    assert_eq!(
        field(&missing, "www-authenticate"),
        Some("Bearer realm=\"quota\"")
    );
    for key in ["qk_unknown", &strange, "-"] {
        let unknown = setting.forged(key).await;
        assert_eq!(unknown.status(), 401, "{key}");
        assert_eq!(field(&unknown, "x-quota-decision"), Some("unauthorized"));
        assert_eq!(problem(unknown).await["status"], 401);
    }
    // Send a key that is not UTF-8.
    let bytes = reqwest::header::HeaderValue::from_bytes(b"qk_\xff").expect("visible bytes");
    let unknown = setting.get("/").header("x-api-key", bytes).send().await;
    assert_eq!(unknown.expect("Envoy responds").status(), 401);
    // Send a key that is almost as long as Envoy allows.
    let large = setting.forged(&"x".repeat(50_000)).await;
    assert_eq!(large.status(), 401);
    assert_eq!(setting.api.requests().len(), 0);

    let order = setting
        .http
        .post(format!("{}/orders?deny=x&a=b", setting.gateway.url()))
        .header("x-api-key", &key)
        .body("an order");
    let admitted = with_forgeries(order).send().await.expect("Envoy responds");
    assert_eq!(admitted.status(), 200);
    has_limits(&admitted, "2");
    assert_eq!(field(&admitted, "x-quota-degraded"), None);
    assert_eq!(field(&admitted, "x-quota-decision"), None);
    assert_eq!(field(&admitted, "x-own"), Some("kept"));
    assert_eq!(admitted.text().await.expect("a body"), "an order");
    let seen = setting.api.requests().pop().expect("the request arrived");
    assert_eq!(seen.line, "POST /orders?deny=x&a=b HTTP/1.1");
    assert_eq!(seen.values("x-api-key"), [&key]);
    for name in ["x-service-token", "x-quota-decision", "ratelimit"] {
        assert!(seen.values(name).is_empty(), "{seen:?}");
    }
    // Errors of the API itself are passed through.
    for status in ["403", "500"] {
        let own = setting.get(&format!("/status/{status}")).bearer_auth(&key);
        let own = own.send().await.expect("Envoy responds");
        assert_eq!(own.status().as_str(), status);
    }

    let before = setting.api.requests().len();
    let denied = setting.forged(&key).await;
    assert_eq!(denied.status(), 429);
    has_limits(&denied, "0");
    assert_eq!(field(&denied, "cache-control"), Some("no-store"));
    let wait: u64 = field(&denied, "retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
    assert_eq!(problem(denied).await["violated-policies"], json!(["rpm"]));
    assert_eq!(
        setting.api.requests().len(),
        before,
        "the API got a denied request"
    );

    // The API sees no key other than the one that Quota has checked.
    let other = setting.key(json!({"default_rpm": 60})).await;
    for (first, second, status) in [
        (&*other, &*key, 200),
        (&key, &other, 429),
        ("", &other, 401),
    ] {
        let two = setting.get("/two").header("x-api-key", first);
        let two = two.header("x-api-key", second).send().await;
        assert_eq!(two.expect("Envoy responds").status(), status, "{first}");
        let seen = setting.api.requests().pop().expect("a request arrived");
        assert_eq!(seen.line, "GET /two HTTP/1.1");
        assert_eq!(seen.values("x-api-key"), [&other]);
    }
    let bearer = setting.get("/bearer").bearer_auth(&other);
    let bearer = bearer.header("x-api-key", "").header("x-api-key", &key);
    assert_eq!(bearer.send().await.expect("Envoy responds").status(), 200);
    let seen = setting.api.requests().pop().expect("the request arrived");
    assert_eq!(seen.values("x-api-key"), [""], "{seen:?}");

    setting.app.ship_usage().await;
    let decisions = "/admin/decisions?limit=100";
    let decisions = setting
        .app
        .act(&setting.account, "GET", decisions, Value::Null);
    let decisions = decisions.await.body["items"].clone();
    let items = decisions.as_array().expect("items").iter();
    let endpoints = items.map(|it| it["endpoint"].as_str().expect("text"));
    let endpoints = endpoints.collect::<std::collections::BTreeSet<_>>();
    let mut expected = vec!["GET /bearer", "GET /orders", "GET /two", "POST /orders"];
    expected.extend(["GET /status/403", "GET /status/500"]);
    assert_eq!(endpoints, expected.into_iter().collect());
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_connections() {
    let setting = Setting::with(TestApp::setup()).await;
    let key = setting.key(json!({"default_rpm": 1, "burst": 10})).await;
    let mut statuses = Vec::new();
    for _ in 0..20 {
        statuses.push(setting.forged(&key).await.status().as_u16());
        assert_eq!(setting.forged("qk_unknown").await.status(), 401);
    }
    statuses.dedup();
    assert_eq!(statuses, [200, 429]);
    let accepted = "quota_connections_accepted_total{listener=\"grpc\"}";
    let accepted = setting.app.metric(accepted).await;
    assert!((0.5..2.5).contains(&accepted), "{accepted} connections");
}

#[tokio::test(flavor = "multi_thread")]
async fn paid_plan_without_a_subscription_gets_402() {
    let stripe = TestStripe::start().await;
    let setting = Setting::with(stripe.configure(TestApp::setup())).await;
    let paid = setting.key(json!({"billing": "paid"})).await;
    let response = setting.forged(&paid).await;
    assert_eq!(response.status(), 402);
    assert_eq!(problem(response).await["status"], 402);
    let free = setting.key(json!({})).await;
    assert_eq!(setting.forged(&free).await.status(), 200);
    assert_eq!(setting.api.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn reports_degraded_decisions() {
    let setup = TestApp::setup().flag(format!("--redis-url=redis://127.0.0.1:{}", free_port()));
    let setting = Setting::with(setup).await;
    for (mode, status) in [("open", 200), ("closed", 503)] {
        let plan = json!({"default_rpm": 600, "on_redis_failure": mode});
        let key = setting.key(plan).await;
        // Until the circuit breaker opens, calls to Redis fail.
        let mut response = setting.forged(&key).await;
        for _ in 0..50 {
            if response.status() == status {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            response = setting.forged(&key).await;
        }
        assert_eq!(response.status(), status, "{mode}: {response:?}");
        // Envoy adds no headers if its call to Quota fails.
        let degraded = (status == 200).then_some("redis-away");
        assert_eq!(field(&response, "x-quota-degraded"), degraded);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fails_closed_without_quota() {
    let app = TestApp::setup().flag("--grpc-listen=127.0.0.1:0");
    let app = app.start().await;
    let api = Api::start().await;
    let listening = app.grpc_addr.expect("gRPC is on").port();
    for (name, port, token) in [
        ("an invalid service token", listening, "qs_invalid"),
        ("nothing listens", free_port(), "qs_any"),
        ("HTTP instead of gRPC", app.addr.port(), "qs_any"),
    ] {
        let gateway = envoy(port, token, &api).await;
        let request = Client::new().get(format!("{}/orders", gateway.url()));
        let request = with_forgeries(request.header("x-api-key", "qk_any"));
        let response = request.send().await.expect("Envoy responds");
        assert_eq!(response.status(), 503, "{name}: {response:?}");
        assert_eq!(api.requests().len(), 0, "{name} was admitted");
    }
}
