//! Compares the script in a real Redis with the model, at times set by the test.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use fastrand::Rng;
use quota_common::id::{ApiKeyId, TenantId};
use quota_server::{
    clock::{Clock, Nanos, TestClock},
    config::{Config, Settings},
    limiter::{
        BucketName, BucketState, CounterError, CounterMicros, RedisCounters, SharedCounters,
        TakeCall, TakeReply,
    },
    redis::Redis,
};
use quota_testkit::redis::RedisServer;

use super::model::{DEADLINE, EPOCH_DELAY, State};
use crate::limiter_contract::START;

#[derive(clap::Parser)]
struct Flags {
    #[command(flatten)]
    settings: Settings,
}

/// Starts a private Redis, and connects with timeouts that do not expire on a busy machine.
pub(crate) async fn started() -> (RedisServer, Redis) {
    let server = RedisServer::start().await;
    let redis = connect(&server, "5s");
    assert!(redis.connected(Duration::from_secs(10)).await);
    (server, redis)
}

pub(super) fn connect(server: &RedisServer, patience: &str) -> Redis {
    connect_to(&server.url(), patience)
}

pub(super) fn connect_to(url: &str, patience: &str) -> Redis {
    let flags = [
        "test".to_owned(),
        format!("--redis-url={url}"),
        format!("--redis-timeout={patience}"),
        "--redis-connect-timeout=2s".to_owned(),
    ];
    let settings = <Flags as clap::Parser>::try_parse_from(flags).expect("flags");
    let config = Config::read(&settings.settings).expect("valid settings");
    Redis::connect_lazy(config.redis.expect("REDIS_URL is set"))
}

/// The counters in Redis, with a script that uses the test's time.
#[derive(Debug)]
pub(crate) struct ClockedCounters {
    counters: RedisCounters,
    redis: Redis,
    clock: TestClock,
}

const TIME: &str = "redis.call('TIME')";
/// Reads the time that the test has set, in seconds and microseconds.
const TEST_TIME: &str = "redis.call('LRANGE', 'time', 0, 1)";

const READ: &str = "local b = redis.call('HMGET', KEYS[1],";
const EXPIRE: &str = "redis.call('PEXPIRE', KEYS[1],";
/// Reads a bucket at the test's time. The bucket's field `expires` contains the time at which the bucket is deleted, in
/// microseconds.
const TEST_READ: &str = "
if now >= tonumber(redis.call('HGET', KEYS[1], 'expires') or 'inf') then
  redis.call('DEL', KEYS[1])
