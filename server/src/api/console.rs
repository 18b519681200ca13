//! `/console`: the console, which is embedded in the server's binary.
//!
//! The build embeds the output of `cargo xtask console`. Without that output, the server still works, and `/console`
//! explains how to build the console.

use poem::{Endpoint, Request, Response, endpoint::make_sync, get, http::HeaderMap};

use super::{
    content_coding::{Coding, choose_coding, write_coding},
    document::html::page,
    problem::ApiError,
    static_file::respond,
};

struct File {
    name: &'static str,
    plain: &'static [u8],
    brotli: &'static [u8],
    gzip: &'static [u8],
}

// Defines `FILES`, sorted by name.
include!(concat!(env!("OUT_DIR"), "/console.rs"));

const INDEX: &str = "index.html";
/// `Cache-Control` for files whose names contain a hash of their content. Such a file never changes.
const YEAR: &str = "public, max-age=31536000, immutable";
/// Allows files from this server and `data:` images, but no inline scripts or styles. Scripts may compile WebAssembly,
/// but cannot evaluate strings as code.
const CSP: &str = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; \
    img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

fn media_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("svg") => "image/svg+xml",
        Some("txt") => "text/plain; charset=utf-8",
        Some("wasm") => "application/wasm",
        _ => "application/octet-stream",
    }
}

fn find(name: &str) -> Option<&'static File> {
    let at = FILES.binary_search_by(|file| file.name.cmp(name)).ok()?;
    FILES.get(at)
}

fn serve(file: &'static File, headers: &HeaderMap) -> Response {
    let coding = choose_coding(headers, &[Coding::Gzip, Coding::Brotli]);
    let body = match coding {
        Coding::Brotli => file.brotli,
        Coding::Gzip => file.gzip,
        Coding::Identity => file.plain,
    };
    let cache = if file.name == INDEX { "no-cache" } else { YEAR };
    let mut response = respond(body, media_type(file.name), cache, CSP);
    let headers = response.headers_mut();
    write_coding(coding, headers);
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
        // A path with a file extension refers to a missing file. For all other paths, the console's own router shows
        // the page.
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

/// Serves the paths below `/console`. Expects paths without that prefix.
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
}
