//! Two servers that differ only in `QUOTA_DIRECT_RESPONSES`: they have the same database and clock, and each has its
//! own limiter, usage records and log.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use quota_server::{
    clock::{Clock as _, SystemClock, TestClock},
    config::LogFormat,
    secret_text::{Kind, SecretText},
    telemetry::log::Log,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};

use super::grammar::Case;
use crate::support::app::{Setup, TestApp};

/// The time after which a server that sends nothing is certain to be waiting for the client. The server has nothing
/// else to wait for, because all keys are cached.
const QUIET: Duration = Duration::from_millis(300);
/// The time within which every connection must close after the client stops sending.
const ENDED_WITHIN: Duration = Duration::from_secs(30);

/// The credentials in requests.
pub(super) struct World {
    /// One key each: usable, limited, inactive, unknown, malformed, and of another tenant.
    pub(super) keys: [String; 6],
    pub(super) token: String,
    pub(super) bad_tokens: [String; 3],
}

/// The output of a log.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One of the two servers.
pub(super) struct Side {
    pub(super) app: TestApp,
    written: Written,
}

pub(super) struct Pair {
    pub(super) direct: Side,
    pub(super) hyper: Side,
    pub(super) world: World,
    clock: TestClock,
    /// By how much the direct server's metrics exceeded those of the other server at the beginning.
    ahead: BTreeMap<String, i64>,
}

impl Side {
    async fn start(setup: Setup, clock: &TestClock) -> Self {
        let written = Written::default();
        let log = Log::start_on(written.clone(), LogFormat::Json);
        // Only the first server's log can become the output of `tracing`, but both servers write access log lines.
        let _ = log.install("info");
        let app = setup
            .clock(Arc::new(clock.clone()))
            .log(log)
            .without_jobs()
            // These times are longer than `ENDED_WITHIN`, so that a connection that is held open is noticed.
            .flag("--header-timeout=60s")
            .flag("--request-timeout=60s")
            .flag("--trusted-proxies=127.0.0.0/8")
            .flag("--allowed-origins=https://a.example")
            .start()
            .await;
        Self { app, written }
    }

