//! Verifies the signature of a webhook: <https://docs.stripe.com/webhooks/signature>.
//!
//! Verifies the bytes exactly as received. Accepts several secrets and several signatures: while a secret is being
//! rotated, both the old and the new secret are valid, and Stripe signs with both.

use std::time::Duration;

use aws_lc_rs::hmac;
use secrecy::{ExposeSecret, SecretString};

/// The maximum difference between the time of a signature and the current time, in either direction.
pub const TOLERANCE: Duration = Duration::from_secs(300);

/// The maximum number of signatures to check. Stripe never sends this many.
const SIGNATURES_MAX: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadSignature {
    #[error("The Stripe-Signature header is missing or malformed.")]
    Malformed,
    #[error("The Stripe-Signature header matches none of the webhook secrets.")]
    Wrong,
    #[error(
        "The timestamp in the Stripe-Signature header is more than 5 minutes old or in the future."
    )]
    Stale,
}

/// Verifies that the body was signed with one of the secrets, within [`TOLERANCE`] of `now`. `now` is in seconds since
/// the Unix epoch.
pub fn verify(
    body: &[u8],
    header: &str,
    secrets: &[SecretString],
    now: u64,
) -> Result<(), BadSignature> {
    let field = |name: &'static str| {
        header
            .split(',')
            .filter_map(move |part| part.trim().strip_prefix(name)?.strip_prefix('='))
    };
    let mut times = field("t");
    let (Some(time), None) = (times.next(), times.next()) else {
        return Err(BadSignature::Malformed);
    };
    let at: u64 = time.parse().map_err(|_| BadSignature::Malformed)?;
    let signatures: Vec<[u8; 32]> = field("v1")
        .take(SIGNATURES_MAX)
        .filter_map(from_hex)
        .collect();
    if signatures.is_empty() {
        return Err(BadSignature::Malformed);
    }
    let mut signed = Vec::with_capacity(time.len() + 1 + body.len());
    signed.extend_from_slice(time.as_bytes());
    signed.push(b'.');
    signed.extend_from_slice(body);
    let is_signed = secrets.iter().any(|secret| {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.expose_secret().as_bytes());
        // `verify` compares in constant time.
        signatures
            .iter()
            .any(|signature| hmac::verify(&key, &signed, signature).is_ok())
    });
    if !is_signed {
        return Err(BadSignature::Wrong);
    }
    if now.abs_diff(at) > TOLERANCE.as_secs() {
        return Err(BadSignature::Stale);
    }
    Ok(())
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let text = text.as_bytes();
    if text.len() != 64 {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, digits) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        let digit = |c: u8| {
            char::from(c)
                .to_digit(16)
                .and_then(|it| u8::try_from(it).ok())
        };
        *byte = digit(digits[0])? << 4 | digit(digits[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;
    const BODY: &[u8] = b"{\"id\":\"evt_1\"}";

    fn sign(secret: &str, at: u64, body: &[u8]) -> String {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        let tag = hmac::sign(&key, &[at.to_string().as_bytes(), b".", body].concat());
        let hex = |text: String, byte: &u8| text + &format!("{byte:02x}");
        tag.as_ref().iter().fold(String::new(), hex)
    }

    fn check(header: &str, body: &[u8], secrets: &[&str]) -> Result<(), BadSignature> {
        let secrets: Vec<_> = secrets.iter().map(|&it| SecretString::from(it)).collect();
        verify(body, header, &secrets, NOW)
    }

    /// The expected signature was computed with `openssl dgst -sha256 -hmac`, so that the test detects mistakes in this
    /// code.
    #[test]
    fn signature_of_another_program_is_accepted() {
        let known = "45705be2a45ab5acdd1395cc695e9e7073125385ec24194921c401dff44176f8";
        let header = format!("t={NOW},v1={known}");
        assert_eq!(check(&header, BODY, &["whsec_test"]), Ok(()));
        let changed = header.replace("v1=4", "v1=0");
        assert_eq!(
            check(&changed, BODY, &["whsec_test"]),
            Err(BadSignature::Wrong)
        );
    }

    #[test]
    fn one_valid_signature_of_one_secret_is_enough() {
        let good = sign("whsec_a", NOW, BODY);
        let other = sign("whsec_b", NOW, BODY);
        let header = format!("t={NOW},v1={good}");
        assert_eq!(check(&header, BODY, &["whsec_a"]), Ok(()));
        assert_eq!(check(&header, BODY, &["whsec_b", "whsec_a"]), Ok(()));
        let both = format!("t={NOW},v1={other},v1={good},v0={other}");
        assert_eq!(check(&both, BODY, &["whsec_a"]), Ok(()));
        assert_eq!(check(&header, BODY, &["whsec_b"]), Err(BadSignature::Wrong));
        assert_eq!(check(&header, BODY, &[]), Err(BadSignature::Wrong));
        assert_eq!(
            check(&header, b"{}", &["whsec_a"]),
            Err(BadSignature::Wrong)
        );
    }

    #[test]
    fn time_is_signed_and_must_be_recent() {
        for (at, expected) in [
            (NOW - 300, Ok(())),
            (NOW + 300, Ok(())),
            (NOW - 301, Err(BadSignature::Stale)),
            (NOW + 301, Err(BadSignature::Stale)),
        ] {
            let header = format!("t={at},v1={}", sign("whsec_a", at, BODY));
            assert_eq!(check(&header, BODY, &["whsec_a"]), expected, "{at}");
        }
        let moved = format!("t={NOW},v1={}", sign("whsec_a", NOW - 1000, BODY));
        assert_eq!(check(&moved, BODY, &["whsec_a"]), Err(BadSignature::Wrong));
    }

    #[test]
    fn malformed_headers_are_rejected() {
        let good = sign("whsec_a", NOW, BODY);
        for header in [
            String::new(),
            format!("v1={good}"),
            format!("t={NOW}"),
            format!("t={NOW},v1="),
            format!("t={NOW},v1={}", &good[1..]),
            format!("t={NOW},v1={good}0"),
            format!("t={NOW},v1={}", "g".repeat(64)),
            format!("t={NOW},v0={good}"),
            format!("t={NOW},t={NOW},v1={good}"),
            format!("t=-1,v1={good}"),
            format!("t=99999999999999999999,v1={good}"),
            "\u{1F600}".to_owned(),
        ] {
            let result = check(&header, BODY, &["whsec_a"]);
            assert_eq!(result, Err(BadSignature::Malformed), "{header}");
        }
    }
}
