//! Pages for people: the landing page, the document and its viewer, and a page for every kind of problem.

use poem::{
    Endpoint, IntoResponse, Response, Result, Route,
    endpoint::make_sync,
    get,
    http::{HeaderValue, StatusCode, header},
    web::Path,
};
use quota_common::ProblemCode;

use super::problem::ApiError;

const JS: &str = "text/javascript; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const STYLE: &str = include_str!("document/page.css");
const LANDING: &str = include_str!("document/landing.html");
/// For as long as the binary runs, which is what the address names.
const HOUR: &str = "public, max-age=3600";
/// Nothing from elsewhere, and nothing inline.
const CSP: &str = "default-src 'none'; style-src 'self'; img-src 'self' data:; script-src 'self'; connect-src 'self'; \
    form-action 'none'; base-uri 'none'; frame-ancestors 'none'";
/// The viewer writes styles into its elements, and shows images from data.
const DOCS_CSP: &str = "default-src 'none'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; script-src 'self'; \
    connect-src 'self'; base-uri 'none'; frame-ancestors 'none'";

const DOCS: &str = r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quota API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
<link rel="icon" href="data:,">
</head>
<body>
<div id="ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"#;

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
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title} · Quota</title>\n\
         <link rel=\"stylesheet\" href=\"/page.css\">\n<link rel=\"icon\" href=\"data:,\">\n</head>\n<body>\n\
         <main class=\"narrow\">\n<p class=\"up\"><a href=\"/\">Quota</a></p>\n{body}\n</main>\n</body>\n</html>\n"
    ))
}

/// Text as HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Text as HTML, with what stands between backticks as code.
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

fn problem(code: ProblemCode) -> Response {
    page(
        code.title(),
        &format!(
            "<h1>{}</h1>\n<p><code>{}</code> · status {}</p>\n<p>{}</p>\n\
             <p>Every answer carries its id in <code>X-Request-Id</code>; it finds the request in the server's log.</p>\n\
             <p><a href=\"/problems\">All kinds of problems</a> · <a href=\"/docs\">The API</a></p>",
            code.title(),
            code.slug(),
            code.status(),
            marked(code.explanation()),
        ),
    )
}

fn problems() -> Response {
    let rows = ProblemCode::ALL.iter().map(|code| {
        format!(
            "<tr><td>{}</td><td><a href=\"/problems/{slug}\"><code>{slug}</code></a></td><td>{}</td></tr>\n",
            code.status(),
            code.title(),
            slug = code.slug(),
        )
    });
    page(
        "Problems",
        &format!(
            "<h1>Problems</h1>\n<p>Errors are <code>application/problem+json</code> (RFC 9457). Their \
             <code>type</code> leads to one of these pages.</p>\n<table>\n\
             <thead><tr><th>Status</th><th>Type</th><th>Meaning</th></tr></thead>\n<tbody>\n{}</tbody>\n</table>",
            rows.collect::<String>(),
        ),
    )
}

#[poem::handler]
fn problem_page(Path(slug): Path<String>) -> Result<Response> {
    Ok(problem(
        ProblemCode::from_slug(&slug).ok_or_else(ApiError::not_found)?,
    ))
}

/// Takes the viewer's two files out of the page that poem-openapi makes of them, which has all inline.
fn viewer(service_html: &str) -> Option<(String, String)> {
    let between = |start: &str, end: &str| {
        let from = service_html.find(start)? + start.len();
        let to = from + service_html[from..].find(end)?;
        Some(service_html[from..to].to_owned())
    };
    let style = between("<style charset=\"UTF-8\">", "</style>")?;
    // The bundle holds the text "</script>" only as the template's own end of it.
    let script = between("<script charset=\"UTF-8\">", "</script>\n</head>")?;
    Some((style, script))
}

/// `/`, `/page.css`, `/problems`, `/docs`, `/openapi.json`.
pub fn routes(base: &str, document: String, service_html: &str) -> impl Endpoint + use<> {
    let (style, script) = viewer(service_html).unwrap_or_default();
    let text = |body: String, media_type: &'static str, cache: &'static str, csp: &'static str| {
        let body = bytes::Bytes::from(body);
        get(make_sync(move |_| {
            respond(body.clone(), media_type, cache, csp)
        }))
    };
    let landing = LANDING
        .replace("{{version}}", env!("CARGO_PKG_VERSION"))
        .replace("{{base}}", &escape(base));
    Route::new()
        .at("/", get(make_sync(move |_| html(landing.clone()))))
        .at("/page.css", text(STYLE.to_owned(), CSS, HOUR, CSP))
        .at("/problems", get(make_sync(|_| problems())))
        .at("/problems/:slug", get(problem_page))
        .at(
            "/openapi.json",
            text(document, "application/json", "no-cache", CSP),
        )
        .at(
            "/docs",
            text(
                DOCS.to_owned(),
                "text/html; charset=utf-8",
                "no-cache",
                DOCS_CSP,
            ),
        )
        .at("/docs/swagger-ui.css", text(style, CSS, HOUR, DOCS_CSP))
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
    fn the_viewer_comes_apart_into_its_style_and_script() {
        let service = poem_openapi::OpenApiService::new((), "x", "1");
        let (style, script) =
            viewer(&service.swagger_ui_html()).expect("the page of poem-openapi has both");
        assert!(style.len() > 50_000, "{}", style.len());
        assert!(
            script.len() > 500_000 && script.contains("SwaggerUIBundle"),
            "{}",
            script.len()
        );
        assert!(!script.contains("</script>"));
    }
}
