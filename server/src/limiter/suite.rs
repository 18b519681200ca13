//! The promise of [`LimitStore`](super::LimitStore), as tests that every store has to pass, and a ledger in
//! memory to run them on.

use std::{
    collections::HashMap,
    num::{NonZeroU32, NonZeroU64},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use quota_common::{ApiKeyId, TenantId};
use uuid::Uuid;

use super::{
    Account, Grant, LedgerUnavailable, Limiter, LimiterError, MemoryStore, Policies, Policy,
    QuotaLedger, Verdict,
};
use crate::clock::{TestClock, UnixNanos};

/// A ledger that outlives the limiters of a test, as PostgreSQL outlives a server.
#[derive(Debug, Default)]
pub(super) struct MemoryLedger {
    used: Mutex<HashMap<Account, u64>>,
    away: AtomicBool,
    asked: AtomicU64,
}

impl MemoryLedger {
    fn used(&self) -> u64 {
        self.used.lock().values().sum()
    }
}

#[async_trait]
impl QuotaLedger for MemoryLedger {
    async fn take(
        &self,
        account: Account,
        limit: u64,
        want: NonZeroU64,
    ) -> Result<Grant, LedgerUnavailable> {
        if self.away.load(Ordering::SeqCst) {
            return Err(LedgerUnavailable("away".into()));
        }
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut all = self.used.lock();
        let used = all.entry(account).or_default();
        let granted = want.get().min(limit.saturating_sub(*used));
        *used += granted;
        Ok(Grant {
            granted,
            used: *used,
        })
    }

    async fn give_back(
        &self,
        account: Account,
        amount: NonZeroU64,
    ) -> Result<(), LedgerUnavailable> {
        if self.away.load(Ordering::SeqCst) {
            return Err(LedgerUnavailable("away".into()));
        }
        *self
            .used
            .lock()
            .get_mut(&account)
            .expect("only what was granted comes back") -= amount.get();
        Ok(())
    }
}

const NOON: UnixNanos = UnixNanos::from_secs(1_785_758_400);

struct Fixture {
    clock: TestClock,
    ledger: Arc<MemoryLedger>,
    limiter: Limiter,
}

impl Fixture {
    fn new() -> Self {
        Self::on(Arc::new(MemoryLedger::default()), TestClock::at(NOON))
    }

    /// What a restart makes: a new limiter on the ledger of the old one.
    fn on(ledger: Arc<MemoryLedger>, clock: TestClock) -> Self {
        let store = MemoryStore::new(ledger.clone(), Arc::new(clock.clone()), 1000);
        let limiter = Limiter::new(Arc::new(store), Arc::new(clock.clone()));
        Self {
            clock,
            ledger,
            limiter,
        }
    }

    async fn ask(&self, policies: &Policies, cost: u32) -> super::Decision {
        let cell = self.limiter.cell(TenantId::NIL, key(1)).unwrap();
        self.limiter.admit(&cell, policies, cost).await.unwrap()
    }

    async fn admitted(&self, policies: &Policies, tries: u32) -> u32 {
        let mut admitted = 0;
        for _ in 0..tries {
            admitted += u32::from(self.ask(policies, 1).await.is_allowed());
        }
        admitted
    }
}

fn key(n: u128) -> ApiKeyId {
    ApiKeyId(Uuid::from_u128(n))
}

fn plan(rpm: u32, burst: u32) -> Policies {
    Policies::new(
        NonZeroU32::new(rpm).unwrap(),
        NonZeroU32::new(burst).unwrap(),
    )
}

fn violated(decision: &super::Decision) -> Vec<Policy> {
    match decision.verdict {
        Verdict::Allowed => vec![],
        Verdict::Denied { violated, .. } => violated.iter().collect(),
    }
}

#[tokio::test]
async fn a_denied_request_consumes_nothing_of_any_policy() {
    let limits = Fixture::new();
    let policies = plan(60, 5)
        .with_daily(NonZeroU64::new(3))
        .with_monthly(NonZeroU64::new(1000));
    for _ in 0..3 {
        assert!(limits.ask(&policies, 1).await.is_allowed());
    }
    let denied = limits.ask(&policies, 1).await;
    assert_eq!(violated(&denied), [Policy::Daily]);
    for _ in 0..20 {
        let again = limits.ask(&policies, 1).await;
        assert_eq!(again.states, denied.states);
    }
    assert_eq!(denied.rate().remaining, 2);
    assert_eq!(denied.state(Policy::Monthly).unwrap().remaining, 997);
}

#[tokio::test]
async fn a_denial_names_the_time_at_which_the_request_passes() {
    let limits = Fixture::new();
    let policies = plan(90, 2);
    assert_eq!(limits.admitted(&policies, 3).await, 2);
    let denied = limits.ask(&policies, 2).await;
    let Verdict::Denied {
        retry_at: Some(at), ..
    } = denied.verdict
    else {
        panic!("{denied:?}")
    };
    limits.clock.set_now(UnixNanos(at.0 - 1));
    assert!(!limits.ask(&policies, 2).await.is_allowed());
    limits.clock.set_now(at);
    assert!(limits.ask(&policies, 2).await.is_allowed());
}

#[tokio::test]
async fn all_violated_policies_are_named_and_the_longest_wait_is_told() {
    let limits = Fixture::new();
    let policies = plan(60, 2).with_daily(NonZeroU64::new(2));
    assert_eq!(limits.admitted(&policies, 2).await, 2);
    let denied = limits.ask(&policies, 1).await;
    assert_eq!(violated(&denied), [Policy::Rpm, Policy::Daily]);
    assert_eq!(denied.retry_after_secs(), Some(12 * 3600));
    assert_eq!(denied.nearest().0, Policy::Daily);
}

#[tokio::test]
async fn a_quota_begins_anew_with_its_window() {
    let limits = Fixture::new();
    let policies = plan(60_000, 1000).with_daily(NonZeroU64::new(150));
    assert_eq!(limits.admitted(&policies, 200).await, 150);
    limits.clock.advance(Duration::from_secs(12 * 3600 - 1));
    assert_eq!(limits.admitted(&policies, 1).await, 0);
    limits.clock.advance(Duration::from_secs(1));
    assert_eq!(limits.admitted(&policies, 200).await, 150);
}

#[tokio::test]
async fn a_cost_that_never_fits_is_denied_without_a_time() {
    let limits = Fixture::new();
    let policies = plan(600, 10).with_daily(NonZeroU64::new(5));
    let denied = limits.ask(&policies, 6).await;
    assert_eq!(violated(&denied), [Policy::Daily]);
    assert_eq!(denied.retry_after_secs(), None);
    let denied = limits.ask(&policies, 11).await;
    assert_eq!(violated(&denied), [Policy::Rpm, Policy::Daily]);
    assert!(limits.ask(&policies, 5).await.is_allowed());
}

#[tokio::test]
async fn a_changed_quota_counts_what_was_used_under_the_old_one() {
    let limits = Fixture::new();
    let wide = plan(60_000, 10_000).with_daily(NonZeroU64::new(1000));
    assert_eq!(limits.admitted(&wide, 300).await, 300);
    let narrow = plan(60_000, 10_000).with_daily(NonZeroU64::new(250));
    assert_eq!(limits.admitted(&narrow, 50).await, 0);
    let wider = plan(60_000, 10_000).with_daily(NonZeroU64::new(400));
    assert_eq!(limits.admitted(&wider, 200).await, 100);
}

#[tokio::test]
async fn a_changed_rate_hands_out_no_new_burst() {
    let limits = Fixture::new();
    assert_eq!(limits.admitted(&plan(60, 10), 20).await, 10);
    assert_eq!(limits.admitted(&plan(6000, 10), 20).await, 0);
    assert_eq!(limits.admitted(&plan(60, 15), 20).await, 5);
}

/// A quota of 1,000 through three restarts, one of them a crash: never more, and at most 1 % unserved.
#[tokio::test]
async fn a_quota_is_spent_exactly_once_through_restarts_and_a_crash() {
    let policies = plan(60_000_000, 60_000).with_daily(NonZeroU64::new(1000));
    let ledger = Arc::new(MemoryLedger::default());
    let mut served = 0;
    for (tries, crash) in [(123, false), (307, true), (211, false), (2000, false)] {
        let limits = Fixture::on(ledger.clone(), TestClock::at(NOON));
        served += limits.admitted(&policies, tries).await;
        tokio::task::yield_now().await;
        if !crash {
            limits.limiter.drain().await.unwrap();
            let cell = limits.limiter.cell(TenantId::NIL, key(1));
            assert!(matches!(cell, Err(LimiterError::Stopped)));
        }
    }
    assert!(served <= 1000, "{served} of 1000 served");
    assert!(served >= 990, "{served} of 1000 served");
}

#[tokio::test]
async fn a_clean_stop_gives_back_every_unspent_request() {
    for limit in [1_u64, 7, 99, 100, 1000, 1_000_000] {
        let limits = Fixture::new();
        let policies = plan(60_000_000, 1000)
            .with_daily(NonZeroU64::new(limit))
            .with_monthly(NonZeroU64::new(limit * 2));
        let admitted = limits.admitted(&policies, 37).await;
        limits.limiter.drain().await.unwrap();
        tokio::task::yield_now().await;
        assert_eq!(
            limits.ledger.used(),
            2 * u64::from(admitted),
            "limit {limit}"
        );
    }
}

#[tokio::test]
async fn a_stream_asks_the_ledger_once_a_block() {
    let limits = Fixture::new();
    let policies = plan(60_000_000, 60_000).with_monthly(NonZeroU64::new(100_000));
    assert_eq!(limits.admitted(&policies, 10_000).await, 10_000);
    let asked = limits.ledger.asked.load(Ordering::SeqCst);
    assert!(
        (10..=20).contains(&asked),
        "asked {asked} times for 10 blocks"
    );
}

#[tokio::test]
async fn without_the_ledger_nothing_is_admitted_on_credit() {
    let limits = Fixture::new();
    limits.ledger.away.store(true, Ordering::SeqCst);
    let policies = plan(600, 600).with_daily(NonZeroU64::new(1000));
    let cell = limits.limiter.cell(TenantId::NIL, key(1)).unwrap();
    let refused = limits.limiter.admit(&cell, &policies, 1).await;
    assert!(
        matches!(refused, Err(LimiterError::Ledger(_))),
        "{refused:?}"
    );
    assert!(
        limits.ask(&plan(600, 600), 1).await.is_allowed(),
        "a key without quotas does not need it"
    );

    limits.ledger.away.store(false, Ordering::SeqCst);
    assert_eq!(limits.admitted(&policies, 20).await, 20);
    limits.ledger.away.store(true, Ordering::SeqCst);
    // 30 were taken: a block of 10 and what followed. What is in hand is served, then no more.
    let mut served = 0;
    while let Ok(decision) = limits.limiter.admit(&cell, &policies, 1).await {
        assert!(decision.is_allowed());
        served += 1;
        assert!(served <= 10, "more than a hundredth was in hand");
    }
}

#[tokio::test]
async fn an_idle_key_gives_its_block_back_and_is_forgotten() {
    let limits = Fixture::new();
    let policies = plan(600, 600).with_daily(NonZeroU64::new(1000));
    assert!(limits.ask(&policies, 1).await.is_allowed());
    tokio::task::yield_now().await;
    assert_eq!(limits.limiter.prune().await, 1, "it is not at rest yet");
    limits.clock.advance(Duration::from_secs(61));
    assert_eq!(limits.limiter.prune().await, 0);
    assert_eq!(limits.ledger.used(), 1);
}

#[tokio::test]
async fn a_full_store_refuses_new_keys_and_keeps_the_old() {
    let clock = TestClock::at(NOON);
    let store = MemoryStore::new(
        Arc::new(MemoryLedger::default()),
        Arc::new(clock.clone()),
        3,
    );
    let limiter = Limiter::new(Arc::new(store), Arc::new(clock.clone()));
    for n in 0..3 {
        let cell = limiter.cell(TenantId::NIL, key(n)).unwrap();
        assert!(
            limiter
                .admit(&cell, &plan(60, 1), 1)
                .await
                .unwrap()
                .is_allowed()
        );
    }
    assert!(matches!(
        limiter.cell(TenantId::NIL, key(9)),
        Err(LimiterError::Full)
    ));
    let cell = limiter.cell(TenantId::NIL, key(1)).unwrap();
    assert!(
        !limiter
            .admit(&cell, &plan(60, 1), 1)
            .await
            .unwrap()
            .is_allowed()
    );
    drop(cell);
    clock.advance(Duration::from_secs(2));
    assert_eq!(limiter.prune().await, 0);
    assert!(limiter.cell(TenantId::NIL, key(9)).is_ok());
}

/// Eight tasks on two threads and one key: exactly the burst passes, and exactly the quota.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_requests_never_pass_a_limit_together() {
    for policies in [
        plan(1, 500),
        plan(60_000_000, 60_000).with_daily(NonZeroU64::new(500)),
        plan(60_000_000, 60_000).with_monthly(NonZeroU64::new(50)),
    ] {
        let expected = policies
            .daily
            .or(policies.monthly)
            .map_or(500, NonZeroU64::get);
        let limits = Arc::new(Fixture::new());
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let (limits, policies) = (limits.clone(), policies.clone());
            tasks.spawn(async move { limits.admitted(&policies, 200).await });
        }
        let admitted: u32 = tasks.join_all().await.into_iter().sum();
        assert_eq!(u64::from(admitted), expected);
    }
}
