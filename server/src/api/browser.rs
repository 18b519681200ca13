//! Browser sessions. They use the same tokens as other sessions, but in cookies that scripts cannot read.
//!
//! A client requests cookies with `X-Quota-Session: cookie`. The tokens are then set as cookies and omitted from the
//! body. These cookies are `HttpOnly` and `SameSite=Lax`. Over HTTPS, the prefix `__Host-` binds the cookies to this
//! host (RFC 6265bis 4.1.3.2). A request that uses them to make a change must come from this server's own pages, as
//! reported by the browser. It must also have a CSRF header derived from the session. The header's value is stored in a
//! cookie that only pages of this origin can read.

use poem::{
    Addr, IntoResponse, Request, Response,
    http::{HeaderMap, HeaderValue, Method, header},
};
use poem_openapi::{
    ApiResponse,
    registry::{MetaResponses, Registry},
};
use quota_common::{ProblemCode, SessionId};
use url::Url;

use super::problem::ApiError;
use crate::{
    auth::{device, session::Tokens, token::LIFETIME},
    state::AppState,
};

/// The header that requests cookies. Its value must be `cookie`.
pub const SESSION_FIELD: &str = "x-quota-session";
/// The header that contains the value of the CSRF cookie.
pub const CSRF_FIELD: &str = "x-quota-csrf";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionCookie {
    Access,
    Refresh,
    /// The only cookie that scripts can read. It is useless without the other cookies.
    Csrf,
    /// Identifies a browser that has signed in before. It outlives sessions and is not a credential.
    Device,
}

impl SessionCookie {
    /// The cookies that are set and deleted together with a session.
    const OF_SESSION: [Self; 3] = [Self::Access, Self::Refresh, Self::Csrf];

    const fn name(self, secure: bool) -> &'static str {
        match (self, secure) {
            (Self::Access, true) => "__Host-quota_access",
            (Self::Access, false) => "quota_access",
            (Self::Refresh, true) => "__Host-quota_refresh",
            (Self::Refresh, false) => "quota_refresh",
            (Self::Csrf, true) => "__Host-quota_csrf",
            (Self::Csrf, false) => "quota_csrf",
            (Self::Device, true) => "__Host-quota_device",
            (Self::Device, false) => "quota_device",
        }
    }
}

/// Headers that only proxies add. Their values do not matter.
const OF_PROXIES: [&str; 5] = [
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
];

/// Returns whether cookies require TLS. They do, unless a browser uses plain HTTP to connect to a server on its own
/// machine. Such a connection cannot be intercepted, and some browsers, such as Safari, reject cookies that require TLS
/// if they are sent over plain HTTP.
///
/// `Host` alone does not prove that the server is local: a proxy may send the name of its upstream, such as
/// `localhost`. Therefore, a server counts as local only if its public URL does not use HTTPS, the peer is on this
/// machine, and the request has no proxy headers. `Origin`, if present, must also be local.
fn is_secure(state: &AppState, request: &Request) -> bool {
    let page_is_local = match request.headers().get(header::ORIGIN) {
        None => true,
        Some(origin) => origin
            .to_str()
            .ok()
            .and_then(|origin| Url::parse(origin).ok())
            .is_some_and(|origin| origin.scheme() == "http" && is_local(&origin)),
    };
    !(page_is_local && is_sent_locally(state, request))
}

/// Returns whether the request was sent from this machine over plain HTTP and without a proxy.
fn is_sent_locally(state: &AppState, request: &Request) -> bool {
    let headers = request.headers();
    let peer_is_local = match &request.remote_addr().0 {
        Addr::SocketAddr(addr) => addr.ip().to_canonical().is_loopback(),
        _ => true,
    };
    let is_proxied = OF_PROXIES.iter().any(|name| headers.contains_key(*name));
    let host = headers.get(header::HOST).and_then(|it| it.to_str().ok());
    let host = host.and_then(|host| Url::parse(&format!("http://{host}")).ok());
    !state.config.public_url.starts_with("https:")
        && peer_is_local
        && !is_proxied
        && host.is_some_and(|host| is_local(&host))
}

/// Returns whether browsers consider the URL's host to be the local machine.
fn is_local(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

pub fn wants_cookies(headers: &HeaderMap) -> bool {
    headers
        .get(SESSION_FIELD)
        .is_some_and(|field| field.as_bytes() == b"cookie")
}

/// Returns the value of a cookie. Always reads cookies with names that only a secure origin can set. Reads other
/// cookies only if `is_sent_locally` returns `true` for the request. Does not check whether the page that sent the
/// request may make changes.
pub fn cookie<'a>(
    state: &AppState,
    request: &'a Request,
    cookie: SessionCookie,
) -> Option<&'a str> {
    let named = |secure| {
        let name = cookie.name(secure);
        request
            .headers()
            .get_all(header::COOKIE)
            .iter()
            .filter_map(|field| field.to_str().ok())
            .flat_map(|field| field.split(';'))
            .filter_map(|pair| pair.trim().split_once('='))
            .find(|(it, _)| *it == name)
            .map(|(_, value)| value)
    };
    named(true).or_else(|| {
        is_sent_locally(state, request)
            .then(|| named(false))
            .flatten()
    })
}

