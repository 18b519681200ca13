//! Tests OpenTelemetry traces: which requests are traced, what their spans contain, and that a failing collector does
//! not affect requests.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use quota_testkit::redis::{RedisServer, free_port};
use reqwest::Client;
use serde_json::{Value, json};

use crate::support::{
    app::{Account, PASSWORD, Setup, TestApp},
    caddy::Caddy,
    collector::{Collector, Received},
    quota::{Quota, data_dir},
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";
/// How long a test waits for spans, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn traceparent(flags: &str) -> String {
    format!("00-{TRACE}-{PARENT}-{flags}")
}

fn traced(collector: &Collector, ratio: &str) -> Setup {
    TestApp::setup()
        .flag(format!("--otel-exporter-otlp-endpoint={}", collector.url()))
        .flag(format!("--otel-traces-sampler-arg={ratio}"))
}

/// Returns the only span with the given name.
#[track_caller]
fn one<'a>(spans: &'a [Received], name: &str) -> &'a Received {
    let found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    assert_eq!(found.len(), 1, "{name} in {spans:#?}");
    found[0]
}

fn children<'a>(spans: &'a [Received], parent: &Received) -> Vec<&'a Received> {
    spans.iter().filter(|it| it.parent == parent.id).collect()
}

/// Creates an account with a key whose rate and burst are `rpm`. Returns the account and the key's secret.
async fn key(app: &TestApp, rpm: u32) -> (Account, String) {
    let account = app.register().await;
    let plan = app.plan(&account, json!({"default_rpm": rpm})).await;
    let key = app.key(&account, &plan).await.text;
    (account, key)
}

#[tokio::test(flavor = "multi_thread")]
async fn trusted_proxy_decides_whether_a_request_is_traced() {
    for direct in ["on", "off"] {
        let collector = Collector::start().await;
        let app = traced(&collector, "0")
            .flag("--trusted-proxies=127.0.0.1")
            .flag(format!("--direct-responses={direct}"))
            .start()
            .await;
        let (_, key) = key(&app, 60_000).await;
        for header in [Some("00"), Some("01"), None] {
            let call = app.get("/v1/echo").header("X-API-Key", &key);
            let call = match header {
                Some(flags) => call.header("traceparent", &traceparent(flags)),
                None => call,
            };
            assert_eq!(call.send().await.status, 200);
        }
        let direct_responses = app.metric("quota_direct_responses_total").await;
        assert_eq!(direct_responses > 0.0, direct == "on");
        app.stop().await;
        let spans = collector.spans();
        let request = one(&spans, "GET /v1/echo");
        assert_eq!((&*request.trace, &*request.parent), (TRACE, PARENT));
        assert!(spans.iter().all(|span| span.trace == TRACE), "{spans:#?}");
    }
}

