//! Signatures of deliveries according to the Standard Webhooks specification
//! (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>).

use std::fmt::Write as _;

use aws_lc_rs::hmac;
use base64::{Engine, engine::general_purpose::STANDARD};

/// The length of a secret in bytes. The specification allows 24 to 64.
pub const SECRET_LENGTH: usize = 32;

/// Returns a secret in the form shown to the tenant.
pub fn shown(secret: &[u8]) -> String {
    format!("whsec_{}", STANDARD.encode(secret))
}

/// Returns the value of `webhook-signature`, with one signature per secret.
///
/// `at` is the time of the attempt in seconds since the Unix epoch. It is sent as `webhook-timestamp`.
pub fn sign(secrets: &[Vec<u8>], event_id: &str, at: i64, payload: &str) -> String {
    let signed = format!("{event_id}.{at}.{payload}");
    let mut signatures = String::new();
    for secret in secrets {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let tag = hmac::sign(&key, signed.as_bytes());
        let space = if signatures.is_empty() { "" } else { " " };
        let _ = write!(signatures, "{space}v1,{}", STANDARD.encode(tag));
    }
    signatures
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example in the documentation of the specification's reference implementations.
    #[test]
    fn signature_is_that_of_the_reference_implementations() {
        let secret = STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        assert_eq!(shown(&secret), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        let (id, at) = ("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330);
        let expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
        let payload = r#"{"test": 2432232314}"#;
        assert_eq!(
            sign(std::slice::from_ref(&secret), id, at, payload),
            expected
        );
        let two = sign(&[vec![7; 32], secret], id, at, payload);
        let (other, same) = two.split_once(' ').unwrap();
        assert_eq!(same, expected);
        assert!(other.starts_with("v1,") && other != expected, "{other}");
    }
}
