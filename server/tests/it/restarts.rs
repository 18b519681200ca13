//! Tests that no token of a quota is granted twice, no matter how the server stops. A clean stop loses no tokens, and a
//! kill loses at most one block of each quota.

use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use quota_server::{
    clock::{Clock as _, SystemClock},
    db,
    secret_text::{Kind, SecretText},
};
use reqwest::Client;
use secrecy::SecretString;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::{
    postgres::TestDatabase,
    quota::{Quota, data_dir},
};

const QUOTA: u64 = 1000;
/// The part of the quota that each run of the server spends, except the last run, which spends the rest.
const PART: u64 = 250;

/// Sends up to `most` requests, until one is denied. Returns how many were allowed.
async fn spend(quota: &Quota, http: &Client, key: &str, most: u64) -> u64 {
    let url = format!("http://{}/v1/echo", quota.addr);
    let (mut served, mut unavailable) = (0, 0);
    while served < most {
        let answer = http.get(&url).header("X-API-Key", key).send().await;
        let answer = answer.expect("the server responds");
        match answer.status().as_u16() {
            200 => served += 1,
            // The ledger is slow on a busy machine.
            503 if unavailable < 20 => {
                let problem = answer.text().await.expect("a body");
                assert!(problem.contains("temporary-reduced-capacity"), "{problem}");
                unavailable += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            429 => {
                let denial: Value = answer.json().await.expect("JSON");
                assert_eq!(denial["violated-policies"], json!(["daily"]));
                return served;
            }
            status => panic!("{status}: {:?}", answer.text().await),
        }
    }
    most
}

async fn spend_through_restarts() -> u64 {
    let (data, http) = (data_dir(), Client::new());
    let plan = json!({"name": "daily", "default_rpm": 1_000_000, "daily_quota": QUOTA});

    let quota = Quota::start(data.path());
    let key = quota.key_on(&http, plan).await;
    let mut served = spend(&quota, &http, &key, PART).await;
    quota.stop();

    let quota = Quota::start(data.path());
    served += spend(&quota, &http, &key, PART).await;
    quota.kill();

    let quota = Quota::start(data.path());
    served += spend(&quota, &http, &key, PART).await;
    quota.stop();
    assert_eq!(served, 3 * PART);

    let quota = Quota::start(data.path());
    served += spend(&quota, &http, &key, 2 * QUOTA).await;
    assert_eq!(spend(&quota, &http, &key, QUOTA).await, 0);
    quota.stop();
    served
}

#[tokio::test]
async fn restarts_and_a_kill_neither_lose_nor_double_a_daily_quota() {
    let clock = SystemClock::new();
    let today = || clock.now().secs() / 86_400;
    loop {
        let day = today();
        let served = spend_through_restarts().await;
        // If a new day has begun, a new quota applies, and the result proves nothing.
        if today() == day {
            assert!(served <= QUOTA, "{served} of {QUOTA} were served");
            assert!(
                served >= QUOTA * 99 / 100,
                "{served} of {QUOTA} were served"
            );
            return;
        }
    }
}

/// Adds `count` keys to the plan of the only key in the database. Returns their secrets.
async fn add_keys(database: &TestDatabase, count: usize) -> Vec<String> {
    let secrets: Vec<_> = (0..count)
        .map(|_| SecretText::generate(Kind::ApiKey).expect("random bytes"))
        .collect();
    let ids: Vec<String> = secrets.iter().map(|_| Uuid::now_v7().to_string()).collect();
    let hashes: Vec<Vec<u8>> = secrets.iter().map(|it| it.hash().to_vec()).collect();
    let added = database
        .connect()
        .await
        .execute(
            "INSERT INTO api_keys (tenant_id, id, plan_id, name, prefix, key_hash) \
             SELECT k.tenant_id, n.id, k.plan_id, 'many', 'qk_', n.hash \
             FROM (SELECT tenant_id, plan_id FROM api_keys LIMIT 1) k, unnest($1::text[]::uuid[], $2::bytea[]) AS n (id, hash)",
            &[&ids, &hashes],
        )
        .await
        .expect("the keys are added");
    assert_eq!(added, count as u64);
    secrets.iter().map(SecretText::reveal).collect()
}

/// Returns the number of keys with blocks when the server stops. Set `DRAIN_KEYS=100000` to measure a large deployment.
#[expect(
    clippy::disallowed_methods,
    reason = "the size of a test is not a setting of the server"
)]
pub(crate) fn drain_keys() -> usize {
    std::env::var("DRAIN_KEYS").map_or(4000, |keys| keys.parse().expect("a number of keys"))
}

#[tokio::test(flavor = "multi_thread")]
async fn clean_stop_returns_every_block() {
    let count = drain_keys();
    let database =
        TestDatabase::create(
            |url| async move { db::migrate(&SecretString::from(url)).await.map(drop) },
        )
        .await;
    let (data, http) = (data_dir(), Client::new());
    let cache = (2 * count).to_string();
    let settings = [
        ("DATABASE_URL", database.url()),
        ("QUOTA_KEY_CACHE", &cache),
        ("QUOTA_DATABASE_WAIT", "10s"),
    ];
    let quota = Quota::start_with(data.path(), &settings);
    let plan = json!({
        "name": "both", "default_rpm": 600, "daily_quota": 5000, "monthly_quota": 50_000,
    });
    quota.key_on(&http, plan).await;
    let secrets = add_keys(&database, count).await;

    let url = format!("http://{}/v1/echo", quota.addr);
    let served = stream::iter(secrets)
        .map(|secret| {
            let request = http.get(&url).header("X-API-Key", secret).send();
            async move { u64::from(request.await.expect("the server responds").status() == 200) }
        })
        .buffer_unordered(16)
        .fold(0, async |served, one| served + one)
        .await;
    assert_eq!(served, count as u64);

    let client = database.connect().await;
    let held: i64 = client
        .query_one("SELECT sum(used)::bigint FROM quota_usage", &[])
        .await
        .expect("a sum")
        .get(0);
    assert!(
        held > 10 * i64::try_from(count).expect("a count"),
        "no blocks were held: {held}"
    );
    let stopping = Instant::now();
    quota.stop();
    println!(
        "{count} keys with two blocks each: stopped in {:?}",
        stopping.elapsed()
    );
    // The usage of each policy, summed over both days if midnight has passed.
    let rows = client
        .query(
            "SELECT policy, sum(used)::bigint, max(used) FROM quota_usage GROUP BY policy ORDER BY policy",
            &[],
        )
        .await
        .expect("sums");
    let used: Vec<(String, i64, i64)> = rows
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect();
    let exact = i64::try_from(count).expect("a count");
    assert_eq!(
        used,
        [
            ("daily".to_owned(), exact, 1),
            ("monthly".to_owned(), exact, 1)
        ]
    );
}
