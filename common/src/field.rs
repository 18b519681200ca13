//! Types for request fields with bounds. Each type has a validation rule and a schema.
//!
//! Deserialization checks only the JSON type. [`garde::Validate`] checks the bounds. Therefore, one response can report
//! all invalid fields of a body, and the console can hold values that the user is still typing.

#[cfg(feature = "openapi")]
use std::collections::BTreeMap;
use std::fmt;

use garde::Validate;
#[cfg(feature = "openapi")]
use poem_openapi::registry::MetaSchema;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{MapAccess, Visitor},
};

use crate::{
    bounds,
    json::{FromJson, Invalid, Json},
};

/// Implements poem-openapi's traits for a newtype. The schema is the inner type's schema with bounds.
macro_rules! schema {
    ($name:ident($inner:ty), $($bound:ident: $value:expr),+) => {
        #[cfg(feature = "openapi")]
        const _: () = {
            use std::borrow::Cow;

            use poem_openapi::{
                registry::{MetaSchema, MetaSchemaRef},
                types::{ParseError, ParseFromJSON, ParseResult, ToJSON, Type},
            };

            impl Type for $name {
                const IS_REQUIRED: bool = true;
                type RawValueType = Self;
                type RawElementValueType = Self;

                fn name() -> Cow<'static, str> {
                    <$inner as Type>::name()
                }

                fn schema_ref() -> MetaSchemaRef {
                    <$inner as Type>::schema_ref().merge(MetaSchema {
                        $($bound: Some($value),)+
                        ..MetaSchema::ANY
                    })
                }

                fn as_raw_value(&self) -> Option<&Self> {
                    Some(self)
                }

                fn raw_element_iter<'a>(&'a self) -> Box<dyn Iterator<Item = &'a Self> + 'a> {
                    Box::new(std::iter::once(self))
                }
            }

            impl ParseFromJSON for $name {
                fn parse_from_json(value: Option<serde_json::Value>) -> ParseResult<Self> {
                    <$inner>::parse_from_json(value)
                        .map(Self::from)
                        .map_err(ParseError::propagate)
                }
            }

            impl ToJSON for $name {
                fn to_json(&self) -> Option<serde_json::Value> {
                    <$inner>::from(self.clone()).to_json()
                }
            }
        };
    };
}

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident($inner:ty as $stored:ty) = $min:literal..=$max:expr;)+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Validate)]
        #[serde(transparent)]
        #[garde(transparent)]
        pub struct $name(#[garde(custom(bounds::between($min, $max)))] $inner);

        impl From<$inner> for $name {
            fn from(number: $inner) -> Self {
                Self(number)
            }
        }

        impl From<$name> for $inner {
            fn from(number: $name) -> Self {
                number.0
            }
        }

        /// Converts the number to the type of the PostgreSQL column. Every valid number fits.
        impl From<$name> for $stored {
            fn from(number: $name) -> Self {
                Self::try_from(number.0).unwrap_or(Self::MAX)
            }
        }

        schema!($name($inner), minimum: bound({ let min: $inner = $min; min }), maximum: bound($max));
    )+};
}

macro_rules! texts {
    ($($(#[$doc:meta])* $name:ident: $min:literal..=$max:expr, $rule:expr $(, $pattern:expr)?;)+) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize, Validate)]
        #[serde(transparent)]
        #[garde(transparent)]
        pub struct $name(#[garde(custom($rule))] String);

        impl std::ops::Deref for $name {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(text: $name) -> Self {
                text.0
            }
        }

        schema!($name(String), min_length: $min, max_length: $max $(, pattern: $pattern.to_owned())?);
    )+};
}

macro_rules! shown {
    ($($name:ident),+) => {$(
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    )+};
}

macro_rules! redacted {
    ($($name:ident),+) => {$(
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("[redacted]")
            }
        }
    )+};
}

