//! Plain HTTP/1.1 requests, parsed from the bytes of a connection.
//!
//! A plain request is unambiguous: every HTTP implementation reads the same request from its bytes, and finds its end
//! at the same byte. [`parse`] recognizes only such requests. All other bytes may still be a valid request, so they are
//! left to hyper, along with everything after them. The parser therefore needs to be strict, but not complete.
//!
//! This module does not depend on which requests are accepted, or on the responses: see [`DirectEndpoint`].

use std::{convert::Infallible, mem::MaybeUninit, net::IpAddr, time::Instant};

use crate::connection_marks::ConnectionMarks;

/// The maximum size of a request's head: the request line and the header fields.
pub const HEAD_MAX: usize = 16 * 1024;
/// The maximum number of header fields.
const FIELDS_MAX: usize = 64;
/// The maximum number of digits in `Content-Length`. Nine digits fit in a `usize` on every supported platform.
const LENGTH_DIGITS: usize = 9;

/// Responds to plain requests, exactly as the endpoint behind hyper would.
pub trait DirectEndpoint: Send + Sync + 'static {
    /// The kind of an accepted request.
    type Route: Copy + Send;

    /// What the endpoint knows about a request.
    type Context: Send;

    /// Returns the route to pass to [`answer`](Self::answer) together with this request, or `None` if the request is
    /// not accepted. The request's body may not have arrived yet.
    fn route(&self, request: &PlainRequest<'_>) -> Option<Self::Route>;

    /// Appends the response to `out`. `context` is `None` at first, and is set early, for
    /// [`answer_after_panic`](Self::answer_after_panic).
    fn answer(
        &self,
        route: Self::Route,
        request: &PlainRequest<'_>,
        arrival: Arrival<'_>,
        context: &mut Option<Self::Context>,
        out: &mut Vec<u8>,
    ) -> impl Future<Output = ()> + Send;

    /// Appends the response to a request for which [`answer`](Self::answer) has panicked. `context` is what `answer` has
    /// set.
    fn answer_after_panic(
        &self,
        route: Self::Route,
        request: &PlainRequest<'_>,
        peer: IpAddr,
        context: Option<Self::Context>,
        out: &mut Vec<u8>,
    ) -> impl Future<Output = ()> + Send;
}

/// The connection and the arrival time of a request.
#[derive(Debug, Clone, Copy)]
pub struct Arrival<'a> {
    pub peer: IpAddr,
    /// When the whole request was read from the socket. `None` if that is unknown or no longer recent; the endpoint then
    /// reads the clock.
    pub time: Option<Instant>,
    /// `None` if the client has already authenticated on the connection.
    pub marks: Option<&'a ConnectionMarks>,
}

/// For listeners without direct responses. No value of this type exists.
impl DirectEndpoint for Infallible {
    type Route = Self;
    type Context = Self;

    fn route(&self, _: &PlainRequest<'_>) -> Option<Self> {
        match *self {}
    }

    async fn answer(
        &self,
        _: Self,
        _: &PlainRequest<'_>,
        _: Arrival<'_>,
        _: &mut Option<Self>,
        _: &mut Vec<u8>,
    ) {
        match *self {}
    }

    async fn answer_after_panic(
        &self,
        _: Self,
        _: &PlainRequest<'_>,
        _: IpAddr,
        _: Option<Self>,
        _: &mut Vec<u8>,
    ) {
        match *self {}
    }
}

/// A request with a complete head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlainRequest<'a> {
    pub method: &'a str,
    /// The path and the query, as sent.
    pub target: &'a str,
    /// The value of `Content-Length`, or 0 if the field is missing.
    pub body_length: usize,
    /// The part of the body that has arrived.
    pub body: &'a [u8],
    known: [Option<&'a [u8]>; KNOWN],
}

/// The number of header fields that endpoints can read. A plain request contains each of these fields
/// at most once.
const KNOWN: usize = 10;

/// Returns the index of a field that endpoints can read.
#[inline]
fn place(name: &str) -> Option<usize> {
    Some(match name {
        "x-api-key" => 0,
        "authorization" => 1,
        "x-service-token" => 2,
        "x-request-id" => 3,
        "x-forwarded-for" => 4,
        "x-forwarded-uri" => 5,
        "x-forwarded-method" => 6,
        "content-type" => 7,
        "origin" => 8,
        "traceparent" => 9,
        _ => return None,
    })
}

impl<'a> PlainRequest<'a> {
    /// Returns the value of a field that endpoints can read. `name` must be lowercase.
    #[inline]
    pub fn field(&self, name: &str) -> Option<&'a [u8]> {
        let place = place(name);
        debug_assert!(place.is_some(), "{name} is not a known field");
        place.and_then(|place| self.known[place])
    }
}

