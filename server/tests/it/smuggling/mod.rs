//! Request smuggling: an attacker's requests must not change what other clients get, directly and behind proxies whose
//! clients share connections to the server.

pub(crate) mod cases;
mod fronts;
mod naive;
mod response;

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    time::{Duration, Instant},
};

use quota_testkit::gateways::{Parsing, Program};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use self::{
    cases::{Attacker, HIDING, Hidden, ODD, PIPELINED, filled},
    fronts::Kind,
};
use crate::support::app::TestApp;

/// How long the attacker waits for a response. Some requests never get one.
const PAUSE: Duration = Duration::from_millis(40);
/// How long the attacker waits for a response before it sends the body. The server waits for bodies for 30 ms.
const EARLY_RESPONSE_WITHIN: Duration = Duration::from_millis(200);
/// How long a victim waits for its response, even on a busy machine.
const ANSWERED_WITHIN: Duration = Duration::from_secs(20);

/// How long clients send bodies only after the response.
const LATE_BODIES_FOR: Duration = Duration::from_secs(5);

/// A client that is not the attacker. Each victim sends a different kind of request, with a key whose limit is unique.
struct Victim {
    key: String,
    key_id: String,
    limit: String,
}

struct World {
    attacker: String,
    token: String,
    victims: Vec<Victim>,
}

/// Returns the keys for a test, on plans with different limits.
async fn world(app: &TestApp) -> World {
    let account = app.register().await;
    let mut victims = Vec::new();
    for limit in (1..5).map(|n| n * 1_000_000) {
        let plan = json!({"default_rpm": limit, "burst": limit});
        let plan = app.plan(&account, plan).await;
        let key = app.key(&account, &plan).await;
        victims.push(Victim {
            key: key.text,
            key_id: key.id,
            limit: limit.to_string(),
        });
    }
    World {
        attacker: victims.pop().expect("four keys").key,
        token: app.service_token(&account).await,
        victims,
    }
}

/// A victim's connection.
struct Client {
    stream: TcpStream,
    received: Vec<u8>,
}

/// What happened in a run.
#[derive(Default)]
struct Report {
    /// Descriptions of events that must not happen.
    findings: Vec<String>,
    /// The cases in which the attacker got a response to the hidden request. A proxy may read the hidden request as
    /// another request of the attacker.
    answered: Vec<String>,
    /// The victims' requests by ID, with their keys and endpoints.
    sent: BTreeMap<String, (String, String)>,
}

struct Run<'a> {
    kind: Kind,
    front: SocketAddr,
    world: &'a World,
    clients: Vec<Option<Client>>,
    report: Report,
}

