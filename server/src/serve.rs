//! Listening: connections, their timeouts, and how they end.
//!
//! poem's own server sets no timeout on header fields, so that a client that sends them a byte a minute holds
//! a connection for ever. This one is hyper's, with poem's endpoint behind it.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
};
use poem::{
    Addr, Endpoint, Response,
    http::uri::Scheme,
    web::{LocalAddr, RemoteAddr},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};

/// How many connections are served at once; more wait to be accepted.
const CONNECTIONS: usize = 10_000;
/// The most that a request's line and header fields may take.
const HEADER_BYTES: usize = 32 * 1024;
const HEADER_FIELDS: usize = 100;
/// After a failed accept, such as for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// From the first byte of a request to its last header field.
    pub header: Duration,
    /// For requests in flight, once the server stops.
    pub drain: Duration,
}

/// Serves until `stop` ends, then lets requests in flight finish, for as long as `timeouts.drain`.
pub async fn serve<E>(
    listener: TcpListener,
    endpoint: E,
    timeouts: Timeouts,
    stop: impl Future<Output = ()>,
) where
    E: Endpoint<Output = Response> + 'static,
{
    let endpoint = Arc::new(endpoint);
    let local = listener.local_addr().ok();
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(timeouts.header)
        .max_headers(HEADER_FIELDS)
        .max_buf_size(HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(200)
        .max_pending_accept_reset_streams(Some(20))
        .max_header_list_size(u32::try_from(HEADER_BYTES).unwrap_or(u32::MAX))
        .keep_alive_interval(Some(Duration::from_secs(30)))
        .keep_alive_timeout(Duration::from_secs(20));
    let builder = Arc::new(builder);
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS));

    tokio::pin!(stop);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, stream, peer) = tokio::select! {
            () = &mut stop => break,
            (place, accepted) = accepted => match accepted {
                Ok((stream, peer)) => (place, stream, peer),
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "cannot accept a connection");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            }
        };
        // Answers are small and complete: waiting to fill a packet only delays them.
        let _ = stream.set_nodelay(true);
        let (builder, endpoint, watcher) = (builder.clone(), endpoint.clone(), graceful.watcher());
        tokio::spawn(async move {
            let _place = place;
            connection(stream, peer, local, &builder, endpoint, watcher).await;
        });
    }
    drop(listener);
    if timeout(timeouts.drain, graceful.shutdown()).await.is_err() {
        tracing::warn!("some requests were still in flight when their time was over");
    }
}

async fn connection<E>(
    stream: TcpStream,
    peer: SocketAddr,
    local: Option<SocketAddr>,
    builder: &auto::Builder<TokioExecutor>,
    endpoint: Arc<E>,
    watcher: hyper_util::server::graceful::Watcher,
) where
    E: Endpoint<Output = Response> + 'static,
{
    let service = hyper::service::service_fn(move |request| {
        let endpoint = endpoint.clone();
        let local = local.map_or_else(LocalAddr::default, |addr| LocalAddr(Addr::SocketAddr(addr)));
        let remote = RemoteAddr(Addr::SocketAddr(peer));
        async move {
            let request = (request, local, remote, Scheme::HTTP).into();
            Ok::<_, Infallible>(http::Response::from(endpoint.get_response(request).await))
        }
    });
    let served = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    // A client that goes away, or sends what is no HTTP, is its own affair.
    if let Err(error) = watcher.watch(served).await {
        tracing::debug!(error = %error, "a connection ended");
    }
}
