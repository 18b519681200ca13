//! Listening: accepting connections, their deadlines, and how they end.
//!
//! poem's own server sets no timeout on header fields, and hyper's none on the first bytes of a connection (which
//! tell HTTP/1 from HTTP/2), on an idle HTTP/2 connection, or on a client that does not read. Here each connection
//! has one timer, and [`connection`] says what it stands for at any moment. [`table`] limits how many connections
//! there are. Knows nothing of what the endpoint does.

mod connection;
mod table;

use std::{
    convert::Infallible, future::poll_fn, io, net::SocketAddr, pin::pin, sync::Arc, task::Poll,
    time::Duration,
};

use bytes::Bytes;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use poem::{
    Addr, Endpoint, Response,
    http::{Version, uri::Scheme},
    web::{LocalAddr, RemoteAddr},
};
use tokio::{
    net::{TcpListener, TcpSocket},
    task,
    time::{self, timeout},
};

pub use self::table::Limits;
use self::{
    connection::{Connection, Order, Phase, TrackedBody, WatchedStream},
    table::{Admitted, Place, Table},
};
use crate::{file_limit, state::AppState, telemetry::metrics::ConnectionMetrics};

/// The most that a request's line and header fields may take.
const HEADER_BYTES: usize = 32 * 1024;
const HEADER_FIELDS: usize = 100;
/// HTTP/2: bytes of request bodies that a client may send before they are read, on one stream and on all of a
/// connection. A body of the default limit fits; hyper's own defaults would hold 1 MiB for each connection.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 128 * 1024;
/// HTTP/2: bytes of responses that wait for the socket, on one stream.
const SEND_BUFFER: usize = 64 * 1024;
/// HTTP/2: requests at a time on one connection; each holds some memory until its response is taken.
const CONCURRENT_STREAMS: u32 = 32;
/// Connections that the kernel completes before they are accepted; it may allow fewer (net.core.somaxconn).
const BACKLOG: u32 = 4096;
/// After a failed accept, such as for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// Accepting waits while more sockets than this are still being closed to make room.
const CLOSING: usize = 64;
/// How long an HTTP/2 connection may take to close after it was told to.
const GOODBYE: Duration = Duration::from_secs(5);
/// Connections to the metrics listener: a few scrapers, and a person who looks.
const METRICS_CONNECTIONS: usize = 64;

#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// From the accept to the end of the first request head, and from the first byte of a later one to its end.
    pub header: Duration,
    /// How long a connection may be idle between two requests. Longer than a proxy keeps one, so that the proxy
    /// closes it: one that is closed here while a request is on its way costs that request.
    pub idle: Duration,
    /// How long a client may take no byte of its response.
    pub write: Duration,
    /// For requests in flight, once the server stops.
    pub drain: Duration,
}

/// How a listener treats its connections.
#[derive(Debug, Clone)]
pub struct ServeSettings {
    pub timeouts: Timeouts,
    pub limits: Limits,
    pub metrics: Arc<ConnectionMetrics>,
}

impl ServeSettings {
    /// For the API. `file_limit` is what [`file_limit::raise`] returned.
    pub fn public(state: &AppState, file_limit: Option<usize>) -> Self {
        let config = &state.config;
        let database = config.database.pool;
        let connections = file_limit::connections(
            config.connections,
            file_limit,
            database + METRICS_CONNECTIONS,
        );
        if connections < config.connections {
            tracing::warn!(
                connections,
                "the limit of open files (ulimit -n) allows fewer connections than QUOTA_CONNECTIONS"
            );
        }
        Self {
            timeouts: Timeouts {
                header: config.header_timeout,
                idle: config.idle_timeout,
                write: config.write_timeout,
                drain: config.drain_timeout,
            },
            limits: Limits {
                connections,
                per_address: config.connections_per_address,
                trusted_proxies: config.trusted_proxies.clone(),
            },
            metrics: state.metrics.public_connections.clone(),
        }
    }

    /// For the metrics listener, which nobody waits for when the server stops.
    pub fn metrics(state: &AppState) -> Self {
        let public = Self::public(state, None);
        Self {
            timeouts: Timeouts {
                drain: Duration::ZERO,
                ..public.timeouts
            },
            limits: Limits {
                connections: METRICS_CONNECTIONS,
                per_address: 0,
                trusted_proxies: Vec::new(),
            },
            metrics: state.metrics.metrics_connections.clone(),
        }
    }
}

/// An address that is reserved but does not accept connections yet.
///
/// A server takes its address before it starts, so that a port in use is reported at once, and listens only when it
/// can answer. Until then connections are refused, and balancers try another server, also with a POST.
#[derive(Debug)]
pub struct BoundSocket(TcpSocket);