impl Run<'_> {
    /// Lets each victim send a request, on its existing connection if there is one.
    async fn victims(&mut self, case: &str) {
        for n in 0..self.world.victims.len() {
            let id = format!("v-{n}-{}", self.report.sent.len());
            let victim = &self.world.victims[n];
            let (request, endpoint) = victim.request(n, &id, &self.world.token);
            self.report
                .sent
                .insert(id.clone(), (victim.key_id.clone(), endpoint));
            let mut client = match self.clients[n].take() {
                Some(client) => client,
                None => Client::connect(self.front).await,
            };
            match client.exchange(&request).await {
                Ok((response, rest)) => {
                    if let Some(wrong) = self.wrong(n, &id, &response) {
                        let text = format!("{case}: victim {n} got {wrong}: {response}");
                        self.report.findings.push(text);
                    }
                    if rest > 0 {
                        let text = format!("{case}: victim {n} got {rest} bytes too many");
                        self.report.findings.push(text);
                    } else {
                        self.clients[n] = Some(client);
                    }
                }
                Err(error) => {
                    let text = format!("{case}: victim {n} got no response: {error}");
                    self.report.findings.push(text);
                }
            }
        }
    }

    /// Returns what is wrong with a response to a victim, if anything.
    fn wrong(&self, n: usize, id: &str, response: &str) -> Option<&'static str> {
        let found = response::value(response, "x-request-id");
        let others = self.world.victims.iter().enumerate();
        let is_of_another = others
            .filter(|(other, _)| *other != n)
            .any(|(_, other)| response.contains(&other.limit));
        if found != Some(id) {
            Some("the response to another request")
        } else if !response.starts_with("HTTP/1.1 200 ") {
            Some("an error")
        } else if is_of_another || !response.contains(&self.world.victims[n].limit) {
            Some("the limits of another key")
        } else {
            None
        }
    }

    /// Sends a case on a new connection, and lets the victims send requests before and after that connection closes.
    async fn case(&mut self, name: &str, parts: &[Vec<u8>]) {
        let stream = TcpStream::connect(self.front).await;
        let mut stream = stream.expect("the front listens");
        let mut received = Vec::new();
        let pause = if name.starts_with("response before the body") {
            EARLY_RESPONSE_WITHIN
        } else {
            PAUSE
        };
        for part in parts {
            // The connection may have been closed.
            let _ = stream.write_all(part).await;
            let _ = timeout(pause, stream.read_buf(&mut received)).await;
        }
        if self.kind == Kind::Relay && received.is_empty() {
            // Until the attacker disconnects, the relay waits for the rest of the request.
            drop(stream);
            return self.victims(name).await;
        }
        self.victims(name).await;
        let rest = async { while matches!(stream.read_buf(&mut received).await, Ok(1..)) {} };
        let _ = timeout(PAUSE / 2, rest).await;
        drop(stream);
        self.victims(name).await;
        let text = String::from_utf8_lossy(&received).to_lowercase();
        if text.contains("x-request-id: v-") {
            let text = format!("{name}: the attacker got a victim's response: {text}");
            self.report.findings.push(text);
        }
        if text.contains("x-request-id: c-hidden") {
            self.report.answered.push(name.to_owned());
        }
    }
}

impl Victim {
    /// Returns a request, and the endpoint that is recorded for it.
    fn request(&self, n: usize, id: &str, token: &str) -> (String, String) {
        let key = &self.key;
        match n {
            0 => (
                format!(
                    "GET /v1/echo HTTP/1.1\r\nHost: q\r\nX-Request-ID: {id}\r\nX-API-Key: {key}\r\n\r\n"
                ),
                "GET /v1/echo".into(),
            ),
            1 => (
                format!(
                    "GET /v1/forward-auth HTTP/1.1\r\nHost: q\r\nX-Request-ID: {id}\r\nX-API-Key: {key}\r\n\
                     X-Service-Token: {token}\r\nX-Forwarded-Method: GET\r\nX-Forwarded-Uri: /{id}\r\n\r\n"
                ),
                format!("GET /{id}"),
            ),
            _ => {
                let body = json!({"key": key, "endpoint": format!("PUT /{id}")}).to_string();
                (
                    format!(
                        "POST /v1/check HTTP/1.1\r\nHost: q\r\nX-Request-ID: {id}\r\nX-Service-Token: {token}\r\n\
                         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                        body.len()
                    ),
                    format!("PUT /{id}"),
                )
            }
        }
    }
}

impl Client {
    async fn connect(front: SocketAddr) -> Self {
        Self {
            stream: TcpStream::connect(front).await.expect("it listens"),
            received: Vec::new(),
        }
    }

    /// Sends a request. Returns the response, and how many more bytes have arrived.
    async fn exchange(&mut self, request: &str) -> Result<(String, usize), String> {
        let exchange = async {
            self.stream.write_all(request.as_bytes()).await?;
            loop {
                if let Some(length) = response::complete(&self.received) {
                    let rest = self.received.split_off(length);
                    let response = std::mem::replace(&mut self.received, rest);
                    let response = String::from_utf8_lossy(&response).into_owned();
                    return Ok((response, self.received.len()));
                }
                if self.stream.read_buf(&mut self.received).await? == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
            }
        };
        let ended = timeout(ANSWERED_WITHIN, exchange).await;
        let ended = ended.map_err(|_| "it takes too long".to_owned())?;
        ended.map_err(|error: std::io::Error| {
            format!(
                "{error}, after {:?}",
                String::from_utf8_lossy(&self.received)
            )
        })
    }
}

