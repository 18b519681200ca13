//! Measures the speed of appending and reading usage, with 10 million rows by default. Run it with `cargo xtask bench
//! usage`. It asserts no times, because they depend on the machine.

use std::time::{Duration, Instant};

use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use quota_server::repo::{
    usage::{self, Filter},
    usage_batch::UsageRecord,
};
use quota_testkit::zipf::Zipf;
use serde_json::json;
use uuid::Uuid;

use super::{append, create_partitions, now, record, rejected};
use crate::support::app::{Account, PASSWORD, TestApp};

const KEYS: usize = 1000;
const ENDPOINTS: usize = 200;
const DAYS: i64 = 30;
/// The number of records per transaction, as when the server ships a backlog.
const BATCH: usize = 50_000;
/// The number of records in the backlog.
const BACKLOG: usize = 1_000_000;
/// The number of requests from which the percentiles of each query are computed.
const ROUNDS: usize = 100;

/// Generates records in chronological order, spread evenly over `span` before `until`.
struct Generator {
    account: Account,
    keys: Vec<(String, String)>,
    endpoints: Vec<String>,
    by_key: Zipf,
    by_endpoint: Zipf,
    random: fastrand::Rng,
    until: DateTime<Utc>,
    span: TimeDelta,
    rows: usize,
    made: usize,
}

impl Generator {
    fn batch(&mut self) -> Vec<UsageRecord> {
        let count = BATCH.min(self.rows - self.made);
        let span = self.span.num_microseconds().expect("a month");
        (0..count)
            .map(|_| {
                let part = i128::from(span) * self.made as i128 / self.rows as i128;
                let at = self.until - self.span
                    + TimeDelta::microseconds(i64::try_from(part).expect("within the span"));
                self.made += 1;
                let (key, plan) = &self.keys[self.by_key.draw(self.random.f64())];
                let endpoint = &self.endpoints[self.by_endpoint.draw(self.random.f64())];
                let it = record(&self.account, key, plan, at);
                let it = UsageRecord {
                    endpoint: endpoint.clone(),
                    ..it
                };
                match self.random.u8(0..100) {
                    0..3 => rejected(it, "rpm"),
                    3..5 => rejected(it, "daily"),
                    _ => it,
                }
            })
            .collect()
    }
}

fn percentile(times: &mut [Duration], part: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * part / 100).min(times.len() - 1)]
}

