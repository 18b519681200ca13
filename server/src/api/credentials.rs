//! Reads credentials from the header fields of a request.

use quota_common::ProblemCode;

use super::{
    fields::{Fields, Sent, text},
    problem::ApiError,
};
use crate::secret_text::Kind;

/// Returns the token from `Authorization: Bearer`, or `None` if the header was not sent.
pub fn bearer(fields: &impl Fields) -> Result<Option<&str>, ApiError> {
    let mut values = fields.values("authorization");
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(ApiError::new(
            ProblemCode::Malformed,
            "The Authorization header was sent more than once.",
        ));
    }
    let unusable = || {
        ApiError::unauthorized(
            true,
            "Send credentials as: Authorization: Bearer <credential>.",
        )
    };
    let value = text(value).ok_or_else(unusable)?;
    let (kind, token) = value.split_once(' ').ok_or_else(unusable)?;
    if !kind.eq_ignore_ascii_case("bearer") || token.trim().is_empty() {
        return Err(unusable());
    }
    Ok(Some(token.trim()))
}

/// Returns the API key from `X-API-Key: K` or `Authorization: Bearer K`. If neither header was sent, returns `None`, or
/// rejects the request if there is a key in its query.
pub fn api_key<'a>(
    fields: &'a impl Fields,
    query: Option<&str>,
) -> Result<Option<&'a str>, ApiError> {
    let from_field = match Sent::of(fields, "x-api-key") {
        Sent::Never => None,
        Sent::Once(key) => Some(key),
        Sent::Several => {
            return Err(ApiError::new(
                ProblemCode::Malformed,
                "The X-API-Key header was sent more than once.",
            ));
        }
    };
    let from_bearer = bearer(fields)?;
    match (from_field, from_bearer) {
        (Some(key), Some(other)) if key != other => Err(ApiError::new(
            ProblemCode::Malformed,
            "X-API-Key and Authorization contain different keys. Send only one of them.",
        )),
        (Some(key), _) | (None, Some(key)) => Ok(Some(key)),
        (None, None) if query.is_some_and(|query| query.contains(Kind::ApiKey.prefix())) => {
            Err(ApiError::new(
                ProblemCode::Malformed,
                "Don't send API keys in the URL, because URLs are logged. Rotate this key, and send the new one as X-API-Key.",
            ))
        }
        (None, None) => Ok(None),
    }
}

/// Returns the consumer's key from a request that a gateway forwards. Reads `X-API-Key` and `Authorization: Bearer
/// qk_…`.
///
/// Ignores other credentials in `Authorization`, which are for the API behind the gateway. Returns `None` if the
/// request contains different keys, or contains either header more than once: the API could read a different key than
/// the one that was checked.
pub fn consumer_key(fields: &impl Fields) -> Option<&str> {
    let from_field = match Sent::of(fields, "x-api-key") {
        Sent::Never => None,
        Sent::Once(key) => Some(key),
        Sent::Several => return None,
    };
    if matches!(Sent::of(fields, "authorization"), Sent::Several) {
        return None;
    }
    let from_bearer = bearer(fields)
        .ok()
        .flatten()
        .filter(|it| it.starts_with(Kind::ApiKey.prefix()));
    match (from_field, from_bearer) {
        (Some(key), Some(other)) if key != other => None,
        (key, other) => key.or(other),
    }
}

/// Returns the endpoint of the forwarded request, based on `X-Forwarded-Method` and the path in `X-Forwarded-Uri`.
/// Returns an empty string if neither header was sent. Omits the query, which may contain arbitrary data.
pub fn forwarded_endpoint(fields: &impl Fields) -> String {
    let field = |name| fields.values(name).next().and_then(text);
    let path =
        field("x-forwarded-uri").map_or("", |uri| uri.split(['?', '#']).next().unwrap_or(""));
    match (field("x-forwarded-method").unwrap_or(""), path) {
        ("", path) => path.to_owned(),
        (method, "") => method.to_owned(),
        (method, path) => [method, " ", path].concat(),
    }
}
