//! Tests of charged usage, from the usage log to meter events in the fake Stripe.
//!
//! The oracle is a sum over the records that the test itself has appended.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::{DateTime, DurationRound as _, TimeDelta, Utc};
use quota_common::TenantId;
use quota_fake_stripe::{Card, Fault, How, Usage};
use quota_server::{
    billing::Billing,
    db, jobs,
    repo::{billing_usage, usage_batch::UsageRecord},
};
use quota_testkit::proxy;
use reqwest::Method;
use secrecy::SecretString;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    outage::through_proxy,
    support::{
        app::{Account, TestApp},
        postgres::TestDatabase,
        stripe::TestStripe,
    },
    usage,
};

const DAY: Duration = Duration::from_hours(24);

/// A server without background jobs, and a tenant with a plan marked `paid`.
struct World {
    stripe: TestStripe,
    app: TestApp,
    account: Account,
    plan: String,
}

impl World {
    /// Creates a tenant with a plan marked `paid` but without a subscription. Sets Stripe's clock back by `ago`.
    async fn unsubscribed(ago: Duration) -> Self {
        let stripe = TestStripe::start().await;
        stripe.fake.set_back(ago);
        let app = stripe
            .configure(TestApp::setup())
            .without_jobs()
            .start()
            .await;
        stripe.send_to(&app);
        let account = app.register().await;
        let plan = app.plan(&account, json!({"billing": "paid"})).await;
        Self {
            stripe,
            app,
            account,
            plan,
        }
    }

    /// Pays at Checkout. Stripe's clock does not advance.
    async fn pay(&self) {
        let session = self.stripe.start_checkout(&self.app, &self.account).await;
        let paid = self.stripe.fake.pay_checkout(&session, Card::Good, false);
        paid.expect("the session is open");
    }

    async fn subscribed(ago: Duration) -> Self {
        let world = Self::unsubscribed(ago).await;
        world.pay().await;
        world.stripe.fake.advance(ago);
        world.read().await;
        world
    }

    /// Creates a tenant that subscribed 40 days ago, and whose invoice for the previous period could not be finalized.
    /// Also returns the invoice's ID.
    async fn with_a_draft_invoice() -> (Self, String) {
        let world = Self::unsubscribed(40 * DAY).await;
        world.pay().await;
        let fake = &world.stripe.fake;
        fake.fail_finalizations(1);
        fake.advance(40 * DAY);
        let invoices = fake.all("invoice");
        let draft = invoices.iter().find(|it| it["status"] == "draft");
        let draft = draft.expect("an invoice that could not be finalized")["id"].as_str();
        let draft = draft.expect("an ID").to_owned();
        world.read().await;
        (world, draft)
    }

    fn billing(&self) -> &Billing {
        self.app.state.billing.as_ref().expect("billing is on")
    }

    async fn uncharged(&self) -> billing_usage::Uncharged {
        let uncharged = self.billing().uncharged_usage().await;
        uncharged.expect("PostgreSQL responds")
    }

    async fn read(&self) {
        let tenant = self.account.tenant_id.parse().expect("a UUID");
        let read = self.billing().read(quota_common::TenantId(tenant)).await;
        read.expect("Stripe responds");
    }

    fn paid(&self, at: DateTime<Utc>, cost: i64) -> UsageRecord {
        let key = Uuid::now_v7().to_string();
        UsageRecord {
            billing: "paid",
            cost,
            ..usage::record(&self.account, &key, &self.plan, at)
        }
    }

    async fn append(&self, records: &[UsageRecord]) {
        usage::append(&self.app, records).await;
    }

    async fn execute(&self, sql: &str) -> u64 {
        let client = self.app.database.connect().await;
        client.execute(sql, &[]).await.expect("valid SQL")
    }

    /// Plans reports, and sends reports until none is pending.
    async fn report(&self) {
        self.billing().plan_usage().await.expect("planned");
        self.send().await;
    }

    /// Sends reports until none is pending. Does not wait until retries are due.
    async fn send(&self) {
        for _ in 0..50 {
            let due = "UPDATE billing_reports SET due_at = now() - interval '1 second' WHERE state = 'pending'";
            if self.execute(due).await == 0 {
                return;
            }
            self.billing()
                .send_usage()
                .await
                .expect("PostgreSQL responds");
        }
        panic!("reports are still pending");
    }

