//! `/admin/webhooks` and `/admin/alert-settings`.

use serde_json::{Value, json};

use crate::support::app::{Account, Answer, TestApp};

const PATH: &str = "/admin/webhooks";
const URL: &str = "https://hooks.example.com/quota";

async fn create(app: &TestApp, account: &Account, name: &str, key: &str) -> Answer {
    app.post(PATH, json!({"name": name, "url": URL}))
        .header("Idempotency-Key", key)
        .bearer(&account.access_token)
        .send()
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn webhook_is_created_once_and_its_secret_returned_once() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let first = create(&app, &account, " Alerts ", "once").await;
    assert_eq!(first.status, 201, "{}", first.text);
    let secret = first.text("secret");
    assert_eq!((secret.len(), &secret[..6]), (50, "whsec_"));
    let webhook = first.body["webhook"].clone();
    assert_eq!(
        (&webhook["name"], &webhook["url"], &webhook["is_active"]),
        (&json!("Alerts"), &json!(URL), &json!(true))
    );
    let again = create(&app, &account, " Alerts ", "once").await;
    assert_eq!((again.status, &again.body["webhook"]), (201, &webhook));
    assert_eq!(again.body["secret"], Value::Null);
    let other = create(&app, &account, "Other", "once").await;
    assert_eq!(other.status, 422);

    let list = app.act(&account, "GET", PATH, Value::Null).await;
    assert_eq!(
        (&list.body["total"], &list.body["items"][0]),
        (&json!(1), &webhook)
    );
    let own = format!("{PATH}/{}", webhook["id"].as_str().expect("an id"));
    let shown = app.act(&account, "GET", &own, Value::Null).await;
    assert_eq!(shown.body, webhook);
    for text in [&list.text, &shown.text, &app.everything_kept().await] {
        assert!(!text.contains(&secret[6..]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rotation_is_done_once_per_idempotency_key() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let id = app.webhook(&account).await;
    let rotate = async |key: &str, body: Value| {
        app.post(&format!("{PATH}/{id}/rotate-secret"), body)
            .header("Idempotency-Key", key)
            .bearer(&account.access_token)
            .send()
            .await
    };
    let first = rotate("once", json!({"grace_seconds": 60})).await;
    assert_eq!(first.status, 200, "{}", first.text);
    let again = rotate("once", json!({"grace_seconds": 60})).await;
    assert_eq!(again.body["webhook"], first.body["webhook"]);
    assert!(first.body["secret"].is_string() && again.body["secret"].is_null());
    let more = rotate("twice", json!({})).await;
    assert_ne!(more.text("secret"), first.text("secret"));
    let audit = "/admin/audit?action=webhook.rotate_secret";
    let audit = app.act(&account, "GET", audit, Value::Null).await;
    assert_eq!(audit.body["total"], 2);
    assert!(!audit.text.contains("whsec_"), "{}", audit.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_audited() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let created = create(&app, &account, "Alerts", "a").await;
    let id = created.body["webhook"]["id"].as_str().expect("an id");
    let own = format!("{PATH}/{id}");
    let change = json!({"name": "Renamed", "is_active": false});
    let changed = app.act(&account, "PATCH", &own, change).await;
    assert_eq!(changed.status, 200, "{}", changed.text);
    let unchanged = app.act(&account, "PATCH", &own, json!({})).await;
    assert_eq!(unchanged.body, changed.body);
    assert_eq!(
        app.act(&account, "DELETE", &own, Value::Null).await.status,
        204
    );
    assert_eq!(
        app.act(&account, "GET", &own, Value::Null).await.status,
        404
    );
    let audit = format!("/admin/audit?target_type=webhook&target_id={id}");
    let audit = app.act(&account, "GET", &audit, Value::Null).await;
    let events = audit.body["items"].as_array().expect("events");
    let actions: Vec<_> = events.iter().map(|it| it["action"].as_str()).collect();
    assert_eq!(
        actions,
        ["webhook.delete", "webhook.update", "webhook.create"].map(Some)
    );
    assert_eq!(
        events[1]["before"],
        json!({"name": "Alerts", "is_active": true})
    );
    assert_eq!(
        events[1]["after"],
        json!({"name": "Renamed", "is_active": false})
    );
    assert_eq!(events[0]["user_email"], account.email.as_str());
}

#[tokio::test(flavor = "multi_thread")]
async fn number_of_webhooks_is_limited() {
    let app = TestApp::setup().flag("--max-webhooks=2").without_jobs();
    let app = app.start().await;
    let account = app.register().await;
    for n in 1..=2 {
        assert_eq!(
            create(&app, &account, "Hook", &n.to_string()).await.status,
            201
        );
    }
    let refused = create(&app, &account, "Hook", "3").await;
    assert_eq!((refused.status, refused.problem()), (403, "limit-reached"));
    assert!(
        refused.text("detail").contains("2 webhooks"),
        "{}",
        refused.text
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn disabling_ends_pending_deliveries_and_deliveries_are_listed_by_status() {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let id = app.webhook(&account).await;
    for _ in 0..3 {
        app.webhook_delivery(&account, &id).await;
    }
    let own = format!("{PATH}/{id}");
    let list = async |query: &str| {
        let path = format!("{own}/deliveries{query}");
        let list = app.act(&account, "GET", &path, Value::Null).await;
        assert_eq!(list.status, 200, "{}", list.text);
        list
    };
    assert_eq!(list("?status=pending").await.body["total"], 3);
    assert_eq!(list("?status=failed").await.body["total"], 0);
    let first = list("?limit=2").await;
    let cursor = first.text("next_cursor");
    let rest = list(&format!("?limit=2&cursor={cursor}")).await;
    assert_eq!(rest.body["items"].as_array().expect("items").len(), 1);
    assert_eq!(rest.body["next_cursor"], Value::Null);

    app.act(&account, "PATCH", &own, json!({"is_active": false}))
        .await;
    let failed = list("?status=failed").await;
    assert_eq!(failed.body["total"], 3);
    assert_eq!(
        failed.body["items"][0]["error"],
        "The webhook was disabled."
    );
    assert_eq!(failed.body["items"][0]["next_attempt_at"], Value::Null);
    let bad = format!("{own}/deliveries?status=lost");
    let bad = app.act(&account, "GET", &bad, Value::Null).await;
    assert_eq!(bad.status, 422);
}

#[tokio::test(flavor = "multi_thread")]
async fn alert_settings_are_kept_and_audited() {
    const SETTINGS: &str = "/admin/alert-settings";
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let shown = app.act(&account, "GET", SETTINGS, Value::Null).await;
    let default = json!({"email": true, "email_roles": ["owner", "admin"], "can_email": false});
    assert_eq!(shown.body, default);
    let change = json!({"email_roles": ["viewer", "owner", "viewer"]});
    let changed = app.act(&account, "PATCH", SETTINGS, change).await;
    let expected = json!({"email": true, "email_roles": ["owner", "viewer"], "can_email": false});
    assert_eq!((changed.status, &changed.body), (200, &expected));
    let off = app
        .act(&account, "PATCH", SETTINGS, json!({"email": false}))
        .await;
    let expected = json!({"email": false, "email_roles": ["owner", "viewer"], "can_email": false});
    assert_eq!(off.body, expected);
    assert_eq!(
        app.act(&account, "GET", SETTINGS, Value::Null).await.body,
        expected
    );
    let wrong = json!({"email_roles": ["boss"]});
    let wrong = app.act(&account, "PATCH", SETTINGS, wrong).await;
    assert_eq!(wrong.status, 422, "{}", wrong.text);
    let audit = "/admin/audit?action=tenant.update_alerts";
    let audit = app.act(&account, "GET", audit, Value::Null).await;
    assert_eq!(audit.body["total"], 2);
    assert_eq!(audit.body["items"][0]["before"], json!({"email": true}));
    assert_eq!(audit.body["items"][0]["after"], json!({"email": false}));
    let other = app.register().await;
    assert_eq!(
        app.act(&other, "GET", SETTINGS, Value::Null).await.body,
        default
    );
}