impl BoundSocket {
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Starts to accept connections, with a queue in the kernel that outlasts a burst.
    pub fn listen(self) -> io::Result<TcpListener> {
        self.0.listen(BACKLOG)
    }
}

/// Reserves an address.
pub fn bind(addr: SocketAddr) -> io::Result<BoundSocket> {
    let socket = if addr.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // What every server does: a port that was left a moment ago is free.
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    Ok(BoundSocket(socket))
}

/// Serves until `stop` ends, then lets requests in flight finish, for as long as `timeouts.drain`.
pub async fn serve<E>(
    listener: TcpListener,
    endpoint: E,
    settings: ServeSettings,
    stop: impl Future<Output = ()>,
) where
    E: Endpoint<Output = Response> + 'static,
{
    let server = Arc::new(Server {
        endpoint,
        local: listener.local_addr().ok(),
        builder: builder(),
        timeouts: settings.timeouts,
    });
    let table = Table::new(settings.limits, settings.metrics.clone());
    let mut is_failing = false;

    tokio::pin!(stop);
    loop {
        while table.closing() > CLOSING {
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
                table.spare_one();
                time::sleep(PAUSE).await;
                continue;
            }
        };
        if std::mem::take(&mut is_failing) {
            tracing::info!("connections are accepted again");
        }
        let Ok(Admitted { connection, place }) = table.admit(peer.ip()) else {
            continue;
        };
        // Answers are small and complete: waiting to fill a packet only delays them.
        let _ = stream.set_nodelay(true);
        let stream = WatchedStream {
            stream,
            connection: connection.clone(),
        };
        let (server, metrics) = (server.clone(), settings.metrics.clone());
        tokio::spawn(async move {
            server
                .connection(stream, peer, connection, place, &metrics)
                .await;
        });
    }
    drop(listener);
    if timeout(settings.timeouts.drain, table.finish())
        .await
        .is_err()
    {
        tracing::warn!("some requests were still in flight when their time was over");
    }
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        // The connection's own timer holds it to its time.
        .header_read_timeout(None)
        // One buffer for an answer: its copy costs less than a list of buffers does in the kernel.
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

/// What all connections of a listener share.
struct Server<E> {
    endpoint: E,
    local: Option<SocketAddr>,
    builder: auto::Builder<TokioExecutor>,
    timeouts: Timeouts,
}

/// How a connection ended, other than by itself.
enum End {
    TimedOut(Phase),
    MadeRoom,
}

