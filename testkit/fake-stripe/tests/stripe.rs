//! Tests the fake Stripe through async-stripe, which parses whole objects and fails if an object is invalid.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use quota_fake_stripe::{
    AfterRetries, Card, Delivery, FakeStripe, Fault, How, INVOICE_GRACE, SECRET_KEY, Signature,
    machine_now, sign,
};
use serde_json::Value;
use stripe::{Client, IdempotencyKey, RequestStrategy, StripeError, StripeRequest as _};
use stripe_billing::{
    billing_meter::{
        CreateBillingMeter, CreateBillingMeterDefaultAggregation,
        CreateBillingMeterDefaultAggregationFormula,
    },
    billing_meter_event::CreateBillingMeterEvent,
    billing_meter_event_summary::{
        ListIdBillingMeterEventSummary, ListIdBillingMeterEventSummaryValueGroupingWindow,
    },
    billing_portal_session::CreateBillingPortalSession,
    invoice::{ListInvoice, RetrieveInvoice},
    subscription::{
        CancelSubscription, ListSubscription, ListSubscriptionStatus, RetrieveSubscription,
        UpdateSubscription,
    },
};
use stripe_checkout::checkout_session::{
    CreateCheckoutSession, CreateCheckoutSessionLineItems, CreateCheckoutSessionSubscriptionData,
    RetrieveCheckoutSession,
};
use stripe_core::customer::{CreateCustomer, RetrieveCustomer};
use stripe_misc::webhook_endpoint::ListWebhookEndpoint;
use stripe_product::{
    price::{
        CreatePrice, CreatePriceRecurring, CreatePriceRecurringInterval,
        CreatePriceRecurringUsageType, ListPrice,
    },
    product::CreateProduct,
};

const HOUR: Duration = Duration::from_hours(1);
const DAY: Duration = Duration::from_hours(24);
const MONTH: Duration = Duration::from_hours(31 * 24);

fn client(fake: &FakeStripe) -> Client {
    let builder = stripe::ClientBuilder::new(SECRET_KEY).url(format!("{}/", fake.url()));
    builder
        .timeout(Duration::from_secs(60))
        .build()
        .expect("a valid configuration")
}

/// A fake Stripe with a customer, two prices and a meter.
struct Shop {
    fake: FakeStripe,
    client: Client,
    customer: String,
    flat: String,
    usage: String,
    meter: String,
}

impl Shop {
    async fn open() -> Self {
        let fake = FakeStripe::start().await.expect("a free port");
        let client = client(&fake);
        let customer = CreateCustomer::new()
            .email("a@example.com")
            .send(&client)
            .await
            .expect("a customer");
        let product = CreateProduct::new("Quota").send(&client).await;
        let product = product.expect("a product").id.to_string();
        let sum = CreateBillingMeterDefaultAggregation::new(
            CreateBillingMeterDefaultAggregationFormula::Sum,
        );
        let meter = CreateBillingMeter::new(sum, "Requests", "requests")
            .send(&client)
            .await
            .expect("a meter");
        let flat = CreatePriceRecurring::new(CreatePriceRecurringInterval::Month);
        let flat = CreatePrice::new(stripe_types::Currency::USD)
            .product(product.clone())
            .unit_amount(2900)
            .lookup_key("flat")
            .recurring(flat)
            .send(&client)
            .await
            .expect("a price");
        let metered = CreatePriceRecurring {
            meter: Some(meter.id.to_string()),
            usage_type: Some(CreatePriceRecurringUsageType::Metered),
            ..CreatePriceRecurring::new(CreatePriceRecurringInterval::Month)
        };
        let usage = CreatePrice::new(stripe_types::Currency::USD)
            .product(product)
            .unit_amount(2)
            .lookup_key("usage")
            .recurring(metered)
            .send(&client)
            .await
            .expect("a metered price");
        Self {
            customer: customer.id.to_string(),
            flat: flat.id.to_string(),
            usage: usage.id.to_string(),
            meter: meter.id.to_string(),
            client,
            fake,
        }
    }

    fn checkout(&self, trial_days: Option<u32>) -> CreateCheckoutSession {
        let line = |price: &str, quantity| CreateCheckoutSessionLineItems {
            price: Some(price.to_owned()),
            quantity,
            ..CreateCheckoutSessionLineItems::new()
        };
        CreateCheckoutSession::new()
            .mode(stripe_shared::CheckoutSessionMode::Subscription)
            .customer(self.customer.clone())
            .line_items(vec![line(&self.flat, Some(1)), line(&self.usage, None)])
            .subscription_data(CreateCheckoutSessionSubscriptionData {
                trial_period_days: trial_days,
                ..CreateCheckoutSessionSubscriptionData::new()
            })
            .success_url("https://example.com/success")
    }

