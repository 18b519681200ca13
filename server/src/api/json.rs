//! JSON bodies of requests and responses.
//!
//! Requests and responses are both converted with serde, not with poem-openapi. `common/tests/wire.rs` checks that the
//! OpenAPI document describes the same JSON. A body that is not a JSON object results in 400. A body with a missing,
//! duplicate or unknown field, or with a value of the wrong type, results in 422. The response names the first such
//! field. If the only faults are values out of bounds, the response lists all of them.

use std::time::Duration;

use futures_util::StreamExt;
use garde::Validate;
use poem::{
    Body, IntoResponse, Request, RequestBody, Response, Result,
    http::{HeaderMap, HeaderValue, StatusCode, header},
};
use poem_openapi::{
    ApiExtractor, ApiExtractorType, ApiResponse, ExtractParamOptions,
    payload::Payload,
    registry::{MetaMediaType, MetaRequest, MetaResponse, MetaResponses, MetaSchemaRef, Registry},
    types::Type,
};
use quota_common::{FieldError, ProblemCode};
use serde::{Serialize, de::DeserializeOwned};

use super::{large_response, limit_headers, problem::ApiError, request_context::RequestContext};

pub const MEDIA_TYPE: &str = "application/json";

#[derive(Debug, Clone)]
pub struct Json<T>(pub T);

/// A 201 response with a JSON body.
#[derive(Debug, Clone)]
pub struct Created<T>(pub T);

/// A 204 response.
#[derive(Debug, Clone, Copy)]
pub struct NoContent;

impl<T: Type + Send> Payload for Json<T> {
    const CONTENT_TYPE: &'static str = MEDIA_TYPE;

    fn schema_ref() -> MetaSchemaRef {
        T::schema_ref()
    }

    fn register(registry: &mut Registry) {
        T::register(registry);
    }
}

impl<T: Serialize + Send> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        respond(StatusCode::OK, &self.0)
    }
}

impl<T: Serialize + Send> IntoResponse for Created<T> {
    fn into_response(self) -> Response {
        respond(StatusCode::CREATED, &self.0)
    }
}

impl IntoResponse for NoContent {
    fn into_response(self) -> Response {
        StatusCode::NO_CONTENT.into_response()
    }
}

pub fn respond<T: Serialize>(status: StatusCode, value: &T) -> Response {
    respond_with(status, serde_json::to_vec(value))
}

