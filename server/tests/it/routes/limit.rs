//! Decisions on every endpoint.

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::Arc,
    time::Duration,
};

use quota_common::limit::CheckResult;
use quota_server::{
    api::problem::ApiError,
    clock::{Clock as _, SystemClock, TestClock},
    keys::LookupCaller,
    limiter::{Decision, Outcome, Policy, PolicySet},
    secret_text::{Kind, SecretText},
};
use quota_testkit::proxy::Fault;
use serde_json::{Value, json};

use crate::{
    outage::through_proxy,
    support::app::{Account, Answer, Key, TestApp},
};

/// Starts a server with a test clock, and registers an account.
async fn still() -> (TestApp, TestClock, Account) {
    let clock = TestClock::at(SystemClock::new().now());
    let app = TestApp::setup()
        .clock(Arc::new(clock.clone()))
        .start()
        .await;
    let account = app.register().await;
    (app, clock, account)
}

async fn key(app: &TestApp, account: &Account, plan: Value) -> Key {
    let plan = app.plan(account, plan).await;
    app.key(account, &plan).await
}

async fn check(app: &TestApp, token: &str, body: Value) -> Answer {
    let answer = app.post("/v1/check", body).bearer(token).send().await;
    if answer.status == 200 {
        // The server writes the JSON without creating a `CheckResult`, so check that the result is the same.
        let result: CheckResult = serde_json::from_str(&answer.text).expect("a check result");
        assert_eq!(
            answer.text,
            serde_json::to_string(&result).expect("valid JSON")
        );
    }
    answer
}