    /// Subscribes through Checkout with a working card. Returns the ID of the subscription.
    async fn subscribe(&self, trial_days: Option<u32>) -> String {
        let session = self.checkout(trial_days).send(&self.client).await;
        let session = session.expect("a session");
        let paid = self.fake.pay_checkout(&session.id, Card::Good, false);
        let paid = paid.expect("the session is open");
        paid["subscription"].as_str().expect("an ID").to_owned()
    }

    async fn status(&self, subscription: &str) -> String {
        let subscription = RetrieveSubscription::new(subscription)
            .send(&self.client)
            .await;
        subscription.expect("a subscription").status.to_string()
    }

    /// Advances the clock to the end of the subscription's current period.
    fn end_period(&self, subscription: &str) {
        let subscription = self.fake.get("subscription", subscription);
        let end = subscription["items"]["data"][0]["current_period_end"].as_i64();
        let rest = end.expect("a time") - self.fake.now();
        self.fake.advance(Duration::from_secs(
            u64::try_from(rest).expect("in the future"),
        ));
    }

    fn event_kinds(&self) -> Vec<String> {
        let events = self.fake.all("event");
        events
            .iter()
            .map(|event| event["type"].as_str().expect("a type").to_owned())
            .collect()
    }

    async fn use_meter(&self, identifier: &str, value: i64, at: i64) -> Result<(), StripeError> {
        let payload = [
            ("stripe_customer_id".to_owned(), self.customer.clone()),
            ("value".to_owned(), value.to_string()),
        ];
        let event =
            CreateBillingMeterEvent::new("requests", std::collections::HashMap::from(payload));
        let event = event.identifier(identifier).timestamp(at);
        event.send(&self.client).await.map(drop)
    }
}

fn status_of<T: std::fmt::Debug>(result: Result<T, StripeError>) -> (u16, String) {
    match result.expect_err("an error") {
        StripeError::Stripe(error, status) => (status, error.message.unwrap_or_default()),
        other => (0, other.to_string()),
    }
}

/// A declined card leaves the Checkout Session open. A good card completes it and creates an active subscription.
#[tokio::test]
async fn checkout_creates_an_active_subscription() {
    let shop = Shop::open().await;
    let session = shop
        .checkout(None)
        .send(&shop.client)
        .await
        .expect("a session");
    assert!(session.url.is_some());
    let declined = shop.fake.pay_checkout(&session.id, Card::Declines, false);
    assert_eq!(declined.expect_err("declined").status, 402);
    assert!(shop.fake.all("subscription").is_empty());
    shop.fake
        .pay_checkout(&session.id, Card::Good, false)
        .expect("the session is still open");
    let session = RetrieveCheckoutSession::new(session.id)
        .send(&shop.client)
        .await;
    let session = session.expect("a session");
    assert_eq!(
        session.status,
        Some(stripe_shared::CheckoutSessionStatus::Complete)
    );
    let subscription = session
        .subscription
        .expect("a subscription")
        .id()
        .to_string();
    assert_eq!(shop.status(&subscription).await, "active");
    let kinds = shop.event_kinds();
    let position = |kind: &str| kinds.iter().position(|it| it == kind).expect(kind);
    assert!(position("customer.subscription.created") < position("invoice.paid"));
    assert!(position("invoice.paid") < position("checkout.session.completed"));
    let again = shop.fake.pay_checkout(&session.id, Card::Good, false);
    assert_eq!(again.expect_err("used").status, 400);
}

