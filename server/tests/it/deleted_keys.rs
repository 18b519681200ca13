//! Tests that the limiter forgets deleted keys, so that a tenant cannot fill Redis by creating, using and deleting
//! keys.

use std::time::{Duration, Instant};

use quota_testkit::redis::RedisServer;
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::sleep};

use crate::support::app::{Account, TestApp};

/// The number of keys that one round creates, uses and deletes.
const ROUND: usize = 400;
/// The maximum increase in the memory use of Redis, in bytes. The buckets of three rounds would need more memory.
const ROOM: u64 = 300_000;

async fn number(redis: &RedisServer, command: &str) -> u64 {
    let answer = redis.command(command).await;
    let number = answer.trim().trim_start_matches(':').parse();
    number.unwrap_or_else(|_| panic!("{answer}"))
}

async fn buckets(redis: &RedisServer) -> u64 {
    number(redis, "EVAL \"return #redis.call('KEYS', '*:k:*')\" 0").await
}

async fn app_on(redis: &RedisServer, grace: &str) -> TestApp {
    let app = TestApp::setup()
        .flag(format!("--redis-url={}", redis.url()))
        .flag("--redis-timeout=5s")
        .flag("--redis-connect-timeout=5s")
        .flag(format!("--stale-grace={grace}"))
        // The bucket of a deleted key is removed from Redis after the grace period plus this time.
        .flag("--request-timeout=5s")
        .start()
        .await;
    let connection = app.state.redis.as_ref().expect("the server uses Redis");
    assert!(connection.connected(Duration::from_secs(60)).await);
    app
}

/// Creates, uses and deletes keys.
async fn churn(app: &TestApp, account: &Account, plan: &str, keys: usize) {
    for _ in 0..keys {
        let key = app.key(account, plan).await;
        let used = app.echo(&key.text).await;
        assert_eq!(used.status, 200, "{}", used.text);
        let path = format!("/admin/api-keys/{}", key.id);
        let deleted = app.act(account, "DELETE", &path, Value::Null).await;
        assert_eq!(deleted.status, 204, "{}", deleted.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_keys_do_not_fill_redis() {
    let redis = RedisServer::start_with(&["--maxmemory-policy", "noeviction"]).await;
    let app = std::sync::Arc::new(app_on(&redis, "1s").await);
    let (attacker, other) = (app.register().await, app.register().await);
    // Each bucket takes almost a month to fill, so it does not expire during the test.
    let plan = json!({"default_rpm": 1, "burst": 40_000});
    let plan = app.plan(&attacker, plan).await;
    let bystander = app.plan(&other, json!({"default_rpm": 60_000})).await;
    let bystander = app.key(&other, &bystander).await;
    assert_eq!(app.echo(&bystander.text).await.status, 200);

    let memory = redis.command("INFO memory").await;
    let used = memory
        .lines()
        .find_map(|it| it.strip_prefix("used_memory:"));
    let used: u64 = used.expect("a number").trim().parse().expect("a number");
    redis
        .command(&format!("CONFIG SET maxmemory {}", used + ROOM))
        .await;
    let attacker = std::sync::Arc::new(attacker);
    for round in 0..3 {
        for _ in 0..8 {
            let mut clients = JoinSet::new();
            for _ in 0..4 {
                let (app, attacker, plan) = (app.clone(), attacker.clone(), plan.clone());
                clients.spawn(async move { churn(&app, &attacker, &plan, ROUND / 32).await });
            }
            while let Some(client) = clients.join_next().await {
                client.expect("every key works");
            }
            // Delete the key records in Redis, which would expire only after five minutes.
            let records = "EVAL \"for _, key in ipairs(redis.call('KEYS', '*:key?:*')) do redis.call('DEL', key) end\" 0";
            redis.command(records).await;
        }
        let patience = Instant::now() + Duration::from_secs(60);
        while buckets(&redis).await > 10 && Instant::now() < patience {
            sleep(Duration::from_millis(250)).await;
        }
        let allowed = app.echo(&bystander.text).await;
        assert_eq!(allowed.status, 200, "round {round}: {}", allowed.text);
        assert_eq!(allowed.header("x-quota-degraded"), None, "round {round}");
        let left = buckets(&redis).await;
        assert!(left <= 10, "round {round}: {left} buckets of deleted keys");
    }
}

/// A replica that cannot reach PostgreSQL still accepts a deleted key during the grace period. The key must not get a
/// new, full bucket.
#[tokio::test(flavor = "multi_thread")]
async fn bucket_of_a_deleted_key_is_kept_while_a_replica_may_accept_the_key() {
    let redis = RedisServer::start().await;
    let app = app_on(&redis, "60s").await;
    let account = app.register().await;
    let plan = app
        .plan(&account, json!({"default_rpm": 1, "burst": 100}))
        .await;
    churn(&app, &account, &plan, 3).await;
    // The server searches for deleted keys at least twice in this time.
    sleep(Duration::from_secs(11)).await;
    assert_eq!(buckets(&redis).await, 3);
}
