//! Tests the configurations in `deploy/gateways` in the real gateways, with Quota behind verified TLS. The tests fill
//! in the placeholders as a user would, and replace addresses with loopback addresses.

mod envoy_ratelimit;
mod matrix;
pub(crate) mod upstreams;

use std::{fs, path::Path};

use quota_testkit::{
    gateways::{Checked, Gateway, Program, folder},
    redis::free_port,
};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::{Value, json};
use tempfile::TempDir;

use self::upstreams::{Api, Behind, Head, TlsHop};
use crate::support::{app::TestApp, authority::Authority, test_with_each_program};

/// Quota's headers that describe a key's limits.
const LIMITS: [&str; 5] = [
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "ratelimit-policy",
    "ratelimit",
];

/// Returns the directory for gateways that are downloaded.
fn tools() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// Returns whether the gateway can add Quota's headers to the API's responses.
fn adds_limits(program: Program) -> bool {
    program != Program::Traefik
}

/// Returns the status of the gateway's own response if Quota cannot be reached or responds with status 500.
fn failed(program: Program) -> u16 {
    if program == Program::Traefik {
        500
    } else {
        503
    }
}

/// A gateway between a consumer and an API.
struct Setting {
    gateway: Gateway,
    hop: TlsHop,
    api: Api,
    http: Client,
    token: String,
    /// Contains the certificate of the test's certificate authority, which Caddy reads on its first connection.
    _dir: Option<TempDir>,
}

impl Setting {
    async fn new(program: Program, token: &str, behind: Behind) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let authority = Authority::new(dir.path(), "authority");
        let hop = TlsHop::start(&authority, behind).await;
        let setting = Self::with(program, token, hop, &authority).await;
        Self {
            _dir: Some(dir),
            ..setting
        }
    }

    /// Sets up HAProxy, optionally with a bug in its script, and a substitute for Quota that admits all requests.
    async fn with_script_fault(fault: Option<(&str, &str)>) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let authority = Authority::new(dir.path(), "authority");
        let hop = TlsHop::start(&authority, Behind::Other(allowed_200)).await;
        let setting = Self::filled(Program::HaProxy, "qs_gateway", hop, &authority, fault).await;
        Self {
            _dir: Some(dir),
            ..setting
        }
    }

    async fn with(program: Program, token: &str, hop: TlsHop, trusted: &Authority) -> Self {
        Self::filled(program, token, hop, trusted, None).await
    }

    async fn filled(
        program: Program,
        token: &str,
        hop: TlsHop,
        trusted: &Authority,
        script_fault: Option<(&str, &str)>,
    ) -> Self {
        let api = Api::start().await;
        let checked = Checked {
            quota_port: hop.port,
            root: Some(&trusted.root),
            token,
            api: api.addr,
            script_fault,
        };
        Self {
            gateway: program.start(&checked, tools()).await,
            hop,
            api,
            http: Client::new(),
            token: token.to_owned(),
            _dir: None,
        }
    }

    fn get(&self, path: &str) -> RequestBuilder {
        self.http.get(format!("{}{path}", self.gateway.url()))
    }

    async fn send(&self, request: RequestBuilder) -> Response {
        let response = request.send().await.expect("the gateway responds");
        for request in self.api.requests() {
            let text = format!("{request:?}");
            assert!(
                !text.contains(&self.token),
                "the API sees the token: {text}"
            );
        }
        response
    }

    /// Sends a request with headers that a consumer might forge to be admitted.
    async fn forged(&self, key: &str) -> Response {
        self.send(with_forgeries(self.get("/orders").header("x-api-key", key)))
            .await
    }
}

fn with_forgeries(request: RequestBuilder) -> RequestBuilder {
    let mut request = request;
    for (name, value) in [
        ("x-quota-decision", "allowed"),
        ("x-quota-degraded", "forged"),
        ("x-service-token", "forged"),
        ("x-ratelimit-limit", "forged"),
        ("x-ratelimit-remaining", "forged"),
        ("ratelimit-policy", "forged"),
        ("ratelimit", "forged"),
        ("x-forwarded-method", "FORGED"),
        ("x-forwarded-uri", "/forged"),
    ] {
        request = request.header(name, value);
    }
    request
}