/// Checkout Sessions expire, and delayed payments succeed or fail.
#[tokio::test]
async fn checkout_expires_and_settles_later() {
    let shop = Shop::open().await;
    let expired = shop
        .checkout(None)
        .send(&shop.client)
        .await
        .expect("a session");
    let paid = shop
        .checkout(None)
        .send(&shop.client)
        .await
        .expect("a session");
    let failed = shop
        .checkout(None)
        .send(&shop.client)
        .await
        .expect("a session");
    for session in [&paid.id, &failed.id] {
        shop.fake
            .pay_checkout(session, Card::None, true)
            .expect("open");
    }
    let statuses = |fake: &FakeStripe| -> Vec<Value> {
        let all = fake.all("subscription");
        all.into_iter().map(|mut it| it["status"].take()).collect()
    };
    assert_eq!(statuses(&shop.fake), ["incomplete", "incomplete"]);
    shop.fake.settle_checkout(&paid.id, true).expect("settled");
    shop.fake
        .settle_checkout(&failed.id, false)
        .expect("settled");
    assert_eq!(statuses(&shop.fake), ["active", "incomplete"]);
    // An incomplete subscription expires after 23 hours.
    shop.fake.advance(23 * HOUR);
    assert_eq!(statuses(&shop.fake), ["active", "incomplete_expired"]);
    shop.fake.advance(HOUR);
    let session = RetrieveCheckoutSession::new(expired.id)
        .send(&shop.client)
        .await;
    let session = session.expect("a session");
    assert_eq!(
        session.status,
        Some(stripe_shared::CheckoutSessionStatus::Expired)
    );
    for kind in [
        "checkout.session.expired",
        "checkout.session.async_payment_succeeded",
        "checkout.session.async_payment_failed",
    ] {
        assert!(shop.event_kinds().iter().any(|it| it == kind), "{kind}");
    }
}

/// At the end of a trial, a subscription becomes active, or is paused and later resumed.
#[tokio::test]
async fn trials_end() {
    let shop = Shop::open().await;
    let subscription = shop.subscribe(Some(14)).await;
    assert_eq!(shop.status(&subscription).await, "trialing");
    shop.fake.advance(14 * DAY);
    assert_eq!(shop.status(&subscription).await, "active");
    assert!(
        shop.event_kinds()
            .iter()
            .any(|it| it == "customer.subscription.trial_will_end")
    );

    let form = format!(
        "customer={}&items[0][price]={}&trial_period_days=7&trial_settings[end_behavior][missing_payment_method]=pause",
        shop.customer, shop.flat
    );
    let paused = shop
        .fake
        .request(&Method::POST, "subscriptions", &form)
        .expect("a trial");
    let paused = paused["id"].as_str().expect("an ID");
    shop.fake.set_card(&shop.customer, Card::None);
    shop.fake.advance(7 * DAY);
    assert_eq!(shop.status(paused).await, "paused");
    shop.fake.set_card(&shop.customer, Card::Good);
    shop.fake
        .request(&Method::POST, &format!("subscriptions/{paused}/resume"), "")
        .expect("resumed");
    assert_eq!(shop.status(paused).await, "active");
}

/// A renewal moves the billing periods of the subscription's items. After a failed payment, a subscription is past due.
/// A later payment makes it active again. If the last attempt fails, the subscription is marked unpaid, is canceled, or
/// remains past due.
#[tokio::test]
async fn failed_renewals_run_their_course() {
    for (outcome, last) in [
        (AfterRetries::Cancel, "canceled"),
        (AfterRetries::Unpaid, "unpaid"),
        (AfterRetries::PastDue, "past_due"),
    ] {
        let shop = Shop::open().await;
        shop.fake.after_retries(outcome);
        let id = shop.subscribe(None).await;
        let before = RetrieveSubscription::new(&*id)
            .send(&shop.client)
            .await
            .expect("found");
        let period_end = before.items.data[0].current_period_end;
        shop.fake.set_card(&shop.customer, Card::Declines);
        // Do not advance by `MONTH`: if the period is shorter, the payment would be retried before the card is good.
        shop.end_period(&id);
        let renewed = RetrieveSubscription::new(&*id)
            .send(&shop.client)
            .await
            .expect("found");
        assert_eq!(renewed.items.data[0].current_period_start, period_end);
        shop.fake.advance(2 * HOUR);
        assert_eq!(shop.status(&id).await, "past_due");
        let open = ListInvoice::new()
            .subscription(&*id)
            .status(stripe_shared::InvoiceStatus::Open)
            .send(&shop.client)
            .await
            .expect("a list");
        assert_eq!(open.data.len(), 1);
        // A payment succeeds between the two failures.
        shop.fake.set_card(&shop.customer, Card::Good);
        shop.fake.advance(3 * DAY);
        assert_eq!(shop.status(&id).await, "active");
        // Every attempt to collect the payment for the next renewal fails.
        shop.fake.set_card(&shop.customer, Card::RequiresAction);
        shop.fake.advance(MONTH);
        assert_eq!(shop.status(&id).await, "past_due");
        shop.fake.advance(16 * DAY);
        assert_eq!(shop.status(&id).await, last);
        let all = ListSubscription::new()
            .customer(&*shop.customer)
            .status(ListSubscriptionStatus::All)
            .send(&shop.client)
            .await
            .expect("a list");
        assert_eq!(all.data.len(), 1);
    }
}

