//! The subset of HTTP/1.1 that the benchmarks need: responses with a `Content-Length`.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// Returns the status and total length of a response, or `None` if the response is not complete yet.
pub(crate) fn answer(bytes: &[u8]) -> Result<Option<(u16, usize)>> {
    let Some(head) = find(bytes, b"\r\n\r\n") else {
        return Ok(None);
    };
    let status = bytes
        .strip_prefix(b"HTTP/1.1 ")
        .and_then(|rest| str::from_utf8(rest.get(..3)?).ok()?.parse().ok())
        .context("a response that is not HTTP/1.1")?;
    let mut length = None;
    for line in bytes[..head].split(|byte| *byte == b'\n') {
        const NAME: &[u8] = b"content-length:";
        if line.len() > NAME.len() && line[..NAME.len()].eq_ignore_ascii_case(NAME) {
            let text = str::from_utf8(&line[NAME.len()..])?;
            length = Some(text.trim().parse::<usize>()?);
        }
    }
    let whole = head + 4 + length.context("a response without Content-Length")?;
    Ok((bytes.len() >= whole).then_some((status, whole)))
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|it| it == what)
}

/// Sends one request on a new connection. Returns the status and the body of the response.
pub(crate) fn call(
    server: SocketAddr,
    method: &str,
    path: &str,
    token: Option<&str>,
    body: Option<&Value>,
) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let token = token.map_or_else(String::new, |token| {
        format!("Authorization: Bearer {token}\r\n")
    });
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n{token}\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let Some((status, whole)) = answer(&bytes)? else {
        bail!("{method} {path}: the response is incomplete");
    };
    let start = find(&bytes, b"\r\n\r\n").map_or(whole, |head| head + 4);
    Ok((status, String::from_utf8(bytes[start..whole].to_vec())?))
}

/// Sends a request and returns the JSON of the response. Fails unless the status is 2xx.
pub(crate) fn json(
    server: SocketAddr,
    method: &str,
    path: &str,
    token: Option<&str>,
    body: &Value,
) -> Result<Value> {
    let (status, text) = call(server, method, path, token, Some(body))?;
    if !(200..300).contains(&status) {
        bail!("{method} {path} returned {status}: {text}");
    }
    Ok(serde_json::from_str(&text)?)
}

#[cfg(test)]
mod tests {
    use super::answer;

    #[test]
    fn a_response_is_complete_when_its_body_is() {
        let whole = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\nX: y\r\n\r\n{}";
        for end in 0..whole.len() {
            assert_eq!(answer(&whole[..end]).unwrap(), None, "{end}");
        }
        assert_eq!(answer(whole).unwrap(), Some((429, whole.len())));
    }

    #[test]
    fn a_malformed_response_is_an_error() {
        assert!(answer(b"SSH-2.0\r\n\r\n").is_err());
        assert!(answer(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
