//! The open connections of one listener: how many there may be, of one address and in all, and which are closed
//! to make room.
//!
//! A newcomer is preferred to a connection that has not sent a request for a second, then to one that is idle between
//! two requests, then to one whose client has not taken its response for a while, of the address with the most
//! connections first, then to one that may be about to send a request, unless its address has fewer connections than
//! the newcomer's. Any other connection with a request in flight is never closed for another. So clients that send
//! nothing, and clients that read nothing, cannot lock out others, whatever their number.
//!
//! Connections of one address, and with more room those of its network, are counted until a valid API key or service
//! token has come over them: a gateway, or many clients behind one address, may have as many as there are places in all.
//! Once an address or network has its share, a newcomer takes the place of its oldest silent connection, or of the one
//! that has been idle longest. A connection is not closed for that in its first second, in which its request may be on
//! its way; instead the address may have twice its share for that second.
//!
//! What counted connections hold in memory is limited in all. Beyond that, those that hold most are closed, of the
//! address that holds most.

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

use self::group::{Group, Width, networks};
use super::{
    connection::{Connection, Order},
    memory::Memory,
};
use crate::telemetry::metrics::{ConnectionMetrics, Refusal};

/// How long a connection must have been idle to be closed for another.
const IDLE_ENOUGH: Duration = Duration::from_secs(1);
/// How long a client must not have taken a response for its connection to be closed for another.
const STALLED_ENOUGH: Duration = Duration::from_secs(1);
/// At an address's limit a connection younger than this is left alone: its request may be on its way.
const YOUNG: Duration = Duration::from_secs(1);
/// Of how many of the oldest connections without a request the one is closed whose address has most.
const WAITING_SEARCH: usize = 16;
/// An address with this part of another's connections, or none, is light beside it.
const LIGHT: usize = 4;
/// Time between two searches for idle and stalled connections, each of which looks at all of them.
const SEARCH_EVERY: Duration = Duration::from_millis(100);
/// At most this part of all connections is closed after one search.
const SEARCH_PART: usize = 4;
/// How many times as many connections an IPv6 /48 may have as a /56. A site may have either.
const SITE: usize = 2;

/// How many connections a listener holds.
#[derive(Debug, Clone)]
pub struct Limits {
    pub connections: usize,
    /// Of one address, or one IPv6 /64, without those that have authenticated; for a second, twice as many; 0: no
    /// limit.
    pub per_address: usize,
    /// The same of one IPv4 /24 or IPv6 /56. An IPv6 /48 may have twice as many.
    pub per_network: usize,
    /// Exempt from both: many clients are behind each of these addresses.
    pub trusted_proxies: Vec<IpNet>,
    /// Bytes that counted connections may hold for requests, in all.
    pub memory: usize,
    /// The same of one connection.
    pub memory_of_one: usize,
}

#[derive(Debug)]
pub(super) struct Table {
    limits: Limits,
    metrics: Arc<ConnectionMetrics>,
    memory: Arc<Memory>,
    open: Mutex<Open>,
    /// Connections that were told to close and whose socket is still open.
    closing: AtomicUsize,
    emptied: Notify,
}

#[derive(Debug, Default)]
struct Open {
    next_id: u64,
    all: HashMap<u64, Entry>,
    /// By address and by network.
    groups: HashMap<IpNet, Group>,
    /// Those without a request so far, in the order of their accept.
    waiting: BTreeSet<u64>,
    /// Those that could be closed when they were last searched for; the last one first.
    spare: Vec<u64>,
    /// The same, of those whose client has not taken a response for a moment only.
    just_stalled: Vec<u64>,
    searched_at: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    connection: Arc<Connection>,
    /// `None`: does not count, or no longer.
    counted_at: Option<IpAddr>,
    is_proxy: bool,
}

impl Entry {
    /// Since when it has been idle, if that is long enough to close it for another.
    fn idle(&self, now: Instant) -> Option<Instant> {
        let since = self.connection.idle_since().filter(|_| !self.is_proxy)?;
        (now.saturating_duration_since(since) >= IDLE_ENOUGH).then_some(since)
    }

