//! Guards by address and by account, in front of what costs more than a look-up: sign-in, management.
//!
//! These are `governor` limiters, one for each purpose, held by this replica alone: they protect the server,
//! and nothing that is sold is counted by them. They work from memory and need nothing else to be up.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use governor::{
    clock::Clock as _, middleware::StateInformationMiddleware, state::keyed::DashMapStateStore,
};

use super::guard::Monotonic;
use crate::clock::Clock;

/// Who is counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Caller {
    /// An address; of IPv6 the /64, which is what one customer of a provider has.
    Address(IpAddr),
    /// A name, as a hash of it: the guard remembers no emails.
    Account(u64),
}

impl Caller {
    pub fn address(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            IpAddr::V4(ip) => Self::Address(IpAddr::V4(ip)),
            IpAddr::V6(ip) => {
                let network = u128::from(ip) & !u128::from(u64::MAX);
                Self::Address(IpAddr::V6(Ipv6Addr::from(network)))
            }
        }
    }
}

type Governor =
    governor::RateLimiter<Caller, DashMapStateStore<Caller>, Monotonic, StateInformationMiddleware>;

/// So many requests a minute for each caller, all of them at once if it likes.
#[derive(Debug)]
pub struct Guard {
    governor: Option<Governor>,
    clock: Monotonic,
    capacity: usize,
    pruned_at: AtomicU64,
}

/// The guard refuses; the caller may come again after so long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    pub retry_after: Duration,
}

impl Guard {
    /// `per_minute`: 0 switches the guard off. `capacity`: how many callers are remembered; when more come
    /// at once than that, those who rest are forgotten first, and then new ones are refused for a second.
    pub fn new(per_minute: u32, capacity: usize, clock: Arc<dyn Clock>) -> Self {
        let clock = Monotonic(clock);
        let governor = NonZeroU32::new(per_minute).map(|per_minute| {
            let quota = governor::Quota::per_minute(per_minute);
            Governor::new(quota, DashMapStateStore::default(), clock.clone())
        });
        Self {
            governor,
            clock,
            capacity,
            pruned_at: AtomicU64::new(0),
        }
    }

    pub fn admit(&self, caller: Caller) -> Result<(), Refused> {
        let Some(governor) = &self.governor else {
            return Ok(());
        };
        if governor.len() >= self.capacity {
            // A look at every caller: not for each of a flood.
            let now = self.clock.0.monotonic();
            let last = self.pruned_at.load(Ordering::Relaxed);
            if now.saturating_sub(last) >= 1_000_000_000 {
                self.pruned_at.store(now, Ordering::Relaxed);
                governor.retain_recent();
            }
            if governor.len() >= self.capacity {
                return Err(Refused {
                    retry_after: Duration::from_secs(1),
                });
            }
        }
        match governor.check_key(&caller) {
            Ok(_) => Ok(()),
            Err(until) => Err(Refused {
                retry_after: until.wait_time_from(self.clock.now()),
            }),
        }
    }

    /// Forgets the callers that are at rest. governor's own map only grows.
    pub fn prune(&self) {
        if let Some(governor) = &self.governor {
            governor.retain_recent();
            governor.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{TestClock, UnixNanos};

    fn guard(per_minute: u32, capacity: usize) -> (Guard, TestClock) {
        let clock = TestClock::at(UnixNanos::from_secs(1_785_738_360));
        (
            Guard::new(per_minute, capacity, Arc::new(clock.clone())),
            clock,
        )
    }

    fn caller(ip: &str) -> Caller {
        Caller::address(ip.parse().unwrap())
    }

    #[test]
    fn a_caller_over_the_limit_may_come_again_when_it_was_told() {
        let (guard, clock) = guard(2, 100);
        let (one, other) = (caller("192.0.2.1"), caller("192.0.2.2"));
        assert_eq!(guard.admit(one), Ok(()));
        assert_eq!(guard.admit(one), Ok(()));
        let refused = guard.admit(one).unwrap_err();
        assert_eq!(refused.retry_after, Duration::from_secs(30));
        assert_eq!(guard.admit(other), Ok(()));
        clock.advance(refused.retry_after);
        assert_eq!(guard.admit(one), Ok(()));
    }

    #[test]
    fn addresses_of_one_customer_are_counted_together() {
        assert_eq!(caller("2001:db8:1:2::1"), caller("2001:db8:1:2:ffff::"));
        assert_ne!(caller("2001:db8:1:2::1"), caller("2001:db8:1:3::1"));
        assert_eq!(caller("::ffff:192.0.2.1"), caller("192.0.2.1"));
    }

    #[test]
    fn a_flood_of_addresses_does_not_grow_the_guard() {
        let (guard, clock) = guard(1, 100);
        for i in 0..1000_u32 {
            let _ = guard.admit(Caller::address(IpAddr::V4(i.into())));
        }
        assert!(guard.governor.as_ref().unwrap().len() <= 100);
        // governor keeps a caller for one interval longer than it has to.
        clock.advance(Duration::from_secs(121));
        assert_eq!(guard.admit(caller("192.0.2.1")), Ok(()));
    }

    #[test]
    fn zero_switches_it_off() {
        let (guard, _) = guard(0, 1);
        for _ in 0..1000 {
            assert_eq!(guard.admit(caller("192.0.2.1")), Ok(()));
        }
    }
}
