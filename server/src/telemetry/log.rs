//! The log: lines on standard output, as JSON or as text.

use std::{
    io::{self, Write},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use quota_common::Timestamp;
use tracing_subscriber::{
    EnvFilter, fmt::MakeWriter, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::{clock::UnixNanos, config::LogFormat};

/// Lines of requests wait so long, or for so many bytes, before they are written together.
const FLUSH_EVERY: Duration = Duration::from_millis(50);
const FLUSH_AT: usize = 64 * 1024;
/// When standard output takes nothing, lines of requests beyond this are dropped rather than kept.
const KEEP_MOST: usize = 4 * 1024 * 1024;

/// The target of a request's line, for `RUST_LOG`.
pub const ACCESS: &str = "quota_server::access";

/// One finished request.
#[derive(Debug)]
pub struct AccessLine<'a> {
    pub at: UnixNanos,
    pub request_id: &'a str,
    pub method: &'a str,
    /// The path alone: queries can hold what should not be logged.
    pub path: &'a str,
    pub status: u16,
    pub micros: u64,
    pub ip: Option<IpAddr>,
    pub tenant: Option<uuid::Uuid>,
    /// The part of the key's text that may be shown: digits and letters.
    pub key: Option<&'a str>,
}

impl AccessLine<'_> {
    /// By hand, since every request pays for it. `second` is the time up to its second.
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
            self.method,
        ]);
        text(&["\",\"path\":"]);
        if self
            .path
            .bytes()
            .all(|byte| byte > b' ' && byte != b'"' && byte != b'\\')
        {
            text(&["\"", self.path, "\""]);
        } else {
            serde_json::to_writer(&mut *out, self.path)?;
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
            self.method,
            self.path,
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
    full: Condvar,
}

#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    dropped: u64,
    stopped: bool,
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
    /// Starts the thread that writes.
    pub fn start(format: LogFormat) -> Self {
        let log = Self {
            inner: Arc::default(),
            format,
        };
        let inner = log.inner.clone();
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || inner.write_out())
            .expect("a thread can be started at the start");
        log
    }

    /// Makes it the place where `tracing` writes. Once in a process.
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

    /// Writes the line of a request, soon.
    pub fn access(&self, line: &AccessLine<'_>) {
        let mut buffer = self.inner.buffer.lock();
        if buffer.bytes.len() >= KEEP_MOST {
            buffer.dropped += 1;
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
            self.inner.full.notify_one();
        }
    }

    /// Writes what is left. Call it last.
    pub fn stop(&self) {
        let mut buffer = self.inner.buffer.lock();
        buffer.stopped = true;
        let rest = std::mem::take(&mut buffer.bytes);
        drop(buffer);
        self.inner.full.notify_one();
        write_all(&rest);
    }
}

impl Inner {
    fn write_out(&self) {
        let mut spare = Vec::with_capacity(2 * FLUSH_AT);
        loop {
            let mut buffer = self.buffer.lock();
            if buffer.bytes.len() < FLUSH_AT && !buffer.stopped {
                self.full.wait_for(&mut buffer, FLUSH_EVERY);
            }
            if buffer.stopped {
                return;
            }
            std::mem::swap(&mut buffer.bytes, &mut spare);
            let dropped = std::mem::take(&mut buffer.dropped);
            drop(buffer);
            write_all(&spare);
            spare.clear();
            if dropped > 0 {
                tracing::warn!(
                    dropped,
                    "standard output is too slow: lines of requests were dropped"
                );
            }
        }
    }
}

/// A log that cannot be written is no reason to stop serving.
fn write_all(bytes: &[u8]) {
    if !bytes.is_empty() {
        let mut out = io::stdout().lock();
        let _ = out.write_all(bytes);
        let _ = out.flush();
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = EventWriter<'a>;

    fn make_writer(&'a self) -> EventWriter<'a> {
        EventWriter(self)
    }
}

/// Takes one event; it is written at once, after what waits.
#[derive(Debug)]
pub struct EventWriter<'a>(&'a Log);

impl Write for EventWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut buffer = self.0.inner.buffer.lock();
        buffer.bytes.extend_from_slice(bytes);
        let all = std::mem::take(&mut buffer.bytes);
        drop(buffer);
        write_all(&all);
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
    fn the_second_is_written_anew_when_it_is_another() {
        let mut second = Second::default();
        assert_eq!(second.of(UnixNanos(0)), "1970-01-01T00:00:00");
        assert_eq!(second.of(UnixNanos(999_999_999)), "1970-01-01T00:00:00");
        assert_eq!(second.of(UnixNanos(1_000_000_000)), "1970-01-01T00:00:01");
        assert_eq!(second.of(UnixNanos(0)), "1970-01-01T00:00:00");
    }
}
