//! The layout of a usage record in a segment.
//!
//! A segment is a sequence of 64-bit words. Every record begins with one header word:
//!
//! ```text
//! bits 0..16   length of the record in words, header included; 0 for a seal
//! bits 16..24  state: open, done, void or sealed
//! bits 24..32  version of the layout
//! bits 32..64  CRC of the segment's ID, the position, the other half of this word, and the body
//! ```
//!
//! Version 2 uses CRC-32C, for which processors have an instruction. Its CRC also covers four zero bytes in place of the
//! CRC itself. Version 1, which earlier versions of the server wrote, uses CRC-32 and does not cover these bytes.
//!
//! A header word of zero means that nothing has been written there yet. The CRC covers the segment's random ID, so that
//! no text from a client can pass for a record.

use std::{borrow::Cow, fmt};

use quota_common::{ApiKeyId, PlanId, TenantId, plan::Billing};
use uuid::{Builder, Uuid};

use crate::{clock::UnixNanos, limiter::Policy, repo::usage_batch::UsageRecord};

/// The maximum length of a recorded endpoint, in bytes.
pub const ENDPOINT_MAX: usize = 128;
/// The maximum length of a recorded request ID, in bytes.
pub const REQUEST_ID_MAX: usize = 128;

pub(super) const WORD: usize = 8;
/// The number of words in the header and the fields of fixed length.
const FIXED_WORDS: usize = 10;
/// The byte offset of the strings in the body.
const TEXTS_AT: usize = (FIXED_WORDS - 1) * WORD;
/// The maximum length of a record, in words.
pub(super) const RECORD_WORDS_MAX: usize = FIXED_WORDS + (ENDPOINT_MAX + REQUEST_ID_MAX) / WORD;

/// The state of a record's space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum RecordState {
    /// The space is reserved. The record has not been written yet.
    Open = 1,
    /// The record has been written.
    Done = 2,
    /// No record was written, for example because no decision was made.
    Void = 3,
    /// No record follows in this segment.
    Sealed = 4,
}

/// The version of a record's layout. The versions differ only in how the CRC is calculated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Version {
    One = 1,
    Two = 2,
}

/// A parsed header word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub version: Version,
    pub state: RecordState,
    /// The length of the record in words; 0 for a seal.
    pub words: usize,
    pub crc: u32,
}

impl Header {
    /// Parses a header word. Returns `None` if the word is not the header of a record.
    pub fn parse(word: u64) -> Option<Self> {
        let [a, b, state, version, crc @ ..] = word.to_le_bytes();
        let version = match version {
            1 => Version::One,
            2 => Version::Two,
            _ => return None,
        };
        let state = match state {
            1 => RecordState::Open,
            2 => RecordState::Done,
            3 => RecordState::Void,
            4 => RecordState::Sealed,
            _ => return None,
        };
        let words = usize::from(u16::from_le_bytes([a, b]));
        let fits = match state {
            RecordState::Sealed => words == 0,
            _ => (FIXED_WORDS..=RECORD_WORDS_MAX).contains(&words),
        };
        fits.then_some(Self {
            version,
            state,
            words,
            crc: u32::from_le_bytes(crc),
        })
    }
}

/// Calculates the header words of a segment's records.
#[derive(Clone)]
pub(super) struct HeaderWords {
    /// The CRCs of the segment's ID, with which the CRC of each record begins.
    crc_32: crc32fast::Hasher,
    crc_32c: u32,
}

impl HeaderWords {
    pub fn of(segment: Uuid) -> Self {
        let mut crc_32 = crc32fast::Hasher::new();
        crc_32.update(segment.as_bytes());
        Self {
            crc_32,
            crc_32c: crc32c::crc32c(segment.as_bytes()),
        }
    }

    /// Returns the header word of a record of `words` words at `position`, a byte offset. `body` must be empty unless
    /// the record is done.
    #[inline]
    pub fn word(
        &self,
        version: Version,
        position: usize,
        state: RecordState,
        words: usize,
        body: &[u8],
    ) -> u64 {
        let word = word_without_crc(version, state, words);
        let prefix = CrcPrefix::of(position, word);
        let crc = match version {
            Version::One => {
                let mut crc = self.crc_32.clone();
                crc.update(&prefix.0[..12]);
                crc.update(body);
                crc.finalize()
            }
            Version::Two => {
                let crc = crc32c::crc32c_append(self.crc_32c, &prefix.0);
                if body.is_empty() {
                    crc
                } else {
                    crc32c::crc32c_append(crc, body)
                }
            }
        };
        word | u64::from(crc) << 32
    }

    /// Returns the header word of a record that is done, in the current version.
    #[inline]
    pub fn word_of_done(&self, position: usize, words: usize, body: &mut Body) -> u64 {
        let word = word_without_crc(Version::Two, RecordState::Done, words);
        let crc = crc32c::crc32c_append(
            self.crc_32c,
            body.with_crc_prefix(&CrcPrefix::of(position, word), words),
        );
        word | u64::from(crc) << 32
    }
}