/// Requires the request to come from one of this server's pages. Checks `Sec-Fetch-Site` or, if that is missing,
/// `Origin`. Rejects requests that have neither header.
pub fn same_origin(state: &AppState, headers: &HeaderMap) -> Result<(), ApiError> {
    let rejected = || {
        ApiError::new(
            ProblemCode::Forbidden,
            "Cookie authentication is only accepted from this server's own pages.",
        )
    };
    if let Some(site) = headers.get("sec-fetch-site") {
        return if site.as_bytes() == b"same-origin" {
            Ok(())
        } else {
            Err(rejected())
        };
    }
    let text = |name| headers.get(name).and_then(|it| it.to_str().ok());
    let origin = text(header::ORIGIN)
        .and_then(|origin| Url::parse(origin).ok())
        .ok_or_else(rejected)?;
    let own = |base: &str| Url::parse(base).is_ok_and(|url| url.origin() == origin.origin());
    let here = text(header::HOST).is_some_and(|host| own(&format!("{}://{host}", origin.scheme())));
    if here || own(&state.config.public_url) {
        Ok(())
    } else {
        Err(rejected())
    }
}

/// Checks a request that was authenticated with a session cookie. A request that could make a change must come from
/// this server's own pages and must have the CSRF header.
pub fn may_change(state: &AppState, request: &Request, session: SessionId) -> Result<(), ApiError> {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return Ok(());
    }
    same_origin(state, request.headers())?;
    if csrf_of(state, request.headers()) == Some(session) {
        return Ok(());
    }
    Err(ApiError::new(
        ProblemCode::Forbidden,
        "X-Quota-CSRF must contain the value of the session's CSRF cookie.",
    ))
}

/// Returns the session to which the token in the CSRF header belongs.
fn csrf_of(state: &AppState, headers: &HeaderMap) -> Option<SessionId> {
    let sent = headers.get(CSRF_FIELD)?.to_str().ok()?;
    state.sessions.of_csrf_token(sent)
}

/// Returns the refresh token from its cookie, and the session to which the token in the CSRF header belongs. Returns
/// `None` if the cookie is missing. Requires the request to come from this server's own pages. The caller must check
/// that the refresh token belongs to the session.
pub fn refresh_token<'a>(
    state: &AppState,
    request: &'a Request,
) -> Result<Option<(&'a str, SessionId)>, ApiError> {
    let headers = request.headers();
    same_origin(state, headers)?;
    let Some(token) = cookie(state, request, SessionCookie::Refresh) else {
        return Ok(None);
    };
    let session = csrf_of(state, headers).ok_or_else(|| {
        ApiError::new(
            ProblemCode::Forbidden,
            "X-Quota-CSRF must contain the value of the session's CSRF cookie.",
        )
    })?;
    Ok(Some((token, session)))
}

/// Returns the `Set-Cookie` headers that store a session's tokens in cookies.
pub fn keep(state: &AppState, request: &Request, tokens: &Tokens) -> Vec<HeaderValue> {
    let days = u64::from(state.config.session_days) * 86_400;
    let csrf = state.sessions.csrf_token(tokens.session);
    let secure = is_secure(state, request);
    let cookies = [
        (SessionCookie::Access, &tokens.access, u64::from(LIFETIME)),
        (SessionCookie::Refresh, &tokens.refresh, days),
        (SessionCookie::Csrf, &csrf, days),
    ];
    cookies
        .iter()
        .filter_map(|(cookie, value, age)| set_cookie(secure, *cookie, value, *age))
        .collect()
}

/// Returns the `Set-Cookie` header for the cookie that identifies this browser at the next sign-in.
pub fn keep_device(state: &AppState, request: &Request, device: &str) -> Option<HeaderValue> {
    let age = device::LIFETIME.as_secs();
    set_cookie(
        is_secure(state, request),
        SessionCookie::Device,
        device,
        age,
    )
}

/// Returns the `Set-Cookie` headers that delete a session's cookies.
pub fn forget(state: &AppState, request: &Request) -> Vec<HeaderValue> {
    let secure = is_secure(state, request);
    SessionCookie::OF_SESSION
        .iter()
        .filter_map(|cookie| set_cookie(secure, *cookie, "", 0))
        .collect()
}

fn set_cookie(
    secure: bool,
    cookie: SessionCookie,
    value: &str,
    max_age: u64,
) -> Option<HeaderValue> {
    let mut text = format!(
        "{}={value}; Path=/; Max-Age={max_age}; SameSite=Lax",
        cookie.name(secure)
    );
    if secure {
        text.push_str("; Secure");
    }
    if cookie != SessionCookie::Csrf {
        text.push_str("; HttpOnly");
    }
    let mut field = HeaderValue::from_str(&text).ok()?;
    field.set_sensitive(true);
    Some(field)
}

/// A response that also sets cookies, if the client requested them.
pub struct WithCookies<T> {
    pub answer: T,
    pub cookies: Vec<HeaderValue>,
}

impl<T: IntoResponse> IntoResponse for WithCookies<T> {
    fn into_response(self) -> Response {
        let mut response = self.answer.into_response();
        for cookie in self.cookies {
            response.headers_mut().append(header::SET_COOKIE, cookie);
        }
        response
    }
}

impl<T: ApiResponse> ApiResponse for WithCookies<T> {
    fn meta() -> MetaResponses {
        T::meta()
    }

    fn register(registry: &mut Registry) {
        T::register(registry);
    }
}
