//! Direct responses: decisions on plain requests, made without poem and hyper.
//!
//! [`fast_path`](super::fast_path) handles check requests in any other form. Both modules share the code that reads
//! credentials, makes and records decisions, and determines headers and bodies. This module only recognizes the
//! requests and writes the responses as bytes. `server/tests/it/direct` compares the responses of the two modules.

mod response;

use std::{cell::RefCell, net::IpAddr, pin::pin};

use poem::http::{HeaderValue, StatusCode, header};
use quota_common::limit::Check;

use self::response::{CommonHeaders, ResponseWriter};
use super::{
    admitted::{DecidedKey, GatewayCaller, ServiceCaller},
    client_ip::client_of,
    fast_path::{CHECK, ECHO, FORWARD_AUTH},
    fields::text,
    json,
    limit::{self, Deny},
    limit_headers::{self, HeaderSink as _},
    problem::{ApiError, denial},
    request_context::{RequestContext, RequestId},
    request_log::{self, REQUEST_ID},
    trace,
};
use crate::{
    clock::{Moment, Nanos},
    connection_marks::ConnectionMarks,
    keys::KeyRecord,
    limiter::Decision,
    plain_request::{Arrival, DirectEndpoint, PlainRequest},
    spans::Span,
    state::AppState,
    telemetry::{log::Log, request_id::RequestIds},
};

/// Responds to plain requests for decisions.
pub struct DirectDecisions {
    state: AppState,
    ids: RequestIds,
    common: CommonHeaders,
}

#[derive(Debug, Clone, Copy)]
pub enum Route {
    Echo,
    Check,
    ForwardAuth(Option<Deny>),
}

