//! The log: lines on standard output, as JSON or text.
//!
//! Only the log thread writes log lines to standard output. Everything else appends to a bounded buffer, so a blocked
//! reader (a paused terminal or a stuck log collector) does not delay requests. Lines that do not fit are dropped. When
//! output is possible again, a line reports how many lines were dropped.

use std::{
    borrow::Cow,
    cell::RefCell,
    io::{self, Write},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::counter::Counter;
use quota_common::Timestamp;
use tracing_subscriber::{
    EnvFilter, fmt::MakeWriter, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::{clock::UnixNanos, config::LogFormat, json_text::write_text};

/// How long access log lines are collected before they are written together.
const FLUSH_EVERY: Duration = Duration::from_millis(50);
/// The number of collected bytes at which access log lines are written early.
const FLUSH_AT: usize = 256 * 1024;
/// The maximum number of bytes that wait for standard output. Further access log lines are dropped.
const MAX_WAITING: usize = 4 * 1024 * 1024;
/// The maximum number of bytes that wait for standard output, including both access log lines and other events. Further
/// events are dropped. Higher than [`MAX_WAITING`], so that a flood of access log lines does not displace other events.
const MAX_WAITING_EVENTS: usize = MAX_WAITING + 1024 * 1024;
/// How long the process waits on exit for the last lines to be written.
const STOP_WITHIN: Duration = Duration::from_secs(1);
/// The maximum length of a path in a line, in bytes. Over HTTP/2, header compression lets a client send a long path in
/// a single byte.
const MAX_PATH: usize = 256;
/// The maximum length of a method in a line, in bytes. A client can send any token as the method.
const MAX_METHOD: usize = 32;

/// The length in bytes that most access log lines do not exceed.
const USUAL_LINE: usize = 512;

/// Whether access log lines are written. This never changes after a log has been installed. Querying `tracing`
/// for every request would be slower.
static IS_ACCESS_LOG_ON: AtomicBool = AtomicBool::new(false);

/// A completed request.
#[derive(Debug)]
pub struct AccessLine<'a> {
    pub at: UnixNanos,
    pub request_id: &'a str,
    pub method: &'a str,
    /// The path without the query, which may contain secrets. Long paths are shortened.
    pub path: &'a str,
    pub status: u16,
    pub micros: u64,
    pub ip: Option<IpAddr>,
    pub tenant: Option<uuid::Uuid>,
    /// The prefix of the API key, which is not secret: letters, digits and an underscore.
    pub key: Option<&'a [u8]>,
}

/// Shortens text to at most `max` bytes, including the ellipsis.
fn shorten(text: &str, max: usize) -> Cow<'_, str> {
    const ELLIPSIS: char = '…';
    if text.len() <= max {
        return Cow::Borrowed(text);
    }
    let end = text.floor_char_boundary(max - ELLIPSIS.len_utf8());
    let mut short = text[..end].to_owned();
    short.push(ELLIPSIS);
    Cow::Owned(short)
}

