//! One connection: what it is doing, and until when it may go on doing it.
//!
//! A connection is always in one of five phases, each with its own deadline, for HTTP/1 and HTTP/2 alike. Bytes
//! alone extend none of them: only a complete request head, a finished response or progress in writing one does.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Instant,
};

use super::Timeouts;
use crate::authenticated::Authenticated;

/// The most that a response hands over at once.
const CHUNK: usize = 16 * 1024;

/// What a connection is waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The first complete request head, from the accept on.
    FirstHead,
    /// The rest of a later request head, of which the first byte has arrived. HTTP/1 only: on HTTP/2 a slow head
    /// counts as an idle connection.
    Head,
    /// The client to take a response.
    Write,
    /// The next request.
    Idle,
    /// A handler. Its own limit is `QUOTA_REQUEST_TIMEOUT`.
    Handler,
}

/// What the table asks of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Order {
    Continue,
    /// Finish the requests in flight, accept no new ones, then close.
    Finish,
    /// Close now.
    Close,
}

/// State shared by a connection's task, its stream, its requests and the table. Times are nanoseconds since
/// `accepted`, plus one; 0 means not set.
#[derive(Debug)]
pub(super) struct Connection {
    accepted: Instant,
    head_began: AtomicU64,
    write_blocked: AtomicU64,
    /// When the last response ended or made progress.
    progressed: AtomicU64,
    has_requested: AtomicBool,
    is_http2: AtomicBool,
    pub(super) authenticated: Authenticated,
    /// Requests whose handler runs. On HTTP/1, also those whose response is being written.
    handlers: AtomicU32,
    /// HTTP/2 responses that are being written.
    responses: AtomicU32,
    stalls: Mutex<Stalls>,
    order: AtomicU8,
    pub(super) waker: AtomicWaker,
}

/// When each HTTP/2 response being written last made progress.
#[derive(Debug, Default)]
struct Stalls {
    next_id: u64,
    progress: Vec<(u64, u64)>,
}

impl Stalls {
    fn oldest(&self) -> Option<u64> {
        self.progress.iter().map(|(_, at)| *at).min()
    }
}

impl Connection {
    pub(super) fn accepted_now() -> Self {
        Self {
            accepted: Instant::now(),
            head_began: AtomicU64::new(0),
            write_blocked: AtomicU64::new(0),
            progressed: AtomicU64::new(0),
            has_requested: AtomicBool::new(false),
            is_http2: AtomicBool::new(false),
            authenticated: Authenticated::default(),
            handlers: AtomicU32::new(0),
            responses: AtomicU32::new(0),
            stalls: Mutex::default(),
            order: AtomicU8::new(Order::Continue as u8),
            waker: AtomicWaker::new(),
        }
    }

    fn now(&self) -> u64 {
        let nanos = self.accepted.elapsed().as_nanos();
        u64::try_from(nanos).unwrap_or(u64::MAX - 1) + 1
    }

    fn at(&self, nanos: u64) -> Instant {
        self.accepted + std::time::Duration::from_nanos(nanos.saturating_sub(1))
    }

    pub(super) fn is_http2(&self) -> bool {
        self.is_http2.load(Ordering::Relaxed)
    }

    /// The phase and when it must be over; `None` where something else limits it.
    pub(super) fn phase(&self, timeouts: &Timeouts) -> (Phase, Option<Instant>) {
        match self.write_blocked.load(Ordering::Relaxed) {
            0 => self.phase_of_requests(timeouts),
            // Whatever else: while a response is being sent the connection is not idle, however long it takes.
            since => (Phase::Write, Some(self.at(since) + timeouts.write)),
        }
    }

    fn phase_of_requests(&self, timeouts: &Timeouts) -> (Phase, Option<Instant>) {
        if !self.has_requested.load(Ordering::Relaxed) {
            return (Phase::FirstHead, Some(self.accepted + timeouts.header));
        }
        // Each response has its own deadline, whatever the connection's other requests do.
        if let Some(since) = self.stalled_response() {
            return (Phase::Write, Some(self.at(since) + timeouts.write));
        }
        // Acquire: pairs with the release of a request that ends, so that `progressed` is its end or later.
        if self.handlers.load(Ordering::Acquire) > 0 {
            return (Phase::Handler, None);
        }
        match self.head_began.load(Ordering::Relaxed) {
            since if since > 0 && !self.is_http2() => {
                (Phase::Head, Some(self.at(since) + timeouts.header))
            }
            _ => {
                let since = self.at(self.progressed.load(Ordering::Relaxed));
                (Phase::Idle, Some(since + timeouts.idle))
            }
        }
    }

    pub(super) fn bytes_arrived(&self) {
        self.head_began.store(self.now(), Ordering::Relaxed);
    }

    /// For how long the connection has been open.
    pub(super) fn age(&self, now: Instant) -> std::time::Duration {
        now.saturating_duration_since(self.accepted)
    }

    /// Whether no byte of a first request has arrived.
    pub(super) fn is_silent(&self) -> bool {
        self.head_began.load(Ordering::Relaxed) == 0 && !self.has_requested.load(Ordering::Relaxed)
    }