end
local b = redis.call('HMGET', KEYS[1],";
const TEST_EXPIRE: &str = "redis.call('HSET', KEYS[1], 'expires', now + 1000 *";

impl ClockedCounters {
    pub(crate) fn new(redis: &Redis, clock: &TestClock) -> Arc<Self> {
        Self::with_script(redis, clock, RedisCounters::script())
    }

    /// Like [`new`](Self::new), but with a different script.
    pub(super) fn with_script(redis: &Redis, clock: &TestClock, script: &str) -> Arc<Self> {
        let mut timed = script.to_owned();
        for (real, test) in [(TIME, TEST_TIME), (READ, TEST_READ), (EXPIRE, TEST_EXPIRE)] {
            assert!(timed.contains(real), "{real}");
            timed = timed.replace(real, test);
        }
        Arc::new(Self {
            counters: RedisCounters::with_script(redis.clone(), timed.leak()),
            redis: redis.clone(),
            clock: clock.clone(),
        })
    }

    /// Starts a new deployment.
    pub(crate) async fn begin(&self) {
        self.counters.begin().await.expect("Redis responds");
    }
}

#[async_trait]
impl SharedCounters for ClockedCounters {
    fn partitions(&self) -> u16 {
        self.counters.partitions()
    }

    async fn take(&self, call: TakeCall) -> Result<TakeReply, CounterError> {
        let micros = self.clock.now().0 / 1000;
        let script = quota_server::redis::Script::new(
            "time",
            "redis.call('DEL', KEYS[1]) return redis.call('RPUSH', KEYS[1], ARGV[1], ARGV[2])",
        );
        let time = [micros / 1_000_000, micros % 1_000_000];
        self.redis
            .eval(&script, &["time"], &time, None)
            .await
            .map_err(|failure| Arc::new(failure) as CounterError)?;
        self.counters.take(call).await
    }

    async fn delete(&self, partition: u16, buckets: &[BucketName]) -> Result<(), CounterError> {
        self.counters.delete(partition, buckets).await
    }
}

fn call(rng: &mut Rng, now: u64, told: u64, generation: u64) -> TakeCall {
    let emission = [1, 7, 1000, 1_000_003, 100_000_000, 60_000_000_000][rng.usize(..6)];
    let burst = [1, 2, 10, 1000][rng.usize(..4)];
    let some = |rng: &mut Rng, most: u64| if rng.bool() { 0 } else { rng.u64(..=most) };
    let need = some(rng, 5);
    let waiting = need + some(rng, 5);
    TakeCall {
        partition: 0,
        bucket: BucketName::Key(
            TenantId(uuid::Uuid::nil()),
            ApiKeyId(uuid::Uuid::from_u128(rng.u128(..3))),
        ),
        emission: Nanos(emission),
        tau: Nanos(emission * burst),
        version: rng.u64(..4),
        need,
        waiting,
        want: if need == 0 {
            0
        } else {
            waiting + some(rng, 20)
        },
        back: some(rng, 5),
        back_taken_at: CounterMicros(now - rng.u64(..2_000_000)),
        back_generation: if rng.u8(..4) == 0 { 0 } else { generation },
        lease: [0, 100_000, 1_000_000][rng.usize(..3)],
        epoch_delay: [EPOCH_DELAY, EPOCH_DELAY, 1_130_000][rng.usize(..3)],
        deadline: [DEADLINE, DEADLINE, 200_000][rng.usize(..3)],
        last_heard: CounterMicros(now - rng.u64(..3_000_000)),
        outage_since: CounterMicros(match rng.u8(..20) {
            0..=1 => now - rng.u64(..5_000_000),
            2 => 1,
            _ => 0,
        }),
        promised: CounterMicros(if rng.bool() { told } else { 0 }),
    }
}

/// For random calls, including calls after a loss of state, after the clock was set back, and after an edit, the script
/// and the model give the same replies, to the nanosecond.
#[tokio::test]
async fn the_script_replies_as_the_model_does() {
    // With the first seed, the clock is set back after a bucket has expired.
    for seed in [15_664_111_716_528_749_777, fastrand::u64(..)] {
        compare_replies(seed).await;
    }
}

async fn compare_replies(seed: u64) {
    let (_server, redis) = started().await;
    let clock = TestClock::at(START);
    let counters = ClockedCounters::new(&redis, &clock);
    counters.begin().await;
    let mut model = State::fresh(1, 1);
    let mut rng = Rng::with_seed(seed);
    let (mut told, mut granted, mut begun) = (0, 0, 0);
    let mut generations = std::collections::HashMap::new();
    for step in 0..6000 {
        match rng.u8(..200) {
            0 => {
                let flush = redis::cmd("FLUSHALL");
                redis.query("", &flush).await.expect("Redis responds");
                model = State::default();
            }
            1 => clock.set_now(quota_server::clock::UnixNanos(
                clock.now().0 - rng.u64(..20_000_000_000),
            )),
            2 => clock.advance(Duration::from_millis(rng.u64(..100_000))),
            _ => {
                let most = [10, 10_000, 500_000][rng.usize(..3)];
                clock.advance(Duration::from_micros(rng.u64(..most)));
            }
        }
        let now = clock.now().0 / 1000;
        let mut call = call(&mut rng, now, told, 1);
        if call.back_generation == 1 {
            call.back_generation = generations.get(&call.bucket).copied().unwrap_or(0);
        }
        let reply = counters.take(call).await.expect("Redis responds");
        assert_eq!(
            reply,
            model.take(1, now, call),
            "seed {seed}, step {step}: {call:?}"
        );
        match reply.state {
            BucketState::Initializing { wait } => {
                told = now + wait;
                begun += 1;
            }
            BucketState::Active {
                granted: n,
                generation,
                ..
            } => {
                granted += n;
                generations.insert(call.bucket, generation);
            }
        }
    }
    assert!(
        granted > 1000 && begun > 10,
        "{granted} granted, {begun} begun"
    );
}

/// In a new deployment, Redis has full buckets. If Redis has lost its state, a new epoch starts with empty buckets.
#[tokio::test]
async fn buckets_are_empty_after_a_loss_of_state_and_full_in_a_new_deployment() {
    let (mut server, redis) = started().await;
    let counters = RedisCounters::new(redis.clone());
    let call = TakeCall {
        need: 1,
        waiting: 1,
        want: 10,
        back: 0,
        outage_since: CounterMicros::NONE,
        // The bucket gets a token only every minute, so that a busy machine makes no difference.
        emission: Nanos::from_secs(60),
        tau: Nanos::from_secs(600),
        ..call(&mut Rng::with_seed(1), 10_000_000, 0, 0)
    };
    let state = async |counters: &RedisCounters| counters.take(call).await.unwrap().state;
    counters.begin().await.unwrap();
    assert!(matches!(
        state(&counters).await,
        BucketState::Active { granted: 5, .. }
    ));
    counters.begin().await.unwrap();
    assert!(matches!(
        state(&counters).await,
        BucketState::Active { granted: 2, .. }
    ));

    server.kill().await;
    server.restart().await;
    let came_back = async {
        loop {
            match counters.take(call).await {
                Ok(reply) => return reply,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    };
    let reply = tokio::time::timeout(Duration::from_secs(60), came_back)
        .await
        .unwrap();
    let BucketState::Initializing { wait } = reply.state else {
        panic!("{reply:?}");
    };
    tokio::time::sleep(Duration::from_micros(wait)).await;
    let BucketState::Active { granted, debt, .. } = state(&counters).await else {
        panic!("the epoch has begun");
    };
    assert_eq!(granted, 0);
    assert!(debt > Nanos::from_secs(540), "nearly empty: {debt:?}");
}

/// Returns the number of granted tokens. The epoch must have started.
fn active(state: BucketState) -> u64 {
    match state {
        BucketState::Active { granted, .. } => granted,
        BucketState::Initializing { .. } => panic!("{state:?}"),
    }
}

/// The versions of a plan start over when PostgreSQL is restored from a backup. A replica that has not learned of an
/// edit also sends a lower version, but only briefly.
#[tokio::test]
async fn versions_that_start_over_are_followed() {
    let (_server, redis) = started().await;
    let clock = TestClock::at(START);
    let counters = ClockedCounters::new(&redis, &clock);
    counters.begin().await;
    // The plan is small and has a high version. After the restore, an edit makes the plan larger and gives it a low
    // version.
    let bucket = BucketName::Key(TenantId(uuid::Uuid::nil()), ApiKeyId(uuid::Uuid::nil()));
    let plan = |version: u64, burst: u64| TakeCall {
        bucket,
        emission: Nanos::from_secs(1),
        tau: Nanos::from_secs(burst),
        version,
        need: 1,
        waiting: 100,
        want: 100,
        back: 0,
        outage_since: CounterMicros::NONE,
        ..call(&mut Rng::with_seed(1), 10_000_000, 0, 0)
    };
    let granted = async |call| active(counters.take(call).await.unwrap().state);
    assert_eq!(granted(plan(900, 3)).await, 3);
    // While the newer version is in use, the older one is ignored, no matter how busy its replica is.
    for _ in 0..30 {
        clock.advance(Duration::from_secs(1));
        assert!(granted(plan(7, 50)).await <= 1);
        assert!(granted(plan(900, 3)).await <= 1);
    }
    // The other replicas are restarted, and no replica has the higher version anymore.
    let mut followed = None;
    for second in 0..30 {
        clock.advance(Duration::from_secs(1));
        if granted(plan(8, 50)).await > 3 {
            followed = followed.or(Some(second));
        }
    }
    let followed = followed.expect("the edit has taken effect");
    assert!((5..=12).contains(&followed), "after {followed} s");
    // After that, edits are ordered by their new versions.
    clock.advance(Duration::from_secs(60));
    assert_eq!(granted(plan(9, 2)).await, 2);
}

/// A loss of state leaves every bucket empty, even if the plan's burst is raised later.
#[tokio::test]
async fn a_lost_bucket_is_empty_for_every_burst() {
    let (_server, redis) = started().await;
    let clock = TestClock::at(START);
    let counters = ClockedCounters::new(&redis, &clock);
    counters.begin().await;
    let plan = |version: u64, burst: u64| TakeCall {
        bucket: BucketName::Key(TenantId(uuid::Uuid::nil()), ApiKeyId(uuid::Uuid::nil())),
        emission: Nanos::from_millis(100),
        tau: Nanos::from_millis(burst * 100),
        version,
        need: 1,
        waiting: 200,
        want: 200,
        back: 0,
        outage_since: CounterMicros::NONE,
        ..call(&mut Rng::with_seed(1), 10_000_000, 0, 0)
    };
    let take = async |call| counters.take(call).await.unwrap().state;
    let granted = async |call| active(take(call).await);
    assert_eq!(granted(plan(1, 100)).await, 100);
    // After an edit to a burst of one, the tokens that the bucket cannot hold remain missing. When the burst is raised
    // again, the bucket contains only the refill.
    clock.advance(Duration::from_secs(1));
    assert_eq!(granted(plan(2, 1)).await, 1);
    clock.advance(Duration::from_secs(1));
    assert_eq!(granted(plan(3, 100)).await, 19);

    let flush = redis::cmd("FLUSHALL");
    redis.query("", &flush).await.expect("Redis responds");
    let BucketState::Initializing { wait } = take(plan(3, 100)).await else {
        panic!("Redis has lost the bucket's state");
    };
    // In the first two seconds of the new epoch, 20 tokens refill, and the first call takes one of them.
    clock.advance(Duration::from_micros(wait) + Duration::from_secs(1));
    assert_eq!(granted(plan(4, 1)).await, 1);
    clock.advance(Duration::from_secs(1));
    assert_eq!(granted(plan(5, 100)).await, 19);
    // With the larger burst, only the refill is available until the bucket has refilled completely.
    clock.advance(Duration::from_secs(5));
    assert_eq!(granted(plan(5, 100)).await, 50);
    clock.advance(Duration::from_secs(100));
    assert_eq!(granted(plan(5, 100)).await, 100);
    assert_eq!(granted(plan(6, 150)).await, 50);

    // Even if the burst of a slowly refilling bucket is raised only hours after it was lowered, the bucket contains
    // only the refill.
    redis.query("", &flush).await.expect("Redis responds");
    let slow = |version, burst: u64| TakeCall {
        emission: Nanos(60_000_000_000),
        tau: Nanos(burst * 60_000_000_000),
        ..plan(version, burst)
    };
    let BucketState::Initializing { wait } = take(slow(7, 1)).await else {
        panic!("Redis has lost the bucket's state");
    };
    clock.advance(Duration::from_micros(wait));
    for use_number in 1..=90 {
        clock.advance(Duration::from_secs(120));
        assert_eq!(granted(slow(7, 1)).await, 1, "use {use_number}");
    }
    assert_eq!(granted(slow(8, 600)).await, 180 - 90);
}

/// After a loss of state, a denied request is enough for the counters to know the key's plan. If the rate is raised
/// later, the bucket has refilled at the earlier rate until then. Without such a request, the counters know only the
/// later plan, and the bucket has refilled at the later plan's rate since the epoch started.
#[tokio::test]
async fn a_denial_in_a_new_epoch_counts_as_a_use_of_the_plan() {
    let (_server, redis) = started().await;
    let clock = TestClock::at(START);
    let counters = ClockedCounters::new(&redis, &clock);
    counters.begin().await;
    let plan = |key: u128, version: u64, seconds: u64| TakeCall {
        bucket: BucketName::Key(
            TenantId(uuid::Uuid::nil()),
            ApiKeyId(uuid::Uuid::from_u128(key)),
        ),
        emission: Nanos::from_secs(seconds),
        tau: Nanos::from_secs(seconds),
        version,
        need: 1,
        waiting: 1,
        want: 1,
        back: 0,
        outage_since: CounterMicros::NONE,
        ..call(&mut Rng::with_seed(1), 10_000_000, 0, 0)
    };
    let take = async |call| counters.take(call).await.unwrap().state;
    let granted = async |call| active(take(call).await);
    let (slow, fast) = (|key| plan(key, 1, 60), |key| plan(key, 2, 6));
    let flush = redis::cmd("FLUSHALL");
    redis.query("", &flush).await.expect("Redis responds");
    let BucketState::Initializing { wait } = take(slow(1)).await else {
        panic!("Redis has lost the bucket's state");
    };
    clock.advance(Duration::from_micros(wait) + Duration::from_secs(1));
    assert_eq!(granted(slow(1)).await, 0);
    // In 3 s at the lower rate, a twentieth of a token has refilled. The rest of the token takes 5.7 s at the higher
    // rate.
    clock.advance(Duration::from_secs(2));
    assert_eq!(granted(fast(1)).await, 0);
    clock.advance(Duration::from_secs(3));
    assert_eq!(granted(fast(2)).await, 1, "6 s after the epoch started");
    clock.advance(Duration::from_micros(2_699_999));
    assert_eq!(granted(fast(1)).await, 0);
    clock.advance(Duration::from_micros(1));
    assert_eq!(granted(fast(1)).await, 1);
}

/// Without edits, a bucket that expires behaves like a bucket that is kept, because it expires only after it is full.
/// The model of the kept bucket has no rule for expiry.
#[tokio::test]
async fn a_bucket_that_expires_equals_one_that_is_kept() {
    let (_server, redis) = started().await;
    let clock = TestClock::at(START);
    let counters = ClockedCounters::new(&redis, &clock);
    counters.begin().await;
    let mut kept = State::fresh(1, 1).without_expiry();
    let seed = fastrand::u64(..);
    let mut rng = Rng::with_seed(seed);
    let (mut granted, mut denied, mut expired) = (0, 0, 0);
    for step in 0..4000 {
        match rng.u8(..100) {
            0 => {
                let flush = redis::cmd("FLUSHALL");
                redis.query("", &flush).await.expect("Redis responds");
                kept = State::default().without_expiry();
            }
            1 => clock.set_now(quota_server::clock::UnixNanos(
                clock.now().0 - rng.u64(..20_000_000_000),
            )),
            2..20 => clock.advance(Duration::from_secs(rng.u64(..400))),
            _ => clock.advance(Duration::from_millis(rng.u64(..3000))),
        }
        let now = clock.now().0 / 1000;
        let (key, emission, tokens) = [
            (0, 1_000_000_000, 50),
            (1, 40_000_000_000, 1),
            (2, 3_000_000_000, 10),
        ][rng.usize(..3)];
        let key = uuid::Uuid::from_u128(key);
        let need = rng.u64(..=tokens);
        let call = TakeCall {
            bucket: BucketName::Key(TenantId(uuid::Uuid::nil()), ApiKeyId(key)),
            emission: Nanos(emission),
            tau: Nanos(emission * tokens),
            version: 1,
            need,
            waiting: need,
            want: need,
            back: 0,
            outage_since: CounterMicros::NONE,
            promised: CounterMicros::NONE,
            ..call(&mut rng, now, 0, 0)
        };
        let name = format!(
            "quota:{{q0}}:k:{}:{}",
            uuid::Uuid::nil().simple(),
            key.simple()
        );
        let mut get = redis::cmd("HGET");
        get.arg(&name).arg("expires");
        if let redis::Value::BulkString(at) = redis.query("", &get).await.expect("Redis responds") {
            let at = String::from_utf8(at).expect("text");
            let at: u64 = at.parse().expect("a number");
            expired += u32::from(now >= at);
        }
        let reply = counters.take(call).await.expect("Redis responds");
        let kept = kept.take(1, now, call);
        let without_generation = |reply: TakeReply| match reply.state {
            BucketState::Active { granted, debt, .. } => Some((granted, debt)),
            BucketState::Initializing { .. } => None,
        };
        assert_eq!(
            without_generation(reply),
            without_generation(kept),
            "seed {seed}, step {step}: {call:?}"
        );
        match without_generation(reply) {
            Some((0, _)) if need > 0 => denied += 1,
            Some((n, _)) => granted += n,
            None => {}
        }
    }
    assert!(
        granted > 1000 && denied > 100 && expired > 50,
        "{granted} granted, {denied} denied, {expired} expired"
    );
}

/// Takes 1 and then 1,000 tokens from a bucket that would take a month to refill completely.
#[tokio::test]
async fn a_bucket_is_kept_until_it_is_full_and_not_much_longer() {
    let (server, redis) = started().await;
    let counters = RedisCounters::new(redis.clone());
    counters.begin().await.expect("Redis responds");
    let take = |tokens| TakeCall {
        bucket: BucketName::Key(TenantId(uuid::Uuid::nil()), ApiKeyId(uuid::Uuid::nil())),
        emission: Nanos::from_secs(60),
        tau: Nanos::from_secs(60 * 44_640),
        version: 1,
        need: tokens,
        waiting: tokens,
        want: tokens,
        back: 0,
        outage_since: CounterMicros::NONE,
        ..call(&mut Rng::with_seed(1), 10_000_000, 0, 0)
    };
    let seconds_left = async || {
        let keys = server.command("KEYS *:k:*").await;
        let bucket = keys.lines().nth(2).expect("one bucket").to_owned();
        let left = server.command(&format!("PTTL {bucket}")).await;
        let left: i64 = left
            .trim()
            .trim_start_matches(':')
            .parse()
            .expect("a number");
        left / 1000
    };
    counters.take(take(1)).await.expect("Redis responds");
    let left = seconds_left().await;
    assert!((60..=180).contains(&left), "{left} s for a minute of debt");
    counters.take(take(1000)).await.expect("Redis responds");
    let left = seconds_left().await;
    assert!(
        (1001 * 60 - 10..=2 * 1001 * 60 + 60).contains(&left),
        "{left} s for 1,001 minutes of debt"
    );
}

#[tokio::test]
async fn deleted_buckets_are_gone_and_others_remain() {
    let (server, redis) = started().await;
    let counters = RedisCounters::new(redis.clone());
    counters.begin().await.expect("Redis responds");
    let bucket = |key| {
        BucketName::Key(
            TenantId(uuid::Uuid::nil()),
            ApiKeyId(uuid::Uuid::from_u128(key)),
        )
    };
    for key in 0..250 {
        let take = TakeCall {
            bucket: bucket(key),
            need: 1,
            waiting: 1,
            want: 1,
            back: 0,
            outage_since: CounterMicros::NONE,
            ..call(&mut Rng::with_seed(1), 10_000_000, 0, 0)
        };
        counters.take(take).await.expect("Redis responds");
    }
    let deleted = (0..240).map(bucket).collect::<Vec<_>>();
    counters.delete(0, &deleted).await.expect("Redis responds");
    // Ten buckets and the epoch remain.
    assert_eq!(server.command("DBSIZE").await.trim(), ":11");
}

/// After Redis's clock has been set back, callers confirm their responses as before. Therefore, a caller that starts,
/// or returns after a brief outage, does not have to assume that all other callers have an outage too.
#[tokio::test]
async fn a_clock_that_was_set_back_hides_no_connected_caller() {
    let (_server, redis) = started().await;
    let clock = TestClock::at(START);
    let counters = ClockedCounters::new(&redis, &clock);
    counters.begin().await;
    let now = || clock.now().0 / 1000;
    let take = async |outage_since: u64, last_heard: u64| {
        let call = TakeCall {
            outage_since: CounterMicros(outage_since),
            last_heard: CounterMicros(last_heard),
            promised: CounterMicros::NONE,
            need: 0,
            waiting: 0,
            want: 0,
            back: 0,
            ..call(&mut Rng::with_seed(1), 10_000_000, 0, 0)
        };
        let reply = counters.take(call).await.expect("Redis responds");
        matches!(reply.state, BucketState::Active { .. }).then_some(reply.at.0)
    };
    // Makes the calls of a connected replica, which learns from the first response that the clock was set back.
    let connected = async || {
        let mut heard = 0;
        for _ in 0..10 {
            clock.advance(Duration::from_millis(100));
            heard = take(0, heard).await.expect("no epoch begins");
        }
    };
    for set_back in [0, 60, 3600] {
        connected().await;
        clock.set_now(quota_server::clock::UnixNanos(
            clock.now().0 - set_back * 1_000_000_000,
        ));
        connected().await;
        assert!(
            take(1, 0).await.is_some(),
            "a caller that starts, {set_back} s"
        );
        let since = now() - 400_000;
        assert!(take(since, since).await.is_some(), "{set_back} s");
    }
    // If no other replica is connected, a new epoch must begin.
    clock.advance(Duration::from_secs(1));
    assert!(take(1, 0).await.is_none());
}

/// A replica whose responses are always late keeps reporting its outage. If its call arrives exactly when an epoch
/// starts, before the other replicas have confirmed a response in the epoch, the replica must not begin another epoch.
/// Otherwise, no replica would recover while calls of the slow replica continue to arrive at such times.
#[tokio::test]
async fn a_caller_with_slow_responses_does_not_delay_the_others() {
    let (_server, redis) = started().await;
    let clock = TestClock::at(START);
    let counters = ClockedCounters::new(&redis, &clock);
    let take = async |outage_since: u64, promised: u64, last_heard: u64| {
        let call = TakeCall {
            outage_since: CounterMicros(outage_since),
            last_heard: CounterMicros(last_heard),
            promised: CounterMicros(promised),
            need: 0,
            waiting: 0,
            want: 0,
            back: 0,
            epoch_delay: EPOCH_DELAY,
            deadline: DEADLINE,
            ..call(&mut Rng::with_seed(1), 10_000_000, 0, 0)
        };
        counters.take(call).await.expect("Redis responds")
    };
    let promise = |reply: TakeReply| match reply.state {
        BucketState::Initializing { wait } => Some(reply.at.0 + wait),
        BucketState::Active { .. } => None,
    };
    let wait_until = |micros: u64| {
        let now = clock.now().0 / 1000;
        clock.advance(Duration::from_micros(micros.saturating_sub(now)));
    };
    let since = clock.now().0 / 1000 - 2_000_000;
    let start = promise(take(since, 0, 0).await).expect("an epoch begins");
    assert_eq!(promise(take(0, start, 0).await), Some(start), "confirmed");

    wait_until(start);
    for _ in 0..3 {
        let again = promise(take(since, 0, 0).await).expect("the caller has to call again");
        assert!(again < start + EPOCH_DELAY, "no new epoch begins");
        clock.advance(Duration::from_millis(10));
    }
    // A caller that was promised the epoch uses it, and confirms its response.
    let first = take(since, start, 0).await;
    assert_eq!(promise(first), None, "the promised epoch has begun");
    clock.advance(Duration::from_millis(2));
    assert_eq!(promise(take(0, 0, first.at.0).await), None);
    assert_eq!(
        promise(take(since, 0, 0).await),
        None,
        "others are connected"
    );

    // Without a connected caller, another epoch begins soon.
    clock.advance(Duration::from_secs(10));
    let since = clock.now().0 / 1000 - 2_000_000;
    let start = promise(take(since, 0, 0).await).expect("an epoch begins");
    assert_eq!(promise(take(0, start, 0).await), Some(start), "confirmed");
    wait_until(start);
    let again = promise(take(since, 0, 0).await).expect("the caller has to call again");
    wait_until(again);
    let next = promise(take(since, 0, 0).await).expect("an epoch begins");
    assert_eq!(next, again + EPOCH_DELAY);
}
