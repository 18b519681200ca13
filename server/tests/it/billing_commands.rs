//! Tests of `quota billing`, which creates and checks the objects that billing needs in Stripe.

use quota_fake_stripe::FakeStripe;
use quota_server::db;
use reqwest::Method;
use secrecy::SecretString;

use crate::support::{postgres::TestDatabase, stripe::billing_command};

const SETUP: [&str; 5] = [
    "setup",
    "--price=2900",
    "--usage-price=0.05",
    "--currency=eur",
    "--product=Acme API",
];

async fn database() -> TestDatabase {
    let migrate =
        |url: String| async move { db::migrate(&SecretString::from(url)).await.map(drop) };
    TestDatabase::create(migrate).await
}

/// Returns the value of a line of the output, such as `ok     product: …`.
fn line<'a>(output: &'a str, start: &str) -> &'a str {
    let found = output.lines().find_map(|it| it.strip_prefix(start));
    found.unwrap_or_else(|| panic!("no line “{start}”: {output}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn check_reports_what_is_missing_until_it_is_set_up() {
    let database = database().await;
    let stripe = FakeStripe::start().await.expect("loopback has a free port");
    let (status, before) = billing_command(&database, &stripe, &["check"], &[]).await;
    assert_eq!(status, Some(1), "{before}");
    assert!(before.contains("3 checks failed"), "{before}");
    assert_eq!(line(&before, "ok     account: "), "acct_fake (test mode)");
    for name in ["monthly price", "webhook endpoint"] {
        let missing = line(&before, &format!("failed {name}: "));
        assert!(missing.contains("quota billing setup"), "{before}");
    }
    assert!(line(&before, "failed webhook secret: ").contains("STRIPE_WEBHOOK_SECRET"));

    let (status, first) = billing_command(&database, &stripe, &SETUP, &[]).await;
    assert_eq!(status, Some(0), "{first}");
    assert_eq!(first.matches("(created)").count(), 5, "{first}");
    let secret = line(&first, "STRIPE_WEBHOOK_SECRET=");
    assert!(secret.starts_with("whsec_"), "{first}");
    let (status, second) = billing_command(&database, &stripe, &SETUP, &[]).await;
    assert_eq!(status, Some(0), "{second}");
    assert_eq!(second.matches("(exists)").count(), 5, "{second}");
    assert!(!second.contains("whsec_"), "{second}");

    let secret = [("STRIPE_WEBHOOK_SECRET", secret)];
    let (status, after) = billing_command(&database, &stripe, &["check"], &secret).await;
    assert_eq!(status, Some(0), "{after}");
    assert!(!after.contains("failed"), "{after}");
    assert!(
        line(&after, "ok     monthly price: ").ends_with(": 2900 EUR (smallest unit) per month")
    );
    assert!(
        line(&after, "ok     usage price: ").ends_with(": 0.05 EUR (smallest unit) per request")
    );
    assert_eq!(line(&after, "ok     webhook secret: "), "set");
    assert_eq!(stripe.all("product")[0]["name"], "Acme API");

    // Change the webhook endpoint in Stripe, so that a check fails.
    let endpoint = stripe.all("webhook_endpoint")[0]["id"].clone();
    let path = format!("webhook_endpoints/{}", endpoint.as_str().expect("an ID"));
    let changed = stripe.request(&Method::POST, &path, "enabled_events[0]=invoice.paid");
    changed.expect("changed");
    let (status, broken) = billing_command(&database, &stripe, &["check"], &secret).await;
    assert_eq!(status, Some(1), "{broken}");
    assert!(broken.contains("1 check failed"), "{broken}");
    let missing = line(&broken, "failed webhook endpoint: ");
    assert!(
        missing.contains("customer.subscription.deleted"),
        "{broken}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_say_what_is_wrong_with_their_settings() {
    let database = database().await;
    let stripe = FakeStripe::start().await.expect("loopback has a free port");
    let run = async |arguments: &[&str], settings: &[(&str, &str)]| {
        billing_command(&database, &stripe, arguments, settings).await
    };
    for command in [&["check"][..], &SETUP] {
        let (status, output) = run(command, &[("STRIPE_SECRET_KEY", "")]).await;
        assert_eq!(status, Some(1), "{output}");
        assert!(output.contains("STRIPE_SECRET_KEY"), "{output}");
        let (status, output) = run(command, &[("STRIPE_SECRET_KEY", "sk_test_wrong")]).await;
        assert_eq!(status, Some(1), "{output}");
        assert!(output.contains("Invalid API Key"), "{output}");
        let (status, output) = run(command, &[("STRIPE_API_BASE", "http://127.0.0.1:9")]).await;
        assert_eq!(status, Some(1), "{output}");
        assert!(output.contains("Stripe could not be reached"), "{output}");
    }
    for wrong in ["--price=-1", "--price=29,00", "--price=1.", "--price="] {
        let (status, output) = run(&["setup", wrong], &[]).await;
        assert_eq!(status, Some(2), "{wrong}: {output}");
        assert!(output.contains("--price"), "{wrong}: {output}");
    }
    let (status, output) = run(&["setup", "--price=1", "--currency=gold"], &[]).await;
    assert_eq!(status, Some(2), "{output}");
    for kind in ["product", "price", "webhook_endpoint"] {
        assert!(stripe.all(kind).is_empty(), "{kind}");
    }
}
