//! The phase of a connection and its deadline.
//!
//! A connection, over HTTP/1 or HTTP/2, is always in one of five phases. Each phase except [`Phase::Handler`] has its
//! own deadline. A running handler is limited by `QUOTA_REQUEST_TIMEOUT` instead. Only a complete request head, a
//! finished response, or progress in sending a response extends a deadline. The first byte of a later request head
//! starts the deadline of that head. Further bytes and canceled requests do not extend a deadline.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    http2::{Event, PROGRESS, Requests},
    memory::{self, Memory},
    settings::Timeouts,
};
use crate::connection_marks::ConnectionMarks;

/// How long the socket's buffer may accept nothing before a response counts toward the memory limit. The buffer accepts
/// more after the client has read 32 KiB (half of `UNSENT`), so a response does not count while the client reads at
/// least 11 KB/s.
pub(super) const STALLED: Duration = Duration::from_secs(3);

/// The phases of a connection, named after what the connection is waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The first complete request head.
    FirstHead,
    /// The rest of a later request head, of which at least one byte has arrived.
    Head,
    /// The client, which has not finished reading a response.
    Write,
    /// The next request.
    Idle,
    /// A handler, which is limited by `QUOTA_REQUEST_TIMEOUT`.
    Handler,
}

/// Whether a connection has been asked to shut down, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Shutdown {
    None,
    /// Finish the requests in flight, do not accept new requests, and then close.
    Graceful,
    /// Close now.
    Immediate,
}

/// The state shared by a connection's task, its stream, its requests and the table. Times are in nanoseconds since
/// `accepted`, plus one, because 0 means that a time is not set.
#[derive(Debug)]
pub(super) struct Connection {
    accepted: Instant,
    /// When the first byte of a request head arrived. For HTTP/2, set only for the first request.
    head_began: AtomicU64,
    write_blocked: AtomicU64,
    /// HTTP/1: when the last response ended or made progress.
    progressed: AtomicU64,
    has_requested: AtomicBool,
    is_http2: AtomicBool,
    pub(super) marks: ConnectionMarks,
    /// HTTP/1: the number of requests whose handler is running or whose response is being sent. Requests that are
    /// served directly and arrive together count as one.
    in_flight: AtomicU32,
    /// HTTP/1: the number of requests so far, counted in the same way as `in_flight`. Wraps around on overflow.
    requests: AtomicU32,
    http2: Mutex<Requests>,
    /// `None` if the connection's memory use is not counted.
    memory: Option<Arc<Memory>>,
    /// The amount that was last reported to `memory`.
    held: AtomicUsize,
    occupied: AtomicUsize,
    /// HTTP/1: bytes of the request that is arriving or in flight.
    buffered: AtomicUsize,
    /// HTTP/1: bytes of the response that wait for the socket.
    unsent: AtomicUsize,
    /// Whether the client has stopped reading, and `unsent` therefore counts.
    is_stalled: AtomicBool,
    /// HTTP/1: whether the rest of a response waits until the socket has accepted everything before it.
    holds_back: AtomicBool,
    /// HTTP/2: bytes of request heads in flight.
    heads: AtomicUsize,
    is_released: AtomicBool,
    shutdown: AtomicU8,
}

impl Connection {
    /// Creates the state of a connection that was just accepted. Its memory use is reported to `memory` until the
    /// connection has authenticated.
    pub(super) fn accepted_now(memory: Option<Arc<Memory>>) -> Self {
        Self {
            accepted: Instant::now(),
            head_began: AtomicU64::new(0),
            write_blocked: AtomicU64::new(0),
            progressed: AtomicU64::new(0),
            has_requested: AtomicBool::new(false),
            is_http2: AtomicBool::new(false),
            marks: ConnectionMarks::default(),
            in_flight: AtomicU32::new(0),
            requests: AtomicU32::new(0),
            http2: Mutex::default(),
            memory,
            held: AtomicUsize::new(0),
            occupied: AtomicUsize::new(0),
            buffered: AtomicUsize::new(0),
            unsent: AtomicUsize::new(0),
            is_stalled: AtomicBool::new(false),
            holds_back: AtomicBool::new(false),
            heads: AtomicUsize::new(0),
            is_released: AtomicBool::new(false),
            shutdown: AtomicU8::new(Shutdown::None as u8),
        }
    }

    fn now(&self) -> u64 {
        let nanos = self.accepted.elapsed().as_nanos();
        u64::try_from(nanos).unwrap_or(u64::MAX - 1) + 1
    }