    /// Sends the case on a new connection. Returns all data that the server sends until it closes the connection,
    /// without dates and IDs that the server chose.
    pub(super) async fn responses(&self, case: &Case) -> String {
        let mut stream = TcpStream::connect(self.app.addr)
            .await
            .expect("the server listens");
        stream.set_nodelay(true).expect("a socket");
        let (mut reader, mut writer) = stream.split();
        let mut received = Vec::new();
        let is_written = AtomicBool::new(false);
        let exchange = async {
            let writing = async {
                for part in case.parts() {
                    // A server that has closed the connection does not accept any more data.
                    if writer.write_all(part).await.is_err() {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
                is_written.store(true, Ordering::Relaxed);
                writer
            };
            let reading = async {
                let mut buffer = vec![0; 16 * 1024];
                loop {
                    let is_last = is_written.load(Ordering::Relaxed);
                    let began = Instant::now();
                    match timeout(QUIET, reader.read(&mut buffer)).await {
                        Ok(Ok(length @ 1..)) => received.extend_from_slice(&buffer[..length]),
                        // If the timer fires late, the process was paused, and so was the server.
                        Err(_) if !is_last || began.elapsed() > QUIET * 2 => {}
                        _ => break,
                    }
                }
                reader
            };
            let (mut writer, mut reader) = tokio::join!(writing, reading);
            let _ = writer.shutdown().await;
            // A reset also ends the connection.
            let _ = reader.read_to_end(&mut received).await;
        };
        let ended = timeout(ENDED_WITHIN, exchange).await;
        assert!(ended.is_ok(), "held open: {:?}", text(&case.bytes));
        normalized(&received)
    }

    /// Returns the access log lines since the last call, sorted.
    async fn lines(&self) -> Vec<String> {
        let mut length = usize::MAX;
        loop {
            let written = self.written.0.lock().expect("no panic").len();
            if written == length {
                break;
            }
            length = written;
            let began = Instant::now();
            tokio::time::sleep(QUIET).await;
            // If the timer fires late, the process was paused, and so was the log's thread.
            if began.elapsed() > QUIET * 2 {
                length = usize::MAX;
            }
        }
        let bytes = std::mem::take(&mut *self.written.0.lock().expect("no panic"));
        let lines = text(&bytes);
        let lines = lines.lines().filter_map(|line| {
            let mut line = serde_json::from_str::<Value>(line).expect("a line is JSON");
            let is_own = line["request_id"]
                .as_str()
                .is_some_and(|id| !is_generated(id));
            if !is_own {
                line["request_id"] = json!("");
            }
            (line["target"] == "quota_server::access").then(|| line.to_string())
        });
        let mut lines = lines.collect::<Vec<_>>();
        lines.sort_unstable();
        lines
    }

    /// Ships the usage records since the last call, deletes them from the database, and returns them sorted.
    async fn usage(&self) -> Vec<String> {
        self.app.ship_usage().await;
        let client = self.app.database.connect().await;
        let query = "WITH gone AS (DELETE FROM usage_log RETURNING *) \
                     SELECT row_to_json(g)::text FROM (SELECT tenant_id, key_id, plan_id, cost, \
                     retry_after_seconds, was_rejected, billing, policy, endpoint, \
                     CASE WHEN length(request_id) < 36 THEN request_id END AS id FROM gone) g";
        let rows = client.query(query, &[]).await.expect("the log is read");
        let mut rows = rows.iter().map(|row| row.get(0)).collect::<Vec<_>>();
        rows.sort_unstable();
        rows
    }

    /// Returns the metrics that both servers must change by the same amounts.
    fn metrics(&self) -> BTreeMap<String, i64> {
        let text = self.app.state.metrics.text();
        let names = [
            "quota_decisions_",
            "quota_keys_",
            "quota_http_responses",
            "quota_requests_in_flight",
            "quota_panics",
            "quota_payment",
            "quota_guard",
            "quota_usage_decisions_rejected",
        ];
        let lines = text.lines();
        let lines = lines.filter(|line| names.iter().any(|name| line.starts_with(name)));
        let values = lines.filter_map(|line| line.rsplit_once(' '));
        values
            .map(|(name, value)| (name.to_owned(), value.parse().expect("a whole number")))
            .collect()
    }

    /// Returns the number of direct responses.
    pub(super) fn direct_responses(&self) -> u64 {
        self.app.state.metrics.direct_responses.get()
    }
}

/// Returns whether the server generated the ID. The clients' IDs are shorter, and both servers must return them
/// unchanged.
fn is_generated(id: &str) -> bool {
    id.len() == 36
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// hyper's own response to a malformed head, without its date. Whether hyper sends this response depends on the parts
/// in which the head arrives: after an incomplete part, hyper waits for an empty line before it parses the head again.
const REJECTED: &str =
    "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\ndate: \r\n";

fn normalized(bytes: &[u8]) -> String {
    const ID: &str = "\r\nx-request-id: ";
    const DATE: &str = "\r\ndate: ";
    const EXPOSED: &str = "\r\naccess-control-expose-headers: ";
    let mut text = text(bytes);
    let ids = text.split(ID).skip(1);
    let ids = ids.filter_map(|rest| rest.split("\r\n").next());
    let generated = ids.filter(|id| is_generated(id)).map(str::to_owned);
    for id in generated.collect::<Vec<_>>() {
        text = text.replace(&id, &"I".repeat(id.len()));
    }
    // poem writes this list in a different order on each server.
    if let Some((_, rest)) = text.split_once(EXPOSED)
        && let Some(list) = rest.split("\r\n").next().map(str::to_owned)
    {
        let mut names = list.split(", ").collect::<Vec<_>>();
        names.sort_unstable();
        text = text.replace(&list, &names.join(", "));
    }
    let mut parts = text.split(DATE);
    let mut without_dates = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        without_dates += DATE;
        without_dates += part.split_once("\r\n").map_or(part, |(_, rest)| rest);
    }
    match without_dates.strip_suffix(REJECTED) {
        Some(rest) => rest.to_owned(),
        None => without_dates,
    }
}

impl Pair {
    pub(super) async fn start() -> Self {
        let clock = TestClock::at(SystemClock::new().now());
        let setup = TestApp::setup().flag("--direct-responses=on");
        let direct = Side::start(setup, &clock).await;
        let setup = TestApp::setup()
            .database(direct.app.database.clone())
            .flag("--direct-responses=off");
        let hyper = Side::start(setup, &clock).await;
        let world = world(&direct.app).await;
        let mut pair = Self {
            direct,
            hyper,
            world,
            clock,
            ahead: BTreeMap::new(),
        };
        // Cache every credential.
        for key in &pair.world.keys {
            for token in [&pair.world.token]
                .into_iter()
                .chain(&pair.world.bad_tokens)
            {
                let request = format!(
                    "GET /v1/forward-auth HTTP/1.1\r\nHost: q\r\nX-API-Key: {key}\r\n\
                     X-Service-Token: {token}\r\nConnection: close\r\n\r\n"
                );
                let case = Case::whole(request.as_bytes());
                pair.direct.responses(&case).await;
                pair.hyper.responses(&case).await;
            }
        }
        pair.direct.lines().await;
        pair.hyper.lines().await;
        pair.direct.usage().await;
        pair.hyper.usage().await;
        pair.ahead = pair.difference();
        pair
    }

    /// Returns by how much the direct server's metrics exceed those of the other server.
    fn difference(&self) -> BTreeMap<String, i64> {
        let mut difference = self.direct.metrics();
        for (name, value) in self.hyper.metrics() {
            *difference.entry(name).or_default() -= value;
        }
        difference.retain(|_, value| *value != 0);
        difference
    }

    /// Sends a case to both servers, and asserts that their responses are equal. Returns the responses.
    pub(super) async fn compare(&self, name: &str, case: &Case) -> String {
        let (direct, hyper) = tokio::join!(self.direct.responses(case), self.hyper.responses(case));
        assert_eq!(
            direct,
            hyper,
            "{name}: {:?}, cut at {:?}",
            text(&case.bytes),
            case.cuts
        );
        direct
    }

    /// Asserts that both servers have recorded, logged and counted the same since the last call. Returns the number of
    /// usage records.
    pub(super) async fn compare_records(&self) -> usize {
        let (direct, hyper) = (self.direct.lines().await, self.hyper.lines().await);
        assert_same("log lines", &direct, &hyper);
        let records = self.direct.usage().await;
        assert_same("usage records", &records, &self.hyper.usage().await);
        assert_eq!(self.difference(), self.ahead, "metrics");
        records.len()
    }

    /// Advances the wall clock, so that limits recover. The age of cached keys does not depend on this clock.
    pub(super) fn advance(&self, by: Duration) {
        let now = self.clock.now().saturating_add(by.into());
        self.clock.set_now(now);
    }
}

fn assert_same(what: &str, direct: &[String], hyper: &[String]) {
    let first = direct.iter().zip(hyper).find(|(one, other)| one != other);
    assert!(
        first.is_none() && direct.len() == hyper.len(),
        "{what}: {} and {}; the first difference: {first:#?}",
        direct.len(),
        hyper.len()
    );
}

async fn world(app: &TestApp) -> World {
    let account = app.register().await;
    let most = json!({"default_rpm": 60_000_000, "burst": 60_000_000});
    let ample = app.plan(&account, most).await;
    let scant = json!({"default_rpm": 600, "burst": 3});
    let scant = app.plan(&account, scant).await;
    let usable = app.key(&account, &ample).await.text;
    let limited = app.key(&account, &scant).await.text;
    let inactive = app.key(&account, &ample).await;
    let path = format!("/admin/api-keys/{}", inactive.id);
    let changed = app
        .act(&account, "PATCH", &path, json!({"is_active": false}))
        .await;
    assert_eq!(changed.status, 200, "{}", changed.body);
    let stranger = app.register().await;
    let plan = app.plan(&stranger, json!({})).await;
    let foreign = app.key(&stranger, &plan).await.text;
    let unknown = |kind| SecretText::from_bytes(kind, &[7; 32]).reveal();
    let mut malformed = unknown(Kind::ApiKey);
    malformed.truncate(30);
    World {
        keys: [
            usable,
            limited,
            inactive.text,
            unknown(Kind::ApiKey),
            malformed,
            foreign,
        ],
        token: app.service_token(&account).await,
        bad_tokens: [
            app.service_token(&stranger).await,
            unknown(Kind::ServiceToken),
            "qs_".into(),
        ],
    }
}
