//! The bounds of fields, and the rules that [`field`](crate::field) uses to check them.
//!
//! The server uses them to reject requests, and the console to explain errors before sending.

#![expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that garde's custom rules have"
)]

use crate::number::grouped;

/// Maximum length of the name of a plan, key, service token, user or tenant, in characters.
pub const NAME_MAX: usize = 200;
/// Maximum rate, in requests per minute.
pub const RPM_MAX: u32 = 60_000_000;
/// Maximum burst, in requests.
pub const BURST_MAX: u32 = RPM_MAX;
/// Maximum daily or monthly quota: the largest integer that an RFC 9651 header field can carry.
pub const QUOTA_MAX: u64 = 999_999_999_999_999;
/// Maximum cost of a single request.
pub const COST_MAX: u32 = 1_000_000;
/// Maximum grace period of a rotation, in seconds: 30 days.
pub const GRACE_MAX: u32 = 30 * 24 * 60 * 60;
/// Default grace period of a rotation, in seconds: 24 hours.
pub const GRACE_DEFAULT: u32 = 24 * 60 * 60;
/// Minimum and maximum length of a password, in bytes of its NFC form.
pub const PASSWORD_BYTES: std::ops::RangeInclusive<usize> = 12..=256;
/// Maximum length of a password, token or API key that is processed, in characters.
pub const CREDENTIAL_MAX: usize = 256;
/// Maximum length of a device token, in characters.
pub const DEVICE_TOKEN_MAX: usize = 512;
/// Maximum length of an email address, in characters. RFC 5321 4.5.3.1.3 allows the same number of octets, without the
/// angle brackets.
pub const EMAIL_MAX: usize = 254;
/// Maximum length of the name of a time zone, in characters.
pub const TIME_ZONE_MAX: usize = 64;
/// Maximum length of an endpoint name, in characters.
pub const ENDPOINT_MAX: usize = 128;
/// Maximum length of the external ID of an API key, in characters.
pub const EXTERNAL_ID_MAX: usize = 200;
/// Maximum number of entries in the metadata of an API key.
pub const METADATA_ENTRIES_MAX: usize = 20;
/// Maximum length of the name of a metadata entry, in characters.
pub const METADATA_NAME_MAX: usize = 40;
/// Maximum length of the value of a metadata entry, in characters.
pub const METADATA_VALUE_MAX: usize = 100;

/// Maximum length of a webhook's URL, in characters.
pub const WEBHOOK_URL_MAX: usize = 2000;

/// Requires 1 to 200 characters, not all of which may be white space and none of which may be control characters.
///
/// PostgreSQL text cannot hold NUL, and other control characters would break a log line or a terminal.
pub(crate) fn name(value: &str, _: &()) -> garde::Result {
    let length = value.chars().count();
    if value.trim().is_empty() {
        return Err(garde::Error::new("must not be empty"));
    }
    if length > NAME_MAX {
        return Err(garde::Error::new(format!(
            "must be at most {NAME_MAX} characters, got {length}"
        )));
    }
    if value.chars().any(char::is_control) {
        return Err(garde::Error::new("must not contain control characters"));
    }
    Ok(())
}

/// Requires exactly one `@` with text on both sides, no white space or control characters, and at most 254
/// characters. Whether the address exists is not checked.
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

/// Requires 12 to 256 bytes as sent. The server checks whether the password is too easy to guess.
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
    move |value, ()| {
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

/// Requires 1 to `max` characters.
pub(crate) fn characters(max: usize) -> impl Fn(&str, &()) -> garde::Result {
    move |value, ()| {
        if value.is_empty() {
            Err(garde::Error::new("must not be empty"))
        } else if value.chars().count() > max {
            Err(garde::Error::new(format!(
                "must be at most {max} characters"
            )))
        } else {
            Ok(())
        }
    }
}

/// Requires 1 to 254 characters without NUL, which PostgreSQL text cannot hold.
pub(crate) fn login_email(value: &str, context: &()) -> garde::Result {
    characters(EMAIL_MAX)(value, context)?;
    if value.contains('\0') {
        Err(garde::Error::new("must not contain NUL characters"))
    } else {
        Ok(())
    }
}

/// Requires 1 to 128 characters that are not control characters.
pub(crate) fn endpoint(value: &str, _: &()) -> garde::Result {
    printable(value, ENDPOINT_MAX)
}

/// Requires 1 to 200 characters that are not control characters.
pub(crate) fn external_id(value: &str, _: &()) -> garde::Result {
    printable(value, EXTERNAL_ID_MAX)
}

/// Requires an `http` or `https` URL of at most 2,000 ASCII characters. The server checks the rest.
pub(crate) fn webhook_url(value: &str, _: &()) -> garde::Result {
    if value.len() > WEBHOOK_URL_MAX {
        return Err(garde::Error::new(format!(
            "must be at most {} characters",
            grouped(WEBHOOK_URL_MAX as u64)
        )));
    }
    let rest = value
        .strip_prefix("https://")
        .or_else(|| value.strip_prefix("http://"));
    if rest.is_some_and(|it| value.len() >= 9 && it.bytes().all(|byte| byte.is_ascii_graphic())) {
        Ok(())
    } else {
        Err(garde::Error::new("must be a URL that starts with https://"))
    }
}

/// Requires 1 to `max` characters that are not control characters.
fn printable(value: &str, max: usize) -> garde::Result {
    if value.is_empty() || value.chars().count() > max {
        return Err(garde::Error::new(format!("must be 1–{max} characters")));
    }
    if value.chars().any(char::is_control) {
        return Err(garde::Error::new("must not contain control characters"));
    }
    Ok(())
}

/// Requires at most 20 entries with names of 1 to 40 letters, digits and `_-.`, and values of at most 100 characters.
pub(crate) fn metadata(entries: &[(String, String)], _: &()) -> garde::Result {
    if entries.len() > METADATA_ENTRIES_MAX {
        return Err(garde::Error::new(format!(
            "must have at most {METADATA_ENTRIES_MAX} entries"
        )));
    }
    for (name, value) in entries {
        let is_name = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if !(1..=METADATA_NAME_MAX).contains(&name.len()) || !name.chars().all(is_name) {
            return Err(garde::Error::new(format!(
                "names must be 1–{METADATA_NAME_MAX} letters, digits, hyphens, underscores or periods"
            )));
        }
        if value.chars().count() > METADATA_VALUE_MAX || value.chars().any(char::is_control) {
            return Err(garde::Error::new(format!(
                "the value of {name} must be at most {METADATA_VALUE_MAX} characters, without control characters"
            )));
        }
    }
    Ok(())
}
