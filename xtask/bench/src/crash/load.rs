//! The load, and the client's record of each request and its response.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::http1;

/// The time limit for a request.
const PATIENCE: Duration = Duration::from_secs(15);

/// What happened to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// 200 or 429: a decision.
    Decided,
    /// 503: no decision.
    Refused,
    /// The connection ended before the response.
    Unanswered,
}

/// The requests that one connection has sent, numbered from 0.
#[derive(Debug, Default)]
pub(super) struct Sent {
    pub(super) count: u64,
    /// The requests that did not get a decision.
    pub(super) others: BTreeMap<u64, Fate>,
    pub(super) last_decided: Option<u64>,
}

/// One replica's share of the load.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) server: SocketAddr,
    key: String,
    pub(super) connections: Vec<Mutex<Sent>>,
    in_flight: AtomicU64,
    stop: AtomicBool,
}

impl Load {
    pub(super) fn new(server: SocketAddr, key: &str, connections: usize) -> Arc<Self> {
        Arc::new(Self {
            server,
            key: key.to_owned(),
            connections: (0..connections).map(|_| Mutex::default()).collect(),
            in_flight: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        })
    }

    /// Returns the number of requests that were sent and have no response yet.
    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(super) fn request_id(&self, connection: usize, number: u64) -> String {
        format!("{}-{connection}-{number}", self.server.port())
    }

    /// Sends requests one after another until the load is stopped. `pause` is the time between a response and the next
    /// request.
    pub(super) async fn run(self: Arc<Self>, connection: usize, pause: Duration) -> Result<()> {
        let mut stream = None;
        while !self.stop.load(Ordering::Relaxed) {
            if stream.is_none() {
                stream = TcpStream::connect(self.server).await.ok();
            }
            let Some(open) = &mut stream else {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            let number = {
                let mut sent = self.connections[connection].lock();
                sent.count += 1;
                sent.count - 1
            };
            self.in_flight.fetch_add(1, Ordering::Relaxed);
            let id = self.request_id(connection, number);
            let answer = tokio::time::timeout(PATIENCE, self.send(open, &id)).await;
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            let fate = match answer {
                Ok(Ok(200 | 429)) => Fate::Decided,
                Ok(Ok(503)) => Fate::Refused,
                Ok(Ok(status)) => bail!("{id} got {status}"),
                Ok(Err(_)) => Fate::Unanswered,
                Err(_) => bail!("{id} got no response within {PATIENCE:?}"),
            };
            {
                let mut sent = self.connections[connection].lock();
                match fate {
                    Fate::Decided => sent.last_decided = Some(number),
                    other => {
                        sent.others.insert(number, other);
                    }
                }
            }
            if fate == Fate::Unanswered {
                stream = None;
            }
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }

    async fn send(&self, stream: &mut TcpStream, id: &str) -> Result<u16> {
        let request = format!(
            "GET /v1/echo HTTP/1.1\r\nHost: quota\r\nX-API-Key: {}\r\nX-Request-Id: {id}\r\n\r\n",
            self.key
        );
        stream.write_all(request.as_bytes()).await?;
        let mut bytes = Vec::with_capacity(1024);
        loop {
            let read = stream.read_buf(&mut bytes).await?;
            if let Some((status, _)) = http1::answer(&bytes)? {
                return Ok(status);
            }
            (read > 0).then_some(()).context("the connection ended")?;
        }
    }
}
