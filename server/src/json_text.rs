//! Writes strings in JSON that is formatted without serde.

/// Appends a string as JSON. Copies the string as it is if it does not need escaping, as is the case for most strings.
#[expect(
    clippy::needless_bitwise_bool,
    reason = "without branches, the compiler can vectorize the check"
)]
pub fn write_text(text: &str, out: &mut Vec<u8>) -> serde_json::Result<()> {
    let needs_escaping = text.bytes().fold(false, |odd, byte| {
        odd | (byte < b' ') | (byte == b'"') | (byte == b'\\')
    });
    if needs_escaping {
        return serde_json::to_writer(out, text);
    }
    out.push(b'"');
    out.extend_from_slice(text.as_bytes());
    out.push(b'"');
    Ok(())
}
