//! Replicas, counters, and what can happen between them, in simulated time and from a seed.
//!
//! The store is the real one, on a paused clock of tokio's; the counters are the [model](super::model), behind
//! links that delay, lose and cut, in a process that is killed, frozen or replaced by one that lags behind.
//! What was admitted is recounted from the answers. A seed that fails is printed: `QUOTA_SEED=n` runs it
//! alone, `QUOTA_SEEDS=n` runs so many.
#![expect(
    clippy::cast_precision_loss,
    reason = "times of a run and counts of requests are far below 2^52"
)]
#![expect(
    clippy::disallowed_methods,
    reason = "seeds are settings of this test alone"
)]

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use fastrand::Rng;
use parking_lot::Mutex;
use quota_common::{
    id::{ApiKeyId, TenantId},
    plan::OnRedisFailure,
};
use quota_server::{
    clock::{Clock, UnixNanos},
    limiter::{
        BucketState, CellSettings, CounterError, KeyCell, Limiter, LimiterError, Place, Policies,
        RatePolicy, Roster, SharedCounters, SharedSettings, SharedStore, TakeCall, TakeReply, Zone,
    },
    telemetry::metrics::Metrics,
};
use tokio::time::{Instant, sleep};

use super::model::{Grant, State};
use crate::limiter_contract::{START, TestLedger};

const TTL: Duration = Duration::from_millis(100);
const DEADLINE: Duration = Duration::from_millis(30);
/// Replicas have counted each other by then.
const WARM_UP: Duration = Duration::from_millis(8200);
const LENGTH: Duration = Duration::from_secs(5);

/// A replica's own clock: the true time, and how far it is off.
#[derive(Debug, Clone)]
struct SkewedClock {
    zero: Instant,
    skew_ms: i64,
}

impl Clock for SkewedClock {
    fn now(&self) -> UnixNanos {
        let at = START.0.saturating_add(self.monotonic());
        UnixNanos(at.saturating_add_signed(self.skew_ms * 1_000_000))
    }

    fn monotonic(&self) -> u64 {
        u64::try_from(self.zero.elapsed().as_nanos()).unwrap()
    }
}

/// The process that keeps the counters.
#[derive(Debug)]
struct Server {
    state: State,
    run: u64,
    up: bool,
    frozen: bool,
    /// Microseconds that its clock is ahead.
    ahead: u64,
    /// What a replica of it has, that lags behind.
    copy: State,
}

/// How a replica's link to the counters is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Up,
    /// Nothing arrives, nothing fails.
    Cut,
    /// Calls arrive, answers do not.
    Deaf,
    Refused,
}

#[derive(Debug)]
struct World {
    zero: Instant,
    rng: Mutex<Rng>,
    server: Mutex<Server>,
    links: Mutex<Vec<Link>>,
    /// What was granted and not returned.
    granted: Mutex<Vec<Grant>>,
    slow: AtomicU64,
}

#[derive(Debug, thiserror::Error)]
#[error("refused")]
struct Refused;

impl World {
    fn micros(&self, ahead: u64) -> u64 {
        START.0 / 1000 + u64::try_from(self.zero.elapsed().as_micros()).unwrap() + ahead
    }

    async fn delay(&self) {
        let slow = self.slow.load(Ordering::Relaxed);
        let ms = {
            let mut rng = self.rng.lock();
            if slow > 0 && rng.u64(..100) < 5 {
                rng.u64(..slow)
            } else {
                rng.u64(1..=3)
            }
        };
        sleep(Duration::from_millis(ms)).await;
    }

    fn serve(&self, call: TakeCall) -> Result<TakeReply, CounterError> {
        let mut server = self.server.lock();
        if !server.up {
            return Err(Arc::new(Refused));
        }
        let (now, run) = (self.micros(server.ahead), server.run);
        let reply = server.state.take(run, now, call);
        drop(server);
        if let BucketState::Known { granted, .. } = reply.state
            && granted > 0
        {
            self.granted.lock().push(Grant {
                at: self.micros(0),
                tokens: granted,
            });
        }
        Ok(reply)
    }
}

