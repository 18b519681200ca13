//! A load over persistent connections, and a log of all its requests. A connection sends its next request after the
//! response to the previous one, immediately or at a fixed rate, and is reopened if the server closes it.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout_at},
};

use crate::http1;

/// How long to wait for responses after the end of the load.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pause after a failed request.
const AFTER_FAILURE: Duration = Duration::from_millis(5);

/// The outcome of a request. Times are in nanoseconds since the start of the load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attempt {
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    /// The status; 0 if there was no response.
    pub(crate) status: u16,
    /// An index into the requests of the load.
    pub(crate) request: u16,
}

#[derive(Clone)]
pub(crate) struct Plan {
    /// The instances of a server. Each gets the same number of connections.
    pub(crate) servers: Vec<SocketAddr>,
    /// The requests. Each connection sends all of them in turn.
    pub(crate) requests: Vec<Vec<u8>>,
    pub(crate) connections: usize,
    /// The time between two requests of a connection. `None` for a saturating load.
    pub(crate) pace: Option<Duration>,
    pub(crate) time: Duration,
}

/// Sends the load. Returns the log, sorted by the time at which requests were sent.
pub(crate) async fn drive(plan: &Plan) -> Result<Vec<Attempt>> {
    let origin = Instant::now();
    let end = origin + plan.time;
    let mut connections = JoinSet::new();
    for (index, server) in plan
        .servers
        .iter()
        .flat_map(|server| vec![*server; plan.connections])
        .enumerate()
    {
        let requests = plan.requests.clone();
        let next = index * requests.len() / (plan.connections * plan.servers.len());
        let pace = plan.pace;
        connections.spawn(async move {
            let mut connection = Connection {
                server,
                origin,
                stream: None,
                next,
                requests,
                log: Vec::new(),
                pending: None,
            };
            let run = connection.run(end, pace);
            // A request without a response delays the end of the load by at most `PATIENCE`.
            let _ = timeout_at(end + PATIENCE, run).await;
            if let Some((sent, request)) = connection.pending {
                connection.finish(sent, request, 0);
            }
            connection.log
        });
    }
    let mut log = Vec::new();
    while let Some(part) = connections.join_next().await {
        log.extend(part?);
    }
    log.sort_unstable_by_key(|attempt| attempt.sent);
    Ok(log)
}

struct Connection {
    server: SocketAddr,
    origin: Instant,
    stream: Option<TcpStream>,
    next: usize,
    requests: Vec<Vec<u8>>,
    log: Vec<Attempt>,
    /// The request that has no response yet: when it was sent, and its index.
    pending: Option<(u64, usize)>,
}

impl Connection {
    async fn run(&mut self, end: Instant, pace: Option<Duration>) {
        let mut due = Instant::now();
        let mut bytes = vec![0; 16 * 1024];
        while Instant::now() < end {
            if let Some(pace) = pace {
                sleep_until(due).await;
                due += pace;
            }
            let request = self.next;
            self.next = (self.next + 1) % self.requests.len();
            let sent = self.now();
            self.pending = Some((sent, request));
            let status = self.exchange(request, &mut bytes).await;
            self.pending = None;
            self.finish(sent, request, status.unwrap_or(0));
            if status.is_none() {
                self.stream = None;
                sleep(AFTER_FAILURE).await;
            }
        }
    }

    /// Sends a request and returns the status, or `None` if there is no response.
    async fn exchange(&mut self, request: usize, bytes: &mut [u8]) -> Option<u16> {
        if let Some(mut stream) = self.stream.take() {
            match exchange(&mut stream, &self.requests[request], bytes).await {
                Ok(Some(status)) => {
                    self.stream = Some(stream);
                    return Some(status);
                }
                // Like HTTP clients, repeat the request on a new connection if the server has closed the idle
                // connection.
                Ok(None) => {}
                Err(_) => return None,
            }
        }
        let mut stream = TcpStream::connect(self.server).await.ok()?;
        stream.set_nodelay(true).ok()?;
        let status = exchange(&mut stream, &self.requests[request], bytes).await;
        let status = status.ok().flatten()?;
        self.stream = Some(stream);
        Some(status)
    }

    fn finish(&mut self, sent: u64, request: usize, status: u16) {
        self.log.push(Attempt {
            sent,
            answered: self.now(),
            status,
            request: u16::try_from(request).unwrap_or(u16::MAX),
        });
    }

    fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Sends a request and returns the status, or `None` if the connection was closed before the first byte of a response.
async fn exchange(stream: &mut TcpStream, request: &[u8], bytes: &mut [u8]) -> Result<Option<u16>> {
    if stream.write_all(request).await.is_err() {
        return Ok(None);
    }
    let mut read = 0;
    loop {
        let n = match stream.read(&mut bytes[read..]).await {
            Ok(n) if n > 0 => n,
            _ if read == 0 => return Ok(None),
            _ => bail!("the response is incomplete"),
        };
        read += n;
        if let Some((status, whole)) = http1::answer(&bytes[..read])? {
            if whole != read {
                bail!("got more responses than requests");
            }
            return Ok(Some(status));
        }
    }
}
