//! Errors that are planted on purpose. The simulation must detect each of these errors. Otherwise, a simulation without
//! violations would prove nothing.

use std::{
    collections::HashMap,
    num::{NonZeroU32, NonZeroU64},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use parking_lot::Mutex;
use quota_common::{
    id::{ApiKeyId, TenantId},
    plan::OnRedisFailure,
};
use quota_server::limiter::{
    BucketName, CounterError, CounterMicros, Decision, DistributedStore, KeyHandle, LimitStore,
    LimiterError, Outcome, Policies, Policy, PolicySet, ReturnedQuota, TakeCall,
};
use tokio::time::Instant;

use super::judge::Guarantee;
use crate::limiter_contract::TestLedger;

/// The kinds of planted errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plant {
    Nothing,
    /// No error: all replicas share one exact bucket without latency.
    OneBucket,
    AdmitsAll,
    DeniesAll,
    /// Serves at most 20 requests that wait for Redis at the same time, and denies the others as if the limit were
    /// exceeded.
    RefusesCrowds,
    /// A denial is repeated for a number of seconds, regardless of what Redis would decide.
    RemembersDenials(u64),
    /// After every ten admissions that waited for Redis, a request is admitted without taking tokens, as if a lease
    /// were spent twice.
    SpendsTwice,
    /// Each replica has its own counters.
    SharesNothing,
    /// Returned tokens are credited in full, regardless of how much the bucket has refilled in the meantime.
    ReturnsInFull,
    ReturnsTwice,
    /// Returned tokens are lost.
    ReturnsNothing,
    /// After an edit of its plan, a key gets a new bucket.
    FreshAfterEdit,
    /// After a loss of state, buckets are full.
    FullAfterLoss,
    /// A promise never expires: a replica that was promised a new epoch may use this epoch at any later time.
    PromiseNeverExpires,
    /// An edit fills the share that a replica admits without Redis.
    FreshShareAfterEdit,
    /// With `open`, every request that is decided without Redis is admitted.
    OpenWithoutLimit,
    /// With `open`, some requests are admitted without Redis, although Redis responds.
    OpenWithoutOutage,
    /// Without Redis, requests on plans with the given fallback setting are denied.
    DeniesWithoutRedis(OnRedisFailure),
    /// Without Redis, every other request on plans with the given fallback setting is denied.
    HalvesWithoutRedis(OnRedisFailure),
    /// Replicas do not confirm the responses that they received.
    ConfirmsNothing,
    /// Each replica has its own ledger of quotas.
    OwnLedgers,
    /// Only half of each quota is admitted.
    HalfQuotas,
    /// Returned quota tokens are lost.
    ReturnsNoQuota,
    /// Redis loses its state each time it has been slow for a moment.
    LosesStateWhenSlow,
    /// A denial always states the shortest possible wait.
    ForgetsWaits,
    /// A denial states ten times the wait, plus a second.
    ProlongsWaits,
}

impl Plant {
    /// The errors that must be detected, with the guarantees they break and the number of seeds within which they must
    /// be found.
    pub(super) const ALL: &[(Self, Guarantee, u64)] = &[
        (Self::AdmitsAll, Guarantee::Upper, 20),
        (Self::DeniesAll, Guarantee::Lower, 20),
        (Self::RefusesCrowds, Guarantee::Lower, 100),
        (Self::RemembersDenials(60), Guarantee::Lower, 100),
        (Self::SpendsTwice, Guarantee::Upper, 100),
        (Self::SharesNothing, Guarantee::Upper, 50),
        (Self::ReturnsInFull, Guarantee::Upper, 1000),
        (Self::ReturnsTwice, Guarantee::Upper, 1000),
        (Self::ReturnsNothing, Guarantee::Lower, 400),
        (Self::FreshAfterEdit, Guarantee::Upper, 400),
        (Self::FullAfterLoss, Guarantee::Upper, 400),
        (Self::PromiseNeverExpires, Guarantee::Upper, 400),
        (Self::FreshShareAfterEdit, Guarantee::Upper, 400),
        (Self::OpenWithoutLimit, Guarantee::Upper, 400),
        (Self::OpenWithoutOutage, Guarantee::Connected, 100),
        (
            Self::DeniesWithoutRedis(OnRedisFailure::Open),
            Guarantee::Outage,
            200,
        ),
        (
            Self::DeniesWithoutRedis(OnRedisFailure::Share),
            Guarantee::Outage,
            200,
        ),
        (
            Self::HalvesWithoutRedis(OnRedisFailure::Open),
            Guarantee::Outage,
            400,
        ),
        (
            Self::HalvesWithoutRedis(OnRedisFailure::Share),
            Guarantee::Outage,
            400,
        ),
        (Self::ConfirmsNothing, Guarantee::Connected, 400),
        (Self::ConfirmsNothing, Guarantee::Lower, 1000),
        (Self::LosesStateWhenSlow, Guarantee::Lower, 400),
        (Self::ForgetsWaits, Guarantee::Wait, 400),
        (Self::ProlongsWaits, Guarantee::Wait, 20),
    ];