/// Returns a response whose body is JSON that has already been formatted.
pub fn respond_with(status: StatusCode, json: serde_json::Result<Vec<u8>>) -> Response {
    match json {
        Ok(body) => {
            let length = body.len();
            let mut response = Response::builder().status(status).body(body);
            large_response::mark(&mut response, length);
            let headers = response.headers_mut();
            headers.reserve(limit_headers::FIELDS);
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
            response
        }
        Err(error) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "response serialization failed"
            );
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

fn meta(status: u16, description: &'static str, content: Vec<MetaMediaType>) -> MetaResponses {
    MetaResponses {
        responses: vec![MetaResponse {
            description,
            status: Some(status),
            status_range: None,
            content,
            headers: vec![],
        }],
    }
}

fn content<T: Type>() -> Vec<MetaMediaType> {
    vec![MetaMediaType {
        content_type: MEDIA_TYPE,
        schema: T::schema_ref(),
    }]
}

impl<T: Type + Serialize + Send> ApiResponse for Json<T> {
    fn meta() -> MetaResponses {
        meta(200, "OK", content::<T>())
    }

    fn register(registry: &mut Registry) {
        T::register(registry);
    }
}

impl<T: Type + Serialize + Send> ApiResponse for Created<T> {
    fn meta() -> MetaResponses {
        meta(201, "Created", content::<T>())
    }

    fn register(registry: &mut Registry) {
        T::register(registry);
    }
}

impl ApiResponse for NoContent {
    fn meta() -> MetaResponses {
        meta(204, "Done", vec![])
    }

    fn register(_registry: &mut Registry) {}
}

impl<'a, T> ApiExtractor<'a> for Json<T>
where
    T: Type + DeserializeOwned + Validate<Context = ()> + Send,
{
    const TYPES: &'static [ApiExtractorType] = &[ApiExtractorType::RequestObject];

    type ParamType = ();
    type ParamRawType = ();

    fn register(registry: &mut Registry) {
        T::register(registry);
    }

    fn request_meta() -> Option<MetaRequest> {
        Some(MetaRequest {
            description: None,
            content: content::<T>(),
            required: true,
        })
    }

    async fn from_request(
        request: &'a Request,
        body: &mut RequestBody,
        _options: ExtractParamOptions<()>,
    ) -> Result<Self> {
        let media_type = request.content_type();
        check_media_type(media_type)?;
        let limit = RequestContext::of(request)?.state.config.body_limit;
        let bytes = read(request, body, limit).await?;
        Ok(Self(parse_body(media_type, &bytes)?))
    }
}

/// Checks that the media type, if present, is JSON.
pub fn check_media_type(media_type: Option<&str>) -> Result<(), ApiError> {
    let Some(media_type) = media_type else {
        return Ok(());
    };
    // Most clients send exactly this text, so it is not parsed.
    if media_type == MEDIA_TYPE {
        return Ok(());
    }
    let media_type = media_type
        .parse::<mime::Mime>()
        .map_err(|_| wrong_media_type())?;
    let charset = media_type
        .get_param(mime::CHARSET)
        .is_none_or(|charset| charset == mime::UTF_8);
    if media_type.essence_str() == MEDIA_TYPE && charset {
        Ok(())
    } else {
        Err(wrong_media_type())
    }
}

/// Parses and validates a body. The media type, if present, must have been checked by [`check_media_type`].
pub fn parse_body<T: DeserializeOwned + Validate<Context = ()>>(
    media_type: Option<&str>,
    bytes: &[u8],
) -> Result<T, ApiError> {
    match (media_type, bytes) {
        // A missing body counts as an empty object. Any other body must have a media type.
        (None, []) => parse(b"{}"),
        (None, _) => Err(wrong_media_type()),
        (Some(_), bytes) => parse(bytes),
    }
}

fn wrong_media_type() -> ApiError {
    ApiError::new(
        ProblemCode::UnsupportedMediaType,
        "Send the request body as application/json.",
    )
}

/// The maximum number of bytes to reserve for a body before it arrives.
const RESERVED: usize = 4 * 1024;

/// Reads a body of at most `limit` bytes.
pub(super) async fn read(
    request: &Request,
    body: &mut RequestBody,
    limit: usize,
) -> Result<Vec<u8>, ApiError> {
    let patience = RequestContext::of(request)?.state.config.header_timeout;
    let body = body
        .take()
        .map_err(|error| ApiError::internal(error.to_string()))?;
    receive(request.headers(), body, limit, patience).await
}

/// Receives a body of at most `limit` bytes within `patience`.
pub(super) async fn receive(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    patience: Duration,
) -> Result<Vec<u8>, ApiError> {
    let too_large = || {
        ApiError::new(
            ProblemCode::ContentTooLarge,
            format!("The request body is larger than {limit} bytes."),
        )
    };
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let mut stream = body.into_bytes_stream();
    let arriving = async {
        // Reserve little memory, because a client could announce a large body and then send nothing.
        let mut bytes = Vec::with_capacity(announced.unwrap_or(0).min(RESERVED));
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|_| {
                ApiError::new(
                    ProblemCode::Malformed,
                    "The request body ended unexpectedly.",
                )
            })?;
            if bytes.len() + chunk.len() > limit {
                return Err(too_large());
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    };
    tokio::time::timeout(patience, arriving)
        .await
        .unwrap_or_else(|_| {
            Err(ApiError::new(
                ProblemCode::RequestTimeout,
                "The request body was not received in time.",
            ))
        })
}

/// Parses and validates a body.
pub fn parse<T: DeserializeOwned + Validate<Context = ()>>(bytes: &[u8]) -> Result<T, ApiError> {
    let value: T = match object(bytes) {
        Some(value) => value,
        // Parse the bytes again to find out what is wrong.
        None => diagnose(bytes)?,
    };
    value.validate().map_err(|report| {
        let errors = report
            .into_inner()
            .into_iter()
            .map(|(path, error)| FieldError {
                field: path.to_string(),
                message: error.message().to_owned(),
            });
        ApiError::invalid_fields(errors.collect())
    })?;
    Ok(value)
}

/// Parses a JSON object. Returns `None` for anything else, even for an array of the object's values, which serde would
/// accept.
fn object<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let is_object = bytes.trim_ascii_start().starts_with(b"{");
    is_object
        .then(|| serde_json::from_slice(bytes).ok())
        .flatten()
}

/// Parses bytes like [`object`]. The error for a JSON object names the invalid field.
fn diagnose<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // A body that is not a JSON object results in 400, and an object of the wrong shape in 422.
    let value: serde_json::Value = serde_json::from_slice(bytes).map_err(|error| {
        let detail = if bytes.is_empty() {
            "The request body is empty. Send a JSON object.".to_owned()
        } else {
            format!("The body is not valid JSON: {error}.")
        };
        ApiError::new(ProblemCode::Malformed, detail)
    })?;
    if !value.is_object() {
        return Err(ApiError::new(
            ProblemCode::Malformed,
            "The request body must be a JSON object.",
        ));
    }
    drop(value);
    // Parse the bytes again, because a [`serde_json::Value`] keeps only the last of several fields with the same name.
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut reader)
        .map_err(|error| ApiError::invalid_fields(vec![rejected_field(&error)]))
}

