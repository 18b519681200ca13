//! A closed loop: each connection sends its next request after the response to the previous one.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

use crate::http1;

pub(crate) const CONNECTIONS: u64 = 32;

/// The number of responses by status.
pub(crate) type Statuses = BTreeMap<u16, u64>;

pub(crate) struct Load {
    runtime: tokio::runtime::Runtime,
}

impl Load {
    /// Creates a load, which runs on the thread that calls [`Self::put`].
    pub(crate) fn new() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(Self { runtime })
    }

    /// Sends the same `request` repeatedly for the duration `time`. Returns the number of responses by status.
    pub(crate) fn put(
        &self,
        server: SocketAddr,
        time: Duration,
        request: &[u8],
    ) -> Result<Statuses> {
        let request = Bytes::copy_from_slice(request);
        let requests = closed_loop(server, time, move || request.clone());
        self.runtime.block_on(requests)
    }
}

/// Sends requests for the duration `time`, and returns the number of responses by status. `request` returns the next
/// request.
pub(crate) async fn closed_loop(
    server: SocketAddr,
    time: Duration,
    request: impl Fn() -> Bytes + Clone + Send + 'static,
) -> Result<Statuses> {
    let mut connections = JoinSet::new();
    let end = Instant::now() + time;
    for _ in 0..CONNECTIONS {
        connections.spawn(connection(server, end, request.clone()));
    }
    let mut all = Statuses::new();
    while let Some(statuses) = connections.join_next().await {
        for (status, count) in statuses?? {
            *all.entry(status).or_default() += count;
        }
    }
    Ok(all)
}

async fn connection(
    server: SocketAddr,
    end: Instant,
    request: impl Fn() -> Bytes,
) -> Result<Statuses> {
    let mut stream = TcpStream::connect(server).await.context("cannot connect")?;
    stream.set_nodelay(true)?;
    let mut bytes = vec![0; 16 * 1024];
    let mut statuses = Statuses::new();
    while Instant::now() < end {
        stream.write_all(&request()).await?;
        let mut read = 0;
        let status = loop {
            let n = stream.read(&mut bytes[read..]).await?;
            if n == 0 {
                bail!("the server closed a connection");
            }
            read += n;
            match http1::answer(&bytes[..read])? {
                Some((status, whole)) if whole == read => break status,
                Some(_) => bail!("got more responses than requests"),
                None => {}
            }
        };
        *statuses.entry(status).or_default() += 1;
    }
    Ok(statuses)
}

/// Returns the request `GET /v1/echo` with a key.
pub(crate) fn echo(key: &str) -> Vec<u8> {
    format!(
        "GET /v1/echo HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: quota-bench\r\nAccept: */*\r\n\
         X-API-Key: {key}\r\n\r\n"
    )
    .into_bytes()
}

/// Returns the request that a gateway sends to Quota for a request `GET /v1/echo` with a key.
pub(crate) fn forward_auth(key: &str, service_token: &str) -> Vec<u8> {
    format!(
        "GET /v1/forward-auth HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: quota-bench\r\nAccept: */*\r\n\
         X-Service-Token: {service_token}\r\nX-API-Key: {key}\r\nX-Forwarded-Method: GET\r\n\
         X-Forwarded-Uri: /v1/echo\r\nX-Forwarded-For: 127.0.0.1\r\n\r\n"
    )
    .into_bytes()
}

/// Returns the request that a service sends to Quota for a request `GET /v1/echo` with a key.
pub(crate) fn check(key: &str, service_token: &str) -> Vec<u8> {
    let body = format!(r#"{{"key":"{key}","endpoint":"GET /v1/echo"}}"#);
    format!(
        "POST /v1/check HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: quota-bench\r\nAccept: */*\r\n\
         Authorization: Bearer {service_token}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}
