//! Routes paths to handlers, and adds middleware.

use std::sync::{Arc, atomic::Ordering};

use poem::{
    Endpoint, EndpointExt, IntoEndpoint, IntoResponse, Request, Response, Result, Route,
    http::{HeaderName, HeaderValue, Method, header},
    middleware::Cors,
};

use quota_common::ProblemCode;

use crate::{
    api::{
        console,
        direct::DirectDecisions,
        document,
        fast_path::{FORWARD_AUTH, FastPath},
        grpc::GrpcService,
        ip_guard::IpGuard,
        limit_headers,
        problem::ApiError,
        request_log::RequestLog,
    },
    openapi,
    redis::Redis,
    state::{AppState, Services},
    telemetry::metrics::Metrics,
};

/// Returns the endpoint of the public listener.
pub fn public(state: &AppState) -> impl Endpoint<Output = Response> + use<> {
    let service = openapi::service(state);
    let document = openapi::document(&service);
    let viewer = service.swagger_ui_html();
    let methods = openapi::methods(&service);
    let (config, landing) = (&state.config, &state.config.landing);
    let pages = document::routes(landing, &config.public_url, document, &viewer);
    let service = Arc::new(service.into_endpoint());
    let guard = |guard: fn(&Services) -> &_| IpGuard {
        state: state.clone(),
        guard,
    };

    let routes = Route::new()
        .nest_no_strip("/v1", service.clone())
        .nest_no_strip(
            "/auth",
            service.clone().with(guard(|parts| &parts.auth_guard)),
        )
        .nest_no_strip(
            "/admin",
            service.clone().with(guard(|parts| &parts.admin_guard)),
        )
        // Webhooks from Stripe are not limited per address, because Stripe sends many webhooks at the same time from a
        // few addresses.
        .nest_no_strip("/billing/stripe", service.clone())
        .nest_no_strip(
            "/billing",
            service.clone().with(guard(|parts| &parts.admin_guard)),
        )
        .nest_no_strip("/health", service)
        .nest("/console", console::endpoint())
        .nest("/", pages);
    let edge = RequestLog {
        state: state.clone(),
        methods: Arc::new(methods),
    };
    // The routes are boxed to keep the future of the fast path small.
    let all = Arc::new(FastPath(routes.boxed()));
    let cors = cors(state);
    let is_open = cors.is_some();
    CrossOrigin {
        others: all.clone().with_if(is_open, cors.unwrap_or_default()),
        forward_auth: all,
    }
    .with(edge)
}

/// Returns the public listener's endpoint for plain requests, unless direct responses are turned off.
pub fn direct(state: &AppState) -> Option<DirectDecisions> {
    let is_on = state.config.direct_responses;
    is_on.then(|| DirectDecisions::new(state))
}

/// Returns the endpoint of the gRPC listener.
pub fn grpc(state: &AppState) -> GrpcService {
    GrpcService::new(state)
}

/// Applies the CORS rules to every path except forward-auth.
///
/// On forward-auth requests, `Origin` and the method of a preflight come from the gateway's client. The gateway would
/// mistake the response to a preflight for an allowed request, and a rejected origin for a denied request.
struct CrossOrigin<E, F> {
    others: E,
    forward_auth: F,
}

impl<E: Endpoint, F: Endpoint<Output = Response>> Endpoint for CrossOrigin<E, F> {
    type Output = Response;

    async fn call(&self, request: Request) -> Result<Response> {
        if request.uri().path() == FORWARD_AUTH {
            self.forward_auth.call(request).await
        } else {
            let mut response = self.others.call(request).await?.into_response();
            // The CORS middleware may have replaced `Vary: accept-encoding` with `Vary: origin`.
            if let Some(vary) = response.headers_mut().get_mut(header::VARY)
                && vary.as_bytes().eq_ignore_ascii_case(b"origin")
            {
                *vary = HeaderValue::from_static("origin, accept-encoding");
            }
            Ok(response)
        }
    }
}

/// Lets pages from the configured origins call the API and read the rate-limit headers. These pages cannot send
/// cookies.
fn cors(state: &AppState) -> Option<Cors> {
    let origins = &state.config.allowed_origins;
    if origins.is_empty() {
        return None;
    }
    let cors = Cors::new()
        .allow_methods([Method::GET, Method::POST, Method::PATCH, Method::DELETE])
        .allow_headers([
            "authorization",
            "content-type",
            "idempotency-key",
            "x-api-key",
            "x-request-id",
        ])
        .expose_headers(exposed())
        .max_age(600);
    if origins.iter().any(|origin| origin == "*") {
        return Some(cors.allow_origins_fn(|_| true));
    }
    // Pages on this server also send their origin, so this origin must be allowed too.
    let own =
        url::Url::parse(&state.config.public_url).map(|url| url.origin().ascii_serialization());
    Some(
        origins
            .iter()
            .cloned()
            .chain(own)
            .fold(cors, poem::middleware::Cors::allow_origin),
    )
}

fn exposed() -> Vec<HeaderName> {
    let mut names = vec![
        limit_headers::DEGRADED,
        limit_headers::LIMIT,
        limit_headers::REMAINING,
        limit_headers::RESET,
        limit_headers::POLICY,
        limit_headers::STATE,
    ];
    names.push(HeaderName::from_static("retry-after"));
    names.push(HeaderName::from_static("x-request-id"));
    names
}

/// Copies the status and the call counts of the Redis connections to the metrics.
fn show_redis(redis: &Redis, metrics: &Metrics) {
    let (status, counts) = (redis.status(), redis.counts());
    let open = i64::try_from(status.connected).unwrap_or(i64::MAX);
    metrics.redis_connections.set(open);
    let made = &metrics.redis_connections_made;
    made.inner().store(status.made, Ordering::Relaxed);
    for (counter, count) in [
        (&metrics.redis_connects_failed, &counts.connects_failed),
        (&metrics.redis_calls, &counts.calls),
        (
            &metrics.redis_calls_without_connection,
            &counts.not_connected,
        ),
        (&metrics.redis_calls_late, &counts.timed_out),
        (&metrics.redis_calls_failed, &counts.failed),
    ] {
        let count = count.load(Ordering::Relaxed);
        counter.inner().store(count, Ordering::Relaxed);
    }
}

/// Returns the endpoint of the metrics listener.
pub fn metrics(state: &AppState) -> impl Endpoint<Output = Response> + use<> {
    let state = state.clone();
    let text = poem::endpoint::make_sync(move |_| {
        let (open, busy) = state.db.connections();
        state
            .metrics
            .database_connections
            .set(i64::try_from(open).unwrap_or(i64::MAX));
        state
            .metrics
            .database_connections_busy
            .set(i64::try_from(busy).unwrap_or(i64::MAX));
        if let Some(redis) = &state.redis {
            show_redis(redis, &state.metrics);
        }
        Response::builder()
            .content_type("application/openmetrics-text; version=1.0.0; charset=utf-8")
            .body(state.metrics.text())
    });
    Route::new()
        .at("/metrics", poem::get(text))
        .map_to_response()
        .catch_all_error(async |error: poem::Error| {
            let error = ApiError::from_poem(error);
            let allow = (error.code == ProblemCode::MethodNotAllowed).then(|| "GET, HEAD".into());
            let error = ApiError { allow, ..error };
            error.into_response("", "")
        })
}
