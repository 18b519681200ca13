//! An open loop: sends requests on schedule, whether or not earlier requests have completed, and logs each outcome.
//!
//! Requests are scheduled in advance, so a slow server does not slow down the load. A request takes an idle connection
//! to its replica or opens one. If all [`CONNECTIONS`] are in use, the request waits for a connection, and its log
//! entry shows a late start. Connections are reopened as replicas stop and start.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use quota_testkit::envelope::Span;
use tokio::{
    net::TcpStream,
    sync::Notify,
    task::{JoinSet, LocalSet},
    time::{Instant, sleep_until, timeout},
};

/// The maximum number of connections to one replica.
const CONNECTIONS: usize = 700;
/// How long to wait for a response.
const PATIENCE: Duration = Duration::from_secs(30);

/// A scheduled request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Arrival {
    /// Nanoseconds since the start of the load.
    pub(crate) at: u64,
    /// Indexes into the lists of keys and replicas.
    pub(crate) key: usize,
    pub(crate) replica: usize,
    /// The cost in tokens.
    pub(crate) cost: u32,
}

/// The outcome of a request. Times are in nanoseconds since the start of the load, on a monotonic clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attempt {
    pub(crate) key: usize,
    pub(crate) replica: usize,
    pub(crate) cost: u32,
    pub(crate) due: u64,
    /// The time just before the request's first byte was sent.
    pub(crate) sent: u64,
    /// The time just after the head of the response arrived, or the request was abandoned.
    pub(crate) answered: u64,
    /// The status; 0 if there was no response.
    pub(crate) status: u16,
    pub(crate) retry_after: Option<u32>,
    /// Whether the response states that the request was decided without Redis.
    pub(crate) degraded: bool,
}

impl Attempt {
    pub(crate) fn admitted(&self) -> bool {
        self.status == 200
    }

    pub(crate) fn span(&self) -> Span {
        Span {
            sent: self.sent,
            answered: self.answered,
            cost: self.cost,
        }
    }

    pub(crate) fn took(&self) -> Duration {
        Duration::from_nanos(self.answered - self.sent)
    }
}

/// Where requests are sent.
pub(crate) struct Targets {
    pub(crate) replicas: Vec<SocketAddr>,
    pub(crate) keys: Vec<HeaderValue>,
    /// With a service token, requests go to the check API, which accepts a cost; otherwise, they go to the echo
    /// endpoint.
    pub(crate) service: Option<HeaderValue>,
    /// How many connections to each replica are opened at the start, before they are needed.
    pub(crate) ready: usize,
}

/// Sends all requests of `schedule`, which is sorted by time, starting at `origin`.
pub(crate) async fn drive(
    targets: &Targets,
    schedule: &[Arrival],
    origin: Instant,
) -> Result<Vec<Attempt>> {
    let local = LocalSet::new();
    local.run_until(send(targets, schedule, origin)).await
}

async fn send(targets: &Targets, schedule: &[Arrival], origin: Instant) -> Result<Vec<Attempt>> {
    let lines: Vec<Rc<Line>> = targets
        .replicas
        .iter()
        .map(|addr| Rc::new(Line::to(*addr, origin)))
        .collect();
    let service = &targets.service;
    let keys: Rc<[Consumer]> = targets
        .keys
        .iter()
        .map(|key| Consumer {
            key: key.clone(),
            service: service.clone(),
        })
        .collect();
    let mut connections = JoinSet::new();
    for line in lines.iter().filter(|_| targets.ready > 0) {
        for _ in 0..targets.ready {
            line.open.set(line.open.get() + 1);
            let (line, keys) = (Rc::clone(line), Rc::clone(&keys));
            connections.spawn_local(async move {
                let sender = connect(line.addr).await.ok();
                line.serve(keys, sender).await
            });
        }
    }
    for arrival in schedule {
        let due = origin + Duration::from_nanos(arrival.at);
        if due > Instant::now() {
            sleep_until(due).await;
        }
        let line = &lines[arrival.replica];
        line.jobs.borrow_mut().push_back(*arrival);
        if line.idle.get() > 0 {
            line.idle.set(line.idle.get() - 1);
            line.bell.notify_one();
        } else if line.open.get() < CONNECTIONS {
            line.open.set(line.open.get() + 1);
            connections.spawn_local(Rc::clone(line).serve(Rc::clone(&keys), None));
        }
    }
    for line in &lines {
        line.over.set(true);
        line.bell.notify_waiters();
    }
    let mut attempts = Vec::with_capacity(schedule.len());
    while let Some(log) = connections.join_next().await {
        attempts.extend(log?);
    }
    attempts.sort_unstable_by_key(|attempt| attempt.sent);
    Ok(attempts)
}

