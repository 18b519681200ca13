//! Tracks the requests on an HTTP/2 connection: which are open, how much memory they use, and which responses make
//! progress. The connection's deadlines and memory limits depend on this.
//!
//! h2 immediately copies a small body into its own buffer, and does not report when the client reads the body or
//! cancels the request. So this module observes the frames between h2 and the socket. It does not validate the frames,
//! since h2 closes the connection if a frame is invalid.

/// The first bytes that an HTTP/2 client sends.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How many bytes of a response count as progress. Fewer bytes count only if the response ends with them, or while the
/// connection has an endless response. This rule prevents a client from keeping many responses in memory by
/// occasionally reading a byte.
pub(super) const PROGRESS: u32 = 1024;
/// The maximum number of concurrent requests per connection. Each request uses some memory until the client has
/// received its response.
pub(super) const CONCURRENT_STREAMS: u32 = 32;
/// The maximum number of tracked requests. h2 rejects or ignores requests above its own limit.
const REMEMBERED: usize = 2 * CONCURRENT_STREAMS as usize;
/// The memory, in bytes, that a request uses for its tasks and its response head, in addition to its own head and body.
const REQUEST: usize = 4 * 1024;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const HEADER: usize = 9;

/// A frame header (RFC 9113, section 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    length: u32,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Frame {
    fn parse(header: [u8; HEADER]) -> Self {
        let [a, b, c, kind, flags, s0, s1, s2, s3] = header;
        Self {
            length: u32::from_be_bytes([0, a, b, c]),
            kind,
            flags,
            // The first bit is reserved.
            stream: u32::from_be_bytes([s0, s1, s2, s3]) & (u32::MAX >> 1),
        }
    }

    const fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    const fn is_of_headers(self) -> bool {
        matches!(self.kind, HEADERS | CONTINUATION)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// The whole frame header has been transferred.
    Began(Frame),
    /// The whole frame has been transferred.
    Ended(Frame),
}

/// Finds the frames in a stream of bytes.
#[derive(Debug, Default)]
pub(super) struct Frames {
    header: [u8; HEADER],
    /// How many bytes of the header have been transferred.
    known: usize,
    /// How many bytes of the payload are missing, once the header is complete.
    missing: usize,
}

impl Frames {
    pub(super) fn scan(&mut self, mut bytes: &[u8], mut on: impl FnMut(Event)) {
        while !bytes.is_empty() {
            if self.known < HEADER {
                let taken = bytes.len().min(HEADER - self.known);
                self.header[self.known..self.known + taken].copy_from_slice(&bytes[..taken]);
                self.known += taken;
                bytes = &bytes[taken..];
                if self.known < HEADER {
                    return;
                }
                let frame = Frame::parse(self.header);
                self.missing = frame.length as usize;
                on(Event::Began(frame));
            }
            let taken = bytes.len().min(self.missing);
            self.missing -= taken;
            bytes = &bytes[taken..];
            if self.missing == 0 {
                self.known = 0;
                on(Event::Ended(Frame::parse(self.header)));
            }
        }
    }
}

/// The requests on one connection. Times are measured as in [`Connection`](super::connection::Connection).
#[derive(Debug, Default)]
pub(super) struct Requests {
    last_stream: u32,
    open: Vec<Request>,
    /// When the incomplete request head started to arrive.
    head_began: Option<u64>,
    /// The estimated number of bytes that the incomplete head uses.
    head_length: usize,
    /// When a response last ended or made progress.
    progressed: u64,
    /// When the oldest response that was reset while it was being sent last made progress. Cleared when another
    /// response makes progress. Without this value, a client that resets responses instead of reading them would get a
    /// new deadline with each request.
    unread: Option<u64>,
    /// The arrival time of the oldest request that was reset before its response began. Cleared when another response
    /// is complete.
    canceled: Option<u64>,
}

#[derive(Debug)]
struct Request {
    stream: u32,
    /// When the request arrived or, once its response has started, when the response last made progress.
    since: u64,
    /// The bytes sent since the response last made progress. `None` until the response starts.
    sent: Option<u32>,
    /// The bytes of the request body received so far.
    received: usize,
}

