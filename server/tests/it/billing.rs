//! Tests of subscriptions, with the fake Stripe.

use std::time::Duration;

use futures_util::StreamExt as _;
use quota_fake_stripe::{AfterRetries, Card, Delivery, Fault, How, Signature, sign};
use quota_server::{
    billing::setup::{self, Offer},
    stripe::Stripe,
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    support::{
        app::TestApp,
        stripe::{TestStripe, paid_key, wait_for_access, wait_for_status},
    },
    usage,
};

const DAY: Duration = Duration::from_hours(24);
const MONTH: Duration = Duration::from_hours(31 * 24);

async fn count(app: &TestApp, query: &str) -> i64 {
    let client = app.database.connect().await;
    client.query_one(query, &[]).await.expect("a count").get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_stripe_billing_is_off_and_paid_plans_work() {
    let app = TestApp::start().await;
    let account = app.register().await;
    let state = app.act(&account, "GET", "/billing", Value::Null).await;
    assert_eq!(state.status, 200);
    assert_eq!(state.body["enabled"], false);
    assert_eq!(state.body["access"], "free");
    assert_eq!(state.body["paid_plans_work"], true);
    for path in ["/billing/checkout", "/billing/portal"] {
        let refused = app.act(&account, "POST", path, Value::Null).await;
        assert_eq!((refused.status, refused.problem()), (409, "billing-off"));
    }
    let key = paid_key(&app, &account).await;
    assert_eq!(app.echo(&key).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn paid_plan_needs_a_subscription_on_every_way_in() {
    let stripe = TestStripe::start().await;
    let app = stripe.app().await;
    let account = app.register().await;
    let other = app.register().await;
    let gateway = app.service_token(&account).await;
    let paid = paid_key(&app, &account).await;
    let free_plan = app.plan(&account, json!({})).await;
    let free = app.key(&account, &free_plan).await.text;

    let forward = async |key: &str, query: &str| {
        let call = app.get(&format!("/v1/forward-auth{query}"));
        let call = call.header("X-Service-Token", &gateway);
        call.header("X-API-Key", key).send().await
    };
    let check = async |key: &str| {
        let call = app.post("/v1/check", json!({"key": key}));
        call.bearer(&gateway).send().await
    };
    let refused = app.echo(&paid).await;
    assert_eq!(
        (refused.status, refused.problem()),
        (402, "subscription-needed")
    );
    let page = app.get("/problems/subscription-needed").send().await;
    assert_eq!(page.status, 200);
    for (query, status) in [("", 402), ("?deny=429", 402), ("?deny=403", 403)] {
        let refused = forward(&paid, query).await;
        assert_eq!(refused.status, status, "{query}");
        assert_eq!(refused.header("x-quota-decision"), Some("payment_required"));
        assert_eq!(refused.text, "");
        assert_eq!(refused.header("www-authenticate"), None);
    }
    let checked = check(&paid).await;
    assert_eq!(checked.body["allowed"], false);
    assert_eq!(checked.body["code"], "payment_required");
    assert!(checked.body["key_id"].is_string());
    // Free plans always work. Another tenant's service token does not reveal that a key exists.
    assert_eq!(app.echo(&free).await.status, 200);
    assert_eq!(forward(&free, "").await.status, 200);
    assert_eq!(check(&free).await.body["code"], "allowed");
    let stranger = app.service_token(&other).await;
    let unknown = app
        .post("/v1/check", json!({"key": paid}))
        .bearer(&stranger)
        .send()
        .await;
    assert_eq!(unknown.body["code"], "unknown_key");
    // No decision was made on requests with the paid key, so none of them was denied by a limit.
    let denied = app.metric("quota_decisions_denied_total").await;
    assert!(denied.abs() < f64::EPSILON, "{denied}");
    assert!(app.metric("quota_payment_required_total").await >= 5.0);

    stripe.subscribe(&app, &account).await;
    let state = wait_for_access(&app, &account, "active").await;
    assert_eq!(state["paid_plans_work"], true);
    assert_eq!(state["access_ends_at"], Value::Null);
    assert!(state["period_end"].is_string());
    assert_eq!(app.echo(&paid).await.status, 200);
    assert_eq!(forward(&paid, "?deny=403").await.status, 200);
    assert_eq!(check(&paid).await.body["code"], "allowed");
    // The other tenant has not subscribed.
    let others = paid_key(&app, &other).await;
    assert_eq!(app.echo(&others).await.status, 402);
}

/// The complete history of a subscription, on two replicas. Both replicas apply every change, regardless of which of
/// them received the webhook.
#[tokio::test(flavor = "multi_thread")]
async fn access_follows_the_subscription_on_every_replica() {
    let stripe = TestStripe::start().await;
    stripe.fake.after_retries(AfterRetries::Unpaid);
    let first = stripe.app().await;
    let second = stripe
        .configure(TestApp::setup())
        .database(first.database.clone());
    let second = second.start().await;
    let account = first.register().await;
    let key = paid_key(&first, &account).await;
    let reaches_both = async |access: &str, status: u16| {
        stripe.deliver_all().await;
        let state = wait_for_access(&first, &account, access).await;
        for app in [&first, &second] {
            let took = wait_for_status(app, &key, status).await;
            println!("{access}: {status} after {took:?}");
        }
        state
    };
    assert_eq!(second.echo(&key).await.status, 402);
    stripe.subscribe(&first, &account).await;
    let customer = stripe.customer_of(&account);
    reaches_both("active", 200).await;

    // A payment fails, and the plan keeps working for a week.
    stripe.fake.set_card(&customer, Card::Declines);
    stripe.fake.advance(MONTH);
    stripe.fake.advance(Duration::from_hours(2));
    let state = reaches_both("past_due", 200).await;
    assert!(state["access_ends_at"].is_string(), "{state}");
    // Stripe stops retrying the payment.
    stripe.fake.advance(16 * DAY);
    stripe.send_to(&second);
    let state = reaches_both("unpaid", 402).await;
    assert_eq!(state["paid_plans_work"], false);
    assert_eq!(state["has_customer"], true);

    // The invoice is paid.
    stripe.fake.set_card(&customer, Card::Good);
    let open = stripe
        .fake
        .all("invoice")
        .into_iter()
        .rfind(|it| it["status"] == "open");
    let open = open.expect("an open invoice")["id"]
        .as_str()
        .expect("an ID")
        .to_owned();
    stripe
        .fake
        .request(&Method::POST, &format!("invoices/{open}/pay"), "")
        .expect("paid");
    reaches_both("active", 200).await;

    let id = stripe.fake.all("subscription")[0]["id"]
        .as_str()
        .expect("an ID")
        .to_owned();
    stripe
        .fake
        .request(
            &Method::POST,
            &format!("subscriptions/{id}"),
            "cancel_at_period_end=true",
        )
        .expect("canceled at the end");
    stripe.deliver_all().await;
    let state = wait_for_access(&first, &account, "active").await;
    assert_eq!(state["paid_plans_work"], true);
    stripe
        .fake
        .request(&Method::DELETE, &format!("subscriptions/{id}"), "")
        .expect("canceled");
    reaches_both("canceled", 402).await;
    stripe.subscribe(&first, &account).await;
    reaches_both("active", 200).await;
}

/// When the grace period after a failed payment ends, access ends without another event. In this test, the grace period
/// is zero days.
#[tokio::test(flavor = "multi_thread")]
async fn grace_period_ends_on_its_date() {
    let stripe = TestStripe::start().await;
    let setup = stripe.configure(TestApp::setup()).flag("--billing-grace=0");
    let app = setup.start().await;
    stripe.send_to(&app);
    let account = app.register().await;
    let key = paid_key(&app, &account).await;
    stripe.subscribe(&app, &account).await;
    wait_for_access(&app, &account, "active").await;
    wait_for_status(&app, &key, 200).await;
    stripe
        .fake
        .set_card(&stripe.customer_of(&account), Card::Declines);
    stripe.fake.advance(MONTH + Duration::from_hours(2));
    stripe.deliver_all().await;
    let state = wait_for_access(&app, &account, "past_due").await;
    // The fake's clock is a month ahead of the server's clock. For the server, the grace period has not ended yet.
    assert_eq!(state["paid_plans_work"], true);
    let client = app.database.connect().await;
    // The worker may still be processing the last event, and would then overwrite the date, so repeat the update.
    for _ in 0..50 {
        client
            .batch_execute(
                "UPDATE billing_accounts SET paid_access_until = now() - interval '1 second'; \
                 INSERT INTO revocations (tenant_id, target_type, target_id) \
                 SELECT tenant_id, 'tenant', tenant_id FROM billing_accounts",
            )
            .await
            .expect("time passes");
        tokio::time::sleep(Duration::from_millis(200)).await;
        if app.echo(&key).await.status == 402 {
            break;
        }
    }
    wait_for_status(&app, &key, 402).await;
    let state = wait_for_access(&app, &account, "past_due").await;
    assert_eq!(state["paid_plans_work"], false);
}

/// After the subscription has ended, its events arrive in random order, and some of them several times. Some deliveries
/// have a new event ID, an old API version or an unknown event type.
#[tokio::test(flavor = "multi_thread")]
async fn events_in_any_order_lead_to_the_present_state() {
    let stripe = TestStripe::start().await;
    let app = stripe.app().await;
    let account = app.register().await;
    let session = stripe.start_checkout(&app, &account).await;
    stripe
        .fake
        .pay_checkout(&session, Card::Good, false)
        .expect("open");
    let customer = stripe.customer_of(&account);
    stripe.fake.set_card(&customer, Card::Declines);
    stripe.fake.advance(MONTH + Duration::from_hours(2));
    stripe.fake.advance(16 * DAY);
    assert_eq!(stripe.fake.all("subscription")[0]["status"], "canceled");
    let mut events: Vec<String> = stripe
        .fake
        .take_queued()
        .into_iter()
        .map(|it| it.0)
        .collect();
    assert!(events.len() > 15, "{}", events.len());
    let mut rng = fastrand::Rng::with_seed(5);
    rng.shuffle(&mut events);
    let mut sent = 0;
    for event in &events {
        for _ in 0..rng.u8(1..4) {
            let delivery = Delivery {
                under_new_id: rng.u8(..4) == 0,
                as_of_2024: rng.u8(..4) == 0,
                kind: (rng.u8(..6) == 0).then(|| "customer.something.new".to_owned()),
                ..Delivery::default()
            };
            assert_eq!(stripe.deliver(event, &delivery).await, 204);
            sent += 1;
        }
    }
    wait_for_access(&app, &account, "canceled").await;
    let stored = count(&app, "SELECT count(*) FROM billing_events").await;
    assert!(stored >= i64::try_from(events.len()).expect("few"));
    assert!(stored < sent, "{stored} of {sent}");
    handled(&app).await;
    let ignored = "SELECT count(*) FROM billing_events WHERE outcome <> 'applied' AND customer_id IS NOT NULL";
    assert_eq!(count(&app, ignored).await, 0);
    assert_eq!(stripe.fake.all("subscription").len(), 1);
    let key = paid_key(&app, &account).await;
    assert_eq!(app.echo(&key).await.status, 402);
}

/// Waits until all events have been processed.
async fn handled(app: &TestApp) {
    for _ in 0..750 {
        let open = "SELECT count(*) FROM billing_events WHERE outcome IS NULL";
        if count(app, open).await == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("some events have not been processed");
}

#[tokio::test(flavor = "multi_thread")]
async fn webhook_without_a_valid_signature_changes_nothing() {
    let stripe = TestStripe::start().await;
    let app = stripe.app().await;
    let account = app.register().await;
    let session = stripe.start_checkout(&app, &account).await;
    stripe
        .fake
        .pay_checkout(&session, Card::Good, false)
        .expect("open");
    let queued = stripe.fake.take_queued();
    let event = &queued.last().expect("an event").0;
    for signature in [
        Signature::Missing,
        Signature::Wrong,
        Signature::Stale(301),
        Signature::Stale(-600),
    ] {
        let delivery = Delivery {
            signature,
            ..Delivery::default()
        };
        assert_eq!(stripe.deliver(event, &delivery).await, 400, "{signature:?}");
    }
    // A signature is valid only for the body that was signed.
    let (body, header) = stripe
        .fake
        .signed(event, &stripe.endpoint, &Delivery::default());
    let header = header.expect("signed");
    let send = async |body: Vec<u8>, header: &str| {
        let call = app.request(Method::POST, "/billing/stripe/webhook");
        let call = call.body("application/json; charset=utf-8", body);
        call.header("Stripe-Signature", header).send().await
    };
    let changed = send(format!("{body} ").into_bytes(), &header).await;
    assert_eq!((changed.status, changed.problem()), (400, "malformed"));
    // A request whose body is too large is rejected before the body is sent.
    let announced = format!(
        "POST /billing/stripe/webhook HTTP/1.1\r\nHost: localhost\r\nStripe-Signature: {header}\r\n\
         Content-Length: {}\r\n\r\n",
        64 * 1024 + 1
    );
    let mut stream = TcpStream::connect(app.addr).await.expect("connected");
    stream.write_all(announced.as_bytes()).await.expect("sent");
    let mut response = [0; 12];
    stream.read_exact(&mut response).await.expect("a response");
    assert_eq!(&response, b"HTTP/1.1 413");
    // These bodies have valid signatures but are not events.
    let now = usage::now().timestamp();
    for body in ["", "[]", "{\"id\":\"evt_1\"}"] {
        let header = sign(now, body, &[&stripe.secret]);
        assert_eq!(send(body.into(), &header).await.status, 400, "{body}");
    }
    assert_eq!(count(&app, "SELECT count(*) FROM billing_events").await, 0);
    assert!(app.metric("quota_billing_signatures_bad_total").await >= 5.0);
    let state = app.act(&account, "GET", "/billing", Value::Null).await;
    assert_eq!(state.body["access"], "free");

    // A body of the maximum size is accepted, and so is the original body.
    let padded = format!("{body}{}", " ".repeat(64 * 1024 - body.len()));
    let padded_header = sign(now, &padded, &[&stripe.secret]);
    assert_eq!(send(padded.into_bytes(), &padded_header).await.status, 204);
    assert_eq!(send(body.into_bytes(), &header).await.status, 204);
    wait_for_access(&app, &account, "active").await;
    assert_eq!(count(&app, "SELECT count(*) FROM billing_events").await, 1);
}

/// While a secret is being rotated, both secrets are set, and Stripe signs with both for a day.
#[tokio::test(flavor = "multi_thread")]
async fn webhook_secret_can_be_rotated() {
    let stripe = TestStripe::start().await;
    let new = stripe.fake.rotate_secret(&stripe.endpoint);
    let both = format!("--stripe-webhook-secret={}, {new}", stripe.secret);
    let app = stripe.configure(TestApp::setup()).flag(both).start().await;
    stripe.send_to(&app);
    let account = app.register().await;
    stripe.start_checkout(&app, &account).await;
    let event = stripe.fake.take_queued().remove(0).0;
    for signature in [Signature::Valid, Signature::Previous] {
        let delivery = Delivery {
            signature,
            ..Delivery::default()
        };
        assert_eq!(
            stripe.deliver(&event, &delivery).await,
            204,
            "{signature:?}"
        );
    }
    stripe.fake.advance(DAY);
    let only_new = Delivery::default();
    assert_eq!(stripe.deliver(&event, &only_new).await, 204);
}

/// Events that do not concern this server are stored and ignored. A thin event is applied.
#[tokio::test(flavor = "multi_thread")]
async fn unknown_thin_and_foreign_events_are_stored_and_end() {
    let stripe = TestStripe::start().await;
    let app = stripe.app().await;
    let account = app.register().await;
    let session = stripe.start_checkout(&app, &account).await;
    stripe
        .fake
        .pay_checkout(&session, Card::Good, false)
        .expect("open");
    stripe.fake.take_queued();
    let subscription = stripe.fake.all("subscription")[0]["id"]
        .as_str()
        .expect("an ID")
        .to_owned();
    let foreign = [
        json!({"id": "evt_a", "type": "charge.succeeded", "data": {"object": {"id": "ch_1", "customer": "cus_x"}}}),
        json!({"id": "evt_b", "type": "v1.billing.meter.no_meter_found", "object": "v2.core.event"}),
        json!({"id": "evt_c", "type": "x", "data": {"object": {"id": "sub_gone", "object": "subscription"}}}),
        json!({"id": "evt_d", "type": "customer.subscription.updated", "livemode": true,
            "data": {"object": {"id": subscription, "customer": stripe.customer_of(&account)}}}),
    ];
    for event in foreign {
        stripe.send_event(&app, &event).await;
    }
    handled(&app).await;
    let ignored = "SELECT count(*) FROM billing_events WHERE outcome = 'ignored'";
    assert_eq!(count(&app, ignored).await, 4);
    let state = app.act(&account, "GET", "/billing", Value::Null).await;
    assert_eq!(
        state.body["access"], "free",
        "a live event says nothing about a sandbox"
    );

    // A thin event only refers to the subscription, so the server has to request the subscription's customer from
    // Stripe.
    let event = json!({"id": "evt_e", "type": "v1.customer.subscription.updated", "object": "v2.core.event",
        "livemode": false, "related_object": {"id": subscription, "type": "subscription"}});
    stripe.send_event(&app, &event).await;
    wait_for_access(&app, &account, "active").await;
    handled(&app).await;
    assert_eq!(
        count(
            &app,
            "SELECT count(*) FROM billing_events WHERE outcome = 'applied'"
        )
        .await,
        1
    );
}

/// Each request of a checkout fails in every way, before and after it takes effect. In the end, the tenant has one
/// customer, and further requests return the same page.
#[tokio::test(flavor = "multi_thread")]
async fn faults_of_stripe_create_nothing_twice() {
    let stripe = TestStripe::start().await;
    let app = stripe
        .configure(TestApp::setup())
        .without_jobs()
        .start()
        .await;
    let mut failures = 0;
    for path in [
        "/v1/customers",
        "/v1/subscriptions",
        "/v1/prices",
        "/v1/checkout/sessions",
    ] {
        for fault in Fault::all(Duration::from_millis(20)) {
            let account = app.register().await;
            stripe.fake.fail_next(path, fault);
            let mut page = app
                .act(&account, "POST", "/billing/checkout", Value::Null)
                .await;
            for _ in 0..3 {
                if page.status == 201 {
                    break;
                }
                failures += 1;
                assert_eq!(
                    (page.status, page.problem()),
                    (503, "unavailable"),
                    "{path} {fault:?}: {}",
                    page.text
                );
                assert!(page.number("retry-after") >= 1);
                page = app
                    .act(&account, "POST", "/billing/checkout", Value::Null)
                    .await;
            }
            assert_eq!(page.status, 201, "{path} {fault:?}: {}", page.text);
            let again = app
                .act(&account, "POST", "/billing/checkout", Value::Null)
                .await;
            assert_eq!(again.body, page.body, "{path} {fault:?}");
            let own = |it: &Value| it["metadata"]["quota_tenant"] == account.tenant_id.as_str();
            let customers = stripe
                .fake
                .all("customer")
                .iter()
                .filter(|it| own(it))
                .count();
            assert_eq!(customers, 1, "{path} {fault:?}");
            let customer = stripe.customer_of(&account);
            let sessions = stripe.fake.all("checkout.session");
            let sessions: Vec<_> = sessions
                .iter()
                .filter(|it| it["customer"] == customer.as_str())
                .collect();
            // There is a second session only if Stripe failed permanently after it had created the first session. The
            // server did not receive the first session, so no user has seen its page.
            let is_lost = path == "/v1/checkout/sessions"
                && [500, 503]
                    .map(|it| Fault::after(How::Status(it)))
                    .contains(&fault);
            assert_eq!(
                sessions.len(),
                if is_lost { 2 } else { 1 },
                "{path} {fault:?}"
            );
        }
    }
    assert!(failures > 30, "{failures}");
}

/// A customer was created but the response was lost, and Stripe no longer recognizes the idempotency key.
#[tokio::test(flavor = "multi_thread")]
async fn customer_is_found_again_after_days() {
    let stripe = TestStripe::start().await;
    let app = stripe.app().await;
    let account = app.register().await;
    stripe
        .fake
        .fail_next("/v1/customers", Fault::after(How::Drop));
    let lost = app
        .act(&account, "POST", "/billing/checkout", Value::Null)
        .await;
    assert_eq!(lost.status, 503);
    stripe.fake.advance(2 * DAY);
    stripe.start_checkout(&app, &account).await;
    assert_eq!(stripe.fake.all("customer").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn checkout_leads_to_one_subscription() {
    let stripe = TestStripe::start().await;
    let app = stripe.app().await;
    let account = app.register().await;
    let post = async |key: Option<&str>| {
        let call = app
            .request(Method::POST, "/billing/checkout")
            .bearer(&account.access_token);
        match key {
            Some(key) => call.header("Idempotency-Key", key).send().await,
            None => call.send().await,
        }
    };
    let portal = app
        .act(&account, "POST", "/billing/portal", Value::Null)
        .await;
    assert_eq!((portal.status, portal.problem()), (409, "not-subscribed"));
    // The user clicks several times in a row.
    let (a, b, c) = tokio::join!(post(None), post(None), post(Some("k")));
    for page in [&a, &b, &c] {
        assert_eq!(page.status, 201, "{}", page.text);
        assert_eq!(page.body, a.body);
    }
    let sessions = stripe.fake.all("checkout.session");
    assert_eq!(sessions.len(), 1);
    assert_eq!(
        sessions[0]["client_reference_id"],
        account.tenant_id.as_str()
    );
    assert_eq!(sessions[0]["_line_items"].as_array().map(Vec::len), Some(2));
    let success = sessions[0]["success_url"].as_str().expect("a URL");
    assert!(
        success.ends_with("/console/billing?checkout=success"),
        "{success}"
    );

    // After the page has expired, the next page is different.
    stripe.fake.advance(DAY);
    let next = post(None).await;
    assert_eq!(next.status, 201);
    assert_ne!(next.body["url"], a.body["url"]);
    let session = next.text("url");
    let session = session.rsplit('/').next().expect("an ID");
    stripe
        .fake
        .pay_checkout(session, Card::Good, true)
        .expect("open");
    // After the user has completed Checkout, no further page is created, even before a webhook arrives. This applies
    // even while the payment has not succeeded yet.
    for is_paid in [false, true] {
        if is_paid {
            stripe.fake.settle_checkout(session, true).expect("paid");
        }
        let second = post(None).await;
        assert_eq!(
            (second.status, second.problem()),
            (409, "already-subscribed")
        );
    }
    // From another tenant, the same idempotency key identifies a different request.
    let other = app.register().await;
    let call = app
        .request(Method::POST, "/billing/checkout")
        .bearer(&other.access_token);
    let others = call.header("Idempotency-Key", "k").send().await;
    assert_eq!(others.status, 201);
    assert_ne!(others.body["url"], c.body["url"]);
    // The same idempotency key gives the same response.
    let replayed = post(Some("k")).await;
    assert_eq!((replayed.status, &replayed.body), (201, &c.body));
    let portal = app
        .act(&account, "POST", "/billing/portal", Value::Null)
        .await;
    assert_eq!(portal.status, 201, "{}", portal.text);
    assert!(portal.text("url").starts_with(stripe.fake.url()));
    let subscriptions = stripe.fake.all("subscription");
    assert_eq!(subscriptions.len(), 1);
    assert_eq!(
        subscriptions[0]["metadata"]["quota_tenant"],
        account.tenant_id.as_str()
    );
}

/// While Stripe is unreachable, tenants keep their access, and events wait.
#[tokio::test(flavor = "multi_thread")]
async fn outage_of_stripe_changes_no_access() {
    let stripe = TestStripe::start().await;
    let app = stripe.app().await;
    let account = app.register().await;
    let key = paid_key(&app, &account).await;
    let subscription = stripe.subscribe(&app, &account).await;
    wait_for_access(&app, &account, "active").await;
    wait_for_status(&app, &key, 200).await;
    handled(&app).await;

    stripe
        .fake
        .choose_faults(|_, _| Some(Fault::before(How::Html)));
    let fake_path = format!("subscriptions/{subscription}");
    stripe
        .fake
        .request(&Method::DELETE, &fake_path, "")
        .expect("canceled");
    stripe.deliver_all().await;
    for _ in 0..100 {
        if app.metric("quota_billing_errors_total").await > 0.0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(app.metric("quota_billing_errors_total").await > 0.0);
    assert_eq!(app.echo(&key).await.status, 200);
    let waiting = "SELECT count(*) FROM billing_events WHERE outcome IS NULL AND error IS NOT NULL AND due_at > now()";
    assert_eq!(count(&app, waiting).await, 1);

    stripe.fake.heal();
    wait_for_status(&app, &key, 402).await;
    handled(&app).await;
}

/// If a webhook never arrives, the regular read of the customer detects the change.
#[tokio::test(flavor = "multi_thread")]
async fn change_is_detected_despite_a_lost_webhook() {
    let stripe = TestStripe::start().await;
    let app = stripe.app().await;
    let account = app.register().await;
    let session = stripe.start_checkout(&app, &account).await;
    stripe
        .fake
        .pay_checkout(&session, Card::Good, false)
        .expect("open");
    stripe.fake.take_queued();
    let client = app.database.connect().await;
    client
        .execute("UPDATE billing_accounts SET read_due_at = now()", &[])
        .await
        .expect("time passes");
    wait_for_access(&app, &account, "active").await;
    assert_eq!(count(&app, "SELECT count(*) FROM billing_events").await, 0);
    let later =
        "SELECT count(*) FROM billing_accounts WHERE read_due_at > now() + interval '8 minutes'";
    assert_eq!(count(&app, later).await, 1);
}

/// Reads of one customer overlap. The read that started last determines the result, even if another read ends later.
#[tokio::test(flavor = "multi_thread")]
async fn outdated_read_is_dropped() {
    let stripe = TestStripe::start().await;
    let app = stripe
        .configure(TestApp::setup())
        .without_jobs()
        .start()
        .await;
    let account = app.register().await;
    let session = stripe.start_checkout(&app, &account).await;
    let tenant = quota_common::TenantId(account.tenant_id.parse().expect("a UUID"));
    let billing = app.state.billing.as_ref().expect("billing is on");
    // The first read sees the customer before the payment but returns late.
    let slow = Fault::after(How::Slow(Duration::from_millis(800)));
    stripe.fake.fail_next("/v1/subscriptions", slow);
    let (outdated, current) = tokio::join!(billing.read(tenant), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        stripe
            .fake
            .pay_checkout(&session, Card::Good, false)
            .expect("open");
        billing.read(tenant).await
    });
    assert!(outdated.expect("a read").is_none());
    assert!(current.expect("a read").is_some());
    let state = app.act(&account, "GET", "/billing", Value::Null).await;
    assert_eq!(state.body["access"], "active");
}

#[tokio::test(flavor = "multi_thread")]
async fn setting_up_twice_creates_nothing_twice() {
    let fake = quota_fake_stripe::FakeStripe::start()
        .await
        .expect("a free port");
    let app = TestApp::setup()
        .flag(format!(
            "--stripe-secret-key={}",
            quota_fake_stripe::SECRET_KEY
        ))
        .flag("--stripe-webhook-secret=whsec_x")
        .flag(format!("--stripe-api-base={}/", fake.url()))
        .without_jobs();
    let app = app.start().await;
    let settings = app.state.config.stripe.as_ref().expect("billing is on");
    let stripe = Stripe::new(settings).expect("valid settings");
    let url = setup::webhook_url("https://quota.example.com");
    let offer = Offer {
        product_name: "Quota".into(),
        currency: "usd".parse().expect("a currency"),
        price: "2900".into(),
        usage_price: Some("0.05".into()),
    };
    let before = setup::check(&stripe, &url, false).await.expect("checked");
    assert_eq!(
        before.iter().filter(|it| !it.is_ok).count(),
        3,
        "{before:?}"
    );

    let (first, secret) = setup::set_up(&stripe, &offer, &url).await.expect("set up");
    assert!(secret.is_some_and(|it| it.starts_with("whsec_")));
    assert!(
        first.iter().all(|it| it.text.ends_with("(created)")),
        "{first:?}"
    );
    let (second, secret) = setup::set_up(&stripe, &offer, &url).await.expect("set up");
    assert_eq!(secret, None);
    assert!(
        second.iter().all(|it| it.text.ends_with("(exists)")),
        "{second:?}"
    );
    assert_eq!(first.len(), 5);
    for (kind, count) in [
        ("product", 1),
        ("price", 2),
        ("billing.meter", 1),
        ("webhook_endpoint", 1),
    ] {
        assert_eq!(fake.all(kind).len(), count, "{kind}");
    }
    let endpoint = &fake.all("webhook_endpoint")[0];
    assert_eq!(endpoint["api_version"], quota_fake_stripe::API_VERSION);
    let after = setup::check(&stripe, &url, true).await.expect("checked");
    assert!(after.iter().all(|it| it.is_ok), "{after:?}");
    // A webhook endpoint that does not receive all events is detected.
    let id = endpoint["id"].as_str().expect("an ID");
    fake.request(
        &Method::POST,
        &format!("webhook_endpoints/{id}"),
        "enabled_events[0]=invoice.paid",
    )
    .expect("changed");
    let changed = setup::check(&stripe, &url, true).await.expect("checked");
    let wrong: Vec<_> = changed
        .iter()
        .filter(|it| !it.is_ok)
        .map(|it| it.name)
        .collect();
    assert_eq!(wrong, ["webhook endpoint"]);
}

/// Two replicas find at the same time that the tenant's customer was deleted. In some cases, one of their requests to
/// Stripe is slow.
#[tokio::test(flavor = "multi_thread")]
async fn customer_that_was_deleted_is_replaced_by_one_customer() {
    for slow in [
        None,
        Some("/v1/customers/"),
        Some("/v1/checkout"),
        Some("/v1/subscriptions"),
    ] {
        let stripe = TestStripe::start().await;
        let first = stripe.app().await;
        let second = stripe.configure(TestApp::setup());
        let second = second.database(first.database.clone()).start().await;
        let account = first.register().await;
        stripe.subscribe(&first, &account).await;
        let deleted = stripe.customer_of(&account);
        let path = format!("customers/{deleted}");
        let request = stripe.fake.request(&Method::DELETE, &path, "");
        request.expect("deleted");
        // Discard the event, so that the checkout is the first to detect the deletion.
        stripe.fake.take_queued();
        if let Some(path) = slow {
            let delay = How::Slow(Duration::from_secs(3));
            stripe.fake.fail_next(path, Fault::after(delay));
        }
        let checkout = async |app: &TestApp| {
            app.act(&account, "POST", "/billing/checkout", Value::Null)
                .await
        };
        let mut pages = tokio::join!(checkout(&first), checkout(&second));
        for (page, app) in [(&mut pages.0, &first), (&mut pages.1, &second)] {
            // A replica returns 503 while the other replica is creating the session.
            if page.status == 503 {
                *page = checkout(app).await;
            }
            assert_eq!(page.status, 201, "{slow:?}: {}", page.text);
        }
        let (one, other) = pages;
        assert_eq!(one.text("url"), other.text("url"), "{slow:?}");
        let customers = stripe.fake.all("customer");
        let usable = customers.iter().filter(|it| it["deleted"] != true);
        assert_eq!(usable.count(), 1, "{slow:?}: {customers:?}");
        let sessions = stripe.fake.all("checkout.session");
        let open = sessions
            .iter()
            .filter(|it| it["status"] == "open" && it["customer"] != deleted.as_str());
        assert_eq!(open.count(), 1, "{slow:?}: {sessions:?}");
    }
}

/// A tenant's customer no longer exists in Stripe, and neither do its subscriptions. The tenant can subscribe again.
#[tokio::test(flavor = "multi_thread")]
async fn tenant_whose_customer_was_deleted_can_subscribe_again() {
    let stripe = TestStripe::start().await;
    let app = stripe.app().await;
    let account = app.register().await;
    let key = paid_key(&app, &account).await;
    stripe.subscribe(&app, &account).await;
    wait_for_access(&app, &account, "active").await;
    wait_for_status(&app, &key, 200).await;
    let customer = stripe.customer_of(&account);
    let path = format!("customers/{customer}");
    stripe
        .fake
        .request(&Method::DELETE, &path, "")
        .expect("deleted");
    stripe.deliver_all().await;
    wait_for_access(&app, &account, "canceled").await;
    wait_for_status(&app, &key, 402).await;
    let portal = app
        .act(&account, "POST", "/billing/portal", Value::Null)
        .await;
    assert_eq!(
        (portal.status, portal.problem()),
        (409, "not-subscribed"),
        "{}",
        portal.text
    );

    stripe.subscribe(&app, &account).await;
    wait_for_access(&app, &account, "active").await;
    wait_for_status(&app, &key, 200).await;
    assert_ne!(stripe.customer_of(&account), customer);
    let shown = app
        .act(
            &account,
            "GET",
            "/admin/audit?action=subscription.update",
            Value::Null,
        )
        .await;
    let items = shown.body["items"].as_array().expect("events").iter().rev();
    let accesses: Vec<_> = items.map(|it| it["after"]["access"].clone()).collect();
    // `free`: the new customer has not subscribed yet.
    assert_eq!(
        accesses,
        ["active", "canceled", "free", "active"],
        "{}",
        shown.text
    );
}

/// Customers without a subscription are read at increasing intervals, and other customers about every 10 minutes.
#[tokio::test(flavor = "multi_thread")]
async fn customer_without_a_subscription_is_rarely_read() {
    let stripe = TestStripe::start().await;
    let app = stripe
        .configure(TestApp::setup())
        .without_jobs()
        .start()
        .await;
    let (idle, subscribed) = (app.register().await, app.register().await);
    let billing = app.state.billing.as_ref().expect("billing is on");
    for account in [&idle, &subscribed] {
        let session = stripe.start_checkout(&app, account).await;
        if account.tenant_id == subscribed.tenant_id {
            stripe
                .fake
                .pay_checkout(&session, Card::Good, false)
                .expect("open");
            let tenant = account.tenant_id.parse().expect("a UUID");
            billing
                .read(quota_common::TenantId(tenant))
                .await
                .expect("read");
        }
    }
    let client = app.database.connect().await;
    let due = async |account: &crate::support::app::Account, read: &str| {
        let sql = format!(
            "UPDATE billing_accounts SET read_due_at = now(), read_at = now() - interval '{read}'"
        );
        client.execute(&sql, &[]).await.expect("time passes");
        billing.read_due().await.expect("read");
        let sql = format!(
            "SELECT extract(epoch FROM read_due_at - now())::bigint / 60 FROM billing_accounts \
             WHERE tenant_id = '{}'",
            account.tenant_id
        );
        let minutes: i64 = client.query_one(&sql, &[]).await.expect("a row").get(0);
        minutes
    };
    let near = |minutes: i64, expected: i64| {
        let range = expected * 88 / 100 - 1..=expected * 112 / 100;
        assert!(range.contains(&minutes), "{minutes} instead of {expected}");
    };
    near(due(&idle, "2 minutes").await, 10);
    near(due(&idle, "1 hour").await, 120);
    near(due(&idle, "3 days").await, 24 * 60);
    near(due(&subscribed, "3 days").await, 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn tenant_cannot_use_up_the_rate_of_requests_to_stripe() {
    let stripe = TestStripe::start().await;
    let app = stripe.app().await;
    let (account, other) = (app.register().await, app.register().await);
    for account in [&account, &other] {
        stripe.start_checkout(&app, account).await;
    }
    let mut opened = 0;
    let refused = loop {
        let page = app
            .act(&account, "POST", "/billing/portal", Value::Null)
            .await;
        if page.status != 201 {
            break page;
        }
        opened += 1;
        assert!(opened < 50);
    };
    assert!(opened >= 10, "{opened}");
    assert_eq!(
        (refused.status, refused.problem()),
        (429, "too-many-requests")
    );
    assert!((1..=60).contains(&refused.number("retry-after")));
    let page = app
        .act(&other, "POST", "/billing/portal", Value::Null)
        .await;
    assert_eq!(page.status, 201, "{}", page.text);
}

/// Measures how long it takes from the webhook of a failed payment until three replicas return 402, and from the
/// webhook of a successful payment until they return 200. Other subscribers are not affected.
#[tokio::test(flavor = "multi_thread")]
async fn failed_payment_reaches_three_replicas_and_affects_no_one_else() {
    const OTHERS: u32 = 10_000;
    let redis = quota_testkit::redis::RedisServer::start().await;
    let stripe = TestStripe::start().await;
    stripe.fake.after_retries(AfterRetries::Unpaid);
    let setup = || {
        let setup = stripe.configure(TestApp::setup());
        let setup = setup.flag(format!("--redis-url={}", redis.url()));
        setup
            .flag("--redis-timeout=5s")
            .flag("--redis-connect-timeout=5s")
    };
    let first = setup().start().await;
    let second = setup().database(first.database.clone()).start().await;
    let third = setup().database(first.database.clone()).start().await;
    stripe.send_to(&first);
    let replicas = [&first, &second, &third];
    let (account, other) = (first.register().await, first.register().await);
    let key = paid_key(&first, &account).await;
    let others = paid_key(&first, &other).await;
    for account in [&account, &other] {
        stripe.subscribe(&first, account).await;
        wait_for_access(&first, account, "active").await;
    }
    for app in replicas {
        wait_for_status(app, &key, 200).await;
        wait_for_status(app, &others, 200).await;
    }
    let customer = stripe.customer_of(&account);
    let reaches = async |status: u16| {
        let began = std::time::Instant::now();
        stripe.deliver_all().await;
        let all = replicas.map(|app| wait_for_status(app, &key, status));
        futures_util::future::join_all(all).await;
        println!("{status} on all replicas after {:?}", began.elapsed());
    };
    let story = async {
        stripe.fake.set_card(&customer, Card::Declines);
        stripe.fake.advance(MONTH + Duration::from_hours(2));
        stripe.fake.advance(16 * DAY);
        reaches(402).await;
        stripe.fake.set_card(&customer, Card::Good);
        let open = stripe.fake.all("invoice").into_iter();
        let open = open
            .rev()
            .find(|it| it["status"] == "open" && it["customer"] == customer.as_str());
        let open = open.expect("an open invoice")["id"]
            .as_str()
            .expect("an ID")
            .to_owned();
        stripe
            .fake
            .request(&Method::POST, &format!("invoices/{open}/pay"), "")
            .expect("paid");
        reaches(200).await;
    };
    let traffic = async {
        let calls = (0..OTHERS).map(|n| {
            let app = replicas[n as usize % 3];
            async { app.echo(&others).await.status }
        });
        let statuses = futures_util::stream::iter(calls).buffer_unordered(6);
        statuses
            .filter(|it| std::future::ready(*it != 200))
            .count()
            .await
    };
    let ((), refused) = tokio::join!(story, traffic);
    assert_eq!(refused, 0, "of {OTHERS}");
}
