//! `/admin/api-keys`.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use quota_server::clock::{Clock as _, SystemClock, TestClock};
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
async fn key_is_returned_once_and_never_stored() {
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
async fn key_requires_a_plan_of_the_same_tenant() {
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
async fn external_id_and_metadata_are_kept_found_and_removed() {
    let app = TestApp::start().await;
    let (account, other) = (app.register().await, app.register().await);
    let plan = app.plan(&account, json!({})).await;
    let create = async |body: Value| {
        let mut all = json!({"name": "Key", "plan_id": plan});
        all.as_object_mut()
            .unwrap()
            .extend(body.as_object().unwrap().clone());
        send(&app, &account, "POST", "/admin/api-keys", all).await
    };
    let first = create(json!({
        "external_id": "crm_42%", "metadata": {"region": "eu", "note": "x=\"<ü>\""},
    }))
    .await;
    assert_eq!(first.status, 201);
    create(json!({"external_id": "crm_4"})).await;
    let bare = create(json!({"external_id": null, "metadata": null})).await;
    assert_eq!(bare.body["api_key"]["external_id"], Value::Null);
    assert_eq!(bare.body["api_key"]["metadata"], json!({}));

    let found = async |account: &Account, query: &str| {
        let path = format!("/admin/api-keys?sort=created_at&{query}");
        let list = send(&app, account, "GET", &path, Value::Null).await;
        let items = list.body["items"].as_array().unwrap().clone();
        assert_eq!(list.body["total"], json!(items.len()));
        let ids = items.iter().map(|it| it["external_id"].clone());
        ids.collect::<Vec<_>>()
    };
    assert_eq!(found(&account, "external_id=crm_4").await, ["crm_4"]);
    assert_eq!(found(&account, "external_id=crm").await.len(), 0);
    assert_eq!(found(&account, "search=crm_4").await.len(), 2);
    assert_eq!(found(&account, "search=crm_42%25").await, ["crm_42%"]);
    // Percent signs and underscores are ordinary characters, not wildcards.
    assert_eq!(found(&account, "search=crm%25").await.len(), 0);
    assert_eq!(found(&other, "external_id=crm_4").await.len(), 0);

    let path = format!(
        "/admin/api-keys/{}",
        first.body["api_key"]["id"].as_str().unwrap()
    );
    let patch = async |body| send(&app, &account, "PATCH", &path, body).await;
    let renamed = patch(json!({"name": "B"})).await;
    assert_eq!(renamed.body["metadata"]["note"], json!("x=\"<ü>\""));
    let replaced = patch(json!({"metadata": {"tier": "1"}})).await;
    assert_eq!(replaced.body["metadata"], json!({"tier": "1"}));
    assert_eq!(replaced.body["external_id"], json!("crm_42%"));
    let removed = patch(json!({"external_id": null, "metadata": {}})).await;
    assert_eq!(removed.body["external_id"], Value::Null);
    assert_eq!(removed.body["metadata"], json!({}));
    let audit = send(&app, &account, "GET", "/admin/audit?limit=1", Value::Null).await;
    assert_eq!(
        audit.body["items"][0]["before"],
        json!({"external_id": "crm_42%", "metadata": {"tier": "1"}})
    );

    for (body, field) in [
        (json!({"external_id": ""}), "external_id"),
        (json!({"external_id": "a\nb"}), "external_id"),
        (json!({"external_id": "x".repeat(201)}), "external_id"),
        (json!({"external_id": 7}), "external_id"),
        (json!({"metadata": {"a b": "c"}}), "metadata"),
        (json!({"metadata": {"a": "\u{0}"}}), "metadata"),
        (json!({"metadata": {"a": "x".repeat(101)}}), "metadata"),
        (json!({"metadata": {"a": 7}}), "metadata"),
        (json!({"metadata": []}), "metadata"),
    ] {
        let rejected = patch(body.clone()).await;
        assert_eq!(rejected.status, 422, "{body}");
        let named = rejected.body["errors"][0]["field"].as_str().unwrap();
        assert!(named.starts_with(field), "{body}: {named}");
    }
    let null = patch(json!({"metadata": null})).await;
    assert_eq!(null.status, 422, "only {{}} removes metadata");
}

#[tokio::test(flavor = "multi_thread")]
async fn list_of_keys_can_be_filtered() {
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
async fn last_used_at_is_updated_soon_after_a_request() {
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
                "use does not count as an update"
            );
            break;
        }
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "last use is unchanged"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replayed_creation_omits_the_key() {
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
async fn rotation_needs_no_body_and_rejects_a_negative_grace_period() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let key = app.key(&account, &plan).await;
    let path = format!("/admin/api-keys/{}/rotate", key.id);
    let rotated = send(&app, &account, "POST", &path, Value::Null).await;
    assert_eq!(rotated.status, 200);
    assert!(
        rotated.body["api_key"]["previous_expires_at"].is_string(),
        "the grace period defaults to a day"
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

#[tokio::test(flavor = "multi_thread")]
async fn invalid_fields_are_named_and_no_key_is_created() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let fields = |answer: &Answer| {
        let errors = answer.body["errors"].as_array().unwrap().iter();
        let fields = errors.map(|it| it["field"].as_str().unwrap().to_owned());
        fields.collect::<BTreeSet<_>>()
    };
    let both = json!({"name": " ", "plan_id": plan, "rpm_override": 0});
    let refused = app.act(&account, "POST", "/admin/api-keys", both).await;
    assert_eq!(refused.status, 422);
    assert_eq!(
        fields(&refused),
        ["name".to_owned(), "rpm_override".into()].into()
    );
    for (change, field) in [
        (json!({"name": null}), "name"),
        (json!({"name": "a\u{0}b"}), "name"),
        (json!({"name": "two\nlines"}), "name"),
        (json!({"name": "é".repeat(201)}), "name"),
        (json!({"plan_id": null}), "plan_id"),
        (json!({"rpm_override": 60_000_001}), "rpm_override"),
        (json!({"rpm_override": 1.5}), "rpm_override"),
        (json!({"expires_at": "2020-01-01T00:00:00Z"}), "expires_at"),
        (json!({"expires_at": "tomorrow"}), "expires_at"),
        (json!({"expires_at": "10000-01-01T00:00:00Z"}), "expires_at"),
        (json!({"key": "qk_mine"}), "key"),
        (json!({"is_active": false}), "is_active"),
    ] {
        let mut body = json!({"name": "Key", "plan_id": plan});
        for (name, value) in change.as_object().unwrap() {
            body[name] = value.clone();
        }
        let refused = app
            .act(&account, "POST", "/admin/api-keys", body.clone())
            .await;
        assert_eq!(
            (refused.status, fields(&refused)),
            (422, [field.to_owned()].into()),
            "{body}"
        );
    }
    let client = app.database.connect().await;
    let rows = client.query_one("SELECT count(*) FROM api_keys", &[]);
    assert_eq!(rows.await.unwrap().get::<_, i64>(0), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn patch_of_a_key_clears_null_fields_and_keeps_absent_ones() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let body = json!({
        "name": "Key", "plan_id": plan, "rpm_override": 7, "expires_at": "9999-12-31T23:59:59Z",
    });
    let made = app.act(&account, "POST", "/admin/api-keys", body).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let key = &made.body["api_key"];
    assert_eq!(
        (&key["rpm_override"], &key["expires_at"]),
        (&json!(7), &json!("9999-12-31T23:59:59.000Z"))
    );
    assert_eq!(app.echo(&made.text("key")).await.status, 200);
    let path = format!("/admin/api-keys/{}", key["id"].as_str().unwrap());
    // The last use is saved a little later. It must not change between two responses that are compared.
    loop {
        let found = app.act(&account, "GET", &path, Value::Null).await;
        if !found.body["last_used_at"].is_null() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let patch = async |body: Value| {
        let changed = app.act(&account, "PATCH", &path, body).await;
        assert_eq!(changed.status, 200, "{}", changed.body);
        changed.body
    };

    let renamed = patch(json!({"name": "  Renamed "})).await;
    assert_eq!(
        (
            &renamed["name"],
            &renamed["rpm_override"],
            &renamed["expires_at"]
        ),
        (&json!("Renamed"), &json!(7), &key["expires_at"])
    );
    let cleared = patch(json!({"rpm_override": null})).await;
    assert_eq!(
        (&cleared["rpm_override"], &cleared["expires_at"]),
        (&Value::Null, &key["expires_at"])
    );
    let cleared = patch(json!({"expires_at": null})).await;
    assert_eq!(
        (&cleared["name"], &cleared["expires_at"]),
        (&json!("Renamed"), &Value::Null)
    );
    assert_eq!(
        app.act(&account, "GET", &path, Value::Null).await.body,
        cleared
    );
    assert_eq!(
        patch(json!({})).await,
        cleared,
        "an empty body changes nothing"
    );

    // `null` for a field that cannot be cleared must not be ignored: a caller could believe that a key was deactivated
    // when it was not.
    for field in ["name", "plan_id", "is_active"] {
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
async fn name_of_a_key_round_trips() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let names = [
        "</script><script>alert(1)</script>",
        "\u{202e}مفتاح\u{2066}",
        "👩\u{200d}🚀 and ☕",
        "'; DELETE FROM api_keys; --",
        "\\ % _ \" {{7*7}} ${x}",
        &"𝕏".repeat(200),
    ];
    for name in names {
        let body = json!({"name": name, "plan_id": plan});
        let made = app.act(&account, "POST", "/admin/api-keys", body).await;
        assert_eq!(
            (made.status, &made.body["api_key"]["name"]),
            (201, &json!(name))
        );
    }
    let list = app
        .act(&account, "GET", "/admin/api-keys", Value::Null)
        .await;
    let shown = list.body["items"].as_array().unwrap().iter().rev();
    let shown = shown.map(|it| it["name"].as_str().unwrap());
    assert_eq!(shown.collect::<Vec<_>>(), names);
    let client = app.database.connect().await;
    let rows = client.query("SELECT name FROM api_keys ORDER BY id", &[]);
    let kept = rows.await.unwrap();
    assert_eq!(
        kept.iter()
            .map(|row| row.get::<_, &str>(0))
            .collect::<Vec<_>>(),
        names
    );

    let nul = app
        .act(&account, "GET", "/admin/api-keys?search=%00", Value::Null)
        .await;
    assert_eq!(
        (nul.status, &nul.body["errors"][0]["field"]),
        (422, &json!("search"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_show_every_matching_key_once_while_others_come_and_go() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let (plan, other) = (
        app.plan(&account, json!({})).await,
        app.plan(&account, json!({})).await,
    );
    let mut made = Vec::new();
    for n in 0..45 {
        made.push(app.key(&account, &plan).await.id);
        if n % 9 == 0 {
            app.key(&account, &other).await;
        }
    }
    made.reverse();
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    let mut pages = 0;
    loop {
        let path = format!("/admin/api-keys?plan_id={plan}&limit=20{cursor}");
        let page = app.act(&account, "GET", &path, Value::Null).await;
        pages += 1;
        let items = page.body["items"].as_array().unwrap();
        seen.extend(items.iter().map(|it| it["id"].as_str().unwrap().to_owned()));
        app.key(&account, &plan).await;
        let last = format!("/admin/api-keys/{}", seen.last().unwrap());
        assert_eq!(
            app.act(&account, "DELETE", &last, Value::Null).await.status,
            204
        );
        match page.body["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!((pages, seen), (3, made));
    for (query, status) in [
        ("limit=0", 422),
        ("limit=101", 422),
        ("limit=-1", 422),
        ("cursor=", 400),
        ("cursor=%00", 400),
        ("cursor=nonsense", 400),
    ] {
        let path = format!("/admin/api-keys?{query}");
        let refused = app.act(&account, "GET", &path, Value::Null).await;
        assert_eq!(refused.status, status, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_key_is_gone_with_its_usage() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({"daily_quota": 100})).await;
    let (key, other) = (
        app.key(&account, &plan).await,
        app.key(&account, &plan).await,
    );
    assert_eq!(app.echo(&key.text).await.status, 200);
    assert_eq!(app.echo(&other.text).await.status, 200);
    let path = format!("/admin/api-keys/{}", key.id);
    assert_eq!(
        app.act(&account, "DELETE", &path, Value::Null).await.status,
        204
    );
    assert_eq!(app.echo(&key.text).await.status, 401);
    for (method, path, body) in [
        ("GET", path.clone(), Value::Null),
        ("PATCH", path.clone(), json!({"name": "x"})),
        ("DELETE", path.clone(), Value::Null),
        ("POST", format!("{path}/rotate"), json!({})),
        ("GET", "/admin/api-keys/x".into(), Value::Null),
    ] {
        let gone = app.act(&account, method, &path, body).await;
        assert_eq!((gone.status, gone.problem()), (404, "not-found"), "{path}");
    }
    assert_eq!(app.echo(&other.text).await.status, 200);
    let client = app.database.connect().await;
    for table in ["api_keys", "quota_usage"] {
        let column = if table == "api_keys" { "id" } else { "key_id" };
        let sql = format!("SELECT {column}::text FROM {table}");
        let left = client.query(&sql, &[]).await.unwrap();
        let left = left.iter().map(|row| row.get::<_, &str>(0));
        assert_eq!(left.collect::<Vec<_>>(), [&other.id], "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_creations_with_one_idempotency_key_create_one_key() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let make = async |name: &str| {
        app.post("/admin/api-keys", json!({"name": name, "plan_id": plan}))
            .header("Idempotency-Key", "mobile")
            .bearer(&account.access_token)
            .send()
            .await
    };
    let answers = futures_util::future::join_all((0..8).map(|_| make("Key"))).await;
    let (mut texts, mut ids) = (0, BTreeSet::new());
    for answer in &answers {
        match answer.status {
            201 => {
                texts += usize::from(answer.body["key"].is_string());
                ids.insert(answer.body["api_key"]["id"].as_str().unwrap());
            }
            409 => {
                assert_eq!(answer.problem(), "request-in-progress");
                assert!(answer.number("retry-after") >= 1);
            }
            status => panic!("{status}: {}", answer.body),
        }
    }
    assert_eq!((texts, ids.len()), (1, 1), "one secret of one key");
    let other = make("Another").await;
    assert_eq!(
        (other.status, other.problem()),
        (422, "idempotency-mismatch")
    );
    let list = app
        .act(&account, "GET", "/admin/api-keys", Value::Null)
        .await;
    assert_eq!(list.body["total"], json!(1));
}

/// Returns the names on all pages of a list, with two keys per page.
async fn names_by(app: &TestApp, account: &Account, query: &str) -> Vec<String> {
    let (mut names, mut cursor) = (Vec::new(), String::new());
    loop {
        let path = format!("/admin/api-keys?limit=2&{query}{cursor}");
        let page = send(app, account, "GET", &path, Value::Null).await;
        assert_eq!(page.status, 200, "{}", page.text);
        let items = page.body["items"].as_array().unwrap();
        names.extend(
            items
                .iter()
                .map(|it| it["name"].as_str().unwrap().to_owned()),
        );
        match page.body["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return names,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_listed_in_every_sort_order_without_gaps_or_repeats() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let client = app.database.connect().await;
    // The list contains names that differ only in case, equal times, and keys that were never used.
    let keys = [
        ("banana", Some(20)),
        ("Apple", None),
        ("apple", Some(20)),
        ("Zebra", Some(10)),
        ("émile", None),
        ("banana", Some(30)),
        ("100%", None),
    ];
    for (name, used) in keys {
        let body = json!({"name": name, "plan_id": plan});
        let made = send(&app, &account, "POST", "/admin/api-keys", body).await;
        assert_eq!(made.status, 201, "{}", made.text);
        if let Some(used) = used {
            let set = format!(
                "UPDATE api_keys SET last_used_at = to_timestamp(1800000000.123456 + {used}) WHERE id = '{}'",
                made.body["api_key"]["id"].as_str().unwrap()
            );
            client.batch_execute(&set).await.unwrap();
        }
    }
    let made = keys.map(|(name, _)| name).to_vec();
    let by_name = [
        "100%", "Apple", "apple", "banana", "banana", "Zebra", "émile",
    ];
    let least = [
        "Apple", "émile", "100%", "Zebra", "banana", "apple", "banana",
    ];
    let turned = |names: &[&'static str]| names.iter().rev().copied().collect::<Vec<_>>();
    for (sort, names) in [
        ("created_at", made.clone()),
        ("-created_at", turned(&made)),
        ("name", by_name.to_vec()),
        ("-name", turned(&by_name)),
        ("last_used_at", least.to_vec()),
        ("-last_used_at", turned(&least)),
    ] {
        let found = names_by(&app, &account, &format!("sort={sort}")).await;
        assert_eq!(found, names, "{sort}");
    }
    assert_eq!(names_by(&app, &account, "").await, turned(&made));
    let found = names_by(&app, &account, "sort=-name&search=ban").await;
    assert_eq!(found, ["banana", "banana"], "with a filter");
}

#[tokio::test(flavor = "multi_thread")]
async fn cursor_stays_valid_when_the_last_key_of_its_page_changes() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let mut ids = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let body = json!({"name": name, "plan_id": plan});
        let made = send(&app, &account, "POST", "/admin/api-keys", body).await;
        ids.push(made.body["api_key"]["id"].as_str().unwrap().to_owned());
    }
    let page = |cursor: &str| format!("/admin/api-keys?limit=2&sort=name{cursor}");
    let first = send(&app, &account, "GET", &page(""), Value::Null).await;
    let next = first.text("next_cursor");
    // The key at the cursor is renamed, the key before it is deleted, and another key is created.
    let b = format!("/admin/api-keys/{}", ids[1]);
    send(&app, &account, "PATCH", &b, json!({"name": "z"})).await;
    let a = format!("/admin/api-keys/{}", ids[0]);
    send(&app, &account, "DELETE", &a, Value::Null).await;
    let body = json!({"name": "bb", "plan_id": plan});
    send(&app, &account, "POST", "/admin/api-keys", body).await;
    let rest = send(
        &app,
        &account,
        "GET",
        &page(&format!("&cursor={next}")),
        Value::Null,
    )
    .await;
    let names = rest.body["items"].as_array().unwrap().iter();
    let names: Vec<_> = names.map(|it| it["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["bb", "c"]);

    for (query, status, field) in [
        ("sort=price", 422, Some("sort")),
        ("sort=", 422, Some("sort")),
        ("sort=Name", 422, Some("sort")),
        (&format!("sort=-name&cursor={next}"), 400, None),
        (&format!("cursor={next}"), 400, None),
        ("sort=name&cursor=AZ", 400, None),
    ] {
        let path = format!("/admin/api-keys?{query}");
        let refused = send(&app, &account, "GET", &path, Value::Null).await;
        assert_eq!(refused.status, status, "{query}: {}", refused.text);
        if let Some(field) = field {
            assert_eq!(refused.body["errors"][0]["field"], json!(field), "{query}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_keys_can_be_filtered() {
    let clock = TestClock::at(SystemClock::new().now());
    let app = TestApp::setup()
        .clock(Arc::new(clock.clone()))
        .start()
        .await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let now = chrono::DateTime::from_timestamp_nanos(i64::try_from(clock.now().0).unwrap());
    let end = now + chrono::TimeDelta::seconds(60);
    for (name, expires_at) in [("Lasting", Value::Null), ("Short", json!(end.to_rfc3339()))] {
        let body = json!({"name": name, "plan_id": plan, "expires_at": expires_at});
        let made = send(&app, &account, "POST", "/admin/api-keys", body).await;
        assert_eq!(made.status, 201, "{}", made.body);
    }
    let names = async |is_expired: bool| {
        let path = format!("/admin/api-keys?is_active=true&is_expired={is_expired}");
        let list = send(&app, &account, "GET", &path, Value::Null).await;
        let items = list.body["items"].as_array().unwrap();
        assert_eq!(list.body["total"], json!(items.len()));
        let names = items
            .iter()
            .map(|it| it["name"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    assert_eq!(names(false).await, ["Short", "Lasting"]);
    assert!(names(true).await.is_empty());
    clock.advance(Duration::from_secs(120));
    assert_eq!(names(false).await, ["Lasting"]);
    assert_eq!(names(true).await, ["Short"]);
}

/// Each key has exactly one status, which is also the status that the console shows.
#[tokio::test(flavor = "multi_thread")]
async fn keys_can_be_filtered_by_status() {
    let clock = TestClock::at(SystemClock::new().now());
    let app = TestApp::setup()
        .clock(Arc::new(clock.clone()))
        .start()
        .await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let now = chrono::DateTime::from_timestamp_nanos(i64::try_from(clock.now().0).unwrap());
    let end = (now + chrono::TimeDelta::seconds(60)).to_rfc3339();
    for (name, expires_at, is_active) in [
        ("Lasting", Value::Null, true),
        ("Short", json!(end), true),
        ("Lasting off", Value::Null, false),
        ("Short off", json!(end), false),
    ] {
        let body = json!({"name": name, "plan_id": plan, "expires_at": expires_at});
        let created = send(&app, &account, "POST", "/admin/api-keys", body).await;
        assert_eq!(created.status, 201, "{}", created.body);
        let id = created.body["api_key"]["id"].as_str().unwrap();
        let path = format!("/admin/api-keys/{id}");
        let change = json!({"is_active": is_active});
        let changed = send(&app, &account, "PATCH", &path, change).await;
        assert_eq!(changed.status, 200, "{}", changed.body);
    }
    let names = async |query: &str| {
        let path = format!("/admin/api-keys?sort=name&{query}");
        let list = send(&app, &account, "GET", &path, Value::Null).await;
        assert_eq!(list.status, 200, "{query}: {}", list.text);
        let items = list.body["items"].as_array().unwrap();
        assert_eq!(list.body["total"], json!(items.len()), "{query}");
        let names = items
            .iter()
            .map(|it| it["name"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    let inactive = ["Lasting off", "Short off"];
    assert_eq!(names("status=active").await, ["Lasting", "Short"]);
    assert!(names("status=expired").await.is_empty());
    assert_eq!(names("status=inactive").await, inactive);
    clock.advance(Duration::from_secs(120));
    assert_eq!(names("status=active").await, ["Lasting"]);
    assert_eq!(names("status=expired").await, ["Short"]);
    assert_eq!(names("status=inactive").await, inactive);
    // With `search`, the list uses a different database query.
    assert_eq!(names("search=o&status=active").await, Vec::<String>::new());
    assert_eq!(names("search=o&status=expired").await, ["Short"]);
    assert_eq!(
        names("search=lasting&status=inactive").await,
        ["Lasting off"]
    );
    // `is_active` does not reflect expiration.
    assert_eq!(names("is_active=true").await, ["Lasting", "Short"]);
    assert_eq!(names("is_active=true&status=active").await, ["Lasting"]);
    assert!(names("is_active=false&status=active").await.is_empty());
}