/// Clients control the `traceparent` header, and must not be able to have all their requests traced.
#[tokio::test(flavor = "multi_thread")]
async fn other_peers_do_not_decide_whether_a_request_is_traced() {
    for direct in ["on", "off"] {
        for ratio in ["0", "1"] {
            let collector = Collector::start().await;
            let app = traced(&collector, ratio)
                .flag("--trusted-proxies=192.0.2.0/24")
                .flag(format!("--direct-responses={direct}"))
                .start()
                .await;
            let flags = if ratio == "0" { "01" } else { "00" };
            let call = app.get("/v1/echo");
            let call = call.header("traceparent", &traceparent(flags));
            assert_eq!(call.send().await.status, 401);
            app.stop().await;
            let spans = collector.spans();
            if ratio == "0" {
                assert!(spans.is_empty(), "{spans:#?}");
            } else {
                let request = one(&spans, "GET /v1/echo");
                assert_ne!(request.trace, TRACE);
                assert_eq!(request.parent, "");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_describe_the_request_its_decision_and_its_statements_without_secrets() {
    let redis = RedisServer::start().await;
    let collector = Collector::start().await;
    let app = traced(&collector, "1")
        .flag("--otel-service-name=limits")
        .flag("--otel-exporter-otlp-headers=api-key=a%20b")
        .flag(format!("--redis-url={}", redis.url()))
        .flag("--redis-timeout=5s")
        .start()
        .await;
    let (account, key) = key(&app, 1).await;
    let token = app.service_token(&account).await;
    assert_eq!(app.echo(&key).await.status, 200);
    assert_eq!(app.echo(&key).await.status, 429);
    let unknown = app.get("/v1/echo").header("X-API-Key", "qk_unknown");
    assert_eq!(unknown.send().await.status, 401);
    let check = json!({"key": key, "cost": 1});
    let check = app.post("/v1/check", check).bearer(&token).send().await;
    assert_eq!(check.status, 200, "{}", check.text);
    let path = format!("/admin/plans/{}?secret=hunter2", account.tenant_id);
    let missing = app.act(&account, "GET", &path, Value::Null).await;
    assert!((400..500).contains(&missing.status), "{}", missing.text);
    assert_eq!(app.get("/health/live").send().await.status, 200);
    app.stop().await;

    let spans = collector.spans();
    assert_eq!(collector.header("api-key").as_deref(), Some("a b"));
    assert!(spans.iter().all(|span| span.service == "limits"));
    assert!(
        !spans.iter().any(|span| span.name.contains("/health/")),
        "{spans:#?}"
    );
    let echoes: Vec<_> = spans
        .iter()
        .filter(|it| it.name == "GET /v1/echo")
        .collect();
    let found: Vec<_> = echoes
        .iter()
        .map(|echo| {
            let decision = children(&spans, echo);
            let decision = decision.first().expect("the limiter was called");
            assert_eq!(decision.name, "decide");
            assert_eq!(echo.trace, decision.trace);
            (
                echo.attribute("http.response.status_code"),
                decision.attribute("quota.decision"),
                decision.attribute("quota.violated"),
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            ("200", "allowed", ""),
            ("429", "limited", "rpm"),
            ("401", "unauthorized", "")
        ]
    );
    for echo in &echoes[..2] {
        assert_eq!(echo.attribute("quota.tenant_id"), account.tenant_id);
        assert_eq!(echo.attribute("quota.key_id").len(), 36);
        assert_eq!(echo.attribute("quota.request_id").len(), 36);
    }
    let check = one(&spans, "POST /v1/check");
    assert_eq!(check.attribute("quota.tenant_id"), account.tenant_id);

    // The spans of a management request include its transaction and statements.
    let plan = one(&spans, "GET /admin/plans/{plan_id}");
    let status = missing.status.to_string();
    assert_eq!(plan.attribute("http.response.status_code"), status);
    assert!(!plan.is_error, "the client caused it");
    let register = one(&spans, "POST /auth/register");
    let transactions = children(&spans, register);
    let transactions = transactions.iter().filter(|it| it.name == "transaction");
    let statements: Vec<_> = transactions.flat_map(|it| children(&spans, it)).collect();
    let text = |operation: &str| {
        let of = statements.iter().find(|it| it.name == operation);
        let of = of.unwrap_or_else(|| panic!("{operation} in {statements:#?}"));
        of.attribute("db.query.text")
    };
    assert!(text("BEGIN").contains("SET LOCAL ROLE"));
    assert!(text("INSERT").contains("$1"), "{}", text("INSERT"));
    assert_eq!(text("COMMIT"), "COMMIT");
    assert!(
        statements
            .iter()
            .all(|it| it.attribute("db.system.name") == "postgresql")
    );

    assert!(collector.has_received("quota.decision"));
    for secret in [
        &*key,
        &*token,
        PASSWORD,
        &*account.email,
        &*account.access_token,
        &*account.refresh_token,
        "hunter2",
        "-- binds",
    ] {
        assert!(!collector.has_received(secret), "{secret} was sent");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_dependency_is_visible_in_the_trace() {
    let mut redis = RedisServer::start().await;
    let collector = Collector::start().await;
    let app = traced(&collector, "1")
        .flag(format!("--redis-url={}", redis.url()))
        .start()
        .await;
    let account = app.register().await;
    let plan = json!({"default_rpm": 60, "on_redis_failure": "closed"});
    let plan = app.plan(&account, plan).await;
    let key = app.key(&account, &plan).await.text;
    redis.kill().await;
    let began = Instant::now();
    while app.echo(&key).await.status != 503 {
        assert!(began.elapsed() < PATIENCE);
    }
    app.stop().await;
    let spans = collector.spans();
    let failed = spans
        .iter()
        .filter(|it| it.name == "GET /v1/echo")
        .find(|it| it.attribute("http.response.status_code") == "503")
        .expect("the request was traced");
    assert!(failed.is_error);
    let decision = children(&spans, failed);
    assert_eq!(decision[0].attribute("quota.decision"), "unavailable");
    assert!(decision[0].is_error);
}

#[tokio::test(flavor = "multi_thread")]
async fn collector_that_fails_or_hangs_affects_neither_requests_nor_the_stop() {
    // The first port refuses connections. The second accepts connections, but never responds.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent_port = silent.local_addr().expect("the socket is bound").port();
    for port in [free_port(), silent_port] {
        let app = TestApp::setup()
            .flag(format!(
                "--otel-exporter-otlp-endpoint=http://127.0.0.1:{port}"
            ))
            .flag("--otel-traces-sampler-arg=1")
            .start()
            .await;
        let (_, key) = key(&app, 60_000_000).await;
        // Send far more spans than fit in the queue.
        for _ in 0..5000 {
            let answer = app.http.get(app.url("/v1/echo")).header("X-API-Key", &key);
            let status = answer.send().await.expect("the server responds").status();
            assert!([200, 429].contains(&status.as_u16()), "{status}");
        }
        let dropped = app.metric("quota_spans_dropped_total").await;
        assert!(dropped > 0.0, "port {port}");
        assert!(app.metric("quota_spans_sent_total").await == 0.0);
        let began = Instant::now();
        app.state
            .traces
            .as_ref()
            .expect("tracing is on")
            .stop()
            .await;
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_traced_without_a_collector() {
    let app = TestApp::setup()
        .flag("--otel-traces-sampler-arg=1")
        .start()
        .await;
    assert_eq!(app.get("/v1/echo").send().await.status, 401);
    assert!(app.state.traces.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_sends_the_last_spans() {
    let collector = Collector::start().await;
    let dir = data_dir();
    let url = collector.url();
    let settings = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
        ("OTEL_TRACES_SAMPLER_ARG", "1"),
    ];
    let quota = Quota::start_with(dir.path(), &settings);
    let http = Client::new();
    for _ in 0..20 {
        let echo = http.get(format!("http://{}/v1/echo", quota.addr));
        assert_eq!(
            echo.send().await.expect("the server responds").status(),
            401
        );
    }
    tokio::task::block_in_place(|| quota.stop());
    let spans = collector.spans();
    let echoes = spans.iter().filter(|it| it.name == "GET /v1/echo");
    assert_eq!(echoes.count(), 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn trace_leads_from_caddy_through_the_decision_to_redis_and_postgresql() {
    let redis = RedisServer::start().await;
    let collector = Collector::start().await;
    let (url, redis_url) = (collector.url(), redis.url());
    let data = data_dir();
    let settings = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
        // Only requests that Caddy decides to trace are traced.
        ("OTEL_TRACES_SAMPLER_ARG", "0"),
        ("QUOTA_TRUSTED_PROXIES", "127.0.0.1"),
        ("REDIS_URL", redis_url.as_str()),
    ];
    let quota = Quota::start_with(data.path(), &settings);
    let plan = json!({"name": "Traced", "default_rpm": 60_000, "daily_quota": 1000});
    let key = quota.key_on(&Client::new(), plan).await;
    let variables = [
        ("QUOTA_TRACING", "on"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &url),
        ("OTEL_SERVICE_NAME", "caddy"),
        ("OTEL_TRACES_SAMPLER", "always_on"),
        // In milliseconds.
        ("OTEL_BSP_SCHEDULE_DELAY", "100"),
    ];
    let caddy = Caddy::start(quota.addr.port(), &variables).await;

    // The client's header claims that the request is part of a trace.
    let echo = caddy
        .client
        .get(format!("https://localhost:{}/api/v1/echo", caddy.https))
        .header("X-API-Key", &key)
        .header("traceparent", traceparent("01"));
    assert_eq!(
        echo.send().await.expect("the server responds").status(),
        200
    );
    let of_caddy = |it: &Received| {
        it.service == "caddy" && it.attributes.values().any(|it| it == "/api/v1/echo")
    };
    let is_complete = |spans: &[Received]| {
        let has = |name: &str| spans.iter().any(|it| it.name == name);
        spans.iter().any(of_caddy) && has("GET /v1/echo") && has("EVALSHA take")
    };
    let spans = collector.wait_until(is_complete).await;

    let caddy = spans.iter().find(|it| of_caddy(it)).expect("Caddy's span");
    assert_ne!(caddy.trace, TRACE, "clients do not decide");
    assert_eq!(caddy.parent, "");
    let spans: Vec<_> = spans
        .iter()
        .filter(|it| it.trace == caddy.trace)
        .cloned()
        .collect();
    let request = one(&spans, "GET /v1/echo");
    assert_eq!((&*request.service, &*request.parent), ("quota", &*caddy.id));
    let decision = one(&spans, "decide");
    assert_eq!(decision.parent, request.id);
    assert_eq!(decision.attribute("quota.decision"), "allowed");
    let parts = children(&spans, decision);
    let names: Vec<_> = parts.iter().map(|it| it.name.as_str()).collect();
    assert!(names.contains(&"EVALSHA take"), "{names:?}");
    let statements: Vec<_> = parts
        .iter()
        .filter(|it| it.name == "transaction")
        .flat_map(|it| children(&spans, it))
        .map(|it| it.attribute("db.query.text"))
        .collect();
    // The key was not in memory, so the server looked it up in the database.
    assert!(
        statements.iter().any(|it| it.contains("api_keys")),
        "{statements:#?}"
    );
    for secret in [key.as_str(), &key[12..], TRACE] {
        assert!(!collector.has_received(secret), "{secret} was sent");
    }
}
