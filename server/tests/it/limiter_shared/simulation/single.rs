//! Tests with one or several replicas and exact schedules of requests.

use std::{
    fmt::Write as _,
    num::{NonZeroU32, NonZeroU64},
    sync::Arc,
    time::Duration,
};

use quota_common::{
    id::{ApiKeyId, TenantId},
    plan::OnRedisFailure,
};
use quota_server::{
    clock::{Clock, Monotonic},
    limiter::{Decision, KeyHandle, Limiter, Membership, Policies, RatePolicy, ReplicaSlot, Zone},
};
use tokio::{
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep},
};

use super::{
    paused,
    plants::Plant,
    registry::Registry,
    run::{DEADLINE, store},
    world::{Link, Linked, SkewedClock, World},
};
use crate::limiter_contract::TestLedger;

/// Returns one replica on a healthy Redis, and policies with the given rate, burst and daily quota.
fn alone(
    ledger: Arc<TestLedger>,
    membership: &Arc<Membership>,
    on_failure: OnRedisFailure,
    (rpm, burst): (u32, u32),
    daily: Option<NonZeroU64>,
) -> (Limiter, Policies) {
    let world = World::new(1, 2, Plant::Nothing);
    world.links.lock().push(Link::default());
    let clock: Arc<dyn Clock> = Arc::new(SkewedClock {
        zero: world.zero,
        skew_ms: 0,
    });
    let counters = Arc::new(Linked { world, replica: 0 });
    let store = store(
        &clock,
        ledger,
        counters,
        membership,
        &Arc::default(),
        on_failure,
        DEADLINE,
    );
    let policies = Policies::new(
        RatePolicy {
            rpm: NonZeroU32::new(rpm).unwrap(),
            burst: NonZeroU32::new(burst).unwrap(),
        },
        daily,
        None,
        Zone::utc(),
        false,
    );
    (Limiter::new(store, clock), policies)
}

/// Returns a world, several replicas in it with the given round-trip time to Redis, and the policies of a `closed`
/// plan.
fn several(
    replicas: usize,
    round_trip: u64,
    limit: (u32, u32),
    strict: bool,
) -> (Arc<World>, Vec<Limiter>, Policies) {
    let memberships: Vec<_> = (0..replicas).map(|_| Arc::default()).collect();
    without_redis(
        OnRedisFailure::Closed,
        &memberships,
        round_trip,
        limit,
        strict,
    )
}

/// Starts another replica.
pub(super) fn replica(
    world: &Arc<World>,
    membership: &Arc<Membership>,
    on_failure: OnRedisFailure,
) -> Limiter {
    replica_with(world, membership, on_failure, DEADLINE)
}

/// Starts another replica, whose calls to Redis have the given deadline.
pub(super) fn replica_with(
    world: &Arc<World>,
    membership: &Arc<Membership>,
    on_failure: OnRedisFailure,
    deadline: Duration,
) -> Limiter {
    let replica = {
        let mut links = world.links.lock();
        links.push(Link::default());
        links.len() - 1
    };
    let clock: Arc<dyn Clock> = Arc::new(SkewedClock {
        zero: world.zero,
        skew_ms: 0,
    });
    let counters = Arc::new(Linked {
        world: Arc::clone(world),
        replica,
    });
    let store = store(
        &clock,
        TestLedger::new(),
        counters,
        membership,
        &Arc::default(),
        on_failure,
        deadline,
    );
    Limiter::new(store, clock)
}

/// Returns the world, a replica in it for each of the memberships, and policies with the given limit. All replicas have
/// the given fallback setting.
pub(super) fn without_redis(
    on_failure: OnRedisFailure,
    memberships: &[Arc<Membership>],
    round_trip: u64,
    (rpm, burst): (u32, u32),
    strict: bool,
) -> (Arc<World>, Vec<Limiter>, Policies) {
    let world = World::new(1, round_trip, Plant::Nothing);
    let limiters = memberships
        .iter()
        .map(|membership| replica(&world, membership, on_failure))
        .collect();
    let rate = RatePolicy {
        rpm: NonZeroU32::new(rpm).unwrap(),
        burst: NonZeroU32::new(burst).unwrap(),
    };
    let policies = Policies::new(rate, None, None, Zone::utc(), strict);
    (world, limiters, policies)
}

