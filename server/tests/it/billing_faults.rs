//! Tests subscriptions and charges while Stripe fails, and while background work is stopped at random moments.
//!
//! Requests of every kind to Stripe fail in random ways, before or after they take effect. The oracle is the state of
//! the fake Stripe: the customers, subscriptions, paid invoices and usage of each tenant.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::{DateTime, DurationRound as _, TimeDelta, Utc};
use parking_lot::Mutex;
use quota_common::TenantId;
use quota_fake_stripe::{Card, Delivery, Fault, SECRET_KEY};
use quota_server::{
    billing::{Billing, Buyer},
    repo::usage_batch::UsageRecord,
};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    billing_usage::seeds,
    support::{
        app::{Account, TestApp},
        quota::{Quota, data_dir},
        stripe::TestStripe,
    },
    usage,
};

const AT_MOST: Duration = Duration::from_secs(60);
/// How long a tenant's subscription has existed when the tenant's usage is reported.
const AGO: Duration = Duration::from_hours(10 * 24);

/// The kinds of requests that failed, and how often.
type Failed = Arc<Mutex<BTreeMap<String, u32>>>;

struct World {
    stripe: TestStripe,
    /// A server without background jobs: the test decides which jobs run.
    app: TestApp,
    failed: Failed,
}

/// A tenant with a plan marked `paid`.
struct Customer {
    account: Account,
    plan: String,
    /// The tenant's total usage.
    used: i64,
}

/// Returns the kind of a request: its method, and its path without IDs.
fn kind(method: &str, path: &str) -> String {
    let is_id = |part: &str| part.contains("_fake") || part.contains("_unknown");
    let parts: Vec<&str> = path
        .trim_start_matches("/v1/")
        .split('/')
        .map(|part| if is_id(part) { "…" } else { part })
        .collect();
    format!("{method} {}", parts.join("/"))
}

impl World {
    async fn new() -> Self {
        let stripe = TestStripe::start().await;
        let app = stripe
            .configure(TestApp::setup())
            .without_jobs()
            .start()
            .await;
        stripe.send_to(&app);
        Self {
            stripe,
            app,
            failed: Failed::default(),
        }
    }

    fn billing(&self) -> &Billing {
        self.app.state.billing.as_ref().expect("billing is on")
    }

