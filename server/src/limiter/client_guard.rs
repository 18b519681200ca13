//! Limits by client address, in front of what costs more than a look-up: accounts, management.
//!
//! These are `governor` limiters, one for each purpose, held by this replica alone: they protect the server, and do not
//! enforce plan limits. They work from memory and need nothing else to be up. IPv6 is counted by /64, and with more
//! room by /56 and /48, since a provider may give a customer any of these.

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

use super::denial_cache::Monotonic;
use crate::clock::Clock;

/// The wider networks of IPv6, and how many times as many requests each may send as a /64.
const WIDER: [(u32, u32); 2] = [(56, 4), (48, 16)];

/// Who is counted together: an address, or an IPv6 network by its first address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientNetwork(IpAddr);

impl ClientNetwork {
    pub fn address(ip: IpAddr) -> Self {
        let ip = ip.to_canonical();
        Self(ip).network(64).unwrap_or(Self(ip))
    }

    /// The network of this length that an IPv6 address is in.
    fn network(self, length: u32) -> Option<Self> {
        match self.0 {
            IpAddr::V4(_) => None,
            IpAddr::V6(ip) => {
                let mask = u128::MAX << (128 - length);
                Some(Self(IpAddr::V6(Ipv6Addr::from(u128::from(ip) & mask))))
            }
        }
    }
}

type Governor = governor::RateLimiter<
    ClientNetwork,
    DashMapStateStore<ClientNetwork>,
    Monotonic,
    StateInformationMiddleware,
>;

/// So many requests a minute for each caller, all of them at once if it likes.
#[derive(Debug)]
pub struct ClientRateLimiter {
    governor: Option<Governor>,
    /// One for each of [`WIDER`].
    wider: Vec<Governor>,
    clock: Monotonic,
    capacity: usize,
    pruned_at: AtomicU64,
}

/// The guard refuses; the caller may come again after so long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooManyRequests {
    pub retry_after: Duration,
}

impl ClientRateLimiter {
    /// `per_minute`: 0 switches the guard off. `capacity`: how many callers are remembered; when more come
    /// at once than that, those who rest are forgotten first, and then new ones are refused for a second.
    pub fn new(per_minute: u32, capacity: usize, clock: Arc<dyn Clock>) -> Self {
        let clock = Monotonic(clock);
        let governor = |per_minute| {
            let quota = governor::Quota::per_minute(per_minute);
            Governor::new(quota, DashMapStateStore::default(), clock.clone())
        };
        let per_minute = NonZeroU32::new(per_minute);
        Self {
            governor: per_minute.map(governor),
            wider: per_minute.map_or(Vec::new(), |per_minute| {
                let room = |(_, room): (u32, u32)| {
                    let room = NonZeroU32::new(room).unwrap_or(NonZeroU32::MIN);
                    governor(per_minute.saturating_mul(room))
                };
                WIDER.map(room).into()
            }),
            clock: clock.clone(),
            capacity,
            pruned_at: AtomicU64::new(0),
        }
    }

    pub fn admit(&self, caller: ClientNetwork) -> Result<(), TooManyRequests> {
        let Some(governor) = &self.governor else {
            return Ok(());
        };
        if governor.len() >= self.capacity {
            // A look at every caller: not for each of a flood.
            let now = self.clock.0.monotonic();
            let last = self.pruned_at.load(Ordering::Relaxed);
            if now.saturating_sub(last) >= 1_000_000_000 {
                self.pruned_at.store(now, Ordering::Relaxed);
                for governor in self.wider.iter().chain(&self.governor) {
                    governor.retain_recent();
                }
            }
            if governor.len() >= self.capacity {
                return Err(TooManyRequests {
                    retry_after: Duration::from_secs(1),
                });
            }
        }
        self.check(governor, caller)?;
        // There are never more of these than of the /64 that they are of.
        for (governor, (length, _)) in self.wider.iter().zip(WIDER) {
            if let Some(network) = caller.network(length) {
                self.check(governor, network)?;
            }
        }
        Ok(())
    }

    fn check(&self, governor: &Governor, caller: ClientNetwork) -> Result<(), TooManyRequests> {
        match governor.check_key(&caller) {
            Ok(_) => Ok(()),
            Err(until) => Err(TooManyRequests {
                retry_after: until.wait_time_from(self.clock.now()),
            }),
        }
    }

    /// Forgets the callers that are at rest. governor's own map only grows.
    pub fn prune(&self) {
        for governor in self.wider.iter().chain(&self.governor) {
            governor.retain_recent();
            governor.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{TestClock, UnixNanos};

    fn guard(per_minute: u32, capacity: usize) -> (ClientRateLimiter, TestClock) {
        let clock = TestClock::at(UnixNanos::from_secs(1_785_738_360));
        (
            ClientRateLimiter::new(per_minute, capacity, Arc::new(clock.clone())),
            clock,
        )
    }

    fn caller(ip: &str) -> ClientNetwork {
        ClientNetwork::address(ip.parse().unwrap())
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
    fn a_customer_with_many_networks_is_limited_too() {
        let (guard, _) = guard(2, 10_000);
        let admitted = |networks: Box<dyn Fn(u32) -> String>| {
            let all = (0..1000).map(networks);
            all.filter(|ip| guard.admit(caller(ip)).is_ok()).count()
        };
        assert_eq!(
            admitted(Box::new(|n| format!("2001:db8:1:{:x}::1", n % 256))),
            8
        );
        assert_eq!(
            admitted(Box::new(|n| format!("2001:db8:2:{:x}00::1", n % 256))),
            32
        );
        assert_eq!(
            admitted(Box::new(|n| format!("2001:db8:3{n:03x}::1"))),
            1000
        );
    }

    #[test]
    fn a_flood_of_addresses_does_not_grow_the_guard() {
        let (guard, clock) = guard(1, 100);
        for i in 0..1000_u32 {
            let _ = guard.admit(ClientNetwork::address(IpAddr::V4(i.into())));
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