/// Returns how many of `count` concurrent requests are admitted.
pub(super) async fn crowd(limiter: &Limiter, policies: &Policies, count: u32) -> u32 {
    crowd_of(limiter, &a_handle(limiter), policies, count).await
}

/// Returns how many of `count` concurrent requests of a key are admitted.
pub(super) async fn crowd_of(
    limiter: &Limiter,
    handle: &Arc<KeyHandle>,
    policies: &Policies,
    count: u32,
) -> u32 {
    let mut crowd = JoinSet::new();
    for _ in 0..count {
        let (limiter, handle, policies) = (limiter.clone(), Arc::clone(handle), policies.clone());
        crowd.spawn(async move { limiter.admit(&handle, &policies, NonZeroU32::MIN).await });
    }
    let answers = crowd.join_all().await.into_iter();
    let admitted = answers.filter(|it| it.as_ref().is_ok_and(Decision::is_allowed));
    u32::try_from(admitted.count()).unwrap()
}

/// The full burst is admitted in one or two round trips, as long as Redis responds within the deadline.
#[test]
fn an_idle_keys_full_burst_is_admitted_at_once() {
    let mut short = String::new();
    for limit in [(600, 600), (60, 60)] {
        for strict in [false, true] {
            for round_trip in [0, 1, 5, 10, 20] {
                let (_, burst) = limit;
                let admitted = paused(async {
                    let (_, limiters, policies) = several(1, round_trip, limit, strict);
                    crowd(&limiters[0], &policies, burst + burst / 10).await
                });
                assert!(admitted <= burst, "{admitted} of {burst}");
                if admitted < burst {
                    let _ = writeln!(
                        short,
                        "{admitted} of {burst}, strict: {strict}, {round_trip} ms to Redis and back"
                    );
                }
            }
        }
    }
    assert!(short.is_empty(), "{short}");
}

/// Tokens that are granted too late to be spent are returned, and are credited only to the extent that the bucket has
/// not refilled in the meantime.
#[test]
fn returns_after_late_responses_credit_no_token_twice() {
    let (rpm, burst) = (60_000, 200);
    let mut over = String::new();
    for strict in [true, false] {
        for late in [60, 120, 300] {
            let (admitted, took) = paused(async {
                let (world, limiters, policies) = several(3, 2, (rpm, burst), strict);
                world.links.lock()[0].late = (100, late);
                let begin = Instant::now();
                let first = crowd(&limiters[0], &policies, 150);
                let others = async {
                    // Some requests are sent just before the returns arrive, and others just after.
                    sleep(Duration::from_millis(late - 10)).await;
                    let second = crowd(&limiters[1], &policies, 250);
                    let third = async {
                        sleep(Duration::from_millis(30)).await;
                        crowd(&limiters[2], &policies, 250).await
                    };
                    let (second, third) = tokio::join!(second, third);
                    second + third
                };
                let begun = Duration::from_millis(late - 10);
                let (first, others) = tokio::join!(first, others);
                assert_eq!(first, 0, "all responses are late");
                (others, begin.elapsed().saturating_sub(begun))
            });
            // One token refills per millisecond.
            let slack = if strict { 0 } else { 100 };
            let allowed = u128::from(burst) + took.as_millis() + slack + 1;
            assert!(admitted * 2 > burst, "{admitted} admitted");
            if u128::from(admitted) > allowed {
                let _ = writeln!(
                    over,
                    "{admitted} admitted within {took:?}, {allowed} allowed; strict: {strict}, {late} ms late"
                );
            }
        }
    }
    assert!(over.is_empty(), "{over}");
}

