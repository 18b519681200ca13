//! Direct responses: decisions on plain requests, made without poem and hyper.
//!
//! [`fast_path`](super::fast_path) handles the same requests in any other form. Both modules share the code that reads
//! credentials, makes and records decisions, and determines headers and bodies. This module only writes the result as
//! bytes. `server/tests/it/direct` compares the two.

mod response;

use std::net::IpAddr;

use poem::{
    IntoResponse as _, Response,
    http::{HeaderValue, StatusCode, header},
};
use quota_common::limit::Check;

use self::response::ResponseWriter;
use super::{
    admitted::{AdmittedKey, GatewayCaller, ServiceCaller},
    client_ip::client_of,
    fast_path::FORWARD_AUTH,
    fields::text,
    json::{self, Json},
    limit::{self, Deny, StatusOnly},
    limit_headers::{self, HeaderSink as _},
    problem::ApiError,
    request_context::RequestContext,
    request_log::{self, REQUEST_ID},
    trace,
};
use crate::{
    clock::UnixNanos,
    connection_marks::ConnectionMarks,
    plain_request::{DirectEndpoint, PlainRequest},
    spans::Span,
    state::AppState,
    telemetry::request_id::RequestIds,
};

/// Responds to plain requests for decisions.
pub struct DirectDecisions {
    state: AppState,
    ids: RequestIds,
}

#[derive(Debug, Clone, Copy)]
enum Route {
    Echo,
    Check,
    ForwardAuth(Option<Deny>),
}

impl Route {
    fn of(request: &PlainRequest<'_>) -> Option<Self> {
        match (request.method, request.target) {
            ("GET", "/v1/echo") => Some(Self::Echo),
            ("POST", "/v1/check") => Some(Self::Check),
            // HEAD is missing because only hyper omits the body of a response to HEAD.
            ("GET" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS", target) => {
                let deny = match target.strip_prefix(FORWARD_AUTH)? {
                    "" => None,
                    "?deny=403" => Some(Deny::Forbidden),
                    "?deny=429" => Some(Deny::TooManyRequests),
                    _ => return None,
                };
                Some(Self::ForwardAuth(deny))
            }
            _ => None,
        }
    }
}

enum Success {
    /// The body and the caller whose limits the headers report.
    Echo(Vec<u8>, AdmittedKey),
    Check(Response),
    ForwardAuth(StatusOnly),
}

impl DirectDecisions {
    pub fn new(state: &AppState) -> Self {
        Self {
            state: state.clone(),
            ids: RequestIds::default(),
        }
    }

    fn context(
        &self,
        request: &PlainRequest<'_>,
        peer: IpAddr,
        arrived: UnixNanos,
        marks: Option<&ConnectionMarks>,
    ) -> RequestContext {
        let state = &self.state;
        let id = request
            .field(REQUEST_ID.as_str())
            .filter(|id| request_log::is_id(id))
            .and_then(|id| HeaderValue::from_bytes(id).ok());
        let client = client_of(peer.to_canonical(), request, &state.config.trusted_proxies);
        RequestContext::new(
            state,
            id.unwrap_or_else(|| request_log::new_id(&self.ids, arrived)),
            Some(client),
            arrived,
            marks.cloned(),
        )
    }

    async fn decide(
        &self,
        context: &RequestContext,
        route: Route,
        request: &PlainRequest<'_>,
    ) -> Result<Success, ApiError> {
        Ok(match route {
            Route::Echo => {
                let caller = AdmittedKey::of(context, request, None).await?;
                let body = serde_json::to_vec(&limit::echo(&caller)?);
                Success::Echo(body.map_err(ApiError::internal)?, caller)
            }
            Route::Check => {
                let caller = ServiceCaller::of(context, request).await?;
                let media_type = request.field(header::CONTENT_TYPE.as_str()).and_then(text);
                json::check_media_type(media_type)?;
                let body = json::parse_body::<Check>(media_type, request.body)?;
                let result = limit::check(context, &caller, &body).await?;
                Success::Check(Json(result).into_response())
            }
            Route::ForwardAuth(deny) => {
                let caller = GatewayCaller::of(context, request).await?;
                Success::ForwardAuth(limit::forward_auth(context, &caller, request, deny).await?)
            }
        })
    }

