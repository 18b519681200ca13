//! The script in a real Redis, on a time that the test brings, against the model.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use fastrand::Rng;
use quota_common::id::{ApiKeyId, TenantId};
use quota_server::{
    clock::{Clock, TestClock},
    config::{Config, Settings},
    limiter::{
        BucketName, BucketState, CounterError, RedisCounters, SharedCounters, TakeCall, TakeReply,
    },
    redis::Redis,
};
use quota_testkit::redis::RedisServer;

use super::model::State;
use crate::limiter_contract::START;

#[derive(clap::Parser)]
struct Flags {
    #[command(flatten)]
    settings: Settings,
}

/// A Redis of the test's own, and connections to it that a busy machine does not make fail.
pub(crate) async fn started() -> (RedisServer, Redis) {
    let server = RedisServer::start().await;
    let redis = connect(&server, "5s");
    assert!(redis.connected(Duration::from_secs(10)).await);
    (server, redis)
}

pub(super) fn connect(server: &RedisServer, patience: &str) -> Redis {
    let flags = [
        "test".to_owned(),
        format!("--redis-url={}", server.url()),
        format!("--redis-timeout={patience}"),
        "--redis-connect-timeout=2s".to_owned(),
    ];
    let settings = <Flags as clap::Parser>::try_parse_from(flags).expect("flags");
    let config = Config::read(&settings.settings).expect("valid settings");
    Redis::connect_lazy(config.redis.expect("it is set"))
}

/// The counters of the script, but that its time is the test's.
#[derive(Debug)]
pub(crate) struct ClockedCounters {
    counters: RedisCounters,
    redis: Redis,
    clock: TestClock,
}

const TIME: &str = "redis.call('TIME')";
/// Seconds and microseconds, as the test has them.
const TEST_TIME: &str = "redis.call('LRANGE', 'time', 0, 1)";

impl ClockedCounters {
    pub(crate) fn new(redis: &Redis, clock: &TestClock) -> Arc<Self> {
        assert!(RedisCounters::script().contains(TIME));
        let script = RedisCounters::script().replace(TIME, TEST_TIME);
        Arc::new(Self {
            counters: RedisCounters::with_script(redis.clone(), script.leak()),
            redis: redis.clone(),
            clock: clock.clone(),
        })
    }

    /// A new deployment.
    pub(crate) async fn begin(&self) {
        self.counters.begin().await.expect("Redis answers");
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
            "redis.call('DEL', KEYS[1]) return redis.call('RPUSH', KEYS[1], ARGV[1], ARGV[2])",
        );
        let time = [micros / 1_000_000, micros % 1_000_000];
        self.redis
            .eval(&script, &["time"], &time, None)
            .await
            .map_err(|failure| Arc::new(failure) as CounterError)?;
        self.counters.take(call).await
    }
}

fn call(rng: &mut Rng, now: u64, told: u64) -> TakeCall {
    let emission = [1, 7, 1000, 1_000_003, 100_000_000, 60_000_000_000][rng.usize(..6)];
    let burst = [1, 2, 10, 1000][rng.usize(..4)];
    let some = |rng: &mut Rng, most: u64| if rng.bool() { 0 } else { rng.u64(..=most) };
    let need = some(rng, 5);
    TakeCall {
        partition: 0,
        bucket: BucketName::Key(
            TenantId(uuid::Uuid::nil()),
            ApiKeyId(uuid::Uuid::from_u128(rng.u128(..3))),
        ),
        emission,
        tau: emission * burst,
        version: rng.u64(..4),
        need,
        want: if need == 0 { 0 } else { need + some(rng, 20) },
        back: some(rng, 5),
        back_taken_at: now - rng.u64(..2_000_000),
        lease: [0, 100_000, 1_000_000][rng.usize(..3)],
        last_heard: now - rng.u64(..3_000_000),
        away_since: if rng.u8(..10) == 0 {
            now - rng.u64(..5_000_000)
        } else {
            0
        },
        promised: if rng.bool() { told } else { 0 },
    }
}

/// Random calls, also after a loss, a clock set back, an edit: the same answers to the last nanosecond.
#[tokio::test]
async fn the_script_answers_as_the_model_does() {
    let (_server, redis) = started().await;
    let clock = TestClock::at(START);
    let counters = ClockedCounters::new(&redis, &clock);
    counters.begin().await;
    let mut model = State::fresh(1, 1);
    let seed = fastrand::u64(..);
    let mut rng = Rng::with_seed(seed);
    let (mut told, mut granted, mut begun) = (0, 0, 0);
    for step in 0..6000 {
        match rng.u8(..200) {
            0 => {
                let flush = redis::cmd("FLUSHALL");
                redis.query("", &flush).await.expect("Redis answers");
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
        let call = call(&mut rng, now, told);
        let reply = counters.take(call).await.expect("Redis answers");
        assert_eq!(
            reply,
            model.take(1, now, call),
            "seed {seed}, step {step}: {call:?}"
        );
        match reply.state {
            BucketState::Beginning { wait } => {
                told = now + wait;
                begun += 1;
            }
            BucketState::Known { granted: n, .. } => granted += n,
        }
    }
    assert!(
        granted > 1000 && begun > 10,
        "{granted} granted, {begun} begun"
    );
}

/// A Redis that is new to the deployment has full buckets; one that has lost them begins anew, empty.
#[tokio::test]
async fn a_lost_state_begins_empty_and_a_new_one_full() {
    let (mut server, redis) = started().await;
    let counters = RedisCounters::new(redis.clone());
    let call = TakeCall {
        need: 1,
        want: 10,
        back: 0,
        away_since: 0,
        emission: 1_000_000_000,
        tau: 10_000_000_000,
        ..call(&mut Rng::with_seed(1), 10_000_000, 0)
    };
    let state = async |counters: &RedisCounters| counters.take(call).await.unwrap().state;
    counters.begin().await.unwrap();
    assert!(matches!(
        state(&counters).await,
        BucketState::Known { granted: 5, .. }
    ));
    counters.begin().await.unwrap();
    assert!(matches!(
        state(&counters).await,
        BucketState::Known { granted: 2, .. }
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
    let reply = tokio::time::timeout(Duration::from_secs(20), came_back)
        .await
        .unwrap();
    let BucketState::Beginning { wait } = reply.state else {
        panic!("{reply:?}");
    };
    tokio::time::sleep(Duration::from_micros(wait)).await;
    let BucketState::Known { granted, debt } = state(&counters).await else {
        panic!("it has begun");
    };
    assert_eq!(granted, 0);
    assert!(debt > 9_000_000_000, "nearly empty: {debt}");
}
