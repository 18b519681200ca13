//! Tests of outages with exact schedules.

use std::{fmt::Write as _, num::NonZeroU32, sync::Arc, time::Duration};

use quota_common::{id::TenantId, plan::OnRedisFailure};
use quota_server::limiter::{Decision, KeyHandle, Limiter, Membership, Policies};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

use super::{
    paused,
    plants::Plant,
    registry::Registry,
    run::{DEADLINE, key_id},
    single::{a_handle, count, crowd, crowd_of, replica, replica_with, version, without_redis},
    world::{Reach, World},
};
use crate::{limiter_contract::START as CLOCK, limiter_shared::model::State};

/// The start of the schedules below, in milliseconds.
const START: u64 = 15_000;
const RPM: u32 = 60_000;
const BURST: u32 = 100;

/// Two replicas that lose Redis 2 ms after [`START`]. The first replica made its last call a while before, so it
/// detects the outage after 121 ms, and sends probes 390 ms and about 860 ms after the detection. The second replica
/// has just made a call, so it detects only an outage that lasts 360 ms or longer.
struct Outage {
    world: Arc<World>,
    registry: Arc<Registry>,
    limiters: Vec<Limiter>,
    policies: Policies,
}

async fn until(world: &World, ms: u64) {
    sleep_until(world.zero + Duration::from_millis(ms)).await;
}

fn handle(limiter: &Limiter, key: usize) -> Arc<KeyHandle> {
    limiter
        .handle(TenantId(uuid::Uuid::nil()), key_id(key))
        .unwrap()
}

impl Outage {
    async fn begin() -> Self {
        let world = World::new(1, 0, Plant::Nothing);
        let memberships: Vec<Arc<Membership>> = (0..2).map(|_| Arc::default()).collect();
        let other = replica(&world, &memberships[1], OnRedisFailure::Share);
        // Heartbeats of the first replica are sent 3 ms after those of the other replica.
        until(&world, 3).await;
        let first = replica(&world, &memberships[0], OnRedisFailure::Share);
        let (registry, _) = count(&world, memberships);
        let policies = version(1, (RPM, BURST), true);
        until(&world, START - 196).await;
        // The next heartbeats are sent at `START - 77` and `START + 43`.
        assert_eq!(crowd(&first, &policies, 1).await, 1);
        until(&world, START + 1).await;
        // The next heartbeats are sent 120, 180, 240, 300 and 360 ms after `START`.
        assert_eq!(crowd(&other, &policies, BURST).await, BURST);
        until(&world, START + 2).await;
        *world.reach.lock() = Reach::Cut;
        until(&world, START + 93).await;
        let mut calls = JoinSet::new();
        for key in 1..=5 {
            let (limiter, policies) = (first.clone(), policies.clone());
            calls.spawn(
                async move { crowd_of(&limiter, &handle(&limiter, key), &policies, 1).await },
            );
        }
        assert_eq!(calls.join_all().await.into_iter().sum::<u32>(), 0);
        Self {
            world,
            registry,
            limiters: vec![first, other],
            policies,
        }
    }

    /// Sends requests to all replicas for `for_ms` milliseconds. Returns by how many tokens the replicas exceed the
    /// envelope.
    async fn excess(&self, for_ms: u64) -> i64 {
        let begin = Instant::now();
        let mut requests = JoinSet::new();
        for _ in 0..for_ms / 5 {
            for limiter in &self.limiters {
                let (limiter, policies) = (limiter.clone(), self.policies.clone());
                requests.spawn(async move { crowd(&limiter, &policies, 10).await });
            }
            sleep(Duration::from_millis(5)).await;
        }
        let admitted: u32 = requests.join_all().await.into_iter().sum();
        assert!(admitted > 0);
        let millis = i64::try_from(begin.elapsed().as_millis()).unwrap();
        i64::from(admitted) - i64::from(BURST) - millis * i64::from(RPM) / 60_000 - 1
    }
}