/// Matches text that has at least one character that is not whitespace, and no control characters.
#[cfg(feature = "openapi")]
const NAME_PATTERN: &str = r"^[^\u0000-\u001F\u007F-\u009F]*[^\u0000-\u0020\u007F-\u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000][^\u0000-\u001F\u007F-\u009F]*$";
#[cfg(feature = "openapi")]
const EMAIL_PATTERN: &str = r"^[^@\u0000-\u0020\u007F-\u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000]{1,64}@[^@.\u0000-\u0020\u007F-\u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000]+(\.[^@.\u0000-\u0020\u007F-\u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000]+)*$";
#[cfg(feature = "openapi")]
const NO_NUL_PATTERN: &str = r"^[^\u0000]*$";
#[cfg(feature = "openapi")]
const PRINTABLE_PATTERN: &str = r"^[^\u0000-\u001F\u007F-\u009F]*$";
#[cfg(feature = "openapi")]
const WEBHOOK_URL_PATTERN: &str = r"^https?://[!-~]+$";

/// poem-openapi stores bounds as floating-point numbers.
#[cfg(feature = "openapi")]
fn bound(number: impl Into<u64>) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "every bound is below 2^53")]
    let bound = number.into() as f64;
    bound
}

numbers! {
    /// A rate in requests per minute.
    Rpm(u32 as i32) = 1..=bounds::RPM_MAX;
    /// The number of requests that are allowed immediately for an idle key.
    Burst(u32 as i32) = 1..=bounds::BURST_MAX;
    /// The number of requests allowed per day or month.
    Quota(u64 as i64) = 1..=bounds::QUOTA_MAX;
    /// The number of requests that a single request counts as.
    Cost(u32 as i32) = 1..=bounds::COST_MAX;
    /// The grace period of a rotation, in seconds.
    GraceSeconds(u32 as i32) = 0..=bounds::GRACE_MAX;
}

texts! {
    /// The name of a plan, key, service token, webhook, user, or tenant.
    Name: 1..=bounds::NAME_MAX, bounds::name, NAME_PATTERN;
    Email: 3..=bounds::EMAIL_MAX, bounds::email, EMAIL_PATTERN;
    /// The email address in a sign-in request. Apart from the length and NUL characters, nothing is checked, so that
    /// malformed and unknown addresses get the same response.
    LoginEmail: 1..=bounds::EMAIL_MAX, bounds::login_email, NO_NUL_PATTERN;
    /// A new password. The server also rejects passwords that are too easy to guess.
    NewPassword: 1..=*bounds::PASSWORD_BYTES.end(), bounds::password;
    /// A password, token, or API key exactly as sent. Validation checks only the length; the server verifies the
    /// credential separately.
    Credential: 1..=bounds::CREDENTIAL_MAX, bounds::characters(bounds::CREDENTIAL_MAX);
    /// A token that identifies a known device at sign-in. Validation checks only the length; the server verifies the
    /// token separately.
    DeviceToken: 1..=bounds::DEVICE_TOKEN_MAX, bounds::characters(bounds::DEVICE_TOKEN_MAX);
    /// The name of a time zone. The server checks whether the IANA database contains it.
    TimeZoneName: 1..=bounds::TIME_ZONE_MAX, bounds::characters(bounds::TIME_ZONE_MAX);
    /// An endpoint of the tenant's API, such as `GET /orders`.
    Endpoint: 1..=bounds::ENDPOINT_MAX, bounds::endpoint, PRINTABLE_PATTERN;
    /// An API key's identifier in the tenant's own system, such as a customer ID.
    ExternalId: 1..=bounds::EXTERNAL_ID_MAX, bounds::external_id, PRINTABLE_PATTERN;
    /// A webhook's URL. The server also checks the host and whether the scheme is allowed.
    WebhookUrl: 9..=bounds::WEBHOOK_URL_MAX, bounds::webhook_url, WEBHOOK_URL_PATTERN;
}

shown!(
    Name,
    Email,
    LoginEmail,
    TimeZoneName,
    Endpoint,
    ExternalId,
    WebhookUrl
);
redacted!(NewPassword, Credential, DeviceToken);

