//! The bounds of fields that a range cannot say, as rules for [`garde`].
//!
//! One place, so that the console explains before sending just what the server would refuse.

#![expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that garde's custom rules have"
)]

use crate::{
    auth::{EMAIL_MAX, PASSWORD_BYTES},
    limit::ENDPOINT_MAX,
    plan::NAME_MAX,
};

/// The rule of every name: 1 to 200 characters, not only white space, no control characters.
///
/// NUL cannot be stored in PostgreSQL text, and the others would break a log line or a terminal.
pub(crate) fn name(value: &str, _: &()) -> garde::Result {
    let length = value.chars().count();
    if value.trim().is_empty() {
        return Err(garde::Error::new("must not be empty"));
    }
    if length > NAME_MAX {
        return Err(garde::Error::new(format!(
            "must be at most {NAME_MAX} characters, is {length}"
        )));
    }
    if value.chars().any(char::is_control) {
        return Err(garde::Error::new("must not contain control characters"));
    }
    Ok(())
}

/// One `@`, something on both sides, no white space or control characters, at most 254 characters. Anything else is
/// shown only by a mail that arrives.
pub(crate) fn email(value: &str, _: &()) -> garde::Result {
    if value.chars().count() > EMAIL_MAX {
        return Err(garde::Error::new(format!(
            "must be at most {EMAIL_MAX} characters"
        )));
    }
    let well_formed = value.rsplit_once('@').is_some_and(|(local, domain)| {
        !local.is_empty()
            && local.chars().count() <= 64
            && !domain.is_empty()
            && !domain.starts_with('.')
            && !domain.ends_with('.')
            && !domain.contains("..")
    }) && value.matches('@').count() == 1
        && !value.chars().any(|c| c.is_whitespace() || c.is_control());
    if well_formed {
        Ok(())
    } else {
        Err(garde::Error::new("must be an email address"))
    }
}

/// The length in bytes as sent; whether it can be guessed is judged by the server, which knows the rest.
pub(crate) fn password(value: &str, _: &()) -> garde::Result {
    if PASSWORD_BYTES.contains(&value.len()) {
        Ok(())
    } else {
        Err(garde::Error::new(format!(
            "must be {} to {} bytes long",
            PASSWORD_BYTES.start(),
            PASSWORD_BYTES.end()
        )))
    }
}

/// PostgreSQL text cannot hold a NUL.
pub(crate) fn no_nul(value: &str, _: &()) -> garde::Result {
    if value.contains('\0') {
        Err(garde::Error::new("must not contain NUL"))
    } else {
        Ok(())
    }
}

/// 1 to 128 characters without control characters.
pub(crate) fn endpoint(value: &str, _: &()) -> garde::Result {
    if value.is_empty() || value.chars().count() > ENDPOINT_MAX {
        return Err(garde::Error::new(format!(
            "must be 1 to {ENDPOINT_MAX} characters long"
        )));
    }
    if value.chars().any(char::is_control) {
        return Err(garde::Error::new("must not contain control characters"));
    }
    Ok(())
}
