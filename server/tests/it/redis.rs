//! Tests how connections to Redis are established, fail and recover, and that calls never wait for a connection.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use clap::Parser;
use quota_server::{
    config::{Config, Settings},
    redis::{CallError, Event, Link, Redis, Script, Subscription},
};
use quota_testkit::{
    proxy::{Fault, FaultProxy, Upstream},
    redis::RedisServer,
    redis_group::{RedisCluster, SentinelGroup},
};
use redis::{Cmd, FromRedisValue, Value};
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(15);
/// Adds to KEYS[1] and returns the sum.
const ADD: &str = "return redis.call('INCRBY', KEYS[1], ARGV[1])";

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    settings: Settings,
}

fn connect(url: &str, flags: &[&str]) -> Redis {
    let url = format!("--redis-url={url}");
    // Allow more time than by default, because responses may be late while other tests run.
    let all = [
        "test",
        &url,
        "--redis-timeout=2s",
        "--redis-connect-timeout=2s",
    ];
    let flags = all.iter().chain(flags);
    let settings = Flags::try_parse_from(flags).expect("flags").settings;
    let config = Config::read(&settings).expect("valid settings");
    Redis::connect_lazy(config.redis.expect("REDIS_URL is set"))
}

async fn add(redis: &Redis, key: &str, n: i64) -> Result<i64, CallError> {
    let value = redis
        .eval(&Script::new("add", ADD), &[key], &[n], None)
        .await?;
    Ok(i64::from_redis_value(value).expect("a number"))
}

/// Retries a call until it succeeds, and returns its result.
async fn eventually(redis: &Redis, key: &str) -> i64 {
    let began = Instant::now();
    loop {
        match add(redis, key, 1).await {
            Ok(sum) => return sum,
            Err(error) => assert!(began.elapsed() < PATIENCE, "{error:?}"),
        }
        sleep(Duration::from_millis(5)).await;
    }
}

fn set(key: &str, value: &str) -> Cmd {
    let mut cmd = redis::cmd("SET");
    cmd.arg(key).arg(value);
    cmd
}

#[tokio::test]
async fn call_fails_immediately_without_redis_and_soon_succeeds_with_it() {
    let mut server = RedisServer::start().await;
    let url = server.url();
    server.kill().await;
    let redis = connect(&url, &[]);
    sleep(Duration::from_millis(50)).await;
    let failed = add(&redis, "k", 1).await;
    assert!(matches!(failed, Err(CallError::NotConnected)), "{failed:?}");
    assert_eq!((redis.status().connected, redis.generation()), (0, 0));

    server.restart().await;
    assert_eq!(eventually(&redis, "k").await, 1);
    assert!(redis.generation() > 0);
}

#[tokio::test]
async fn script_is_called_by_hash_and_resent_after_redis_lost_it() {
    let server = RedisServer::start().await;
    let redis = connect(&server.url(), &[]);
    assert!(redis.connected(PATIENCE).await);
    for sum in 1..=3 {
        assert_eq!(add(&redis, "k", 1).await.expect("the script runs"), sum);
    }
    let stats = server.command("INFO commandstats").await;
    assert!(stats.contains("cmdstat_eval:calls=1,"), "{stats}");
    assert!(stats.contains("cmdstat_evalsha:calls=3,"), "{stats}");
    server.command("SCRIPT FLUSH").await;
    assert_eq!(add(&redis, "k", 1).await.expect("the script runs"), 4);
}

#[tokio::test]
async fn restart_changes_the_generation_and_the_run_id() {
    let mut server = RedisServer::start().await;
    let redis = connect(&server.url(), &["--redis-connections=3"]);
    assert_eq!(eventually(&redis, "k").await, 1);
    let before = redis.link("k").expect("Redis is connected");
    assert_eq!(
        before.run_id().map(str::len),
        Some(40),
        "{:?}",
        before.run_id()
    );

    server.kill().await;
    server.restart().await;
    assert_eq!(eventually(&redis, "k").await, 1, "Redis still has its data");
    let after = redis.link("k").expect("Redis is connected");
    assert!(after.generation() > before.generation());
    assert_ne!(after.run_id(), before.run_id());

    // All three connections are restored. The link from before the restart remains broken.
    let began = Instant::now();
    while redis.status().connected < 3 {
        assert!(began.elapsed() < PATIENCE);
        sleep(Duration::from_millis(20)).await;
    }
    assert!(before.query(&set("k", "1")).await.is_err());
}

