//! The connections from one address or network. Chooses which of them to close to make room for another.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use tokio::time::Instant;

use crate::serve::connection::Connection;

/// How long a connection must have been idle before it can be closed to make room.
pub(super) const IDLE_ENOUGH: Duration = Duration::from_secs(1);
/// A connection younger than this is not closed to enforce the limit for its address, because its request may be in
/// transit.
pub(super) const YOUNG: Duration = Duration::from_secs(1);
/// The number of connections without a complete request, oldest first, that are searched for a silent one: a connection
/// on which nothing has been received.
const SILENT_SEARCH: usize = 16;

/// The level at which connections are counted. [`networks`] defines the prefix lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    Address,
    Network,
    Site,
}

/// Returns the networks whose limits apply to an address, narrowest first.
pub(super) fn networks(peer: IpAddr) -> impl Iterator<Item = (Width, IpNet)> {
    const V4: &[(Width, u8)] = &[(Width::Address, 32), (Width::Network, 24)];
    const V6: &[(Width, u8)] = &[
        (Width::Address, 64),
        (Width::Network, 56),
        (Width::Site, 48),
    ];
    let widths = if peer.is_ipv4() { V4 } else { V6 };
    widths
        .iter()
        .filter_map(move |(width, length)| Some((*width, IpNet::new(peer, *length).ok()?.trunc())))
}

#[derive(Debug, Default)]
pub(super) struct Group {
    /// The connections, in the order in which they were accepted.
    pub(super) counted: BTreeMap<u64, Arc<Connection>>,
    pub(super) waiting: BTreeSet<u64>,
    /// When a search last failed to find a connection that could be closed.
    pub(super) searched_at: Option<Instant>,
}

impl Group {
    /// Returns the oldest silent connection, on which nothing has been received, if the connection is old enough.
    pub(super) fn silent(&self, now: Instant) -> Option<u64> {
        self.old_and_waiting(now)
            .take(SILENT_SEARCH)
            .find(|(_, connection)| connection.is_silent())
            .map(|(id, _)| id)
    }

    /// Returns the oldest connection without a complete request, if it is old enough.
    pub(super) fn slow(&self, now: Instant) -> Option<u64> {
        self.old_and_waiting(now).next().map(|(id, _)| id)
    }

    fn old_and_waiting(&self, now: Instant) -> impl Iterator<Item = (u64, &Connection)> {
        self.waiting
            .iter()
            .filter_map(|id| Some((*id, &**self.counted.get(id)?)))
            .take_while(move |(_, connection)| connection.age(now) >= YOUNG)
    }

    /// Returns the connection that has been idle the longest, if it has been idle long enough.
    pub(super) fn idle(&self, now: Instant) -> Option<u64> {
        self.counted
            .iter()
            .filter_map(|(id, connection)| Some((connection.idle_since()?, *id)))
            .min()
            .filter(|(since, _)| now.saturating_duration_since(*since) >= IDLE_ENOUGH)
            .map(|(_, id)| id)
    }

    /// Returns whether fewer than `limit` connections are older than a second, and fewer than twice `limit` are open in
    /// total.
    pub(super) fn has_short_term_room(&self, limit: usize, now: Instant) -> bool {
        self.counted.len() < limit.saturating_mul(2)
            && self
                .counted
                .values()
                .nth(limit - 1)
                .is_none_or(|connection| connection.age(now) < YOUNG)
    }
}
