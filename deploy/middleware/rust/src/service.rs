//! The layer, and the service that it adds.

use std::{
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, request::Parts};
use http_body_util::{Either, Full};
use tower_layer::Layer;
use tower_service::Service;

use crate::{
    client::{Check, Client, DEGRADED, REQUEST_ID},
    decision::{Code, Decision},
    request,
    response::{self, ResponseBody},
    settings::{OnUnavailable, Settings},
};

/// The maximum cost. Quota rejects checks with a higher cost.
const MAX_COST: u32 = 1_000_000;

/// Checks each request with Quota before it reaches the service. Clones share connections and remembered denials.
#[derive(Debug, Clone)]
pub struct QuotaLayer {
    checker: Arc<Checker>,
}

impl QuotaLayer {
    pub(crate) fn new(client: Client, settings: Settings) -> Self {
        Self {
            checker: Arc::new(Checker { client, settings }),
        }
    }
}

impl<S> Layer<S> for QuotaLayer {
    type Service = QuotaService<S>;

    fn layer(&self, inner: S) -> QuotaService<S> {
        QuotaService {
            inner,
            checker: Arc::clone(&self.checker),
        }
    }
}

#[derive(Debug)]
struct Checker {
    client: Client,
    settings: Settings,
}

/// What happens to a request.
enum Verdict {
    /// The request reaches the service.
    Pass(Decision),
    Deny(Response<Full<Bytes>>),
}

impl Checker {
    async fn check(&self, parts: &Parts) -> Verdict {
        let settings = &self.settings;
        let Some(key) = (settings.key)(parts) else {
            return Verdict::Deny(response::key_missing());
        };
        if !request::may_be_key(&key) {
            return Verdict::Deny(response::key_malformed());
        }
        let cost = (settings.cost)(parts).max(1);
        if cost > MAX_COST {
            let decision = Decision::local(Code::QuotaExceeded);
            return Verdict::Deny(response::denied(&decision, cost));
        }
        let asked_at = Instant::now();
        if let Some(denials) = &settings.denials
            && let Some(decision) = denials.get(&key, cost, asked_at)
        {
            return Verdict::Deny(response::denied(&decision, cost));
        }
        let check = Check {
            key: &key,
            cost,
            endpoint: (settings.endpoint)(parts).and_then(|name| request::endpoint(&name)),
        };
        // If there are several IDs, it is unclear which of them identifies the request.
        let mut ids = parts.headers.get_all(REQUEST_ID).iter();
        let request_id = ids.next().filter(|_| ids.next().is_none());
        let request_id = request_id.filter(|id| request::is_id(id.as_bytes()));
        match self.client.check(&check, request_id).await {
            Ok(decision) if decision.code == Code::Allowed => Verdict::Pass(decision),
            Ok(decision) => {
                if let Some(denials) = &settings.denials {
                    denials.insert(&key, cost, asked_at, &decision);
                }
                Verdict::Deny(response::denied(&decision, cost))
            }
            Err(error) if settings.on_unavailable == OnUnavailable::Allow && !error.is_final() => {
                let mut decision = Decision::local(Code::Unchecked);
                let unchecked = HeaderValue::from_static("unchecked");
                decision.headers.insert(DEGRADED, unchecked);
                Verdict::Pass(decision)
            }
            Err(_) => Verdict::Deny(response::unavailable()),
        }
    }
}

/// The service that [`QuotaLayer`] adds.
#[derive(Debug, Clone)]
pub struct QuotaService<S> {
    inner: S,
    checker: Arc<Checker>,
}

impl<S, B, R> Service<Request<B>> for QuotaService<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = Response<ResponseBody<R>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The clone may not be ready, so call the original, which is ready, and keep the clone.
        let clone = self.inner.clone();
        let mut inner = mem::replace(&mut self.inner, clone);
        let checker = Arc::clone(&self.checker);
        let (mut parts, body) = request.into_parts();
        Box::pin(async move {
            let decision = match checker.check(&parts).await {
                Verdict::Pass(decision) => decision,
                Verdict::Deny(response) => return Ok(response.map(Either::Right)),
            };
            let headers = decision.headers.clone();
            parts.extensions.insert(decision);
            let mut response = inner.call(Request::from_parts(parts, body)).await?;
            for (name, value) in &headers {
                response.headers_mut().insert(name, value.clone());
            }
            Ok(response.map(Either::Left))
        })
    }
}