    /// Returns the call that reaches Redis when a replica makes `call`.
    pub(super) fn call(self, call: TakeCall, now: u64) -> TakeCall {
        match (self, call.bucket) {
            (Self::ReturnsInFull, _) if call.back > 0 => TakeCall {
                back_taken_at: CounterMicros(now),
                ..call
            },
            (Self::ReturnsNothing, _) => TakeCall { back: 0, ..call },
            (Self::ConfirmsNothing, _) => TakeCall {
                last_heard: CounterMicros::NONE,
                ..call
            },
            (Self::FreshAfterEdit, BucketName::Key(tenant, key)) => {
                let edited = key.0.as_u128() + (u128::from(call.version) << 32);
                TakeCall {
                    bucket: BucketName::Key(tenant, ApiKeyId(uuid::Uuid::from_u128(edited))),
                    ..call
                }
            }
            _ => call,
        }
    }

    /// Returns the ledger that a replica uses.
    pub(super) fn ledger(self, shared: &Arc<TestLedger>) -> Arc<TestLedger> {
        match self {
            Self::OwnLedgers => TestLedger::new(),
            _ => Arc::clone(shared),
        }
    }

    pub(super) fn quota(self, quota: Option<NonZeroU64>) -> Option<NonZeroU64> {
        match self {
            Self::HalfQuotas => quota.and_then(|it| NonZeroU64::new(it.get().div_ceil(2))),
            _ => quota,
        }
    }

    pub(super) fn store(self, store: Arc<DistributedStore>) -> Arc<dyn LimitStore> {
        match self {
            Self::AdmitsAll
            | Self::DeniesAll
            | Self::RefusesCrowds
            | Self::RemembersDenials(_)
            | Self::SpendsTwice
            | Self::OpenWithoutLimit
            | Self::OpenWithoutOutage
            | Self::DeniesWithoutRedis(_)
            | Self::HalvesWithoutRedis(_)
            | Self::ForgetsWaits
            | Self::ProlongsWaits
            | Self::FreshShareAfterEdit => Arc::new(Planted {
                plant: self,
                store,
                waiting: AtomicU64::new(0),
                denied: Mutex::new(None),
                admitted: AtomicU64::new(0),
                shares: Mutex::default(),
            }),
            _ => store,
        }
    }
}

/// A store with a planted error in front of it.
#[derive(Debug)]
struct Planted {
    plant: Plant,
    store: Arc<DistributedStore>,
    waiting: AtomicU64,
    denied: Mutex<Option<Instant>>,
    admitted: AtomicU64,
    /// For each key, the version of the plan with which the key's share was last filled, and the tokens left in the
    /// share.
    shares: Mutex<HashMap<ApiKeyId, (u64, u32)>>,
}

impl Planted {
    fn allowed(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        Decision {
            outcome: Outcome::Allowed,
            degraded: false,
            ..self.store.peek(handle, policies)
        }
    }

    /// Takes one of the tokens that an edit has wrongly granted, and returns whether one was left.
    fn takes_fresh(&self, handle: &KeyHandle, policies: &Policies) -> bool {
        let mut shares = self.shares.lock();
        let (version, left) = shares.entry(handle.key()).or_insert((1, 0));
        if *version != policies.version() {
            (*version, *left) = (policies.version(), policies.rate().burst.get() / 3);
        }
        let takes = *left > 0;
        *left -= u32::from(takes);
        takes
    }

