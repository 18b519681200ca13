//! `quota health`: checks the health of a running server, for container engines and service managers.
//!
//! The command is part of the binary, because the container image has neither a shell nor an HTTP client.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use http::{Request, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

/// The time limit for a health check. Container engines allow a few seconds.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The maximum size of a response.
const MAX_BODY: usize = 16 << 10;

/// What to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// Whether the process responds.
    Live,
    /// Whether PostgreSQL responds, all migrations have been applied, and the server is not stopping.
    Ready,
    /// Whether the server serves requests and is not stopping.
    Serving,
}

impl Probe {
    fn path(self) -> &'static str {
        match self {
            Self::Live => "/health/live",
            Self::Ready => "/health/ready",
            Self::Serving => "/health/serving",
        }
    }

    /// Checks the server that listens on `listen`.
    ///
    /// # Errors
    ///
    /// Returns an error if the server does not respond in time, or if the status of its response is not 200. In the
    /// second case, the error contains the body of the response.
    pub async fn check(self, listen: SocketAddr) -> anyhow::Result<()> {
        let addr = reachable(listen);
        timeout(TIMEOUT, self.ask(addr))
            .await
            .with_context(|| format!("{addr} did not respond within {} s", TIMEOUT.as_secs()))?
    }

    async fn ask(self, addr: SocketAddr) -> anyhow::Result<()> {
        let stream = TcpStream::connect(addr)
            .await
            .with_context(|| format!("cannot connect to {addr}"))?;
        let (mut client, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::get(self.path())
            .header(header::HOST, addr.to_string())
            .body(Empty::<&[u8]>::new())?;
        let response = client.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
        connection.abort();
        let body = body
            .map(http_body_util::Collected::to_bytes)
            .unwrap_or_default();
        ensure!(
            status == 200,
            "{} returned {status}: {}",
            self.path(),
            String::from_utf8_lossy(&body).trim()
        );
        Ok(())
    }
}

/// Returns the address at which this machine reaches a server that listens on `listen`.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

#[cfg(test)]
mod tests {
    use super::reachable;

    #[test]
    fn an_unspecified_address_is_reached_by_loopback() {
        for (listen, reached) in [
            ("0.0.0.0:8080", "127.0.0.1:8080"),
            ("[::]:8080", "[::1]:8080"),
            ("10.1.2.3:80", "10.1.2.3:80"),
        ] {
            assert_eq!(
                reachable(listen.parse().unwrap()),
                reached.parse().unwrap(),
                "{listen}"
            );
        }
    }
}
