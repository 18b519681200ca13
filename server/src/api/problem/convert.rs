//! Converts other errors to API errors.

use std::time::Duration;

use poem::{
    error::{MethodNotAllowedError, NotFoundError},
    http::StatusCode,
};
use poem_openapi::error::{ParseParamError, ParsePathError};
use quota_common::{
    FieldError, ProblemCode,
    api_key::ApiKeyStatus,
    audit::{AuditAction, AuditTarget},
    decision::DecisionOutcome,
    page::{ApiKeyOrder, PlanOrder},
    usage::{UsageBucketSize, UsageGroupBy},
    webhook::WebhookDeliveryStatus,
};

use super::ApiError;
use crate::{
    auth::AuthError, cache::Unconfirmed, db::DbError, limiter::LimiterError, tenant_queue::Busy,
};

impl ApiError {
    /// Converts any error that a handler, an extractor, or the router returns.
    pub fn from_poem(error: poem::Error) -> Self {
        if error.is::<Self>() {
            return error
                .downcast::<Self>()
                .unwrap_or_else(|_| Self::internal("unexpected error type"));
        }
        if let Some(error) = error.downcast_ref::<ParseParamError>() {
            return Self::invalid(error.name, parameter_message(&error.reason));
        }
        // A path segment that is not an ID is treated like an ID that does not exist.
        if error.is::<ParsePathError>() || error.is::<NotFoundError>() {
            return Self::not_found();
        }
        if error.is::<MethodNotAllowedError>() || error.status() == StatusCode::METHOD_NOT_ALLOWED {
            // `request_log` adds the supported methods.
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
}

/// Rewrites poem-openapi's reason for rejecting a parameter as a message for the caller.
fn parameter_message(reason: &str) -> String {
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

/// Returns the possible values of an enum parameter.
fn choices(kind: &str) -> Option<Vec<&'static str>> {
    Some(match kind {
        "ApiKeyStatus" => ApiKeyStatus::ALL.iter().map(|it| it.as_str()).collect(),
        "ApiKeyOrder" => ApiKeyOrder::ALL.iter().map(|it| it.as_str()).collect(),
        "PlanOrder" => PlanOrder::ALL.iter().map(|it| it.as_str()).collect(),
        "AuditAction" => AuditAction::ALL.iter().map(|it| it.as_str()).collect(),
        "AuditTarget" => AuditTarget::ALL.iter().map(|it| it.as_str()).collect(),
        "UsageBucketSize" => UsageBucketSize::ALL.iter().map(|it| it.as_str()).collect(),
        "UsageGroupBy" => UsageGroupBy::ALL.iter().map(|it| it.as_str()).collect(),
        "DecisionOutcome" => DecisionOutcome::ALL.iter().map(|it| it.as_str()).collect(),
        "WebhookDeliveryStatus" => WebhookDeliveryStatus::ALL
            .iter()
            .map(|it| it.as_str())
            .collect(),
        "QuotaPolicy" => vec!["daily", "monthly"],
        _ => return None,
    })
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
            // Do not log this error: if the changes ahead of this one fail, their own errors are logged.
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
            // This error is counted but not logged, because unauthenticated clients could otherwise fill the disk with
            // log lines.
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
            AuthError::TooManyRegistrations(after) => Self::wait(
                "Too many accounts were created from your network. Try again later.",
                after,
            ),
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
            assert_eq!(parameter_message(reason), message);
        }
    }
}