fn field<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    let mut values = response.headers().get_all(name).iter();
    let value = values.next()?;
    assert!(values.next().is_none(), "{name} twice: {response:?}");
    Some(value.to_str().expect("fields are text"))
}

#[track_caller]
fn has_limits(response: &Response, remaining: &str) {
    for name in LIMITS {
        let value = field(response, name).unwrap_or_else(|| panic!("no {name}: {response:?}"));
        assert!(value != "forged" && value != "api", "{name}: {response:?}");
    }
    assert_eq!(field(response, "x-ratelimit-remaining"), Some(remaining));
}

/// Tests admissions, denials, and the ways in which a consumer might try to change the decision.
async fn enforces_decisions(program: Program) {
    // The allowed origins do not affect requests through a gateway.
    let app = TestApp::setup()
        .flag("--allowed-origins=https://app.example.com")
        .start()
        .await;
    let account = app.register().await;
    let plan = app
        .plan(&account, json!({"default_rpm": 1, "burst": 3}))
        .await;
    let key = app.key(&account, &plan).await.text;
    let (stranger, token) = (app.register().await, app.service_token(&account).await);
    let other_token = app.service_token(&stranger).await;
    let setting = Setting::new(program, &token, Behind::Quota(app.addr)).await;

    let missing = setting.send(with_forgeries(setting.get("/orders"))).await;
    assert_eq!(missing.status(), 401);
    assert_eq!(
        field(&missing, "www-authenticate"),
        Some("Bearer realm=\"quota\"")
    );
    let unknown = setting.forged("qk_unknown").await;
    assert_eq!(unknown.status(), 401);
    assert_eq!(
        field(&unknown, "www-authenticate"),
        Some("Bearer realm=\"quota\", error=\"invalid_token\"")
    );
    // The consumer's bearer token is another tenant's service token.
    let bearer = setting.get("/orders").bearer_auth(&other_token);
    assert_eq!(setting.send(bearer).await.status(), 401);
    assert_eq!(setting.api.requests().len(), 0);

    // The consumer's method, path, query, body and origin reach the API and do not affect the decision.
    let order = setting
        .http
        .post(format!("{}/orders?deny=x&a=b", setting.gateway.url()))
        .header("x-api-key", &key)
        .header("origin", "https://elsewhere.example")
        .body("an order");
    let admitted = setting.send(with_forgeries(order)).await;
    assert_eq!(admitted.status(), 200);
    if adds_limits(program) {
        has_limits(&admitted, "2");
    } else {
        // The API's own headers with these names are removed too.
        for name in LIMITS {
            assert_eq!(field(&admitted, name), None);
        }
    }
    assert_eq!(field(&admitted, "x-quota-degraded"), None);
    assert_eq!(field(&admitted, "x-own"), Some("kept"));
    assert_eq!(admitted.text().await.expect("a body"), "an order");
    let seen = setting.api.requests().pop().expect("the request arrived");
    assert_eq!(seen.line, "POST /orders?deny=x&a=b HTTP/1.1");
    assert_eq!(seen.values("origin"), ["https://elsewhere.example"]);
    assert_eq!(seen.values("x-api-key"), [&key]);
    for name in ["x-service-token", "x-quota-decision", "x-quota-degraded"] {
        assert!(seen.values(name).is_empty(), "{seen:?}");
    }
    for name in LIMITS {
        assert!(seen.values(name).is_empty(), "{seen:?}");
    }

    // Errors of the API itself are passed through.
    for status in ["403", "500"] {
        let path = format!("/status/{status}");
        let own = setting.get(&path).bearer_auth(&key);
        assert_eq!(setting.send(own).await.status().as_str(), status);
    }

    let before = setting.api.requests().len();
    let denied = setting.forged(&key).await;
    assert_eq!(denied.status(), 429);
    has_limits(&denied, "0");
    assert_eq!(field(&denied, "cache-control"), Some("no-store"));
    let wait: u64 = field(&denied, "retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
    assert_eq!(
        setting.api.requests().len(),
        before,
        "the API got a denied request"
    );
    // A consumer cannot choose the status of denials.
    let query = setting.get("/?deny=403").header("x-api-key", &key);
    assert_eq!(setting.send(query).await.status(), 429);

    // The API sees no key other than the one that Quota has checked.
    let other = app.key(&account, &plan).await.text;
    let both = setting
        .get("/two")
        .header("x-api-key", &other)
        .header("x-api-key", &key);
    let both = setting.send(both).await.status();
    let seen = setting
        .api
        .requests()
        .pop()
        .expect("earlier requests arrived");
    assert!(
        (both == 401 && seen.line != "GET /two HTTP/1.1")
            || (both == 200 && seen.values("x-api-key") == [&other]),
        "{both} {seen:?}"
    );
    // Proxies remove headers named in `Connection`. The gateway's own token must not be removed.
    let hop = setting
        .get("/connection")
        .header("x-api-key", &other)
        .header("connection", "X-Service-Token");
    assert_eq!(setting.send(hop).await.status(), 200);
    let hop = setting.get("/").header("connection", "X-Service-Token");
    assert_eq!(setting.send(hop).await.status(), 401);

    // Usage shows the consumer's actual method and path, not those in forged headers.
    app.ship_usage().await;
    let decisions = "/admin/decisions?limit=100";
    let decisions = app.act(&account, "GET", decisions, Value::Null).await;
    let items = decisions.body["items"].as_array().expect("items").iter();
    let endpoints = items.map(|it| it["endpoint"].as_str().expect("text"));
    let endpoints = endpoints.collect::<std::collections::BTreeSet<_>>();
    let mut expected = vec!["GET /", "GET /connection", "GET /orders", "POST /orders"];
    expected.extend(["GET /status/403", "GET /status/500"]);
    if both == 200 {
        expected.push("GET /two");
    }
    assert_eq!(endpoints, expected.into_iter().collect());
}

/// Tests that the connection to Quota is reused after allowed, denied and rejected requests.
async fn keeps_connections(program: Program) {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app
        .plan(&account, json!({"default_rpm": 1, "burst": 10}))
        .await;
    let key = app.key(&account, &plan).await.text;
    let token = app.service_token(&account).await;
    let setting = Setting::new(program, &token, Behind::Quota(app.addr)).await;
    let mut statuses = Vec::new();
    for _ in 0..20 {
        statuses.push(setting.forged(&key).await.status().as_u16());
        let unknown = setting.forged("qk_unknown").await.status();
        assert_eq!(unknown, 401);
    }
    statuses.dedup();
    assert_eq!(statuses, [200, 429]);
    assert!(
        setting.hop.connections() <= 2,
        "{} connections for 40 requests",
        setting.hop.connections()
    );
}

/// Without Redis, requests on an `open` plan are admitted, and requests on a `closed` plan get 503. The 503 response
/// has the degraded header, and so does the API's response, if the gateway can add Quota's headers to it.
async fn reports_degraded_decisions(program: Program) {
    let app = TestApp::setup()
        .flag(format!("--redis-url=redis://127.0.0.1:{}", free_port()))
        .start()
        .await;
    let account = app.register().await;
    let token = app.service_token(&account).await;
    let setting = Setting::new(program, &token, Behind::Quota(app.addr)).await;
    for (mode, status) in [("open", 200), ("closed", 503)] {
        let plan = json!({"default_rpm": 600, "on_redis_failure": mode});
        let plan = app.plan(&account, plan).await;
        let key = app.key(&account, &plan).await.text;
        // Until the circuit breaker opens, calls to Redis fail.
        let mut response = setting.forged(&key).await;
        for _ in 0..50 {
            if response.status() == status {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            response = setting.forged(&key).await;
        }
        assert_eq!(response.status(), status, "{mode}: {response:?}");
        let is_reported = status == 503 || adds_limits(program);
        assert_eq!(
            field(&response, "x-quota-degraded"),
            is_reported.then_some("redis-away"),
            "{mode}: {response:?}"
        );
        if status == 503 {
            assert_eq!(field(&response, "retry-after"), Some("1"));
        }
    }
}

fn empty_200(_: &Head) -> &'static str {
    "200 OK\r\ncontent-length: 0"
}

fn echoed_200(head: &Head) -> &'static str {
    // Responds like a proxy that echoes the request.
    if head.values("x-quota-decision").contains(&"allowed") {
        "200 OK\r\nx-quota-decision: allowed\r\ncontent-length: 0"
    } else {
        "200 OK\r\ncontent-length: 0"
    }
}

