//! `/admin/audit`.

use serde_json::{Value, json};

use crate::support::app::{Account, PASSWORD, TestApp};

/// Returns the events, newest first.
async fn log(app: &TestApp, account: &Account) -> Vec<Value> {
    let log = app
        .act(account, "GET", "/admin/audit?limit=100", Value::Null)
        .await;
    assert_eq!(log.status, 200);
    log.body["items"].as_array().unwrap().clone()
}

fn actions(events: &[Value]) -> Vec<&str> {
    events
        .iter()
        .map(|it| it["action"].as_str().unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_audited_with_before_and_after() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({"name": "Starter"})).await;
    let key = app.key(&account, &plan).await;
    let (plan_path, key_path) = (
        format!("/admin/plans/{plan}"),
        format!("/admin/api-keys/{}", key.id),
    );
    let done = async |method: &str, path: &str, body: Value| {
        let answer = app.act(&account, method, path, body).await;
        assert!(answer.status < 300, "{method} {path}: {}", answer.body);
        answer
    };
    let made = done("GET", &key_path, Value::Null).await.body;
    done("PATCH", &plan_path, json!({"burst": 5})).await;
    done("PATCH", &key_path, json!({"is_active": false})).await;
    let rotated = done("POST", &format!("{key_path}/rotate"), json!({})).await;
    done("DELETE", &key_path, Value::Null).await;
    done("DELETE", &plan_path, Value::Null).await;
    let token = done("POST", "/admin/service-tokens", json!({"name": "Edge"})).await;
    let token_id = token.body["service_token"]["id"].as_str().unwrap();
    let token_path = format!("/admin/service-tokens/{token_id}");
    done("DELETE", &token_path, Value::Null).await;
    done("PATCH", "/auth/me", json!({"time_zone": "Asia/Tokyo"})).await;

    let events = log(&app, &account).await;
    assert_eq!(
        actions(&events),
        [
            "tenant.update",
            "service_token.delete",
            "service_token.create",
            "plan.delete",
            "api_key.delete",
            "api_key.rotate",
            "api_key.update",
            "plan.update",
            "api_key.create",
            "plan.create",
            "user.register",
        ]
    );
    let change = |n: usize| (&events[n]["before"], &events[n]["after"]);
    assert_eq!(
        change(0),
        (
            &json!({"time_zone": "UTC"}),
            &json!({"time_zone": "Asia/Tokyo"})
        )
    );
    assert_eq!(
        change(1),
        (&token.body["service_token"], &Value::Null),
        "a deletion records the whole resource"
    );
    assert_eq!(change(2), (&Value::Null, &token.body["service_token"]));
    assert_eq!(
        (
            &events[5]["before"]["prefix"],
            &events[5]["after"]["prefix"]
        ),
        (&json!(key.text[..11]), &json!(rotated.text("key")[..11]))
    );
    assert_eq!(
        change(6),
        (&json!({"is_active": true}), &json!({"is_active": false}))
    );
    assert_eq!(change(7), (&json!({"burst": 60}), &json!({"burst": 5})));
    assert_eq!(change(8), (&Value::Null, &made));
    for event in &events {
        assert_eq!(
            (&event["user_id"], &event["user_email"], &event["ip"]),
            (
                &json!(account.user_id),
                &json!(account.email),
                &json!("127.0.0.1")
            )
        );
    }
    let targets = events
        .iter()
        .map(|it| it["target_id"].as_str().unwrap())
        .collect::<Vec<_>>();
    assert_eq!(
        (targets[0], targets[1], targets[3], targets[4]),
        (
            account.tenant_id.as_str(),
            token_id,
            plan.as_str(),
            key.id.as_str()
        )
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn session_events_are_audited_without_secrets() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let login = json!({"email": account.email, "password": PASSWORD});
    let second = app.post("/auth/login", login.clone()).send().await;
    let third = app.post("/auth/login", login).send().await;
    let new = "seven orchards under frost";
    let out = json!({"refresh_token": second.text("refresh_token")});
    assert_eq!(app.post("/auth/logout", out).send().await.status, 204);
    let change = json!({"current_password": PASSWORD, "new_password": new});
    assert_eq!(
        app.act(&account, "POST", "/auth/password", change)
            .await
            .status,
        204
    );
    let plan = app.plan(&account, json!({})).await;
    let key = app.key(&account, &plan).await;
    let path = format!("/admin/api-keys/{}/rotate", key.id);
    let rotated = app.act(&account, "POST", &path, json!({})).await;
    let token = app.service_token(&account).await;

    let events = log(&app, &account).await;
    let known = actions(&events);
    assert_eq!(
        known[known.len() - 5..],
        [
            "user.change_password",
            "session.end",
            "session.begin",
            "session.begin",
            "user.register"
        ]
    );
    let changed = &events[known.len() - 5];
    assert_eq!(changed["after"], json!({"sessions_ended": 1}));

    let shown = serde_json::to_string(&events).unwrap();
    for secret in [
        PASSWORD,
        new,
        &account.access_token,
        &account.refresh_token[3..],
        &second.text("refresh_token")[3..],
        &third.text("access_token"),
        &key.text[11..],
        &rotated.text("key")[11..],
        &token[11..],
    ] {
        assert!(!shown.contains(secret), "the log contains a secret");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn change_of_display_name_is_audited() {
    let app = TestApp::start().await;
    let account = app.register().await;
    for name in ["Ada", " Ada King "] {
        let change = json!({"name": name});
        let changed = app.act(&account, "PATCH", "/auth/me", change).await;
        assert_eq!(changed.status, 200);
    }
    let events = log(&app, &account).await;
    assert_eq!(
        actions(&events),
        ["user.update", "user.update", "user.register"]
    );
    assert_eq!(
        (&events[0]["before"], &events[0]["after"]),
        (&json!({"name": "Ada"}), &json!({"name": "Ada King"}))
    );
    for event in &events[..2] {
        assert_eq!(
            (&event["user_id"], &event["target_id"], &event["ip"]),
            (
                &json!(account.user_id),
                &json!(account.user_id),
                &json!("127.0.0.1")
            )
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rejected_and_empty_changes_are_not_audited() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({"name": "Starter"})).await;
    let key = app.key(&account, &plan).await;
    let before = log(&app, &account).await;
    let plan_path = format!("/admin/plans/{plan}");
    let key_path = format!("/admin/api-keys/{}", key.id);
    let never = format!("/admin/plans/{}", uuid::Uuid::now_v7());
    for (method, path, body, status) in [
        (
            "POST",
            "/admin/plans",
            json!({"name": "Starter", "default_rpm": 1}),
            409,
        ),
        (
            "POST",
            "/admin/plans",
            json!({"name": "", "default_rpm": 1}),
            422,
        ),
        ("DELETE", &plan_path, Value::Null, 409),
        ("PATCH", &plan_path, json!({"burst": 0}), 422),
        ("PATCH", &plan_path, json!({}), 200),
        ("PATCH", &key_path, json!({}), 200),
        (
            "PATCH",
            &key_path,
            json!({"plan_id": uuid::Uuid::now_v7()}),
            404,
        ),
        ("PATCH", &never, json!({"burst": 1}), 404),
        ("DELETE", &never, Value::Null, 404),
        ("PATCH", "/auth/me", json!({"time_zone": "Nowhere"}), 422),
        ("GET", "/admin/api-keys", Value::Null, 200),
    ] {
        let answer = app.act(&account, method, path, body).await;
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
    }
    assert_eq!(log(&app, &account).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn replayed_request_is_audited_once() {
    let app = TestApp::start().await;
    let account = app.register().await;
    for _ in 0..3 {
        let call = app.post("/admin/plans", json!({"name": "Starter", "default_rpm": 1}));
        let call = call.header("Idempotency-Key", "once");
        assert_eq!(call.bearer(&account.access_token).send().await.status, 201);
    }
    let events = log(&app, &account).await;
    assert_eq!(actions(&events), ["plan.create", "user.register"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn audited_address_is_the_address_of_the_client() {
    let app = TestApp::setup()
        .flag("--trusted-proxies=127.0.0.1")
        .start()
        .await;
    let account = app.register().await;
    let call = app.post("/admin/plans", json!({"name": "Starter", "default_rpm": 1}));
    let made = call
        .header("X-Forwarded-For", "203.0.113.9, 2001:db8::7")
        .header("X-Real-IP", "192.0.2.1")
        .header("Forwarded", "for=192.0.2.2")
        .bearer(&account.access_token)
        .send()
        .await;
    assert_eq!(made.status, 201);
    let events = log(&app, &account).await;
    assert_eq!(events[0]["ip"], json!("2001:db8::7"));
}

#[tokio::test(flavor = "multi_thread")]
async fn tenant_reads_only_its_own_log() {
    let app = TestApp::start().await;
    let (ours, theirs) = (app.register().await, app.register().await);
    app.plan(&ours, json!({})).await;
    assert_eq!(actions(&log(&app, &theirs).await), ["user.register"]);
    assert_eq!(
        actions(&log(&app, &ours).await),
        ["plan.create", "user.register"]
    );
    assert_eq!(app.get("/admin/audit").send().await.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_show_every_event_once_while_new_ones_are_added() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let mut plans = Vec::new();
    for _ in 0..44 {
        plans.push(app.plan(&account, json!({})).await);
    }
    plans.reverse();
    plans.push(account.user_id.clone());
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let path = format!("/admin/audit?limit=20{cursor}");
        let page = app.act(&account, "GET", &path, Value::Null).await;
        let items = page.body["items"].as_array().unwrap();
        seen.extend(
            items
                .iter()
                .map(|it| it["target_id"].as_str().unwrap().to_owned()),
        );
        app.plan(&account, json!({})).await;
        match page.body["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen, plans);
    for (query, status) in [("limit=0", 422), ("limit=101", 422), ("cursor=x", 400)] {
        let path = format!("/admin/audit?{query}");
        let refused = app.act(&account, "GET", &path, Value::Null).await;
        assert_eq!(refused.status, status, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn event_keeps_the_name_of_a_deleted_resource() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({"name": "Starter"})).await;
    let key = app.key(&account, &plan).await;
    let (plan_path, key_path) = (
        format!("/admin/plans/{plan}"),
        format!("/admin/api-keys/{}", key.id),
    );
    for (method, path, body) in [
        ("PATCH", &key_path, json!({"is_active": false})),
        ("PATCH", &key_path, json!({"name": "Mobile app"})),
        ("POST", &format!("{key_path}/rotate"), json!({})),
        ("DELETE", &key_path, Value::Null),
        ("PATCH", &plan_path, json!({"burst": 5})),
        ("DELETE", &plan_path, Value::Null),
    ] {
        let answer = app.act(&account, method, path, body).await;
        assert!(answer.status < 300, "{method} {path}: {}", answer.body);
    }
    let told = log(&app, &account).await;
    let told = told.iter().map(|it| {
        (
            it["action"].as_str().unwrap(),
            it["target_name"].as_str().unwrap_or("-"),
        )
    });
    assert_eq!(
        told.collect::<Vec<_>>(),
        [
            ("plan.delete", "Starter"),
            ("plan.update", "Starter"),
            ("api_key.delete", "Mobile app"),
            ("api_key.rotate", "Mobile app"),
            ("api_key.update", "Mobile app"),
            ("api_key.update", "Key"),
            ("api_key.create", "Key"),
            ("plan.create", "Starter"),
            ("user.register", "-"),
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn log_can_be_filtered_by_action_type_and_target() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let mut plans = Vec::new();
    for _ in 0..3 {
        plans.push(app.plan(&account, json!({})).await);
    }
    let key = app.key(&account, &plans[0]).await;
    let path = format!("/admin/plans/{}", plans[0]);
    let changed = app.act(&account, "PATCH", &path, json!({"burst": 5})).await;
    assert_eq!(changed.status, 200);
    let read = async |query: &str| {
        let path = format!("/admin/audit?{query}");
        app.act(&account, "GET", &path, Value::Null).await
    };
    let made = read("action=plan.create&limit=2").await.body;
    assert_eq!(
        (
            made["total"].as_u64(),
            made["items"][0]["target_id"].as_str()
        ),
        (Some(3), Some(plans[2].as_str()))
    );
    let cursor = made["next_cursor"].as_str().unwrap();
    let rest = read(&format!("action=plan.create&limit=2&cursor={cursor}"))
        .await
        .body;
    assert_eq!(rest["items"].as_array().unwrap().len(), 1);
    assert_eq!(rest["items"][0]["target_id"], json!(plans[0]));
    let of = async |query: &str| {
        let page = read(query).await.body;
        let events = page["items"].as_array().unwrap().clone();
        assert_eq!(page["total"], json!(events.len()));
        actions(&events)
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(of("target_type=api_key").await, ["api_key.create"]);
    assert_eq!(
        of(&format!("target_id={}", plans[0])).await,
        ["plan.update", "plan.create"]
    );
    assert_eq!(
        of(&format!("target_id={}&action=plan.update", plans[0])).await,
        ["plan.update"]
    );
    assert!(
        of(&format!("target_type=plan&target_id={}", key.id))
            .await
            .is_empty()
    );
    let stranger = app.register().await;
    let theirs = format!("/admin/audit?target_id={}", plans[0]);
    let theirs = app.act(&stranger, "GET", &theirs, Value::Null).await;
    assert_eq!(theirs.body["total"], json!(0));
    for (query, field) in [
        ("action=plan.paint", "action"),
        ("target_type=plans", "target_type"),
        ("target_id=%00", "target_id"),
    ] {
        let refused = read(query).await;
        assert_eq!(refused.status, 422, "{query}: {}", refused.body);
        assert_eq!(refused.body["errors"][0]["field"], json!(field), "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_recorded_action_is_a_valid_filter() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    app.key(&account, &plan).await;
    app.service_token(&account).await;
    let login = json!({"email": account.email, "password": PASSWORD});
    assert_eq!(app.post("/auth/login", login).send().await.status, 200);
    for event in log(&app, &account).await {
        for name in ["action", "target_type"] {
            let value = event[name].as_str().unwrap();
            let path = format!("/admin/audit?{name}={value}");
            let found = app.act(&account, "GET", &path, Value::Null).await;
            assert_eq!(found.status, 200, "{path}: {}", found.body);
            assert!(
                found.body["items"].as_array().unwrap().contains(&event),
                "{path}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_filtered_by_actor_name_and_time() {
    let app = TestApp::start().await;
    let account = app.register().await;
    app.plan(&account, json!({"name": "100% Starter_1"})).await;
    app.plan(&account, json!({"name": "Pro"})).await;
    let names = async |query: &str| -> Vec<String> {
        let path = format!("/admin/audit?target_type=plan&{query}");
        let page = app.act(&account, "GET", &path, Value::Null).await;
        assert_eq!(page.status, 200, "{query}: {}", page.body);
        let items = page.body["items"].as_array().unwrap().clone();
        assert_eq!(page.body["total"], items.len(), "{query}");
        items
            .iter()
            .map(|it| it["target_name"].as_str().unwrap().to_owned())
            .collect()
    };
    let both = ["Pro", "100% Starter_1"];
    assert_eq!(names("").await, both);
    assert_eq!(names("search=starter").await, [both[1]]);
    // Wildcards are treated as ordinary characters.
    assert_eq!(names("search=0%25%20S").await, [both[1]]);
    assert_eq!(names("search=%25").await, [both[1]]);
    assert_eq!(names("search=Starter-1").await, [""; 0]);
    let events = log(&app, &account).await;
    let email = events[0]["user_email"].as_str().unwrap();
    assert_eq!(
        names(&format!("actor={}", email.to_uppercase())).await,
        both
    );
    assert_eq!(names("actor=nobody-else").await, [""; 0]);
    // `from` is inclusive and `to` is exclusive.
    let at = |name: &str| {
        let event = events.iter().find(|it| it["target_name"] == name);
        event.unwrap()["at"].as_str().unwrap().to_owned()
    };
    let (first, second) = (at(both[1]), at(both[0]));
    assert_eq!(names(&format!("from={second}")).await, [both[0]]);
    assert_eq!(names(&format!("from={first}&to={second}")).await, [both[1]]);
    assert_eq!(names(&format!("to={first}")).await, [""; 0]);
    for (query, field) in [
        (format!("from={second}&to={first}"), "to"),
        (format!("from={first}&to={first}"), "to"),
        ("from=yesterday".to_owned(), "from"),
        ("search=%00".to_owned(), "search"),
    ] {
        let path = format!("/admin/audit?{query}");
        let rejected = app.act(&account, "GET", &path, Value::Null).await;
        assert_eq!(rejected.status, 422, "{query}");
        assert_eq!(rejected.body["errors"][0]["field"], field, "{query}");
    }
}