    pub(super) fn at(&self, nanos: u64) -> Instant {
        self.accepted + Duration::from_nanos(nanos.saturating_sub(1))
    }

    pub(super) fn is_http2(&self) -> bool {
        self.is_http2.load(Ordering::Relaxed)
    }

    /// Records that the client speaks HTTP/2. From then on, frames are passed to [`Self::received`] and [`Self::sent`].
    pub(super) fn speaks_http2(&self) {
        self.is_http2.store(true, Ordering::Relaxed);
    }

    /// Records that an HTTP/2 frame from the client has started or is complete.
    pub(super) fn received(&self, event: Event) {
        self.http2.lock().received(event, self.now());
    }

    /// Records that an HTTP/2 frame to the client has started or is complete.
    pub(super) fn sent(&self, event: Event) {
        // An idle event stream sends only a few bytes at a time, so even a single byte counts as progress.
        let progress = if self.marks.has_endless_response() {
            1
        } else {
            PROGRESS
        };
        self.http2.lock().sent(event, self.now(), progress);
    }

    /// Returns the current phase and its deadline. The deadline is `None` if another timer limits the phase.
    pub(super) fn phase(&self, timeouts: &Timeouts) -> (Phase, Option<Instant>) {
        let blocked = match self.write_blocked.load(Ordering::Relaxed) {
            0 => None,
            since => Some((Phase::Write, self.at(since) + timeouts.write)),
        };
        if !self.has_requested.load(Ordering::Relaxed) {
            return (Phase::FirstHead, Some(self.accepted + timeouts.header));
        }
        if self.is_http2() {
            return self.phase_of_http2(timeouts, blocked);
        }
        // A connection is not idle while the rest of a response waits for the socket.
        if let Some((phase, deadline)) = blocked {
            return (phase, Some(deadline));
        }
        // The acquire ordering pairs with the release at the end of a request, so that `progressed` is not older than
        // that end.
        if self.in_flight.load(Ordering::Acquire) > 0 {
            return (Phase::Handler, None);
        }
        match self.head_began.load(Ordering::Relaxed) {
            0 => {
                let since = self.at(self.progressed.load(Ordering::Relaxed));
                (Phase::Idle, Some(since + timeouts.idle))
            }
            since => (Phase::Head, Some(self.at(since) + timeouts.header)),
        }
    }

    /// Returns the phase with the earliest deadline of all requests. Each request has its own deadline.
    fn phase_of_http2(
        &self,
        timeouts: &Timeouts,
        blocked: Option<(Phase, Instant)>,
    ) -> (Phase, Option<Instant>) {
        let waiting = self.http2.lock().waiting();
        let is_quiet = !waiting.has_open && blocked.is_none();
        let head = waiting
            .head
            .map(|since| (Phase::Head, self.at(since) + timeouts.header));
        let response = waiting.response.map(|since| {
            // A connection whose requests have all been canceled is still shut down gracefully.
            let phase = if is_quiet { Phase::Idle } else { Phase::Write };
            (phase, self.at(since) + timeouts.write)
        });
        let idle = is_quiet.then(|| (Phase::Idle, self.at(waiting.progressed) + timeouts.idle));
        [blocked, head, response, idle]
            .into_iter()
            .flatten()
            .min_by_key(|(_, deadline)| *deadline)
            .map_or((Phase::Handler, None), |(phase, deadline)| {
                (phase, Some(deadline))
            })
    }

    /// Records that `length` bytes were read from the socket.
    pub(super) fn has_read(&self, length: usize) {
        if self.head_began.load(Ordering::Relaxed) == 0 {
            self.head_began.store(self.now(), Ordering::Relaxed);
        }
        // The bytes are counted twice, because hyper's buffer may be twice their size, or a handler may have made a
        // copy.
        self.buffered.fetch_add(2 * length, Ordering::Relaxed);
    }

    /// Records that the socket accepted bytes, which means that the server has begun to respond to earlier requests.
    pub(super) fn has_written(&self) {
        if !self.is_http2() {
            self.head_began.store(0, Ordering::Relaxed);
            self.buffered.store(0, Ordering::Relaxed);
        }
        if self.write_blocked.load(Ordering::Relaxed) > 0 {
            self.write_blocked.store(0, Ordering::Relaxed);
            self.is_stalled.store(false, Ordering::Relaxed);
            self.progressed.store(self.now(), Ordering::Relaxed);
        }
    }

