//! `/console`: the web console, embedded in the binary.
//!
//! Embeds what `cargo xtask console` had built when the server was compiled. Without that, the server works but shows
//! instructions for building the console.

use poem::{
    Endpoint, Request, Response,
    endpoint::make_sync,
    get,
    http::{HeaderMap, HeaderValue, header},
};

use super::{
    document::{page, respond},
    problem::ApiError,
};

/// A file of the console.
struct File {
    name: &'static str,
    plain: &'static [u8],
    /// The same content, compressed.
    gzip: &'static [u8],
}

// `FILES`, sorted by name.
include!(concat!(env!("OUT_DIR"), "/console.rs"));

const INDEX: &str = "index.html";
/// File names contain a hash of the content, so a file never changes.
const YEAR: &str = "public, max-age=31536000, immutable";
/// Allows nothing from other origins and nothing inline. Allows compiling WebAssembly, but not evaluating text.
const CSP: &str = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; \
    img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

fn media_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("svg") => "image/svg+xml",
        Some("wasm") => "application/wasm",
        _ => "application/octet-stream",
    }
}

fn find(name: &str) -> Option<&'static File> {
    let at = FILES.binary_search_by(|file| file.name.cmp(name)).ok()?;
    FILES.get(at)
}

/// Whether the client accepts gzip: `gzip` or `*` with a weight above zero (RFC 9110, 12.5.3).
fn takes_gzip(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::ACCEPT_ENCODING)
        .iter()
        .filter_map(|field| field.to_str().ok())
        .flat_map(|field| field.split(','))
        .any(|coding| {
            let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
            let refused = weight
                .trim()
                .strip_prefix("q=")
                .is_some_and(|weight| weight.parse::<f32>().is_ok_and(|weight| weight <= 0.0));
            matches!(name.trim(), "gzip" | "*") && !refused
        })
}

fn serve(file: &'static File, headers: &HeaderMap) -> Response {
    let gzip = takes_gzip(headers);
    let body = if gzip { file.gzip } else { file.plain };
    let cache = if file.name == INDEX { "no-cache" } else { YEAR };
    let mut response = respond(body, media_type(file.name), cache, CSP);
    let headers = response.headers_mut();
    headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    if gzip {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}

fn not_built() -> Response {
    page(
        "Console not built",
        "<h1>Console not built</h1>\n<p>This server was compiled without the console. From the source code, \
         <code>cargo xtask run</code> builds and runs both; <code>cargo xtask console</code> builds only the console, \
         which the next build of the server embeds.</p>\n<p>The <a href=\"/docs\">API</a> works without it.</p>",
    )
}

fn answer(request: &Request) -> Result<Response, ApiError> {
    let name = request.uri().path().trim_start_matches('/');
    let Some(index) = find(INDEX) else {
        return Ok(not_built());
    };
    match find(name) {
        Some(file) => Ok(serve(file, request.headers())),
        // A path with a file extension is a missing file. Any other path is a page that the console routes itself.
        None if name
            .rsplit('/')
            .next()
            .is_some_and(|last| last.contains('.')) =>
        {
            Err(ApiError::not_found())
        }
        None => Ok(serve(index, request.headers())),
    }
}

/// The endpoint to mount at `/console`, which strips that prefix.
pub fn endpoint() -> impl Endpoint + use<> {
    get(make_sync(|request| answer(&request)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_sorted_for_binary_search() {
        assert!(FILES.is_sorted_by_key(|file| file.name));
    }

    #[test]
    fn gzip_is_only_sent_to_clients_that_accept_it() {
        let takes = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, text.parse().unwrap());
            takes_gzip(&headers)
        };
        assert!(takes("gzip"));
        assert!(takes("br, gzip;q=0.5"));
        assert!(takes("*"));
        assert!(!takes("br"));
        assert!(!takes("gzip;q=0"));
        assert!(!takes("gzipped"));
        assert!(!takes_gzip(&HeaderMap::new()));
    }
}
