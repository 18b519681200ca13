//! The open connections to one listener: how many are allowed, in total and per address, and which connections are
//! closed to make room.
//!
//! When the total is reached, a new connection replaces another connection, in this order:
//!
//! 1. a connection that has been open for at least a second without sending a request,
//! 2. a connection that is idle between two requests,
//! 3. a connection whose client has not read its response for a while, starting with the address that has the most
//!    connections,
//! 4. a connection that may be about to send its first request, unless its address has fewer connections than the new
//!    connection's address.
//!
//! Connections from trusted proxies are exempt from 2 and 3. Connections that no longer count toward the limit for
//! their address are exempt from 3. Apart from those in 3, no connection with a request in flight is ever closed to
//! make room. So clients that do not send or read anything cannot lock out other clients, no matter how many such
//! clients there are.
//!
//! A connection that is not from a trusted proxy counts toward the limit for its address, and toward a higher limit for
//! its network, until a valid API key or service token is received on the connection. A gateway, or many clients behind
//! one address, may therefore have as many connections as the total allows. At the limit for an address or network, a
//! new connection replaces the oldest connection on which nothing has been received. If there is none, it replaces the
//! connection that has been idle the longest or, as a last choice, the oldest connection without a complete request.
//! During its first second, a connection is not replaced in this way, because its request may be in transit. Instead,
//! an address can have up to twice as many connections during that second.
//!
//! The total memory used by requests on connections that have not authenticated is limited, except for connections from
//! trusted proxies. Above that limit, the table closes the connections that use the most memory, starting with the
//! address that uses the most in total.

mod group;

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use self::group::{Group, IDLE_ENOUGH, Width, YOUNG, networks};
use super::{
    connection::{Connection, Shutdown},
    memory::Memory,
    settings::Limits,
};
use crate::telemetry::metrics::{ConnectionLimit, ConnectionMetrics};

/// How long a client must have stopped reading its response before its connection can be closed to make room.
const STALLED_ENOUGH: Duration = Duration::from_secs(1);
/// How many of the oldest connections without a request are considered for closing. Of these, the connection whose
/// address has the most connections is closed.
const WAITING_SEARCH: usize = 16;
/// An address with `n` connections is light compared with an address with at least `LIGHT * n` connections (or `LIGHT`
/// connections, if `n` is 0).
const LIGHT: usize = 4;
/// The minimum time between two searches for idle and stalled connections. A search checks all connections.
const SEARCH_EVERY: Duration = Duration::from_millis(100);
/// A search selects at most `connections / SEARCH_PART` connections.
const SEARCH_PART: usize = 4;
/// How many connections an IPv6 /48 may have, as a multiple of a /56's limit. A site may be assigned a network of
/// either size.
const SITE: usize = 2;

#[derive(Debug)]
pub(super) struct Table {
    limits: Limits,
    metrics: Arc<ConnectionMetrics>,
    memory: Arc<Memory>,
    open: Mutex<Open>,
    /// The number of connections that are closing but still have an open socket.
    closing: AtomicUsize,
    emptied: Notify,
}

#[derive(Debug, Default)]
struct Open {
    next_id: u64,
    all: HashMap<u64, Entry>,
    /// Connections by address and by network.
    groups: HashMap<IpNet, Group>,
    /// Connections without a request so far, in the order in which they were accepted.
    waiting: BTreeSet<u64>,
    /// Connections that the last search found. The connections are closed from the end of the list.
    spare: Vec<u64>,
    /// Like `spare`, but for connections whose client stopped reading its response only recently.
    just_stalled: Vec<u64>,
    searched_at: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    connection: Arc<Connection>,
    /// `None` if the connection does not count toward the limits per address and per network.
    counted_at: Option<IpAddr>,
    is_proxy: bool,
}

impl Entry {
    /// Returns the time at which the connection became idle, if that is long enough ago to close the connection.
    /// Returns `None` for connections from trusted proxies.
    fn idle(&self, now: Instant) -> Option<Instant> {
        let since = self.connection.idle_since().filter(|_| !self.is_proxy)?;
        (now.saturating_duration_since(since) >= IDLE_ENOUGH).then_some(since)
    }

