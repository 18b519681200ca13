//! Encrypts stored secrets that Quota must be able to read again, such as the signing secrets of webhooks.
//!
//! Uses AES-256-GCM with a random nonce. The key is derived from the server's secret and from a secret in the database
//! ([`crate::auth::secret::Seals`]). If the operator has set `QUOTA_SECRET`, a dump of the database does not reveal the
//! secrets that have been stored or re-encrypted since. A context, such as a row's ID, is authenticated too: a
//! ciphertext that is copied to another row cannot be decrypted there.

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey},
    error::Unspecified,
};

/// The key in use, and other keys with which stored secrets may still be encrypted.
pub struct Encryption {
    current: RandomizedNonceKey,
    others: Vec<RandomizedNonceKey>,
}

impl std::fmt::Debug for Encryption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Encryption")
    }
}

/// A decrypted secret.
pub struct Decrypted {
    pub secret: Vec<u8>,
    /// Whether the secret was encrypted with the key in use. If not, the secret must be re-encrypted before the key
    /// that it was encrypted with is removed.
    pub is_current: bool,
}

fn key(bytes: &[u8; 32]) -> RandomizedNonceKey {
    RandomizedNonceKey::new(&AES_256_GCM, bytes).expect("a key of AES-256 has 32 bytes")
}

impl Encryption {
    pub fn new(current: &[u8; 32], others: &[[u8; 32]]) -> Self {
        Self {
            current: key(current),
            others: others.iter().map(key).collect(),
        }
    }

    /// Encrypts a secret. Returns the nonce, followed by the ciphertext and its tag.
    ///
    /// # Errors
    ///
    /// Fails if the operating system cannot provide random bytes.
    pub fn encrypt(&self, context: &[u8], secret: &[u8]) -> Result<Vec<u8>, Unspecified> {
        let mut text = secret.to_vec();
        let nonce = self
            .current
            .seal_in_place_append_tag(Aad::from(context), &mut text)?;
        Ok([nonce.as_ref().as_slice(), &text].concat())
    }

    /// Decrypts a secret. Returns `None` unless the secret was encrypted in this context with one of the keys.
    pub fn decrypt(&self, context: &[u8], stored: &[u8]) -> Option<Decrypted> {
        let (nonce, text) = stored.split_at_checked(NONCE_LEN)?;
        let open = |key: &RandomizedNonceKey| {
            let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
            let mut text = text.to_vec();
            let secret = key
                .open_in_place(nonce, Aad::from(context), &mut text)
                .ok()?;
            Some(secret.to_vec())
        };
        let decrypted = |secret, is_current| Decrypted { secret, is_current };
        open(&self.current)
            .map(|secret| decrypted(secret, true))
            .or_else(|| {
                let other = self.others.iter().find_map(open);
                other.map(|secret| decrypted(secret, false))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(by: &Encryption, context: &[u8], stored: &[u8]) -> Option<(Vec<u8>, bool)> {
        let decrypted = by.decrypt(context, stored);
        decrypted.map(|it| (it.secret, it.is_current))
    }

    #[test]
    fn a_secret_is_read_only_with_its_key_and_in_its_context() {
        let first = Encryption::new(&[1; 32], &[]);
        let stored = first.encrypt(b"row 1", b"secret").unwrap();
        assert!(!stored.windows(6).any(|part| part == b"secret"));
        assert_ne!(stored, first.encrypt(b"row 1", b"secret").unwrap());
        let second = Encryption::new(&[2; 32], &[[3; 32], [1; 32]]);
        let expected = |is_current| Some((b"secret".to_vec(), is_current));
        assert_eq!(secret(&first, b"row 1", &stored), expected(true));
        assert_eq!(secret(&second, b"row 1", &stored), expected(false));
        assert_eq!(secret(&first, b"row 2", &stored), None);
        let stranger = Encryption::new(&[2; 32], &[]);
        assert_eq!(secret(&stranger, b"row 1", &stored), None);
    }

    #[test]
    fn a_damaged_or_truncated_secret_is_not_read() {
        let it = Encryption::new(&[1; 32], &[]);
        let stored = it.encrypt(b"", b"secret").unwrap();
        for at in 0..stored.len() {
            let mut damaged = stored.clone();
            damaged[at] ^= 1;
            assert_eq!(secret(&it, b"", &damaged), None, "{at}");
            assert_eq!(secret(&it, b"", &stored[..at]), None, "{at}");
        }
    }
}