/// Sends all cases through a front, or only the case named `only`, and returns what happened.
async fn run(kind: Kind, server: SocketAddr, world: &World, only: Option<&str>) -> Report {
    let front = kind.start(server).await;
    let mut run = Run {
        kind,
        front: front.addr,
        world,
        clients: world.victims.iter().map(|_| None).collect(),
        report: Report::default(),
    };
    run.victims("before the first case").await;
    assert!(run.report.findings.is_empty(), "{:?}", run.report.findings);
    let attacker = Attacker {
        key: &world.attacker,
        token: &world.token,
    };
    let cases = HIDING.iter().chain(PIPELINED).chain(ODD);
    for (name, text) in cases.filter(|(name, _)| only.is_none_or(|it| it == *name)) {
        let is_one = !PIPELINED.iter().any(|(it, _)| it == name);
        for hidden in [Hidden::Request, Hidden::Beginning] {
            let is_repeated = hidden == Hidden::Beginning && !text.contains("HIDDEN");
            let parts = filled(text, hidden, &attacker);
            // The relay treats all bytes that arrive before a response as one request, so it is tested only with cases
            // that are a single request in one part.
            if is_repeated || (kind == Kind::Relay && (parts.len() > 1 || !is_one)) {
                continue;
            }
            run.case(&format!("{name}, {hidden:?}"), &parts).await;
        }
    }
    run.report
}

/// Sends all cases to Quota, with and without direct responses. Asserts that no victim is affected.
async fn smuggles_nothing(kind: Kind) {
    for direct in ["on", "off"] {
        let app = TestApp::setup()
            .without_jobs()
            .flag(format!("--direct-responses={direct}"))
            .start()
            .await;
        let world = world(&app).await;
        let report = run(kind, app.addr, &world, None).await;
        println!(
            "{kind:?}, direct responses {direct}: {} requests of victims, hidden requests with responses: {:?}",
            report.sent.len(),
            report.answered
        );
        assert!(
            report.findings.is_empty(),
            "{direct}: {:#?}",
            report.findings
        );
        // A proxy may read a hidden request as another request of the attacker, but Quota does not.
        if !matches!(kind, Kind::Proxy(..)) {
            for name in &report.answered {
                let is_pipelined = PIPELINED.iter().any(|(it, _)| name.starts_with(it));
                assert!(is_pipelined, "{direct}: {name}");
            }
        }
        let handled = app.metric("quota_direct_responses_total").await;
        assert_eq!(handled > 0.0, direct == "on", "{handled} direct responses");
        if kind != Kind::Direct {
            // The clients have shared connections to the server.
            let accepted = "quota_connections_accepted_total{listener=\"public\"}";
            let accepted = app.metric(accepted).await;
            let requests = u32::try_from(report.sent.len()).expect("a few thousand");
            assert!(accepted * 2.0 < requests.into(), "{accepted} connections");
        }
        assert_recorded(&app, &report, kind).await;
    }
}

/// Asserts that each request of a victim is recorded once, with its own key and endpoint.
async fn assert_recorded(app: &TestApp, report: &Report, kind: Kind) {
    app.ship_usage().await;
    let client = app.database.connect().await;
    let query = "SELECT request_id, key_id::text, endpoint FROM usage_log";
    let rows = client.query(query, &[]).await.expect("the log is read");
    let (mut recorded, mut hidden) = (BTreeMap::new(), 0);
    for row in &rows {
        let (id, key, endpoint): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        if id.starts_with("v-") {
            let is_first = recorded.insert(id.clone(), (key, endpoint)).is_none();
            assert!(is_first, "{id} is recorded twice");
        } else if id == "c-hidden" {
            hidden += 1;
        }
    }
    assert_eq!(recorded, report.sent);
    let expected = match kind {
        Kind::Direct => PIPELINED.len(),
        Kind::Relay => 0,
        Kind::Proxy(..) => hidden,
    };
    assert_eq!(hidden, expected, "hidden requests");
}