    /// Returns the time at which the client stopped reading a response, if that is long enough ago to close the
    /// connection. Returns `None` for connections that do not count toward the limit for their address.
    fn stalled(&self, now: Instant) -> Option<Instant> {
        let since = self.connection.stalled_since();
        let since = since.filter(|_| self.counted_at.is_some())?;
        (now.saturating_duration_since(since) >= STALLED_ENOUGH).then_some(since)
    }
}

impl Open {
    fn remove(&mut self, id: u64) -> Option<Entry> {
        self.stop_counting(id);
        self.waiting.remove(&id);
        self.all.remove(&id)
    }

    fn stop_counting(&mut self, id: u64) {
        let Some(peer) = self.all.get_mut(&id).and_then(|it| it.counted_at.take()) else {
            return;
        };
        for (_, network) in networks(peer) {
            if let Some(group) = self.groups.get_mut(&network) {
                group.counted.remove(&id);
                group.waiting.remove(&id);
                if group.counted.is_empty() {
                    self.groups.remove(&network);
                }
            }
        }
    }

    /// Returns the number of connections from an address that count toward its limit.
    fn weight(&self, peer: Option<IpAddr>) -> usize {
        peer.and_then(|peer| networks(peer).next())
            .and_then(|(_, address)| self.groups.get(&address))
            .map_or(0, |group| group.counted.len())
    }

    /// Finds up to `most` connections that can be closed to make room: first the connections that have been idle the
    /// longest, then stalled connections from the addresses with the most connections.
    fn search(&mut self, now: Instant, most: usize) {
        let mut found = Vec::new();
        let mut just_stalled = Vec::new();
        for (id, entry) in &self.all {
            if let Some(since) = entry.idle(now) {
                found.push((0, Reverse(0), since, *id));
            } else if let Some(since) = entry.stalled(now) {
                found.push((1, Reverse(self.weight(entry.counted_at)), since, *id));
            } else if entry.counted_at.is_some()
                && let Some(since) = entry.connection.stalled_since()
            {
                just_stalled.push((2, Reverse(self.weight(entry.counted_at)), since, *id));
            }
        }
        let first = |mut found: Vec<(u8, Reverse<usize>, Instant, u64)>| {
            found.sort_unstable();
            found.truncate(most);
            found.iter().rev().map(|(.., id)| *id).collect()
        };
        self.spare = first(found);
        self.just_stalled = first(just_stalled);
    }

    /// Stops counting a group's connections that have authenticated.
    fn stop_counting_authenticated(&mut self, network: IpNet) {
        let Some(group) = self.groups.get(&network) else {
            return;
        };
        let authenticated = group
            .counted
            .iter()
            .filter(|(_, connection)| connection.marks.is_authenticated())
            .map(|(id, _)| *id)
            .collect::<Vec<_>>();
        for id in authenticated {
            self.stop_counting(id);
        }
    }
}

impl Table {
    pub(super) fn new(limits: Limits, metrics: Arc<ConnectionMetrics>) -> Arc<Self> {
        Arc::new(Self {
            memory: Arc::new(Memory::new(limits.memory, limits.memory_per_connection)),
            limits,
            metrics,
            open: Mutex::default(),
            closing: AtomicUsize::new(0),
            emptied: Notify::new(),
        })
    }

    /// Adds a connection that was just accepted, or rejects it.
    pub(super) fn admit(self: &Arc<Self>, peer: IpAddr) -> Result<Admitted, ConnectionLimit> {
        let peer = peer.to_canonical();
        let is_proxy = self
            .limits
            .trusted_proxies
            .iter()
            .any(|network| network.contains(&peer));
        let counted_at = (!is_proxy).then_some(peer);
        let mut open = self.open.lock();
        for (width, network) in counted_at.into_iter().flat_map(networks) {
            if !self.make_room_in(&mut open, width, network) {
                let limit = match width {
                    Width::Address => ConnectionLimit::Address,
                    Width::Network | Width::Site => ConnectionLimit::Network,
                };
                return Err(self.rejected(limit));
            }
        }
        if open.all.len() >= self.limits.connections && !self.make_room(&mut open, counted_at) {
            return Err(self.rejected(ConnectionLimit::Full));
        }
        let memory = counted_at.map(|_| self.memory.clone());
        let connection = Arc::new(Connection::accepted_now(memory));
        let id = open.next_id;
        open.next_id += 1;
        open.all.insert(
            id,
            Entry {
                connection: connection.clone(),
                counted_at,
                is_proxy,
            },
        );
        open.waiting.insert(id);
        for (_, network) in counted_at.into_iter().flat_map(networks) {
            let group = open.groups.entry(network).or_default();
            group.counted.insert(id, connection.clone());
            group.waiting.insert(id);
        }
        self.metrics.accepted.inc();
        self.metrics.open.inc();
        Ok(Admitted {
            connection,
            slot: Slot {
                table: self.clone(),
                id,
            },
        })
    }

