//! Sessions of browsers: the same tokens as everybody's, in cookies that no script can read.
//!
//! A caller asks for cookies with `X-Quota-Session: cookie`. Both tokens are then in cookies that are
//! `HttpOnly`, `SameSite=Lax` and bound to this host alone (`__Host-`, RFC 6265bis 4.1.3.2), and in no body. What
//! changes something with them must come from the server's own pages, by what the browser says of it, and carry
//! a field that follows from the session, which only a page of this origin can read from its cookie.

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

/// Asks for cookies, with the value `cookie`.
pub const SESSION_FIELD: &str = "x-quota-session";
/// Carries what the cookie of the same purpose holds.
pub const CSRF_FIELD: &str = "x-quota-csrf";

/// The cookies of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    Access,
    Refresh,
    /// The only one that scripts read: it is worth nothing without the others.
    Csrf,
    /// Where this browser has signed in before. It outlives sessions, and is no credential.
    Device,
}

impl Kept {
    /// Those that begin and end with a session.
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

/// Fields that only proxies add. Their values do not matter here.
const OF_PROXIES: [&str; 5] = [
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
];

/// Whether cookies are set for TLS only. All are, unless the browser speaks plain HTTP to a server on its own machine:
/// it would refuse such cookies, and nobody listens in between.
///
/// `Host` alone does not prove that: a proxy may send the name of its upstream, such as `localhost`. So the peer has to
/// be on this machine, no field may come from a proxy, and the page, where the browser names it, has to be local too.
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

/// Whether the address is this machine's, as browsers decide it.
fn is_local(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

/// The caller wants its tokens in cookies.
pub fn wants_cookies(headers: &HeaderMap) -> bool {
    headers
        .get(SESSION_FIELD)
        .is_some_and(|field| field.as_bytes() == b"cookie")
}

/// What one of the cookies holds. The names that only a secure origin can set are always read; the others only from
/// this machine, whatever page sent them: whether that page may do something is decided elsewhere.
pub fn cookie<'a>(state: &AppState, request: &'a Request, kept: Kept) -> Option<&'a str> {
    let named = |secure| {
        let name = kept.name(secure);
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

/// The request comes from a page of this server, as far as browsers tell: by `Sec-Fetch-Site`, else by `Origin`.
/// What tells neither is refused.
pub fn same_origin(state: &AppState, headers: &HeaderMap) -> Result<(), ApiError> {
    let refused = || {
        ApiError::new(
            ProblemCode::Forbidden,
            "Cookies are believed only in requests from the server's own pages.",
        )
    };
    if let Some(site) = headers.get("sec-fetch-site") {
        return if site.as_bytes() == b"same-origin" {
            Ok(())
        } else {
            Err(refused())
        };
    }
    let text = |name| headers.get(name).and_then(|it| it.to_str().ok());
    let origin = text(header::ORIGIN)
        .and_then(|origin| Url::parse(origin).ok())
        .ok_or_else(refused)?;
    let own = |base: &str| Url::parse(base).is_ok_and(|url| url.origin() == origin.origin());
    let here = text(header::HOST).is_some_and(|host| own(&format!("{}://{host}", origin.scheme())));
    if here || own(&state.config.public_url) {
        Ok(())
    } else {
        Err(refused())
    }
}

/// What a change by cookie must fulfil, once its session is known.
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
        "X-Quota-CSRF must carry what the session's cookie of that purpose holds.",
    ))
}

/// The session that the field was made for.
fn csrf_of(state: &AppState, headers: &HeaderMap) -> Option<SessionId> {
    let sent = headers.get(CSRF_FIELD)?.to_str().ok()?;
    state.sessions.of_csrf_token(sent)
}

/// The refresh token of a cookie caller, once the request has shown that it may use it; `None` when there is no
/// such cookie.
pub fn refresh_token<'a>(
    state: &AppState,
    request: &'a Request,
) -> Result<Option<(&'a str, SessionId)>, ApiError> {
    let headers = request.headers();
    same_origin(state, headers)?;
    let Some(token) = cookie(state, request, Kept::Refresh) else {
        return Ok(None);
    };
    let session = csrf_of(state, headers).ok_or_else(|| {
        ApiError::new(
            ProblemCode::Forbidden,
            "X-Quota-CSRF must carry what the session's cookie of that purpose holds.",
        )
    })?;
    Ok(Some((token, session)))
}

/// Fields that set the cookies of a session.
pub fn keep(state: &AppState, request: &Request, tokens: &Tokens) -> Vec<HeaderValue> {
    let days = u64::from(state.config.session_days) * 86_400;
    let csrf = state.sessions.csrf_token(tokens.session);
    let secure = is_secure(state, request);
    let cookies = [
        (Kept::Access, &tokens.access, u64::from(LIFETIME)),
        (Kept::Refresh, &tokens.refresh, days),
        (Kept::Csrf, &csrf, days),
    ];
    cookies
        .iter()
        .filter_map(|(kept, value, age)| set_cookie(secure, *kept, value, *age))
        .collect()
}

/// The field that sets the cookie by which the browser is known at its next sign-in.
pub fn keep_device(state: &AppState, request: &Request, device: &str) -> Option<HeaderValue> {
    let age = device::LIFETIME.as_secs();
    set_cookie(is_secure(state, request), Kept::Device, device, age)
}

/// Fields that remove the cookies of a session.
pub fn forget(state: &AppState, request: &Request) -> Vec<HeaderValue> {
    let secure = is_secure(state, request);
    Kept::OF_SESSION
        .iter()
        .filter_map(|kept| set_cookie(secure, *kept, "", 0))
        .collect()
}

fn set_cookie(secure: bool, kept: Kept, value: &str, max_age: u64) -> Option<HeaderValue> {
    let mut text = format!(
        "{}={value}; Path=/; Max-Age={max_age}; SameSite=Lax",
        kept.name(secure)
    );
    if secure {
        text.push_str("; Secure");
    }
    if kept != Kept::Csrf {
        text.push_str("; HttpOnly");
    }
    let mut field = HeaderValue::from_str(&text).ok()?;
    field.set_sensitive(true);
    Some(field)
}

/// An answer with cookies, where the caller asked for them.
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
