//! Tests that the key records that replicas share in Redis save database lookups, and that an outdated record is never
//! used.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use quota_server::{
    clock::{Clock as _, SystemClock, TestClock},
    keys::LookupCaller,
    repo::sweep,
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

const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    server: RedisServer,
    /// The clock stands still, so that the last poll for changes always counts as recent. Otherwise, a replica on a
    /// busy machine would ignore shared records.
    clock: TestClock,
    first: TestApp,
    account: Account,
    key: Key,
}

impl World {
    async fn start() -> Self {
        let server = RedisServer::start().await;
        let clock = TestClock::at(SystemClock::new().now());
        let first = TestApp::setup()
            .clock(Arc::new(clock.clone()))
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
            clock,
            first,
            account,
            key,
        }
    }

    /// Starts another replica, which has nothing in memory.
    async fn another(&self) -> TestApp {
        let app = TestApp::setup()
            .database(self.first.database.clone())
            .clock(Arc::new(self.clock.clone()))
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
        connection.expect("Redis responds")
    }

    /// Returns the Redis key and the value of the only shared record.
    async fn only_record(&self) -> (String, Vec<u8>) {
        let mut redis = self.redis().await;
        let began = Instant::now();
        loop {
            let names: Vec<String> = redis.keys("quota:key*").await.expect("the keys are listed");
            if let [name] = &*names {
                let bytes = redis.get(name).await.expect("Redis responds");
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

/// Returns a setting that allows for late responses while other tests run.
fn slow() -> &'static str {
    "--redis-timeout=2s"
}

/// Waits until the replica is connected to Redis and can use shared records.
async fn polled(app: &TestApp) {
    let began = Instant::now();
    let redis = app.state.redis.as_ref().expect("the server uses Redis");
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
async fn record_read_by_one_replica_is_found_by_another() {
    let world = World::start().await;
    assert_eq!(world.first.echo(&world.key.text).await.status, 200);
    world.only_record().await;
    let second = world.another().await;
    assert_eq!(second.echo(&world.key.text).await.status, 200);
    assert!(second.metric("quota_key_shared_hits_total").await >= 1.0);
    assert!(
        second.metric("quota_key_loads_total").await < 0.5,
        "PostgreSQL was not queried"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_keys_are_shared_too() {
    let world = World::start().await;
    let unknown = SecretText::generate(Kind::ApiKey)
        .expect("random bytes")
        .reveal();
    assert_eq!(world.first.echo(&unknown).await.status, 401);
    world.only_record().await;
    let second = world.another().await;
    assert_eq!(second.echo(&unknown).await.status, 401);
    assert!(second.metric("quota_key_shared_negative_hits_total").await >= 1.0);
}

/// A record that was loaded before a change is written to Redis long after the change.
#[tokio::test(flavor = "multi_thread")]
async fn record_from_before_a_change_is_rejected_whenever_it_was_written() {
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
        // Write the old record for each replica, so that it looks as if it had just been stored.
        redis
            .set::<_, _, ()>(&name, &before)
            .await
            .expect("the record is written");
        let began = Instant::now();
        while app.echo(&world.key.text).await.status != 401 {
            assert!(began.elapsed() < PATIENCE, "a deactivated key is accepted");
        }
        redis
            .set::<_, _, ()>(&name, &before)
            .await
            .expect("the record is written");
        assert_eq!(app.echo(&world.key.text).await.status, 401);
    }
    // A replica that has just started also knows about the change.
    redis
        .set::<_, _, ()>(&name, &before)
        .await
        .expect("the record is written");
    let fresh = world.another().await;
    assert_eq!(fresh.echo(&world.key.text).await.status, 401);
    assert!(fresh.metric("quota_key_shared_outdated_total").await >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn change_to_a_plan_or_tenant_invalidates_every_record() {
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
            .expect("the record is written");
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
            .expect("the record is written");
        let third = world.another().await;
        assert_eq!(third.echo(&world.key.text).await.status, 200);
        assert!(third.metric("quota_key_shared_outdated_total").await >= 1.0);
        redis.del::<_, ()>(&name).await.expect("the key is deleted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_or_forged_record_is_ignored() {
    let world = World::start().await;
    assert_eq!(world.first.echo(&world.key.text).await.status, 200);
    let (name, whole) = world.only_record().await;
    let mut redis = world.redis().await;
    let mut damaged = whole.clone();
    *damaged.last_mut().expect("the record is not empty") ^= 1;
    for bytes in [&damaged[..], b"", b"nonsense", &whole[..40]] {
        redis
            .set::<_, _, ()>(&name, bytes)
            .await
            .expect("the record is written");
        let app = world.another().await;
        assert_eq!(app.echo(&world.key.text).await.status, 200);
        assert!(app.metric("quota_key_shared_unreadable_total").await >= 1.0);
    }
    // A record stored under another key's name is rejected.
    let unknown = SecretText::generate(Kind::ApiKey).expect("random bytes");
    redis.del::<_, ()>(&name).await.expect("the key is deleted");
    assert_eq!(world.first.echo(&unknown.reveal()).await.status, 401);
    let (other, _) = world.only_record().await;
    redis
        .set::<_, _, ()>(&other, &whole)
        .await
        .expect("the record is written");
    let app = world.another().await;
    assert_eq!(app.echo(&unknown.reveal()).await.status, 401);
    assert!(app.metric("quota_key_shared_unreadable_total").await >= 1.0);
    // A Redis value of another type is ignored.
    redis.del::<_, ()>(&name).await.expect("the key is deleted");
    redis
        .rpush::<_, _, ()>(&name, "list")
        .await
        .expect("the record is written");
    assert_eq!(
        world.another().await.echo(&world.key.text).await.status,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_redis_is_a_miss() {
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
    // Redis is used again after it recovers.
    world.server.restart().await;
    let redis = world
        .first
        .state
        .redis
        .clone()
        .expect("the server uses Redis");
    assert!(redis.connected(PATIENCE).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_redis_delays_one_lookup_and_not_the_next() {
    let world = World::start().await;
    let proxy = FaultProxy::start(Upstream::Tcp(world.server.addr())).await;
    // The clock is stopped, so that the pause after the first failure does not end.
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
        let text = SecretText::parse(Kind::ApiKey, key.text.as_bytes()).expect("a valid key");
        let found = app
            .state
            .keys
            .key(
                text.hash(),
                app.state.freshness.now(),
                LookupCaller::default(),
            )
            .await;
        assert!(found.expect("PostgreSQL responds").is_some());
        app.state.metrics.key_shared_errors.get()
    };
    for key in &keys[..4] {
        assert_eq!(look_up(key).await, 1, "Redis was called once");
    }
    clock.advance(Duration::from_secs(2));
    let began = Instant::now();
    while app.state.freshness.polled_lately().is_none() {
        assert!(began.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(look_up(&keys[4]).await, 2, "Redis is called again");
}

/// A replica that is cut off from PostgreSQL cannot know about changes made since then.
#[tokio::test(flavor = "multi_thread")]
async fn replica_cut_off_from_postgres_trusts_no_shared_record() {
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
async fn no_secret_and_no_plain_hash_is_written_to_redis() {
    let world = World::start().await;
    assert_eq!(world.first.echo(&world.key.text).await.status, 200);
    let (name, bytes) = world.only_record().await;
    let shown = format!("{name} {}", String::from_utf8_lossy(&bytes));
    let secret = &world.key.text[8..];
    assert!(!shown.contains(secret), "{shown}");
    let mut redis = world.redis().await;
    let ttl: i64 = redis.ttl(&name).await.expect("Redis responds");
    assert!((1..=300).contains(&ttl), "{ttl}");
}

#[tokio::test(flavor = "multi_thread")]
async fn change_is_published_to_other_replicas() {
    let world = World::start().await;
    let second = world.another().await;
    assert_eq!(second.echo(&world.key.text).await.status, 200);
    let path = format!("/admin/api-keys/{}", world.key.id);
    // If a message is published before the replica has subscribed, the replica misses the message. Therefore, repeat
    // the changes until a message is received.
    let began = Instant::now();
    while second.metric("quota_invalidations_received_total").await < 1.0 {
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
    eventually(&world.first, "quota_invalidations_published_total", 1.0).await;
    eventually(&second, "quota_invalidation_lag_seconds_count", 1.0).await;
    // Garbage on the channel is counted and has no effect.
    let mut redis = world.redis().await;
    redis
        .publish::<_, _, ()>("quota:revoked", "nonsense")
        .await
        .expect("the message is sent");
    eventually(&second, "quota_invalidations_unreadable_total", 1.0).await;
    assert_eq!(second.echo(&world.key.text).await.status, 200);
}

/// Returns the highest number that PostgreSQL has assigned to an invalidation.
async fn newest_invalidation(app: &TestApp) -> i64 {
    let client = app.database.connect().await;
    let row = client
        .query_one("SELECT coalesce(max(seq), 0) FROM revocations", &[])
        .await;
    row.expect("the number is read").get(0)
}

/// Returns a message without a seal. Anyone who has seen a message could write one like it.
fn unsealed(seq: i64, id: uuid::Uuid) -> String {
    let at = SystemClock::new().now().0 / 1000;
    json!({"seq": seq, "tenant": id, "target": "tenant", "id": id, "at": at}).to_string()
}

/// Someone with access to Redis publishes messages with future numbers. The real changes with these numbers must still
/// count.
#[tokio::test(flavor = "multi_thread")]
async fn messages_with_future_numbers_do_not_restore_a_deleted_key() {
    let world = World::start().await;
    let second = world.another().await;
    for app in [&world.first, &second] {
        assert_eq!(app.echo(&world.key.text).await.status, 200);
    }
    let (name, record) = world.only_record().await;
    let newest = newest_invalidation(&world.first).await;
    let mut redis = world.redis().await;
    for seq in newest + 1..newest + 200 {
        let heard: u64 = redis
            .publish("quota:revoked", unsealed(seq, uuid::Uuid::now_v7()))
            .await
            .expect("the message is sent");
        assert!(heard <= 2);
    }
    // Wait until both replicas have received the messages, whether or not they accept them.
    for app in [&world.first, &second] {
        let began = Instant::now();
        loop {
            let taken = app.metric("quota_invalidations_received_total").await
                + app.metric("quota_invalidations_unreadable_total").await;
            if taken >= 199.0 {
                break;
            }
            // Send the message repeatedly, because a replica misses messages until it has subscribed.
            redis
                .publish::<_, _, ()>("quota:revoked", unsealed(newest + 1, uuid::Uuid::now_v7()))
                .await
                .expect("the message is sent");
            assert!(began.elapsed() < PATIENCE, "{taken} were taken");
            sleep(Duration::from_millis(2)).await;
        }
    }

    let path = format!("/admin/api-keys/{}", world.key.id);
    let deleted = world
        .first
        .act(&world.account, "DELETE", &path, json!(null))
        .await;
    assert_eq!(deleted.status, 204, "{}", deleted.body);
    for app in [&world.first, &second] {
        let began = Instant::now();
        while app.echo(&world.key.text).await.status != 401 {
            assert!(began.elapsed() < PATIENCE, "a deleted key is accepted");
            sleep(Duration::from_millis(5)).await;
        }
    }
    // Clear the key's negative cache entry, as any change does, and store the old record again.
    for app in [&world.first, &second] {
        app.state
            .keys
            .created(&SecretText::parse(Kind::ApiKey, world.key.text.as_bytes()).expect("a key"));
        redis
            .set::<_, _, ()>(&name, &record)
            .await
            .expect("the record is written");
        let answer = app.echo(&world.key.text).await;
        assert_eq!(
            answer.status, 401,
            "a deleted key came back: {}",
            answer.text
        );
    }
}

/// Invalidations are deleted from the table after a day. A replica that starts later has never seen them.
#[tokio::test(flavor = "multi_thread")]
async fn starting_replica_rejects_records_of_keys_deleted_long_ago() {
    let world = World::start().await;
    assert_eq!(world.first.echo(&world.key.text).await.status, 200);
    let (name, record) = world.only_record().await;
    let path = format!("/admin/api-keys/{}", world.key.id);
    let deleted = world
        .first
        .act(&world.account, "DELETE", &path, json!(null))
        .await;
    assert_eq!(deleted.status, 204, "{}", deleted.body);
    // Make a newer change in another account, so that the row of the deletion may be swept.
    let other = world.first.register().await;
    let plan = world.first.plan(&other, json!({"default_rpm": 60})).await;
    let changed = world
        .first
        .act(
            &other,
            "PATCH",
            &format!("/admin/plans/{plan}"),
            json!({"default_rpm": 61}),
        )
        .await;
    assert_eq!(changed.status, 200, "{}", changed.body);
    let client = world.first.database.connect().await;
    let aged = client
        .execute(
            "UPDATE revocations SET at = now() - interval '2 days' WHERE target_type = 'api_key'",
            &[],
        )
        .await
        .expect("the row is changed");
    assert!(aged >= 1);
    let mut tx = world.first.state.db.system().await.expect("a connection");
    let swept = sweep::batch(&mut tx, sweep::Expired::Invalidations, 1000).await;
    tx.commit().await.expect("the transaction is committed");
    assert!(swept.expect("the rows are swept") >= 1);

    let mut redis = world.redis().await;
    redis
        .set::<_, _, ()>(&name, &record)
        .await
        .expect("the record is written");
    let fresh = world.another().await;
    let answer = fresh.echo(&world.key.text).await;
    assert_eq!(
        answer.status, 401,
        "a deleted key came back: {}",
        answer.text
    );
    assert!(fresh.metric("quota_key_shared_outdated_total").await >= 1.0);
}

/// Two installations with the same Redis, prefix and secret do not trust each other.
#[tokio::test(flavor = "multi_thread")]
async fn two_installations_with_one_prefix_do_not_trust_each_other() {
    let server = RedisServer::start().await;
    let clock = TestClock::at(SystemClock::new().now());
    let start = async || {
        let app = TestApp::setup()
            .clock(Arc::new(clock.clone()))
            .flag(redis_flag(&server))
            .flag(slow())
            .flag("--secret=0123456789abcdef0123456789abcdef")
            .start()
            .await;
        polled(&app).await;
        app
    };
    let (one, other) = (start().await, start().await);
    let client = redis::Client::open(server.url()).expect("a URL");
    let mut redis = client
        .get_multiplexed_async_connection()
        .await
        .expect("Redis responds");
    let account = one.register().await;
    let plan = one.plan(&account, json!({})).await;
    let key = one.key(&account, &plan).await;
    assert_eq!(one.echo(&key.text).await.status, 200);
    let began = Instant::now();
    loop {
        let names: Vec<String> = redis.keys("quota:key*").await.expect("the keys are listed");
        if !names.is_empty() {
            break;
        }
        assert!(began.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(
        other.echo(&key.text).await.status,
        401,
        "another installation's record was accepted"
    );
    let began = Instant::now();
    while other.metric("quota_invalidations_unreadable_total").await < 1.0 {
        assert!(began.elapsed() < PATIENCE);
        let changed = one
            .act(
                &account,
                "PATCH",
                &format!("/admin/plans/{plan}"),
                json!({"default_rpm": 100}),
            )
            .await;
        assert_eq!(changed.status, 200, "{}", changed.body);
        sleep(Duration::from_millis(20)).await;
    }
    assert!(other.metric("quota_invalidations_received_total").await < 0.5);
    // A replica of the same installation accepts the record.
    let replica = TestApp::setup()
        .database(one.database.clone())
        .clock(Arc::new(clock.clone()))
        .flag(redis_flag(&server))
        .flag(slow())
        .flag("--secret=0123456789abcdef0123456789abcdef")
        .start()
        .await;
    polled(&replica).await;
    let names: Vec<String> = redis.keys("quota:key*").await.expect("the keys are listed");
    redis
        .del::<_, ()>(names)
        .await
        .expect("the keys are deleted");
    let key = one.key(&account, &plan).await;
    assert_eq!(one.echo(&key.text).await.status, 200);
    let began = Instant::now();
    loop {
        let names: Vec<String> = redis.keys("quota:key*").await.expect("the keys are listed");
        if !names.is_empty() {
            break;
        }
        assert!(began.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(replica.echo(&key.text).await.status, 200);
    assert!(replica.metric("quota_key_shared_hits_total").await >= 1.0);
}

/// A captured message can be replayed, whole or truncated.
#[tokio::test(flavor = "multi_thread")]
async fn replayed_message_has_no_effect() {
    let world = World::start().await;
    let client = redis::Client::open(world.server.url()).expect("a URL");
    let mut pubsub = client.get_async_pubsub().await.expect("Redis responds");
    pubsub
        .subscribe("quota:revoked")
        .await
        .expect("the subscription starts");
    let mut messages = pubsub.on_message();
    let path = format!("/admin/api-keys/{}", world.key.id);
    let change = async |rpm: u32| {
        let changed = world
            .first
            .act(&world.account, "PATCH", &path, json!({"rpm_override": rpm}))
            .await;
        assert_eq!(changed.status, 200, "{}", changed.body);
    };
    change(1000).await;
    let message = tokio::time::timeout(PATIENCE, futures_util::StreamExt::next(&mut messages))
        .await
        .expect("the message is published")
        .expect("a message");
    let message = message.get_payload_bytes().to_vec();

    let second = world.another().await;
    let before = newest_invalidation(&world.first).await;
    assert_eq!(second.echo(&world.key.text).await.status, 200);
    let loads = second.metric("quota_key_loads_total").await
        + second.metric("quota_key_shared_hits_total").await;
    let mut redis = world.redis().await;
    let mut received = 0.0;
    let began = Instant::now();
    while received < 20.0 {
        redis
            .publish::<_, _, ()>("quota:revoked", &message)
            .await
            .expect("the message is sent");
        sleep(Duration::from_millis(5)).await;
        received = second.metric("quota_invalidations_received_total").await;
        assert!(
            began.elapsed() < PATIENCE,
            "a genuine message is not applied"
        );
    }
    assert_eq!(second.echo(&world.key.text).await.status, 200);
    let again = second.metric("quota_key_loads_total").await
        + second.metric("quota_key_shared_hits_total").await;
    assert!((again - loads).abs() < 0.5, "the key was looked up again");
    for cut in [0, 1, 31, 32, 33, message.len() - 1] {
        redis
            .publish::<_, _, ()>("quota:revoked", &message[..cut])
            .await
            .expect("the message is sent");
    }
    eventually(&second, "quota_invalidations_unreadable_total", 6.0).await;
    assert_eq!(newest_invalidation(&world.first).await, before);
    // The next genuine change applies.
    change(2000).await;
    let began = Instant::now();
    while second
        .echo(&world.key.text)
        .await
        .number("x-ratelimit-limit")
        != 2000
    {
        assert!(began.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5)).await;
    }
}