/// The credentials with which requests are sent.
struct Consumer {
    key: HeaderValue,
    service: Option<HeaderValue>,
}

impl Consumer {
    fn request(&self, cost: u32) -> http::Result<Request<Full<Bytes>>> {
        let host = HeaderValue::from_static("quota");
        let Some(token) = &self.service else {
            return Request::get("/v1/echo")
                .header(header::HOST, host)
                .header("x-api-key", self.key.clone())
                .body(Full::default());
        };
        let key = self.key.to_str().unwrap_or_default();
        let body = format!(r#"{{"key":"{key}","cost":{cost},"endpoint":"GET /bench"}}"#);
        Request::post("/v1/check")
            .header(header::HOST, host)
            .header(header::CONTENT_TYPE, "application/json")
            .header("x-service-token", token.clone())
            .body(Full::from(body))
    }
}

/// Returns the status that corresponds to a decision of the check API.
fn decided(body: &[u8]) -> u16 {
    match serde_json::from_slice::<serde_json::Value>(body) {
        Ok(decision) if decision["allowed"] == true => 200,
        Ok(decision) if decision["allowed"] == false => 429,
        _ => 500,
    }
}

/// The connections to one replica, and the requests that wait for them.
struct Line {
    addr: SocketAddr,
    origin: Instant,
    jobs: RefCell<VecDeque<Arrival>>,
    bell: Notify,
    open: Cell<usize>,
    /// The number of open connections that wait for a request.
    idle: Cell<usize>,
    /// Whether there are no more jobs.
    over: Cell<bool>,
}

pub(crate) type Sender = SendRequest<Full<Bytes>>;

impl Line {
    fn to(addr: SocketAddr, origin: Instant) -> Self {
        Self {
            addr,
            origin,
            jobs: RefCell::default(),
            bell: Notify::new(),
            open: Cell::new(0),
            idle: Cell::new(0),
            over: Cell::new(false),
        }
    }

    /// Runs one connection.
    async fn serve(
        self: Rc<Self>,
        keys: Rc<[Consumer]>,
        mut sender: Option<Sender>,
    ) -> Vec<Attempt> {
        let mut log = Vec::new();
        loop {
            let job = self.jobs.borrow_mut().pop_front();
            let Some(job) = job else {
                if self.over.get() {
                    return log;
                }
                self.idle.set(self.idle.get() + 1);
                self.bell.notified().await;
                continue;
            };
            log.push(self.attempt(&mut sender, job, &keys[job.key]).await);
        }
    }

    async fn attempt(
        &self,
        sender: &mut Option<Sender>,
        job: Arrival,
        consumer: &Consumer,
    ) -> Attempt {
        let mut attempt = Attempt {
            key: job.key,
            replica: job.replica,
            cost: job.cost,
            due: job.at,
            sent: self.now(),
            answered: 0,
            status: 0,
            retry_after: None,
            degraded: false,
        };
        // Reopens a connection that the server closed while it was idle.
        let kept = match sender.take() {
            Some(mut kept) => kept.ready().await.is_ok().then_some(kept),
            None => None,
        };
        let ready = match kept {
            Some(kept) => Ok(kept),
            None => connect(self.addr).await,
        };
        if let Ok(mut ready) = ready {
            let request = consumer.request(job.cost);
            attempt.sent = self.now();
            let answered = async {
                let answer = ready.send_request(request?).await?;
                attempt.answered = self.now();
                attempt.status = answer.status().as_u16();
                attempt.retry_after = number(answer.headers(), &header::RETRY_AFTER);
                attempt.degraded = is_degraded(answer.headers());
                let body = answer.into_body().collect().await?.to_bytes();
                if consumer.service.is_some() && attempt.status == 200 {
                    attempt.status = decided(&body);
                }
                anyhow::Ok(())
            };
            if let Ok(Ok(())) = timeout(PATIENCE, answered).await {
                *sender = Some(ready);
            }
        }
        if attempt.status == 0 {
            attempt.answered = self.now();
        }
        attempt
    }

    fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

pub(crate) async fn connect(addr: SocketAddr) -> Result<Sender> {
    let stream = timeout(PATIENCE, TcpStream::connect(addr)).await??;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

fn number(headers: &HeaderMap, name: &header::HeaderName) -> Option<u32> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

/// Returns whether the request was decided without Redis. If so, the response has a header whose name ends with
/// `degraded`, with any value.
fn is_degraded(headers: &HeaderMap) -> bool {
    headers
        .keys()
        .any(|name| name.as_str().ends_with("degraded"))
}
