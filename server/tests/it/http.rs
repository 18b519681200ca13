//! Tests requests that are too large, too slow or not HTTP. Also tests request IDs, the web pages, the metrics port,
//! and stopping the server.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::StreamBody;
use hyper::body::Frame;
use quota_common::ProblemCode;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    app::{Account, TestApp},
    test_with_and_without_direct_responses,
};

const LONG: Duration = Duration::from_secs(20);

/// Sends bytes and reads until the server closes the connection, for at most `LONG`.
async fn raw(addr: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(addr).await.expect("the server listens");
    // The server may respond and close the connection before it has read all bytes.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let read = timeout(LONG, stream.read_to_end(&mut answer)).await;
    assert!(
        read.is_ok(),
        "the connection is still open: {}",
        String::from_utf8_lossy(&answer)
    );
    String::from_utf8_lossy(&answer).into_owned()
}

fn status(answer: &str) -> u16 {
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    code.unwrap_or_else(|| panic!("no response: {answer:?}"))
}

async fn app_and_account() -> (TestApp, Account) {
    let app = TestApp::start().await;
    let account = app.register().await;
    (app, account)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_the_limit_is_413_announced_or_not() {
    let (app, account) = app_and_account().await;
    let limit = app.state.config.body_limit;
    let padded = |length: usize| {
        let mut body = json!({"name": "Gateway"}).to_string();
        body.push_str(&" ".repeat(length - body.len()));
        body
    };
    let send = async |body: reqwest::Body| {
        let call = app.request(reqwest::Method::POST, "/admin/service-tokens");
        call.bearer(&account.access_token)
            .body("application/json", body)
            .send()
            .await
    };
    assert_eq!(
        send(padded(limit).into()).await.status,
        201,
        "the limit itself is allowed"
    );
    let announced = send(padded(limit + 1).into()).await;
    assert_eq!(
        (announced.status, announced.problem()),
        (413, "content-too-large")
    );
    let chunks = |length: usize| {
        let body = padded(length).into_bytes();
        let chunks = body
            .chunks(1000)
            .map(|it| Ok::<_, std::io::Error>(Frame::data(Bytes::copy_from_slice(it))));
        let chunks = chunks.collect::<Vec<_>>();
        reqwest::Body::wrap(StreamBody::new(futures_util::stream::iter(chunks)))
    };
    assert_eq!(send(chunks(limit)).await.status, 201);
    let chunked = send(chunks(limit + 1)).await;
    assert_eq!(
        (chunked.status, chunked.problem()),
        (413, "content-too-large")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn body_that_is_not_json_gets_a_clear_problem() {
    let (app, account) = app_and_account().await;
    let send = async |media_type: &str, body: Vec<u8>| {
        let call = app.request(reqwest::Method::POST, "/admin/service-tokens");
        let answer = call
            .bearer(&account.access_token)
            .body(media_type, body)
            .send()
            .await;
        answer.status
    };
    let good = br#"{"name":"Gateway"}"#.to_vec();
    for media_type in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonp",
        "x",
        "application/json; charset=utf-16",
    ] {
        assert_eq!(send(media_type, good.clone()).await, 415, "{media_type}");
    }
    for media_type in [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
    ] {
        assert_eq!(send(media_type, good.clone()).await, 201, "{media_type}");
    }
    for body in [
        b"".to_vec(),
        b"{".to_vec(),
        b"null".to_vec(),
        b"[]".to_vec(),
        b"\xff\xfe{}".to_vec(),
        b"{\"name\":\"\xff\"}".to_vec(),
        b"{\"name\":\"a\"}{}".to_vec(),
        b"[".repeat(60_000),
        [
            b"{\"a\":".repeat(10_000),
            b"1".to_vec(),
            b"}".repeat(10_000),
        ]
        .concat(),
    ] {
        let shown = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
        assert_eq!(send("application/json", body).await, 400, "{shown}");
    }
    // A missing body counts as an empty object, in which the required field is missing.
    let none = app.request(reqwest::Method::POST, "/admin/service-tokens");
    assert_eq!(none.bearer(&account.access_token).send().await.status, 422);
}

test_with_and_without_direct_responses! {
    too_many_or_too_large_headers_are_rejected,
    slow_headers_are_cut_off_in_time,
    stalled_body_is_answered_in_time,
}

async fn too_many_or_too_large_headers_are_rejected(direct: &str) {
    let app = TestApp::setup()
        .flag(format!("--direct-responses={direct}"))
        .start()
        .await;
    let get = |fields: &str| {
        format!("GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{fields}\r\n")
    };
    assert_eq!(status(&raw(app.addr, get("").as_bytes()).await), 200);
    for fields in [
        "A: b\r\n".repeat(10_000),
        "A: b\r\n".repeat(150),
        format!("A: {}\r\n", "b".repeat(40 * 1024)),
    ] {
        let answer = raw(app.addr, get(&fields).as_bytes()).await;
        assert!(
            answer.is_empty() || [400, 431].contains(&status(&answer)),
            "{answer}"
        );
    }
    let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(70_000));
    let answer = raw(app.addr, long.as_bytes()).await;
    assert!(
        answer.is_empty() || [400, 414, 431].contains(&status(&answer)),
        "{answer}"
    );
    // The server keeps serving other clients.
    assert_eq!(app.get("/health/live").send().await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn non_http_traffic_is_rejected_and_does_no_harm() {
    let app = TestApp::start().await;
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nA\x00: b\r\n\r\n",
        b"POST /auth/login HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /auth/login HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /auth/login HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\nConnection: close\r\n\r\nzz\r\n",
        b"\r\n\r\n\r\n nonsense",
    ] {
        let answer = raw(app.addr, bytes).await;
        assert!(answer.is_empty() || (400..500).contains(&status(&answer)), "{answer}");
    }
    assert_eq!(app.get("/health/live").send().await.status, 200);
}

/// A time limit for responses and closed connections that is shorter than the default timeouts. The shortest of a few
/// attempts counts, because a busy machine delays some of them.
const SHORT: Duration = Duration::from_secs(4);
const ATTEMPTS: usize = 5;

async fn slow_headers_are_cut_off_in_time(direct: &str) {
    let app = TestApp::setup()
        .flag("--header-timeout=1s")
        .flag(format!("--direct-responses={direct}"))
        .start()
        .await;
    let mut took = Duration::MAX;
    for _ in 0..ATTEMPTS {
        took = took.min(slow_headers_take(&app).await);
        if took < SHORT {
            return;
        }
    }
    panic!("{took:?}");
}

/// Sends the head of a request slowly. Returns the time after which the server closes the connection.
async fn slow_headers_take(app: &TestApp) -> Duration {
    let began = Instant::now();
    let mut stream = TcpStream::connect(app.addr)
        .await
        .expect("the server listens");
    stream
        .write_all(b"GET /health/live HTTP/1.1\r\n")
        .await
        .expect("sent");
    let (mut reader, mut writer) = stream.into_split();
    // An occasional byte does not extend the deadline.
    let drip = tokio::spawn(async move {
        while writer.write_all(b"a").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let mut answer = Vec::new();
    let ended = timeout(LONG, reader.read_to_end(&mut answer)).await;
    assert!(ended.is_ok(), "the connection is held open");
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(900), "{took:?}");
    drip.abort();
    took
}

async fn stalled_body_is_answered_in_time(direct: &str) {
    // This server has no short timeout, so that the requests that prepare the test succeed on a busy machine.
    let other = TestApp::start().await;
    let token = other.service_token(&other.register().await).await;
    // The first timeout ends the wait for the body, and the second one ends the handler.
    for (header, request, expected) in [(1, 60, 408), (60, 1, 503)] {
        let app = TestApp::setup()
            .database(other.database.clone())
            .flag(format!("--header-timeout={header}s"))
            .flag(format!("--request-timeout={request}s"))
            .flag(format!("--direct-responses={direct}"))
            .start()
            .await;
        stalled_bodies_get(expected, &app, &token).await;
    }
}

async fn stalled_bodies_get(expected: u16, app: &TestApp, token: &str) {
    for (path, connection) in [
        ("/auth/login", "close"),
        ("/v1/check", "close"),
        // A plain request whose body is incomplete.
        ("/v1/check", "keep-alive"),
    ] {
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: a\r\nX-Service-Token: {token}\r\n\
             Content-Type: application/json\r\nContent-Length: 90\r\nConnection: {connection}\r\n\r\n{{"
        );
        // If the machine is so slow that the head arrives too late, there is no response.
        let mut answer = String::new();
        let mut is_in_time = false;
        for _ in 0..ATTEMPTS {
            let began = Instant::now();
            answer = raw(app.addr, head.as_bytes()).await;
            is_in_time = began.elapsed() < SHORT;
            if is_in_time && !answer.is_empty() {
                break;
            }
        }
        assert_eq!(status(&answer), expected, "{path}: {answer}");
        assert!(is_in_time, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_harmless_request_ids_are_kept() {
    let app = TestApp::start().await;
    let ask = async |id: &[u8]| {
        let value = reqwest::header::HeaderValue::from_bytes(id).expect("a field's value");
        let answer = app
            .http
            .get(app.url("/health/live"))
            .header("x-request-id", value)
            .send()
            .await;
        let answer = answer.expect("the server responds");
        answer.headers()["x-request-id"]
            .to_str()
            .expect("a header value is text")
            .to_owned()
    };
    for good in [
        "trace-1",
        "019ab4e1-7c00-7000-8000-000000000001",
        &"a".repeat(128),
    ] {
        assert_eq!(ask(good.as_bytes()).await, good);
    }
    for bad in [
        "",
        "a b",
        "a\tb",
        "<script>",
        "\"",
        "a;b",
        "ä",
        &"a".repeat(129),
        "\u{1b}[31m",
    ] {
        let Ok(_) = reqwest::header::HeaderValue::from_bytes(bad.as_bytes()) else {
            continue;
        };
        let given = ask(bad.as_bytes()).await;
        assert!(uuid::Uuid::parse_str(&given).is_ok(), "{bad:?}: {given}");
    }
    // Every response has a request ID, including errors.
    for path in ["/", "/nope", "/docs", "/openapi.json", "/admin/plans"] {
        assert!(app.get(path).send().await.header("x-request-id").is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_exist_and_load_nothing_from_other_hosts() {
    let app = TestApp::start().await;
    let slugs = ProblemCode::ALL
        .iter()
        .map(|code| format!("/problems/{}", code.slug()));
    let mut pages = vec!["/".to_owned(), "/docs".into(), "/problems".into()];
    pages.extend(slugs);
    let mut assets = std::collections::BTreeSet::new();
    for page in &pages {
        let answer = app.get(page).send().await;
        assert_eq!(answer.status, 200, "{page}");
        assert_eq!(
            answer.header("content-type"),
            Some("text/html; charset=utf-8"),
            "{page}"
        );
        let csp = answer.header("content-security-policy").expect("a policy");
        assert!(
            csp.starts_with("default-src 'none'") && csp.contains("frame-ancestors 'none'"),
            "{page}: {csp}"
        );
        assert!(
            !csp.contains("script-src 'self' 'unsafe") && !csp.contains("http"),
            "{page}: {csp}"
        );
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        for attribute in ["src=\"", "<link rel=\"stylesheet\" href=\""] {
            for rest in answer.text.split(attribute).skip(1) {
                let target = rest.split('"').next().unwrap_or_default();
                assert!(
                    target.starts_with('/') && !target.starts_with("//"),
                    "{page} loads {target}"
                );
                assets.insert(target.to_owned());
            }
        }
        // Checks that links within the server work.
        for rest in answer.text.split("<a href=\"").skip(1) {
            let target = rest.split('"').next().unwrap_or_default();
            if target.starts_with('/') {
                assert_eq!(
                    app.get(target).send().await.status,
                    200,
                    "{page} links to {target}"
                );
            }
        }
    }
    assert!(assets.len() >= 3, "{assets:?}");
    for asset in assets {
        let answer = app.get(&asset).send().await;
        assert_eq!(answer.status, 200, "{asset}");
        assert!(answer.text.len() > 50, "{asset}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_problem_type_links_to_a_page() {
    let app = TestApp::start().await;
    for code in ProblemCode::ALL {
        let uri = code.type_uri("");
        if uri.starts_with('/') {
            assert_eq!(app.get(&uri).send().await.status, 200, "{uri}");
        } else {
            assert!(
                uri.starts_with("https://iana.org/assignments/http-problem-types#"),
                "{uri}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_only_on_their_own_port() {
    let app = TestApp::start().await;
    assert_eq!(app.get("/metrics").send().await.status, 404);
    let metrics = app
        .http
        .get(format!("http://{}/metrics", app.metrics_addr))
        .send()
        .await;
    assert_eq!(metrics.expect("the server responds").status(), 200);
    let other = app
        .http
        .get(format!("http://{}/admin/plans", app.metrics_addr))
        .send()
        .await;
    assert_eq!(other.expect("the server responds").status(), 404);
}

// The real binary. ------------------------------------------------------------------------------------

/// A running `quota serve`, which is killed when it is dropped.
struct Serving {
    child: Child,
    addr: SocketAddr,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_addr() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("the socket is bound")
}

async fn serving(database_url: &str, flags: &[&str]) -> Serving {
    let addr = free_addr();
    let mut child = Command::new(env!("CARGO_BIN_EXE_quota"))
        .arg("serve")
        .args(flags)
        .env_clear()
        .env("QUOTA_LISTEN", addr.to_string())
        .env("QUOTA_METRICS_LISTEN", "off")
        .env("DATABASE_URL", database_url)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("the binary starts");
    // Read the log to the end, so that the server never blocks on a full pipe.
    let log = BufReader::new(child.stdout.take().expect("the output is piped"));
    std::thread::spawn(move || log.lines().map_while(Result::ok).for_each(drop));
    let serving = Serving { child, addr };
    for _ in 0..1200 {
        let ready = reqwest::get(format!("http://{addr}/health/ready")).await;
        if ready.is_ok_and(|answer| answer.status() == 200) {
            return serving;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the server does not become ready");
}

#[tokio::test(flavor = "multi_thread")]
async fn clean_stop_reports_not_ready_and_finishes_requests_in_flight() {
    let app = TestApp::setup().without_jobs().start().await;
    let flags = [
        "--drain-delay=8s",
        "--header-timeout=60s",
        "--request-timeout=60s",
        "--database-wait=10s",
        "--database-statement-timeout=30s",
    ];
    let mut serving = serving(app.database.url(), &flags).await;
    let addr = serving.addr;

    // Send a request whose body is incomplete.
    let body = r#"{"email":"nobody@example.com","password":"violet-harbour-quilt-93"}"#;
    let mut flight = std::net::TcpStream::connect(addr).expect("the server listens");
    write!(
        flight,
        "POST /auth/login HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{{",
        body.len()
    )
    .expect("sent");

    let pid = i32::try_from(serving.child.id()).expect("a pid");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGTERM,
    )
    .expect("a child process");
    let told = Instant::now();
    loop {
        let ready = reqwest::get(format!("http://{addr}/health/ready"))
            .await
            .expect("the server still accepts requests");
        if ready.status() == 503 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let live = reqwest::get(format!("http://{addr}/health/live")).await;
    assert_eq!(
        live.expect("the liveness probe gets a response").status(),
        200
    );

    // After the server has stopped listening, the request in flight still gets a response.
    while std::net::TcpStream::connect(addr).is_ok() {
        assert!(
            told.elapsed() < Duration::from_secs(60),
            "the server still accepts connections"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(
        serving.child.try_wait().expect("a child process").is_none(),
        "the server waits for the request"
    );
    flight.write_all(&body.as_bytes()[1..]).expect("sent");
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut flight, &mut answer).expect("answered");
    assert_eq!(status(&answer), 401, "{answer}");

    let ended = loop {
        if let Some(ended) = serving.child.try_wait().expect("a child process") {
            break ended;
        }
        assert!(
            told.elapsed() < Duration::from_secs(90),
            "the server does not exit"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(ended.code(), Some(0));
}
