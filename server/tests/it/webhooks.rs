//! Tests deliveries to webhooks: each delivery is signed, and is attempted until the endpoint accepts it, the attempts
//! are exhausted, or the delivery is canceled.
//!
//! To simulate the passage of time, the tests change times in the database.

use std::{sync::Arc, time::Duration};

use quota_server::{db, jobs};
use quota_testkit::proxy::Fault;
use secrecy::SecretString;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    outage::through_proxy,
    support::{
        app::{Account, Setup, TestApp},
        hooks::{Hooks, PATIENCE, Response, with_hooks},
        postgres::TestDatabase,
    },
};

struct World {
    app: TestApp,
    hooks: Hooks,
    account: Account,
}

impl World {
    async fn new() -> Self {
        Self::start(|setup| setup).await
    }

    /// Starts a server that sends nothing on its own.
    async fn without_jobs() -> Self {
        Self::start(Setup::without_jobs).await
    }

    async fn start(change: impl FnOnce(Setup) -> Setup) -> Self {
        let hooks = Hooks::start().await;
        let app = change(with_hooks(TestApp::setup())).start().await;
        let account = app.register().await;
        Self {
            app,
            hooks,
            account,
        }
    }

    async fn act(&self, method: &str, path: &str, body: Value) -> Value {
        let answer = self.app.act(&self.account, method, path, body).await;
        assert!(answer.status < 300, "{method} {path}: {}", answer.text);
        answer.body
    }

    /// Sends a test event. Returns the ID of the delivery.
    async fn test(&self, webhook: &str) -> String {
        self.app.webhook_delivery(&self.account, webhook).await
    }

    async fn delivery(&self, webhook: &str, id: &str) -> Value {
        let path = format!("/admin/webhooks/{webhook}/deliveries?limit=100");
        let list = self.act("GET", &path, Value::Null).await;
        let mut items = list["items"].as_array().expect("items").iter();
        let found = items.find(|it| it["id"] == id).cloned();
        found.expect("the delivery is listed")
    }

