//! Writes a response as bytes, with headers in the same order as hyper.

use std::{
    cell::Cell,
    time::{Duration, UNIX_EPOCH},
};

use poem::http::{HeaderName, HeaderValue, StatusCode, header};

use crate::{api::limit_headers::HeaderSink, clock::UnixNanos};

/// The length of a date such as `Thu, 26 Nov 2026 16:00:00 GMT`.
const DATE: usize = 29;
/// A capacity, in bytes, that is enough for most responses.
const USUAL: usize = 1024;

thread_local! {
    /// The most recently formatted second, and its text.
    static LAST_DATE: Cell<(u64, [u8; DATE])> = const { Cell::new((u64::MAX, [b' '; DATE])) };
}

/// A response whose headers are being written.
pub(super) struct ResponseWriter<'a> {
    out: &'a mut Vec<u8>,
    /// The [`flag`]s of the headers that have been set.
    flags: u8,
}

/// The number of combinations of [`flag`]s.
const COMBINATIONS: u8 = 4;

/// The bytes of the headers that every response has. Each combination of [`flag`]s has its own version, because a
/// header that is already set is not added again.
pub(super) struct CommonHeaders([Vec<u8>; COMBINATIONS as usize]);

impl CommonHeaders {
    /// Formats the headers that `write` sets, for each combination of flags.
    pub(super) fn new(write: impl Fn(&mut ResponseWriter<'_>)) -> Self {
        let mut combinations = [const { Vec::new() }; COMBINATIONS as usize];
        for (out, flags) in combinations.iter_mut().zip(0..) {
            write(&mut ResponseWriter { out, flags });
        }
        Self(combinations)
    }
}

/// Returns the bit of a header whose presence callers check with [`HeaderSink::contains`], or 0 for any other header.
#[expect(clippy::inline_always, reason = "see the methods that set headers")]
#[inline(always)]
fn flag(name: &HeaderName) -> u8 {
    if *name == header::CACHE_CONTROL {
        1
    } else if *name == header::CONTENT_SECURITY_POLICY {
        2
    } else {
        0
    }
}

impl<'a> ResponseWriter<'a> {
    /// Appends the status line to `out`.
    pub(super) fn begin(out: &'a mut Vec<u8>, status: StatusCode) -> Self {
        out.reserve(USUAL);
        match status {
            StatusCode::OK => out.extend_from_slice(b"HTTP/1.1 200 OK\r\n"),
            StatusCode::TOO_MANY_REQUESTS => {
                out.extend_from_slice(b"HTTP/1.1 429 Too Many Requests\r\n");
            }
            _ => {
                out.extend_from_slice(b"HTTP/1.1 ");
                out.extend_from_slice(status.as_str().as_bytes());
                out.push(b' ');
                out.extend_from_slice(status.canonical_reason().unwrap_or("<none>").as_bytes());
                out.extend_from_slice(b"\r\n");
            }
        }
        Self { out, flags: 0 }
    }

    /// Writes the common headers, the length, the date, and the body.
    pub(super) fn finish(self, common: &CommonHeaders, body: &[u8], now: UnixNanos) {
        let Self { out, flags } = self;
        out.extend_from_slice(&common.0[usize::from(flags)]);
        out.extend_from_slice(b"content-length: ");
        let mut length = itoa::Buffer::new();
        out.extend_from_slice(length.format(body.len()).as_bytes());
        out.extend_from_slice(b"\r\ndate: ");
        out.extend_from_slice(&date(now.secs()));
        out.extend_from_slice(b"\r\n\r\n");
        out.extend_from_slice(body);
    }
}

#[expect(
    clippy::inline_always,
    reason = "nearly all names are constants, so most of this code is evaluated at compile time, but the compiler cannot \
              tell before it has inlined the code"
)]
impl HeaderSink for ResponseWriter<'_> {
    fn contains(&self, name: &HeaderName) -> bool {
        debug_assert!(flag(name) > 0, "{name} has no flag");
        self.flags & flag(name) > 0
    }

    #[inline(always)]
    fn set(&mut self, name: HeaderName, value: &HeaderValue) {
        self.set_text(name, value.as_bytes());
    }

    #[inline(always)]
    fn set_static(&mut self, name: HeaderName, value: &'static str) {
        self.set_text(name, value.as_bytes());
    }

    #[inline(always)]
    fn set_number(&mut self, name: HeaderName, value: u64) {
        self.set_text(name, itoa::Buffer::new().format(value).as_bytes());
    }

    #[inline(always)]
    fn set_text(&mut self, name: HeaderName, value: &[u8]) {
        // `finish` writes the length after the common headers, as hyper does.
        if name == header::CONTENT_LENGTH {
            return;
        }
        self.flags |= flag(&name);
        self.out.extend_from_slice(name.as_str().as_bytes());
        self.out.extend_from_slice(b": ");
        self.out.extend_from_slice(value);
        self.out.extend_from_slice(b"\r\n");
    }
}

fn date(secs: u64) -> [u8; DATE] {
    let (last, text) = LAST_DATE.get();
    if last == secs {
        return text;
    }
    let time = UNIX_EPOCH + Duration::from_secs(secs);
    let mut text = [b' '; DATE];
    let formatted = httpdate::fmt_http_date(time);
    if formatted.len() == DATE {
        text.copy_from_slice(formatted.as_bytes());
    }
    LAST_DATE.set((secs, text));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn response_has_its_length_and_date() {
        let mut out = b"before".to_vec();
        let mut response = ResponseWriter::begin(&mut out, StatusCode::TOO_MANY_REQUESTS);
        response.set_static(header::CONTENT_SECURITY_POLICY, "own");
        assert!(response.contains(&header::CONTENT_SECURITY_POLICY));
        assert!(!response.contains(&header::CACHE_CONTROL));
        let common = CommonHeaders::new(|headers| {
            for name in [header::CONTENT_SECURITY_POLICY, header::CACHE_CONTROL] {
                if !headers.contains(&name) {
                    headers.set_static(name, "common");
                }
            }
        });
        response.finish(&common, b"{}", UnixNanos::from_secs(1_785_738_337));
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "beforeHTTP/1.1 429 Too Many Requests\r\ncontent-security-policy: own\r\ncache-control: common\r\n\
             content-length: 2\r\n\
             date: Mon, 03 Aug 2026 06:25:37 GMT\r\n\r\n{}"
        );
    }

    #[test]
    fn stated_length_is_not_repeated() {
        let mut out = Vec::new();
        let mut response = ResponseWriter::begin(&mut out, StatusCode::OK);
        response.set_number(header::CONTENT_LENGTH, 0);
        let common = CommonHeaders::new(|_| {});
        response.finish(&common, b"", UnixNanos::from_secs(0));
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.matches("content-length: 0\r\n").count(), 1, "{text}");
        assert!(
            text.contains("date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"),
            "{text}"
        );
    }

    #[test]
    fn each_second_has_its_own_date() {
        let dates = [1, 2, 1].map(|secs| String::from_utf8(date(secs).to_vec()).unwrap());
        assert_eq!(dates[0], dates[2]);
        assert_ne!(dates[0], dates[1]);
        assert_eq!(dates[1], "Thu, 01 Jan 1970 00:00:02 GMT");
    }
}
