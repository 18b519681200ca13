//! Tests that returned tokens never make a bucket fuller than if they had never been taken.
//!
//! After every call, the oracle replays the bucket's entire history from a full bucket, without the tokens that have
//! been returned by then. It compares the resulting debt with the reported debt. Unlike the script, the oracle does not
//! record minimum debts and has no rules for credits. Schedules are random. They include early and late returns, calls
//! that return the tokens of several grants, plan edits, callers with an old plan, lost and stale state, and a clock
//! that goes backward. Scripts with planted errors prove that the oracle detects them.
#![expect(
    clippy::disallowed_methods,
    reason = "only tests read the seed settings"
)]

use std::{sync::Arc, time::Duration};

use fastrand::Rng;
use quota_common::id::{ApiKeyId, TenantId};
use quota_server::{
    clock::{Clock as _, Nanos, TestClock, UnixNanos},
    limiter::{
        BucketName, BucketState, CounterMicros, RedisCounters, SharedCounters as _, TakeCall,
    },
    redis::Redis,
};

use super::{
    model::{DEADLINE, EPOCH_DELAY, State},
    script::{ClockedCounters, started},
};
use crate::limiter_contract::START;

const BUCKET: BucketName = BucketName::Key(
    TenantId(uuid::Uuid::nil()),
    ApiKeyId(uuid::Uuid::from_u128(1)),
);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    emission: u64,
    tau: u64,
    version: u64,
}

impl Plan {
    fn random(rng: &mut Rng, version: u64) -> Self {
        let emission = [1_000, 1_000_000, 7_000_001, 100_000_000, 1_000_000_000][rng.usize(..5)];
        let burst = [1, 3, 10, 200][rng.usize(..4)];
        Self {
            emission,
            tau: emission * burst,
            version,
        }
    }
}

/// The tokens granted by one call.
#[derive(Debug, Clone, Copy)]
struct Granted {
    at: u64,
    generation: u64,
    tokens: u64,
    returned: u64,
    /// Tokens whose return was lost.
    lost: u64,
}

/// An event in the history of the bucket.
#[derive(Debug, Clone, Copy)]
enum Event {
    /// A call found the bucket in an epoch and under a plan, or found no bucket.
    Call {
        at: u64,
        plan: Plan,
        epoch: u64,
        remembered: bool,
        /// The call took or returned tokens.
        wrote: bool,
    },
    Took(usize),
}

/// Returns the number of nanoseconds until the bucket would be full if the returned tokens had never been taken.
fn debt_without_returned(history: &[Event], grants: &[Granted]) -> u128 {
    // The bucket as last written, and its debt as last reported.
    let (mut bucket, mut shown) = ((0_u128, 0_u128, 0), 0);
    let mut epoch = 0;
    let mut plan = None::<Plan>;
    for event in history {
        match *event {
            Event::Call {
                at,
                plan: new,
                epoch: start,
                remembered,
                wrote,
            } => {
                // `beyond` is debt that exceeds the debt of an empty bucket, from before the burst was lowered. This
                // excess decreases while the bucket is full.
                let (mut debt, mut beyond, last) = bucket;
                let mut passed = u128::from(at.saturating_sub(last)) * 1000;
                let mut writes = wrote || at < last;
                if let Some(old) = plan
                    && (old.emission, old.tau) != (new.emission, new.tau)
                {
                    // The number of missing tokens stays the same, although a smaller bucket does not show all of them.
                    // The time of the edit is unknown: for the time since the last write, the lower rate applies.
                    let missing = (debt + beyond) * u128::from(new.emission);
                    let missing = missing.div_ceil(u128::from(old.emission));
                    let slower = passed * u128::from(new.emission) / u128::from(old.emission);
                    passed = passed.min(slower);
                    debt = missing.min(u128::from(new.tau));
                    beyond = missing - debt;
                    writes = true;
                }
                beyond = beyond.saturating_sub(passed.saturating_sub(debt));
                debt = debt.saturating_sub(passed);
                plan = Some(new);
                if start != epoch || !remembered {
                    // The bucket was empty when the epoch began.
                    let since = u128::from(at.saturating_sub(start)) * 1000;
                    debt = u128::from(new.tau).saturating_sub(since);
                    beyond = 0;
                    epoch = start;
                    writes = true;
                }
                if writes {
                    bucket = (debt, beyond, at);
                }
                shown = debt;
            }
            Event::Took(grant) => {
                let kept = grants[grant].tokens - grants[grant].returned;
                let emission = plan.expect("there was a call").emission;
                bucket.0 += u128::from(kept) * u128::from(emission);
            }
        }
    }
    shown
}

