//! Web pages: the landing page, the OpenAPI document and its viewer, and one page per error type.

mod front_page;

use poem::{
    Endpoint, IntoResponse, Response, Route,
    endpoint::{make, make_sync},
    get,
    http::{HeaderValue, StatusCode, header},
};
use quota_common::{ProblemCode, problem::MEDIA_TYPE};

use self::front_page::{front_page, picture};
use super::problem::{self, ApiError};
use crate::config::Landing;

const JS: &str = "text/javascript; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SVG: &str = "image/svg+xml";
const WEBP: &str = "image/webp";
const STYLE: &str = include_str!("document/page.css");
const SCRIPT: &str = include_str!("document/page.js");
/// The metadata at the start of every page.
const META: &str = "<meta charset=\"utf-8\">\n\
    <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
    <meta name=\"color-scheme\" content=\"light dark\">";
const ICON: &str = include_str!("../../../desktop/ui/icon.svg");
/// The URLs contain no version, so cache these files only briefly.
const HOUR: &str = "public, max-age=3600";
/// Allows nothing from other origins, and nothing inline.
const CSP: &str = "default-src 'none'; style-src 'self'; img-src 'self' data:; script-src 'self'; connect-src 'self'; \
    form-action 'none'; base-uri 'none'; frame-ancestors 'none'";
/// The viewer sets inline styles and shows `data:` images.
const DOCS_CSP: &str = "default-src 'none'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; script-src 'self'; \
    connect-src 'self'; base-uri 'none'; frame-ancestors 'none'";

const DOCS: &str = include_str!("document/docs.html");
const DOCS_STYLE: &str = include_str!("document/docs.css");

const START: &str = r##"SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#ui",
  deepLinking: true,
  persistAuthorization: false,
  tryItOutEnabled: true,
});
"##;

pub(super) fn respond(
    body: impl Into<poem::Body>,
    media_type: &'static str,
    cache: &'static str,
    csp: &'static str,
) -> Response {
    let mut response = Response::builder().body(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(cache));
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(csp),
    );
    response
}

fn html(body: String) -> Response {
    respond(body, "text/html; charset=utf-8", "no-cache", CSP)
}

pub(super) fn page(title: &str, body: &str) -> Response {
    html(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n{META}\n<title>{title} · Quota</title>\n\
         <link rel=\"stylesheet\" href=\"/page.css\">\n<link rel=\"icon\" type=\"image/svg+xml\" href=\"/icon.svg\">\n</head>\n<body>\n\
         <main class=\"narrow\">\n<p class=\"up\"><a class=\"brand\" href=\"/\"><img src=\"/icon.svg\" alt=\"\" width=\"24\" \
         height=\"24\">Quota</a></p>\n{body}\n</main>\n</body>\n</html>\n"
    ))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Escapes text for HTML and turns backticks into `<code>` elements.
fn marked(text: &str) -> String {
    let parts = text.split('`').enumerate().map(|(index, part)| {
        let part = escape(part);
        if index % 2 == 0 {
            part
        } else {
            format!("<code>{part}</code>")
        }
    });
    parts.collect()
}

fn error_page(code: ProblemCode, base: &str) -> Response {
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

/// Returns whether the error is temporary, so that responses have a `Retry-After` header.
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
            "Retrying won't help. This request shows whether billing is set up on this server.",
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
            "The same request will fail until the previous key expires. To revoke that key immediately, set `replace_previous`.",
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

fn error_list() -> Response {
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

/// Extracts the viewer's style and script from the page that poem-openapi generates. That page contains both inline.
fn viewer(service_html: &str) -> Option<(String, String)> {
    let between = |start: &str, end: &str| {
        let from = service_html.find(start)? + start.len();
        let to = from + service_html[from..].find(end)?;
        Some(service_html[from..to].to_owned())
    };
    let style = between("<style charset=\"UTF-8\">", "</style>")?;
    // The bundle itself does not contain "</script>", so the first match is the end of the template's element.
    let script = between("<script charset=\"UTF-8\">", "</script>\n</head>")?;
    Some((style, script))
}

/// Serves `/`, `/page.css`, `/pictures`, `/problems`, `/docs`, and `/openapi.json`.
pub fn routes(
    landing: &Landing,
    base: &str,
    document: String,
    service_html: &str,
) -> impl Endpoint + use<> {
    let (style, script) = viewer(service_html).unwrap_or_default();
    let text = |body: String, media_type: &'static str, cache: &'static str, csp: &'static str| {
        let body = bytes::Bytes::from(body);
        get(make_sync(move |_| {
            respond(body.clone(), media_type, cache, csp)
        }))
    };
    let landing = front_page(landing, base);
    let docs = DOCS
        .replace("{{meta}}", META)
        .replace("{{base}}", &escape(base));
    let base = base.to_owned();
    Route::new()
        .at("/", get(make_sync(move |_| html(landing.clone()))))
        .at("/page.css", text(STYLE.to_owned(), CSS, HOUR, CSP))
        .at("/page.js", text(SCRIPT.to_owned(), JS, HOUR, CSP))
        .at("/icon.svg", text(ICON.to_owned(), SVG, HOUR, CSP))
        .at(
            "/pictures/:file",
            get(make(|request| {
                let found = request.raw_path_param("file").and_then(picture);
                async move { Ok::<_, poem::Error>(found.ok_or_else(ApiError::not_found)?) }
            })),
        )
        .at("/problems", get(make_sync(|_| error_list())))
        .at(
            "/problems/:slug",
            get(make(move |request| {
                let code = request
                    .raw_path_param("slug")
                    .and_then(ProblemCode::from_slug);
                let page = code
                    .map(|code| error_page(code, &base))
                    .ok_or_else(ApiError::not_found);
                async move { Ok::<_, poem::Error>(page?) }
            })),
        )
        .at(
            "/openapi.json",
            text(document, "application/json", "no-cache", CSP),
        )
        .at(
            "/docs",
            text(docs, "text/html; charset=utf-8", "no-cache", DOCS_CSP),
        )
        .at("/docs/swagger-ui.css", text(style, CSS, HOUR, DOCS_CSP))
        .at(
            "/docs/docs.css",
            text(DOCS_STYLE.to_owned(), CSS, HOUR, DOCS_CSP),
        )
        .at(
            "/docs/swagger-ui-bundle.js",
            text(script, JS, HOUR, DOCS_CSP),
        )
        .at("/docs/start.js", text(START.to_owned(), JS, HOUR, DOCS_CSP))
        .at(
            "/favicon.ico",
            get(make_sync(|_| StatusCode::NO_CONTENT.into_response())),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn viewer_splits_into_style_and_script() {
        let service = poem_openapi::OpenApiService::new((), "x", "1");
        let (style, script) =
            viewer(&service.swagger_ui_html()).expect("poem-openapi's page has both");
        assert!(style.len() > 50_000, "{}", style.len());
        assert!(
            script.len() > 500_000 && script.contains("SwaggerUIBundle"),
            "{}",
            script.len()
        );
        assert!(!script.contains("</script>"));
    }

    #[test]
    fn error_page_says_to_wait_only_if_the_error_passes() {
        for code in ProblemCode::ALL {
            let (advice, snippet) = retry(*code);
            assert_eq!(waits(*code), snippet == RETRY_AFTER, "{code:?}: {advice}");
        }
    }
}