/// Sends a case to a server that is vulnerable. Returns whether other clients are affected.
async fn is_noticed(kind: Kind, case: &str) -> bool {
    let victim = |n: u32| Victim {
        key: format!("qk_victim_{n}"),
        key_id: String::new(),
        limit: (n * 1_000_000).to_string(),
    };
    let world = World {
        attacker: "qk_attacker".into(),
        token: "qs_token".into(),
        victims: (1..4).map(victim).collect(),
    };
    let limits = world.victims.iter();
    let limits = limits.map(|it| (it.key.clone(), it.limit.clone()));
    let server = naive::start(limits.collect::<HashMap<_, _>>()).await;
    let report = run(kind, server, &world, Some(case)).await;
    println!("{kind:?}, {case}: {:?}", report.findings);
    !report.findings.is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn vulnerable_server_is_detected_behind_the_relay() {
    for case in ["CL.TE", "CL.0", "TE with a space before the colon"] {
        assert!(is_noticed(Kind::Relay, case).await, "{case}");
    }
    assert!(!is_noticed(Kind::Relay, "close").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_smuggled_directly() {
    smuggles_nothing(Kind::Direct).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_smuggled_through_the_relay() {
    smuggles_nothing(Kind::Relay).await;
}

/// A client that repeatedly waits for the response to a request whose body it has not sent, and then sends the body.
async fn send_bodies_late(front: SocketAddr) {
    let repeated = async {
        loop {
            let mut client = Client::connect(front).await;
            let head = "POST /nothing HTTP/1.1\r\nHost: q\r\nContent-Length: 60\r\n\r\n";
            client.exchange(head).await.expect("a response");
            // The connection may have been closed.
            let _ = client.stream.write_all(&[b'x'; 60]).await;
        }
    };
    let _ = timeout(LATE_BODIES_FOR, repeated).await;
}

/// Sends requests on one connection. Returns how many got their response.
async fn send_plain_requests(front: SocketAddr) -> u32 {
    let began = Instant::now();
    let mut client = Client::connect(front).await;
    let mut answered = 0;
    while began.elapsed() < LATE_BODIES_FOR {
        let request = "GET /health/live HTTP/1.1\r\nHost: q\r\n\r\n";
        let (response, rest) = client.exchange(request).await.expect("a response");
        assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
        assert_eq!(rest, 0, "{response}");
        answered += 1;
    }
    answered
}

/// The server closes a connection after it has responded to a request whose body has not arrived. HAProxy must know this
/// when it receives the response. Otherwise, it sends another client's request on the connection.
#[tokio::test(flavor = "multi_thread")]
async fn early_response_costs_no_other_client_its_response() {
    let app = TestApp::setup()
        .without_jobs()
        .flag("--direct-responses=off")
        .start()
        .await;
    let haproxy = Kind::Proxy(Program::HaProxy, Parsing::Strict);
    let front = haproxy.start(app.addr).await;
    let attackers = (0..4).map(|_| tokio::spawn(send_bodies_late(front.addr)));
    let attackers = attackers.collect::<Vec<_>>();
    let clients = (0..2).map(|_| tokio::spawn(send_plain_requests(front.addr)));
    let mut answered = 0;
    for client in clients.collect::<Vec<_>>() {
        answered += client.await.expect("every request gets a response");
    }
    for attacker in attackers {
        attacker.await.expect("every early response arrives");
    }
    assert!(answered > 10, "{answered}");
}

macro_rules! behind {
    ($($name:ident: $kind:expr;)+) => {
        $(mod $name {
            use super::*;

            #[tokio::test(flavor = "multi_thread")]
            async fn nothing_is_smuggled() {
                smuggles_nothing($kind).await;
            }

            /// Proves that the proxy forwards bodies of GET requests, and that clients share connections to the server.
            #[tokio::test(flavor = "multi_thread")]
            async fn vulnerable_server_is_detected() {
                assert!(is_noticed($kind, "CL.0").await);
                assert!(!is_noticed($kind, "after 200").await);
            }
        })+
    };
}

behind! {
    caddy: Kind::Proxy(Program::Caddy, Parsing::Strict);
    nginx: Kind::Proxy(Program::Nginx, Parsing::Strict);
    lenient_nginx: Kind::Proxy(Program::Nginx, Parsing::Lenient);
    haproxy: Kind::Proxy(Program::HaProxy, Parsing::Strict);
    lenient_haproxy: Kind::Proxy(Program::HaProxy, Parsing::Lenient);
}