#[tokio::test]
async fn patient_caller_gets_a_late_answer() {
    let mut server = RedisServer::start().await;
    let redis = connect_with(&server.url(), &["--redis-timeout=50ms"]);
    assert!(redis.connected(PATIENCE).await);
    server.stop();
    let patient = redis.clone();
    let patient = tokio::spawn(async move {
        let script = Script::new("add", ADD);
        patient.eval(&script, &["k"], &[1], Some(PATIENCE)).await
    });
    let late = || redis.counts().timed_out.load(Ordering::Relaxed);
    while late() == 0 {
        assert!(!patient.is_finished());
        sleep(Duration::from_millis(5)).await;
    }
    server.cont();
    let answer = patient.await.expect("the task ends").expect("a response");
    assert_eq!(i64::from_redis_value(answer), Ok(1));
    assert_eq!(late(), 1);
}

#[tokio::test]
async fn silent_redis_times_out_then_disconnects_and_recovers() {
    let server = RedisServer::start().await;
    let proxy = FaultProxy::start(Upstream::Tcp(server.addr())).await;
    let url = format!("redis://{}", proxy.addr());
    let flags = ["--redis-timeout=50ms", "--redis-connect-timeout=300ms"];
    let flags = ["--redis-connections=1", flags[0], flags[1]];
    let redis = connect_with(&url, &flags);
    eventually(&redis, "k").await;

    proxy.set(Fault::BlackHole);
    let failed = add(&redis, "k", 1).await;
    assert!(matches!(failed, Err(CallError::TimedOut(_))), "{failed:?}");
    let began = Instant::now();
    while !matches!(add(&redis, "k", 1).await, Err(CallError::NotConnected)) {
        assert!(began.elapsed() < PATIENCE, "the silence is not detected");
    }
    proxy.set(Fault::Pass);
    eventually(&redis, "k").await;
}

/// Connects with the timeouts in `flags`, and the default for every other setting.
fn connect_with(url: &str, flags: &[&str]) -> Redis {
    let url = format!("--redis-url={url}");
    let flags = ["test", &url].into_iter().chain(flags.iter().copied());
    let settings = Flags::try_parse_from(flags).expect("flags").settings;
    let config = Config::read(&settings).expect("valid settings");
    Redis::connect_lazy(config.redis.expect("REDIS_URL is set"))
}