    /// Returns the usage that the fake Stripe has counted for the tenant.
    fn counted(&self) -> Vec<Usage> {
        let customer = self.stripe.customer_of(&self.account);
        let all = self.stripe.fake.usage().into_iter();
        all.filter(|it| it.customer == customer).collect()
    }

    fn total(&self) -> i64 {
        self.counted().iter().map(|it| it.value).sum()
    }

    /// Returns the state, reason and value of each report, ordered by hour and revision.
    async fn reports(&self) -> Vec<(String, Option<String>, i64)> {
        let client = self.app.database.connect().await;
        let rows = client
            .query(
                "SELECT state, reason, value FROM billing_reports ORDER BY start, revision",
                &[],
            )
            .await
            .expect("reports");
        rows.iter()
            .map(|row| (row.get(0), row.get(1), row.get(2)))
            .collect()
    }
}

/// Returns the start of the hour that was `ago` hours ago.
fn hour(ago: i64) -> DateTime<Utc> {
    let at = usage::now() - TimeDelta::hours(ago);
    at.duration_trunc(TimeDelta::hours(1))
        .expect("a valid time")
}

fn minutes(n: i64) -> TimeDelta {
    TimeDelta::minutes(n)
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_of_an_hour_becomes_one_meter_event() {
    let world = World::subscribed(3 * DAY).await;
    let at = hour(4);
    let rejected = usage::rejected(world.paid(at + minutes(3), 100), "rpm");
    let free = UsageRecord {
        billing: "free",
        ..world.paid(at + minutes(3), 100)
    };
    world
        .append(&[
            world.paid(at, 1),
            world.paid(at + minutes(30), 2),
            world.paid(at + minutes(60) - TimeDelta::milliseconds(1), 3),
            world.paid(at + minutes(60), 10),
            rejected,
            free,
        ])
        .await;
    // The current hour has not ended yet, so its usage is not reported.
    world.append(&[world.paid(usage::now(), 1000)]).await;
    world.report().await;
    let tenant = &world.account.tenant_id;
    let sent: Vec<_> = world
        .counted()
        .into_iter()
        .map(|it| (it.identifier, it.at, it.value))
        .collect();
    let (first, second) = (at.timestamp(), at.timestamp() + 3600);
    assert_eq!(
        sent,
        [
            (format!("{tenant}-{first}-0"), first, 6),
            (format!("{tenant}-{second}-0"), second, 10),
        ]
    );
    // The usage is not reported again.
    world.report().await;
    assert_eq!(world.counted().len(), 2);

    // Usage that arrives late becomes a revision with the difference.
    world.append(&[world.paid(at + minutes(59), 4)]).await;
    world.append(&[world.paid(at + minutes(59), 1)]).await;
    world.report().await;
    let late = world.counted().pop().expect("sent");
    assert_eq!(
        (late.identifier, late.at, late.value),
        (format!("{tenant}-{first}-1"), first, 5)
    );
    assert_eq!(world.total(), 21);
}

/// The total in Stripe equals the usage, although requests to the meter fail in every way, before and after taking
/// effect.
#[tokio::test(flavor = "multi_thread")]
async fn faults_charge_nothing_twice_and_lose_nothing() {
    let world = World::subscribed(3 * DAY).await;
    let mut used = 0;
    for (n, fault) in Fault::all(Duration::from_millis(10))
        .into_iter()
        .enumerate()
    {
        let n = i64::try_from(n).expect("few");
        world
            .append(&[world.paid(hour(n + 2) + minutes(7), n + 1)])
            .await;
        used += n + 1;
        world
            .stripe
            .fake
            .fail_next("/v1/billing/meter_events", fault);
        world.report().await;
        assert_eq!(world.total(), used, "{fault:?}");
    }
    assert!(world.reports().await.iter().all(|it| it.0 == "sent"));
    assert!(used > 70, "{used}");
}

/// Combines random usage, faults, late rows, crashes between a request and the recording of its result, and outages
/// that last longer than the time for which Stripe recognizes an identifier.
#[tokio::test(flavor = "multi_thread")]
async fn random_schedules_charge_exactly_what_was_used() {
    let world = World::subscribed(10 * DAY).await;
    let faults = Fault::all(Duration::from_millis(2));
    let mut used = 0;
    let mut failed = 0;
    for seed in 0..60 {
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..rng.u8(1..4) {
            let at = hour(rng.i64(3..80)) + minutes(rng.i64(0..60));
            let cost = rng.i64(1..1000);
            used += cost;
            world.append(&[world.paid(at, cost)]).await;
        }
        world.billing().plan_usage().await.expect("planned");
        for _ in 0..rng.u8(0..3) {
            if let Some(fault) = rng.choice(&faults) {
                world
                    .stripe
                    .fake
                    .fail_next("/v1/billing/meter_events", *fault);
            }
        }
        let before = world
            .reports()
            .await
            .iter()
            .filter(|it| it.0 == "pending")
            .count();
        world
            .execute("UPDATE billing_reports SET due_at = now() WHERE state = 'pending'")
            .await;
        world
            .billing()
            .send_usage()
            .await
            .expect("PostgreSQL responds");
        failed += world
            .reports()
            .await
            .iter()
            .filter(|it| it.0 == "pending")
            .count()
            .min(before);
        if rng.u8(..4) == 0 {
            // Nothing is sent for a day and a half.
            world.stripe.fake.advance(Duration::from_hours(36));
            world.execute("UPDATE billing_reports SET first_attempt_at = first_attempt_at - interval '36 hours'").await;
        }
        world.stripe.fake.heal();
        world.send().await;
        assert_eq!(world.total(), used, "seed {seed}");
    }
    assert!(failed > 20, "{failed}");
    assert!(world.reports().await.iter().all(|it| it.0 == "sent"));
}

/// The number of runs, each with its own seed. Set `BILLING_SEEDS=1000` for a long run.
#[expect(
    clippy::disallowed_methods,
    reason = "the length of a test is not a setting of the server"
)]
pub(crate) fn seeds() -> u64 {
    std::env::var("BILLING_SEEDS").map_or(25, |seeds| seeds.parse().expect("a number"))
}