/// Subscriptions are canceled at the end of the period, or immediately.
#[tokio::test]
async fn subscriptions_are_canceled() {
    let shop = Shop::open().await;
    let id = shop.subscribe(None).await;
    let at_end = UpdateSubscription::new(&*id)
        .cancel_at_period_end(true)
        .send(&shop.client)
        .await;
    let at_end = at_end.expect("updated");
    assert!(at_end.cancel_at_period_end && at_end.cancel_at.is_some());
    assert_eq!(shop.status(&id).await, "active");
    shop.fake.advance(MONTH);
    assert_eq!(shop.status(&id).await, "canceled");
    assert!(
        shop.event_kinds()
            .iter()
            .any(|it| it == "customer.subscription.deleted")
    );

    let other = shop.subscribe(None).await;
    CancelSubscription::new(&*other)
        .send(&shop.client)
        .await
        .expect("canceled");
    assert_eq!(shop.status(&other).await, "canceled");
}

/// A request with a known idempotency key gets the first response again, even if the connection was lost, and even if
/// the response is an error. A known key is rejected if the parameters differ, or while the first request with it is in
/// progress. Keys are forgotten after a day.
#[tokio::test]
async fn idempotency_keys_follow_the_rules() {
    let shop = Shop::open().await;
    let create = async |key: &str, email: &str| {
        let strategy = RequestStrategy::Idempotent(IdempotencyKey::new(key).expect("a key"));
        let request = CreateCustomer::new().email(email).customize();
        request.request_strategy(strategy).send(&shop.client).await
    };
    let count = || shop.fake.all("customer").len();
    let before = count();

    shop.fake
        .fail_next("/v1/customers", Fault::after(How::Drop));
    assert_eq!(status_of(create("lost", "b@example.com").await).0, 0);
    assert_eq!(count(), before + 1);
    let replayed = create("lost", "b@example.com")
        .await
        .expect("the first response");
    assert_eq!(count(), before + 1);
    assert_eq!(replayed.email.as_deref(), Some("b@example.com"));

    let (status, message) = status_of(create("lost", "c@example.com").await);
    assert_eq!(status, 400);
    assert!(message.contains("same parameters"), "{message}");

    shop.fake
        .fail_next("/v1/customers", Fault::after(How::Status(500)));
    assert_eq!(status_of(create("failed", "d@example.com").await).0, 500);
    assert_eq!(status_of(create("failed", "d@example.com").await).0, 500);
    assert_eq!(count(), before + 2);

    shop.fake.fail_next(
        "/v1/customers",
        Fault::before(How::Slow(Duration::from_secs(5))),
    );
    let has_arrived = || {
        let received = shop.fake.received();
        let mut keys = received.into_iter().map(|it| it.idempotency_key);
        keys.any(|key| key.as_deref() == Some("both"))
    };
    let (first, second) = tokio::join!(create("both", "e@example.com"), async {
        while !has_arrived() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        create("both", "e@example.com").await
    });
    assert!(first.is_ok());
    assert_eq!(status_of(second).0, 409);
    assert_eq!(count(), before + 3);

    shop.fake.advance(DAY);
    create("lost", "c@example.com")
        .await
        .expect("the key is forgotten");
    assert_eq!(count(), before + 4);
}

#[tokio::test]
async fn faults_happen_before_or_after_the_effect() {
    let shop = Shop::open().await;
    for fault in Fault::all(Duration::from_millis(1)) {
        let before = shop.fake.all("customer").len();
        shop.fake.fail_next("/v1/customers", fault);
        let result = CreateCustomer::new().send(&shop.client).await;
        let had_effect = shop.fake.all("customer").len() > before;
        let is_slow = matches!(fault.how, How::Slow(_));
        assert_eq!(result.is_ok(), is_slow, "{fault:?}");
        let expected = is_slow || fault.when == quota_fake_stripe::When::After;
        assert_eq!(had_effect, expected, "{fault:?}");
        if let How::Status(status) = fault.how {
            assert_eq!(status_of(result).0, status);
        }
    }
    // After a rate limit, the idempotency key is still unused.
    let strategy = || RequestStrategy::Idempotent(IdempotencyKey::new("limited").expect("a key"));
    shop.fake
        .fail_next("/v1/customers", Fault::before(How::Status(429)));
    let limited = CreateCustomer::new()
        .customize()
        .request_strategy(strategy());
    assert_eq!(status_of(limited.send(&shop.client).await).0, 429);
    let again = CreateCustomer::new()
        .customize()
        .request_strategy(strategy());
    again.send(&shop.client).await.expect("not replayed");
}

