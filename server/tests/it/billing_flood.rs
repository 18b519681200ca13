//! Tests floods of webhooks from Stripe: with valid, wrong, stale, rotated and missing signatures, and with large
//! bodies.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use quota_fake_stripe::sign;
use serde_json::json;
use tokio::{sync::Semaphore, task::JoinSet};

use crate::{
    support::{app::TestApp, stripe::TestStripe},
    usage,
};

/// The maximum number of requests in progress. Further requests wait, and the wait is included in their response times.
const CONCURRENT: usize = 256;
/// The number of batches of requests that are sent per second.
const PARTS: u64 = 100;

/// A kind of webhook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Valid,
    /// Signed with the previous secret, while both secrets are set.
    Rotated,
    Wrong,
    Stale,
    Missing,
    /// A body of 1 MB with a valid signature.
    Large,
}

impl Kind {
    /// Returns the kind of the webhook with the number `n`. Only one webhook in a hundred is large, because a large
    /// webhook has as many bytes as thousands of small ones.
    fn nth(n: u64) -> Self {
        match n % 100 {
            0..50 => Self::Valid,
            50..65 => Self::Rotated,
            65..77 => Self::Wrong,
            77..89 => Self::Stale,
            89..99 => Self::Missing,
            _ => Self::Large,
        }
    }

    fn is_accepted(self) -> bool {
        matches!(self, Self::Valid | Self::Rotated)
    }
}

/// The response times by kind of webhook and by status. The status is 0 if there was no response, for example because
/// the server closed the connection instead of reading a large body.
type Times = BTreeMap<(Kind, u16), Vec<Duration>>;

/// The results of a flood.
#[derive(Debug, Default)]
struct Flood {
    times: Times,
    /// The reasons for missing responses, and how often each occurred.
    lost: BTreeMap<(Kind, String), usize>,
    /// The time from the first webhook to the last response.
    took: Duration,
}

/// Returns why a request has no response.
fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn percentile(times: &[Duration], percent: usize) -> Duration {
    times[(times.len() * percent / 100).min(times.len() - 1)]
}

/// Sends webhooks at a constant rate. Asserts that only webhooks with a valid signature and a small body are stored.
async fn flood(rate: u64, seconds: u64) -> Flood {
    let stripe = TestStripe::start().await;
    let new = stripe.fake.rotate_secret(&stripe.endpoint);
    let secrets = format!("--stripe-webhook-secret={},{new}", stripe.secret);
    let app = stripe.configure(TestApp::setup()).flag(secrets);
    let app = app.start().await;
    let account = app.register().await;
    stripe.start_checkout(&app, &account).await;
    let customer = stripe.customer_of(&account);
    let before = stored(&app).await;

    let url = app.url("/billing/stripe/webhook");
    let flood: Arc<Mutex<Flood>> = Arc::default();
    let began = Instant::now();
    let slots = Arc::new(Semaphore::new(CONCURRENT));
    let mut requests = JoinSet::new();
    let mut ticks =
        tokio::time::interval(Duration::from_secs(1) / u32::try_from(PARTS).expect("few"));
    let mut n = 0;
    // The server closes a connection on which it does not read the body, so these connections are not reused.
    let large = reqwest::Client::builder().pool_max_idle_per_host(0).build();
    let large = large.expect("a client");
    for _ in 0..seconds * PARTS {
        // The scheduled time has already passed if sending has fallen behind.
        let scheduled = ticks.tick().await.into_std();
        for _ in 0..rate / PARTS {
            let kind = Kind::nth(n);
            let now = usage::now().timestamp();
            let mut body = json!({
                "id": format!("evt_{kind:?}_{n}"), "object": "event", "api_version": "2026-09-30.endive",
                "created": now, "livemode": false, "type": "invoice.paid",
                "data": {"object": {"id": format!("in_{n}"), "object": "invoice", "customer": customer}},
            })
            .to_string();
            if kind == Kind::Large {
                body.push_str(&" ".repeat(1_000_000));
            }
            let header = match kind {
                Kind::Valid | Kind::Large => Some(sign(now, &body, &[&new])),
                Kind::Rotated => Some(sign(now, &body, &[&stripe.secret])),
                Kind::Wrong => Some(sign(now, &body, &["whsec_of_someone_else"])),
                Kind::Stale => Some(sign(now - 301, &body, &[&new])),
                Kind::Missing => None,
            };
            let http = if kind == Kind::Large {
                &large
            } else {
                &app.http
            };
            let mut call = http.post(&url).body(Bytes::from(body));
            call = call.header("Content-Type", "application/json; charset=utf-8");
            if let Some(header) = header {
                call = call.header("Stripe-Signature", header);
            }
            let (flood, slots) = (flood.clone(), slots.clone());
            requests.spawn(async move {
                let _slot = slots.acquire_owned().await;
                let status = match call.send().await {
                    Ok(response) => response.status().as_u16(),
                    Err(error) => {
                        let lost = (kind, cause(&error));
                        *flood.lock().lost.entry(lost).or_default() += 1;
                        0
                    }
                };
                let took = scheduled.elapsed();
                let mut flood = flood.lock();
                flood.times.entry((kind, status)).or_default().push(took);
            });
            n += 1;
        }
    }
    while let Some(ended) = requests.join_next().await {
        ended.expect("the task does not panic");
    }
    let mut flood = std::mem::take(&mut *flood.lock());
    flood.took = began.elapsed();
    for times in flood.times.values_mut() {
        times.sort_unstable();
    }
    let times = &flood.times;
    for (kind, status) in times.keys() {
        let is_success = (200..300).contains(status);
        assert!(!is_success || kind.is_accepted(), "{kind:?}: {status}");
        assert!(
            (400..500).contains(status) || kind.is_accepted() || *status == 0,
            "{kind:?}: {status}"
        );
    }
    let responses = |is_counted: &dyn Fn(u16) -> bool| -> usize {
        let own = times
            .iter()
            .filter(|((kind, status), _)| kind.is_accepted() && is_counted(*status));
        own.map(|(_, times)| times.len()).sum()
    };
    let new = usize::try_from(stored(&app).await - before).expect("events are not deleted");
    // If the response is not 204 or is missing, the event may still have been stored. Stripe would send it again.
    let (accepted, unknown) = (responses(&|it| it == 204), responses(&|it| it != 204));
    assert!(
        (accepted..=accepted + unknown).contains(&new),
        "{new} stored, {accepted} accepted"
    );
    let client = app.database.connect().await;
    let bad = "SELECT count(*) FROM billing_events \
         WHERE id LIKE 'evt!_%' ESCAPE '!' AND id !~ '^evt_(Valid|Rotated|fake)'";
    let bad: i64 = client.query_one(bad, &[]).await.expect("a count").get(0);
    assert_eq!(bad, 0);
    // Events do not determine access, which is read from Stripe.
    let access = "SELECT count(*) FROM billing_accounts WHERE access <> 'free'";
    let access: i64 = client.query_one(access, &[]).await.expect("a count").get(0);
    assert_eq!(access, 0);
    flood
}

