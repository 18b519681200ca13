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
async fn new_user_is_signed_in_as_owner_of_a_new_tenant() {
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
async fn easily_guessed_password_is_rejected_by_field() {
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
async fn unknown_email_and_wrong_password_get_the_same_response() {
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
async fn access_token_expires_after_fifteen_minutes() {
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
async fn refresh_token_works_once_and_its_predecessor_gets_the_same_successor() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let second = refresh(&app, &account.refresh_token).await;
    assert_eq!(second.status, 200);
    assert_ne!(second.text("refresh_token"), account.refresh_token);
    // Two tabs refresh at the same time, or a client repeats a refresh because the response was lost.
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

    // This token is no longer the predecessor of the current token, so someone must have copied it, and the whole
    // session family ends.
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
async fn reuse_of_the_previous_refresh_token_after_ten_seconds_revokes_the_session() {
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
async fn invalid_refresh_token_is_401_and_revokes_nothing() {
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
async fn signing_out_ends_access_immediately() {
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
        "signing out of a session that has ended also succeeds"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_password_revokes_every_other_session() {
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
        "the session that made the change remains active"
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
async fn only_their_user_lists_and_revokes_sessions() {
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
async fn current_user_can_be_updated() {
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

/// Changes to a tenant are made one at a time. This update would have to wait too long, so it is rejected as a whole.
#[tokio::test(flavor = "multi_thread")]
async fn rejected_update_of_user_and_tenant_changes_neither() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let tenant = account.tenant_id.parse().expect("a UUID");
    let before = app.act(&account, "GET", "/auth/me", Value::Null).await;
    let update = json!({"name": "Ada", "tenant_name": "Analytical Engines"});
    let turn = app.state.changes.turn(tenant).await.expect("a turn");
    let rejected = app.act(&account, "PATCH", "/auth/me", update.clone()).await;
    assert_eq!(rejected.status, 503, "{}", rejected.text);
    let after = app.act(&account, "GET", "/auth/me", Value::Null).await;
    assert_eq!(after.body, before.body);
    drop(turn);
    let updated = app.act(&account, "PATCH", "/auth/me", update).await;
    assert_eq!(updated.status, 200, "{}", updated.text);
    assert_eq!(updated.body["user"]["name"], "Ada", "{}", updated.text);
    assert_eq!(updated.body["tenant"]["name"], "Analytical Engines");
}

#[tokio::test(flavor = "multi_thread")]
async fn role_may_do_exactly_what_it_allows() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let client = app.database.connect().await;
    for (role, manages, reads, administers) in [
        ("admin", 201, 200, 200),
        ("developer", 201, 200, 403),
        ("billing", 403, 403, 403),
        ("viewer", 403, 200, 403),
    ] {
        client
            .execute("UPDATE memberships SET role = $1", &[&role])
            .await
            .unwrap();
        // A session may use its cached role for a moment, so sign in again to use the new role.
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
            reads,
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
    // A client may show only the detail, so the detail must state the wait.
    let wait = format!("Try again in {} second", refused.number("retry-after"));
    assert!(refused.text("detail").contains(&wait), "{}", refused.body);
    assert_eq!(
        from("203.0.113.1, 198.51.100.7", "/admin/plans")
            .await
            .status,
        429,
        "addresses that the client sent do not count"
    );
    assert_eq!(
        from("198.51.100.8", "/admin/plans").await.status,
        200,
        "another address is not affected"
    );
    assert_eq!(
        from("198.51.100.7", "/auth/me").await.status,
        200,
        "requests for another purpose are not affected"
    );

    let app = TestApp::setup()
        .flag("--login-free-failures=2")
        .start()
        .await;
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
async fn untrusted_peer_cannot_choose_its_address() {
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

/// Signs in with the given user agent.
async fn login_from(app: &TestApp, account: &Account, user_agent: &str) -> Answer {
    let body = json!({"email": account.email, "password": PASSWORD});
    let call = app.post("/auth/login", body);
    call.header("User-Agent", user_agent).send().await
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_registrations_of_one_email_create_one_account() {
    let app = TestApp::start().await;
    let register = async |email: &str| {
        app.post(
            "/auth/register",
            json!({"email": email, "password": PASSWORD}),
        )
        .send()
        .await
    };
    let emails = [
        "ada@example.com",
        "Ada@example.com",
        "ADA@EXAMPLE.COM",
        "aDa@exAmple.com",
    ];
    let answers = futures_util::future::join_all(emails.map(register)).await;
    let mut statuses = answers.iter().map(|it| it.status).collect::<Vec<_>>();
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 409, 409, 409]);
    for taken in answers.iter().filter(|it| it.status == 409) {
        assert_eq!(taken.problem(), "email-taken");
        assert_eq!(taken.body["errors"][0]["field"], json!("email"));
    }
    let client = app.database.connect().await;
    for table in ["users", "tenants", "memberships", "sessions"] {
        let sql = format!("SELECT count(*) FROM {table}");
        let rows: i64 = client.query_one(&sql, &[]).await.unwrap().get(0);
        assert_eq!(rows, 1, "a rejected registration leaves nothing in {table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn password_matches_in_any_unicode_composition() {
    let app = TestApp::start().await;
    let (composed, decomposed) = (
        "caf\u{e9} w\u{fc}rfel 93 zebra",
        "cafe\u{301} wu\u{308}rfel 93 zebra",
    );
    let body = json!({"email": "ada@example.com", "password": decomposed});
    assert_eq!(app.post("/auth/register", body).send().await.status, 201);
    assert_eq!(login(&app, "ada@example.com", composed).await.status, 200);
    assert_eq!(login(&app, "ada@example.com", decomposed).await.status, 200);
    assert_eq!(
        login(&app, "ada@example.com", "cafe wurfel 93 zebra")
            .await
            .status,
        401
    );
    let kept = app.everything_kept().await;
    assert!(kept.contains("$argon2id$"));
    for text in [composed, decomposed] {
        assert!(!kept.contains(text), "the password is stored");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_password_is_rejected_without_a_hint() {
    let app = TestApp::start().await;
    let account = app.register().await;
    for (email, password, status) in [
        (account.email.as_str(), "", 422),
        (&account.email, &"x".repeat(257), 422),
        (&account.email, "a\u{0}b", 401),
        ("", PASSWORD, 422),
        ("nobody@example.com\u{0}", PASSWORD, 422),
    ] {
        let refused = login(&app, email, password).await;
        assert_eq!(refused.status, status, "{email:?} {password:?}");
    }
    let unknown = json!({"email": account.email, "password": PASSWORD, "role": "owner"});
    let refused = app.post("/auth/login", unknown).send().await;
    assert_eq!(
        (refused.status, &refused.body["errors"][0]["field"]),
        (422, &json!("role"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tabs_that_refresh_concurrently_stay_signed_in() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let answers =
        futures_util::future::join_all((0..8).map(|_| refresh(&app, &account.refresh_token))).await;
    let next = answers[0].text("refresh_token");
    for answer in &answers {
        assert_eq!(
            (answer.status, answer.text("refresh_token")),
            (200, next.clone())
        );
        assert_eq!(me(&app, &answer.text("access_token")).await, 200);
    }
    let client = app.database.connect().await;
    let row = client
        .query_one(
            "SELECT count(*), count(used_at), count(DISTINCT session_id) FROM refresh_tokens",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(
        (
            row.get::<_, i64>(0),
            row.get::<_, i64>(1),
            row.get::<_, i64>(2)
        ),
        (2, 1, 1),
        "one successor, of one session"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn stolen_refresh_token_revokes_only_its_own_session() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let elsewhere = login(&app, &account.email, PASSWORD).await;
    let second = refresh(&app, &account.refresh_token).await;
    let third = refresh(&app, &second.text("refresh_token")).await;
    assert_eq!(third.status, 200);
    assert_eq!(refresh(&app, &account.refresh_token).await.status, 401);
    assert_eq!(me(&app, &third.text("access_token")).await, 401);
    assert_eq!(me(&app, &elsewhere.text("access_token")).await, 200);
    assert_eq!(
        refresh(&app, &elsewhere.text("refresh_token")).await.status,
        200
    );

    let token = elsewhere.text("access_token");
    let log = send(&app, &token, "GET", "/admin/audit", Value::Null).await;
    let events = log.body["items"].as_array().unwrap();
    let reuse = events
        .iter()
        .filter(|it| it["action"] == json!("session.reuse_detected"))
        .collect::<Vec<_>>();
    assert_eq!(
        reuse.len(),
        1,
        "recorded once, no matter how often the token is reused"
    );
    let client = app.database.connect().await;
    let ended = client
        .query_one(
            "SELECT id::text FROM sessions WHERE revoked_at IS NOT NULL",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(reuse[0]["target_id"], json!(ended.get::<_, &str>(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn session_lasts_as_long_as_it_is_used() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let idle = login(&app, &account.email, PASSWORD).await;
    let client = app.database.connect().await;
    let remaining = async |sql: &str| {
        let sql =
            format!("SELECT extract(epoch FROM expires_at - now())::float8 FROM sessions {sql}");
        client.query_one(&sql, &[]).await.unwrap().get::<_, f64>(0) / 86_400.0
    };
    client
        .execute(
            "UPDATE sessions SET expires_at = now() + interval '1 day'",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(refresh(&app, &account.refresh_token).await.status, 200);
    let used = remaining("ORDER BY id LIMIT 1").await;
    assert!((13.9..=14.0).contains(&used), "{used} days");
    assert!(remaining("ORDER BY id DESC LIMIT 1").await <= 1.0);

    client
        .execute("UPDATE sessions SET expires_at = now()", &[])
        .await
        .unwrap();
    assert_eq!(refresh(&app, &idle.text("refresh_token")).await.status, 401);
    assert_eq!(me(&app, &idle.text("access_token")).await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_replica_rejects_a_revoked_session_within_ten_polls() {
    let one = TestApp::start().await;
    let other = TestApp::setup()
        .database(one.database.clone())
        .start()
        .await;
    let account = one.register().await;
    assert_eq!(
        me(&other, &account.access_token).await,
        200,
        "replicas accept each other's tokens"
    );
    let out = json!({"refresh_token": account.refresh_token});
    assert_eq!(one.post("/auth/logout", out).send().await.status, 204);
    other
        .notices("the sign-out", async || {
            me(&other, &account.access_token).await == 401
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn signing_out_revokes_only_its_own_session_and_needs_its_token() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let other = login(&app, &account.email, PASSWORD).await;
    for wrong in ["x", &account.access_token[..200], ""] {
        let refused = app
            .post("/auth/logout", json!({"refresh_token": wrong}))
            .send()
            .await;
        assert!(
            matches!(refused.status, 401 | 422),
            "{wrong}: {}",
            refused.status
        );
    }
    assert_eq!(me(&app, &account.access_token).await, 200);
    // Signing out works with any token of the family, and does not treat reuse as theft.
    let next = refresh(&app, &account.refresh_token).await;
    let out = json!({"refresh_token": account.refresh_token});
    assert_eq!(app.post("/auth/logout", out).send().await.status, 204);
    assert_eq!(me(&app, &next.text("access_token")).await, 401);
    assert_eq!(refresh(&app, &next.text("refresh_token")).await.status, 401);
    assert_eq!(me(&app, &other.text("access_token")).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn list_of_sessions_is_paginated_and_distinguishes_them() {
    let app = TestApp::start().await;
    let account = app.register().await;
    for n in 0..4 {
        assert_eq!(
            login_from(&app, &account, &format!("Browser {n}"))
                .await
                .status,
            200
        );
    }
    // A refresh does not create another session.
    let renewed = refresh(&app, &account.refresh_token).await;
    let token = renewed.text("access_token");
    let (mut agents, mut cursor) = (Vec::new(), String::new());
    loop {
        let path = format!("/auth/sessions?limit=2{cursor}");
        let page = send(&app, &token, "GET", &path, Value::Null).await;
        assert_eq!((page.status, &page.body["total"]), (200, &json!(5)));
        for session in page.body["items"].as_array().unwrap() {
            assert_eq!(session["ip"], json!("127.0.0.1"));
            agents.push((session["user_agent"].clone(), session["current"].clone()));
        }
        match page.body["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    let other = |n: usize| (json!(format!("Browser {n}")), json!(false));
    assert_eq!(agents[..4], [other(3), other(2), other(1), other(0)]);
    assert_eq!((agents.len(), &agents[4].1), (5, &json!(true)));
    for (query, status) in [("limit=0", 422), ("limit=101", 422), ("cursor=x", 400)] {
        let path = format!("/auth/sessions?{query}");
        assert_eq!(
            send(&app, &token, "GET", &path, Value::Null).await.status,
            status
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rejected_update_changes_nothing_in_the_account() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let token = &account.access_token;
    let before = send(&app, token, "GET", "/auth/me", Value::Null).await.body;
    for (body, fields) in [
        (
            json!({"name": "Ada", "time_zone": "Mars/Olympus"}),
            vec!["time_zone"],
        ),
        (
            json!({"name": "", "tenant_name": "a\u{0}b", "time_zone": ""}),
            vec!["name", "tenant_name", "time_zone"],
        ),
        (
            json!({"name": "Ada", "email": "eve@example.com"}),
            vec!["email"],
        ),
        (json!({"tenant_name": null}), vec!["tenant_name"]),
        (json!({"name": "x".repeat(201)}), vec!["name"]),
    ] {
        let refused = send(&app, token, "PATCH", "/auth/me", body.clone()).await;
        let errors = refused.body["errors"].as_array().unwrap().iter();
        let named = errors.map(|it| it["field"].as_str().unwrap());
        assert_eq!(
            (refused.status, named.collect::<Vec<_>>()),
            (422, fields),
            "{body}"
        );
    }
    let after = send(&app, token, "PATCH", "/auth/me", json!({})).await;
    assert_eq!((after.status, &after.body), (200, &before));

    let client = app.database.connect().await;
    client
        .execute("UPDATE memberships SET role = 'developer'", &[])
        .await
        .unwrap();
    let token = login(&app, &account.email, PASSWORD)
        .await
        .text("access_token");
    let both = json!({"name": "Ada", "tenant_name": "Engines"});
    let refused = send(&app, &token, "PATCH", "/auth/me", both).await;
    assert_eq!((refused.status, refused.problem()), (403, "forbidden"));
    let own = send(&app, &token, "PATCH", "/auth/me", json!({"name": "Ada"})).await;
    assert_eq!(
        (own.status, &own.body["user"]["name"]),
        (200, &json!("Ada"))
    );
    let kept = client
        .query_one("SELECT name, time_zone FROM tenants", &[])
        .await
        .unwrap();
    assert_eq!(
        (json!(kept.get::<_, &str>(0)), kept.get::<_, &str>(1)),
        (before["tenant"]["name"].clone(), "UTC")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn rejected_address_is_admitted_exactly_after_retry_after() {
    let clock = TestClock::at(SystemClock::new().now());
    let app = TestApp::setup()
        .clock(Arc::new(clock.clone()))
        .flag("--auth-rpm=3")
        .start()
        .await;
    let account = app.register().await;
    for _ in 0..2 {
        assert_eq!(login(&app, &account.email, "wrong").await.status, 401);
    }
    let refused = login(&app, &account.email, PASSWORD).await;
    assert_eq!(
        (
            refused.status,
            refused.problem(),
            refused.number("retry-after")
        ),
        (429, "too-many-requests", 20)
    );
    assert!(
        refused.header("x-ratelimit-limit").is_none(),
        "the response reports no limit of a key"
    );
    let plans = send(
        &app,
        &account.access_token,
        "GET",
        "/admin/plans",
        Value::Null,
    );
    assert_eq!(plans.await.status, 200);
    clock.advance(std::time::Duration::from_millis(19_999));
    assert_eq!(login(&app, &account.email, PASSWORD).await.status, 429);
    clock.advance(std::time::Duration::from_millis(1));
    assert_eq!(login(&app, &account.email, PASSWORD).await.status, 200);
    assert_eq!(login(&app, &account.email, PASSWORD).await.status, 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn sign_in_attempts_are_limited_per_account_whether_it_exists_or_not() {
    let clock = TestClock::at(SystemClock::new().now());
    let app = TestApp::setup()
        .clock(Arc::new(clock.clone()))
        .flag("--login-free-failures=2")
        .start()
        .await;
    let (account, other) = (app.register().await, app.register().await);
    for email in [account.email.as_str(), "nobody@example.com"] {
        assert_eq!(login(&app, email, "wrong").await.status, 401);
        assert_eq!(
            login(&app, &email.to_uppercase(), "wrong").await.status,
            401
        );
        let refused = login(&app, email, PASSWORD).await;
        assert_eq!(
            (
                refused.status,
                refused.problem(),
                refused.number("retry-after")
            ),
            (429, "too-many-requests", 30),
            "{email}"
        );
    }
    assert_eq!(login(&app, &other.email, PASSWORD).await.status, 200);
    assert_eq!(
        me(&app, &account.access_token).await,
        200,
        "signed-in users are not affected"
    );
    clock.advance(std::time::Duration::from_secs(30));
    assert_eq!(login(&app, &account.email, PASSWORD).await.status, 200);

    let change = async || {
        let body =
            json!({"current_password": "wrong", "new_password": "seven orchards under frost"});
        send(&app, &other.access_token, "POST", "/auth/password", body)
            .await
            .status
    };
    assert_eq!(
        (change().await, change().await, change().await),
        (422, 422, 429),
        "a stolen session cannot be used to guess the password"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_of_one_ipv6_network_are_counted_together() {
    let app = TestApp::setup()
        .flag("--admin-rpm=2")
        .flag("--trusted-proxies=127.0.0.0/8,10.0.0.0/8")
        .start()
        .await;
    let account = app.register().await;
    let from = async |forwarded: &str| {
        app.get("/admin/plans")
            .header("X-Forwarded-For", forwarded)
            .bearer(&account.access_token)
            .send()
            .await
            .status
    };
    assert_eq!(from("2001:db8:1:2::1").await, 200);
    assert_eq!(from("2001:db8:1:2:ffff::9, 10.1.2.3").await, 200);
    assert_eq!(from("[2001:db8:1:2::7]:4711").await, 429);
    assert_eq!(from("2001:db8:1:3::1").await, 200, "another network");
    // If an address in the header cannot be parsed, the address of the proxy that added it counts instead.
    assert_eq!(from("2001:db8:1:4::1, nonsense").await, 200);
    assert_eq!(from("2001:db8:1:5::1, nonsense").await, 200);
    assert_eq!(from("2001:db8:1:6::1, nonsense").await, 429);
}

async fn login_from_network(app: &TestApp, ip: &str, email: &str, password: &str) -> Answer {
    let body = json!({"email": email, "password": password});
    app.post("/auth/login", body)
        .header("X-Forwarded-For", ip)
        .send()
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn stranger_cannot_lock_out_an_owner() {
    let app = TestApp::setup()
        .flag("--login-free-failures=10")
        .flag("--trusted-proxies=127.0.0.0/8")
        .start()
        .await;
    let owner = app.register().await;
    for _ in 0..10 {
        let answer = login_from_network(&app, "198.51.100.7", &owner.email, "wrong").await;
        assert_eq!(answer.status, 401);
    }
    let refused = login_from_network(&app, "198.51.100.7", &owner.email, PASSWORD).await;
    assert_eq!(
        (refused.status, refused.problem()),
        (429, "too-many-requests")
    );
    assert!(refused.number("retry-after") >= 1);
    // The owner can still sign in on a new device in another network.
    let owner_signs_in = login_from_network(&app, "203.0.113.9", &owner.email, PASSWORD).await;
    assert_eq!(owner_signs_in.status, 200, "{}", owner_signs_in.body);
}

/// Keeps both password threads busy for a while, with accounts whose password hashes take `passes` passes to verify.
/// Returns the tasks that sign in to these accounts.
async fn occupy_password_threads(app: &TestApp, passes: u32) -> Vec<tokio::task::JoinHandle<u16>> {
    let costly = format!(
        "$argon2id$v=19$m=65536,t={passes},p=1$c29tZXNhbHRzb21lc2FsdA$\
         AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    );
    let mut busy = Vec::new();
    for _ in 0..2 {
        let account = app.register().await;
        let client = app.database.connect().await;
        let set = client
            .execute(
                "UPDATE users SET password_hash = $1 WHERE email = $2",
                &[&costly, &account.email],
            )
            .await;
        assert_eq!(set.expect("the row is updated"), 1);
        let (http, url) = (app.http.clone(), app.url("/auth/login"));
        let body = json!({"email": account.email, "password": "anything"});
        busy.push(tokio::spawn(async move {
            let answer = http.post(url).json(&body).send().await;
            answer.expect("the server responds").status().as_u16()
        }));
    }
    // Wait until both threads are busy, but not so long that they finish.
    tokio::time::sleep(std::time::Duration::from_millis(150)).await;
    busy
}

/// Signs in with `old` while the password threads are busy, and changes the password to `new` in the meantime. Returns
/// the status and the body of the response, and whether the response came after the change.
async fn sign_in_during_reset(
    app: &TestApp,
    other: &TestApp,
    email: &str,
    (old, new): (&str, &str),
    passes: u32,
) -> (u16, Value, bool) {
    let busy = occupy_password_threads(app, passes).await;
    let (http, url) = (app.http.clone(), app.url("/auth/login"));
    let body = json!({"email": email, "password": old});
    let waiting = tokio::spawn(async move {
        let answer = http
            .post(url)
            .json(&body)
            .send()
            .await
            .expect("the server responds");
        let status = answer.status().as_u16();
        let body: Value = answer.json().await.expect("JSON");
        (status, body, std::time::Instant::now())
    });
    tokio::time::sleep(std::time::Duration::from_millis(150)).await;
    let reset = other.state.accounts.reset_password(email, new).await;
    reset.expect("the password is reset");
    let reset_at = std::time::Instant::now();
    let (status, body, answered_at) = waiting.await.expect("the task ends");
    for it in busy {
        // The status is 503 if a hash takes too long on a busy machine.
        assert!(matches!(it.await.expect("the task ends"), 401 | 503));
    }
    (status, body, answered_at > reset_at)
}

/// The old password is still correct when the sign-in reads the password hash, but no longer when the session would be
/// created.
#[tokio::test(flavor = "multi_thread")]
async fn sign_in_during_a_password_change_creates_no_session() {
    let app = TestApp::start().await;
    let other = TestApp::setup()
        .database(app.database.clone())
        .start()
        .await;
    let owner = app.register().await;
    let client = app.database.connect().await;
    let mut old = PASSWORD.to_owned();
    // Raise the hash cost until the sign-in completes only after the password change.
    for passes in [6, 12, 24, 48, 96] {
        let new = format!("seven orchards under frost {passes}");
        let (status, body, waited) =
            sign_in_during_reset(&app, &other, &owner.email, (&old, &new), passes).await;
        let active: i64 = client
            .query_one(
                "SELECT count(*) FROM sessions s JOIN users u ON u.id = s.user_id \
                 WHERE u.email = $1 AND s.revoked_at IS NULL",
                &[&owner.email],
            )
            .await
            .expect("a count")
            .get(0);
        assert_eq!(active, 0, "a session with the old password");
        if waited {
            assert!(matches!(status, 401 | 503), "{status} {body}");
            assert_eq!(login(&app, &owner.email, &new).await.status, 200);
            assert_eq!(login(&app, &owner.email, &old).await.status, 401);
            return;
        }
        old = new;
    }
    panic!("no sign-in waited until after the change");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_concurrent_password_changes_succeeds() {
    let app = TestApp::start().await;
    let owner = app.register().await;
    let sessions =
        futures_util::future::join_all((0..6).map(|_| login(&app, &owner.email, PASSWORD))).await;
    let new = |n: usize| format!("seven orchards under frost {n}");
    let changes = sessions.iter().enumerate().map(|(n, session)| {
        let body = json!({"current_password": PASSWORD, "new_password": new(n)});
        let token = session.text("access_token");
        let app = &app;
        async move {
            send(app, &token, "POST", "/auth/password", body)
                .await
                .status
        }
    });
    let changed = futures_util::future::join_all(changes).await;
    let made = changed.iter().filter(|status| **status == 204).count();
    assert_eq!(made, 1, "{changed:?}");
    let winner = changed
        .iter()
        .position(|status| *status == 204)
        .expect("one");
    assert!(
        changed
            .iter()
            .all(|status| matches!(status, 204 | 401 | 422)),
        "{changed:?}"
    );
    assert_eq!(login(&app, &owner.email, &new(winner)).await.status, 200);
    for (n, session) in sessions.iter().enumerate() {
        let expected = if n == winner { 200 } else { 401 };
        assert_eq!(me(&app, &session.text("access_token")).await, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn known_device_signs_in_during_an_attack_from_many_networks() {
    let app = TestApp::setup()
        .flag("--login-free-failures=2")
        .flag("--trusted-proxies=127.0.0.0/8")
        .start()
        .await;
    let owner = app.register().await;
    let first = login_from_network(&app, "203.0.113.9", &owner.email, PASSWORD).await;
    assert_eq!(first.status, 200);
    let device = first.text("device_token");
    for network in 0..40 {
        let ip = format!("198.51.{network}.7");
        for _ in 0..2 {
            let status = login_from_network(&app, &ip, &owner.email, "wrong")
                .await
                .status;
            assert_eq!(status, 401);
        }
        let status = login_from_network(&app, &ip, &owner.email, "wrong")
            .await
            .status;
        assert_eq!(status, 429, "{ip}");
    }
    let with_device = async |ip: &str, password: &str, device: &str| {
        let body = json!({"email": owner.email, "password": password, "device_token": device});
        let call = app.post("/auth/login", body).header("X-Forwarded-For", ip);
        call.send().await
    };
    // A sign-in with a device token works even from a network that is slowed down.
    let known = with_device("198.51.1.7", PASSWORD, &device).await;
    assert_eq!(known.status, 200, "{}", known.body);
    let renewed = known.text("device_token");
    assert_eq!(
        with_device("198.51.1.7", PASSWORD, &renewed).await.status,
        200
    );
    let new_device = login_from_network(&app, "203.0.113.77", &owner.email, PASSWORD).await;
    assert_eq!(new_device.status, 200);
    // A token that no server has issued does not identify a device.
    let mut forged = renewed.clone();
    let other = if &forged[40..41] == "A" { "B" } else { "A" };
    forged.replace_range(40..41, other);
    assert_eq!(
        with_device("198.51.1.7", PASSWORD, &forged).await.status,
        429
    );
    assert_eq!(
        with_device("198.51.1.7", PASSWORD, &"x".repeat(513))
            .await
            .status,
        422
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_of_ipv6_are_counted_together_at_sign_in() {
    let app = TestApp::setup()
        .flag("--login-free-failures=2")
        .flag("--trusted-proxies=127.0.0.0/8")
        .start()
        .await;
    let owner = app.register().await;
    let mut tried = 0;
    for n in 0..40 {
        let ip = format!("2001:db8:7:{n:x}00::1");
        let status = login_from_network(&app, &ip, &owner.email, "wrong")
            .await
            .status;
        tried += usize::from(status == 401);
    }
    assert_eq!(tried, 8, "a /48 has four times the tries of a /64");
    let elsewhere = login_from_network(&app, "2001:db8:8::1", &owner.email, PASSWORD).await;
    assert_eq!(elsewhere.status, 200);
}

/// Two replicas together do not allow more attempts than a single replica.
#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_counts_and_are_stricter_without_redis() {
    let mut redis = quota_testkit::redis::RedisServer::start().await;
    let setup = || {
        TestApp::setup()
            .flag(format!("--redis-url={}", redis.url()))
            .flag("--redis-timeout=2s")
            .flag("--login-free-failures=6")
    };
    let one = setup().start().await;
    let other = setup().database(one.database.clone()).start().await;
    for app in [&one, &other] {
        let redis = app.state.redis.as_ref().expect("the server uses Redis");
        assert!(redis.connected(std::time::Duration::from_secs(10)).await);
    }
    let owner = one.register().await;
    let mut statuses = Vec::new();
    for n in 0..8 {
        let app = if n % 2 == 0 { &one } else { &other };
        statuses.push(login(app, &owner.email, "wrong").await.status);
    }
    assert_eq!(statuses, [401, 401, 401, 401, 401, 401, 429, 429]);
    let refused = login(&other, &owner.email, PASSWORD).await;
    assert!((1..=10).contains(&refused.number("retry-after")));
    let second = one.register().await;
    assert_eq!(login(&one, &second.email, "wrong").await.status, 401);
    assert_eq!(login(&other, &second.email, PASSWORD).await.status, 200);
    // A correct password resets the count on both replicas.
    for _ in 0..6 {
        assert_eq!(login(&one, &second.email, "wrong").await.status, 401);
    }

    // Without Redis, each replica counts separately and allows half as many attempts.
    let third = one.register().await;
    redis.kill().await;
    let mut statuses = Vec::new();
    for _ in 0..5 {
        statuses.push(login(&one, &third.email, "wrong").await.status);
    }
    assert_eq!(statuses, [401, 401, 401, 429, 429]);
    let fourth = login(&other, &third.email, PASSWORD).await;
    assert_eq!(fourth.status, 200, "{}", fourth.body);
}

/// Without a limit on registrations, someone who creates many accounts could exceed all limits that apply to each
/// tenant separately.
#[tokio::test(flavor = "multi_thread")]
async fn registrations_from_a_network_are_limited_over_all_replicas() {
    let redis = quota_testkit::redis::RedisServer::start().await;
    let setup = || {
        TestApp::setup()
            .flag(format!("--redis-url={}", redis.url()))
            .flag("--redis-timeout=2s")
            .flag("--trusted-proxies=127.0.0.1")
            .flag("--registrations-per-day=4")
    };
    let one = setup().start().await;
    let other = setup().database(one.database.clone()).start().await;
    for app in [&one, &other] {
        let redis = app.state.redis.as_ref().expect("the server uses Redis");
        assert!(redis.connected(std::time::Duration::from_secs(10)).await);
    }
    let register = async |app: &TestApp, ip: &str, email: &str, password: &str| {
        let body = json!({"email": email, "password": password});
        let call = app.post("/auth/register", body);
        call.header("X-Forwarded-For", ip).send().await
    };
    // A weak password creates no account and does not count.
    let weak = register(&one, "198.51.100.7", "weak@example.com", "passwordpassword").await;
    assert_eq!(weak.status, 422, "{}", weak.text);
    let mut statuses = Vec::new();
    for n in 0..6 {
        let app = if n % 2 == 0 { &one } else { &other };
        let email = format!("user-{n}@example.com");
        statuses.push(register(app, "198.51.100.7", &email, PASSWORD).await.status);
    }
    assert_eq!(statuses, [201, 201, 201, 201, 429, 429]);
    let refused = register(&one, "198.51.100.7", "late@example.com", PASSWORD).await;
    assert!((3600..=6 * 3600).contains(&refused.number("retry-after")));
    assert!(refused.text.contains("network"), "{}", refused.text);
    // Other people can still register, and the accounts of this network can still sign in.
    let elsewhere = register(&other, "203.0.113.9", "other@example.com", PASSWORD).await;
    assert_eq!(elsewhere.status, 201, "{}", elsewhere.text);
    let body = json!({"email": "user-0@example.com", "password": PASSWORD});
    let call = one.post("/auth/login", body);
    let signed_in = call.header("X-Forwarded-For", "198.51.100.7").send().await;
    assert_eq!(signed_in.status, 200, "{}", signed_in.text);
    // The operator is not limited.
    for n in 0..6 {
        let email = format!("created-{n}@example.com");
        one.state
            .accounts
            .create(&email, PASSWORD, None)
            .await
            .expect("an account");
    }
}

/// The client disconnects while PostgreSQL commits. The account exists, so the registration counts.
#[tokio::test(flavor = "multi_thread")]
async fn registration_whose_client_leaves_during_the_commit_counts() {
    let app = TestApp::setup()
        .flag("--registrations-per-day=1")
        .start()
        .await;
    let client = app.database.connect().await;
    client
        .batch_execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN PERFORM pg_sleep(5); RETURN new; END $$; \
             CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON users DEFERRABLE INITIALLY DEFERRED \
                 FOR EACH ROW EXECUTE FUNCTION slow()",
        )
        .await
        .expect("a trigger");
    let count = async |query: &str| {
        let row = client.query_one(query, &[]).await.expect("a count");
        row.get::<_, i64>(0)
    };
    let register = |email: &str| {
        let body = json!({"email": email, "password": PASSWORD});
        app.post("/auth/register", body).send()
    };
    let began = std::time::Instant::now();
    let patience = std::time::Duration::from_secs(60);
    let is_committing = async {
        // Only the trigger sleeps: other transactions may be committing, too.
        let committing = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
             AND wait_event = 'PgSleep' AND query ILIKE 'commit%'";
        while count(committing).await == 0 {
            assert!(began.elapsed() < patience, "no commit");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        answer = register("left@example.com") => panic!("{}", answer.text),
        () = is_committing => {}
    }
    while count("SELECT count(*) FROM users").await == 0 {
        assert!(began.elapsed() < patience, "no account");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let next = register("next@example.com").await;
    assert_eq!(next.status, 429, "{}", next.text);
}

/// Two threads hash passwords. Even if many networks flood them with sign-ins, a known device is served.
#[tokio::test(flavor = "multi_thread")]
async fn known_device_is_served_while_the_password_threads_are_flooded() {
    let app = TestApp::setup()
        .flag("--trusted-proxies=127.0.0.0/8")
        .flag("--login-free-failures=10")
        .start()
        .await;
    let owner = app.register().await;
    let device = login(&app, &owner.email, PASSWORD)
        .await
        .text("device_token");
    let victim = app.register().await;
    let costly = "$argon2id$v=19$m=16384,t=4,p=1$c29tZXNhbHRzb21lc2FsdA$\
                  AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    let client = app.database.connect().await;
    client
        .execute(
            "UPDATE users SET password_hash = $1 WHERE email = $2",
            &[&costly, &victim.email],
        )
        .await
        .expect("the row is updated");
    let flood = (0..60).map(|network| {
        let (http, url) = (app.http.clone(), app.url("/auth/login"));
        let body = json!({"email": victim.email, "password": "wrong"});
        tokio::spawn(async move {
            let mut statuses = Vec::new();
            for _ in 0..4 {
                let ip = format!("198.51.{network}.7");
                let request = http.post(&url).header("X-Forwarded-For", ip).json(&body);
                statuses.push(
                    request
                        .send()
                        .await
                        .expect("the server responds")
                        .status()
                        .as_u16(),
                );
            }
            statuses
        })
    });
    let flood = flood.collect::<Vec<_>>();
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    for _ in 0..10 {
        let body = json!({"email": owner.email, "password": PASSWORD, "device_token": device});
        let known = app.post("/auth/login", body).send().await;
        assert_eq!(known.status, 200, "{}", known.body);
    }
    let mut statuses = Vec::new();
    for it in flood {
        statuses.extend(it.await.expect("the task ends"));
    }
    let of = |status: u16| statuses.iter().filter(|it| **it == status).count();
    assert_eq!(of(401) + of(503), statuses.len(), "{statuses:?}");
    assert!(of(503) > 0, "no sign-in was rejected");
    assert!(of(401) > 0, "others are served as well");
}

#[tokio::test(flavor = "multi_thread")]
async fn registration_can_be_closed() {
    let app = TestApp::setup().flag("--registration=closed").start().await;
    let email = "new@example.com";
    let body = json!({"email": email, "password": PASSWORD});
    let refused = app.post("/auth/register", body).send().await;
    assert_eq!(
        (refused.status, refused.problem()),
        (403, "registration-closed")
    );
    assert!(
        refused.text("detail").contains("operator"),
        "{}",
        refused.body
    );
    let kept = app.everything_kept().await;
    assert!(!kept.contains(email));
    // The operator can still create accounts, and their users can sign in.
    let created = app.state.accounts.create(email, PASSWORD, None).await;
    created.expect("the account is created");
    assert_eq!(login(&app, email, PASSWORD).await.status, 200);
}

/// When requests race to create resources, only as many succeed as the limit allows.
#[tokio::test(flavor = "multi_thread")]
async fn tenant_creates_as_much_as_the_operator_allows_and_no_more() {
    let app = TestApp::setup()
        .flag("--max-plans=3")
        .flag("--max-api-keys=4")
        .flag("--max-service-tokens=2")
        .start()
        .await;
    let (owner, other) = (app.register().await, app.register().await);
    let plan = app.plan(&owner, json!({})).await;
    let cases = [
        ("/admin/plans", 2, "3 plans"),
        ("/admin/api-keys", 4, "4 API keys"),
        ("/admin/service-tokens", 2, "2 service tokens"),
    ];
    for (path, room, named) in cases {
        let create = |n: usize, account| {
            let body = match path {
                "/admin/plans" => json!({"name": format!("Plan {n}"), "default_rpm": 60}),
                "/admin/api-keys" => json!({"name": "Key", "plan_id": plan}),
                _ => json!({"name": "Gateway"}),
            };
            app.act(account, "POST", path, body)
        };
        let made = futures_util::future::join_all((0..6).map(|n| create(n, &owner))).await;
        let created = made
            .iter()
            .filter(|it| it.status == 201)
            .collect::<Vec<_>>();
        assert_eq!(created.len(), room, "{path}");
        for refused in made.iter().filter(|it| it.status != 201) {
            assert_eq!((refused.status, refused.problem()), (403, "limit-reached"));
            assert!(refused.text("detail").contains(named), "{}", refused.body);
        }
        // Another tenant is not affected. It creates no key, because it cannot use the plan.
        if path != "/admin/api-keys" {
            assert_eq!(create(0, &other).await.status, 201, "{path}");
        }
        // Deleting one resource makes room for another.
        let body = &created[0].body;
        let id = ["api_key", "service_token"]
            .iter()
            .find_map(|it| body[it]["id"].as_str())
            .or(body["id"].as_str())
            .expect("an id");
        let deleted = app
            .act(&owner, "DELETE", &format!("{path}/{id}"), Value::Null)
            .await;
        assert_eq!(deleted.status, 204, "{}", deleted.body);
        assert_eq!(create(9, &owner).await.status, 201, "{path}");
        assert_eq!(create(10, &owner).await.status, 403, "{path}");
    }
}

/// The cost of checking a password's strength is limited, so that no password delays other users.
#[tokio::test(flavor = "multi_thread")]
async fn password_that_is_costly_to_check_does_not_delay_others() {
    let app = TestApp::start().await;
    let register = async |n: usize, password: &str| {
        let email = format!("ada{n}@example.com");
        let body = json!({"email": email, "password": password});
        app.post("/auth/register", body).send().await
    };
    let costly = "4@8({[<369&#!1|0$5+7%2".repeat(5)[..100].to_owned();
    let overflowing = "o0O0o0".repeat(17)[..100].to_owned();
    let eight = async |from: usize, password: &str| {
        let began = std::time::Instant::now();
        let answers = (from..from + 8).map(|n| register(n, password));
        let answers = futures_util::future::join_all(answers).await;
        let statuses = answers.iter().map(|it| it.status).collect::<Vec<_>>();
        assert_eq!(statuses, [201; 8]);
        began.elapsed()
    };
    // The shortest times count, because a busy machine delays some of the requests.
    let (mut ordinary, mut took) = (std::time::Duration::MAX, std::time::Duration::MAX);
    for round in 1..=3 {
        ordinary = ordinary.min(eight(100 * round, PASSWORD).await);
        took = took.min(eight(100 * round + 50, &costly).await);
    }
    let bound = 5 * ordinary + std::time::Duration::from_secs(1);
    assert!(took < bound, "{took:?} instead of {ordinary:?}");
    let refused = register(8, &overflowing).await;
    assert_eq!(
        (refused.status, &refused.body["errors"][0]["field"]),
        (422, &json!("password")),
        "{}",
        refused.body
    );
}

/// Registrations wait and are rejected like sign-ins.
#[tokio::test(flavor = "multi_thread")]
async fn flood_of_registrations_is_rejected_while_known_devices_are_served() {
    let app = TestApp::start().await;
    let owner = app.register().await;
    let device = login(&app, &owner.email, PASSWORD)
        .await
        .text("device_token");
    let busy = occupy_password_threads(&app, 6).await;
    let flood = (0..60).map(|n| {
        let (http, url) = (app.http.clone(), app.url("/auth/register"));
        let body = json!({"email": format!("flood{n}@example.com"), "password": PASSWORD});
        tokio::spawn(async move {
            let answer = http
                .post(&url)
                .json(&body)
                .send()
                .await
                .expect("the server responds");
            let waits = answer.headers().contains_key("retry-after");
            (answer.status().as_u16(), waits)
        })
    });
    let flood = flood.collect::<Vec<_>>();
    let body = json!({"email": owner.email, "password": PASSWORD, "device_token": device});
    let known = app.post("/auth/login", body).send().await;
    assert_eq!(known.status, 200, "{}", known.body);
    let mut statuses = Vec::new();
    for it in flood {
        let (status, waits) = it.await.expect("the task ends");
        assert_eq!(status == 503, waits, "{status}");
        statuses.push(status);
    }
    for it in busy {
        assert!(matches!(it.await.expect("the task ends"), 401 | 503));
    }
    let of = |status: u16| statuses.iter().filter(|it| **it == status).count();
    assert_eq!(of(201) + of(503), statuses.len(), "{statuses:?}");
    assert!(of(201) > 0 && of(503) >= 20, "{statuses:?}");
}

/// Anyone who knows the old secret and a used refresh token can compute the token's successors, so replacing the secret
/// without a rotation must end every session.
#[tokio::test(flavor = "multi_thread")]
async fn new_secret_ends_every_session_and_a_rotation_ends_none() {
    let (old, new) = ("old-".repeat(8), "new-".repeat(8));
    let with = |database: &Arc<_>, current: &str, previous: Option<&str>| {
        let setup = TestApp::setup()
            .database(Arc::clone(database))
            .flag(format!("--secret={current}"));
        match previous {
            Some(previous) => setup.flag(format!("--secret-previous={previous}")),
            None => setup,
        }
    };
    let first = TestApp::setup()
        .flag(format!("--secret={old}"))
        .start()
        .await;
    let database = first.database.clone();
    let account = first.register().await;
    let sessions =
        futures_util::future::join_all((0..4).map(|_| login(&first, &account.email, PASSWORD)))
            .await;
    let token = |n: usize| sessions[n].text("refresh_token");
    // Make two sessions look as if an earlier version had created them, without a secret ID.
    let client = database.connect().await;
    let unmarked = "UPDATE sessions SET secret_id = NULL WHERE id IN \
                    (SELECT session_id FROM refresh_tokens WHERE token_hash = sha256($1))";
    for n in [2, 3] {
        let changed = client.execute(unmarked, &[&token(n).as_bytes()]).await;
        assert_eq!(changed.expect("the row is updated"), 1);
    }

    // Rotate the secret step by step.
    let (one, two) = (
        with(&database, &old, Some(&new)).start().await,
        with(&database, &new, Some(&old)).start().await,
    );
    let rotated = refresh(&one, &token(0)).await;
    assert_eq!(rotated.status, 200, "{}", rotated.body);
    let rotated = refresh(&two, &rotated.text("refresh_token")).await;
    assert_eq!(rotated.status, 200, "{}", rotated.body);
    let unmarked = refresh(&two, &token(2)).await;
    assert_eq!(unmarked.status, 200, "{}", unmarked.body);

    // With only the new secret, sessions that have moved to it remain active, and others end.
    let alone = with(&database, &new, None).start().await;
    for (name, token, status) in [
        ("moved", rotated.text("refresh_token"), 200),
        ("moved, once unmarked", unmarked.text("refresh_token"), 200),
        ("left behind", token(1), 401),
        ("unmarked and left behind", token(3), 401),
        (
            "the session of the registration",
            account.refresh_token.clone(),
            401,
        ),
    ] {
        let answer = refresh(&alone, &token).await;
        assert_eq!(answer.status, status, "{name}: {}", answer.body);
    }
    // The sessions remain revoked: restoring the old secret does not revive them.
    let back = with(&database, &old, Some(&new)).start().await;
    for n in [1, 3] {
        assert_eq!(refresh(&back, &token(n)).await.status, 401);
    }
    let leaked = with(&database, &"third-".repeat(6), None).start().await;
    let fresh = login(&back, &account.email, PASSWORD).await;
    assert_eq!(
        refresh(&leaked, &fresh.text("refresh_token")).await.status,
        401
    );
    let again = login(&leaked, &account.email, PASSWORD).await;
    assert_eq!(
        refresh(&leaked, &again.text("refresh_token")).await.status,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_password_makes_known_devices_unknown() {
    let clock = TestClock::at(SystemClock::new().now());
    let app = TestApp::setup()
        .clock(Arc::new(clock))
        .flag("--login-free-failures=2")
        .start()
        .await;
    let owner = app.register().await;
    let session = login(&app, &owner.email, PASSWORD).await;
    let with_device = async |device: &str, password: &str| {
        let body = json!({"email": owner.email, "password": password, "device_token": device});
        app.post("/auth/login", body).send().await
    };
    let device = session.text("device_token");
    let new = "seven orchards under frost";
    let body = json!({"current_password": PASSWORD, "new_password": new});
    let token = session.text("access_token");
    let changed = send(&app, &token, "POST", "/auth/password", body).await;
    assert_eq!(changed.status, 204);
    // Use up the attempts of this network. The device no longer bypasses the limit.
    for _ in 0..2 {
        assert_eq!(login(&app, &owner.email, "wrong").await.status, 401);
    }
    assert_eq!(login(&app, &owner.email, "wrong").await.status, 429);
    let refused = with_device(&device, new).await;
    assert_eq!(refused.status, 429, "{}", refused.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_of_an_account_are_counted_together() {
    let clock = TestClock::at(SystemClock::new().now());
    let app = TestApp::setup()
        .clock(Arc::new(clock))
        .flag("--login-free-failures=2")
        .start()
        .await;
    let owner = app.register().await;
    let mut devices = Vec::new();
    for _ in 0..12 {
        let answer = login(&app, &owner.email, PASSWORD).await;
        devices.push(answer.text("device_token"));
    }
    for _ in 0..2 {
        assert_eq!(login(&app, &owner.email, "wrong").await.status, 401);
    }
    let mut guesses = 0;
    for device in &devices {
        for _ in 0..3 {
            let body = json!({"email": owner.email, "password": "wrong", "device_token": device});
            let answer = app.post("/auth/login", body).send().await;
            assert!(matches!(answer.status, 401 | 429), "{}", answer.body);
            guesses += usize::from(answer.status == 401);
        }
    }
    // Together, the devices get five times as many attempts as a single device, and no more.
    assert_eq!(guesses, 10);
}

/// An attacker who can write to Redis can delay sign-ins, but not for longer than Quota itself would delay them.
#[tokio::test(flavor = "multi_thread")]
async fn contents_of_redis_delay_sign_ins_no_longer_than_the_maximum_wait() {
    let redis = quota_testkit::redis::RedisServer::start().await;
    let app = TestApp::setup()
        .flag(format!("--redis-url={}", redis.url()))
        .flag("--redis-timeout=2s")
        .flag("--login-free-failures=2")
        .start()
        .await;
    let connection = app.state.redis.as_ref().expect("the server uses Redis");
    assert!(
        connection
            .connected(std::time::Duration::from_secs(10))
            .await
    );
    let owner = app.register().await;
    assert_eq!(login(&app, &owner.email, "wrong").await.status, 401);
    let client = redis::Client::open(redis.url()).expect("a valid URL");
    let mut writer = client
        .get_multiplexed_async_connection()
        .await
        .expect("a connection");
    let keys: Vec<String> = redis::cmd("KEYS")
        .arg("quota:login:*")
        .query_async(&mut writer)
        .await
        .expect("the keys are listed");
    assert!(!keys.is_empty());
    for (field, value) in [
        ("until", "1e15"),
        ("until", "inf"),
        ("n", "1e300"),
        ("at", "1e300"),
    ] {
        for key in &keys {
            redis::cmd("HSET")
                .arg(key)
                .arg(field)
                .arg(value)
                .exec_async(&mut writer)
                .await
                .expect("the row is updated");
        }
        let refused = login(&app, &owner.email, PASSWORD).await;
        if field == "until" {
            assert_eq!(refused.status, 429, "{value}");
            let wait = refused.number("retry-after");
            assert!((1..=900).contains(&wait), "{field} {value}: {wait}");
            let until: f64 = redis::cmd("HGET")
                .arg(&keys[0])
                .arg("until")
                .query_async(&mut writer)
                .await
                .expect("the counter exists");
            let now = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("now");
            assert!(
                until <= now.as_secs_f64() * 1000.0 + 901_000.0,
                "the wait ends by itself: {until}"
            );
        }
    }
}
