//! Listening: connections, their timeouts, and how they end.
//!
//! poem's own server sets no timeout on header fields, so that a client that sends them a byte a minute holds
//! a connection for ever. This one is hyper's, with poem's endpoint behind it.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use hyper::rt::{Sleep, Timer};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
};
use parking_lot::Mutex;
use poem::{
    Addr, Endpoint, Response,
    http::uri::Scheme,
    web::{LocalAddr, RemoteAddr},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{self, timeout},
};

/// How many connections are served at once; more wait to be accepted.
const CONNECTIONS: usize = 10_000;
/// The most that a request's line and header fields may take.
const HEADER_BYTES: usize = 32 * 1024;
const HEADER_FIELDS: usize = 100;
/// What [`Timeouts::idle`] is: nginx keeps a connection for 60 s.
pub const IDLE: Duration = Duration::from_secs(75);
/// After a failed accept, such as for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// From the first byte of a request to its last header field.
    pub header: Duration,
    /// How long a connection may rest between two requests. Longer than a proxy keeps one, so that it is the
    /// proxy that ends it: one that ends here while a request is on its way costs that request.
    pub idle: Duration,
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
        .header_read_timeout(timeouts.header)
        // One buffer for an answer: its copy costs less than a list of buffers does in the kernel.
        .writev(false)
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
        let (mut builder, endpoint, watcher) =
            (builder.clone(), endpoint.clone(), graceful.watcher());
        let heard = Heard::default();
        builder.http1().timer(Alarm::new(timeouts, heard.clone()));
        let stream = Listened { stream, heard };
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

/// Since when a request is arriving on a connection; `None` while it rests or is answered.
#[derive(Debug, Clone, Default)]
struct Heard(Arc<Mutex<Option<time::Instant>>>);

/// A connection that notes when a request begins to arrive.
struct Listened {
    stream: TcpStream,
    heard: Heard,
}

impl AsyncRead for Listened {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.heard.0.lock().get_or_insert_with(time::Instant::now);
        }
        read
    }
}

impl AsyncWrite for Listened {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        *self.heard.0.lock() = None;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The timer of one HTTP/1 connection, which waits for one thing at a time: the next request's header fields.
///
/// hyper starts and drops a wait for every request, from the end of the one before, and so takes a connection
/// that rests for one that is slow. Here the wait is as long as a connection may rest, until the first byte
/// has come. And all of them share one entry in the runtime's timer: it is left at the deadline of an earlier
/// wait, and moved on when that has come, so it is touched once in a deadline's time instead of twice in a
/// request's.
struct Alarm {
    timeouts: Timeouts,
    heard: Heard,
    entry: Arc<Mutex<Pin<Box<time::Sleep>>>>,
}

impl Alarm {
    fn new(timeouts: Timeouts, heard: Heard) -> Self {
        let entry = Arc::new(Mutex::new(Box::pin(time::sleep(timeouts.header))));
        Self {
            timeouts,
            heard,
            entry,
        }
    }
}

impl Timer for Alarm {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        let rest = self.timeouts.idle.saturating_sub(self.timeouts.header);
        Box::pin(Wait {
            rested: time::Instant::from(deadline) + rest,
            header: self.timeouts.header,
            heard: self.heard.clone(),
            entry: self.entry.clone(),
        })
    }

    fn now(&self) -> Instant {
        time::Instant::now().into_std()
    }
}

struct Wait {
    /// When a connection has rested for too long.
    rested: time::Instant,
    header: Duration,
    heard: Heard,
    entry: Arc<Mutex<Pin<Box<time::Sleep>>>>,
}

impl Sleep for Wait {}

impl Future for Wait {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let due = self
            .heard
            .0
            .lock()
            .map_or(self.rested, |began| began + self.header);
        let mut entry = self.entry.lock();
        if entry.deadline() > due {
            entry.as_mut().reset(due);
        }
        while entry.as_mut().poll(context).is_ready() {
            if entry.deadline() >= due {
                return Poll::Ready(());
            }
            entry.as_mut().reset(due);
        }
        Poll::Pending
    }
}

async fn connection<E>(
    stream: Listened,
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

#[cfg(test)]
mod tests {
    use poem::{EndpointExt, endpoint::make_sync};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const HEADER: Duration = Duration::from_millis(300);
    const IDLE: Duration = Duration::from_millis(900);

    async fn connect() -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let timeouts = Timeouts {
            header: HEADER,
            idle: IDLE,
            drain: Duration::ZERO,
        };
        let endpoint = make_sync(|_| "here").map_to_response();
        tokio::spawn(serve(listener, endpoint, timeouts, std::future::pending()));
        TcpStream::connect(addr).await.unwrap()
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
}