/// In this test, the outage ends just before the second replica would detect it. The second replica then keeps using
/// the bucket in Redis, which does not reflect what the first replica's share admits.
#[test]
fn no_share_begins_before_the_outage_is_over_or_detected_by_all() {
    paused(async {
        let outage = Outage::begin().await;
        until(&outage.world, START + 355).await;
        *outage.world.reach.lock() = Reach::Up;
        let excess = outage.excess(505).await;
        assert!(excess <= 0, "{excess} tokens above the envelope");
    });
}

/// A replica that starts when an outage ends cannot know whether other replicas have already used their shares. The new
/// replica must not use buckets that do not reflect these shares, even if it has not counted the replicas yet.
#[test]
fn a_replica_that_starts_at_the_end_of_an_outage_begins_an_epoch() {
    for (lasts, is_counted) in [870, 950, 1040, 1100, 1390]
        .into_iter()
        .flat_map(|lasts| [(lasts, true), (lasts, false)])
    {
        paused(async {
            let mut outage = Outage::begin().await;
            let world = Arc::clone(&outage.world);
            until(&world, START + lasts - 10).await;
            let membership = Arc::new(Membership::default());
            if is_counted {
                outage.registry.count(2, &membership, world.now());
            }
            outage
                .limiters
                .push(replica(&world, &membership, OnRedisFailure::Share));
            until(&world, START + lasts).await;
            *world.reach.lock() = Reach::Up;
            let excess = outage.excess(900).await;
            assert!(
                excess <= 0,
                "{excess} tokens above the envelope after {lasts} ms, counted: {is_counted}"
            );
        });
    }
}

/// After all replicas have exited, new replicas start, at the same time or one after the other. If the old replicas
/// were stopped, or were killed more than a minute ago, none of them can have admitted a request that Redis does not
/// know of, so buckets keep their tokens.
#[test]
fn replicas_that_start_together_find_full_buckets() {
    for (is_stopped, pause, apart, is_full) in [
        (true, 20, 0, true),
        (true, 20, 3, true),
        (false, 20, 0, false),
        (false, 20, 3, false),
        (false, 65, 0, true),
    ] {
        paused(async {
            let memberships: Vec<Arc<Membership>> = (0..2).map(|_| Arc::default()).collect();
            let (world, limiters, policies) =
                without_redis(OnRedisFailure::Share, &memberships, 2, (60, 100), true);
            let (registry, counting) = count(&world, memberships);
            sleep(Duration::from_secs(2)).await;
            assert_eq!(crowd(&limiters[0], &policies, 10).await, 10);
            counting.abort();
            for (replica, link) in world.links.lock().iter_mut().enumerate() {
                link.dead = true;
                if is_stopped {
                    registry.leave(replica);
                }
            }
            sleep(Duration::from_secs(pause)).await;
            let mut started = Vec::new();
            for index in 2..4 {
                let membership = Arc::new(Membership::default());
                registry.count(index, &membership, world.now());
                started.push(replica(&world, &membership, OnRedisFailure::Share));
                sleep(Duration::from_secs(apart)).await;
            }
            sleep(Duration::from_secs(1)).await;
            let admitted = crowd(&started[0], &policies, 110).await;
            assert_eq!(
                admitted == 100,
                is_full,
                "{admitted}, {pause} s, {apart} s, stopped: {is_stopped}"
            );
        });
    }
}