impl Route {
    fn of(request: &PlainRequest<'_>) -> Option<Self> {
        match (request.method, request.target) {
            ("GET", ECHO) => Some(Self::Echo),
            ("POST", CHECK) => Some(Self::Check),
            // HEAD is missing, because a response to HEAD must not have a body, and only hyper omits the body.
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

    const fn path(self) -> &'static str {
        match self {
            Self::Echo => ECHO,
            Self::Check => CHECK,
            Self::ForwardAuth(_) => FORWARD_AUTH,
        }
    }
}

thread_local! {
    /// The buffer for response bodies, which the thread reuses.
    static BODY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn with_empty_body<T>(write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    BODY.with_borrow_mut(|body| {
        body.clear();
        write(body)
    })
}

impl DirectDecisions {
    pub fn new(state: &AppState) -> Self {
        Self {
            state: state.clone(),
            ids: RequestIds::default(),
            common: CommonHeaders::new(|headers| request_log::write_common(headers, state)),
        }
    }

    fn context(
        &self,
        request: &PlainRequest<'_>,
        peer: IpAddr,
        arrived: Moment,
        marks: Option<&ConnectionMarks>,
    ) -> RequestContext {
        let state = &self.state;
        let id = request
            .field(REQUEST_ID.as_str())
            .filter(|id| request_log::is_id(id))
            .and_then(|id| HeaderValue::from_bytes(id).ok());
        RequestContext::new(
            state,
            id.map_or_else(
                || RequestId::Generated(self.ids.next(arrived.calendar)),
                RequestId::Sent,
            ),
            Some(client_of(peer, request, &state.config.trusted_proxies)),
            arrived.calendar,
            Some(arrived.monotonic),
            marks.cloned(),
        )
    }

    /// Makes a decision, appends the response, and returns the response's status. Appends nothing if it returns an error.
    ///
    /// The response is written here, because returning the decision through the layers around this future would copy it
    /// several times.
    async fn respond(
        &self,
        context: &RequestContext,
        route: Route,
        request: &PlainRequest<'_>,
        arrived: Moment,
        out: &mut Vec<u8>,
    ) -> Result<StatusCode, Box<ApiError>> {
        Ok(match route {
            Route::Echo => {
                let decided = pin!(DecidedKey::of(context, request, None)).await?;
                let DecidedKey { record, decision } = &decided;
                if !decision.is_allowed() {
                    return Ok(self.write_denial(context, record, decision, arrived, out));
                }
                let time = limit::echo_time_json(decision)?;
                with_empty_body(|body| {
                    let written = limit::write_echo(record.id(), &record.plan.name, &time, body);
                    debug_assert!(written.is_ok(), "writing to memory does not fail");
                    let mut response = ResponseWriter::begin(out, StatusCode::OK);
                    response.set_static(header::CONTENT_TYPE, json::MEDIA_TYPE);
                    limit_headers::write(&mut response, record, decision);
                    self.finish(context, response, body, arrived);
                });
                StatusCode::OK
            }
            Route::Check => {
                let caller = pin!(ServiceCaller::of(context, request)).await?;
                let media_type = request.field(header::CONTENT_TYPE.as_str()).and_then(text);
                json::check_media_type(media_type)?;
                let body = json::parse_body::<Check>(media_type, request.body)?;
                let checked = pin!(limit::check(context, &caller, &body)).await?;
                with_empty_body(|body| {
                    let written = checked.write(body);
                    debug_assert!(written.is_ok(), "writing to memory does not fail");
                    let mut response = ResponseWriter::begin(out, StatusCode::OK);
                    response.set_static(header::CONTENT_TYPE, json::MEDIA_TYPE);
                    self.finish(context, response, body, arrived);
                });
                StatusCode::OK
            }
            Route::ForwardAuth(deny) => {
                let caller = pin!(GatewayCaller::of(context, request)).await?;
                let answer = pin!(limit::forward_auth(context, &caller, request, deny)).await?;
                let mut response = ResponseWriter::begin(out, answer.status);
                answer.write_headers(&mut response);
                self.finish(context, response, &[], arrived);
                answer.status
            }
        })
    }

    fn write_denial(
        &self,
        context: &RequestContext,
        record: &KeyRecord,
        decision: &Decision,
        arrived: Moment,
        out: &mut Vec<u8>,
    ) -> StatusCode {
        with_empty_body(|body| {
            denial::write_body(decision, context.id(), body);
            let mut response = ResponseWriter::begin(out, denial::STATUS);
            denial::write_headers(&mut response, record, decision);
            self.finish(context, response, body, arrived);
        });
        denial::STATUS
    }

    /// Appends the response for an error, and returns its status.
    async fn write_error(
        &self,
        context: &RequestContext,
        route: Route,
        error: ApiError,
        arrived: Moment,
        out: &mut Vec<u8>,
    ) -> StatusCode {
        let mut response = error.into_response(context.id(), &self.state.config.public_url);
        if let Route::ForwardAuth(_) = route {
            response = request_log::for_gateway(response);
        }
        let status = response.status();
        let (parts, body) = response.into_parts();
        let body = body.into_bytes().await.unwrap_or_default();
        let mut response = ResponseWriter::begin(out, status);
        for (name, value) in &parts.headers {
            response.set(name.clone(), value);
        }
        self.finish(context, response, &body, arrived);
        status
    }

    /// Counts a response, and writes it to the access log.
    fn record(
        &self,
        context: &RequestContext,
        method: &str,
        path: &str,
        status: StatusCode,
        took: Nanos,
    ) {
        let metrics = &self.state.metrics;
        metrics.answered(status.as_u16());
        metrics.direct_responses.inc();
        if Log::is_access_log_on() {
            context.log(method, path, status.as_u16(), took);
        }
    }

    /// Writes the remaining headers and the body.
    fn finish(
        &self,
        context: &RequestContext,
        mut response: ResponseWriter<'_>,
        body: &[u8],
        arrived: Moment,
    ) {
        response.set_text(REQUEST_ID, context.id().as_bytes());
        let now = arrived.calendar.saturating_add(elapsed(context, arrived));
        response.finish(&self.common, body, now);
    }
}

/// Returns the time from a request's arrival until the decision ended. This does not include the time to record usage
/// and to write the response, because the clock is not read again. If there was no decision, the time ends at the first
/// call.
fn elapsed(context: &RequestContext, arrived: Moment) -> Nanos {
    context.decision_ended().saturating_since(arrived.monotonic)
}

impl DirectEndpoint for DirectDecisions {
    type Route = Route;
    type Context = RequestContext;

    fn route(&self, request: &PlainRequest<'_>) -> Option<Route> {
        // While the server is stopping, each response must announce that its connection will be closed, and direct
        // responses cannot do this.
        if self.state.is_draining() {
            return None;
        }
        let config = &self.state.config;
        let is_cross_origin = || {
            !config.allowed_origins.is_empty() && request.field(header::ORIGIN.as_str()).is_some()
        };
        Route::of(request).filter(|route| match route {
            Route::Check => request.body_length <= config.body_limit && !is_cross_origin(),
            Route::Echo => request.body_length == 0 && !is_cross_origin(),
            // On forward-auth, `Origin` comes from the consumer, and CORS rules do not apply.
            Route::ForwardAuth(_) => request.body_length == 0,
        })
    }

    async fn answer(
        &self,
        route: Route,
        request: &PlainRequest<'_>,
        Arrival { peer, time, marks }: Arrival<'_>,
        context: &mut Option<RequestContext>,
        out: &mut Vec<u8>,
    ) {
        let (state, path, peer) = (&self.state, route.path(), peer.to_canonical());
        let arrived = match time {
            Some(just_read) => state.clock.moment_of(just_read),
            None => state.clock.moment(),
        };
        let span = trace::begin(state, Some(peer), request, path);
        let context = &*context.insert(self.context(request, peer, arrived, marks));
        let parent = span.as_ref().map(Span::as_parent);
        let response_start = out.len();
        let result = {
            let responding = pin!(self.respond(context, route, request, arrived, out));
            request_log::run(state, parent, responding).await
        };
        let status = match result {
            Ok(Ok(status)) => status,
            Ok(Err(error)) => self.write_error(context, route, *error, arrived, out).await,
            Err(error) => {
                // A panic may have left an incomplete response.
                out.truncate(response_start);
                self.write_error(context, route, error, arrived, out).await
            }
        };
        if let Some(span) = span {
            trace::end(span, context, request.method, Some(path), status.as_u16());
        }
        let took = elapsed(context, arrived);
        self.record(context, request.method, path, status, took);
    }

    async fn answer_after_panic(
        &self,
        route: Route,
        request: &PlainRequest<'_>,
        peer: IpAddr,
        context: Option<RequestContext>,
        out: &mut Vec<u8>,
    ) {
        let state = &self.state;
        state.metrics.panics.inc();
        let at = state.clock.moment();
        // The usage of the request may have been recorded with the ID of the context.
        let context =
            context.unwrap_or_else(|| self.context(request, peer.to_canonical(), at, None));
        let error = ApiError::internal("a response could not be written because of a panic");
        let status = self.write_error(&context, route, error, at, out).await;
        let took = at.calendar.saturating_since(context.arrived);
        self.record(&context, request.method, route.path(), status, took);
    }
}
