//! The distributed store: buckets that all replicas share, tokens taken from them in advance, and decisions without
//! them.
//!
//! Decides when to call the shared counters. Calendar quotas are blocks from the ledger, as in the local store, sized
//! so that all replicas together hold one block. Does not depend on Redis: the counters are a trait
//! ([`SharedCounters`]), implemented by a script in Redis and, in the simulation, by a model of it.
//!
//! ```text
//! tokens held here      ─ spend, no I/O
//! none                  ─ one call for all requests of the key that wait: what they need, in full, and for a busy
//!                         key a lease for later, which is renewed ahead of need
//! counters unavailable  ─ share | open | closed
//! ```
//!
//! **Guarantees.** In any window of `T` seconds, all replicas together admit at most `burst + rate · (T + ttl)`, or at
//! most `burst + rate · T` if the counters decide every request ([`lease`](crate::limiter::rate::lease) has the
//! argument). Calendar quotas are exact: the ledger counts a token before it is spent. The full burst of an idle
//! bucket, sent to one replica at the same time, is admitted in at most two round trips.
//!
//! **Deadlines.** A call without a timely response counts as failed. A decision waits for at most two deadlines: for the
//! call in flight when it arrives and the next one, or for a late response. Then it is made without the counters. A
//! decision also waits for at most two calls to the ledger. A request's quota tokens are reserved before its rate is
//! taken, so that no rate tokens are taken for a request that the quota then denies.
//!
//! **While the counters are unavailable** ([`breaker`] decides when), a replica follows the plan's fallback setting.
//! With `Share`, it uses a separate bucket of `burst / replicas` and `rate / replicas`, which starts *empty* shortly
//! after the start of the outage. All shares together are one bucket that starts empty, so that they stay within the
//! envelope together with the tokens taken before. With `Open`, each replica enforces the whole limit in a separate
//! bucket that starts full. With `Closed`, nothing is admitted. A denial then names no violated policy, since it is
//! unknown whether the limit was reached.
//!
//! **When they are available again**, they do not know which requests were allowed without them, and may have lost
//! their state. So after a loss of state, or an outage in which no replica got a response, they start a *new epoch* at
//! a single moment on their own clock, slightly in the future, with every bucket empty. Until then, all replicas decide
//! as during an outage. If only one replica had the outage, it simply resumes. A replica that is starting cannot know
//! whether others have an outage. If no replica got a response for 0.8 s, it starts a new epoch as well, unless all
//! others have only just started too. (This does not apply to a cluster, whose partitions may be idle for a long time.)
//!
//! **Edits.** An edit does not change the number of missing tokens. If a smaller burst cannot hold all of them, the
//! rest is missing again when the burst is raised, less what would have refilled while the bucket was full. A bucket
//! learns of an edit with the first request after it, but not when the edit was made. So it counts as having refilled
//! at the lower of the two rates since the previous request. A bucket that was idle for a minute plus twice the time
//! after which it was full is deleted, and is full under any plan. After a loss of state, a larger burst contains no
//! more than what has refilled since then.
//!
//! **Not guaranteed.** While only some replicas have an outage, `Share` allows their share `p` of the bucket in addition
//! to what the counters grant: at most `(1 + p) * (burst + rate * (T + ttl))`. Here, `p` is the sum of their parts of the
//! burst, each of which is a whole number of tokens: with a burst of 1, one replica has all of it. This includes the
//! start of a new epoch, if the first call of a replica fails while those of others succeed. `Closed` allows no
//! additional requests. This does not apply to an outage of all replicas that is too short for some of them to detect:
//! shares begin to fill only when it would be over or detected by all. In a cluster, it does apply to replicas that did not use the partition: they do not detect its outage.

mod breaker;
mod calls;
pub(super) mod core;
mod decide;
mod lease_fetch;
mod probe;
mod redis;

use std::{
    num::NonZeroU32,
    sync::{Arc, Weak, atomic::AtomicBool},
};

use async_trait::async_trait;
use quota_common::{
    id::{ApiKeyId, TenantId},
    plan::OnRedisFailure,
};
use tokio::runtime::Handle;

