//! The pages about errors: one page per error type, and a list of all error types.

use poem::Response;
use quota_common::{ProblemCode, problem::MEDIA_TYPE};

use super::html::{escape, marked, page};
use crate::api::problem;

/// Returns the page that explains an error type and shows how to retry.
pub(super) fn error_page(code: ProblemCode, base: &str) -> Response {
    let example = serde_json::to_string_pretty(&problem::example(code, base)).unwrap_or_default();
    let wait = if waits(code) { "retry-after: 3\n" } else { "" };
    let (advice, snippet) = retry(code);
    page(
        code.title(),
        &format!(
            "<h1>{title}</h1>\n<p><code>{slug}</code> · HTTP {status}</p>\n<p>{explanation}</p>\n\
             <h2>Example response</h2>\n<pre tabindex=\"0\" aria-label=\"Example response\">HTTP/1.1 {status}\ncontent-type: {MEDIA_TYPE}\n{wait}\n{example}</pre>\n\
             <h2>Retry</h2>\n<p>{advice}</p>\n<pre tabindex=\"0\" aria-label=\"Example of a retry\">{snippet}</pre>\n\
             <p>Every response includes its request ID in <code>X-Request-Id</code>. Use it to find the request in the \
             server's log.</p>\n<p><a href=\"/problems\">All errors</a> · <a href=\"/docs\">API docs</a></p>",
            title = code.title(),
            slug = code.slug(),
            status = code.status(),
            explanation = marked(code.explanation()),
            example = escape(&example),
            advice = marked(advice),
            snippet = escape(&snippet.replace("{base}", base.trim_end_matches('/'))),
        ),
    )
}

/// Returns whether the caller should wait for the number of seconds in `Retry-After`, and then retry.
const fn waits(code: ProblemCode) -> bool {
    matches!(
        code,
        ProblemCode::RequestInProgress
            | ProblemCode::QuotaExceeded
            | ProblemCode::TooManyRequests
            | ProblemCode::Unavailable
            | ProblemCode::ReducedCapacity
            | ProblemCode::InsufficientStorage
    )
}

