//! `/admin/service-tokens`.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::support::app::{Account, Answer, TestApp};

const PATH: &str = "/admin/service-tokens";

async fn make(app: &TestApp, account: &Account, name: &str) -> (String, String) {
    let made = app.act(account, "POST", PATH, json!({"name": name})).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let id = made.body["service_token"]["id"].as_str().unwrap();
    (made.text("token"), id.to_owned())
}

/// Returns the status that a gateway with the given token gets.
async fn ask(app: &TestApp, token: &str) -> u16 {
    app.post("/v1/check", json!({"key": "x"}))
        .bearer(token)
        .send()
        .await
        .status
}

fn fields(answer: &Answer) -> BTreeSet<&str> {
    let errors = answer.body["errors"].as_array().unwrap().iter();
    errors.map(|it| it["field"].as_str().unwrap()).collect()
}

async fn count(app: &TestApp) -> i64 {
    let client = app.database.connect().await;
    let row = client.query_one("SELECT count(*) FROM service_tokens", &[]);
    row.await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn service_token_stops_working_when_it_is_deleted() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let (token, id) = make(&app, &account, "Edge").await;
    let (other, _) = make(&app, &account, "Other").await;
    let path = format!("{PATH}/{id}");
    assert_eq!(ask(&app, &token).await, 200);
    let shown = app.act(&account, "GET", &path, Value::Null).await;
    assert_eq!(
        (&shown.body["name"], &shown.body["prefix"]),
        (&json!("Edge"), &json!(token[..11]))
    );

    assert_eq!(
        app.act(&account, "DELETE", &path, Value::Null).await.status,
        204
    );
    assert_eq!(ask(&app, &token).await, 401);
    let as_field = app
        .get("/v1/forward-auth")
        .header("X-Service-Token", &token)
        .send()
        .await;
    assert_eq!(
        (as_field.status, as_field.header("www-authenticate")),
        (401, Some("Bearer realm=\"quota\", error=\"invalid_token\""))
    );
    assert_eq!(ask(&app, &other).await, 200, "another token still works");
    for method in ["GET", "DELETE"] {
        assert_eq!(
            app.act(&account, method, &path, Value::Null).await.status,
            404
        );
    }
    assert_eq!(count(&app).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_replica_rejects_a_deleted_service_token_within_ten_polls() {
    let one = TestApp::start().await;
    let other = TestApp::setup()
        .database(one.database.clone())
        .start()
        .await;
    let account = one.register().await;
    let (token, id) = make(&one, &account, "Edge").await;
    assert_eq!(ask(&other, &token).await, 200);
    let path = format!("{PATH}/{id}");
    assert_eq!(
        one.act(&account, "DELETE", &path, Value::Null).await.status,
        204
    );
    other
        .notices("the deletion", async || ask(&other, &token).await == 401)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn service_token_is_returned_once_and_never_stored() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let create = async |name: &str| {
        app.post(PATH, json!({"name": name}))
            .header("Idempotency-Key", "gateway of the north")
            .bearer(&account.access_token)
            .send()
            .await
    };
    let first = create("North").await;
    let token = first.text("token");
    assert_eq!((first.status, token.len()), (201, 41));

    let again = create("North").await;
    assert_eq!(
        (again.status, &again.body),
        (201, &json!({"service_token": first.body["service_token"]}))
    );
    let mismatch = create("South").await;
    assert_eq!(
        (mismatch.status, mismatch.problem()),
        (422, "idempotency-mismatch")
    );
    assert_eq!(count(&app).await, 1, "only one token was created");

    let id = first.body["service_token"]["id"].as_str().unwrap();
    let mut shown = app.everything_kept().await;
    for path in [PATH, &format!("{PATH}/{id}"), "/admin/audit"] {
        shown += &app.act(&account, "GET", path, Value::Null).await.text;
    }
    assert!(shown.contains(&token[..11]), "the prefix is shown");
    assert!(
        !shown.contains(&token[11..]),
        "the secret is shown or stored"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_fields_are_named_and_no_service_token_is_created() {
    let app = TestApp::start().await;
    let account = app.register().await;
    for (body, field) in [
        (json!({}), "name"),
        (json!({"name": ""}), "name"),
        (json!({"name": "  "}), "name"),
        (json!({"name": "a\u{0}b"}), "name"),
        (json!({"name": "é".repeat(201)}), "name"),
        (json!({"name": 7}), "name"),
        (json!({"name": "x", "token": "qs_mine"}), "token"),
    ] {
        let refused = app.act(&account, "POST", PATH, body.clone()).await;
        assert_eq!(
            (refused.status, fields(&refused)),
            (422, [field].into()),
            "{body}"
        );
    }
    let anonymous = app.post(PATH, json!({"name": "x"})).send().await;
    assert_eq!(anonymous.status, 401);
    assert_eq!(count(&app).await, 0);

    for name in [
        "<img src=x onerror=alert(1)>",
        "\u{202e}שער",
        "🚪",
        &"é".repeat(200),
    ] {
        let (_, id) = make(&app, &account, name).await;
        let path = format!("{PATH}/{id}");
        let shown = app.act(&account, "GET", &path, Value::Null).await;
        assert_eq!(shown.body["name"], json!(name));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn viewer_cannot_create_or_delete_a_service_token() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let (token, id) = make(&app, &account, "Edge").await;
    let client = app.database.connect().await;
    client
        .execute("UPDATE memberships SET role = 'viewer'", &[])
        .await
        .unwrap();
    let login = json!({"email": account.email, "password": crate::support::app::PASSWORD});
    let viewer = Account {
        access_token: app
            .post("/auth/login", login)
            .send()
            .await
            .text("access_token"),
        ..account
    };
    let path = format!("{PATH}/{id}");
    let made = app.act(&viewer, "POST", PATH, json!({"name": "x"})).await;
    assert_eq!((made.status, made.problem()), (403, "forbidden"));
    let deleted = app.act(&viewer, "DELETE", &path, Value::Null).await;
    assert_eq!(deleted.status, 403);
    assert_eq!(
        app.act(&viewer, "GET", &path, Value::Null).await.status,
        200
    );
    assert_eq!(ask(&app, &token).await, 200, "the token still exists");
    assert_eq!(count(&app).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_show_every_service_token_once_while_others_come_and_go() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let mut made = Vec::new();
    for n in 0..45 {
        made.push(make(&app, &account, &format!("Gateway {n}")).await.1);
    }
    made.reverse();
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let path = format!("{PATH}?limit=20{cursor}");
        let page = app.act(&account, "GET", &path, Value::Null).await;
        let items = page.body["items"].as_array().unwrap();
        seen.extend(items.iter().map(|it| it["id"].as_str().unwrap().to_owned()));
        make(&app, &account, "New").await;
        // The token at the cursor is deleted; the next page still begins after it.
        let last = format!("{PATH}/{}", seen.last().unwrap());
        assert_eq!(
            app.act(&account, "DELETE", &last, Value::Null).await.status,
            204
        );
        match page.body["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen, made);
    for (query, status) in [
        ("limit=0", 422),
        ("limit=101", 422),
        ("cursor=", 400),
        ("cursor=nonsense", 400),
    ] {
        let path = format!("{PATH}?{query}");
        let refused = app.act(&account, "GET", &path, Value::Null).await;
        assert_eq!(refused.status, status, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn last_used_at_of_a_service_token_is_updated_soon_after_a_check() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let (token, id) = make(&app, &account, "Edge").await;
    let path = format!("{PATH}/{id}");
    let before = app.act(&account, "GET", &path, Value::Null).await;
    assert_eq!(before.body["last_used_at"], Value::Null);
    assert_eq!(ask(&app, &token).await, 200);
    let began = Instant::now();
    while app.act(&account, "GET", &path, Value::Null).await.body["last_used_at"].is_null() {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "last use is unchanged"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