impl<E: Endpoint<Output = Response> + 'static> Server<E> {
    async fn connection(
        self: Arc<Self>,
        stream: WatchedStream,
        peer: SocketAddr,
        connection: Arc<Connection>,
        place: Place,
        metrics: &ConnectionMetrics,
    ) {
        let service =
            hyper::service::service_fn(|mut request: hyper::Request<hyper::body::Incoming>| {
                let is_http2 = request.version() == Version::HTTP_2;
                let (mut in_flight, is_first) = connection.begin_request(is_http2);
                if is_first {
                    place.has_requested();
                }
                if !connection.authenticated.is_set() {
                    let authenticated = connection.authenticated.clone();
                    request.extensions_mut().insert(authenticated);
                }
                let server = self.clone();
                async move {
                    let local = server.local;
                    let local = local
                        .map_or_else(LocalAddr::default, |addr| LocalAddr(Addr::SocketAddr(addr)));
                    let remote = RemoteAddr(Addr::SocketAddr(peer));
                    let request = (request, local, remote, Scheme::HTTP).into();
                    let response =
                        http::Response::from(server.endpoint.get_response(request).await);
                    in_flight.respond();
                    Ok::<_, Infallible>(response.map(|body| TrackedBody {
                        body,
                        rest: Bytes::new(),
                        request: in_flight,
                    }))
                }
            });
        let mut served = pin!(
            self.builder
                .serve_connection_with_upgrades(TokioIo::new(stream), service)
        );
        // One entry in the runtime's timer for the life of the connection. It is moved when its time has come, and
        // moved forward only when a deadline is earlier: once in a deadline's time instead of twice in a request's.
        let mut alarm = pin!(time::sleep(self.timeouts.header));
        let mut is_finishing = false;
        let mut goodbye_until = None;
        let end = poll_fn(|context| {
            connection.waker.register(context.waker());
            match connection.order() {
                Order::Close => return Poll::Ready(Err(End::MadeRoom)),
                Order::Finish if !is_finishing => {
                    is_finishing = true;
                    served.as_mut().graceful_shutdown();
                }
                Order::Continue | Order::Finish => {}
            }
            loop {
                if let Poll::Ready(result) = served.as_mut().poll(context) {
                    return Poll::Ready(Ok(result));
                }
                let (phase, deadline) = connection.phase(&self.timeouts);
                if is_finishing && phase == Phase::Idle && goodbye_until.is_none() {
                    // hyper would wait for the client to answer its ping, for as long as that takes.
                    goodbye_until = Some(time::Instant::now() + GOODBYE);
                }
                let deadline = match phase {
                    Phase::Idle => goodbye_until.or(deadline),
                    _ => deadline,
                };
                if let Some(deadline) = deadline
                    && alarm.deadline() > deadline
                {
                    alarm.as_mut().reset(deadline);
                }
                if alarm.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                let Some(deadline) = deadline else {
                    alarm
                        .as_mut()
                        .reset(time::Instant::now() + self.timeouts.header);
                    continue;
                };
                if alarm.deadline() < deadline {
                    alarm.as_mut().reset(deadline);
                    continue;
                }
                if phase == Phase::Idle && connection.is_http2() && goodbye_until.is_none() {
                    // A client that is about to send a request learns that it was not taken.
                    served.as_mut().graceful_shutdown();
                    goodbye_until = Some(time::Instant::now() + GOODBYE);
                    continue;
                }
                return Poll::Ready(Err(End::TimedOut(phase)));
            }
        });
        match end.await {
            Ok(Ok(())) | Err(End::MadeRoom) => {}
            // A client that leaves, or does not speak HTTP, is its own affair.
            Ok(Err(error)) => tracing::debug!(error = %error, "a connection ended"),
            Err(End::TimedOut(phase)) => {
                let count = match phase {
                    Phase::FirstHead | Phase::Head => &metrics.timed_out_head,
                    Phase::Write => &metrics.timed_out_write,
                    Phase::Idle | Phase::Handler => &metrics.timed_out_idle,
                };
                count.inc();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use poem::{EndpointExt, endpoint::make_sync};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    const HEADER: Duration = Duration::from_millis(300);
    const IDLE: Duration = Duration::from_millis(900);
    const WRITE: Duration = Duration::from_millis(600);
    /// More than any socket buffers.
    const LARGE: usize = 32 * 1024 * 1024;

    #[expect(clippy::needless_pass_by_value, reason = "what an endpoint takes")]
    fn endpoint(request: poem::Request) -> poem::Body {
        if request.uri().path() == "/large" {
            vec![b'x'; LARGE].into()
        } else {
            "here".into()
        }
    }

    async fn connect() -> TcpStream {
        connect_until(std::future::pending(), Duration::ZERO)
            .await
            .0
    }

    async fn connect_until(
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
                trusted_proxies: Vec::new(),
            },
            metrics: Arc::default(),
        };
        let endpoint = make_sync(endpoint).map_to_response();
        let server = tokio::spawn(serve(listener, endpoint, settings, stop));
        (TcpStream::connect(addr).await.unwrap(), server)
    }

    async fn ask(stream: &mut TcpStream) {
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: q\r\n\r\n")
            .await
            .unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"here") {
            assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "it ended");
        }
    }

    /// How long until the server ends the connection.
    async fn ended_after(stream: &mut TcpStream) -> Duration {
        let began = time::Instant::now();
        let mut rest = Vec::new();
        let _ = timeout(10 * HEADER, stream.read_to_end(&mut rest))
            .await
            .expect("the server ends it");
        began.elapsed()
    }

    #[tokio::test]
    async fn a_connection_that_goes_on_asking_is_never_ended() {
        let mut stream = connect().await;
        for _ in 0..10 {
            ask(&mut stream).await;
            time::sleep(HEADER / 3).await;
        }
    }

    #[tokio::test]
    async fn header_fields_that_come_too_slowly_end_the_connection() {
        let mut stream = connect().await;
        stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let ended = ended_after(&mut stream).await;
        assert!(ended >= HEADER * 9 / 10, "{ended:?}");
    }

    /// Also when the alarm still stood at an earlier request's deadline.
    #[tokio::test]
    async fn every_request_gets_the_whole_time() {
        let mut stream = connect().await;
        time::sleep(HEADER / 2).await;
        ask(&mut stream).await;
        stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let ended = ended_after(&mut stream).await;
        assert!(ended >= HEADER * 9 / 10, "{ended:?}");
    }

    #[tokio::test]
    async fn a_connection_may_rest_for_longer_than_a_request_may_take_to_arrive() {
        let mut stream = connect().await;
        ask(&mut stream).await;
        time::sleep(HEADER * 2).await;
        ask(&mut stream).await;
        let ended = ended_after(&mut stream).await;
        assert!(ended >= IDLE * 9 / 10, "{ended:?}");
    }

    #[tokio::test]
    async fn a_connection_that_sends_nothing_is_closed() {
        let mut stream = connect().await;
        let ended = ended_after(&mut stream).await;
        assert!(ended >= HEADER * 9 / 10, "{ended:?}");
    }

    /// One byte that HTTP/1 and HTTP/2 have in common, then a byte now and then.
    #[tokio::test]
    async fn a_first_request_that_arrives_too_slowly_is_closed_whatever_its_protocol() {
        for (first, rest) in [
            ("P", "OST / HT"),
            ("GET / HTTP/1.1\r\n", "A: bcdefgh"),
            ("PRI * HTTP/2.0\r\n\r\nS", "M\r\n"),
        ] {
            let stream = connect().await;
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

    #[tokio::test]
    async fn a_client_that_does_not_read_its_response_is_closed() {
        let mut stream = connect().await;
        stream
            .write_all(b"GET /large HTTP/1.1\r\nHost: q\r\n\r\n")
            .await
            .unwrap();
        time::sleep(WRITE * 3).await;
        let mut answer = Vec::new();
        let _ = timeout(10 * HEADER, stream.read_to_end(&mut answer))
            .await
            .expect("the server ends it");
        assert!(answer.len() < LARGE, "it was sent completely");
    }

    #[tokio::test]
    async fn a_client_that_reads_slowly_gets_its_whole_response() {
        let mut stream = connect().await;
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

    /// Just enough of HTTP/2, by hand: a client that follows the rules could not misbehave.
    mod http2 {
        use super::*;

        const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        const SETTINGS: u8 = 4;
        const PING: u8 = 6;
        const GOAWAY: u8 = 7;
        const DATA: u8 = 0;
        const HEADERS: u8 = 1;

        pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
            let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
            let mut frame = length[1..].to_vec();
            frame.extend([kind, flags]);
            frame.extend(stream.to_be_bytes());
            frame.extend(payload);
            frame
        }

        fn get(stream: u32) -> Vec<u8> {
            // GET, http, "/" from the static table; the authority as a literal.
            frame(HEADERS, 0x5, stream, &[0x82, 0x86, 0x84, 0x41, 1, b'q'])
        }

        fn hello(settings: &[u8]) -> Vec<u8> {
            [PREFACE, &frame(SETTINGS, 0, 0, settings)].concat()
        }

        /// Answers pings until the server closes; returns after how long, and the types of the frames it sent.
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
            timeout(20 * HEADER, all).await.expect("the server ends it");
            (began.elapsed(), kinds)
        }

        #[tokio::test]
        async fn a_connection_without_a_request_is_closed() {
            let mut stream = connect().await;
            stream.write_all(&hello(&[])).await.unwrap();
            let (ended, _) = until_closed(&mut stream).await;
            assert!(ended >= HEADER * 9 / 10, "{ended:?}");
        }

        #[tokio::test]
        async fn an_idle_connection_is_closed_with_a_goodbye() {
            let mut stream = connect().await;
            stream
                .write_all(&[hello(&[]), get(1)].concat())
                .await
                .unwrap();
            let (ended, kinds) = until_closed(&mut stream).await;
            assert!(ended >= IDLE * 9 / 10, "{ended:?}");
            assert!(kinds.contains(&DATA), "its request was answered: {kinds:?}");
            assert!(kinds.contains(&GOAWAY), "{kinds:?}");
        }

        #[tokio::test]
        async fn a_connection_that_goes_on_asking_is_kept() {
            let mut stream = connect().await;
            stream.write_all(&hello(&[])).await.unwrap();
            let began = time::Instant::now();
            for id in 0..8 {
                stream
                    .write_all(&get(2 * id + 1))
                    .await
                    .expect("it is open");
                time::sleep(IDLE / 4).await;
            }
            let (_, kinds) = until_closed(&mut stream).await;
            assert!(began.elapsed() > IDLE * 2);
            let answers = kinds.iter().filter(|kind| [DATA].contains(kind)).count();
            assert_eq!(answers, 8, "{kinds:?}");
        }

        #[tokio::test]
        async fn an_idle_client_that_answers_no_ping_does_not_delay_a_stop() {
            let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
            let stopped = async move {
                let _ = stopped.await;
            };
            let (mut stream, server) = connect_until(stopped, GOODBYE * 4).await;
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

        /// The socket stays writable and pings are answered: only the response does not move.
        #[tokio::test]
        async fn a_client_that_opens_no_window_for_its_response_is_closed() {
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
    }
}
