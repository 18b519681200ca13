//! Examples of all problem types, for the OpenAPI document and the error pages.

use quota_common::{FieldError, Problem, ProblemCode, limit::PolicyName};

pub(super) const USAGE_UNRECORDABLE: &str = "Usage can't be recorded right now. This request doesn't count against any limit. Try again in a few seconds.";

pub(super) const SUBSCRIPTION_NEEDED: &str =
    "This key's plan requires a valid subscription. This request doesn't count against any limit.";

/// Returns a typical problem of this type.
pub fn example(code: ProblemCode, base: &str) -> Problem {
    let detail = match code {
        ProblemCode::Malformed => {
            "The body is not valid JSON: EOF while parsing an object at line 1 column 18."
        }
        ProblemCode::Unauthorized => "This API key is invalid, inactive or expired.",
        ProblemCode::WrongCredentials => "Incorrect email or password.",
        ProblemCode::SubscriptionNeeded => SUBSCRIPTION_NEEDED,
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
        ProblemCode::PlanInUse => "3 keys use this plan. Move or delete the keys first.",
        ProblemCode::NameTaken => "A plan with this name already exists.",
        ProblemCode::EmailTaken => "An account with this email already exists.",
        ProblemCode::PreviousKeyActive => {
            "The previous secret is valid until 2026-08-04T06:26:00.000Z. Rotate again after that, or send replace_previous: true to revoke that secret now."
        }
        ProblemCode::BillingOff => "Billing is off on this server.",
        ProblemCode::AlreadySubscribed => {
            "Your organization already has a subscription. Change or cancel it in the customer portal."
        }
        ProblemCode::NotSubscribed => "Your organization has never subscribed.",
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
            message: "must be true to revoke the previous secret".into(),
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
