//! Error responses. Errors become a [`Problem`](quota_common::Problem) only in this module.

mod body;
mod convert;
pub mod denial;
mod example;

use std::{sync::Arc, time::Duration};

use poem::{
    IntoResponse, Response,
    error::ResponseError,
    http::{HeaderValue, StatusCode, header},
};
use poem_openapi::{
    ApiResponse,
    registry::{MetaResponses, Registry},
};
use quota_common::{FieldError, ProblemCode, problem::MEDIA_TYPE};

use self::body::{Body, Start};
pub use self::{body::wire_name, example::example};
use super::limit_headers::{self, HeaderSink};
use crate::{
    db::{self, DbError},
    keys::KeyRecord,
    limiter::{Decision, LimiterError},
};

/// Converts a missing row to a 404 error.
pub trait OrNotFound<T> {
    fn or_not_found(self) -> Result<T, ApiError>;
}

impl<T> OrNotFound<T> for Result<Option<T>, DbError> {
    fn or_not_found(self) -> Result<T, ApiError> {
        self?.ok_or_else(ApiError::not_found)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{}: {detail}", .code.slug())]
pub struct ApiError {
    pub code: ProblemCode,
    pub detail: String,
    pub errors: Vec<FieldError>,
    pub retry_after: Option<Duration>,
    /// The methods that the path supports, for 405.
    pub allow: Option<String>,
    /// Whether the request had credentials, for 401.
    pub credential_sent: bool,
    /// The key and the decision, if the request was denied. The response headers report the decision.
    pub denied: Option<Box<(Arc<KeyRecord>, Decision)>>,
    /// The cause, for the log. Never sent to the caller.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The name of a database constraint, and the error for violating it.
pub type Named = (&'static str, fn() -> ApiError);

impl ApiError {
    pub fn new(code: ProblemCode, detail: impl Into<String>) -> Self {
        Self {
            code,
            detail: detail.into(),
            errors: Vec::new(),
            retry_after: None,
            allow: None,
            credential_sent: false,
            denied: None,
            source: None,
        }
    }

    /// Returns the error for a resource that does not exist or belongs to another tenant.
    pub fn not_found() -> Self {
        Self::new(ProblemCode::NotFound, "Not found.")
    }

    pub fn unauthorized(credential_sent: bool, detail: &str) -> Self {
        Self {
            credential_sent,
            ..Self::new(ProblemCode::Unauthorized, detail)
        }
    }

    /// Returns the error for a request without an API key.
    pub fn key_missing() -> Self {
        Self::unauthorized(false, "Send an API key as X-API-Key.")
    }

    pub fn subscription_needed() -> Self {
        Self::new(
            ProblemCode::SubscriptionNeeded,
            example::SUBSCRIPTION_NEEDED,
        )
    }

    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::invalid_fields(vec![FieldError {
            field: field.into(),
            message: message.into(),
        }])
    }

    pub fn invalid_fields(errors: Vec<FieldError>) -> Self {
        let detail = errors
            .iter()
            .map(|error| format!("{}: {}", error.field, error.message))
            .collect::<Vec<_>>()
            .join("; ");
        Self {
            errors,
            ..Self::new(ProblemCode::Invalid, detail)
        }
    }

    /// Returns whether Redis is unreachable and the plan rejects all requests in that case.
    fn is_without_counters(&self) -> bool {
        let source = self.source.as_deref();
        source
            .and_then(|source| source.downcast_ref::<LimiterError>())
            .is_some_and(|error| matches!(error, LimiterError::CountersUnavailable))
    }

    pub fn too_many(retry_after: Duration) -> Self {
        Self::wait("Too many requests from this address.", retry_after)
    }

    /// Returns the error for a tenant with too many concurrent reads.
    pub fn too_many_reads() -> Self {
        Self::wait(
            "Your organization has too many concurrent reads.",
            Duration::from_secs(1),
        )
    }

    pub fn too_many_pages(retry_after: Duration) -> Self {
        Self::wait(
            "Your organization has opened too many billing pages.",
            retry_after,
        )
    }

    /// Returns the error for a tenant that has requested too many deliveries.
    pub fn too_many_webhook_requests(retry_after: Duration) -> Self {
        Self::wait(
            "Your organization has requested too many test events and redeliveries.",
            retry_after,
        )
    }

    /// Returns the error for a webhook with the maximum number of pending deliveries.
    pub fn too_many_pending() -> Self {
        Self::wait(
            "The webhook has too many pending deliveries.",
            Duration::from_mins(1),
        )
    }

    /// Returns the error for too many open streams.
    pub fn too_many_streams() -> Self {
        Self::wait("Too many open streams.", Duration::from_secs(10))
    }

    /// Returns an error for a request that can be retried after `retry_after`. `detail` also states the delay, for
    /// users who cannot see the headers.
    fn wait(why: &str, retry_after: Duration) -> Self {
        let secs = whole_secs(retry_after);
        let unit = if secs == 1 { "second" } else { "seconds" };
        Self {
            retry_after: Some(retry_after),
            ..Self::new(
                ProblemCode::TooManyRequests,
                format!("{why} Try again in {secs} {unit}."),
            )
        }
    }

    pub fn unavailable(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            retry_after: Some(Duration::from_secs(1)),
            source: Some(source.into()),
            ..Self::new(
                ProblemCode::Unavailable,
                "Temporarily unavailable. Try again in a few seconds.",
            )
        }
    }

    pub fn unrecordable() -> Self {
        Self {
            retry_after: Some(Duration::from_secs(1)),
            ..Self::new(
                ProblemCode::InsufficientStorage,
                example::USAGE_UNRECORDABLE,
            )
        }
    }

    pub fn internal(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            source: Some(source.into()),
            ..Self::new(ProblemCode::Internal, "Something went wrong.")
        }
    }

    pub fn denied(record: Arc<KeyRecord>, decision: Decision) -> Self {
        let mut detail = Vec::with_capacity(96);
        denial::write_detail(&decision, &mut detail);
        Self {
            denied: Some(Box::new((record, decision))),
            ..Self::new(denial::code(&decision), String::from_utf8_lossy(&detail))
        }
    }

    /// Converts a database error. If a named constraint was violated, returns that constraint's error.
    pub fn on_constraint(error: DbError, named: &[Named]) -> Self {
        if let DbError::Constraint(name) = &error
            && let Some((_, problem)) = named.iter().find(|(constraint, _)| constraint == name)
        {
            return problem();
        }
        error.into()
    }

    fn http_status(&self) -> u16 {
        match self.denied {
            Some(_) => denial::STATUS.as_u16(),
            None => self.code.status(),
        }
    }

    pub fn status_code(&self) -> StatusCode {
        StatusCode::from_u16(self.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// Returns the response. If the server failed, also logs the error.
    pub fn into_response(self, request_id: &str, base: &str) -> Response {
        let mut body = Vec::with_capacity(512);
        self.write_body(request_id, base, &mut body);
        let mut response = Response::builder().status(self.status_code()).body(body);
        self.write_headers(response.headers_mut());
        response
    }

    /// Logs the error if the server failed. Errors caused by overload or by a lack of space for usage records are
    /// counted in metrics instead of being logged.
    pub fn log(&self, request_id: &str) {
        let is_busy = self.code == ProblemCode::InsufficientStorage
            || self.code == ProblemCode::Unavailable && self.source.is_none();
        if self.http_status() >= 500 && !is_busy {
            let source = self
                .source
                .as_ref()
                .map(|source| db::chain(source.as_ref()))
                .unwrap_or_default();
            tracing::error!(
                request_id,
                problem = self.code.slug(),
                error = source,
                "request failed"
            );
        }
    }

    /// Writes the body of the problem. If the server failed, also logs the error.
    pub fn write_body(&self, request_id: &str, base: &str, out: &mut Vec<u8>) {
        self.log(request_id);
        if let Some(denied) = &self.denied {
            denial::write_body(&denied.1, request_id, out);
            return;
        }
        let detail = match self.code {
            ProblemCode::Internal if !request_id.is_empty() => &format!(
                "{} Quote request ID {request_id} when reporting it.",
                self.detail
            ),
            _ => &self.detail,
        };
        let body = Body {
            start: Start {
                kind: &self.code.type_uri(base),
                title: self.code.title(),
                status: self.http_status(),
            },
            detail,
            request_id,
            errors: &self.errors,
        };
        if let Err(error) = body.write(out) {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "problem serialization failed"
            );
        }
    }

    pub fn write_headers(&self, headers: &mut impl HeaderSink) {
        if let Some(denied) = &self.denied {
            denial::write_headers(headers, &denied.0, &denied.1);
            return;
        }
        headers.expect(limit_headers::FIELDS);
        headers.set_static(header::CONTENT_TYPE, MEDIA_TYPE);
        headers.set_static(header::CACHE_CONTROL, "no-store");
        if let Some(after) = self.retry_after {
            headers.set_number(header::RETRY_AFTER, whole_secs(after));
        }
        if self.is_without_counters() {
            headers.set_static(limit_headers::DEGRADED, limit_headers::REDIS_AWAY);
        }
        if self.status_code() == StatusCode::UNAUTHORIZED {
            headers.set(header::WWW_AUTHENTICATE, &challenge(self.credential_sent));
        }
        if let Some(allow) = &self.allow
            && let Ok(allow) = HeaderValue::from_str(allow)
        {
            headers.set(header::ALLOW, &allow);
        }
    }
}

/// Returns a wait in seconds, at least 1. Rounds up, so that clients never retry too early.
fn whole_secs(wait: Duration) -> u64 {
    (wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1)
}

/// Returns the `WWW-Authenticate` header (RFC 6750, section 3).
pub fn challenge(credential_sent: bool) -> HeaderValue {
    HeaderValue::from_static(if credential_sent {
        "Bearer realm=\"quota\", error=\"invalid_token\""
    } else {
        "Bearer realm=\"quota\""
    })
}

impl ResponseError for ApiError {
    fn status(&self) -> StatusCode {
        self.status_code()
    }
}

impl IntoResponse for ApiError {
    /// Returns the response without a request ID, which only `request_log` knows. Used only for responses that bypass
    /// `request_log`.
    fn into_response(self) -> Response {
        self.into_response("", "")
    }
}

/// Describes no responses, because the `openapi` module adds the error responses to the document.
impl ApiResponse for ApiError {
    fn meta() -> MetaResponses {
        MetaResponses {
            responses: Vec::new(),
        }
    }

    fn register(_registry: &mut Registry) {}
}
