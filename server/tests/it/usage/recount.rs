//! Tests that all numbers returned by the API equal those in the clients' own log, with two replicas under load.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use quota_testkit::redis::RedisServer;
use serde_json::{Value, json};

use super::now;
use crate::support::app::TestApp;

const REQUESTS: usize = 5_000;
const CLIENTS: usize = 16;
const ENDPOINTS: [&str; 3] = ["GET /orders", "POST /orders", "DELETE /orders/{id}"];

/// The numbers of requests and their total costs, by outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Counts {
    allowed: u64,
    rejected: u64,
    allowed_cost: u64,
    rejected_cost: u64,
}

impl Counts {
    fn add(&mut self, is_allowed: bool, cost: u64) {
        let (requests, sum) = if is_allowed {
            (&mut self.allowed, &mut self.allowed_cost)
        } else {
            (&mut self.rejected, &mut self.rejected_cost)
        };
        *requests += 1;
        *sum += cost;
    }

    /// Returns the numbers shown by the API.
    fn shown(value: &Value) -> Self {
        let number = |name: &str| value[name].as_u64().expect("a number");
        Self {
            allowed: number("allowed"),
            rejected: number("rejected"),
            allowed_cost: number("allowed_cost"),
            rejected_cost: number("rejected_cost"),
        }
    }
}

/// A request that received a response.
struct Answered {
    key: usize,
    endpoint: usize,
    cost: u64,
    /// `allowed`, or why the request was denied.
    code: String,
}

impl Answered {
    fn is_allowed(&self) -> bool {
        self.code == "allowed"
    }

    /// Returns the policy that denied the request, or `allowed`. Each plan has at most one policy that can deny a
    /// request.
    fn policy(&self) -> &str {
        match self.code.as_str() {
            "quota_exceeded" => ["rpm", "daily", "none"][self.key % 3],
            code => code,
        }
    }
}

fn sums<'a>(
    log: &'a [Answered],
    group: impl Fn(&'a Answered) -> String,
) -> BTreeMap<String, Counts> {
    let mut sums = BTreeMap::<String, Counts>::new();
    for it in log {
        let counts = sums.entry(group(it)).or_default();
        counts.add(it.is_allowed(), it.cost);
    }
    sums
}

#[tokio::test(flavor = "multi_thread")]
async fn what_two_replicas_show_equals_the_clients_own_log() {
    let redis = RedisServer::start().await;
    let flag = format!("--redis-url={}", redis.url());
    let first = TestApp::setup().flag(&flag).start().await;
    let database = first.database.clone();
    let second = TestApp::setup()
        .database(database)
        .flag(&flag)
        .start()
        .await;
    let account = first.register().await;
    let token = first.service_token(&account).await;
    let plans = [
        first.plan(&account, json!({"default_rpm": 60, "burst": 200})),
        first.plan(
            &account,
            json!({"default_rpm": 1_000_000, "daily_quota": 1_500}),
        ),
        first.plan(
            &account,
            json!({"default_rpm": 1_000_000, "burst": 1_000_000}),
        ),
    ];
    let plans = futures_util::future::join_all(plans).await;
    let mut keys = Vec::new();
    for n in 0..6 {
        keys.push(first.key(&account, &plans[n % 3]).await);
    }
    let day = now().date_naive();
    let next = Arc::new(AtomicUsize::new(0));
    let clients = (0..CLIENTS).map(|client| {
        let app = if client % 2 == 0 { &first } else { &second };
        let (http, url, token) = (app.http.clone(), app.url("/v1/check"), token.clone());
        let texts = keys.iter().map(|key| key.text.clone()).collect::<Vec<_>>();
        let next = next.clone();
        tokio::spawn(async move {
            let mut log = Vec::new();
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= REQUESTS {
                    return log;
                }
                let (key, endpoint) = (n % texts.len(), n / 7 % ENDPOINTS.len());
                let cost = n as u64 % 3 + 1;
                let body =
                    json!({"key": texts[key], "cost": cost, "endpoint": ENDPOINTS[endpoint]});
                let call = http.post(&url).bearer_auth(&token).json(&body);
                let answer = call.send().await.expect("the server responds");
                assert_eq!(answer.status(), 200);
                let answer = answer.json::<Value>().await.expect("JSON");
                log.push(Answered {
                    key,
                    endpoint,
                    cost,
                    code: answer["code"].as_str().expect("a decision").to_owned(),
                });
            }
        })
    });
    let mut log = Vec::new();
    for client in clients.collect::<Vec<_>>() {
        log.extend(client.await.expect("the task ends"));
    }
    assert_eq!(log.len(), REQUESTS);
    first.ship_usage().await;
    second.ship_usage().await;

    let total = sums(&log, |_| String::new())[""];
    assert!(total.allowed > 1_000 && total.rejected > 1_000, "{total:?}");
    let by_key = sums(&log, |it| keys[it.key].id.clone());
    let by_endpoint = sums(&log, |it| ENDPOINTS[it.endpoint].to_owned());
    let by_plan = sums(&log, |it| plans[it.key % 3].clone());
    let mut by_policy = sums(&log, |it| it.policy().to_owned());
    by_policy.remove("allowed");
    assert!(by_policy["rpm"].rejected > 100 && by_policy["daily"].rejected > 100);
    for app in [&first, &second] {
        let get = async |path: &str| {
            let answer = app.get(path).bearer(&account.access_token).send().await;
            assert_eq!(answer.status, 200, "{path}: {}", answer.text);
            answer.body
        };
        for (by, field, expected) in [
            ("key", "key_id", &by_key),
            ("endpoint", "endpoint", &by_endpoint),
            ("plan", "plan_id", &by_plan),
            ("policy", "policy", &by_policy),
        ] {
            let usage = get(&format!("/admin/usage?group_by={by}")).await;
            assert_eq!(Counts::shown(&usage["total"]), total, "{by}");
            let groups = usage["groups"].as_array().expect("groups").iter();
            let shown = groups.map(|it| {
                let name = it[field].as_str().expect("a name").to_owned();
                (name, Counts::shown(it))
            });
            assert_eq!(&shown.collect::<BTreeMap<_, _>>(), expected, "{by}");
        }
        let usage = get("/admin/usage").await;
        let mut buckets = Counts::default();
        for bucket in usage["buckets"].as_array().expect("buckets") {
            let it = Counts::shown(bucket);
            buckets.allowed += it.allowed;
            buckets.rejected += it.rejected;
            buckets.allowed_cost += it.allowed_cost;
            buckets.rejected_cost += it.rejected_cost;
        }
        assert_eq!(buckets, total);
        let stats = get("/admin/stats").await;
        // Skip this comparison if midnight has passed in the meantime.
        if now().date_naive() == day {
            assert_eq!(
                (&stats["requests_today"], &stats["rejected_today"]),
                (&json!(REQUESTS), &json!(total.rejected))
            );
        }
        assert_eq!(
            (&stats["total_keys"], &stats["unused_keys"]),
            (&json!(keys.len()), &json!(0))
        );
        let decisions = get("/admin/decisions?outcome=rejected&limit=1").await;
        assert_eq!(decisions["total"], json!(total.rejected));
    }
    first.stop().await;
    second.stop().await;
}
