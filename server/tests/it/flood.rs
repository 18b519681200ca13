//! Tests of what clients can do without an account: sending keys that were never created, holding many connections
//! open, reading or sending slowly, canceling requests, and checking readiness often.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use quota_server::{
    file_limit,
    secret_text::{Kind, SecretText},
};
use reqwest::Client;
use tokio::net::TcpSocket;

use crate::support::{
    app::TestApp,
    http2::{self, CONTINUATION, DATA, END_HEADERS, HEADERS, cancel, field, frame, hello},
    quota::{Quota, data_dir},
    test_with_and_without_direct_responses,
};

const KEYS: u32 = 100_000;
/// The number of requests that a connection sends before it reads the first response.
const BATCH: u32 = 100;

/// Returns a key that is valid except for its checksum.
fn forged(n: u32) -> String {
    let mut bytes = [7; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    let mut text = SecretText::from_bytes(Kind::ApiKey, &bytes).reveal();
    let last = text.pop();
    text.push(if last == Some('0') { '1' } else { '0' });
    text
}

fn count(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).filter(|it| *it == what).count()
}

/// Sends `keys` forged keys, starting with number `first`. Returns how many were rejected with 401.
fn flood(server: SocketAddr, first: u32, keys: u32) -> usize {
    let mut refused = 0;
    for batch in (first..first + keys).step_by(BATCH as usize) {
        let mut stream = TcpStream::connect(server).expect("the server listens");
        let patience = Some(Duration::from_secs(30));
        stream.set_read_timeout(patience).expect("a socket");
        let mut requests = String::new();
        for n in batch..batch + BATCH {
            requests += "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-API-Key: ";
            requests += &forged(n);
            requests += if n == batch + BATCH - 1 {
                "\r\nConnection: close\r\n\r\n"
            } else {
                "\r\n\r\n"
            };
        }
        stream
            .write_all(requests.as_bytes())
            .expect("the server reads");
        let mut answers = Vec::new();
        stream
            .read_to_end(&mut answers)
            .expect("the server responds");
        refused += count(&answers, b"HTTP/1.1 401 ");
    }
    refused
}

#[tokio::test]
async fn flood_of_keys_with_wrong_checksums_causes_no_lookups() {
    const LOOK_UPS: [&str; 4] = [
        "quota_key_cache_hits_total",
        "quota_key_cache_negative_hits_total",
        "quota_key_loads_total",
        "quota_ledger_takes_total",
    ];
    let (data, http) = (data_dir(), Client::new());
    let quota = Quota::start(data.path());
    let malformed = "quota_keys_malformed_total";
    assert_eq!(quota.counter(&http, malformed).await, 0);
    let mut before = Vec::new();
    for name in LOOK_UPS {
        before.push(quota.counter(&http, name).await);
    }

    let server = quota.addr;
    let floods =
        [0, KEYS / 2].map(|first| std::thread::spawn(move || flood(server, first, KEYS / 2)));
    let mut refused = 0;
    for flood in floods {
        refused += flood.join().expect("every request got a response");
    }
    assert_eq!(refused, KEYS as usize);

    assert_eq!(quota.counter(&http, malformed).await, u64::from(KEYS));
    for (name, before) in LOOK_UPS.into_iter().zip(before) {
        assert_eq!(quota.counter(&http, name).await, before, "{name}");
    }
    quota.stop();
}

/// The number of files that this process may have open in addition to the hostile sockets.
const OWN_FILES: usize = 600;
const SILENT: usize = 20_000;
/// The number of connections from one address, and the number of addresses in one network. Both are below their limits,
/// so that only the total limit applies.
const FROM_ONE_ADDRESS: usize = 500;
const ADDRESSES: usize = 4;
/// The maximum duration of a request, even on a busy machine.
const ANSWERED_WITHIN: Duration = Duration::from_secs(5);