/// The counters under test.
enum Counters {
    Model { state: Box<State>, run: u64 },
    Redis(Arc<ClockedCounters>, Redis),
}

impl Counters {
    fn model() -> Self {
        Self::Model {
            state: Box::new(State::fresh(1, 1)),
            run: 1,
        }
    }

    /// Resets the counters to the state of a new deployment.
    async fn reset(&mut self) {
        match self {
            Self::Model { .. } => *self = Self::model(),
            Self::Redis(counters, redis) => {
                redis.query("", &redis::cmd("FLUSHALL")).await.unwrap();
                counters.begin().await;
            }
        }
    }

    async fn take(&mut self, clock: &TestClock, call: TakeCall) -> BucketState {
        match self {
            Self::Model { state, run } => state.take(*run, clock.now().0 / 1000, call).state,
            Self::Redis(counters, _) => counters.take(call).await.unwrap().state,
        }
    }

    /// Simulates a failover to another Redis process, with or without the buckets.
    async fn fail_over(&mut self, keeps: bool) {
        match self {
            Self::Model { state, run } => {
                *run += 1;
                if !keeps {
                    **state = State::default();
                }
            }
            Self::Redis(_, redis) => {
                let lost = if keeps {
                    let mut other = redis::cmd("HSET");
                    other.arg(format!("{}:{{q0}}:epoch", redis.prefix()));
                    other.arg("run").arg("another");
                    other
                } else {
                    redis::cmd("FLUSHALL")
                };
                redis.query("", &lost).await.unwrap();
            }
        }
    }
}

/// The combined results of the schedules.
#[derive(Debug, Default)]
struct Sum {
    returned: u64,
    /// The total credit in schedules without exceptions (edits, failovers and clock changes), and the total that the
    /// oracle would have allowed in these schedules. The unit of both totals is one full bucket.
    credited: f64,
    allowed: f64,
    exceptions: u64,
    /// The first call after which the bucket was fuller than in the oracle.
    fuller: Option<String>,
}