#[derive(Debug)]
struct Linked {
    world: Arc<World>,
    replica: usize,
}

#[async_trait]
impl SharedCounters for Linked {
    fn partitions(&self) -> u16 {
        1
    }

    async fn take(&self, call: TakeCall) -> Result<TakeReply, CounterError> {
        let (world, replica) = (Arc::clone(&self.world), self.replica);
        // What was sent arrives, whether or not the caller still waits.
        let served = tokio::spawn(async move {
            let link = || world.links.lock()[replica];
            match link() {
                Link::Refused => return Err(Arc::new(Refused) as CounterError),
                Link::Cut => std::future::pending().await,
                Link::Up | Link::Deaf => {}
            }
            world.delay().await;
            while world.server.lock().frozen {
                sleep(Duration::from_millis(5)).await;
            }
            let reply = world.serve(call);
            world.delay().await;
            if link() != Link::Up {
                std::future::pending::<()>().await;
            }
            reply
        });
        match served.await {
            Ok(reply) => reply,
            Err(_) => Err(Arc::new(Refused)),
        }
    }
}

/// One admission: when it was asked for and answered, in nanoseconds.
#[derive(Debug, Clone, Copy)]
struct Admission {
    answered: u64,
    degraded: bool,
}

/// What may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Calls are slow now and then.
    Slow,
    /// Killed; back without its state.
    Kill,
    /// Stopped; back with what it had, and with the calls that came meanwhile.
    Freeze,
    /// A replica that lags behind takes over, its clock ahead.
    FailOver,
    /// Nobody reaches it, one way or both.
    CutAll,
    DeafAll,
    /// Some do not reach it.
    CutSome,
}

const FAULTS: [Fault; 8] = [
    Fault::None,
    Fault::Slow,
    Fault::Kill,
    Fault::Freeze,
    Fault::FailOver,
    Fault::CutAll,
    Fault::DeafAll,
    Fault::CutSome,
];

/// A run, as the seed has it.
#[derive(Debug)]
struct Scene {
    replicas: usize,
    rpm: u32,
    burst: u32,
    strict: bool,
    on_failure: OnRedisFailure,
    fault: Fault,
    /// How many replicas are cut off by [`Fault::CutSome`].
    cut: usize,
    fault_at: u64,
    fault_ms: u64,
    /// In percent of the limit.
    load: u64,
    bursts: u64,
}

impl Scene {
    fn of(rng: &mut Rng) -> Self {
        let replicas = rng.usize(1..=5);
        let rpm = [60, 600, 2000, 6000][rng.usize(..4)];
        Self {
            replicas,
            rpm,
            burst: [1, 3, rpm / 60, rpm / 10][rng.usize(..4)].max(1),
            strict: rng.u8(..4) == 0,
            on_failure: if rng.u8(..4) == 0 {
                OnRedisFailure::Closed
            } else {
                OnRedisFailure::Share
            },
            fault: FAULTS[rng.usize(..FAULTS.len())],
            cut: rng.usize(1..=replicas),
            fault_at: rng.u64(..1500),
            fault_ms: rng.u64(50..2500),
            load: [50, 90, 200, 400][rng.usize(..4)],
            bursts: rng.u64(1..=20),
        }
    }
}

/// What a run came to.
#[derive(Debug)]
struct Outcome {
    admissions: Vec<Admission>,
    granted: u64,
    /// What of it was heard of, spent, and taken back or lost, as the store counts.
    book: (u64, u64, u64),
    asked: u64,
    calls: u64,
    errors: u64,
    /// Whether any replica was without its counters in the end.
    degraded: bool,
}

