//! The limiter against a naive model of itself, over random schedules.
//!
//! The model is written in the plainest way: a level in a bucket that rises with time, and a count for every
//! calendar window there ever was. It shares with the limiter only the calendar, which is tested by itself.

use std::{
    collections::HashMap,
    num::{NonZeroU32, NonZeroU64},
    sync::Arc,
    time::Duration,
};

use proptest::{prelude::*, test_runner::TestRunner};
use quota_common::{ApiKeyId, TenantId};
use uuid::Uuid;

use super::{
    Decision, Limiter, MemoryStore, Period, Policies, Policy, PolicySet, Verdict, Window, Zone,
    suite::MemoryLedger,
};
use crate::clock::{TestClock, UnixNanos};

/// What happens next.
#[derive(Debug, Clone)]
enum Step {
    Ask(u32),
    /// Both hands of the clock move on.
    Pass(u64),
    /// The calendar's hand is set, perhaps back.
    Jump(i64),
    Plan(usize),
}

#[derive(Debug, Clone)]
struct Plan {
    rpm: u32,
    burst: u32,
    daily: Option<u64>,
    monthly: Option<u64>,
}

impl Plan {
    fn policies(&self, zone: &Zone) -> Policies {
        Policies::new(
            NonZeroU32::new(self.rpm).unwrap(),
            NonZeroU32::new(self.burst).unwrap(),
        )
        .with_daily(self.daily.and_then(NonZeroU64::new))
        .with_monthly(self.monthly.and_then(NonZeroU64::new))
        .with_zone(zone.clone())
    }

    /// Nanoseconds from one token to the next.
    fn interval(&self) -> i128 {
        let rpm = i128::from(self.rpm);
        (60_000_000_000 + rpm - 1) / rpm
    }

    fn capacity(&self) -> i128 {
        self.interval() * i128::from(self.burst)
    }
}

/// The bucket's level in nanoseconds of refilling, and every window's count. What runs over is poured away
/// when something is taken, so a rested bucket stays full when the clock jumps back a little.
struct Naive {
    level: i128,
    seen: i128,
    plan: Plan,
    used: HashMap<(Policy, u64), u64>,
}

impl Naive {
    fn change(&mut self, plan: &Plan, now: i128) {
        self.settle(now);
        let (old, new) = (self.plan.interval(), plan.interval());
        if (old, self.plan.burst) != (new, plan.burst) {
            // As many tokens stay spent; a broken one counts in the key owner's disfavour.
            let spent = (self.plan.capacity() - self.level).max(0);
            let spent = (spent * new + old - 1) / old;
            self.level = (plan.capacity() - spent).max(0);
        }
        self.plan = plan.clone();
    }

    /// Time that goes back takes from the bucket what it would have given.
    fn settle(&mut self, now: i128) {
        self.level = (self.level + now - self.seen).max(0);
        self.seen = now;
    }

    fn ask(&mut self, cost: u32, now: UnixNanos, zone: &Zone) -> (Verdict, [Option<u64>; 3]) {
        let at = i128::from(now.0);
        self.settle(at);
        let mut violated = PolicySet::EMPTY;
        let mut retry: Option<i128> = Some(at);
        let needed = self.plan.interval() * i128::from(cost);
        let level = self.level.min(self.plan.capacity());
        if needed > level {
            violated = violated.with(Policy::Rpm);
            retry = (cost <= self.plan.burst).then_some(at + needed - level);
        }
        let quotas = [
            (Period::Day, self.plan.daily),
            (Period::Month, self.plan.monthly),
        ];
        let windows = quotas.map(|(period, limit)| {
            limit.map(|limit| (Window::at(period, zone, now), limit, period))
        });
        for (window, limit, period) in windows.into_iter().flatten() {
            let used = self
                .used
                .get(&(period.policy(), window.start.0))
                .copied()
                .unwrap_or(0);
            if used + u64::from(cost) > limit {
                violated = violated.with(period.policy());
                let ends = (u64::from(cost) <= limit).then_some(i128::from(window.end.0));
                retry = retry.zip(ends).map(|(a, b)| a.max(b));
            }
        }
        let verdict = if violated.is_empty() {
            self.level = level - needed;
            for (window, _, period) in windows.into_iter().flatten() {
                *self
                    .used
                    .entry((period.policy(), window.start.0))
                    .or_default() += u64::from(cost);
            }
            Verdict::Allowed
        } else {
            let retry_at = retry.map(|at| UnixNanos(u64::try_from(at).unwrap()));
            Verdict::Denied { violated, retry_at }
        };
        let mut remaining = [
            Some(
                u64::try_from(self.level.min(self.plan.capacity()) / self.plan.interval()).unwrap(),
            ),
            None,
            None,
        ];
        for (window, limit, period) in windows.into_iter().flatten() {
            let used = self
                .used
                .get(&(period.policy(), window.start.0))
                .copied()
                .unwrap_or(0);
            remaining[period.policy().index()] = Some(limit.saturating_sub(used));
        }
        (verdict, remaining)
    }
}

const STEPS: usize = 4000;
const CASES: u32 = 400;

