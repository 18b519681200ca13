//! Accepts connections, enforces their deadlines and closes them.
//!
//! poem's server has no timeout for header fields. hyper has no timeout for the first bytes of a connection (which
//! distinguish HTTP/1 from HTTP/2), for an idle HTTP/2 connection, or for a client that does not read its response. In
//! this module, each connection has one timer, and [`connection`] computes the connection's current deadline. For
//! HTTP/2, the deadline depends on the frames on the wire ([`http2`]). [`table`] limits the number of connections.
//! [`direct`] responds to plain requests without hyper. This module does not depend on what the endpoint does.

mod body;
mod connection;
mod direct;
mod http2;
mod memory;
mod request_body;
mod settings;
mod stream;
mod table;

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, combinators::BoxBody};
use hyper::body::Body as _;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use poem::{
    Addr, Endpoint, Response,
    http::uri::Scheme,
    web::{LocalAddr, RemoteAddr},
};
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpSocket},
    task,
    time::{self, timeout},
};

pub use self::settings::{Limits, ServeSettings, Timeouts};
use self::{
    body::ResponseBody,
    connection::{Connection, Phase, Shutdown},
    direct::DirectService,
    http2::CONCURRENT_STREAMS,
    request_body::BodyEnd,
    stream::{LentStream, WatchedStream},
    table::{Admitted, Slot, Table},
};
use crate::{
    plain_request::DirectEndpoint, telemetry::metrics::ConnectionMetrics,
    tenant_places::HeldUntilSent,
};

/// The maximum total size of a request line and its header fields.
const HEADER_BYTES: usize = 32 * 1024;
/// The maximum number of header fields of an HTTP/1 request.
const HEADER_FIELDS: usize = 100;
/// The overhead per header field, as counted by HTTP/2 (RFC 9113, section 6.5.2).
const FIELD: usize = 32;
/// HTTP/2: how many bytes of a request body a client may send before the server has read any of them. The window is
/// large enough for a body of the default maximum size.
const STREAM_WINDOW: u32 = 64 * 1024;
/// HTTP/2: how many bytes of request bodies a client may send on a connection before the server has read any of them.
/// hyper's default would buffer 1 MiB.
const CONNECTION_WINDOW: u32 = 128 * 1024;
/// HTTP/2: how many bytes of a response may wait for the socket, per stream.
const SEND_BUFFER: usize = 64 * 1024;
/// The maximum number of connections that the kernel completes before they are accepted. The kernel may allow fewer
/// (net.core.somaxconn).
const BACKLOG: u32 = 4096;
/// The kernel accepts no more of a response while this many bytes have not been sent. Otherwise, it would buffer
/// megabytes for a client that does not read, and copying them would keep other clients waiting. Bytes in transit do
/// not count, so the limit does not slow down clients that read. When this limit has been reached, the kernel accepts
/// more only after half as many bytes have been sent.
const UNSENT: u32 = 64 * 1024;
/// How long to pause after failing to accept a connection, for example because there are no free file descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// No connections are accepted while more than this number of sockets are being closed to make room or to free memory.
const CLOSING: usize = 16;
/// After this many connections have been accepted, other tasks run before the next connection is accepted. Otherwise,
/// requests on open connections would wait for the first requests of all connections that clients open at the same
/// time.
const ACCEPTED_TOGETHER: u32 = 16;
/// How long an HTTP/2 connection without requests in flight may take to close after a graceful shutdown has started.
const GOODBYE: Duration = Duration::from_secs(5);

/// An address that is reserved but does not accept connections yet.
///
/// A server reserves its address early during startup, so that an occupied port is reported immediately. The server
/// listens only when it can respond. Until then, connections are refused, and load balancers try another server, even
/// for POST requests.
#[derive(Debug)]
pub struct BoundSocket(TcpSocket);

impl BoundSocket {
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    pub fn listen(self) -> io::Result<TcpListener> {
        self.0.listen(BACKLOG)
    }
}