async fn run(seed: u64, scene: &Scene) -> Outcome {
    let mut rng = Rng::with_seed(seed);
    let zero = Instant::now();
    let state = State::fresh(1, 1);
    let world = Arc::new(World {
        zero,
        rng: Mutex::new(rng.fork()),
        server: Mutex::new(Server {
            copy: state.clone(),
            state,
            run: 1,
            up: true,
            frozen: false,
            ahead: 0,
        }),
        links: Mutex::new(vec![Link::Up; scene.replicas]),
        granted: Mutex::default(),
        slow: AtomicU64::new(0),
    });
    let metrics = Arc::new(Metrics::default());
    let mut replicas = Vec::new();
    for replica in 0..scene.replicas {
        let clock: Arc<dyn Clock> = Arc::new(SkewedClock {
            zero,
            skew_ms: rng.i64(-120_000..=120_000),
        });
        let roster = Arc::new(Roster::default());
        let store = SharedStore::new(
            Arc::clone(&clock),
            TestLedger::new(),
            Arc::new(Linked {
                world: Arc::clone(&world),
                replica,
            }),
            Arc::clone(&roster),
            Arc::clone(&metrics),
            SharedSettings {
                lease_ttl: TTL,
                deadline: DEADLINE,
                on_failure: scene.on_failure,
                cells: CellSettings::default(),
            },
        );
        replicas.push((Limiter::new(Arc::clone(&store) as _, clock), store, roster));
    }
    let place = |rank: usize| Place {
        rank: rank as u64,
        of: NonZeroU64::new(scene.replicas as u64).unwrap(),
    };
    let counting = {
        let rosters: Vec<_> = replicas
            .iter()
            .map(|(_, _, roster)| Arc::clone(roster))
            .collect();
        let places: Vec<_> = (0..rosters.len()).map(place).collect();
        tokio::spawn(async move {
            loop {
                let now = u64::try_from(zero.elapsed().as_nanos()).unwrap();
                for (roster, place) in rosters.iter().zip(&places) {
                    roster.confirm(*place, now);
                }
                sleep(Duration::from_secs(1)).await;
            }
        })
    };
    sleep(WARM_UP).await;

    let faults = tokio::spawn(misbehave(
        Arc::clone(&world),
        (scene.fault, scene.cut, scene.fault_at, scene.fault_ms),
        rng.fork(),
    ));
    let policies = Arc::new(Policies::new(
        RatePolicy {
            rpm: NonZeroU32::new(scene.rpm).unwrap(),
            burst: NonZeroU32::new(scene.burst).unwrap(),
        },
        None,
        None,
        Zone::utc(),
        scene.strict,
    ));
    let admissions = Arc::new(Mutex::new(Vec::new()));
    let (asked, errors) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut clients = Vec::new();
    for (limiter, ..) in &replicas {
        let cell = limiter
            .cell(
                TenantId(uuid::Uuid::from_u128(1)),
                ApiKeyId(uuid::Uuid::from_u128(7)),
            )
            .unwrap();
        // So many at a time, at random, at the rate of the load in the end.
        let share = u64::from(scene.rpm) * scene.load / 100 / scene.replicas as u64;
        let pause = (scene.bursts * 60_000 / share.max(1)).max(1);
        let (limiter, policies) = (limiter.clone(), Arc::clone(&policies));
        let (admissions, asked) = (Arc::clone(&admissions), Arc::clone(&asked));
        let (errors, bursts, mut rng) = (Arc::clone(&errors), scene.bursts, rng.fork());
        clients.push(tokio::spawn(async move {
            while zero.elapsed() < WARM_UP + LENGTH {
                sleep(Duration::from_millis(rng.u64(..=2 * pause))).await;
                for _ in 0..bursts {
                    let (limiter, cell) = (limiter.clone(), Arc::clone(&cell));
                    let (policies, admissions) = (Arc::clone(&policies), Arc::clone(&admissions));
                    let errors = Arc::clone(&errors);
                    asked.fetch_add(1, Ordering::Relaxed);
                    tokio::spawn(async move {
                        match limiter.admit(&cell, &policies, NonZeroU32::MIN).await {
                            Ok(decision) if decision.is_allowed() => {
                                admissions.lock().push(Admission {
                                    answered: u64::try_from(zero.elapsed().as_nanos()).unwrap(),
                                    degraded: decision.degraded,
                                });
                            }
                            Ok(_) => {}
                            Err(LimiterError::CountersAway) => {
                                errors.fetch_add(1, Ordering::Relaxed);
                            }
                            Err(error) => panic!("{error}"),
                        }
                    });
                }
            }
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    faults.await.unwrap();
    sleep(Duration::from_millis(2500)).await;
    counting.abort();
    let returned = metrics.lease_tokens_returned.get();
    let granted: u64 = world.granted.lock().iter().map(|grant| grant.tokens).sum();
    Outcome {
        admissions: std::mem::take(&mut admissions.lock()),
        granted: granted.saturating_sub(returned),
        book: (
            metrics.lease_tokens_taken.get(),
            metrics.lease_tokens_spent.get(),
            returned + metrics.lease_tokens_lost.get(),
        ),
        asked: asked.load(Ordering::Relaxed),
        calls: metrics.counter_calls.get(),
        errors: errors.load(Ordering::Relaxed),
        degraded: replicas.iter().any(|(_, store, _)| store.is_degraded()),
    }
}

async fn misbehave(
    world: Arc<World>,
    (fault, cut, at, ms): (Fault, usize, u64, u64),
    mut rng: Rng,
) {
    let (at, lasts) = (Duration::from_millis(at), Duration::from_millis(ms));
    // The copy lags behind by up to a second.
    let lag = Duration::from_millis(rng.u64(..1000)).min(at);
    sleep(at.saturating_sub(lag)).await;
    {
        let mut server = world.server.lock();
        server.copy = server.state.clone();
    }
    sleep(lag).await;
    let set_links = |n: usize, link| {
        for it in world.links.lock().iter_mut().take(n) {
            *it = link;
        }
    };
    match fault {
        Fault::None => {}
        Fault::Slow => {
            world.slow.store(rng.u64(5..120), Ordering::Relaxed);
            sleep(lasts).await;
            world.slow.store(0, Ordering::Relaxed);
        }
        Fault::Kill | Fault::FailOver => {
            world.server.lock().up = false;
            sleep(lasts).await;
            let mut server = world.server.lock();
            server.state = if fault == Fault::Kill {
                State::default()
            } else {
                server.copy.clone()
            };
            if fault == Fault::FailOver {
                server.ahead = rng.u64(..5_000_000);
            }
            server.run += 1;
            server.up = true;
        }
        Fault::Freeze => {
            world.server.lock().frozen = true;
            sleep(lasts).await;
            world.server.lock().frozen = false;
        }
        Fault::CutAll | Fault::DeafAll => {
            let all = world.links.lock().len();
            set_links(
                all,
                if fault == Fault::CutAll {
                    Link::Cut
                } else {
                    Link::Deaf
                },
            );
            sleep(lasts).await;
            set_links(all, Link::Up);
        }
        Fault::CutSome => {
            set_links(cut, if rng.bool() { Link::Cut } else { Link::Refused });
            sleep(lasts).await;
            set_links(cut, Link::Up);
        }
    }
}

/// By how many tokens the worst window is above what `rate` a nanosecond and `burst` allow.
fn excess(times: &[u64], burst: f64, rate: f64) -> f64 {
    // The level of a bucket that leaks at the rate and is never emptied below zero is the worst window's count.
    let (mut level, mut last, mut worst) = (0.0_f64, 0, 0.0_f64);
    for &time in times {
        level = (level - (time - last) as f64 * rate).max(0.0) + 1.0;
        last = time;
        worst = worst.max(level);
    }
    worst - burst
}

fn check(seed: u64, scene: &Scene, outcome: &Outcome) {
    let mut times: Vec<u64> = outcome.admissions.iter().map(|it| it.answered).collect();
    times.sort_unstable();
    let rate = f64::from(scene.rpm) / 60e9;
    let ttl = TTL.as_nanos() as f64;
    let cut_off = match scene.fault {
        _ if scene.on_failure != OnRedisFailure::Share => 0.0,
        // So short that some replicas may give the counters up and others not.
        Fault::Kill | Fault::Freeze | Fault::FailOver | Fault::CutAll | Fault::DeafAll
            if scene.fault_ms < 1000 =>
        {
            1.0
        }
        Fault::CutSome => {
            // The shares of those that are cut off, who come first.
            let (burst, of) = (u64::from(scene.burst), scene.replicas as u64);
            let shares: u64 = (0..scene.cut as u64)
                .map(|rank| burst / of + u64::from(rank < burst % of))
                .sum();
            shares as f64 / f64::from(scene.burst)
        }
        _ => 0.0,
    };
    let rate = rate * (1.0 + cut_off);
    let burst = f64::from(scene.burst) * (1.0 + cut_off) + rate * ttl;
    let over = excess(&times, burst, rate);
    let degraded = outcome.admissions.iter().filter(|it| it.degraded).count() as u64;
    let admitted = outcome.admissions.len() as u64;
    let told = || {
        if std::env::var_os("QUOTA_SEED").is_some() {
            for it in &outcome.admissions {
                eprintln!(
                    "{:>8} ms{}",
                    it.answered / 1_000_000,
                    if it.degraded { " degraded" } else { "" }
                );
            }
        }
        format!(
            "seed {seed}: {scene:?}\nadmitted {admitted} of {}, {degraded} degraded, granted {}, {} calls, {} errors",
            outcome.asked, outcome.granted, outcome.calls, outcome.errors
        )
    };
    assert!(over < 1e-3, "{over} tokens above the envelope\n{}", told());
    let (taken, spent, gone) = outcome.book;
    assert_eq!(taken, spent + gone, "the book has a hole\n{}", told());
    assert!(
        admitted - degraded <= outcome.granted,
        "spent more than was granted\n{}",
        told()
    );
    assert!(
        !outcome.degraded,
        "the counters are not come back to\n{}",
        told()
    );
    if scene.on_failure == OnRedisFailure::Closed {
        assert_eq!(degraded, 0, "{}", told());
    } else {
        assert_eq!(outcome.errors, 0, "{}", told());
    }
    if scene.fault == Fault::None {
        assert_eq!((degraded, outcome.errors), (0, 0), "{}", told());
        // Most of what was sold is served where enough was asked for.
        let sold = f64::from(scene.burst) + f64::from(scene.rpm) / 60.0 * LENGTH.as_secs_f64();
        if scene.load >= 200
            && scene.burst >= 20
            && scene.bursts <= 10
            && (outcome.asked as f64) > 1.5 * sold
        {
            assert!(admitted as f64 >= 0.9 * sold, "{sold} sold\n{}", told());
        }
    }
}

fn simulate(seed: u64) {
    let scene = Scene::of(&mut Rng::with_seed(seed));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let outcome = runtime.block_on(run(seed, &scene));
    check(seed, &scene, &outcome);
}

#[test]
fn no_replica_fault_or_partition_sells_more_than_was_sold() {
    let number = |name| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
    };
    if let Some(seed) = number("QUOTA_SEED") {
        return simulate(seed);
    }
    let seeds = number("QUOTA_SEEDS").unwrap_or(3000);
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, Into::into) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    simulate(seed);
                }
            });
        }
    });
}