/// Returns the number of rows per second.
fn per_second(rows: usize, time: Duration) -> u64 {
    let nanos = time.as_nanos().max(1);
    u64::try_from(rows as u128 * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

/// Appends all rows, and prints the speed.
async fn fill(app: &TestApp, generator: &mut Generator) {
    let (mut spent, mut reported) = (Duration::ZERO, Duration::ZERO);
    while generator.made < generator.rows {
        let batch = generator.batch();
        let began = Instant::now();
        append(app, &batch).await;
        spent += began.elapsed();
        if spent > reported + Duration::from_secs(20) {
            reported = spent;
            let rate = per_second(generator.made, spent);
            println!("{} rows, {rate} rows/s", generator.made);
        }
    }
    let rate = per_second(generator.made, spent);
    println!(
        "appended {} rows in batches of {BATCH}: {rate} rows/s",
        generator.made
    );
}

async fn vacuum(app: &TestApp) {
    let client = app.database.connect().await;
    client
        .batch_execute("VACUUM (ANALYZE) usage_log, usage_quarters, usage_days, usage_endpoints")
        .await
        .expect("a vacuum");
}

/// Prints how long requests for usage in the whole range take.
async fn measure(app: &TestApp, token: &str, range: &str, busiest: &str) {
    let endpoint = "endpoint=GET%20/v1/resource/0";
    println!("GET /admin/usage over {DAYS} days, {ROUNDS} requests each");
    for (name, filter) in [
        ("tenant", String::new()),
        ("busiest key", format!("key_id={busiest}")),
        ("endpoint", endpoint.to_owned()),
        ("key and endpoint", format!("key_id={busiest}&{endpoint}")),
        ("by key", "group_by=key".into()),
        ("by endpoint", "group_by=endpoint".into()),
        ("by policy", "group_by=policy".into()),
        ("by plan", "group_by=plan".into()),
        (
            "endpoints of the busiest key",
            format!("key_id={busiest}&group_by=endpoint"),
        ),
        ("keys of an endpoint", format!("{endpoint}&group_by=key")),
    ] {
        for (bucket, zone) in [
            ("day", "UTC"),
            ("day", "Asia/Kolkata"),
            ("hour", "Europe/Berlin"),
        ] {
            let path = format!("/admin/usage?{range}&bucket={bucket}&tz={zone}&{filter}");
            let mut times = Vec::new();
            for _ in 0..ROUNDS {
                let began = Instant::now();
                let answer = app.get(&path).bearer(token).send().await;
                times.push(began.elapsed());
                assert_eq!(answer.status, 200, "{}", answer.text);
                assert!(answer.body["total"]["allowed"].as_u64() > Some(0), "{path}");
            }
            let millis = |it: Duration| it.as_secs_f64() * 1e3;
            let (p50, p99) = (percentile(&mut times, 50), percentile(&mut times, 99));
            println!(
                "{name:<30} {bucket:<4} {zone:<14} p50 {:>7.1} ms  p99 {:>7.1} ms",
                millis(p50),
                millis(p99)
            );
        }
    }
}

/// Prints PostgreSQL's plans for the two most frequent queries.
async fn explain(app: &TestApp, tenant: &str, until: DateTime<Utc>, busiest: &str) {
    let start = until - TimeDelta::days(DAYS);
    let starts = (0..DAYS * 24)
        .map(|hour| start + TimeDelta::hours(hour))
        .collect::<Vec<_>>();
    let tenant = quota_common::TenantId(tenant.parse().expect("an ID"));
    for (name, key) in [
        ("tenant", None),
        ("busiest key", Some(busiest.parse().expect("an ID"))),
    ] {
        let filter = Filter {
            key,
            ..Filter::default()
        };
        let mut tx = app.state.db.tenant(tenant).await.expect("a transaction");
        let plan = usage::explain_series(&mut tx, &filter, &starts, until)
            .await
            .expect("a plan");
        // Print only one scan, because the scans of all days are alike.
        let mut lines = plan
            .into_iter()
            .filter(|it| !it.contains("Index Cond"))
            .collect::<Vec<_>>();
        let scans = lines.iter().filter(|it| it.contains("Scan")).count();
        let mut seen = false;
        lines.retain(|it| !it.contains("Scan") || !std::mem::replace(&mut seen, true));
        println!("plan for {name}, by hour ({scans} scans of partitions):");
        for line in lines {
            println!("  {line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: cargo xtask bench usage"]
async fn ten_million_rows() {
    #[expect(
        clippy::disallowed_methods,
        reason = "an option of a measurement, not a setting of the server"
    )]
    let rows = std::env::var("QUOTA_USAGE_ROWS");
    let rows = rows.map_or(10_000_000, |it| it.parse().expect("a number"));
    let app = TestApp::setup()
        .without_jobs()
        .flag("--database-statement-timeout=60s")
        .flag("--request-timeout=60s")
        .start()
        .await;
    let quarter = TimeDelta::minutes(15);
    let until = (now() + quarter)
        .duration_trunc(quarter)
        .expect("a quarter");
    let account = app.register().await;
    let mut plans = Vec::new();
    for _ in 0..5 {
        plans.push(app.plan(&account, json!({})).await);
    }
    let busiest = app.key(&account, &plans[0]).await.id;
    let mut keys = vec![(busiest.clone(), plans[0].clone())];
    keys.extend((1..KEYS).map(|n| (Uuid::now_v7().to_string(), plans[n % 5].clone())));
    let days = (0..=DAYS).map(|day| (until - TimeDelta::days(day)).date_naive());
    create_partitions(&app, days).await;

    let mut generator = Generator {
        account,
        keys,
        endpoints: (0..ENDPOINTS)
            .map(|n| format!("GET /v1/resource/{n}"))
            .collect(),
        by_key: Zipf::new(u32::try_from(KEYS).expect("small")),
        by_endpoint: Zipf::new(u32::try_from(ENDPOINTS).expect("small")),
        random: fastrand::Rng::with_seed(1),
        until,
        span: TimeDelta::days(DAYS),
        rows,
        made: 0,
    };
    fill(&app, &mut generator).await;
    println!("The same as a backlog of {BACKLOG} records at 10,000 requests/s:");
    generator.until = until - TimeDelta::hours(1);
    generator.span = TimeDelta::microseconds(i64::try_from(BACKLOG).expect("small") * 100);
    (generator.rows, generator.made) = (BACKLOG, 0);
    fill(&app, &mut generator).await;
    vacuum(&app).await;
    let rows = rows + BACKLOG;
    // Sign in again, because access tokens are valid for only 15 minutes.
    let account = generator.account;
    let login = json!({"email": account.email, "password": PASSWORD});
    let token = app
        .post("/auth/login", login)
        .send()
        .await
        .text("access_token");
    let range = format!(
        "from={}&to={}",
        (until - TimeDelta::days(DAYS)).format("%Y-%m-%dT%H:%M:%SZ"),
        until.format("%Y-%m-%dT%H:%M:%SZ")
    );
    let path = format!("/admin/usage?{range}&bucket=day");
    let total = app.get(&path).bearer(&token).send().await.body["total"].clone();
    let counted = total["allowed"]
        .as_u64()
        .zip(total["rejected"].as_u64())
        .map(|(a, b)| a + b);
    assert_eq!(counted, u64::try_from(rows).ok(), "rollups equal the rows");
    measure(&app, &token, &range, &busiest).await;
    explain(&app, &account.tenant_id, until, &busiest).await;
}