/// Covers duplicate identifiers, the time window, errors that a thin event reports, and usage after finalization.
#[tokio::test]
async fn meters_count_each_identifier_once_and_charge_what_arrives_in_time() {
    let shop = Shop::open().await;
    let id = shop.subscribe(None).await;
    let now = shop.fake.now();
    shop.use_meter("one", 5, now).await.expect("counted");
    let (status, message) = status_of(shop.use_meter("one", 5, now).await);
    assert_eq!(status, 400);
    assert!(
        message.contains("already exists with identifier"),
        "{message}"
    );
    assert_eq!(
        status_of(shop.use_meter("old", 1, now - 35 * 86_400 - 10).await).0,
        400
    );
    assert_eq!(
        status_of(shop.use_meter("early", 1, now + 400).await).0,
        400
    );
    let payload = [
        ("stripe_customer_id".to_owned(), "cus_nobody".to_owned()),
        ("value".to_owned(), "1".to_owned()),
    ];
    CreateBillingMeterEvent::new("requests", std::collections::HashMap::from(payload))
        .send(&shop.client)
        .await
        .expect("the error is found later");
    let thin = shop
        .fake
        .all("event")
        .into_iter()
        .next_back()
        .expect("an event");
    assert_eq!(thin["type"], "v1.billing.meter.error_report_triggered");

    let summaries = ListIdBillingMeterEventSummary::new(
        &*shop.meter,
        shop.customer.clone(),
        now - now % 3600 + 3600,
        now - now % 3600,
    );
    let summaries = summaries
        .value_grouping_window(ListIdBillingMeterEventSummaryValueGroupingWindow::Hour)
        .send(&shop.client)
        .await
        .expect("summaries");
    let total: f64 = summaries.data.iter().map(|it| it.aggregated_value).sum();
    assert!((total - 5.0).abs() < 0.1, "{total}");

    // Late usage is charged if it arrives before the invoice is finalized, an hour after the period ends.
    shop.end_period(&id);
    shop.use_meter("late", 7, now + 60).await.expect("counted");
    shop.fake.advance(Duration::from_secs(
        u64::try_from(INVOICE_GRACE).expect("positive"),
    ));
    shop.use_meter("too-late", 100, now + 60)
        .await
        .expect("accepted");
    shop.fake.advance(HOUR);
    let invoices = ListInvoice::new()
        .subscription(&*id)
        .send(&shop.client)
        .await
        .expect("a list");
    assert_eq!(invoices.data.len(), 2);
    assert_eq!(invoices.data[0].total, 2900 + 2 * (5 + 7));
    let unbilled: Vec<_> = shop
        .fake
        .usage()
        .into_iter()
        .filter(|it| it.invoice.is_none())
        .collect();
    assert_eq!(unbilled.len(), 1);
    assert_eq!(unbilled[0].identifier, "too-late");
    // An identifier may be used again after a day.
    shop.use_meter("one", 5, shop.fake.now())
        .await
        .expect("counted again");
}

/// An invoice that cannot be finalized remains a draft.
#[tokio::test]
async fn finalization_can_fail() {
    let shop = Shop::open().await;
    let id = shop.subscribe(None).await;
    shop.fake.fail_finalizations(1);
    shop.fake.advance(MONTH + 2 * HOUR);
    let latest = RetrieveSubscription::new(&*id)
        .send(&shop.client)
        .await
        .expect("found");
    let latest = latest
        .latest_invoice
        .expect("an invoice")
        .id()
        .clone()
        .expect("an ID");
    let invoice = RetrieveInvoice::new(latest.clone())
        .send(&shop.client)
        .await
        .expect("found");
    assert_eq!(invoice.status, Some(stripe_shared::InvoiceStatus::Draft));
    assert!(
        shop.event_kinds()
            .iter()
            .any(|it| it == "invoice.finalization_failed")
    );
    shop.fake
        .request(&Method::POST, &format!("invoices/{latest}/finalize"), "")
        .expect("final");
    let invoice = RetrieveInvoice::new(latest)
        .send(&shop.client)
        .await
        .expect("found");
    assert_eq!(invoice.status, Some(stripe_shared::InvoiceStatus::Paid));
}

/// A received webhook: the signature header and the body.
type Hook = (Option<String>, String);

