//! The log file, which contains one line per request and all errors, including panics.
//!
//! The app does not log secrets. As a safeguard, text that looks like a secret is redacted before it is written.

use std::{
    borrow::Cow,
    fs,
    io::{self, Write},
    panic,
    path::Path,
    sync::LazyLock,
};

use parking_lot::Mutex;
use regex::Regex;
use tracing_appender::rolling::{RollingFileAppender, Rotation};
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

const MAX_FILES: usize = 7;

/// Matches API keys, tokens, JWTs, `Bearer` credentials, and email addresses.
static SECRET: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"(?x) \bq[ksr]_[0-9A-Za-z]+ | \beyJ[0-9A-Za-z_.=-]+ | (?i:\bbearer)\s+[^\s\x22',]+
          | [^\s\x22'<>=(]+@[^\s\x22'<>)]+\.[A-Za-z]{2,}",
    )
    .expect("a valid pattern")
});

pub fn redacted(text: &str) -> Cow<'_, str> {
    SECRET.replace_all(text, "[redacted]")
}

/// Writes one log file per day into `folder`. If the log cannot be written, prints the error to standard error and
/// continues without a log.
pub fn start(folder: &Path) {
    // If the folder were missing, the appender would print an error before creating it.
    let _ = fs::create_dir_all(folder);
    let file = RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("quota")
        .filename_suffix("log")
        .max_log_files(MAX_FILES)
        .build(folder);
    match file {
        Ok(file) => {
            let started = tracing_subscriber::fmt()
                .with_env_filter(EnvFilter::new("info"))
                .with_ansi(false)
                .with_writer(Redacting(Mutex::new(file)))
                .try_init();
            if let Err(error) = started {
                eprintln!("cannot write the log: {error}");
            }
        }
        Err(error) => eprintln!("cannot write the log: {error}"),
    }
    let default_hook = panic::take_hook();
    panic::set_hook(Box::new(move |it| {
        let location = it.location().map(ToString::to_string).unwrap_or_default();
        let text = it.payload_as_str().unwrap_or("(no message)");
        tracing::error!(location, "panic: {text}");
        default_hook(it);
    }));
}

struct Redacting<W>(Mutex<W>);

/// Writes one line of the log. The subscriber passes each line in a single call, so a secret is never split between two
/// calls.
struct Line<'a, W>(&'a Mutex<W>);

impl<'a, W: Write + 'a> MakeWriter<'a> for Redacting<W> {
    type Writer = Line<'a, W>;

    fn make_writer(&'a self) -> Self::Writer {
        Line(&self.0)
    }
}

impl<W: Write> Write for Line<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        self.0.lock().write_all(redacted(&text).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anything_like_a_secret_is_redacted() {
        let secrets = [
            "qk_0123456789abcdefghijABCDEFGHIJ01234567",
            "qr_0123456789abcdefghijABCDEFGHIJ01234567",
            "qs_0123456789abcdefghijABCDEFGHIJ01234567",
            "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiIxIn0.c2ln-_",
            "Bearer abc.def",
            "ada@example.com",
        ];
        let written = std::sync::Arc::new(Mutex::new(Vec::new()));
        let writer = Redacting(Mutex::new(Shared(written.clone())));
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(writer)
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            for secret in secrets {
                tracing::info!(field = secret, "in a sentence: {secret}, \"{secret}\"");
            }
            tracing::info!(
                path = "/admin/api-keys/019ab4e1-7c00-7000-8000-0000000000b1",
                "request sent"
            );
        });
        let text = String::from_utf8(written.lock().clone()).expect("text");
        for secret in secrets {
            let core = secret.trim_start_matches("Bearer ");
            assert!(!text.contains(core), "{core} is in {text}");
        }
        assert_eq!(
            text.matches("[redacted]").count(),
            3 * secrets.len(),
            "{text}"
        );
        assert!(
            text.contains("019ab4e1-7c00-7000-8000-0000000000b1"),
            "{text}"
        );
    }

    struct Shared(std::sync::Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}