/// Starts a task that counts replicas for the given memberships once per second, like the server's background job.
/// Returns the registry, and a handle that aborts the task.
pub(super) fn count(
    world: &Arc<World>,
    memberships: Vec<Arc<Membership>>,
) -> (Arc<Registry>, AbortHandle) {
    let (registry, world) = (Arc::<Registry>::default(), Arc::clone(world));
    let count = {
        let registry = Arc::clone(&registry);
        move || {
            for (replica, membership) in memberships.iter().enumerate() {
                registry.count(replica, membership, world.now());
            }
        }
    };
    count();
    let task = tokio::spawn(async move {
        loop {
            sleep(Duration::from_secs(1)).await;
            count();
        }
    });
    (registry, task.abort_handle())
}

/// Returns the policies of version `number` of a plan, with the given rate and burst.
pub(super) fn version(number: u64, (rpm, burst): (u32, u32), strict: bool) -> Policies {
    let rate = RatePolicy {
        rpm: NonZeroU32::new(rpm).unwrap(),
        burst: NonZeroU32::new(burst).unwrap(),
    };
    Policies::new(rate, None, None, Zone::utc(), strict).with_version(number)
}

/// Three replicas share a busy key at 90% of its limit. They renew their leases about every 90 ms, and these calls also
/// serve as heartbeats.
#[test]
fn a_busy_key_takes_few_calls_to_redis() {
    for (rpm, most_per_thousand) in [(60_000, 46), (600_000, 4)] {
        let (calls, asked, admitted) = paused(async {
            let memberships: Vec<Arc<Membership>> = (0..3).map(|_| Arc::default()).collect();
            let (world, limiters, policies) =
                without_redis(OnRedisFailure::Share, &memberships, 1, (rpm, rpm), false);
            count(&world, memberships);
            let mut rng = fastrand::Rng::with_seed(1);
            let mut requests = JoinSet::new();
            let (mut calls, mut asked) = (0, 0_u64);
            for ms in 0..6000 {
                // Calls are counted only after the leases have reached their full size.
                if ms == 2000 {
                    (calls, asked) = (world.calls.lock().all(), 0);
                }
                let per_second = u64::from(rpm) * 9 / 600;
                let count = (per_second + rng.u64(..1000)) / 1000;
                asked += count;
                for _ in 0..count {
                    let limiter = limiters[rng.usize(..3)].clone();
                    let (handle, policies) = (a_handle(&limiter), policies.clone());
                    requests.spawn(async move {
                        let decision = limiter.admit(&handle, &policies, NonZeroU32::MIN).await;
                        decision.is_ok_and(|it| it.is_allowed())
                    });
                }
                sleep(Duration::from_millis(1)).await;
            }
            calls = world.calls.lock().all() - calls;
            let decisions = requests.join_all().await;
            (calls, asked, decisions.into_iter().all(|it| it))
        });
        assert!(admitted);
        assert!(
            calls * 1000 <= asked * most_per_thousand,
            "{calls} calls for {asked} decisions"
        );
    }
}

