//! The messages of Envoy's rate limit service.
//!
//! The messages are defined in `envoy/service/ratelimit/v3/rls.proto` and in the files that it imports. Fields that
//! Quota does not use are omitted here, and are skipped when a message is decoded.

use prost::{Enumeration, Message};

/// `envoy.service.ratelimit.v3.RateLimitRequest`
#[derive(Clone, PartialEq, Message)]
pub struct RateLimitRequest {
    #[prost(message, repeated, tag = "2")]
    pub descriptors: Vec<Descriptor>,
    /// The cost of the request. 0 means 1.
    #[prost(uint32, tag = "3")]
    pub hits_addend: u32,
}

/// `envoy.extensions.common.ratelimit.v3.RateLimitDescriptor`
#[derive(Clone, PartialEq, Message)]
pub struct Descriptor {
    #[prost(message, repeated, tag = "1")]
    pub entries: Vec<Entry>,
    /// Overrides the cost in the request.
    #[prost(message, optional, tag = "3")]
    pub hits_addend: Option<u64>,
    /// Whether to give tokens back instead of consuming them.
    #[prost(bool, tag = "4")]
    pub is_negative_hits: bool,
}

/// `envoy.extensions.common.ratelimit.v3.RateLimitDescriptor.Entry`
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct Entry {
    #[prost(string, tag = "1")]
    pub key: String,
    /// A string, according to the protocol. However, Envoy copies header values into this field, and header values may
    /// contain any bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The value may be an API key.
        f.debug_struct("Entry")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

/// `envoy.service.ratelimit.v3.RateLimitResponse`
#[derive(Clone, PartialEq, Message)]
pub struct RateLimitResponse {
    #[prost(enumeration = "Code", tag = "1")]
    pub overall_code: i32,
    /// One status for each descriptor, in the same order, unless the request was rejected as a whole.
    #[prost(message, repeated, tag = "2")]
    pub statuses: Vec<DescriptorStatus>,
    #[prost(message, repeated, tag = "3")]
    pub response_headers_to_add: Vec<HeaderValue>,
    /// The body of the response to the consumer, if the request is not allowed.
    #[prost(bytes = "vec", tag = "5")]
    pub raw_body: Vec<u8>,
    #[prost(message, optional, tag = "6")]
    pub dynamic_metadata: Option<Struct>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Enumeration)]
#[repr(i32)]
pub enum Code {
    Unknown = 0,
    Ok = 1,
    OverLimit = 2,
}

/// `envoy.service.ratelimit.v3.RateLimitResponse.DescriptorStatus`
#[derive(Clone, PartialEq, Message)]
pub struct DescriptorStatus {
    #[prost(enumeration = "Code", tag = "1")]
    pub code: i32,
    #[prost(message, optional, tag = "2")]
    pub current_limit: Option<RateLimit>,
    #[prost(uint32, tag = "3")]
    pub limit_remaining: u32,
    #[prost(message, optional, tag = "4")]
    pub duration_until_reset: Option<Duration>,
}

/// `envoy.service.ratelimit.v3.RateLimitResponse.RateLimit`
#[derive(Clone, PartialEq, Message)]
pub struct RateLimit {
    #[prost(uint32, tag = "1")]
    pub requests_per_unit: u32,
    #[prost(enumeration = "Unit", tag = "2")]
    pub unit: i32,
    #[prost(string, tag = "3")]
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Enumeration)]
#[repr(i32)]
pub enum Unit {
    Unknown = 0,
    Minute = 2,
    Day = 4,
    Month = 5,
}

/// `google.protobuf.Duration`
#[derive(Clone, PartialEq, Message)]
pub struct Duration {
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

/// `envoy.config.core.v3.HeaderValue`
#[derive(Clone, PartialEq, Message)]
pub struct HeaderValue {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

/// `google.protobuf.Struct`. Its map is encoded as a list of entries.
#[derive(Clone, PartialEq, Message)]
pub struct Struct {
    #[prost(message, repeated, tag = "1")]
    pub fields: Vec<Field>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Field {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(message, optional, tag = "2")]
    pub value: Option<Value>,
}

/// `google.protobuf.Value`. Quota sends only strings.
#[derive(Clone, PartialEq, Message)]
pub struct Value {
    #[prost(string, tag = "3")]
    pub string_value: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Encodes a length-delimited field: a string, bytes or a message.
    fn field(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = u8::try_from(content.len()).expect("a short field");
        assert!(length < 128, "the length is a single byte");
        [&[tag << 3 | 2, length], content].concat()
    }

    #[test]
    fn request_has_the_field_numbers_of_the_protocol() {
        let entry = [field(1, b"api_key"), field(2, b"qk_1")].concat();
        let descriptor = [
            field(1, &entry),
            // A limit override of 5 per minute, which Quota ignores.
            field(2, &[0x08, 5, 0x10, 2]),
            field(3, &[0x08, 9]),
            vec![0x20, 1],
        ];
        let request = [
            field(1, b"quota"),
            field(2, &descriptor.concat()),
            vec![0x18, 3],
        ];
        let request = RateLimitRequest::decode(&*request.concat()).unwrap();
        assert_eq!(request.hits_addend, 3);
        let [descriptor] = &request.descriptors[..] else {
            panic!("{request:?}")
        };
        assert_eq!(descriptor.hits_addend, Some(9));
        assert!(descriptor.is_negative_hits);
        assert_eq!(descriptor.entries[0].key, "api_key");
        assert_eq!(descriptor.entries[0].value, b"qk_1");
        assert!(!format!("{request:?}").contains("qk_1"));
    }

    #[test]
    fn response_has_the_field_numbers_of_the_protocol() {
        let response = RateLimitResponse {
            overall_code: Code::OverLimit.into(),
            statuses: vec![DescriptorStatus {
                code: Code::OverLimit.into(),
                current_limit: Some(RateLimit {
                    requests_per_unit: 60,
                    unit: Unit::Minute.into(),
                    name: "rpm".into(),
                }),
                limit_remaining: 7,
                duration_until_reset: Some(Duration {
                    seconds: 3,
                    nanos: 5,
                }),
            }],
            response_headers_to_add: vec![HeaderValue {
                key: "a".into(),
                value: "b".into(),
            }],
            raw_body: b"body".to_vec(),
            dynamic_metadata: Some(Struct {
                fields: vec![Field {
                    key: "decision".into(),
                    value: Some(Value {
                        string_value: "limited".into(),
                    }),
                }],
            }),
        };
        let limit = [vec![0x08, 60, 0x10, 2], field(3, b"rpm")].concat();
        let status = [
            vec![0x08, 2],
            field(2, &limit),
            vec![0x18, 7],
            field(4, &[0x08, 3, 0x10, 5]),
        ];
        let decision = [field(1, b"decision"), field(2, &field(3, b"limited"))].concat();
        let expected = [
            vec![0x08, 2],
            field(2, &status.concat()),
            field(3, &[field(1, b"a"), field(2, b"b")].concat()),
            field(5, b"body"),
            field(6, &field(1, &decision)),
        ];
        assert_eq!(response.encode_to_vec(), expected.concat());
    }
}
