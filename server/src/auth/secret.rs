//! The keys that everything signed follows from: one secret of the operator's, or one that is kept in the
//! database. Each use has a key of its own (HKDF-SHA-256), so that none tells of another.

use aws_lc_rs::{hkdf, hmac};

/// Bytes for one use.
fn derive(master: &[u8], purpose: &str) -> [u8; 32] {
    struct Length;
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            32
        }
    }
    let mut key = [0; 32];
    let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, b"quota");
    let info = [purpose.as_bytes()];
    salt.extract(master)
        .expand(&info, Length)
        .and_then(|okm| okm.fill(&mut key))
        .expect("HKDF gives up to 255 blocks, and this is one");
    key
}

/// See the module.
pub struct Secrets {
    /// The seed of the Ed25519 key that signs access tokens.
    pub signing_seed: [u8; 32],
    /// What records that replicas share are sealed with.
    pub record_seal: [u8; 32],
    refresh: hmac::Key,
    csrf: hmac::Key,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secrets")
    }
}

impl Secrets {
    pub fn new(master: &[u8]) -> Self {
        Self {
            signing_seed: derive(master, "access token signature"),
            record_seal: derive(master, "shared record seal"),
            refresh: hmac::Key::new(
                hmac::HMAC_SHA256,
                &derive(master, "refresh token successor"),
            ),
            csrf: hmac::Key::new(hmac::HMAC_SHA256, &derive(master, "browser session csrf")),
        }
    }

    /// What a refresh token is followed by. It follows from the token, so that of two callers with the same one
    /// both get the same, and from the secret, so that nobody else can tell it.
    pub fn successor(&self, token: &[u8]) -> [u8; 32] {
        let tag = hmac::sign(&self.refresh, token);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(tag.as_ref());
        bytes
    }

    /// What a page has to show to change something with the cookies of this session.
    pub fn csrf(&self, session: &[u8]) -> Vec<u8> {
        hmac::sign(&self.csrf, session).as_ref().to_vec()
    }

    /// Compared in constant time.
    pub fn is_csrf(&self, session: &[u8], tag: &[u8]) -> bool {
        hmac::verify(&self.csrf, session, tag).is_ok()
    }
}
