//! What replicas share of keys in Redis: it saves look-ups, and is never believed when it is not true.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use quota_server::{
    clock::{Clock as _, SystemClock, TestClock},
    secret_text::{Kind, SecretText},
};
use quota_testkit::{
    proxy::{Fault, FaultProxy, Upstream},
    redis::RedisServer,
};
use redis::{AsyncCommands as _, aio::MultiplexedConnection};
use serde_json::json;
use tokio::time::sleep;

use crate::{
    outage::through_proxy,
    support::app::{Account, Key, TestApp},
};

const PATIENCE: Duration = Duration::from_secs(10);

struct World {
    server: RedisServer,
    first: TestApp,
    account: Account,
    key: Key,
}

impl World {
    async fn start() -> Self {
        let server = RedisServer::start().await;
        let first = TestApp::setup()
            .flag(redis_flag(&server))
            .flag(slow())
            .flag("--on-redis-failure=open")
            .start()
            .await;
        polled(&first).await;
        let account = first.register().await;
        let plan = first.plan(&account, json!({"default_rpm": 60_000})).await;
        let key = first.key(&account, &plan).await;
        Self {
            server,
            first,
            account,
            key,
        }
    }

    /// Another replica, with nothing in its memory.
    async fn another(&self) -> TestApp {
        let app = TestApp::setup()
            .database(self.first.database.clone())
            .flag(redis_flag(&self.server))
            .flag(slow())
            .flag("--on-redis-failure=open")
            .start()
            .await;
        polled(&app).await;
        app
    }

    async fn redis(&self) -> MultiplexedConnection {
        let client = redis::Client::open(self.server.url()).expect("a URL");
        let connection = client.get_multiplexed_async_connection().await;
        connection.expect("it is there")
    }

