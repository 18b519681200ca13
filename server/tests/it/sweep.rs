//! Tests that expired rows are deleted, no matter how many there are, and even if rows of one kind cannot be deleted.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use tokio_postgres::Client;

use crate::support::app::{Account, TestApp};

const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    /// A server without background jobs.
    app: TestApp,
    account: Account,
    client: Client,
}

/// Fills a database with `many` expired idempotency keys, one or more expired rows of every other kind, and one row of
/// each kind that must be kept.
async fn world(many: i32) -> World {
    let app = TestApp::setup().without_jobs().start().await;
    let account = app.register().await;
    let plan = app.plan(&account, json!({})).await;
    let key = app.key(&account, &plan).await;
    let fresh = app.key(&account, &plan).await;
    let client = app.database.connect().await;
    // These IDs come from the server, so they are safe in SQL.
    let (tenant, user) = (&account.tenant_id, &account.user_id);
    let (key, fresh) = (&key.id, &fresh.id);
    let rows = format!(
        "INSERT INTO idempotency_keys (tenant_id, operation, key, request_hash, created_at)
             SELECT '{tenant}', 'old', n::text, '', now() - interval '2 days' FROM generate_series(1, {many}) n;
         INSERT INTO idempotency_keys (tenant_id, operation, key, request_hash)
             VALUES ('{tenant}', 'new', 'n', '');
         INSERT INTO sessions (id, user_id, tenant_id, expires_at, revoked_at)
             SELECT gen_random_uuid(), '{user}'::uuid, '{tenant}'::uuid, now() - interval '2 days', NULL::timestamptz
             FROM generate_series(1, 20)
             UNION ALL
             SELECT gen_random_uuid(), '{user}', '{tenant}', now() + interval '9 days', now() - interval '2 days'
             FROM generate_series(1, 20);
         INSERT INTO revocations (tenant_id, target_type, target_id, at)
             SELECT '{tenant}', 'api_key', gen_random_uuid(), now() - interval '2 days'
             FROM generate_series(1, 20);
         INSERT INTO revocations (tenant_id, target_type, target_id) VALUES ('{tenant}', 'api_key', '{key}');
         INSERT INTO quota_usage (tenant_id, key_id, policy, window_start, used) VALUES
             ('{tenant}', '{key}', 'monthly', now() - interval '60 days', 1),
             ('{tenant}', '{key}', 'monthly', now(), 1);
         UPDATE api_keys SET previous_key_hash = sha256(id::text::bytea),
             previous_expires_at = now() + CASE WHEN id = '{key}' THEN interval '-1 hour' ELSE interval '1 hour' END
             WHERE id IN ('{key}', '{fresh}');
         INSERT INTO billing_events (id, kind, livemode, body, received_at, due_at, outcome) VALUES
             ('handled', '', false, '', now() - interval '31 days', NULL, 'applied'),
             ('waiting', '', false, '', now() - interval '31 days', now() + interval '1 day', NULL);
         INSERT INTO billing_usage (tenant_id, start, cost, planned) VALUES
             ('{tenant}', now() - interval '401 days', 1, 1), ('{tenant}', now() - interval '402 days', 1, 0);
         INSERT INTO billing_reports (tenant_id, start, revision, until, value, state, due_at, created_at) VALUES
             ('{tenant}', now(), 0, now() + interval '1 hour', 1, 'sent', NULL, now() - interval '401 days'),
             ('{tenant}', now(), 1, now() + interval '1 hour', 1, 'pending', now(), now() - interval '401 days')"
    );
    client.batch_execute(&rows).await.expect("the rows fit");
    World {
        app,
        account,
        client,
    }
}

impl World {
    /// Returns the number of remaining expired rows of each kind.
    async fn left(&self) -> Vec<i64> {
        let row = self
            .client
            .query_one(
                "SELECT (SELECT count(*) FROM idempotency_keys WHERE operation = 'old'), \
                 (SELECT count(*) FROM sessions WHERE expires_at < now()), \
                 (SELECT count(*) FROM sessions WHERE revoked_at < now()), \
                 (SELECT count(*) FROM revocations WHERE at < now() - interval '1 day'), \
                 (SELECT count(*) FROM quota_usage WHERE window_start < now() - interval '40 days'), \
                 (SELECT count(*) FROM api_keys WHERE previous_expires_at < now()), \
                 (SELECT count(*) FROM billing_events WHERE id = 'handled'), \
                 (SELECT count(*) FROM billing_usage WHERE cost = planned), \
                 (SELECT count(*) FROM billing_reports WHERE state = 'sent')",
                &[],
            )
            .await
            .expect("a superuser sees all rows");
        (0..9).map(|i| row.get(i)).collect()
    }

