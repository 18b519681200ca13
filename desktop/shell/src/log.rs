//! The log file: a line for each request and for what goes wrong, panics included.
//!
//! Lines hold no secret by how they are made; what looks like one all the same is taken out on the way to the file.

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

const KEPT_DAYS: usize = 7;

/// Keys and tokens of ours, JWTs, what follows `Bearer`, and addresses of people.
static SECRET: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"(?x) \bq[ksr]_[0-9A-Za-z]+ | \beyJ[0-9A-Za-z_.=-]+ | (?i:\bbearer)\s+[^\s\x22',]+
          | [^\s\x22'<>=(]+@[^\s\x22'<>)]+\.[A-Za-z]{2,}",
    )
    .expect("a pattern of ours")
});

pub fn redacted(text: &str) -> Cow<'_, str> {
    SECRET.replace_all(text, "[redacted]")
}

/// Begins to log into `folder`. Where that cannot be written there is no log, and that is said on standard error.
pub fn begin(folder: &Path) {
    // Else the appender complains before it makes it.
    let _ = fs::create_dir_all(folder);
    let file = RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("quota")
        .filename_suffix("log")
        .max_log_files(KEPT_DAYS)
        .build(folder);
    match file {
        Ok(file) => {
            let begun = tracing_subscriber::fmt()
                .with_env_filter(EnvFilter::new("info"))
                .with_ansi(false)
                .with_writer(Redacting(Mutex::new(file)))
                .try_init();
            if let Err(error) = begun {
                eprintln!("no log is written: {error}");
            }
        }
        Err(error) => eprintln!("no log is written: {error}"),
    }
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |it| {
        let place = it.location().map(ToString::to_string).unwrap_or_default();
        let text = it.payload_as_str().unwrap_or("(no text)");
        tracing::error!(place, "panicked: {text}");
        before(it);
    }));
}

struct Redacting<W>(Mutex<W>);

/// One line, which the subscriber writes at once.
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
    fn what_looks_like_a_secret_does_not_reach_the_file() {
        let secrets = [
            "qk_0123456789abcdefghijABCDEFGHIJ01234567",
            "qr_0123456789abcdefghijABCDEFGHIJ01234567",
            "qs_0123456789abcdefghijABCDEFGHIJ01234567",
            "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiIxIn0.c2ln-_",
            "Bearer abc.def",
            "ada@example.com",
        ];
        let shown = std::sync::Arc::new(Mutex::new(Vec::new()));
        let writer = Redacting(Mutex::new(Shared(shown.clone())));
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(writer)
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            for secret in secrets {
                tracing::info!(field = secret, "in a text: {secret}, \"{secret}\"");
            }
            tracing::info!(
                path = "/admin/api-keys/019ab4e1-7c00-7000-8000-0000000000b1",
                "asked"
            );
        });
        let text = String::from_utf8(shown.lock().clone()).expect("text");
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
