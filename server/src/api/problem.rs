//! Error responses. The only place where an error becomes a [`Problem`].

use std::{sync::Arc, time::Duration};

use poem::{
    IntoResponse, Response,
    error::{MethodNotAllowedError, NotFoundError, ResponseError},
    http::{HeaderValue, StatusCode, header},
};
use poem_openapi::{
    ApiResponse,
    error::{ParseParamError, ParsePathError},
    registry::{MetaResponses, Registry},
};
use quota_common::{
    FieldError, Problem, ProblemCode,
    audit::{AuditAction, AuditTarget},
    decision::DecisionOutcome,
    limit::PolicyName,
    page::{ApiKeyOrder, PlanOrder},
    problem::MEDIA_TYPE,
    usage::{UsageBucketSize, UsageGroupBy},
};
use serde::{Serialize, Serializer};

use super::limit_headers;
use crate::{
    auth::AuthError,
    cache::Unconfirmed,
    db::{self, DbError},
    keys::KeyRecord,
    limiter::{Decision, LimiterError, Policy, PolicySet},
    tenant_queue::Busy,
};

/// For look-ups: no row is 404.
pub trait OrNotFound<T> {
    fn or_not_found(self) -> Result<T, ApiError>;
}

impl<T> OrNotFound<T> for Result<Option<T>, DbError> {
    fn or_not_found(self) -> Result<T, ApiError> {
        self?.ok_or_else(ApiError::not_found)
    }
}

/// An error that becomes a response.
#[derive(Debug, thiserror::Error)]
#[error("{}: {detail}", .code.slug())]
pub struct ApiError {
    pub code: ProblemCode,
    pub detail: String,
    pub errors: Vec<FieldError>,
    pub retry_after: Option<Duration>,
    /// The methods that the path supports, for 405.
    pub allow: Option<String>,
    /// For 401: whether the request had credentials.
    pub credential_sent: bool,
    /// The denial by a key's limits, which the response headers describe.
    pub denied: Option<Box<(Arc<KeyRecord>, Decision)>>,
    /// The cause, for the log. Never sent to the caller.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

const USAGE_UNRECORDABLE: &str =
    "Usage can't be recorded right now. Nothing was charged. Try again in a few seconds.";

/// A database constraint, and the problem for violating it.
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

    /// The same problem for a resource that does not exist and for another tenant's.
    pub fn not_found() -> Self {
        Self::new(ProblemCode::NotFound, "Not found.")
    }