    /// Waits until a delivery satisfies a condition, and returns the delivery.
    async fn wait_until(
        &self,
        webhook: &str,
        delivery: &str,
        is_so: impl Fn(&Value) -> bool,
    ) -> Value {
        let began = std::time::Instant::now();
        loop {
            let shown = self.delivery(webhook, delivery).await;
            if is_so(&shown) {
                return shown;
            }
            assert!(began.elapsed() < PATIENCE, "{shown}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stores `count` deliveries that are due.
    async fn store(&self, webhook: &str, count: usize) {
        let tenant = &self.account.tenant_id;
        self.sql(&format!(
            "INSERT INTO webhook_deliveries (tenant_id, id, webhook_id, event_id, event_type, payload) \
             SELECT '{tenant}', gen_random_uuid(), '{webhook}', 'msg_' || gen_random_uuid(), 'webhook.test', '{{}}' \
             FROM generate_series(1, {count})"
        ))
        .await;
    }

    async fn webhook(&self, id: &str) -> Value {
        self.act("GET", &format!("/admin/webhooks/{id}"), Value::Null)
            .await
    }

    async fn sql(&self, statement: &str) -> u64 {
        let client = self.app.database.connect().await;
        client.execute(statement, &[]).await.expect("valid SQL")
    }

    /// Ends the pause before the next attempt.
    async fn pause_passes(&self) {
        self.sql("UPDATE webhook_deliveries SET due_at = now() WHERE status = 'pending'")
            .await;
    }
}

fn is(status: &'static str) -> impl Fn(&Value) -> bool {
    move |shown| shown["status"] == status
}

/// Returns a function that checks whether `attempts` attempts were made and the last one failed.
fn has_failed(attempts: u64) -> impl Fn(&Value) -> bool {
    move |shown| shown["attempts"] == attempts && !shown["error"].is_null()
}

#[tokio::test(flavor = "multi_thread")]
async fn delivery_is_signed_as_the_reference_implementation_expects() {
    let world = World::new().await;
    let (webhook, secret) = world
        .hooks
        .create(&world.app, &world.account, "/a?b=c")
        .await;
    let (_, other_secret) = world
        .hooks
        .create(&world.app, &world.account, "/other")
        .await;
    let delivery = world.test(&webhook).await;
    let received = world.hooks.wait_for("/a?b=c", 1).await.remove(0);
    assert!(received.is_signed_with(&secret));
    assert!(!received.is_signed_with(&other_secret));
    let mut changed = received.clone();
    changed.body = changed.body.replace("test", "text");
    assert!(!changed.is_signed_with(&secret));
    assert_eq!(received.headers["content-type"], "application/json");
    assert_eq!(received.json()["type"], "webhook.test");
    assert!(received.json()["timestamp"].is_string() && received.json()["data"].is_object());

    let shown = world.wait_until(&webhook, &delivery, is("delivered")).await;
    assert_eq!(shown["event_id"], received.id());
    assert_eq!(shown["payload"], received.json());
    assert_eq!(
        (
            &shown["attempts"],
            &shown["response_status"],
            &shown["error"]
        ),
        (&json!(1), &json!(204), &Value::Null)
    );
    assert_eq!(shown["next_attempt_at"], Value::Null);
    assert!(world.hooks.received("/other").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn rotated_secret_signs_together_with_the_previous_one_until_it_expires() {
    let world = World::new().await;
    let (webhook, first) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    let rotate = async |body: Value| {
        let path = format!("/admin/webhooks/{webhook}/rotate-secret");
        let rotated = world.act("POST", &path, body).await;
        let expires = rotated["webhook"]["previous_secret_expires_at"].clone();
        (
            rotated["secret"].as_str().expect("a secret").to_owned(),
            expires,
        )
    };
    let (second, expires) = rotate(json!({})).await;
    assert!(expires.is_string());
    world.test(&webhook).await;
    let overlap = world.hooks.wait_for("/hook", 1).await.remove(0);
    assert!(overlap.is_signed_with(&first) && overlap.is_signed_with(&second));
    assert_eq!(overlap.headers["webhook-signature"].split(' ').count(), 2);

    world
        .sql("UPDATE webhooks SET previous_secret_expires_at = now()")
        .await;
    world.test(&webhook).await;
    let later = world.hooks.wait_for("/hook", 2).await.remove(1);
    assert!(!later.is_signed_with(&first) && later.is_signed_with(&second));

    let (third, expires) = rotate(json!({"grace_seconds": 0})).await;
    assert_eq!(expires, Value::Null);
    world.test(&webhook).await;
    let last = world.hooks.wait_for("/hook", 3).await.remove(2);
    assert!(!last.is_signed_with(&second) && last.is_signed_with(&third));
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_delivery_is_repeated_until_it_is_accepted() {
    let world = World::new().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    world.hooks.respond("/hook", Response::status(500));
    let delivery = world.test(&webhook).await;
    let shown = world.wait_until(&webhook, &delivery, has_failed(1)).await;
    assert_eq!(shown["status"], "pending");
    assert_eq!(shown["response_status"], 500);
    assert_eq!(shown["error"], "The endpoint responded with status 500.");
    assert!(shown["next_attempt_at"].as_str() > shown["last_attempt_at"].as_str());
    assert!(world.webhook(&webhook).await["failing_since"].is_string());

    world.hooks.respond("/hook", Response::status(204));
    world.pause_passes().await;
    let shown = world.wait_until(&webhook, &delivery, is("delivered")).await;
    assert_eq!(
        (&shown["attempts"], &shown["error"]),
        (&json!(2), &Value::Null)
    );
    assert_eq!(world.webhook(&webhook).await["failing_since"], Value::Null);
    let received = world.hooks.received("/hook");
    assert_eq!(received.len(), 2);
    assert_eq!(received[0].id(), received[1].id());
    assert_eq!(received[0].body, received[1].body);
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoint_can_ask_for_a_later_attempt() {
    let world = World::new().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    let busy = Response {
        headers: "retry-after: 3000\r\n",
        ..Response::status(503)
    };
    world.hooks.respond("/hook", busy);
    let delivery = world.test(&webhook).await;
    world.wait_until(&webhook, &delivery, has_failed(1)).await;
    let client = world.app.database.connect().await;
    let row = client
        .query_one(
            "SELECT extract(epoch FROM due_at - last_attempt_at)::bigint FROM webhook_deliveries",
            &[],
        )
        .await
        .expect("one row");
    let pause: i64 = row.get(0);
    assert!((3000..3060).contains(&pause), "{pause}");
}

#[tokio::test(flavor = "multi_thread")]
async fn gone_endpoint_is_disabled_with_a_note() {
    let world = World::new().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/gone")
        .await;
    let (other, _) = world
        .hooks
        .create(&world.app, &world.account, "/fine")
        .await;
    world.hooks.respond("/gone", Response::status(500));
    let waiting = world.test(&webhook).await;
    world.wait_until(&webhook, &waiting, has_failed(1)).await;
    world.hooks.respond("/gone", Response::status(410));
    let delivery = world.test(&webhook).await;
    let shown = world.wait_until(&webhook, &delivery, is("failed")).await;
    assert_eq!(shown["response_status"], 410);
    let shown = world.webhook(&webhook).await;
    assert_eq!(shown["is_active"], false);
    let reason = shown["disabled_reason"].as_str().expect("a reason");
    assert!(reason.contains("410"), "{reason}");
    let waiting = world.delivery(&webhook, &waiting).await;
    assert_eq!(waiting["status"], "failed");
    assert_eq!(world.webhook(&other).await["is_active"], true);
    let audit = "/admin/audit?action=webhook.disable";
    let audit = world.act("GET", audit, Value::Null).await;
    assert_eq!(audit["total"], 1);
    assert_eq!(audit["items"][0]["target_id"], webhook.as_str());
    assert_eq!(audit["items"][0]["user_id"], Value::Null);

    // When a webhook is enabled, the reason why it was disabled is removed.
    let path = format!("/admin/webhooks/{webhook}");
    let enabled = world.act("PATCH", &path, json!({"is_active": true})).await;
    assert_eq!(
        (&enabled["is_active"], &enabled["disabled_reason"]),
        (&json!(true), &Value::Null)
    );
}

/// The user corrects the URL while an attempt to send to the previous URL is in progress.
#[tokio::test(flavor = "multi_thread")]
async fn response_of_the_previous_url_does_not_disable_a_webhook() {
    let world = World::new().await;
    for (status, old) in [(410, "/gone"), (500, "/broken")] {
        let (webhook, _) = world.hooks.create(&world.app, &world.account, old).await;
        let response = Response {
            delay: Duration::from_secs(3),
            ..Response::status(status)
        };
        world.hooks.respond(old, response);
        let first = world.test(&webhook).await;
        world.hooks.wait_for(old, 1).await;
        world.hooks.respond(
            "/slow",
            Response {
                delay: Duration::from_secs(6),
                ..Response::status(204)
            },
        );
        let url = format!("http://{}/slow", world.hooks.addr);
        let path = format!("/admin/webhooks/{webhook}");
        world.act("PATCH", &path, json!({"url": url})).await;
        // This delivery is in progress when the previous URL responds.
        let other = world.test(&webhook).await;
        let failed = world.wait_until(&webhook, &first, has_failed(1)).await;
        assert_eq!(failed["status"], "pending", "{failed}");
        let shown = world.webhook(&webhook).await;
        assert_eq!(
            (&shown["is_active"], &shown["failing_since"]),
            (&json!(true), &Value::Null),
            "{shown}"
        );
        world.wait_until(&webhook, &other, is("delivered")).await;
        world.pause_passes().await;
        world.wait_until(&webhook, &first, is("delivered")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoint_that_fails_for_days_is_disabled_but_not_one_that_fails_for_a_day() {
    let world = World::new().await;
    for (path, age, is_active) in [("/day", "1 day", true), ("/days", "4 days", false)] {
        let (webhook, _) = world.hooks.create(&world.app, &world.account, path).await;
        world.hooks.respond(path, Response::status(500));
        let delivery = world.test(&webhook).await;
        world.wait_until(&webhook, &delivery, has_failed(1)).await;
        world
            .sql(&format!(
                "UPDATE webhooks SET failing_since = now() - interval '{age}' WHERE id = '{webhook}'"
            ))
            .await;
        // Make the delivery look as if all attempts except the last had been made.
        world
            .sql(&format!(
                "UPDATE webhook_deliveries SET attempts = 9, due_at = now() WHERE id = '{delivery}'"
            ))
            .await;
        let shown = world.wait_until(&webhook, &delivery, is("failed")).await;
        assert_eq!(shown["attempts"], 10);
        assert_eq!(shown["next_attempt_at"], Value::Null);
        assert_eq!(
            world.webhook(&webhook).await["is_active"],
            is_active,
            "{path}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redelivery_has_the_same_id_and_works_whatever_the_state() {
    let world = World::new().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    let delivery = world.test(&webhook).await;
    world.wait_until(&webhook, &delivery, is("delivered")).await;
    let path = format!("/admin/webhooks/deliveries/{delivery}/redeliver");
    let again = world.act("POST", &path, Value::Null).await;
    assert_eq!(
        (&again["status"], &again["attempts"]),
        (&json!("pending"), &json!(0))
    );
    let received = world.hooks.wait_for("/hook", 2).await;
    assert_eq!(received[0].id(), received[1].id());
    world.wait_until(&webhook, &delivery, is("delivered")).await;

    // A disabled webhook can be tested, and events can be redelivered to it.
    let own = format!("/admin/webhooks/{webhook}");
    world.act("PATCH", &own, json!({"is_active": false})).await;
    world.act("POST", &path, Value::Null).await;
    world.test(&webhook).await;
    world.hooks.wait_for("/hook", 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_send_each_delivery_once() {
    const COUNT: usize = 60;
    let world = World::new().await;
    let second = with_hooks(TestApp::setup()).database(world.app.database.clone());
    let second = second.start().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    let slow = Response {
        delay: Duration::from_millis(30),
        ..Response::status(204)
    };
    world.hooks.respond("/hook", slow);
    for i in 0..COUNT {
        let app = if i % 2 == 0 { &world.app } else { &second };
        app.webhook_delivery(&world.account, &webhook).await;
    }
    world.hooks.wait_for("/hook", COUNT).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut ids: Vec<_> = world.hooks.received("/hook");
    assert_eq!(ids.len(), COUNT);
    ids.sort_by(|a, b| a.id().cmp(b.id()));
    ids.dedup_by(|a, b| a.id() == b.id());
    assert_eq!(ids.len(), COUNT);
    second.stop().await;
}

/// The replica that claimed the delivery exited before it recorded a result.
#[tokio::test(flavor = "multi_thread")]
async fn delivery_of_a_replica_that_crashed_is_repeated_after_its_lease() {
    let hooks = Hooks::start().await;
    let crashed = with_hooks(TestApp::setup()).without_jobs().start().await;
    let account = crashed.register().await;
    let (webhook, _) = hooks.create(&crashed, &account, "/hook").await;
    let delivery = crashed.webhook_delivery(&account, &webhook).await;
    let claimed = crashed
        .state
        .webhooks
        .claim(10, &[])
        .await
        .expect("a claim");
    assert_eq!(claimed.len(), 1);
    let again = crashed
        .state
        .webhooks
        .claim(10, &[])
        .await
        .expect("a claim");
    assert!(
        again.is_empty(),
        "no other worker sends the delivery during the lease"
    );

    let app = with_hooks(TestApp::setup()).database(crashed.database.clone());
    let world = World {
        app: app.start().await,
        hooks,
        account,
    };
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(world.hooks.received("/hook").is_empty());
    world.pause_passes().await;
    let shown = world.wait_until(&webhook, &delivery, is("delivered")).await;
    assert_eq!(shown["attempts"], 2);
    // The result of the first attempt arrives late, and changes nothing.
    world.hooks.respond("/hook", Response::status(500));
    let late = crashed.state.webhooks.deliver(&claimed[0]).await;
    late.expect("the result is handled");
    assert_eq!(
        world.delivery(&webhook, &delivery).await["status"],
        "delivered"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_endpoint_does_not_delay_others() {
    let world = World::new().await;
    let (slow, _) = world
        .hooks
        .create(&world.app, &world.account, "/slow")
        .await;
    let (fast, _) = world
        .hooks
        .create(&world.app, &world.account, "/fast")
        .await;
    let delay = Response {
        delay: Duration::from_secs(10),
        ..Response::status(204)
    };
    world.hooks.respond("/slow", delay);
    // Store more deliveries than there can be attempts in progress.
    world.store(&slow, 40).await;
    world.hooks.wait_for("/slow", 4).await;
    let began = std::time::Instant::now();
    world.test(&fast).await;
    world.hooks.wait_for("/fast", 1).await;
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    assert!(world.hooks.received("/slow").len() < 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn secret_is_not_stored_in_plain_and_survives_a_rotation_of_the_servers_secret() {
    const OLD: &str = "old secret with more than 32 characters";
    const NEW: &str = "new secret with more than 32 characters";
    let hooks = Hooks::start().await;
    let first = with_hooks(TestApp::setup()).flag(format!("--secret={OLD}"));
    let first = first.start().await;
    let account = first.register().await;
    let (webhook, secret) = hooks.create(&first, &account, "/hook").await;
    let kept = first.everything_kept().await;
    let text = secret.strip_prefix("whsec_").expect("the prefix");
    let hex = base64_to_hex(text);
    assert!(!kept.contains(text) && !kept.contains(&hex));
    assert!(kept.contains("/hook"), "the row itself is found");

    let database = first.database.clone();
    first.stop().await;
    let both = with_hooks(TestApp::setup())
        .flag(format!("--secret={NEW}"))
        .flag(format!("--secret-previous={OLD}"))
        .database(database.clone());
    let both = both.start().await;
    both.webhook_delivery(&account, &webhook).await;
    let received = hooks.wait_for("/hook", 1).await;
    assert!(received[0].is_signed_with(&secret));
    both.stop().await;

    let last = with_hooks(TestApp::setup()).flag(format!("--secret={NEW}"));
    let last = last.database(database.clone()).start().await;
    let login = json!({"email": account.email, "password": crate::support::app::PASSWORD});
    let login = last.post("/auth/login", login).send().await;
    let account = Account {
        access_token: login.text("access_token"),
        ..account
    };
    last.webhook_delivery(&account, &webhook).await;
    let received = hooks.wait_for("/hook", 2).await;
    assert!(received[1].is_signed_with(&secret));
    assert!(last.metric("quota_webhook_secrets_unreadable").await < 0.5);
    last.stop().await;

    // A server with another secret sends nothing, and the error says what to do.
    let stranger = with_hooks(TestApp::setup()).flag(format!("--secret={OLD}"));
    let world = World {
        app: stranger.database(database).start().await,
        hooks,
        account,
    };
    let login = json!({"email": world.account.email, "password": crate::support::app::PASSWORD});
    let login = world.app.post("/auth/login", login).send().await;
    let world = World {
        account: Account {
            access_token: login.text("access_token"),
            ..world.account
        },
        ..world
    };
    let delivery = world.test(&webhook).await;
    let shown = world.wait_until(&webhook, &delivery, has_failed(1)).await;
    assert_eq!(
        shown["error"],
        "The signing secret cannot be read. Rotate it."
    );
    assert_eq!(world.hooks.received("/hook").len(), 2);
}

/// Converts a secret from Base64 to hexadecimal, the form in which PostgreSQL shows bytes.
fn base64_to_hex(text: &str) -> String {
    use std::fmt::Write as _;

    use base64::{Engine, engine::general_purpose::STANDARD};
    let bytes = STANDARD.decode(text).expect("Base64");
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_are_not_public_are_rejected_and_not_connected_to() {
    let hooks = Hooks::start().await;
    let app = TestApp::start().await;
    let account = app.register().await;
    for (url, message) in [
        (
            format!("http://{}/", hooks.addr),
            "must start with https://",
        ),
        (
            format!("https://{}/", hooks.addr),
            "must have a public address",
        ),
        (
            "https://169.254.169.254/".into(),
            "must have a public address",
        ),
        (
            "https://u:p@example.com/".into(),
            "must not contain a user name or password",
        ),
    ] {
        let body = json!({"name": "Hook", "url": url});
        let refused = app.act(&account, "POST", "/admin/webhooks", body).await;
        assert_eq!(refused.status, 422, "{url}: {}", refused.text);
        assert_eq!(
            refused.body["errors"],
            json!([{"field": "url", "message": message}]),
            "{url}"
        );
    }
    // A host name that resolves to this machine is detected only when the delivery is sent.
    let url = format!("https://localhost:{}/", hooks.addr.port());
    let body = json!({"name": "Hook", "url": url});
    let made = app.act(&account, "POST", "/admin/webhooks", body).await;
    assert_eq!(made.status, 201, "{}", made.text);
    let webhook = made.body["webhook"]["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let world = World {
        app,
        hooks,
        account,
    };
    let delivery = world.test(&webhook).await;
    let shown = world.wait_until(&webhook, &delivery, has_failed(1)).await;
    let error = shown["error"].as_str().expect("an error");
    assert!(
        error.contains("to which webhooks may not be sent"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tests_and_redeliveries_of_a_tenant_are_limited() {
    let world = World::new().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    let delivery = world.test(&webhook).await;
    let test = format!("/admin/webhooks/{webhook}/test");
    let redeliver = format!("/admin/webhooks/deliveries/{delivery}/redeliver");
    let (mut sent, mut refused) = (1, 0);
    for n in 0..40 {
        let path = if n % 2 == 0 { &test } else { &redeliver };
        let answer = world
            .app
            .act(&world.account, "POST", path, Value::Null)
            .await;
        if answer.status == 429 {
            assert_eq!(answer.problem(), "too-many-requests");
            assert!(answer.number("retry-after") >= 1);
            refused += 1;
        } else {
            assert!(answer.status < 300, "{}", answer.text);
            sent += 1;
        }
    }
    // On a slow machine, a few more than 30 requests may be accepted.
    assert!(sent >= 30 && refused >= 1, "{sent}, {refused}");
    let stranger = world.app.register().await;
    let (webhook, _) = world.hooks.create(&world.app, &stranger, "/other").await;
    world.app.webhook_delivery(&stranger, &webhook).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tenant_with_a_large_backlog_does_not_take_all_attempts() {
    let world = World::without_jobs().await;
    let stranger = world.app.register().await;
    for n in 0..10 {
        let (webhook, _) = world
            .hooks
            .create(&world.app, &world.account, &format!("/{n}"))
            .await;
        world.store(&webhook, 100).await;
    }
    world
        .sql("UPDATE webhook_deliveries SET due_at = now() - interval '1 day'")
        .await;
    let (webhook, _) = world.hooks.create(&world.app, &stranger, "/other").await;
    for _ in 0..3 {
        world.app.webhook_delivery(&stranger, &webhook).await;
    }
    let claimed = world.app.state.webhooks.claim(32, &[]).await;
    let claimed = claimed.expect("a claim");
    let of = |account: &Account| {
        let tenant = account.tenant_id.as_str();
        let own = claimed
            .iter()
            .filter(|it| it.tenant_id.to_string() == tenant);
        own.count()
    };
    assert_eq!((of(&world.account), of(&stranger)), (8, 3));
    // The tenant's webhooks share the tenant's part of the claimed deliveries.
    let mut webhooks: Vec<_> = claimed.iter().map(|it| it.webhook_id).collect();
    webhooks.sort();
    webhooks.dedup();
    assert_eq!(webhooks.len(), 9);
}

/// Deliveries of a tenant whose earlier attempts are still in progress are claimed last, even if it is the tenant's
/// turn.
#[tokio::test(flavor = "multi_thread")]
async fn tenant_without_attempts_in_progress_is_first() {
    let world = World::without_jobs().await;
    let stranger = world.app.register().await;
    let (busy, _) = world.hooks.create(&world.app, &world.account, "/a").await;
    let (idle, _) = world.hooks.create(&world.app, &stranger, "/b").await;
    let tenant = Uuid::parse_str(&world.account.tenant_id).expect("an ID");
    let running = [(tenant, Uuid::now_v7()), (tenant, Uuid::now_v7())];
    for _ in 0..3 {
        world.app.webhook_delivery(&world.account, &busy).await;
        world.app.webhook_delivery(&stranger, &idle).await;
        let claimed = world.app.state.webhooks.claim(1, &running).await;
        let claimed = claimed.expect("a claim");
        let tenants: Vec<_> = claimed.iter().map(|it| it.tenant_id.to_string()).collect();
        assert_eq!(tenants, [stranger.tenant_id.as_str()]);
    }
}

/// Attempts count even if their results were not recorded.
#[tokio::test(flavor = "multi_thread")]
async fn delivery_is_not_attempted_more_than_ten_times() {
    let world = World::new().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    world.hooks.respond("/hook", Response::status(500));
    let delivery = world.test(&webhook).await;
    world.wait_until(&webhook, &delivery, has_failed(1)).await;
    world
        .sql("UPDATE webhook_deliveries SET attempts = 10, due_at = now()")
        .await;
    let shown = world.wait_until(&webhook, &delivery, is("failed")).await;
    assert_eq!(shown["attempts"], 10);
    assert!(shown["error"].is_string());
    assert_eq!(world.hooks.received("/hook").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn gone_endpoint_is_disabled_even_if_its_other_deliveries_cannot_be_canceled() {
    let world = World::new().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    world.hooks.respond("/hook", Response::status(500));
    let waiting = world.test(&webhook).await;
    world.wait_until(&webhook, &waiting, has_failed(1)).await;
    world
        .sql("UPDATE webhook_deliveries SET due_at = now() + interval '1 day'")
        .await;
    let mut client = world.app.database.connect().await;
    let locked = client.transaction().await.expect("a transaction");
    let lock = format!("SELECT FROM webhook_deliveries WHERE id = '{waiting}' FOR UPDATE");
    locked.batch_execute(&lock).await.expect("a lock");
    world.hooks.respond("/hook", Response::status(410));
    let delivery = world.test(&webhook).await;
    let shown = world.wait_until(&webhook, &delivery, is("failed")).await;
    assert_eq!(
        (&shown["response_status"], &shown["attempts"]),
        (&json!(410), &json!(1))
    );
    assert_eq!(world.webhook(&webhook).await["is_active"], false);
    locked.rollback().await.expect("a rollback");
    // The next attempt also cancels the delivery that was locked.
    let again = world.test(&webhook).await;
    world.wait_until(&webhook, &again, is("failed")).await;
    world.wait_until(&webhook, &waiting, is("failed")).await;
    assert_eq!(world.hooks.received("/hook").len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn webhook_is_deleted_before_its_log() {
    let world = World::new().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    let (other, _) = world
        .hooks
        .create(&world.app, &world.account, "/other")
        .await;
    let delivery = world.test(&webhook).await;
    world.wait_until(&webhook, &delivery, is("delivered")).await;
    let kept = world.test(&other).await;
    world.wait_until(&other, &kept, is("delivered")).await;
    let mut client = world.app.database.connect().await;
    let locked = client.transaction().await.expect("a transaction");
    let lock = format!("SELECT FROM webhook_deliveries WHERE id = '{delivery}' FOR UPDATE");
    locked.batch_execute(&lock).await.expect("a lock");
    let path = format!("/admin/webhooks/{webhook}");
    world.act("DELETE", &path, Value::Null).await;
    for (method, path) in [
        ("GET", format!("{path}/deliveries")),
        ("POST", format!("{path}/test")),
        (
            "POST",
            format!("/admin/webhooks/deliveries/{delivery}/redeliver"),
        ),
    ] {
        let answer = world
            .app
            .act(&world.account, method, &path, Value::Null)
            .await;
        assert_eq!(answer.status, 404, "{method} {path}: {}", answer.text);
    }
    locked.rollback().await.expect("a rollback");
}

#[tokio::test(flavor = "multi_thread")]
async fn previous_secret_that_cannot_be_read_does_not_prevent_deliveries() {
    let world = World::new().await;
    let (webhook, secret) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    world
        .sql(
            "UPDATE webhooks SET previous_secret = '\\x0102', \
                 previous_secret_expires_at = now() + interval '1 day'",
        )
        .await;
    let delivery = world.test(&webhook).await;
    world.wait_until(&webhook, &delivery, is("delivered")).await;
    let received = world.hooks.wait_for("/hook", 1).await.remove(0);
    assert!(received.is_signed_with(&secret));
}

/// An earlier version of the server may have left a backlog of this size.
#[tokio::test(flavor = "multi_thread")]
async fn webhook_with_a_large_backlog_can_be_disabled() {
    let world = World::without_jobs().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    world.store(&webhook, 2500).await;
    // Reject statements that update more than 500 rows: one statement that cancels all deliveries could take too long.
    let client = world.app.database.connect().await;
    client
        .batch_execute(
            "CREATE FUNCTION limit_rows() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN \
                     IF (SELECT count(*) FROM changed) > 500 THEN RAISE EXCEPTION 'too many rows'; END IF; \
                     RETURN NULL; \
                 END $$; \
             CREATE TRIGGER limit_rows AFTER UPDATE ON webhook_deliveries REFERENCING NEW TABLE AS changed \
                 FOR EACH STATEMENT EXECUTE FUNCTION limit_rows()",
        )
        .await
        .expect("a trigger");
    let path = format!("/admin/webhooks/{webhook}");
    world.act("PATCH", &path, json!({"is_active": false})).await;
    let list = format!("{path}/deliveries?status=");
    let failed = world
        .act("GET", &format!("{list}failed"), Value::Null)
        .await;
    assert_eq!(failed["total"], 2500);
    let pending = world
        .act("GET", &format!("{list}pending"), Value::Null)
        .await;
    assert_eq!(pending["total"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn long_lists_of_deliveries_are_not_counted_completely() {
    let world = World::without_jobs().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    world.store(&webhook, 10_005).await;
    let path = format!("/admin/webhooks/{webhook}/deliveries?limit=2");
    let list = world.act("GET", &path, Value::Null).await;
    assert_eq!(list["total"], 10_000);
    assert_eq!(list["items"].as_array().map(Vec::len), Some(2));
}

/// The cost of a claim does not depend on the backlog.
#[tokio::test(flavor = "multi_thread")]
async fn claim_reads_few_of_many_deliveries() {
    const CLAIMS: usize = 10;
    let world = World::without_jobs().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    world.store(&webhook, 20_000).await;
    world.sql("ANALYZE webhook_deliveries").await;
    let client = world.app.database.connect().await;
    let read = async || {
        let rows = "SELECT (SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE relname = 'webhook_deliveries')::bigint \
             + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname = 'webhook_deliveries')::bigint";
        let row = client.query_one(rows, &[]).await.expect("statistics");
        row.get::<_, i64>(0)
    };
    let before = read().await;
    let mut claimed = 0;
    for _ in 0..CLAIMS {
        let due = world.app.state.webhooks.claim(32, &[]).await;
        claimed += due.expect("a claim").len();
        // Wait, because PostgreSQL updates its read statistics at most once per second.
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    assert_eq!(claimed, 4 * CLAIMS);
    let began = std::time::Instant::now();
    loop {
        let rows = read().await - before;
        if rows >= 40 {
            assert!(rows < 20_000, "{rows}");
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{rows}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Otherwise, a replica that cannot reach PostgreSQL would keep reporting an outdated value.
#[tokio::test(flavor = "multi_thread")]
async fn time_overdue_is_missing_after_a_failed_measurement() {
    const METRIC: &str = "quota_webhooks_overdue_seconds";
    let migrate =
        |url: String| async move { db::migrate(&SecretString::from(url)).await.map(drop) };
    let database = Arc::new(TestDatabase::create(migrate).await);
    let (proxy, url) = through_proxy(&database).await;
    let world = World::start(|setup| setup.without_jobs().database(database).url(url)).await;
    let app = &world.app;
    let (webhook, _) = world.hooks.create(app, &world.account, "/").await;
    assert_eq!(app.metric_if_present(METRIC).await, None);
    jobs::measure_overdue(&app.state).await;
    assert_eq!(app.metric_if_present(METRIC).await, Some(0.0));

    proxy.set(Fault::Refuse);
    proxy.cut();
    jobs::measure_overdue(&app.state).await;
    assert_eq!(app.metric_if_present(METRIC).await, None);

    proxy.set(Fault::Pass);
    world.store(&webhook, 1).await;
    world
        .sql("UPDATE webhook_deliveries SET due_at = now() - interval '10 minutes'")
        .await;
    let began = std::time::Instant::now();
    let overdue = loop {
        jobs::measure_overdue(&app.state).await;
        if let Some(overdue) = app.metric_if_present(METRIC).await {
            break overdue;
        }
        assert!(began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!((600.0..700.0).contains(&overdue), "{overdue}");
}
