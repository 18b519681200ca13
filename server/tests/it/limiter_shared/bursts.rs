//! Tests of bursts with distant counters: the full burst of an idle key is admitted in two round trips, slow responses
//! are never reported as an exceeded limit, and tokens that were taken but not spent are returned. The tests run in
//! simulated time on the model of the counters, and in real time on a real Redis behind a proxy that delays traffic.

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures_util::FutureExt as _;
use parking_lot::Mutex;
use quota_common::{
    id::{ApiKeyId, TenantId},
    plan::OnRedisFailure,
};
use quota_server::{
    clock::{Clock, Monotonic, Nanos, SystemClock, UnixNanos},
    limiter::{
        BucketName, BucketState, CounterError, CounterMicros, Decision, DistributedSettings,
        DistributedStore, KeyHandle, KeyTableSettings, Limiter, Membership, Policies, RatePolicy,
        RedisCounters, ReplicaSlot, SharedCounters, TakeCall, TakeReply, Zone,
    },
    telemetry::metrics::Metrics,
};
use quota_testkit::{
    proxy::{Fault, FaultProxy, Upstream},
    redis::RedisServer,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{
    model::{self, EPOCH_DELAY, State},
    script::{connect, connect_to},
};
use crate::limiter_contract::{START, TestLedger};

const TTL: Duration = Duration::from_millis(100);
const DEADLINE: Duration = Duration::from_millis(30);
/// A deadline that is long enough for a busy machine.
const LONG: Duration = Duration::from_secs(5);
const TENANT: TenantId = TenantId(uuid::Uuid::nil());

/// Tokio's time, which the test pauses.
#[derive(Debug, Clone)]
struct PausedClock(Instant);

impl Clock for PausedClock {
    fn now(&self) -> UnixNanos {
        START.saturating_add(Nanos(self.monotonic().0))
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic(Nanos::from(self.0.elapsed()).0)
    }
}

/// A model of the counters, with latency.
#[derive(Debug, Clone)]
pub(super) struct Far {
    zero: Instant,
    state: Arc<Mutex<State>>,
    calls: Arc<Mutex<Vec<TakeCall>>>,
    round_trip: Arc<Mutex<Duration>>,
    /// If set, calls arrive, but their responses are lost.
    breaks: Arc<AtomicBool>,
}

#[derive(Debug, thiserror::Error)]
#[error("the connection broke")]
struct Broke;

impl Far {
    pub(super) fn new(round_trip: Duration) -> Self {
        Self {
            zero: Instant::now(),
            state: Arc::new(Mutex::new(State::fresh(1, 1))),
            calls: Arc::default(),
            round_trip: Arc::new(Mutex::new(round_trip)),
            breaks: Arc::default(),
        }
    }

    fn serve(&self, call: TakeCall) -> TakeReply {
        let elapsed = u64::try_from(self.zero.elapsed().as_micros()).unwrap();
        self.state.lock().take(1, START.0 / 1000 + elapsed, call)
    }

    /// Returns the number of calls so far, not including heartbeats.
    pub(super) fn calls(&self) -> usize {
        let calls = self.calls.lock();
        calls
            .iter()
            .filter(|it| it.bucket != BucketName::Heartbeat)
            .count()
    }

    fn replica(&self, on_failure: OnRedisFailure, membership: Arc<Membership>) -> Replica {
        self.replica_on(TestLedger::new(), on_failure, membership)
    }

    pub(super) fn replica_on(
        &self,
        ledger: Arc<TestLedger>,
        on_failure: OnRedisFailure,
        membership: Arc<Membership>,
    ) -> Replica {
        let clock: Arc<dyn Clock> = Arc::new(PausedClock(self.zero));
        let metrics = Arc::new(Metrics::default());
        let store = DistributedStore::new(
            Arc::clone(&clock),
            ledger,
            Arc::new(self.clone()),
            membership,
            Arc::clone(&metrics),
            settings(DEADLINE, on_failure),
        );
        Replica {
            limiter: Limiter::new(store, clock),
            metrics,
        }
    }
}

#[async_trait]
impl SharedCounters for Far {
    fn partitions(&self) -> u16 {
        1
    }

    async fn take(&self, call: TakeCall) -> Result<TakeReply, CounterError> {
        let it = self.clone();
        // A call that was sent arrives, whether or not the caller is still waiting.
        let served = tokio::spawn(async move {
            let way = *it.round_trip.lock() / 2;
            it.calls.lock().push(call);
            sleep(way).await;
            let reply = it.serve(call);
            let broke = it.breaks.load(Ordering::Relaxed);
            sleep(way).await;
            if broke {
                return Err(Arc::new(Broke) as CounterError);
            }
            Ok(reply)
        });
        served.await.unwrap()
    }

    async fn delete(&self, _: u16, buckets: &[BucketName]) -> Result<(), CounterError> {
        self.state.lock().delete(buckets);
        Ok(())
    }
}

fn settings(deadline: Duration, on_failure: OnRedisFailure) -> DistributedSettings {
    DistributedSettings {
        lease_ttl: TTL,
        deadline,
        on_failure,
        keys: KeyTableSettings::default(),
    }
}

#[derive(Clone)]
pub(super) struct Replica {
    pub(super) limiter: Limiter,
    pub(super) metrics: Arc<Metrics>,
}

impl Replica {
    pub(super) fn handle(&self, key: u128) -> Arc<KeyHandle> {
        let key = ApiKeyId(uuid::Uuid::from_u128(key));
        self.limiter.handle(TENANT, key).unwrap()
    }

    pub(super) async fn admit(&self, policies: &Policies, cost: u32) -> Decision {
        let cost = NonZeroU32::new(cost).unwrap();
        let decided = self.limiter.admit(&self.handle(7), policies, cost).await;
        decided.unwrap()
    }

    /// Sends requests with the given costs, all at the same time.
    pub(super) async fn at_once(&self, policies: &Policies, costs: &[u32]) -> Vec<(u32, Decision)> {
        let mut requests = JoinSet::new();
        for cost in costs.iter().copied() {
            let (it, policies) = (self.clone(), policies.clone());
            requests.spawn(async move { (cost, it.admit(&policies, cost).await) });
        }
        requests.join_all().await
    }
}

impl Replica {
    /// Sends one request for each of `keys` keys, all at the same time. Returns how many requests were admitted.
    async fn one_of_each(&self, policies: &Policies, keys: u128) -> u64 {
        let mut requests = JoinSet::new();
        for key in 0..keys {
            let (it, policies) = (self.clone(), policies.clone());
            requests.spawn(async move {
                let handle = it.handle(key);
                let decided = it.limiter.admit(&handle, &policies, NonZeroU32::MIN).await;
                u64::from(decided.unwrap().is_allowed())
            });
        }
        requests.join_all().await.into_iter().sum()
    }
}

pub(super) fn admitted(decisions: &[(u32, Decision)]) -> u32 {
    let admitted = decisions.iter().filter(|(_, it)| it.is_allowed());
    admitted.map(|(cost, _)| cost).sum()
}

fn plan(rpm: u32, burst: u32, strict: bool) -> Policies {
    let rate = RatePolicy {
        rpm: NonZeroU32::new(rpm).unwrap(),
        burst: NonZeroU32::new(burst).unwrap(),
    };
    Policies::new(rate, None, None, Zone::utc(), strict)
}

fn alone() -> Arc<Membership> {
    Arc::default()
}

#[tokio::test(start_paused = true)]
async fn an_idle_keys_full_burst_is_admitted_in_two_round_trips() {
    for round_trip in [0, 1, 2, 5, 10, 20].map(Duration::from_millis) {
        for (rpm, burst) in [(600, 600), (60, 60), (60_000, 1000), (6000, 1)] {
            for strict in [false, true] {
                let far = Far::new(round_trip);
                let replica = far.replica(OnRedisFailure::Share, alone());
                let policies = plan(rpm, burst, strict);
                let began = Instant::now();
                let more = vec![1; burst as usize + 5];
                let decisions = replica.at_once(&policies, &more).await;
                let what = format!("{rpm}/min, burst {burst}, strict {strict}, {round_trip:?}");
                let refilled = began.elapsed().as_secs_f64() * f64::from(rpm) / 60.0;
                let served = admitted(&decisions);
                assert!(served >= burst, "{served} of {what}");
                assert!(f64::from(served) <= f64::from(burst) + refilled, "{what}");
                let timer = Duration::from_millis(4);
                assert!(began.elapsed() <= 2 * round_trip + timer, "{what}");
                assert!(far.calls() <= 3, "{} calls: {what}", far.calls());
                for (_, decision) in decisions {
                    assert!(!decision.degraded, "{what}");
                    assert_eq!(decision.is_allowed(), decision.violated().is_empty());
                }
            }
        }
    }
}

/// Each request gets its full cost or nothing, and no tokens are lost.
#[tokio::test(start_paused = true)]
async fn a_burst_of_different_costs_is_admitted_up_to_the_limit() {
    for strict in [false, true] {
        let far = Far::new(Duration::from_millis(5));
        let replica = far.replica(OnRedisFailure::Share, alone());
        let policies = plan(60, 100, strict);
        let costs: Vec<u32> = (0..60).map(|n| n % 5 + 1).collect();
        let served = admitted(&replica.at_once(&policies, &costs).await);
        assert!((96..=100).contains(&served), "{served}");
        // All other granted tokens have been returned to the bucket.
        sleep(Duration::from_millis(150)).await;
        let rest = admitted(&replica.at_once(&policies, &[1; 10]).await);
        assert_eq!(served + rest, 100, "strict {strict}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_response_is_not_reported_as_an_exceeded_limit() {
    for strict in [false, true] {
        let far = Far::new(Duration::from_millis(80));
        let replica = far.replica(OnRedisFailure::Share, alone());
        let policies = plan(600, 600, strict);
        let began = Instant::now();
        let decisions = replica.at_once(&policies, &[1; 600]).await;
        let took = began.elapsed();
        assert!(took <= 2 * DEADLINE + Duration::from_millis(8), "{took:?}");
        for (_, decision) in &decisions {
            assert!(decision.degraded && !decision.is_allowed());
            assert!(decision.violated().is_empty(), "{decision:?}");
            assert!(decision.retry_after_secs().is_some());
        }
        // Tokens that arrived too late were returned. They are available once the counters are fast again. In this
        // test, that happens before the circuit breaker opens.
        tokio::time::sleep_until(began + Duration::from_millis(100)).await;
        *far.round_trip.lock() = Duration::from_millis(2);
        sleep(Duration::from_secs(1)).await;
        let served = admitted(&replica.at_once(&policies, &[1; 600]).await);
        assert_eq!(served, 600, "strict {strict}");
        let metrics = &replica.metrics;
        assert_eq!(metrics.lease_tokens_lost.get(), 0);
    }
}

/// If the counters respond too late, a request on a `closed` plan fails, and a request on an `open` plan is admitted.
#[tokio::test(start_paused = true)]
async fn a_slow_response_is_decided_by_the_fallback_setting() {
    let far = Far::new(Duration::from_millis(80));
    let closed = far.replica(OnRedisFailure::Closed, alone());
    let one = NonZeroU32::MIN;
    let policies = plan(600, 600, true);
    let decided = closed
        .limiter
        .admit(&closed.handle(7), &policies, one)
        .await;
    assert!(decided.is_err(), "{decided:?}");
    let open = far.replica(OnRedisFailure::Open, alone());
    let decision = open.admit(&policies, 1).await;
    assert!(decision.is_allowed() && decision.degraded);
}

/// Requests that are dropped while they wait consume nothing, even if their tokens have already been taken.
#[tokio::test(start_paused = true)]
async fn dropped_requests_take_nothing() {
    for strict in [false, true] {
        for dropped_after in [0, 3, 9, 11, 15, 19] {
            let far = Far::new(Duration::from_millis(10));
            let replica = far.replica(OnRedisFailure::Share, alone());
            let policies = plan(60, 40, strict);
            let mut requests = JoinSet::new();
            for _ in 0..40 {
                let (it, policies) = (replica.clone(), policies.clone());
                requests.spawn(async move { it.admit(&policies, 1).await });
            }
            sleep(Duration::from_millis(dropped_after)).await;
            requests.abort_all();
            let mut served = 0;
            while let Some(it) = requests.join_next().await {
                served += u32::from(it.is_ok_and(|it| it.is_allowed()));
            }
            sleep(Duration::from_millis(300)).await;
            let rest = admitted(&replica.at_once(&policies, &[1; 45]).await);
            assert_eq!(served + rest, 40, "{strict}, after {dropped_after} ms");
        }
    }
}

/// The script runs, but its response is lost. The tokens that the script took must not be spent, and later requests are
/// decided as usual.
#[tokio::test(start_paused = true)]
async fn a_lost_response_loses_only_the_tokens_it_granted() {
    let far = Far::new(Duration::from_millis(4));
    let replica = far.replica(OnRedisFailure::Share, alone());
    let policies = plan(60, 100, false);
    far.breaks.store(true, Ordering::Relaxed);
    let decisions = replica.at_once(&policies, &[1; 10]).await;
    assert_eq!(admitted(&decisions), 0);
    assert!(decisions.iter().all(|(_, it)| it.violated().is_empty()));
    far.breaks.store(false, Ordering::Relaxed);
    let served = admitted(&replica.at_once(&policies, &[1; 100]).await);
    assert_eq!(served, 90);
}

/// Another replica has taken all tokens of the bucket, so the next token refills in a minute. However, that replica
/// returns its tokens after one lease TTL.
#[tokio::test(start_paused = true)]
async fn a_denial_is_forgotten_when_others_may_have_returned_tokens() {
    let far = Far::new(Duration::from_millis(2));
    let policies = plan(1, 100, false);
    let other = TakeCall {
        partition: 0,
        bucket: BucketName::Key(TENANT, ApiKeyId(uuid::Uuid::from_u128(7))),
        emission: Nanos::from_secs(60),
        tau: Nanos::from_secs(6000),
        version: 0,
        need: 100,
        waiting: 100,
        want: 100,
        back: 0,
        back_taken_at: CounterMicros::NONE,
        back_generation: 0,
        lease: 100_000,
        epoch_delay: EPOCH_DELAY,
        deadline: model::DEADLINE,
        last_heard: CounterMicros::NONE,
        outage_since: CounterMicros::NONE,
        promised: CounterMicros::NONE,
    };
    let taken = far.serve(other);
    let BucketState::Active {
        granted: 100,
        generation,
        ..
    } = taken.state
    else {
        panic!("{taken:?}");
    };
    let replica = far.replica(OnRedisFailure::Share, alone());
    let denied = replica.admit(&policies, 1).await;
    assert!(!denied.is_allowed() && !denied.degraded);
    // The stated wait does not assume that tokens will be returned.
    assert!(denied.retry_after_secs().unwrap() >= 59, "{denied:?}");
    sleep(TTL).await;
    far.serve(TakeCall {
        need: 0,
        waiting: 0,
        want: 0,
        back: 100,
        back_taken_at: taken.at,
        back_generation: generation,
        ..other
    });
    // Repeating the denial does not prolong it.
    sleep(TTL.mul_f64(0.95)).await;
    assert!(!replica.admit(&policies, 1).await.is_allowed());
    sleep(Duration::from_millis(15)).await;
    assert!(replica.admit(&policies, 1).await.is_allowed());
}

/// The bucket filled up while another plan was in force. No request was decided under that plan, since both clients
/// disconnected.
#[tokio::test(start_paused = true)]
async fn a_denial_is_forgotten_when_an_edit_is_undone() {
    let far = Far::new(Duration::from_millis(10));
    let replica = far.replica(OnRedisFailure::Share, alone());
    let (slow, fast) = (plan(1, 1, true), plan(600, 1, true));
    assert_eq!(admitted(&replica.at_once(&slow, &[1; 2]).await), 1);
    for _ in 0..2 {
        let canceled = timeout(Duration::from_millis(1), replica.admit(&fast, 1));
        assert!(canceled.await.is_err());
        sleep(Duration::from_secs(1)).await;
    }
    assert!(replica.admit(&slow, 1).await.is_allowed());
}

/// The first request is granted the only token, but its client disconnects before the request spends the token. The
/// second request is denied.
#[tokio::test(start_paused = true)]
async fn a_denial_is_forgotten_when_a_canceled_request_has_returned_its_token() {
    let far = Far::new(Duration::from_millis(10));
    let replica = far.replica(OnRedisFailure::Share, alone());
    let policies = plan(1, 1, true);
    let (mut first, mut second) = (
        Box::pin(replica.admit(&policies, 1)),
        Box::pin(replica.admit(&policies, 1)),
    );
    // The calls end while neither request is polled again.
    assert!(first.as_mut().now_or_never().is_none());
    assert!(second.as_mut().now_or_never().is_none());
    sleep(Duration::from_millis(50)).await;
    drop(first);
    assert!(!second.await.is_allowed());
    sleep(Duration::from_millis(1100)).await;
    assert!(replica.admit(&policies, 1).await.is_allowed());
}

/// The client of the first request disconnects. The call for this request is late, and takes the last token. The call
/// for the second request begins before this token is returned.
#[tokio::test(start_paused = true)]
async fn a_denial_is_forgotten_when_a_late_call_has_returned_its_token() {
    for second_trip in [15, 25].map(Duration::from_millis) {
        let far = Far::new(Duration::from_millis(50));
        let replica = far.replica(OnRedisFailure::Share, alone());
        let policies = plan(1, 1, true);
        let canceled = timeout(Duration::from_millis(1), replica.admit(&policies, 1));
        assert!(canceled.await.is_err());
        *far.round_trip.lock() = second_trip;
        let denied = replica.admit(&policies, 1).await;
        assert!(!denied.is_allowed() && !denied.degraded, "{denied:?}");
        sleep(Duration::from_millis(1100)).await;
        let decision = replica.admit(&policies, 1).await;
        assert!(decision.is_allowed(), "{second_trip:?}: {decision:?}");
    }
}

/// A runtime that has been shut down drops each new task immediately.
#[test]
fn request_ends_although_the_runtime_has_been_shut_down() {
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let handle = runtime.handle().clone();
        let replica = runtime.block_on(async {
            let far = Far::new(Duration::from_millis(2));
            far.replica(OnRedisFailure::Share, alone())
        });
        runtime.shutdown_background();
        let _context = handle.enter();
        let request = std::panic::AssertUnwindSafe(|| {
            // The request must not block, but its outcome does not matter: it may panic, because the runtime no longer
            // has timers.
            let _ = Box::pin(replica.admit(&plan(1, 100, false), 1)).now_or_never();
        });
        let _ = std::panic::catch_unwind(request);
        let _ = ended.send(());
    });
    end.recv_timeout(Duration::from_secs(20))
        .expect("the request does not block its thread");
}

/// A key that is denied repeatedly does not need a call for each request.
#[tokio::test(start_paused = true)]
async fn denials_are_remembered_for_a_while() {
    for (strict, most) in [(false, 30), (true, 3)] {
        let far = Far::new(Duration::from_millis(2));
        let policies = plan(1, 5, strict);
        let replica = far.replica(OnRedisFailure::Share, alone());
        assert_eq!(admitted(&replica.at_once(&policies, &[1; 8]).await), 5);
        let calls = far.calls();
        for _ in 0..2000 {
            let decision = replica.admit(&policies, 1).await;
            assert!(!decision.is_allowed() && !decision.degraded);
            assert!(decision.retry_after_secs().unwrap() >= 50, "{decision:?}");
            sleep(Duration::from_millis(2)).await;
        }
        let calls = far.calls() - calls;
        assert!(calls <= most, "{calls} calls, strict {strict}");
    }
}

/// A replica that stops returns the leases of all keys.
#[tokio::test(start_paused = true)]
async fn a_stop_returns_every_lease() {
    const KEYS: u128 = 500;
    let far = Far::new(Duration::from_millis(2));
    let replica = far.replica(OnRedisFailure::Share, alone());
    let policies = plan(60_000, 60_000, false);
    let mut spent = 0;
    for _ in 0..20 {
        spent += replica.one_of_each(&policies, KEYS).await;
    }
    let metrics = &replica.metrics;
    let held = metrics.lease_tokens_taken.get() - spent - metrics.lease_tokens_returned.get();
    assert!(held > 0, "nothing is held");
    replica.limiter.drain().await;
    assert_eq!(metrics.lease_tokens_lost.get(), 0);
    assert_eq!(
        metrics.lease_tokens_taken.get(),
        spent + metrics.lease_tokens_returned.get()
    );
    // No tokens are held anymore, and requests are still decided.
    assert!(replica.admit(&policies, 1).await.is_allowed());
    sleep(Duration::from_millis(10)).await;
    assert_eq!(
        metrics.lease_tokens_taken.get(),
        spent + 1 + metrics.lease_tokens_returned.get()
    );
}

/// Counters that do not respond do not prevent a replica from stopping.
#[tokio::test(start_paused = true)]
async fn a_stop_without_counters_ends() {
    let far = Far::new(Duration::from_millis(2));
    let replica = far.replica(OnRedisFailure::Share, alone());
    let policies = plan(60_000, 60_000, false);
    for _ in 0..20 {
        replica.one_of_each(&policies, 2000).await;
    }
    *far.round_trip.lock() = Duration::from_secs(3600);
    let began = Instant::now();
    replica.limiter.drain().await;
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "{:?}",
        began.elapsed()
    );
}