#[tokio::test]
async fn dropping_the_handle_closes_its_connections() {
    let server = RedisServer::start().await;
    let redis = connect(&server.url(), &["--redis-connections=4"]);
    let subscription = redis.subscribe("c".into());
    eventually(&redis, "k").await;
    let clients = async || {
        server
            .command("CLIENT LIST")
            .await
            .matches(" addr=")
            .count()
            - 1
    };
    let began = Instant::now();
    while clients().await < 5 {
        assert!(began.elapsed() < PATIENCE);
        sleep(Duration::from_millis(20)).await;
    }
    drop((redis, subscription));
    while clients().await > 0 {
        assert!(began.elapsed() < PATIENCE);
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn password_is_required_and_sufficient() {
    let server = RedisServer::start_with(&["--requirepass", "hunter2"]).await;
    let redis = connect(&server.url(), &[]);
    assert_eq!(eventually(&redis, "k").await, 1);

    for wrong in ["redis://", "redis://:hunter3@"] {
        let redis = connect(&format!("{wrong}{}", server.addr()), &[]);
        assert!(
            !redis.connected(Duration::from_millis(300)).await,
            "{wrong}"
        );
        assert!(matches!(
            add(&redis, "k", 1).await,
            Err(CallError::NotConnected)
        ));
    }
}

#[tokio::test]
async fn replica_is_not_used_as_a_master() {
    let master = RedisServer::start().await;
    let port = master.addr().port().to_string();
    let replica = RedisServer::start_with(&["--replicaof", "127.0.0.1", &port]).await;
    let redis = connect(&replica.url(), &[]);
    assert!(!redis.connected(Duration::from_millis(300)).await);
    replica.command("REPLICAOF NO ONE").await;
    eventually(&redis, "k").await;

    // A master that becomes a replica is abandoned.
    replica
        .command(&format!("REPLICAOF 127.0.0.1 {port}"))
        .await;
    let began = Instant::now();
    while redis.status().connected > 0 {
        assert!(began.elapsed() < PATIENCE);
        assert!(add(&redis, "k", 1).await.is_err());
    }
}

async fn kept_up(redis: &Redis, key: &str) -> Link {
    eventually(redis, key).await;
    redis.link(key).expect("Redis is connected")
}

#[tokio::test]
async fn sentinel_is_asked_for_the_master_again_after_a_failover() {
    let mut group = SentinelGroup::start().await;
    let redis = connect(&group.url(), &[]);
    let before = kept_up(&redis, "k").await;
    let mut subscription = redis.subscribe("c".into());
    subscribed(&mut subscription).await;

    group.servers[0].kill().await;
    let failed = add(&redis, "k", 1).await;
    assert!(failed.is_err(), "{failed:?}");
    group.failed_over().await;
    let after = kept_up(&redis, "k").await;
    assert!(after.generation() > before.generation());
    assert_ne!(after.run_id(), before.run_id());
    assert_eq!(eventually(&redis, "after").await, 1);
    let there = group.servers[1].command("EXISTS after").await;
    assert!(
        there.contains(":1"),
        "the new master was written to: {there}"
    );

    assert_eq!(lost_then_subscribed(&mut subscription).await, 1);
}

#[tokio::test]
async fn connections_leave_a_master_that_sentinel_demotes() {
    let mut group = SentinelGroup::start().await;
    let redis = connect_with(&group.url(), &["--redis-connect-timeout=300ms"]);
    let before = kept_up(&redis, "k").await;
    group.servers[0].stop();
    group.failed_over().await;
    let after = kept_up(&redis, "k").await;
    assert_ne!(after.run_id(), before.run_id());
    group.servers[0].cont();
    // The master becomes a replica, and no client reconnects to it.
    sleep(Duration::from_millis(500)).await;
    let still = kept_up(&redis, "k").await;
    assert_eq!(still.run_id(), after.run_id());
}

#[tokio::test]
async fn cluster_keeps_each_key_on_its_node() {
    let cluster = RedisCluster::start().await;
    let redis = connect(&cluster.url(), &[]);
    assert!(redis.connected(PATIENCE).await);
    for i in 0..60 {
        let key = format!("{{key-{i}}}:count");
        assert_eq!(add(&redis, &key, 2).await.expect("the script runs"), 2);
    }
    let mut sizes = Vec::new();
    for node in &cluster.nodes {
        sizes.push(node.command("DBSIZE").await);
    }
    assert!(
        sizes.iter().all(|size| !size.contains(":0\r")),
        "every node has some keys: {sizes:?}"
    );
}

#[tokio::test]
async fn key_that_moves_to_another_node_is_found() {
    let cluster = RedisCluster::start().await;
    let redis = connect(&cluster.url(), &[]);
    assert!(redis.connected(PATIENCE).await);
    // Move the slot of {moved} to another node.
    let slot = cluster.nodes[0].command("CLUSTER KEYSLOT {moved}").await;
    let slot: u16 = slot
        .trim_start_matches(':')
        .lines()
        .next()
        .and_then(|it| it.parse().ok())
        .expect("a number");
    let owner = usize::from(slot / 5461).min(2);
    let other = (owner + 1) % 3;
    let id = cluster.nodes[other].command("CLUSTER MYID").await;
    let id = id.lines().nth(1).expect("an id").trim().to_owned();
    assert_eq!(
        add(&redis, "{moved}:a", 1).await.expect("the script runs"),
        1
    );
    cluster.nodes[owner].command("DEL {moved}:a").await;
    for node in [&cluster.nodes[other], &cluster.nodes[owner]] {
        let moved = format!("CLUSTER SETSLOT {slot} NODE {id}");
        assert!(node.command(&moved).await.contains("OK"));
    }
    assert_eq!(
        add(&redis, "{moved}:a", 5).await.expect("the script runs"),
        5
    );
    let there = cluster.nodes[other].command("GET {moved}:a").await;
    assert!(there.contains('5'), "{there}");
}

#[tokio::test]
async fn connection_to_a_cluster_recovers_after_an_outage() {
    let mut cluster = RedisCluster::start().await;
    let redis = connect(&cluster.url(), &[]);
    eventually(&redis, "{a}").await;
    let mut subscription = redis.subscribe("c".into());
    subscribed(&mut subscription).await;
    redis
        .query("", &publish("c", "m"))
        .await
        .expect("published");
    assert_eq!(next(&mut subscription).await, Event::Message(b"m".to_vec()));
    let before = redis.generation();
    for node in &mut cluster.nodes {
        node.kill().await;
    }
    assert!(add(&redis, "{a}", 1).await.is_err());
    for node in &mut cluster.nodes {
        node.restart().await;
    }
    eventually(&redis, "{a}").await;
    let began = Instant::now();
    while redis.generation() == before {
        assert!(began.elapsed() < PATIENCE, "the outage is not detected");
        sleep(Duration::from_millis(20)).await;
    }
}

fn publish(channel: &str, message: &str) -> Cmd {
    let mut cmd = redis::cmd("PUBLISH");
    cmd.arg(channel).arg(message);
    cmd
}

async fn next(subscription: &mut Subscription) -> Event {
    timeout(PATIENCE, subscription.next())
        .await
        .expect("something comes")
}

async fn subscribed(subscription: &mut Subscription) {
    assert_eq!(next(subscription).await, Event::Subscribed);
}

/// Returns how often the subscription was lost before it was restored.
async fn lost_then_subscribed(subscription: &mut Subscription) -> usize {
    let mut lost = 0;
    loop {
        match next(subscription).await {
            Event::Lost => lost += 1,
            Event::Subscribed => return lost,
            Event::Message(_) => {}
        }
    }
}

#[tokio::test]
async fn messages_arrive_in_order_and_losses_are_reported() {
    let server = RedisServer::start().await;
    let proxy = FaultProxy::start(Upstream::Tcp(server.addr())).await;
    let redis = connect(&server.url(), &[]);
    assert!(redis.connected(PATIENCE).await);
    let listener = connect_with(
        &format!("redis://{}", proxy.addr()),
        &["--redis-connect-timeout=3s"],
    );
    let mut subscription = listener.subscribe("c".into());
    subscribed(&mut subscription).await;
    for i in 0..500 {
        let heard = redis.query("", &publish("c", &i.to_string())).await;
        assert_eq!(heard.expect("published"), Value::Int(1));
    }
    for i in 0..500 {
        let message = Event::Message(i.to_string().into_bytes());
        assert_eq!(next(&mut subscription).await, message);
    }

    proxy.cut();
    assert_eq!(lost_then_subscribed(&mut subscription).await, 1);
    // Silence is detected even when there are no messages.
    proxy.set(Fault::BlackHole);
    assert_eq!(next(&mut subscription).await, Event::Lost);
    proxy.set(Fault::Pass);
    subscribed(&mut subscription).await;
    redis.query("", &publish("c", "last")).await.expect("sent");
    let message = Event::Message(b"last".to_vec());
    assert_eq!(next(&mut subscription).await, message);
}
