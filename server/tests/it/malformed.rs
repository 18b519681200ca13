//! Tests malformed requests: the server responds or closes the connection, never fails, and keeps serving other
//! requests.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fastrand::Rng;
use futures_util::{StreamExt as _, stream};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::support::app::TestApp;

const REQUESTS: u64 = 3000;
const AT_A_TIME: usize = 64;
/// The maximum duration of a connection: every deadline is a second, and the machine may be busy.
const ENDED_WITHIN: Duration = Duration::from_secs(30);

const METHODS: &[&str] = &[
    "GET", "POST", "PATCH", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PRI", "get",
    "", "G ET", "GÉT", "G\0T", "GET\t", "(", "QUERY",
];
const PATHS: &[&str] = &[
    "/",
    "/v1/echo",
    "/v1/check",
    "/v1/forward-auth",
    "/auth/login",
    "/auth/login",
    "/auth/login",
    "/auth/refresh",
    "/auth/refresh",
    "/auth/register",
    "/auth/register",
    "/auth/register",
    "/auth/me",
    "/admin/plans",
    "/admin/plans/0/1/2",
    "/admin/api-keys",
    "/admin/api-keys/019ab4e1-7c00-7000-8000-0000000000a1",
    "/admin/usage",
    "/openapi.json",
    "/docs",
    "/problems/invalid-request",
    "/console",
    "/console/../../etc/passwd",
    "/health/live",
    "*",
    "",
    "q",
    "q:80",
    "http://q/v1/echo",
    "http://[::1/v1/echo",
    "http://user:secret@q:99999/",
    "//",
    "///v1//echo",
    "\\v1\\echo",
];
const TAILS: &[&str] = &[
    "",
    "?",
    "?cursor=%ff",
    "?limit=-1&limit=2",
    "?limit=99999999999999999999",
    "?from=x&to=%00",
    "%",
    "%zz",
    "%00",
    "%2e%2e/",
    "/../..",
    "#part",
    " x",
    "\u{e4}",
    "\u{1f511}",
    "\u{0}",
    "\u{7f}",
    ";a=b",
    "?a[]=1&a[b]=2",
];
const VERSIONS: &[&str] = &[
    "HTTP/1.1",
    "HTTP/1.1",
    "HTTP/1.1",
    "HTTP/1.0",
    "HTTP/0.9",
    "HTTP/2.0",
    "HTTP/3",
    "HTTP/1.",
    "HTTP/1.11",
    "http/1.1",
    "HTCPCP/1.0",
    "",
    "HTTP/1.1 ",
];
const ENDS: &[&str] = &[
    "\r\n", "\r\n", "\r\n", "\r\n", "\n", "\r", "\r\r\n", "\n\r", "",
];
const NAMES: &[&str] = &[
    "Host",
    "host",
    "Content-Length",
    "Transfer-Encoding",
    "Content-Type",
    "X-API-Key",
    "X-Service-Token",
    "Authorization",
    "Cookie",
    "X-Request-ID",
    "X-Forwarded-For",
    "X-Forwarded-Uri",
    "X-Forwarded-Method",
    "Origin",
    "Accept-Encoding",
    "Accept",
    "Expect",
    "Upgrade",
    "HTTP2-Settings",
    "Connection",
    "Range",
    "If-None-Match",
    "If-Modified-Since",
    "Idempotency-Key",
    "Trailer",
    "TE",
    "",
    " ",
    "A B",
    "A:",
    "Ä",
    "\0",
    ":path",
];
const VALUES: &[&str] = &[
    "q",
    "q:80",
    "q, q",
    "0",
    "1",
    "5",
    "5, 5",
    "+5",
    "-1",
    "0x5",
    "5 5",
    "1000000000",
    "18446744073709551616",
    "99999999999999999999999999",
    "chunked",
    "chunked, identity",
    "identity, chunked",
    " chunked",
    "xchunked",
    "gzip",
    "application/json",
    "application/json; charset=utf-16",
    "application/json; charset",
    "text/plain",
    ";",
    "/",
    "Bearer",
    "Bearer ",
    "Bearer x",
    "Bearer a.b.c",
    "Bearer eyJhbGciOiJub25lIn0.e30.",
    "Basic !!!",
    "Basic cTpx",
    "qk_00000000000000000000000000000000000000",
    "qs_\u{e4}",
    "a=b; a=c; =; ;;",
    "__Host-quota_refresh=qr_x",
    "100-continue",
    "200-ok",
    "h2c",
    "websocket",
    "close",
    "keep-alive, Upgrade",
    "content-length",
    "bytes=0-0,5-1,-",
    "W/\"",
    "gzip;q=2, br;q=-1, *;q=x",
    "1.2.3.4, 999.1.1.1, [::1]:x, unknown",
    "null",
    "https://evil.example",
    "Thu, 99 Foo 0000 25:61:61 GMT",
    "",
    "\t",
    "\u{0}",
    "\u{80}\u{ff}",
    "a\r\n b",
    "a\rb",
];
const BODIES: &[&str] = &[
    "",
    "{}",
    "[]",
    "null",
    "{",
    "{\"name\":",
    "{\"name\":\"a\",\"name\":\"b\"}",
    "{\"email\":1,\"password\":null}",
    "{\"email\":\"a@b\",\"password\":\"\\ud800\"}",
    "{\"cost\":1e999}",
    "{\"cost\":-0.0}",
    "{\"cost\":99999999999999999999}",
    "{\"key\":\"qk_\",\"cost\":1}",
    "\u{feff}{}",
    "0\r\n\r\n",
    "2\r\n{}\r\n0\r\n\r\n",
    "2;ext=\"\r\n{}\r\n0\r\nA: b\r\n\r\n",
    "fffffffffffffffff\r\n{}\r\n",
    "-1\r\n{}\r\n0\r\n\r\n",
    "2\n{}\n0\n\n",
    "zz\r\n",
    "5\r\n{}\r\n0\r\n\r\n",
];

