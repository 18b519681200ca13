//! The state of the distributed store. Most of its methods are defined in the modules that use them.

use std::{
    sync::{Arc, Weak, atomic::AtomicBool},
    time::Duration,
};

use quota_common::plan::OnRedisFailure;

use super::breaker::CircuitBreaker;
use crate::{
    clock::{Clock, Nanos},
    limiter::{
        key::table::{KeyTable, KeyTableSettings},
        membership::Membership,
        rate::counters::SharedCounters,
    },
    telemetry::metrics::Metrics,
};

/// Settings of the distributed store.
#[derive(Debug, Clone)]
pub struct DistributedSettings {
    /// The lease TTL. If zero, the counters decide every request.
    pub lease_ttl: Duration,
    /// How long a call to the counters may take before it counts as late. A request waits for at most twice this time.
    pub deadline: Duration,
    /// The fallback setting for plans without their own.
    pub on_failure: OnRedisFailure,
    pub keys: KeyTableSettings,
}

/// The state of the distributed store.
#[derive(Debug)]
pub(super) struct StoreCore {
    pub(super) keys: KeyTable,
    pub(super) counters: Arc<dyn SharedCounters>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) membership: Arc<Membership>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) settings: DistributedSettings,
    pub(super) ttl: Nanos,
    /// One breaker for each partition of the counters.
    pub(super) breakers: Box<[CircuitBreaker]>,
    /// Whether the store is draining and no longer keeps tokens for later.
    pub(super) draining: AtomicBool,
    pub(super) me: Weak<StoreCore>,
}

/// What to do when the deadline of a call has passed.
pub(super) enum AfterDeadline {
    /// Wait for the late response, because its tokens can still be spent or returned.
    Wait,
    /// Do not wait: the call takes no tokens.
    GiveUp,
}
