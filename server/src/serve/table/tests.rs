use tokio::time;

use super::{
    super::{connection::STALLED, http2::Frames},
    *,
};

const MEMORY: usize = 16 * 1024 * 1024;

fn table(connections: usize, per_address: usize) -> Arc<Table> {
    table_with(connections, per_address, 0)
}

fn table_with(connections: usize, per_address: usize, per_network: usize) -> Arc<Table> {
    let limits = Limits {
        connections,
        per_address,
        per_network,
        trusted_proxies: vec!["10.0.0.0/8".parse().unwrap()],
        memory: MEMORY,
        memory_per_connection: MEMORY / 32,
    };
    Table::new(limits, Arc::default())
}

fn admit(table: &Arc<Table>, peer: &str) -> Result<Admitted, ConnectionLimit> {
    table.admit(peer.parse().unwrap())
}

/// Returns whether the connection has been told to close. Its task checks the same state when it is woken.
fn is_told_to_close(it: &Admitted) -> bool {
    it.connection.shutdown() == Shutdown::Immediate
}

fn request(it: &Admitted) -> super::super::connection::RequestInFlight {
    let (is_first, request) = it.connection.begin_request(0);
    assert!(is_first);
    it.slot.has_requested();
    request
}

#[tokio::test]
async fn oldest_connection_without_a_request_makes_room() {
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
    assert_eq!(
        admit(&table, "192.0.2.5").unwrap_err(),
        ConnectionLimit::Full
    );
    drop(third);
    assert!(admit(&table, "192.0.2.5").is_ok(), "a slot became free");
}

#[tokio::test(start_paused = true)]
async fn idle_connections_make_room_if_all_have_sent_a_request() {
    let table = table(2, 0);
    let idle = admit(&table, "192.0.2.1").unwrap();
    drop(request(&idle));
    let busy = admit(&table, "192.0.2.2").unwrap();
    let _request = request(&busy);
    assert_eq!(
        admit(&table, "192.0.2.3").unwrap_err(),
        ConnectionLimit::Full
    );
    tokio::time::advance(Duration::from_secs(2)).await;
    let _new = admit(&table, "192.0.2.3").unwrap();
    assert!(is_told_to_close(&idle) && !is_told_to_close(&busy));
}

#[tokio::test(start_paused = true)]
async fn stalled_response_makes_room_and_a_running_handler_does_not() {
    let table = table(2, 0);
    let stalled = admit(&table, "192.0.2.1").unwrap();
    stalled.connection.speaks_http2();
    let (mut received, mut sent) = (Frames::default(), Frames::default());
    // The frame headers of a request's head and of its response's head, on the same stream.
    let (asked, answered) = ([0, 0, 0, 1, 5, 0, 0, 0, 1], [0, 0, 0, 1, 4, 0, 0, 0, 1]);
    received.scan(&asked, |event| stalled.connection.received(event));
    drop(stalled.connection.begin_request(0));
    stalled.slot.has_requested();
    sent.scan(&answered, |event| stalled.connection.sent(event));
    let busy = admit(&table, "192.0.2.2").unwrap();
    let _request = request(&busy);
    tokio::time::advance(STALLED_ENOUGH / 2).await;
    assert_eq!(
        admit(&table, "192.0.2.3").unwrap_err(),
        ConnectionLimit::Full
    );
    tokio::time::advance(STALLED_ENOUGH).await;
    let _new = admit(&table, "192.0.2.3").unwrap();
    assert!(is_told_to_close(&stalled) && !is_told_to_close(&busy));
}

#[tokio::test(start_paused = true)]
async fn limit_of_one_address_does_not_affect_others() {
    let table = table(100, 2);
    let all = ["198.51.100.1", "198.51.100.1"].map(|peer| admit(&table, peer).unwrap());
    let _requests = all.iter().map(request).collect::<Vec<_>>();
    tokio::time::advance(YOUNG).await;
    assert_eq!(
        admit(&table, "198.51.100.1").unwrap_err(),
        ConnectionLimit::Address
    );
    // The same address, written as IPv6.
    assert_eq!(
        admit(&table, "::ffff:198.51.100.1").unwrap_err(),
        ConnectionLimit::Address
    );
    assert!(admit(&table, "198.51.100.2").is_ok());
    drop(all);
    assert!(admit(&table, "198.51.100.1").is_ok(), "slots became free");
}