async fn forward(app: &TestApp, token: &str, key: &str, query: &str) -> Answer {
    let call = app.get(&format!("/v1/forward-auth{query}"));
    call.header("X-Service-Token", token)
        .header("X-API-Key", key)
        .send()
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valid_key_gets_200_with_its_limits() {
    // No token is refilled during the test.
    let (app, clock, account) = still().await;
    let key = key(
        &app,
        &account,
        json!({"default_rpm": 600, "daily_quota": 5000}),
    )
    .await;

    let answer = app.echo(&key.text).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body["key_id"], json!(key.id));
    assert_eq!(answer.number("x-ratelimit-limit"), 600);
    assert_eq!(answer.number("x-ratelimit-remaining"), 599);
    assert_eq!(
        answer.header("ratelimit-policy"),
        Some("\"rpm\";q=600;w=60, \"daily\";q=5000;w=86400")
    );
    let now = clock.now().secs();
    let reset = answer.number("x-ratelimit-reset");
    assert!(
        (now..=now + 2).contains(&reset),
        "{reset} is not soon after {now}"
    );

    let bearer = app.get("/v1/echo").bearer(&key.text).send().await;
    assert_eq!(
        (bearer.status, bearer.number("x-ratelimit-remaining")),
        (200, 598)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn over_the_limit_429_states_when_the_next_request_is_allowed() {
    let (app, clock, account) = still().await;
    let key = key(&app, &account, json!({"default_rpm": 20, "burst": 2})).await;
    for _ in 0..2 {
        assert_eq!(app.echo(&key.text).await.status, 200);
    }
    let denied = app.echo(&key.text).await;
    assert_eq!(denied.status, 429);
    assert_eq!(denied.problem(), "quota-exceeded");
    assert_eq!(denied.body["violated-policies"], json!(["rpm"]));
    assert_eq!(denied.header("cache-control"), Some("no-store"));
    assert_eq!(denied.number("x-ratelimit-remaining"), 0);
    assert_eq!(denied.number("retry-after"), 3);

    clock.advance(Duration::from_millis(2999));
    assert_eq!(
        app.echo(&key.text).await.status,
        429,
        "a millisecond too early"
    );
    clock.advance(Duration::from_millis(1));
    assert_eq!(
        app.echo(&key.text).await.status,
        200,
        "after exactly Retry-After"
    );
    assert_eq!(app.echo(&key.text).await.status, 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn daily_quota_resets_with_the_day_on_every_endpoint() {
    let (app, clock, account) = still().await;
    let token = app.service_token(&account).await;
    let key = key(
        &app,
        &account,
        json!({"default_rpm": 6000, "daily_quota": 3}),
    )
    .await;
    assert_eq!(app.echo(&key.text).await.status, 200);
    assert_eq!(
        check(&app, &token, json!({"key": key.text})).await.body["allowed"],
        json!(true)
    );
    assert_eq!(forward(&app, &token, &key.text, "").await.status, 200);

    let denied = app.echo(&key.text).await;
    assert_eq!(denied.status, 429);
    assert_eq!(denied.body["violated-policies"], json!(["daily"]));
    let wait = denied.number("retry-after");
    assert!(wait <= 86_400);
    assert_eq!(
        denied.number("x-ratelimit-remaining"),
        5997,
        "the rate was not charged for the denial"
    );
    clock.advance(Duration::from_secs(wait));
    assert_eq!(app.echo(&key.text).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_endpoints_share_a_bucket_and_respond_alike() {
    let (app, _clock, account) = still().await;
    let token = app.service_token(&account).await;
    let key = key(&app, &account, json!({"default_rpm": 60, "burst": 3})).await;

    let echo = app.echo(&key.text).await;
    let checked = check(
        &app,
        &token,
        json!({"key": key.text, "endpoint": "GET /orders"}),
    )
    .await;
    let forwarded = forward(&app, &token, &key.text, "").await;
    assert_eq!(echo.number("x-ratelimit-remaining"), 2);
    assert_eq!(checked.body["headers"]["X-RateLimit-Remaining"], json!("1"));
    assert_eq!(
        (forwarded.status, forwarded.number("x-ratelimit-remaining")),
        (200, 0)
    );
    assert_eq!(
        (forwarded.text.as_str(), forwarded.header("content-length")),
        ("", Some("0"))
    );

    let echo = app.echo(&key.text).await;
    let checked = check(&app, &token, json!({"key": key.text})).await;
    let forwarded = forward(&app, &token, &key.text, "").await;
    let nginx = forward(&app, &token, &key.text, "?deny=403").await;
    assert_eq!(
        (echo.status, forwarded.status, nginx.status),
        (429, 429, 403)
    );
    assert_eq!(
        (checked.status, &checked.body["allowed"]),
        (200, &json!(false))
    );
    assert_eq!(checked.body["code"], json!("quota_exceeded"));
    for (name, value) in checked.body["headers"].as_object().unwrap() {
        let value = value.as_str();
        let name = name.to_lowercase();
        assert_eq!(echo.header(&name), value, "echo {name}");
        assert_eq!(forwarded.header(&name), value, "forward-auth {name}");
        assert_eq!(nginx.header(&name), value, "forward-auth?deny=403 {name}");
    }
    assert_eq!((forwarded.text.as_str(), nginx.text.as_str()), ("", ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn cost_above_the_burst_is_never_allowed_and_consumes_nothing() {
    let (app, _clock, account) = still().await;
    let token = app.service_token(&account).await;
    let key = key(&app, &account, json!({"default_rpm": 60, "burst": 5})).await;
    let never = check(&app, &token, json!({"key": key.text, "cost": 6})).await;
    assert_eq!(
        (&never.body["allowed"], &never.body["retry_after"]),
        (&json!(false), &Value::Null)
    );
    assert!(never.body["headers"]["Retry-After"].is_null());
    let all = check(&app, &token, json!({"key": key.text, "cost": 5})).await;
    assert_eq!(all.body["allowed"], json!(true));
    for cost in [
        json!(0),
        json!(-1),
        json!(1_000_001),
        json!(1.5),
        json!("1"),
    ] {
        let refused = check(&app, &token, json!({"key": key.text, "cost": cost})).await;
        assert_eq!(
            (refused.status, &refused.body["errors"][0]["field"]),
            (422, &json!("cost")),
            "{cost}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn denied_request_costs_nothing() {
    let (app, clock, account) = still().await;
    let token = app.service_token(&account).await;
    let by_rate = key(
        &app,
        &account,
        json!({"default_rpm": 60, "burst": 2, "daily_quota": 4}),
    )
    .await;
    for _ in 0..2 {
        assert_eq!(app.echo(&by_rate.text).await.status, 200);
    }
    for _ in 0..10 {
        let echo = app.echo(&by_rate.text).await;
        assert_eq!(
            (echo.status, &echo.body["violated-policies"]),
            (429, &json!(["rpm"]))
        );
        assert_eq!(forward(&app, &token, &by_rate.text, "").await.status, 429);
        let checked = check(&app, &token, json!({"key": by_rate.text})).await;
        assert_eq!(checked.body["allowed"], json!(false));
        // Two requests of the daily quota of four are left.
        assert_eq!(checked.body["limits"][1]["remaining"], json!(2));
    }
    clock.advance(Duration::from_secs(2));
    for _ in 0..2 {
        assert_eq!(app.echo(&by_rate.text).await.status, 200);
    }
    let denied = app.echo(&by_rate.text).await;
    assert_eq!(denied.body["violated-policies"], json!(["rpm", "daily"]));

    let by_quota = key(
        &app,
        &account,
        json!({"default_rpm": 60, "burst": 5, "daily_quota": 1}),
    )
    .await;
    assert_eq!(app.echo(&by_quota.text).await.status, 200);
    for _ in 0..10 {
        let denied = app.echo(&by_quota.text).await;
        assert_eq!(denied.body["violated-policies"], json!(["daily"]));
        assert_eq!(denied.number("x-ratelimit-remaining"), 4);
    }
}

/// Asserts the responses to an invalid key, and that no decision was made.
async fn refused(app: &TestApp, token: &str, key: &str, code: &str) {
    let decided = async || {
        app.metric("quota_decisions_allowed_total").await
            + app.metric("quota_decisions_denied_total").await
    };
    let before = decided().await;
    let echo = app.echo(key).await;
    assert_eq!(
        (echo.status, echo.problem()),
        (401, "unauthorized"),
        "{key}"
    );
    assert_eq!(
        echo.header("www-authenticate"),
        Some("Bearer realm=\"quota\", error=\"invalid_token\"")
    );
    assert!(echo.header("x-ratelimit-limit").is_none());
    let forwarded = forward(app, token, key, "").await;
    assert_eq!((forwarded.status, forwarded.text.as_str()), (401, ""));
    let checked = check(app, token, json!({"key": key})).await;
    assert_eq!((checked.status, &checked.body["code"]), (200, &json!(code)));
    assert!(
        (decided().await - before).abs() < 0.5,
        "a decision was made"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_key_is_401_and_not_charged() {
    let (app, clock, account) = still().await;
    let token = app.service_token(&account).await;
    let key = key(&app, &account, json!({"default_rpm": 60})).await;
    let admin = &account.access_token;
    let path = format!("/admin/api-keys/{}", key.id);
    let patch = async |body: Value| {
        let done = app
            .request(reqwest::Method::PATCH, &path)
            .json(body)
            .bearer(admin)
            .send()
            .await;
        assert_eq!(done.status, 200, "{}", done.body);
    };

    let missing = app.get("/v1/echo").send().await;
    assert_eq!(
        (missing.status, missing.header("www-authenticate")),
        (401, Some("Bearer realm=\"quota\""))
    );
    for malformed in [
        "x",
        "qk_",
        "qk_00000000000000000000000000000000000000",
        &format!("{}x", key.text),
        &token,
    ] {
        refused(&app, &token, malformed, "unknown_key").await;
    }
    let unknown =
        quota_server::secret_text::SecretText::generate(quota_server::secret_text::Kind::ApiKey)
            .unwrap();
    refused(&app, &token, &unknown.reveal(), "unknown_key").await;

    patch(json!({"is_active": false})).await;
    refused(&app, &token, &key.text, "inactive_key").await;
    patch(json!({"is_active": true})).await;
    assert_eq!(
        app.echo(&key.text).await.number("x-ratelimit-remaining"),
        59,
        "nothing was charged before"
    );

    let end = chrono::DateTime::from_timestamp(i64::try_from(clock.now().secs()).unwrap() + 60, 0)
        .unwrap();
    patch(json!({"expires_at": end.to_rfc3339()})).await;
    assert_eq!(app.echo(&key.text).await.status, 200);
    clock.advance(Duration::from_secs(61));
    refused(&app, &token, &key.text, "expired_key").await;
    patch(json!({"expires_at": null})).await;
    assert_eq!(app.echo(&key.text).await.status, 200);

    let gone = app
        .request(reqwest::Method::DELETE, &path)
        .bearer(admin)
        .send()
        .await;
    assert_eq!(gone.status, 204);
    refused(&app, &token, &key.text, "unknown_key").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_checksum_is_rejected_without_a_lookup() {
    let app = TestApp::setup().without_jobs().start().await;
    let lookups = async || {
        app.metric("quota_key_cache_hits_total").await
            + app.metric("quota_key_cache_negative_hits_total").await
            + app.metric("quota_key_loads_total").await
    };
    let before = lookups().await;
    for n in 0..200 {
        assert_eq!(app.echo(&format!("qk_{n:032}AAAAAA")).await.status, 401);
    }
    assert!((lookups().await - before).abs() < 0.5);
    assert!(app.metric("quota_keys_malformed_total").await >= 200.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_key_is_like_one_that_never_existed() {
    let app = TestApp::start().await;
    let (ours, theirs) = (app.register().await, app.register().await);
    let token = app.service_token(&ours).await;
    let their_key = key(&app, &theirs, json!({"default_rpm": 60})).await;
    let unknown =
        quota_server::secret_text::SecretText::generate(quota_server::secret_text::Kind::ApiKey)
            .unwrap();

    let foreign = check(&app, &token, json!({"key": their_key.text})).await;
    let never = check(&app, &token, json!({"key": unknown.reveal()})).await;
    assert_eq!(foreign.text, never.text);
    assert_eq!(foreign.body["code"], json!("unknown_key"));
    assert_eq!(forward(&app, &token, &their_key.text, "").await.status, 401);
    assert_eq!(
        app.echo(&their_key.text)
            .await
            .number("x-ratelimit-remaining"),
        59,
        "the key was not charged"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn key_is_read_from_one_place_only() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let one = key(&app, &account, json!({})).await;
    let other = key(&app, &account, json!({})).await;
    let both = app
        .get("/v1/echo")
        .header("X-API-Key", &one.text)
        .bearer(&other.text)
        .send()
        .await;
    assert_eq!((both.status, both.problem()), (400, "malformed"));
    let same = app
        .get("/v1/echo")
        .header("X-API-Key", &one.text)
        .bearer(&one.text)
        .send()
        .await;
    assert_eq!(same.status, 200);
    let in_query = app
        .get(&format!("/v1/echo?api_key={}", one.text))
        .send()
        .await;
    assert_eq!((in_query.status, in_query.problem()), (400, "malformed"));
    assert!(!in_query.text.contains(&one.text));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_without_a_token_is_401() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let key = key(&app, &account, json!({})).await;
    for (path, body) in [
        ("/v1/check", json!({"key": key.text})),
        ("/v1/check", json!({})),
    ] {
        assert_eq!(app.post(path, body.clone()).send().await.status, 401);
        assert_eq!(
            app.post(path, body.clone())
                .bearer(&account.access_token)
                .send()
                .await
                .status,
            401
        );
        assert_eq!(
            app.post(path, body).bearer(&key.text).send().await.status,
            401
        );
    }
    let bare = app
        .get("/v1/forward-auth")
        .header("X-API-Key", &key.text)
        .send()
        .await;
    assert_eq!(bare.status, 401);
    assert_eq!(
        app.echo(&key.text).await.number("x-ratelimit-remaining"),
        59
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn gateway_may_forward_any_method_and_a_bearer_key() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let token = app.service_token(&account).await;
    let key = key(&app, &account, json!({})).await;
    for method in [
        "GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND",
    ] {
        let call = app.request(method.parse().unwrap(), "/v1/forward-auth");
        let answer = call
            .header("X-Service-Token", &token)
            .bearer(&key.text)
            .send()
            .await;
        assert_eq!((answer.status, answer.text.as_str()), (200, ""), "{method}");
    }
    let none = app
        .get("/v1/forward-auth")
        .header("X-Service-Token", &token)
        .send()
        .await;
    assert_eq!(
        (none.status, none.header("www-authenticate")),
        (401, Some("Bearer realm=\"quota\""))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_plan_applies_immediately_and_grants_no_new_burst() {
    let (app, _clock, account) = still().await;
    let plan = app
        .plan(&account, json!({"default_rpm": 60, "burst": 10}))
        .await;
    let key = app.key(&account, &plan).await;
    for _ in 0..10 {
        assert_eq!(app.echo(&key.text).await.status, 200);
    }
    let patch = async |body: Value| {
        let call = app.request(reqwest::Method::PATCH, &format!("/admin/plans/{plan}"));
        assert_eq!(
            call.json(body)
                .bearer(&account.access_token)
                .send()
                .await
                .status,
            200
        );
    };
    patch(json!({"default_rpm": 6000})).await;
    let denied = app.echo(&key.text).await;
    assert_eq!(
        (denied.status, denied.header("ratelimit-policy")),
        (429, Some("\"rpm\";q=6000;w=60"))
    );
    patch(json!({"burst": 15})).await;
    for _ in 0..5 {
        assert_eq!(app.echo(&key.text).await.status, 200);
    }
    assert_eq!(app.echo(&key.text).await.status, 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn override_replaces_the_plans_rate() {
    let (app, _clock, account) = still().await;
    let key = key(&app, &account, json!({"default_rpm": 60})).await;
    let set = async |rpm: Value| {
        let call = app.request(
            reqwest::Method::PATCH,
            &format!("/admin/api-keys/{}", key.id),
        );
        let set = call
            .json(json!({"rpm_override": rpm}))
            .bearer(&account.access_token)
            .send()
            .await;
        assert_eq!(set.status, 200, "{}", set.body);
    };
    set(json!(600)).await;
    let answer = app.echo(&key.text).await;
    assert_eq!(
        (
            answer.number("x-ratelimit-limit"),
            answer.header("ratelimit-policy")
        ),
        (600, Some("\"rpm\";q=600;w=60"))
    );
    set(Value::Null).await;
    assert_eq!(app.echo(&key.text).await.number("x-ratelimit-limit"), 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn both_secrets_work_within_the_grace_period_and_share_a_bucket() {
    let (app, clock, account) = still().await;
    let key = key(&app, &account, json!({"default_rpm": 60, "burst": 10})).await;
    let rotate = async |body: Value| {
        let call = app.post(&format!("/admin/api-keys/{}/rotate", key.id), body);
        let rotated = call.bearer(&account.access_token).send().await;
        assert_eq!(rotated.status, 200, "{}", rotated.body);
        rotated.text("key")
    };
    assert_eq!(app.echo(&key.text).await.number("x-ratelimit-remaining"), 9);
    let second = rotate(json!({"grace_seconds": 60})).await;
    assert_eq!(app.echo(&second).await.number("x-ratelimit-remaining"), 8);
    assert_eq!(app.echo(&key.text).await.number("x-ratelimit-remaining"), 7);
    clock.advance(Duration::from_secs(61));
    assert_eq!(
        app.echo(&key.text).await.status,
        401,
        "the key's grace period is over"
    );
    assert_eq!(app.echo(&second).await.status, 200);

    let third = rotate(json!({"grace_seconds": 0})).await;
    assert_eq!(
        app.echo(&second).await.status,
        401,
        "a leaked key has no grace period"
    );
    assert_eq!(app.echo(&third).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_replica_rejects_a_deactivated_key_within_ten_polls() {
    let one = TestApp::start().await;
    let other = TestApp::setup()
        .database(one.database.clone())
        .start()
        .await;
    let account = one.register().await;
    let key = key(&one, &account, json!({"default_rpm": 60_000})).await;
    assert_eq!(other.echo(&key.text).await.status, 200);

    let call = one.request(
        reqwest::Method::PATCH,
        &format!("/admin/api-keys/{}", key.id),
    );
    assert_eq!(
        call.json(json!({"is_active": false}))
            .bearer(&account.access_token)
            .send()
            .await
            .status,
        200
    );
    other
        .notices("the deactivation", async || {
            other.echo(&key.text).await.status == 401
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn quota_continues_after_a_restart() {
    let first = TestApp::start().await;
    let account = first.register().await;
    let key = key(
        &first,
        &account,
        json!({"default_rpm": 60_000, "daily_quota": 250}),
    )
    .await;
    for _ in 0..123 {
        assert_eq!(first.echo(&key.text).await.status, 200);
    }
    let database = first.database.clone();
    first.stop().await;
    let second = TestApp::setup().database(database).start().await;
    assert_eq!(123 + second.spend(&key.text).await, 250);
}

#[tokio::test(flavor = "multi_thread")]
async fn exactly_the_burst_of_many_concurrent_requests_is_allowed() {
    let (app, _clock, account) = still().await;
    let token = app.service_token(&account).await;
    let key = key(
        &app,
        &account,
        json!({"default_rpm": 60, "burst": 20, "daily_quota": 1000}),
    )
    .await;
    let before = app.metric("quota_decisions_allowed_total").await;
    let denied_before = app.metric("quota_decisions_denied_total").await;
    let ask = async |n: usize| match n % 3 {
        0 => app.echo(&key.text).await.status == 200,
        1 => forward(&app, &token, &key.text, "").await.status == 200,
        _ => check(&app, &token, json!({"key": key.text})).await.body["allowed"] == json!(true),
    };
    let passed = futures_util::future::join_all((0..60).map(ask)).await;
    assert_eq!(passed.iter().filter(|it| **it).count(), 20);
    let decided = (
        app.metric("quota_decisions_allowed_total").await - before,
        app.metric("quota_decisions_denied_total").await - denied_before,
    );
    assert_eq!(decided, (20.0, 40.0), "every decision is counted once");
}

#[tokio::test(flavor = "multi_thread")]
async fn gateway_gets_the_same_headers_and_an_empty_body_with_every_method() {
    let (app, _clock, account) = still().await;
    let token = app.service_token(&account).await;
    let key = key(&app, &account, json!({"default_rpm": 60, "burst": 1})).await;
    assert_eq!(app.echo(&key.text).await.status, 200);
    let echo = app.echo(&key.text).await;
    for (query, status) in [("", 429), ("?deny=429", 429), ("?deny=403", 403)] {
        for method in ["GET", "HEAD", "POST", "DELETE"] {
            let path = format!("/v1/forward-auth{query}");
            let call = app.request(method.parse().unwrap(), &path);
            let answer = call
                .header("X-API-Key", &key.text)
                .header("X-Service-Token", &token)
                .send()
                .await;
            assert_eq!(
                (answer.status, answer.text.as_str()),
                (status, ""),
                "{method}{query}"
            );
            assert_eq!(answer.header("content-length"), Some("0"));
            for name in [
                "x-ratelimit-limit",
                "x-ratelimit-remaining",
                "x-ratelimit-reset",
                "ratelimit-policy",
                "ratelimit",
                "retry-after",
                "cache-control",
            ] {
                assert!(echo.header(name).is_some(), "{name}");
                assert_eq!(answer.header(name), echo.header(name), "{method} {name}");
            }
        }
    }
    // A gateway can choose the status of a denial, but not the status for an invalid key.
    let unknown = forward(&app, &token, "x", "?deny=403").await;
    assert_eq!(
        (unknown.status, unknown.header("content-length")),
        (401, Some("0"))
    );
    assert!(unknown.header("x-ratelimit-limit").is_none());
    for deny in ["200", "500", "x", "-1"] {
        let refused = forward(&app, &token, &key.text, &format!("?deny={deny}")).await;
        assert_eq!(
            (refused.status, &refused.body["errors"][0]["field"]),
            (422, &json!("deny")),
            "{deny}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_check_names_its_fields_and_consumes_nothing() {
    let (app, _clock, account) = still().await;
    let token = app.service_token(&account).await;
    let key = key(&app, &account, json!({"default_rpm": 60})).await;
    for (extra, fields) in [
        (json!({"key": null}), vec!["key"]),
        (json!({"key": ""}), vec!["key"]),
        (json!({"key": "x".repeat(257)}), vec!["key"]),
        (json!({"endpoint": ""}), vec!["endpoint"]),
        (json!({"endpoint": "é".repeat(129)}), vec!["endpoint"]),
        (json!({"endpoint": "GET /\n"}), vec!["endpoint"]),
        (json!({"tenant": account.tenant_id}), vec!["tenant"]),
        (json!({"cost": 0, "endpoint": ""}), vec!["cost", "endpoint"]),
    ] {
        let mut body = json!({"key": key.text});
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        let refused = check(&app, &token, body).await;
        let errors = refused.body["errors"].as_array().unwrap().iter();
        let named = errors.map(|it| it["field"].as_str().unwrap());
        assert_eq!(
            (refused.status, named.collect::<Vec<_>>()),
            (422, fields),
            "{extra}"
        );
        assert!(!refused.text.contains(&key.text));
    }
    let body = json!({"key": key.text, "cost": 2, "endpoint": "é".repeat(128)});
    let allowed = check(&app, &token, body).await;
    assert_eq!(allowed.body["allowed"], json!(true));
    assert_eq!(
        app.echo(&key.text).await.number("x-ratelimit-remaining"),
        57,
        "the cost of the check, and this request"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_violated_policy_is_named_with_the_longest_wait() {
    let (app, clock, account) = still().await;
    let token = app.service_token(&account).await;
    let key = key(
        &app,
        &account,
        json!({"default_rpm": 60, "burst": 2, "daily_quota": 2, "monthly_quota": 2}),
    )
    .await;
    for _ in 0..2 {
        assert_eq!(app.echo(&key.text).await.status, 200);
    }
    let all = app.echo(&key.text).await;
    assert_eq!(
        (all.status, &all.body["violated-policies"]),
        (429, &json!(["rpm", "daily", "monthly"]))
    );
    let checked = check(&app, &token, json!({"key": key.text})).await;
    let limits = checked.body["limits"].as_array().unwrap();
    let shown = limits
        .iter()
        .map(|it| (it["policy"].clone(), it["remaining"].clone()));
    assert_eq!(
        shown.collect::<Vec<_>>(),
        ["rpm", "daily", "monthly"].map(|name| (json!(name), json!(0)))
    );
    let month = chrono::DateTime::parse_from_rfc3339(limits[2]["reset_at"].as_str().unwrap())
        .unwrap()
        .timestamp();
    let now = i64::try_from(clock.now().secs()).unwrap();
    let wait = i64::try_from(all.number("retry-after")).unwrap();
    assert!(
        (wait - (month - now)).abs() <= 1,
        "{wait} s is not until {month}"
    );
    assert_eq!(checked.body["retry_after"], json!(wait));

    clock.advance(Duration::from_secs(2));
    let quotas = app.echo(&key.text).await;
    assert_eq!(
        quotas.body["violated-policies"],
        json!(["daily", "monthly"])
    );
    clock.advance(Duration::from_secs(quotas.number("retry-after")));
    assert_eq!(app.echo(&key.text).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn key_that_moves_to_another_plan_keeps_its_usage() {
    let (app, _clock, account) = still().await;
    let small = app
        .plan(
            &account,
            json!({"default_rpm": 60, "burst": 3, "daily_quota": 5}),
        )
        .await;
    let large = app
        .plan(
            &account,
            json!({"default_rpm": 600, "burst": 10, "daily_quota": 8}),
        )
        .await;
    let key = app.key(&account, &small).await;
    let path = format!("/admin/api-keys/{}", key.id);
    let patch = async |body: Value| {
        let changed = app.act(&account, "PATCH", &path, body).await;
        assert_eq!(changed.status, 200, "{}", changed.body);
    };
    let pass = async || {
        let mut passed = 0;
        while app.echo(&key.text).await.status == 200 {
            passed += 1;
        }
        passed
    };
    assert_eq!(pass().await, 3);
    // Deactivating and activating the key, or rotating it, does not grant a new burst either.
    patch(json!({"is_active": false})).await;
    assert_eq!(app.echo(&key.text).await.status, 401);
    patch(json!({"is_active": true})).await;
    assert_eq!(pass().await, 0);

    patch(json!({"plan_id": large})).await;
    let served = pass().await;
    let denied = app.echo(&key.text).await;
    assert_eq!(
        denied.header("ratelimit-policy"),
        Some("\"rpm\";q=600;w=60, \"daily\";q=8;w=86400"),
        "the change applies immediately"
    );
    assert!(
        served <= 5,
        "3 of the day's 8 were spent already, and {served} more passed"
    );
    assert_eq!(served, 5);
    assert_eq!(denied.body["violated-policies"], json!(["daily"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn daily_quota_uses_the_tenants_time_zone() {
    let now = SystemClock::new().now().secs();
    let evening = now - now % 86_400 + 20 * 3600;
    let clock = TestClock::at(quota_server::clock::UnixNanos::from_secs(evening));
    let app = TestApp::setup()
        .clock(Arc::new(clock.clone()))
        .start()
        .await;
    let account = app.register().await;
    let plan = app
        .plan(&account, json!({"default_rpm": 6000, "daily_quota": 1}))
        .await;
    // 20:00 UTC is 05:00 the next day in Tokyo and 10:00 the same day in Honolulu. Neither city observes daylight
    // saving time.
    for (zone, hours) in [("UTC", 4), ("Asia/Tokyo", 19), ("Pacific/Honolulu", 14)] {
        let set = app
            .act(&account, "PATCH", "/auth/me", json!({"time_zone": zone}))
            .await;
        assert_eq!(set.status, 200, "{}", set.body);
        let key = app.key(&account, &plan).await;
        assert_eq!(app.echo(&key.text).await.status, 200);
        let denied = app.echo(&key.text).await;
        assert_eq!(
            (denied.status, denied.number("retry-after")),
            (429, hours * 3600),
            "{zone}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn change_of_time_zone_applies_when_the_day_ends_and_headers_say_so() {
    let now = SystemClock::new().now().secs();
    let evening = now - now % 86_400 + 20 * 3600;
    let clock = TestClock::at(quota_server::clock::UnixNanos::from_secs(evening));
    let app = TestApp::setup()
        .clock(Arc::new(clock.clone()))
        .start()
        .await;
    let account = app.register().await;
    let plan = json!({"default_rpm": 6000, "daily_quota": 48});
    let plan = app.plan(&account, plan).await;
    let key = app.key(&account, &plan).await;
    let policy = async |quota: &str| {
        let answer = app.echo(&key.text).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let field = answer.headers["ratelimit-policy"].to_str().expect("ASCII");
        assert!(field.ends_with(quota), "{field}");
    };
    policy("\"daily\";q=48;w=86400").await;
    for zone in ["Pacific/Honolulu", "Asia/Tokyo"] {
        let set = app
            .act(&account, "PATCH", "/auth/me", json!({"time_zone": zone}))
            .await;
        assert_eq!(set.status, 200, "{}", set.body);
        policy("\"daily\";q=48;w=86400").await;
    }
    // The new window lasts from midnight in UTC to midnight in Tokyo.
    clock.advance(Duration::from_hours(4));
    for _ in 0..30 {
        policy("\"daily\";q=30;w=54000").await;
    }
    let denied = app.echo(&key.text).await;
    assert_eq!(
        (denied.status, denied.number("retry-after")),
        (429, 15 * 3600)
    );
    clock.advance(Duration::from_hours(15));
    policy("\"daily\";q=48;w=86400").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_replica_applies_a_changed_plan_and_a_rotated_key_within_ten_polls() {
    let one = TestApp::start().await;
    let other = TestApp::setup()
        .database(one.database.clone())
        .start()
        .await;
    let account = one.register().await;
    let plan = one.plan(&account, json!({"default_rpm": 60_000})).await;
    let key = one.key(&account, &plan).await;
    assert_eq!(
        other.echo(&key.text).await.number("x-ratelimit-limit"),
        60_000
    );
    let path = format!("/admin/plans/{plan}");
    let changed = one
        .act(&account, "PATCH", &path, json!({"default_rpm": 30_000}))
        .await;
    assert_eq!(changed.status, 200);
    other
        .notices("the new rate", async || {
            let answer = other.echo(&key.text).await;
            answer.header("x-ratelimit-limit") == Some("30000")
        })
        .await;

    let path = format!("/admin/api-keys/{}/rotate", key.id);
    let rotated = one
        .act(&account, "POST", &path, json!({"grace_seconds": 0}))
        .await;
    assert_eq!(
        other.echo(&rotated.text("key")).await.status,
        200,
        "the new secret works on every replica immediately"
    );
    other
        .notices("the rotation", async || {
            other.echo(&key.text).await.status == 401
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disabling_and_enabling_a_key_applies_immediately() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let first = key(&app, &account, json!({})).await;
    let path = format!("/admin/api-keys/{}", first.id);
    let patch = async |active: bool| {
        let changed = app
            .act(&account, "PATCH", &path, json!({"is_active": active}))
            .await;
        assert_eq!(changed.status, 200);
    };
    for _ in 0..3 {
        patch(false).await;
        assert_eq!(app.echo(&first.text).await.status, 401);
        patch(true).await;
        assert_eq!(app.echo(&first.text).await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn key_that_is_sent_twice_is_rejected() {
    let (app, _clock, account) = still().await;
    let token = app.service_token(&account).await;
    let (one, other) = (
        key(&app, &account, json!({})).await,
        key(&app, &account, json!({})).await,
    );
    let twice = app
        .get("/v1/echo")
        .header("X-API-Key", &one.text)
        .header("X-API-Key", &other.text)
        .send()
        .await;
    assert_eq!((twice.status, twice.problem()), (400, "malformed"));
    // The API behind the gateway may read the other key, so neither is accepted.
    let forwarded = app
        .get("/v1/forward-auth")
        .header("X-Service-Token", &token)
        .header("X-API-Key", &one.text)
        .header("X-API-Key", &other.text)
        .send()
        .await;
    assert_eq!((forwarded.status, forwarded.text.as_str()), (401, ""));
    let forwarded = app
        .get("/v1/forward-auth")
        .header("X-Service-Token", &token)
        .header("X-API-Key", &one.text)
        .bearer(&other.text)
        .send()
        .await;
    assert_eq!((forwarded.status, forwarded.text.as_str()), (401, ""));
    for key in [one, other] {
        assert_eq!(
            app.echo(&key.text).await.number("x-ratelimit-remaining"),
            59,
            "neither was charged"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grace_period_is_for_one_secret_and_does_not_outlive_the_key() {
    let (app, clock, account) = still().await;
    let first = key(&app, &account, json!({"default_rpm": 6000})).await;
    let path = format!("/admin/api-keys/{}", first.id);
    let rotate = async |seconds: u32| {
        let rotate = format!("{path}/rotate");
        let body = json!({"grace_seconds": seconds, "replace_previous": true});
        let rotated = app.act(&account, "POST", &rotate, body).await;
        assert_eq!(rotated.status, 200);
        rotated.text("key")
    };
    let second = rotate(3600).await;
    assert_eq!(app.echo(&first.text).await.status, 200);
    let third = rotate(3600).await;
    assert_eq!(
        app.echo(&first.text).await.status,
        401,
        "only one previous secret works"
    );
    for text in [&second, &third] {
        assert_eq!(app.echo(text).await.status, 200);
    }

    // The key expires before the grace period ends. From then on, neither secret works.
    let end = i64::try_from(clock.now().secs()).unwrap() + 60;
    let end = chrono::DateTime::from_timestamp(end, 0).unwrap();
    let until = json!({"expires_at": end.to_rfc3339()});
    let changed = app.act(&account, "PATCH", &path, until).await;
    assert_eq!(changed.status, 200);
    clock.advance(Duration::from_secs(59));
    for text in [&second, &third] {
        assert_eq!(app.echo(text).await.status, 200);
    }
    clock.advance(Duration::from_secs(2));
    for text in [&second, &third] {
        assert_eq!(app.echo(text).await.status, 401);
    }
}

/// Requests to the three endpoints that make decisions are recognized by their path before they reach the router. With
/// an additional query parameter, they go through the router.
#[tokio::test(flavor = "multi_thread")]
async fn fast_path_and_router_respond_alike() {
    let (app, _clock, account) = still().await;
    let plan = json!({"default_rpm": 60, "burst": 2, "daily_quota": 100});
    let plan = app.plan(&account, plan).await;
    let token = app.service_token(&account).await;
    let mut seen = [Vec::new(), Vec::new()];
    for (query, seen) in ["", "n=1"].into_iter().zip(&mut seen) {
        let key = app.key(&account, &plan).await;
        let path = |path: &str| match (query, path.contains('?')) {
            ("", _) => path.to_owned(),
            (query, true) => format!("{path}&{query}"),
            (query, false) => format!("{path}?{query}"),
        };
        let echo = || app.get(&path("/v1/echo"));
        let forward = |query: &str| app.get(&path(&format!("/v1/forward-auth{query}")));
        let check = |body: Value| app.post(&path("/v1/check"), body);
        let mut shows = |answer: Answer| {
            let mut headers = answer.headers.clone();
            for name in ["x-request-id", "date", "content-length"] {
                headers.remove(name);
            }
            let mut headers = headers
                .iter()
                .map(|(name, value)| format!("{name}: {value:?}"))
                .collect::<Vec<_>>();
            headers.sort();
            let mut body = answer.body.clone();
            if let Some(body) = body.as_object_mut() {
                body.remove("request_id");
                body.remove("key_id");
            }
            seen.push((answer.status, headers, body));
        };

        // Send requests without credentials, with invalid credentials, and with an invalid body.
        shows(echo().send().await);
        shows(echo().header("X-API-Key", "qk_none").send().await);
        shows(forward("").send().await);
        shows(forward("").header("X-Service-Token", &token).send().await);
        shows(check(json!({})).send().await);
        shows(check(json!({})).bearer(&token).send().await);
        shows(
            app.request(reqwest::Method::POST, &path("/v1/check"))
                .bearer(&token)
                .body("text/plain", "{}")
                .send()
                .await,
        );
        // Send allowed and denied requests on each path. With a daily quota, all headers are present.
        for _ in 0..2 {
            shows(echo().header("X-API-Key", &key.text).send().await);
            for query in ["", "?deny=403", "?deny=429"] {
                let call = forward(query).header("X-Service-Token", &token);
                shows(call.header("X-API-Key", &key.text).send().await);
            }
            let body = json!({"key": key.text});
            shows(check(body).bearer(&token).send().await);
        }
    }
    let [short, long] = seen;
    let statuses = short.iter().map(|it| it.0).collect::<Vec<_>>();
    assert_eq!(
        statuses,
        [
            401, 401, 401, 401, 401, 422, 415, // rejected
            200, 200, 403, 429, 200, // the burst of two is used up
            429, 429, 403, 429, 200,
        ]
    );
    for (short, long) in short.into_iter().zip(long) {
        assert_eq!(short, long);
    }
}

/// Returns the value of `X-Quota-Decision`, on which gateways rely.
fn decision(answer: &Answer) -> &str {
    answer.header("x-quota-decision").unwrap_or("none")
}

#[tokio::test(flavor = "multi_thread")]
async fn forward_auth_accepts_exactly_one_service_token_in_its_header() {
    let (app, _clock, account) = still().await;
    let key = key(&app, &account, json!({"default_rpm": 60})).await;
    let token = app.service_token(&account).await;
    let stranger = app.register().await;
    let other = app.service_token(&stranger).await;
    let ask = |tokens: Vec<&str>, bearer: Option<&str>| {
        let mut call = app.get("/v1/forward-auth").header("X-API-Key", &key.text);
        for token in tokens {
            call = call.header("X-Service-Token", token);
        }
        if let Some(bearer) = bearer {
            call = call.bearer(bearer);
        }
        call.send()
    };
    for (tokens, bearer) in [
        (vec![], None),
        (vec![], Some(token.as_str())),
        (vec![], Some(other.as_str())),
        (vec![""], Some(token.as_str())),
        (vec![token.as_str(), token.as_str()], None),
        (vec![token.as_str(), "forged"], None),
        (vec!["forged", token.as_str()], None),
        (vec![other.as_str(), token.as_str()], None),
        (vec!["forged"], Some(token.as_str())),
    ] {
        let shown = format!("{} tokens, bearer: {}", tokens.len(), bearer.is_some());
        let answer = ask(tokens, bearer).await;
        assert_eq!(
            (answer.status, decision(&answer)),
            (401, "unauthorized"),
            "{shown}"
        );
    }
    let list = format!("{token}, {token}");
    assert_eq!(ask(vec![&list], None).await.status, 401);
    let admitted = ask(vec![&token], None).await;
    assert_eq!((admitted.status, decision(&admitted)), (200, "allowed"));
    assert_eq!(
        admitted.number("x-ratelimit-remaining"),
        59,
        "nothing was charged before"
    );
    // Other credentials of the service do not affect the decision about the consumer's key.
    let both = ask(vec![&token], Some(&other)).await;
    assert_eq!((both.status, decision(&both)), (200, "allowed"));
}

/// `POST /v1/check` is called by a service that controls its headers. Two tokens are rejected anyway.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_with_two_service_tokens_is_401() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let key = key(&app, &account, json!({})).await;
    let token = app.service_token(&account).await;
    let body = json!({"key": key.text});
    let two = app
        .post("/v1/check", body.clone())
        .header("X-Service-Token", &token)
        .header("X-Service-Token", &token);
    assert_eq!(two.send().await.status, 401);
    for one in [
        app.post("/v1/check", body.clone())
            .header("X-Service-Token", &token),
        app.post("/v1/check", body).bearer(&token),
    ] {
        assert_eq!(one.send().await.body["allowed"], json!(true));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_response_of_forward_auth_states_the_decision() {
    let first = TestApp::start().await;
    let (proxy, url) = through_proxy(&first.database).await;
    let app = TestApp::setup()
        .database(first.database.clone())
        .url(url)
        .start()
        .await;
    let account = app.register().await;
    let token = app.service_token(&account).await;
    let key = key(&app, &account, json!({"default_rpm": 1, "burst": 1})).await;
    let states = async |answer: Answer, expected: (u16, &str)| {
        assert_eq!((answer.status, decision(&answer)), expected, "{answer:?}");
    };
    states(forward(&app, &token, &key.text, "").await, (200, "allowed")).await;
    states(forward(&app, &token, &key.text, "").await, (429, "limited")).await;
    let nginx = forward(&app, &token, &key.text, "?deny=403").await;
    states(nginx, (403, "limited")).await;
    states(forward(&app, &token, "x", "").await, (401, "unauthorized")).await;
    let nginx = forward(&app, &token, "x", "?deny=403").await;
    states(nginx, (401, "unauthorized")).await;
    states(
        forward(&app, "qs_x", &key.text, "").await,
        (401, "unauthorized"),
    )
    .await;
    states(
        app.get("/v1/forward-auth").send().await,
        (401, "unauthorized"),
    )
    .await;
    for deny in ["200", "500", "x", ""] {
        let query = format!("?deny={deny}");
        states(
            forward(&app, &token, &key.text, &query).await,
            (422, "unavailable"),
        )
        .await;
    }
    // This key is only in the database.
    let cold = app
        .key(&account, &app.plan(&account, json!({})).await)
        .await
        .text;
    proxy.set(Fault::Refuse);
    proxy.cut();
    let away = forward(&app, &token, &cold, "?deny=403").await;
    assert_eq!(
        (away.text.as_str(), away.header("content-length")),
        ("", Some("0"))
    );
    assert_eq!(away.header("retry-after"), Some("1"));
    states(away, (503, "unavailable")).await;
    // Responses of other paths do not have the `X-Quota-Decision` header.
    assert_eq!(decision(&app.echo(&key.text).await), "none");
}

/// Without the shared counters, a denial does not show that a limit was reached.
#[tokio::test(flavor = "multi_thread")]
async fn a_denial_that_names_no_policy_is_429_and_reduced_capacity() {
    let (app, _clock, account) = still().await;
    let key = key(&app, &account, json!({"default_rpm": 60})).await;
    let now = app.state.clock.monotonic();
    let text = SecretText::parse(Kind::ApiKey, key.text.as_bytes()).unwrap();
    let record = app
        .state
        .keys
        .key(text.hash(), now, LookupCaller::default())
        .await
        .unwrap()
        .unwrap();
    let admitted = app
        .state
        .limiter
        .admit(&record.handle, &record.policies, NonZeroU32::MIN)
        .await
        .unwrap();
    for (violated, kind, degraded) in [
        (PolicySet::EMPTY, "temporary-reduced-capacity", true),
        (PolicySet::EMPTY.with(Policy::Rpm), "quota-exceeded", false),
    ] {
        let denied = Decision {
            outcome: Outcome::Denied {
                violated,
                retry_after: NonZeroU64::new(1_500_000_000),
            },
            ..admitted
        };
        let response = ApiError::denied(record.clone(), denied)
            .into_response("r-1", "https://quota.example.com");
        assert_eq!(response.status(), 429);
        let field = |name: &str| response.headers().get(name).map(|it| it.to_str().unwrap());
        assert_eq!(field("retry-after"), Some("2"));
        assert_eq!(field("x-quota-degraded"), degraded.then_some("redis-away"));
        assert_eq!(field("x-ratelimit-limit"), Some("60"));
        let body: Value = response.into_body().into_json().await.unwrap();
        assert_eq!(
            body["type"],
            format!("https://iana.org/assignments/http-problem-types#{kind}")
        );
        assert_eq!(body["status"], 429);
        assert_eq!(body.get("violated-policies").is_none(), degraded, "{body}");
    }
}

/// Headers that a browser adds reach Quota through gateways that forward all headers.
#[tokio::test(flavor = "multi_thread")]
async fn cross_origin_rules_do_not_apply_to_forward_auth() {
    let app = TestApp::setup()
        .flag("--allowed-origins=https://app.example.com")
        .start()
        .await;
    let account = app.register().await;
    let token = app.service_token(&account).await;
    let key = key(&app, &account, json!({"default_rpm": 60})).await;
    for origin in [
        "https://app.example.com",
        "https://elsewhere.example",
        "null",
    ] {
        let asked = forward_from(&app, &token, &key.text, origin).await;
        assert_eq!(
            (asked.status, decision(&asked)),
            (200, "allowed"),
            "{origin}"
        );
        assert!(asked.header("access-control-allow-origin").is_none());
        // A preflight request is treated like any other request and needs a key.
        let preflight = app
            .request(reqwest::Method::OPTIONS, "/v1/forward-auth")
            .header("Origin", origin)
            .header("Access-Control-Request-Method", "GET")
            .header("X-Service-Token", &token)
            .send()
            .await;
        assert_eq!(
            (preflight.status, decision(&preflight)),
            (401, "unauthorized"),
            "{origin}"
        );
    }
    // The CORS rules still apply to other endpoints.
    let elsewhere = app
        .http
        .get(app.url("/v1/echo"))
        .header("X-API-Key", &key.text)
        .header("Origin", "https://elsewhere.example")
        .send()
        .await
        .unwrap();
    assert_eq!(elsewhere.status(), 403);
    let allowed = app
        .get("/v1/echo")
        .header("X-API-Key", &key.text)
        .header("Origin", "https://app.example.com")
        .send()
        .await;
    assert_eq!(
        (
            allowed.status,
            allowed.header("access-control-allow-origin")
        ),
        (200, Some("https://app.example.com"))
    );
}

async fn forward_from(app: &TestApp, token: &str, key: &str, origin: &str) -> Answer {
    app.get("/v1/forward-auth?n=1")
        .header("X-Service-Token", token)
        .header("X-API-Key", key)
        .header("Origin", origin)
        .send()
        .await
}

/// The API behind the gateway may read a different key than the one that was checked.
#[tokio::test(flavor = "multi_thread")]
async fn two_consumer_credentials_are_rejected() {
    let (app, _clock, account) = still().await;
    let token = app.service_token(&account).await;
    let one = key(&app, &account, json!({})).await;
    let bearer = format!("Bearer {}", one.text);
    for fields in [
        vec![("X-API-Key", &one.text), ("X-API-Key", &one.text)],
        vec![("Authorization", &bearer), ("Authorization", &bearer)],
        vec![
            ("X-API-Key", &one.text),
            ("Authorization", &bearer),
            ("Authorization", &bearer),
        ],
    ] {
        let mut direct = app.get("/v1/echo");
        let mut asked = app
            .get("/v1/forward-auth")
            .header("X-Service-Token", &token);
        for (name, value) in &fields {
            direct = direct.header(name, value);
            asked = asked.header(name, value);
        }
        let direct = direct.send().await;
        assert_eq!((direct.status, direct.problem()), (400, "malformed"));
        let asked = asked.send().await;
        assert_eq!((asked.status, decision(&asked)), (401, "unauthorized"));
    }
    // Quota ignores other credentials, which are for the API.
    let own = app
        .get("/v1/forward-auth")
        .header("X-Service-Token", &token)
        .header("X-API-Key", &one.text)
        .header("Authorization", "Basic dTpw");
    let own = own.send().await;
    assert_eq!(own.status, 200);
    assert_eq!(
        own.number("x-ratelimit-remaining"),
        59,
        "nothing was charged"
    );
}