    /// The one record that is shared, by its name.
    async fn only_record(&self) -> (String, Vec<u8>) {
        let mut redis = self.redis().await;
        let began = Instant::now();
        loop {
            let names: Vec<String> = redis.keys("quota:key*").await.expect("it lists");
            if let [name] = &*names {
                let bytes = redis.get(name).await.expect("it is there");
                return (name.clone(), bytes);
            }
            assert!(began.elapsed() < PATIENCE, "{names:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

fn redis_flag(server: &RedisServer) -> String {
    format!("--redis-url={}", server.url())
}

/// A machine that is busy with other tests answers late.
fn slow() -> &'static str {
    "--redis-timeout=2s"
}

/// Until it may believe what others have read, and is connected.
async fn polled(app: &TestApp) {
    let began = Instant::now();
    let redis = app.state.redis.as_ref().expect("it has Redis");
    while app.state.freshness.polled_lately().is_none() || redis.status().connected == 0 {
        assert!(began.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5)).await;
    }
}

async fn eventually(app: &TestApp, metric: &str, at_least: f64) {
    let began = Instant::now();
    while app.metric(metric).await < at_least {
        assert!(began.elapsed() < PATIENCE, "{metric}");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_replica_has_read_another_finds() {
    let world = World::start().await;
    assert_eq!(world.first.echo(&world.key.text).await.status, 200);
    world.only_record().await;
    let second = world.another().await;
    assert_eq!(second.echo(&world.key.text).await.status, 200);
    assert!(second.metric("quota_key_shared_hits_total").await >= 1.0);
    assert!(
        second.metric("quota_key_loads_total").await < 0.5,
        "PostgreSQL was not asked"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_opens_nothing_is_shared_too() {
    let world = World::start().await;
    let unknown = SecretText::generate(Kind::ApiKey).expect("chance").reveal();
    assert_eq!(world.first.echo(&unknown).await.status, 401);
    world.only_record().await;
    let second = world.another().await;
    assert_eq!(second.echo(&unknown).await.status, 401);
    assert!(second.metric("quota_key_shared_negative_hits_total").await >= 1.0);
}

/// A load that began before a change, and wrote what it had read long after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_from_before_a_change_is_not_believed_whenever_it_was_written() {
    let world = World::start().await;
    let (first, path) = (&world.first, format!("/admin/api-keys/{}", world.key.id));
    assert_eq!(first.echo(&world.key.text).await.status, 200);
    let (name, before) = world.only_record().await;
    let second = world.another().await;

    let changed = first
        .act(&world.account, "PATCH", &path, json!({"is_active": false}))
        .await;
    assert_eq!(changed.status, 200, "{}", changed.body);
    let mut redis = world.redis().await;
    for app in [first, &second, &world.another().await] {
        // As if it were written just now, for each anew.
        redis
            .set::<_, _, ()>(&name, &before)
            .await
            .expect("it is written");
        let began = Instant::now();
        while app.echo(&world.key.text).await.status != 401 {
            assert!(
                began.elapsed() < PATIENCE,
                "a key that was switched off opens"
            );
        }
        redis
            .set::<_, _, ()>(&name, &before)
            .await
            .expect("it is written");
        assert_eq!(app.echo(&world.key.text).await.status, 401);
    }
    // A replica that has just started knows of the change as well.
    redis
        .set::<_, _, ()>(&name, &before)
        .await
        .expect("it is written");
    let fresh = world.another().await;
    assert_eq!(fresh.echo(&world.key.text).await.status, 401);
    assert!(fresh.metric("quota_key_shared_outdated_total").await >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_a_plan_or_the_tenant_makes_every_record_untrue() {
    let world = World::start().await;
    let first = &world.first;
    let mut limit = 60_000;
    for _ in 0..2 {
        assert_eq!(first.echo(&world.key.text).await.status, 200);
        let (name, before) = world.only_record().await;
        limit += 1;
        let key = first
            .act(
                &world.account,
                "GET",
                &format!("/admin/api-keys/{}", world.key.id),
                json!(null),
            )
            .await;
        let plan = format!("/admin/plans/{}", key.text("plan_id"));
        let changed = first
            .act(
                &world.account,
                "PATCH",
                &plan,
                json!({"default_rpm": limit}),
            )
            .await;
        assert_eq!(changed.status, 200, "{}", changed.body);
        let mut redis = world.redis().await;
        redis
            .set::<_, _, ()>(&name, &before)
            .await
            .expect("it is written");
        let second = world.another().await;
        let answer = second.echo(&world.key.text).await;
        assert_eq!(answer.number("x-ratelimit-limit"), limit);

        assert_eq!(first.echo(&world.key.text).await.status, 200);
        let (name, before) = world.only_record().await;
        let zone = json!({"time_zone": "Europe/Berlin"});
        let changed = first.act(&world.account, "PATCH", "/auth/me", zone).await;
        assert_eq!(changed.status, 200, "{}", changed.body);
        redis
            .set::<_, _, ()>(&name, &before)
            .await
            .expect("it is written");
        let third = world.another().await;
        assert_eq!(third.echo(&world.key.text).await.status, 200);
        assert!(third.metric("quota_key_shared_outdated_total").await >= 1.0);
        redis.del::<_, ()>(&name).await.expect("it is gone");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_or_forged_is_as_good_as_nothing() {
    let world = World::start().await;
    assert_eq!(world.first.echo(&world.key.text).await.status, 200);
    let (name, whole) = world.only_record().await;
    let mut redis = world.redis().await;
    let mut damaged = whole.clone();
    *damaged.last_mut().expect("it is long") ^= 1;
    for bytes in [&damaged[..], b"", b"nonsense", &whole[..40]] {
        redis
            .set::<_, _, ()>(&name, bytes)
            .await
            .expect("it is written");
        let app = world.another().await;
        assert_eq!(app.echo(&world.key.text).await.status, 200);
        assert!(app.metric("quota_key_shared_unreadable_total").await >= 1.0);
    }
    // A record in another key's place opens nothing.
    let unknown = SecretText::generate(Kind::ApiKey).expect("chance");
    redis.del::<_, ()>(&name).await.expect("it is gone");
    assert_eq!(world.first.echo(&unknown.reveal()).await.status, 401);
    let (other, _) = world.only_record().await;
    redis
        .set::<_, _, ()>(&other, &whole)
        .await
        .expect("it is written");
    let app = world.another().await;
    assert_eq!(app.echo(&unknown.reveal()).await.status, 401);
    assert!(app.metric("quota_key_shared_unreadable_total").await >= 1.0);
    // And something that is no text at all.
    redis.del::<_, ()>(&name).await.expect("it is gone");
    redis
        .rpush::<_, _, ()>(&name, "list")
        .await
        .expect("it is written");
    assert_eq!(
        world.another().await.echo(&world.key.text).await.status,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_away_is_a_miss() {
    let mut world = World::start().await;
    world.server.kill().await;
    let key = {
        let plan = world
            .first
            .plan(&world.account, json!({"default_rpm": 60}))
            .await;
        world.first.key(&world.account, &plan).await
    };
    assert_eq!(world.first.echo(&key.text).await.status, 200);
    assert_eq!(world.first.echo(&world.key.text).await.status, 200);
    eventually(&world.first, "quota_key_shared_errors_total", 1.0).await;
    // And is used again when it is back.
    world.server.restart().await;
    let redis = world.first.state.redis.clone().expect("it has Redis");
    assert!(redis.connected(PATIENCE).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_falls_silent_delays_one_look_up_and_not_the_next() {
    let world = World::start().await;
    let proxy = FaultProxy::start(Upstream::Tcp(world.server.addr())).await;
    // Time stands still, so that the pause after the first failure does not end.
    let clock = TestClock::at(SystemClock::new().now());
    let app = TestApp::setup()
        .database(world.first.database.clone())
        .clock(Arc::new(clock.clone()))
        .flag(format!("--redis-url=redis://{}", proxy.addr()))
        .flag("--redis-timeout=200ms")
        .flag("--on-redis-failure=open")
        .flag("--redis-connect-timeout=10s")
        .start()
        .await;
    polled(&app).await;
    let plan = world
        .first
        .plan(&world.account, json!({"default_rpm": 60}))
        .await;
    let mut keys = Vec::new();
    for _ in 0..5 {
        keys.push(world.first.key(&world.account, &plan).await);
    }
    proxy.set(Fault::BlackHole);
    let look_up = async |key: &Key| {
        let text = SecretText::parse(Kind::ApiKey, key.text.as_bytes()).expect("a text");
        let found = app.state.keys.key(&text, app.state.freshness.now()).await;
        assert!(found.expect("PostgreSQL answers").is_some());
        app.state.metrics.key_shared_errors.get()
    };
    for key in &keys[..4] {
        assert_eq!(look_up(key).await, 1, "Redis was asked once");
    }
    clock.advance(Duration::from_secs(2));
    let began = Instant::now();
    while app.state.freshness.polled_lately().is_none() {
        assert!(began.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(look_up(&keys[4]).await, 2, "and is tried again");
}

/// It cannot tell what has been revoked since.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_cut_off_from_postgres_believes_no_shared_record() {
    let world = World::start().await;
    let (proxy, url) = through_proxy(&world.first.database).await;
    let cut_off = TestApp::setup()
        .database(world.first.database.clone())
        .url(url)
        .flag(redis_flag(&world.server))
        .flag(slow())
        .flag("--on-redis-failure=open")
        .start()
        .await;
    polled(&cut_off).await;
    assert_eq!(world.first.echo(&world.key.text).await.status, 200);
    world.only_record().await;
    proxy.set(Fault::Refuse);
    proxy.cut();
    let began = Instant::now();
    while cut_off.state.freshness.polled_lately().is_some() {
        assert!(began.elapsed() < PATIENCE);
        sleep(Duration::from_millis(20)).await;
    }
    let answer = cut_off.echo(&world.key.text).await;
    assert_eq!(answer.status, 503, "{}", answer.text);
    assert!(answer.number("retry-after") >= 1);

    proxy.set(Fault::Pass);
    polled(&cut_off).await;
    assert_eq!(cut_off.echo(&world.key.text).await.status, 200);
    assert!(cut_off.metric("quota_key_shared_hits_total").await >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_text_and_no_hash_of_ours_alone_is_written_to_redis() {
    let world = World::start().await;
    assert_eq!(world.first.echo(&world.key.text).await.status, 200);
    let (name, bytes) = world.only_record().await;
    let shown = format!("{name} {}", String::from_utf8_lossy(&bytes));
    let secret = &world.key.text[8..];
    assert!(!shown.contains(secret), "{shown}");
    let mut redis = world.redis().await;
    let ttl: i64 = redis.ttl(&name).await.expect("it tells");
    assert!((1..=300).contains(&ttl), "{ttl}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_told_to_the_other_replicas() {
    let world = World::start().await;
    let second = world.another().await;
    assert_eq!(second.echo(&world.key.text).await.status, 200);
    let path = format!("/admin/api-keys/{}", world.key.id);
    // Until the subscription stands, messages are lost, as they may be.
    let began = Instant::now();
    while second.metric("quota_revocations_received_total").await < 1.0 {
        assert!(began.elapsed() < PATIENCE);
        for rpm in [1000, 2000] {
            let changed = world
                .first
                .act(&world.account, "PATCH", &path, json!({"rpm_override": rpm}))
                .await;
            assert_eq!(changed.status, 200, "{}", changed.body);
        }
        sleep(Duration::from_millis(20)).await;
    }
    eventually(&world.first, "quota_revocations_published_total", 1.0).await;
    eventually(&second, "quota_revocation_lag_seconds_count", 1.0).await;
    // Nonsense on the channel is counted, and harms nothing.
    let mut redis = world.redis().await;
    redis
        .publish::<_, _, ()>("quota:revoked", "nonsense")
        .await
        .expect("it is sent");
    eventually(&second, "quota_revocations_unreadable_total", 1.0).await;
    assert_eq!(second.echo(&world.key.text).await.status, 200);
}
