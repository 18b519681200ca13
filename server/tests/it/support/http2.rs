//! HTTP/2 frames for tests with misbehaving clients. The frames are written by hand, because an HTTP/2 library follows
//! the protocol.

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
pub(crate) const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len())
        .expect("a short payload")
        .to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Returns a client's first frames. `window` is the flow-control window for each response.
pub(crate) fn hello(window: u32) -> Vec<u8> {
    let settings = [&[0, 4], &window.to_be_bytes()[..]].concat();
    [PREFACE, &frame(SETTINGS, 0, 0, &settings)].concat()
}

/// Encodes a length for HPACK, with a 7-bit prefix.
fn length(mut length: usize) -> Vec<u8> {
    if let Ok(short @ ..127) = u8::try_from(length) {
        return vec![short];
    }
    let mut bytes = vec![127];
    length -= 127;
    while length >= 128 {
        bytes.push(u8::try_from(length % 128).expect("below 128") | 128);
        length /= 128;
    }
    bytes.push(u8::try_from(length).expect("below 128"));
    bytes
}

/// Returns a header field that is not added to the dynamic table.
pub(crate) fn field(name: &str, value: &str) -> Vec<u8> {
    let mut field = vec![0];
    field.extend(length(name.len()));
    field.extend(name.as_bytes());
    field.extend(length(value.len()));
    field.extend(value.as_bytes());
    field
}

/// Returns the pseudo-header fields of a request.
pub(crate) fn head(method: &str, path: &str) -> Vec<u8> {
    [
        field(":method", method),
        field(":scheme", "http"),
        field(":path", path),
        field(":authority", "q"),
    ]
    .concat()
}

pub(crate) fn get(stream: u32, path: &str) -> Vec<u8> {
    frame(
        HEADERS,
        END_HEADERS | END_STREAM,
        stream,
        &head("GET", path),
    )
}

pub(crate) fn cancel(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])
}