/// A worker that reports usage is repeatedly stopped at a random moment, and some requests to Stripe fail. The next
/// worker knows only what the previous worker has stored and sent.
#[tokio::test(flavor = "multi_thread")]
async fn worker_that_ends_at_any_moment_charges_exactly_what_was_used() {
    let world = World::subscribed(10 * DAY).await;
    let faults = Fault::all(Duration::from_millis(3));
    let (mut used, mut ended) = (0, 0);
    for seed in 0..seeds() {
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..rng.u8(1..6) {
            let at = hour(rng.i64(3..80)) + minutes(rng.i64(0..60));
            let cost = rng.i64(1..1000);
            used += cost;
            world.append(&[world.paid(at, cost)]).await;
        }
        for _ in 0..rng.u8(1..6) {
            if let Some(fault) = rng.choice(&faults).filter(|_| rng.bool()) {
                let path = "/v1/billing/meter_events";
                world.stripe.fake.fail_next(path, *fault);
            }
            let work = async {
                world.billing().plan_usage().await.expect("planned");
                world.billing().send_usage().await.expect("sent");
            };
            let moment = Duration::from_micros(rng.u64(0..60_000));
            ended += u32::from(tokio::time::timeout(moment, work).await.is_err());
            // The next worker starts after the claim of the previous worker has expired.
            world
                .execute("UPDATE billing_senders SET until = now()")
                .await;
            world
                .execute("UPDATE billing_reports SET due_at = now() WHERE state = 'pending'")
                .await;
        }
        world.stripe.fake.heal();
        world.report().await;
        assert_eq!(world.total(), used, "seed {seed}");
    }
    println!("ended {ended} times");
    assert!(ended > 10, "{ended}");
    assert!(world.reports().await.iter().all(|it| it.0 == "sent"));
}