/// Returns three replicas on one Redis. The first replica connects through a proxy, and its calls have the deadline
/// `deadline`. The other replicas have a long deadline, so that they do not depend on the speed of the machine.
async fn three(server: &RedisServer, proxy: &FaultProxy, deadline: Duration) -> Vec<Replica> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let mut replicas = Vec::new();
    for n in 0..3 {
        let deadline = if n == 0 { deadline } else { LONG };
        let patience = format!("{}ms", deadline.as_millis());
        let redis = if n == 0 {
            connect_to(&format!("redis://{}/0", proxy.addr()), &patience)
        } else {
            connect(server, &patience)
        };
        assert!(redis.connected(Duration::from_secs(60)).await);
        let counters = RedisCounters::new(redis);
        while counters.begin().await.is_err() {}
        let membership = Arc::new(Membership::default());
        let of = NonZeroU64::new(3).unwrap();
        membership.confirm(ReplicaSlot { rank: n, of }, clock.monotonic());
        let metrics = Arc::new(Metrics::default());
        let store = DistributedStore::new(
            Arc::clone(&clock),
            TestLedger::new(),
            Arc::new(counters),
            membership,
            Arc::clone(&metrics),
            settings(deadline, OnRedisFailure::Share),
        );
        replicas.push(Replica {
            limiter: Limiter::new(store, Arc::clone(&clock)),
            metrics,
        });
    }
    replicas
}

