//! Limits how often each tenant may cause requests to other servers, such as Stripe or a webhook's endpoint.
//!
//! The counts are kept in memory, so each replica enforces the limit separately.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use governor::{
    clock::Clock as _, middleware::StateInformationMiddleware, state::keyed::DashMapStateStore,
};
use quota_common::TenantId;

use crate::clock::{Clock, GovernorClock};

type Governor = governor::RateLimiter<
    TenantId,
    DashMapStateStore<TenantId>,
    GovernorClock,
    StateInformationMiddleware,
>;

/// When this many tenants are tracked, idle tenants are dropped.
const CROWDED: usize = 10_000;

/// A limit on requests per minute for each tenant. The burst is one minute's worth of requests.
#[derive(Debug)]
pub struct TenantRate {
    governor: Governor,
    clock: GovernorClock,
}

impl TenantRate {
    pub fn new(per_minute: NonZeroU32, clock: Arc<dyn Clock>) -> Self {
        let clock = GovernorClock(clock);
        let quota = governor::Quota::per_minute(per_minute);
        Self {
            governor: Governor::new(quota, DashMapStateStore::default(), clock.clone()),
            clock,
        }
    }

    /// Counts a request toward the tenant's limit. If the limit has been reached, returns how long to wait.
    pub fn admit(&self, tenant: TenantId) -> Result<(), Duration> {
        if self.governor.len() >= CROWDED {
            self.governor.retain_recent();
        }
        match self.governor.check_key(&tenant) {
            Ok(_) => Ok(()),
            Err(until) => Err(until.wait_time_from(self.clock.now())),
        }
    }
}

#[cfg(test)]
mod tests {
    use quota_common::id::TenantId;
    use uuid::Uuid;

    use super::*;
    use crate::clock::SystemClock;

    #[test]
    fn tenants_are_limited_separately() {
        let rate = TenantRate::new(NonZeroU32::new(3).unwrap(), Arc::new(SystemClock::new()));
        let (one, other) = (TenantId(Uuid::now_v7()), TenantId(Uuid::now_v7()));
        for _ in 0..3 {
            assert_eq!(rate.admit(one), Ok(()));
        }
        let wait = rate.admit(one).unwrap_err();
        assert!(
            wait > Duration::from_secs(1) && wait <= Duration::from_secs(20),
            "{wait:?}"
        );
        assert_eq!(rate.admit(other), Ok(()));
    }
}
