//! Compares the requests that the parser of plain requests finds on a connection with those that hyper finds.
//!
//! Compiled into the fuzz target and into the integration tests, which replay the corpus. Both declare the module
//! `plain_request` next to this one.

use std::{
    cell::RefCell,
    convert::Infallible,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker},
};

use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Response, Version,
    body::{Bytes, Incoming},
    rt::{Read, ReadBufCursor, Write},
    server::conn::http1,
    service::service_fn,
};

use super::plain_request::{Parsed, PlainRequest, parse};

/// The header fields of plain requests that endpoints can read.
const FIELDS: [&str; 10] = [
    "x-api-key",
    "authorization",
    "x-service-token",
    "x-request-id",
    "x-forwarded-for",
    "x-forwarded-uri",
    "x-forwarded-method",
    "content-type",
    "origin",
    "traceparent",
];
/// The maximum number of times that hyper is polled for one input: more than the number of bytes in any input.
const POLLS_MAX: usize = 100_000;

/// A request, as read by the parser or by hyper.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    method: String,
    target: String,
    fields: Vec<(&'static str, Vec<u8>)>,
    body: Vec<u8>,
}

/// The bytes that arrive on a connection, and the positions at which they are divided.
struct Input<'a> {
    bytes: &'a [u8],
    ends: Vec<usize>,
}

impl<'a> Input<'a> {
    /// Reads the number of divisions (one byte), their positions (two bytes each), and the bytes of the connection.
    fn new(data: &'a [u8]) -> Option<Self> {
        let (&count, rest) = data.split_first()?;
        let (positions, bytes) = rest.split_at_checked(2 * usize::from(count))?;
        let positions = positions.chunks_exact(2);
        let positions = positions.map(|it| usize::from(u16::from_be_bytes([it[0], it[1]])));
        let mut ends = positions
            .filter(|end| (1..bytes.len()).contains(end))
            .collect::<Vec<_>>();
        ends.push(bytes.len());
        ends.sort_unstable();
        ends.dedup();
        Some(Self { bytes, ends })
    }
}

/// Panics if the parser accepts a request that is invalid or that hyper reads differently, or if the parser finds
/// different requests when the bytes arrive in several parts. Returns the number of requests that the parser accepts.
pub fn check(data: &[u8]) -> usize {
    let Some(input) = Input::new(data) else {
        return 0;
    };
    let (seen, length) = accepted(input.bytes, &input.ends);
    let whole = accepted(input.bytes, &[input.bytes.len()]);
    assert_eq!((&seen, length), (&whole.0, whole.1), "divided and whole");
    if !seen.is_empty() {
        let ends = input.ends.iter().map(|end| *end.min(&length)).collect();
        let input = Input {
            bytes: &input.bytes[..length],
            ends,
        };
        assert_eq!(seen, read_by_hyper(&input), "plain requests, and hyper's");
    }
    seen.len()
}

/// Reads plain requests from a connection in the same way as the server. Stops at a request that is incomplete or that
/// the server leaves to hyper. Returns the requests before it and their total length.
fn accepted(bytes: &[u8], ends: &[usize]) -> (Vec<Seen>, usize) {
    let (mut seen, mut start) = (Vec::new(), 0);
    for &end in ends {
        while start < end {
            match parse(&bytes[start..end]) {
                Parsed::Plain(request, head) => {
                    let length = head + request.body_length;
                    check_framing(&bytes[start..start + head], &request);
                    // hyper rejects some of the targets that are not simple, and reads others differently. No endpoint
                    // has such a target, so the server leaves these requests to hyper.
                    if !is_simple(request.target) || start + length > bytes.len() {
                        return (seen, start);
                    }
                    let body = &bytes[start + head..start + length];
                    assert!(body.starts_with(request.body), "the body follows the head");
                    seen.push(Seen {
                        method: request.method.to_owned(),
                        target: request.target.to_owned(),
                        fields: FIELDS
                            .into_iter()
                            .filter_map(|name| Some((name, request.field(name)?.to_vec())))
                            .collect(),
                        body: body.to_vec(),
                    });
                    start += length;
                }
                Parsed::Incomplete => break,
                Parsed::Other => return (seen, start),
            }
        }
    }
    (seen, start)
}

