//! `/auth`.

use std::sync::Arc;

use quota_server::clock::{Clock as _, SystemClock, TestClock};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::app::{Account, Answer, PASSWORD, TestApp};

async fn send(app: &TestApp, token: &str, method: &str, path: &str, body: Value) -> Answer {
    let call = app
        .request(method.parse::<Method>().unwrap(), path)
        .bearer(token);
    if body.is_null() {
        call.send().await
    } else {
        call.json(body).send().await
    }
}

async fn me(app: &TestApp, token: &str) -> u16 {
    send(app, token, "GET", "/auth/me", Value::Null)
        .await
        .status
}

async fn login(app: &TestApp, email: &str, password: &str) -> Answer {
    app.post("/auth/login", json!({"email": email, "password": password}))
        .send()
        .await
}

async fn refresh(app: &TestApp, token: &str) -> Answer {
    app.post("/auth/refresh", json!({"refresh_token": token}))
        .send()
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_registers_is_signed_in_as_owner_of_a_tenant_of_their_own() {
    let app = TestApp::start().await;
    let body = json!({"email": "Ada@Example.com", "password": PASSWORD, "tenant_name": "Engines"});
    let made = app.post("/auth/register", body).send().await;
    assert_eq!(made.status, 201);
    assert_eq!(made.body["user"]["email"], json!("ada@example.com"));
    assert_eq!(
        (&made.body["tenant"]["name"], &made.body["tenant"]["role"]),
        (&json!("Engines"), &json!("owner"))
    );
    assert_eq!(made.body["expires_in"], json!(900));
    let me = send(
        &app,
        &made.text("access_token"),
        "GET",
        "/auth/me",
        Value::Null,
    )
    .await;
    assert_eq!(
        (&me.body["user"], &me.body["tenant"]),
        (&made.body["user"], &made.body["tenant"])
    );

    let again = app
        .post(
            "/auth/register",
            json!({"email": "ADA@example.com", "password": PASSWORD}),
        )
        .send()
        .await;
    assert_eq!((again.status, again.problem()), (409, "email-taken"));
    let signed_in = login(&app, " ada@EXAMPLE.com ", PASSWORD).await;
    assert_eq!(
        (signed_in.status, &signed_in.body["user"]),
        (200, &made.body["user"])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_is_easy_to_guess_is_refused_by_name() {
    let app = TestApp::start().await;
    for (email, password, field) in [
        ("ada@example.com", "short", "password"),
        ("ada@example.com", "passwordpassword", "password"),
        ("ada@example.com", "ada@example.com", "password"),
        ("ada@example.com", &"x".repeat(257), "password"),
        ("ada", PASSWORD, "email"),
        ("a b@example.com", PASSWORD, "email"),
        ("a@b@example.com", PASSWORD, "email"),
        ("ada\u{0}@example.com", PASSWORD, "email"),
    ] {
        let refused = app
            .post(
                "/auth/register",
                json!({"email": email, "password": password}),
            )
            .send()
            .await;
        assert_eq!(
            (refused.status, &refused.body["errors"][0]["field"]),
            (422, &json!(field)),
            "{email} {password}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_email_and_a_wrong_password_are_answered_alike() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let wrong = login(&app, &account.email, "violet-harbour-quilt-94").await;
    let unknown = login(&app, "nobody@example.com", PASSWORD).await;
    assert_eq!((wrong.status, wrong.problem()), (401, "wrong-credentials"));
    let without_id = |answer: &Answer| {
        let mut body = answer.body.clone();
        body["request_id"] = Value::Null;
        body
    };
    assert_eq!(
        (wrong.status, without_id(&wrong)),
        (unknown.status, without_id(&unknown))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_access_token_ends_after_fifteen_minutes() {
    let clock = TestClock::at(SystemClock::new().now());
    let app = TestApp::setup()
        .clock(Arc::new(clock.clone()))
        .start()
        .await;
    let account = app.register().await;
    clock.advance(std::time::Duration::from_secs(899));
    assert_eq!(me(&app, &account.access_token).await, 200);
    clock.advance(std::time::Duration::from_secs(1));
    assert_eq!(me(&app, &account.access_token).await, 401);
    let next = refresh(&app, &account.refresh_token).await;
    assert_eq!(me(&app, &next.text("access_token")).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_token_works_once_and_its_predecessor_gets_the_same_successor() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let second = refresh(&app, &account.refresh_token).await;
    assert_eq!(second.status, 200);
    assert_ne!(second.text("refresh_token"), account.refresh_token);
    // Two tabs, or an answer that was lost.
    let both = futures_util::future::join(
        refresh(&app, &account.refresh_token),
        refresh(&app, &account.refresh_token),
    );
    for answer in <[Answer; 2]>::from(both.await) {
        assert_eq!(
            (answer.status, answer.text("refresh_token")),
            (200, second.text("refresh_token"))
        );
    }
    let third = refresh(&app, &second.text("refresh_token")).await;
    assert_eq!(third.status, 200);

    // Not the predecessor any more: somebody has a copy, and the whole family ends.
    assert_eq!(refresh(&app, &account.refresh_token).await.status, 401);
    assert_eq!(
        refresh(&app, &third.text("refresh_token")).await.status,
        401
    );
    for token in [
        &account.access_token,
        &second.text("access_token"),
        &third.text("access_token"),
    ] {
        assert_eq!(me(&app, token).await, 401);
    }
    let signed_in = login(&app, &account.email, PASSWORD).await;
    let log = send(
        &app,
        &signed_in.text("access_token"),
        "GET",
        "/admin/audit",
        Value::Null,
    )
    .await;
    assert!(log.text.contains("session.reuse_detected"), "{}", log.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_predecessor_after_its_ten_seconds_ends_the_family() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let second = refresh(&app, &account.refresh_token).await;
    let client = app.database.connect().await;
    let moved = client.execute(
        "UPDATE refresh_tokens SET used_at = used_at - interval '11 s' WHERE used_at IS NOT NULL",
        &[],
    );
    assert_eq!(moved.await.unwrap(), 1);
    assert_eq!(refresh(&app, &account.refresh_token).await.status, 401);
    assert_eq!(
        refresh(&app, &second.text("refresh_token")).await.status,
        401
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_refresh_token_is_401_and_ends_nothing() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let made_up =
        quota_server::secret_text::SecretText::generate(quota_server::secret_text::Kind::Refresh)
            .unwrap();
    for wrong in ["x", &account.access_token[..200], &made_up.reveal()] {
        assert_eq!(refresh(&app, wrong).await.status, 401);
    }
    assert_eq!(me(&app, &account.access_token).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn signing_out_ends_access_at_once() {
    let app = TestApp::start().await;
    let account = app.register().await;
    assert_eq!(me(&app, &account.access_token).await, 200);
    let out = async || {
        app.post(
            "/auth/logout",
            json!({"refresh_token": account.refresh_token}),
        )
        .send()
        .await
        .status
    };
    assert_eq!(out().await, 204);
    assert_eq!(me(&app, &account.access_token).await, 401);
    assert_eq!(refresh(&app, &account.refresh_token).await.status, 401);
    assert_eq!(
        out().await,
        204,
        "a session that has ended is as it should be"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_password_ends_every_other_session() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let other = login(&app, &account.email, PASSWORD).await;
    assert_eq!(me(&app, &other.text("access_token")).await, 200);
    let change = async |current: &str, new: &str| {
        let body = json!({"current_password": current, "new_password": new});
        send(&app, &account.access_token, "POST", "/auth/password", body).await
    };
    let wrong = change("not it at all", "seven orchards under frost").await;
    assert_eq!(
        (wrong.status, &wrong.body["errors"][0]["field"]),
        (422, &json!("current_password"))
    );
    let weak = change(PASSWORD, "passwordpassword").await;
    assert_eq!(
        (weak.status, &weak.body["errors"][0]["field"]),
        (422, &json!("new_password"))
    );
    assert_eq!(
        change(PASSWORD, "seven orchards under frost").await.status,
        204
    );
    assert_eq!(me(&app, &other.text("access_token")).await, 401);
    assert_eq!(
        refresh(&app, &other.text("refresh_token")).await.status,
        401
    );
    assert_eq!(
        me(&app, &account.access_token).await,
        200,
        "the own session goes on"
    );
    assert_eq!(login(&app, &account.email, PASSWORD).await.status, 401);
    assert_eq!(
        login(&app, &account.email, "seven orchards under frost")
            .await
            .status,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_listed_and_ended_by_their_user_alone() {
    let app = TestApp::start().await;
    let (account, stranger) = (app.register().await, app.register().await);
    let other = login(&app, &account.email, PASSWORD).await;
    let list = send(
        &app,
        &account.access_token,
        "GET",
        "/auth/sessions",
        Value::Null,
    )
    .await;
    assert_eq!(list.body["total"], json!(2));
    let items = list.body["items"].as_array().unwrap();
    assert_eq!(
        items
            .iter()
            .map(|it| it["current"].as_bool().unwrap())
            .collect::<Vec<_>>(),
        [false, true]
    );
    let path = format!("/auth/sessions/{}", items[0]["id"].as_str().unwrap());
    assert_eq!(
        send(&app, &stranger.access_token, "DELETE", &path, Value::Null)
            .await
            .status,
        404
    );
    assert_eq!(me(&app, &other.text("access_token")).await, 200);
    assert_eq!(
        send(&app, &account.access_token, "DELETE", &path, Value::Null)
            .await
            .status,
        204
    );
    assert_eq!(me(&app, &other.text("access_token")).await, 401);
    assert_eq!(
        send(&app, &account.access_token, "DELETE", &path, Value::Null)
            .await
            .status,
        404
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_own_account_is_changed() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let change = json!({"name": "Ada", "tenant_name": "Engines", "time_zone": "Europe/Berlin"});
    let changed = send(&app, &account.access_token, "PATCH", "/auth/me", change).await;
    assert_eq!(changed.status, 200);
    assert_eq!(changed.body["user"]["name"], json!("Ada"));
    assert_eq!(changed.body["tenant"]["name"], json!("Engines"));
    assert_eq!(changed.body["tenant"]["time_zone"], json!("Europe/Berlin"));
    let unknown = send(
        &app,
        &account.access_token,
        "PATCH",
        "/auth/me",
        json!({"time_zone": "Mars/Olympus"}),
    )
    .await;
    assert_eq!(
        (unknown.status, &unknown.body["errors"][0]["field"]),
        (422, &json!("time_zone"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_may_do_what_it_may() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let client = app.database.connect().await;
    for (role, manages, administers) in [
        ("admin", 201, 200),
        ("developer", 201, 403),
        ("billing", 403, 403),
        ("viewer", 403, 403),
    ] {
        client
            .execute("UPDATE memberships SET role = $1", &[&role])
            .await
            .unwrap();
        // A session remembers its role for no longer than other replicas take to hear of a change.
        let token = login(&app, &account.email, PASSWORD)
            .await
            .text("access_token");
        let body = json!({"name": format!("By {role}"), "default_rpm": 1});
        assert_eq!(
            send(&app, &token, "POST", "/admin/plans", body)
                .await
                .status,
            manages,
            "{role}"
        );
        assert_eq!(
            send(
                &app,
                &token,
                "GET",
                &format!("/admin/plans/{plan}"),
                Value::Null
            )
            .await
            .status,
            200,
            "{role}"
        );
        let renamed = send(
            &app,
            &token,
            "PATCH",
            "/auth/me",
            json!({"tenant_name": "New"}),
        )
        .await;
        assert_eq!(renamed.status, administers, "{role}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_limited_by_address_and_sign_ins_by_account() {
    let app = TestApp::setup()
        .flag("--auth-rpm=5")
        .flag("--admin-rpm=2")
        .flag("--trusted-proxies=127.0.0.1")
        .start()
        .await;
    let account = app.register().await;
    let from = async |ip: &str, path: &str| {
        app.get(path)
            .header("X-Forwarded-For", ip)
            .bearer(&account.access_token)
            .send()
            .await
    };
    for _ in 0..2 {
        assert_eq!(from("198.51.100.7", "/admin/plans").await.status, 200);
    }
    let refused = from("198.51.100.7", "/admin/plans").await;
    assert_eq!(
        (refused.status, refused.problem()),
        (429, "too-many-requests")
    );
    assert!((1..=30).contains(&refused.number("retry-after")));
    assert_eq!(
        from("203.0.113.1, 198.51.100.7", "/admin/plans")
            .await
            .status,
        429,
        "what the client wrote counts nothing"
    );
    assert_eq!(
        from("198.51.100.8", "/admin/plans").await.status,
        200,
        "another address is not concerned"
    );
    assert_eq!(
        from("198.51.100.7", "/auth/me").await.status,
        200,
        "nor another purpose"
    );

    let app = TestApp::setup().flag("--login-rpm=2").start().await;
    let account = app.register().await;
    for _ in 0..2 {
        assert_eq!(login(&app, &account.email, "wrong").await.status, 401);
    }
    let refused = login(&app, &account.email, PASSWORD).await;
    assert_eq!(
        (refused.status, refused.header("retry-after").is_some()),
        (429, true)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_no_trusted_proxy_cannot_choose_its_address() {
    let app = TestApp::setup().flag("--admin-rpm=2").start().await;
    let Account { access_token, .. } = app.register().await;
    let mut last = 0;
    for n in 0..3 {
        let call = app
            .get("/admin/plans")
            .header("X-Forwarded-For", &format!("198.51.100.{n}"));
        last = call
            .header("X-Real-IP", "192.0.2.1")
            .bearer(&access_token)
            .send()
            .await
            .status;
    }
    assert_eq!(last, 429);
}
