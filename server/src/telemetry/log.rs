//! The log: lines on standard output, as JSON or as text.
//!
//! Only the log thread writes to standard output. Everything else appends to a bounded buffer, so a reader that stops
//! (a paused terminal, a stuck log collector) holds up no request. Lines that do not fit are dropped and counted, and
//! a line says how many once output flows again.

use std::{
    borrow::Cow,
    io::{self, Write},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::counter::Counter;
use quota_common::Timestamp;
use tracing_subscriber::{
    EnvFilter, fmt::MakeWriter, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::{clock::UnixNanos, config::LogFormat};

/// Access log lines are collected for this long, or up to this many bytes, and written together.
const FLUSH_EVERY: Duration = Duration::from_millis(50);
const FLUSH_AT: usize = 64 * 1024;
/// How many bytes wait for standard output. Access log lines beyond this are dropped.
const MAX_WAITING: usize = 4 * 1024 * 1024;
/// How many more bytes may wait for other events, so that a flood of requests does not push them out.
const MAX_WAITING_EVENTS: usize = MAX_WAITING + 1024 * 1024;
/// How long the end of the process waits for standard output to take the last lines.
const STOP_WITHIN: Duration = Duration::from_secs(1);
/// The longest path in a line, in bytes. A client chooses the path, and on HTTP/2 a long one can cost it a byte.
const MAX_PATH: usize = 256;
/// The longest method in a line, in bytes: any token is one.
const MAX_METHOD: usize = 32;

/// The target of a request's line, for `RUST_LOG`.
pub const ACCESS: &str = "quota_server::access";

/// One finished request.
#[derive(Debug)]
pub struct AccessLine<'a> {
    pub at: UnixNanos,
    pub request_id: &'a str,
    pub method: &'a str,
    /// Without the query, which can hold what should not be logged. Long paths are shortened in the line.
    pub path: &'a str,
    pub status: u16,
    pub micros: u64,
    pub ip: Option<IpAddr>,
    pub tenant: Option<uuid::Uuid>,
    /// The prefix of the API key, which is no secret: digits and letters.
    pub key: Option<&'a str>,
}

/// Shortens text to at most `max` bytes, the ellipsis included.
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
    /// Written by hand, since every request pays for it. `second` is the time up to its second.
    fn json(&self, second: &str, out: &mut Vec<u8>) -> io::Result<()> {
        let mut number = itoa::Buffer::new();
        let mut text = |parts: &[&str]| {
            for part in parts {
                out.extend_from_slice(part.as_bytes());
            }
        };
        text(&["{\"timestamp\":\"", second, "."]);
        let millis = self.at.0 / 1_000_000 % 1000;
        text(&[
            &number.format(1000 + millis)[1..],
            "Z\",\"level\":\"INFO\",\"target\":\"",
            ACCESS,
        ]);
        // Ids and methods are tokens: nothing in them needs escaping. A path may hold quotes.
        text(&[
            "\",\"request_id\":\"",
            self.request_id,
            "\",\"method\":\"",
            &shorten(self.method, MAX_METHOD),
        ]);
        text(&["\",\"path\":"]);
        let path = shorten(self.path, MAX_PATH);
        if path
            .bytes()
            .all(|byte| byte > b' ' && byte != b'"' && byte != b'\\')
        {
            text(&["\"", &path, "\""]);
        } else {
            serde_json::to_writer(&mut *out, &path)?;
        }
        let mut text = |parts: &[&str]| {
            for part in parts {
                out.extend_from_slice(part.as_bytes());
            }
        };
        text(&[",\"status\":", number.format(self.status)]);
        text(&[",\"micros\":", number.format(self.micros)]);
        match self.ip {
            None => {}
            Some(IpAddr::V4(ip)) => {
                out.extend_from_slice(b",\"ip\":\"");
                for (n, part) in ip.octets().into_iter().enumerate() {
                    out.extend_from_slice(if n == 0 { b"" } else { b"." });
                    out.extend_from_slice(number.format(part).as_bytes());
                }
                out.push(b'"');
            }
            Some(IpAddr::V6(ip)) => write!(out, ",\"ip\":\"{ip}\"")?,
        }
        if let Some(tenant) = self.tenant {
            let mut id = [0; 36];
            out.extend_from_slice(b",\"tenant\":\"");
            out.extend_from_slice(tenant.as_hyphenated().encode_lower(&mut id).as_bytes());
            out.push(b'"');
        }
        if let Some(key) = self.key {
            out.extend_from_slice(b",\"key\":\"");
            out.extend_from_slice(key.as_bytes());
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

/// Standard output behind a buffer. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Log {
    inner: Arc<Inner>,
    format: LogFormat,
}

#[derive(Debug, Default)]
struct Inner {
    buffer: Mutex<Buffer>,
    /// Notified when the log thread should write.
    write: Condvar,
    /// Notified when the log thread has written its last line.
    written: Condvar,
    /// Lines that did not fit into the buffer, since startup.
    dropped: Counter,
}

#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// Whether `bytes` holds an event, which is written without delay.
    has_event: bool,
    /// Dropped lines that no line has reported yet.
    unreported: u64,
    stopped: bool,
    all_written: bool,
    second: Second,
}

/// The text of the second that lines are written in, up to its fraction: the same for thousands of them.
#[derive(Debug, Default)]
struct Second {
    secs: u64,
    text: String,
}

impl Second {
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

    fn start_on(out: impl Write + Send + 'static, format: LogFormat) -> Self {
        let log = Self {
            inner: Arc::default(),
            format,
        };
        let inner = log.inner.clone();
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || inner.write_until_stopped(out))
            .expect("a thread can be started at startup");
        log
    }

    /// Makes this the output of `tracing`. Call once per process.
    pub fn install(&self, directives: &str) -> Result<(), tracing_subscriber::util::TryInitError> {
        let filter = EnvFilter::try_new(directives).unwrap_or_else(|_| EnvFilter::new("info"));
        let registry = tracing_subscriber::registry().with(filter);
        let layer = tracing_subscriber::fmt::layer()
            .with_writer(self.clone())
            .with_ansi(false);
        match self.format {
            LogFormat::Json => registry
                .with(layer.json().flatten_event(true).with_current_span(false))
                .try_init(),
            LogFormat::Text => registry.with(layer).try_init(),
        }
    }

    /// Counts the lines dropped because standard output did not take them.
    pub fn dropped(&self) -> &Counter {
        &self.inner.dropped
    }

    /// Queues the line of a request. Does not block on output.
    pub fn access(&self, line: &AccessLine<'_>) {
        let mut buffer = self.inner.buffer.lock();
        if buffer.bytes.len() >= MAX_WAITING {
            self.inner.drop_line(&mut buffer);
            return;
        }
        let Buffer { bytes, second, .. } = &mut *buffer;
        let second = second.of(line.at);
        let written = match self.format {
            LogFormat::Json => line.json(second, bytes),
            LogFormat::Text => line.text(second, bytes),
        };
        debug_assert!(written.is_ok(), "writing to memory does not fail");
        if buffer.bytes.len() >= FLUSH_AT {
            self.inner.write.notify_one();
        }
    }

    /// Queues an event, after the lines that already wait. Does not block on output.
    fn event(&self, line: &[u8]) {
        let mut buffer = self.inner.buffer.lock();
        if buffer.bytes.len() + line.len() > MAX_WAITING_EVENTS {
            self.inner.drop_line(&mut buffer);
            return;
        }
        buffer.bytes.extend_from_slice(line);
        buffer.has_event = true;
        self.inner.write.notify_one();
    }

    /// Writes what is left, for at most a second. Call it last.
    pub fn stop(&self) {
        let mut buffer = self.inner.buffer.lock();
        buffer.stopped = true;
        self.inner.write.notify_one();
        self.inner
            .written
            .wait_while_for(&mut buffer, |it| !it.all_written, STOP_WITHIN);
    }
}