    fn rejected(&self, limit: ConnectionLimit) -> ConnectionLimit {
        self.metrics.rejected(limit).inc();
        limit
    }

    /// Closes a connection, if one can be closed. Returns whether a connection was closed. Called when a connection
    /// could not be accepted, for example because the process has no free file descriptors.
    pub(super) fn close_spare(&self) -> bool {
        self.make_room(&mut self.open.lock(), None)
    }

    const fn limit(&self, width: Width) -> usize {
        match width {
            Width::Address => self.limits.per_address,
            Width::Network => self.limits.per_network,
            Width::Site => self.limits.per_network.saturating_mul(SITE),
        }
    }

    /// Returns whether an address or network may have one more connection. Closes one of its other connections if
    /// necessary.
    fn make_room_in(&self, open: &mut Open, width: Width, network: IpNet) -> bool {
        let limit = self.limit(width);
        let has_room = |open: &Open| {
            let group = open.groups.get(&network);
            limit == 0 || group.is_none_or(|it| it.counted.len() < limit)
        };
        if has_room(open) {
            return true;
        }
        let now = Instant::now();
        let silent = open.groups.get(&network).and_then(|it| it.silent(now));
        if let Some(silent) = silent {
            self.close(open, silent);
            return true;
        }
        let is_searched = open.groups.get(&network).is_some_and(|it| {
            it.searched_at
                .is_some_and(|at| now.saturating_duration_since(at) < SEARCH_EVERY)
        });
        if !is_searched {
            open.stop_counting_authenticated(network);
            if has_room(open) {
                return true;
            }
            let idle = open.groups.get(&network).and_then(|it| it.idle(now));
            if let Some(idle) = idle {
                self.close(open, idle);
                return true;
            }
        }
        let Some(group) = open.groups.get_mut(&network) else {
            return true;
        };
        if !is_searched {
            group.searched_at = Some(now);
        }
        if group.has_short_term_room(limit, now) {
            return true;
        }
        match group.slow(now) {
            Some(slow) => {
                self.close(open, slow);
                true
            }
            None => false,
        }
    }

    /// Closes a connection to make room for one from the address `newcomer`, if one can be closed. Returns whether a
    /// connection was closed. A connection that may be about to send its first request is closed only if its address
    /// has at least as many connections as `newcomer`.
    fn make_room(&self, open: &mut Open, newcomer: Option<IpAddr>) -> bool {
        let now = Instant::now();
        let waiting = open
            .waiting
            .iter()
            .take(WAITING_SEARCH)
            .filter_map(|id| {
                let entry = open.all.get(id)?;
                let is_old = entry.connection.age(now) >= YOUNG;
                Some((open.weight(entry.counted_at), Reverse(*id), is_old))
            })
            .max();
        if let Some((_, Reverse(id), true)) = waiting {
            self.close(open, id);
            return true;
        }
        if let Some(id) = self.spare(open, now, newcomer) {
            self.close(open, id);
            return true;
        }
        match waiting {
            Some((weight, Reverse(id), _)) if weight >= open.weight(newcomer) => {
                self.close(open, id);
                true
            }
            _ => false,
        }
    }

