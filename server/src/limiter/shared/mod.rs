//! The store of many replicas: buckets that all share, tokens taken from them ahead of need, and what is done
//! without them.
//!
//! Owns when the shared counters are asked and when not. Calendar quotas are blocks from the ledger, as in
//! the memory store, cut so that all replicas together hold one block. Knows no Redis: the counters are a
//! trait ([`SharedCounters`]), which a script in Redis keeps, and in the simulation a model of it.
//!
//! ```text
//! lease in hand ─ spend, no I/O
//! none          ─ key is busy: one flight for all that wait, sized by the key's pace, ahead of need
//!               ─ key is slow, strict, or leases are off: one call a request
//! counters away ─ share | open | closed
//! ```
//!
//! **What is promised.** In any window of `T` seconds, at most `burst + rate * (T + ttl)` over all replicas,
//! and `burst + rate * T` where every request is decided by the counters ([`lease`] has the reason).
//! Calendar quotas exactly: a token of theirs is counted in the ledger before it is spent.
//!
//! **When the counters are away** ([`health`] tells when), a replica serves by the plan's choice. `Share`: a
//! bucket of its own of `burst / replicas` and `rate / replicas`, which starts *empty* when the outage does. All
//! shares together are one bucket that starts empty, so that with what was taken before it they stay within
//! the envelope. `Open`: all of the rate here, whatever the others do. `Closed`: nothing.
//!
//! **When they come back**, what was sold without them is not in them, and they may have lost what was. So
//! after a loss, or after an outage in which nobody was answered, they *begin anew*: at one instant by their own
//! clock, a little in the future, with every bucket empty; until it everybody serves as in an outage. A
//! replica that was alone in its outage just returns.
//!
//! **What is not promised.** While some replicas are cut off and others are not, `Share` sells their part `p` of
//! the bucket beside the counters (`k/n` of it for `k` of `n` replicas, but for fractions of a token): at most
//! `(1 + p) * (burst + rate * (T + ttl))`. An outage so short that only some replicas notice it, which is under
//! a second, is such a case. `Closed` sells nothing beside the counters.

mod counters;
mod decide;
mod flight;
mod health;
mod lease;
mod roster;
mod script;
mod watch;

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::{Arc, Weak},
    time::Duration,
};

use async_trait::async_trait;
use quota_common::{
    id::{ApiKeyId, TenantId},
    plan::OnRedisFailure,
};
use tokio::runtime::Handle;

pub(super) use self::lease::Lease;
pub use self::{
    counters::{
        BucketName, BucketState, CounterError, CounterMicros, SharedCounters, TakeCall, TakeReply,
    },
    roster::{COUNTED_EVERY, FORGOTTEN, Place, Roster},
    script::RedisCounters,
};
use self::{
    decide::{Look, decision},
    health::Partition,
};
use super::{
    blocks::QuotaLedger,
    cells::{CellSettings, Cells},
    decision::{Decision, Outcome},
    policy::Policies,
    store::{Drained, KeyCell, LimitStore, LimiterError},
};
use crate::{clock::Clock, telemetry::metrics::Metrics};

/// The wait that is told where none is known.
const A_SECOND: NonZeroU64 = NonZeroU64::new(1_000_000_000).unwrap();

/// The wait that is told where it is known to be short.
const A_MOMENT: NonZeroU64 = NonZeroU64::new(1_000_000).unwrap();

/// How a shared store is set up.
#[derive(Debug, Clone)]
pub struct SharedSettings {
    /// How long tokens that were taken ahead may be spent. Zero: none are.
    pub lease_ttl: Duration,
    /// How long a request waits for the counters.
    pub deadline: Duration,
    /// What is done without them, where a plan says nothing else.
    pub on_failure: OnRedisFailure,
    pub cells: CellSettings,
}

/// Limits that all replicas share.
#[derive(Debug)]
pub struct SharedStore(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cells: Cells,
    counters: Arc<dyn SharedCounters>,
    clock: Arc<dyn Clock>,
    roster: Arc<Roster>,
    metrics: Arc<Metrics>,
    settings: SharedSettings,
    ttl: u64,
    partitions: Box<[Partition]>,
    me: Weak<Inner>,
}

impl SharedStore {
    /// Starts the tasks that watch the counters; they end with the store.
    pub fn new(
        clock: Arc<dyn Clock>,
        ledger: Arc<dyn QuotaLedger>,
        counters: Arc<dyn SharedCounters>,
        roster: Arc<Roster>,
        metrics: Arc<Metrics>,
        settings: SharedSettings,
    ) -> Arc<Self> {
        let now = clock.monotonic();
        let inner = Arc::new_cyclic(|me| Inner {
            cells: Cells::new(
                Arc::clone(&clock),
                ledger,
                settings.cells.clone(),
                Arc::clone(&roster),
            ),
            partitions: (0..counters.partitions().max(1))
                .map(|_| Partition::new(now))
                .collect(),
            counters,
            clock,
            roster,
            metrics,
            ttl: nanos(settings.lease_ttl),
            settings,
            me: Weak::clone(me),
        });
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(watch::beat(Weak::clone(&inner.me)));
        }
        Arc::new(Self(inner))
    }

    /// Whether some counters are away.
    pub fn is_degraded(&self) -> bool {
        self.0.partitions.iter().any(Partition::is_away)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[async_trait]
impl LimitStore for SharedStore {
    fn cell(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyCell>, LimiterError> {
        self.0.cells.cell(tenant, key)
    }

    #[inline]
    fn try_take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision> {
        match self.0.look(cell, policies, cost) {
            Ok(Look::Done(decision)) => Some(decision),
            Ok(Look::Take) if self.0.partition(cell).is_away() => {
                let on_failure = policies.on_failure().unwrap_or(self.0.settings.on_failure);
                // The gate stands between the others and what they admit.
                if on_failure != OnRedisFailure::Share {
                    return None;
                }
                self.0.without_counters(cell, policies, cost).ok()?
            }
            _ => None,
        }
    }

    async fn take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        self.0.take(cell, policies, cost).await
    }

    fn peek(&self, cell: &KeyCell, policies: &Policies) -> Decision {
        let (mut state, now) = self.0.cells.current(cell, policies);
        let times = (now, self.0.clock.monotonic());
        decision(&mut state, policies, times, Outcome::Allowed)
    }

    fn is_local(&self) -> bool {
        false
    }

    fn prune(&self) -> usize {
        self.0.cells.prune()
    }

    async fn drain(&self) -> Drained {
        self.0.cells.drain().await
    }
}
