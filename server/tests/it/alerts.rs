//! Tests quota alerts: in each window of a quota, each threshold causes only one alert, even if several replicas check
//! the quota, and no alert is lost.

use std::time::{Duration, Instant};

use quota_server::repo::quota_standing::{self, Lateness};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    support::{
        app::{Account, Key, TestApp},
        hooks::{Hooks, Received, with_hooks},
    },
    usage,
};

struct World {
    app: TestApp,
    account: Account,
    plan: String,
    key: Key,
    service_token: String,
}

impl World {
    /// Starts a server without background jobs, so that the test decides when quotas are checked.
    async fn new(plan: Value) -> Self {
        Self::on(
            with_hooks(TestApp::setup()).without_jobs().start().await,
            plan,
        )
        .await
    }

    async fn on(app: TestApp, plan: Value) -> Self {
        let account = app.register().await;
        let mut plan = plan;
        plan["default_rpm"] = json!(60_000_000);
        let plan = app.plan(&account, plan).await;
        let key = app.key(&account, &plan).await;
        let service_token = app.service_token(&account).await;
        Self {
            app,
            account,
            plan,
            key,
            service_token,
        }
    }

    /// Sends a request with the given cost. Returns whether the request was allowed.
    async fn spend(&self, app: &TestApp, cost: u64) -> bool {
        let check = json!({"key": self.key.text, "cost": cost});
        let answer = app.post("/v1/check", check).bearer(&self.service_token);
        let answer = answer.send().await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.body["allowed"] == true
    }

    async fn check(&self) {
        self.app.ship_usage().await;
        self.app.state.alerts.check().await.expect("a check");
    }

    /// Returns the alerts, oldest first.
    async fn alerts(&self) -> Vec<Value> {
        let list = self
            .app
            .act(&self.account, "GET", "/admin/alerts?limit=100", Value::Null)
            .await;
        assert_eq!(list.status, 200, "{}", list.text);
        let mut alerts = list.body["items"].as_array().expect("items").clone();
        alerts.reverse();
        alerts
    }

    /// Returns the policy and threshold of each alert, oldest first.
    async fn reached(&self) -> Vec<(String, u64)> {
        let alerts = self.alerts().await;
        let of = |it: &Value| {
            let policy = it["policy"].as_str().expect("a policy").to_owned();
            (policy, it["threshold"].as_u64().expect("a threshold"))
        };
        alerts.iter().map(of).collect()
    }

    async fn thresholds(&self) -> Vec<u64> {
        self.reached().await.into_iter().map(|it| it.1).collect()
    }

    async fn sql(&self, statement: &str) -> u64 {
        let client = self.app.database.connect().await;
        client.execute(statement, &[]).await.expect("valid SQL")
    }

    /// Creates `count` keys, each with a daily quota of 2 that was just used up.
    async fn use_up(&self, count: usize) {
        let (tenant, plan) = (&self.account.tenant_id, &self.plan);
        self
            .sql(&format!(
                "INSERT INTO api_keys (tenant_id, id, plan_id, name, prefix, key_hash) \
                 SELECT '{tenant}', gen_random_uuid(), '{plan}', 'Key ' || n, 'qk_', sha256(n::text::bytea) \
                 FROM generate_series(1, {count}) n"
            ))
            .await;
        self
            .sql(
                "INSERT INTO quota_usage (tenant_id, key_id, policy, window_start, used, window_end, period_seconds) \
                 SELECT tenant_id, id, 'daily', date_trunc('day', now()), 2, date_trunc('day', now()) + interval '1 day', \
                     86400 FROM api_keys WHERE prefix = 'qk_'",
            )
            .await;
        let client = self.app.database.connect().await;
        let keys = client
            .query("SELECT id::text FROM api_keys WHERE prefix = 'qk_'", &[])
            .await
            .expect("keys");
        let records: Vec<_> = keys
            .iter()
            .flat_map(|row| {
                let record = usage::record(&self.account, row.get(0), plan, usage::now());
                let again = usage::record(&self.account, row.get(0), plan, usage::now());
                [record, again]
            })
            .collect();
        usage::append(&self.app, &records).await;
    }

