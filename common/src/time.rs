use chrono::{DateTime, Datelike, SubsecRound, Timelike, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A timestamp in RFC 3339 format, in UTC with milliseconds, such as `2026-11-24T09:18:42.000Z`.
///
/// Parsing accepts any offset. Timestamps are truncated to milliseconds, so that converting them to JSON and back does
/// not change them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(DateTime<Utc>);

impl Timestamp {
    pub fn new(at: DateTime<Utc>) -> Self {
        Self(at.trunc_subsecs(3))
    }

    /// Returns `None` after the year 9999, the last year that RFC 3339 can represent.
    pub fn from_unix_secs(secs: u64) -> Option<Self> {
        let at = DateTime::from_timestamp(i64::try_from(secs).ok()?, 0)?;
        (at <= Self::latest()).then_some(Self(at))
    }

    fn latest() -> DateTime<Utc> {
        DateTime::from_timestamp(253_402_300_799, 0).expect("9999-12-31T23:59:59Z is a time")
    }

    pub fn inner(self) -> DateTime<Utc> {
        self.0
    }
}

impl From<DateTime<Utc>> for Timestamp {
    fn from(at: DateTime<Utc>) -> Self {
        Self::new(at)
    }
}

impl From<Timestamp> for DateTime<Utc> {
    fn from(at: Timestamp) -> Self {
        at.0
    }
}

impl Timestamp {
    /// Formats the timestamp without allocating memory, because most check results contain timestamps.
    pub fn text(self) -> [u8; 24] {
        let mut text = *b"0000-00-00T00:00:00.000Z";
        let mut write = |end: usize, digits: usize, mut number: u32| {
            for place in text[end - digits..end].iter_mut().rev() {
                *place = b'0' + u8::try_from(number % 10).unwrap_or_default();
                number /= 10;
            }
        };
        // Reading a field of a `DateTime` would apply its time zone every time.
        let at = self.0.naive_utc();
        // Four digits are enough: parsing and `from_unix_secs` reject later years, and all other times are close to the
        // present.
        write(4, 4, at.year().unsigned_abs());
        write(7, 2, at.month());
        write(10, 2, at.day());
        write(13, 2, at.hour());
        write(16, 2, at.minute());
        write(19, 2, at.second());
        write(23, 3, self.0.timestamp_subsec_millis());
        text
    }
}

impl std::fmt::Display for Timestamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(std::str::from_utf8(&self.text()).unwrap_or_default())
    }
}

impl std::str::FromStr for Timestamp {
    type Err = InvalidTimestamp;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let at = DateTime::parse_from_rfc3339(text)
            .map_err(|_| InvalidTimestamp)?
            .to_utc();
        // Rejects times before 1970, which the API does not need. Applying the offset can also move a time past the
        // year 9999, the last year that RFC 3339 can represent.
        if at < DateTime::UNIX_EPOCH || at > Timestamp::latest() {
            return Err(InvalidTimestamp);
        }
        Ok(Self::new(at))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("must be an RFC 3339 time between 1970 and 9999, such as 2026-11-24T09:18:42Z")]
pub struct InvalidTimestamp;

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(std::str::from_utf8(&self.text()).unwrap_or_default())
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(feature = "openapi")]
mod openapi {
    use std::borrow::Cow;

    use poem_openapi::{
        registry::{MetaSchema, MetaSchemaRef},
        types::{ParseError, ParseFromJSON, ParseFromParameter, ParseResult, ToJSON, Type},
    };
    use serde_json::Value;

    use super::Timestamp;

    impl Type for Timestamp {
        const IS_REQUIRED: bool = true;
        type RawValueType = Self;
        type RawElementValueType = Self;

        fn name() -> Cow<'static, str> {
            "string_date-time".into()
        }

        fn schema_ref() -> MetaSchemaRef {
            MetaSchemaRef::Inline(Box::new(MetaSchema {
                example: Some("2026-11-24T09:18:42.000Z".into()),
                ..MetaSchema::new_with_format("string", "date-time")
            }))
        }

        fn as_raw_value(&self) -> Option<&Self::RawValueType> {
            Some(self)
        }

        fn raw_element_iter<'a>(
            &'a self,
        ) -> Box<dyn Iterator<Item = &'a Self::RawElementValueType> + 'a> {
            Box::new(self.as_raw_value().into_iter())
        }
    }

    impl ParseFromJSON for Timestamp {
        fn parse_from_json(value: Option<Value>) -> ParseResult<Self> {
            match value {
                Some(Value::String(text)) => text.parse().map_err(ParseError::custom),
                other => Err(ParseError::expected_type(other.unwrap_or_default())),
            }
        }
    }

    impl ParseFromParameter for Timestamp {
        fn parse_from_parameter(value: &str) -> ParseResult<Self> {
            value.parse().map_err(ParseError::custom)
        }
    }

    impl ToJSON for Timestamp {
        fn to_json(&self) -> Option<Value> {
            Some(Value::String(self.to_string()))
        }
    }
}
