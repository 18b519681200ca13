//! The format of secrets: a prefix for the kind, such as `qk_`, 32 random base62 characters (190 bits) and a
//! 6-character checksum. Secret scanners can match `q[ksr]_[0-9A-Za-z]{38}` and verify the checksum.

use std::{cell::RefCell, fmt};

use aws_lc_rs::{constant_time, digest};

const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const RANDOM: usize = 32;
const CHECKSUM: usize = 6;
const LENGTH: usize = 3 + RANDOM + CHECKSUM;
/// The length of the part that is stored and shown to identify a secret. It contains 8 of the random characters, so 142
/// random bits remain secret.
const PREFIX: usize = 3 + 8;

/// The purpose of a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An API consumer's key.
    ApiKey,
    /// A service token for a tenant's gateway or middleware.
    ServiceToken,
    /// A refresh token of a session.
    Refresh,
}

impl Kind {
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::ApiKey => "qk_",
            Self::ServiceToken => "qs_",
            Self::Refresh => "qr_",
        }
    }
}

/// A secret's SHA-256 hash, which is stored and used for lookups.
pub type Hash = [u8; 32];

/// The part of a secret that may be stored and shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix([u8; PREFIX]);

impl Prefix {
    /// Returns the prefix with this text. Omits characters that are not visible ASCII, and characters beyond the length
    /// of a prefix. Such characters exist only if the database was edited by hand.
    pub fn of(text: &str) -> Self {
        let mut prefix = [0; PREFIX];
        let characters = text.bytes().filter(u8::is_ascii_graphic);
        for (byte, character) in prefix.iter_mut().zip(characters) {
            *byte = character;
        }
        Self(prefix)
    }

    /// Returns the prefix as ASCII bytes.
    pub fn as_bytes(&self) -> &[u8] {
        let length = self.0.iter().position(|byte| *byte == 0);
        &self.0[..length.unwrap_or(PREFIX)]
    }

    pub fn as_str(&self) -> &str {
        str::from_utf8(self.as_bytes()).expect("a prefix consists of ASCII characters")
    }
}

/// A secret with a valid format and checksum.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretText([u8; LENGTH]);

impl SecretText {
    /// Generates a secret with random numbers from the operating system.
    pub fn generate(kind: Kind) -> Result<Self, getrandom::Error> {
        let mut random = [0_u8; RANDOM];
        let mut filled = 0;
        while filled < RANDOM {
            let mut bytes = [0_u8; 2 * RANDOM];
            getrandom::fill(&mut bytes)?;
            // Bytes of 248 or more are skipped, because they would make some digits more likely than others.
            for byte in bytes
                .into_iter()
                .filter(|byte| *byte < 248)
                .take(RANDOM - filled)
            {
                random[filled] = DIGITS[usize::from(byte % 62)];
                filled += 1;
            }
        }
        Ok(Self::assemble(kind, &random))
    }

    /// Derives a secret from 32 unpredictable bytes. The digits 0 to 7 are more likely than the others, because 256 is
    /// not a multiple of 62. This lowers the min-entropy from 190.5 to 181.7 bits, which is still impossible to guess.
    /// The same bytes must give the same secret in every version of Quota: while replicas of two versions are running,
    /// both may derive the successor of the same refresh token.
    pub fn from_bytes(kind: Kind, bytes: &[u8; 32]) -> Self {
        Self::assemble(kind, &bytes.map(|byte| DIGITS[usize::from(byte) % 62]))
    }

    fn assemble(kind: Kind, random: &[u8; RANDOM]) -> Self {
        let mut text = [0; LENGTH];
        text[..3].copy_from_slice(kind.prefix().as_bytes());
        text[3..3 + RANDOM].copy_from_slice(random);
        let sum = checksum(&text[..3 + RANDOM]);
        text[3 + RANDOM..].copy_from_slice(&sum);
        Self(text)
    }