    async fn update_plan(&self, change: Value) {
        let path = format!("/admin/plans/{}", self.plan);
        let answer = self.app.act(&self.account, "PATCH", &path, change).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_of_two_replicas_arrive_once_each_by_themselves() {
    let hooks = Hooks::start().await;
    let app = with_hooks(TestApp::setup()).start().await;
    let second = with_hooks(TestApp::setup()).database(app.database.clone());
    let second = second.start().await;
    let world = World::on(app, json!({"daily_quota": 100})).await;
    let (_, secret) = hooks.create(&world.app, &world.account, "/hook").await;
    // A replica cannot spend the tokens that the other replica holds, so a denied request is sent again.
    let mut spent = 0;
    while spent < 100 {
        let app = if spent % 2 == 0 { &world.app } else { &second };
        assert!(world.spend(app, 1).await || world.spend(&world.app, 1).await);
        spent += 1;
    }
    let began = Instant::now();
    let received = hooks.wait_for("/hook", 3).await;
    assert!(
        began.elapsed() < Duration::from_secs(50),
        "{:?}",
        began.elapsed()
    );
    assert!(!world.spend(&world.app, 1).await, "the quota is used up");
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert_eq!(hooks.received("/hook").len(), 3, "no alert is repeated");
    assert!(received.iter().all(|it| it.is_signed_with(&secret)));
    let mut events: Vec<Value> = received.iter().map(Received::json).collect();
    events.sort_by_key(|it| it["data"]["threshold"].as_u64());
    for (event, threshold) in events.iter().zip([50, 80, 100]) {
        let data = &event["data"];
        assert_eq!(event["type"], "quota.threshold_reached");
        assert_eq!(event["timestamp"], data["created_at"]);
        assert_eq!(data["threshold"], threshold);
        assert_eq!(data["policy"], "daily");
        assert_eq!(data["key_id"], world.key.id.as_str());
        assert_eq!(data["key_name"], "Key");
        assert_eq!(data["limit"], 100);
        let used = data["used"].as_u64().expect("a number");
        assert!((threshold..=100).contains(&used), "{event}");
    }
    assert_eq!(
        world.alerts().await,
        events
            .iter()
            .map(|it| it["data"].clone())
            .collect::<Vec<_>>()
    );
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_checks_of_replicas_create_each_alert_once() {
    let world = World::new(json!({"daily_quota": 10, "monthly_quota": 20})).await;
    let second = with_hooks(TestApp::setup()).database(world.app.database.clone());
    let second = second.without_jobs().start().await;
    let hooks = Hooks::start().await;
    hooks.create(&world.app, &world.account, "/hook").await;
    assert!(world.spend(&world.app, 10).await);
    world.app.ship_usage().await;
    let tenant = world.account.tenant_id.parse().expect("an id");
    let mut checks = tokio::task::JoinSet::new();
    for i in 0..16 {
        let alerts = if i % 2 == 0 { &world.app } else { &second };
        let alerts = alerts.state.alerts.clone();
        checks.spawn(async move { alerts.check_tenant(tenant).await.map(|it| it.alerts) });
    }
    let created: u64 = checks
        .join_all()
        .await
        .into_iter()
        .map(|it| it.expect("a check"))
        .sum();
    assert_eq!(created, 4);
    let mut reached = world.reached().await;
    reached.sort();
    let expected = [
        ("daily", 50),
        ("daily", 80),
        ("daily", 100),
        ("monthly", 50),
    ];
    let mut expected = expected.map(|(policy, threshold)| (policy.to_owned(), threshold));
    expected.sort();
    assert_eq!(reached, expected);
    let client = world.app.database.connect().await;
    let row = client.query_one("SELECT count(*) FROM webhook_deliveries", &[]);
    assert_eq!(row.await.expect("a row").get::<_, i64>(0), 4);
}

/// The alert is caused by the request that brings the usage to the threshold, not by an earlier one.
#[tokio::test(flavor = "multi_thread")]
async fn threshold_is_reached_with_the_request_that_uses_its_share() {
    let world = World::new(json!({"daily_quota": 1000})).await;
    for (cost, thresholds) in [
        // The ledger already includes tokens that the replica holds. Only spent tokens count toward a threshold.
        (499, &[][..]),
        (1, &[50]),
        (299, &[50]),
        (1, &[50, 80]),
        (199, &[50, 80]),
        (1, &[50, 80, 100]),
    ] {
        assert!(world.spend(&world.app, cost).await);
        world.check().await;
        assert_eq!(world.thresholds().await, thresholds, "after {cost} more");
    }
    let used: Vec<_> = world
        .alerts()
        .await
        .iter()
        .map(|it| it["used"].clone())
        .collect();
    assert_eq!(used, [500, 800, 1000]);
}

#[tokio::test(flavor = "multi_thread")]
async fn smallest_quotas_alert_when_they_are_used_up() {
    for quota in [1, 2, 3] {
        let world = World::new(json!({"monthly_quota": quota})).await;
        for _ in 0..quota - 1 {
            assert!(world.spend(&world.app, 1).await);
            world.check().await;
            assert!(!world.thresholds().await.contains(&100), "{quota}");
        }
        assert!(world.spend(&world.app, 1).await);
        world.check().await;
        assert_eq!(world.thresholds().await, [50, 80, 100], "{quota}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_are_not_repeated_by_a_restart_an_edit_or_another_time_zone() {
    let world = World::new(json!({"daily_quota": 100, "monthly_quota": 1000})).await;
    assert!(world.spend(&world.app, 85).await);
    world.check().await;
    assert_eq!(world.thresholds().await, [50, 80]);

    let change = async |change: Value| {
        world.update_plan(change).await;
        world.spend(&world.app, 1).await;
        world.check().await;
        world.thresholds().await
    };
    assert_eq!(change(json!({"daily_quota": 1000})).await, [50, 80]);
    assert_eq!(change(json!({"daily_quota": 90})).await, [50, 80]);
    assert_eq!(change(json!({"daily_quota": null})).await, [50, 80]);
    assert_eq!(change(json!({"daily_quota": 100})).await, [50, 80]);

    for zone in ["Pacific/Kiritimati", "Pacific/Pago_Pago", "UTC"] {
        let me = json!({"time_zone": zone});
        let answer = world.app.act(&world.account, "PATCH", "/auth/me", me).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert!(world.spend(&world.app, 1).await);
        world.check().await;
        assert_eq!(world.thresholds().await, [50, 80], "{zone}");
    }

    let restarted = with_hooks(TestApp::setup()).database(world.app.database.clone());
    let restarted = restarted.without_jobs().start().await;
    assert!(world.spend(&restarted, 1).await);
    restarted.ship_usage().await;
    restarted.state.alerts.check().await.expect("a check");
    // Alerts are not repeated even if the progress of the checks is lost.
    world.sql("DELETE FROM quota_alert_progress").await;
    world.check().await;
    assert_eq!(world.thresholds().await, [50, 80]);

    // Alerts are not lost either: the next threshold is still reported.
    while world.spend(&restarted, 1).await || world.spend(&world.app, 1).await {}
    restarted.ship_usage().await;
    world.check().await;
    assert_eq!(world.thresholds().await, [50, 80, 100]);
}

#[tokio::test(flavor = "multi_thread")]
async fn new_window_has_its_own_alerts() {
    let world = World::new(json!({"daily_quota": 10})).await;
    assert!(world.spend(&world.app, 5).await);
    world.check().await;
    assert_eq!(world.thresholds().await, [50]);
    // Make the alert look as if it were from yesterday.
    world
        .sql(
            "UPDATE quota_alerts SET window_start = window_start - interval '1 day', \
                 window_end = window_end - interval '1 day'",
        )
        .await;
    assert!(world.spend(&world.app, 1).await);
    world.check().await;
    assert_eq!(world.thresholds().await, [50, 50]);
}

/// Storing the deliveries fails. The effect is the same as if the server had exited in the middle of a check.
#[tokio::test(flavor = "multi_thread")]
async fn alert_is_not_lost_if_its_deliveries_cannot_be_stored() {
    let world = World::new(json!({"daily_quota": 10})).await;
    let hooks = Hooks::start().await;
    hooks.create(&world.app, &world.account, "/hook").await;
    assert!(world.spend(&world.app, 8).await);
    world.app.ship_usage().await;
    world
        .sql("ALTER TABLE webhook_deliveries ADD CONSTRAINT no_room CHECK (false) NOT VALID")
        .await;
    let round = world.app.state.alerts.check().await.expect("a round");
    assert_eq!((round.alerts, round.errors), (0, 1));
    assert_eq!(world.thresholds().await, Vec::<u64>::new());
    world
        .sql("ALTER TABLE webhook_deliveries DROP CONSTRAINT no_room")
        .await;
    let round = world.app.state.alerts.check().await.expect("a round");
    assert_eq!((round.alerts, round.deliveries, round.errors), (2, 2, 0));
    assert_eq!(world.thresholds().await, [50, 80]);
}

#[tokio::test(flavor = "multi_thread")]
async fn quota_with_tokens_that_a_crash_lost_is_used_up_when_requests_are_denied() {
    let world = World::new(json!({"daily_quota": 1000})).await;
    assert!(world.spend(&world.app, 995).await);
    world.check().await;
    assert_eq!(world.thresholds().await, [50, 80]);
    // Simulates a replica that took the last five tokens, and crashed before it spent them.
    world.sql("UPDATE quota_usage SET used = 1000").await;
    let restarted = with_hooks(TestApp::setup()).database(world.app.database.clone());
    let restarted = restarted.without_jobs().start().await;
    assert!(!world.spend(&restarted, 1).await);
    restarted.ship_usage().await;
    world.check().await;
    assert_eq!(world.thresholds().await, [50, 80, 100]);
}

#[tokio::test(flavor = "multi_thread")]
async fn alert_is_created_if_usage_is_recorded_after_its_window_has_ended() {
    let world = World::new(json!({"daily_quota": 10})).await;
    // The usage is an hour old, so it is in the second window, but not in the first window, which ended earlier.
    for (window_end, expected) in [("61 minutes", &[][..]), ("20 minutes", &[50, 80, 100])] {
        let (tenant, key) = (&world.account.tenant_id, &world.key.id);
        world
            .sql(&format!(
                "INSERT INTO quota_usage (tenant_id, key_id, policy, window_start, used, window_end, period_seconds) \
                 VALUES ('{tenant}', '{key}', 'daily', now() - interval '{window_end}' - interval '1 day', 10, \
                     now() - interval '{window_end}', 86400)"
            ))
            .await;
        let at = usage::now() - Duration::from_secs(3600);
        let records: Vec<_> = (0..10)
            .map(|_| usage::record(&world.account, key, &world.plan, at))
            .collect();
        usage::append(&world.app, &records).await;
        world.check().await;
        assert_eq!(world.thresholds().await, expected, "{window_end} ago");
        world.sql("DELETE FROM quota_usage").await;
    }
}

/// After the plan is edited, it is unknown which quota applied in a window that has ended, so late usage causes no
/// alert. Usage of one key does not cause alerts for another key.
#[tokio::test(flavor = "multi_thread")]
async fn late_usage_causes_no_alert_of_another_key_or_a_later_quota() {
    let world = World::new(json!({"daily_quota": 10})).await;
    let (tenant, key) = (&world.account.tenant_id, &world.key.id);
    let other = world.app.key(&world.account, &world.plan).await.id;
    for key in [key, &other] {
        world
            .sql(&format!(
                "INSERT INTO quota_usage (tenant_id, key_id, policy, window_start, used, window_end, period_seconds) \
                 VALUES ('{tenant}', '{key}', 'daily', now() - interval '1 day 20 minutes', 10, \
                     now() - interval '20 minutes', 86400)"
            ))
            .await;
    }
    let hour_ago = usage::now() - Duration::from_secs(3600);
    let late = |key: &str| usage::record(&world.account, key, &world.plan, hour_ago);
    let usage_of = |key: &str| (0..10).map(|_| late(key)).collect::<Vec<_>>();
    // The other key's usage was recorded and checked in time.
    usage::append(&world.app, &usage_of(&other)).await;
    world
        .sql(
            "INSERT INTO quota_alert_progress (tenant_id, seq) SELECT tenant_id, last_seq FROM usage_tenants \
             ON CONFLICT (tenant_id) DO UPDATE SET seq = excluded.seq",
        )
        .await;
    world.sql("UPDATE plans SET daily_quota = 9").await;
    usage::append(&world.app, &usage_of(key)).await;
    world.check().await;
    assert_eq!(world.thresholds().await, Vec::<u64>::new(), "after an edit");

    // Make the plan look as if it had never been edited.
    world
        .sql("ALTER TABLE plans DISABLE TRIGGER plans_touch")
        .await;
    world
        .sql("UPDATE plans SET updated_at = created_at, daily_quota = 10")
        .await;
    let timely = usage::record(&world.account, &other, &world.plan, usage::now());
    usage::append(&world.app, &[late(key), timely]).await;
    world.check().await;
    assert_eq!(world.thresholds().await, [50, 80, 100]);
    let alerts = world.alerts().await;
    assert!(
        alerts.iter().all(|it| it["key_id"] == json!(key)),
        "{alerts:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_metering_the_ledger_is_checked() {
    let setup = with_hooks(TestApp::setup()).flag("--metering=off");
    let world = World::on(
        setup.without_jobs().start().await,
        json!({"daily_quota": 10}),
    )
    .await;
    let check = async || {
        world.app.state.alerts.check().await.expect("a check");
        world.thresholds().await
    };
    assert!(world.spend(&world.app, 4).await);
    assert!(!check().await.contains(&80));
    assert!(world.spend(&world.app, 6).await);
    assert_eq!(check().await, [50, 80, 100]);
    assert_eq!(check().await, [50, 80, 100]);
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_concern_only_their_key_and_tenant() {
    let world = World::new(json!({"daily_quota": 10})).await;
    let other_key = world.app.key(&world.account, &world.plan).await;
    let stranger = world.app.register().await;
    let hooks = Hooks::start().await;
    hooks.create(&world.app, &stranger, "/stranger").await;
    hooks.create(&world.app, &world.account, "/own").await;
    assert!(world.spend(&world.app, 5).await);
    world.check().await;
    let alerts = world.alerts().await;
    assert_eq!(alerts.len(), 1);
    assert_eq!(alerts[0]["key_id"], world.key.id.as_str());
    assert_ne!(alerts[0]["key_id"], other_key.id.as_str());
    let theirs = world
        .app
        .act(&stranger, "GET", "/admin/alerts", Value::Null)
        .await;
    assert_eq!(theirs.body["total"], 0);
    let client = world.app.database.connect().await;
    let rows = client
        .query("SELECT tenant_id::text FROM webhook_deliveries", &[])
        .await
        .expect("rows");
    let tenants: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(tenants, std::slice::from_ref(&world.account.tenant_id));
}

#[tokio::test(flavor = "multi_thread")]
async fn quota_of_the_whole_tenant_has_alerts_too() {
    let setup = with_hooks(TestApp::setup()).flag("--free-requests-per-month=10");
    let world = World::on(setup.without_jobs().start().await, json!({})).await;
    let other = world.app.key(&world.account, &world.plan).await;
    assert!(world.spend(&world.app, 4).await);
    world.check().await;
    assert!(world.thresholds().await.is_empty());
    let check = json!({"key": other.text, "cost": 1});
    let answer = world
        .app
        .post("/v1/check", check)
        .bearer(&world.service_token);
    assert_eq!(answer.send().await.body["allowed"], true);
    world.check().await;
    assert_eq!(world.reached().await, [("tenant_monthly".to_owned(), 50)]);
    assert!(world.spend(&world.app, 5).await);
    world.check().await;
    assert_eq!(world.thresholds().await, [50, 80, 100]);
    let alerts = world.alerts().await;
    assert!(
        alerts
            .iter()
            .all(|it| it["key_id"].is_null() && it["limit"] == 10)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn disabled_webhook_gets_no_alerts() {
    let world = World::new(json!({"daily_quota": 10})).await;
    let hooks = Hooks::start().await;
    let (webhook, _) = hooks.create(&world.app, &world.account, "/hook").await;
    let path = format!("/admin/webhooks/{webhook}");
    let disable = json!({"is_active": false});
    world.app.act(&world.account, "PATCH", &path, disable).await;
    assert!(world.spend(&world.app, 10).await);
    world.check().await;
    assert_eq!(world.thresholds().await, [50, 80, 100]);
    let path = format!("{path}/deliveries");
    let list = world
        .app
        .act(&world.account, "GET", &path, Value::Null)
        .await;
    assert_eq!(list.body["total"], 0);
}

/// Many keys reach their quotas at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn many_alerts_of_one_tenant_are_all_created() {
    const KEYS: usize = 400;
    let world = World::new(json!({"daily_quota": 2})).await;
    let hooks = Hooks::start().await;
    hooks.create(&world.app, &world.account, "/hook").await;
    world.use_up(KEYS).await;
    world.check().await;
    let client = world.app.database.connect().await;
    let counts = client
        .query_one(
            "SELECT (SELECT count(*) FROM quota_alerts), (SELECT count(*) FROM webhook_deliveries)",
            &[],
        )
        .await
        .expect("counts");
    let expected = i64::try_from(KEYS * 3).expect("a number");
    assert_eq!((counts.get(0), counts.get(1)), (expected, expected));
}

/// The check of one tenant waits for a lock until its statement is canceled.
#[tokio::test(flavor = "multi_thread")]
async fn tenant_whose_check_fails_does_not_delay_other_tenants() {
    let setup = with_hooks(TestApp::setup()).flag("--database-lock-timeout=1s");
    let app = setup.without_jobs().start().await;
    let world = World::on(app, json!({"daily_quota": 10})).await;
    let hooks = Hooks::start().await;
    let (webhook, _) = hooks.create(&world.app, &world.account, "/hook").await;
    let mut others = Vec::new();
    for _ in 0..3 {
        let account = world.app.register().await;
        let plan = json!({"daily_quota": 10, "default_rpm": 60_000_000});
        let plan = world.app.plan(&account, plan).await;
        let key = world.app.key(&account, &plan).await;
        let token = world.app.service_token(&account).await;
        let check = json!({"key": key.text, "cost": 8});
        let answer = world.app.post("/v1/check", check).bearer(&token);
        assert_eq!(answer.send().await.body["allowed"], true);
        others.push(account);
    }
    assert!(world.spend(&world.app, 8).await);
    world.app.ship_usage().await;
    let mut client = world.app.database.connect().await;
    let locked = client.transaction().await.expect("a transaction");
    let lock = format!("SELECT FROM webhooks WHERE id = '{webhook}' FOR UPDATE");
    locked.batch_execute(&lock).await.expect("a lock");
    let round = world.app.state.alerts.check().await.expect("a round");
    assert_eq!((round.alerts, round.errors), (6, 1));
    for account in &others {
        let list = world
            .app
            .act(account, "GET", "/admin/alerts", Value::Null)
            .await;
        assert_eq!(list.body["total"], 2);
    }
    assert_eq!(world.thresholds().await, Vec::<u64>::new());
    locked.rollback().await.expect("a rollback");
    let round = world.app.state.alerts.check().await.expect("a round");
    assert_eq!((round.alerts, round.deliveries, round.errors), (2, 2, 0));
    assert_eq!(world.thresholds().await, [50, 80]);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_keys_are_checked_in_several_transactions() {
    const KEYS: usize = 700;
    let world = World::new(json!({"daily_quota": 2})).await;
    world.use_up(KEYS).await;
    let tenant = world.account.tenant_id.parse().expect("an id");
    let (mut total, mut steps) = (0, 0);
    loop {
        let step = world.app.state.alerts.check_tenant(tenant).await;
        let step = step.expect("a check");
        assert!(step.alerts <= 1000, "{step:?}");
        total += step.alerts;
        steps += 1;
        if !step.has_more {
            break;
        }
    }
    assert_eq!(total, 3 * KEYS as u64);
    assert!((2..20).contains(&steps), "{steps}");
    assert_eq!(
        world
            .app
            .state
            .alerts
            .check()
            .await
            .expect("a round")
            .alerts,
        0
    );
}

/// Reading the usage of a window is costly, so it is no longer read after the alert at 100%, which is the last one.
#[tokio::test(flavor = "multi_thread")]
async fn keys_with_an_alert_at_100_percent_are_skipped() {
    let world = World::new(json!({"daily_quota": 10, "monthly_quota": 15})).await;
    let tenant = world.account.tenant_id.parse().expect("an ID");
    let key: Uuid = world.key.id.parse().expect("an ID");
    let read = async || {
        world.app.ship_usage().await;
        let mut tx = world.app.state.db.system().await.expect("a connection");
        let read = quota_standing::of_keys(&mut tx, tenant, &[key], 50, &Lateness::default()).await;
        let mut read: Vec<_> = read
            .expect("the usage")
            .into_iter()
            .map(|it| (it.policy, it.spent))
            .collect();
        read.sort();
        read
    };
    let of = |policy: &str, spent| (policy.to_owned(), spent);
    assert!(world.spend(&world.app, 8).await);
    world.check().await;
    assert_eq!(read().await, [of("daily", 8), of("monthly", 8)]);
    assert!(world.spend(&world.app, 2).await);
    assert_eq!(read().await, [of("daily", 10), of("monthly", 10)]);
    world.check().await;
    let of_daily = world
        .reached()
        .await
        .into_iter()
        .filter(|it| it.0 == "daily");
    assert_eq!(of_daily.map(|it| it.1).collect::<Vec<_>>(), [50, 80, 100]);
    // The key's usage under its other quota is still read.
    assert_eq!(read().await, [of("monthly", 10)]);
    // Alerts of an earlier window do not count.
    world
        .sql(
            "UPDATE quota_alerts SET window_start = window_start - interval '2 days', \
                 window_end = window_end - interval '2 days' WHERE policy = 'daily'",
        )
        .await;
    assert_eq!(read().await, [of("daily", 10), of("monthly", 10)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_beyond_the_pending_deliveries_of_a_webhook_fail() {
    let world = World::new(json!({"daily_quota": 10})).await;
    let hooks = Hooks::start().await;
    let (full, _) = hooks.create(&world.app, &world.account, "/full").await;
    let (other, _) = hooks.create(&world.app, &world.account, "/other").await;
    let tenant = &world.account.tenant_id;
    world
        .sql(&format!(
            "INSERT INTO webhook_deliveries (tenant_id, id, webhook_id, event_id, event_type, payload, due_at) \
             SELECT '{tenant}', gen_random_uuid(), '{full}', 'msg_' || n, 'webhook.test', '{{}}', \
                 now() + interval '1 hour' FROM generate_series(1, 999) n"
        ))
        .await;
    assert!(world.spend(&world.app, 8).await);
    world.check().await;
    assert_eq!(world.thresholds().await, [50, 80]);
    let list = async |webhook: &str, status: &str| {
        let path = format!("/admin/webhooks/{webhook}/deliveries?status={status}");
        let list = world
            .app
            .act(&world.account, "GET", &path, Value::Null)
            .await;
        list.body
    };
    assert_eq!(list(&other, "pending").await["total"], 2);
    assert_eq!(list(&full, "pending").await["total"], 1000);
    let failed = list(&full, "failed").await;
    assert_eq!(failed["total"], 1);
    let failed = &failed["items"][0];
    assert_eq!(failed["event_type"], "quota.threshold_reached");
    let error = failed["error"].as_str().expect("an error");
    assert!(error.contains("1,000 pending deliveries"), "{error}");

    // Users of the tenant cannot add further deliveries either.
    let act =
        async |method, path: String, body| world.app.act(&world.account, method, &path, body).await;
    let test = format!("/admin/webhooks/{full}/test");
    let refused = act("POST", test.clone(), Value::Null).await;
    assert_eq!(
        (refused.status, refused.problem()),
        (429, "too-many-requests")
    );
    let id = failed["id"].as_str().expect("an id");
    let redeliver = format!("/admin/webhooks/deliveries/{id}/redeliver");
    let refused = act("POST", redeliver.clone(), Value::Null).await;
    assert_eq!(
        (refused.status, refused.problem()),
        (429, "too-many-requests")
    );
    assert!(refused.number("retry-after") >= 1);
    assert_eq!(list(&full, "failed").await["total"], 1);

    let own = format!("/admin/webhooks/{full}");
    let disabled = act("PATCH", own, json!({"is_active": false})).await;
    assert_eq!(disabled.status, 200, "{}", disabled.text);
    assert_eq!(list(&full, "pending").await["total"], 0);
    assert_eq!(act("POST", test, Value::Null).await.status, 201);
    assert_eq!(act("POST", redeliver, Value::Null).await.status, 200);
    assert_eq!(list(&full, "pending").await["total"], 2);
}