    /// Finds a connection that is idle, or whose client has stopped reading its response. If the address `newcomer` is
    /// light compared with another address, a connection from that heavy address can be closed as soon as its client
    /// stops reading. Without this rule, the heavy address would take every slot that becomes free, because its clients
    /// reconnect immediately.
    fn spare(&self, open: &mut Open, now: Instant, newcomer: Option<IpAddr>) -> Option<u64> {
        let is_searched = open
            .searched_at
            .is_some_and(|at| now.saturating_duration_since(at) < SEARCH_EVERY);
        if open.spare.is_empty() && !is_searched {
            open.searched_at = Some(now);
            open.search(now, (self.limits.connections / SEARCH_PART).max(1));
        }
        while let Some(id) = open.spare.pop() {
            let entry = open.all.get(&id);
            if entry.is_some_and(|it| it.idle(now).or(it.stalled(now)).is_some()) {
                return Some(id);
            }
        }
        let heavy = open.weight(newcomer).saturating_mul(LIGHT).max(LIGHT);
        while let Some(id) = open.just_stalled.pop() {
            let Some(entry) = open.all.get(&id) else {
                continue;
            };
            if open.weight(entry.counted_at) < heavy {
                // No remaining address has more connections than this address.
                open.just_stalled.push(id);
                break;
            }
            if entry.connection.stalled_since().is_some() {
                return Some(id);
            }
        }
        None
    }

    /// Closes connections that exceed the memory limit per connection. While more than three quarters of the total
    /// limit is used, also closes connections from the addresses that use the most memory.
    pub(super) fn free_memory(&self) {
        let mut open = self.open.lock();
        let mut of_address = HashMap::<IpNet, usize>::new();
        let mut holding = Vec::new();
        for (id, entry) in &open.all {
            let held = entry.connection.held();
            if held > 0
                && let Some((_, address)) = entry.counted_at.and_then(|peer| networks(peer).next())
            {
                *of_address.entry(address).or_default() += held;
                holding.push((address, held, *id));
            }
        }
        holding.sort_unstable_by_key(|(address, held, _)| Reverse((of_address[address], *held)));
        for (_, held, id) in holding {
            if held > self.memory.per_connection() || self.memory.is_short() {
                self.close(&mut open, id);
            }
        }
    }

    fn close(&self, open: &mut Open, id: u64) {
        if let Some(entry) = open.remove(id) {
            self.closing.fetch_add(1, Ordering::AcqRel);
            self.metrics.dropped.inc();
            entry.connection.release_memory();
            entry.connection.shut_down(Shutdown::Immediate);
        }
    }

    /// Returns whether all connections together, including those that are being closed, use much more memory than the
    /// limit.
    pub(super) fn is_backlogged(&self) -> bool {
        self.memory.is_backlogged()
    }

    /// Returns the number of sockets that are being closed and are no longer in the table.
    pub(super) fn closing(&self) -> usize {
        self.closing.load(Ordering::Acquire)
    }

    /// Asks every connection to finish, and waits until all have closed.
    pub(super) async fn finish(&self) {
        for entry in self.open.lock().all.values() {
            entry.connection.shut_down(Shutdown::Graceful);
        }
        loop {
            let emptied = self.emptied.notified();
            if self.open.lock().all.is_empty() {
                return;
            }
            emptied.await;
        }
    }
}

#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) connection: Arc<Connection>,
    pub(super) slot: Slot,
}

/// A connection's entry in the table. Removed on drop, after the socket has closed.
#[derive(Debug)]
pub(super) struct Slot {
    table: Arc<Table>,
    id: u64,
}

impl Slot {
    /// Records that the first request head is complete, so the connection is no longer among the first to be closed.
    pub(super) fn has_requested(&self) {
        let mut open = self.table.open.lock();
        open.waiting.remove(&self.id);
        let peer = open.all.get(&self.id).and_then(|entry| entry.counted_at);
        for (_, network) in peer.into_iter().flat_map(networks) {
            if let Some(group) = open.groups.get_mut(&network) {
                group.waiting.remove(&self.id);
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.table.metrics.open.dec();
        let mut open = self.table.open.lock();
        if open.remove(self.id).is_none() {
            self.table.closing.fetch_sub(1, Ordering::AcqRel);
        } else if open.all.is_empty() {
            self.table.emptied.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests;
