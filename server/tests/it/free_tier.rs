//! Tests of the operator's limits for tenants without a subscription.

use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, future::join_all, stream};
use quota_testkit::redis::RedisServer;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::support::{
    app::{Account, Answer, TestApp},
    stripe::{TestStripe, wait_for_access, wait_for_status},
};

/// A time limit that is long enough for a busy machine.
const AT_MOST: Duration = Duration::from_secs(45);
/// Changes that do not get their turn get 503 after five seconds.
const TURN_WITHIN: Duration = Duration::from_secs(4);
/// Requests that do not get quota tokens get 503 after a second.
const TOKENS_WITHIN: Duration = Duration::from_millis(900);

/// Returns a plan whose bucket does not refill noticeably during a test.
fn plan(burst: u32) -> Value {
    // The lowest rate at which the burst refills within 31 days.
    json!({"default_rpm": burst.div_ceil(44_640), "burst": burst})
}

async fn create_plan(app: &TestApp, account: &Account, name: &str, fields: Value) -> Answer {
    let mut body = json!({"name": name, "default_rpm": 60});
    for (field, value) in fields.as_object().expect("fields") {
        body[field] = value.clone();
    }
    app.act(account, "POST", "/admin/plans", body).await
}

async fn create_key(app: &TestApp, account: &Account, plan: &str, fields: Value) -> Answer {
    let mut body = json!({"name": "Key", "plan_id": plan});
    for (field, value) in fields.as_object().expect("fields") {
        body[field] = value.clone();
    }
    app.act(account, "POST", "/admin/api-keys", body).await
}

/// Repeats a request up to 20 times if it gets 503 after a wait of at least `wait`. If PostgreSQL is paused, a tenant's
/// changes may not get their turn in time, and requests may not get the tenant's tokens in time. A failure without a
/// wait, such as a deadlock, is not retried.
async fn retry_if_late<F: Future<Output = Answer>>(wait: Duration, send: impl Fn() -> F) -> Answer {
    for _ in 0..20 {
        let began = Instant::now();
        let answer = send().await;
        if answer.status != 503 || began.elapsed() < wait {
            return answer;
        }
        sleep(Duration::from_millis(100)).await;
    }
    send().await
}

async fn limits(app: &TestApp, account: &Account) -> Value {
    let state = app.act(account, "GET", "/billing", Value::Null).await;
    assert_eq!(state.status, 200, "{}", state.text);
    state.body["limits"].clone()
}

