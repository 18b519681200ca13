//! Compares the limiter with a simple model on random schedules.
//!
//! The model keeps a list of a bucket's events and, for each request, replays the list from the start, counting tokens
//! as exact fractions. The model gets days and months from `chrono`. The outcome, the wait, the remaining tokens and
//! the reset times of every decision are compared.

use std::collections::HashMap;

use chrono::{DateTime, Datelike, Days, Months, NaiveDate, NaiveTime};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use quota_server::{
    clock::UnixNanos,
    limiter::{Decision, Outcome, Policy, PolicySet},
};

use super::world::{self, Key, Plan, START, World, settle};

const MINUTE: i128 = 60_000_000_000;

/// An event of a bucket.
#[derive(Clone, Copy)]
enum Event {
    /// The arrival of a request, with its time.
    Seen(u64),
    /// A grant, with the number of tokens that were taken.
    Grant(u32),
    /// A plan edit, with the new emission interval and burst.
    Plan(i128, i128),
    /// The state of a full bucket: its debt, and when tokens were last taken. The debt is 0 or negative, and its
    /// absolute value is the time for which the bucket has been full.
    Full(i128, u64),
}

/// The debt of a bucket, and the numbers needed to interpret it.
#[derive(Default)]
struct Bucket {
    clock: u64,
    interval: i128,
    burst: i128,
    /// The time until the bucket is full. If negative, the absolute value is the time for which the bucket has been
    /// full.
    missing: i128,
    /// Debt beyond that of an empty bucket, from before the burst was lowered. This debt decreases while the bucket is
    /// full.
    beyond: i128,
    /// When tokens were last taken or the plan was last edited, whichever is later.
    since: u64,
}

impl Bucket {
    /// Reduces `beyond` by the time for which the bucket has been full. The bucket then counts as just full.
    fn use_time_when_full(&mut self) {
        self.beyond = (self.beyond + self.missing.min(0)).max(0);
        self.missing = self.missing.max(0);
    }
}

#[derive(Default)]
struct Model {
    events: Vec<Event>,
    /// Usage, by policy and first day of the window.
    used: HashMap<(Policy, NaiveDate), u64>,
    plan: (i128, i128),
}

impl Model {
    /// Replays all events. Drops the history of a full bucket.
    fn bucket(&mut self) -> Bucket {
        let mut bucket = Bucket::default();
        for event in &self.events {
            match *event {
                // Elapsed time refills the bucket. If the clock was set back, the refill of that time is removed again,
                // at most until the bucket is empty.
                Event::Seen(now) => {
                    bucket.missing -= i128::from(now) - i128::from(bucket.clock);
                    bucket.missing = bucket.missing.min(bucket.interval * bucket.burst);
                    bucket.clock = now;
                    bucket.since = bucket.since.min(now);
                }
                Event::Grant(cost) => {
                    bucket.use_time_when_full();
                    bucket.missing += i128::from(cost) * bucket.interval;
                    bucket.since = bucket.clock;
                }
                Event::Plan(interval, burst) => {
                    // The number of missing tokens remains the same, although a smaller bucket cannot show all of them.
                    // The time of the edit is unknown: for the time since tokens were last taken or the plan was last
                    // edited, the lower rate applies.
                    if bucket.interval > 0 {
                        let passed = i128::from(bucket.clock - bucket.since);
                        bucket.missing += passed;
                        bucket.use_time_when_full();
                        let missing = (bucket.missing + bucket.beyond) * interval;
                        let missing = (missing + bucket.interval - 1) / bucket.interval;
                        bucket.missing = missing.min(interval * burst);
                        bucket.beyond = missing - bucket.missing;
                        bucket.missing -= passed.min(passed * interval / bucket.interval);
                        bucket.use_time_when_full();
                    }
                    bucket.since = bucket.clock;
                    bucket.missing = bucket.missing.min(interval * burst);
                    bucket.interval = interval;
                    bucket.burst = burst;
                }
                Event::Full(missing, since) => {
                    bucket.missing = missing;
                    bucket.since = since;
                }
            }
        }
        if bucket.missing <= 0 && bucket.beyond == 0 {
            self.events = vec![
                Event::Plan(bucket.interval, bucket.burst),
                Event::Seen(bucket.clock),
                Event::Full(bucket.missing, bucket.since),
            ];
        }
        bucket
    }

    fn windows(now: UnixNanos) -> [(Policy, NaiveDate, u64); 2] {
        let at = DateTime::from_timestamp_nanos(i64::try_from(now.0).unwrap());
        let today = at.date_naive();
        let month = today.with_day(1).unwrap();
        let nanos = |date: NaiveDate| {
            let midnight = date.and_time(NaiveTime::MIN).and_utc();
            u64::try_from(midnight.timestamp_nanos_opt().unwrap()).unwrap()
        };
        [
            (Policy::Daily, today, nanos(today + Days::new(1))),
            (Policy::Monthly, month, nanos(month + Months::new(1))),
        ]
    }