fn pick<'a>(random: &mut Rng, from: &[&'a str]) -> &'a str {
    random.choice(from).copied().unwrap_or_default()
}

/// Returns a request generated from the grammar above, in which most parts are valid and some are not.
fn request(random: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::new();
    let is_usual = |random: &mut Rng| random.u8(..10) < 8;
    let end = |random: &mut Rng| {
        if random.u8(..30) == 0 {
            pick(random, ENDS)
        } else {
            "\r\n"
        }
    };
    let method = if is_usual(random) {
        pick(random, &METHODS[..5])
    } else {
        pick(random, METHODS)
    };
    let tail = if is_usual(random) {
        ""
    } else {
        pick(random, TAILS)
    };
    let version = if is_usual(random) {
        VERSIONS[0]
    } else {
        pick(random, VERSIONS)
    };
    let mut target = pick(random, PATHS).to_owned() + tail;
    if random.u8(..50) == 0 {
        target += &"/x".repeat(random.usize(1..20_000));
    }
    bytes.extend(format!("{method} {target} {version}{}", end(random)).into_bytes());
    let body = match random.u8(..12) {
        0 => "[".repeat(random.usize(1..70_000)).into_bytes(),
        1 => (0..random.usize(1..2000)).map(|_| random.u8(..)).collect(),
        _ => pick(random, BODIES).as_bytes().to_vec(),
    };
    if is_usual(random) {
        bytes.extend_from_slice(b"Host: q\r\n");
    }
    match random.u8(..10) {
        0 => {}
        1 => bytes.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        _ => bytes.extend(format!("Content-Length: {}\r\n", body.len()).into_bytes()),
    }
    if is_usual(random) {
        bytes.extend_from_slice(b"Content-Type: application/json\r\n");
    }
    for _ in 0..random.u8(..4) {
        let separator = pick(random, &[": ", ": ", ": ", ":", " : ", "", "\0", "\t:"]);
        let (name, value) = (pick(random, NAMES), pick(random, VALUES));
        bytes.extend(format!("{name}{separator}{value}{}", end(random)).into_bytes());
    }
    match random.u8(..60) {
        0 => bytes.extend("A: b\r\n".repeat(random.usize(1..300)).into_bytes()),
        1 => {
            let value = "v".repeat(random.usize(1..60_000));
            bytes.extend(format!("{}: {value}\r\n", pick(random, NAMES)).into_bytes());
        }
        _ => {}
    }
    bytes.extend(end(random).as_bytes());
    bytes.extend(body);
    // Sometimes, change or insert some bytes, or truncate the request.
    if random.u8(..8) == 0 && !bytes.is_empty() {
        for _ in 0..random.u8(1..4) {
            let at = random.usize(..bytes.len());
            match random.u8(..3) {
                0 => bytes[at] = random.u8(..),
                1 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, random.u8(..)),
            }
        }
    }
    bytes
}

