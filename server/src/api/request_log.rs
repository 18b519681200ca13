//! The outermost layer around the routes of the public listener.
//!
//! Assigns the request ID, converts errors and panics to problems, enforces the time limit, adds common response
//! headers, counts the request, and writes the access log.

use std::{
    future::poll_fn,
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
};

use futures_util::FutureExt;
use poem::{
    Endpoint, IntoResponse, Middleware, Request, Response, Result,
    http::{HeaderName, HeaderValue, StatusCode, Version, header},
};
use quota_common::ProblemCode;
use tokio::time::timeout;

use super::{
    allow::Methods,
    client_ip::{client_of, peer_ip},
    fast_path::FORWARD_AUTH,
    large_response,
    limit_headers::{DECISION, GatewayDecision, HeaderSink},
    problem::ApiError,
    request_context::{RequestContext, RequestId},
    trace,
};
use crate::{
    clock::UnixNanos,
    connection_marks::ConnectionMarks,
    spans::{self, Parent, Span},
    state::AppState,
    telemetry::{log::Log, request_id::RequestIds},
    tenant_places::TenantPlaces,
};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The security headers of responses on the public listener.
const ALWAYS: [(HeaderName, &str); 5] = [
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
];

pub struct RequestLog {
    pub state: AppState,
    pub methods: Arc<Methods>,
}

impl<E: Endpoint> Middleware<E> for RequestLog {
    type Output = RequestLogEndpoint<E>;

    fn transform(&self, inner: E) -> RequestLogEndpoint<E> {
        RequestLogEndpoint {
            inner,
            state: self.state.clone(),
            ids: RequestIds::default(),
            methods: self.methods.clone(),
            large: large_response::places(),
        }
    }
}

pub struct RequestLogEndpoint<E> {
    inner: E,
    state: AppState,
    ids: RequestIds,
    methods: Arc<Methods>,
    /// The slots for large responses.
    large: TenantPlaces,
}

impl<E: Endpoint> Endpoint for RequestLogEndpoint<E> {
    type Output = Response;

    async fn call(&self, mut request: Request) -> Result<Response> {
        let state = &self.state;
        let (arrived, began) = (state.clock.now(), state.clock.monotonic());
        let peer = peer_ip(&request);
        let span = trace::begin(state, peer, request.headers(), request.uri().path());
        let context = Arc::new(RequestContext::new(
            state,
            self.request_id(&request, arrived),
            peer.map(|peer| client_of(peer, request.headers(), &state.config.trusted_proxies)),
            arrived,
            None,
            request.data::<ConnectionMarks>().cloned(),
        ));
        let method = request.method().clone();
        let is_http1 = request.version() < Version::HTTP_2;
        // Cloning the whole URI is cheaper than copying its path.
        let uri = request.uri().clone();
        request.set_data(context.clone());

        let parent = span.as_ref().map(Span::as_parent);
        let handler = pin!(self.inner.call(request));
        let answer = match run(state, parent, handler).await {
            Ok(Ok(response)) => {
                large_response::hold(&self.large, &context, response.into_response())
            }
            Ok(Err(error)) => Err(ApiError::from_poem(error)),
            Err(error) => Err(error),
        };
        let mut response = match answer {
            Ok(response) => response,
            Err(mut error) => {
                if error.code == ProblemCode::MethodNotAllowed {
                    error.allow = Some(self.methods.allow(uri.path()).to_owned());
                }
                error.into_response(context.id(), &state.config.public_url)
            }
        };

        if uri.path() == FORWARD_AUTH && !response.headers().contains_key(DECISION) {
            response = for_gateway(response);
        }
        let status = response.status().as_u16();
        let took = state.clock.monotonic().saturating_since(began);
        state.metrics.answered(status);
        if let Some(span) = span {
            let route = self.methods.template(uri.path());
            trace::end(span, &context, method.as_str(), route, status);
        }
        // Routine probes arrive every few seconds, so they are not logged.
        let is_routine_probe =
            uri.path().starts_with("/health/") && (status < 500 || state.is_draining());
        if !is_routine_probe && Log::is_access_log_on() {
            context.log(method.as_str(), uri.path(), status, took);
        }

        let headers = response.headers_mut();
        // Avoids a copy, unless a spawned task still holds the context.
        let id = Arc::try_unwrap(context)
            .map_or_else(|context| context.id.clone(), |context| context.id);
        headers.insert(REQUEST_ID, id.into());
        write_common(headers, state);
        // Proxies must not reuse connections that the server is about to close: a request that is sent at that moment
        // fails, unless the proxy can safely retry it.
        if is_http1 && state.is_draining() {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response)
    }
}

