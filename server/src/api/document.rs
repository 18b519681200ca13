//! Web pages: the landing page, the OpenAPI document and its viewer, and one page per error type.

pub(super) mod html;
mod landing;
mod problems;

use std::sync::Arc;

use poem::{
    Endpoint, IntoResponse, Route,
    endpoint::{make, make_sync},
    get,
    http::StatusCode,
};
use quota_common::ProblemCode;

use self::{
    html::{CSP, HOUR, META, escape, html},
    landing::{front_page, picture},
    problems::{error_list, error_page},
};
use super::{problem::ApiError, static_file::StaticFile};
use crate::config::Landing;

const JS: &str = "text/javascript; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SVG: &str = "image/svg+xml";
const STYLE: &str = include_str!("document/page.css");
const SCRIPT: &str = include_str!("document/page.js");
const ICON: &str = include_str!("../../../desktop/ui/icon.svg");
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

/// Extracts the viewer's style and script from the page that poem-openapi generates, in which both are inline.
fn viewer(service_html: &str) -> Option<(String, String)> {
    let between = |start: &str, end: &str| {
        let from = service_html.find(start)? + start.len();
        let to = from + service_html[from..].find(end)?;
        Some(service_html[from..to].to_owned())
    };
    let style = between("<style charset=\"UTF-8\">", "</style>")?;
    // The script itself does not contain "</script>", so the first match is the end of the `<script>` element.
    let script = between("<script charset=\"UTF-8\">", "</script>\n</head>")?;
    Some((style, script))
}

/// Serves `/`, `/problems`, `/docs`, the files that these pages need, and `/openapi.json`.
pub fn routes(
    landing: &Landing,
    base: &str,
    document: String,
    service_html: &str,
) -> impl Endpoint + use<> {
    let (style, script) = viewer(service_html).unwrap_or_default();
    let text = |content: String, media_type, cache, csp| {
        let file = Arc::new(StaticFile::new(content, media_type, cache, csp));
        get(make(move |request| {
            let file = file.clone();
            async move { Ok::<_, poem::Error>(file.respond(request.headers()).await) }
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
}
