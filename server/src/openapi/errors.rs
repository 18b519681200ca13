//! The error responses of operations. Most of them are derived from an operation's path and arguments. Some operations
//! have additional errors, or describe an error in more detail.

use quota_common::ProblemCode;
use serde_json::{Value, json};

use super::operation::{Operation, for_each_operation};
use crate::api::problem;

const BY_ROLE: &str = "Your role does not allow this action.";
const BY_COOKIE: &str = "Cookie authentication is only accepted from this server's own pages.";
const IN_PROGRESS: &str = "A request with this `Idempotency-Key` is still in progress.";
const BY_ROLE_OR_LIMIT: &str =
    "Your role does not allow this action, or the tenant has reached a limit set by the operator.";
const STRIPE_UNAVAILABLE: &str =
    "Stripe or the database is unavailable. Retry after `Retry-After` seconds.";
const NO_REFRESH_TOKEN: &str = "The refresh token is missing, invalid, expired or already used.";
const INVALID_OR_MISMATCH: &str = "Validation failed (see `errors`), or the `Idempotency-Key` was already used with a different request body.";
const UNCHECKED: &str =
    "A dependency is unavailable, or usage can't be recorded. Retry after `Retry-After` seconds.";

/// Errors of individual operations, in addition to those derived from their paths and arguments. An entry replaces the
/// derived error with the same status.
const OWN_ERRORS: &[(&str, &[(ProblemCode, &str)])] = {
    use ProblemCode as P;
    &[
        (
            "register",
            &[
                (
                    P::RegistrationClosed,
                    "Registration is closed, or cookies were requested from a page on another origin.",
                ),
                (P::EmailTaken, "An account with this email already exists."),
            ],
        ),
        (
            "login",
            &[
                (P::WrongCredentials, "Incorrect email or password."),
                (P::Forbidden, BY_COOKIE),
            ],
        ),
        (
            "refresh",
            &[
                (P::Unauthorized, NO_REFRESH_TOKEN),
                (P::Forbidden, BY_COOKIE),
            ],
        ),
        (
            "logout",
            &[
                (
                    P::Unauthorized,
                    "The refresh token is missing or malformed.",
                ),
                (P::Forbidden, BY_COOKIE),
            ],
        ),
        (
            "create_plan",
            &[
                (P::Forbidden, BY_ROLE_OR_LIMIT),
                (
                    P::NameTaken,
                    "A plan with this name already exists, or a request with this `Idempotency-Key` is still in progress.",
                ),
                (P::Invalid, INVALID_OR_MISMATCH),
            ],
        ),
        (
            "update_plan",
            &[(P::NameTaken, "A plan with this name already exists.")],
        ),
        ("delete_plan", &[(P::PlanInUse, "The plan still has keys.")]),
        (
            "create_api_key",
            &[
                (P::Forbidden, BY_ROLE_OR_LIMIT),
                (
                    P::NotFound,
                    "The plan does not exist, or it belongs to another tenant.",
                ),
                (P::RequestInProgress, IN_PROGRESS),
                (P::Invalid, INVALID_OR_MISMATCH),
            ],
        ),
        (
            "update_api_key",
            &[(
                P::NotFound,
                "The key or plan does not exist, or it belongs to another tenant.",
            )],
        ),
        (
            "rotate_api_key",
            &[
                (
                    P::PreviousKeyActive,
                    "The grace period of an earlier rotation has not ended and `replace_previous` is not true, or a request with this `Idempotency-Key` is still in progress.",
                ),
                (P::Invalid, INVALID_OR_MISMATCH),
            ],
        ),
        (
            "create_service_token",
            &[
                (P::Forbidden, BY_ROLE_OR_LIMIT),
                (P::RequestInProgress, IN_PROGRESS),
                (P::Invalid, INVALID_OR_MISMATCH),
            ],
        ),
        (
            "create_webhook",
            &[
                (P::Forbidden, BY_ROLE_OR_LIMIT),
                (P::RequestInProgress, IN_PROGRESS),
                (P::Invalid, INVALID_OR_MISMATCH),
            ],
        ),
        (
            "rotate_webhook_secret",
            &[
                (P::RequestInProgress, IN_PROGRESS),
                (P::Invalid, INVALID_OR_MISMATCH),
            ],
        ),
        ("update_me", &[(P::Forbidden, BY_ROLE)]),
        ("change_password", &[(P::Forbidden, BY_COOKIE)]),
        (
            "end_session",
            &[
                (P::Forbidden, BY_COOKIE),
                (P::NotFound, "You have no active session with this ID."),
            ],
        ),
        (
            "start_checkout",
            &[
                (
                    P::AlreadySubscribed,
                    "Billing is off, the tenant already has a subscription, or a request with this `Idempotency-Key` is still in progress.",
                ),
                (P::Unavailable, STRIPE_UNAVAILABLE),
            ],
        ),
        (
            "open_billing_portal",
            &[
                (
                    P::NotSubscribed,
                    "Billing is off, or the tenant has never started a subscription.",
                ),
                (P::Unavailable, STRIPE_UNAVAILABLE),
            ],
        ),
        (
            "receive_stripe_event",
            &[
                (P::Malformed, "The signature or the body is invalid."),
                (P::BillingOff, "Billing is off."),
                (
                    P::RequestTimeout,
                    "The request body was not received in time.",
                ),
                (P::ContentTooLarge, "The request body is too large."),
            ],
        ),
        (
            "echo",
            &[
                (
                    P::SubscriptionNeeded,
                    "The key is on a paid plan, and its tenant has no valid subscription. The request does not count against any limit.",
                ),
                (
                    P::Malformed,
                    "Malformed request; for example, two different keys were sent.",
                ),
                (
                    P::QuotaExceeded,
                    "Rate limit or quota exceeded, or limits can't be checked right now. Retry after `Retry-After` seconds.",
                ),
                (P::Unavailable, UNCHECKED),
            ],
        ),
        ("check", &[(P::Unavailable, UNCHECKED)]),
        ("forward_auth", &[(P::Unavailable, UNCHECKED)]),
        ("serving", &[(P::Unavailable, "The server is stopping.")]),
        (
            "ready",
            &[(
                P::Unavailable,
                "PostgreSQL is unreachable, migrations are pending, or the server is stopping.",
            )],
        ),
    ]
};

