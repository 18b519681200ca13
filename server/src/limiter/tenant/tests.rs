use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::{sync::oneshot, task::JoinSet, time};
use uuid::Uuid;

use super::*;
use crate::{
    clock::{SystemClock, TestClock, UnixNanos},
    limiter::{
        local::LocalStore,
        quota::{
            calendar::{QuotaWindow, window},
            ledger::{LedgerError, ReturnBatch, TakeRequest, Taken},
        },
        store::LimitStore,
    },
};

/// An in-memory ledger for one tenant. The keys of `used` are the starts of the windows.
#[derive(Debug, Default)]
struct Memory {
    used: Mutex<BTreeMap<UnixNanos, u64>>,
    /// How long each call takes.
    delay: Duration,
    /// The number of calls in progress, and its maximum.
    calls: AtomicUsize,
    most_calls: AtomicUsize,
}

impl Memory {
    fn used(&self) -> Vec<u64> {
        self.used.lock().values().copied().collect()
    }

    async fn work(&self) {
        let calls = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_calls.fetch_max(calls, Ordering::SeqCst);
        time::sleep(self.delay).await;
        self.calls.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl QuotaLedger for Memory {
    async fn take(&self, requests: &[TakeRequest]) -> Vec<Result<Taken, LedgerError>> {
        self.work().await;
        let mut used = self.used.lock();
        let take = |request: &TakeRequest| {
            let used = used.entry(request.calendar.start).or_default();
            let granted = request.want.min(request.limit - *used);
            *used += granted;
            Ok(Taken {
                window: QuotaWindow::whole(request.calendar),
                granted,
                used: *used,
            })
        };
        requests.iter().map(take).collect()
    }

    async fn give_back(&self, batch: &ReturnBatch) -> Result<(), LedgerError> {
        self.work().await;
        for (row, n) in &batch.rows {
            *self.used.lock().entry(row.window_start).or_default() -= n;
        }
        Ok(())
    }
}

/// 2026-11-30T23:59:59Z.
const END_OF_MONTH: UnixNanos = UnixNanos::from_secs(1_796_083_199);

struct World {
    quotas: TenantQuotas,
    quota: TenantQuota,
    store: Arc<LocalStore>,
    key: Arc<KeyHandle>,
    policies: Policies,
    ledger: Arc<Memory>,
    clock: TestClock,
}

impl World {
    fn new(limit: u64) -> Self {
        let clock = TestClock::at(END_OF_MONTH);
        let shared: Arc<dyn Clock> = Arc::new(clock.clone());
        let ledger = Arc::new(Memory::default());
        let limit = NonZeroU64::new(limit).unwrap();
        let settings = KeyTableSettings::default();
        let quotas = TenantQuotas::new(
            shared.clone(),
            ledger.clone(),
            settings.clone(),
            Arc::default(),
            limit,
        );
        let tenant = TenantId(Uuid::now_v7());
        let store = LocalStore::new(shared, Arc::new(Memory::default()), settings);
        let rate = RatePolicy {
            rpm: NonZeroU32::new(1).unwrap(),
            burst: NonZeroU32::new(1000).unwrap(),
        };
        Self {
            quota: quotas.of(tenant).unwrap(),
            quotas,
            key: store.handle(tenant, ApiKeyId(Uuid::now_v7())).unwrap(),
            store,
            policies: Policies::new(rate, None, None, Zone::utc(), false),
            ledger,
            clock,
        }
    }

    fn peek(&self) -> Decision {
        self.store.peek(&self.key, &self.policies)
    }

    async fn admit(&self, cost: u32) -> Decision {
        let cost = NonZeroU32::new(cost).unwrap();
        let decide = self.store.take(&self.key, &self.policies, cost);
        self.admit_with(cost, decide).await.unwrap()
    }

    async fn admit_with(
        &self,
        cost: NonZeroU32,
        decide: impl Future<Output = Result<Decision, LimiterError>>,
    ) -> Result<Decision, LimiterError> {
        let peek = || self.peek();
        self.quotas.admit(&self.quota, cost, peek, decide).await
    }

    /// Sends `begun` to report that the tokens have been reserved. Then waits for the outcome that the test sends, and
    /// returns a decision with this outcome.
    async fn decided(
        &self,
        begun: oneshot::Sender<()>,
        decision: oneshot::Receiver<Outcome>,
    ) -> Result<Decision, LimiterError> {
        begun.send(()).unwrap();
        let outcome = decision.await.unwrap();
        Ok(Decision {
            outcome,
            ..self.peek()
        })
    }
}

const DENIED: Outcome = Outcome::Denied {
    violated: PolicySet::EMPTY.with(Policy::Rpm),
    retry_after: NonZeroU64::new(1),
};

#[tokio::test]
async fn all_of_the_quota_is_admitted_and_no_more() {
    let world = World::new(100);
    let mut admitted = 0;
    for cost in [7, 1, 30, 2, 60, 1].into_iter().cycle().take(60) {
        let before = world.peek().rate.remaining;
        let decision = world.admit(cost).await;
        if decision.is_allowed() {
            admitted += cost;
            continue;
        }
        assert_eq!(
            decision.violated(),
            PolicySet::EMPTY.with(Policy::TenantMonthly)
        );
        assert_eq!(decision.nearest().policy, Policy::TenantMonthly);
        assert_eq!(
            world.peek().rate.remaining,
            before,
            "a denial costs nothing"
        );
    }
    assert_eq!(admitted, 100);
    let never = world.admit(101).await;
    assert_eq!((never.is_allowed(), never.retry_after()), (false, None));
}

#[tokio::test]
async fn last_token_is_available_again_if_the_key_is_denied() {
    let world = World::new(1);
    let (decide, decision) = oneshot::channel();
    let (begun, reserved) = oneshot::channel();
    let first = world.admit_with(NonZeroU32::MIN, world.decided(begun, decision));
    let second = async {
        reserved.await.unwrap();
        // This request waits for the outcome of the first request instead of being denied until the next month.
        let second = world.admit(1);
        tokio::pin!(second);
        for _ in 0..10 {
            assert!(futures_util::poll!(&mut second).is_pending());
            tokio::task::yield_now().await;
        }
        decide.send(DENIED).unwrap();
        second.await
    };
    let (first, second) = tokio::join!(first, second);
    let first = first.unwrap();
    assert_eq!(first.violated(), PolicySet::EMPTY.with(Policy::Rpm));
    assert!(second.is_allowed(), "{second:?}");
    assert!(!world.admit(1).await.is_allowed());
}

#[tokio::test]
async fn last_token_is_spent_once() {
    let world = World::new(1);
    let (decide, decision) = oneshot::channel();
    let (begun, reserved) = oneshot::channel();
    let first = world.admit_with(NonZeroU32::MIN, world.decided(begun, decision));
    let second = async {
        reserved.await.unwrap();
        let second = world.admit(1);
        tokio::pin!(second);
        assert!(futures_util::poll!(&mut second).is_pending());
        decide.send(Outcome::Allowed).unwrap();
        second.await
    };
    let (first, second) = tokio::join!(first, second);
    assert!(first.unwrap().is_allowed());
    assert_eq!(
        second.violated(),
        PolicySet::EMPTY.with(Policy::TenantMonthly)
    );
}

#[tokio::test]
async fn failed_or_canceled_decision_costs_nothing() {
    let world = World::new(1);
    let failed = async { Err(LimiterError::CountersUnavailable) };
    assert!(world.admit_with(NonZeroU32::MIN, failed).await.is_err());
    {
        let (_decide, decision) = oneshot::channel();
        let (begun, reserved) = oneshot::channel();
        let canceled = world.admit_with(NonZeroU32::MIN, world.decided(begun, decision));
        tokio::select! {
            _ = canceled => unreachable!("the request is not decided"),
            begun = reserved => begun.unwrap(),
        }
    }
    assert!(world.admit(1).await.is_allowed());
    assert!(!world.admit(1).await.is_allowed());
}

#[tokio::test]
async fn draining_returns_the_rest() {
    let world = World::new(1000);
    for _ in 0..5 {
        assert!(world.admit(1).await.is_allowed());
    }
    world.quotas.drain().await;
    assert_eq!(world.ledger.used(), [5]);
}

/// Two requests have each reserved one of the last two tokens, and a third request waits for both. When the first
/// request spends its token, the third request is denied without waiting for the second.
#[tokio::test]
async fn request_that_can_no_longer_get_enough_tokens_stops_waiting() {
    let world = World::new(2);
    let hold = || {
        let (decide, decision) = oneshot::channel();
        let (begun, reserved) = oneshot::channel();
        let request = world.admit_with(NonZeroU32::MIN, world.decided(begun, decision));
        (request, reserved, decide)
    };
    let (first, first_reserved, decide_first) = hold();
    let (second, second_reserved, decide_second) = hold();
    let third = async {
        first_reserved.await.unwrap();
        second_reserved.await.unwrap();
        let cost = NonZeroU32::new(2).unwrap();
        let decide = world.store.take(&world.key, &world.policies, cost);
        let third = world.admit_with(cost, decide);
        tokio::pin!(third);
        for _ in 0..10 {
            assert!(futures_util::poll!(&mut third).is_pending());
            tokio::task::yield_now().await;
        }
        // A request larger than the whole quota does not wait, and does not affect the waiting requests.
        let too_large = NonZeroU32::new(1000).unwrap();
        let decide = world.store.take(&world.key, &world.policies, too_large);
        let denied = world.admit_with(too_large, decide).await.unwrap();
        assert!(!denied.is_allowed());
        decide_first.send(Outcome::Allowed).unwrap();
        let third = third.await;
        decide_second.send(Outcome::Allowed).unwrap();
        third
    };
    let (first, second, third) = tokio::join!(first, second, third);
    assert!(first.unwrap().is_allowed() && second.unwrap().is_allowed());
    assert_eq!(
        third.unwrap().violated(),
        PolicySet::EMPTY.with(Policy::TenantMonthly)
    );
}

/// A month ends while a request is in progress, and the quota of the next month may already be exhausted. The request's
/// tokens are taken from the quota of the month in which the request arrived.
#[tokio::test]
async fn request_at_the_end_of_a_month_is_charged_if_and_only_if_it_is_allowed() {
    for is_next_exhausted in [false, true] {
        let world = World::new(5);
        let next = window(Policy::Monthly, &Zone::utc(), world.clock.now()).end;
        if is_next_exhausted {
            world.ledger.used.lock().insert(next, 5);
        }
        let before = world.peek().rate.remaining;
        let cost = NonZeroU32::new(2).unwrap();
        let decide = async {
            let decision = world.store.take(&world.key, &world.policies, cost).await;
            world.clock.advance(Duration::from_secs(1));
            decision
        };
        let decision = world.admit_with(cost, decide).await.unwrap();
        assert!(decision.is_allowed(), "{decision:?}");
        assert_eq!(world.peek().rate.remaining, before - 2);
        world.quotas.drain().await;
        let of_next = if is_next_exhausted { 5 } else { 0 };
        let used = world.ledger.used();
        assert_eq!((used[0], used.get(1).map_or(0, |n| *n)), (2, of_next));
    }
}

/// The tables of keys and of tenants share connections. Together, the tables never make more concurrent ledger calls
/// than there are connections, and a call of one table does not wait until the other table is idle.
#[tokio::test(start_paused = true)]
async fn key_tables_share_the_connections_to_the_ledger() {
    const KEYS: u32 = 3000;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let ledger = Arc::new(Memory {
        delay: Duration::from_millis(100),
        ..Memory::default()
    });
    // In this ledger, all keys share one row, and so do all tenants, so the quota has to be large.
    let quota = NonZeroU64::new(1_000_000_000);
    let settings = KeyTableSettings {
        ledger_deadline: Duration::from_secs(60),
        ..KeyTableSettings::default()
    };
    let quotas = TenantQuotas::new(
        clock.clone(),
        ledger.clone(),
        settings.clone(),
        Arc::default(),
        quota.unwrap(),
    );
    let (quotas, store) = (
        Arc::new(quotas),
        LocalStore::new(clock, ledger.clone(), settings),
    );
    let rate = RatePolicy {
        rpm: NonZeroU32::MIN,
        burst: NonZeroU32::MIN,
    };
    let policies = Policies::new(rate, quota, None, Zone::utc(), false);
    let began = time::Instant::now();
    let mut requests = JoinSet::new();
    for _ in 0..KEYS {
        let (store, policies) = (store.clone(), policies.clone());
        let tenant = TenantId(Uuid::now_v7());
        let key = store.handle(tenant, ApiKeyId(Uuid::now_v7())).unwrap();
        requests.spawn(async move { store.take(&key, &policies, NonZeroU32::MIN).await });
    }
    time::sleep(Duration::from_millis(150)).await;
    let asked = time::Instant::now();
    let mut tenants = JoinSet::new();
    for _ in 0..150 {
        let (quotas, quota) = (quotas.clone(), quotas.of(TenantId(Uuid::now_v7())).unwrap());
        let key = store
            .handle(TenantId(Uuid::now_v7()), ApiKeyId(Uuid::now_v7()))
            .unwrap();
        let decided = store.peek(&key, &policies);
        tenants.spawn(async move {
            let decide = async { Ok(decided) };
            quotas
                .admit(&quota, NonZeroU32::MIN, || decided, decide)
                .await
        });
    }
    for decision in tenants.join_all().await {
        assert!(decision.unwrap().is_allowed());
    }
    let waited = asked.elapsed();
    assert!(waited <= Duration::from_millis(600), "{waited:?}");
    for decision in requests.join_all().await {
        assert!(decision.unwrap().is_allowed());
    }
    let all = began.elapsed();
    assert!(all > 2 * waited, "the keys took only {all:?}");
    tokio::join!(store.drain(), quotas.drain());
    let most = ledger.most_calls.load(Ordering::SeqCst);
    assert_eq!(most, 3, "concurrent calls");
}