/// Returns the source address of hostile connection `n`.
fn hostile(n: usize) -> Ipv4Addr {
    let address = n / FROM_ONE_ADDRESS;
    let octet = |n: usize| u8::try_from(n % 250 + 1).expect("below 256");
    Ipv4Addr::new(
        127,
        0,
        octet(address / ADDRESSES),
        octet(address % ADDRESSES),
    )
}

async fn connect_from(
    source: Ipv4Addr,
    server: SocketAddr,
) -> std::io::Result<tokio::net::TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((source, 0).into())?;
    socket.connect(server).await
}

fn client_at(source: Ipv4Addr) -> Client {
    let client = Client::builder().local_address(std::net::IpAddr::from(source));
    let client = client.pool_max_idle_per_host(0).timeout(ANSWERED_WITHIN);
    client.build().expect("a client")
}

test_with_and_without_direct_responses! {
    silent_connections_do_not_lock_out_others,
    slow_http1_connections_hold_little_memory,
}

/// Opens as many connections as the open-file limit allows, up to 20,000.
async fn silent_connections_do_not_lock_out_others(direct: &str) {
    let limit = file_limit::raise().unwrap_or(1024);
    let silent = SILENT.min(limit.saturating_sub(OWN_FILES));
    // There are fewer slots than silent connections.
    let places = (silent / 2).to_string();
    let (data, http) = (data_dir(), Client::new());
    let settings = [
        ("QUOTA_CONNECTIONS", places.as_str()),
        ("QUOTA_DIRECT_RESPONSES", direct),
    ];
    let quota = Quota::start_with(data.path(), &settings);
    let before = quota.memory();

    let (server, metrics) = (quota.addr, quota.metrics_addr);
    let flood = tokio::spawn(async move {
        let mut held = Vec::with_capacity(silent);
        for n in 0..silent {
            // One connection in a hundred is opened to the metrics listener.
            let to = if n % 100 == 0 { metrics } else { server };
            match connect_from(hostile(n), to).await {
                Ok(stream) => held.push(stream),
                Err(error) => panic!("connection {n}: {error}"),
            }
        }
        held
    });
    // Each request opens a new connection, from a separate address or from one of the flood's addresses.
    let clients = [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 1, 1)].map(client_at);
    let began = Instant::now();
    let (mut answered, mut slowest) = (0, Duration::ZERO);
    while !flood.is_finished() || began.elapsed() < Duration::from_secs(4) {
        for (client, port) in [
            (&clients[0], server),
            (&clients[1], server),
            (&clients[0], metrics),
        ] {
            let path = if port == metrics {
                "metrics"
            } else {
                "health/live"
            };
            let asked = Instant::now();
            let answer = client.get(format!("http://{port}/{path}")).send().await;
            let status = answer.map(|answer| answer.status().as_u16());
            assert_eq!(status.ok(), Some(200), "{path} after {:?}", began.elapsed());
            slowest = slowest.max(asked.elapsed());
            answered += 1;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let held = flood.await.expect("the task ends");
    let grown = quota.memory().saturating_sub(before) / (1 << 20);
    println!(
        "{} silent connections in {:?}: {answered} requests answered, the slowest in {slowest:?}, {grown} MiB more",
        held.len(),
        began.elapsed()
    );
    assert!(answered >= 30, "{answered}");
    assert!(grown < 150, "{grown} MiB");

    // Silent connections are closed in time even if no other client needs their slots.
    for listener in ["public", "metrics"] {
        let open = format!("quota_connections_open{{listener=\"{listener}\"}}");
        let ended = Instant::now();
        while quota.counter(&http, &open).await > 10 {
            assert!(
                ended.elapsed() < Duration::from_secs(30),
                "{listener}: silent connections are held open"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    let timed_out =
        "quota_connections_timed_out_total{listener=\"public\",waiting_for=\"request\"}";
    assert!(quota.counter(&http, timed_out).await > 0);
    drop(held);
    quota.stop();
}

/// Runs an HTTP/2 client that opens no flow-control window, periodically sends a request and cancels the previous one,
/// and reconnects when its connection is closed.
async fn cancels_and_comes_back(source: Ipv4Addr, server: SocketAddr) {
    use tokio::io::AsyncWriteExt as _;
    loop {
        let Ok(mut stream) = connect_from(source, server).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let mut next = [hello(0), http2::get(1, "/health/live")].concat();
        for id in (3..).step_by(2) {
            if stream.write_all(&next).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(400)).await;
            next = [http2::get(id, "/openapi.json"), cancel(id - 2)].concat();
        }
        // Pause, because the clients run on the same machine as the server.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_cancel_unread_responses_do_not_lock_out_others() {
    const PLACES: usize = 200;
    let data = data_dir();
    let places = PLACES.to_string();
    let settings = [("QUOTA_CONNECTIONS", places.as_str())];
    let quota = Quota::start_with(data.path(), &settings);
    let (server, http) = (quota.addr, Client::new());
    let flood = (0..2 * PLACES)
        .map(|n| tokio::spawn(cancels_and_comes_back(hostile(10 * n), server)))
        .collect::<Vec<_>>();
    let client = client_at(Ipv4Addr::LOCALHOST);
    let (began, mut answered, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    // On a busy machine, ten responses can take longer.
    while began.elapsed() < Duration::from_secs(8) || answered < 10 {
        let asked = Instant::now();
        // While all slots are in use, a new client may have to retry.
        let mut status = None;
        while status.is_none() && asked.elapsed() < ANSWERED_WITHIN {
            let answer = client.get(format!("http://{server}/health/live")).send();
            status = answer.await.ok().map(|answer| answer.status().as_u16());
        }
        assert_eq!(status, Some(200), "after {:?}", began.elapsed());
        slowest = slowest.max(asked.elapsed());
        answered += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!("{answered} requests answered, the slowest in {slowest:?}");
    let dropped = "quota_connections_dropped_total{listener=\"public\"}";
    assert!(quota.counter(&http, dropped).await > 0);
    for client in flood {
        client.abort();
    }
    quota.stop();
}

/// The number of connections of each kind. The connections use as much memory as they can by sending or reading slowly.
const SLOW: usize = 2000;
/// The maximum increase in memory, in MiB.
const MOST: u64 = 64;
/// The maximum increase in memory with many concurrent requests, in MiB. Their handlers end only some time after the
/// connections have closed. In a debug build, these handlers use most of the memory.
const MOST_AT_A_TIME: u64 = 128;
const LARGE: usize = 31 * 1024;

/// A kind of connection, the data that each connection sends, and the maximum increase in memory.
type Slow = (&'static str, Vec<u8>, u64);

/// Returns the beginning of a body.
fn slow_body() -> String {
    format!("{{{}", " ".repeat(60_000))
}

/// Returns the kinds of connections over HTTP/1. Bodies are sent to endpoints that need no account, or that reject the
/// request.
fn slow_http1() -> [Slow; 6] {
    let head = |length| {
        let value = "v".repeat(length);
        format!("GET / HTTP/1.1\r\nHost: q\r\nA: {value}").into_bytes()
    };
    let post = |path| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: q\r\nContent-Type: application/json\r\n\
             Content-Length: 65000\r\n\r\n{}",
            slow_body()
        )
        .into_bytes()
    };
    let get = |path, times| {
        format!("GET {path} HTTP/1.1\r\nHost: q\r\n\r\n")
            .repeat(times)
            .into_bytes()
    };
    [
        ("slow heads", head(LARGE), MOST),
        // The longest heads of requests that may get direct responses.
        ("shorter slow heads", head(LARGE / 2), MOST),
        ("slow bodies", post("/auth/login"), MOST),
        ("slow bodies of checks", post("/v1/check"), MOST),
        ("stalled reads", get("/openapi.json", 100), MOST_AT_A_TIME),
        // The responses are larger than the buffers of both sockets.
        (
            "stalled reads of rejections",
            get("/v1/echo", 20_000),
            MOST_AT_A_TIME,
        ),
    ]
}

/// Returns the kinds of connections over HTTP/2.
fn slow_http2() -> [Slow; 5] {
    let value = |length: usize| "v".repeat(length);
    let body = slow_body();
    let json = || field("content-type", "application/json");
    let streams = || (1..64).step_by(2);
    let reads = |window, path| {
        let requests = streams().flat_map(|id| http2::get(id, path));
        [hello(window), requests.collect()].concat()
    };
    let login = |id| {
        let head = [
            http2::head("POST", "/auth/login"),
            json(),
            field("a", &value(15_000)),
        ];
        frame(HEADERS, END_HEADERS, id, &head.concat())
    };
    let one_login = [
        hello(0),
        login(1),
        (0..4)
            .flat_map(|n| frame(DATA, 0, 1, &body.as_bytes()[n * 15_000..][..15_000]))
            .collect(),
    ];
    let logins = [
        hello(0),
        streams().flat_map(login).collect(),
        streams()
            .flat_map(|id| frame(DATA, 0, id, &body.as_bytes()[..1900]))
            .collect(),
    ];
    let slow_head = [
        hello(0),
        http2::get(1, "/health/live"),
        frame(HEADERS, 0, 3, &field("a", &value(LARGE / 2))),
        frame(CONTINUATION, 0, 3, &field("b", &value(LARGE / 2 - 64))),
    ];
    [
        ("HTTP/2, slow heads", slow_head.concat(), MOST),
        ("HTTP/2, slow bodies", one_login.concat(), MOST),
        (
            "HTTP/2, 32 slow bodies each",
            logins.concat(),
            MOST_AT_A_TIME,
        ),
        (
            "HTTP/2, 32 stalled reads of nothing each",
            reads(0, "/health/live"),
            MOST_AT_A_TIME,
        ),
        (
            "HTTP/2, 32 stalled reads of a byte each",
            reads(1, "/openapi.json"),
            MOST_AT_A_TIME,
        ),
    ]
}

async fn slow_http1_connections_hold_little_memory(direct: &str) {
    hold_little_memory(&slow_http1(), direct).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_http2_connections_hold_little_memory() {
    hold_little_memory(&slow_http2(), "off").await;
}

async fn hold_little_memory(kinds: &[Slow], direct: &str) {
    use tokio::io::AsyncWriteExt as _;
    let limit = file_limit::raise().unwrap_or(1024);
    let slow = SLOW.min(limit.saturating_sub(OWN_FILES));
    let (data, http) = (data_dir(), Client::new());
    // The limits on sign-in attempts are turned off, because they would reject the bodies.
    let settings = [
        ("QUOTA_AUTH_RPM", "0"),
        ("QUOTA_LOGIN_FREE_FAILURES", "0"),
        ("QUOTA_DIRECT_RESPONSES", direct),
    ];
    let accepted = "quota_connections_accepted_total{listener=\"public\"}";
    for (kind, bytes, most) in kinds {
        let quota = Quota::start_with(data.path(), &settings);
        quota.counter(&http, accepted).await;
        let before = quota.memory();
        let (bytes, server) = (Arc::new(bytes.clone()), quota.addr);
        let first = quota.counter(&http, accepted).await;
        let mut clients = Vec::new();
        for n in 0..slow {
            let bytes = bytes.clone();
            clients.push(tokio::spawn(async move {
                let stream = connect_from(hostile(n), server).await;
                if let Ok(mut stream) = stream {
                    // The server may close the connection, or stop reading.
                    let _ = stream.write_all(&bytes).await;
                    std::future::pending::<()>().await;
                }
            }));
        }
        let (began, mut peak) = (Instant::now(), 0);
        let mut all = None;
        while all.is_none_or(|all: Instant| all.elapsed() < Duration::from_secs(2)) {
            peak = peak.max(quota.memory());
            let seen = quota.counter(&http, accepted).await - first;
            if all.is_none() && seen >= slow as u64 {
                all = Some(Instant::now());
            }
            assert!(began.elapsed() < Duration::from_secs(120), "{kind}: {seen}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let grown = peak.saturating_sub(before) / (1 << 20);
        println!("{slow} connections, {kind}: at most {grown} MiB more");
        assert!(grown < *most, "{kind}: {grown} MiB");
        let answer = http.get(format!("http://{server}/health/live")).send();
        assert_eq!(answer.await.expect("the server responds").status(), 200);
        for client in clients {
            client.abort();
        }
        quota.stop();
    }
}

/// Downloads the OpenAPI document at about 40 kB/s. Returns its length, or how many bytes arrived before the server
/// closed the connection.
async fn download_slowly(source: Ipv4Addr, server: SocketAddr) -> Result<usize, usize> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    const PART: usize = 4 * 1024;
    let socket = TcpSocket::new_v4().expect("a socket");
    socket
        .set_recv_buffer_size(8 * 1024)
        .expect("a small buffer");
    socket.bind((source, 0).into()).expect("a loopback address");
    let mut stream = socket.connect(server).await.map_err(|_| 0_usize)?;
    let request = b"GET /openapi.json HTTP/1.1\r\nHost: q\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await.map_err(|_| 0_usize)?;
    let (mut response, mut part) = (Vec::new(), [0; PART]);
    let mut parts = tokio::time::interval(Duration::from_millis(100));
    loop {
        parts.tick().await;
        match stream.read(&mut part).await {
            Ok(0) => break,
            Ok(length) => response.extend_from_slice(&part[..length]),
            Err(_) => return Err(response.len()),
        }
    }
    let head = response.windows(4).position(|it| it == b"\r\n\r\n");
    let body = &response[head.map_or(response.len(), |head| head + 4)..];
    match serde_json::from_slice::<serde_json::Value>(body) {
        Ok(_) => Ok(body.len()),
        Err(_) => Err(response.len()),
    }
}

/// Some clients read slowly, and others do not read at all. Only the connections of clients that do not read are
/// closed.
#[tokio::test(flavor = "multi_thread")]
async fn slow_downloads_complete_beside_clients_that_do_not_read() {
    use tokio::io::AsyncWriteExt as _;
    const DOWNLOADS: u8 = 200;
    const STALLED: usize = 1000;
    let (data, http) = (data_dir(), Client::new());
    let quota = Quota::start(data.path());
    let server = quota.addr;
    let stalled = (0..STALLED).map(|n| {
        tokio::spawn(async move {
            let request = b"GET /openapi.json HTTP/1.1\r\nHost: q\r\n\r\n";
            if let Ok(mut stream) = connect_from(hostile(n), server).await {
                // The server may close the connection.
                let _ = stream.write_all(&request.repeat(20)).await;
                std::future::pending::<()>().await;
            }
        })
    });
    let stalled = stalled.collect::<Vec<_>>();
    let downloads = (0..2 * u16::from(DOWNLOADS)).map(|n| {
        let [network, host] = [n / u16::from(DOWNLOADS), n % u16::from(DOWNLOADS) + 1];
        let octet = |n: u16| u8::try_from(n).expect("below 256");
        let source = Ipv4Addr::new(127, 1, octet(network), octet(host));
        tokio::spawn(download_slowly(source, server))
    });
    let downloads = downloads.collect::<Vec<_>>();
    let mut cut_off = Vec::new();
    for download in downloads {
        if let Err(length) = download.await.expect("the task ends") {
            cut_off.push(length);
        }
    }
    assert!(
        cut_off.is_empty(),
        "{} downloads: {cut_off:?}",
        cut_off.len()
    );
    let dropped = "quota_connections_dropped_total{listener=\"public\"}";
    assert!(quota.counter(&http, dropped).await > 0);
    for client in stalled {
        client.abort();
    }
    quota.stop();
}

/// Sends a request and keeps the connection open. Returns `None` if the server closed the connection without a
/// response.
async fn ask_on(stream: &mut tokio::net::TcpStream) -> Option<String> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let request = b"GET /health/live HTTP/1.1\r\nHost: q\r\n\r\n";
    stream.write_all(request).await.ok()?;
    let mut answer = vec![0; 4096];
    let read = tokio::time::timeout(ANSWERED_WITHIN, stream.read(&mut answer)).await;
    let length = read
        .expect("the server responds or closes the connection")
        .ok()?;
    (length > 0).then(|| String::from_utf8_lossy(&answer[..length]).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn address_at_its_connection_limit_does_not_affect_others() {
    let app = TestApp::setup()
        .flag("--connections-per-address=5")
        .flag("--trusted-proxies=127.0.2.9")
        .start()
        .await;
    let at = async |network: u8, last: u8| {
        let mut stream = connect_from(Ipv4Addr::new(127, 0, network, last), app.addr)
            .await
            .expect("the server listens");
        ask_on(&mut stream).await.map(|_| stream)
    };
    let mut limited = None;
    for network in 10..30 {
        let began = Instant::now();
        let mut held = Vec::new();
        for _ in 0..5 {
            held.push(at(network, 1).await.expect("within its share"));
        }
        // For a moment, an address may have up to twice as many connections as its limit allows.
        let mut refused = 0;
        for _ in 0..15 {
            match at(network, 1).await {
                Some(stream) => held.push(stream),
                None => refused += 1,
            }
        }
        // A new connection replaces a connection that has been idle for a second. On a busy machine, repeat this step
        // from another network.
        if began.elapsed() < Duration::from_millis(900) {
            assert!(refused >= 5, "beyond its share: {refused}");
            limited = Some((network, held));
            break;
        }
    }
    let (network, mut held) = limited.expect("the machine is too busy");
    held.push(at(network, 2).await.expect("another address"));
    for _ in 0..20 {
        let stream = at(2, 9).await;
        held.push(stream.expect("a trusted proxy serves many clients"));
    }
    // The address's existing connections keep working.
    assert!(ask_on(&mut held[0]).await.is_some());
    held.remove(0);
    let again = async {
        while at(network, 1).await.is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let again = tokio::time::timeout(ANSWERED_WITHIN, again).await;
    assert!(again.is_ok(), "no connection was accepted again");
    let refused = "quota_connections_rejected_total{listener=\"public\",limit=\"address\"}";
    assert!(app.metric(refused).await >= 1.0);
}

/// Anyone may check readiness, so most checks must not query PostgreSQL.
#[tokio::test(flavor = "multi_thread")]
async fn flood_of_readiness_checks_rarely_queries_postgres() {
    let app = TestApp::setup().without_jobs().start().await;
    let client = app.database.connect().await;
    // Reads PostgreSQL's own statistics, which are written with a delay.
    let scans = async || {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let sql = "SELECT coalesce(sum(seq_scan + coalesce(idx_scan, 0)), 0)::bigint FROM pg_stat_user_tables \
                   WHERE relname = '__diesel_schema_migrations'";
        client
            .query_one(sql, &[])
            .await
            .expect("statistics")
            .get::<_, i64>(0)
    };
    assert_eq!(app.get("/health/ready").send().await.status, 200);
    let before = scans().await;
    let began = Instant::now();
    for _ in 0..20 {
        let all = (0..25).map(|_| async { app.get("/health/ready").send().await.status });
        let all = futures_util::future::join_all(all).await;
        assert!(all.iter().all(|status| *status == 200), "{all:?}");
    }
    let took = began.elapsed();
    let asked = scans().await - before;
    let at_most = i64::try_from(took.as_millis() / 250 + 2).expect("a short time");
    assert!((1..=at_most).contains(&asked), "{asked} times in {took:?}");
}