/// A response that arrives a little too late is still used: the request waits for up to twice the deadline.
#[test]
fn a_late_response_is_no_denial() {
    for on_failure in [OnRedisFailure::Share, OnRedisFailure::Closed] {
        for strict in [true, false] {
            for late in [29, 40, 55] {
                paused(async {
                    let memberships: Vec<Arc<Membership>> =
                        (0..2).map(|_| Arc::default()).collect();
                    let (world, limiters, policies) =
                        without_redis(on_failure, &memberships, 2, (60, 10), strict);
                    world.links.lock()[0].late = (100, late);
                    let handle = a_handle(&limiters[0]);
                    let begin = Instant::now();
                    let ends = async {
                        sleep(Duration::from_millis(20)).await;
                        world.links.lock()[0].late = (0, 0);
                    };
                    let asked = limiters[0].admit(&handle, &policies, NonZeroU32::MIN);
                    let (decision, ()) = tokio::join!(asked, ends);
                    let decision = decision.unwrap();
                    assert!(decision.is_allowed() && !decision.degraded, "{decision:?}");
                    assert!(begin.elapsed() <= 2 * DEADLINE);
                    // The late response granted one token.
                    sleep(Duration::from_millis(300)).await;
                    assert_eq!(crowd(&limiters[1], &policies, 12).await, 9, "{late} ms");
                });
            }
        }
    }
}

/// Inspecting a key's limits takes no tokens, so there is no reason to wait for a late response.
#[test]
fn a_key_is_inspected_within_one_deadline() {
    for (reach, late) in [(Reach::Deaf, 0), (Reach::Up, 55)] {
        paused(async {
            let membership: Arc<Membership> = Arc::default();
            let (world, limiters, policies) =
                without_redis(OnRedisFailure::Share, &[membership], 2, (60, 10), true);
            let handle = a_handle(&limiters[0]);
            assert_eq!(crowd(&limiters[0], &policies, 4).await, 4);
            {
                let mut links = world.links.lock();
                links[0].reach = reach;
                links[0].late = (100, late);
            }
            let begin = Instant::now();
            let inspected = limiters[0].inspect(&handle, &policies).await;
            assert!(begin.elapsed() <= DEADLINE + Duration::from_millis(1));
            // Without a response, the result is what the replica knows.
            let known = limiters[0].peek(&handle, &policies);
            let remaining = |it: &Decision| it.states().next().map(|it| it.remaining);
            assert_eq!(remaining(&inspected), remaining(&known), "{reach:?}");
        });
    }
}

/// A response that reports a loss of state may arrive after Redis has started to grant tokens again. Such a response is
/// no reason to stop using Redis, let alone to begin another epoch.
#[test]
fn a_late_response_that_reports_a_loss_of_state_begins_no_outage() {
    for strict in [true, false] {
        paused(async {
            let membership: Arc<Membership> = Arc::default();
            let memberships = [Arc::clone(&membership)];
            let (world, limiters, policies) =
                without_redis(OnRedisFailure::Share, &memberships, 2, (6000, 100), strict);
            count(&world, vec![membership]);
            sleep(Duration::from_secs(12)).await;
            assert_eq!(crowd(&limiters[0], &policies, 1).await, 1);
            {
                let mut process = world.process.lock();
                process.run += 1;
                process.state = State::default();
            }
            world.links.lock()[0].late = (100, 950);
            let (limiter, asked) = (limiters[0].clone(), policies.clone());
            tokio::spawn(async move { crowd(&limiter, &asked, 1).await });
            sleep(Duration::from_millis(5)).await;
            world.links.lock()[0].late = (0, 0);
            // The new epoch starts within 650 ms of the loss of state.
            for (pause, wanted) in [(945, 10), (50, 10), (200, 30), (1500, 100)] {
                sleep(Duration::from_millis(pause)).await;
                let admitted = crowd(&limiters[0], &policies, wanted).await;
                assert_eq!(admitted, wanted, "after {pause} ms, strict: {strict}");
            }
        });
    }
}