    /// Makes `percent` percent of all requests fail, and also the first request of each kind.
    fn fail(&self, seed: u64, percent: u8) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let faults = Fault::all(Duration::from_millis(3));
        let failed = self.failed.clone();
        self.stripe.fake.choose_faults(move |method, path| {
            let mut failed = failed.lock();
            let failed = failed.entry(kind(method, path)).or_default();
            if *failed > 0 && rng.u8(..100) >= percent {
                return None;
            }
            *failed += 1;
            rng.choice(&faults).copied()
        });
    }

    fn has_failed(&self, kind: &str) -> bool {
        self.failed.lock().contains_key(kind)
    }

    async fn customer(&self) -> Customer {
        let account = self.app.register().await;
        let plan = self.app.plan(&account, json!({"billing": "paid"})).await;
        Customer {
            account,
            plan,
            used: 0,
        }
    }

    async fn sql(&self, statement: &str) -> u64 {
        let client = self.app.database.connect().await;
        client.execute(statement, &[]).await.expect("valid SQL")
    }

    async fn count(&self, query: &str) -> i64 {
        let client = self.app.database.connect().await;
        client.query_one(query, &[]).await.expect("a count").get(0)
    }

    /// Makes all retries due, and lets all claims expire.
    async fn time_passes(&self) {
        for statement in [
            "UPDATE billing_events SET due_at = now() WHERE outcome IS NULL",
            "UPDATE billing_accounts SET read_due_at = now()",
            "UPDATE billing_senders SET until = now()",
            "UPDATE billing_reports SET due_at = now() WHERE state = 'pending'",
        ] {
            self.sql(statement).await;
        }
    }

    /// Appends random usage in hours that have ended.
    async fn spend(&self, customer: &mut Customer, rng: &mut fastrand::Rng) {
        for _ in 0..rng.u8(1..4) {
            let cost = rng.i64(1..1000);
            let at = hour(rng.i64(3..80)) + TimeDelta::minutes(rng.i64(0..60));
            let key = Uuid::now_v7().to_string();
            let record = UsageRecord {
                billing: "paid",
                cost,
                ..usage::record(&customer.account, &key, &customer.plan, at)
            };
            usage::append(&self.app, &[record]).await;
            customer.used += cost;
        }
    }

    /// Delivers all events in random order, some of them twice, to the server that the endpoint's URL refers to.
    async fn deliver(&self, rng: &mut fastrand::Rng) {
        let mut events = self.stripe.fake.take_queued();
        let twice: Vec<_> = events.iter().filter(|_| rng.bool()).cloned().collect();
        events.extend(twice);
        rng.shuffle(&mut events);
        for (event, _) in events {
            // Stripe repeats a delivery that was not accepted.
            let began = Instant::now();
            while self.stripe.deliver(&event, &Delivery::default()).await != 204 {
                assert!(began.elapsed() < AT_MOST, "not accepted");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Asserts that the tenant has one customer with one subscription, that the customer was charged once, and that
    /// Stripe has counted exactly the tenant's usage.
    async fn expect_charged_once(&self, customer: &Customer, run: u64) {
        let tenant = customer.account.tenant_id.as_str();
        let of = |kind: &str, is_own: &dyn Fn(&Value) -> bool| {
            let all = self.stripe.fake.all(kind).into_iter();
            all.filter(|it| is_own(it)).collect::<Vec<_>>()
        };
        let customers = of("customer", &|it| it["metadata"]["quota_tenant"] == tenant);
        assert_eq!(customers.len(), 1, "run {run}: customers");
        let id = customers[0]["id"].as_str().expect("an ID");
        let subscriptions = of("subscription", &|it| it["customer"] == id);
        assert_eq!(subscriptions.len(), 1, "run {run}: subscriptions");
        assert_eq!(subscriptions[0]["status"], "active", "run {run}");
        let paid = of("invoice", &|it| {
            it["customer"] == id && it["status"] == "paid" && it["amount_paid"] != 0
        });
        assert_eq!(paid.len(), 1, "run {run}: charges: {paid:?}");
        let usage = self.stripe.fake.usage().into_iter();
        let counted: i64 = usage
            .filter(|it| it.customer == id)
            .map(|it| it.value)
            .sum();
        assert_eq!(counted, customer.used, "run {run}: usage in Stripe");
        let rollups = format!(
            "SELECT coalesce(sum(cost), 0)::bigint FROM usage_quarters WHERE tenant_id = '{tenant}' \
                 AND endpoint = E'\\x01' AND policy = '' AND key_id <> '{}'",
            Uuid::nil()
        );
        assert_eq!(
            self.count(&rollups).await,
            customer.used,
            "run {run}: rollups"
        );
        let unsent = format!(
            "SELECT count(*) FROM billing_reports WHERE tenant_id = '{tenant}' AND state <> 'sent'"
        );
        assert_eq!(self.count(&unsent).await, 0, "run {run}: reports");
        let access = format!(
            "SELECT count(*) FROM billing_accounts WHERE tenant_id = '{tenant}' AND access = 'active'"
        );
        assert_eq!(self.count(&access).await, 1, "run {run}: access");
    }
}

/// Returns the start of the hour that was `ago` hours ago.
fn hour(ago: i64) -> DateTime<Utc> {
    let at = usage::now() - TimeDelta::hours(ago);
    at.duration_trunc(TimeDelta::hours(1))
        .expect("a valid time")
}

/// Cancels `work` at a random moment within `longest` microseconds. Returns whether `work` was still running.
async fn end_early(rng: &mut fastrand::Rng, longest: u64, work: impl Future<Output = ()>) -> bool {
    let moment = Duration::from_micros(rng.u64(0..longest));
    tokio::time::timeout(moment, work).await.is_err()
}

/// Returns the seed of the first run, which `BILLING_FIRST` sets.
#[expect(
    clippy::disallowed_methods,
    reason = "the length of a test is not a setting of the server"
)]
fn first() -> u64 {
    std::env::var("BILLING_FIRST").map_or(0, |first| first.parse().expect("a number"))
}

