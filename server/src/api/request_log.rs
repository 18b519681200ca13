//! The edge: what happens to every request, outermost.
//!
//! It gives the request its id, turns errors and panics into problems, holds it to its time, adds the fields
//! that every answer carries, counts it, and writes its line into the log.

use std::{future::poll_fn, net::IpAddr, panic::AssertUnwindSafe, pin::pin, sync::Arc, task::Poll};

use futures_util::FutureExt;
use parking_lot::Mutex;
use poem::{
    Endpoint, IntoResponse, Middleware, Request, Response, Result,
    http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header},
};
use quota_common::{ProblemCode, TenantId};
use tokio::time::timeout;

use super::{
    allow::Methods,
    client_ip::client_ip,
    limit_headers::{DECISION, GatewayDecision},
    problem::ApiError,
    short_way::FORWARD_AUTH,
};
use crate::{
    authenticated::Authenticated,
    clock::UnixNanos,
    keys::{KeyRecord, Source},
    limiter::Caller,
    state::AppState,
    telemetry::{log::AccessLine, request_id::RequestIds},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What every answer carries: nothing of ours is framed, sniffed, shared with windows of other origins or told
/// to them.
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

/// What is worked out once about a request, when it arrives. It goes with the request.
pub struct Visit {
    pub state: AppState,
    /// The request's id, which is visible ASCII.
    pub id: HeaderValue,
    /// The client's address; `None` for a peer that has none.
    pub ip: Option<IpAddr>,
    arrived: UnixNanos,
    /// Of the connection, until it is set.
    authenticated: Option<Authenticated>,
    /// Who it turned out to be from, for its line in the log. Filled on the way in.
    caller: Mutex<Option<Identity>>,
}

enum Identity {
    Tenant(TenantId),
    Key(Arc<KeyRecord>),
}

impl Visit {
    pub fn of(request: &Request) -> Result<&Self, ApiError> {
        match request.data::<Arc<Self>>() {
            Some(visit) => Ok(visit),
            None => Err(ApiError::internal("the edge is not mounted")),
        }
    }

    pub fn id(&self) -> &str {
        self.id.to_str().unwrap_or_default()
    }

    pub fn is_tenant(&self, tenant: TenantId) {
        *self.caller.lock() = Some(Identity::Tenant(tenant));
    }

    pub fn is_key(&self, key: Arc<KeyRecord>) {
        *self.caller.lock() = Some(Identity::Key(key));
    }

    /// On whose behalf a secret of this request is looked up. `tenant`: whose service token came with it.
    pub fn source(&self, tenant: Option<TenantId>) -> Source {
        Source {
            tenant,
            address: self.ip.map(Caller::address),
        }
    }

    /// The request came with a valid API key or service token.
    pub fn has_authenticated(&self) {
        if let Some(authenticated) = &self.authenticated {
            authenticated.set();
        }
    }

    fn log(&self, method: &Method, uri: &Uri, status: u16, nanos: u64) {
        let identity = self.caller.lock().take();
        let (tenant, key) = match &identity {
            Some(Identity::Tenant(tenant)) => (Some(tenant.0), None),
            Some(Identity::Key(key)) => (Some(key.tenant.0), Some(key.prefix.as_str())),
            None => (None, None),
        };
        self.state.log.access(&AccessLine {
            at: self.arrived.saturating_add(nanos),
            request_id: self.id(),
            method: method.as_str(),
            path: uri.path(),
            status,
            micros: nanos / 1000,
            ip: self.ip,
            tenant,
            key,
        });
    }
}

/// See the module.
pub struct RequestLog {
    pub state: AppState,
    pub methods: Arc<Methods>,
}

impl<E: Endpoint> Middleware<E> for RequestLog {
    type Output = Edge<E>;

    fn transform(&self, inner: E) -> Edge<E> {
        Edge {
            inner,
            state: self.state.clone(),
            ids: RequestIds::default(),
            methods: self.methods.clone(),
        }
    }
}

pub struct Edge<E> {
    inner: E,
    state: AppState,
    ids: RequestIds,
    methods: Arc<Methods>,
}

impl<E: Endpoint> Endpoint for Edge<E> {
    type Output = Response;

    async fn call(&self, mut request: Request) -> Result<Response> {
        let state = &self.state;
        let (arrived, began) = (state.clock.now(), state.clock.monotonic());
        let visit = Arc::new(Visit {
            state: state.clone(),
            id: self.request_id(&request, arrived),
            ip: client_ip(&request, &state.config.trusted_proxies),
            arrived,
            authenticated: request.data::<Authenticated>().cloned(),
            caller: Mutex::default(),
        });
        let method = request.method().clone();
        // Not its path alone, which would have to be copied.
        let uri = request.uri().clone();
        request.set_data(visit.clone());

        state.metrics.requests_in_flight.inc();
        let flight = InFlight(state);
        // Within the server's own limits a handler never takes so long; what it waits for may. Most wait for
        // nothing, and need no clock to be told so.
        let mut answer = pin!(AssertUnwindSafe(self.inner.call(request)).catch_unwind());
        let at_once = poll_fn(|context| Poll::Ready(answer.as_mut().poll(context))).await;
        let answer = match at_once {
            Poll::Ready(answer) => Ok(answer),
            Poll::Pending => timeout(state.config.request_timeout, answer).await,
        };
        let answer = match answer {
            Ok(Ok(Ok(response))) => Ok(response.into_response()),
            Ok(Ok(Err(error))) => Err(ApiError::from_poem(error)),
            Ok(Err(_)) => {
                state.metrics.panics.inc();
                Err(ApiError::internal("a handler panicked"))
            }
            Err(_) => Err(ApiError::unavailable(
                "the request took longer than QUOTA_REQUEST_TIMEOUT",
            )),
        };
        drop(flight);
        let mut response = match answer {
            Ok(response) => response,
            Err(mut error) => {
                if error.code == ProblemCode::MethodNotAllowed {
                    error.allow = Some(self.methods.allow(uri.path()).to_owned());
                }
                error.into_response(visit.id(), &state.config.public_url)
            }
        };

        if uri.path() == FORWARD_AUTH && !response.headers().contains_key(DECISION) {
            response = for_gateway(response);
        }
        let status = response.status().as_u16();
        let nanos = state.clock.monotonic() - began;
        state.metrics.answered(status);
        if tracing::enabled!(target: "quota_server::access", tracing::Level::INFO) {
            visit.log(&method, &uri, status, nanos);
        }

        let headers = response.headers_mut();
        // The visit is over, unless the request lives on in a task.
        let id = Arc::try_unwrap(visit).map_or_else(|visit| visit.id.clone(), |visit| visit.id);
        headers.insert(REQUEST_ID, id);
        for (name, value) in ALWAYS {
            headers.insert(name, HeaderValue::from_static(value));
        }
        if state.config.public_url.starts_with("https:") {
            headers.insert(
                header::STRICT_TRANSPORT_SECURITY,
                HeaderValue::from_static("max-age=63072000"),
            );
        }
        if !headers.contains_key(header::CONTENT_SECURITY_POLICY) {
            headers.insert(
                header::CONTENT_SECURITY_POLICY,
                HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"),
            );
        }
        if !headers.contains_key(header::CACHE_CONTROL) {
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        }
        Ok(response)
    }
}

/// States the decision in an error response of forward-auth. One that a gateway passes on has no body, so that nginx can
/// reuse its connection; a request that is itself invalid keeps its explanation.
fn for_gateway(mut response: Response) -> Response {
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

impl<E> Edge<E> {
    /// The incoming id when it is one, else a new one.
    fn request_id(&self, request: &Request, now: UnixNanos) -> HeaderValue {
        match request.headers().get(REQUEST_ID) {
            Some(id) if is_id(id.as_bytes()) => id.clone(),
            _ => {
                let id = self.ids.next(now);
                HeaderValue::from_bytes(&id).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
            }
        }
    }
}

/// 1 to 128 letters, digits and `-_.:`: nothing that a log or a terminal would read as more.
fn is_id(bytes: &[u8]) -> bool {
    (1..=128).contains(&bytes.len())
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::is_id;

    #[test]
    fn an_id_is_taken_over_only_when_it_is_harmless() {
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