impl AccessLine<'_> {
    /// Appends the line as JSON, formatted by hand because the function runs for every request. `second` is the
    /// formatted time, without the fraction of a second.
    fn json(&self, second: &str, out: &mut Vec<u8>) -> io::Result<()> {
        let mut number = itoa::Buffer::new();
        out.extend_from_slice(b"{\"timestamp\":\"");
        out.extend_from_slice(second.as_bytes());
        out.push(b'.');
        let millis = self.at.0 / 1_000_000 % 1000;
        out.extend_from_slice(&number.format(1000 + millis).as_bytes()[1..]);
        // IDs and methods are tokens, which do not need escaping. A path may contain quotes.
        out.extend_from_slice(
            b"Z\",\"level\":\"INFO\",\"target\":\"quota_server::access\",\"request_id\":\"",
        );
        out.extend_from_slice(self.request_id.as_bytes());
        out.extend_from_slice(b"\",\"method\":\"");
        out.extend_from_slice(shorten(self.method, MAX_METHOD).as_bytes());
        out.extend_from_slice(b"\",\"path\":");
        write_text(&shorten(self.path, MAX_PATH), out)?;
        out.extend_from_slice(b",\"status\":");
        out.extend_from_slice(number.format(self.status).as_bytes());
        out.extend_from_slice(b",\"micros\":");
        out.extend_from_slice(number.format(self.micros).as_bytes());
        match self.ip {
            None => {}
            Some(IpAddr::V4(ip)) => {
                out.extend_from_slice(b",\"ip\":\"");
                for (n, part) in ip.octets().into_iter().enumerate() {
                    if n > 0 {
                        out.push(b'.');
                    }
                    out.extend_from_slice(number.format(part).as_bytes());
                }
                out.push(b'"');
            }
            Some(IpAddr::V6(ip)) => write!(out, ",\"ip\":\"{ip}\"")?,
        }
        if let Some(tenant) = self.tenant {
            let mut id = [0; 36];
            tenant.as_hyphenated().encode_lower(&mut id);
            out.extend_from_slice(b",\"tenant\":\"");
            out.extend_from_slice(&id);
            out.push(b'"');
        }
        if let Some(key) = self.key {
            out.extend_from_slice(b",\"key\":\"");
            out.extend_from_slice(key);
            out.push(b'"');
        }
        out.extend_from_slice(b"}\n");
        Ok(())
    }

    fn text(&self, second: &str, out: &mut Vec<u8>) -> io::Result<()> {
        writeln!(
            out,
            "{second}.{:03}Z INFO {} {} {} {}us id={}",
            self.at.0 / 1_000_000 % 1000,
            shorten(self.method, MAX_METHOD),
            shorten(self.path, MAX_PATH),
            self.status,
            self.micros,
            self.request_id
        )
    }
}

/// A line that is being formatted. The line is formatted outside the lock, so that other threads can append lines in
/// the meantime.
struct Line {
    bytes: Vec<u8>,
    second: Second,
}

thread_local! {
    static LINE: RefCell<Line> = const {
        RefCell::new(Line {
            bytes: Vec::new(),
            second: Second::NONE,
        })
    };
}

/// Buffered standard output. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Log {
    state: Arc<LogState>,
    format: LogFormat,
}

#[derive(Debug, Default)]
struct LogState {
    buffer: Mutex<Buffer>,
    /// Notified when the log thread should write.
    write: Condvar,
    /// Notified when the log thread has written its last line.
    written: Condvar,
    /// The number of lines since startup that did not fit into the buffer.
    dropped: Counter,
}

#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// Whether `bytes` contains an event, which must be written without delay.
    has_event: bool,
    /// The number of dropped lines that have not been reported yet.
    unreported: u64,
    stopped: bool,
    all_written: bool,
}

/// The current time without the fraction of a second, formatted once for the thousands of lines in the same second.
#[derive(Debug)]
struct Second {
    secs: u64,
    text: String,
}

impl Second {
    const NONE: Self = Self {
        secs: 0,
        text: String::new(),
    };

    fn of(&mut self, at: UnixNanos) -> &str {
        if self.secs != at.secs() || self.text.is_empty() {
            let text = Timestamp::from_unix_secs(at.secs()).map(|it| it.to_string());
            self.text = text.unwrap_or_default();
            self.text.truncate("2026-11-24T09:18:42".len());
            self.secs = at.secs();
        }
        &self.text
    }
}

impl Log {
    /// Starts the log thread.
    pub fn start(format: LogFormat) -> Self {
        Self::start_on(io::stdout(), format)
    }