/// Returns a header word without its CRC.
fn word_without_crc(version: Version, state: RecordState, words: usize) -> u64 {
    let [a, b] = u16::try_from(words).unwrap_or(0).to_le_bytes();
    u64::from_le_bytes([a, b, state as u8, version as u8, 0, 0, 0, 0])
}

/// The bytes that the CRC covers before the body: the position, and the header word with zeros in place of the CRC.
/// Version 1 omits these zeros. Version 2 includes them, because whole words are processed faster. Aligned for the same
/// reason.
#[repr(align(8))]
struct CrcPrefix([u8; CRC_PREFIX]);

const CRC_PREFIX: usize = 2 * WORD;

impl CrcPrefix {
    fn of(position: usize, word: u64) -> Self {
        let mut prefix = [0; CRC_PREFIX];
        prefix[..WORD].copy_from_slice(&(position as u64).to_le_bytes());
        prefix[WORD..].copy_from_slice(&word.to_le_bytes());
        Self(prefix)
    }
}

impl fmt::Debug for HeaderWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeaderWords").finish_non_exhaustive()
    }
}

/// A decision on a known key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecisionRecord<'a> {
    pub tenant: TenantId,
    pub key: ApiKeyId,
    pub plan: PlanId,
    pub billing: Billing,
    pub at: UnixNanos,
    pub cost: u32,
    pub outcome: RecordedOutcome,
    /// `Retry-After` in seconds, or 0 if the response has no `Retry-After`.
    pub retry_after_secs: u32,
    /// At most [`ENDPOINT_MAX`] bytes.
    pub endpoint: &'a str,
    /// At most [`REQUEST_ID_MAX`] bytes.
    pub request_id: &'a str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordedOutcome {
    Allowed,
    /// The policy that denied the request. `None` if the shared counters were unavailable and no limit is known to have
    /// been reached.
    Denied(Option<Policy>),
}

impl RecordedOutcome {
    const fn code(self) -> u8 {
        match self {
            Self::Allowed => 0,
            Self::Denied(None) => 1,
            Self::Denied(Some(policy)) => 2 + policy as u8,
        }
    }

    fn of_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Allowed),
            1 => Some(Self::Denied(None)),
            _ => Policy::ALL
                .into_iter()
                .map(|policy| Self::Denied(Some(policy)))
                .find(|it| it.code() == code),
        }
    }
}

/// Returns the length, in words, of a record whose strings have these lengths in bytes.
pub(super) const fn words(endpoint: usize, request_id: usize) -> usize {
    FIXED_WORDS + (endpoint + request_id).div_ceil(WORD)
}