/// Once Stripe no longer recognizes an identifier, the total in Stripe shows whether the report was counted.
#[tokio::test(flavor = "multi_thread")]
async fn worker_that_was_down_for_30_hours_charges_once() {
    let world = World::subscribed(3 * DAY).await;
    for (n, fault, before) in [
        (3, Fault::after(How::Drop), 1),
        (4, Fault::before(How::Drop), 0),
    ] {
        world.append(&[world.paid(hour(n), 5)]).await;
        world.billing().plan_usage().await.expect("planned");
        world
            .stripe
            .fake
            .fail_next("/v1/billing/meter_events", fault);
        let events = world.counted().len();
        let sent = world
            .billing()
            .send_usage()
            .await
            .expect("PostgreSQL responds");
        assert_eq!((sent.finished, sent.errors), (0, 1));
        assert_eq!(world.counted().len(), events + before, "{fault:?}");
        world.stripe.fake.advance(Duration::from_hours(30));
        world.execute("UPDATE billing_reports SET first_attempt_at = first_attempt_at - interval '30 hours'").await;
        world.send().await;
        assert_eq!(world.counted().len(), events + 1, "{fault:?}");
    }
    assert_eq!(world.total(), 10);
    // The total in Stripe matches neither a counted nor a lost report, so a person has to investigate.
    world.append(&[world.paid(hour(5), 5)]).await;
    world.billing().plan_usage().await.expect("planned");
    world
        .stripe
        .fake
        .fail_next("/v1/billing/meter_events", Fault::before(How::Drop));
    world
        .billing()
        .send_usage()
        .await
        .expect("PostgreSQL responds");
    let form = format!(
        "event_name=quota_requests&timestamp={}&payload[value]=2&payload[stripe_customer_id]={}",
        hour(5).timestamp(),
        world.stripe.customer_of(&world.account)
    );
    world
        .stripe
        .fake
        .request(&Method::POST, "billing/meter_events", &form)
        .expect("counted");
    world
        .execute(
            "UPDATE billing_reports SET first_attempt_at = first_attempt_at - interval '30 hours'",
        )
        .await;
    world.send().await;
    assert!(
        world
            .reports()
            .await
            .iter()
            .any(|it| it.1.as_deref() == Some("unclear"))
    );
}

/// If a billing period ends within an hour, the hour is split at that point. Usage of a period whose invoice is final
/// is not sent.
#[tokio::test(flavor = "multi_thread")]
async fn hour_with_the_edge_of_a_period_is_divided() {
    let world = World::subscribed(40 * DAY).await;
    let subscription = &world.stripe.fake.all("subscription")[0];
    let edge = &subscription["items"]["data"][0]["current_period_start"];
    let edge = DateTime::from_timestamp(edge.as_i64().expect("a time"), 0).expect("a time");
    let start = edge.duration_trunc(TimeDelta::hours(1)).expect("a time");
    assert!(edge < usage::now() - TimeDelta::days(5), "{edge}");
    let millis = |n| TimeDelta::milliseconds(n);
    world
        .append(&[
            world.paid(start, 1),
            world.paid(edge - millis(1), 2),
            world.paid(edge, 4),
            world.paid(start + minutes(60) - millis(1), 8),
        ])
        .await;
    world.report().await;
    // If the billing period starts at a full hour, the hour is not split.
    let before = if start == edge { 0 } else { 3 };
    let sent = world.counted();
    assert_eq!(sent.len(), 1);
    assert_eq!((sent[0].at, sent[0].value), (edge.timestamp(), 15 - before));
    if before > 0 {
        let reports = world.reports().await;
        assert_eq!(
            reports[0],
            ("unbilled".into(), Some("finalized".into()), before)
        );
        // Late usage from the previous period is not sent either.
        world.append(&[world.paid(edge - millis(1), 16)]).await;
        world.append(&[world.paid(edge, 32)]).await;
        world.report().await;
        assert_eq!(world.total(), 12 + 32);
        let unbilled = world
            .reports()
            .await
            .iter()
            .filter(|it| it.0 == "unbilled")
            .map(|it| it.2)
            .sum::<i64>();
        assert_eq!(unbilled, 3 + 16);
    }
}

/// While the invoice of the previous period is a draft, usage of that period is still charged.
#[tokio::test(flavor = "multi_thread")]
async fn usage_of_the_last_period_is_sent_while_its_invoice_is_a_draft() {
    let (world, draft) = World::with_a_draft_invoice().await;
    world
        .append(&[world.paid(usage::now() - TimeDelta::days(20), 7)])
        .await;
    world.report().await;
    assert_eq!(world.total(), 7);
    let path = format!("invoices/{draft}/finalize");
    let invoice = world
        .stripe
        .fake
        .request(&Method::POST, &path, "")
        .expect("final");
    assert_eq!(invoice["total"], 2900 + 7);
}

