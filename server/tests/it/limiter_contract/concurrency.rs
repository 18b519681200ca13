//! Tests in which many threads use one key.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use quota_server::{
    clock::{Clock, Nanos, SystemClock, TestClock},
    limiter::{Decision, KeyTableSettings, Limiter, LimiterError, LocalStore, Policy},
};

use super::{
    ledger::TestLedger,
    world::{Far, Key, ONE, Plan, START, memory_store},
};

/// Returns a function that waits for a decision on the thread's own runtime.
fn asker<F: Future<Output = Result<Decision, LimiterError>>>() -> impl Fn(F) -> Decision {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    move |asked| runtime.block_on(asked).unwrap()
}

/// Threads send requests as fast as they can while the clock advances. The number of allowed requests is at least the
/// burst, and at most the burst plus the refill.
#[test]
fn threads_get_exactly_the_burst_and_the_refill() {
    for far in [false, true] {
        let clock = TestClock::at(START);
        let store = memory_store(&clock, &TestLedger::new());
        let limiter = if far {
            Limiter::new(Far::new(store), Arc::new(clock.clone()))
        } else {
            Limiter::new(store, Arc::new(clock.clone()))
        };
        let key = Key::of(&limiter);
        let policies = Plan::rate(6000, 100).policies();
        let admitted = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let ask = asker();
                    for _ in 0..20_000 {
                        let decision = ask(limiter.admit(&key.handle, &policies, ONE));
                        admitted.fetch_add(u64::from(decision.is_allowed()), Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..1000 {
                clock.advance(Duration::from_millis(1));
                std::thread::yield_now();
            }
        });
        // Spend the tokens that no thread has used.
        let ask = asker();
        while ask(limiter.admit(&key.handle, &policies, ONE)).is_allowed() {
            admitted.fetch_add(1, Ordering::Relaxed);
        }
        let admitted = admitted.into_inner();
        assert!(admitted <= 100 + 100, "{admitted} (far: {far})");
        assert!(admitted >= 100, "{admitted} (far: {far})");
    }
}

/// Like the previous test, but with the system clock.
#[test]
fn no_more_than_the_limit_is_allowed_in_real_time() {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let store = LocalStore::new(
        Arc::clone(&clock),
        TestLedger::new(),
        KeyTableSettings::default(),
    );
    let limiter = Limiter::new(store, Arc::clone(&clock));
    let key = Key::of(&limiter);
    let policies = Plan::rate(600_000, 50).policies();
    let admitted = AtomicU64::new(0);
    let (from, began) = (clock.now(), clock.monotonic());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                // If the threads start late, continue until refilled tokens have been admitted, for up to 30 s.
                let is_over = || {
                    let took = clock.monotonic().saturating_since(began);
                    let has_refilled = admitted.load(Ordering::Relaxed) > 50;
                    took >= Nanos::from_secs(30)
                        || (took >= Nanos::from_millis(200) && has_refilled)
                };
                while !is_over() {
                    let decision = limiter.try_admit(&key.handle, &policies, ONE).unwrap();
                    admitted.fetch_add(u64::from(decision.is_allowed()), Ordering::Relaxed);
                }
            });
        }
    });
    let took = clock.now().0 - from.0;
    let admitted = admitted.into_inner();
    let sold = 50 + 10_000 * took / 1_000_000_000;
    assert!(admitted <= sold, "{admitted} of {sold}");
    // How far the total stays below the limit depends on when the threads run, so check only that tokens were refilled.
    assert!(admitted > 50, "{admitted}: nothing was refilled");
}

/// Several threads send requests against a quota that is fetched in blocks.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_requests_get_exactly_the_quota() {
    for (quota, costs) in [
        (10_000u64, vec![1u32]),
        (50, vec![1]),
        (5000, vec![1, 7, 130]),
    ] {
        let clock = TestClock::at(START);
        let ledger = TestLedger::new();
        // With long deadlines, a request does not fail if its thread does not run for a moment.
        let store = LocalStore::new(
            Arc::new(clock.clone()),
            Arc::clone(&ledger) as _,
            KeyTableSettings {
                ledger_deadline: Duration::from_secs(60),
                call_deadline: Duration::from_secs(60),
                ..KeyTableSettings::default()
            },
        );
        let limiter = Limiter::new(store, Arc::new(clock));
        let policies = Plan::any_rate().daily(quota).policies();
        let mut tasks = Vec::new();
        for n in 0..16usize {
            let key = Key::of(&limiter);
            let policies = policies.clone();
            let cost = NonZeroU32::new(costs[n % costs.len()]).unwrap();
            tasks.push(tokio::spawn(async move {
                let mut admitted = 0;
                loop {
                    let decision = key
                        .limiter
                        .admit(&key.handle, &policies, cost)
                        .await
                        .unwrap();
                    if !decision.is_allowed() {
                        assert!(decision.violated().contains(Policy::Daily));
                        return admitted;
                    }
                    admitted += u64::from(cost.get());
                }
            }));
        }
        let mut admitted = 0;
        for task in tasks {
            admitted += task.await.unwrap();
        }
        assert_eq!(admitted, quota, "{costs:?}");
        limiter.drain().await;
        assert_eq!(ledger.used(), quota);
    }
}
