//! Tests malformed requests: the server responds or closes the connection, never fails, and keeps serving other
//! requests.

mod http2;
mod operations;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    ops::Range,
    panic::PanicHookInfo,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fastrand::Rng;
use futures_util::{StreamExt as _, stream};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use self::operations::Caller;
use crate::support::app::TestApp;

const REQUESTS: u64 = 3000;
const AT_A_TIME: usize = 64;
/// The maximum number of requests with one caller's credentials. The number is limited because the access token
/// expires.
const PER_CALLER: u64 = 5000;
/// How long the server must send nothing on an HTTP/2 connection before the test closes the connection.
const QUIET: Duration = Duration::from_millis(300);
/// The maximum duration of a connection. The header and idle timeouts are a second each, but the machine may be busy.
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

/// Returns a request generated from the grammar above. Most parts of the request are valid.
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

/// How a request is generated and encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// HTTP/1, from the grammar above.
    Grammar,
    /// A documented operation with valid credentials, over HTTP/1.
    Operation,
    /// Documented operations over HTTP/2, with several requests on a connection and sometimes with odd frames.
    Http2,
}

impl Kind {
    fn of(seed: u64) -> Self {
        match seed % 4 {
            0 | 1 => Self::Grammar,
            2 => Self::Operation,
            _ => Self::Http2,
        }
    }
}

/// Sends a random HTTP/1 request followed by a valid one, or random HTTP/2 frames. Returns the bytes of the random
/// request or frames, and all data that the server sends until it closes the connection or, over HTTP/2, until it sends
/// nothing for a while.
async fn answers(server: SocketAddr, caller: &Caller, seed: u64) -> (Vec<u8>, Vec<u8>) {
    let mut random = Rng::with_seed(seed);
    let kind = Kind::of(seed);
    let request = match kind {
        Kind::Grammar => request(&mut random),
        Kind::Operation => operations::request(&mut random, caller).http1(),
        Kind::Http2 => http2::connection(&mut random, caller),
    };
    let last: &[u8] = if kind == Kind::Http2 {
        b""
    } else {
        b"GET /health/live HTTP/1.1\r\nHost: q\r\nConnection: close\r\n\r\n"
    };
    let mut stream = TcpStream::connect(server)
        .await
        .expect("the server listens");
    let (mut reader, mut writer) = stream.split();
    let writing = async {
        // Send the request in two parts, occasionally with a pause. A server that has closed the connection does not
        // accept any more data.
        let middle = random.usize(..=request.len());
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
        if kind == Kind::Http2 {
            // Do not read until the server closes the connection: it waits for more streams until the idle timeout.
            while let Ok(Ok(1..)) = timeout(QUIET, reader.read_buf(&mut answers)).await {}
        } else {
            // A reset also ends the connection.
            let _ = reader.read_to_end(&mut answers).await;
        }
    };
    let both = async { tokio::join!(writing, reading) };
    let ended = timeout(ENDED_WITHIN, both).await;
    assert!(
        ended.is_ok(),
        "seed {seed}: the connection is held open: {request:?}"
    );
    (request, answers)
}

/// Registers an account, and creates the resources that requests refer to.
async fn caller(app: &TestApp) -> Caller {
    let account = app.register().await;
    let plan = app.plan(&account, json!({"default_rpm": 600})).await;
    let key = app.key(&account, &plan).await;
    Caller {
        service_token: app.service_token(&account).await,
        key: key.text,
        ids: vec![
            plan,
            key.id,
            app.webhook(&account).await,
            "019ab4e1-7c00-7000-8000-0000000000a1".into(),
        ],
        access_token: account.access_token,
    }
}

/// Returns the seeds of the requests to send. `MALFORMED_REQUESTS=100000` sends more requests, and `MALFORMED_FIRST=7`
/// starts with seed 7.
#[expect(
    clippy::disallowed_methods,
    reason = "the length of a test is not a setting of the server"
)]
fn seeds() -> Range<u64> {
    let number = |name, default| {
        std::env::var(name).map_or(default, |number| number.parse().expect("a number"))
    };
    let first = number("MALFORMED_FIRST", 0);
    first..first + number("MALFORMED_REQUESTS", REQUESTS)
}

/// Returns the number of responses by status, according to the server.
async fn counted(app: &TestApp) -> BTreeMap<u16, u64> {
    let url = format!("http://{}/metrics", app.metrics_addr);
    let text = app.http.get(url).send().await.expect("metrics");
    let text = text.text().await.expect("metrics");
    let lines = text.lines();
    lines
        .filter_map(|line| {
            let rest = line.strip_prefix("quota_http_responses_total{status=\"")?;
            let (status, count) = rest.split_once("\"} ")?;
            Some((status.parse().ok()?, count.parse().ok()?))
        })
        .collect()
}

