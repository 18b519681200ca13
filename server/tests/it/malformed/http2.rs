//! Generates what a client sends on an HTTP/2 connection. Most frames are valid.

use fastrand::Rng;

use super::operations::{self, Caller};
use crate::support::http2::{
    CONTINUATION, DATA, END_HEADERS, HEADERS, cancel, field, frame, head, hello,
};

const END_STREAM: u8 = 1;

const FIELDS: &[(&str, &str)] = &[
    ("X-Upper", "1"),
    ("connection", "close"),
    ("transfer-encoding", "chunked"),
    ("te", "gzip"),
    ("host", "other"),
    (":method", "POST"),
    (":status", "200"),
    (":unknown", "1"),
    ("", "1"),
    ("a b", "1"),
    ("a", "b\r\nc: d"),
    ("a", "\u{0}"),
    ("content-length", "5"),
    ("content-length", "99999999999999999999"),
    ("content-length", "-1"),
    ("cookie", "a=b; =; ;;"),
    ("accept-encoding", "gzip;q=2, br;q=-1"),
    ("x-request-id", "\u{e4}"),
    ("expect", "100-continue"),
    ("upgrade", "websocket"),
    ("range", "bytes=0-0,5-1,-"),
];

/// Returns the bytes that a client sends on one connection.
pub(super) fn connection(random: &mut Rng, caller: &Caller) -> Vec<u8> {
    let mut bytes = hello(random.choice([0, 1, 65_535, 0x7fff_ffff]).unwrap_or(65_535));
    for stream in (1..=random.u32(1..6) * 2).step_by(2) {
        bytes.extend(request(random, caller, stream));
        if random.u8(..8) == 0 {
            bytes.extend(odd_frame(random, stream));
        }
    }
    // Sometimes, change or insert some bytes, or truncate the connection's bytes.
    if random.u8(..6) == 0 {
        for _ in 0..random.u8(1..4) {
            let at = random.usize(..bytes.len());
            match random.u8(..3) {
                0 => bytes[at] = random.u8(..),
                1 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, random.u8(..)),
            }
        }
    }
    bytes
}

fn request(random: &mut Rng, caller: &Caller, stream: u32) -> Vec<u8> {
    let request = operations::request(random, caller);
    let mut block = match random.u8(..20) {
        // Omit the pseudo-header fields, use the method or the path of a proxy request, or use an empty path.
        0 => Vec::new(),
        1 => head("CONNECT", &request.target),
        2 => head(&request.method, "http://q/v1/echo"),
        3 => head(&request.method, ""),
        _ => head(&request.method, &request.target),
    };
    for (name, value) in &request.fields {
        block.extend(field(&name.to_ascii_lowercase(), value));
    }
    for _ in 0..random.u8(..3) {
        if random.u8(..4) == 0 {
            let (name, value) = random.choice(FIELDS).copied().unwrap_or_default();
            block.extend(field(name, value));
        }
    }
    if random.u8(..40) == 0 {
        block.extend(field("a", &"v".repeat(random.usize(1..20_000))));
    }
    let has_body = !request.body.is_empty();
    let end = if has_body { 0 } else { END_STREAM };
    let mut bytes = if random.u8(..10) == 0 {
        let middle = random.usize(..=block.len());
        let (first, second) = block.split_at(middle);
        [
            frame(HEADERS, end, stream, first),
            frame(CONTINUATION, END_HEADERS, stream, second),
        ]
        .concat()
    } else {
        frame(HEADERS, END_HEADERS | end, stream, &block)
    };
    if has_body {
        // Shorten the body, because a frame holds at most 16 KiB, and a connection's window is 64 KiB.
        let body = &request.body[..request.body.len().min(16_000)];
        let end = if random.u8(..12) == 0 { 0 } else { END_STREAM };
        bytes.extend(frame(DATA, end, stream, body));
        if end == 0 {
            // Cancel the request, send trailers, or send nothing more.
            match random.u8(..3) {
                0 => bytes.extend(cancel(stream)),
                1 => {
                    let trailers = field("a", "b");
                    bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream, &trailers));
                }
                _ => {}
            }
        }
    }
    bytes
}

fn odd_frame(random: &mut Rng, stream: u32) -> Vec<u8> {
    let payload: Vec<u8> = (0..random.usize(..40)).map(|_| random.u8(..)).collect();
    let stream = match random.u8(..4) {
        0 => 0,
        1 => stream + 1,
        2 => 0x7fff_ffff,
        _ => stream,
    };
    frame(random.u8(..16), random.u8(..), stream, &payload)
}

/// Returns the number of responses in the frames that a server has sent.
pub(super) fn responses(mut bytes: &[u8]) -> u64 {
    let mut found = 0;
    while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        found += u64::from(head[3] == HEADERS);
        bytes = rest.get(length..).unwrap_or_default();
    }
    found
}