/// One of two replicas loses Redis for a while. The other replica still gets responses, so buckets keep their tokens,
/// even if both replicas use a partition only rarely, or if the responses take nearly as long as the deadline allows.
#[test]
fn an_outage_of_one_replica_empties_no_bucket() {
    let ms = Duration::from_millis;
    let mut lost = String::new();
    for (partitions, late, deadline) in [
        (1, 0, DEADLINE),
        (2, 0, DEADLINE),
        (1, 26, DEADLINE),
        (1, 190, ms(200)),
        (1, 480, ms(500)),
    ] {
        // `apart` is the time from each heartbeat of the first replica to the next heartbeat of the second replica.
        for (apart, cut_at, lasts) in [0, 35, 75].into_iter().flat_map(|apart| {
            (0..120)
                .step_by(20)
                .flat_map(move |at| [300, 400, 500, 600, 750, 1000].map(|lasts| (apart, at, lasts)))
        }) {
            paused(async {
                let world = World::with_partitions(partitions, 1, 2, Plant::Nothing);
                let memberships: Vec<Arc<Membership>> = (0..2).map(|_| Arc::default()).collect();
                let mut limiters = Vec::new();
                for membership in &memberships {
                    let share = OnRedisFailure::Share;
                    limiters.push(replica_with(&world, membership, share, deadline));
                    sleep(ms(apart)).await;
                }
                count(&world, memberships);
                world.links.lock()[1].late = (100, late);
                let policies = version(1, (6, 100), true);
                until(&world, START).await;
                assert_eq!(crowd(&limiters[0], &policies, 1).await, 1);
                until(&world, START + apart).await;
                assert_eq!(crowd(&limiters[1], &policies, 1).await, 1);
                until(&world, START + 1000 + cut_at).await;
                world.links.lock()[0].reach = Reach::Cut;
                sleep(ms(lasts)).await;
                world.links.lock()[0].reach = Reach::Up;
                sleep(ms(2000)).await;
                let admitted = crowd(&limiters[1], &policies, 110).await;
                if admitted < 98 {
                    let _ = writeln!(
                        lost,
                        "{admitted} of 98 tokens left, {partitions} partitions, responses {late} ms late, {apart} ms \
                         apart, {lasts} ms from {cut_at} ms"
                    );
                }
            });
        }
    }
    assert!(lost.is_empty(), "{lost}");
}

