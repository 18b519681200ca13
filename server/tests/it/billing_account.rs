//! Tests a server with a secret key of another Stripe account or mode: tenants keep their access but cannot subscribe,
//! and no usage is reported.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use quota_fake_stripe::{Fault, How};
use quota_server::billing::{BillingError, account::Switch, setup};
use reqwest::Method;
use serde_json::Value;

use crate::support::{
    app::{Account, TestApp},
    postgres::TestDatabase,
    stripe::{TestStripe, billing_command, paid_key, wait_for_access, wait_for_status},
};

const AT_MOST: Duration = Duration::from_secs(30);

/// A tenant with a subscription in the server's Stripe account (`own`), and another Stripe account (`other`). The
/// server that the tenant used has stopped.
struct World {
    own: TestStripe,
    other: TestStripe,
    database: Arc<TestDatabase>,
    account: Account,
    key: String,
    subscription: String,
}

impl World {
    async fn new() -> Self {
        let (own, other) = (TestStripe::start().await, TestStripe::start().await);
        other.fake.set_account("acct_other");
        let app = own.app().await;
        let account = app.register().await;
        let key = paid_key(&app, &account).await;
        let subscription = own.subscribe(&app, &account).await;
        wait_for_access(&app, &account, "active").await;
        wait_for_status(&app, &key, 200).await;
        let world = Self {
            own,
            other,
            database: app.database.clone(),
            account,
            key,
            subscription,
        };
        assert_eq!(world.stored().await, stored("acct_fake", false));
        app.stop().await;
        world
    }

    async fn start(&self, stripe: &TestStripe) -> TestApp {
        let app = stripe.configure(TestApp::setup());
        app.database(self.database.clone()).start().await
    }

    async fn sql(&self, statement: &str) {
        let client = self.database.connect().await;
        client.batch_execute(statement).await.expect("valid SQL");
    }

    async fn stored(&self) -> Option<(Option<String>, bool)> {
        let client = self.database.connect().await;
        let sql = "SELECT account_id, livemode FROM billing_stripe_account";
        let row = client.query_opt(sql, &[]).await.expect("at most one row");
        row.map(|row| (row.get(0), row.get(1)))
    }

    /// Cancels the subscription, and delivers the event to a server. Also makes a read of the customer due.
    async fn cancel(&self, app: &TestApp) {
        let path = format!("subscriptions/{}", self.subscription);
        let canceled = self.own.fake.request(&Method::DELETE, &path, "");
        canceled.expect("canceled");
        self.own.send_to(app);
        self.own.deliver_all().await;
        self.sql("UPDATE billing_accounts SET read_due_at = now()")
            .await;
    }

    /// Returns the number of events that have not been processed.
    async fn waiting(&self) -> i64 {
        let client = self.database.connect().await;
        let sql = "SELECT count(*) FROM billing_events WHERE outcome IS NULL";
        client.query_one(sql, &[]).await.expect("a count").get(0)
    }

    /// Asserts that the tenant's access has not changed, and that the tenant cannot subscribe.
    async fn expect_unchanged(&self, app: &TestApp) {
        // Wait for several rounds of every job.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let state = app.act(&self.account, "GET", "/billing", Value::Null).await;
        assert_eq!(state.body["access"], "active", "{}", state.text);
        assert_eq!(app.echo(&self.key).await.status, 200);
        for path in ["/billing/checkout", "/billing/portal"] {
            let refused = app.act(&self.account, "POST", path, Value::Null).await;
            assert_eq!(refused.status, 503, "{path}: {}", refused.text);
        }
    }
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "the result is compared with the stored value"
)]
fn stored(id: &str, livemode: bool) -> Option<(Option<String>, bool)> {
    Some((Some(id.to_owned()), livemode))
}