    fn with_other_wait(&self, decision: Decision) -> Decision {
        let Outcome::Denied {
            violated,
            retry_after: Some(wait),
        } = decision.outcome
        else {
            return decision;
        };
        let wait = match self.plant {
            Plant::ForgetsWaits => 1,
            Plant::ProlongsWaits => wait.get() * 10 + 1_000_000_000,
            _ => wait.get(),
        };
        let outcome = Outcome::Denied {
            violated,
            retry_after: NonZeroU64::new(wait),
        };
        Decision {
            outcome,
            ..decision
        }
    }

    /// Returns the decision. With some of the planted errors, returns a denial instead if the request was admitted
    /// without Redis.
    fn without_redis(&self, decision: Decision, policies: &Policies) -> Decision {
        let denies = match self.plant {
            Plant::DeniesWithoutRedis(choice) => policies.on_failure() == Some(choice),
            Plant::HalvesWithoutRedis(choice) => {
                policies.on_failure() == Some(choice)
                    && decision.degraded
                    && self
                        .admitted
                        .fetch_add(1, Ordering::Relaxed)
                        .is_multiple_of(2)
            }
            _ => false,
        };
        if !denies || !decision.degraded || !decision.is_allowed() {
            return decision;
        }
        Decision {
            outcome: Outcome::Denied {
                violated: PolicySet::EMPTY,
                retry_after: NonZeroU64::new(1_000_000_000),
            },
            ..decision
        }
    }

    fn denied(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        Decision {
            outcome: Outcome::Denied {
                violated: PolicySet::EMPTY.with(Policy::Rpm),
                retry_after: NonZeroU64::new(1_000_000_000),
            },
            degraded: false,
            ..self.store.peek(handle, policies)
        }
    }
}

#[async_trait]
impl LimitStore for Planted {
    fn handle(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyHandle>, LimiterError> {
        self.store.handle(tenant, key)
    }

    fn try_take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision> {
        match self.plant {
            Plant::AdmitsAll => return Some(self.allowed(handle, policies)),
            Plant::DeniesAll => return Some(self.denied(handle, policies)),
            Plant::RemembersDenials(seconds) => {
                let denied = *self.denied.lock();
                if denied.is_some_and(|at| at.elapsed().as_secs() < seconds) {
                    return Some(self.denied(handle, policies));
                }
            }
            Plant::SpendsTwice if self.admitted.load(Ordering::Relaxed) >= 10 => {
                self.admitted.store(0, Ordering::Relaxed);
                return Some(self.allowed(handle, policies));
            }
            Plant::OpenWithoutOutage
                if policies.on_failure() == Some(OnRedisFailure::Open)
                    && self.admitted.load(Ordering::Relaxed) >= 10 =>
            {
                self.admitted.store(0, Ordering::Relaxed);
                return Some(Decision {
                    degraded: true,
                    ..self.allowed(handle, policies)
                });
            }
            _ => {}
        }
        let decision = self.store.try_take(handle, policies, cost);
        decision.map(|it| self.without_redis(self.with_other_wait(it), policies))
    }

    async fn take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        if self.plant == Plant::RefusesCrowds && self.waiting.load(Ordering::Relaxed) >= 20 {
            return Ok(self.denied(handle, policies));
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let decision = self.store.take(handle, policies, cost).await;
        let decision = decision.map(|it| self.without_redis(self.with_other_wait(it), policies));
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        if self.plant == Plant::FreshShareAfterEdit
            && let Ok(denied) = &decision
            && denied.degraded
            && !denied.is_allowed()
            && self.takes_fresh(handle, policies)
        {
            return Ok(Decision {
                outcome: Outcome::Allowed,
                ..*denied
            });
        }
        if self.plant == Plant::OpenWithoutLimit
            && policies.on_failure() == Some(OnRedisFailure::Open)
            && let Ok(denied) = &decision
            && denied.degraded
        {
            return Ok(Decision {
                outcome: Outcome::Allowed,
                ..*denied
            });
        }
        match &decision {
            Ok(decision)
                if decision.is_allowed() && !matches!(self.plant, Plant::HalvesWithoutRedis(_)) =>
            {
                self.admitted.fetch_add(1, Ordering::Relaxed);
            }
            Ok(_) => *self.denied.lock() = Some(Instant::now()),
            Err(_) => {}
        }
        decision
    }

    fn peek(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        self.store.peek(handle, policies)
    }

    /// Prevents the use of a denial cache in front of the store, because the cache could hide the error.
    fn is_local(&self) -> bool {
        true
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