    pub fn unauthorized(credential_sent: bool, detail: &str) -> Self {
        Self {
            credential_sent,
            ..Self::new(ProblemCode::Unauthorized, detail)
        }
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

    /// Whether Redis is unreachable and the plan rejects all requests in that case.
    fn is_without_counters(&self) -> bool {
        let source = self.source.as_deref();
        source
            .and_then(|source| source.downcast_ref::<LimiterError>())
            .is_some_and(|error| matches!(error, LimiterError::CountersAway))
    }

    pub fn too_many(retry_after: Duration) -> Self {
        Self::wait("Too many requests from this address.", retry_after)
    }

    /// For streams, which stay open for as long as somebody watches.
    pub fn too_many_streams() -> Self {
        Self::wait("Too many open streams.", Duration::from_secs(10))
    }

    /// Also states the wait in the detail, for people who see no headers.
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
            ..Self::new(ProblemCode::InsufficientStorage, USAGE_UNRECORDABLE)
        }
    }

    pub fn internal(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            source: Some(source.into()),
            ..Self::new(ProblemCode::Internal, "Something went wrong.")
        }
    }

    pub fn denied(record: Arc<KeyRecord>, decision: Decision) -> Self {
        let secs = decision.retry_after_secs();
        if decision.violated().is_empty() {
            // No limit is known to be reached: the shared counters could not be queried.
            return Self {
                retry_after: Some(Duration::from_secs(secs.unwrap_or(1))),
                denied: Some(Box::new((record, decision))),
                ..Self::new(
                    ProblemCode::ReducedCapacity,
                    "Rate limits can't be checked right now. Try again in a few seconds.",
                )
            };
        }
        let mut detail = String::with_capacity(96);
        for (n, policy) in decision.violated().iter().enumerate() {
            detail.push_str(if n == 0 { "This key's " } else { " and " });
            detail.push_str(policy_name(policy));
        }
        match secs {
            Some(secs) => {
                detail.push_str(" has been reached. Retry in ");
                detail.push_str(itoa::Buffer::new().format(secs));
                detail.push_str(if secs == 1 { " second." } else { " seconds." });
            }
            None => detail.push_str(" is lower than the cost of this request."),
        }
        Self {
            denied: Some(Box::new((record, decision))),
            ..Self::new(ProblemCode::QuotaExceeded, detail)
        }
    }

    /// Converts a database error, with the given problems for violated constraints.
    pub fn on_constraint(error: DbError, named: &[Named]) -> Self {
        if let DbError::Constraint(name) = &error
            && let Some((_, problem)) = named.iter().find(|(constraint, _)| constraint == name)
        {
            return problem();
        }
        error.into()
    }

    /// Converts any error that reaches the edge.
    pub fn from_poem(error: poem::Error) -> Self {
        if error.is::<Self>() {
            return error
                .downcast::<Self>()
                .unwrap_or_else(|_| Self::internal("an error changed its type"));
        }
        if let Some(error) = error.downcast_ref::<ParseParamError>() {
            return Self::invalid(error.name, parameter_fault(&error.reason));
        }
        // A path segment that is not an ID is treated like an ID that does not exist.
        if error.is::<ParsePathError>() || error.is::<NotFoundError>() {
            return Self::not_found();
        }
        if error.is::<MethodNotAllowedError>() || error.status() == StatusCode::METHOD_NOT_ALLOWED {
            // The edge adds the supported methods.
            return Self::new(ProblemCode::MethodNotAllowed, "Method not allowed.");
        }
        match error.status().as_u16() {
            404 => Self::not_found(),
            413 => Self::new(
                ProblemCode::ContentTooLarge,
                "The request body is too large.",
            ),
            415 => Self::new(
                ProblemCode::UnsupportedMediaType,
                "Send the request body as application/json.",
            ),
            403 => Self::new(ProblemCode::Forbidden, "Not allowed."),
            status if (400..500).contains(&status) => {
                Self::new(ProblemCode::Malformed, "Malformed request.")
            }
            _ => Self::internal(error.to_string()),
        }
    }

    /// Returns the status: 429 for every denial, whatever its problem type.
    const fn http_status(&self) -> u16 {
        match self.denied {
            Some(_) => 429,
            None => self.code.status(),
        }
    }

    /// Returns the response. Logs the error, once, if the server failed. Being busy is not a failure: it has no source,
    /// and metrics count it. Nor is a lack of space for usage logged with every request: the recorder logs it once.
    pub fn into_response(self, request_id: &str, base: &str) -> Response {
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
        let detail = match self.code {
            ProblemCode::Internal if !request_id.is_empty() => &format!(
                "{} Quote request ID {request_id} when reporting it.",
                self.detail
            ),
            _ => &self.detail,
        };
        let problem = Written {
            kind: &self.code.type_uri(base),
            title: self.code.title(),
            status: self.http_status(),
            detail,
            request_id,
            errors: &self.errors,
            violated_policies: Names(
                self.denied
                    .as_ref()
                    .map(|denied| denied.1.violated())
                    .unwrap_or_default(),
            ),
        };
        let mut body = Vec::with_capacity(512);
        if let Err(error) = serde_json::to_writer(&mut body, &problem) {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "problem serialization failed"
            );
        }
        let status =
            StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = Response::builder().status(status).body(body);
        let headers = response.headers_mut();
        headers.reserve(limit_headers::FIELDS);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(denied) = &self.denied {
            limit_headers::write(headers, &denied.0, &denied.1);
        }
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(whole_secs(after)));
        }
        if self.is_without_counters() {
            let away = HeaderValue::from_static(limit_headers::REDIS_AWAY);
            headers.insert(limit_headers::DEGRADED, away);
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, challenge(self.credential_sent));
        }
        if let Some(allow) = self
            .allow
            .and_then(|allow| HeaderValue::from_str(&allow).ok())
        {
            headers.insert(header::ALLOW, allow);
        }
        response
    }
}

