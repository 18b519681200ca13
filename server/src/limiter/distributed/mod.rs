//! The distributed store: buckets that all replicas share, leases, and decisions during an outage.
//!
//! The store decides when to call the shared counters. Calendar quotas use blocks from the ledger, as in the local
//! store. The blocks of all replicas together are no larger than one block in the local store, except that each block
//! has at least one token. This module does not depend on Redis: the counters are a trait ([`SharedCounters`]),
//! implemented by a script in Redis and, in simulation tests, by a model of that script.
//!
//! ```text
//! local tokens          ─ spend them, no I/O
//! too few local tokens  ─ one call for all waiting requests of the key. It takes all the tokens they need and, for a
//!                         busy key, a lease, which is renewed before it runs out
//! counters unavailable  ─ share | open | closed
//! ```
//!
//! **Guarantees.** In any window of `T` seconds, all replicas together allow at most `burst + rate · (T + ttl)`. If the
//! counters decide every request, the bound is `burst + rate · T`. ([`lease`](crate::limiter::rate::lease) explains
//! why.) Calendar quotas are exact: the ledger counts a token before it is spent. If a client sends the entire burst of
//! an idle key to one replica at the same time, the requests are allowed after at most two round trips to the counters.
//!
//! **Deadlines.** For the circuit breaker, a late response is a failure. A request waits for at most twice
//! the deadline: for the call that is in flight when the request arrives and then for the next call, or for a late
//! response. After that, the request is decided without the counters. A request also waits for at most two calls to the
//! ledger. Its quota tokens are reserved before its rate tokens are taken, so that no rate tokens are taken for a
//! request that the quota then denies. If the quota's window ends before the rate tokens arrive, the request starts
//! over, unless the new window's tokens are available locally.
//!
//! **While the counters are unavailable** ([`breaker`] decides when), a replica follows the plan's fallback setting.
//! With `Share`, the replica uses a separate bucket of `burst / replicas` and `rate / replicas`, which starts *empty*
//! shortly after the start of the outage. Together, all shares amount to one bucket that starts empty, so the shares
//! and the tokens granted before the outage stay within the envelope. With `Open`, each replica enforces the whole
//! limit in a separate bucket that starts full. With `Closed`, requests fail. A denial by a share does not name a
//! violated policy, since it is unknown whether the limit itself was reached.
//!
//! **When the counters are available again**, they do not know which requests were allowed without them, and may have
//! lost their state. So after a loss of state, or an outage in which no replica got a response, the counters start a
//! *new epoch* with every bucket empty. The epoch starts at one moment on the counters' clock, slightly in the future.
//! Until then, all replicas decide as during the outage. If other replicas got responses during the outage, there is no
//! new epoch, and the replicas that had an outage resume their calls. A replica that has just started cannot know
//! whether other replicas have an outage. If no replica has received a response for 0.8 s, the new replica also causes
//! a new epoch, unless all other replicas have just started too. (This does not apply to a cluster, because its
//! partitions may be idle for a long time.)
//!
//! **Edits.** An edit does not change the number of missing tokens. If more tokens are missing than a smaller burst can
//! hold, the bucket is empty, and the excess is remembered. If the burst is raised later, the excess is missing too,
//! minus the tokens that would have refilled while the smaller bucket was full. A bucket learns of an edit from the
//! first request after the edit, but does not learn when the edit was made. So the bucket counts as having refilled at
//! the lower of the two rates since the previous request. A bucket that has been idle for a minute plus twice the time
//! until it was full is deleted, and counts as full under any plan. After a loss of state, raising the burst does not
//! add more tokens than have refilled since then.
//!
//! **Not guaranteed.** While only some replicas have an outage, `Share` lets these replicas allow their part of the
//! bucket in addition to what the counters grant. In total, at most `(1 + p) * (burst + rate * (T + ttl))` is allowed,
//! where `p` is the sum of their parts of the burst. Each part is a whole number of tokens, so with a burst of 1, one
//! replica's part is the entire burst. The same can happen at the start of a new epoch, if one replica's first call
//! fails while other replicas' calls succeed. In an outage of all replicas, no additional requests are allowed, even if
//! the outage is too short for some of the replicas to detect. This is because shares begin to fill only when the
//! outage has either ended or been detected by all replicas. In a cluster, however, a replica that was not using a
//! partition does not detect the partition's outage. `Closed` never allows additional requests.

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
    key::{handle::KeyHandle, ledger_calls::ReturnedQuota, table::KeyTable},
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

/// The store whose limits all replicas share.
#[derive(Debug)]
pub struct DistributedStore(Arc<StoreCore>);

impl DistributedStore {
    /// Creates the store, and starts the task that sends heartbeats. The task ends when the store is dropped.
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
            breakers: (0..counters.partitions().max(1))
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

    /// Returns whether any partition has an outage.
    pub fn is_degraded(&self) -> bool {
        self.0.breakers.iter().any(CircuitBreaker::is_open)
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
            Ok(LocalOutcome::Fetch) if self.0.breaker(handle).is_open() => {
                let on_failure = policies.on_failure().unwrap_or(self.0.settings.on_failure);
                // A cached denial is more informative than the error, so the caller looks for one first.
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
        let (mut state, at) = self.0.keys.lock_state(handle, policies);
        decision(&mut state, policies, at, Outcome::Allowed)
    }

    async fn inspect(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        let debt = self
            .0
            .look_up_debt(handle, policies.terms(self.0.ttl))
            .await;
        let (mut state, at) = self.0.keys.lock_state(handle, policies);
        match debt {
            Some(debt) => state.decision_with(
                policies,
                at,
                Outcome::Allowed,
                decide::rate(policies, at.calendar, debt),
            ),
            None => decision(&mut state, policies, at, Outcome::Allowed),
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

    async fn drain(&self) -> ReturnedQuota {
        let (drained, ()) = tokio::join!(self.0.keys.drain(), self.0.return_leases());
        drained
    }
}
