//! Reads the API key and the route of a request.

use http::{HeaderMap, HeaderName, header, request::Parts};

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const KEY_PREFIX: &str = "qk_";
/// The maximum length of a key. Quota rejects check requests with longer keys.
const MAX_KEY: usize = 256;
/// The maximum length of an endpoint. Quota rejects checks with longer endpoints.
const MAX_ENDPOINT: usize = 128;

/// Returns the API key from `X-API-Key` or `Authorization: Bearer qk_…`. Other credentials in `Authorization` belong to
/// the service.
///
/// Returns `None` if there are different keys or several values of either header, because the service could read a key
/// that was not checked.
pub(crate) fn api_key(headers: &HeaderMap) -> Option<String> {
    let bearer = match sent(headers, &header::AUTHORIZATION) {
        Sent::Several => return None,
        Sent::Once(value) => value
            .split_once(' ')
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, credential)| credential.trim())
            .filter(|credential| credential.starts_with(KEY_PREFIX)),
        Sent::Never => None,
    };
    let key = match (sent(headers, &API_KEY), bearer) {
        (Sent::Several, _) => return None,
        (Sent::Once(key), Some(bearer)) if key != bearer => return None,
        (Sent::Once(key), _) => key,
        (Sent::Never, bearer) => bearer?,
    };
    Some(key.to_owned())
}

/// Returns the value of a header that was sent exactly once.
pub(crate) fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    match sent(headers, name) {
        Sent::Once(value) => Some(value),
        Sent::Never | Sent::Several => None,
    }
}

enum Sent<'a> {
    Never,
    /// Empty if the value is not ASCII.
    Once(&'a str),
    Several,
}

fn sent<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Sent<'a> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Sent::Never,
        (Some(value), None) => Sent::Once(value.to_str().unwrap_or_default()),
        (Some(_), Some(_)) => Sent::Several,
    }
}

/// Returns whether Quota accepts this string in a check. If not, the string cannot be a key.
pub(crate) fn may_be_key(key: &str) -> bool {
    (1..=MAX_KEY).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Returns an endpoint without control characters, truncated to the length that Quota accepts. Returns `None` if
/// nothing is left.
pub(crate) fn endpoint(name: &str) -> Option<String> {
    let name: String = name
        .chars()
        .filter(|it| !it.is_control())
        .take(MAX_ENDPOINT)
        .collect();
    (!name.is_empty()).then_some(name)
}

#[cfg(feature = "axum")]
pub(crate) fn matched_route(parts: &Parts) -> Option<String> {
    let route = parts.extensions.get::<axum::extract::MatchedPath>()?;
    Some(format!("{} {}", parts.method, route.as_str()))
}

#[cfg(not(feature = "axum"))]
pub(crate) fn matched_route(_: &Parts) -> Option<String> {
    None
}

/// Returns whether Quota accepts this request ID. If an ID that is too long were passed on, the consumer could make the
/// check fail.
pub(crate) fn is_id(bytes: &[u8]) -> bool {
    (1..=128).contains(&bytes.len())
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(byte))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    /// The name and value of a header.
    type Field<'a> = (&'a str, &'a str);

    fn key(fields: &[Field<'_>]) -> Option<String> {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
            headers.append(HeaderName::try_from(*name).unwrap(), value);
        }
        api_key(&headers)
    }

    #[test]
    fn key_is_read_only_if_it_is_unambiguous() {
        let (own, bearer) = ("x-api-key", "authorization");
        let cases: [(&[Field<'_>], Option<&str>); 13] = [
            (&[], None),
            (&[(own, "qk_1")], Some("qk_1")),
            (&[(bearer, "Bearer qk_1")], Some("qk_1")),
            (&[(bearer, "bearer  qk_1")], Some("qk_1")),
            (&[(own, "qk_1"), (bearer, "Bearer qk_1")], Some("qk_1")),
            (&[(own, "qk_1"), (bearer, "Bearer other")], Some("qk_1")),
            (&[(own, "qk_1"), (bearer, "Basic cWs6")], Some("qk_1")),
            (&[(bearer, "Bearer other")], None),
            (&[(bearer, "qk_1")], None),
            (&[(own, "qk_1"), (own, "qk_1")], None),
            (&[(own, "qk_1"), (bearer, "Bearer qk_2")], None),
            (&[(bearer, "Bearer qk_1"), (bearer, "Bearer qk_1")], None),
            (&[(own, "qk_1"), (bearer, "a b"), (bearer, "a b")], None),
        ];
        for (fields, expected) in cases {
            assert_eq!(key(fields).as_deref(), expected, "{fields:?}");
        }
        assert!(!may_be_key(&key(&[(own, "qk_ü")]).unwrap()));
    }

    #[test]
    fn keys_that_quota_would_not_parse_are_recognized() {
        assert!(may_be_key("qk_1"));
        assert!(may_be_key(&"k".repeat(256)));
        for key in ["", "qk_ 1", "qk_\0", "qk_ü", &"k".repeat(257)] {
            assert!(!may_be_key(key), "{key}");
        }
    }

    #[test]
    fn endpoint_is_shortened_to_what_quota_accepts() {
        assert_eq!(endpoint("GET /orders").as_deref(), Some("GET /orders"));
        assert_eq!(endpoint("GET\n /a").as_deref(), Some("GET /a"));
        assert_eq!(endpoint(&"ü".repeat(200)), Some("ü".repeat(128)));
        assert_eq!(endpoint("\n"), None);
    }
}
