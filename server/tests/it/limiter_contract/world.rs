//! A limiter with a test clock and a test ledger.

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use quota_common::{
    id::{ApiKeyId, TenantId},
    plan::OnRedisFailure,
};
use quota_server::{
    clock::{Clock, TestClock, UnixNanos},
    limiter::{
        CounterError, Decision, DistributedSettings, DistributedStore, KeyHandle, KeyTableSettings,
        LimitStore, Limiter, LimiterError, LocalStore, Membership, Policies, RatePolicy,
        ReplicaSlot, ReturnedQuota, Zone,
    },
};

use quota_testkit::redis::RedisServer;

use super::ledger::TestLedger;
use crate::limiter_shared::{ClockedCounters, started};

/// 2026-11-24T10:00:00Z, a Tuesday.
pub(crate) const START: UnixNanos = UnixNanos::from_secs(1_795_514_400);
pub(super) const ONE: NonZeroU32 = NonZeroU32::MIN;

/// How long draining waits for the ledger.
pub(super) const DRAIN_DEADLINE: Duration = Duration::from_secs(2);

/// How long a request waits for the ledger in these tests.
pub(super) const DEADLINE: Duration = Duration::from_millis(200);

type SetUp = Box<dyn Fn(&TestClock, &Arc<TestLedger>) -> Arc<dyn LimitStore>>;

pub(super) struct World {
    pub(super) clock: TestClock,
    pub(super) ledger: Arc<TestLedger>,
    set_up: SetUp,
}

impl World {
    fn new(set_up: impl Fn(&TestClock, &Arc<TestLedger>) -> Arc<dyn LimitStore> + 'static) -> Self {
        Self {
            clock: TestClock::at(START),
            ledger: TestLedger::new(),
            set_up: Box::new(set_up),
        }
    }

    /// Starts a replica.
    pub(super) fn start(&self) -> Limiter {
        let store = (self.set_up)(&self.clock, &self.ledger);
        Limiter::new(store, Arc::new(self.clock.clone()))
    }

    pub(super) fn advance(&self, by: Duration) {
        self.clock.advance(by);
    }

    pub(super) fn now(&self) -> UnixNanos {
        self.clock.now()
    }
}

pub(super) fn memory() -> World {
    World::new(|clock, ledger| memory_store(clock, ledger))
}

pub(super) fn far() -> World {
    World::new(|clock, ledger| Far::new(memory_store(clock, ledger)))
}

/// Returns a world whose buckets are in a private Redis server, which uses the test's clock and decides every request.
pub(super) async fn redis() -> (World, RedisServer) {
    let (server, redis) = started().await;
    ClockedCounters::new(&redis, &TestClock::at(START))
        .begin()
        .await;
    let world = World::new(move |clock, ledger| {
        let membership = Arc::new(Membership::default());
        let only = ReplicaSlot {
            rank: 0,
            of: NonZeroU64::MIN,
        };
        membership.confirm(only, clock.monotonic());
        DistributedStore::new(
            Arc::new(clock.clone()),
            Arc::clone(ledger) as _,
            ClockedCounters::new(&redis, clock),
            membership,
            Arc::default(),
            DistributedSettings {
                lease_ttl: Duration::ZERO,
                deadline: Duration::from_secs(5),
                on_failure: OnRedisFailure::Closed,
                keys: key_settings(),
            },
        )
    });
    (world, server)
}

pub(super) fn memory_store(clock: &TestClock, ledger: &Arc<TestLedger>) -> Arc<LocalStore> {
    LocalStore::new(
        Arc::new(clock.clone()),
        Arc::clone(ledger) as _,
        key_settings(),
    )
}

fn key_settings() -> KeyTableSettings {
    KeyTableSettings {
        ledger_deadline: DEADLINE,
        drain_deadline: DRAIN_DEADLINE,
        ..KeyTableSettings::default()
    }
}

/// A store that claims to be remote and counts calls.
#[derive(Debug)]
pub(super) struct Far {
    store: Arc<LocalStore>,
    asked: AtomicU64,
}