    /// Since when the connection has been idle between two requests; `None` if it is not.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let is_idle = self.has_requested.load(Ordering::Relaxed)
            && self.handlers.load(Ordering::Acquire) == 0
            && self.responses.load(Ordering::Acquire) == 0
            && self.write_blocked.load(Ordering::Relaxed) == 0
            && (self.is_http2() || self.head_began.load(Ordering::Relaxed) == 0);
        is_idle.then(|| self.at(self.progressed.load(Ordering::Relaxed)))
    }

    fn stalled_response(&self) -> Option<u64> {
        if self.responses.load(Ordering::Acquire) == 0 {
            return None;
        }
        self.stalls.lock().oldest()
    }

    /// Since when the client has not taken a response; `None` if none waits for it.
    pub(super) fn stalled_since(&self) -> Option<Instant> {
        let blocked = self.write_blocked.load(Ordering::Relaxed);
        let blocked = (blocked > 0).then_some(blocked);
        let oldest = blocked.into_iter().chain(self.stalled_response()).min()?;
        Some(self.at(oldest))
    }

    pub(super) fn give(&self, order: Order) {
        self.order.fetch_max(order as u8, Ordering::AcqRel);
        self.waker.wake();
    }

    pub(super) fn order(&self) -> Order {
        match self.order.load(Ordering::Acquire) {
            0 => Order::Continue,
            1 => Order::Finish,
            _ => Order::Close,
        }
    }

    /// Counts a request from its complete head to the end of its response. Returns whether it is the first.
    pub(super) fn begin_request(self: &Arc<Self>, is_http2: bool) -> (RequestInFlight, bool) {
        let is_first = !self.has_requested.load(Ordering::Relaxed);
        self.handlers.fetch_add(1, Ordering::Relaxed);
        if is_first {
            self.is_http2.store(is_http2, Ordering::Relaxed);
            self.has_requested.store(true, Ordering::Relaxed);
        }
        let request = RequestInFlight {
            connection: self.clone(),
            response: None,
        };
        (request, is_first)
    }
}

/// Ends when the response was handed over completely, or was given up.
#[derive(Debug)]
pub(super) struct RequestInFlight {
    connection: Arc<Connection>,
    /// HTTP/2 only: its number under `stalls`, once it counts under `responses`.
    response: Option<u64>,
}

impl RequestInFlight {
    /// The handler has answered.
    pub(super) fn respond(&mut self) {
        let it = &self.connection;
        if !it.is_http2() {
            // The connection is not used for anything else meanwhile, and a client that does not read is noticed
            // by its socket.
            return;
        }
        it.progressed.store(it.now(), Ordering::Relaxed);
        let mut stalls = it.stalls.lock();
        let id = stalls.next_id;
        stalls.next_id += 1;
        stalls.progress.push((id, it.now()));
        drop(stalls);
        it.responses.fetch_add(1, Ordering::Release);
        it.handlers.fetch_sub(1, Ordering::Release);
        self.response = Some(id);
    }

    fn progress(&self) {
        let Some(id) = self.response else { return };
        let it = &self.connection;
        let now = it.now();
        it.progressed.store(now, Ordering::Relaxed);
        let mut stalls = it.stalls.lock();
        if let Some((_, at)) = stalls.progress.iter_mut().find(|(other, _)| *other == id) {
            *at = now;
        }
    }
}

impl Drop for RequestInFlight {
    fn drop(&mut self) {
        let it = &self.connection;
        it.progressed.store(it.now(), Ordering::Relaxed);
        let count = if let Some(id) = self.response {
            let mut stalls = it.stalls.lock();
            if let Some(index) = stalls.progress.iter().position(|(other, _)| *other == id) {
                stalls.progress.swap_remove(index);
            }
            &it.responses
        } else {
            &it.handlers
        };
        count.fetch_sub(1, Ordering::Release);
    }
}

/// A response body that keeps its request in flight and, on HTTP/2, notes progress: there a client can stop a
/// single response by flow control while the socket stays writable.
pub(super) struct TrackedBody<B> {
    pub(super) body: B,
    /// What is left of a large frame: hyper copies a frame whole, and keeps the memory while the connection lives.
    pub(super) rest: Bytes,
    pub(super) request: RequestInFlight,
}

impl<B: Body<Data = Bytes> + Unpin> Body for TrackedBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut frame = if self.rest.is_empty() {
            Pin::new(&mut self.body).poll_frame(context)
        } else {
            Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.rest)))))
        };
        if let Poll::Ready(Some(Ok(frame))) = &mut frame
            && let Some(data) = frame.data_mut()
            && data.len() > CHUNK
        {
            self.rest = data.split_off(CHUNK);
        }
        if matches!(&frame, Poll::Ready(Some(Ok(_)))) {
            self.request.progress();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.len() as u64;
        let hint = self.body.size_hint();
        let mut with_rest = SizeHint::new();
        with_rest.set_lower(hint.lower() + rest);
        if let Some(upper) = hint.upper() {
            with_rest.set_upper(upper + rest);
        }
        with_rest
    }
}

/// A socket that notes when a request begins to arrive, and since when the client takes no bytes.
#[derive(Debug)]
pub(super) struct WatchedStream {
    pub(super) stream: TcpStream,
    pub(super) connection: Arc<Connection>,
}

impl AsyncRead for WatchedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let it = &self.connection;
        if buffer.filled().len() > before && it.head_began.load(Ordering::Relaxed) == 0 {
            it.bytes_arrived();
        }
        read
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        let it = &self.connection;
        it.head_began.store(0, Ordering::Relaxed);
        if written.is_ready() {
            if it.write_blocked.load(Ordering::Relaxed) > 0 {
                it.write_blocked.store(0, Ordering::Relaxed);
                it.progressed.store(it.now(), Ordering::Relaxed);
            }
        } else if it.write_blocked.load(Ordering::Relaxed) == 0 {
            it.write_blocked.store(it.now(), Ordering::Relaxed);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