/// Sends a random request, followed by a valid request. Returns all data that the server sends until it closes the
/// connection.
async fn answers(server: std::net::SocketAddr, seed: u64) -> Vec<u8> {
    let mut random = Rng::with_seed(seed);
    let request = request(&mut random);
    let mut stream = TcpStream::connect(server)
        .await
        .expect("the server listens");
    let (mut reader, mut writer) = stream.split();
    let writing = async {
        // Send the request in two parts, occasionally with a pause. A server that has closed the connection does not
        // accept any more data.
        let middle = random.usize(..=request.len());
        let last = b"GET /health/live HTTP/1.1\r\nHost: q\r\nConnection: close\r\n\r\n";
        for part in [&request[..middle], &request[middle..], last] {
            if writer.write_all(part).await.is_err() {
                break;
            }
            if random.u8(..20) == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    };
    let mut answers = Vec::new();
    let reading = async {
        // A reset also ends the connection.
        let _ = reader.read_to_end(&mut answers).await;
    };
    let both = async { tokio::join!(writing, reading) };
    let ended = timeout(ENDED_WITHIN, both).await;
    assert!(
        ended.is_ok(),
        "seed {seed}: the connection is held open: {request:?}"
    );
    answers
}

/// Returns the number of requests to send. Set `MALFORMED_REQUESTS=100000` to send more.
#[expect(
    clippy::disallowed_methods,
    reason = "the length of a test is not a setting of the server"
)]
fn requests() -> u64 {
    std::env::var("MALFORMED_REQUESTS").map_or(REQUESTS, |number| number.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_are_refused_and_nothing_fails() {
    let requests = requests();
    let panics = Arc::new(AtomicUsize::new(0));
    let (before, counted) = (std::panic::take_hook(), panics.clone());
    std::panic::set_hook(Box::new(move |panic| {
        counted.fetch_add(1, Ordering::Relaxed);
        before(panic);
    }));
    let app = TestApp::setup()
        .flag("--header-timeout=1s")
        .flag("--idle-timeout=1s")
        .flag("--connections-per-address=0")
        .flag("--connections-per-network=0")
        .start()
        .await;

    let mut statuses = BTreeMap::<String, u64>::new();
    let mut all = stream::iter(0..requests)
        .map(|seed| async move { (seed, answers(app.addr, seed).await) })
        .buffer_unordered(AT_A_TIME);
    while let Some((seed, answers)) = all.next().await {
        let text = String::from_utf8_lossy(&answers);
        let mut found = 0;
        for (at, _) in text.match_indices("HTTP/1.") {
            let Some(status) = text.get(at + 9..at + 12) else {
                continue;
            };
            if status.bytes().all(|byte| byte.is_ascii_digit()) {
                assert!(!status.starts_with('5'), "seed {seed}: {text}");
                *statuses.entry(status.to_owned()).or_default() += 1;
                found += 1;
            }
        }
        if found == 0 {
            *statuses.entry("closed".to_owned()).or_default() += 1;
        }
    }
    drop(all);
    println!("{requests} requests: {statuses:?}");
    // Each of these statuses must occur, so that the requests are known to reach the endpoints.
    let answered = |status: &str| statuses.get(status).copied().unwrap_or_default();
    for status in ["400", "401", "404", "405", "415", "422"] {
        assert!(answered(status) > 0, "{status}: {statuses:?}");
    }
    assert!(answered("400") >= requests / 5, "{statuses:?}");
    assert!(answered("200") >= requests / 20, "{statuses:?}");

    assert_eq!(app.get("/health/ready").send().await.status, 200);
    assert_eq!(app.get("/auth/me").send().await.status, 401);
    assert!(app.metric("quota_panics_total").await.abs() < 0.5);
    assert_eq!(panics.load(Ordering::Relaxed), 0);
}