/// Adds the statuses of HTTP/1 responses to `statuses`. Returns the number of responses.
fn count(
    seed: u64,
    request: &[u8],
    answers: &[u8],
    statuses: &mut BTreeMap<(Kind, String), u64>,
) -> u64 {
    let text = String::from_utf8_lossy(answers);
    let mut found = 0;
    for (at, _) in text.match_indices("HTTP/1.") {
        let Some(status) = text.get(at + 9..at + 12) else {
            continue;
        };
        if status.bytes().all(|byte| byte.is_ascii_digit()) {
            assert!(
                !status.starts_with('5'),
                "seed {seed}: {}\n{text}",
                String::from_utf8_lossy(request)
            );
            let status = (Kind::of(seed), status.to_owned());
            *statuses.entry(status).or_default() += 1;
            found += 1;
        }
    }
    found
}

/// Returns whether a panic is h2's assertion that a connection has no streams when it ends. Only debug builds of h2
/// 0.4.20 contain this assertion. Malformed frames can violate it.
fn is_debug_assertion_of_h2(panic: &PanicHookInfo<'_>) -> bool {
    let file = panic.location().map_or("", |it| it.file());
    file.contains("/h2-0.")
        && file.ends_with("/counts.rs")
        && panic.payload_as_str() == Some("assertion failed: !self.has_streams()")
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_are_refused_and_nothing_fails() {
    let seeds = seeds();
    let requests = seeds.end - seeds.start;
    let panics = Arc::new(AtomicUsize::new(0));
    let (before, counter) = (std::panic::take_hook(), panics.clone());
    std::panic::set_hook(Box::new(move |panic| {
        if !is_debug_assertion_of_h2(panic) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        before(panic);
    }));
    let app = TestApp::setup()
        .flag("--header-timeout=1s")
        .flag("--idle-timeout=1s")
        .flag("--connections-per-address=0")
        .flag("--connections-per-network=0")
        // On a busy machine, this many concurrent requests have to wait for database connections.
        .flag("--database-wait=10s")
        .flag("--database-pool=30")
        // Without jobs, nothing is sent to the accounts' webhooks.
        .without_jobs()
        .start()
        .await;

    let mut statuses = BTreeMap::new();
    let (mut closed, mut over_http2) = (0_u64, 0);
    for first in seeds
        .clone()
        .step_by(usize::try_from(PER_CALLER).expect("it fits"))
    {
        let caller = &caller(&app).await;
        let mut all = stream::iter(first..seeds.end.min(first + PER_CALLER))
            .map(|seed| async move { (seed, answers(app.addr, caller, seed).await) })
            .buffer_unordered(AT_A_TIME);
        while let Some((seed, (request, answers))) = all.next().await {
            let found = if Kind::of(seed) == Kind::Http2 && !answers.starts_with(b"HTTP/1") {
                let responses = http2::responses(&answers);
                over_http2 += responses;
                responses
            } else {
                count(seed, &request, &answers, &mut statuses)
            };
            closed += u64::from(found == 0);
        }
    }
    let by_server = counted(&app).await;
    println!(
        "{requests} requests or HTTP/2 connections, {closed} closed without a response, {over_http2} responses over \
         HTTP/2\nby client, HTTP/1: {statuses:?}\nby server: {by_server:?}"
    );
    // Many requests were parsed, and they were rejected for various reasons.
    let answered = |kind, status: &str| {
        let found = statuses.get(&(kind, status.to_owned()));
        found.copied().unwrap_or_default()
    };
    for status in ["400", "401", "404", "405", "431"] {
        assert!(answered(Kind::Grammar, status) > 0, "{status}");
    }
    assert!(answered(Kind::Grammar, "400") >= requests / 10);
    assert!(answered(Kind::Grammar, "200") >= requests / 40);
    for status in ["200", "201", "400", "401", "404", "415", "422"] {
        assert!(answered(Kind::Operation, status) > 0, "{status}");
    }
    assert!(over_http2 >= requests / 8, "{over_http2}");
    let failed = by_server.range(500..).map(|(_, count)| count);
    assert_eq!(failed.sum::<u64>(), 0, "{by_server:?}");

    assert_eq!(app.get("/health/ready").send().await.status, 200);
    assert_eq!(app.get("/auth/me").send().await.status, 401);
    assert!(app.metric("quota_panics_total").await.abs() < 0.5);
    assert_eq!(panics.load(Ordering::Relaxed), 0);
}