/// Replicas get many more requests for a key than its limit allows. During the lifetime of a lease, a single replica
/// calls Redis about twice. If there are several replicas, each of them calls Redis about once. Nearly all of these
/// calls take tokens. When other replicas stop, the remaining replica takes over their part of the limit within the
/// lifetime of a lease.
#[test]
fn a_saturated_key_takes_few_calls_to_redis() {
    // One token refills per millisecond.
    let (rpm, burst) = (60_000, 1000);
    for round_trip in [0, 1, 5] {
        paused(async {
            let memberships: Vec<Arc<Membership>> = (0..3).map(|_| Arc::default()).collect();
            let (world, limiters, policies) = without_redis(
                OnRedisFailure::Share,
                &memberships,
                round_trip,
                (rpm, burst),
                false,
            );
            count(&world, memberships);
            // Sends requests for `ms` milliseconds. Returns how many are admitted, and the calls to Redis.
            let saturate = async |limiters: &[Limiter], ms: u64| {
                let before = *world.calls.lock();
                let (mut admitted, mut requests) = (0, JoinSet::new());
                for _ in 0..ms {
                    for limiter in limiters {
                        let handle = a_handle(limiter);
                        for _ in 0..8 {
                            match limiter.try_admit(&handle, &policies, NonZeroU32::MIN) {
                                Some(decision) => admitted += u64::from(decision.is_allowed()),
                                None => {
                                    let (limiter, handle) = (limiter.clone(), Arc::clone(&handle));
                                    let policies = policies.clone();
                                    requests.spawn(async move {
                                        limiter.admit(&handle, &policies, NonZeroU32::MIN).await
                                    });
                                }
                            }
                        }
                    }
                    sleep(Duration::from_millis(1)).await;
                }
                let decisions = requests.join_all().await.into_iter();
                let waited = decisions.filter(|it| it.as_ref().is_ok_and(Decision::is_allowed));
                (
                    admitted + waited.count() as u64,
                    world.calls.lock().since(before),
                )
            };
            let (first, _) = saturate(&limiters, 1000).await;
            assert!(first >= u64::from(burst), "{first}");
            for (replicas, most_per_second) in [(3, 36), (1, 20), (2, 28), (3, 36)] {
                let (admitted, calls) = saturate(&limiters[..replicas], 3000).await;
                let text = format!("{replicas} replicas, {round_trip} ms: {admitted}, {calls:?}");
                // The replica that takes over may first wait for up to the lifetime of a lease.
                assert!((2890..=3100).contains(&admitted), "{text}");
                assert!(calls.takes <= 3 * most_per_second + 6, "{text}");
                // Replicas that get no requests send heartbeats.
                let idle = 3 - replicas as u64;
                assert!(calls.heartbeats <= idle * 3 * 10, "{text}");
                assert!(calls.returns + calls.reads <= 3, "{text}");
            }
        });
    }
}

/// After an edit, a replica still has the state of its share under the earlier plan. Redis may have learned of the edit
/// earlier, and refilled the bucket at the new rate since then. The share must not deny what Redis would grant.
#[test]
fn an_edit_denies_nothing_that_the_counters_would_grant() {
    paused(async {
        let before = version(1, (12, 100), true);
        let after = version(2, (2000, 100), true);
        let (_, limiters, _) = several(2, 2, (12, 100), true);
        assert_eq!(crowd(&limiters[0], &before, 110).await, 100);
        assert_eq!(crowd(&limiters[1], &after, 1).await, 0);
        sleep(Duration::from_millis(3100)).await;
        let mut admitted = 0;
        for _ in 0..105 {
            admitted += crowd(&limiters[0], &after, 1).await;
        }
        // 33 tokens per second refill during the round trips.
        assert!((100..=113).contains(&admitted), "{admitted} admitted");
    });
}

/// During an outage, a replica gets its first request for a key whose rate has been raised. The replica's share of the
/// bucket must not have refilled at the new rate since the start of the outage.
#[test]
fn a_share_does_not_refill_at_a_rate_before_the_edit_to_it() {
    for strict in [true, false] {
        paused(async {
            let memberships: Vec<Arc<Membership>> = (0..2).map(|_| Arc::default()).collect();
            let slow = (60, 600);
            let (world, limiters, _) =
                without_redis(OnRedisFailure::Share, &memberships, 2, slow, strict);
            count(&world, memberships);
            sleep(Duration::from_secs(12)).await;
            let (before, after) = (version(1, slow, strict), version(2, (6000, 600), strict));
            assert_eq!(crowd(&limiters[0], &before, 600).await, 600);
            world.stalled.send_replace(true);
            sleep(Duration::from_secs(6)).await;
            // In 6 s, at most one token per second has refilled.
            let first = crowd(&limiters[1], &after, 600).await;
            assert!(first <= 7, "{first} admitted");
            sleep(Duration::from_secs(1)).await;
            let second = crowd(&limiters[1], &after, 600).await;
            assert!((40..=51).contains(&second), "{second} admitted");
        });
    }
}