pub fn bind(addr: SocketAddr) -> io::Result<BoundSocket> {
    let socket = if addr.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // Allows binding while old connections are in TIME_WAIT, as most servers do.
    socket.set_reuseaddr(true)?;
    // Accepted connections inherit this option.
    if let Err(error) = SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT) {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "the kernel may buffer megabytes for each client that does not read"
        );
    }
    socket.bind(addr)?;
    Ok(BoundSocket(socket))
}

/// Serves connections until `stop` completes, and then waits up to `timeouts.drain` for requests in flight. `direct`
/// responds to the complete plain requests that it accepts, and `endpoint` to all other requests.
pub async fn serve<E, D>(
    listener: TcpListener,
    endpoint: E,
    direct: Option<D>,
    settings: ServeSettings,
    stop: impl Future<Output = ()>,
) where
    E: Endpoint<Output = Response> + 'static,
    D: DirectEndpoint,
{
    let table = Table::new(settings.limits, settings.metrics.clone());
    let server = Arc::new(Server {
        table: table.clone(),
        endpoint,
        direct,
        local: listener.local_addr().ok(),
        builder: builder(),
        timeouts: settings.timeouts,
    });
    let mut is_failing = false;
    let mut accepted_together = 0;

    tokio::pin!(stop);
    loop {
        if accepted_together == ACCEPTED_TOGETHER {
            accepted_together = 0;
            task::yield_now().await;
        }
        while table.closing() > CLOSING || table.is_backlogged() {
            task::yield_now().await;
        }
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                settings.metrics.accept_errors.inc();
                if !std::mem::replace(&mut is_failing, true) {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "cannot accept connections"
                    );
                }
                table.close_spare();
                time::sleep(PAUSE).await;
                continue;
            }
        };
        if std::mem::take(&mut is_failing) {
            tracing::info!("accepting connections again");
        }
        accepted_together += 1;
        let Ok(Admitted { connection, slot }) = table.admit(peer.ip()) else {
            continue;
        };
        // Most responses are small and are written in one piece, so waiting to fill a packet would only delay them.
        let _ = stream.set_nodelay(true);
        let stream = WatchedStream::new(stream, connection.clone(), table.clone());
        let (server, metrics) = (server.clone(), settings.metrics.clone());
        tokio::spawn(async move {
            server
                .connection(stream, peer, connection, slot, &metrics)
                .await;
        });
    }
    drop(listener);
    if timeout(settings.timeouts.drain, table.finish())
        .await
        .is_err()
    {
        tracing::warn!("some requests were still in flight when the drain timeout expired");
    }
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        // The connection's own timer enforces this deadline.
        .header_read_timeout(None)
        // Copying a response into one buffer costs less than passing a list of buffers to the kernel.
        .writev(false)
        .max_headers(HEADER_FIELDS)
        .max_buf_size(HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(CONCURRENT_STREAMS)
        .max_pending_accept_reset_streams(Some(20))
        .max_header_list_size(u32::try_from(HEADER_BYTES).unwrap_or(u32::MAX))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(Some(Duration::from_secs(30)))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}

/// Returns the approximate number of bytes that the head of an HTTP/2 request uses. Heads of HTTP/1 requests are
/// counted as they arrive.
fn head_length<B>(connection: &Connection, request: &hyper::Request<B>) -> usize {
    if !connection.is_http2() {
        return 0;
    }
    let fields = request.headers().iter();
    let fields = fields.map(|(name, value)| name.as_str().len() + value.len() + FIELD);
    let target = request.uri().path_and_query();
    // Doubled, because each part of a request head keeps its whole frame in memory, and the frame is larger than the
    // part.
    2 * (fields.sum::<usize>() + target.map_or(0, |target| target.as_str().len()))
}

/// The state shared by all connections to a listener.
struct Server<E, D> {
    table: Arc<Table>,
    endpoint: E,
    direct: Option<D>,
    local: Option<SocketAddr>,
    builder: auto::Builder<TokioExecutor>,
    timeouts: Timeouts,
}

