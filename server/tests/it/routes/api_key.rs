//! `/admin/api-keys`.

use std::time::{Duration, Instant};

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
async fn the_text_of_a_key_is_shown_once_and_kept_nowhere() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({"daily_quota": 10})).await;
    let key = app.key(&account, &plan).await;
    assert_eq!(key.text.len(), 41);
    assert_eq!(app.echo(&key.text).await.status, 200);
    let rotated = send(
        &app,
        &account,
        "POST",
        &format!("/admin/api-keys/{}/rotate", key.id),
        json!({}),
    )
    .await;
    let token = app.service_token(&account).await;
    let texts = [
        key.text.clone(),
        rotated.text("key"),
        token,
        account.refresh_token.clone(),
        account.access_token.clone(),
    ];

    let mut shown = String::new();
    for path in [
        "/admin/api-keys",
        &format!("/admin/api-keys/{}", key.id),
        "/admin/service-tokens",
        "/admin/audit?limit=100",
    ] {
        shown += &send(&app, &account, "GET", path, Value::Null).await.text;
    }
    shown += &app.everything_kept().await;
    assert!(shown.contains(&key.text[..11]), "the prefix is shown");
    for text in texts {
        assert!(!shown.contains(&text[11..]), "a secret is shown or kept");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_needs_a_plan_of_the_tenants() {
    let app = TestApp::start().await;
    let (ours, theirs) = (app.register().await, app.register().await);
    let their_plan = app.plan(&theirs, json!({})).await;
    let body = |plan: &str| json!({"name": "Key", "plan_id": plan});
    let never = send(
        &app,
        &ours,
        "POST",
        "/admin/api-keys",
        body(&uuid::Uuid::now_v7().to_string()),
    )
    .await;
    assert_eq!((never.status, never.problem()), (404, "not-found"));
    assert_eq!(never.body["errors"][0]["field"], json!("plan_id"));
    let foreign = send(&app, &ours, "POST", "/admin/api-keys", body(&their_plan)).await;
    assert_eq!(foreign.status, 404);
    assert_eq!(foreign.body["errors"], never.body["errors"]);

    let plan = app.plan(&ours, json!({})).await;
    let key = app.key(&ours, &plan).await;
    let path = format!("/admin/api-keys/{}", key.id);
    assert_eq!(
        send(&app, &ours, "PATCH", &path, json!({"plan_id": their_plan}))
            .await
            .status,
        404
    );
    let malformed = send(&app, &ours, "POST", "/admin/api-keys", body("x")).await;
    assert_eq!(
        (malformed.status, &malformed.body["errors"][0]["field"]),
        (422, &json!("plan_id"))
    );
    let anonymous = app.post("/admin/api-keys", body(&plan)).send().await;
    assert_eq!(anonymous.status, 401);
    assert_eq!(
        send(&app, &ours, "GET", "/admin/api-keys", Value::Null)
            .await
            .body["total"],
        json!(1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_shows_what_the_filters_say() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let (one, two) = (
        app.plan(&account, json!({})).await,
        app.plan(&account, json!({})).await,
    );
    for (name, plan) in [
        ("Mobile 100%", &one),
        ("mobile_web", &one),
        ("Server", &two),
    ] {
        let made = send(
            &app,
            &account,
            "POST",
            "/admin/api-keys",
            json!({"name": name, "plan_id": plan}),
        )
        .await;
        assert_eq!(made.status, 201);
    }
    let list = send(&app, &account, "GET", "/admin/api-keys", Value::Null).await;
    let server = list.body["items"][0].clone();
    assert_eq!(server["name"], json!("Server"), "newest first");
    let path = format!("/admin/api-keys/{}", server["id"].as_str().unwrap());
    assert_eq!(
        send(&app, &account, "PATCH", &path, json!({"is_active": false}))
            .await
            .status,
        200
    );

    let prefix = server["prefix"].as_str().unwrap();
    for (query, names) in [
        (format!("plan_id={one}"), vec!["mobile_web", "Mobile 100%"]),
        ("is_active=false".into(), vec!["Server"]),
        ("is_active=true".into(), vec!["mobile_web", "Mobile 100%"]),
        ("search=MOBILE".into(), vec!["mobile_web", "Mobile 100%"]),
        ("search=%25".into(), vec!["Mobile 100%"]),
        ("search=_".into(), vec!["mobile_web"]),
        ("search=%5C".into(), vec![]),
        (format!("search={prefix}"), vec!["Server"]),
        (format!("plan_id={one}&search=web"), vec!["mobile_web"]),
        (format!("plan_id={}", uuid::Uuid::now_v7()), vec![]),
    ] {
        let list = send(
            &app,
            &account,
            "GET",
            &format!("/admin/api-keys?{query}"),
            Value::Null,
        )
        .await;
        let found = list.body["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| it["name"].as_str().unwrap());
        assert_eq!(found.collect::<Vec<_>>(), names, "{query}");
        assert_eq!(list.body["total"], json!(names.len()));
    }
    for query in ["plan_id=x", "is_active=maybe"] {
        let refused = send(
            &app,
            &account,
            "GET",
            &format!("/admin/api-keys?{query}"),
            Value::Null,
        )
        .await;
        assert_eq!(refused.status, 422, "{query}");
        assert_eq!(
            refused.body["errors"][0]["field"],
            json!(query.split('=').next().unwrap())
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn last_used_at_moves_soon_after_a_request() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let key = app.key(&account, &plan).await;
    let path = format!("/admin/api-keys/{}", key.id);
    let before = send(&app, &account, "GET", &path, Value::Null).await;
    assert_eq!(before.body["last_used_at"], Value::Null);
    app.echo(&key.text).await;
    let began = Instant::now();
    loop {
        let now = send(&app, &account, "GET", &path, Value::Null).await;
        if now.body["last_used_at"].is_string() {
            assert_eq!(
                now.body["updated_at"], before.body["updated_at"],
                "use is no edit"
            );
            break;
        }
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "it does not move"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_of_a_creation_answers_without_the_text() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let make = async || {
        let call = app.post("/admin/api-keys", json!({"name": "Key", "plan_id": plan}));
        call.header("Idempotency-Key", "a key")
            .bearer(&account.access_token)
            .send()
            .await
    };
    let (first, again) = (make().await, make().await);
    assert_eq!((first.status, again.status), (201, 201));
    assert!(first.body["key"].is_string());
    assert_eq!(again.body, json!({"api_key": first.body["api_key"]}));
    assert_eq!(
        send(&app, &account, "GET", "/admin/api-keys", Value::Null)
            .await
            .body["total"],
        json!(1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_rotated_without_a_body_and_not_into_the_past() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let key = app.key(&account, &plan).await;
    let path = format!("/admin/api-keys/{}/rotate", key.id);
    let rotated = send(&app, &account, "POST", &path, Value::Null).await;
    assert_eq!(rotated.status, 200);
    assert!(
        rotated.body["api_key"]["previous_expires_at"].is_string(),
        "the default is a day of grace"
    );
    assert_ne!(rotated.text("key"), key.text);
    assert_eq!(
        send(
            &app,
            &account,
            "POST",
            &path,
            json!({"grace_seconds": 2_592_001})
        )
        .await
        .status,
        422
    );

    let key_path = format!("/admin/api-keys/{}", key.id);
    let past = send(
        &app,
        &account,
        "PATCH",
        &key_path,
        json!({"expires_at": "2020-01-01T00:00:00Z"}),
    )
    .await;
    assert_eq!(
        (past.status, &past.body["errors"][0]["field"]),
        (422, &json!("expires_at"))
    );
}
