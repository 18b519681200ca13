//! `POST /admin/api-keys/{key_id}/rotate`.

use std::{sync::Arc, time::Duration};

use quota_server::clock::{Clock as _, SystemClock, TestClock};
use serde_json::{Value, json};

use crate::support::app::{Account, Answer, Key, TestApp};

async fn rotate(app: &TestApp, account: &Account, id: &str, body: Value) -> Answer {
    let path = format!("/admin/api-keys/{id}/rotate");
    app.act(account, "POST", &path, body).await
}

async fn rotate_once(app: &TestApp, account: &Account, id: &str, body: Value) -> Answer {
    app.post(&format!("/admin/api-keys/{id}/rotate"), body)
        .header("Idempotency-Key", "rotation")
        .bearer(&account.access_token)
        .send()
        .await
}

async fn new_key(app: &TestApp) -> (Account, Key) {
    let account = app.register().await;
    let plan = app.plan(&account, json!({"default_rpm": 6000})).await;
    let key = app.key(&account, &plan).await;
    (account, key)
}

/// Returns the number of rotations in the audit log.
async fn rotations(app: &TestApp, account: &Account) -> Value {
    let path = "/admin/audit?action=api_key.rotate";
    let audit = app.act(account, "GET", path, Value::Null).await;
    audit.body["total"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_rotations_keep_the_old_key_within_its_grace_period() {
    let one = TestApp::start().await;
    let other = TestApp::setup()
        .database(one.database.clone())
        .start()
        .await;
    for _ in 0..5 {
        let (account, key) = new_key(&one).await;
        assert_eq!(one.echo(&key.text).await.status, 200);
        let (first, second) = tokio::join!(
            rotate(&one, &account, &key.id, json!({})),
            rotate(&other, &account, &key.id, json!({})),
        );
        let (won, lost) = if first.status == 200 {
            (first, second)
        } else {
            (second, first)
        };
        assert_eq!((won.status, lost.status), (200, 409), "{}", lost.text);
        assert_eq!(lost.problem(), "previous-key-active");
        for app in [&one, &other] {
            assert_eq!(app.echo(&key.text).await.status, 200, "the old key works");
            assert_eq!(app.echo(&won.text("key")).await.status, 200);
        }
        assert_eq!(rotations(&one, &account).await, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rotation_within_a_grace_period_must_confirm_that_the_previous_key_is_revoked() {
    let clock = TestClock::at(SystemClock::new().now());
    let app = TestApp::setup()
        .clock(Arc::new(clock.clone()))
        .start()
        .await;
    let (account, first) = new_key(&app).await;
    let rotated = rotate(&app, &account, &first.id, json!({"grace_seconds": 300})).await;
    assert_eq!(rotated.status, 200, "{}", rotated.text);
    let second = rotated.text("key");
    let until = rotated.body["api_key"]["previous_expires_at"]
        .as_str()
        .unwrap();

    for body in [
        json!({}),
        json!({"grace_seconds": 0}),
        json!({"replace_previous": false}),
        json!({"replace_previous": null}),
        Value::Null,
    ] {
        let rejected = rotate(&app, &account, &first.id, body.clone()).await;
        assert_eq!(
            (rejected.status, rejected.problem()),
            (409, "previous-key-active"),
            "{body}"
        );
        assert!(
            rejected.text("detail").contains(until),
            "{}: not {until}",
            rejected.text
        );
        assert_eq!(
            rejected.body["errors"][0]["field"],
            json!("replace_previous")
        );
    }
    for key in [&first.text, &second] {
        assert_eq!(app.echo(key).await.status, 200, "nothing has changed");
    }
    assert_eq!(rotations(&app, &account).await, 1);

    let body = json!({"replace_previous": true, "grace_seconds": 300});
    let replaced = rotate(&app, &account, &first.id, body).await;
    assert_eq!(replaced.status, 200, "{}", replaced.text);
    let third = replaced.text("key");
    assert_eq!(
        app.echo(&first.text).await.status,
        401,
        "the first key was revoked"
    );
    for key in [&second, &third] {
        assert_eq!(app.echo(key).await.status, 200);
    }

    // Once the grace period is over, no confirmation is needed.
    clock.advance(Duration::from_secs(301));
    let rotated = rotate(&app, &account, &first.id, json!({"grace_seconds": 300})).await;
    assert_eq!(rotated.status, 200, "{}", rotated.text);
    assert_eq!(app.echo(&third).await.status, 200);

    let invalid = rotate(&app, &account, &first.id, json!({"replace_previous": 1})).await;
    assert_eq!(
        (invalid.status, &invalid.body["errors"][0]["field"]),
        (422, &json!("replace_previous"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn rejected_rotation_names_the_expiry_of_a_key_that_ends_before_the_grace_period() {
    let clock = TestClock::at(SystemClock::new().now());
    let app = TestApp::setup()
        .clock(Arc::new(clock.clone()))
        .start()
        .await;
    let (account, key) = new_key(&app).await;
    let rotated = rotate(&app, &account, &key.id, json!({"grace_seconds": 300})).await;
    assert_eq!(rotated.status, 200, "{}", rotated.text);
    let end = i64::try_from(clock.now().secs()).unwrap() + 60;
    let end = chrono::DateTime::from_timestamp(end, 0).unwrap();
    let path = format!("/admin/api-keys/{}", key.id);
    let change = json!({"expires_at": end.to_rfc3339()});
    let changed = app.act(&account, "PATCH", &path, change).await;
    assert_eq!(changed.status, 200, "{}", changed.text);
    let rejected = rotate(&app, &account, &key.id, json!({})).await;
    assert_eq!(rejected.status, 409);
    let end = changed.body["expires_at"].as_str().unwrap();
    assert!(rejected.text("detail").contains(end), "{}", rejected.text);

    // An expired key has no previous secret that works.
    clock.advance(Duration::from_secs(61));
    let rotated = rotate(&app, &account, &key.id, json!({})).await;
    assert_eq!(rotated.status, 200, "{}", rotated.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn replayed_rotation_omits_the_key_and_rotates_nothing() {
    let app = TestApp::start().await;
    let (account, key) = new_key(&app).await;
    let body = || json!({"grace_seconds": 300});
    let first = rotate_once(&app, &account, &key.id, body()).await;
    let again = rotate_once(&app, &account, &key.id, body()).await;
    assert_eq!((first.status, again.status), (200, 200), "{}", again.text);
    assert_eq!(again.body, json!({"api_key": first.body["api_key"]}));
    for secret in [&key.text, &first.text("key")] {
        assert_eq!(app.echo(secret).await.status, 200);
    }
    assert_eq!(rotations(&app, &account).await, 1);
    assert!(
        !app.everything_kept().await.contains(&first.text("key")),
        "the secret is not stored"
    );

    // A different body, or the same body for a different key, is a different request.
    let other = app
        .key(&account, first.body["api_key"]["plan_id"].as_str().unwrap())
        .await;
    for (id, body) in [(&key.id, json!({"grace_seconds": 60})), (&other.id, body())] {
        let mismatch = rotate_once(&app, &account, id, body).await;
        assert_eq!(
            (mismatch.status, mismatch.problem()),
            (422, "idempotency-mismatch")
        );
    }
    assert_eq!(rotations(&app, &account).await, 1);
    assert_eq!(app.echo(&other.text).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_rotations_with_one_idempotency_key_return_one_secret() {
    let one = TestApp::start().await;
    let other = TestApp::setup()
        .database(one.database.clone())
        .start()
        .await;
    let (account, key) = new_key(&one).await;
    let all = (0..8).map(|n| {
        let app = if n % 2 == 0 { &one } else { &other };
        rotate_once(app, &account, &key.id, json!({}))
    });
    let mut secrets = Vec::new();
    for answer in futures_util::future::join_all(all).await {
        match answer.status {
            200 => secrets.extend(answer.body["key"].as_str().map(str::to_owned)),
            409 => assert_eq!(answer.problem(), "request-in-progress"),
            status => panic!("{status}: {}", answer.text),
        }
    }
    assert_eq!(secrets.len(), 1);
    for secret in [&key.text, &secrets[0]] {
        assert_eq!(one.echo(secret).await.status, 200);
    }
    assert_eq!(rotations(&one, &account).await, 1);
}