/// The only attempt before the invoice was finalized may or may not have arrived. Stripe would accept another attempt,
/// but would not charge for it.
#[tokio::test(flavor = "multi_thread")]
async fn usage_is_not_sent_again_after_its_invoice_is_final() {
    for (fault, reported, lost) in [
        (
            Fault::before(How::Drop),
            ("unbilled", Some("finalized"), 7),
            7,
        ),
        (Fault::after(How::Drop), ("sent", None, 7), 0),
    ] {
        let (world, draft) = World::with_a_draft_invoice().await;
        world
            .append(&[world.paid(usage::now() - TimeDelta::days(20), 7)])
            .await;
        world.billing().plan_usage().await.expect("planned");
        world
            .stripe
            .fake
            .fail_next("/v1/billing/meter_events", fault);
        let first = world.billing().send_usage().await.expect("tried");
        assert_eq!((first.finished, first.errors), (0, 1), "{fault:?}");
        let path = format!("invoices/{draft}/finalize");
        let finalized = world.stripe.fake.request(&Method::POST, &path, "");
        finalized.expect("final");
        world.send().await;
        let (state, reason, value) = reported;
        let expected = (state.to_owned(), reason.map(str::to_owned), value);
        assert_eq!(world.reports().await, [expected], "{fault:?}");
        let counted = if lost == 0 { 7 } else { 0 };
        assert_eq!(world.total(), counted, "{fault:?}");
        assert_eq!(world.uncharged().await.lost, lost, "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_that_cannot_be_charged_is_recorded_with_the_reason() {
    let world = World::subscribed(50 * DAY).await;
    let now = usage::now();
    // The first usage is from before the subscription, and the second is too old for Stripe.
    world
        .append(&[world.paid(now - TimeDelta::days(60), 1)])
        .await;
    world
        .append(&[world.paid(now - TimeDelta::days(45), 2)])
        .await;
    world.report().await;
    // Stripe rejects the value.
    world.append(&[world.paid(hour(3), 4)]).await;
    world
        .stripe
        .fake
        .fail_next("/v1/billing/meter_events", Fault::before(How::Status(400)));
    world.report().await;
    let reason = |text: &str| Some(text.to_owned());
    assert_eq!(
        world.reports().await,
        [
            ("unbilled".into(), reason("no_subscription"), 1),
            ("unbilled".into(), reason("too_old"), 2),
            ("unbilled".into(), reason("rejected"), 4),
        ]
    );
    assert_eq!(world.total(), 0);
    assert_eq!(world.uncharged().await.lost, 6);
}

/// A tenant that never subscribed, or whose subscription has no price for usage, is not charged for usage.
#[tokio::test(flavor = "multi_thread")]
async fn usage_without_a_metered_price_is_not_sent() {
    let world = World::unsubscribed(3 * DAY).await;
    world.append(&[world.paid(hour(5), 1)]).await;
    world.report().await;
    let metered = world
        .stripe
        .fake
        .all("price")
        .into_iter()
        .find(|it| it["lookup_key"] == "quota_usage");
    let path = format!(
        "prices/{}",
        metered.expect("a price")["id"].as_str().expect("an ID")
    );
    world
        .stripe
        .fake
        .request(&Method::POST, &path, "active=false")
        .expect("changed");
    let session = world
        .stripe
        .start_checkout(&world.app, &world.account)
        .await;
    world
        .stripe
        .fake
        .pay_checkout(&session, Card::Good, false)
        .expect("open");
    world.stripe.fake.advance(3 * DAY);
    world.read().await;
    world.append(&[world.paid(hour(4), 2)]).await;
    world.report().await;
    let reason = |text: &str| Some(text.to_owned());
    assert_eq!(
        world.reports().await,
        [
            ("unbilled".into(), reason("no_subscription"), 1),
            ("unbilled".into(), reason("not_metered"), 2),
        ]
    );
    assert!(world.stripe.fake.usage().is_empty());
    assert_eq!(world.uncharged().await.lost, 0);
}

/// The usage of an hour is not reported before it is known whether a billing period starts or ends in this hour.
#[tokio::test(flavor = "multi_thread")]
async fn hour_waits_until_subscriptions_were_read_after_it() {
    let world = World::subscribed(3 * DAY).await;
    world.append(&[world.paid(hour(3), 5)]).await;
    world
        .execute("UPDATE billing_accounts SET read_at = now() - interval '4 hours'")
        .await;
    world
        .stripe
        .fake
        .choose_faults(|_, _| Some(Fault::before(How::Html)));
    assert_eq!(
        world
            .billing()
            .plan_usage()
            .await
            .expect("PostgreSQL responds"),
        0
    );
    assert!(world.reports().await.is_empty());
    world.stripe.fake.heal();
    world.report().await;
    assert_eq!(world.total(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_workers_send_each_report_once() {
    let world = World::subscribed(3 * DAY).await;
    let records: Vec<_> = (2..40).map(|n| world.paid(hour(n), n)).collect();
    world.append(&records).await;
    let billing = world.billing();
    let work = async || {
        billing.plan_usage().await.expect("planned");
        billing.send_usage().await.expect("sent");
    };
    tokio::join!(work(), work(), work(), work());
    world.send().await;
    assert_eq!(world.total(), (2..40).sum::<i64>());
    assert_eq!(world.counted().len(), 38);
    let requests = world.stripe.fake.received();
    let conflicts = requests.iter().filter(|it| it.status == Some(409)).count();
    assert_eq!(conflicts, 0, "one at a time for each customer");
}

#[tokio::test(flavor = "multi_thread")]
async fn reconciliation_finds_what_stripe_counts_differently() {
    let world = World::subscribed(5 * DAY).await;
    let yesterday = usage::now() - TimeDelta::days(1);
    let noon = yesterday
        .date_naive()
        .and_hms_opt(12, 0, 0)
        .expect("noon")
        .and_utc();
    world
        .append(&[world.paid(noon, 5), world.paid(noon + minutes(90), 6)])
        .await;
    world.report().await;
    let compare = async || {
        let now = world.uncharged().await.now;
        let compared = world.billing().reconcile_usage(now).await;
        compared.expect("compared")
    };
    assert_eq!(compare().await, 0);
    let form = format!(
        "event_name=quota_requests&timestamp={}&payload[value]=7&payload[stripe_customer_id]={}",
        noon.timestamp(),
        world.stripe.customer_of(&world.account)
    );
    world
        .stripe
        .fake
        .request(&Method::POST, "billing/meter_events", &form)
        .expect("counted");
    assert_eq!(compare().await, 7);
}

/// Waits until a metric is above zero, and returns it. After a failure, a job may run again only after a minute.
async fn above_zero(app: &TestApp, metric: &str) -> f64 {
    let began = Instant::now();
    loop {
        if let Some(value) = app.metric_if_present(metric).await
            && value > 0.0
        {
            return value;
        }
        assert!(
            began.elapsed() < Duration::from_secs(90),
            "{metric} is not above zero"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A server with background jobs sends reports on its own, and its metrics show them.
#[tokio::test(flavor = "multi_thread")]
async fn server_reports_usage_by_itself() {
    let world = World::subscribed(3 * DAY).await;
    world.append(&[world.paid(hour(3), 5)]).await;
    let second = world
        .stripe
        .configure(TestApp::setup())
        .database(world.app.database.clone());
    let second = second.start().await;
    above_zero(&second, "quota_billing_reports_total").await;
    assert_eq!(world.total(), 5);
    above_zero(&second, "quota_billing_reconciled_at_seconds").await;
    let state = second
        .act(&world.account, "GET", "/billing", Value::Null)
        .await;
    assert_eq!(state.body["access"], "active");
}

/// A replica that is too slow loses its claim, and then neither sends reports nor releases the claim of another
/// replica.
#[tokio::test(flavor = "multi_thread")]
async fn slow_sender_stops_when_another_has_taken_over() {
    let world = World::subscribed(3 * DAY).await;
    world
        .append(&[world.paid(hour(3), 5), world.paid(hour(2), 6)])
        .await;
    world.billing().plan_usage().await.expect("planned");
    let tenant = TenantId(world.account.tenant_id.parse().expect("a UUID"));
    let (slow, quick) = (Uuid::now_v7(), Uuid::now_v7());
    let claim = async |owner| {
        let mut tx = world.app.state.db.system().await.expect("a connection");
        let claimed = billing_usage::claim_senders(&mut tx, owner, 10).await;
        tx.commit().await.expect("committed");
        claimed.expect("claimed")
    };
    let begin = async |owner| {
        let mut tx = world.app.state.db.system().await.expect("a connection");
        let begun = billing_usage::begin_attempt(&mut tx, tenant, owner).await;
        tx.commit().await.expect("committed");
        begun.expect("begun").is_some()
    };
    assert_eq!(claim(slow).await, [tenant]);
    assert!(
        claim(quick).await.is_empty(),
        "another worker's claim was ignored"
    );
    assert!(begin(slow).await);
    world
        .execute("UPDATE billing_senders SET until = now() - interval '1 second'")
        .await;
    assert_eq!(claim(quick).await, [tenant]);
    assert!(!begin(slow).await, "the claim is lost");
    let mut tx = world.app.state.db.system().await.expect("a connection");
    billing_usage::release_sender(&mut tx, tenant, slow)
        .await
        .expect("nothing");
    tx.commit().await.expect("committed");
    // Each attempt extends the claim.
    world
        .execute("UPDATE billing_senders SET until = now() + interval '1 second'")
        .await;
    assert!(begin(quick).await);
    let extended =
        "UPDATE billing_senders SET until = until WHERE until > now() + interval '1 minute'";
    assert_eq!(world.execute(extended).await, 1);
}

/// The invoice may become final an hour after the period ends. A report of the whole hour could come too late.
#[tokio::test(flavor = "multi_thread")]
async fn usage_before_the_edge_of_a_period_is_reported_before_the_hour_ends() {
    let world = World::subscribed(3 * DAY).await;
    let mut start = hour(0);
    while usage::now() - start < TimeDelta::seconds(3) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        start = hour(0);
    }
    let second = TimeDelta::seconds(1);
    let edge = start + (usage::now() - start) / 2;
    let edge = edge.duration_trunc(second).expect("a valid time");
    world
        .append(&[
            world.paid(start, 1),
            world.paid(edge - second, 2),
            world.paid(edge, 4),
            world.paid(edge + TimeDelta::milliseconds(500), 8),
        ])
        .await;
    // No report is planned until the subscriptions have been read after the end of the period.
    let set_edge = format!(
        "UPDATE billing_subscriptions SET period_end = '{edge}'; \
         UPDATE billing_accounts SET read_at = now()"
    );
    let client = world.app.database.connect().await;
    client
        .batch_execute(&set_edge)
        .await
        .expect("the period ends");
    world.report().await;
    assert_eq!(world.total(), 3, "{:?}", world.reports().await);
    // Further usage from before the end of the period is not reported separately.
    world.append(&[world.paid(edge - second, 16)]).await;
    world.report().await;
    assert_eq!(world.reports().await.len(), 1);
}

/// Stripe accepts usage for a customer that does not exist, and reports the error later.
#[tokio::test(flavor = "multi_thread")]
async fn error_that_the_meter_reports_later_is_shown() {
    let world = World::subscribed(3 * DAY).await;
    world.append(&[world.paid(hour(3), 5)]).await;
    world
        .execute("UPDATE billing_accounts SET customer_id = 'cus_gone'")
        .await;
    world.stripe.fake.take_queued();
    world.report().await;
    assert_eq!(world.total(), 0);
    world.stripe.deliver_all().await;
    let state = async || {
        let state = world
            .app
            .act(&world.account, "GET", "/billing", Value::Null)
            .await;
        assert_eq!(state.status, 200, "{}", state.text);
        state.body["usage"]["last_error"].clone()
    };
    assert_eq!(state().await, Value::Null);
    let round = world.billing().handle_due().await.expect("handled");
    assert_eq!((round.meter_errors, round.failed), (1, 0));
    assert_eq!(state().await["code"], "meter_event_customer_not_found");
    // The event is processed only once.
    assert_eq!(
        world.billing().handle_due().await.expect("nothing").events,
        0
    );
}

/// If an hour has ended, its usage counts as pending until the usage is in a report.
#[tokio::test(flavor = "multi_thread")]
async fn hours_that_cannot_be_planned_are_counted_as_pending() {
    let world = World::subscribed(3 * DAY).await;
    let pending = async || world.uncharged().await.oldest_pending;
    assert_eq!(pending().await, 0);
    // Usage in the current hour is not pending.
    world.append(&[world.paid(usage::now(), 5)]).await;
    assert_eq!(pending().await, 0);
    world.append(&[world.paid(hour(5), 5)]).await;
    let age = (usage::now() - hour(4)).num_seconds();
    assert!((age - 60..=age + 60).contains(&pending().await));
    world.report().await;
    assert_eq!(pending().await, 0);
}

/// Otherwise, usage that is late because Stripe is unreachable would cause no alert.
#[tokio::test(flavor = "multi_thread")]
async fn age_of_pending_usage_is_measured_while_stripe_is_unreachable() {
    let world = World::subscribed(3 * DAY).await;
    world.append(&[world.paid(hour(5), 5)]).await;
    world
        .stripe
        .fake
        .choose_faults(|_, _| Some(Fault::before(How::Drop)));
    let second = world
        .stripe
        .configure(TestApp::setup())
        .database(world.app.database.clone());
    let second = second.start().await;
    let age = above_zero(&second, "quota_billing_usage_oldest_pending_seconds").await;
    assert!(age > 4.0 * 3600.0 - 60.0, "{age}");
}

/// Otherwise, a replica that cannot reach PostgreSQL would keep reporting outdated values.
#[tokio::test(flavor = "multi_thread")]
async fn uncharged_usage_is_missing_after_a_failed_measurement() {
    let migrate =
        |url: String| async move { db::migrate(&SecretString::from(url)).await.map(drop) };
    let database = Arc::new(TestDatabase::create(migrate).await);
    let (proxy, url) = through_proxy(&database).await;
    let stripe = TestStripe::start().await;
    let setup = stripe.configure(TestApp::setup()).without_jobs();
    let app = setup.database(database).url(url).start().await;
    let measure = async || {
        let billing = app.state.billing.as_ref().expect("billing is on");
        jobs::measure_uncharged_usage(&app.state.metrics, billing).await;
        [
            app.metric_if_present("quota_billing_usage_lost").await,
            app.metric_if_present("quota_billing_usage_oldest_pending_seconds")
                .await,
        ]
    };
    assert_eq!(measure().await, [Some(0.0); 2]);
    proxy.set(proxy::Fault::Refuse);
    proxy.cut();
    assert_eq!(measure().await, [None; 2]);
}

/// `GET /billing` shows the price, and the usage of the current period with its charge.
#[tokio::test(flavor = "multi_thread")]
async fn usage_and_its_charge_are_shown() {
    let world = World::subscribed(3 * DAY).await;
    let state = async || {
        let state = world
            .app
            .act(&world.account, "GET", "/billing", Value::Null)
            .await;
        assert_eq!(state.status, 200, "{}", state.text);
        state.body
    };
    world
        .append(&[world.paid(hour(30), 100), world.paid(hour(4), 20)])
        .await;
    let before = state().await;
    let reported = |state: &Value| -> DateTime<Utc> {
        let at = state["usage"]["reported_until"].as_str().expect("a time");
        at.parse().expect("a time")
    };
    assert_eq!(reported(&before), hour(30));
    world.report().await;
    world.append(&[world.paid(usage::now(), 3)]).await;
    let shown = state().await;
    assert_eq!(
        shown["price"],
        json!({"name": "Quota", "currency": "usd", "monthly": "2900", "per_request": "1"})
    );
    let usage = &shown["usage"];
    assert_eq!(
        (&usage["used"], &usage["charge"]),
        (&json!(123), &json!(123))
    );
    assert_eq!(
        (&usage["not_charged"], &usage["last_error"]),
        (&json!(0), &Value::Null)
    );
    assert_eq!(reported(&shown), hour(0));
    // Three days of a month with 28 to 31 days have passed.
    let projected = usage["projected"].as_u64().expect("a number");
    assert!((1120..=1290).contains(&projected), "{projected}");
    assert_eq!(usage["projected_total"], 2900 + projected);
    assert_eq!(
        (&shown["paid_plans"], &shown["paid_keys"]),
        (&json!(1), &json!(0))
    );
    world.app.key(&world.account, &world.plan).await;
    assert_eq!(state().await["paid_keys"], 1);
}