impl Inner {
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
                // A log that cannot be written is no reason to stop serving.
                let _ = out.write_all(&spare);
                let _ = out.flush();
            }
            spare.clear();
            // It grows while output is blocked.
            spare.shrink_to(2 * FLUSH_AT);
            if is_last {
                self.buffer.lock().all_written = true;
                self.written.notify_all();
                return;
            }
            if dropped > 0 {
                tracing::warn!(
                    dropped,
                    "standard output was blocked: log lines were dropped"
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

/// Takes whole events.
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
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn line(path: &str) -> AccessLine<'_> {
        AccessLine {
            at: UnixNanos(1_785_738_360_007_999_999),
            request_id: "019ab4e1-7c00-7000-8000-0000000000a1",
            method: "GET",
            path,
            status: 200,
            micros: 41,
            ip: None,
            tenant: None,
            key: None,
        }
    }

    fn json(line: &AccessLine<'_>) -> Value {
        let mut out = Vec::new();
        line.json(Second::default().of(line.at), &mut out).unwrap();
        assert_eq!(out.pop(), Some(b'\n'));
        assert!(!out.contains(&b'\n'));
        serde_json::from_slice(&out).expect("a line is JSON")
    }

    #[test]
    fn a_line_is_json_whatever_the_path_holds() {
        for path in ["/v1/echo", "/\"},{\"", "/\\", "/a\nb", "/ä"] {
            let written = json(&line(path));
            let meant = json!({
                "timestamp": "2026-08-03T06:26:00.007Z",
                "level": "INFO",
                "target": "quota_server::access",
                "request_id": "019ab4e1-7c00-7000-8000-0000000000a1",
                "method": "GET",
                "path": path,
                "status": 200,
                "micros": 41,
            });
            assert_eq!(written, meant);
        }
    }

    #[test]
    fn a_line_shortens_what_the_client_chose() {
        for (path, written) in [
            ("/".repeat(256), "/".repeat(256)),
            ("/".repeat(3900), format!("{}…", "/".repeat(253))),
            // Cut between characters: 252 bytes of two-byte characters would end inside of one.
            (
                format!("/{}", "ä".repeat(2000)),
                format!("/{}…", "ä".repeat(126)),
            ),
        ] {
            assert_eq!(json(&line(&path))["path"], written.as_str());
            let mut out = Vec::new();
            line(&path).text("2026", &mut out).unwrap();
            let text = String::from_utf8(out).unwrap();
            assert!(text.contains(&format!(" {written} 200 ")), "{text}");
        }
        let method = "M".repeat(3900);
        let written = json(&AccessLine {
            method: &method,
            ..line("/")
        });
        assert_eq!(written["method"], format!("{}…", "M".repeat(29)).as_str());
    }

    /// Output that takes nothing until it is opened.
    #[derive(Debug, Clone, Default)]
    struct Valve(Arc<ValveState>);

    #[derive(Debug, Default)]
    struct ValveState {
        is_open: Mutex<bool>,
        opened: Condvar,
        written: Mutex<Vec<u8>>,
    }

    impl Write for Valve {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut is_open = self.0.is_open.lock();
            self.0.opened.wait_while(&mut is_open, |is_open| !*is_open);
            self.0.written.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Valve {
        fn open(&self) {
            *self.0.is_open.lock() = true;
            self.0.opened.notify_all();
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.written.lock().clone()).unwrap()
        }
    }

    #[test]
    fn blocked_output_blocks_nobody_and_every_line_is_written_or_counted() {
        const LINES: u64 = 60_000;
        let valve = Valve::default();
        let log = Log::start_on(valve.clone(), LogFormat::Json);
        for _ in 0..LINES {
            log.access(&line("/v1/echo"));
        }
        // An event still has room, in bounds.
        log.event(b"{\"event\":1}\n");
        let lines_dropped = log.dropped().get();
        assert!(lines_dropped > 0);
        let large = "x".repeat(64 * 1024);
        for _ in 0..64 {
            log.event(large.as_bytes());
        }
        let dropped = log.dropped().get();
        assert!(dropped > lines_dropped);
        assert!(log.inner.buffer.lock().bytes.len() <= MAX_WAITING_EVENTS);
        // The end of the process does not wait for long either.
        let began = std::time::Instant::now();
        log.clone().stop();
        assert!(began.elapsed() < 10 * STOP_WITHIN);

        valve.open();
        log.stop();
        let text = valve.text();
        let written = text.matches("\"path\":\"/v1/echo\"").count() as u64;
        assert_eq!(written + lines_dropped, LINES);
        assert!(text.contains("{\"event\":1}\n"));
    }

    #[test]
    fn an_event_and_all_lines_before_it_are_written_without_delay() {
        let valve = Valve::default();
        valve.open();
        let log = Log::start_on(valve.clone(), LogFormat::Json);
        log.access(&line("/first"));
        log.event(b"second\n");
        log.stop();
        let text = valve.text();
        assert!(text.find("/first").unwrap() < text.find("second").unwrap());
    }

    #[test]
    fn a_line_names_who_it_was_as_far_as_it_is_known() {
        let tenant = uuid::Uuid::from_u128(7);
        let known = AccessLine {
            ip: Some("2001:db8::5".parse().unwrap()),
            tenant: Some(tenant),
            key: Some("qk_abcdefgh"),
            ..line("/")
        };
        let written = json(&known);
        assert_eq!(written["ip"], "2001:db8::5");
        let ip = Some("203.0.113.7".parse().unwrap());
        assert_eq!(json(&AccessLine { ip, ..line("/") })["ip"], "203.0.113.7");
        assert_eq!(written["tenant"], tenant.to_string());
        assert_eq!(written["key"], "qk_abcdefgh");
    }

    #[test]
    fn the_second_is_formatted_again_when_it_changes() {
        let mut second = Second::default();
        assert_eq!(second.of(UnixNanos(0)), "1970-01-01T00:00:00");
        assert_eq!(second.of(UnixNanos(999_999_999)), "1970-01-01T00:00:00");
        assert_eq!(second.of(UnixNanos(1_000_000_000)), "1970-01-01T00:00:01");
        assert_eq!(second.of(UnixNanos(0)), "1970-01-01T00:00:00");
    }
}