/// Default descriptions of errors.
const ERRORS: &[(ProblemCode, &str)] = {
    use ProblemCode as P;
    &[
        (P::Malformed, "Malformed request. No changes were made."),
        (
            P::Unauthorized,
            "Missing or invalid credentials. Nothing was charged.",
        ),
        (P::Forbidden, BY_ROLE),
        (P::NotFound, "Not found, or belongs to another tenant."),
        (
            P::RequestTimeout,
            "The request body was not received in time.",
        ),
        (P::ContentTooLarge, "The request body is too large."),
        (
            P::UnsupportedMediaType,
            "The request body is not `application/json`.",
        ),
        (P::Invalid, "Validation failed; see `errors`."),
        (
            P::QuotaExceeded,
            "Rate limit exceeded. Retry after `Retry-After` seconds.",
        ),
        (
            P::TooManyRequests,
            "Rate limit exceeded. Retry after `Retry-After` seconds.",
        ),
        (P::Internal, "Internal server error."),
        (
            P::Unavailable,
            "A dependency is unavailable. Retry after `Retry-After` seconds.",
        ),
    ]
};

/// Returns the errors derived from the path and the arguments of an operation.
fn derived_errors(operation: &Operation<'_>) -> Vec<ProblemCode> {
    use ProblemCode as P;
    if operation.id() == "live" {
        return vec![P::Internal];
    }
    let mut errors = vec![P::Internal, P::Unavailable];
    if operation.value.get("security").is_some() {
        errors.extend([P::Malformed, P::Unauthorized]);
    }
    let is_webhook = operation.id() == "receive_stripe_event";
    let is_billing = operation.path.starts_with("/billing") && !is_webhook;
    if operation.path.starts_with("/admin") || is_billing {
        errors.push(P::Forbidden);
    }
    if operation.path.starts_with("/auth") || operation.path.starts_with("/admin") || is_billing {
        errors.push(P::TooManyRequests);
    }
    if operation.value.get("requestBody").is_some() && !is_webhook {
        errors.extend([
            P::Malformed,
            P::RequestTimeout,
            P::ContentTooLarge,
            P::UnsupportedMediaType,
            P::Invalid,
        ]);
    }
    if operation.has_parameter(&["path"]) {
        errors.push(P::NotFound);
    }
    if operation.has_parameter(&["query", "header"]) {
        errors.extend([P::Malformed, P::Invalid]);
    }
    if operation.id() == "echo" {
        errors.push(P::QuotaExceeded);
    }
    errors
}

pub(super) fn add_error_responses(document: &mut Value) {
    for_each_operation(document, |mut operation| {
        let own = OWN_ERRORS.iter().find(|(id, _)| *id == operation.id());
        let own = own.map(|(_, errors)| *errors).unwrap_or_default();
        let derived = derived_errors(&operation);
        let derived = derived.into_iter().map(|code| {
            let general = ERRORS.iter().find(|(it, _)| *it == code);
            (code, general.map_or(code.title(), |(_, text)| *text))
        });
        let all = own.iter().copied().chain(derived).collect::<Vec<_>>();
        if let Some(responses) = operation.responses() {
            for (code, description) in all {
                responses
                    .entry(code.status().to_string())
                    .or_insert_with(|| error_response(code, description));
            }
        }
    });
}

fn error_response(code: ProblemCode, description: &str) -> Value {
    json!({
        "description": description,
        "content": {
            "application/problem+json": {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "example": problem::example(code, "https://quota.example.com"),
            }
        },
    })
}

/// Documents that 401 and 503 responses from forward-auth have no body: gateways act only on the status and headers.
pub(super) fn empty_forward_auth_errors(document: &mut Value) {
    for_each_operation(document, |mut operation| {
        if operation.id() != "forward_auth" {
            return;
        }
        for (status, response) in operation.responses().into_iter().flatten() {
            if let ("401" | "503", Some(response)) = (status.as_str(), response.as_object_mut()) {
                response.remove("content");
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_with_own_errors_exists() {
        let mut document: Value = serde_json::from_str(&crate::openapi::text()).unwrap();
        let mut ids = Vec::new();
        for_each_operation(&mut document, |it| ids.push(it.id().to_owned()));
        assert!(ids.len() > 25, "{ids:?}");
        for (id, _) in OWN_ERRORS {
            assert!(ids.iter().any(|it| it == id), "{id}");
        }
    }
}
