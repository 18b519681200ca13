//! Runs three replicas in real time on a real Redis that is killed or frozen, and recounts the admitted requests. Also
//! tests that a token granted by a late response is returned.
#![expect(
    clippy::cast_precision_loss,
    reason = "times of a run are far below 2^52 nanoseconds"
)]

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use quota_common::{
    id::{ApiKeyId, TenantId},
    plan::OnRedisFailure,
};
use quota_server::{
    clock::{Clock, SystemClock},
    limiter::{
        DistributedSettings, DistributedStore, KeyTableSettings, Limiter, Membership, Policies,
        RatePolicy, RedisCounters, ReplicaSlot, Zone,
    },
    telemetry::metrics::Metrics,
};
use quota_testkit::redis::RedisServer;
use tokio::time::{Instant, sleep};

use super::script::connect;
use crate::limiter_contract::TestLedger;

const REPLICAS: u64 = 3;
const TTL: Duration = Duration::from_millis(100);
const DEADLINE: Duration = Duration::from_millis(30);
const RPM: u32 = 6000;
const BURST: u32 = 50;

/// The outcomes of the requests of a run.
#[derive(Debug, Default)]
struct Log {
    /// For each admitted request, when it was sent and when its response arrived, in nanoseconds.
    admitted: Mutex<Vec<(u64, u64)>>,
    degraded: AtomicU64,
    errors: AtomicU64,
}

struct Replicas {
    stores: Vec<Arc<DistributedStore>>,
    limiters: Vec<Limiter>,
    zero: Instant,
}

async fn replicas(server: &RedisServer, on_failure: OnRedisFailure) -> Replicas {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let zero = Instant::now();
    let (mut stores, mut limiters) = (Vec::new(), Vec::new());
    let mut memberships = Vec::new();
    for _ in 0..REPLICAS {
        let redis = connect(server, "30ms");
        assert!(redis.connected(Duration::from_secs(10)).await);
        let counters = RedisCounters::new(redis);
        while counters.begin().await.is_err() {}
        let membership = Arc::new(Membership::default());
        let store = DistributedStore::new(
            Arc::clone(&clock),
            TestLedger::new(),
            Arc::new(counters),
            Arc::clone(&membership),
            Arc::default(),
            DistributedSettings {
                lease_ttl: TTL,
                deadline: DEADLINE,
                on_failure,
                keys: KeyTableSettings::default(),
            },
        );
        limiters.push(Limiter::new(Arc::clone(&store) as _, Arc::clone(&clock)));
        stores.push(store);
        memberships.push(membership);
    }
    tokio::spawn(async move {
        loop {
            for (rank, membership) in (0..).zip(&memberships) {
                let of = NonZeroU64::new(REPLICAS).unwrap();
                membership.confirm(ReplicaSlot { rank, of }, clock.monotonic());
            }
            sleep(Duration::from_millis(500)).await;
        }
    });
    // A replica may use its share only after the replicas have been counted for a while.
    sleep(Duration::from_millis(8500)).await;
    Replicas {
        stores,
        limiters,
        zero,
    }
}