fn is_simple(target: &str) -> bool {
    let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"/?=&-_.".contains(&byte);
    target.starts_with('/') && target.bytes().all(is_known)
}

/// Checks the head of a plain request against the grammar of RFC 9112, independently of httparse.
fn check_framing(head: &[u8], request: &PlainRequest<'_>) {
    let shown = || String::from_utf8_lossy(head).into_owned();
    let text = str::from_utf8(head).unwrap_or_else(|_| panic!("not ASCII: {}", shown()));
    let lines = text.strip_suffix("\r\n\r\n");
    let lines = lines.unwrap_or_else(|| panic!("no end: {}", shown()));
    let mut lines = lines.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let expected = format!("{} {} HTTP/1.1", request.method, request.target);
    assert_eq!(first, expected, "the request line");
    assert!(!request.target.contains(' '), "{}", shown());
    let (mut length, mut hosts) = (None, 0);
    for line in lines {
        let is_visible = line.bytes().all(|byte| (b' '..0x7f).contains(&byte));
        assert!(is_visible && !line.is_empty(), "{}", shown());
        let field = line.split_once(':');
        let (name, value) = field.unwrap_or_else(|| panic!("no colon: {}", shown()));
        let is_token =
            |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        assert!(
            !name.is_empty() && name.bytes().all(is_token),
            "{}",
            shown()
        );
        match &*name.to_ascii_lowercase() {
            "content-length" => {
                let digits = value.trim_matches(' ');
                assert!(digits.bytes().all(|it| it.is_ascii_digit()), "{}", shown());
                assert!(length.replace(digits.to_owned()).is_none(), "{}", shown());
            }
            "host" => hosts += 1,
            "transfer-encoding" | "upgrade" | "expect" | "te" | "trailer" => {
                panic!("not plain: {}", shown())
            }
            "connection" => {
                let value = value.trim_matches(' ').to_ascii_lowercase();
                assert_eq!(value, "keep-alive", "{}", shown());
            }
            _ => {}
        }
    }
    assert_eq!(hosts, 1, "{}", shown());
    let length = length.unwrap_or_else(|| "0".to_owned());
    assert_eq!(length, request.body_length.to_string(), "{}", shown());
}

/// A connection on which the parts of an input arrive, and whose responses are discarded.
struct Parts<'a> {
    input: &'a Input<'a>,
    start: usize,
}

impl Read for Parts<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        let start = self.start;
        let next = self.input.ends.iter().find(|end| **end > start);
        let end = next.map_or(start, |end| *end.min(&(start + buffer.remaining())));
        buffer.put_slice(&self.input.bytes[start..end]);
        self.start = end;
        Poll::Ready(Ok(()))
    }
}

impl Write for Parts<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Returns the requests that hyper finds. The input must end with a complete request.
fn read_by_hyper(input: &Input<'_>) -> Vec<Seen> {
    let seen = Rc::new(RefCell::new(Vec::new()));
    let service = service_fn(|request: Request<Incoming>| {
        let seen = Rc::clone(&seen);
        async move {
            let request = read_request(request).await;
            seen.borrow_mut().push(request);
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }
    });
    let parts = Parts { input, start: 0 };
    let mut served = pin!(
        http1::Builder::new()
            .half_close(true)
            .serve_connection(parts, service)
    );
    let mut context = Context::from_waker(Waker::noop());
    let end = (0..POLLS_MAX).find_map(|_| match served.as_mut().poll(&mut context) {
        Poll::Ready(end) => Some(end),
        Poll::Pending => None,
    });
    let end = end.expect("hyper reaches the end of the input");
    assert!(end.is_ok(), "hyper rejects a plain request: {end:?}");
    seen.take()
}

async fn read_request(request: Request<Incoming>) -> Seen {
    assert_eq!(request.version(), Version::HTTP_11);
    let mut fields = Vec::new();
    for name in FIELDS {
        let mut values = request.headers().get_all(name).iter();
        if let Some(value) = values.next() {
            assert!(values.next().is_none(), "{name} occurs twice");
            fields.push((name, value.as_bytes().to_vec()));
        }
    }
    let (method, target) = (request.method().to_string(), request.uri().to_string());
    let body = request.into_body().collect().await;
    Seen {
        method,
        target,
        fields,
        body: body.expect("the body is complete").to_bytes().to_vec(),
    }
}