/// Returns the field that could not be deserialized. For missing, duplicate, and unknown fields, the name comes from
/// serde's message, because the path does not always contain it.
fn rejected_field(error: &serde_path_to_error::Error<serde_json::Error>) -> FieldError {
    let path = error.path().to_string();
    let message = error.inner().to_string();
    let message = message.split(" at line ").next().unwrap_or_default();
    let quoted = |start: &str| message.strip_prefix(start)?.split('`').next();
    let join = |name: &str| {
        if path == "." {
            name.to_owned()
        } else {
            format!("{path}.{name}")
        }
    };
    if let Some(name) = quoted("missing field `") {
        return FieldError {
            field: join(name),
            message: "is required".into(),
        };
    }
    if let Some(name) = quoted("duplicate field `") {
        return FieldError {
            field: join(name),
            message: "duplicate field".into(),
        };
    }
    if let Some(name) = quoted("unknown field `") {
        // The path may already end with the name of the unknown field.
        let field = if path.ends_with(name) {
            path
        } else {
            join(name)
        };
        return FieldError {
            field,
            message: "unknown field".into(),
        };
    }
    FieldError {
        field: path,
        message: mismatch(message),
    }
}

/// Rewrites serde's message about a value of the wrong type. The result does not contain names of Rust types.
fn mismatch(message: &str) -> String {
    if message.starts_with("UUID parsing failed") {
        return "must be a UUID".to_owned();
    }
    match message.rsplit_once(", expected ") {
        None => message.to_owned(),
        Some((_, "u8" | "u16" | "u32" | "u64")) => "must be a non-negative integer".to_owned(),
        Some((_, "a boolean")) => "must be true or false".to_owned(),
        Some((_, expected)) if expected.contains("UUID") => "must be a UUID".to_owned(),
        Some((_, expected)) => format!("must be {expected}"),
    }
}

#[cfg(test)]
mod tests {
    use quota_common::plan::CreatePlan;

    use super::*;

    fn rejection(body: &str) -> (u16, Vec<(String, String)>) {
        let error = parse::<CreatePlan>(body.as_bytes()).unwrap_err();
        (
            error.code.status(),
            error
                .errors
                .into_iter()
                .map(|it| (it.field, it.message))
                .collect(),
        )
    }

    #[test]
    fn body_that_is_not_a_json_object_is_malformed() {
        for body in [
            "",
            "{",
            "nonsense",
            "[]",
            "7",
            "{\"name\":\"x\"} {}",
            "{\"name\":\"x\",\"default_rpm\":1} {}",
            "[\"x\",1]",
            " [\"x\",1,null,null,null]",
            "\u{feff}{}",
        ] {
            assert_eq!(rejection(body), (400, vec![]), "{body}");
        }
    }

    #[test]
    fn invalid_field_is_named_with_a_plain_message() {
        let one = |field: &str, message: &str| (422, vec![(field.to_owned(), message.to_owned())]);
        assert_eq!(
            rejection(r#"{"default_rpm":1}"#),
            one("name", "is required")
        );
        assert_eq!(
            rejection(r#"{"name":"x","default_rpm":1,"rpm":2}"#),
            one("rpm", "unknown field")
        );
        assert_eq!(
            rejection(r#"{"name":"x","name":"y","default_rpm":1}"#),
            one("name", "duplicate field")
        );
        let (status, errors) = rejection(r#"{"name":"x","default_rpm":"many"}"#);
        assert_eq!((status, errors[0].0.as_str()), (422, "default_rpm"));
        let integer = one("default_rpm", "must be a non-negative integer");
        for wrong in ["\"many\"", "-1", "1.5", "[]", "null"] {
            let body = format!(r#"{{"name":"x","default_rpm":{wrong}}}"#);
            assert_eq!(rejection(&body), integer, "{wrong}");
        }
        assert_eq!(
            rejection(r#"{"name":7,"default_rpm":1}"#),
            one("name", "must be a string")
        );
        assert_eq!(
            rejection(r#"{"name":"x","default_rpm":1,"strict":"yes"}"#),
            one("strict", "must be true or false")
        );
        assert_eq!(
            rejection(r#"{"name":"x","default_rpm":1,"billing":"gold"}"#),
            one("billing", "must be `free` or `paid`")
        );
        assert_eq!(
            rejection(r#"{"name":"x","default_rpm":0}"#),
            one("default_rpm", "must be at least 1")
        );
        assert_eq!(
            rejection(r#"{"name":"x","default_rpm":60000001}"#),
            one("default_rpm", "must be at most 60,000,000")
        );
    }

    #[test]
    fn all_invalid_fields_are_named_at_once() {
        let (status, errors) = rejection(r#"{"name":"a\u0000b","default_rpm":0,"daily_quota":0}"#);
        let fields = errors.into_iter().map(|(field, _)| field);
        let fields = fields.collect::<std::collections::BTreeSet<_>>();
        let expected = ["daily_quota", "default_rpm", "name"].map(str::to_owned);
        assert_eq!((status, fields), (422, expected.into()));
    }
}
