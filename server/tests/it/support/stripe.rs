//! The fake Stripe, with the objects that Quota needs, and servers that bill through it.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use quota_fake_stripe::{Card, Delivery, FakeStripe, SECRET_KEY, sign};
use reqwest::Method;
use serde_json::{Value, json};

use super::{
    app::{Account, Setup, TestApp},
    postgres::TestDatabase,
};
use crate::usage;

/// How long a test waits for a result, even on a busy machine.
const AT_MOST: Duration = Duration::from_secs(15);

pub(crate) struct TestStripe {
    pub(crate) fake: FakeStripe,
    pub(crate) endpoint: String,
    pub(crate) secret: String,
}

impl TestStripe {
    /// Starts a fake Stripe with a monthly price, a price for usage and a webhook endpoint.
    pub(crate) async fn start() -> Self {
        let fake = FakeStripe::start().await.expect("loopback has a free port");
        let post = |path: &str, form: &str| {
            let created = fake.request(&Method::POST, path, form);
            created.expect("the fake creates the object")["id"]
                .as_str()
                .expect("an ID")
                .to_owned()
        };
        let product = post("products", "name=Quota");
        let monthly =
            "currency=usd&unit_amount=2900&recurring[interval]=month&lookup_key=quota_monthly";
        post("prices", &format!("{monthly}&product={product}"));
        let meter =
            "default_aggregation[formula]=sum&display_name=Requests&event_name=quota_requests";
        let meter = post("billing/meters", meter);
        let usage =
            "currency=usd&unit_amount=1&recurring[interval]=month&recurring[usage_type]=metered";
        post(
            "prices",
            &format!("{usage}&recurring[meter]={meter}&product={product}&lookup_key=quota_usage"),
        );
        // `send_to` changes the URL once a server runs.
        let (endpoint, secret) = fake.add_endpoint("http://127.0.0.1:9/");
        Self {
            fake,
            endpoint,
            secret,
        }
    }

    /// Configures a server to bill through the fake Stripe.
    pub(crate) fn configure(&self, setup: Setup) -> Setup {
        setup
            .flag(format!("--stripe-secret-key={SECRET_KEY}"))
            .flag(format!("--stripe-webhook-secret={}", self.secret))
            .flag(format!("--stripe-api-base={}", self.fake.url()))
    }

    /// Starts a server that bills through the fake Stripe and receives its webhooks.
    pub(crate) async fn app(&self) -> TestApp {
        let app = self.configure(TestApp::setup()).start().await;
        self.send_to(&app);
        app
    }

    pub(crate) fn send_to(&self, app: &TestApp) {
        let url = app.url("/billing/stripe/webhook");
        self.fake.move_endpoint(&self.endpoint, &url);
    }

    /// Sends an event that the fake Stripe has not created, with a valid signature.
    pub(crate) async fn send_event(&self, app: &TestApp, event: &Value) {
        let body = event.to_string();
        let header = sign(usage::now().timestamp(), &body, &[&self.secret]);
        let call = app.request(Method::POST, "/billing/stripe/webhook");
        let call = call.body("application/json; charset=utf-8", body);
        let answer = call.header("Stripe-Signature", &header).send().await;
        assert_eq!(answer.status, 204, "{}", answer.text);
    }

    /// Delivers one event. Returns the status of the response.
    pub(crate) async fn deliver(&self, event: &str, delivery: &Delivery) -> u16 {
        self.fake.deliver(event, &self.endpoint, delivery).await
    }

    /// Delivers all queued events, each once.
    pub(crate) async fn deliver_all(&self) {
        for status in self.fake.deliver_all().await {
            assert_eq!(status, 204);
        }
    }

    /// Starts a subscription as a tenant's user, up to the Checkout page. Returns the ID of the Checkout Session.
    pub(crate) async fn start_checkout(&self, app: &TestApp, account: &Account) -> String {
        let page = app
            .act(account, "POST", "/billing/checkout", Value::Null)
            .await;
        assert_eq!(page.status, 201, "{}", page.text);
        let url = page.text("url");
        url.rsplit('/').next().expect("an ID").to_owned()
    }

    /// Subscribes with a working card, and delivers the webhooks. Returns the subscription's ID.
    pub(crate) async fn subscribe(&self, app: &TestApp, account: &Account) -> String {
        let session = self.start_checkout(app, account).await;
        let paid = self.fake.pay_checkout(&session, Card::Good, false);
        self.deliver_all().await;
        let paid = paid.expect("the session is open");
        paid["subscription"].as_str().expect("an ID").to_owned()
    }

    /// Returns the ID of the tenant's customer.
    pub(crate) fn customer_of(&self, account: &Account) -> String {
        let customers = self.fake.all("customer");
        let own = |it: &&Value| it["metadata"]["quota_tenant"] == account.tenant_id.as_str();
        let customer = customers
            .iter()
            .find(own)
            .expect("the tenant has a customer");
        customer["id"].as_str().expect("an ID").to_owned()
    }
}

/// Waits until `GET /billing` returns the given access. Returns the body of that response.
pub(crate) async fn wait_for_access(app: &TestApp, account: &Account, access: &str) -> Value {
    let began = Instant::now();
    loop {
        let state = app.act(account, "GET", "/billing", Value::Null).await;
        assert_eq!(state.status, 200, "{}", state.text);
        if state.body["access"] == access {
            return state.body;
        }
        assert!(began.elapsed() < AT_MOST, "not {access}: {}", state.text);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until requests with a key get the given status. Returns how long that took.
pub(crate) async fn wait_for_status(app: &TestApp, key: &str, status: u16) -> Duration {
    let began = Instant::now();
    loop {
        let answer = app.echo(key).await;
        if answer.status == status {
            return began.elapsed();
        }
        assert!(
            began.elapsed() < AT_MOST,
            "not {status}: {} {}",
            answer.status,
            answer.text
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Creates a plan marked `paid` with a high limit, and a key on it. Returns the key's secret.
pub(crate) async fn paid_key(app: &TestApp, account: &Account) -> String {
    let plan = app
        .plan(
            account,
            json!({"billing": "paid", "default_rpm": 6_000_000}),
        )
        .await;
    app.key(account, &plan).await.text
}

/// Runs `quota billing` against a fake Stripe. Returns the command's exit status and output.
pub(crate) async fn billing_command(
    database: &TestDatabase,
    stripe: &FakeStripe,
    arguments: &[&str],
    settings: &[(&str, &str)],
) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quota"));
    command
        .arg("billing")
        .args(arguments)
        .env_clear()
        .env("DATABASE_URL", database.url())
        .env("STRIPE_SECRET_KEY", SECRET_KEY)
        .env("STRIPE_API_BASE", stripe.url())
        .env("QUOTA_PUBLIC_URL", "https://quota.example.com")
        .envs(settings.iter().copied());
    let output = tokio::task::spawn(async move { command.output() });
    let output = output.await.expect("no panic").expect("the binary runs");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output.status.code(), text)
}