/// `BILLING_SEEDS` sets the number of runs, and `BILLING_FIRST` sets the seed of the first run.
#[tokio::test(flavor = "multi_thread")]
async fn tenants_are_charged_once_with_faults_in_every_request_and_a_worker_that_ends() {
    let world = World::new().await;
    let mut ended = 0;
    for seed in first()..first() + seeds() {
        let is_last = seed + 1 == first() + seeds();
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut customer = world.customer().await;
        let tenant = TenantId(customer.account.tenant_id.parse().expect("a UUID"));
        world.stripe.fake.set_back(AGO);
        world.fail(seed, 35);
        let buyer = Buyer {
            tenant,
            email: &customer.account.email,
            name: "Acme",
            success_url: "https://quota.test/success",
            cancel_url: "https://quota.test/canceled",
        };
        let billing = world.billing();
        let mut session = None;
        for attempt in 0.. {
            if attempt == 60 {
                world.stripe.fake.heal();
            }
            assert!(attempt < 70, "run {seed}: no Checkout");
            let mut started = None;
            let work = async { started = billing.checkout(&buyer).await.ok() };
            // On a slow machine, every attempt with a time limit may be canceled, so some attempts have no time limit.
            if is_last || attempt >= 60 {
                work.await;
            } else {
                ended += u32::from(end_early(&mut rng, 120_000, Box::pin(work)).await);
            }
            session = started.map(|(session, _)| session.id).or(session);
            // Some tenants request another page although they already have one. On a slow machine, most of these
            // requests are canceled. Therefore, the last tenant's requests are never canceled, and are repeated until a
            // request to Stripe for its session has failed.
            let enough = if is_last {
                world.has_failed("GET checkout/sessions/…")
            } else {
                rng.bool()
            };
            if session.is_some() && enough {
                break;
            }
        }
        let session = session.expect("a Checkout Session");
        let paid = world.stripe.fake.pay_checkout(&session, Card::Good, false);
        paid.expect("the session is open");
        world.stripe.fake.advance(AGO);
        world.deliver(&mut rng).await;
        for _ in 0..rng.u8(2..6) {
            world.time_passes().await;
            let work = async {
                billing.handle_due().await.expect("PostgreSQL responds");
                billing.read_due().await.expect("PostgreSQL responds");
            };
            ended += u32::from(end_early(&mut rng, 60_000, work).await);
            // A tenant may try to subscribe again, or open the portal.
            let work = async {
                let _ = billing.checkout(&buyer).await;
                let _ = billing.portal(tenant, "https://quota.test").await;
                let _ = billing.read_offer().await;
            };
            ended += u32::from(end_early(&mut rng, 120_000, Box::pin(work)).await);
        }
        // The usage must come after the subscription, so wait until a read has found the subscription.
        while billing.read(tenant).await.is_err() {}
        world.spend(&mut customer, &mut rng).await;
        for _ in 0..rng.u8(2..6) {
            let work = async {
                let _ = billing.plan_usage().await;
                let _ = billing.send_usage().await;
            };
            ended += u32::from(end_early(&mut rng, 60_000, work).await);
            world.time_passes().await;
        }
        world.stripe.fake.heal();
        let waiting = "SELECT (SELECT count(*) FROM billing_events WHERE outcome IS NULL) \
             + (SELECT count(*) FROM billing_usage WHERE cost <> planned) \
             + (SELECT count(*) FROM billing_reports WHERE state = 'pending')";
        for rounds in 0.. {
            world.time_passes().await;
            billing.handle_due().await.expect("PostgreSQL responds");
            billing.read(tenant).await.expect("Stripe responds");
            billing.plan_usage().await.expect("planned");
            billing.send_usage().await.expect("sent");
            if world.count(waiting).await == 0 {
                break;
            }
            assert!(rounds < 20, "run {seed}: work is left");
        }
        world.expect_charged_once(&customer, seed).await;
    }
    let failed = world.failed.lock();
    println!("ended {ended} times; failed requests: {failed:#?}");
    assert!(ended > 20, "{ended}");
    for kind in [
        "POST customers",
        "GET customers",
        "GET subscriptions",
        "GET prices",
        "POST checkout/sessions",
        "GET checkout/sessions/…",
        "POST billing_portal/sessions",
        "POST billing/meter_events",
    ] {
        assert!(
            failed.contains_key(kind),
            "{kind} has not failed: {failed:?}"
        );
    }
}