    /// Records that the socket is not accepting these `length` bytes at the moment.
    pub(super) fn is_write_blocked(&self, length: usize) {
        if !self.is_http2() {
            self.head_began.store(0, Ordering::Relaxed);
        }
        if self.write_blocked.load(Ordering::Relaxed) == 0 {
            self.write_blocked.store(self.now(), Ordering::Relaxed);
            self.unsent.store(length, Ordering::Relaxed);
        }
    }

    /// Returns whether the socket is not accepting the rest of a response.
    pub(super) fn has_unsent(&self) -> bool {
        self.write_blocked.load(Ordering::Relaxed) > 0
    }

    /// Returns whether to poll the connection again, because the rest of a response no longer has to wait.
    pub(super) fn resumes(&self) -> bool {
        let resumes = self.holds_back.load(Ordering::Relaxed) && !self.has_unsent();
        if resumes {
            self.holds_back.store(false, Ordering::Relaxed);
        }
        resumes
    }

    /// Returns when the first byte of the arriving request head was read, or `None` if no head is arriving.
    pub(super) fn head_began(&self) -> Option<u64> {
        let began = self.head_began.load(Ordering::Relaxed);
        (began > 0).then_some(began)
    }

    /// Returns the number of HTTP/1 requests so far. Requests that are served directly and arrive together count as
    /// one.
    pub(super) fn requests(&self) -> u32 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Returns whether every HTTP/1 response has been passed to the socket.
    pub(super) fn has_responded(&self) -> bool {
        self.in_flight.load(Ordering::Acquire) == 0 && !self.has_unsent()
    }

    /// Reports the connection's memory use to `memory`. Returns whether too much memory is used, by this connection or
    /// by all connections together.
    pub(super) fn account(&self) -> bool {
        let Some(memory) = &self.memory else {
            return false;
        };
        let occupied = if self.marks.is_authenticated() {
            0
        } else if self.is_http2() {
            self.http2.lock().held() + self.heads.load(Ordering::Relaxed)
        } else {
            let is_stalled = self.is_stalled.load(Ordering::Relaxed);
            let unsent = is_stalled.then(|| self.unsent.load(Ordering::Relaxed));
            self.buffered.load(Ordering::Relaxed) + unsent.unwrap_or(0)
        };
        self.account_as(memory, occupied)
    }

    /// Returns when the response that waits for the socket begins to count toward the memory limit, unless the client
    /// continues to read. Returns `None` if no response is waiting, or if the response already counts or can never
    /// count.
    pub(super) fn stalls_at(&self) -> Option<Instant> {
        let since = self.write_blocked.load(Ordering::Relaxed);
        let is_to_count = since > 0
            && self.memory.is_some()
            && !self.is_http2()
            && !self.is_stalled.load(Ordering::Relaxed);
        is_to_count.then(|| self.at(since) + STALLED)
    }

    /// From now on, counts the response that waits for the socket toward the memory limit. Otherwise works like
    /// [`Self::account`].
    pub(super) fn account_stalled(&self) -> bool {
        self.is_stalled.store(true, Ordering::Relaxed);
        self.account()
    }

    fn account_as(&self, memory: &Memory, occupied: usize) -> bool {
        let occupied = if occupied <= memory::SMALL {
            0
        } else {
            occupied
        };
        if occupied != self.occupied.load(Ordering::Relaxed) {
            let before = self.occupied.swap(occupied, Ordering::Relaxed);
            memory.change_occupied(before, occupied);
        }
        let held = if self.is_released.load(Ordering::Relaxed) {
            0
        } else {
            occupied
        };
        if held != self.held.load(Ordering::Relaxed) {
            let before = self.held.swap(held, Ordering::Relaxed);
            memory.change_held(before, held);
        }
        held > 0 && (held > memory.per_connection() || memory.is_exceeded())
    }

    /// Returns whether to stop reading until other connections have freed memory.
    pub(super) fn should_pause(&self) -> bool {
        let memory = self.memory.as_ref();
        memory.is_some_and(|memory| memory.is_backlogged()) && !self.marks.is_authenticated()
    }

    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Stops counting the memory of the connection, which is about to be closed, toward the limits. Until the memory is
    /// freed, it still counts when deciding whether to [pause](Self::should_pause) reading.
    pub(super) fn release_memory(&self) {
        self.is_released.store(true, Ordering::Relaxed);
        self.account();
    }