/// Sends requests at twice the plan's rate to the replicas in turn, for the duration `lasts`.
async fn load(replicas: &Replicas, log: &Arc<Log>, lasts: Duration) {
    let policies = Arc::new(Policies::new(
        RatePolicy {
            rpm: NonZeroU32::new(RPM).unwrap(),
            burst: NonZeroU32::new(BURST).unwrap(),
        },
        None,
        None,
        Zone::utc(),
        false,
    ));
    let (tenant, key) = (TenantId(uuid::Uuid::nil()), ApiKeyId(uuid::Uuid::nil()));
    let zero = replicas.zero;
    let since = move || u64::try_from(zero.elapsed().as_nanos()).unwrap();
    let (began, mut sent) = (Instant::now(), 0_u32);
    while began.elapsed() < lasts {
        while f64::from(sent) < began.elapsed().as_secs_f64() * f64::from(RPM) / 30.0 {
            let limiter = replicas.limiters[sent as usize % replicas.limiters.len()].clone();
            sent += 1;
            let (log, policies) = (Arc::clone(log), Arc::clone(&policies));
            tokio::spawn(async move {
                let handle = limiter.handle(tenant, key).unwrap();
                let asked = since();
                match limiter.admit(&handle, &policies, NonZeroU32::MIN).await {
                    Ok(decision) => {
                        let degraded = u64::from(decision.degraded);
                        log.degraded.fetch_add(degraded, Ordering::Relaxed);
                        if decision.is_allowed() {
                            log.admitted.lock().push((asked, since()));
                        }
                    }
                    Err(_) => {
                        log.errors.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        sleep(Duration::from_millis(5)).await;
    }
    sleep(Duration::from_millis(200)).await;
}

impl Log {
    /// Returns the largest number of tokens by which a window is certain to exceed its bound: the burst, plus the
    /// refill in a time that is longer than the window by [`TTL`]. Only requests that were sent and got their response
    /// within the window count.
    fn excess(&self) -> f64 {
        let admitted = self.admitted.lock();
        let rate = f64::from(RPM) / 60e9;
        let mut worst = f64::MIN;
        let mut starts: Vec<u64> = admitted.iter().map(|(asked, _)| *asked).collect();
        starts.sort_unstable();
        starts.dedup();
        // Checking every twentieth start is enough to find an excess of more than a few tokens.
        for start in starts.iter().step_by(20) {
            let mut ends: Vec<u64> = admitted
                .iter()
                .filter(|(asked, _)| asked >= start)
                .map(|(_, answered)| *answered)
                .collect();
            ends.sort_unstable();
            for (count, end) in (1_u32..).zip(ends) {
                let allowed = (end - start + nanos(TTL)) as f64 * rate + f64::from(BURST);
                worst = worst.max(f64::from(count) - allowed);
            }
        }
        worst
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap()
}

async fn is_back(replicas: &Replicas) {
    let back = async {
        while replicas.stores.iter().any(|store| store.is_degraded()) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), back)
        .await
        .expect("the replicas use the counters again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_redis_grants_nothing_twice() {
    let mut server = RedisServer::start().await;
    let replicas = replicas(&server, OnRedisFailure::Share).await;
    let log = Arc::new(Log::default());
    let faults = async {
        sleep(Duration::from_millis(1500)).await;
        server.kill().await;
        sleep(Duration::from_millis(2000)).await;
        server.restart().await;
    };
    tokio::join!(load(&replicas, &log, Duration::from_secs(7)), faults);
    is_back(&replicas).await;
    assert!(log.excess() <= 0.0, "{} above the envelope", log.excess());
    assert!(
        log.degraded.load(Ordering::Relaxed) > 0,
        "the outage was noticed"
    );
    assert_eq!(
        log.errors.load(Ordering::Relaxed),
        0,
        "no request fails with an error"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_redis_rejects_requests_on_a_closed_plan() {
    let mut server = RedisServer::start().await;
    let replicas = replicas(&server, OnRedisFailure::Closed).await;
    let log = Arc::new(Log::default());
    let faults = async {
        sleep(Duration::from_millis(1000)).await;
        server.stop();
        sleep(Duration::from_millis(2000)).await;
        server.cont();
    };
    tokio::join!(load(&replicas, &log, Duration::from_secs(6)), faults);
    is_back(&replicas).await;
    assert!(log.excess() <= 0.0, "{} above the envelope", log.excess());
    assert!(
        log.errors.load(Ordering::Relaxed) > 0,
        "the plan was closed during the outage"
    );
    let again = Arc::new(Log::default());
    load(&replicas, &again, Duration::from_millis(500)).await;
    assert!(
        !again.admitted.lock().is_empty(),
        "requests are admitted again"
    );
}

/// The token was taken from the bucket before the response arrived: if the response were ignored, the token would be
/// lost.
#[tokio::test]
async fn a_token_granted_too_late_is_returned() {
    for _ in 0..20 {
        if late_token_is_returned().await.is_some() {
            return;
        }
    }
    panic!("the machine is too busy");
}

/// Returns `None` if the machine was so slow that other calls were late too. The outage that this may cause empties all
/// buckets.
async fn late_token_is_returned() -> Option<()> {
    let mut server = RedisServer::start().await;
    let redis = connect(&server, "300ms");
    assert!(redis.connected(Duration::from_secs(60)).await);
    let counters = RedisCounters::new(redis);
    while counters.begin().await.is_err() {}
    let (clock, metrics) = (SystemClock::new(), Arc::new(Metrics::default()));
    let clock: Arc<dyn Clock> = Arc::new(clock);
    let store = DistributedStore::new(
        Arc::clone(&clock),
        TestLedger::new(),
        Arc::new(counters),
        Arc::new(Membership::default()),
        Arc::clone(&metrics),
        DistributedSettings {
            lease_ttl: Duration::ZERO,
            deadline: Duration::from_millis(300),
            on_failure: OnRedisFailure::Share,
            keys: KeyTableSettings::default(),
        },
    );
    let limiter = Limiter::new(store as _, clock);
    let policies = Policies::new(
        RatePolicy {
            rpm: NonZeroU32::MIN,
            burst: NonZeroU32::new(5).unwrap(),
        },
        None,
        None,
        Zone::utc(),
        false,
    );
    let (tenant, key) = (TenantId(uuid::Uuid::nil()), ApiKeyId(uuid::Uuid::nil()));
    let handle = limiter.handle(tenant, key).unwrap();
    let admit = async || {
        let one = limiter.admit(&handle, &policies, NonZeroU32::MIN).await;
        one.unwrap().is_allowed()
    };
    let first = admit().await;
    if metrics.counter_errors.get() > 0 {
        return None;
    }
    assert!(first);
    server.stop();
    assert!(!admit().await, "no response arrives in time");
    server.cont();
    let returned = async {
        while metrics.lease_tokens_returned.get() == 0 && metrics.counter_outages.get() == 0 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), returned)
        .await
        .expect("the token is returned");
    let errors = metrics.counter_errors.get();
    let mut admitted = Vec::new();
    for _ in 0..5 {
        admitted.push(admit().await);
    }
    if metrics.counter_outages.get() > 0 || metrics.counter_errors.get() > errors {
        return None;
    }
    assert_eq!(admitted, [true, true, true, true, false]);
    assert_eq!(metrics.lease_tokens_taken.get(), 6);
    assert_eq!(metrics.lease_tokens_returned.get(), 1);
    Some(())
}
