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

/// One `@`, something on both sides, no white space or control characters, at most 254 bytes. More than
/// that only a mail that arrives can tell.
pub(crate) fn email(value: &str, _: &()) -> garde::Result {
    if value.len() > EMAIL_MAX {
        return Err(garde::Error::new(format!(
            "must be at most {EMAIL_MAX} bytes"
        )));
    }
    let well_formed = value.rsplit_once('@').is_some_and(|(local, domain)| {
        !local.is_empty()
            && local.len() <= 64
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
            "must be {}–{} bytes",
            PASSWORD_BYTES.start(),
            PASSWORD_BYTES.end()
        )))
    }
}

/// Requires a number within `min..=max`.
pub(crate) fn between<N>(min: N, max: N) -> impl Fn(&N, &()) -> garde::Result
where
    N: Copy + PartialOrd + Into<u64>,
{
    move |value, _| {
        if *value < min {
            let min = grouped(min.into());
            Err(garde::Error::new(format!("must be at least {min}")))
        } else if *value > max {
            let max = grouped(max.into());
            Err(garde::Error::new(format!("must be at most {max}")))
        } else {
            Ok(())
        }
    }
}

/// Requires 1 to `max` bytes.
pub(crate) fn bytes(max: usize) -> impl Fn(&str, &()) -> garde::Result {
    move |value, _| {
        if value.is_empty() {
            Err(garde::Error::new("must not be empty"))
        } else if value.len() > max {
            Err(garde::Error::new(format!("must be at most {max} bytes")))
        } else {
            Ok(())
        }
    }
}

/// Formats a number with a comma between groups of three digits.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// PostgreSQL text cannot hold a NUL.
pub(crate) fn no_nul(value: &str, _: &()) -> garde::Result {
    if value.contains('\0') {
        Err(garde::Error::new("must not contain NUL characters"))
    } else {
        Ok(())
    }
}

/// 1 to 128 bytes without control characters.
pub(crate) fn endpoint(value: &str, _: &()) -> garde::Result {
    if value.is_empty() || value.len() > ENDPOINT_MAX {
        return Err(garde::Error::new(format!("must be 1–{ENDPOINT_MAX} bytes")));
    }
    if value.chars().any(char::is_control) {
        return Err(garde::Error::new("must not contain control characters"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{between, grouped};

    #[test]
    fn numbers_are_grouped_by_three() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1,000"),
            (60_000_000, "60,000,000"),
            (999_999_999_999_999, "999,999,999,999,999"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn out_of_range_number_is_rejected_with_the_bound() {
        let rule = between(1_u32, 60_000_000);
        let message = |value: u32| rule(&value, &()).map_err(|error| error.message().to_owned());
        assert_eq!(message(0), Err("must be at least 1".to_owned()));
        assert_eq!(
            message(60_000_001),
            Err("must be at most 60,000,000".to_owned())
        );
        assert_eq!((message(1), message(60_000_000)), (Ok(()), Ok(())));
    }
}