    pub(super) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.accepted)
    }

    /// Returns whether no byte of a request has arrived yet.
    pub(super) fn is_silent(&self) -> bool {
        self.head_began.load(Ordering::Relaxed) == 0 && !self.has_requested.load(Ordering::Relaxed)
    }

    /// Returns the time at which the connection became idle between two requests. Returns `None` if the connection is
    /// not idle.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        if !self.has_requested.load(Ordering::Relaxed) || self.has_unsent() {
            return None;
        }
        let since = if self.is_http2() {
            let waiting = self.http2.lock().waiting();
            (!waiting.has_open && waiting.head.is_none()).then_some(waiting.progressed)
        } else {
            let is_idle = self.in_flight.load(Ordering::Acquire) == 0
                && self.head_began.load(Ordering::Relaxed) == 0;
            is_idle.then(|| self.progressed.load(Ordering::Relaxed))
        };
        since.map(|since| self.at(since))
    }

    /// Returns the time at which the client stopped reading a response, or `None` if no response is waiting for the
    /// client.
    pub(super) fn stalled_since(&self) -> Option<Instant> {
        let blocked = self.write_blocked.load(Ordering::Relaxed);
        let blocked = (blocked > 0).then_some(blocked);
        let response = self
            .is_http2()
            .then(|| self.http2.lock().waiting().response)
            .flatten();
        let oldest = blocked.into_iter().chain(response).min()?;
        Some(self.at(oldest))
    }

    pub(super) fn shut_down(&self, how: Shutdown) {
        self.shutdown.fetch_max(how as u8, Ordering::AcqRel);
        self.marks.wake();
    }

    pub(super) fn shutdown(&self) -> Shutdown {
        if self.marks.is_to_close() {
            return Shutdown::Immediate;
        }
        match self.shutdown.load(Ordering::Acquire) {
            0 => Shutdown::None,
            1 => Shutdown::Graceful,
            _ => Shutdown::Immediate,
        }
    }

    /// Records that a request head of about `length` bytes is complete. Returns whether the request is the connection's
    /// first.
    pub(super) fn begin_request(self: &Arc<Self>, length: usize) -> (bool, RequestInFlight) {
        let head = if self.is_http2() {
            self.heads.fetch_add(length, Ordering::Relaxed);
            length
        } else {
            self.in_flight.fetch_add(1, Ordering::Relaxed);
            self.requests.fetch_add(1, Ordering::Relaxed);
            0
        };
        let is_first = !self.has_requested.load(Ordering::Relaxed);
        if is_first {
            self.has_requested.store(true, Ordering::Relaxed);
        }
        let request = RequestInFlight {
            connection: self.clone(),
            head,
            ends_at: 0,
        };
        (is_first, request)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.is_released.store(true, Ordering::Relaxed);
        if let Some(memory) = &self.memory {
            self.account_as(memory, 0);
        }
    }
}

/// A request in flight: its response has been neither passed to hyper in full nor abandoned. Also used for a group of
/// requests that are served directly, until their responses have been sent. Over HTTP/2, this value may be dropped
/// before the client has read the response; see [`http2`](super::http2).
#[derive(Debug)]
pub(super) struct RequestInFlight {
    connection: Arc<Connection>,
    /// HTTP/2: the bytes of the request's head.
    head: usize,
    /// HTTP/1: when the request ends, or 0 if this is not known yet.
    ends_at: u64,
}

impl RequestInFlight {
    /// Sets the time at which an HTTP/1 request ends, so that the clock does not have to be read when the request ends.
    pub(super) fn ends_at(&mut self, time: u64) {
        self.ends_at = time;
    }

    pub(super) fn has_unsent(&self) -> bool {
        self.connection.has_unsent()
    }

    /// Makes the rest of an HTTP/1 response wait until the socket has accepted everything before it. The connection is
    /// then polled again. Returns `false` over HTTP/2, where each response has its own task and buffer.
    pub(super) fn hold_back(&self) -> bool {
        let is_http1 = !self.connection.is_http2();
        if is_http1 {
            self.connection.holds_back.store(true, Ordering::Relaxed);
        }
        is_http1
    }
}

impl Drop for RequestInFlight {
    fn drop(&mut self) {
        let it = &self.connection;
        if it.is_http2() {
            it.heads.fetch_sub(self.head, Ordering::Relaxed);
            it.account();
        } else {
            let ended = match self.ends_at {
                0 => it.now(),
                // Sending the response may have taken longer.
                known => known.max(it.progressed.load(Ordering::Relaxed)),
            };
            it.progressed.store(ended, Ordering::Relaxed);
            it.in_flight.fetch_sub(1, Ordering::Release);
        }
    }
}