/// Why the server closed a connection.
enum End {
    TimedOut(Phase),
    ShutDown,
}

impl<E: Endpoint<Output = Response> + 'static, D: DirectEndpoint> Server<E, D> {
    async fn connection(
        self: Arc<Self>,
        stream: WatchedStream,
        peer: SocketAddr,
        connection: Arc<Connection>,
        slot: Slot,
        metrics: &ConnectionMetrics,
    ) {
        let service =
            hyper::service::service_fn(|mut request: hyper::Request<hyper::body::Incoming>| {
                let length = head_length(&connection, &request);
                let (is_first, in_flight) = connection.begin_request(length);
                if is_first {
                    slot.has_requested();
                }
                // Handlers use `marks` to record that the connection has authenticated. Over HTTP/2, handlers also use
                // `marks` to announce endless responses.
                let is_http2 = connection.is_http2();
                if is_http2 || !connection.marks.is_authenticated() {
                    request.extensions_mut().insert(connection.marks.clone());
                }
                let server = self.clone();
                async move {
                    let local = server.local;
                    let local = local
                        .map_or_else(LocalAddr::default, |addr| LocalAddr(Addr::SocketAddr(addr)));
                    let remote = RemoteAddr(Addr::SocketAddr(peer));
                    let (parts, body) = request.into_parts();
                    let (end, body) = if is_http2 || body.is_end_stream() {
                        (None, BoxBody::new(body.map_err(io::Error::other)).into())
                    } else {
                        let (end, body) = BodyEnd::watch(&parts.headers, body);
                        (Some(end), body)
                    };
                    let parts = (parts, local, remote, Scheme::HTTP).into();
                    let request = poem::Request::from_parts(parts, body);
                    let mut response =
                        http::Response::from(server.endpoint.get_response(request).await);
                    if let Some(end) = end {
                        end.announce_close(response.headers_mut()).await;
                    }
                    let held = response.extensions_mut().remove::<HeldUntilSent>();
                    Ok::<_, Infallible>(response.map(|body| ResponseBody {
                        body,
                        rest: Bytes::new(),
                        has_passed: false,
                        request: in_flight,
                        _held: held,
                    }))
                }
            });
        let lent = LentStream::default();
        let mut http = pin!(
            self.builder
                .serve_connection_with_upgrades(TokioIo::new(lent.clone()), service)
        );
        let stream = match &self.direct {
            None => Some(stream),
            Some(endpoint) => {
                // The direct service is created only once data has arrived, because its future and its buffer use
                // memory.
                let waited = {
                    let readable = pin!(stream.readable());
                    self.supervise(&connection, readable, |_| {}).await
                };
                if log_end(waited, metrics).is_none() {
                    // The socket is closed before the slot is free for another connection.
                    drop(stream);
                    return;
                }
                let direct = DirectService {
                    endpoint,
                    peer: peer.ip(),
                    connection: &connection,
                    slot: &slot,
                };
                // Boxed because the future contains a whole decision. Otherwise, every connection would reserve memory
                // for a decision.
                let mut served = Box::pin(direct.serve(stream, &lent, http.as_mut()));
                // The future completes by itself when the connection is shut down.
                let end = self.supervise(&connection, served.as_mut(), |_| {}).await;
                log_end(end, metrics).flatten()
            }
        };
        if let Some(stream) = stream {
            lent.lend(stream);
            let end = self.supervise(
                &connection,
                http,
                auto::UpgradeableConnection::graceful_shutdown,
            );
            log_end(end.await, metrics);
        }
    }

    /// Polls `served` until it completes, a deadline passes or the connection is shut down. `finish` makes `served`
    /// stop accepting requests.
    async fn supervise<F: Future>(
        &self,
        connection: &Connection,
        mut served: Pin<&mut F>,
        finish: impl Fn(Pin<&mut F>),
    ) -> Result<F::Output, End> {
        // One timer serves all deadlines. The timer is reset only when it fires, or when a deadline becomes earlier:
        // about once per deadline, instead of twice per request.
        let mut alarm = pin!(time::sleep(self.timeouts.header));
        // The waker that was last registered with `marks`. Most polls have the same waker, and most requests end before
        // the alarm fires, so most polls register nothing.
        let mut waker = None::<Waker>;
        let mut is_armed = false;
        let mut is_finishing = false;
        let mut goodbye_until = None;
        poll_fn(|context| {
            let is_known = waker
                .as_ref()
                .is_some_and(|waker| waker.will_wake(context.waker()));
            // `shut_down` sets this state and then wakes the waker. Waking removes the waker from `marks`, so it is
            // registered again.
            if !is_known || connection.shutdown() != Shutdown::None {
                connection.marks.register(context.waker());
                waker = Some(context.waker().clone());
                is_armed = false;
            }
            if connection.shutdown() == Shutdown::Immediate {
                return Poll::Ready(Err(End::ShutDown));
            }
            loop {
                if let Poll::Ready(result) = served.as_mut().poll(context) {
                    return Poll::Ready(Ok(result));
                }
                if connection.resumes() {
                    continue;
                }
                if connection.shutdown() == Shutdown::Graceful && !is_finishing {
                    is_finishing = true;
                    finish(served.as_mut());
                    continue;
                }
                let (phase, deadline) = connection.phase(&self.timeouts);
                if is_finishing && phase == Phase::Idle && goodbye_until.is_none() {
                    // hyper would wait indefinitely for the client to respond to its ping.
                    goodbye_until = Some(time::Instant::now() + GOODBYE);
                }
                let deadline = match phase {
                    Phase::Idle => goodbye_until.or(deadline),
                    _ => deadline,
                };
                let stalls_at = connection.stalls_at();
                let next = deadline.into_iter().chain(stalls_at).min();
                if let Some(next) = next
                    && alarm.deadline() > next
                {
                    alarm.as_mut().reset(next);
                    is_armed = false;
                }
                if is_armed && !alarm.is_elapsed() {
                    return Poll::Pending;
                }
                // If the task's budget is used up, the alarm does not store the waker.
                let has_budget = task::coop::has_budget_remaining();
                if alarm.as_mut().poll(context).is_pending() {
                    is_armed = has_budget;
                    return Poll::Pending;
                }
                is_armed = false;
                let Some(next) = next else {
                    alarm
                        .as_mut()
                        .reset(time::Instant::now() + self.timeouts.header);
                    continue;
                };
                if alarm.deadline() < next {
                    alarm.as_mut().reset(next);
                    continue;
                }
                if stalls_at == Some(next) {
                    if connection.account_stalled() {
                        self.table.free_memory();
                    }
                    continue;
                }
                if phase == Phase::Idle && connection.is_http2() && goodbye_until.is_none() {
                    // If the client is about to send a request, the shutdown tells the client that the request was not
                    // processed.
                    finish(served.as_mut());
                    goodbye_until = Some(time::Instant::now() + GOODBYE);
                    continue;
                }
                return Poll::Ready(Err(End::TimedOut(phase)));
            }
        })
        .await
    }
}

/// Logs a connection's error, or counts its timeout. Returns the result of the connection if it ended successfully.
fn log_end<T, E: std::fmt::Display>(
    end: Result<Result<T, E>, End>,
    metrics: &ConnectionMetrics,
) -> Option<T> {
    match end {
        Ok(Ok(result)) => return Some(result),
        Err(End::ShutDown) => {}
        // A client that disconnects or does not speak HTTP does not indicate a server error.
        Ok(Err(error)) => tracing::debug!(error = %error, "a connection failed"),
        Err(End::TimedOut(phase)) => {
            let count = match phase {
                Phase::FirstHead | Phase::Head => &metrics.timed_out_head,
                Phase::Write => &metrics.timed_out_write,
                Phase::Idle | Phase::Handler => &metrics.timed_out_idle,
            };
            count.inc();
        }
    }
    None
}

#[cfg(test)]
mod tests;
