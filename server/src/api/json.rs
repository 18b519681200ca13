//! JSON bodies, in and out.
//!
//! One type for both, over serde alone, so that the console, which knows no poem, speaks the same; that the
//! document describes the same JSON is proved in `common/tests/wire.rs`. Reading tells apart what cannot be
//! understood (400) from what is understood and not allowed (422), and names every field that is not.

use futures_util::StreamExt;
use garde::Validate;
use poem::{
    IntoResponse, Request, RequestBody, Response, Result,
    http::{HeaderValue, StatusCode, header},
};
use poem_openapi::{
    ApiExtractor, ApiExtractorType, ApiResponse, ExtractParamOptions,
    payload::Payload,
    registry::{MetaMediaType, MetaRequest, MetaResponse, MetaResponses, MetaSchemaRef, Registry},
    types::Type,
};
use quota_common::{FieldError, ProblemCode};
use serde::{Serialize, de::DeserializeOwned};

use super::{limit_headers, problem::ApiError, request_log::Visit};

const MEDIA_TYPE: &str = "application/json";

/// A JSON body.
#[derive(Debug, Clone)]
pub struct Json<T>(pub T);

/// An answer 201 with a JSON body.
#[derive(Debug, Clone)]
pub struct Created<T>(pub T);

/// An answer 204.
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

fn respond<T: Serialize>(status: StatusCode, value: &T) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => {
            let mut response = Response::builder().status(status).body(body);
            let headers = response.headers_mut();
            headers.reserve(limit_headers::FIELDS);
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
            response
        }
        Err(error) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "an answer cannot be written"
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
        if request.content_type().is_some() {
            check_media_type(request)?;
        }
        let mut bytes = read(request, body).await?;
        if request.content_type().is_none() {
            // A request without a body asks for what an empty object does; a body has to say what it is.
            if !bytes.is_empty() {
                return Err(wrong_media_type().into());
            }
            bytes.extend_from_slice(b"{}");
        }
        Ok(Self(parse(&bytes)?))
    }
}

fn wrong_media_type() -> ApiError {
    ApiError::new(
        ProblemCode::UnsupportedMediaType,
        "Send the request body as application/json.",
    )
}

fn check_media_type(request: &Request) -> Result<(), ApiError> {
    let media_type = request
        .content_type()
        .and_then(|it| it.parse::<mime::Mime>().ok());
    let media_type = media_type.ok_or_else(wrong_media_type)?;
    let charset = media_type
        .get_param(mime::CHARSET)
        .is_none_or(|charset| charset == mime::UTF_8);
    if media_type.essence_str() == MEDIA_TYPE && charset {
        Ok(())
    } else {
        Err(wrong_media_type())
    }
}

async fn read(request: &Request, body: &mut RequestBody) -> Result<Vec<u8>, ApiError> {
    let settings = &Visit::of(request)?.state.config;
    let (limit, patience) = (settings.body_limit, settings.header_timeout);
    let too_large = || {
        ApiError::new(
            ProblemCode::ContentTooLarge,
            format!("The request body is larger than {limit} bytes."),
        )
    };
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let body = body
        .take()
        .map_err(|error| ApiError::internal(error.to_string()))?;
    let mut stream = body.into_bytes_stream();
    let arriving = async {
        let mut bytes = Vec::with_capacity(announced.unwrap_or(0));
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

/// Reads and judges a body.
pub fn parse<T: DeserializeOwned + Validate<Context = ()>>(bytes: &[u8]) -> Result<T, ApiError> {
    // What is no JSON at all is told apart from what is JSON and not what was asked for.
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
    // From the text, not from the value: a name that comes twice is a fault there, and the last one's win here.
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value: T = serde_path_to_error::deserialize(&mut reader)
        .map_err(|error| ApiError::invalid_fields(vec![unread(&error)]))?;
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

/// The field that could not be read. serde names a missing and an unknown one only in its message.
fn unread(error: &serde_path_to_error::Error<serde_json::Error>) -> FieldError {
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
        // The path names the unknown field already.
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

/// Rewrites serde's message about a value of the wrong type without the names of Rust types.
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

    fn refusal(body: &str) -> (u16, Vec<(String, String)>) {
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
    fn what_is_no_json_object_is_malformed() {
        for body in [
            "",
            "{",
            "nonsense",
            "[]",
            "7",
            "{\"name\":\"x\"} {}",
            "\u{feff}{}",
        ] {
            assert_eq!(refusal(body), (400, vec![]), "{body}");
        }
    }

    #[test]
    fn the_field_that_is_not_allowed_is_named() {
        let one = |field: &str, message: &str| (422, vec![(field.to_owned(), message.to_owned())]);
        assert_eq!(refusal(r#"{"default_rpm":1}"#), one("name", "is required"));
        assert_eq!(
            refusal(r#"{"name":"x","default_rpm":1,"rpm":2}"#),
            one("rpm", "unknown field")
        );
        assert_eq!(
            refusal(r#"{"name":"x","name":"y","default_rpm":1}"#),
            one("name", "duplicate field")
        );
        let (status, errors) = refusal(r#"{"name":"x","default_rpm":"many"}"#);
        assert_eq!((status, errors[0].0.as_str()), (422, "default_rpm"));
        let integer = one("default_rpm", "must be a non-negative integer");
        for wrong in ["\"many\"", "-1", "1.5", "[]", "null"] {
            let body = format!(r#"{{"name":"x","default_rpm":{wrong}}}"#);
            assert_eq!(refusal(&body), integer, "{wrong}");
        }
        assert_eq!(
            refusal(r#"{"name":7,"default_rpm":1}"#),
            one("name", "must be a string")
        );
        assert_eq!(
            refusal(r#"{"name":"x","default_rpm":1,"strict":"yes"}"#),
            one("strict", "must be true or false")
        );
        assert_eq!(
            refusal(r#"{"name":"x","default_rpm":1,"billing":"gold"}"#),
            one("billing", "must be `free` or `paid`")
        );
        assert_eq!(
            refusal(r#"{"name":"x","default_rpm":0}"#),
            one("default_rpm", "must be at least 1")
        );
        assert_eq!(
            refusal(r#"{"name":"x","default_rpm":60000001}"#),
            one("default_rpm", "must be at most 60,000,000")
        );
    }

    #[test]
    fn every_field_that_is_not_allowed_is_named_at_once() {
        let (status, errors) = refusal(r#"{"name":"a\u0000b","default_rpm":0,"daily_quota":0}"#);
        let fields = errors.into_iter().map(|(field, _)| field);
        let fields = fields.collect::<std::collections::BTreeSet<_>>();
        let expected = ["daily_quota", "default_rpm", "name"].map(str::to_owned);
        assert_eq!((status, fields), (422, expected.into()));
    }
}
