//! Rate limits per client address, for sign-in and management endpoints.
//!
//! Each group of endpoints has its own `governor` limiters in memory. The limiters protect this replica and do not
//! enforce plan limits. Requests from IPv6 addresses are counted per /64 network and, with higher limits, per /56 and
//! /48 network, because a provider may assign a network of any of these sizes to a customer.

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

use crate::clock::{Clock, GovernorClock, Monotonic, Nanos};

/// The prefix lengths of the wider IPv6 networks, with their limits as multiples of a /64's limit.
const WIDER: [(u32, u32); 2] = [(56, 4), (48, 16)];

/// Addresses that share a limit: one IPv4 address, or an IPv6 network, represented by its first address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientNetwork(IpAddr);

impl ClientNetwork {
    pub fn address(ip: IpAddr) -> Self {
        let ip = ip.to_canonical();
        Self(ip).network(64).unwrap_or(Self(ip))
    }

    /// Returns the network with this prefix length that contains the IPv6 address. `None` for an IPv4 address.
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
    GovernorClock,
    StateInformationMiddleware,
>;

/// A limit on requests per minute for each client network. The burst is one minute's worth of requests.
#[derive(Debug)]
pub struct ClientRateLimiter {
    governor: Option<Governor>,
    /// One limiter for each of the [`WIDER`] networks.
    wider: Vec<Governor>,
    clock: GovernorClock,
    capacity: usize,
    pruned_at: AtomicU64,
}

/// The minimum time between two searches for idle networks.
const PRUNE_EVERY: Nanos = Nanos::from_secs(1);

/// The limit was reached. The client may retry after `retry_after`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooManyRequests {
    pub retry_after: Duration,
}

impl ClientRateLimiter {
    /// Creates a limit of `per_minute` requests per network; 0 means no limit. `capacity` is the maximum number of
    /// tracked networks. When this number is reached, idle networks are dropped. If no network is idle, every request
    /// is rejected, with a `retry_after` of one second.
    pub fn new(per_minute: u32, capacity: usize, clock: Arc<dyn Clock>) -> Self {
        let clock = GovernorClock(clock);
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
            // Pruning iterates over all networks, so it must not run for every request in a flood.
            let now = self.clock.0.monotonic();
            let last = Monotonic(self.pruned_at.load(Ordering::Relaxed));
            if now.saturating_since(last) >= PRUNE_EVERY {
                self.pruned_at.store(now.0, Ordering::Relaxed);
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
        // A wider network is tracked only if one of its /64 networks has made a request, and each request keeps the
        // wider network tracked for a shorter time than the /64 network. Therefore, the wider networks need no separate
        // capacity.
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

    /// Drops idle networks. The map in `governor` does not shrink on its own.
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
    fn limited_client_may_retry_exactly_after_retry_after() {
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
    fn addresses_of_a_network_are_counted_together() {
        assert_eq!(caller("2001:db8:1:2::1"), caller("2001:db8:1:2:ffff::"));
        assert_ne!(caller("2001:db8:1:2::1"), caller("2001:db8:1:3::1"));
        assert_eq!(caller("::ffff:192.0.2.1"), caller("192.0.2.1"));
    }

    #[test]
    fn wider_networks_are_limited_too() {
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
    fn flood_of_addresses_does_not_grow_the_map() {
        let (guard, clock) = guard(1, 100);
        for i in 0..1000_u32 {
            let _ = guard.admit(ClientNetwork::address(IpAddr::V4(i.into())));
        }
        assert!(guard.governor.as_ref().unwrap().len() <= 100);
        // `governor` keeps entries one interval longer than necessary.
        clock.advance(Duration::from_secs(121));
        assert_eq!(guard.admit(caller("192.0.2.1")), Ok(()));
    }

    #[test]
    fn zero_means_no_limit() {
        let (guard, _) = guard(0, 1);
        for _ in 0..1000 {
            assert_eq!(guard.admit(caller("192.0.2.1")), Ok(()));
        }
    }
}