    /// Starts the log thread, which writes to `out`.
    pub fn start_on(out: impl Write + Send + 'static, format: LogFormat) -> Self {
        let log = Self {
            state: Arc::default(),
            format,
        };
        let state = log.state.clone();
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || state.write_until_stopped(out))
            .expect("a thread can be started at startup");
        log
    }

    /// Makes this log the output of `tracing`. Call once per process.
    pub fn install(&self, directives: &str) -> Result<(), tracing_subscriber::util::TryInitError> {
        let filter = EnvFilter::try_new(directives).unwrap_or_else(|_| EnvFilter::new("info"));
        let registry = tracing_subscriber::registry().with(filter);
        let layer = tracing_subscriber::fmt::layer()
            .with_writer(self.clone())
            .with_ansi(false);
        let installed = match self.format {
            LogFormat::Json => registry
                .with(layer.json().flatten_event(true).with_current_span(false))
                .try_init(),
            LogFormat::Text => registry.with(layer).try_init(),
        };
        let is_on = tracing::enabled!(target: "quota_server::access", tracing::Level::INFO);
        IS_ACCESS_LOG_ON.store(is_on, Ordering::Relaxed);
        installed
    }

    /// Returns whether the filter of the installed log includes access log lines.
    pub fn is_access_log_on() -> bool {
        IS_ACCESS_LOG_ON.load(Ordering::Relaxed)
    }

    /// Returns the number of lines dropped because standard output was blocked.
    pub fn dropped(&self) -> &Counter {
        &self.state.dropped
    }

    /// Queues the access log line for a request. Does not wait for output.
    pub fn access(&self, line: &AccessLine<'_>) {
        LINE.with_borrow_mut(|Line { bytes, second }| {
            bytes.clear();
            bytes.reserve(USUAL_LINE);
            let second = second.of(line.at);
            let written = match self.format {
                LogFormat::Json => line.json(second, bytes),
                LogFormat::Text => line.text(second, bytes),
            };
            debug_assert!(written.is_ok(), "writing to memory does not fail");
            self.append(bytes);
        });
    }

    /// Queues an access log line.
    fn append(&self, line: &[u8]) {
        let mut buffer = self.state.buffer.lock();
        let waiting = buffer.bytes.len();
        if waiting >= MAX_WAITING {
            self.state.drop_line(&mut buffer);
            return;
        }
        buffer.bytes.extend_from_slice(line);
        // One notification is enough, because the log thread takes the whole buffer.
        if waiting < FLUSH_AT && buffer.bytes.len() >= FLUSH_AT {
            self.state.write.notify_one();
        }
    }

    /// Queues an event after the waiting lines. Does not wait for output.
    fn event(&self, line: &[u8]) {
        let mut buffer = self.state.buffer.lock();
        if buffer.bytes.len() + line.len() > MAX_WAITING_EVENTS {
            self.state.drop_line(&mut buffer);
            return;
        }
        buffer.bytes.extend_from_slice(line);
        buffer.has_event = true;
        self.state.write.notify_one();
    }

    /// Waits up to a second for the remaining lines to be written. Must be called last.
    pub fn stop(&self) {
        let mut buffer = self.state.buffer.lock();
        buffer.stopped = true;
        self.state.write.notify_one();
        self.state
            .written
            .wait_while_for(&mut buffer, |it| !it.all_written, STOP_WITHIN);
    }
}

impl LogState {
    fn drop_line(&self, buffer: &mut Buffer) {
        buffer.unreported += 1;
        self.dropped.inc();
    }

    fn write_until_stopped(&self, mut out: impl Write) {
        let mut spare = Vec::with_capacity(2 * FLUSH_AT);
        loop {
            let mut buffer = self.buffer.lock();
            let is_collecting =
                |it: &mut Buffer| !it.stopped && !it.has_event && it.bytes.len() < FLUSH_AT;
            self.write
                .wait_while_for(&mut buffer, is_collecting, FLUSH_EVERY);
            std::mem::swap(&mut buffer.bytes, &mut spare);
            buffer.has_event = false;
            let dropped = std::mem::take(&mut buffer.unreported);
            let is_last = buffer.stopped && dropped == 0;
            drop(buffer);
            if !spare.is_empty() {
                // The server continues even if the log cannot be written.
                let _ = out.write_all(&spare);
                let _ = out.flush();
            }
            spare.clear();
            // The buffer may have grown while output was blocked.
            spare.shrink_to(2 * FLUSH_AT);
            if is_last {
                self.buffer.lock().all_written = true;
                self.written.notify_all();
                return;
            }
            if dropped > 0 {
                tracing::warn!(
                    dropped,
                    "log lines were dropped because standard output was blocked"
                );
            }
        }
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = EventWriter<'a>;

    fn make_writer(&'a self) -> EventWriter<'a> {
        EventWriter(self)
    }
}

/// A writer that receives each event as a whole.
#[derive(Debug)]
pub struct EventWriter<'a>(&'a Log);

impl Write for EventWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.event(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
