//! The bounds of request fields, and the [`garde`] rules that [`field`](crate::field) uses to check them.
//!
//! The server rejects requests that violate a rule. The console shows the same errors before it sends a request.

#![expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that garde's custom rules have"
)]

use crate::number::grouped;

/// Maximum length of the names of plans, keys, service tokens, webhooks, users, and tenants, in characters.
pub const NAME_MAX: usize = 200;
/// Maximum rate in requests per minute.
pub const RPM_MAX: u32 = 60_000_000;
/// Maximum burst in requests.
pub const BURST_MAX: u32 = RPM_MAX;
/// Maximum time that an empty bucket may take to refill, in minutes: 31 days. Therefore, the burst is at most this many
/// times the rate per minute.
pub const FILL_MINUTES_MAX: u32 = 31 * 24 * 60;
/// Maximum daily or monthly quota: the largest integer in an HTTP structured field (RFC 9651).
pub const QUOTA_MAX: u64 = 999_999_999_999_999;
pub const COST_MAX: u32 = 1_000_000;
/// Maximum grace period of a rotated secret in seconds: 30 days.
pub const GRACE_MAX: u32 = 30 * 24 * 60 * 60;
/// Default grace period of a rotated secret in seconds: 24 hours.
pub const GRACE_DEFAULT: u32 = 24 * 60 * 60;
/// The permitted length of a password in bytes, both as sent and after NFC normalization.
pub const PASSWORD_BYTES: std::ops::RangeInclusive<usize> = 12..=256;
/// Maximum length of a password, token, or API key in a request, in characters. Longer values are rejected without
/// being verified.
pub const CREDENTIAL_MAX: usize = 256;
/// Maximum length of a device token in characters.
pub const DEVICE_TOKEN_MAX: usize = 512;
/// Maximum length of an email address in characters. RFC 5321 4.5.3.1.3 has the same limit in octets, not counting the
/// angle brackets.
pub const EMAIL_MAX: usize = 254;
/// Maximum length of a time zone's name in characters.
pub const TIME_ZONE_MAX: usize = 64;
/// Maximum length of an endpoint in characters.
pub const ENDPOINT_MAX: usize = 128;
/// Maximum length of an external ID in characters.
pub const EXTERNAL_ID_MAX: usize = 200;
/// Maximum number of metadata entries of an API key.
pub const METADATA_ENTRIES_MAX: usize = 20;
/// Maximum length of the name of a metadata entry in characters.
pub const METADATA_NAME_MAX: usize = 40;
/// Maximum length of the value of a metadata entry in characters.
pub const METADATA_VALUE_MAX: usize = 100;

/// Maximum length of a webhook's URL in characters.
pub const WEBHOOK_URL_MAX: usize = 2000;

/// Requires 1 to 200 characters, including at least one that is not whitespace. Rejects control characters.
///
/// PostgreSQL text cannot contain NUL, and other control characters could garble log lines and terminals.
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

/// Requires at most 254 characters, exactly one `@` after 1 to 64 characters, a domain without empty labels, and no
/// whitespace or control characters. Does not check whether the address exists.
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

/// Requires 12 to 256 bytes. The server also checks the length after NFC normalization, and whether the password is too
/// easy to guess.
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

/// Requires 1 to 254 characters, none of them NUL, which PostgreSQL text cannot contain.
pub(crate) fn login_email(value: &str, context: &()) -> garde::Result {
    characters(EMAIL_MAX)(value, context)?;
    if value.contains('\0') {
        Err(garde::Error::new("must not contain NUL characters"))
    } else {
        Ok(())
    }
}

/// Requires 1 to 128 characters, none of them control characters.
pub(crate) fn endpoint(value: &str, _: &()) -> garde::Result {
    printable(value, ENDPOINT_MAX)
}

/// Requires 1 to 200 characters, none of them control characters.
pub(crate) fn external_id(value: &str, _: &()) -> garde::Result {
    printable(value, EXTERNAL_ID_MAX)
}

/// Requires an `http` or `https` URL of at most 2,000 visible ASCII characters. The server also checks the host and
/// whether the scheme is allowed.
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

/// Requires 1 to `max` characters, none of them control characters.
fn printable(value: &str, max: usize) -> garde::Result {
    if value.is_empty() || value.chars().count() > max {
        return Err(garde::Error::new(format!("must be 1–{max} characters")));
    }
    if value.chars().any(char::is_control) {
        return Err(garde::Error::new("must not contain control characters"));
    }
    Ok(())
}

/// Requires at most 20 entries. A name must have 1 to 40 characters, all of them ASCII letters, digits, or `_-.`; a
/// value must have at most 100 characters, none of them control characters.
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
