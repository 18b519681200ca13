//! The log: lines on standard output, as JSON or as text.

use std::{
    io::{self, Write},
    sync::Arc,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use serde::Serialize;
use tracing_subscriber::{
    EnvFilter, fmt::MakeWriter, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::config::LogFormat;

/// Lines of requests wait so long, or for so many bytes, before they are written together.
const FLUSH_EVERY: Duration = Duration::from_millis(50);
const FLUSH_AT: usize = 64 * 1024;
/// When standard output takes nothing, lines of requests beyond this are dropped rather than kept.
const KEEP_MOST: usize = 4 * 1024 * 1024;

/// One finished request.
#[derive(Debug, Serialize)]
pub struct AccessLine<'a> {
    pub timestamp: &'a str,
    pub level: &'static str,
    pub target: &'static str,
    pub request_id: &'a str,
    pub method: &'a str,
    /// The path alone: queries can hold what should not be logged.
    pub path: &'a str,
    pub status: u16,
    pub micros: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<std::net::IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<uuid::Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<&'a str>,
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
        let written = match self.format {
            LogFormat::Json => {
                serde_json::to_writer(&mut buffer.bytes, line).map_err(io::Error::from)
            }
            LogFormat::Text => write!(
                buffer.bytes,
                "{} {} {} {} {} {}us id={}",
                line.timestamp,
                line.level,
                line.method,
                line.path,
                line.status,
                line.micros,
                line.request_id
            ),
        };
        debug_assert!(written.is_ok(), "writing to memory does not fail");
        buffer.bytes.push(b'\n');
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
