//! The edge: what happens to every request, outermost.
//!
//! It gives the request its id, turns errors and panics into problems, holds it to its time, adds the fields
//! that every answer carries, counts it, and writes its line into the log.

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures_util::FutureExt;
use parking_lot::Mutex;
use poem::{
    Endpoint, IntoResponse, Middleware, Request, Response, Result,
    http::{HeaderName, HeaderValue, header},
};
use quota_common::{ProblemCode, TenantId, Timestamp};
use uuid::Uuid;

use super::{allow::Methods, client_ip::client_ip, problem::ApiError};
use crate::{keys::KeyRecord, state::AppState, telemetry::log::AccessLine};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Who a request turned out to be from, for its line in the log. Filled on the way in.
#[derive(Debug, Clone, Default)]
pub struct Caller(Arc<Mutex<Option<Identity>>>);

#[derive(Debug)]
enum Identity {
    Tenant(TenantId),
    Key(Arc<KeyRecord>),
}

impl Caller {
    pub fn is_tenant(&self, tenant: TenantId) {
        *self.0.lock() = Some(Identity::Tenant(tenant));
    }

    pub fn is_key(&self, key: Arc<KeyRecord>) {
        *self.0.lock() = Some(Identity::Key(key));
    }
}

/// The client's address, worked out once.
#[derive(Debug, Clone, Copy)]
pub struct ClientAddress(pub Option<std::net::IpAddr>);

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
            methods: self.methods.clone(),
        }
    }
}

pub struct Edge<E> {
    inner: E,
    state: AppState,
    methods: Arc<Methods>,
}

impl<E: Endpoint> Endpoint for Edge<E> {
    type Output = Response;

    async fn call(&self, mut request: Request) -> Result<Response> {
        let state = &self.state;
        let began = state.clock.monotonic();
        let id = request_id(&request);
        let ip = client_ip(&request, &state.config.trusted_proxies);
        let caller = Caller::default();
        let method = request.method().clone();
        let path = request.uri().path().to_owned();
        request.set_data(caller.clone());
        request.set_data(ClientAddress(ip));
        request.set_data(state.clone());

        state.metrics.requests_in_flight.inc();
        let flight = InFlight(state);
        // Within the server's own limits a handler never takes so long; what it waits for may.
        let answer = tokio::time::timeout(
            state.config.request_timeout,
            AssertUnwindSafe(self.inner.call(request)).catch_unwind(),
        );
        let answer = match answer.await {
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
        let id_text = id.to_str().unwrap_or_default();
        let mut response = match answer {
            Ok(response) => response,
            Err(mut error) => {
                if error.code == ProblemCode::MethodNotAllowed {
                    error.allow = Some(self.methods.allow(&path).to_owned());
                }
                error.into_response(id_text, &state.config.public_url)
            }
        };

        let status = response.status().as_u16();
        let nanos = state.clock.monotonic() - began;
        state.metrics.answered(status);
        if tracing::enabled!(target: "quota_server::access", tracing::Level::INFO) {
            let identity = caller.0.lock().take();
            let (tenant, key) = match &identity {
                Some(Identity::Tenant(tenant)) => (Some(tenant.0), None),
                Some(Identity::Key(key)) => (Some(key.tenant.0), Some(key.prefix.as_str())),
                None => (None, None),
            };
            let now = state.clock.now();
            let time = Timestamp::from_unix_secs(now.secs())
                .map(|it| it.to_string())
                .unwrap_or_default();
            state.log.access(&AccessLine {
                timestamp: &time,
                level: "INFO",
                target: "quota_server::access",
                request_id: id_text,
                method: method.as_str(),
                path: &path,
                status,
                micros: nanos / 1000,
                ip,
                tenant,
                key,
            });
        }

        let headers = response.headers_mut();
        headers.insert(REQUEST_ID, id);
        headers.insert(
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        );
        if !headers.contains_key(header::CACHE_CONTROL) {
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        }
        Ok(response)
    }
}

struct InFlight<'a>(&'a AppState);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.metrics.requests_in_flight.dec();
    }
}

/// The incoming id when it is one, else a new one.
fn request_id(request: &Request) -> HeaderValue {
    match request.headers().get(REQUEST_ID) {
        Some(id) if is_id(id.as_bytes()) => id.clone(),
        _ => {
            let mut text = [0; 36];
            let text = Uuid::now_v7().as_hyphenated().encode_lower(&mut text);
            HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
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
