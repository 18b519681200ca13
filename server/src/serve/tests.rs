use std::{
    io::Write as _,
    panic::{AssertUnwindSafe, resume_unwind},
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures_util::{FutureExt as _, stream};
use poem::{EndpointExt, endpoint::make};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;
use crate::{
    connection_marks::ConnectionMarks,
    plain_request::{Arrival, DirectEndpoint, PlainRequest},
};

const HEADER: Duration = Duration::from_millis(300);
const IDLE: Duration = Duration::from_millis(900);
const WRITE: Duration = Duration::from_millis(600);
/// More than any socket can buffer.
const LARGE: usize = 32 * 1024 * 1024;

const MEDIUM: usize = 50 * 1024;

/// The process counts as paused if a timer fires later than this. Shorter pauses do not affect the tests.
const LATENESS: Duration = Duration::from_millis(10);
/// The maximum number of attempts of a test that fails because of pauses.
const ATTEMPTS: u32 = 5;

async fn endpoint(request: poem::Request) -> poem::Body {
    match request.uri().path() {
        "/large" => vec![b'x'; LARGE].into(),
        "/medium" => vec![b'x'; MEDIUM].into(),
        "/never" => std::future::pending().await,
        "/foreign" => {
            let body = request.into_body().into_string().await;
            assert_eq!(body.expect("the body arrives"), "abc");
            "here".into()
        }
        "/tolerant" => {
            let _ = request.into_body().into_bytes().await;
            "here".into()
        }
        "/events" => quiet_events(request.data().expect("an HTTP/2 connection")),
        _ => "here".into(),
    }
}

/// Returns a body of occasional comments, as in an idle event stream.
fn quiet_events(connection: &ConnectionMarks) -> poem::Body {
    let endless = connection.begin_endless_response();
    poem::Body::from_bytes_stream(stream::unfold(endless, async |endless| {
        time::sleep(WRITE / 3).await;
        Some((Ok::<_, io::Error>(Bytes::from_static(b":\n\n")), endless))
    }))
}

/// Whether plain requests over HTTP/1 are served directly or by hyper.
#[derive(Debug, Clone, Copy)]
enum Way {
    Direct,
    Hyper,
}

/// Responds to most targets like [`endpoint`], and to some targets that only individual tests use.
struct Plain;

impl DirectEndpoint for Plain {
    type Route = ();
    type Context = ();

    fn route(&self, request: &PlainRequest<'_>) -> Option<()> {
        (!matches!(request.target, "/foreign" | "/unread" | "/tolerant")).then_some(())
    }

    async fn answer(
        &self,
        (): (),
        request: &PlainRequest<'_>,
        arrival: Arrival<'_>,
        _: &mut Option<()>,
        out: &mut Vec<u8>,
    ) {
        let body = match request.target {
            "/large" => vec![b'x'; LARGE],
            "/medium" => vec![b'x'; MEDIUM],
            "/never" => std::future::pending().await,
            "/panics" | "/waits-and-panics" => {
                out.extend_from_slice(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\npartial");
                if request.target == "/waits-and-panics" {
                    task::yield_now().await;
                }
                panic!("a defect");
            }
            "/counted" => {
                COUNTED.fetch_add(1, Ordering::Relaxed);
                Vec::new()
            }
            "/new" => {
                if NEW.fetch_add(1, Ordering::Relaxed) == 0 {
                    let open = OPEN.get().expect("the test has opened a connection");
                    (&*open).write_all(OPEN_REQUEST).expect("the request fits");
                }
                Vec::new()
            }
            "/open" => NEW.load(Ordering::Relaxed).to_string().into_bytes(),
            "/arrival" => {
                if let Some(marks) = arrival.marks {
                    marks.set_authenticated();
                }
                let is_recent = arrival.time.is_some_and(|it| it.elapsed() < HEADER / 15);
                match (arrival.time, is_recent) {
                    (None, _) => b"unknown;".to_vec(),
                    (Some(_), true) => b"known;".to_vec(),
                    (Some(_), false) => b"outdated;".to_vec(),
                }
            }
            _ => b"here".to_vec(),
        };
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(&body);
    }

    async fn answer_after_panic(
        &self,
        (): (),
        _: &PlainRequest<'_>,
        _: std::net::IpAddr,
        _: Option<()>,
        out: &mut Vec<u8>,
    ) {
        out.extend_from_slice(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n");
    }
}

/// Repeats a test if it fails and its process was paused meanwhile, because the deadlines on both sides of a connection
/// then pass at the same time. A defect is still detected, because the test also fails without a pause, or fails in
/// every attempt.
async fn retry_if_paused<F: Future<Output = ()>>(test: impl Fn() -> F) {
    for attempt in 1..=ATTEMPTS {
        let (watching, running) = tokio::sync::oneshot::channel::<()>();
        let lateness = tokio::spawn(async move {
            let mut greatest = Duration::ZERO;
            while !watching.is_closed() {
                let due = time::Instant::now() + LATENESS / 2;
                time::sleep_until(due).await;
                greatest = greatest.max(due.elapsed());
            }
            greatest
        });
        let outcome = AssertUnwindSafe(test()).catch_unwind().await;
        drop(running);
        // The pause may have just ended, so that the task measures it only now.
        let lateness = lateness.await.expect("the task does not panic");
        match outcome {
            Ok(()) => return,
            Err(panic) if lateness <= LATENESS || attempt == ATTEMPTS => resume_unwind(panic),
            Err(_) => {}
        }
    }
}

/// Runs the tests, and repeats those that fail because of a pause; see [`retry_if_paused()`].
macro_rules! retry_if_paused {
    ($($name:ident),+ $(,)?) => {
        mod retry_if_paused {
            $(
                #[tokio::test]
                async fn $name() {
                    super::retry_if_paused(super::$name).await;
                }
            )+
        }
    };
}

/// Runs the tests with and without direct service, like [`retry_if_paused!`].
macro_rules! both_ways {
    ($($name:ident),+ $(,)?) => {
        mod through_hyper {
            use super::Way;

            $(
                #[tokio::test]
                async fn $name() {
                    super::retry_if_paused(|| super::$name(Way::Hyper)).await;
                }
            )+
        }

        mod directly {
            use super::Way;

            $(
                #[tokio::test]
                async fn $name() {
                    super::retry_if_paused(|| super::$name(Way::Direct)).await;
                }
            )+
        }
    };
}

both_ways!(
    connection_with_continuous_requests_stays_open,
    slow_header_fields_close_the_connection,
    every_request_gets_the_full_header_timeout,
    connection_may_be_idle_longer_than_the_header_timeout,
    connection_that_sends_nothing_is_closed,
    slow_first_request_is_closed_for_any_protocol,
    client_that_does_not_read_its_response_is_closed,
    client_that_reads_slowly_gets_its_whole_response,
    slow_request_after_a_pipelined_one_closes_the_connection,
    half_closed_connection_gets_its_responses_and_is_closed,
    response_does_not_wait_for_the_next_request,
    idle_connection_does_not_delay_a_stop,
    request_of_a_client_that_leaves_is_canceled,
    request_in_flight_is_answered_when_the_server_stops,
    kernel_forgets_a_response_that_was_not_read,
);

retry_if_paused!(
    panic_in_a_direct_response_affects_no_other_response,
    arrival_time_is_known_only_if_the_whole_request_was_just_read,
    direct_responses_that_are_not_read_are_bounded,
    body_that_nobody_reads_is_not_answered,
    response_before_the_end_of_a_body_announces_that_the_connection_closes,
    deadlines_apply_after_a_foreign_request,
);

async fn connect() -> TcpStream {
    connect_by(Way::Hyper).await
}

async fn connect_by(way: Way) -> TcpStream {
    connect_until(way, std::future::pending(), Duration::ZERO)
        .await
        .0
}

async fn connect_until(
    way: Way,
    stop: impl Future<Output = ()> + Send + 'static,
    drain: Duration,
) -> (TcpStream, task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let settings = ServeSettings {
        timeouts: Timeouts {
            header: HEADER,
            idle: IDLE,
            write: WRITE,
            drain,
        },
        limits: Limits {
            connections: 100,
            per_address: 0,
            per_network: 0,
            trusted_proxies: Vec::new(),
            memory: 16 * 1024 * 1024,
            memory_per_connection: 1024 * 1024,
        },
        metrics: Arc::default(),
    };
    let endpoint = make(endpoint).map_to_response();
    let direct = match way {
        Way::Direct => Some(Plain),
        Way::Hyper => None,
    };
    let server = tokio::spawn(serve(listener, endpoint, direct, settings, stop));
    (TcpStream::connect(addr).await.unwrap(), server)
}

async fn ask(stream: &mut TcpStream) {
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: q\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"here") {
        assert_ne!(
            stream.read_buf(&mut answer).await.unwrap(),
            0,
            "the connection ended"
        );
    }
}

/// The second of two pipelined requests never gets a response, but the first one must get one.
async fn response_does_not_wait_for_the_next_request(way: Way) {
    for half_closes in [false, true] {
        let mut stream = connect_by(way).await;
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: q\r\n\r\nGET /never HTTP/1.1\r\nHost: q\r\n\r\n")
            .await
            .unwrap();
        if half_closes {
            stream.shutdown().await.unwrap();
        }
        let mut answer = Vec::new();
        while !answer.ends_with(b"here") {
            let read = timeout(Duration::from_secs(5), stream.read_buf(&mut answer)).await;
            let length = read.expect("the first response is sent at once").unwrap();
            assert_ne!(length, 0, "half-closed: {half_closes}");
        }
    }
}

async fn panic_in_a_direct_response_affects_no_other_response() {
    let targets = [
        "/panics",
        "/",
        "/waits-and-panics",
        "/panics",
        "/",
        "/waits-and-panics",
    ];
    let expected = targets.map(|target| if target == "/" { "200" } else { "500" });
    let mut stream = connect_by(Way::Direct).await;
    let request = |target| format!("GET {target} HTTP/1.1\r\nHost: q\r\n\r\n");
    let requests = targets.map(request).concat();
    // The requests are sent all at once, and then one after another.
    for requests in [vec![requests], targets.map(request).to_vec()] {
        let mut answers = Vec::new();
        let mut sent = 0;
        for requests in requests {
            stream.write_all(requests.as_bytes()).await.unwrap();
            sent += requests.matches("GET").count();
            while statuses(&answers).len() < sent {
                let length = stream.read_buf(&mut answers).await.unwrap();
                assert_ne!(length, 0, "the connection ended: {:?}", statuses(&answers));
            }
        }
        assert_eq!(statuses(&answers), expected);
        let text = String::from_utf8(answers).unwrap();
        assert!(!text.contains("partial"), "{text}");
    }
    // No request is in flight any longer, so the connection is idle.
    let ended = ended_after(&mut stream).await;
    assert!(ended >= IDLE * 9 / 10, "{ended:?}");
}

/// With an outdated arrival time, a stale key record could be used without being reloaded.
async fn arrival_time_is_known_only_if_the_whole_request_was_just_read() {
    let arrival = "GET /arrival HTTP/1.1\r\nHost: q\r\n\r\n";
    let foreign = "POST /foreign HTTP/1.1\r\nHost: q\r\nContent-Length: 3\r\n\r\nabc";
    let late = "POST /tolerant HTTP/1.1\r\nHost: q\r\nContent-Length: 3\r\n\r\n";
    let (first, rest) = arrival.split_at(20);
    let two = arrival.repeat(2);
    let [after_foreign, before_foreign] =
        [[foreign, arrival], [arrival, foreign]].map(|it| it.concat());
    let steps: &[(&[&str], &[&str])] = &[
        // The connection has not authenticated yet.
        (&[arrival], &["unknown"]),
        (&[arrival], &["known"]),
        (&[&two], &["known", "unknown"]),
        (&[first, rest], &["unknown"]),
        (&[arrival], &["known"]),
        (&[&after_foreign], &["here", "unknown"]),
        (&[arrival], &["known"]),
        (&[&before_foreign, arrival], &["known", "here", "known"]),
        (&[late, "abc", arrival], &["here", "known"]),
    ];
    let mut stream = connect_by(Way::Direct).await;
    for (parts, expected) in steps {
        for part in *parts {
            stream.write_all(part.as_bytes()).await.unwrap();
            time::sleep(HEADER / 15).await;
        }
        let mut answers = Vec::new();
        let mut bodies = Vec::new();
        while bodies.len() < expected.len() {
            let length = stream.read_buf(&mut answers).await.unwrap();
            assert_ne!(length, 0, "the connection ended: {parts:?}");
            let text = String::from_utf8_lossy(&answers);
            let responses = text
                .split("HTTP/1.1 ")
                .filter_map(|it| it.split("\r\n\r\n").nth(1));
            bodies = responses
                .filter_map(|it| it.strip_suffix(';').or((it == "here").then_some(it)))
                .map(str::to_owned)
                .collect();
        }
        assert_eq!(bodies, *expected, "{parts:?}");
    }
}

/// Returns the status of each response.
fn statuses(answers: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(answers);
    let starts = text.match_indices("HTTP/1.1 ");
    starts
        .filter_map(|(start, name)| text.get(start + name.len()..start + name.len() + 3))
        .map(str::to_owned)
        .collect()
}

/// Returns the time until the server closes the connection.
async fn ended_after(stream: &mut TcpStream) -> Duration {
    let began = time::Instant::now();
    let mut rest = Vec::new();
    let _ = timeout(10 * HEADER, stream.read_to_end(&mut rest))
        .await
        .expect("the server closes the connection");
    began.elapsed()
}

async fn connection_with_continuous_requests_stays_open(way: Way) {
    let mut stream = connect_by(way).await;
    for _ in 0..10 {
        ask(&mut stream).await;
        time::sleep(HEADER / 3).await;
    }
}

async fn slow_header_fields_close_the_connection(way: Way) {
    let mut stream = connect_by(way).await;
    stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let ended = ended_after(&mut stream).await;
    assert!(ended >= HEADER * 9 / 10, "{ended:?}");
}

/// When the second request arrives, the timer may still be set to the deadline of the first one.
async fn every_request_gets_the_full_header_timeout(way: Way) {
    let mut stream = connect_by(way).await;
    time::sleep(HEADER / 2).await;
    ask(&mut stream).await;
    stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let ended = ended_after(&mut stream).await;
    assert!(ended >= HEADER * 9 / 10, "{ended:?}");
}

async fn connection_may_be_idle_longer_than_the_header_timeout(way: Way) {
    let mut stream = connect_by(way).await;
    ask(&mut stream).await;
    time::sleep(HEADER * 2).await;
    ask(&mut stream).await;
    let ended = ended_after(&mut stream).await;
    assert!(ended >= IDLE * 9 / 10, "{ended:?}");
}

async fn connection_that_sends_nothing_is_closed(way: Way) {
    let mut stream = connect_by(way).await;
    let ended = ended_after(&mut stream).await;
    assert!(ended >= HEADER * 9 / 10, "{ended:?}");
}

/// Sends the beginning of a request, and then the rest one byte at a time.
async fn slow_first_request_is_closed_for_any_protocol(way: Way) {
    for (first, rest) in [
        ("P", "OST / HT"),
        ("GET / HTTP/1.1\r\n", "A: bcdefgh"),
        ("PRI * HTTP/2.0\r\n\r\nS", "M\r\n"),
    ] {
        let stream = connect_by(way).await;
        let (mut reader, mut writer) = stream.into_split();
        let began = time::Instant::now();
        let drip = tokio::spawn(async move {
            let _ = writer.write_all(first.as_bytes()).await;
            for byte in rest.bytes() {
                time::sleep(HEADER / 5).await;
                if writer.write_all(&[byte]).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        });
        let mut answer = Vec::new();
        let ended = timeout(10 * HEADER, reader.read_to_end(&mut answer)).await;
        assert!(ended.is_ok(), "{first:?} is held open");
        assert!(began.elapsed() >= HEADER * 9 / 10, "{first:?}: {answer:?}");
        drip.abort();
    }
}

async fn client_that_does_not_read_its_response_is_closed(way: Way) {
    let mut stream = connect_by(way).await;
    stream
        .write_all(b"GET /large HTTP/1.1\r\nHost: q\r\n\r\n")
        .await
        .unwrap();
    time::sleep(WRITE * 3).await;
    let mut answer = Vec::new();
    let _ = timeout(10 * HEADER, stream.read_to_end(&mut answer))
        .await
        .expect("the server closes the connection");
    assert!(answer.len() < LARGE, "the response was sent completely");
}

async fn client_that_reads_slowly_gets_its_whole_response(way: Way) {
    let mut stream = connect_by(way).await;
    stream
        .write_all(b"GET /large HTTP/1.1\r\nHost: q\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    let began = time::Instant::now();
    let (mut read, mut buffer) = (0, vec![0; LARGE / 16]);
    loop {
        let length = stream.read(&mut buffer).await.unwrap();
        read += length;
        if length == 0 {
            break;
        }
        if began.elapsed() < WRITE * 2 {
            time::sleep(WRITE / 6).await;
        }
    }
    assert!(read > LARGE, "{read}");
    assert!(began.elapsed() > WRITE, "{:?}", began.elapsed());
}

async fn slow_request_after_a_pipelined_one_closes_the_connection(way: Way) {
    let mut stream = connect_by(way).await;
    ask(&mut stream).await;
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: q\r\n\r\n")
        .await
        .unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHo").await.unwrap();
    let ended = ended_after(&mut stream).await;
    // With hyper, a head that arrives together with an earlier request has the deadline of an idle connection.
    let limit = match way {
        Way::Direct => IDLE,
        Way::Hyper => IDLE * 2,
    };
    assert!((HEADER * 9 / 10..limit).contains(&ended), "{ended:?}");
}

async fn half_closed_connection_gets_its_responses_and_is_closed(way: Way) {
    let mut stream = connect_by(way).await;
    let request = b"GET / HTTP/1.1\r\nHost: q\r\n\r\n";
    stream.write_all(&request.repeat(3)).await.unwrap();
    stream.write_all(&request[..10]).await.unwrap();
    let mut answers = Vec::new();
    while answers.windows(4).filter(|it| it == b"here").count() < 3 {
        assert_ne!(
            stream.read_buf(&mut answers).await.unwrap(),
            0,
            "the connection ended"
        );
    }
    stream.shutdown().await.unwrap();
    let ended = ended_after(&mut stream).await;
    assert!(ended < HEADER, "{ended:?}");
}

async fn request_of_a_client_that_leaves_is_canceled(way: Way) {
    let mut stream = connect_by(way).await;
    stream
        .write_all(b"GET /never HTTP/1.1\r\nHost: q\r\n\r\n")
        .await
        .unwrap();
    time::sleep(HEADER / 3).await;
    stream.shutdown().await.unwrap();
    let ended = ended_after(&mut stream).await;
    assert!(ended < HEADER, "{ended:?}");
}

async fn idle_connection_does_not_delay_a_stop(way: Way) {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let stopped = async move {
        let _ = stopped.await;
    };
    let (mut stream, server) = connect_until(way, stopped, GOODBYE * 4).await;
    ask(&mut stream).await;
    let began = time::Instant::now();
    drop(stop);
    server.await.unwrap();
    assert!(began.elapsed() < IDLE, "{:?}", began.elapsed());
}

async fn request_in_flight_is_answered_when_the_server_stops(way: Way) {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let stopped = async move {
        let _ = stopped.await;
    };
    let (mut stream, server) = connect_until(way, stopped, GOODBYE * 4).await;
    ask(&mut stream).await;
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: q\r\n")
        .await
        .unwrap();
    time::sleep(HEADER / 3).await;
    drop(stop);
    let mut answer = Vec::new();
    if matches!(way, Way::Direct) {
        // The request is passed to hyper, which announces that its response is the last.
        time::sleep(HEADER / 3).await;
        stream.write_all(b"\r\n").await.unwrap();
        stream.read_to_end(&mut answer).await.unwrap();
        let text = String::from_utf8(answer).unwrap();
        assert!(text.contains("connection: close\r\n"), "{text}");
        assert!(text.ends_with("here"), "{text}");
    }
    server.await.unwrap();
}

/// The server does not respond to all requests from a client that sends requests and never reads.
async fn direct_responses_that_are_not_read_are_bounded() {
    let mut stream = connect_by(Way::Direct).await;
    let requests = b"GET /medium HTTP/1.1\r\nHost: q\r\n\r\n".repeat(1000);
    let began = time::Instant::now();
    let mut sent = 0;
    // The server stops reading when its responses are not read, and closes the connection.
    while began.elapsed() < HEADER * 30 {
        let written = timeout(WRITE * 4, stream.write(&requests)).await;
        match written.expect("the connection is not held open") {
            Ok(length) => sent += length,
            Err(_) => break,
        }
    }
    assert!(sent > requests.len(), "{sent}");
    assert!(began.elapsed() >= WRITE * 9 / 10, "{:?}", began.elapsed());
    assert!(began.elapsed() < HEADER * 30, "{sent} bytes were accepted");
}

/// Counts the requests for `/counted`.
static COUNTED: AtomicUsize = AtomicUsize::new(0);
/// The number of requests for `/new`. The handler of the first of them sends [`OPEN_REQUEST`] on [`OPEN`].
static NEW: AtomicUsize = AtomicUsize::new(0);
static OPEN: OnceLock<std::net::TcpStream> = OnceLock::new();
const OPEN_REQUEST: &[u8] = b"GET /open HTTP/1.1\r\nHost: q\r\n\r\n";

/// One connection must not keep the others waiting by sending many requests at once.
#[tokio::test]
async fn pipelined_requests_let_other_tasks_run() {
    const REQUESTS: usize = 5000;
    let stream = connect_by(Way::Direct).await;
    let (mut reader, mut writer) = stream.into_split();
    let requests = b"GET /counted HTTP/1.1\r\nHost: q\r\n\r\n".repeat(REQUESTS);
    let sending = tokio::spawn(async move { writer.write_all(&requests).await.map(|()| writer) });
    let receiving = tokio::spawn(async move {
        let mut answers = vec![0; LARGE / 16];
        while let Ok(1..) = reader.read(&mut answers).await {}
    });
    let (mut most, mut before) = (0, 0);
    while before < REQUESTS {
        task::yield_now().await;
        let now = COUNTED.load(Ordering::Relaxed);
        most = most.max(now - before);
        before = now;
    }
    assert!((1..=256).contains(&most), "{most} requests without a break");
    drop(sending.await);
    receiving.abort();
}

/// Many clients that connect at the same time must not keep requests on open connections waiting.
#[tokio::test]
async fn simultaneous_connections_let_open_connections_go_on() {
    const CONNECTIONS: usize = 64;
    let mut stream = connect_by(Way::Direct).await;
    ask(&mut stream).await;
    let addr = stream.peer_addr().unwrap();
    let open = stream.into_std().unwrap();
    OPEN.set(open.try_clone().unwrap()).unwrap();
    // The server runs on this thread, so all connections wait in the backlog until the next `await`.
    let _new: Vec<_> = std::iter::repeat_with(|| {
        let mut stream = std::net::TcpStream::connect(addr).unwrap();
        stream
            .write_all(b"GET /new HTTP/1.1\r\nHost: q\r\n\r\n")
            .unwrap();
        stream
    })
    .take(CONNECTIONS)
    .collect();
    let mut open = TcpStream::from_std(open).unwrap();
    let mut answer = vec![0; 256];
    let length = open.read(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]);
    let (_, served) = answer.split_once("\r\n\r\n").unwrap();
    let served: usize = served.parse().unwrap();
    assert!(
        (1..=CONNECTIONS / 2).contains(&served),
        "{served} new connections were served first"
    );
    while NEW.load(Ordering::Relaxed) < CONNECTIONS {
        task::yield_now().await;
    }
}

/// Sends the requests in two parts, split at every possible place, and passes the responses to `check` each time.
async fn in_two_parts(requests: &[u8], mut check: impl FnMut(&str)) {
    for middle in 0..requests.len() {
        let mut stream = connect_by(Way::Direct).await;
        stream.set_nodelay(true).unwrap();
        let (first, second) = requests.split_at(middle);
        stream.write_all(first).await.unwrap();
        task::yield_now().await;
        stream.write_all(second).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        check(&String::from_utf8(answer).unwrap());
    }
}

#[tokio::test]
async fn hyper_answers_a_foreign_request_and_returns_the_connection() {
    let requests = b"GET / HTTP/1.1\r\nHost: q\r\n\r\n\
        POST /foreign HTTP/1.1\r\nHost: q\r\nContent-Length: 3\r\n\r\nabc\
        GET / HTTP/1.1\r\nHost: q\r\n\r\n\
        GET / HTTP/1.1\r\nHost: q\r\nContent-Length: 0\r\n\r\n\
        POST /foreign HTTP/1.1\r\nHost: q\r\nContent-Length: 3\r\n\r\nabc\
        GET / HTTP/1.1\r\nHost: q\r\nConnection: close\r\n\r\n";
    in_two_parts(requests, |text| {
        assert_eq!(text.matches("here").count(), 6, "{text}");
        // In this test, only responses from hyper have a date.
        let mut by_hyper = text.split("HTTP/1.1 200 OK").skip(1);
        for expected in [false, true, false, false, true, true] {
            let response = by_hyper.next().unwrap_or_default();
            assert_eq!(response.contains("date: "), expected, "{text}");
        }
    })
    .await;
}

#[tokio::test]
async fn request_that_is_not_plain_is_answered_by_hyper_with_what_follows() {
    let requests = b"GET / HTTP/1.1\r\nHost: q\r\n\r\n\
        POST /foreign HTTP/1.1\r\nHost: q\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n\
        GET / HTTP/1.1\r\nHost: q\r\n\r\n\
        GET / HTTP/1.1\r\nHost: q\r\nConnection: close\r\n\r\n";
    in_two_parts(requests, |text| {
        assert_eq!(text.matches("here").count(), 4, "{text}");
        assert_eq!(text.matches("date: ").count(), 3, "{text}");
    })
    .await;
}

/// hyper closes a connection on which the rest of a body may still arrive, so that no part of the body is parsed as a
/// request.
async fn body_that_nobody_reads_is_not_answered() {
    let hidden = b"GET / HTTP/1.1\r\nHost: q\r\n\r\n";
    let head = format!(
        "POST /unread HTTP/1.1\r\nHost: q\r\nContent-Length: {}\r\n\r\n",
        hidden.len()
    );
    for available in [0, hidden.len() / 2, hidden.len()] {
        let mut stream = connect_by(Way::Direct).await;
        let first = [head.as_bytes(), &hidden[..available]].concat();
        stream.write_all(&first).await.unwrap();
        time::sleep(HEADER / 3).await;
        let _ = stream.write_all(&hidden[available..]).await;
        let mut answer = Vec::new();
        let _ = timeout(HEADER, stream.read_to_end(&mut answer)).await;
        let text = String::from_utf8(answer).unwrap();
        assert_eq!(text.matches("here").count(), 1, "{available}: {text}");
    }
}

/// A proxy may send another client's request on a connection after the response to a request whose body has not arrived
/// completely. So if the server is about to close the connection, the response must say so.
async fn response_before_the_end_of_a_body_announces_that_the_connection_closes() {
    let body = b"abcdefghij".repeat(2_000);
    let to = |path, rest: &str| format!("POST {path} HTTP/1.1\r\nHost: q\r\n{rest}\r\n\r\n");
    let head = |rest: &str| to("/unread", rest);
    let length = head(&format!("Content-Length: {}", body.len()));
    let waiting = head(&format!(
        "Expect: 100-continue\r\nContent-Length: {}",
        body.len()
    ));
    let chunks = head("Transfer-Encoding: chunked");
    let too_large = head("Content-Length: 100000000");
    let chunk = [b"4e20\r\n", &body[..], b"\r\n"].concat();
    let all_chunks = [&chunk, &b"0\r\n\r\n"[..]].concat();
    let many_chunks = [&chunk.repeat(4), &b"0\r\n\r\n"[..]].concat();
    let wrong_trailer = [&chunk, &b"0\r\nX: \x01y\r\n\r\n"[..]].concat();
    let read = to("/tolerant", &format!("Content-Length: {}", body.len()));
    let read_chunks = to("/tolerant", "Transfer-Encoding: chunked");
    for (sent, is_complete) in [
        ((&length, &body[..]), true),
        ((&length, &body[..body.len() - 1]), false),
        ((&length, b""), false),
        ((&waiting, b""), false),
        ((&chunks, &all_chunks), true),
        ((&chunks, &chunk), false),
        ((&chunks, b"4e21\r\n"), false),
        ((&chunks, b"wrong\r\n"), false),
        ((&chunks, &wrong_trailer), false),
        ((&chunks, &many_chunks), false),
        ((&read, &body), true),
        ((&read_chunks, &all_chunks), true),
        ((&read_chunks, &many_chunks), true),
        ((&read_chunks, b"wrong\r\n"), false),
        ((&read_chunks, &wrong_trailer), false),
        ((&too_large, &body), false),
    ] {
        let (head, body) = sent;
        for way in [Way::Hyper, Way::Direct] {
            let mut stream = connect_by(way).await;
            let request = [head.as_bytes(), body].concat();
            stream.write_all(&request).await.unwrap();
            let mut answer = Vec::new();
            while !answer.ends_with(b"here") {
                let length = stream.read_buf(&mut answer).await.unwrap();
                assert_ne!(length, 0, "{head}: the connection ended");
            }
            let text = String::from_utf8(answer).unwrap();
            assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
            let is_announced = text.contains("connection: close\r\n");
            assert_eq!(is_announced, !is_complete, "{way:?}: {head}{text}");
            if is_complete {
                ask(&mut stream).await;
            } else {
                ended_after(&mut stream).await;
            }
        }
    }
}

/// Many clients send the head and the body in two packets.
#[tokio::test]
async fn body_that_arrives_soon_keeps_the_connection_open() {
    let head = b"POST /unread HTTP/1.1\r\nHost: q\r\nContent-Length: 3\r\n\r\n";
    // On a busy machine, the body may arrive too late.
    for _ in 0..20 {
        let mut stream = connect().await;
        stream.set_nodelay(true).unwrap();
        stream.write_all(head).await.unwrap();
        time::sleep(Duration::from_millis(2)).await;
        stream.write_all(b"abc").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"here") {
            let length = stream.read_buf(&mut answer).await.unwrap();
            assert_ne!(length, 0, "the connection ended");
        }
        if !String::from_utf8(answer).unwrap().contains("close") {
            return ask(&mut stream).await;
        }
    }
    panic!("every response closed the connection");
}

async fn deadlines_apply_after_a_foreign_request() {
    let mut stream = connect_by(Way::Direct).await;
    let request = b"POST /foreign HTTP/1.1\r\nHost: q\r\nContent-Length: 3\r\n\r\nabc";
    stream.write_all(request).await.unwrap();
    ask(&mut stream).await;
    stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let ended = ended_after(&mut stream).await;
    assert!((HEADER * 9 / 10..IDLE).contains(&ended), "{ended:?}");
    let mut stream = connect_by(Way::Direct).await;
    stream.write_all(request).await.unwrap();
    let ended = ended_after(&mut stream).await;
    assert!(ended >= IDLE * 9 / 10, "{ended:?}");
}

/// A minimal hand-written HTTP/2 client, since a client that follows the protocol could not misbehave.
mod http2 {
    use super::*;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const GOAWAY: u8 = 7;
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const WINDOW_UPDATE: u8 = 8;

    retry_if_paused!(
        connection_without_a_request_is_closed,
        idle_connection_is_shut_down_gracefully,
        http2_connection_with_continuous_requests_stays_open,
        idle_client_that_ignores_pings_does_not_delay_a_stop,
        client_that_opens_no_window_is_closed,
        canceling_unread_responses_gains_no_time,
        client_that_reads_one_byte_of_a_small_response_is_closed,
        client_that_opens_its_window_slowly_gets_its_whole_response,
        client_that_cancels_some_requests_and_reads_others_stays_connected,
        slow_later_request_head_closes_the_connection,
        quiet_event_stream_that_is_read_outlives_every_deadline,
        event_stream_that_is_not_read_is_closed,
        event_stream_does_not_extend_the_deadline_of_another_response,
    );

    pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn get(stream: u32) -> Vec<u8> {
        get_path(stream, "/")
    }

    fn get_path(stream: u32, path: &str) -> Vec<u8> {
        // The method (GET) and the scheme (http) come from HPACK's static table. The path and the authority are encoded
        // as literals.
        let mut head = vec![0x82, 0x86, 0x44, u8::try_from(path.len()).unwrap()];
        head.extend(path.as_bytes());
        head.extend([0x41, 1, b'q']);
        frame(HEADERS, 0x5, stream, &head)
    }

    /// Returns the payload of a SETTINGS frame with this window size for each response.
    fn window(size: u32) -> Vec<u8> {
        [&[0, 4], &size.to_be_bytes()[..]].concat()
    }

    fn hello(settings: &[u8]) -> Vec<u8> {
        [PREFACE, &frame(SETTINGS, 0, 0, settings)].concat()
    }

    /// Responds to pings until the server closes the connection. Returns how long that took, and the types of the
    /// frames that the server sent.
    async fn until_closed(stream: &mut TcpStream) -> (Duration, Vec<u8>) {
        let began = time::Instant::now();
        let mut kinds = Vec::new();
        let all = async {
            loop {
                let mut head = [0; 9];
                if stream.read_exact(&mut head).await.is_err() {
                    return;
                }
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let mut payload = vec![0; length];
                if stream.read_exact(&mut payload).await.is_err() {
                    return;
                }
                kinds.push(head[3]);
                if head[3] == PING && head[4] & 1 == 0 {
                    let _ = stream.write_all(&frame(PING, 1, 0, &payload)).await;
                }
            }
        };
        timeout(20 * HEADER, all)
            .await
            .expect("the server closes the connection");
        (began.elapsed(), kinds)
    }

    async fn connection_without_a_request_is_closed() {
        let mut stream = connect().await;
        stream.write_all(&hello(&[])).await.unwrap();
        let (ended, _) = until_closed(&mut stream).await;
        assert!(ended >= HEADER * 9 / 10, "{ended:?}");
    }

    async fn idle_connection_is_shut_down_gracefully() {
        let mut stream = connect().await;
        stream
            .write_all(&[hello(&[]), get(1)].concat())
            .await
            .unwrap();
        let (ended, kinds) = until_closed(&mut stream).await;
        assert!(ended >= IDLE * 9 / 10, "{ended:?}");
        assert!(
            kinds.contains(&DATA),
            "the request got a response: {kinds:?}"
        );
        assert!(kinds.contains(&GOAWAY), "{kinds:?}");
    }

    async fn http2_connection_with_continuous_requests_stays_open() {
        let mut stream = connect().await;
        stream.write_all(&hello(&[])).await.unwrap();
        let began = time::Instant::now();
        for id in 0..8 {
            stream
                .write_all(&get(2 * id + 1))
                .await
                .expect("the connection is open");
            time::sleep(IDLE / 4).await;
        }
        let (_, kinds) = until_closed(&mut stream).await;
        assert!(began.elapsed() > IDLE * 2);
        let answers = kinds.iter().filter(|kind| [DATA].contains(kind)).count();
        assert_eq!(answers, 8, "{kinds:?}");
    }

    async fn idle_client_that_ignores_pings_does_not_delay_a_stop() {
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let stopped = async move {
            let _ = stopped.await;
        };
        let (mut stream, server) = connect_until(Way::Hyper, stopped, GOODBYE * 4).await;
        stream
            .write_all(&[hello(&[]), get(1)].concat())
            .await
            .unwrap();
        time::sleep(HEADER / 2).await;
        let began = time::Instant::now();
        drop(stop);
        server.await.unwrap();
        assert!(began.elapsed() < GOODBYE * 2, "{:?}", began.elapsed());
    }

    /// The socket remains writable and pings get responses, but the response does not make progress.
    async fn client_that_opens_no_window_is_closed() {
        let mut stream = connect().await;
        let no_window = [0, 4, 0, 0, 0, 0];
        stream
            .write_all(&[hello(&no_window), get(1)].concat())
            .await
            .unwrap();
        let (ended, kinds) = until_closed(&mut stream).await;
        assert!(ended >= WRITE * 9 / 10, "{ended:?}");
        assert!(
            kinds.contains(&HEADERS) && !kinds.contains(&DATA),
            "{kinds:?}"
        );
    }

    /// Periodically sends a new request and cancels the previous request. Returns how long the server allows this
    /// behavior.
    async fn cancel_unread_responses(size: u32, path: &str) -> Duration {
        let (mut reader, mut writer) = connect().await.into_split();
        let began = time::Instant::now();
        let canceling = async {
            let hello = [hello(&window(size)), get_path(1, path)].concat();
            writer.write_all(&hello).await.unwrap();
            for stream in (3..).step_by(2) {
                time::sleep(WRITE / 5).await;
                let reset = frame(RST_STREAM, 0, stream - 2, &[0, 0, 0, 8]);
                let next = [get_path(stream, path), reset].concat();
                if writer.write_all(&next).await.is_err() {
                    break;
                }
            }
        };
        let mut answer = Vec::new();
        let ended = timeout(10 * WRITE, async {
            tokio::select! {
                () = canceling => {}
                _ = reader.read_to_end(&mut answer) => {}
            }
        });
        assert!(ended.await.is_ok(), "{path} with {size} is held open");
        began.elapsed()
    }

    async fn canceling_unread_responses_gains_no_time() {
        for (size, path) in [
            (0, "/"),
            (0, "/large"),
            (1, "/"),
            (1, "/large"),
            (0, "/never"),
        ] {
            let ended = cancel_unread_responses(size, path).await;
            assert!(ended >= WRITE * 9 / 10, "{path} with {size}: {ended:?}");
        }
    }

    /// h2 accepts a small body immediately, so hyper considers the response sent.
    async fn client_that_reads_one_byte_of_a_small_response_is_closed() {
        let mut stream = connect().await;
        stream
            .write_all(&[hello(&window(1)), get(1)].concat())
            .await
            .unwrap();
        let (ended, kinds) = until_closed(&mut stream).await;
        assert!((WRITE * 9 / 10..IDLE).contains(&ended), "{ended:?}");
        assert!(kinds.contains(&DATA), "{kinds:?}");
    }

    async fn client_that_opens_its_window_slowly_gets_its_whole_response() {
        const STEP: u32 = 2048;
        let mut stream = connect().await;
        let began = time::Instant::now();
        stream
            .write_all(&[hello(&window(0)), get_path(1, "/medium")].concat())
            .await
            .unwrap();
        let (mut reader, mut writer) = stream.into_split();
        let opening = tokio::spawn(async move {
            loop {
                time::sleep(WRITE / 6).await;
                let more = frame(WINDOW_UPDATE, 0, 1, &STEP.to_be_bytes());
                if writer.write_all(&more).await.is_err() {
                    break;
                }
            }
        });
        let mut read = 0;
        while read < MEDIUM {
            let mut head = [0; 9];
            reader
                .read_exact(&mut head)
                .await
                .expect("the connection is open");
            let mut payload = vec![0; usize::from(u16::from_be_bytes([head[1], head[2]]))];
            reader
                .read_exact(&mut payload)
                .await
                .expect("the connection is open");
            if head[3] == DATA {
                read += payload.len();
            }
        }
        assert!(began.elapsed() > WRITE * 3, "{:?}", began.elapsed());
        opening.abort();
    }

    /// Canceling requests does not end a connection whose client reads its other responses.
    async fn client_that_cancels_some_requests_and_reads_others_stays_connected() {
        let mut stream = connect().await;
        stream.write_all(&hello(&[])).await.unwrap();
        for n in 0..12 {
            let canceled = 4 * n + 1;
            let reset = frame(RST_STREAM, 0, canceled, &[0, 0, 0, 8]);
            let requests = [get_path(canceled, "/never"), reset, get(canceled + 2)].concat();
            stream
                .write_all(&requests)
                .await
                .expect("the connection is open");
            time::sleep(WRITE / 4).await;
        }
        let (_, kinds) = until_closed(&mut stream).await;
        let answers = kinds.iter().filter(|kind| [DATA].contains(kind)).count();
        assert_eq!(answers, 12, "{kinds:?}");
    }

    async fn slow_later_request_head_closes_the_connection() {
        let mut stream = connect().await;
        stream
            .write_all(&[hello(&[]), get(1)].concat())
            .await
            .unwrap();
        time::sleep(HEADER / 2).await;
        let began = time::Instant::now();
        // The remaining header fields would follow in another frame.
        let part = frame(HEADERS, 0x1, 3, &[0x82, 0x86, 0x84]);
        stream.write_all(&part).await.unwrap();
        until_closed(&mut stream).await;
        let ended = began.elapsed();
        assert!((HEADER * 9 / 10..IDLE).contains(&ended), "{ended:?}");
    }

    async fn quiet_event_stream_that_is_read_outlives_every_deadline() {
        let mut stream = connect().await;
        let request = [hello(&[]), get_path(1, "/events")].concat();
        stream.write_all(&request).await.unwrap();
        let mut events = 0;
        let reading = async {
            loop {
                let mut head = [0; 9];
                stream
                    .read_exact(&mut head)
                    .await
                    .expect("the connection is open");
                let mut payload = vec![0; usize::from(u16::from_be_bytes([head[1], head[2]]))];
                stream
                    .read_exact(&mut payload)
                    .await
                    .expect("the connection is open");
                events += usize::from(head[3] == DATA);
            }
        };
        assert!(timeout(WRITE * 5, reading).await.is_err());
        assert!(events >= 8, "{events}");
    }

    async fn event_stream_that_is_not_read_is_closed() {
        // The client reads either nothing or only the first two events.
        for size in [0, 6] {
            let mut stream = connect().await;
            let request = [hello(&window(size)), get_path(1, "/events")].concat();
            stream.write_all(&request).await.unwrap();
            let (ended, kinds) = until_closed(&mut stream).await;
            assert!(ended >= WRITE * 9 / 10, "{size}: {ended:?}");
            assert!(kinds.contains(&HEADERS), "{size}: {kinds:?}");
        }
    }

    async fn event_stream_does_not_extend_the_deadline_of_another_response() {
        let mut stream = connect().await;
        let open = frame(WINDOW_UPDATE, 0, 1, &60_000_u32.to_be_bytes());
        let requests = [hello(&window(0)), get_path(1, "/events"), open, get(3)].concat();
        stream.write_all(&requests).await.unwrap();
        let (ended, kinds) = until_closed(&mut stream).await;
        assert!((WRITE * 9 / 10..WRITE * 4).contains(&ended), "{ended:?}");
        assert!(kinds.contains(&DATA), "events arrived: {kinds:?}");
    }
}

/// Connects a client that reads nothing and has a small receive buffer.
async fn client_that_does_not_read(addr: SocketAddr) -> TcpStream {
    let client = TcpSocket::new_v4().expect("a socket");
    client.set_recv_buffer_size(4096).expect("it is possible");
    client.connect(addr).await.expect("it listens")
}

#[tokio::test]
async fn kernel_buffers_little_for_a_client_that_does_not_read() {
    let socket = bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
    let addr = socket.local_addr().expect("it is bound");
    let listener = socket.listen().expect("it listens");
    let _client = client_that_does_not_read(addr).await;
    let (server, _) = listener.accept().await.expect("there is a client");
    let (response, mut written) = (vec![b'x'; MEDIUM], 0);
    while let Ok(Ok(())) = timeout(Duration::from_millis(300), server.writable()).await {
        written += server.try_write(&response).unwrap_or(0);
        assert!(written < LARGE, "the kernel buffers everything");
    }
    assert!(written >= MEDIUM, "{written}");
    assert!(written <= 256 * 1024, "{written}");
}

async fn kernel_forgets_a_response_that_was_not_read(way: Way) {
    let mut client = connect_by(way).await;
    let request = b"GET /large HTTP/1.1\r\nHost: q\r\n\r\n";
    client.write_all(request).await.expect("the server reads");
    time::sleep(WRITE * 3).await;
    let mut response = Vec::new();
    let end = client.read_to_end(&mut response).await;
    let error = end.expect_err("the response is incomplete");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}