/// Explains how to retry after an error, with an example.
const fn retry(code: ProblemCode) -> (&'static str, &'static str) {
    match code {
        ProblemCode::RequestInProgress
        | ProblemCode::QuotaExceeded
        | ProblemCode::TooManyRequests
        | ProblemCode::Unavailable
        | ProblemCode::ReducedCapacity
        | ProblemCode::InsufficientStorage => (
            "Wait for the number of seconds in `Retry-After`, then send the same request again.",
            RETRY_AFTER,
        ),
        ProblemCode::RequestTimeout | ProblemCode::Internal => (
            "Send the same request again. With an `Idempotency-Key`, a request that was already processed is not processed again.",
            r#"curl --retry 3 {base}/admin/plans \
  -H "Authorization: Bearer $ACCESS_TOKEN" -H "Content-Type: application/json" \
  -H "Idempotency-Key: 5f0c1a9e" -d '{"name": "Starter", "default_rpm": 600}'"#,
        ),
        ProblemCode::Malformed | ProblemCode::Invalid | ProblemCode::UnsupportedMediaType => (
            "Retrying won't help. Fix the request first.",
            r#"curl {base}/admin/plans \
  -H "Authorization: Bearer $ACCESS_TOKEN" -H "Content-Type: application/json" \
  -d '{"name": "Starter", "default_rpm": 600}'"#,
        ),
        ProblemCode::Unauthorized => (
            "Send a valid API key, or get a new access token first.",
            r#"curl {base}/v1/echo -H "X-API-Key: $API_KEY"

curl {base}/auth/refresh -H "Content-Type: application/json" \
  -d '{"refresh_token": "qr_…"}'"#,
        ),
        ProblemCode::WrongCredentials | ProblemCode::EmailTaken => (
            "Sign in with the account's email and password.",
            r#"curl {base}/auth/login -H "Content-Type: application/json" \
  -d '{"email": "ada@example.com", "password": "…"}'"#,
        ),
        ProblemCode::RegistrationClosed => (
            "Retrying won't help. Once the operator has created your account, sign in.",
            r#"curl {base}/auth/login -H "Content-Type: application/json" \
  -d '{"email": "ada@example.com", "password": "…"}'"#,
        ),
        ProblemCode::LimitReached => (
            "Delete a resource of the same kind, then send the request again.",
            r#"curl -X DELETE {base}/admin/plans/$PLAN_ID -H "Authorization: Bearer $ACCESS_TOKEN""#,
        ),
        ProblemCode::SubscriptionNeeded | ProblemCode::NotSubscribed => (
            "Request a Stripe Checkout page, subscribe there, then send the original request again.",
            r#"curl -X POST {base}/billing/checkout -H "Authorization: Bearer $ACCESS_TOKEN""#,
        ),
        ProblemCode::AlreadySubscribed => (
            "Manage the existing subscription in the Stripe customer portal. This request returns a link to it.",
            r#"curl -X POST {base}/billing/portal -H "Authorization: Bearer $ACCESS_TOKEN""#,
        ),
        ProblemCode::BillingOff => (
            "Retrying won't help. This request shows whether billing is on.",
            r#"curl {base}/billing -H "Authorization: Bearer $ACCESS_TOKEN""#,
        ),
        ProblemCode::HeadersTooLarge => (
            "Send fewer or shorter headers.",
            r#"curl -i {base}/v1/echo -H "X-API-Key: $API_KEY""#,
        ),
        ProblemCode::Forbidden => (
            "Retrying won't help. Check your role, and ask an owner or admin to change it.",
            r#"curl {base}/auth/me -H "Authorization: Bearer $ACCESS_TOKEN""#,
        ),
        ProblemCode::NotFound => (
            "Retrying won't help. List the resources to find the right ID.",
            r#"curl "{base}/admin/plans?limit=100" -H "Authorization: Bearer $ACCESS_TOKEN""#,
        ),
        ProblemCode::MethodNotAllowed => (
            "Use one of the methods in the `Allow` header.",
            r#"curl -i -X GET {base}/admin/plans -H "Authorization: Bearer $ACCESS_TOKEN""#,
        ),
        ProblemCode::PlanInUse => (
            "Move each key to another plan, then delete the plan.",
            r#"curl -X PATCH {base}/admin/api-keys/$KEY_ID \
  -H "Authorization: Bearer $ACCESS_TOKEN" -H "Content-Type: application/json" \
  -d '{"plan_id": "019ab4e1-7c00-7000-8000-0000000000a1"}'

curl -X DELETE {base}/admin/plans/$PLAN_ID -H "Authorization: Bearer $ACCESS_TOKEN""#,
        ),
        ProblemCode::PreviousKeyActive => (
            "The same request will fail until the previous secret expires. To revoke the previous secret immediately, set `replace_previous`.",
            r#"curl {base}/admin/api-keys/$KEY_ID/rotate \
  -H "Authorization: Bearer $ACCESS_TOKEN" -H "Content-Type: application/json" \
  -d '{"replace_previous": true}'"#,
        ),
        ProblemCode::NameTaken => (
            "Send the request again with another name.",
            r#"curl {base}/admin/plans \
  -H "Authorization: Bearer $ACCESS_TOKEN" -H "Content-Type: application/json" \
  -d '{"name": "Starter 2", "default_rpm": 600}'"#,
        ),
        ProblemCode::ContentTooLarge => (
            "Retrying won't help. Send only the fields that the API documents.",
            r#"curl -X PATCH {base}/admin/plans/$PLAN_ID \
  -H "Authorization: Bearer $ACCESS_TOKEN" -H "Content-Type: application/json" \
  -d '{"default_rpm": 1200}'"#,
        ),
        ProblemCode::IdempotencyMismatch => (
            "Send the new request with a new `Idempotency-Key`.",
            r#"curl {base}/admin/plans \
  -H "Authorization: Bearer $ACCESS_TOKEN" -H "Content-Type: application/json" \
  -H "Idempotency-Key: $(uuidgen)" -d '{"name": "Pro", "default_rpm": 6000}'"#,
        ),
    }
}

const RETRY_AFTER: &str = r#"async function send(url, options, attempts = 5) {
  for (let attempt = 1; ; attempt++) {
    const response = await fetch(url, options);
    const seconds = Number(response.headers.get("Retry-After"));
    if (response.ok || !seconds || attempt === attempts) return response;
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
  }
}

await send("{base}/v1/echo", { headers: { "X-API-Key": apiKey } });"#;

/// Returns the list of all error types.
pub(super) fn error_list() -> Response {
    let rows = ProblemCode::ALL.iter().map(|code| {
        format!(
            "<tr><td>{}</td><td><a href=\"/problems/{slug}\"><code>{slug}</code></a></td><td>{}</td></tr>\n",
            code.status(),
            code.title(),
            slug = code.slug(),
        )
    });
    page(
        "Errors",
        &format!(
            "<h1>Errors</h1>\n<p>Errors are <code>{MEDIA_TYPE}</code> (RFC 9457). The <code>type</code> of each \
             error links to one of these pages.</p>\n<table>\n\
             <thead><tr><th>Status</th><th>Type</th><th>Meaning</th></tr></thead>\n<tbody>\n{}</tbody>\n</table>",
            rows.collect::<String>(),
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_page_says_to_wait_only_if_the_error_is_temporary() {
        for code in ProblemCode::ALL {
            let (advice, snippet) = retry(*code);
            assert_eq!(waits(*code), snippet == RETRY_AFTER, "{code:?}: {advice}");
        }
    }
}