    /// Writes a response and returns its status.
    async fn write(
        &self,
        context: &RequestContext,
        route: Route,
        result: Result<Success, ApiError>,
        out: &mut Vec<u8>,
    ) -> StatusCode {
        let (id, base) = (context.id(), &self.state.config.public_url);
        let response = match result {
            // These responses are frequent, so they are written without an intermediate [`Response`].
            Ok(Success::Echo(body, caller)) => {
                let mut response = ResponseWriter::begin(out, StatusCode::OK);
                response.set_static(header::CONTENT_TYPE, json::MEDIA_TYPE);
                limit_headers::write(&mut response, &caller.record, &caller.decision);
                return self.finish(context, response, StatusCode::OK, &body);
            }
            Ok(Success::ForwardAuth(answer)) => {
                let mut response = ResponseWriter::begin(out, answer.status);
                answer.write_headers(&mut response);
                return self.finish(context, response, answer.status, &[]);
            }
            Err(error) if error.denied.is_some() && matches!(route, Route::Echo) => {
                let mut body = Vec::with_capacity(512);
                error.write_body(id, base, &mut body);
                let mut response = ResponseWriter::begin(out, error.status_code());
                error.write_headers(&mut response);
                return self.finish(context, response, error.status_code(), &body);
            }
            Ok(Success::Check(response)) => response,
            Err(error) => {
                let response = error.into_response(id, base);
                match route {
                    Route::ForwardAuth(_) => request_log::for_gateway(response),
                    Route::Echo | Route::Check => response,
                }
            }
        };
        let status = response.status();
        let (parts, body) = response.into_parts();
        let body = body.into_bytes().await.unwrap_or_default();
        let mut response = ResponseWriter::begin(out, status);
        for (name, value) in &parts.headers {
            response.set(name.clone(), value);
        }
        self.finish(context, response, status, &body)
    }

    /// Writes the remaining headers and the body.
    fn finish(
        &self,
        context: &RequestContext,
        mut response: ResponseWriter<'_>,
        status: StatusCode,
        body: &[u8],
    ) -> StatusCode {
        response.set(REQUEST_ID, &context.id);
        request_log::write_common(&mut response, &self.state);
        response.finish(body, self.state.clock.now());
        status
    }
}

impl DirectEndpoint for DirectDecisions {
    fn accepts(&self, request: &PlainRequest<'_>) -> bool {
        // While the server is stopping, each response must announce that its connection will be closed, as hyper does.
        if self.state.is_draining() {
            return false;
        }
        let config = &self.state.config;
        let is_cross_origin = || {
            !config.allowed_origins.is_empty() && request.field(header::ORIGIN.as_str()).is_some()
        };
        match Route::of(request) {
            None => false,
            Some(Route::Check) => request.body_length <= config.body_limit && !is_cross_origin(),
            Some(Route::Echo) => request.body_length == 0 && !is_cross_origin(),
            // On forward-auth, `Origin` comes from the consumer, and CORS rules do not apply.
            Some(Route::ForwardAuth(_)) => request.body_length == 0,
        }
    }

    async fn answer(
        &self,
        request: &PlainRequest<'_>,
        peer: IpAddr,
        marks: Option<&ConnectionMarks>,
        out: &mut Vec<u8>,
    ) {
        let Some(route) = Route::of(request) else {
            return;
        };
        let state = &self.state;
        let (arrived, began) = (state.clock.now(), state.clock.monotonic());
        let path = request.target.split('?').next().unwrap_or_default();
        let span = trace::begin(state, Some(peer.to_canonical()), request, path);
        let context = self.context(request, peer, arrived, marks);
        let parent = span.as_ref().map(Span::as_parent);
        let result = request_log::run(state, parent, self.decide(&context, route, request)).await;
        let status = self.write(&context, route, result.flatten(), out).await;
        let took = state.clock.monotonic().saturating_since(began);
        state.metrics.answered(status.as_u16());
        state.metrics.direct_responses.inc();
        if let Some(span) = span {
            trace::end(span, &context, request.method, Some(path), status.as_u16());
        }
        if tracing::enabled!(target: "quota_server::access", tracing::Level::INFO) {
            context.log(request.method, path, status.as_u16(), took);
        }
    }
}
