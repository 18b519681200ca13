//! HTML and response headers that several pages share.

use poem::Response;

use crate::api::static_file::respond;

/// The metadata at the start of every page.
pub(super) const META: &str = "<meta charset=\"utf-8\">\n\
    <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
    <meta name=\"color-scheme\" content=\"light dark\">";
/// Allows only resources from this origin and `data:` images. Does not allow inline scripts or styles.
pub(super) const CSP: &str = "default-src 'none'; style-src 'self'; img-src 'self' data:; script-src 'self'; connect-src 'self'; \
    form-action 'none'; base-uri 'none'; frame-ancestors 'none'";
/// `Cache-Control` for files whose URLs contain no version, so that browsers cache these files only briefly.
pub(super) const HOUR: &str = "public, max-age=3600";

pub(super) fn html(body: String) -> Response {
    respond(body, "text/html; charset=utf-8", "no-cache", CSP)
}

pub(in crate::api) fn page(title: &str, body: &str) -> Response {
    html(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n{META}\n<title>{title} · Quota</title>\n\
         <link rel=\"stylesheet\" href=\"/page.css\">\n<link rel=\"icon\" type=\"image/svg+xml\" href=\"/icon.svg\">\n</head>\n<body>\n\
         <main class=\"narrow\">\n<p class=\"up\"><a class=\"brand\" href=\"/\"><img src=\"/icon.svg\" alt=\"\" width=\"24\" \
         height=\"24\">Quota</a></p>\n{body}\n</main>\n</body>\n</html>\n"
    ))
}

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Escapes text for HTML, and turns backticks into `<code>` elements.
pub(super) fn marked(text: &str) -> String {
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