/// Redis loses its state while replicas are detecting an outage, so some replicas send their first probe long after
/// other replicas have called Redis again. All replicas must learn of the new epoch before it starts. Otherwise, a late
/// replica begins another epoch, and every bucket is emptied again. Also, the replicas must not postpone the start
/// again and again.
#[test]
fn a_loss_of_state_empties_every_bucket_once() {
    let ms = Duration::from_millis;
    let mut wrong = String::new();
    for (round_trip, deadline) in [(28, 30), (95, 100), (190, 200), (950, 1000)] {
        // `apart` is the time from each heartbeat of the first replica to the next heartbeat of the second replica.
        let outages = (0..8).map(|n| 200 + n * (deadline + 250) / 8);
        for (lasts, apart, reach) in outages.flat_map(|lasts| {
            [
                (lasts, 20, Reach::Refused),
                (lasts, 80, Reach::Refused),
                (lasts, 20, Reach::Cut),
                (lasts, 80, Reach::Cut),
            ]
        }) {
            paused(async {
                let world = World::new(1, round_trip, Plant::Nothing);
                let memberships: Vec<Arc<Membership>> = (0..2).map(|_| Arc::default()).collect();
                let mut limiters = Vec::new();
                for membership in &memberships {
                    let share = OnRedisFailure::Share;
                    limiters.push(replica_with(&world, membership, share, ms(deadline)));
                    sleep(ms(apart)).await;
                }
                count(&world, memberships);
                until(&world, START).await;
                *world.reach.lock() = reach;
                until(&world, START + lasts).await;
                {
                    let mut process = world.process.lock();
                    process.run += 1;
                    process.state = State::default();
                }
                *world.reach.lock() = Reach::Up;
                let case = format!(
                    "round trips of {round_trip} ms, deadlines of {deadline} ms, {reach:?} for {lasts} ms, heartbeats \
                     {apart} ms apart"
                );
                let mut begun = None;
                for _ in 0..600 + 2 * deadline {
                    let epoch = world.process.lock().state.epoch(0);
                    let now = CLOCK.0 / 1000 + world.now() / 1000;
                    if let Some(start) = epoch.filter(|start| *start <= now) {
                        begun = begun.or(Some(start));
                    }
                    if begun.is_some() && epoch != begun {
                        let _ = writeln!(wrong, "emptied twice: {case}");
                        break;
                    }
                    sleep(ms(5)).await;
                }
                let policies = version(1, (60_000, 1000), true);
                for limiter in &limiters {
                    let decision = limiter
                        .admit(&a_handle(limiter), &policies, NonZeroU32::MIN)
                        .await
                        .unwrap();
                    if !decision.is_allowed() || decision.degraded {
                        let _ = writeln!(wrong, "not served: {case}");
                    }
                }
            });
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// A replica that has just started has no share yet, but it uses Redis like any other replica. If responses are late at
/// first, the replica serves requests soon after responses begin to arrive in time. It never serves more than the limit
/// allows.
#[test]
fn a_replica_that_starts_serves_once_redis_responds_in_time() {
    let ms = Duration::from_millis;
    for (strict, late_for, replicas) in [true, false]
        .into_iter()
        .flat_map(|strict| [100, 400].map(|late_for| (strict, late_for)))
        .flat_map(|(strict, late_for)| [1, 2].map(|replicas| (strict, late_for, replicas)))
    {
        paused(async {
            let memberships: Vec<Arc<Membership>> = (0..replicas).map(|_| Arc::default()).collect();
            let (world, limiters, policies) =
                without_redis(OnRedisFailure::Share, &memberships, 2, (6000, 100), strict);
            count(&world, memberships);
            let respond = |late| {
                for link in world.links.lock().iter_mut() {
                    link.late = late;
                }
            };
            respond((100, 200));
            let mut requests = JoinSet::new();
            for at in (0..2500_u64).step_by(5) {
                if at == late_for {
                    respond((0, 0));
                }
                let (limiter, policies) = (limiters[0].clone(), policies.clone());
                requests.spawn(async move { (at, crowd(&limiter, &policies, 1).await) });
                sleep(ms(5)).await;
            }
            let served = requests.join_all().await;
            let since = |from: u64| {
                let served = served.iter().filter(|(at, _)| *at >= from);
                served
                    .map(|(_, admitted)| u64::from(*admitted))
                    .sum::<u64>()
            };
            let case = format!("late for {late_for} ms, {replicas} replicas, strict: {strict}");
            // 100 tokens per second refill.
            let admitted = since(0);
            assert!(admitted <= 100 + 250 + 10, "{admitted} admitted, {case}");
            // A new epoch may have begun, in which the bucket was empty.
            let begun = late_for + 1400;
            let (later, refilled) = (since(begun), (2500 - begun) / 10);
            assert!(
                later >= refilled * 9 / 10,
                "{later} of {refilled} later, {case}"
            );
        });
    }
}

/// In an outage, an open plan is limited by the replica's own bucket, and not by what Redis decided before.
#[test]
fn an_open_plan_repeats_no_denial_of_redis_during_an_outage() {
    for strict in [true, false] {
        paused(async {
            let memberships: Vec<Arc<Membership>> = (0..2).map(|_| Arc::default()).collect();
            let (world, limiters, policies) =
                without_redis(OnRedisFailure::Open, &memberships, 2, (6, 10), strict);
            count(&world, memberships);
            sleep(Duration::from_secs(12)).await;
            assert_eq!(crowd(&limiters[0], &policies, 10).await, 10);
            let handle = a_handle(&limiters[1]);
            let denied = limiters[1].admit(&handle, &policies, NonZeroU32::MIN).await;
            let denied = denied.unwrap();
            assert!(!denied.is_allowed() && !denied.degraded, "{denied:?}");
            world.stalled.send_replace(true);
            sleep(Duration::from_secs(1)).await;
            for n in 0..12 {
                let decision = limiters[1].admit(&handle, &policies, NonZeroU32::MIN).await;
                let decision = decision.unwrap();
                assert_eq!(decision.is_allowed(), n < 10, "{n}: {decision:?}");
                assert!(decision.degraded, "{n}: {decision:?}");
            }
        });
    }
}