/// Starts a server that receives webhooks, and returns its URL and the received webhooks. The server responds with
/// `statuses`, the last one first, and after that always with 200.
async fn receiver(mut statuses: Vec<u16>) -> (String, Arc<Mutex<Vec<Hook>>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a free port");
    let url = format!("http://{}/hook", listener.local_addr().expect("bound"));
    let hooks = Arc::new(Mutex::new(Vec::new()));
    let received = hooks.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let received = received.clone();
            let status = statuses.pop().unwrap_or(200);
            let service = service_fn(move |request: Request<Incoming>| {
                let received = received.clone();
                async move {
                    let header = request.headers().get("stripe-signature");
                    let header = header.and_then(|it| it.to_str().ok()).map(str::to_owned);
                    let body = request.into_body().collect().await?.to_bytes();
                    let body = String::from_utf8_lossy(&body).into_owned();
                    received.lock().expect("no panic").push((header, body));
                    let response = Response::builder()
                        .status(status)
                        .header("connection", "close");
                    Ok::<_, hyper::Error>(response.body(Full::<Bytes>::default()).expect("valid"))
                }
            });
            drop(
                http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await,
            );
        }
    });
    (url, hooks)
}

/// Returns whether a header contains a valid signature of the body.
fn is_signed(hook: &Hook, secret: &str) -> bool {
    let Some(header) = &hook.0 else { return false };
    let at = header
        .split(',')
        .next()
        .and_then(|it| it.strip_prefix("t="));
    let at: i64 = at.and_then(|at| at.parse().ok()).expect("a time");
    let expected = sign(at, &hook.1, &[secret]);
    let expected = expected.split(',').next_back().expect("a signature");
    header.split(',').any(|part| part == expected)
}

/// Covers every option of a delivery.
#[tokio::test]
async fn webhooks_are_signed_and_delivered_in_every_way() {
    let shop = Shop::open().await;
    let (url, hooks) = receiver(vec![]).await;
    let (endpoint, secret) = shop.fake.add_endpoint(&url);
    let listed = ListWebhookEndpoint::new()
        .send(&shop.client)
        .await
        .expect("a list");
    assert_eq!(listed.data[0].id.as_str(), endpoint);
    assert_eq!(listed.data[0].secret, None, "shown only once");
    shop.subscribe(None).await;
    let queued = shop.fake.take_queued();
    assert!(queued.len() >= 5, "{}", queued.len());
    let event = &queued[0].0;
    let deliver = async |delivery: Delivery| {
        assert_eq!(shop.fake.deliver(event, &endpoint, &delivery).await, 200);
        hooks.lock().expect("no panic").pop().expect("a delivery")
    };
    let signature = |signature| Delivery {
        signature,
        ..Delivery::default()
    };

    let first = deliver(Delivery::default()).await;
    assert!(is_signed(&first, &secret));
    let again = deliver(Delivery::default()).await;
    assert_eq!(first.1, again.1);
    let renamed = deliver(Delivery {
        under_new_id: true,
        ..Delivery::default()
    })
    .await;
    let parse = |hook: &Hook| serde_json::from_str::<Value>(&hook.1).expect("JSON");
    assert_ne!(parse(&renamed)["id"], parse(&first)["id"]);
    assert_eq!(parse(&renamed)["data"], parse(&first)["data"]);
    assert!(is_signed(&renamed, &secret));

    assert_eq!(deliver(signature(Signature::Missing)).await.0, None);
    assert!(!is_signed(
        &deliver(signature(Signature::Wrong)).await,
        &secret
    ));
    let stale = deliver(signature(Signature::Stale(600))).await;
    assert!(is_signed(&stale, &secret));
    let age = stale
        .0
        .as_deref()
        .and_then(|it| it[2..].split(',').next()?.parse::<i64>().ok());
    assert!(age.expect("a time") <= machine_now() - 600);

    let new = shop.fake.rotate_secret(&endpoint);
    let both = deliver(Delivery::default()).await;
    assert!(is_signed(&both, &secret) && is_signed(&both, &new));
    assert!(is_signed(
        &deliver(signature(Signature::Previous)).await,
        &secret
    ));
    shop.fake.advance(DAY);
    let only = deliver(Delivery::default()).await;
    assert!(!is_signed(&only, &secret) && is_signed(&only, &new));

    let unknown = deliver(Delivery {
        kind: Some("x.y".into()),
        ..Delivery::default()
    })
    .await;
    assert_eq!(parse(&unknown)["type"], "x.y");
    let old = deliver(Delivery {
        as_of_2024: true,
        ..Delivery::default()
    })
    .await;
    assert_eq!(parse(&old)["api_version"], "2024-06-20");
    let object = &parse(&old)["data"]["object"];
    assert!(object["current_period_end"].is_i64(), "{object}");
    assert!(object["items"]["data"][0]["current_period_end"].is_null());
}