async fn stored(app: &TestApp) -> i64 {
    let client = app.database.connect().await;
    let sql = "SELECT count(*) FROM billing_events";
    client.query_one(sql, &[]).await.expect("a count").get(0)
}

/// Runs a short flood, and checks only correctness.
#[tokio::test(flavor = "multi_thread")]
async fn flood_of_webhooks_changes_nothing_without_a_valid_signature() {
    let Flood { times, lost, .. } = flood(200, 2).await;
    let responses = |kind: Kind| {
        let own = times.iter().filter(|((of, _), _)| *of == kind);
        own.map(|(_, times)| times.len()).sum::<usize>()
    };
    for kind in [
        Kind::Valid,
        Kind::Rotated,
        Kind::Wrong,
        Kind::Stale,
        Kind::Missing,
        Kind::Large,
    ] {
        assert!(responses(kind) > 0, "{kind:?}");
    }
    assert!(times.contains_key(&(Kind::Valid, 204)), "{lost:?}");
    assert!(times.contains_key(&(Kind::Rotated, 204)), "{lost:?}");
}

/// `QUOTA_WEBHOOKS` sets the rate, and `QUOTA_SECONDS` the duration.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: cargo xtask bench webhooks"]
#[expect(
    clippy::disallowed_methods,
    reason = "the length of a measurement is not a setting of the server"
)]
async fn webhooks_per_second() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |it| it.parse().expect("a number"))
    };
    let (rate, seconds) = (number("QUOTA_WEBHOOKS", 2000), number("QUOTA_SECONDS", 10));
    let Flood { times, lost, took } = flood(rate, seconds).await;
    let accepted: usize = times
        .iter()
        .filter(|((_, status), _)| *status == 204)
        .map(|(_, times)| times.len())
        .sum();
    println!(
        "{rate} webhooks per second for {seconds} s, ended after {took:.1?}: {:.0} per second accepted",
        f64::from(u32::try_from(accepted).expect("a few")) / took.as_secs_f64()
    );
    println!(
        "{:<10} {:>6} {:>8} {:>10} {:>10} {:>10}",
        "webhook", "status", "count", "p50", "p99", "max"
    );
    for ((kind, status), times) in &times {
        println!(
            "{:<10} {status:>6} {:>8} {:>10.1?} {:>10.1?} {:>10.1?}",
            format!("{kind:?}"),
            times.len(),
            percentile(times, 50),
            percentile(times, 99),
            times[times.len() - 1]
        );
    }
    for (name, range) in [("2xx", 200..300), ("4xx", 400..500)] {
        let own = times
            .iter()
            .filter(|((_, status), _)| range.contains(status));
        let mut all: Vec<Duration> = own.flat_map(|(_, times)| times).copied().collect();
        all.sort_unstable();
        if !all.is_empty() {
            println!(
                "{name}: {} responses, p50 {:.1?}, p99 {:.1?}",
                all.len(),
                percentile(&all, 50),
                percentile(&all, 99)
            );
        }
    }
    for ((kind, cause), count) in &lost {
        println!("{kind:?}: {count} without a response: {cause}");
    }
}