fn plans() -> impl Strategy<Value = Vec<Plan>> {
    let rate = prop_oneof![1..100_u32, 1000..100_000_u32, Just(60_000_000_u32)];
    let burst = prop_oneof![1..20_u32, 100..5000_u32];
    let quota = || {
        prop_oneof![
            Just(None),
            (1..50_u64).prop_map(Some),
            (100..20_000_u64).prop_map(Some)
        ]
    };
    let plan = (rate, burst, quota(), quota()).prop_map(|(rpm, burst, daily, monthly)| Plan {
        rpm,
        burst,
        daily,
        monthly,
    });
    prop::collection::vec(plan, 1..4)
}

fn step() -> impl Strategy<Value = Step> {
    const SECOND: i64 = 1_000_000_000;
    prop_oneof![
        60 => (1..4_u32).prop_map(Step::Ask),
        4 => (1..6000_u32).prop_map(Step::Ask),
        14 => (0..2_000_000_000_u64).prop_map(Step::Pass),
        3 => (0..90_000_u64).prop_map(|secs| Step::Pass(secs * 1_000_000_000)),
        1 => (-90_000..90_000_i64).prop_map(|secs| Step::Jump(secs * SECOND)),
        1 => (-2_000_000_000..2_000_000_000_i64).prop_map(Step::Jump),
        1 => (0..4_usize).prop_map(Step::Plan),
    ]
}

#[test]
fn the_limiter_decides_as_the_naive_model_over_a_million_decisions() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let decisions = std::cell::Cell::new(0_u64);
    let denials = std::cell::Cell::new(0_u64);
    let zones = [
        "UTC",
        "Europe/Berlin",
        "America/St_Johns",
        "Pacific/Apia",
        "Africa/Cairo",
    ];
    let schedule = (
        plans(),
        0..zones.len(),
        prop::collection::vec(step(), STEPS..STEPS + 1),
    );
    let mut runner = TestRunner::new(ProptestConfig {
        cases: CASES,
        max_shrink_iters: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let outcome = runner.run(&schedule, |(plans, zone, steps)| {
        let zone = Zone::named(zones[zone]).unwrap();
        runtime.block_on(async {
            let start = UnixNanos::from_secs(1_774_000_000);
            let clock = TestClock::at(start);
            let store = MemoryStore::new(
                Arc::new(MemoryLedger::default()),
                Arc::new(clock.clone()),
                10,
            );
            let limiter = Limiter::new(Arc::new(store), Arc::new(clock.clone()));
            let cell = limiter
                .cell(TenantId::NIL, ApiKeyId(Uuid::from_u128(7)))
                .unwrap();
            let mut model = Naive {
                // At rest since the epoch.
                level: i128::from(start.0),
                seen: i128::from(start.0),
                plan: plans[0].clone(),
                used: HashMap::new(),
            };
            let mut policies = plans[0].policies(&zone);
            for step in steps {
                match step {
                    Step::Pass(nanos) => clock.advance(Duration::from_nanos(nanos)),
                    Step::Jump(nanos) => {
                        clock.set_now(UnixNanos(now(&clock).0.saturating_add_signed(nanos)))
                    }
                    Step::Plan(index) => {
                        // The limiter learns of a plan with the next request, so the model does too.
                        policies = plans[index % plans.len()].policies(&zone);
                        model.change(&plans[index % plans.len()], i128::from(now(&clock).0));
                        compare(&limiter, &cell, &policies, &mut model, 1, &clock, &zone).await?;
                        decisions.set(decisions.get() + 1);
                    }
                    Step::Ask(cost) => {
                        let decision =
                            compare(&limiter, &cell, &policies, &mut model, cost, &clock, &zone)
                                .await?;
                        decisions.set(decisions.get() + 1);
                        denials.set(denials.get() + u64::from(!decision.is_allowed()));
                    }
                }
            }
            Ok(())
        })
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
    let (decisions, denials) = (decisions.get(), denials.get());
    println!("{decisions} decisions, {denials} of them denials, 0 differences");
    assert!(
        decisions >= 1_000_000,
        "only {decisions} decisions were compared"
    );
    assert!(
        denials > decisions / 20 && denials < decisions / 20 * 19,
        "{denials} denials prove little"
    );
}

fn now(clock: &TestClock) -> UnixNanos {
    use crate::clock::Clock as _;
    clock.now()
}

async fn compare(
    limiter: &Limiter,
    cell: &Arc<super::KeyCell>,
    policies: &Policies,
    model: &mut Naive,
    cost: u32,
    clock: &TestClock,
    zone: &Zone,
) -> Result<Decision, TestCaseError> {
    let decision = limiter
        .admit(cell, policies, cost)
        .await
        .expect("the ledger is there");
    let (verdict, remaining) = model.ask(cost, now(clock), zone);
    prop_assert_eq!(decision.verdict, verdict, "cost {}, {:?}", cost, &decision);
    let states = decision
        .states
        .map(|state| state.map(|state| state.remaining));
    prop_assert_eq!(states, remaining, "cost {}, {:?}", cost, &decision);
    Ok(decision)
}