/// Rounds up, so that a retry is never too early.
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

/// Returns a typical problem of this kind, for the OpenAPI document and the error pages.
pub fn example(code: ProblemCode, base: &str) -> Problem {
    let detail = match code {
        ProblemCode::Malformed => {
            "The body is not valid JSON: EOF while parsing an object at line 1 column 18."
        }
        ProblemCode::Unauthorized => "This API key is invalid, disabled or expired.",
        ProblemCode::WrongCredentials => "Incorrect email or password.",
        ProblemCode::SubscriptionNeeded => {
            "The key's plan is paid and its tenant has no active subscription."
        }
        ProblemCode::Forbidden => "Your role (viewer) does not allow this action.",
        ProblemCode::RegistrationClosed => {
            "Registration is closed on this server. Ask its operator for an account."
        }
        ProblemCode::LimitReached => {
            "Your organization has reached its limit of 100 plans. Delete some, or ask the operator for a higher limit."
        }
        ProblemCode::NotFound => "Not found.",
        ProblemCode::MethodNotAllowed => "Method not allowed.",
        ProblemCode::RequestTimeout => "The request body was not received in time.",
        ProblemCode::PlanInUse => "3 keys use this plan. Move or delete them first.",
        ProblemCode::NameTaken => "A plan with this name already exists.",
        ProblemCode::EmailTaken => "An account with this email already exists.",
        ProblemCode::PreviousKeyActive => {
            "The previous key is valid until 2026-08-04T06:26:00.000Z. Rotate again after that, or send replace_previous: true to revoke it now."
        }
        ProblemCode::RequestInProgress => {
            "A request with this Idempotency-Key is still in progress."
        }
        ProblemCode::ContentTooLarge => "The request body is larger than 65536 bytes.",
        ProblemCode::UnsupportedMediaType => "Send the request body as application/json.",
        ProblemCode::Invalid => "default_rpm: must be at least 1",
        ProblemCode::IdempotencyMismatch => {
            "This Idempotency-Key was already used with a different request body. Use a new one."
        }
        ProblemCode::QuotaExceeded => "This key's rate limit has been reached. Retry in 3 seconds.",
        ProblemCode::TooManyRequests => {
            "Too many requests from this address. Try again in 3 seconds."
        }
        ProblemCode::HeadersTooLarge => "The request headers are too large.",
        ProblemCode::Internal => {
            "Something went wrong. Quote request ID 019ab4e1-7c00-7000-8000-000000000001 when reporting it."
        }
        ProblemCode::Unavailable => "Temporarily unavailable. Try again in a few seconds.",
        ProblemCode::ReducedCapacity => {
            "Rate limits can't be checked right now. Try again in a few seconds."
        }
        ProblemCode::InsufficientStorage => USAGE_UNRECORDABLE,
    };
    let errors = match code {
        ProblemCode::Invalid => vec![FieldError {
            field: "default_rpm".into(),
            message: "must be at least 1".into(),
        }],
        ProblemCode::EmailTaken => vec![FieldError {
            field: "email".into(),
            message: "is already in use".into(),
        }],
        ProblemCode::PreviousKeyActive => vec![FieldError {
            field: "replace_previous".into(),
            message: "must be true to revoke the previous key".into(),
        }],
        _ => Vec::new(),
    };
    Problem {
        kind: code.type_uri(base).into_owned(),
        title: code.title().to_owned(),
        status: code.status(),
        detail: detail.to_owned(),
        request_id: "019ab4e1-7c00-7000-8000-000000000001".to_owned(),
        errors,
        violated_policies: match code {
            ProblemCode::QuotaExceeded => vec![PolicyName::Rpm],
            _ => Vec::new(),
        },
    }
}