/// Returns `text`, truncated at a character boundary to at most `max` bytes.
pub(super) fn cut(text: &str, max: usize) -> &str {
    if text.len() <= max {
        return text;
    }
    let end = (0..=max).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

/// The body of a record (everything except its header word), preceded by space for a [`CrcPrefix`].
#[repr(align(8))]
pub(super) struct Body {
    /// The space makes it possible to calculate the CRC in one call. The body is padded with zeros.
    bytes: [u8; CRC_PREFIX + (RECORD_WORDS_MAX - 1) * WORD],
    len: usize,
}

impl Body {
    pub fn of(record: &DecisionRecord<'_>) -> Self {
        let (endpoint, request_id) = (record.endpoint.as_bytes(), record.request_id.as_bytes());
        let len = (words(endpoint.len(), request_id.len()) - 1) * WORD;
        let mut all = [0; CRC_PREFIX + (RECORD_WORDS_MAX - 1) * WORD];
        let bytes = &mut all[CRC_PREFIX..];
        bytes[..16].copy_from_slice(record.tenant.0.as_bytes());
        bytes[16..32].copy_from_slice(record.key.0.as_bytes());
        bytes[32..48].copy_from_slice(record.plan.0.as_bytes());
        bytes[48..56].copy_from_slice(&record.at.0.to_le_bytes());
        bytes[56..60].copy_from_slice(&record.cost.to_le_bytes());
        bytes[60] = record.outcome.code();
        bytes[61] = u8::from(record.billing == Billing::Paid);
        bytes[62] = u8::try_from(endpoint.len()).unwrap_or(0);
        bytes[63] = u8::try_from(request_id.len()).unwrap_or(0);
        bytes[64..68].copy_from_slice(&record.retry_after_secs.to_le_bytes());
        let texts = &mut bytes[TEXTS_AT..];
        texts[..endpoint.len()].copy_from_slice(endpoint);
        texts[endpoint.len()..][..request_id.len()].copy_from_slice(request_id);
        Self { bytes: all, len }
    }

    #[cfg(test)]
    fn bytes(&self) -> &[u8] {
        &self.bytes[CRC_PREFIX..][..self.len]
    }

    /// Returns the body of a record of `words` words, padded with zeros. Returns `None` if the body does not fit.
    pub fn padded(&self, words: usize) -> Option<&[u8]> {
        let len = words.checked_sub(1)? * WORD;
        (len >= self.len)
            .then(|| self.bytes[CRC_PREFIX..].get(..len))
            .flatten()
    }

    /// Writes the prefix before the body of a record of `words` words, and returns both.
    fn with_crc_prefix(&mut self, prefix: &CrcPrefix, words: usize) -> &[u8] {
        self.bytes[..CRC_PREFIX].copy_from_slice(&prefix.0);
        let len = CRC_PREFIX + words.saturating_sub(1) * WORD;
        &self.bytes[..len.min(self.bytes.len())]
    }
}

/// A record that was read from a segment. It borrows the segment's bytes.
pub(super) type RecordRead<'a> = UsageRecord<Cow<'a, str>>;

/// Parses the body of a record at `position`. Returns `None` if its format is unknown. PostgreSQL must accept every row
/// that is returned: a single rejected row would block all later records.
#[inline]
pub(super) fn read(segment: Uuid, position: usize, body: &[u8]) -> Option<RecordRead<'_>> {
    let uuid = |at: usize| Uuid::from_slice(body.get(at..at + 16)?).ok();
    let half = |at: usize| Some(u32::from_le_bytes(body.get(at..at + 4)?.try_into().ok()?));
    let [outcome, is_paid, endpoint, request_id] = *body.get(60..64)?.first_chunk()?;
    let (endpoint, texts) = body
        .get(TEXTS_AT..)?
        .split_at_checked(usize::from(endpoint))?;
    let request_id = texts.get(..usize::from(request_id))?;
    let outcome = RecordedOutcome::of_code(outcome)?;
    let was_rejected = outcome != RecordedOutcome::Allowed;
    let at = UnixNanos(u64::from_le_bytes(body.get(48..56)?.try_into().ok()?));
    let retry_after = i32::try_from(half(64)?).unwrap_or(i32::MAX);
    Some(UsageRecord {
        event_id: event_id(segment, position, at),
        tenant_id: uuid(0)?,
        key_id: uuid(16)?,
        plan_id: uuid(32)?,
        at: at.into(),
        billing: if is_paid == 0 { "free" } else { "paid" },
        endpoint: text(endpoint)?,
        was_rejected,
        policy: match outcome {
            RecordedOutcome::Denied(policy) => policy.map(Policy::name),
            RecordedOutcome::Allowed => None,
        },
        retry_after_seconds: (was_rejected && retry_after > 0).then_some(retry_after),
        cost: half(56)?.max(1).into(),
        request_id: text(request_id)?,
    })
}

/// Returns the text of a field, or `None` if the field is not valid UTF-8. NUL is replaced, because PostgreSQL's `text`
/// cannot contain NUL.
fn text(bytes: &[u8]) -> Option<Cow<'_, str>> {
    let text = std::str::from_utf8(bytes).ok()?;
    Some(if bytes.contains(&0) {
        Cow::Owned(text.replace('\0', "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    })
}

/// Returns the ID of a record: a UUIDv7 that contains the record's time. The other bits of the ID depend on where the
/// record was written, so that reading the record again yields the same ID.
fn event_id(segment: Uuid, position: usize, at: UnixNanos) -> Uuid {
    let (high, low) = segment.as_u64_pair();
    // No two positions in a segment have the same `rest`, and the ID of a segment contains at least 60 random bits.
    let rest = (high ^ low.rotate_left(17))
        .wrapping_add((position as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut bytes = [0; 10];
    let index = u16::try_from((position / WORD) & 0xfff).unwrap_or(0);
    bytes[..2].copy_from_slice(&index.to_be_bytes());
    bytes[2..].copy_from_slice(&rest.to_be_bytes());
    Builder::from_unix_timestamp_millis(at.0 / 1_000_000, &bytes).into_uuid()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_acceptable_to_the_database() {
        let id = Uuid::from_u128(1);
        let record = DecisionRecord {
            tenant: TenantId(id),
            key: ApiKeyId(id),
            plan: PlanId(id),
            billing: Billing::Free,
            at: UnixNanos(u64::MAX),
            cost: 0,
            outcome: RecordedOutcome::Denied(None),
            retry_after_secs: u32::MAX,
            endpoint: "GET /a\0b",
            request_id: "\0",
        };
        let body = Body::of(&record);
        let row = read(id, 64, body.bytes()).expect("a known format");
        assert_eq!((row.cost, row.retry_after_seconds), (1, Some(i32::MAX)));
        assert_eq!(row.endpoint, "GET /a\u{fffd}b");
        assert_eq!(row.request_id, "\u{fffd}");
        let allowed = DecisionRecord {
            outcome: RecordedOutcome::Allowed,
            ..record
        };
        let body = Body::of(&allowed);
        let row = read(id, 64, body.bytes()).expect("a known format");
        assert_eq!(row.retry_after_seconds, None);
        assert!(row.at < chrono::DateTime::<chrono::Utc>::MAX_UTC);
    }
}