/// A replica whose responses are 120 ms late gets 150 requests. Two other replicas get 250 requests each: one of them
/// before the tokens granted by the late responses are returned, and the other one afterward.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_responses_grant_nothing_twice() {
    let server = RedisServer::start().await;
    let proxy = FaultProxy::start(Upstream::Tcp(server.addr())).await;
    let policies = plan(60_000, 200, true);
    let replicas = three(&server, &proxy, DEADLINE).await;
    proxy.set(Fault::Delay(Duration::from_millis(60)));
    let began = Instant::now();
    let wave = |n: usize, at: u64, count: usize| {
        let (replica, policies) = (replicas[n].clone(), policies.clone());
        async move {
            tokio::time::sleep_until(began + Duration::from_millis(at)).await;
            let asked = Instant::now();
            let decisions = replica.at_once(&policies, &vec![1; count]).await;
            (asked, Instant::now(), decisions)
        }
    };
    let (late, first, second) = tokio::join!(wave(0, 0, 150), wave(1, 170, 250), wave(2, 195, 250));
    for (_, decision) in &late.2 {
        assert!(decision.is_allowed() || decision.violated().is_empty());
    }
    let served = admitted(&late.2) + admitted(&first.2) + admitted(&second.2);
    let elapsed = second.1.max(first.1) - late.0.min(first.0);
    // If the late replica admitted nothing, only the time from the first of the other two waves counts.
    let since = if admitted(&late.2) > 0 {
        elapsed
    } else {
        second.1.max(first.1) - first.0
    };
    let most = 200.0 + since.as_secs_f64() * 1000.0;
    assert!(f64::from(served) <= most, "{served} of {most}");
    assert!(served >= 100, "{served} of {most}");
}