/// Runs a handler, inside the request's span if there is one. Converts a panic to an error, and enforces the time
/// limit.
///
/// The handler is pinned by the caller, because it is large: each move would copy several kilobytes.
pub async fn run<T>(
    state: &AppState,
    span: Option<&Parent>,
    handler: Pin<&mut impl Future<Output = T>>,
) -> Result<T, ApiError> {
    state.metrics.requests_in_flight.inc();
    let _flight = InFlight(state);
    // Most handlers complete without waiting, so poll once before setting up a timer. The time limit can interrupt a
    // handler only while the handler waits.
    let answer = pin!(AssertUnwindSafe(handler).catch_unwind());
    let mut answer = spans::inside(span, answer);
    let at_once = poll_fn(|context| Poll::Ready(Pin::new(&mut answer).poll(context))).await;
    let answer = match at_once {
        Poll::Ready(answer) => Ok(answer),
        Poll::Pending => timeout(state.config.request_timeout, answer).await,
    };
    match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_)) => {
            state.metrics.panics.inc();
            Err(ApiError::internal("a handler panicked"))
        }
        Err(_) => Err(ApiError::unavailable(
            "the request took longer than QUOTA_REQUEST_TIMEOUT",
        )),
    }
}

/// Writes the common headers, except for the request ID. Does not overwrite `Content-Security-Policy` or
/// `Cache-Control`.
pub fn write_common(headers: &mut impl HeaderSink, state: &AppState) {
    for (name, value) in ALWAYS {
        headers.set_static(name, value);
    }
    if state.config.public_url.starts_with("https:") {
        headers.set_static(header::STRICT_TRANSPORT_SECURITY, "max-age=63072000");
    }
    if !headers.contains(&header::CONTENT_SECURITY_POLICY) {
        headers.set_static(
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; frame-ancestors 'none'",
        );
    }
    if !headers.contains(&header::CACHE_CONTROL) {
        headers.set_static(header::CACHE_CONTROL, "no-store");
    }
}

/// Adds the decision to an error response of forward-auth. Also removes the body, so that nginx can reuse the
/// connection, unless the decision is `unavailable` and the status is not 503. Such a response, for example to a
/// malformed request, keeps its body, which explains the error.
pub fn for_gateway(mut response: Response) -> Response {
    let status = response.status();
    let decision = GatewayDecision::of_error(status);
    if decision != GatewayDecision::Unavailable || status == StatusCode::SERVICE_UNAVAILABLE {
        response.set_body(());
        let headers = response.headers_mut();
        headers.remove(header::CONTENT_TYPE);
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
    response.headers_mut().insert(DECISION, decision.value());
    response
}

struct InFlight<'a>(&'a AppState);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.metrics.requests_in_flight.dec();
    }
}

impl<E> RequestLogEndpoint<E> {
    /// Returns the ID in the request if it is valid, or a new one otherwise.
    fn request_id(&self, request: &Request, now: UnixNanos) -> RequestId {
        match request.headers().get(REQUEST_ID) {
            Some(id) if is_id(id.as_bytes()) => RequestId::Sent(id.clone()),
            _ => RequestId::Generated(self.ids.next(now)),
        }
    }
}

/// Returns whether `bytes` are a valid request ID: 1 to 128 ASCII letters, digits, and the characters `-_.:`. None of
/// these characters is special in logs or terminals.
pub fn is_id(bytes: &[u8]) -> bool {
    (1..=128).contains(&bytes.len())
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::is_id;

    #[test]
    fn only_harmless_request_ids_are_accepted() {
        assert!(is_id(b"019ab4e1-7c00-7000-8000-0000000000a1"));
        assert!(is_id(b"trace:1.2_3"));
        for harmful in [
            &b""[..],
            b"a b",
            b"a\tb",
            b"\"",
            b"<script>",
            "ä".as_bytes(),
            &[b'a'; 129],
        ] {
            assert!(!is_id(harmful), "{harmful:?}");
        }
    }
}
