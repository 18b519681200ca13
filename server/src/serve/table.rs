//! The open connections of one listener: how many there may be, of one address and in all, and which are closed
//! to make room.
//!
//! A newcomer is preferred to a connection that has not sent a request yet, the oldest of these first, and to one
//! that is idle between two requests, then to one whose client has not taken its response for a while, of the address
//! with the most connections first. Any other connection with a request in flight is never closed for another. So
//! clients that send nothing cannot lock out others, whatever their number; clients that read nothing give way when
//! all places are taken.
//!
//! Connections of one address are counted until a valid API key or service token has come over them: a gateway, or
//! many clients behind one address, may have as many as there are places in all. Once an address has its share, a
//! newcomer takes the place of its oldest silent connection, or of the one that has been idle longest. A connection is
//! not closed for that in its first second, in which its request may be on its way; instead the address may have twice
//! its share for that second.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
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

use super::connection::{Connection, Order};
use crate::{
    limiter::Caller,
    telemetry::metrics::{ConnectionMetrics, Refusal},
};

/// How long a connection must have been idle to be closed for another.
const IDLE_ENOUGH: Duration = Duration::from_secs(1);
/// How long a client must not have taken a response for its connection to be closed for another.
const STALLED_ENOUGH: Duration = Duration::from_secs(1);
/// At an address's limit a connection younger than this is left alone: its request may be on its way.
const YOUNG: Duration = Duration::from_secs(1);
/// How many of an address's oldest connections without a request are looked at for a silent one.
const SILENT_SEARCH: usize = 16;
/// Time between two searches for idle connections, each of which looks at all of them.
const SEARCH_EVERY: Duration = Duration::from_millis(100);
/// At most this part of all connections is closed in one search.
const SEARCH_PART: usize = 16;

/// How many connections a listener holds.
#[derive(Debug, Clone)]
pub struct Limits {
    pub connections: usize,
    /// Of one address, or one IPv6 /64, without those that have authenticated; for a second, twice as many; 0: no
    /// limit.
    pub per_address: usize,
    /// Exempt from `per_address`: many clients are behind each of these addresses.
    pub trusted_proxies: Vec<IpNet>,
}

#[derive(Debug)]
pub(super) struct Table {
    limits: Limits,
    metrics: Arc<ConnectionMetrics>,
    open: Mutex<Open>,
    /// Connections that were told to close and whose socket is still open.
    closing: AtomicUsize,
    emptied: Notify,
}

#[derive(Debug, Default)]
struct Open {
    next_id: u64,
    all: HashMap<u64, Entry>,
    addresses: HashMap<Caller, OfAddress>,
    /// Those without a request so far, in the order of their accept.
    waiting: BTreeSet<u64>,
    searched_at: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    connection: Arc<Connection>,
    /// `None`: does not count, or no longer.
    address: Option<Caller>,
    is_proxy: bool,
}

#[derive(Debug, Default)]
struct OfAddress {
    /// In the order of their accept.
    counted: BTreeMap<u64, Arc<Connection>>,
    waiting: BTreeSet<u64>,
    /// When none was found that could be closed.
    searched_at: Option<Instant>,
}

impl OfAddress {
    /// The oldest silent one, if it is not young.
    fn silent(&self, now: Instant) -> Option<u64> {
        self.old_and_waiting(now)
            .take(SILENT_SEARCH)
            .find(|(_, connection)| connection.is_silent())
            .map(|(id, _)| id)
    }

    /// The oldest without a complete request, if it is not young.
    fn slow(&self, now: Instant) -> Option<u64> {
        self.old_and_waiting(now).next().map(|(id, _)| id)
    }

    fn old_and_waiting(&self, now: Instant) -> impl Iterator<Item = (u64, &Connection)> {
        self.waiting
            .iter()
            .filter_map(|id| Some((*id, &**self.counted.get(id)?)))
            .take_while(move |(_, connection)| connection.age(now) >= YOUNG)
    }

    /// The one that has been idle longest, if that is long enough.
    fn idle(&self, now: Instant) -> Option<u64> {
        self.counted
            .iter()
            .filter_map(|(id, connection)| Some((connection.idle_since()?, *id)))
            .min()
            .filter(|(since, _)| now.saturating_duration_since(*since) >= IDLE_ENOUGH)
            .map(|(_, id)| id)
    }

    /// Whether fewer than `limit` are older than a second, and fewer than twice as many in all.
    fn has_room_for_a_moment(&self, limit: usize, now: Instant) -> bool {
        self.counted.len() < limit.saturating_mul(2)
            && self
                .counted
                .values()
                .nth(limit - 1)
                .is_none_or(|connection| connection.age(now) < YOUNG)
    }
}