/// The result of parsing a connection's unread bytes.
#[derive(Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "the value is destructured right after parsing"
)]
pub enum Parsed<'a> {
    /// A plain request whose head has this length. The body follows the head.
    Plain(PlainRequest<'a>, usize),
    /// An incomplete head, possibly of a plain request.
    Incomplete,
    /// Anything else.
    Other,
}

/// Parses the beginning of a connection's unread bytes.
pub fn parse(bytes: &[u8]) -> Parsed<'_> {
    // Empty lines before a request are legal, but not plain. httparse would skip them.
    if bytes.first().is_some_and(|byte| !byte.is_ascii_uppercase()) {
        return Parsed::Other;
    }
    let mut fields = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut []);
    let length = match request.parse_with_uninit_headers(bytes, &mut fields) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_MAX => return Parsed::Incomplete,
        Ok(httparse::Status::Partial) | Err(_) => return Parsed::Other,
    };
    let (head, rest) = bytes.split_at(length);
    match (request.method, request.path, request.version) {
        // CONNECT is the only method that changes the meaning of the bytes after the request.
        (Some("CONNECT"), ..) => Parsed::Other,
        (Some(method), Some(target), Some(1)) if length <= HEAD_MAX && is_plain(head) => {
            match Known::of(request.headers) {
                Some(Known {
                    values,
                    length: body_length,
                }) => Parsed::Plain(
                    PlainRequest {
                        method,
                        target,
                        body_length,
                        body: &rest[..body_length.min(rest.len())],
                        known: values,
                    },
                    length,
                ),
                None => Parsed::Other,
            }
        }
        _ => Parsed::Other,
    }
}

/// Returns whether a head consists of visible ASCII characters and spaces, in lines that end with CRLF. httparse
/// accepts more. Does not check the first byte, which the caller has checked.
#[expect(
    clippy::needless_bitwise_bool,
    reason = "without branches, the compiler can vectorize the check"
)]
fn is_plain(head: &[u8]) -> bool {
    let next = head.get(1..).unwrap_or_default();
    let odd = head.iter().zip(next).fold(0, |odd, (byte, next)| {
        let is_visible = (b' '..0x7f).contains(next);
        let ends_line = (*next == b'\r') | (*next == b'\n');
        // A carriage return must be followed by a line feed, and no other byte may be followed by one.
        let is_split = (*byte == b'\r') != (*next == b'\n');
        odd | u8::from(!(is_visible | ends_line)) | u8::from(is_split)
    });
    odd == 0 && head.ends_with(b"\n")
}

struct Known<'a> {
    values: [Option<&'a [u8]>; KNOWN],
    length: usize,
}

impl<'a> Known<'a> {
    /// Reads the header fields. Returns `None` if the request is not plain. A plain request has a `Host` field and
    /// repeats none of the fields that are read. `Content-Length` and `Connection` have usual values, if they are
    /// present. No other field affects where the request ends or how to respond.
    fn of(fields: &[httparse::Header<'a>]) -> Option<Self> {
        let mut values = [None; KNOWN];
        let (mut length, mut host, mut connection) = (None, None, None);
        for field in fields {
            let is = |name: &str| field.name.eq_ignore_ascii_case(name);
            let place = match field.name.len() {
                2 if is("te") => return None,
                4 if is("host") => &mut host,
                6 if is("expect") => return None,
                6 if is("origin") => &mut values[8],
                7 if is("upgrade") || is("trailer") => return None,
                9 if is("x-api-key") => &mut values[0],
                10 if is("connection") => &mut connection,
                11 if is("traceparent") => &mut values[9],
                12 if is("x-request-id") => &mut values[3],
                12 if is("content-type") => &mut values[7],
                13 if is("authorization") => &mut values[1],
                14 if is("content-length") => &mut length,
                14 if is("http2-settings") => return None,
                15 if is("x-service-token") => &mut values[2],
                15 if is("x-forwarded-for") => &mut values[4],
                15 if is("x-forwarded-uri") => &mut values[5],
                16 if is("content-encoding") || is("proxy-connection") => return None,
                17 if is("transfer-encoding") => return None,
                18 if is("x-forwarded-method") => &mut values[6],
                _ => continue,
            };
            if place.replace(field.value).is_some() {
                return None;
            }
        }
        host?;
        let is_plain = connection.is_none_or(|it| it.eq_ignore_ascii_case(b"keep-alive"));
        let length = length.map_or(Some(0), content_length)?;
        is_plain.then_some(Self { values, length })
    }
}

/// Parses the value of `Content-Length`. Returns `None` if it has leading zeros or too many digits, or is not a number.
fn content_length(value: &[u8]) -> Option<usize> {
    let is_plain = value.len() <= LENGTH_DIGITS
        && value.iter().all(u8::is_ascii_digit)
        && (value.len() == 1 || !value.starts_with(b"0"));
    is_plain.then(|| str::from_utf8(value).ok()?.parse().ok())?
}

#[cfg(test)]
mod tests;
