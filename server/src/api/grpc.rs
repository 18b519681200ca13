//! gRPC: Envoy's rate limit service, on its own listener.
//!
//! Implements the part of the [protocol](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md) that unary
//! calls need: one uncompressed message in each direction. The access log and the metrics show the HTTP status that
//! corresponds to an error; the actual status of every gRPC response is 200.

pub mod message;
mod rate_limit;

use std::{future::ready, pin::pin};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use poem::{
    Body, Endpoint, Request, Response, Result,
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header},
};
use prost::Message as _;
use quota_common::ProblemCode;

use self::message::{RateLimitRequest, RateLimitResponse};
use super::{
    admitted::GatewayCaller,
    client_ip::{client_of, peer_ip},
    json,
    problem::ApiError,
    request_context::{RequestContext, RequestId},
    request_log::{self, REQUEST_ID},
    trace,
};
use crate::{
    connection_marks::ConnectionMarks,
    spans::Span,
    state::AppState,
    telemetry::{log::Log, request_id::RequestIds},
};

const SHOULD_RATE_LIMIT: &str = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";
const MEDIA_TYPE: &str = "application/grpc";
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
/// The length of a message's prefix: the compressed flag and the message length.
const PREFIX: usize = 5;
/// The maximum length of a request message. By default, the headers of a request to Envoy have at most 60 KiB.
const MESSAGE_MAX: usize = 128 * 1024;
/// The characters that must be encoded in [`GRPC_MESSAGE`], besides non-ASCII characters.
const ENCODED: &AsciiSet = &CONTROLS.add(b'%');

/// The gRPC status of a failed call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GrpcStatus {
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    Unauthenticated = 16,
}

impl GrpcStatus {
    const fn of_error(status: StatusCode) -> Self {
        match status {
            StatusCode::BAD_REQUEST => Self::InvalidArgument,
            StatusCode::UNAUTHORIZED => Self::Unauthenticated,
            StatusCode::REQUEST_TIMEOUT => Self::DeadlineExceeded,
            StatusCode::NOT_FOUND | StatusCode::UNSUPPORTED_MEDIA_TYPE => Self::Unimplemented,
            StatusCode::SERVICE_UNAVAILABLE => Self::Unavailable,
            _ => Self::Internal,
        }
    }
}

/// The endpoint of the gRPC listener.
pub struct GrpcService {
    state: AppState,
    ids: RequestIds,
}

impl GrpcService {
    pub fn new(state: &AppState) -> Self {
        Self {
            state: state.clone(),
            ids: RequestIds::default(),
        }
    }
}

impl Endpoint for GrpcService {
    type Output = Response;

    async fn call(&self, mut request: Request) -> Result<Response> {
        let state = &self.state;
        let (arrived, began) = (state.clock.now(), state.clock.monotonic());
        let id = request.headers().get(REQUEST_ID);
        let id = id.filter(|id| request_log::is_id(id.as_bytes())).cloned();
        let peer = peer_ip(&request);
        let span = trace::begin(state, peer, request.headers(), request.uri().path());
        let context = RequestContext::new(
            state,
            id.map_or_else(
                || RequestId::Generated(self.ids.next(arrived)),
                RequestId::Sent,
            ),
            peer.map(|peer| client_of(peer, request.headers(), &state.config.trusted_proxies)),
            arrived,
            None,
            request.data::<ConnectionMarks>().cloned(),
        );
        let body = request.take_body();
        let parent = span.as_ref().map(Span::as_parent);
        let (status, mut response) = if is_grpc(&request) {
            let handler = pin!(call(&context, &request, body));
            match request_log::run(state, parent, handler).await.flatten() {
                Ok(message) => (StatusCode::OK, success(&message)),
                Err(error) => (error.status_code(), failure(&error, context.id())),
            }
        } else {
            let error = ApiError::new(
                ProblemCode::UnsupportedMediaType,
                "This address accepts only gRPC calls.",
            );
            let base = &state.config.public_url;
            (error.status_code(), error.into_response(context.id(), base))
        };
        response
            .headers_mut()
            .insert(REQUEST_ID, context.id.clone().into());
        let took = state.clock.monotonic().saturating_since(began);
        state.metrics.answered(status.as_u16());
        if let Some(span) = span {
            let route = (request.uri().path() == SHOULD_RATE_LIMIT).then_some(SHOULD_RATE_LIMIT);
            trace::end(
                span,
                &context,
                request.method().as_str(),
                route,
                status.as_u16(),
            );
        }
        if Log::is_access_log_on() {
            let (method, path) = (request.method().as_str(), request.uri().path());
            context.log(method, path, status.as_u16(), took);
        }
        Ok(response)
    }
}

