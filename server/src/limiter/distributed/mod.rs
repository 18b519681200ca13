//! The distributed store: buckets that all replicas share, tokens taken from them ahead of need, and decisions without
//! them.
//!
//! Owns when the shared counters are called. Calendar quotas are blocks from the ledger, as in the memory store, sized
//! so that all replicas together hold one block. Does not know Redis: the counters are a trait ([`SharedCounters`]),
//! implemented by a script in Redis and, in the simulation, by a model of it.
//!
//! ```text
//! tokens held here      ─ spend, no I/O
//! none                  ─ one call for all requests of the key that wait: what they need, in full, and for a busy
//!                         key a lease for later, which is renewed ahead of need
//! counters unavailable  ─ share | open | closed
//! ```
//!
//! **Guarantees.** In any window of `T` seconds, all replicas together admit at most `burst + rate · (T + ttl)`, and
//! at most `burst + rate · T` where every request is decided by the counters ([`lease`](crate::limiter::rate::lease) has the argument). Calendar
//! quotas are exact: the ledger counts a token before it is spent. A rested bucket's whole burst, sent at once to one
//! replica, is admitted in at most two round trips.
//!
//! **Deadlines.** A call that is not answered in time counts as failed, and the request that waits for it is decided
//! without the counters. A decision waits for at most two calls: the one that is under way when it arrives, and the
//! next. So it does for the ledger. A request's quota tokens are set apart before its rate is taken, so that no rate is
//! taken for a request that then finds no quota.
//!
//! **While the counters are unavailable** ([`breaker`] decides when), a replica follows the plan's choice. `Share`: a
//! bucket of its own of `burst / replicas` and `rate / replicas`, which starts *empty* shortly after the outage. All
//! shares together are one bucket that starts empty, so that with what was taken before they stay within the
//! envelope. `Open`: the whole rate here, whatever other replicas do. `Closed`: nothing. A denial then names no violated
//! policy, since whether the limit was reached is not known.
//!
//! **When they are back**, they do not know what was admitted without them, and may have lost what was before. So
//! after a loss, or after an outage in which no replica was answered, they start a *new epoch*: at one instant of their
//! own clock, a little in the future, with every bucket empty. Until then all replicas decide as in an outage. A
//! replica that was alone in its outage just returns. One that starts among others cannot know whether they are in an
//! outage; when it finds that nobody was answered for a second, it has a new epoch begin too. (With a cluster, whose
//! partitions may rest for long, it does not.)
//!
//! **Edits.** As many tokens are missing after an edit as before. What a smaller burst cannot hold is missing again when
//! the burst is made larger, less the time in which the bucket was full. An edit reaches a bucket with the first request
//! after it, and when it was made is not known there: since the request before, the bucket has refilled at the lower of
//! the two rates. A bucket that has rested for a minute and twice the time it takes to fill is forgotten, and full
//! whatever its plan has become. For an hour after a loss of state, a larger burst holds no more than what has refilled
//! since.
//!
//! **Not guaranteed.** While some replicas are cut off and others are not, `Share` admits their part `p` of the bucket
//! in addition to what the counters grant (`k/n` of it for `k` of `n` replicas, up to fractions of a token): at most
//! `(1 + p) * (burst + rate * (T + ttl))`. `Closed` admits nothing in addition. An outage of all that is too short for
//! every replica to notice is no such case: shares begin to fill only when it would be over, or noticed by all.

mod breaker;
pub(super) mod calls;
mod decide;
mod probe;
mod redis;

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::{Arc, Weak, atomic::AtomicBool},
    time::Duration,
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
    decide::{LocalOutcome, decision},
};
use super::{
    decision::{Decision, Outcome},
    key::table::{KeyTable, KeyTableSettings},
    membership::Membership,
    policy::Policies,
    quota::block::QuotaLedger,
    rate::{counters::SharedCounters, lease::Terms},
    store::{Drained, KeyHandle, LimitStore, LimiterError},
};
use crate::{clock::Clock, telemetry::metrics::Metrics};

/// The wait to announce when none is known.
pub(in crate::limiter) const A_SECOND: NonZeroU64 = NonZeroU64::new(1_000_000_000).unwrap();

/// The wait to announce when it is known to be short.
pub(in crate::limiter) const A_MOMENT: NonZeroU64 = NonZeroU64::new(1_000_000).unwrap();

/// Settings of the distributed store.
#[derive(Debug, Clone)]
pub struct DistributedSettings {
    /// For how long tokens taken ahead of need may be spent. Zero: every request is decided by the counters.
    pub lease_ttl: Duration,
    /// How long a request waits for one call to the counters.
    pub deadline: Duration,
    /// What to do without them, unless a plan says otherwise.
    pub on_failure: OnRedisFailure,
    pub keys: KeyTableSettings,
}

/// Limits that all replicas share.
#[derive(Debug)]
pub struct DistributedStore(Arc<StoreCore>);

#[derive(Debug)]
struct StoreCore {
    keys: KeyTable,
    counters: Arc<dyn SharedCounters>,
    clock: Arc<dyn Clock>,
    membership: Arc<Membership>,
    metrics: Arc<Metrics>,
    settings: DistributedSettings,
    ttl: u64,
    partitions: Box<[CircuitBreaker]>,
    /// Nothing is held for later any more.
    draining: AtomicBool,
    me: Weak<StoreCore>,
}

impl DistributedStore {
    /// Starts the tasks that watch the counters; they end with the store.
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
            ttl: nanos(settings.lease_ttl),
            settings,
            me: Weak::clone(me),
        });
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(probe::send_heartbeats(Weak::clone(&inner.me)));
        }
        Arc::new(Self(inner))
    }

    /// Whether some counters are away.
    pub fn is_degraded(&self) -> bool {
        self.0.partitions.iter().any(CircuitBreaker::is_away)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
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
                // The other choices are subject to the local limiter first.
                if on_failure != OnRedisFailure::Share {
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
        let times = (now, self.0.clock.monotonic());
        decision(&mut state, policies, times, Outcome::Allowed)
    }

    async fn inspect(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        let debt = self
            .0
            .look_up_debt(handle, Terms::new(policies, self.0.ttl))
            .await;
        let (mut state, now) = self.0.keys.current(handle, policies);
        match debt {
            Some(debt) => state.decision_with(
                policies,
                now,
                Outcome::Allowed,
                decide::rate(policies, now, debt),
            ),
            None => decision(
                &mut state,
                policies,
                (now, self.0.clock.monotonic()),
                Outcome::Allowed,
            ),
        }
    }

    fn is_local(&self) -> bool {
        false
    }

    fn prune(&self) -> usize {
        self.0.keys.prune()
    }

    fn denial_memory(&self, policies: &Policies) -> Option<u64> {
        let leased = self.0.ttl > 0 && !policies.strict();
        leased.then(|| self.0.ttl.saturating_mul(calls::DENIED_FOR_LEASES))
    }

    async fn drain(&self) -> Drained {
        let (drained, ()) = tokio::join!(self.0.keys.drain(), self.0.return_leases());
        drained
    }
}
