//! `/admin/plans`.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::app::{Account, Answer, TestApp};

async fn send(app: &TestApp, account: &Account, method: &str, path: &str, body: Value) -> Answer {
    let call = app
        .request(method.parse::<Method>().unwrap(), path)
        .bearer(&account.access_token);
    if body.is_null() {
        call.send().await
    } else {
        call.json(body).send().await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plan_is_created_read_updated_and_deleted() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let made = send(
        &app,
        &account,
        "POST",
        "/admin/plans",
        json!({"name": "Starter", "default_rpm": 600}),
    )
    .await;
    assert_eq!(made.status, 201);
    assert_eq!(
        (&made.body["burst"], &made.body["key_count"]),
        (&json!(600), &json!(0)),
        "burst defaults to the rate"
    );
    let path = format!("/admin/plans/{}", made.text("id"));
    assert_eq!(
        send(&app, &account, "GET", &path, Value::Null).await.body,
        made.body
    );

    let faster = send(&app, &account, "PATCH", &path, json!({"default_rpm": 1200})).await;
    assert_eq!(faster.body["burst"], json!(1200), "burst follows the rate");
    let back = send(&app, &account, "PATCH", &path, json!({"default_rpm": 600})).await;
    assert_eq!(back.body["burst"], json!(600));

    let changed = send(
        &app,
        &account,
        "PATCH",
        &path,
        json!({"burst": 10, "daily_quota": 100}),
    )
    .await;
    assert_eq!(
        (&changed.body["burst"], &changed.body["daily_quota"]),
        (&json!(10), &json!(100))
    );
    assert_eq!(
        changed.body["default_rpm"],
        json!(600),
        "absent fields are unchanged"
    );
    let lifted = send(&app, &account, "PATCH", &path, json!({"daily_quota": null})).await;
    assert_eq!(
        (&lifted.body["burst"], &lifted.body["daily_quota"]),
        (&json!(10), &Value::Null)
    );
    assert_eq!(
        send(&app, &account, "PATCH", &path, json!({})).await.body,
        lifted.body
    );

    assert_eq!(
        send(&app, &account, "DELETE", &path, Value::Null)
            .await
            .status,
        204
    );
    assert_eq!(
        send(&app, &account, "GET", &path, Value::Null).await.status,
        404
    );
    assert_eq!(
        send(&app, &account, "DELETE", &path, Value::Null)
            .await
            .status,
        404
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn plan_with_keys_cannot_be_deleted() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let keys = [
        app.key(&account, &plan).await,
        app.key(&account, &plan).await,
    ];
    let path = format!("/admin/plans/{plan}");
    assert_eq!(
        send(&app, &account, "GET", &path, Value::Null).await.body["key_count"],
        json!(2)
    );

    let refused = send(&app, &account, "DELETE", &path, Value::Null).await;
    assert_eq!((refused.status, refused.problem()), (409, "plan-in-use"));
    assert!(
        refused.text("detail").contains("2 keys"),
        "{}",
        refused.body
    );
    assert_eq!(app.echo(&keys[0].text).await.status, 200);

    for key in keys {
        let path = format!("/admin/api-keys/{}", key.id);
        assert_eq!(
            send(&app, &account, "DELETE", &path, Value::Null)
                .await
                .status,
            204
        );
    }
    assert_eq!(
        send(&app, &account, "DELETE", &path, Value::Null)
            .await
            .status,
        204
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn plan_names_are_unique_within_a_tenant() {
    let app = TestApp::start().await;
    let (ours, theirs) = (app.register().await, app.register().await);
    let body = json!({"name": "Starter", "default_rpm": 1});
    assert_eq!(
        send(&app, &ours, "POST", "/admin/plans", body.clone())
            .await
            .status,
        201
    );
    let taken = send(&app, &ours, "POST", "/admin/plans", body.clone()).await;
    assert_eq!((taken.status, taken.problem()), (409, "name-taken"));
    assert_eq!(
        send(&app, &theirs, "POST", "/admin/plans", body)
            .await
            .status,
        201
    );
}

/// The number of requests in 31 days at one request per minute.
const MONTH: u32 = 31 * 24 * 60;

#[tokio::test(flavor = "multi_thread")]
async fn burst_that_takes_more_than_a_month_to_refill_is_rejected() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = |rpm: u32, burst: u32| json!({"name": "P", "default_rpm": rpm, "burst": burst});
    let assert_rejected = |answer: &Answer, field: &str, number: &str| {
        assert_eq!(answer.status, 422, "{}", answer.text);
        assert_eq!(answer.body["errors"][0]["field"], field, "{}", answer.text);
        assert!(answer.text.contains(number), "{}", answer.text);
    };
    let refused = send(&app, &account, "POST", "/admin/plans", plan(1, MONTH + 1)).await;
    assert_rejected(&refused, "burst", "44,640");
    let refused = send(&app, &account, "POST", "/admin/plans", plan(2, 60_000_000)).await;
    assert_rejected(&refused, "burst", "89,280");
    let made = send(&app, &account, "POST", "/admin/plans", plan(1, MONTH)).await;
    assert_eq!(made.status, 201, "{}", made.text);

    let path = format!("/admin/plans/{}", made.text("id"));
    let edit = async |body| send(&app, &account, "PATCH", &path, body).await;
    assert_rejected(&edit(json!({"burst": MONTH + 1})).await, "burst", "44,640");
    let raised = edit(json!({"default_rpm": 60, "burst": 60 * MONTH})).await;
    assert_eq!(raised.status, 200, "{}", raised.text);
    let slower = edit(json!({"default_rpm": 59})).await;
    assert_rejected(&slower, "default_rpm", "at least 60");
    // A key with its own rate has the plan's burst.
    let key = |rpm: u32| json!({"name": "K", "plan_id": made.text("id"), "rpm_override": rpm});
    let refused = send(&app, &account, "POST", "/admin/api-keys", key(59)).await;
    assert_rejected(&refused, "rpm_override", "at least 60");
    let created = send(&app, &account, "POST", "/admin/api-keys", key(60)).await;
    assert_eq!(created.status, 201, "{}", created.text);
    let id = created.body["api_key"]["id"].as_str().expect("an ID");
    let key_path = format!("/admin/api-keys/{id}");
    let slower = json!({"rpm_override": 59});
    let slower = send(&app, &account, "PATCH", &key_path, slower).await;
    assert_rejected(&slower, "rpm_override", "at least 60");
    let faster = edit(json!({"default_rpm": 120, "burst": 120 * MONTH})).await;
    assert_rejected(&faster, "burst", "a key on this plan");

    // A plan that is older than the limit on the refill time keeps working, and its other settings can be changed.
    let client = app.database.connect().await;
    let old = "UPDATE plans SET default_rpm = 1, burst = 60000000";
    client.execute(old, &[]).await.expect("valid SQL");
    let renamed = edit(json!({"name": "Renamed", "daily_quota": 7})).await;
    assert_eq!(renamed.status, 200, "{}", renamed.text);
    assert_eq!(renamed.body["burst"], 60_000_000);
    let lowered = edit(json!({"burst": MONTH})).await;
    assert_eq!(lowered.status, 200, "{}", lowered.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_fields_are_named_and_no_plan_is_created() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let body = json!({"name": "", "default_rpm": 0, "burst": 60_000_001, "daily_quota": 0});
    let refused = send(&app, &account, "POST", "/admin/plans", body).await;
    assert_eq!(refused.status, 422);
    let fields = refused.body["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["field"].as_str().unwrap());
    let fields = fields.collect::<std::collections::BTreeSet<_>>();
    assert_eq!(
        fields,
        ["burst", "daily_quota", "default_rpm", "name"].into()
    );

    for (body, field) in [
        (json!({"default_rpm": 1}), "name"),
        (json!({"name": "x", "default_rpm": "1"}), "default_rpm"),
        (
            json!({"name": "x", "default_rpm": 1, "tenant_id": account.tenant_id}),
            "tenant_id",
        ),
        (
            json!({"name": "x", "default_rpm": 1, "billing": "gold"}),
            "billing",
        ),
        (json!({"name": "a\u{0}b", "default_rpm": 1}), "name"),
        (json!({"name": "x".repeat(201), "default_rpm": 1}), "name"),
        (
            json!({"name": "x", "default_rpm": 1, "monthly_quota": 1_000_000_000_000_000_u64}),
            "monthly_quota",
        ),
    ] {
        let refused = send(&app, &account, "POST", "/admin/plans", body.clone()).await;
        assert_eq!(
            (refused.status, &refused.body["errors"][0]["field"]),
            (422, &json!(field)),
            "{body}"
        );
    }
    assert_eq!(
        send(&app, &account, "GET", "/admin/plans", Value::Null)
            .await
            .body["total"],
        json!(0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn name_of_up_to_200_characters_round_trips() {
    let app = TestApp::start().await;
    let account = app.register().await;
    for name in [
        "<script>alert(1)</script>",
        "\u{202e}שלום עולם",
        "🦀 and ☕",
        "O'Brien; DROP TABLE plans --",
        &"ß".repeat(200),
    ] {
        let made = send(
            &app,
            &account,
            "POST",
            "/admin/plans",
            json!({"name": name, "default_rpm": 1}),
        )
        .await;
        assert_eq!((made.status, &made.body["name"]), (201, &json!(name)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_show_every_plan_once_while_others_are_created() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let mut made = Vec::new();
    for _ in 0..45 {
        made.push(app.plan(&account, json!({})).await);
    }
    made.reverse();
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = send(
            &app,
            &account,
            "GET",
            &format!("/admin/plans?limit=20{cursor}"),
            Value::Null,
        )
        .await;
        assert_eq!(page.status, 200);
        seen.extend(
            page.body["items"]
                .as_array()
                .unwrap()
                .iter()
                .map(|it| it["id"].as_str().unwrap().to_owned()),
        );
        assert!(page.body["total"].as_u64().unwrap() >= 45);
        app.plan(&account, json!({})).await;
        match page.body["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen, made);

    for (query, status) in [
        ("limit=0", 422),
        ("limit=101", 422),
        ("limit=x", 422),
        ("cursor=x", 400),
        ("cursor=AAAA", 400),
    ] {
        let refused = send(
            &app,
            &account,
            "GET",
            &format!("/admin/plans?{query}"),
            Value::Null,
        )
        .await;
        assert_eq!(refused.status, status, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_plan_is_created_without_a_valid_token() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let body = json!({"name": "Starter", "default_rpm": 1});
    let missing = app.post("/admin/plans", body.clone()).send().await;
    assert_eq!(
        (missing.status, missing.header("www-authenticate")),
        (401, Some("Bearer realm=\"quota\""))
    );
    let forged = format!("{}x", account.access_token);
    for wrong in ["x", &forged, &account.refresh_token] {
        let refused = app
            .post("/admin/plans", body.clone())
            .bearer(wrong)
            .send()
            .await;
        assert_eq!(refused.status, 401);
        assert_eq!(
            refused.header("www-authenticate"),
            Some("Bearer realm=\"quota\", error=\"invalid_token\"")
        );
    }
    let basic = app
        .post("/admin/plans", body)
        .header("authorization", "Basic eDp5")
        .send()
        .await;
    assert_eq!(basic.status, 401);
    assert_eq!(
        send(&app, &account, "GET", "/admin/plans", Value::Null)
            .await
            .body["total"],
        json!(0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_request_with_an_idempotency_key_is_processed_once() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let make = async |key: &str, name: &str| {
        let call = app.post("/admin/plans", json!({"name": name, "default_rpm": 1}));
        call.header("Idempotency-Key", key)
            .bearer(&account.access_token)
            .send()
            .await
    };
    let first = make("one", "Starter").await;
    assert_eq!(first.status, 201);
    let again = make("one", "Starter").await;
    assert_eq!((again.status, &again.body), (201, &first.body));
    let other = make("one", "Other").await;
    assert_eq!(
        (other.status, other.problem()),
        (422, "idempotency-mismatch")
    );
    let mut answers = Vec::new();
    for answer in futures_util::future::join_all((0..6).map(|_| make("two", "Second"))).await {
        assert!(matches!(answer.status, 201 | 409), "{}", answer.status);
        if answer.status == 201 {
            answers.push(answer.text("id"));
        }
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "every response contains the same plan");
    assert_eq!(make("", "x").await.status, 422);
    assert_eq!(make(&"x".repeat(256), "x").await.status, 422);
    assert_eq!(
        send(&app, &account, "GET", "/admin/plans", Value::Null)
            .await
            .body["total"],
        json!(2)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn patch_of_a_plan_clears_null_fields_and_keeps_absent_ones() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let body = json!({
        "name": "Starter", "default_rpm": 60, "burst": 5, "daily_quota": 10, "monthly_quota": 100,
        "strict": true, "on_redis_failure": "closed", "billing": "free",
    });
    let made = app.act(&account, "POST", "/admin/plans", body).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let path = format!("/admin/plans/{}", made.text("id"));
    let with = |changes: Value| {
        let mut plan = made.body.clone();
        for (field, value) in changes.as_object().unwrap() {
            plan[field] = value.clone();
        }
        plan["updated_at"] = Value::Null;
        plan
    };
    for (change, expected) in [
        (json!({"daily_quota": null}), json!({"daily_quota": null})),
        (
            json!({"name": " Renamed "}),
            json!({"daily_quota": null, "name": "Renamed"}),
        ),
        (
            json!({"monthly_quota": null, "daily_quota": 11, "name": "Starter"}),
            json!({"monthly_quota": null, "daily_quota": 11}),
        ),
        (
            json!({"strict": false, "monthly_quota": 100, "daily_quota": 10}),
            json!({"strict": false}),
        ),
        (
            json!({"on_redis_failure": "open"}),
            json!({"strict": false, "on_redis_failure": "open"}),
        ),
        (
            json!({"on_redis_failure": null}),
            json!({"strict": false, "on_redis_failure": null}),
        ),
    ] {
        let changed = app.act(&account, "PATCH", &path, change.clone()).await;
        assert_eq!(changed.status, 200, "{}", changed.body);
        let shown = app.act(&account, "GET", &path, Value::Null).await;
        assert_eq!(shown.body, changed.body);
        let mut shown = shown.body;
        shown["updated_at"] = Value::Null;
        assert_eq!(shown, with(expected), "{change}");
    }
    for field in ["name", "default_rpm", "burst", "strict", "billing"] {
        let refused = app
            .act(&account, "PATCH", &path, json!({ field: null }))
            .await;
        assert_eq!(
            (refused.status, &refused.body["errors"][0]["field"]),
            (422, &json!(field))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plan_cannot_be_renamed_to_a_name_in_use() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let one = app.plan(&account, json!({"name": "One"})).await;
    let two = app.plan(&account, json!({"name": "Two"})).await;
    let path = format!("/admin/plans/{two}");
    let before = app.act(&account, "GET", &path, Value::Null).await.body;
    for name in ["One", " One  "] {
        let body = json!({"name": name, "default_rpm": 7, "daily_quota": 7});
        let taken = app.act(&account, "PATCH", &path, body).await;
        assert_eq!((taken.status, taken.problem()), (409, "name-taken"));
    }
    let after = app.act(&account, "GET", &path, Value::Null).await.body;
    assert_eq!(after, before, "a rejected change changes nothing");
    let same = app
        .act(&account, "PATCH", &path, json!({"name": "Two"}))
        .await;
    assert_eq!(same.status, 200, "a plan can keep its own name");

    let path = format!("/admin/plans/{one}");
    assert_eq!(
        app.act(&account, "DELETE", &path, Value::Null).await.status,
        204
    );
    let body = json!({"name": "One", "default_rpm": 1});
    let made = app.act(&account, "POST", "/admin/plans", body).await;
    assert_eq!(made.status, 201, "the name of a deleted plan can be reused");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_creations_with_one_name_create_one_plan() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let make = async || {
        let body = json!({"name": "Starter", "default_rpm": 1});
        app.act(&account, "POST", "/admin/plans", body).await.status
    };
    let mut statuses = futures_util::future::join_all((0..6).map(|_| make())).await;
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 409, 409, 409, 409, 409]);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_changes_never_leave_a_key_without_a_plan() {
    let app = TestApp::start().await;
    let account = app.register().await;
    for _ in 0..8 {
        let plan = app.plan(&account, json!({})).await;
        let path = format!("/admin/plans/{plan}");
        let body = json!({"name": "Key", "plan_id": plan});
        let (made, deleted) = futures_util::future::join(
            app.act(&account, "POST", "/admin/api-keys", body),
            app.act(&account, "DELETE", &path, Value::Null),
        )
        .await;
        match (made.status, deleted.status) {
            (201, 409) => assert_eq!(app.echo(&made.text("key")).await.status, 200),
            (404, 204) => assert_eq!(made.body["errors"][0]["field"], json!("plan_id")),
            both => panic!("{both:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rejected_request_does_not_consume_its_idempotency_key() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let taken = app.plan(&account, json!({"name": "Starter"})).await;
    let make = async || {
        app.post("/admin/plans", json!({"name": "Starter", "default_rpm": 1}))
            .header("Idempotency-Key", "one")
            .bearer(&account.access_token)
            .send()
            .await
    };
    assert_eq!(make().await.status, 409);
    let path = format!("/admin/plans/{taken}");
    let rename = json!({"name": "Other"});
    assert_eq!(app.act(&account, "PATCH", &path, rename).await.status, 200);
    let made = make().await;
    assert_eq!(made.status, 201, "the same request now succeeds");
    assert_eq!(make().await.body, made.body);

    // Idempotency keys are scoped to the operation.
    let plan = made.text("id");
    let key = app
        .post("/admin/api-keys", json!({"name": "Key", "plan_id": plan}))
        .header("Idempotency-Key", "one")
        .bearer(&account.access_token)
        .send()
        .await;
    assert_eq!((key.status, key.body["key"].is_string()), (201, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn idempotency_key_expires_after_a_day() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let make = async |name: &str| {
        app.post("/admin/plans", json!({"name": name, "default_rpm": 1}))
            .header("Idempotency-Key", "one")
            .bearer(&account.access_token)
            .send()
            .await
    };
    let first = make("First").await;
    let client = app.database.connect().await;
    let age = async |interval: &str| {
        let sql = format!("UPDATE idempotency_keys SET created_at = now() - interval '{interval}'");
        assert_eq!(client.execute(&sql, &[]).await.unwrap(), 1);
    };
    age("23 h 59 min").await;
    assert_eq!(make("First").await.body, first.body);
    age("24 h 1 min").await;
    let second = make("Second").await;
    assert_eq!(second.status, 201);
    assert_eq!(make("Second").await.body, second.body);
    assert_eq!(make("First").await.status, 422);
}

#[tokio::test(flavor = "multi_thread")]
async fn answered_request_is_never_reported_as_in_progress() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let make = async || {
        app.post("/admin/plans", json!({"name": "Starter", "default_rpm": 1}))
            .header("Idempotency-Key", "one")
            .bearer(&account.access_token)
            .send()
            .await
    };
    let first = make().await;
    assert_eq!(first.status, 201);
    for _ in 0..20 {
        for again in futures_util::future::join_all((0..4).map(|_| make())).await {
            assert_eq!((again.status, &again.body), (201, &first.body));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_are_listed_in_every_sort_order() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let made = ["beta", "Gold", "Alpha", "gold 2", "omega"];
    for name in made {
        let body = json!({"name": name, "default_rpm": 60});
        let made = send(&app, &account, "POST", "/admin/plans", body).await;
        assert_eq!(made.status, 201);
    }
    let by_name = ["Alpha", "beta", "Gold", "gold 2", "omega"];
    let turned = |names: [&'static str; 5]| names.into_iter().rev().collect::<Vec<_>>();
    for (sort, names) in [
        ("created_at", made.to_vec()),
        ("-created_at", turned(made)),
        ("name", by_name.to_vec()),
        ("-name", turned(by_name)),
    ] {
        let (mut found, mut cursor) = (Vec::new(), String::new());
        loop {
            let path = format!("/admin/plans?limit=2&sort={sort}{cursor}");
            let page = send(&app, &account, "GET", &path, Value::Null).await;
            for plan in page.body["items"].as_array().unwrap() {
                found.push(plan["name"].as_str().unwrap().to_owned());
            }
            match page.body["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        assert_eq!(found, names, "{sort}");
    }
    let refused = send(
        &app,
        &account,
        "GET",
        "/admin/plans?sort=last_used_at",
        Value::Null,
    )
    .await;
    assert_eq!(refused.status, 422);
    assert_eq!(refused.body["errors"][0]["field"], json!("sort"));
}