impl Open {
    fn remove(&mut self, id: u64) -> Option<Entry> {
        let entry = self.all.remove(&id)?;
        self.waiting.remove(&id);
        if let Some(address) = entry.address
            && let Some(of_address) = self.addresses.get_mut(&address)
        {
            of_address.counted.remove(&id);
            of_address.waiting.remove(&id);
            if of_address.counted.is_empty() {
                self.addresses.remove(&address);
            }
        }
        Some(entry)
    }

    /// Stops counting those of an address that have authenticated.
    fn count_anew(&mut self, address: Caller) {
        let Some(of_address) = self.addresses.get_mut(&address) else {
            return;
        };
        let all = &mut self.all;
        of_address.counted.retain(|id, connection| {
            let is_counted = !connection.authenticated.is_set();
            if !is_counted && let Some(entry) = all.get_mut(id) {
                entry.address = None;
            }
            is_counted
        });
        if of_address.counted.is_empty() {
            self.addresses.remove(&address);
        }
    }
}

impl Table {
    pub(super) fn new(limits: Limits, metrics: Arc<ConnectionMetrics>) -> Arc<Self> {
        Arc::new(Self {
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
        let address = (!is_proxy).then(|| Caller::address(peer));
        let mut open = self.open.lock();
        if let Some(address) = address
            && !self.make_room_at(&mut open, address)
        {
            return Err(self.refused(Refusal::Address));
        }
        if open.all.len() >= self.limits.connections && !self.make_room(&mut open) {
            return Err(self.refused(Refusal::Full));
        }
        let connection = Arc::new(Connection::accepted_now());
        let id = open.next_id;
        open.next_id += 1;
        open.all.insert(
            id,
            Entry {
                connection: connection.clone(),
                address,
                is_proxy,
            },
        );
        open.waiting.insert(id);
        if let Some(address) = address {
            let of_address = open.addresses.entry(address).or_default();
            of_address.counted.insert(id, connection.clone());
            of_address.waiting.insert(id);
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
        self.make_room(&mut self.open.lock())
    }

    /// Whether an address may have one more, for which one of its others may be closed.
    fn make_room_at(&self, open: &mut Open, address: Caller) -> bool {
        let limit = self.limits.per_address;
        let has_room = |open: &Open| {
            let of_address = open.addresses.get(&address);
            limit == 0 || of_address.is_none_or(|it| it.counted.len() < limit)
        };
        if has_room(open) {
            return true;
        }
        let now = Instant::now();
        let silent = open.addresses.get(&address).and_then(|it| it.silent(now));
        if let Some(silent) = silent {
            self.close(open, silent);
            return true;
        }
        let is_searched = open.addresses.get(&address).is_some_and(|it| {
            it.searched_at
                .is_some_and(|at| now.saturating_duration_since(at) < SEARCH_EVERY)
        });
        if !is_searched {
            open.count_anew(address);
            if has_room(open) {
                return true;
            }
            let idle = open.addresses.get(&address).and_then(|it| it.idle(now));
            if let Some(idle) = idle {
                self.close(open, idle);
                return true;
            }
        }
        let Some(of_address) = open.addresses.get_mut(&address) else {
            return true;
        };
        if !is_searched {
            of_address.searched_at = Some(now);
        }
        if of_address.has_room_for_a_moment(limit, now) {
            return true;
        }
        match of_address.slow(now) {
            Some(slow) => {
                self.close(open, slow);
                true
            }
            None => false,
        }
    }

    fn make_room(&self, open: &mut Open) -> bool {
        if let Some(oldest) = open.waiting.first().copied() {
            self.close(open, oldest);
            return true;
        }
        let now = Instant::now();
        if open
            .searched_at
            .is_some_and(|at| now.saturating_duration_since(at) < SEARCH_EVERY)
        {
            return false;
        }
        open.searched_at = Some(now);
        let mut idle = open
            .all
            .iter()
            .filter(|(_, entry)| !entry.is_proxy)
            .filter_map(|(id, entry)| Some((entry.connection.idle_since()?, *id)))
            .filter(|(since, _)| now.saturating_duration_since(*since) >= IDLE_ENOUGH)
            .collect::<Vec<_>>();
        idle.sort_unstable();
        idle.truncate((self.limits.connections / SEARCH_PART).max(1));
        for (_, id) in &idle {
            self.close(open, *id);
        }
        !idle.is_empty() || self.close_stalled(open, now)
    }

    fn close_stalled(&self, open: &mut Open, now: Instant) -> bool {
        let mut stalled = open
            .all
            .iter()
            .filter_map(|(id, entry)| {
                let since = entry.connection.stalled_since()?;
                // Trusted proxies are spared. An address that has authenticated on all its connections counts none.
                let of_address = open.addresses.get(&entry.address?);
                let counted = of_address.map_or(0, |it| it.counted.len());
                Some((Reverse(counted), since, *id))
            })
            .filter(|(_, since, _)| now.saturating_duration_since(*since) >= STALLED_ENOUGH)
            .collect::<Vec<_>>();
        stalled.sort_unstable();
        stalled.truncate((self.limits.connections / SEARCH_PART).max(1));
        for (_, _, id) in &stalled {
            self.close(open, *id);
        }
        !stalled.is_empty()
    }

    fn close(&self, open: &mut Open, id: u64) {
        if let Some(entry) = open.remove(id) {
            self.closing.fetch_add(1, Ordering::AcqRel);
            self.metrics.dropped.inc();
            entry.connection.give(Order::Close);
        }
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
        if let Some(address) = open.all.get(&self.id).and_then(|entry| entry.address)
            && let Some(of_address) = open.addresses.get_mut(&address)
        {
            of_address.waiting.remove(&self.id);
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
mod tests {
    use super::*;

    fn table(connections: usize, per_address: usize) -> Arc<Table> {
        let limits = Limits {
            connections,
            per_address,
            trusted_proxies: vec!["10.0.0.0/8".parse().unwrap()],
        };
        Table::new(limits, Arc::default())
    }

    fn admit(table: &Arc<Table>, peer: &str) -> Result<Admitted, Refusal> {
        table.admit(peer.parse().unwrap())
    }

    /// As its task does when told to.
    fn is_told_to_close(it: &Admitted) -> bool {
        it.connection.order() == Order::Close
    }

    fn request(it: &Admitted) -> super::super::connection::RequestInFlight {
        let (request, is_first) = it.connection.begin_request(false);
        assert!(is_first);
        it.place.has_requested();
        request
    }

    #[tokio::test]
    async fn the_oldest_that_never_asked_makes_room_and_one_that_asks_stays() {
        let table = table(3, 0);
        let busy = admit(&table, "192.0.2.1").unwrap();
        let _request = request(&busy);
        let first = admit(&table, "192.0.2.2").unwrap();
        let second = admit(&table, "192.0.2.3").unwrap();
        let third = admit(&table, "192.0.2.4").unwrap();
        assert!(is_told_to_close(&first));
        assert!(!is_told_to_close(&busy) && !is_told_to_close(&second));
        assert_eq!(table.closing(), 1);
        drop(first);
        assert_eq!(table.closing(), 0);
        let _requests = (request(&second), request(&third));
        assert_eq!(admit(&table, "192.0.2.5").unwrap_err(), Refusal::Full);
        drop(third);
        assert!(admit(&table, "192.0.2.5").is_ok(), "a place came free");
    }

    #[tokio::test(start_paused = true)]
    async fn idle_connections_make_room_when_none_waits_for_a_first_request() {
        let table = table(2, 0);
        let idle = admit(&table, "192.0.2.1").unwrap();
        drop(request(&idle));
        let busy = admit(&table, "192.0.2.2").unwrap();
        let _request = request(&busy);
        assert_eq!(admit(&table, "192.0.2.3").unwrap_err(), Refusal::Full);
        tokio::time::advance(Duration::from_secs(2)).await;
        let _new = admit(&table, "192.0.2.3").unwrap();
        assert!(is_told_to_close(&idle) && !is_told_to_close(&busy));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalled_response_makes_room_and_a_running_handler_does_not() {
        let table = table(2, 0);
        let stalled = admit(&table, "192.0.2.1").unwrap();
        let (mut response, _) = stalled.connection.begin_request(true);
        stalled.place.has_requested();
        response.respond();
        let busy = admit(&table, "192.0.2.2").unwrap();
        let _request = request(&busy);
        tokio::time::advance(STALLED_ENOUGH / 2).await;
        assert_eq!(admit(&table, "192.0.2.3").unwrap_err(), Refusal::Full);
        tokio::time::advance(STALLED_ENOUGH).await;
        let _new = admit(&table, "192.0.2.3").unwrap();
        assert!(is_told_to_close(&stalled) && !is_told_to_close(&busy));
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_has_its_own_limit_which_spares_the_others() {
        let table = table(100, 2);
        let all = ["198.51.100.1", "198.51.100.1"].map(|peer| admit(&table, peer).unwrap());
        let _requests = all.iter().map(request).collect::<Vec<_>>();
        tokio::time::advance(YOUNG).await;
        assert_eq!(admit(&table, "198.51.100.1").unwrap_err(), Refusal::Address);
        // The same address, written as IPv6.
        assert_eq!(
            admit(&table, "::ffff:198.51.100.1").unwrap_err(),
            Refusal::Address
        );
        assert!(admit(&table, "198.51.100.2").is_ok());
        drop(all);
        assert!(admit(&table, "198.51.100.1").is_ok(), "places came free");
    }

    #[tokio::test(start_paused = true)]
    async fn ipv6_counts_by_its_64() {
        let table = table(100, 1);
        let one = admit(&table, "2001:db8:0:1::1").unwrap();
        let _request = request(&one);
        tokio::time::advance(YOUNG).await;
        assert_eq!(
            admit(&table, "2001:db8:0:1:ffff::2").unwrap_err(),
            Refusal::Address
        );
        assert!(admit(&table, "2001:db8:0:2::1").is_ok());
    }

    #[tokio::test]
    async fn a_trusted_proxy_counts_in_the_total_alone() {
        let table = table(3, 1);
        let all = (0..3)
            .map(|_| admit(&table, "10.1.2.3").unwrap())
            .collect::<Vec<_>>();
        let _requests = all.iter().map(request).collect::<Vec<_>>();
        assert_eq!(admit(&table, "10.1.2.3").unwrap_err(), Refusal::Full);
    }

    #[tokio::test(start_paused = true)]
    async fn at_its_limit_an_address_loses_what_it_never_used_and_not_what_others_have() {
        let table = table(100, 2);
        let other = admit(&table, "203.0.113.9").unwrap();
        let first = admit(&table, "203.0.113.1").unwrap();
        let second = admit(&table, "203.0.113.1").unwrap();
        tokio::time::advance(YOUNG).await;
        let _third = admit(&table, "203.0.113.1").unwrap();
        assert!(is_told_to_close(&first));
        assert!(!is_told_to_close(&second) && !is_told_to_close(&other));
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_of_one_address_is_let_in_and_no_more_than_twice_its_share() {
        let table = table(100, 3);
        let burst = (0..6)
            .map(|_| admit(&table, "203.0.113.1").unwrap())
            .collect::<Vec<_>>();
        assert_eq!(admit(&table, "203.0.113.1").unwrap_err(), Refusal::Address);
        assert!(!burst.iter().any(is_told_to_close));
        // What is silent makes room as soon as it is not young.
        tokio::time::advance(YOUNG).await;
        assert!(admit(&table, "203.0.113.1").is_ok());
        assert!(is_told_to_close(&burst[0]));
    }

    #[tokio::test(start_paused = true)]
    async fn at_its_limit_an_address_loses_what_is_silent_before_what_sends() {
        let table = table(100, 2);
        let sends = admit(&table, "203.0.113.1").unwrap();
        sends.connection.bytes_arrived();
        let silent = admit(&table, "203.0.113.1").unwrap();
        tokio::time::advance(YOUNG).await;
        let _newcomer = admit(&table, "203.0.113.1").unwrap();
        assert!(is_told_to_close(&silent) && !is_told_to_close(&sends));
    }

    #[tokio::test(start_paused = true)]
    async fn at_its_limit_an_address_loses_what_has_been_idle_longest() {
        let table = table(100, 3);
        let all = (0..3)
            .map(|_| admit(&table, "203.0.113.1").unwrap())
            .collect::<Vec<_>>();
        let _busy = request(&all[0]);
        drop(request(&all[2]));
        tokio::time::advance(Duration::from_millis(10)).await;
        drop(request(&all[1]));
        tokio::time::advance(IDLE_ENOUGH).await;
        let _newcomer = admit(&table, "203.0.113.1").unwrap();
        assert_eq!(
            all.iter().map(is_told_to_close).collect::<Vec<_>>(),
            [false, false, true]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_authenticated_does_not_count_against_its_address() {
        let table = table(12, 2);
        let mut gateway = Vec::new();
        for _ in 0..10 {
            let one = admit(&table, "203.0.113.1").unwrap();
            drop(request(&one));
            one.connection.authenticated.set();
            gateway.push(one);
            tokio::time::advance(2 * IDLE_ENOUGH).await;
        }
        assert!(!gateway.iter().any(is_told_to_close));
        // The others of the address have its share.
        let strangers = [(), ()].map(|()| admit(&table, "203.0.113.1").unwrap());
        tokio::time::advance(YOUNG).await;
        let _newcomer = admit(&table, "203.0.113.1").unwrap();
        assert!(is_told_to_close(&strangers[0]) && !is_told_to_close(&strangers[1]));
        drop(strangers);
        // In the total it still counts.
        let _new = admit(&table, "203.0.113.2").unwrap();
        let _newest = admit(&table, "203.0.113.2").unwrap();
        drop(gateway);
        assert!(table.open.lock().addresses.len() <= 2);
    }

    #[tokio::test]
    async fn finish_waits_for_the_last() {
        let table = table(10, 0);
        let one = admit(&table, "192.0.2.1").unwrap();
        let finishing = tokio::spawn({
            let table = table.clone();
            async move { table.finish().await }
        });
        tokio::task::yield_now().await;
        assert_eq!(one.connection.order(), Order::Finish);
        assert!(!finishing.is_finished());
        drop(one);
        finishing.await.unwrap();
    }
}