    /// Parses a secret. Returns `None` if its length, prefix, characters or checksum are wrong.
    pub fn parse(kind: Kind, text: &[u8]) -> Option<Self> {
        let text: &[u8; LENGTH] = text.try_into().ok()?;
        let (body, sum) = text.split_at(3 + RANDOM);
        let well_formed = body.starts_with(kind.prefix().as_bytes())
            && body[3..].iter().all(u8::is_ascii_alphanumeric)
            && checksum(body) == *sum;
        well_formed.then_some(Self(*text))
    }

    pub fn hash(&self) -> Hash {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, &self.0).as_ref());
        hash
    }

    /// Returns the secret as text, which must be shown only once.
    pub fn reveal(&self) -> String {
        self.0.iter().map(|byte| char::from(*byte)).collect()
    }

    /// Returns the part that may be stored and shown.
    pub fn prefix(&self) -> String {
        self.0[..PREFIX]
            .iter()
            .map(|byte| char::from(*byte))
            .collect()
    }
}

/// The maximum number of recent secrets whose hashes each thread keeps.
const KEPT: usize = 512;

thread_local! {
    /// Well-formed secrets that were sent recently, and their hashes. [`place`] returns a secret's index.
    static RECENT: RefCell<Vec<Option<(SecretText, Hash)>>> = const { RefCell::new(Vec::new()) };
}

/// Parses a secret that authenticates a request, and returns its hash. Returns `None` if the secret is malformed.
///
/// Each thread keeps recent secrets with their hashes, because most clients send the same secret with every request.
/// Secrets are compared in constant time, so the time that it takes does not help attackers guess a secret.
pub fn hash_of(kind: Kind, text: &[u8]) -> Option<Hash> {
    let text: &[u8; LENGTH] = text.try_into().ok()?;
    RECENT.with_borrow_mut(|recent| {
        recent.resize(KEPT, None);
        let place = &mut recent[place(text)];
        if let Some((secret, hash)) = place
            && is_equal(&secret.0, text)
        {
            return text.starts_with(kind.prefix().as_bytes()).then_some(*hash);
        }
        let secret = SecretText::parse(kind, text)?;
        let hash = secret.hash();
        *place = Some((secret, hash));
        Some(hash)
    })
}

/// Returns the index of a secret in [`RECENT`]. Depends only on characters that are not secret: see [`PREFIX`].
fn place(text: &[u8; LENGTH]) -> usize {
    let [.., a, b, c] = text[..PREFIX] else {
        return 0;
    };
    (usize::from(a) * 961 + usize::from(b) * 31 + usize::from(c)) % KEPT
}

/// Compares two secrets in constant time.
fn is_equal(one: &[u8; LENGTH], other: &[u8; LENGTH]) -> bool {
    constant_time::verify_slices_are_equal(one, other).is_ok()
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretText({}…)", self.prefix())
    }
}