/// Without Redis, `open` enforces the whole limit on each replica, no matter how many requests waited for the failed
/// call. These requests cause no denials after Redis has recovered.
#[test]
fn open_admits_the_whole_limit_on_each_replica_and_no_more() {
    let mut wrong = String::new();
    for strict in [true, false] {
        for is_noticed in [false, true] {
            paused(async {
                let memberships: Vec<Arc<Membership>> = (0..2).map(|_| Arc::default()).collect();
                let (world, limiters, policies) =
                    without_redis(OnRedisFailure::Open, &memberships, 2, (60, 10), strict);
                let policies = policies.on_redis_failure(Some(OnRedisFailure::Open));
                sleep(Duration::from_secs(1)).await;
                world.stalled.send_replace(true);
                if is_noticed {
                    sleep(Duration::from_secs(2)).await;
                }
                for limiter in &limiters {
                    let admitted = crowd(limiter, &policies, 200).await;
                    if admitted != 10 {
                        let _ = writeln!(wrong, "{admitted} of 10, outage detected: {is_noticed}");
                    }
                }
                world.stalled.send_replace(false);
                // A new epoch may begin, in which every bucket is empty.
                sleep(Duration::from_secs(15)).await;
                let admitted = crowd(&limiters[0], &policies, 20).await;
                if admitted != 10 {
                    let _ = writeln!(
                        wrong,
                        "{admitted} of 10 afterward, outage detected: {is_noticed}"
                    );
                }
            });
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// Redis may stall, and respond again before an idle replica detects the stall. In the meantime, another replica has
/// detected the stall and spent tokens that Redis does not know of. The other replica then uses Redis again without the
/// idle replica's knowledge.
#[test]
fn an_outage_that_some_replicas_miss_grants_nothing_twice() {
    let (rpm, burst) = (6000, 100);
    let (mut over, mut served_on) = (String::new(), 0);
    for strict in [true, false] {
        for stall in (220..520).step_by(20) {
            let (admitted, took) = paused(async {
                let memberships: Vec<Arc<Membership>> = (0..2).map(|_| Arc::default()).collect();
                let (world, limiters, policies) =
                    without_redis(OnRedisFailure::Share, &memberships, 2, (rpm, burst), strict);
                count(&world, memberships);
                sleep(Duration::from_secs(12)).await;
                let begin = Instant::now();
                let first = crowd(&limiters[0], &policies, burst).await;
                assert_eq!(first, burst);
                world.stalled.send_replace(true);
                let mut requests = JoinSet::new();
                for ms in (0..stall + 800).step_by(5) {
                    if ms >= stall {
                        world.stalled.send_replace(false);
                    }
                    for limiter in &limiters[..if ms < stall { 1 } else { 2 }] {
                        let (limiter, policies) = (limiter.clone(), policies.clone());
                        requests.spawn(async move { crowd(&limiter, &policies, 2).await });
                    }
                    sleep(Duration::from_millis(5)).await;
                }
                let rest: u32 = requests.join_all().await.into_iter().sum();
                (first + rest, begin.elapsed())
            });
            let slack = if strict { 0 } else { 100 };
            let rate = u128::from(rpm) / 60;
            let allowed = u128::from(burst) + rate * (took.as_millis() + slack) / 1000 + 1;
            served_on += u32::from(u128::from(admitted - burst) > rate * 700 / 1000);
            if u128::from(admitted) > allowed {
                let _ = writeln!(
                    over,
                    "{admitted} admitted within {took:?}, {allowed} allowed; strict: {strict}, a stall of {stall} ms"
                );
            }
        }
    }
    assert!(over.is_empty(), "{over}");
    // After longer stalls, a new epoch begins, and every bucket is empty at first.
    assert!(served_on > 10, "served on after {served_on} of 30 stalls");
}

pub(super) fn a_handle(limiter: &Limiter) -> Arc<KeyHandle> {
    limiter
        .handle(TenantId(uuid::Uuid::nil()), ApiKeyId(uuid::Uuid::nil()))
        .unwrap()
}

/// PostgreSQL may respond more slowly than Redis is allowed to. A request on a `closed` plan that waits for PostgreSQL
/// is not rejected as in an outage.
#[test]
fn a_slow_ledger_does_not_count_as_an_outage() {
    paused(async {
        let ledger = TestLedger::new();
        ledger.set_delay(DEADLINE * 3);
        let daily = NonZeroU64::new(10_000);
        let (limiter, policies) = alone(
            ledger,
            &Arc::default(),
            OnRedisFailure::Closed,
            (6000, 6000),
            daily,
        );
        let handle = a_handle(&limiter);
        let decision = limiter.admit(&handle, &policies, NonZeroU32::MIN).await;
        let decision = decision.unwrap();
        assert!(decision.is_allowed() && !decision.degraded, "{decision:?}");
    });
}

/// Requests whose cost exceeds every lease are denied repeatedly. These requests must not make the lease larger than
/// the replica's other requests need. Otherwise, the lease would hold tokens that no request can spend.
#[test]
fn requests_too_large_for_a_lease_hold_back_no_tokens() {
    paused(async {
        let (_, limiters, policies) = several(2, 1, (60, 1000), false);
        let [mixed, other] = &limiters[..] else {
            panic!("two replicas");
        };
        assert_eq!(crowd(other, &policies, 500).await, 500);
        let (mut large, mut small) = (JoinSet::new(), JoinSet::new());
        let mut crowded = JoinSet::new();
        for n in 0..700 {
            // Consecutive requests have different costs, so no cached denial applies to them.
            let cost = NonZeroU32::new(900 + n % 50).unwrap();
            let (limiter, same) = (mixed.clone(), policies.clone());
            large.spawn(async move {
                let decision = limiter.admit(&a_handle(&limiter), &same, cost).await;
                decision.is_ok_and(|it| it.is_allowed())
            });
            if n % 10 == 0 {
                let (limiter, same) = (mixed.clone(), policies.clone());
                small.spawn(async move { crowd(&limiter, &same, 1).await });
            }
            if n == 600 {
                let (limiter, same) = (other.clone(), policies.clone());
                crowded.spawn(async move { crowd(&limiter, &same, 430).await });
            }
            sleep(Duration::from_millis(5)).await;
        }
        assert!(large.join_all().await.iter().all(|it| !it));
        // When the other replica's requests arrive, the small requests have spent 60 of 500 tokens, and 3 have
        // refilled.
        let small = small.join_all().await.iter().sum::<u32>();
        let crowded = crowded.join_all().await.iter().sum::<u32>();
        assert_eq!((small, crowded), (70, 430));
    });
}

/// A call that serves a large request and small requests takes all tokens in the bucket if there are too few for the
/// large request. The small requests need only some of these tokens, and the rest is returned immediately.
#[test]
fn tokens_taken_in_vain_for_a_large_request_are_returned_at_once() {
    paused(async {
        let (world, limiters, policies) = several(2, 4, (60, 1000), false);
        let [mixed, other] = &limiters[..] else {
            panic!("two replicas");
        };
        assert_eq!(crowd(other, &policies, 500).await, 500);
        for _ in 0..40 {
            assert_eq!(crowd(mixed, &policies, 1).await, 1);
            sleep(Duration::from_millis(10)).await;
        }
        let handle = a_handle(mixed);
        let small = crowd(mixed, &policies, 30);
        let large = async {
            // The first small requests have started a call. The other small requests and the large one wait for the
            // next call.
            sleep(Duration::from_millis(1)).await;
            let cost = NonZeroU32::new(900).unwrap();
            mixed.admit(&handle, &policies, cost).await
        };
        let (small, large) = tokio::join!(small, large);
        assert_eq!(small, 30);
        assert!(!large.unwrap().is_allowed());
        let (taken, _) = world.granted(handle.key());
        assert!(taken >= 900, "{taken} taken, so the calls were separate");
        sleep(Duration::from_millis(10)).await;
        // The lease holds some of the 430 remaining tokens.
        assert_eq!(crowd(other, &policies, 405).await, 405);
    });
}

/// Leases grow with the pace of requests, and shrink when the bucket is nearly empty. No request is denied before the
/// bucket is empty.
#[test]
fn a_full_burst_is_admitted_despite_leases() {
    paused(async {
        let rate = (600, 600);
        let (limiter, policies) = alone(
            TestLedger::new(),
            &Arc::default(),
            OnRedisFailure::Share,
            rate,
            None,
        );
        let handle = a_handle(&limiter);
        for n in 0..600 {
            let decision = limiter.admit(&handle, &policies, NonZeroU32::MIN).await;
            let decision = decision.unwrap();
            assert!(decision.is_allowed(), "request {n}: {decision:?}");
            sleep(Duration::from_micros(500)).await;
        }
    });
}

/// If a request that costs more than one token is denied, the denial states when enough tokens will be available, even
/// if the counters are not called in the meantime.
#[test]
fn a_denial_states_the_wait_for_the_requested_cost() {
    paused(async {
        let rate = (6000, 100);
        let (limiter, policies) = alone(
            TestLedger::new(),
            &Arc::default(),
            OnRedisFailure::Share,
            rate,
            None,
        );
        let handle = a_handle(&limiter);
        let mut denied = 0;
        for _ in 0..400 {
            let one = limiter.admit(&handle, &policies, NonZeroU32::MIN).await;
            denied += u32::from(!one.unwrap().is_allowed());
            sleep(Duration::from_micros(500)).await;
        }
        assert!(denied > 100);
        let fifty = NonZeroU32::new(50).unwrap();
        let decision = limiter.admit(&handle, &policies, fifty).await.unwrap();
        // A token refills in 10 ms, and the bucket contains at most what refills in half the lifetime of a lease.
        let wait = decision
            .retry_after()
            .expect("a wait, because the request is denied");
        assert!(wait >= 400_000_000, "{decision:?}");
        let never = NonZeroU32::new(101).unwrap();
        let decision = limiter.admit(&handle, &policies, never).await.unwrap();
        assert!(!decision.is_allowed());
        assert_eq!(decision.retry_after(), None);
    });
}

/// While another replica denies requests, a replica that spends few tokens of a quota keeps only those that it needs
/// soon.
#[test]
fn a_slow_replica_leaves_the_quota_to_a_busy_one() {
    paused(async {
        let of = NonZeroU64::new(2).unwrap();
        let ledger = TestLedger::new();
        let [slow, busy] = [0, 1].map(|rank| {
            let membership = Arc::new(Membership::default());
            membership.confirm(ReplicaSlot { rank, of }, Monotonic::default());
            let daily = NonZeroU64::new(10_000);
            let rate = (600_000, 100_000);
            alone(
                Arc::clone(&ledger),
                &membership,
                OnRedisFailure::Share,
                rate,
                daily,
            )
        });
        // Keep the handles, as cached records do.
        let handles = [a_handle(&slow.0), a_handle(&busy.0)];
        let is_admitted = async |which: usize| {
            let (limiter, policies) = [&slow, &busy][which];
            let decision = limiter.admit(&handles[which], policies, NonZeroU32::MIN);
            decision.await.unwrap().is_allowed()
        };
        let mut served = 0;
        for second in 0..60 {
            if second % 5 == 0 {
                assert!(is_admitted(0).await, "after {second} s");
                served += 1;
            }
            while is_admitted(1).await {
                served += 1;
            }
            if second % 10 == 9 {
                slow.0.prune();
                busy.0.prune();
            }
            sleep(Duration::from_secs(1)).await;
        }
        assert!((9_985..=10_000).contains(&served), "{served} served");
    });
}

/// Each of many replicas takes from a small quota only the tokens that it spends, and none in advance.
#[test]
fn a_small_quota_is_served_in_full_by_many_replicas() {
    paused(async {
        let of = NonZeroU64::new(9).unwrap();
        let ledger = TestLedger::new();
        let replicas: Vec<_> = (0..of.get())
            .map(|rank| {
                let membership = Arc::new(Membership::default());
                membership.confirm(ReplicaSlot { rank, of }, Monotonic::default());
                let daily = NonZeroU64::new(10);
                let on_failure = OnRedisFailure::Share;
                alone(
                    Arc::clone(&ledger),
                    &membership,
                    on_failure,
                    (6000, 100),
                    daily,
                )
            })
            .collect();
        for (n, (limiter, policies)) in replicas.iter().cycle().take(18).enumerate() {
            let handle = a_handle(limiter);
            let decision = limiter.admit(&handle, policies, NonZeroU32::MIN).await;
            assert_eq!(decision.unwrap().is_allowed(), n < 10, "request {n}");
            sleep(Duration::from_millis(20)).await;
        }
    });
}