pub fn wire_name(policy: Policy) -> PolicyName {
    match policy {
        Policy::Rpm => PolicyName::Rpm,
        Policy::Daily => PolicyName::Daily,
        Policy::Monthly => PolicyName::Monthly,
    }
}

const fn policy_name(policy: Policy) -> &'static str {
    match policy {
        Policy::Rpm => "rate limit",
        Policy::Daily => "daily quota",
        Policy::Monthly => "monthly quota",
    }
}

/// A [`Problem`] of borrowed parts, since denials must be as cheap as admissions.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    title: &'a str,
    status: u16,
    detail: &'a str,
    request_id: &'a str,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    errors: &'a [FieldError],
    #[serde(rename = "violated-policies", skip_serializing_if = "Names::is_empty")]
    violated_policies: Names,
}

/// Serializes policies by their names in the API.
struct Names(PolicySet);

impl Names {
    const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Names {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(wire_name))
    }
}

/// Rewrites poem-openapi's reason for rejecting a parameter as a message for the caller.
fn parameter_fault(reason: &str) -> String {
    let bound = |rule: &str| {
        let (_, rest) = reason.split_once("verification failed. ")?;
        let argument = rest.strip_prefix(rule)?.strip_prefix('(')?;
        argument.split([',', ')']).next()
    };
    if let Some(min) = bound("minimum") {
        return format!("must be at least {min}");
    }
    if let Some(max) = bound("maximum") {
        return format!("must be at most {max}");
    }
    if let Some(max) = bound("maxLength") {
        return format!("must be at most {max} characters");
    }
    let (kind, message) = reason
        .strip_prefix("failed to parse \"")
        .and_then(|rest| rest.split_once("\": "))
        .unwrap_or(("", reason));
    if let Some(choices) = choices(kind) {
        return format!("must be one of {}", choices.join(", "));
    }
    match kind {
        "boolean" => "must be true or false".to_owned(),
        "string_uuid" => "must be a UUID".to_owned(),
        kind if kind.starts_with("integer") => "must be a non-negative integer".to_owned(),
        _ => message
            .split(" (occurred while parsing")
            .next()
            .unwrap_or_default()
            .to_owned(),
    }
}

/// Returns the values of a parameter that is an enum.
fn choices(kind: &str) -> Option<Vec<&'static str>> {
    Some(match kind {
        "ApiKeyOrder" => ApiKeyOrder::ALL.iter().map(|it| it.as_str()).collect(),
        "PlanOrder" => PlanOrder::ALL.iter().map(|it| it.as_str()).collect(),
        "AuditAction" => AuditAction::ALL.iter().map(|it| it.as_str()).collect(),
        "AuditTarget" => AuditTarget::ALL.iter().map(|it| it.as_str()).collect(),
        "UsageBucketSize" => UsageBucketSize::ALL.iter().map(|it| it.as_str()).collect(),
        "UsageGroupBy" => UsageGroupBy::ALL.iter().map(|it| it.as_str()).collect(),
        "DecisionOutcome" => DecisionOutcome::ALL.iter().map(|it| it.as_str()).collect(),
        "QuotaPolicy" => vec!["daily", "monthly"],
        _ => return None,
    })
}

impl ResponseError for ApiError {
    fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl IntoResponse for ApiError {
    /// For responses that bypass the edge, which knows the request ID.
    fn into_response(self) -> Response {
        self.into_response("", "")
    }
}

/// `openapi` adds the error responses to the document.
impl ApiResponse for ApiError {
    fn meta() -> MetaResponses {
        MetaResponses {
            responses: Vec::new(),
        }
    }