    /// Asserts that the rows that must not be swept are kept: one of each kind, and the account's session.
    async fn assert_fresh_rows_are_kept(&self) {
        let row = self
            .client
            .query_one(
                "SELECT (SELECT count(*) FROM idempotency_keys WHERE operation = 'new'), \
                 (SELECT count(*) FROM sessions WHERE expires_at > now() AND revoked_at IS NULL), \
                 (SELECT least(count(*), 1) FROM revocations), \
                 (SELECT count(*) FROM quota_usage), \
                 (SELECT count(*) FROM api_keys WHERE previous_expires_at > now()), \
                 (SELECT count(*) FROM billing_events), \
                 (SELECT count(*) FROM billing_usage), \
                 (SELECT count(*) FROM billing_reports)",
                &[],
            )
            .await
            .expect("a superuser sees all rows");
        let kept = (0..8).map(|i| row.get::<_, i64>(i)).collect::<Vec<_>>();
        assert_eq!(kept, [1; 8]);
    }

    /// Starts the background jobs, with a short statement timeout.
    async fn start(&self) -> TestApp {
        TestApp::setup()
            .database(Arc::clone(&self.app.database))
            .flag("--database-statement-timeout=2s")
            .start()
            .await
    }

    async fn until(&self, expected: &[i64]) {
        let swept = async {
            while self.left().await != expected {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let swept = tokio::time::timeout(PATIENCE, swept).await;
        let left = self.left().await;
        assert!(swept.is_ok(), "left over: {left:?}, not {expected:?}");
    }
}

/// There are too many rows to delete in one statement within the timeout.
#[tokio::test(flavor = "multi_thread")]
async fn more_rows_than_one_statement_can_delete_are_deleted() {
    const MANY: i32 = 3000;
    let world = world(MANY).await;
    // Make the deletion of each row take more than a millisecond: in total, three seconds.
    world
        .client
        .batch_execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN PERFORM pg_sleep(0.001); RETURN OLD; END $$; \
             CREATE TRIGGER slow BEFORE DELETE ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION slow()",
        )
        .await
        .expect("a trigger");
    let app = world.start().await;
    world.until(&[0; 9]).await;
    world.assert_fresh_rows_are_kept().await;
    let swept = app
        .metric("quota_rows_swept_total{kind=\"idempotency_keys\"}")
        .await;
    assert!((swept - f64::from(MANY)).abs() < 0.5, "{swept}");
    let plans = app
        .get("/admin/plans")
        .bearer(&world.account.access_token)
        .send()
        .await;
    assert_eq!(plans.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn kind_that_cannot_be_deleted_does_not_hold_up_others() {
    let world = world(50).await;
    world
        .client
        .batch_execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN RAISE EXCEPTION 'not this one'; END $$; \
             CREATE TRIGGER refuse BEFORE DELETE ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        .await
        .expect("a trigger");
    // Lock an expired session in another transaction.
    let mut other = world.app.database.connect().await;
    let held = other.transaction().await.expect("a transaction");
    held.execute(
        "SELECT id FROM sessions WHERE expires_at < now() LIMIT 1 FOR UPDATE",
        &[],
    )
    .await
    .expect("a lock");
    let app = world.start().await;
    world.until(&[50, 1, 0, 0, 0, 0, 0, 0, 0]).await;
    world.assert_fresh_rows_are_kept().await;
    assert!(app.metric("quota_sweep_errors_total").await >= 1.0);
    held.rollback().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn deliveries_of_deleted_webhooks_are_deleted() {
    let world = world(1).await;
    let webhook = world.app.webhook(&world.account).await;
    let tenant = &world.account.tenant_id;
    let insert = |webhook: &str, count: i32| {
        format!(
            "INSERT INTO webhook_deliveries (tenant_id, id, webhook_id, event_id, event_type, payload, status, due_at) \
             SELECT '{tenant}', gen_random_uuid(), {webhook}, 'msg_' || n, 'webhook.test', '{{}}', 'delivered', NULL \
             FROM generate_series(1, {count}) n; \
             INSERT INTO webhook_deliveries (tenant_id, id, webhook_id, event_id, event_type, payload, due_at) \
             SELECT '{tenant}', gen_random_uuid(), {webhook}, 'waiting_' || n, 'webhook.test', '{{}}', \
                 now() + interval '1 hour' FROM generate_series(1, {count}) n;"
        )
    };
    // Insert deliveries of one webhook that exists and of two webhooks that do not. In order of their IDs, the webhook
    // that exists is between the other two.
    let rows = [
        insert("'00000000-0000-0000-0000-000000000001'", 2000),
        insert(&format!("'{webhook}'"), 3),
        insert("'ffffffff-ffff-ffff-ffff-ffffffffffff'", 2000),
    ];
    let rows = rows.concat();
    world.client.batch_execute(&rows).await.expect("rows");
    let _app = world.start().await;
    let began = std::time::Instant::now();
    loop {
        let counts = world
            .client
            .query_one(
                "SELECT count(*) FILTER (WHERE webhook_id = $1::text::uuid), count(*) FROM webhook_deliveries",
                &[&webhook],
            )
            .await
            .expect("counts");
        assert_eq!(counts.get::<_, i64>(0), 6);
        if counts.get::<_, i64>(1) == 6 {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{counts:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
