//! Authenticates data that replicas exchange through Redis.
//!
//! Other applications may be able to write to the same Redis, and so may another Quota installation with the same
//! prefix. A [`Seal`] prepends an HMAC-SHA-256 tag to a message. The HMAC key is derived from the server's secret and
//! the database ([`crate::auth::secret::Seals`]), so only messages from replicas of the same installation can be
//! opened. The tag also covers a context, such as a purpose and a key's hash: a message can be opened only in the
//! context for which it was sealed. A seal does not hide the content and does not prevent replays, so messages contain
//! a time or a number.

use aws_lc_rs::hmac;

/// The length of a tag, in bytes.
pub const TAG: usize = 32;

/// The keys for one purpose. While `QUOTA_SECRET` is being rotated, messages that were sealed with the current or the
/// previous key can be opened.
#[derive(Clone)]
pub struct Seal {
    current: hmac::Key,
    previous: Option<hmac::Key>,
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seal")
    }
}

impl Seal {
    pub fn new(current: &[u8; 32], previous: Option<&[u8; 32]>) -> Self {
        let key = |bytes: &[u8; 32]| hmac::Key::new(hmac::HMAC_SHA256, bytes);
        Self {
            current: key(current),
            previous: previous.map(key),
        }
    }

    /// Returns the tag, followed by the content.
    pub fn close(&self, context: &[&[u8]], content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(TAG + content.len());
        bytes.extend_from_slice(sign(&self.current, context, content).as_ref());
        bytes.extend_from_slice(content);
        bytes
    }

    /// Returns the content, if one of the keys sealed it for this context.
    pub fn open<'a>(&self, context: &[&[u8]], bytes: &'a [u8]) -> Option<&'a [u8]> {
        let (tag, content) = bytes.split_at_checked(TAG)?;
        let sealed_by = |key: &hmac::Key| {
            aws_lc_rs::constant_time::verify_slices_are_equal(
                sign(key, context, content).as_ref(),
                tag,
            )
            .is_ok()
        };
        (sealed_by(&self.current) || self.previous.as_ref().is_some_and(sealed_by))
            .then_some(content)
    }
}

/// Returns the tag. Each part of the context is preceded by its length, and the content by a number that is not a
/// length. Therefore, different inputs are never signed as the same bytes.
fn sign(key: &hmac::Key, context: &[&[u8]], content: &[u8]) -> hmac::Tag {
    let mut signing = hmac::Context::with_key(key);
    for part in context {
        signing.update(&(part.len() as u64).to_be_bytes());
        signing.update(part);
    }
    signing.update(&u64::MAX.to_be_bytes());
    signing.update(content);
    signing.sign()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seal(current: u8, previous: Option<u8>) -> Seal {
        Seal::new(&[current; 32], previous.map(|byte| [byte; 32]).as_ref())
    }

    #[test]
    fn a_message_opens_only_with_its_key_and_in_its_context() {
        let closed = seal(1, None).close(&[b"purpose", b"place"], b"content");
        let open = |seal: &Seal, context: &[&[u8]]| seal.open(context, &closed).map(<[u8]>::to_vec);
        let content = Some(b"content".to_vec());
        assert_eq!(open(&seal(1, None), &[b"purpose", b"place"]), content);
        assert_eq!(open(&seal(2, Some(1)), &[b"purpose", b"place"]), content);
        assert_eq!(open(&seal(2, None), &[b"purpose", b"place"]), None);
        assert_eq!(open(&seal(1, None), &[b"purpose", b"other"]), None);
        assert_eq!(open(&seal(1, None), &[b"purposeplace"]), None);
        assert_eq!(open(&seal(1, None), &[b"purpose", b"place", b""]), None);
    }

    #[test]
    fn a_damaged_or_truncated_message_does_not_open() {
        let seal = seal(1, None);
        let whole = seal.close(&[b"purpose"], b"content");
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            assert_eq!(seal.open(&[b"purpose"], &damaged), None, "{at}");
            assert_eq!(seal.open(&[b"purpose"], &whole[..at]), None, "{at}");
        }
        let longer = [&whole[..], b"x"].concat();
        assert_eq!(seal.open(&[b"purpose"], &longer), None);
    }
}