/// Returns whether this is a gRPC request. gRPC requires HTTP/2.
fn is_grpc(request: &Request) -> bool {
    let media_type = request.headers().get(header::CONTENT_TYPE);
    let format = media_type.and_then(|it| it.as_bytes().strip_prefix(MEDIA_TYPE.as_bytes()));
    request.version() == Version::HTTP_2 && matches!(format, Some([] | [b'+' | b';', ..]))
}

async fn call(
    context: &RequestContext,
    request: &Request,
    body: Body,
) -> Result<RateLimitResponse, ApiError> {
    if request.uri().path() != SHOULD_RATE_LIMIT || request.method() != Method::POST {
        return Err(ApiError::new(ProblemCode::NotFound, "Unknown method."));
    }
    let caller = GatewayCaller::of(context, request.headers()).await?;
    let patience = context.state.config.header_timeout;
    match json::receive(request.headers(), body, PREFIX + MESSAGE_MAX, patience).await {
        Ok(body) => {
            let request = decode(&body)?;
            rate_limit::should_rate_limit(context, caller.token.tenant, &request).await
        }
        // A consumer can cause this error by sending long headers. The call must not fail, because Envoy would then
        // forward the request.
        Err(error) if error.code == ProblemCode::ContentTooLarge => {
            Ok(rate_limit::not_allowed(context, &error))
        }
        Err(error) => Err(error),
    }
}

fn malformed(detail: &str) -> ApiError {
    ApiError::new(ProblemCode::Malformed, detail)
}

fn decode(body: &[u8]) -> Result<RateLimitRequest, ApiError> {
    let Some((&[compressed, a, b, c, d], message)) = body.split_first_chunk::<PREFIX>() else {
        return Err(malformed("The message is incomplete."));
    };
    if compressed != 0 {
        return Err(ApiError::new(
            ProblemCode::UnsupportedMediaType,
            "Compressed messages are not supported.",
        ));
    }
    let length = u32::from_be_bytes([a, b, c, d]);
    if usize::try_from(length).is_ok_and(|length| length == message.len()) {
        RateLimitRequest::decode(message).map_err(|_| malformed("The message is malformed."))
    } else {
        Err(malformed("The call must have exactly one message."))
    }
}

fn success(message: &RateLimitResponse) -> Response {
    let message = message.encode_to_vec();
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    let body = [&[0], &length.to_be_bytes()[..], &message].concat();
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
    let body = Full::new(Bytes::from(body))
        .with_trailers(ready(Some(Ok(trailers))))
        .map_err(|never| match never {});
    Response::builder()
        .content_type(MEDIA_TYPE)
        .body(Body::from(BoxBody::new(body)))
}

/// Returns the response to a failed call. If the server failed, also logs the error.
fn failure(error: &ApiError, request_id: &str) -> Response {
    error.log(request_id);
    let message = utf8_percent_encode(&error.detail, ENCODED).to_string();
    let status = GrpcStatus::of_error(error.status_code());
    Response::builder()
        .content_type(MEDIA_TYPE)
        .header(GRPC_STATUS, status as u16)
        .header(GRPC_MESSAGE, message)
        .finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detail(body: &[u8]) -> String {
        decode(body).expect_err("the message is malformed").detail
    }

    #[test]
    fn only_a_single_uncompressed_message_is_decoded() {
        // hits_addend (field 3, a varint) is 7.
        assert_eq!(decode(&[0, 0, 0, 0, 2, 0x18, 7]).unwrap().hits_addend, 7);
        assert_eq!(decode(&[0; 5]).unwrap(), RateLimitRequest::default());
        for incomplete in [&[][..], &[0, 0, 0, 0]] {
            assert_eq!(detail(incomplete), "The message is incomplete.");
        }
        assert_eq!(
            detail(&[1, 0, 0, 0, 0]),
            "Compressed messages are not supported."
        );
        for count in [
            &[0, 0, 0, 0, 1][..],
            &[0, 0, 0, 0, 0, 0x18],
            &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0, 255, 255, 255, 255, 0x18, 7],
        ] {
            assert_eq!(detail(count), "The call must have exactly one message.");
        }
        assert_eq!(detail(&[0, 0, 0, 0, 1, 0x18]), "The message is malformed.");
    }

    #[test]
    fn every_error_has_a_grpc_status() {
        for (status, grpc) in [
            (400, 3),
            (401, 16),
            (404, 12),
            (408, 4),
            (415, 12),
            (500, 13),
            (503, 14),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(GrpcStatus::of_error(status) as u16, grpc, "{status}");
        }
    }
}