/// A delivery that fails is sent again, with a new signature.
#[tokio::test]
async fn failed_deliveries_are_repeated() {
    let mut shop = Shop::open().await;
    let (url, hooks) = receiver(vec![200, 500]).await;
    let (_, secret) = shop.fake.add_endpoint(&url);
    shop.fake.deliver_immediately();
    CreateCustomer::new()
        .send(&shop.client)
        .await
        .expect("a customer");
    for _ in 0..200 {
        if hooks.lock().expect("no panic").len() == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let hooks = hooks.lock().expect("no panic").clone();
    assert_eq!(hooks.len(), 2);
    assert_eq!(hooks[0].1, hooks[1].1);
    assert!(hooks.iter().all(|hook| is_signed(hook, &secret)));
}

/// A user can go through the lifetime of a subscription in a browser.
#[tokio::test]
async fn pages_lead_through_checkout_and_the_portal() {
    let shop = Shop::open().await;
    let http = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none());
    let http = http.build().expect("a client");
    let session = shop
        .checkout(None)
        .send(&shop.client)
        .await
        .expect("a session");
    let url = session.url.expect("a page");
    let page = http
        .get(&url)
        .send()
        .await
        .expect("a response")
        .text()
        .await
        .expect("text");
    assert!(page.contains("29.00 USD"), "{page}");
    let press = async |url: &str, button: &str| {
        let form = http
            .post(url)
            .header("content-type", "application/x-www-form-urlencoded");
        form.body(format!("do={button}"))
            .send()
            .await
            .expect("a response")
    };
    assert_eq!(press(&url, "decline").await.status(), 402);
    let paid = press(&url, "pay").await;
    assert_eq!(paid.headers()["location"], "https://example.com/success");
    let id = shop.fake.all("subscription")[0]["id"]
        .as_str()
        .expect("an ID")
        .to_owned();
    assert_eq!(shop.status(&id).await, "active");

    let portal = CreateBillingPortalSession::new()
        .customer(&*shop.customer)
        .return_url("https://example.com/back")
        .send(&shop.client)
        .await
        .expect("a session");
    assert_eq!(press(&portal.url, "end").await.status(), 303);
    assert!(shop.fake.get("subscription", &id)["cancel_at_period_end"] == true);
    press(&portal.url, "keep").await;
    press(&portal.url, "bad").await;
    press(&portal.url, "month").await;
    shop.fake.advance(2 * HOUR);
    assert_eq!(shop.status(&id).await, "past_due");
    press(&portal.url, "good").await;
    assert_eq!(shop.status(&id).await, "active");
    assert_eq!(
        press(&portal.url, "back").await.headers()["location"],
        "https://example.com/back"
    );
}

/// Checks the responses to requests with a wrong key, for an unknown object or path, or without required parameters.
#[tokio::test]
async fn bad_requests_are_rejected() {
    let shop = Shop::open().await;
    let stranger = stripe::ClientBuilder::new("sk_test_wrong").url(format!("{}/", shop.fake.url()));
    let stranger = stranger.build().expect("a valid configuration");
    assert_eq!(
        status_of(CreateCustomer::new().send(&stranger).await).0,
        401
    );
    let missing = RetrieveCustomer::new("cus_nobody").send(&shop.client).await;
    assert_eq!(status_of(missing).0, 404);
    let unknown = shop.fake.request(&Method::GET, "nothing/here", "");
    assert_eq!(unknown.expect_err("an error").status, 404);
    let incomplete = shop.fake.request(&Method::POST, "prices", "currency=usd");
    assert_eq!(
        incomplete.expect_err("an error").body["error"]["code"],
        "parameter_missing"
    );
    let prices = ListPrice::new()
        .lookup_keys(vec!["usage".to_owned()])
        .send(&shop.client)
        .await;
    let prices = prices.expect("a list");
    assert_eq!(prices.data.len(), 1);
    assert_eq!(prices.data[0].id.as_str(), shop.usage);
}