#[tokio::test(start_paused = true)]
async fn ipv6_counts_by_its_64() {
    let table = table(100, 1);
    let one = admit(&table, "2001:db8:0:1::1").unwrap();
    let _request = request(&one);
    tokio::time::advance(YOUNG).await;
    assert_eq!(
        admit(&table, "2001:db8:0:1:ffff::2").unwrap_err(),
        ConnectionLimit::Address
    );
    assert!(admit(&table, "2001:db8:0:2::1").is_ok());
}

#[tokio::test]
async fn trusted_proxy_counts_only_in_the_total() {
    let table = table(3, 1);
    let all = (0..3)
        .map(|_| admit(&table, "10.1.2.3").unwrap())
        .collect::<Vec<_>>();
    let _requests = all.iter().map(request).collect::<Vec<_>>();
    assert_eq!(
        admit(&table, "10.1.2.3").unwrap_err(),
        ConnectionLimit::Full
    );
}

#[tokio::test(start_paused = true)]
async fn address_at_its_limit_loses_its_own_unused_connections() {
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
async fn burst_of_one_address_may_have_twice_its_limit() {
    let table = table(100, 3);
    let burst = (0..6)
        .map(|_| admit(&table, "203.0.113.1").unwrap())
        .collect::<Vec<_>>();
    assert_eq!(
        admit(&table, "203.0.113.1").unwrap_err(),
        ConnectionLimit::Address
    );
    assert!(!burst.iter().any(is_told_to_close));
    // Silent connections make room as soon as they are old enough.
    tokio::time::advance(YOUNG).await;
    assert!(admit(&table, "203.0.113.1").is_ok());
    assert!(is_told_to_close(&burst[0]));
}

#[tokio::test(start_paused = true)]
async fn address_at_its_limit_loses_silent_connections_first() {
    let table = table(100, 2);
    let sends = admit(&table, "203.0.113.1").unwrap();
    sends.connection.has_read(1);
    let silent = admit(&table, "203.0.113.1").unwrap();
    tokio::time::advance(YOUNG).await;
    let _newcomer = admit(&table, "203.0.113.1").unwrap();
    assert!(is_told_to_close(&silent) && !is_told_to_close(&sends));
}

#[tokio::test(start_paused = true)]
async fn address_at_its_limit_loses_the_longest_idle_connection() {
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
async fn authenticated_connections_do_not_count_against_their_address() {
    let table = table(12, 2);
    let mut gateway = Vec::new();
    for _ in 0..10 {
        let one = admit(&table, "203.0.113.1").unwrap();
        drop(request(&one));
        one.connection.marks.set_authenticated();
        gateway.push(one);
        tokio::time::advance(2 * IDLE_ENOUGH).await;
    }
    assert!(!gateway.iter().any(is_told_to_close));
    // The other connections from the address share the limit.
    let strangers = [(), ()].map(|()| admit(&table, "203.0.113.1").unwrap());
    tokio::time::advance(YOUNG).await;
    let _newcomer = admit(&table, "203.0.113.1").unwrap();
    assert!(is_told_to_close(&strangers[0]) && !is_told_to_close(&strangers[1]));
    drop(strangers);
    // The gateway's connection still counts toward the total.
    let _new = admit(&table, "203.0.113.2").unwrap();
    let _newest = admit(&table, "203.0.113.2").unwrap();
    drop(gateway);
    assert!(table.open.lock().groups.len() <= 3);
}

#[tokio::test]
async fn finish_waits_for_the_last_connection() {
    let table = table(10, 0);
    let one = admit(&table, "192.0.2.1").unwrap();
    let finishing = tokio::spawn({
        let table = table.clone();
        async move { table.finish().await }
    });
    tokio::task::yield_now().await;
    assert_eq!(one.connection.shutdown(), Shutdown::Graceful);
    assert!(!finishing.is_finished());
    drop(one);
    finishing.await.unwrap();
}

/// Two addresses in the same network and one address outside the network, with the limit of that network.
const NETWORKS: [([&str; 3], usize); 3] = [
    (["203.0.113.1", "203.0.113.200", "203.0.112.1"], 3),
    (
        ["2001:db8:0:100::1", "2001:db8:0:1ff::1", "2001:db8:1::1"],
        3,
    ),
    (
        ["2001:db8:0:100::1", "2001:db8:0:200::1", "2001:db8:1::1"],
        6,
    ),
];

#[tokio::test(start_paused = true)]
async fn limit_of_one_network_does_not_affect_others() {
    for ([one, other, elsewhere], limit) in NETWORKS {
        let table = table_with(100, 0, 3);
        let mut all = Vec::new();
        for n in 0..limit {
            let peer = if n % 2 == 0 { one } else { other };
            all.push(admit(&table, peer).unwrap());
        }
        let requests = all.iter().map(request).collect::<Vec<_>>();
        tokio::time::advance(YOUNG).await;
        for peer in [one, other] {
            assert_eq!(
                admit(&table, peer).unwrap_err(),
                ConnectionLimit::Network,
                "{peer}"
            );
        }
        let _elsewhere = admit(&table, elsewhere).unwrap();
        assert!(!all.iter().any(is_told_to_close));
        // Idle connections are closed to make room.
        drop(requests);
        tokio::time::advance(IDLE_ENOUGH).await;
        let _newcomer = admit(&table, other).unwrap();
        assert_eq!(all.iter().filter(|it| is_told_to_close(it)).count(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn authenticated_connections_do_not_count_against_their_network() {
    let table = table_with(100, 0, 2);
    let mut gateway = Vec::new();
    for n in 0..20 {
        let one = admit(&table, &format!("203.0.113.{n}")).unwrap();
        drop(request(&one));
        one.connection.marks.set_authenticated();
        gateway.push(one);
        tokio::time::advance(2 * IDLE_ENOUGH).await;
    }
    assert!(!gateway.iter().any(is_told_to_close));
    let proxies = (0..20).map(|n| admit(&table, &format!("10.0.0.{n}")));
    assert!(proxies.into_iter().all(|it| it.is_ok()));
}

#[tokio::test]
async fn largest_connections_are_closed_when_memory_is_short() {
    let table = table(1000, 0);
    let hold = |peer: &str, bytes: usize| {
        let it = admit(&table, peer).unwrap();
        it.connection.has_read(bytes / 2);
        if it.connection.account() {
            table.free_memory();
        }
        it
    };
    let usual = hold("192.0.2.1", 20_000);
    let proxy = hold("10.0.0.1", MEMORY);
    let known = admit(&table, "192.0.2.2").unwrap();
    known.connection.marks.set_authenticated();
    known.connection.has_read(MEMORY);
    assert!(!known.connection.account());
    assert_eq!(table.memory.held(), 20_000);

    let hostile = (0..MEMORY / 30_000 + 10)
        .map(|_| hold("198.51.100.1", 30_000))
        .collect::<Vec<_>>();
    let closed = hostile.iter().filter(|it| is_told_to_close(it)).count();
    assert!((100..hostile.len()).contains(&closed), "{closed}");
    assert!(table.memory.held() <= MEMORY);
    assert!(![&usual, &proxy, &known].into_iter().any(is_told_to_close));

    // When a connection ends, all of its memory is freed, even if the connection had been asked to close.
    drop((hostile, known, proxy));
    assert_eq!(table.memory.held(), 20_000);
    usual.connection.has_written();
    assert!(!usual.connection.account());
    assert_eq!(table.memory.held(), 0);
}

/// Only responses to clients that have stopped reading count, no matter how many other clients read slowly.
#[tokio::test(start_paused = true)]
async fn responses_to_clients_that_read_slowly_do_not_count() {
    const WAITING: usize = 30_000;
    let table = table(2000, 0);
    let clients = (0..3 * MEMORY / WAITING)
        .map(|n| admit(&table, &format!("198.51.{}.{}", n / 200, n % 200)).unwrap())
        .collect::<Vec<_>>();
    for it in &clients {
        let _request = it.connection.begin_request(0);
        it.connection.is_write_blocked(WAITING);
        assert!(!it.connection.account());
    }
    let step = STALLED / 3 * 2;
    time::advance(step).await;
    let (slow, stalled) = clients.split_at(clients.len() / 2);
    for it in slow {
        it.connection.has_written();
        it.connection.is_write_blocked(WAITING);
    }
    time::advance(step).await;
    for it in slow {
        assert!(it.connection.stalls_at().unwrap() > Instant::now());
        assert!(!it.connection.account());
    }
    assert_eq!(table.memory.held(), 0);
    for it in stalled {
        assert!(it.connection.stalls_at().unwrap() < Instant::now());
        if it.connection.account_stalled() {
            table.free_memory();
        }
        assert_eq!(it.connection.stalls_at(), None);
    }
    assert!(table.memory.held() > 0);
    assert!(table.memory.held() <= MEMORY);
    assert!(!slow.iter().any(is_told_to_close));
    assert!(stalled.iter().any(is_told_to_close));
}

#[tokio::test]
async fn memory_per_connection_is_limited() {
    let table = table(10, 0);
    let greedy = admit(&table, "192.0.2.1").unwrap();
    let other = admit(&table, "192.0.2.1").unwrap();
    for (it, bytes) in [(&other, MEMORY / 64), (&greedy, MEMORY / 64 + 1)] {
        it.connection.has_read(bytes);
        if it.connection.account() {
            table.free_memory();
        }
    }
    assert!(is_told_to_close(&greedy) && !is_told_to_close(&other));
}

#[tokio::test(start_paused = true)]
async fn address_with_few_connections_is_not_displaced_by_one_with_many() {
    let table = table(3, 0);
    let heavy = ["192.0.2.1", "192.0.2.1"].map(|peer| admit(&table, peer).unwrap());
    let _requests = heavy.iter().map(request).collect::<Vec<_>>();
    let light = admit(&table, "198.51.100.1").unwrap();
    for _ in 0..3 {
        assert_eq!(
            admit(&table, "192.0.2.1").unwrap_err(),
            ConnectionLimit::Full
        );
    }
    assert!(!is_told_to_close(&light));
    // An address without connections displaces an address with one connection.
    let _lighter = admit(&table, "203.0.113.1").unwrap();
    assert!(is_told_to_close(&light));
}

#[tokio::test(start_paused = true)]
async fn stalled_clients_are_closed_before_new_ones() {
    let table = table(8, 0);
    let stalled = [(); 7].map(|()| admit(&table, "192.0.2.1").unwrap());
    for it in &stalled {
        let _request = request(it);
        it.connection.is_write_blocked(1);
    }
    tokio::time::advance(STALLED_ENOUGH).await;
    let waiting = admit(&table, "192.0.2.2").unwrap();
    let _newcomers = [(); 2].map(|()| admit(&table, "192.0.2.3").unwrap());
    assert!(!is_told_to_close(&waiting));
    assert_eq!(stalled.iter().filter(|it| is_told_to_close(it)).count(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_light_address_does_not_wait_until_clients_of_a_heavy_one_have_stalled_for_long() {
    let table = table(8, 0);
    let stalled = [(); 8].map(|()| admit(&table, "192.0.2.1").unwrap());
    for it in &stalled {
        let _request = request(it);
        it.connection.is_write_blocked(1);
    }
    assert_eq!(
        admit(&table, "192.0.2.1").unwrap_err(),
        ConnectionLimit::Full
    );
    let _light = admit(&table, "198.51.100.1").unwrap();
    assert_eq!(stalled.iter().filter(|it| is_told_to_close(it)).count(), 1);
    assert_eq!(
        admit(&table, "192.0.2.1").unwrap_err(),
        ConnectionLimit::Full
    );
}
