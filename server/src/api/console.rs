//! `/console`: the console, which is embedded in the server's binary.
//!
//! The build embeds the output of `cargo xtask console`. Without that output, the server still works, and `/console`
//! explains how to build the console.

use poem::{
    Endpoint, Request, Response,
    endpoint::make_sync,
    get,
    http::{HeaderMap, HeaderValue, header},
};

use super::{
    document::html::{page, respond},
    problem::ApiError,
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
/// Allows only files from this server and `data:` images, but no inline scripts or styles. WebAssembly may be compiled,
/// but strings are never evaluated as code.
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

#[derive(Debug, Clone, Copy, PartialEq)]
enum Coding {
    Brotli,
    Gzip,
    Identity,
}

impl Coding {
    const fn name(self) -> &'static str {
        match self {
            Self::Brotli => "br",
            Self::Gzip => "gzip",
            Self::Identity => "identity",
        }
    }
}

/// Returns the coding that the client prefers (RFC 9110, section 12.5.3). Of several codings that the client prefers
/// equally, returns the one with the smallest result.
fn choose_coding(headers: &HeaderMap) -> Coding {
    let accepted: Vec<(&str, f32)> = headers
        .get_all(header::ACCEPT_ENCODING)
        .iter()
        .filter_map(|field| field.to_str().ok())
        .flat_map(|field| field.split(','))
        .map(|element| {
            let (name, parameter) = element.split_once(';').unwrap_or((element, "q=1"));
            let quality = parameter
                .split_once('=')
                .filter(|(name, _)| name.trim().eq_ignore_ascii_case("q"))
                .and_then(|(_, value)| value.trim().parse().ok());
            // A coding with a malformed quality value is not acceptable.
            (name.trim(), quality.unwrap_or(0.0))
        })
        .collect();
    let quality = |wanted: &str| {
        let found = accepted
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(wanted));
        found.map(|(_, quality)| *quality)
    };
    let mut best = (Coding::Identity, quality("identity").unwrap_or(0.0));
    for coding in [Coding::Gzip, Coding::Brotli] {
        let quality = quality(coding.name())
            .or_else(|| quality("*"))
            .unwrap_or(0.0);
        if quality > 0.0 && quality >= best.1 {
            best = (coding, quality);
        }
    }
    best.0
}

fn serve(file: &'static File, headers: &HeaderMap) -> Response {
    let coding = choose_coding(headers);
    let body = match coding {
        Coding::Brotli => file.brotli,
        Coding::Gzip => file.gzip,
        Coding::Identity => file.plain,
    };
    let cache = if file.name == INDEX { "no-cache" } else { YEAR };
    let mut response = respond(body, media_type(file.name), cache, CSP);
    let headers = response.headers_mut();
    headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    if coding != Coding::Identity {
        let name = HeaderValue::from_static(coding.name());
        headers.insert(header::CONTENT_ENCODING, name);
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
        // The console's own router shows the page for this path. A path with a file extension refers to a file that no
        // longer exists.
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

    #[test]
    fn the_coding_is_the_one_that_the_client_prefers() {
        let choose = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, text.parse().unwrap());
            choose_coding(&headers)
        };
        assert_eq!(choose("gzip, deflate, br, zstd"), Coding::Brotli);
        assert_eq!(choose("gzip, deflate"), Coding::Gzip);
        assert_eq!(choose("GZIP"), Coding::Gzip);
        assert_eq!(choose("*"), Coding::Brotli);
        assert_eq!(choose("br;q=0, *"), Coding::Gzip);
        assert_eq!(choose("br;q=0.5, gzip;q=0.9"), Coding::Gzip);
        assert_eq!(choose("br ; q=0.9 , gzip;Q=0.9"), Coding::Brotli);
        assert_eq!(choose("identity, gzip;q=0.5"), Coding::Identity);
        assert_eq!(choose("gzip;q=0"), Coding::Identity);
        assert_eq!(choose("gzip;q=0.000, *;q=0"), Coding::Identity);
        assert_eq!(choose("gzip;q=abc"), Coding::Identity);
        assert_eq!(choose("gzipped, brotli"), Coding::Identity);
        assert_eq!(choose_coding(&HeaderMap::new()), Coding::Identity);
        // The header can appear several times.
        let mut headers = HeaderMap::new();
        for coding in ["gzip", "br"] {
            headers.append(header::ACCEPT_ENCODING, coding.parse().unwrap());
        }
        assert_eq!(choose_coding(&headers), Coding::Brotli);
    }
}