#[expect(
    clippy::cast_precision_loss,
    reason = "the ratio of two sums, compared with a wide margin"
)]
#[expect(clippy::too_many_lines, reason = "the steps of one schedule, in order")]
async fn schedule(seed: u64, counters: &mut Counters, clock: &TestClock, sum: &mut Sum) {
    let mut rng = Rng::with_seed(seed);
    clock.set_now(START);
    counters.reset().await;
    let mut plan = Plan::random(&mut rng, 1);
    let mut old_plan = plan;
    let mut newest_used = clock.now().0 / 1000;
    let (mut history, mut grants) = (Vec::new(), Vec::<Granted>::new());
    let (mut epoch, mut promised) = (0, 0);
    // `exists`: whether the counters still have the bucket. `known`: the newest plan of any call for the bucket.
    let (mut exists, mut known) = (false, plan);
    // The time of the last call, and the bucket's debt at that time.
    let mut last = (START.0 / 1000, 0_u128);
    // Half of the schedules have no edits, failovers or clock changes.
    let calm = rng.bool();
    let step = [1, plan.emission / 1000, plan.tau / 4000, 200_000][rng.usize(..4)].max(1);
    for _ in 0..rng.u64(4..40) {
        if rng.u8(..4) > 0 {
            clock.advance(Duration::from_micros(rng.u64(..=step.min(3_000_000))));
        }
        if !calm && rng.u8(..12) == 0 {
            sum.exceptions += 1;
            match rng.u8(..4) {
                0 => {
                    old_plan = plan;
                    plan = Plan::random(&mut rng, plan.version + 1);
                }
                1 => {
                    old_plan = plan;
                    plan.tau = plan.emission * rng.u64(1..200);
                    plan.version += 1;
                }
                2 => {
                    let keeps = rng.bool();
                    counters.fail_over(keeps).await;
                    exists &= keeps;
                }
                _ => {
                    let back = rng.u64(1..2_000_000) * 1000;
                    clock.set_now(UnixNanos(clock.now().0 - back));
                }
            }
        }
        let now = clock.now().0 / 1000;
        // Tokens are returned in a separate call, or in a call that also takes tokens. A call may return tokens of
        // several grants.
        let (mut back, mut back_taken_at, mut back_generation) = (0, u64::MAX, u64::MAX);
        let mut parts = Vec::new();
        if rng.u8(..3) > 0 {
            for _ in 0..rng.u8(1..4) {
                if grants.is_empty() {
                    break;
                }
                let i = rng.usize(..grants.len());
                let left = grants[i].tokens - grants[i].returned - grants[i].lost;
                if left == 0 {
                    continue;
                }
                let n = if rng.bool() { left } else { rng.u64(1..=left) };
                grants[i].returned += n;
                back += n;
                back_taken_at = back_taken_at.min(grants[i].at);
                // If the tokens are from several generations, none of them is credited.
                back_generation = match back_generation {
                    u64::MAX => grants[i].generation,
                    same if same == grants[i].generation => same,
                    _ => 0,
                };
                parts.push((i, n));
            }
        }
        let takes = back == 0 || rng.bool();
        let burst = plan.tau / plan.emission;
        let waiting = if takes { rng.u64(1..=burst) } else { 0 };
        let stale = now.abs_diff(newest_used) < 4_000_000 && rng.u8(..6) == 0;
        let used = if stale { old_plan } else { plan };
        if !stale {
            newest_used = now;
        }
        let call = TakeCall {
            partition: 0,
            bucket: BUCKET,
            emission: Nanos(used.emission),
            tau: Nanos(used.tau),
            version: used.version,
            need: if takes { rng.u64(1..=waiting) } else { 0 },
            waiting,
            want: waiting + if takes { rng.u64(..=burst) } else { 0 },
            back,
            back_taken_at: CounterMicros(if back > 0 { back_taken_at } else { 0 }),
            back_generation: if back > 0 { back_generation } else { 0 },
            lease: [0, 100, 100_000][rng.usize(..3)],
            epoch_delay: EPOCH_DELAY,
            deadline: DEADLINE,
            last_heard: CounterMicros::NONE,
            outage_since: CounterMicros::NONE,
            promised: CounterMicros(promised),
        };
        match counters.take(clock, call).await {
            BucketState::Initializing { wait } => {
                for (i, n) in parts {
                    grants[i].returned -= n;
                    grants[i].lost += n;
                }
                promised = now + wait;
                epoch = promised;
                clock.advance(Duration::from_micros(wait));
            }
            BucketState::Active {
                granted,
                debt,
                generation,
            } => {
                if !exists || used.version >= known.version {
                    known = used;
                }
                history.push(Event::Call {
                    at: now,
                    plan: known,
                    epoch,
                    remembered: exists,
                    wrote: granted > 0 || back > 0,
                });
                // If a bucket is not stored yet, a call stores it unless the bucket counts as full.
                exists |= back > 0 || debt.0 > 0;
                let allowed = debt_without_returned(&history, &grants);
                let price = u128::from(granted) * u128::from(known.emission);
                if u128::from(debt.0) < allowed + price && sum.fuller.is_none() {
                    sum.fuller = Some(format!(
                        "seed {seed}, at {now}: {debt:?} from full, {allowed} ns and the {price} ns of this grant \
                         had the tokens never been taken; {call:?} {parts:?} {grants:?} {history:?}"
                    ));
                    return;
                }
                let real = u128::from(debt.0) - price;
                sum.returned += back;
                if back > 0 && calm {
                    let before = last.1.saturating_sub(u128::from(now - last.0) * 1000);
                    sum.credited += (before - real) as f64 / known.tau as f64;
                    sum.allowed += (before - allowed) as f64 / known.tau as f64;
                }
                last = (now, u128::from(debt.0));
                if granted > 0 {
                    history.push(Event::Took(grants.len()));
                    grants.push(Granted {
                        at: now,
                        generation,
                        tokens: granted,
                        returned: 0,
                        lost: 0,
                    });
                }
            }
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Runs `schedules` schedules, or only the schedule of the seed in `QUOTA_SEED`. Stops after the first schedule in
/// which a bucket became too full.
async fn run(counters: &mut Counters, clock: &TestClock, schedules: u64) -> Sum {
    let seeds = number("QUOTA_SEED").map_or(0..schedules, |seed| seed..seed + 1);
    let mut sum = Sum::default();
    for seed in seeds {
        schedule(seed, counters, clock, &mut sum).await;
        if sum.fuller.is_some() {
            break;
        }
    }
    sum
}

fn check(sum: &Sum) {
    assert_eq!(sum.fuller, None);
    eprintln!("{sum:?}");
    if number("QUOTA_SEED").is_none() {
        assert!(sum.returned > 1000 && sum.exceptions > 100, "{sum:?}");
        // A script that credits nothing would never make a bucket too full either, so the total credit must not be
        // small.
        assert!(sum.credited > 0.5 * sum.allowed, "{sum:?}");
    }
}

/// Runs tens of thousands of schedules on the model that the script is compared with.
#[tokio::test]
async fn a_return_never_makes_a_bucket_fuller_than_without_the_take() {
    let clock = TestClock::at(START);
    let schedules = number("QUOTA_SEEDS").unwrap_or(40_000);
    check(&run(&mut Counters::model(), &clock, schedules).await);
}

/// Runs a few thousand schedules on the script in a real Redis.
#[tokio::test]
async fn the_script_never_makes_a_bucket_fuller_than_without_the_take() {
    let (_server, redis) = started().await;
    let clock = TestClock::at(START);
    let counters = ClockedCounters::new(&redis, &clock);
    let schedules = number("QUOTA_SEEDS").unwrap_or(2000);
    check(&run(&mut Counters::Redis(counters, redis), &clock, schedules).await);
}

/// Scripts that make a bucket too full, each in a different way, are detected.
#[tokio::test]
async fn planted_errors_in_the_script_are_found() {
    let lowered = "m = math.max(0, m - credit)\n  n = math.max(0, n - credit)";
    let planted = [
        // The lowest debt since a grant is not reduced by a credit, so it is used again for every return.
        (lowered, "m = math.min(m, debt)\n  n = math.min(n, debt)"),
        // Tokens are credited across edits, epochs and a clock that goes backward.
        ("back_generation == g and taken_at <= now", "true"),
        // A token keeps its original value, regardless of when it is returned.
        (
            "math.min(debt, back * e, math.max(",
            "math.min(debt, back * e, math.max(back * e, ",
        ),
        // A minimum debt also counts for grants from before it was recorded.
        ("taken_at >= nt", "true"),
        // A request that is denied in a new epoch does not store the bucket.
        ("at ~= nil or debt > 0", "at ~= nil"),
    ];
    let (_server, redis) = started().await;
    let clock = TestClock::at(START);
    for (right, wrong) in planted {
        let script = RedisCounters::script();
        assert!(script.contains(right), "{right}");
        let script = script.replace(right, wrong);
        let counters = ClockedCounters::with_script(&redis, &clock, &script);
        let sum = run(&mut Counters::Redis(counters, redis.clone()), &clock, 3000).await;
        assert!(sum.fuller.is_some(), "{wrong} goes unnoticed: {sum:?}");
    }
}

/// A request that is dropped while it waits takes no tokens. A lease that is returned to a busy bucket is credited in
/// full, however late it is returned.
#[tokio::test]
async fn a_simple_return_is_credited_in_full() {
    let (_server, redis) = started().await;
    let clock = TestClock::at(START);
    let counters = ClockedCounters::new(&redis, &clock);
    counters.begin().await;
    let call = TakeCall {
        partition: 0,
        bucket: BUCKET,
        emission: Nanos(1_000_000),
        tau: Nanos(200_000_000),
        version: 1,
        need: 0,
        waiting: 0,
        want: 0,
        back: 0,
        back_taken_at: CounterMicros::NONE,
        back_generation: 0,
        lease: 100_000,
        epoch_delay: EPOCH_DELAY,
        deadline: DEADLINE,
        last_heard: CounterMicros::NONE,
        outage_since: CounterMicros::NONE,
        promised: CounterMicros::NONE,
    };
    let take = async |call: TakeCall| {
        let reply = counters.take(call).await.unwrap();
        match reply.state {
            BucketState::Active {
                granted,
                debt,
                generation,
            } => (reply.at, granted, debt.0, generation),
            state @ BucketState::Initializing { .. } => panic!("{state:?}"),
        }
    };
    let wanting = |n| TakeCall {
        need: 1,
        waiting: n,
        want: n,
        ..call
    };
    let returning = |n, at, generation| TakeCall {
        back: n,
        back_taken_at: at,
        back_generation: generation,
        ..call
    };
    // If tokens are returned immediately to a bucket that was full, all of them are credited, except for the refill in
    // between.
    let (at, granted, _, generation) = take(wanting(50)).await;
    assert_eq!(granted, 50);
    clock.advance(Duration::from_millis(2));
    let (_, _, debt, _) = take(returning(50, at, generation)).await;
    assert_eq!(debt, 0);
    // If tokens are returned late to a bucket that was never full in between, all of them are credited.
    assert_eq!(take(wanting(150)).await.1, 150);
    let (at, granted, debt, generation) = take(wanting(40)).await;
    assert_eq!((granted, debt), (40, 190_000_000));
    clock.advance(Duration::from_millis(100));
    let (_, _, debt, _) = take(returning(40, at, generation)).await;
    assert_eq!(debt, 50_000_000);
    // Tokens from an older generation are not credited.
    let (at, granted, debt, generation) = take(wanting(40)).await;
    assert_eq!(granted, 40);
    let (_, _, same, _) = take(returning(40, at, generation - 1)).await;
    assert_eq!(debt, same);
}

/// Simulates a replica whose responses are late. It takes 150 tokens in separate calls, and returns them one by one
/// between two waves of 250 requests on other replicas.
#[tokio::test]
async fn late_separate_returns_grant_nothing_twice() {
    let (_server, redis) = started().await;
    let clock = TestClock::at(START);
    let counters = ClockedCounters::new(&redis, &clock);
    counters.begin().await;
    let one = TakeCall {
        partition: 0,
        bucket: BUCKET,
        emission: Nanos(1_000_000),
        tau: Nanos(200_000_000),
        version: 1,
        need: 1,
        waiting: 1,
        want: 1,
        back: 0,
        back_taken_at: CounterMicros::NONE,
        back_generation: 0,
        lease: 100_000,
        epoch_delay: EPOCH_DELAY,
        deadline: DEADLINE,
        last_heard: CounterMicros::NONE,
        outage_since: CounterMicros::NONE,
        promised: CounterMicros::NONE,
    };
    let mut late = Vec::new();
    for _ in 0..150 {
        let reply = counters.take(one).await.unwrap();
        late.push(reply);
        clock.advance(Duration::from_micros(10));
    }
    let wave = async || {
        let mut served = 0;
        for _ in 0..250 {
            let reply = counters.take(one).await.unwrap();
            if let BucketState::Active { granted, .. } = reply.state {
                served += granted;
            }
        }
        served
    };
    clock.advance(Duration::from_millis(110));
    let first = wave().await;
    clock.advance(Duration::from_millis(10));
    for reply in late {
        let BucketState::Active {
            granted: 1,
            generation,
            ..
        } = reply.state
        else {
            panic!("{reply:?}");
        };
        let back = TakeCall {
            need: 0,
            waiting: 0,
            want: 0,
            back: 1,
            back_taken_at: reply.at,
            back_generation: generation,
            ..one
        };
        counters.take(back).await.unwrap();
    }
    clock.advance(Duration::from_millis(15));
    let served = first + wave().await;
    // The bound allows for the 25 ms between the waves and the refill during the first calls.
    assert!(served <= 200 + 25 + 1, "{served}, {first} at first");
    assert!(served >= 185, "{served}, {first} at first");
}