/// The number of times that the server is killed. Set `BILLING_KILLS=100` for a long run.
#[expect(
    clippy::disallowed_methods,
    reason = "the length of a test is not a setting of the server"
)]
fn kills() -> u64 {
    std::env::var("BILLING_KILLS").map_or(6, |kills| kills.parse().expect("a number"))
}

/// Like the test above, but kills the whole server with SIGKILL, including the part that handles requests. For each
/// tenant, the server is killed while it creates a Checkout Session, and again while it processes events and reports
/// usage.
#[tokio::test(flavor = "multi_thread")]
async fn tenants_are_charged_once_by_a_server_that_is_killed() {
    let world = World::new().await;
    let dir = data_dir();
    let base = world.stripe.fake.url().to_owned();
    let settings = [
        ("DATABASE_URL", world.app.database.url()),
        ("STRIPE_SECRET_KEY", SECRET_KEY),
        ("STRIPE_WEBHOOK_SECRET", world.stripe.secret.as_str()),
        ("STRIPE_API_BASE", base.as_str()),
    ];
    let start = || {
        let server = Quota::start_with(dir.path(), &settings);
        let url = format!("http://{}/billing/stripe/webhook", server.addr);
        world
            .stripe
            .fake
            .move_endpoint(&world.stripe.endpoint, &url);
        server
    };
    let mut killed = 0;
    let mut run = first();
    while killed < kills() {
        run += 1;
        let mut rng = fastrand::Rng::with_seed(run);
        let mut customer = world.customer().await;
        let token = customer.account.access_token.clone();
        world.stripe.fake.set_back(AGO);
        world.fail(run, 25);
        let checkout = async |server: &Quota| {
            let url = format!("http://{}/billing/checkout", server.addr);
            let call = world.app.http.post(url).bearer_auth(&token);
            let call = call.timeout(Duration::from_secs(5));
            let answer = call.send().await.ok()?;
            let body: Value = answer.json().await.ok()?;
            let id = body["url"].as_str()?.rsplit('/').next()?;
            Some(id.to_owned())
        };

        // Kill the server while it is creating a Checkout Session.
        let server = start();
        let moment = Duration::from_micros(rng.u64(0..150_000));
        let _ = tokio::time::timeout(moment, async {
            loop {
                let _ = checkout(&server).await;
            }
        })
        .await;
        server.kill();
        killed += 1;
        let server = start();
        let mut session = None;
        for attempt in 0..18 {
            if attempt == 12 {
                world.stripe.fake.heal();
            }
            session = checkout(&server).await;
            if session.is_some() {
                break;
            }
        }
        let session = session.expect("a Checkout Session");
        world.fail(run, 25);
        let paid = world.stripe.fake.pay_checkout(&session, Card::Good, false);
        paid.expect("the session is open");
        world.stripe.fake.advance(AGO);
        world.deliver(&mut rng).await;
        // The usage must come after the subscription, so wait until a read has found the subscription.
        let tenant = &customer.account.tenant_id;
        let active = format!(
            "SELECT count(*) FROM billing_accounts WHERE tenant_id = '{tenant}' AND access = 'active'"
        );
        let began = Instant::now();
        while world.count(&active).await == 0 {
            assert!(began.elapsed() < AT_MOST, "run {run}: no access");
            tokio::time::sleep(Duration::from_millis(100)).await;
            world.time_passes().await;
        }
        world.spend(&mut customer, &mut rng).await;
        drop(server);

        // After its start, a server immediately processes events and reports usage. Kill the server while it does so.
        world.time_passes().await;
        let server = start();
        tokio::time::sleep(Duration::from_micros(rng.u64(0..300_000))).await;
        server.kill();
        killed += 1;

        world.stripe.fake.heal();
        world.time_passes().await;
        let server = start();
        let waiting = "SELECT (SELECT count(*) FROM billing_events WHERE outcome IS NULL) \
             + (SELECT count(*) FROM billing_usage WHERE cost <> planned) \
             + (SELECT count(*) FROM billing_reports WHERE state = 'pending')";
        let began = Instant::now();
        while world.count(waiting).await > 0 {
            assert!(began.elapsed() < AT_MOST, "run {run}: work is left");
            tokio::time::sleep(Duration::from_millis(200)).await;
            world.time_passes().await;
        }
        world.expect_charged_once(&customer, run).await;
        server.stop();
    }
    println!(
        "killed {killed} times; failed requests: {:#?}",
        world.failed.lock()
    );
}
