//! Checks the requests that Quota sends to Stripe against Stripe's description of its API.
//!
//! The fake Stripe checks every request in all tests. This test sends each kind of request in [`OPERATIONS`] at least
//! once.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use chrono::TimeDelta;
use quota_fake_stripe::{Card, FakeStripe, Fault, How};
use quota_server::repo::usage_batch::UsageRecord;
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    support::{
        app::TestApp,
        stripe::{TestStripe, billing_command, wait_for_access},
    },
    usage,
};

const AT_MOST: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_hours(24);

/// The operations that Quota uses, except `GET /v1/invoices`, which Quota uses only if a subscription is past due, or
/// before it reports usage from an earlier billing period.
const OPERATIONS: [&str; 21] = [
    "GET /v1/account",
    "GET /v1/billing/meters",
    "GET /v1/billing/meters/{id}/event_summaries",
    "GET /v1/checkout/sessions/{session}",
    "GET /v1/customers",
    "GET /v1/customers/{customer}",
    "GET /v1/invoices/{invoice}",
    "GET /v1/prices",
    "GET /v1/products/{id}",
    "GET /v1/subscriptions",
    "GET /v1/subscriptions/{subscription_exposed_id}",
    "GET /v1/webhook_endpoints",
    "GET /v2/core/events/{id}",
    "POST /v1/billing/meter_events",
    "POST /v1/billing/meters",
    "POST /v1/billing_portal/sessions",
    "POST /v1/checkout/sessions",
    "POST /v1/customers",
    "POST /v1/prices",
    "POST /v1/products",
    "POST /v1/webhook_endpoints",
];

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_request_is_valid_according_to_stripe() {
    let fake = FakeStripe::start().await.expect("loopback has a free port");
    fake.set_back(5 * DAY);
    let before = TestApp::setup().without_jobs().start().await;
    let database = before.database.clone();
    before.stop().await;
    let setup = ["setup", "--price=2900", "--usage-price=0.05"];
    let (_, created) = billing_command(&database, &fake, &setup, &[]).await;
    let secret = created
        .lines()
        .find_map(|it| it.strip_prefix("STRIPE_WEBHOOK_SECRET="));
    let secret = secret.expect("the endpoint is new").to_owned();
    let (_, checked) = billing_command(&database, &fake, &["check"], &[]).await;
    assert!(checked.contains("ok     webhook endpoint"), "{checked}");
    let endpoint = fake.all("webhook_endpoint")[0].clone();
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let stripe = TestStripe {
        endpoint: text(&endpoint["id"]),
        secret,
        fake,
    };
    let app = stripe.configure(TestApp::setup()).database(database);
    let app = app.without_jobs().start().await;
    stripe.send_to(&app);
    let billing = app.state.billing.as_ref().expect("billing is on");
    let account = app.register().await;

    // The first response is lost, so that Quota searches for the customer.
    let lost = Fault::after(How::Drop);
    stripe.fake.fail_next("/v1/customers", lost);
    let failed = app
        .act(&account, "POST", "/billing/checkout", Value::Null)
        .await;
    assert_eq!(failed.status, 503, "{}", failed.text);
    stripe.fake.advance(DAY);
    let session = stripe.start_checkout(&app, &account).await;
    let again = stripe.start_checkout(&app, &account).await;
    assert_eq!(session, again);
    let paid = stripe.fake.pay_checkout(&session, Card::Good, false);
    paid.expect("the session is open");
    stripe.fake.take_queued();
    let client = app.database.connect().await;
    let forget = client.execute("DELETE FROM billing_stripe_account", &[]);
    assert_eq!(forget.await.expect("valid SQL"), 1);

    // A thin event contains only the ID of its object, so Quota requests the object from Stripe.
    let of_kind = |kind: &str| text(&stripe.fake.all(kind)[0]["id"]);
    let objects = [of_kind("subscription"), of_kind("invoice"), session];
    for (n, object) in objects.iter().enumerate() {
        let event = json!({"id": format!("evt_{n}"), "object": "v2.core.event", "type": "v1.any",
            "livemode": false, "related_object": {"id": object}});
        stripe.send_event(&app, &event).await;
    }
    billing.handle_due().await.expect("handled");
    wait_for_access(&app, &account, "active").await;
    let portal = app
        .act(&account, "POST", "/billing/portal", Value::Null)
        .await;
    assert_eq!(portal.status, 201, "{}", portal.text);
    billing.read_offer().await.expect("the offer is complete");

    // Report usage that is 24 and 25 hours old.
    stripe.fake.advance(4 * DAY);
    let tenant = quota_common::TenantId(account.tenant_id.parse().expect("a UUID"));
    billing.read(tenant).await.expect("read");
    let plan = app.plan(&account, json!({"billing": "paid"})).await;
    let record = |hours| UsageRecord {
        billing: "paid",
        ..usage::record(
            &account,
            &Uuid::now_v7().to_string(),
            &plan,
            usage::now() - TimeDelta::hours(hours),
        )
    };
    usage::append(&app, &[record(24), record(25)]).await;
    let began = Instant::now();
    while stripe.fake.usage().len() < 2 {
        billing.plan_usage().await.expect("planned");
        billing.send_usage().await.expect("sent");
        assert!(began.elapsed() < AT_MOST, "not reported");
    }
    let uncharged = billing.uncharged_usage().await.expect("measured");
    let compared = billing.reconcile_usage(uncharged.now).await;
    assert_eq!(compared.expect("compared"), 0);
    // Stripe accepts usage for a customer that does not exist, and reports later that it cannot assign the usage.
    client
        .execute("UPDATE billing_accounts SET customer_id = 'cus_gone'", &[])
        .await
        .expect("the update succeeds");
    usage::append(&app, &[record(3)]).await;
    // Thin events have a separate destination with the same URL.
    let path = format!("webhook_endpoints/{}", stripe.endpoint);
    let all = stripe
        .fake
        .request(&Method::POST, &path, "enabled_events[0]=*");
    all.expect("changed");
    let mut meter_errors = 0;
    while meter_errors == 0 {
        billing.plan_usage().await.expect("planned");
        billing.send_usage().await.expect("sent");
        stripe.deliver_all().await;
        meter_errors = billing.handle_due().await.expect("handled").meter_errors;
        assert!(began.elapsed() < AT_MOST, "no error is reported");
    }

    let sent = stripe.fake.received();
    let operations: BTreeSet<_> = sent.iter().filter_map(|it| it.operation).collect();
    assert_eq!(operations, OPERATIONS.into());
    assert_eq!(stripe.fake.take_invalid(), Vec::<String>::new());
}