    fn decide(&mut self, plan: &Plan, now: UnixNanos, cost: u32) -> Expected {
        let rpm = i128::from(plan.rpm);
        let rate = ((MINUTE + rpm - 1) / rpm, i128::from(plan.burst));
        self.events.push(Event::Seen(now.0));
        if rate != self.plan {
            self.plan = rate;
            self.events.push(Event::Plan(rate.0, rate.1));
        }
        let bucket = self.bucket();
        let holds = bucket.interval * bucket.burst;
        let price = i128::from(cost) * bucket.interval;
        let before = bucket.missing.max(0);

        let mut violated = PolicySet::EMPTY;
        let (mut wait, mut never) = (0u64, false);
        if before + price > holds {
            violated = violated.with(Policy::Rpm);
            never |= price > holds;
            wait = u64::try_from(before + price - holds).unwrap();
        }
        let mut quotas = Vec::new();
        for ((policy, start, end), limit) in Self::windows(now)
            .into_iter()
            .zip([plan.daily, plan.monthly])
        {
            if limit == 0 {
                continue;
            }
            let used = self.used.get(&(policy, start)).copied().unwrap_or(0);
            if used + u64::from(cost) > limit {
                violated = violated.with(policy);
                never |= u64::from(cost) > limit;
                wait = wait.max(end - now.0);
            }
            quotas.push((policy, limit, used, start, end));
        }

        let allowed = violated.is_empty();
        let mut missing = before;
        if allowed {
            missing += price;
            self.events.push(Event::Grant(cost));
            for (policy, _, used, start, _) in &mut quotas {
                *used += u64::from(cost);
                self.used.insert((*policy, *start), *used);
            }
        }
        Expected {
            violated,
            retry_after: (!allowed && !never).then_some(wait),
            rate_left: u64::try_from((holds - missing) / bucket.interval).unwrap(),
            full_at: now.0 + u64::try_from(missing).unwrap(),
            quotas: quotas
                .into_iter()
                .map(|(policy, limit, used, _, end)| {
                    (policy, limit, limit.saturating_sub(used), end)
                })
                .collect(),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Expected {
    violated: PolicySet,
    retry_after: Option<u64>,
    rate_left: u64,
    full_at: u64,
    quotas: Vec<(Policy, u64, u64, u64)>,
}

impl From<Decision> for Expected {
    fn from(decision: Decision) -> Self {
        assert_eq!(
            decision.is_allowed(),
            decision.outcome == Outcome::Allowed && decision.violated().is_empty()
        );
        Self {
            violated: decision.violated(),
            retry_after: decision.retry_after(),
            rate_left: decision.rate.remaining,
            full_at: decision.rate.reset_at.0,
            quotas: [decision.daily, decision.monthly]
                .into_iter()
                .flatten()
                .map(|state| (state.policy, state.limit, state.remaining, state.reset_at.0))
                .collect(),
        }
    }
}

/// A step that is applied to both the limiter and the model.
#[derive(Debug, Clone)]
enum Step {
    /// Sends `times` requests that cost `cost` each.
    Ask {
        cost: u32,
        times: u32,
    },
    /// Waits for this many nanoseconds, rounded up to a multiple of the unit of time.
    Wait(u64),
    /// Waits as long as the last denial stated, plus the given number of units of time.
    WaitAsTold(i8),
    /// Sets the clock back.
    Back(u64),
    Edit(usize),
    /// Restarts the replica cleanly.
    Restart,
}

fn step(jumps: bool, plans: usize) -> impl Strategy<Value = Step> {
    let jump = u32::from(jumps);
    prop_oneof![
        12 => (1..4u32, 1..30u32).prop_map(|(cost, times)| Step::Ask { cost, times }),
        4 => (1..200u32, 1..4u32).prop_map(|(cost, times)| Step::Ask { cost, times }),
        6 => (0..3_000_000_000u64).prop_map(Step::Wait),
        4 => (0..20_000_000u64).prop_map(Step::Wait),
        1 => (0..200_000_000_000_000u64).prop_map(Step::Wait),
        6 => (-1..2i8).prop_map(Step::WaitAsTold),
        jump => (0..5_000_000_000u64).prop_map(Step::Back),
        jump => (0..200_000_000_000_000u64).prop_map(Step::Back),
        2 => (0..plans).prop_map(Step::Edit),
        jump => Just(Step::Restart),
    ]
}

fn plan() -> impl Strategy<Value = Plan> {
    let rpm = prop_oneof![
        1..100u32,
        100..10_000u32,
        Just(7),
        Just(59_999_999),
        Just(60_000_000)
    ];
    let quota =
        prop_oneof![2 => Just(0u64), 1 => 1..50u64, 2 => 50..5000u64, 1 => 5000..2_000_000u64];
    (rpm, 1..60u32, quota.clone(), quota).prop_map(|(rpm, burst, daily, monthly)| {
        Plan::rate(rpm, burst).daily(daily).monthly(monthly)
    })
}

/// Runs `steps` on the limiter and the model, and returns the number of compared decisions. Every wait is a multiple of
/// the unit of time, which is `grain` nanoseconds.
async fn play(world: &World, plans: &[Plan], steps: &[Step], grain: u64) -> u64 {
    let mut model = Model::default();
    let mut key = Key::of(&world.start());
    let mut plan = &plans[0];
    let mut policies = plan.policies();
    let mut told = 1_000_000_000;
    let mut compared = 0;
    // For checking the rate: the time and the cost of each grant.
    let mut grants: Vec<(u64, u64)> = Vec::new();
    for step in steps {
        match *step {
            Step::Ask { cost, times } => {
                let asked = std::num::NonZeroU32::new(cost).unwrap();
                for _ in 0..times {
                    let expected = model.decide(plan, world.now(), cost);
                    let decision = key
                        .limiter
                        .admit(&key.handle, &policies, asked)
                        .await
                        .unwrap();
                    told = decision.retry_after().unwrap_or(told);
                    if decision.is_allowed() {
                        grants.push((world.now().0, u64::from(cost)));
                    }
                    assert_eq!(Expected::from(decision), expected, "decision {compared}");
                    compared += 1;
                }
            }
            Step::Wait(nanos) => {
                let nanos = nanos.next_multiple_of(grain);
                world.advance(std::time::Duration::from_nanos(nanos));
            }
            Step::WaitAsTold(off) => {
                let grains = told.div_ceil(grain).saturating_add_signed(i64::from(off));
                let nanos = grains * grain;
                world.advance(std::time::Duration::from_nanos(nanos));
            }
            Step::Back(nanos) => {
                world
                    .clock
                    .set_now(UnixNanos((world.now().0 - nanos).max(START.0 / 2)));
                grants.clear();
            }
            Step::Edit(index) => {
                within_what_was_sold(plan, &grants);
                grants.clear();
                plan = &plans[index];
                policies = plan.policies();
            }
            Step::Restart => {
                settle().await;
                assert_eq!(key.limiter.drain().await.lost, 0);
                key = Key::of(&world.start());
                model.events.clear();
                model.plan = (0, 0);
                grants.clear();
            }
        }
    }
    within_what_was_sold(plan, &grants);
    compared
}

/// Asserts that at most `burst + rpm/60 * T` is admitted in any window of `T` seconds. Uses the exact rate instead of
/// the emission interval, which is rounded.
fn within_what_was_sold(plan: &Plan, grants: &[(u64, u64)]) {
    // Check every window that starts with a grant.
    for (i, (from, _)) in grants.iter().enumerate() {
        let mut sum = 0i128;
        for (until, cost) in &grants[i..] {
            sum += i128::from(*cost);
            let refilled = i128::from(plan.rpm) * i128::from(until - from);
            assert!(sum * MINUTE <= i128::from(plan.burst) * MINUTE + refilled);
        }
    }
}

fn compare(seed: u8, set_up: fn() -> World, jumps: bool, decisions: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        // Time is paused, so that requests wait for the ledger until it responds, even if the machine is busy.
        .start_paused(true)
        .build()
        .unwrap();
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let script = (
        prop::collection::vec(plan(), 4),
        prop::collection::vec(step(jumps, 4), 150),
    );
    let mut compared = 0;
    while compared < decisions {
        let (plans, steps) = script.new_tree(&mut runner).unwrap().current();
        let world = set_up();
        compared += runtime.block_on(play(&world, &plans, &steps, 1));
    }
    assert!(compared >= decisions);
}

#[test]
fn a_million_decisions_equal_those_of_the_model() {
    std::thread::scope(|scope| {
        scope.spawn(|| compare(1, world::memory, true, 400_000));
        scope.spawn(|| compare(2, world::memory, true, 400_000));
        compare(3, world::memory, false, 200_000);
    });
}

/// The denial cache in front of a store does not change any decision.
#[test]
fn denial_cache_changes_no_decision() {
    compare(4, world::far, false, 100_000);
}

/// Compares buckets in Redis, whose clock has a resolution of one microsecond, with the model.
#[tokio::test]
async fn redis_decides_like_the_model() {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[5; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let script = (
        prop::collection::vec(plan(), 4),
        prop::collection::vec(step(false, 4), 150),
    );
    let mut compared = 0;
    while compared < 15_000 {
        let (plans, steps) = script.new_tree(&mut runner).unwrap().current();
        let (world, _redis) = world::redis().await;
        compared += play(&world, &plans, &steps, 1000).await;
    }
}