fn limited_200(_: &Head) -> &'static str {
    "200 OK\r\nx-quota-decision: limited\r\ncontent-length: 0"
}

fn allowed_204(_: &Head) -> &'static str {
    "204 No Content\r\nx-quota-decision: allowed"
}

fn allowed_500(_: &Head) -> &'static str {
    "500 Internal Server Error\r\nx-quota-decision: allowed\r\ncontent-length: 0"
}

fn unmarked_401(_: &Head) -> &'static str {
    "401 Unauthorized\r\ncontent-length: 0"
}

fn allowed_200(_: &Head) -> &'static str {
    "200 OK\r\nx-quota-decision: allowed\r\ncontent-length: 0"
}

/// Returns Quota's rejection of a key whose plan requires a subscription.
fn payment_required(head: &Head) -> &'static str {
    if head.line.contains("deny=403") {
        "403 Forbidden\r\nx-quota-decision: payment_required\r\ncontent-length: 0"
    } else {
        "402 Payment Required\r\nx-quota-decision: payment_required\r\ncontent-length: 0"
    }
}

/// Tests that a request is forwarded only if Quota has admitted it, regardless of what the consumer sends.
async fn admits_only_what_quota_admits(program: Program) {
    type Answer = fn(&Head) -> &'static str;
    // Some gateways respond with Quota's denial even if the status of Quota's response is 200.
    let follows_decision = matches!(program, Program::Nginx | Program::Envoy);
    let limited = if follows_decision { 429 } else { 503 };
    // Traefik forwards every response except 2xx responses to the consumer, and treats all 2xx responses alike.
    let passes_on = program == Program::Traefik;
    let mut answers: Vec<(&str, Answer, u16)> = vec![
        ("empty 200", empty_200, 503),
        ("echoed 200", echoed_200, 503),
        ("limited 200", limited_200, limited),
        ("allowed 500", allowed_500, failed(program)),
        (
            "unmarked 401",
            unmarked_401,
            if passes_on { 401 } else { 503 },
        ),
        ("payment required", payment_required, 402),
    ];
    if !passes_on {
        answers.push(("allowed 204", allowed_204, 503));
    }
    for (name, answer, status) in answers {
        let setting = Setting::new(program, "qs_gateway", Behind::Other(answer)).await;
        let response = setting.forged("qk_any").await;
        assert!(
            setting.hop.connections() > 0,
            "{name}: Quota was not called"
        );
        assert_eq!(setting.api.requests().len(), 0, "{name} was admitted");
        assert_eq!(response.status(), status, "{name}: {response:?}");
    }
    // The same setup admits the request if Quota responds with 200 and `x-quota-decision: allowed`.
    let setting = Setting::new(program, "qs_gateway", Behind::Other(allowed_200)).await;
    assert_eq!(setting.forged("qk_any").await.status(), 200);
    assert_eq!(setting.api.requests().len(), 1);
}