    /// Since when its client has not taken a response, if that is long enough. Not of those that have authenticated.
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

    /// How many connections are counted at an address.
    fn weight(&self, peer: Option<IpAddr>) -> usize {
        peer.and_then(|peer| networks(peer).next())
            .and_then(|(_, address)| self.groups.get(&address))
            .map_or(0, |group| group.counted.len())
    }

    /// Finds up to `most` that can be closed for others: those that have been idle longest, then the stalled ones of
    /// the addresses that have most.
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

    /// Stops counting those of a group that have authenticated.
    fn stop_counting_authenticated(&mut self, network: IpNet) {
        let Some(group) = self.groups.get(&network) else {
            return;
        };
        let authenticated = group
            .counted
            .iter()
            .filter(|(_, connection)| connection.authenticated.is_set())
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
            memory: Arc::new(Memory::new(limits.memory, limits.memory_of_one)),
            limits,
            metrics,
            open: Mutex::default(),
            closing: AtomicUsize::new(0),
            emptied: Notify::new(),
        })
    }

    /// Takes in a connection that was just accepted, or refuses it.
    pub(super) fn admit(self: &Arc<Self>, peer: IpAddr) -> Result<Admitted, Refusal> {
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
                let refusal = match width {
                    Width::Address => Refusal::Address,
                    Width::Network | Width::Site => Refusal::Network,
                };
                return Err(self.refused(refusal));
            }
        }
        if open.all.len() >= self.limits.connections && !self.make_room(&mut open, counted_at) {
            return Err(self.refused(Refusal::Full));
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
            place: Place {
                table: self.clone(),
                id,
            },
        })
    }

    fn refused(&self, refusal: Refusal) -> Refusal {
        self.metrics.refused(refusal).inc();
        refusal
    }

    /// The process has no file descriptor left: closes a connection if one can be spared.
    pub(super) fn spare_one(&self) -> bool {
        self.make_room(&mut self.open.lock(), None)
    }

    const fn limit(&self, width: Width) -> usize {
        match width {
            Width::Address => self.limits.per_address,
            Width::Network => self.limits.per_network,
            Width::Site => self.limits.per_network.saturating_mul(SITE),
        }
    }

    /// Whether an address or network may have one more, for which one of its others may be closed.
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
        if group.has_room_for_a_moment(limit, now) {
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

    /// `newcomer`: who wants a place. A light address is not pushed out by a heavy one.
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

    /// One that is idle, or whose client does not take a response. For a newcomer of a light address a client of a
    /// heavy one need not have done so for long: else the clients of that one, which come back at once, would take
    /// every place that becomes free.
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
                // No other one has more.
                open.just_stalled.push(id);
                break;
            }
            if entry.connection.stalled_since().is_some() {
                return Some(id);
            }
        }
        None
    }

    /// Closes connections that hold more than one may, and while all hold more than they may, those that hold most.
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
            if held > self.memory.of_one() || self.memory.is_short() {
                self.close(&mut open, id);
            }
        }
    }

    fn close(&self, open: &mut Open, id: u64) {
        if let Some(entry) = open.remove(id) {
            self.closing.fetch_add(1, Ordering::AcqRel);
            self.metrics.dropped.inc();
            entry.connection.release_memory();
            entry.connection.give(Order::Close);
        }
    }

    /// Whether much memory of closed connections is still to be freed.
    pub(super) fn is_backlogged(&self) -> bool {
        self.memory.is_backlogged()
    }

    /// How many sockets are still open beyond those that are counted.
    pub(super) fn closing(&self) -> usize {
        self.closing.load(Ordering::Acquire)
    }

    /// Tells every connection to finish, and waits until all have.
    pub(super) async fn finish(&self) {
        for entry in self.open.lock().all.values() {
            entry.connection.give(Order::Finish);
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

/// A connection that was taken in.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) connection: Arc<Connection>,
    pub(super) place: Place,
}

/// A place in the table. Given back on drop, after the socket was closed.
#[derive(Debug)]
pub(super) struct Place {
    table: Arc<Table>,
    id: u64,
}

impl Place {
    /// The first request head is complete: the connection is no longer among the first to close.
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

impl Drop for Place {
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