/// Stripe rejects parameters that it does not document. The fake also records such requests, so that the test that sent
/// them fails.
#[tokio::test]
async fn requests_that_stripe_does_not_document_are_detected() {
    let fake = FakeStripe::start().await.expect("a free port");
    let http = reqwest::Client::new();
    let send = async |method: &str, path: &str, form: &str, headers: &[(&'static str, &str)]| {
        let (url, body) = match method {
            "GET" => (format!("{}{path}?{form}", fake.url()), ""),
            _ => (format!("{}{path}", fake.url()), form),
        };
        let method = method.parse::<reqwest::Method>().expect("a method");
        let mut call = http.request(method, url).bearer_auth(SECRET_KEY);
        let defaults = [
            ("Stripe-Version", quota_fake_stripe::API_VERSION),
            ("Content-Type", "application/x-www-form-urlencoded"),
        ];
        for (name, value) in defaults.iter().chain(headers) {
            let mut only = reqwest::header::HeaderMap::new();
            only.insert(*name, value.parse().expect("a value"));
            // `headers` replaces default headers of the same name.
            call = call.headers(only);
        }
        let status = call.body(body.to_owned()).send().await;
        (
            status.expect("a response").status().as_u16(),
            fake.take_invalid(),
        )
    };
    let price = "currency=usd&product=p&unit_amount=5&recurring[interval]=month";
    let long = "n".repeat(201);
    for (method, path, form, headers, part) in [
        (
            "POST",
            "/v1/prices",
            format!("{price}&color=red"),
            &[][..],
            "color",
        ),
        (
            "POST",
            "/v1/prices",
            format!("{price}&recurring[until]=5"),
            &[],
            "until",
        ),
        (
            "POST",
            "/v1/prices",
            price.replace("=5", "=five"),
            &[],
            "/unit_amount",
        ),
        (
            "POST",
            "/v1/prices",
            price.replace("month", "moon"),
            &[],
            "/recurring/interval",
        ),
        (
            "POST",
            "/v1/prices",
            price.replace("currency=usd&", ""),
            &[],
            "currency",
        ),
        (
            "POST",
            "/v1/prices",
            format!("{price}&active=maybe"),
            &[],
            "/active",
        ),
        (
            "POST",
            "/v1/prices",
            format!("{price}&metadata=none"),
            &[],
            "/metadata",
        ),
        (
            "POST",
            "/v1/prices",
            format!("{price}&lookup_key={long}"),
            &[],
            "/lookup_key",
        ),
        (
            "POST",
            "/v1/webhook_endpoints",
            "url=u&enabled_events[0]=no.event".into(),
            &[],
            "no.event",
        ),
        (
            "POST",
            "/v1/billing/meter_events",
            "event_name=e&payload[value]=1&timestamp=now".into(),
            &[],
            "/timestamp",
        ),
        (
            "GET",
            "/v1/subscriptions",
            "status=alive".into(),
            &[],
            "/status",
        ),
        (
            "GET",
            "/v1/subscriptions",
            "limit=ten".into(),
            &[],
            "/limit",
        ),
        (
            "GET",
            "/v1/subscriptions/a/b",
            String::new(),
            &[],
            "no such operation",
        ),
        ("PUT", "/v1/prices", String::new(), &[], "no such operation"),
        (
            "GET",
            "/v1/account",
            String::new(),
            &[("Stripe-Version", "2020-08-27")],
            "Stripe-Version",
        ),
        (
            "POST",
            "/v1/customers",
            "name=a".into(),
            &[("Content-Type", "application/json")],
            "Content-Type",
        ),
        (
            "POST",
            "/v1/customers",
            "name=a".into(),
            &[("Idempotency-Key", &"k".repeat(256))],
            "Idempotency-Key",
        ),
    ] {
        let (status, invalid) = send(method, path, &form, headers).await;
        assert_eq!(status, 400, "{method} {path} {form}: {invalid:?}");
        assert_eq!(invalid.len(), 1, "{method} {path} {form}: {invalid:?}");
        assert!(invalid[0].contains(part), "{part}: {invalid:?}");
    }
    for (method, path, form) in [
        ("POST", "/v1/products", "name=p&id=p".into()),
        (
            "POST",
            "/v1/prices",
            format!("{price}&metadata[a]=b&lookup_key={}", &long[1..]),
        ),
        ("POST", "/v1/customers", "name=".into()),
        ("POST", "/v1/prices", format!("{price}&active=true")),
        ("GET", "/v1/customers", "limit=10&created[gte]=5".into()),
        ("GET", "/v1/account", String::new()),
    ] {
        let (status, invalid) = send(method, path, &form, &[]).await;
        assert_eq!(
            (status, &invalid[..]),
            (200, &[][..]),
            "{method} {path} {form}"
        );
    }
    let operations: Vec<_> = fake.received().iter().map(|it| it.operation).collect();
    assert_eq!(operations[0], Some("POST /v1/prices"));
    assert_eq!(operations[12], None);
}

#[tokio::test]
#[should_panic(expected = "there is no such operation")]
async fn test_with_an_invalid_request_fails() {
    let fake = FakeStripe::start().await.expect("a free port");
    let url = format!("{}/v1/nothing", fake.url());
    reqwest::get(url).await.expect("a response");
}
