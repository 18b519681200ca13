//! Encodes positions in the log as cursors and event IDs.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

/// The first byte of an encoded position in the log.
const POSITION: u8 = 3;

pub(super) fn write_position(seq: i64) -> String {
    let mut bytes = vec![POSITION];
    bytes.extend_from_slice(&seq.to_be_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

pub(super) fn read_position(text: &str) -> Option<i64> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
    let seq = bytes.strip_prefix(&[POSITION])?.try_into().ok()?;
    Some(i64::from_be_bytes(seq)).filter(|seq| *seq >= 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn only_encoded_positions_can_be_read(seq in 0..=i64::MAX, text: String) {
            prop_assert_eq!(read_position(&write_position(seq)), Some(seq));
            if let Some(read) = read_position(&text) {
                prop_assert_eq!(write_position(read), text);
            }
        }
    }
}