    fn register(_registry: &mut Registry) {}
}

impl From<DbError> for ApiError {
    fn from(error: DbError) -> Self {
        match error {
            DbError::Unavailable(_) => Self::unavailable(error),
            error => Self::internal(error),
        }
    }
}

impl From<Busy> for ApiError {
    fn from(busy: Busy) -> Self {
        match busy {
            Busy::QueueFull => Self::wait(
                "Your organization is making too many changes at the same time.",
                Duration::from_secs(1),
            ),
            // Not logged: the changes in front are, if they fail.
            Busy::TimedOut => Self {
                source: None,
                ..Self::unavailable(String::new())
            },
        }
    }
}

impl From<Unconfirmed> for ApiError {
    fn from(error: Unconfirmed) -> Self {
        let all = Self::unavailable(error.clone());
        match error {
            Unconfirmed::Failed(_) => all,
            // Counted, not logged: strangers could fill the disk with it.
            Unconfirmed::TooMany => Self {
                source: None,
                ..all
            },
        }
    }
}

impl From<LimiterError> for ApiError {
    fn from(error: LimiterError) -> Self {
        Self {
            retry_after: Some(Duration::from_secs(1)),
            source: Some(Box::new(error)),
            ..Self::new(
                ProblemCode::ReducedCapacity,
                "Rate limits can't be checked right now. Try again in a few seconds.",
            )
        }
    }
}

impl From<getrandom::Error> for ApiError {
    fn from(error: getrandom::Error) -> Self {
        Self::internal(error)
    }
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> Self {
        match error {
            AuthError::WrongCredentials => Self {
                credential_sent: true,
                ..Self::new(
                    ProblemCode::WrongCredentials,
                    "Incorrect email or password.",
                )
            },
            AuthError::Unauthorized => {
                Self::unauthorized(true, "Your session has expired. Sign in again.")
            }
            AuthError::EmailTaken => Self {
                errors: vec![FieldError {
                    field: "email".into(),
                    message: "is already in use".into(),
                }],
                ..Self::new(
                    ProblemCode::EmailTaken,
                    "An account with this email already exists.",
                )
            },
            AuthError::WeakPassword(message) => Self::invalid("password", message),
            AuthError::TooManyTries(after) => {
                Self::wait("Too many attempts for this account.", after)
            }
            AuthError::Busy => Self::unavailable("too many passwords are being hashed"),
            AuthError::Db(error) => error.into(),
            AuthError::Random(error) => error.into(),
            AuthError::Internal(message) => Self::internal(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn rejected_parameter_gets_a_plain_message() {
        for (reason, message) in [
            (
                "verification failed. minimum(1, exclusive: false)",
                "must be at least 1",
            ),
            (
                "verification failed. maximum(100, exclusive: false)",
                "must be at most 100",
            ),
            (
                "verification failed. maxLength(200)",
                "must be at most 200 characters",
            ),
            (
                "failed to parse \"integer_uint32\": invalid digit found in string",
                "must be a non-negative integer",
            ),
            (
                "failed to parse \"string\": must be a fish (occurred while parsing \"Fish\")",
                "must be a fish",
            ),
        ] {
            assert_eq!(parameter_fault(reason), message);
        }
    }

    #[test]
    fn written_problem_equals_the_wire_type() {
        let errors = [FieldError {
            field: "name".into(),
            message: "is \"odd\"".into(),
        }];
        let mut written = Written {
            kind: "https://q.example/problems/invalid",
            title: "Validation failed",
            status: 422,
            detail: "name: is \"odd\"",
            request_id: "r-1",
            errors: &errors,
            violated_policies: Names(PolicySet::EMPTY),
        };
        let mut meant = Problem {
            kind: written.kind.into(),
            title: written.title.into(),
            status: 422,
            detail: written.detail.into(),
            request_id: "r-1".into(),
            errors: errors.to_vec(),
            violated_policies: vec![],
        };
        assert_eq!(json(&written), json(&meant));

        written.errors = &[];
        let denied = PolicySet::EMPTY.with(Policy::Rpm).with(Policy::Monthly);
        written.violated_policies = Names(denied);
        meant.errors.clear();
        meant.violated_policies = vec![PolicyName::Rpm, PolicyName::Monthly];
        assert_eq!(json(&written), json(&meant));
    }
}