/// With a real Redis and a round-trip time of 20 ms, 620 simultaneous requests need at most 40 calls, not counting
/// heartbeats.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_takes_few_calls_to_a_distant_redis() {
    let server = RedisServer::start().await;
    let proxy = FaultProxy::start(Upstream::Tcp(server.addr())).await;
    let replicas = three(&server, &proxy, LONG).await;
    proxy.set(Fault::Delay(Duration::from_millis(10)));
    for (key, strict) in [(1, false), (2, true)] {
        // Only one token per minute is added.
        let policies = plan(1, 600, strict);
        let replica = &replicas[0];
        let (calls, began) = (replica.metrics.counter_calls.get(), Instant::now());
        let mut requests = JoinSet::new();
        for _ in 0..620 {
            let (it, policies) = (replica.clone(), policies.clone());
            requests.spawn(async move {
                let handle = it.handle(key);
                let decided = it.limiter.admit(&handle, &policies, NonZeroU32::MIN).await;
                decided.unwrap().is_allowed()
            });
        }
        let decided = requests.join_all().await;
        let served = decided.iter().filter(|it| **it).count();
        assert!((600..=602).contains(&served), "{served}, strict {strict}");
        let calls = replica.metrics.counter_calls.get() - calls;
        // The calls include heartbeats, which are at least 110 ms apart.
        let most = 40 + began.elapsed().as_millis() / 100;
        assert!(u128::from(calls) <= most, "{calls} calls, strict {strict}");
    }
}