/// One replica on counters that are well, for a plan of `rpm` and `burst`.
fn alone(
    ledger: Arc<TestLedger>,
    roster: Arc<Roster>,
    on_failure: OnRedisFailure,
    (rpm, burst): (u32, u32),
    daily: Option<NonZeroU64>,
) -> (Limiter, Policies) {
    let zero = Instant::now();
    let state = State::fresh(1, 1);
    let world = Arc::new(World {
        zero,
        rng: Mutex::new(Rng::with_seed(1)),
        server: Mutex::new(Server {
            copy: state.clone(),
            state,
            run: 1,
            up: true,
            frozen: false,
            ahead: 0,
        }),
        links: Mutex::new(vec![Link::Up]),
        granted: Mutex::default(),
        slow: AtomicU64::new(0),
    });
    let clock: Arc<dyn Clock> = Arc::new(SkewedClock { zero, skew_ms: 0 });
    let store = SharedStore::new(
        Arc::clone(&clock),
        ledger,
        Arc::new(Linked { world, replica: 0 }),
        roster,
        Arc::default(),
        SharedSettings {
            lease_ttl: TTL,
            deadline: DEADLINE,
            on_failure,
            cells: CellSettings::default(),
        },
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

fn paused<F: Future>(test: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(test)
}

fn a_cell(limiter: &Limiter) -> Arc<KeyCell> {
    limiter
        .cell(TenantId(uuid::Uuid::nil()), ApiKeyId(uuid::Uuid::nil()))
        .unwrap()
}

/// PostgreSQL is slower than Redis may be, and busy requests of a closed plan wait for it: neither is an outage.
#[test]
fn a_slow_ledger_leaves_the_counters_their_time() {
    paused(async {
        let ledger = TestLedger::new();
        ledger.set_delay(DEADLINE * 3);
        let daily = NonZeroU64::new(10_000);
        let (limiter, policies) = alone(
            ledger,
            Arc::default(),
            OnRedisFailure::Closed,
            (6000, 6000),
            daily,
        );
        let cell = a_cell(&limiter);
        let decision = limiter.admit(&cell, &policies, NonZeroU32::MIN).await;
        let decision = decision.unwrap();
        assert!(decision.is_allowed() && !decision.degraded, "{decision:?}");
    });
}

/// Leases grow with the pace and shrink near the bottom, and no token of a full bucket is refused on the way.
#[test]
fn a_burst_is_had_whole_though_leases_are_taken_of_it() {
    paused(async {
        let rate = (600, 600);
        let (limiter, policies) = alone(
            TestLedger::new(),
            Arc::default(),
            OnRedisFailure::Share,
            rate,
            None,
        );
        let cell = a_cell(&limiter);
        for n in 0..600 {
            let decision = limiter.admit(&cell, &policies, NonZeroU32::MIN).await;
            let decision = decision.unwrap();
            assert!(decision.is_allowed(), "request {n}: {decision:?}");
            sleep(Duration::from_micros(500)).await;
        }
    });
}

/// Whoever asks for more than one token is told when so many are there, also while nobody asks the counters.
#[test]
fn a_wait_is_told_for_the_tokens_that_were_asked_for() {
    paused(async {
        let rate = (6000, 100);
        let (limiter, policies) = alone(
            TestLedger::new(),
            Arc::default(),
            OnRedisFailure::Share,
            rate,
            None,
        );
        let cell = a_cell(&limiter);
        let mut denied = 0;
        for _ in 0..400 {
            let one = limiter.admit(&cell, &policies, NonZeroU32::MIN).await;
            denied += u32::from(!one.unwrap().is_allowed());
            sleep(Duration::from_micros(500)).await;
        }
        assert!(denied > 100);
        let fifty = NonZeroU32::new(50).unwrap();
        let decision = limiter.admit(&cell, &policies, fifty).await.unwrap();
        // 10 ms a token, and a bucket that has no more than gathers in the life of half a lease.
        let wait = decision.retry_after().expect("it is denied");
        assert!(wait >= 400_000_000, "{decision:?}");
        let never = NonZeroU32::new(101).unwrap();
        let decision = limiter.admit(&cell, &policies, never).await.unwrap();
        assert!(!decision.is_allowed());
        assert_eq!(decision.retry_after(), None);
    });
}

/// Each of many replicas takes of a small quota what it spends, and nothing for later.
#[test]
fn a_small_quota_is_had_whole_of_many_replicas() {
    paused(async {
        let of = NonZeroU64::new(9).unwrap();
        let ledger = TestLedger::new();
        let replicas: Vec<_> = (0..of.get())
            .map(|rank| {
                let roster = Arc::new(Roster::default());
                roster.confirm(Place { rank, of }, 0);
                let daily = NonZeroU64::new(10);
                let on_failure = OnRedisFailure::Share;
                alone(Arc::clone(&ledger), roster, on_failure, (6000, 100), daily)
            })
            .collect();
        for (n, (limiter, policies)) in replicas.iter().cycle().take(18).enumerate() {
            let cell = a_cell(limiter);
            let decision = limiter.admit(&cell, policies, NonZeroU32::MIN).await;
            assert_eq!(decision.unwrap().is_allowed(), n < 10, "request {n}");
            sleep(Duration::from_millis(20)).await;
        }
    });
}