/// What a connection is waiting for its client to do, and since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Waiting {
    /// The start of the wait for the rest of a request head.
    pub(super) head: Option<u64>,
    /// The start of the wait for the oldest response that the client has not read or whose stream was reset.
    pub(super) response: Option<u64>,
    /// Whether any request is open.
    pub(super) has_open: bool,
    /// When a response last ended or made progress.
    pub(super) progressed: u64,
}

impl Requests {
    pub(super) fn received(&mut self, event: Event, now: u64) {
        match event {
            Event::Began(frame) if frame.is_of_headers() => {
                self.head_began.get_or_insert(now);
                // h2 reserves space for the whole frame, and also keeps the decoded part of the head.
                self.head_length += 2 * frame.length as usize;
            }
            Event::Ended(frame) if frame.is_of_headers() && frame.has(END_HEADERS) => {
                self.head_began = None;
                self.head_length = 0;
                // If the stream number is not higher, the frame contains the trailers of an earlier request.
                if frame.stream > self.last_stream {
                    self.last_stream = frame.stream;
                    if self.open.len() < REMEMBERED {
                        self.open.push(Request {
                            stream: frame.stream,
                            since: now,
                            sent: None,
                            received: 0,
                        });
                    }
                }
            }
            Event::Ended(frame) if frame.kind == RST_STREAM => self.reset(frame.stream),
            Event::Began(frame) if frame.kind == DATA => {
                let request = self.open.iter_mut().find(|it| it.stream == frame.stream);
                if let Some(request) = request {
                    request.received += frame.length as usize;
                }
            }
            _ => {}
        }
    }

    /// Returns the approximate number of bytes that the requests use, not including complete heads.
    pub(super) fn held(&self) -> usize {
        let bodies = self.open.iter().map(|it| it.received).sum::<usize>();
        self.head_length + self.open.len() * REQUEST + bodies
    }

    /// Records a frame sent to the client. `progress` is the number of bytes that count as progress for a response that
    /// has not ended.
    pub(super) fn sent(&mut self, event: Event, now: u64, progress: u32) {
        let Event::Ended(frame) = event else { return };
        match frame.kind {
            HEADERS | DATA if frame.has(END_STREAM) => {
                // An empty frame is sent regardless of the client's window, so the frame does not show that the client
                // is reading.
                if frame.kind == DATA && frame.length > 0 {
                    self.unread = None;
                }
                self.canceled = None;
                self.progressed = now;
                self.open.retain(|it| it.stream != frame.stream);
            }
            HEADERS | DATA => {
                let request = self.open.iter_mut().find(|it| it.stream == frame.stream);
                let Some(request) = request else { return };
                match &mut request.sent {
                    None => {
                        request.sent = Some(0);
                        request.since = now;
                    }
                    Some(sent) => {
                        *sent = sent.saturating_add(frame.length);
                        if *sent >= progress {
                            *sent = 0;
                            request.since = now;
                            self.progressed = now;
                            self.unread = None;
                        }
                    }
                }
            }
            RST_STREAM => self.reset(frame.stream),
            _ => {}
        }
    }

    /// Records that either side has reset a stream. A client can make the server reset a stream by violating the
    /// protocol on that stream.
    fn reset(&mut self, stream: u32) {
        let Some(index) = self.open.iter().position(|it| it.stream == stream) else {
            return;
        };
        let request = self.open.swap_remove(index);
        let oldest = match request.sent {
            Some(_) => &mut self.unread,
            None => &mut self.canceled,
        };
        *oldest = Some(oldest.map_or(request.since, |since| since.min(request.since)));
    }

    pub(super) fn waiting(&self) -> Waiting {
        let begun = self.open.iter().filter(|it| it.sent.is_some());
        let begun = begun.map(|it| it.since);
        Waiting {
            head: self.head_began,
            response: begun.chain(self.unread).chain(self.canceled).min(),
            has_open: !self.open.is_empty(),
            progressed: self.progressed,
        }
    }
}

#[cfg(test)]
mod tests;