/// Returns the CRC32 (IEEE) in base62, most significant digit first. 62^6 is greater than 2^32.
fn checksum(bytes: &[u8]) -> [u8; CHECKSUM] {
    let mut sum = crc32fast::hash(bytes);
    let mut digits = [0; CHECKSUM];
    for digit in digits.iter_mut().rev() {
        *digit = DIGITS[(sum % 62) as usize];
        sum /= 62;
    }
    digits
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn stored_prefix_is_kept() {
        for kind in [Kind::ApiKey, Kind::ServiceToken, Kind::Refresh] {
            let prefix = SecretText::generate(kind).unwrap().prefix();
            assert_eq!(Prefix::of(&prefix).as_str(), prefix);
        }
        assert_eq!(Prefix::of("").as_str(), "");
        assert_eq!(Prefix::of("qk_é1\0 2").as_str(), "qk_12");
        assert_eq!(Prefix::of("qk_0123456789").as_str(), "qk_01234567");
    }

    const KINDS: [Kind; 3] = [Kind::ApiKey, Kind::ServiceToken, Kind::Refresh];

    #[test]
    fn generated_secret_parses_only_as_its_own_kind() {
        for kind in KINDS {
            let text = SecretText::generate(kind).unwrap();
            let shown = text.reveal();
            assert_eq!(shown.len(), 41);
            assert_eq!(SecretText::parse(kind, shown.as_bytes()), Some(text));
            for other in KINDS.into_iter().filter(|other| *other != kind) {
                assert_eq!(SecretText::parse(other, shown.as_bytes()), None);
            }
        }
    }

    #[test]
    fn hash_does_not_depend_on_earlier_secrets() {
        // Some of these secrets have the same place, in particular each token and the key with the same characters.
        let secrets: Vec<_> = (0..600_u32)
            .flat_map(|n| {
                let mut bytes = [0; 32];
                bytes[4..8].copy_from_slice(&n.to_be_bytes());
                [Kind::ApiKey, Kind::ServiceToken]
                    .map(|kind| (kind, SecretText::from_bytes(kind, &bytes)))
            })
            .collect();
        let places: HashSet<_> = secrets.iter().map(|(_, it)| place(&it.0)).collect();
        let distinct: HashSet<_> = secrets.iter().map(|(_, it)| it.reveal()).collect();
        assert!((100..distinct.len()).contains(&places.len()));
        for index in (0..secrets.len()).chain([7, 7, 6, 7, 6, 6, 9, 6]) {
            let (kind, secret) = &secrets[index];
            let text = secret.reveal();
            let expected = digest::digest(&digest::SHA256, text.as_bytes());
            for _ in 0..2 {
                let hash = hash_of(*kind, text.as_bytes());
                assert_eq!(hash.unwrap(), expected.as_ref());
            }
            for other in KINDS.into_iter().filter(|it| it != kind) {
                assert_eq!(hash_of(other, text.as_bytes()), None);
            }
            for malformed in [&text[1..], &text[..40], ""] {
                assert_eq!(hash_of(*kind, malformed.as_bytes()), None);
            }
            for at in [3, 10, 11, 40] {
                let mut changed = text.clone().into_bytes();
                changed[at] = if changed[at] == b'z' { b'y' } else { b'z' };
                assert_eq!(hash_of(*kind, &changed), None);
            }
        }
    }

    #[test]
    fn derived_secret_is_the_same_in_every_version() {
        let mut bytes = [0, 61, 62, 123, 124, 185, 186, 247, 248, 255].to_vec();
        bytes.extend((0..22).map(|n| 11 * n));
        let secret = SecretText::from_bytes(Kind::Refresh, &bytes.try_into().unwrap());
        assert_eq!(secret.reveal(), "qr_0z0z0z0z070BMXit4FQbmx8JUfq1CNYj0yPiPM");
    }

    #[test]
    fn debug_output_does_not_reveal_the_secret() {
        let text = SecretText::generate(Kind::ApiKey).unwrap();
        assert!(!format!("{text:?}").contains(&text.reveal()[11..]));
    }

    proptest! {
        #[test]
        fn any_single_change_is_detected(bytes: [u8; 32], at in 0..LENGTH, to in 0..62_usize) {
            let text = SecretText::from_bytes(Kind::ApiKey, &bytes);
            let mut changed = text.reveal().into_bytes();
            prop_assume!(changed[at] != DIGITS[to]);
            changed[at] = DIGITS[to];
            prop_assert_eq!(SecretText::parse(Kind::ApiKey, &changed), None);
        }

        #[test]
        fn every_secret_round_trips(bytes: [u8; 32]) {
            let text = SecretText::from_bytes(Kind::Refresh, &bytes);
            prop_assert_eq!(SecretText::parse(Kind::Refresh, text.reveal().as_bytes()), Some(text));
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes: Vec<u8>) {
            prop_assert_eq!(SecretText::parse(Kind::ApiKey, &bytes), None);
        }
    }
}
