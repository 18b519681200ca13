//! Tests that background jobs continue after PostgreSQL has stopped responding in the middle of a transaction, for
//! example because its disk hangs. After PostgreSQL has recovered, the connections that were open when it stopped
//! responding remain silent, so the jobs have to use other connections.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use quota_server::db;
use quota_testkit::{
    proxy::{Fault, FaultProxy},
    smtp::SmtpServer,
};
use secrecy::SecretString;
use serde_json::{Value, json};

use crate::{
    mail::with_smtp,
    outage::through_proxy,
    support::{
        app::{Account, TestApp},
        hooks::{Hooks, PATIENCE, with_hooks},
        postgres::TestDatabase,
        stripe::TestStripe,
    },
};

struct World {
    app: TestApp,
    proxy: FaultProxy,
    smtp: SmtpServer,
    stripe: TestStripe,
    hooks: Hooks,
    account: Account,
}

impl World {
    async fn new() -> Self {
        let migrate =
            |url: String| async move { db::migrate(&SecretString::from(url)).await.map(drop) };
        let database = Arc::new(TestDatabase::create(migrate).await);
        let (proxy, url) = through_proxy(&database).await;
        let (smtp, stripe) = (SmtpServer::start().await, TestStripe::start().await);
        let setup = stripe.configure(with_hooks(with_smtp(TestApp::setup(), &smtp, "")));
        // A job continues after the time limit for statements plus two seconds.
        let app = setup
            .database(database)
            .url(url)
            .flag("--database-statement-timeout=5s")
            .flag("--database-lock-timeout=5s")
            .start()
            .await;
        stripe.send_to(&app);
        let account = app.register().await;
        Self {
            app,
            proxy,
            smtp,
            stripe,
            hooks: Hooks::start().await,
            account,
        }
    }

    /// Runs `begin`, waits until `count` of the server's statements are waiting for a table, and then drops all further
    /// responses on the open connections.
    async fn freeze(&self, table: &str, count: i64, begin: impl AsyncFn()) {
        let holder = self.app.database.connect().await;
        let observer = self.app.database.connect().await;
        let lock = format!("BEGIN; LOCK TABLE {table} IN EXCLUSIVE MODE");
        holder.batch_execute(&lock).await.expect("a lock");
        begin().await;
        let began = Instant::now();
        let waiting =
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = $1::text::regclass";
        let mut begun_at = Instant::now();
        loop {
            // The statements time out after five seconds, so start new ones.
            if begun_at.elapsed() > Duration::from_secs(8) {
                begin().await;
                begun_at = Instant::now();
            }
            let row = observer.query_one(waiting, &[&table]).await;
            if row.expect("a count").get::<_, i64>(0) >= count {
                break;
            }
            assert!(began.elapsed() < PATIENCE, "nothing waits for {table}");
        }
        self.proxy.set(Fault::BlackHole);
        holder.batch_execute("COMMIT").await.expect("released");
        tokio::time::sleep(Duration::from_millis(300)).await;
        self.proxy.set(Fault::Pass);
    }

    async fn spend(&self, key: &str, token: &str, cost: u64) {
        let check = json!({"key": key, "cost": cost});
        let answer = self.app.post("/v1/check", check).bearer(token).send().await;
        assert_eq!(answer.body["allowed"], true, "{}", answer.text);
    }
}

async fn until(what: &str, is_so: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < PATIENCE, "not {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_and_their_emails_continue() {
    let world = World::new().await;
    let plan = json!({"daily_quota": 10, "default_rpm": 60_000_000});
    let plan = world.app.plan(&world.account, plan).await;
    let key = world.app.key(&world.account, &plan).await.text;
    let token = world.app.service_token(&world.account).await;
    world.spend(&key, &token, 5).await;
    world.freeze("quota_alert_progress", 1, async || {}).await;
    until("an alert", async || {
        let path = "/admin/alerts";
        let alerts = world
            .app
            .act(&world.account, "GET", path, Value::Null)
            .await;
        alerts.body["total"] == 1
    })
    .await;
    until("an email", async || world.smtp.received().len() == 1).await;
    world.spend(&key, &token, 3).await;
    world.freeze("mails", 1, async || {}).await;
    until("another email", async || world.smtp.received().len() == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn webhooks_continue() {
    let world = World::new().await;
    let (webhook, _) = world
        .hooks
        .create(&world.app, &world.account, "/hook")
        .await;
    // Freeze as many deliveries as are sent concurrently.
    world
        .freeze("webhooks", 4, async || {
            let client = world.app.database.connect().await;
            let tenant = &world.account.tenant_id;
            let store = format!(
                "INSERT INTO webhook_deliveries (tenant_id, id, webhook_id, event_id, event_type, payload) \
                 SELECT '{tenant}', gen_random_uuid(), '{webhook}', 'msg_' || n, 'webhook.test', '{{}}' \
                 FROM generate_series(1, 4) n \
                 ON CONFLICT ON CONSTRAINT webhook_deliveries_once DO UPDATE SET due_at = now(), attempts = 0, \
                     status = 'pending'"
            );
            client.batch_execute(&store).await.expect("stored");
        })
        .await;
    until("delivered", async || {
        let path = format!("/admin/webhooks/{webhook}/test");
        let sent = world
            .app
            .act(&world.account, "POST", &path, Value::Null)
            .await;
        let Some(id) = sent.body["id"].as_str().map(str::to_owned) else {
            return false;
        };
        let path = format!("/admin/webhooks/{webhook}/deliveries?status=delivered");
        tokio::time::sleep(Duration::from_secs(1)).await;
        let list = world
            .app
            .act(&world.account, "GET", &path, Value::Null)
            .await;
        let items = list.body["items"].as_array().cloned().unwrap_or_default();
        items.iter().any(|it| it["id"] == id.as_str())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn billing_continues() {
    let world = World::new().await;
    let (app, account) = (&world.app, &world.account);
    let session = world.stripe.start_checkout(app, account).await;
    world.freeze("billing_events", 1, async || {}).await;
    let card = quota_fake_stripe::Card::Good;
    let paid = world.stripe.fake.pay_checkout(&session, card, false);
    paid.expect("the session is open");
    until("received", async || {
        let queued = world.stripe.fake.take_queued();
        let mut is_accepted = true;
        for (event, _) in queued {
            is_accepted &= world
                .stripe
                .deliver(&event, &quota_fake_stripe::Delivery::default())
                .await
                == 204;
        }
        is_accepted
    })
    .await;
    let client = app.database.connect().await;
    let has_access = async |access: &str| {
        let sql = "SELECT count(*) FROM billing_accounts WHERE access = $1";
        let row = client.query_one(sql, &[&access]).await;
        row.expect("a count").get::<_, i64>(0) == 1
    };
    until("active", async || has_access("active").await).await;
    // Freeze the regular read of customers.
    let canceled = world.stripe.fake.all("subscription")[0]["id"].clone();
    let path = format!("subscriptions/{}", canceled.as_str().expect("an ID"));
    let canceled = world
        .stripe
        .fake
        .request(&reqwest::Method::DELETE, &path, "");
    canceled.expect("canceled");
    world.stripe.fake.take_queued();
    world.freeze("billing_accounts", 1, async || {}).await;
    let due = "UPDATE billing_accounts SET read_due_at = now()";
    client.batch_execute(due).await.expect("valid SQL");
    until("canceled", async || has_access("canceled").await).await;
}