pub use self::redis::RedisCounters;
use self::{
    breaker::CircuitBreaker,
    core::{DistributedSettings, StoreCore},
    decide::{LocalOutcome, decision},
};
use super::{
    decision::{Decision, Outcome},
    error::LimiterError,
    key::{handle::KeyHandle, ledger_calls::Drained, table::KeyTable},
    limits::Policies,
    membership::Membership,
    quota::ledger::QuotaLedger,
    rate::counters::{CounterError, SharedCounters},
    store::LimitStore,
};
use crate::{
    clock::{Clock, Nanos},
    telemetry::metrics::Metrics,
};

/// Limits that all replicas share.
#[derive(Debug)]
pub struct DistributedStore(Arc<StoreCore>);

impl DistributedStore {
    /// Also starts the task that sends heartbeats. The task ends with the store.
    pub fn new(
        clock: Arc<dyn Clock>,
        ledger: Arc<dyn QuotaLedger>,
        counters: Arc<dyn SharedCounters>,
        membership: Arc<Membership>,
        metrics: Arc<Metrics>,
        settings: DistributedSettings,
    ) -> Arc<Self> {
        let now = clock.monotonic();
        let inner = Arc::new_cyclic(|me| StoreCore {
            keys: KeyTable::new(
                Arc::clone(&clock),
                ledger,
                settings.keys.clone(),
                Arc::clone(&membership),
            ),
            partitions: (0..counters.partitions().max(1))
                .map(|_| CircuitBreaker::new(now))
                .collect(),
            draining: AtomicBool::new(false),
            counters,
            clock,
            membership,
            metrics,
            ttl: settings.lease_ttl.into(),
            settings,
            me: Weak::clone(me),
        });
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(probe::send_heartbeats(Weak::clone(&inner.me)));
        }
        Arc::new(Self(inner))
    }

    /// Returns whether there is an outage in any partition.
    pub fn is_degraded(&self) -> bool {
        self.0.partitions.iter().any(CircuitBreaker::is_away)
    }
}

#[async_trait]
impl LimitStore for DistributedStore {
    fn handle(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyHandle>, LimiterError> {
        self.0.keys.handle(tenant, key)
    }

    #[inline]
    fn try_take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision> {
        match self.0.decide_locally(handle, policies, cost, None) {
            Ok(LocalOutcome::Done(decision)) => Some(decision),
            Ok(LocalOutcome::Fetch) if self.0.partition(handle).is_away() => {
                let on_failure = policies.on_failure().unwrap_or(self.0.settings.on_failure);
                // A denial that is still known says more than the failure without the counters.
                if on_failure == OnRedisFailure::Closed {
                    return None;
                }
                self.0.without_counters(handle, policies, cost, None).ok()?
            }
            _ => None,
        }
    }

    async fn take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        self.0.take(handle, policies, cost).await
    }

    fn peek(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        let (mut state, now) = self.0.keys.current(handle, policies);
        let now = self.0.moment(now);
        decision(&mut state, policies, now, Outcome::Allowed)
    }

    async fn inspect(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        let debt = self
            .0
            .look_up_debt(handle, policies.terms(self.0.ttl))
            .await;
        let (mut state, now) = self.0.keys.current(handle, policies);
        match debt {
            Some(debt) => state.decision_with(
                policies,
                now,
                Outcome::Allowed,
                decide::rate(policies, now, debt),
            ),
            None => decision(&mut state, policies, self.0.moment(now), Outcome::Allowed),
        }
    }

    fn is_local(&self) -> bool {
        false
    }

    fn prune(&self) -> usize {
        self.0.keys.prune()
    }

    fn denial_memory(&self, policies: &Policies) -> Option<Nanos> {
        let leased = self.0.ttl > Nanos::ZERO && !policies.strict();
        leased.then(|| self.0.ttl.saturating_mul(calls::DENIED_FOR_LEASES))
    }

    async fn delete(&self, keys: &[(TenantId, ApiKeyId)]) -> Result<(), CounterError> {
        self.0.keys.delete(keys);
        self.0.delete_buckets(keys).await
    }

    async fn drain(&self) -> Drained {
        let (drained, ()) = tokio::join!(self.0.keys.drain(), self.0.return_leases());
        drained
    }
}