/// Custom name–value pairs of an API key. Quota stores these pairs but does not interpret them.
///
/// The pairs are kept in a list, because a map would make the console's download larger.
#[derive(Debug, Clone, Default, PartialEq, Eq, Validate)]
#[garde(transparent)]
pub struct Metadata(#[garde(custom(bounds::metadata))] Vec<(String, String)>);

impl std::ops::Deref for Metadata {
    type Target = [(String, String)];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl FromIterator<(String, String)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(entries: I) -> Self {
        Self(entries.into_iter().collect())
    }
}

impl Serialize for Metadata {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter().map(|(name, value)| (name, value)))
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Metadata(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

impl FromJson for Metadata {
    fn from_json(json: Json) -> Result<Self, Invalid> {
        match json {
            // Earlier versions of the server do not send this field.
            Json::Null => Ok(Self::default()),
            json => json.entries().map(Self),
        }
    }
}

#[cfg(feature = "openapi")]
impl From<BTreeMap<String, String>> for Metadata {
    fn from(entries: BTreeMap<String, String>) -> Self {
        entries.into_iter().collect()
    }
}

#[cfg(feature = "openapi")]
impl From<Metadata> for BTreeMap<String, String> {
    fn from(metadata: Metadata) -> Self {
        metadata.0.into_iter().collect()
    }
}

#[cfg(feature = "openapi")]
fn metadata_value() -> MetaSchema {
    MetaSchema {
        max_length: Some(bounds::METADATA_VALUE_MAX),
        pattern: Some(PRINTABLE_PATTERN.to_owned()),
        ..MetaSchema::new("string")
    }
}

schema!(
    Metadata(BTreeMap<String, String>),
    max_properties: bounds::METADATA_ENTRIES_MAX,
    additional_properties: Box::new(MetaSchemaRef::Inline(Box::new(metadata_value())))
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounds::{QUOTA_MAX, RPM_MAX};

    fn fault<T: Validate<Context = ()>>(field: &T) -> Option<String> {
        let report = field.validate().err()?;
        let (path, error) = report.into_inner().into_iter().next().expect("an error");
        assert_eq!(path.to_string(), "", "the field itself is at fault");
        Some(error.message().to_owned())
    }

    #[test]
    fn number_out_of_bounds_is_rejected_with_the_bound() {
        assert_eq!(fault(&Rpm::from(0)), Some("must be at least 1".to_owned()));
        assert_eq!(
            fault(&Rpm::from(60_000_001)),
            Some("must be at most 60,000,000".to_owned())
        );
        assert_eq!(
            fault(&Quota::from(1_000_000_000_000_000)),
            Some("must be at most 999,999,999,999,999".to_owned())
        );
        assert_eq!(fault(&Rpm::from(1)), None);
        assert_eq!(fault(&Rpm::from(60_000_000)), None);
        assert_eq!(fault(&GraceSeconds::from(0)), None);
    }

    #[test]
    fn every_valid_number_fits_its_column() {
        assert_eq!(i32::from(Rpm::from(RPM_MAX)).unsigned_abs(), RPM_MAX);
        assert_eq!(i64::from(Quota::from(QUOTA_MAX)).unsigned_abs(), QUOTA_MAX);
    }

    #[test]
    fn metadata_out_of_bounds_is_rejected_with_the_bound() {
        let entries = |count: usize, name: &str, value: &str| {
            let entries = (0..count).map(|i| (format!("{name}{i}"), value.to_owned()));
            entries.collect::<Metadata>()
        };
        let longest_value = "é".repeat(100);
        assert_eq!(fault(&entries(20, &"n".repeat(38), &longest_value)), None);
        assert_eq!(fault(&entries(1, "Crm.id-2_", "")), None);
        let names = "names must be 1–40 letters, digits, hyphens, underscores or periods";
        let value = "the value of name0 must be at most 100 characters, without control characters";
        for (metadata, fault_text) in [
            (entries(21, "name", ""), "must have at most 20 entries"),
            (entries(1, &"n".repeat(40), ""), names),
            (entries(1, "a=", ""), names),
            (entries(1, "ü", ""), names),
            (entries(1, "name", &"v".repeat(101)), value),
            (entries(1, "name", "a\nb"), value),
        ] {
            assert_eq!(fault(&metadata).as_deref(), Some(fault_text));
        }
    }

    #[test]
    fn credential_is_not_written_to_logs() {
        let debug = format!(
            "{:?} {:?}",
            Credential::from("qk_secret"),
            NewPassword::from("violet-harbour")
        );
        assert_eq!(debug, "[redacted] [redacted]");
    }
}
