//! Finds headers, and the ends of responses.

/// Returns the value of a header in a response or request. Names are compared case-insensitively.
pub(super) fn value<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// Returns the head at the beginning of these bytes, and its length.
pub(super) fn head(bytes: &[u8]) -> Option<(String, usize)> {
    let end = bytes.windows(4).position(|it| it == b"\r\n\r\n")? + 4;
    Some((String::from_utf8_lossy(&bytes[..end]).into_owned(), end))
}

/// Returns the length of the complete response at the beginning of these bytes. An interim response counts as part of
/// the response that follows.
pub(super) fn complete(bytes: &[u8]) -> Option<usize> {
    let (text, end) = head(bytes)?;
    if text.starts_with("HTTP/1.1 100 ") {
        return Some(end + complete(&bytes[end..])?);
    }
    let length = value(&text, "content-length").map_or(Ok(0), str::parse::<usize>);
    let length = end + length.ok()?;
    (length <= bytes.len()).then_some(length)
}

/// Returns whether the server closes the connection after this response.
pub(super) fn closes(response: &[u8]) -> bool {
    head(response).is_some_and(|(text, _)| {
        value(&text, "connection").is_some_and(|it| it.eq_ignore_ascii_case("close"))
    })
}
