//! Generates UUIDv7 IDs for requests that do not have an ID.

use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicU64, Ordering},
};

use uuid::{Builder, fmt::Hyphenated};

use crate::clock::UnixNanos;

/// A generated ID, as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GeneratedId([u8; Hyphenated::LENGTH]);

impl GeneratedId {
    #[inline]
    #[expect(
        unsafe_code,
        reason = "the text is used several times per request, and validating it each time takes longer than generating it"
    )]
    pub fn as_str(&self) -> &str {
        // SAFETY: the bytes are ASCII. The field is private to this module, and only `RequestIds::next` creates this
        // type, with an array that `Hyphenated::encode_lower` has filled with hexadecimal digits and hyphens.
        unsafe { str::from_utf8_unchecked(&self.0) }
    }
}

/// Generates IDs that are unique across processes. The IDs are predictable, which does not matter for request IDs.
/// Reading random numbers from the operating system for each ID would cost more than the rest of the generation.
#[derive(Debug)]
pub struct RequestIds {
    /// The start value of this process's counter.
    start: u64,
    count: AtomicU64,
}

impl Default for RequestIds {
    fn default() -> Self {
        Self {
            start: RandomState::new().hash_one("request ids"),
            count: AtomicU64::new(0),
        }
    }
}

impl RequestIds {
    pub fn next(&self, now: UnixNanos) -> GeneratedId {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let mut random = [0; 10];
        // `mixed` is one-to-one, so its eight bytes are unique within a process. The first two bytes compensate for the
        // six bits that the version and variant overwrite.
        random[..2].copy_from_slice(&count.to_be_bytes()[6..]);
        random[2..].copy_from_slice(&mixed(self.start.wrapping_add(count)).to_be_bytes());
        let millis = now.0 / 1_000_000;
        let id = Builder::from_unix_timestamp_millis(millis, &random).into_uuid();
        let mut text = [0; Hyphenated::LENGTH];
        id.as_hyphenated().encode_lower(&mut text);
        GeneratedId(text)
    }
}

/// Returns the `n`th output of SplitMix64 with seed 0 (Steele, Lea, Flood: Fast splittable pseudorandom number
/// generators, 2014).
const fn mixed(n: u64) -> u64 {
    let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use uuid::Uuid;

    use super::*;

    #[test]
    fn ids_are_uuids_of_version_7_with_the_current_time() {
        let text = RequestIds::default().next(UnixNanos::from_secs(1_785_738_360));
        let id = Uuid::try_parse(text.as_str()).expect("a UUID");
        assert_eq!(id.get_version_num(), 7);
        let (secs, _) = id.get_timestamp().expect("a time").to_unix();
        assert_eq!(secs, 1_785_738_360);
    }

    #[test]
    fn ids_are_unique_in_a_process_and_across_processes() {
        let (one, other) = (RequestIds::default(), RequestIds::default());
        let now = UnixNanos::from_secs(1);
        let ids = (0..100_000).flat_map(|_| [one.next(now), other.next(now)]);
        assert_eq!(ids.collect::<HashSet<_>>().len(), 200_000);
    }
}