async fn wait_for_mismatch(app: &TestApp, expected: f64) {
    let began = Instant::now();
    while (app.metric("quota_billing_account_mismatch").await - expected).abs() > 0.1 {
        assert!(began.elapsed() < AT_MOST, "not {expected}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn secret_key_of_another_account_ends_no_access() {
    let world = World::new().await;
    assert_eq!(world.own.secret, world.other.secret);
    let wrong = world.start(&world.other).await;
    world.cancel(&wrong).await;
    wait_for_mismatch(&wrong, 1.0).await;
    world.expect_unchanged(&wrong).await;
    let waiting = world.waiting().await;
    assert!(waiting >= 1, "{waiting}");
    let billing = wrong.state.billing.as_ref().expect("billing is on");
    let sent = billing.send_usage().await;
    assert!(
        matches!(sent, Err(BillingError::OtherAccount(_))),
        "{sent:?}"
    );
    let finding = setup::account_finding(billing.verify_account().await);
    assert!(!finding.is_ok);
    for id in ["acct_other", "acct_fake"] {
        assert!(finding.text.contains(id), "{}", finding.text);
    }
    for request in world.other.fake.received() {
        let request = (request.method.as_str(), request.path.as_str());
        assert_eq!(request, ("GET", "/v1/account"));
    }
    assert_eq!(world.stored().await, stored("acct_fake", false));
    wrong.stop().await;

    // With the right key, changes that were made in Stripe in the meantime take effect.
    let right = world.start(&world.own).await;
    wait_for_access(&right, &world.account, "canceled").await;
    wait_for_status(&right, &world.key, 402).await;
    wait_for_mismatch(&right, 0.0).await;
    let began = Instant::now();
    while world.waiting().await > 0 {
        assert!(began.elapsed() < AT_MOST);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world.own.start_checkout(&right, &world.account).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn secret_key_of_another_mode_ends_no_access() {
    let world = World::new().await;
    world
        .sql("UPDATE billing_stripe_account SET livemode = true")
        .await;
    let app = world.start(&world.own).await;
    world.cancel(&app).await;
    wait_for_mismatch(&app, 1.0).await;
    world.expect_unchanged(&app).await;
    world
        .sql("UPDATE billing_stripe_account SET livemode = false")
        .await;
    wait_for_access(&app, &world.account, "canceled").await;
    wait_for_mismatch(&app, 0.0).await;
}

/// Simulates an upgrade from a version that did not store which Stripe account the server uses.
#[tokio::test(flavor = "multi_thread")]
async fn account_that_knows_no_customer_is_not_stored() {
    let world = World::new().await;
    world.sql("DELETE FROM billing_stripe_account").await;
    let wrong = world.start(&world.other).await;
    world.cancel(&wrong).await;
    wait_for_mismatch(&wrong, 1.0).await;
    world.expect_unchanged(&wrong).await;
    assert_eq!(world.stored().await, None);
    wrong.stop().await;
    let right = world.start(&world.own).await;
    wait_for_access(&right, &world.account, "canceled").await;
    assert_eq!(world.stored().await, stored("acct_fake", false));
}

#[tokio::test(flavor = "multi_thread")]
async fn account_may_change_until_there_are_customers() {
    let (first, second) = (TestStripe::start().await, TestStripe::start().await);
    second.fake.set_account("acct_other");
    let app = first.app().await;
    let account = app.register().await;
    let client = app.database.connect().await;
    let began = Instant::now();
    let stored = async || {
        let sql = "SELECT account_id FROM billing_stripe_account";
        let row = client.query_opt(sql, &[]).await.expect("at most one row");
        row.map(|it| it.get::<_, String>(0))
    };
    while stored().await.as_deref() != Some("acct_fake") {
        assert!(began.elapsed() < AT_MOST);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let database = app.database.clone();
    app.stop().await;
    let app = second.configure(TestApp::setup()).database(database);
    let app = app.start().await;
    second.send_to(&app);
    second.subscribe(&app, &account).await;
    wait_for_access(&app, &account, "active").await;
    assert_eq!(stored().await.as_deref(), Some("acct_other"));
    assert_eq!(first.fake.all("customer").len(), 0);
}

/// Stripe may have no record of a customer, for example because someone deleted the test data. Access ends only if
/// Stripe reports that the customer was deleted.
#[tokio::test(flavor = "multi_thread")]
async fn customer_that_stripe_does_not_know_keeps_its_access() {
    let world = World::new().await;
    world
        .sql("UPDATE billing_accounts SET customer_id = 'cus_unknown', read_due_at = now()")
        .await;
    let app = world.start(&world.own).await;
    let began = Instant::now();
    while app.metric("quota_billing_errors_total").await < 1.0 {
        assert!(began.elapsed() < AT_MOST);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world.expect_unchanged(&app).await;
    assert_eq!(world.own.fake.all("customer").len(), 1);
    // If a customer is deleted in Stripe, access ends.
    let customer = world.own.customer_of(&world.account);
    world
        .sql(&format!(
            "UPDATE billing_accounts SET customer_id = '{customer}'"
        ))
        .await;
    let path = format!("customers/{customer}");
    let deleted = world.own.fake.request(&Method::DELETE, &path, "");
    deleted.expect("deleted");
    world.own.send_to(&app);
    world.own.deliver_all().await;
    wait_for_access(&app, &world.account, "canceled").await;
    wait_for_status(&app, &world.key, 402).await;
}

/// A restricted key may have no permission to read its account. The server then checks whether the account has the
/// stored customers.
#[tokio::test(flavor = "multi_thread")]
async fn key_that_may_not_read_its_account_is_compared_by_its_customers() {
    let world = World::new().await;
    world.sql("DELETE FROM billing_stripe_account").await;
    let forbidden =
        |_: &str, path: &str| (path == "/v1/account").then(|| Fault::before(How::Status(403)));
    world.own.fake.choose_faults(forbidden);
    world.other.fake.choose_faults(forbidden);
    let wrong = world.start(&world.other).await;
    world.cancel(&wrong).await;
    wait_for_mismatch(&wrong, 1.0).await;
    world.expect_unchanged(&wrong).await;
    wrong.stop().await;
    let right = world.start(&world.own).await;
    wait_for_access(&right, &world.account, "canceled").await;
    assert_eq!(world.stored().await, Some((None, false)));
    right.stop().await;
    // With a key that has the permission, the server stores the missing account ID.
    world.own.fake.heal();
    let _complete = world.start(&world.own).await;
    let began = Instant::now();
    while world.stored().await != stored("acct_fake", false) {
        assert!(began.elapsed() < AT_MOST);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The data of a sandbox was deleted: the account is the same, but it no longer contains the server's customers.
#[tokio::test(flavor = "multi_thread")]
async fn operator_can_start_over_in_the_same_account() {
    let world = World::new().await;
    let billing = |app: &TestApp| app.state.billing.clone().expect("billing is on");
    let account = || "acct_fake (test mode)".to_owned();
    let app = world.start(&world.own).await;
    let unchanged = billing(&app).switch_account().await.expect("compared");
    assert_eq!(unchanged, Switch::AlreadyDone { account: account() });
    wait_for_access(&app, &world.account, "active").await;
    app.stop().await;

    world.other.fake.set_account("acct_fake");
    let app = world.start(&world.other).await;
    let switched = billing(&app).switch_account().await.expect("switched");
    assert_eq!(
        switched,
        Switch::Done {
            account: account(),
            ended: 1
        }
    );
    wait_for_access(&app, &world.account, "free").await;
    world.other.send_to(&app);
    world.other.subscribe(&app, &world.account).await;
    wait_for_access(&app, &world.account, "active").await;
    let again = billing(&app).switch_account().await.expect("compared");
    assert_eq!(again, Switch::AlreadyDone { account: account() });
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_can_switch_to_another_account() {
    let world = World::new().await;
    let app = world.start(&world.other).await;
    wait_for_mismatch(&app, 1.0).await;
    assert_eq!(app.echo(&world.key).await.status, 200);
    let billing = app.state.billing.as_ref().expect("billing is on");
    let switched = billing.switch_account().await.expect("switched");
    let account = "acct_other (test mode)".to_owned();
    assert_eq!(switched, Switch::Done { account, ended: 1 });
    assert_eq!(world.stored().await, stored("acct_other", false));
    wait_for_access(&app, &world.account, "free").await;
    wait_for_status(&app, &world.key, 402).await;
    wait_for_mismatch(&app, 0.0).await;
    world.other.send_to(&app);
    world.other.subscribe(&app, &world.account).await;
    wait_for_access(&app, &world.account, "active").await;
    wait_for_status(&app, &world.key, 200).await;
    assert_eq!(world.own.fake.all("customer").len(), 1);
    assert_eq!(world.other.fake.all("customer").len(), 1);
}

/// Without `--switch-account`, setting up the objects in another account does not switch the server to that account.
#[tokio::test(flavor = "multi_thread")]
async fn command_switches_to_another_account_only_when_asked() {
    let world = World::new().await;
    let run = async |arguments: &[&str]| {
        let secret = [("STRIPE_WEBHOOK_SECRET", world.other.secret.as_str())];
        billing_command(&world.database, &world.other.fake, arguments, &secret).await
    };
    let arguments = ["setup", "--price=2900", "--usage-price=1"];
    // Give the existing webhook endpoint the server's URL, as if an earlier setup had created it.
    let url = setup::webhook_url("https://quota.example.com");
    world.other.fake.move_endpoint(&world.other.endpoint, &url);
    let (status, output) = run(&arguments).await;
    assert_eq!(status, Some(0), "{output}");
    let (status, output) = run(&["check"]).await;
    assert_eq!(status, Some(1), "{output}");
    let account = output.lines().find(|it| it.starts_with("failed account: "));
    let account = account.expect("the account is compared");
    for id in ["acct_fake (test mode)", "acct_other (test mode)"] {
        assert!(account.contains(id), "{account}");
    }
    assert_eq!(world.stored().await, stored("acct_fake", false));
    let app = world.start(&world.other).await;
    wait_for_mismatch(&app, 1.0).await;
    assert_eq!(app.echo(&world.key).await.status, 200);

    let switch = [&arguments[..], &["--switch-account"]].concat();
    let (status, output) = run(&switch).await;
    assert_eq!(status, Some(0), "{output}");
    let said =
        "now bills through acct_other (test mode). 1 tenant lost access; it can subscribe again.";
    assert!(output.contains(said), "{output}");
    assert_eq!(world.stored().await, stored("acct_other", false));
    wait_for_status(&app, &world.key, 402).await;
    wait_for_mismatch(&app, 0.0).await;
    let (_, output) = run(&["check"]).await;
    let account = "ok     account: acct_other (test mode)";
    assert!(output.contains(account), "{output}");

    // The tenant subscribes again, and repeating the command does not end the tenant's access.
    world.other.send_to(&app);
    world.other.subscribe(&app, &world.account).await;
    wait_for_status(&app, &world.key, 200).await;
    let (status, output) = run(&switch).await;
    assert_eq!(status, Some(0), "{output}");
    assert!(output.contains("No tenant lost access"), "{output}");
    assert_eq!(app.echo(&world.key).await.status, 200);
    let state = app
        .act(&world.account, "GET", "/billing", Value::Null)
        .await;
    assert_eq!(state.body["access"], "active", "{}", state.text);
}
