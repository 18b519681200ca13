//! Tests responses while Redis is unreachable, for each fallback setting of a plan. Also tests which replicas are
//! counted, and which buckets are empty after Redis has lost its state.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use quota_server::repo::replica;
use quota_testkit::redis::RedisServer;
use serde_json::json;
use tokio::time::sleep;
use uuid::Uuid;

use crate::support::app::{Setup, TestApp};

const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn each_plan_is_served_as_configured_and_every_response_says_so() {
    let mut server = RedisServer::start().await;
    let app = TestApp::setup()
        .flag(format!("--redis-url={}", server.url()))
        .start()
        .await;
    let account = app.register().await;
    let mut keys = Vec::new();
    for mode in ["share", "open", "closed"] {
        let plan = json!({"default_rpm": 60_000, "daily_quota": 1000, "on_redis_failure": mode});
        let plan = app.plan(&account, plan).await;
        keys.push(app.key(&account, &plan).await.text);
    }
    // While Redis is available, the fallback setting makes no difference. The first admitted request makes a block of
    // the daily quota available locally.
    for key in &keys {
        let began = Instant::now();
        loop {
            let answer = app.echo(key).await;
            if answer.status == 200 && answer.header("x-quota-degraded").is_none() {
                break;
            }
            assert!(began.elapsed() < PATIENCE, "{}", answer.text);
            sleep(Duration::from_millis(50)).await;
        }
    }

    server.kill().await;
    let began = Instant::now();
    // Until the circuit breaker opens, a request whose call fails is decided as if the replica's share had just
    // started.
    while app.metric("quota_counter_outages_total").await < 1.0 {
        assert!(began.elapsed() < PATIENCE);
        app.echo(&keys[2]).await;
    }
    let open = app.echo(&keys[1]).await;
    assert_eq!(open.status, 200);
    assert_eq!(open.header("x-quota-degraded"), Some("redis-away"));
    let closed = app.echo(&keys[2]).await;
    assert_eq!(
        (closed.status, closed.problem()),
        (503, "temporary-reduced-capacity")
    );
    assert_eq!(closed.header("retry-after"), Some("1"));
    assert_eq!(closed.header("x-quota-degraded"), Some("redis-away"));
    let began = Instant::now();
    // The share is empty at first, and starts to fill once the replicas have been counted.
    loop {
        let share = app.echo(&keys[0]).await;
        assert!(share.status == 200 || share.status == 429, "{}", share.text);
        assert_eq!(share.header("x-quota-degraded"), Some("redis-away"));
        if share.status == 200 {
            break;
        }
        // It is unknown whether the limit is reached, so the response does not say that it is.
        assert_eq!(share.problem(), "temporary-reduced-capacity");
        assert!(!share.text.contains("violated-policies"), "{}", share.text);
        assert!(share.header("retry-after").is_some());
        assert!(began.elapsed() < PATIENCE);
        sleep(Duration::from_millis(50)).await;
    }
    assert!(app.metric("quota_decisions_allowed_degraded_total").await >= 2.0);
    assert_eq!(
        app.metric("quota_counter_partitions_unavailable")
            .await
            .to_string(),
        "1"
    );

    server.restart().await;
    let began = Instant::now();
    for key in &keys {
        loop {
            let answer = app.echo(key).await;
            if answer.status == 200 && answer.header("x-quota-degraded").is_none() {
                break;
            }
            assert!(began.elapsed() < PATIENCE, "{}", answer.text);
            sleep(Duration::from_millis(50)).await;
        }
    }
    assert_eq!(
        app.metric("quota_counter_partitions_unavailable")
            .await
            .to_string(),
        "0"
    );
}

/// A replica that has stopped is not counted. However, replicas that start soon afterward still learn of the stopped
/// replica, because its share may have admitted requests that Redis does not know of.
#[tokio::test(flavor = "multi_thread")]
async fn stopped_replica_is_remembered_longer_than_it_is_counted() {
    let app = TestApp::setup().without_jobs().start().await;
    let (stopped, started) = (Uuid::now_v7(), Uuid::now_v7());
    let seen = async |id, remembered| {
        let mut tx = app.state.db.system().await.expect("a transaction");
        let seen = replica::seen(&mut tx, id, Duration::ZERO, remembered).await;
        tx.commit().await.expect("a commit");
        seen.expect("a count")
    };
    let minute = Duration::from_secs(60);
    assert!(seen(stopped, minute).await.oldest_other.is_none());
    let of_started = seen(started, minute).await;
    assert_eq!((of_started.count.get(), of_started.rank), (1, 0));
    assert!(of_started.oldest_other.is_some());
    assert!(seen(started, Duration::ZERO).await.oldest_other.is_none());
}

/// The first call to Redis states whether other replicas may have decided requests without Redis, so the replicas must
/// be counted before this call.
#[tokio::test(flavor = "multi_thread")]
async fn replica_is_counted_before_it_uses_redis() {
    let server = RedisServer::start().await;
    let app = TestApp::setup()
        .without_jobs()
        .flag(format!("--redis-url={}", server.url()))
        .start()
        .await;
    let mut tx = app.state.db.system().await.expect("a transaction");
    let minute = Duration::from_secs(60);
    let seen = replica::seen(&mut tx, Uuid::now_v7(), minute, minute).await;
    tx.commit().await.expect("a commit");
    assert_eq!(seen.expect("a count").count.get(), 2);
}

/// Buckets can be full only at the first start of a deployment. After that, buckets that Redis has lost are empty, even
/// if the first start did not reach Redis.
#[tokio::test(flavor = "multi_thread")]
async fn lost_buckets_are_empty_even_if_the_first_start_did_not_reach_redis() {
    for is_reached in [true, false] {
        let mut redis = RedisServer::start().await;
        let url = format!("--redis-url={}", redis.url());
        if !is_reached {
            redis.kill().await;
        }
        let start = |setup: Setup| {
            let setup = setup.flag(url.clone());
            setup.flag("--redis-timeout=1s").start()
        };
        let app = start(TestApp::setup()).await;
        if !is_reached {
            redis.restart().await;
        }
        let account = app.register().await;
        let plan = json!({
            "default_rpm": 60, "burst": 100, "strict": true, "on_redis_failure": "closed",
        });
        let plan = app.plan(&account, plan).await;
        let key = app.key(&account, &plan).await.text;
        // Returns how many of 100 requests are admitted, once Redis admits the first.
        let admitted = async |app: &TestApp| {
            let began = Instant::now();
            while app.echo(&key).await.status != 200 {
                assert!(began.elapsed() < PATIENCE);
                sleep(Duration::from_millis(50)).await;
            }
            let mut admitted = 1;
            for _ in 1..100 {
                admitted += u32::from(app.echo(&key).await.status == 200);
            }
            admitted
        };
        let first = admitted(&app).await;
        if is_reached {
            assert!(first >= 100, "{first} of a full bucket");
        }
        let database = Arc::clone(&app.database);
        app.stop().await;
        redis.kill().await;
        redis.restart().await;
        let app = start(TestApp::setup().database(database)).await;
        let second = admitted(&app).await;
        // One token per second refills.
        assert!(
            second < 50,
            "{second} admitted, first start reached Redis: {is_reached}"
        );
        app.stop().await;
    }
}