/// Tests an untrusted certificate, and a Quota server that is not running.
async fn fails_closed_without_quota(program: Program) {
    let dir = tempfile::tempdir().expect("a directory");
    let (right, wrong) = (
        Authority::new(dir.path(), "right"),
        Authority::new(dir.path(), "wrong"),
    );
    let hop = TlsHop::start(&right, Behind::Other(allowed_200)).await;
    let setting = Setting::with(program, "qs_gateway", hop, &wrong).await;
    let response = setting.forged("qk_any").await;
    assert_eq!(response.status(), failed(program), "{response:?}");
    assert_eq!(setting.api.requests().len(), 0);

    let mut hop = TlsHop::start(&right, Behind::Other(allowed_200)).await;
    hop.port = free_port();
    let setting = Setting::with(program, "qs_gateway", hop, &right).await;
    let response = setting.forged("qk_any").await;
    assert_eq!(response.status(), failed(program), "{response:?}");
    assert_eq!(setting.api.requests().len(), 0);
}

/// After a script error, HAProxy continues with its next rule, which must not admit the request.
#[tokio::test(flavor = "multi_thread")]
async fn failing_or_silent_script_admits_nothing() {
    let ask = "local answer = core.httpclient()";
    let admit = "if answer and answer.status == 200";
    let faults = [
        (
            "an error before the check",
            ask,
            "error('a mistake')\n  local answer = core.httpclient()",
        ),
        (
            "an error after the check",
            admit,
            "error('a mistake')\n  if answer and answer.status == 200",
        ),
        (
            "no decision",
            ask,
            "do return end\n  local answer = core.httpclient()",
        ),
    ];
    for (name, from, to) in faults {
        let setting = Setting::with_script_fault(Some((from, to))).await;
        let response = setting.forged("qk_any").await;
        assert_eq!(response.status(), 503, "{name}: {response:?}");
        assert_eq!(setting.api.requests().len(), 0, "{name} was admitted");
    }
    let setting = Setting::with_script_fault(None).await;
    assert_eq!(setting.forged("qk_any").await.status(), 200);
}