impl Far {
    pub(super) fn new(store: Arc<LocalStore>) -> Arc<Self> {
        Arc::new(Self {
            store,
            asked: AtomicU64::new(0),
        })
    }

    pub(super) fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl LimitStore for Far {
    fn handle(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyHandle>, LimiterError> {
        self.store.handle(tenant, key)
    }

    fn try_take(&self, _: &Arc<KeyHandle>, _: &Policies, _: NonZeroU32) -> Option<Decision> {
        // No tokens are available locally.
        None
    }

    async fn take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.store.take(handle, policies, cost).await
    }

    fn peek(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        self.store.peek(handle, policies)
    }

    fn is_local(&self) -> bool {
        false
    }

    fn prune(&self) -> usize {
        self.store.prune()
    }

    async fn delete(&self, keys: &[(TenantId, ApiKeyId)]) -> Result<(), CounterError> {
        self.store.delete(keys).await
    }

    async fn drain(&self) -> ReturnedQuota {
        self.store.drain().await
    }
}

/// A builder for the policies of a test.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) rpm: u32,
    pub(super) burst: u32,
    pub(super) daily: u64,
    pub(super) monthly: u64,
    pub(super) zone: &'static str,
}

impl Plan {
    pub(super) fn rate(rpm: u32, burst: u32) -> Self {
        Self {
            rpm,
            burst,
            daily: 0,
            monthly: 0,
            zone: "UTC",
        }
    }

    /// Returns a plan with a rate that never limits.
    pub(super) fn any_rate() -> Self {
        Self::rate(60_000_000, 60_000_000)
    }

    pub(super) fn daily(self, daily: u64) -> Self {
        Self { daily, ..self }
    }

    pub(super) fn monthly(self, monthly: u64) -> Self {
        Self { monthly, ..self }
    }

    pub(super) fn zone(self, zone: &'static str) -> Self {
        Self { zone, ..self }
    }

    pub(super) fn policies(&self) -> Policies {
        Policies::new(
            RatePolicy {
                rpm: NonZeroU32::new(self.rpm).unwrap(),
                burst: NonZeroU32::new(self.burst).unwrap(),
            },
            NonZeroU64::new(self.daily),
            NonZeroU64::new(self.monthly),
            Zone::named(self.zone).unwrap(),
            false,
        )
    }
}

/// A key on a replica.
pub(super) struct Key {
    pub(super) limiter: Limiter,
    pub(super) handle: Arc<KeyHandle>,
}

impl Key {
    /// Returns key `n`. The number identifies the same key after a restart.
    pub(super) fn number(limiter: &Limiter, n: u128) -> Self {
        let tenant = TenantId(uuid::Uuid::from_u128(1));
        let key = ApiKeyId(uuid::Uuid::from_u128(n));
        Self {
            limiter: limiter.clone(),
            handle: limiter.handle(tenant, key).unwrap(),
        }
    }

    pub(super) fn of(limiter: &Limiter) -> Self {
        Self::number(limiter, 7)
    }

    pub(super) async fn ask(&self, plan: &Plan, cost: u32) -> Decision {
        self.try_ask(plan, cost).await.unwrap()
    }

    pub(super) async fn try_ask(&self, plan: &Plan, cost: u32) -> Result<Decision, LimiterError> {
        let cost = NonZeroU32::new(cost).unwrap();
        self.limiter
            .admit(&self.handle, &plan.policies(), cost)
            .await
    }

    /// Returns how many of `tries` consecutive requests are allowed.
    pub(super) async fn admitted(&self, plan: &Plan, tries: u32) -> u64 {
        let policies = plan.policies();
        let mut admitted = 0;
        for _ in 0..tries {
            let decision = self.limiter.admit(&self.handle, &policies, ONE).await;
            admitted += u64::from(decision.unwrap().is_allowed());
        }
        admitted
    }
}

/// Waits for background work to complete.
pub(super) async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}