/// Returns the fields that a response names as invalid.
fn fields(answer: &Answer) -> Vec<&str> {
    assert_eq!(answer.status, 422, "{}", answer.text);
    let errors = answer.body["errors"].as_array().expect("errors");
    errors
        .iter()
        .map(|it| it["field"].as_str().expect("a field"))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_plans_or_keys_are_refused_until_the_tenant_subscribes() {
    let stripe = TestStripe::start().await;
    let setup = stripe.configure(TestApp::setup());
    let app = setup
        .flag("--free-plans=2")
        .flag("--free-keys=3")
        .start()
        .await;
    stripe.send_to(&app);
    let account = app.register().await;
    let first = app.plan(&account, json!({"name": "First"})).await;
    assert_eq!(
        create_plan(&app, &account, "Second", json!({}))
            .await
            .status,
        201
    );
    let refused = create_plan(&app, &account, "Third", json!({})).await;
    assert_eq!((refused.status, refused.problem()), (403, "limit-reached"));
    assert!(
        refused.text("detail").contains("2 plans"),
        "{}",
        refused.text
    );
    for _ in 0..3 {
        app.key(&account, &first).await;
    }
    let refused = create_key(&app, &account, &first, json!({})).await;
    assert_eq!((refused.status, refused.problem()), (403, "limit-reached"));
    assert!(
        refused.text("detail").contains("3 API keys"),
        "{}",
        refused.text
    );
    let shown = limits(&app, &account).await;
    assert_eq!(shown["plans"], json!({"used": 2, "maximum": 2}));
    assert_eq!(shown["api_keys"], json!({"used": 3, "maximum": 3}));
    // Other tenants have separate limits, and these limits do not apply to service tokens.
    let other = app.register().await;
    app.plan(&other, json!({})).await;
    app.service_token(&account).await;

    stripe.subscribe(&app, &account).await;
    wait_for_access(&app, &account, "active").await;
    assert_eq!(
        create_plan(&app, &account, "Third", json!({})).await.status,
        201
    );
    assert_eq!(
        create_key(&app, &account, &first, json!({})).await.status,
        201
    );
    let shown = limits(&app, &account).await;
    assert_eq!(shown["plans"], json!({"used": 3, "maximum": 1000}));
    assert_eq!(shown["api_keys"], json!({"used": 4, "maximum": 100_000}));
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_creations_on_two_replicas_do_not_exceed_the_limit() {
    let flags = ["--free-plans=4", "--free-keys=5"];
    let start = async |setup: crate::support::app::Setup| {
        let setup = flags.iter().fold(setup, |setup, flag| setup.flag(*flag));
        setup.start().await
    };
    let first = start(TestApp::setup()).await;
    let second = start(TestApp::setup().database(first.database.clone())).await;
    let account = first.register().await;
    let plan = first.plan(&account, json!({"name": "Base"})).await;
    let replicas = [&first, &second];
    let creations = (0..24).map(|n| {
        let (app, account, plan) = (replicas[n % 2], &account, plan.as_str());
        async move {
            let name = format!("Plan {n}");
            let (a, b) = tokio::join!(
                retry_if_late(TURN_WITHIN, || create_plan(app, account, &name, json!({}))),
                retry_if_late(TURN_WITHIN, || create_key(app, account, plan, json!({})))
            );
            (a.status, b.status)
        }
    });
    let statuses = join_all(creations).await;
    let created = |of: fn(&(u16, u16)) -> u16| {
        let all = statuses.iter().map(of);
        assert!(
            all.clone().all(|it| [201, 403].contains(&it)),
            "{statuses:?}"
        );
        all.filter(|it| *it == 201).count()
    };
    // One plan has existed since the start of the test.
    assert_eq!(created(|it| it.0), 3);
    assert_eq!(created(|it| it.1), 5);
    let shown = limits(&second, &account).await;
    assert_eq!(shown["plans"], json!({"used": 4, "maximum": 4}));
    assert_eq!(shown["api_keys"], json!({"used": 5, "maximum": 5}));
}

#[tokio::test(flavor = "multi_thread")]
async fn plan_above_the_free_limits_must_be_paid() {
    let stripe = TestStripe::start().await;
    let setup = stripe.configure(TestApp::setup());
    let setup = setup
        .flag("--free-rpm=60")
        .flag("--free-requests-per-month=1000");
    let app = setup.start().await;
    let account = app.register().await;
    let refused = create_plan(
        &app,
        &account,
        "Free",
        json!({"default_rpm": 61, "daily_quota": 1001, "monthly_quota": 1001}),
    )
    .await;
    // The burst follows the rate, so both fields are invalid.
    assert_eq!(
        fields(&refused),
        ["default_rpm", "burst", "daily_quota", "monthly_quota"]
    );
    let refused = create_plan(&app, &account, "Free", json!({"burst": 61})).await;
    assert_eq!(fields(&refused), ["burst"]);
    let free = json!({"daily_quota": 1000, "monthly_quota": 1000});
    let free = create_plan(&app, &account, "Free", free).await;
    assert_eq!(free.status, 201, "{}", free.text);
    let free = free.text("id");
    let paid = json!({"default_rpm": 61, "monthly_quota": 5000, "billing": "paid"});
    let paid = create_plan(&app, &account, "Paid", paid).await;
    assert_eq!(paid.status, 201, "{}", paid.text);
    let paid = paid.text("id");

    let patch = async |plan: &str, body: Value| {
        let path = format!("/admin/plans/{plan}");
        app.act(&account, "PATCH", &path, body).await
    };
    let refused = patch(&paid, json!({"billing": "free"})).await;
    assert_eq!(fields(&refused), ["default_rpm", "burst", "monthly_quota"]);
    assert_eq!(
        fields(&patch(&free, json!({"default_rpm": 100})).await),
        ["default_rpm", "burst"]
    );
    assert_eq!(
        patch(&free, json!({"default_rpm": 60, "daily_quota": null}))
            .await
            .status,
        200
    );
    assert_eq!(patch(&paid, json!({"default_rpm": 100})).await.status, 200);

    // A key's own rate is limited as well.
    let refused = create_key(&app, &account, &free, json!({"rpm_override": 61})).await;
    assert_eq!(fields(&refused), ["rpm_override"]);
    let made = create_key(&app, &account, &paid, json!({"rpm_override": 5000})).await;
    assert_eq!(made.status, 201, "{}", made.text);
    let key = made.body["api_key"]["id"].as_str().expect("an ID");
    let path = format!("/admin/api-keys/{key}");
    let refused = app
        .act(&account, "PATCH", &path, json!({"plan_id": free}))
        .await;
    assert_eq!(fields(&refused), ["rpm_override"]);
    let lower = json!({"billing": "free", "default_rpm": 60, "monthly_quota": null});
    assert_eq!(fields(&patch(&paid, lower.clone()).await), ["billing"]);
    let moved = json!({"plan_id": free, "rpm_override": 60});
    assert_eq!(app.act(&account, "PATCH", &path, moved).await.status, 200);
    assert_eq!(patch(&paid, lower).await.status, 200);

    // Plans and keys that are older than the limits can be edited, but their limits cannot be raised.
    let client = app.database.connect().await;
    let sql = "UPDATE plans SET default_rpm = 500, burst = 500 WHERE name = 'Free'";
    client.execute(sql, &[]).await.expect("the plan is changed");
    assert_eq!(patch(&free, json!({"name": "Old"})).await.status, 200);
    assert_eq!(
        fields(&patch(&free, json!({"default_rpm": 501})).await),
        ["default_rpm", "burst"]
    );
    for kept_or_lower in [json!({"daily_quota": 900}), json!({"default_rpm": 400})] {
        let patched = patch(&free, kept_or_lower).await;
        assert_eq!(patched.status, 200, "{}", patched.text);
    }
    let sql = "UPDATE api_keys SET rpm_override = 500";
    client.execute(sql, &[]).await.expect("the key is changed");
    let refused = app
        .act(&account, "PATCH", &path, json!({"rpm_override": 501}))
        .await;
    assert_eq!(fields(&refused), ["rpm_override"]);
    let lower = json!({"rpm_override": 400});
    assert_eq!(app.act(&account, "PATCH", &path, lower).await.status, 200);
    let shown = limits(&app, &account).await;
    assert_eq!(
        (&shown["free_plan_rpm"], &shown["free_plan_quota"]),
        (&json!(60), &json!(1000))
    );
}

/// Without billing, `paid` has no effect, so the limits apply to all plans.
#[tokio::test(flavor = "multi_thread")]
async fn without_billing_all_plans_have_the_limits() {
    let app = TestApp::setup().flag("--free-rpm=60").start().await;
    let account = app.register().await;
    let fast = json!({"default_rpm": 61, "billing": "paid"});
    let refused = create_plan(&app, &account, "Fast", fast).await;
    assert_eq!(fields(&refused), ["default_rpm", "burst"]);
    assert_eq!(
        create_plan(&app, &account, "Slow", json!({})).await.status,
        201
    );
    // A plan can be marked `paid` even if a key on it is above the limit.
    let plan = app.plan(&account, json!({})).await;
    app.key(&account, &plan).await;
    let client = app.database.connect().await;
    let sql = "UPDATE api_keys SET rpm_override = 500";
    client.execute(sql, &[]).await.expect("the key is changed");
    let path = format!("/admin/plans/{plan}");
    let marked = app
        .act(&account, "PATCH", &path, json!({"billing": "paid"}))
        .await;
    assert_eq!(marked.status, 200, "{}", marked.text);
    // Billing might be turned on later, so the mark cannot be removed from a plan that needs it.
    let unmark = json!({"billing": "free"});
    let refused = app.act(&account, "PATCH", &path, unmark.clone()).await;
    assert_eq!(fields(&refused), ["billing"]);
    let sql = "UPDATE api_keys SET rpm_override = NULL";
    client.execute(sql, &[]).await.expect("the key is changed");
    let sql = "UPDATE plans SET default_rpm = 500, burst = 500 WHERE billing = 'paid'";
    client.execute(sql, &[]).await.expect("the plan is changed");
    let refused = app.act(&account, "PATCH", &path, unmark).await;
    assert_eq!(fields(&refused), ["default_rpm", "burst"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn monthly_requests_are_limited_on_every_way_in() {
    let app = TestApp::setup()
        .flag("--free-requests-per-month=20")
        .start()
        .await;
    let (account, other) = (app.register().await, app.register().await);
    let gateway = app.service_token(&account).await;
    let plan_id = app.plan(&account, plan(1000)).await;
    let first = app.key(&account, &plan_id).await.text;
    let second = app.key(&account, &plan_id).await.text;
    let check = async |key: &str, cost: u32| {
        let call = app.post("/v1/check", json!({"key": key, "cost": cost}));
        call.bearer(&gateway).send().await
    };
    let forward = async |key: &str, query: &str| {
        let call = app.get(&format!("/v1/forward-auth{query}"));
        let call = call.header("X-Service-Token", &gateway);
        call.header("X-API-Key", key).send().await
    };
    // A request that costs more than the whole quota is never admitted, and consumes nothing.
    let never = check(&first, 21).await;
    assert_eq!(never.body["allowed"], false, "{}", never.text);
    assert_eq!(never.body["retry_after"], Value::Null);

    let answer = app.echo(&first).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let policies = answer.header("ratelimit-policy").expect("policies");
    assert!(
        policies.ends_with(", \"tenant_monthly\";q=20"),
        "{policies}"
    );
    for _ in 0..9 {
        assert_eq!(forward(&second, "").await.status, 200);
    }
    let checked = check(&second, 5).await;
    assert_eq!(checked.body["allowed"], true, "{}", checked.text);
    let state = checked.body["limits"]
        .as_array()
        .expect("limits")
        .last()
        .cloned();
    let state = state.expect("a limit");
    assert_eq!(
        (&state["policy"], &state["remaining"]),
        (&json!("tenant_monthly"), &json!(5))
    );
    // The cost is more than what is left, but not more than the quota.
    assert_eq!(check(&first, 6).await.body["allowed"], false);
    for _ in 0..5 {
        assert_eq!(app.echo(&first).await.status, 200);
    }

    let before = app.echo(&first).await;
    assert_eq!(before.status, 429, "{}", before.text);
    assert_eq!(before.body["violated-policies"], json!(["tenant_monthly"]));
    let nearest = before.header("ratelimit").expect("the nearest policy");
    assert!(
        nearest.starts_with("\"tenant_monthly\";r=0;t="),
        "{nearest}"
    );
    assert!((1..=31 * 86_400).contains(&before.number("retry-after")));
    for query in ["", "?deny=429"] {
        let denied = forward(&second, query).await;
        assert_eq!(
            (denied.status, denied.header("x-quota-decision")),
            (429, Some("limited"))
        );
    }
    assert_eq!(forward(&second, "?deny=403").await.status, 403);
    let denied = check(&second, 1).await;
    assert_eq!(denied.body["code"], "quota_exceeded");
    assert!(denied.body["retry_after"].is_u64(), "{}", denied.text);
    // Denied requests took nothing from the key's bucket.
    let after = app.echo(&first).await;
    assert_eq!(
        after.header("x-ratelimit-remaining"),
        before.header("x-ratelimit-remaining")
    );
    let shown = limits(&app, &account).await;
    assert_eq!(shown["requests"]["maximum"], 20);

    // The other tenant has its own quota.
    let plan_id = app.plan(&other, plan(1000)).await;
    let key = app.key(&other, &plan_id).await.text;
    assert_eq!(app.echo(&key).await.status, 200);
    app.ship_usage().await;
    assert_eq!(limits(&app, &account).await["requests"]["used"], 20);
    assert_eq!(limits(&app, &other).await["requests"]["used"], 1);
}

/// A request that the key's rate limit denies does not count toward the tenant's monthly quota.
#[tokio::test(flavor = "multi_thread")]
async fn request_denied_by_the_key_is_not_counted() {
    let app = TestApp::setup()
        .flag("--free-requests-per-month=30")
        .start()
        .await;
    let account = app.register().await;
    let plan_id = app.plan(&account, plan(1)).await;
    let key = app.key(&account, &plan_id).await.text;
    assert_eq!(app.echo(&key).await.status, 200);
    for _ in 0..50 {
        let denied = app.echo(&key).await;
        assert_eq!(denied.status, 429);
        assert_eq!(denied.body["violated-policies"], json!(["rpm"]));
    }
    let wide = app.plan(&account, plan(1000)).await;
    let key = app.key(&account, &wide).await.text;
    let mut admitted = 0;
    while app.echo(&key).await.status == 200 {
        admitted += 1;
        assert!(admitted <= 30);
    }
    assert_eq!(admitted, 29);
}

/// Sends requests with all keys to all replicas at the same time. Returns how many were admitted.
async fn spend(replicas: &[&TestApp], keys: &[String], requests: usize) -> u64 {
    let calls = (0..requests).map(|n| {
        let (app, key) = (
            replicas[n % replicas.len()],
            &keys[n / replicas.len() % keys.len()],
        );
        async move {
            let answer = retry_if_late(TOKENS_WITHIN, || app.echo(key)).await;
            match answer.status {
                200 => 1,
                429 => {
                    assert_eq!(answer.body["violated-policies"], json!(["tenant_monthly"]));
                    0
                }
                status => panic!("{status}: {}", answer.text),
            }
        }
    });
    stream::iter(calls)
        .buffer_unordered(16)
        .fold(0, async |sum, one| sum + one)
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_serve_exactly_the_month_of_a_tenant() {
    const LIMIT: u64 = 1000;
    let redis = RedisServer::start().await;
    let start = async |setup: crate::support::app::Setup| {
        let setup = setup.flag(format!("--redis-url={}", redis.url()));
        let setup = setup.flag("--redis-timeout=5s");
        setup
            .flag("--redis-connect-timeout=5s")
            .flag(format!("--free-requests-per-month={LIMIT}"))
            .start()
            .await
    };
    let first = start(TestApp::setup()).await;
    let second = start(TestApp::setup().database(first.database.clone())).await;
    let account = first.register().await;
    let plan_id = first.plan(&account, plan(100_000)).await;
    let mut keys = Vec::new();
    for _ in 0..5 {
        keys.push(first.key(&account, &plan_id).await.text);
    }
    let replicas = [&first, &second];
    let mut served = spend(&replicas, &keys, 1300).await;
    assert!(served <= LIMIT, "{served}");
    assert!(served >= LIMIT * 99 / 100, "{served}");
    // A replica may still hold the last tokens, so send further requests until these tokens are spent.
    let began = Instant::now();
    while served < LIMIT {
        assert!(began.elapsed() < AT_MOST, "{served}");
        sleep(Duration::from_millis(200)).await;
        served += spend(&replicas, &keys, 20).await;
    }
    assert_eq!(spend(&replicas, &keys, 100).await, 0);
    assert_eq!(served, LIMIT);
    let client = first.database.connect().await;
    let used = client
        .query_one("SELECT used FROM tenant_quota_usage", &[])
        .await;
    let used: i64 = used.expect("one row").get(0);
    assert_eq!(u64::try_from(used), Ok(LIMIT));
}

#[tokio::test(flavor = "multi_thread")]
async fn clean_stop_returns_the_tokens_of_a_tenant() {
    const LIMIT: u64 = 1000;
    let flag = format!("--free-requests-per-month={LIMIT}");
    let first = TestApp::setup().flag(&flag).start().await;
    let account = first.register().await;
    let plan_id = first.plan(&account, plan(100_000)).await;
    let keys = [first.key(&account, &plan_id).await.text];
    assert_eq!(spend(&[&first], &keys, 101).await, 101);
    let database = first.database.clone();
    first.stop().await;
    let second = TestApp::setup()
        .flag(&flag)
        .database(database)
        .start()
        .await;
    assert_eq!(spend(&[&second], &keys, 950).await, LIMIT - 101);
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriber_is_exempt_from_the_monthly_limit() {
    let stripe = TestStripe::start().await;
    let setup = stripe.configure(TestApp::setup());
    let app = setup.flag("--free-requests-per-month=10").start().await;
    stripe.send_to(&app);
    let account = app.register().await;
    let plan_id = app.plan(&account, plan(100_000)).await;
    let key = app.key(&account, &plan_id).await.text;
    assert_eq!(spend(&[&app], std::slice::from_ref(&key), 15).await, 10);

    let subscription = stripe.subscribe(&app, &account).await;
    wait_for_access(&app, &account, "active").await;
    let took = wait_for_status(&app, &key, 200).await;
    println!("200 after {took:?}");
    let answer = app.echo(&key).await;
    let policies = answer.header("ratelimit-policy").expect("policies");
    assert!(!policies.contains("tenant_monthly"), "{policies}");
    assert_eq!(spend(&[&app], std::slice::from_ref(&key), 50).await, 50);
    assert_eq!(
        limits(&app, &account).await["requests"]["maximum"],
        Value::Null
    );

    let path = format!("subscriptions/{subscription}");
    stripe
        .fake
        .request(&Method::DELETE, &path, "")
        .expect("canceled");
    stripe.deliver_all().await;
    wait_for_access(&app, &account, "canceled").await;
    wait_for_status(&app, &key, 429).await;
}