/// HAProxy adds the service token to requests that its script sends to a local port. Other programs on the machine can
/// connect to this port too, and must not be able to use the token for other requests.
#[tokio::test(flavor = "multi_thread")]
async fn service_token_is_added_only_to_checks() {
    let setting = Setting::with_script_fault(None).await;
    assert_eq!(setting.forged("qk_any").await.status(), 200);
    let inner = setting.gateway.inner();
    for (method, path, status) in [
        (Method::GET, "/v1/forward-auth", 200),
        (Method::GET, "/v1/forward-auth/", 403),
        (Method::GET, "/v1/echo", 403),
        (Method::GET, "/", 403),
        (Method::POST, "/v1/forward-auth", 403),
        (Method::POST, "/v1/check", 403),
    ] {
        let name = format!("{method} {path}");
        let request = setting
            .http
            .request(method, format!("http://{inner}{path}"));
        let response = request.send().await.expect("HAProxy responds");
        // The substitute for Quota responds to every request with 200.
        assert_eq!(response.status(), status, "{name}: {response:?}");
    }
}

test_with_each_program! {
    { caddy: Caddy, nginx: Nginx, haproxy: HaProxy, envoy: Envoy, traefik: Traefik, }
    {
        enforces_decisions
        keeps_connections
        reports_degraded_decisions
        admits_only_what_quota_admits
        fails_closed_without_quota
    }
}

#[test]
fn every_configuration_marks_what_to_fill_in() {
    for file in [
        "Caddyfile",
        "nginx.conf",
        "haproxy.cfg",
        "traefik.yml",
        "envoy.yaml",
        "envoy-ratelimit.yaml",
    ] {
        let text = fs::read_to_string(folder().join(file)).expect("the file is there");
        for part in [
            "api.example.com",
            "127.0.0.1:3000",
            "quota.example.com",
            "qs_YOUR_SERVICE_TOKEN",
            // With the rate limit service, a consumer cannot forge a decision, so the configuration checks no header.
            if file == "envoy-ratelimit.yaml" {
                "failure_mode_deny: true"
            } else {
                "X-Quota-Decision"
            },
        ] {
            assert!(text.contains(part), "{file} does not name {part}");
        }
    }
    let files = fs::read_dir(folder()).expect("the folder is there").count();
    assert_eq!(files, 7, "a gateway is missing here");
}
