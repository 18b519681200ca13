//! A fast path for decisions.
//!
//! Most requests are check requests to one of three fixed paths. They are recognized before they reach the router and
//! poem-openapi, because nested routes, query parsing, and boxed errors would cost more than the rest of the request.
//! All other code is the same as for routed requests, and runs in the same order. A check request with an unrecognized
//! query is routed normally.

use poem::{Endpoint, IntoResponse, Request, Response, Result, http::Method};
use poem_openapi::{ApiExtractor, ExtractParamOptions, param::Query};
use quota_common::limit::Check;

use super::{
    admitted::{AdmittedKey, GatewayCaller, ServiceCaller},
    json::Json,
    limit::{Deny, LimitApi},
    problem::ApiError,
    request_context::RequestContext,
};

pub const ECHO: &str = "/v1/echo";
pub const CHECK: &str = "/v1/check";
/// The path of forward-auth, which accepts every method.
pub const FORWARD_AUTH: &str = "/v1/forward-auth";

/// Wraps the router, which handles all other requests.
pub struct FastPath<E>(pub E);

enum FastRoute {
    Echo,
    Check,
    ForwardAuth { deny: Option<Deny> },
}

impl FastRoute {
    fn of(request: &Request) -> Option<Self> {
        let (method, uri) = (request.method(), request.uri());
        match (uri.path(), uri.query()) {
            (ECHO, None) if method == Method::GET => Some(Self::Echo),
            (CHECK, None) if method == Method::POST => Some(Self::Check),
            (FORWARD_AUTH, query) => {
                let deny = match query {
                    None => None,
                    Some("deny=403") => Some(Deny::Forbidden),
                    Some("deny=429") => Some(Deny::TooManyRequests),
                    Some(_) => return None,
                };
                Some(Self::ForwardAuth { deny })
            }
            _ => None,
        }
    }
}

impl<E: Endpoint<Output = Response>> Endpoint for FastPath<E> {
    type Output = Response;

    async fn call(&self, mut request: Request) -> Result<Response> {
        let answer = match FastRoute::of(&request) {
            None => {
                // Forward-auth accepts any method, because a gateway may send its consumer's method. The router knows
                // only GET.
                if request.uri().path() == FORWARD_AUTH {
                    request.set_method(Method::GET);
                }
                return self.0.call(request).await;
            }
            Some(FastRoute::Echo) => echo(&request).await,
            Some(FastRoute::ForwardAuth { deny }) => forward_auth(&request, deny).await,
            Some(FastRoute::Check) => return Ok(check(request).await?.into_response()),
        };
        match answer {
            Ok(response) => Ok(response),
            // Convert errors here: denials are frequent, and the outer layers would box them.
            Err(error) => {
                let context = RequestContext::of(&request)?;
                Ok(error.into_response(context.id(), &context.state.config.public_url))
            }
        }
    }
}

async fn echo(request: &Request) -> Result<Response, ApiError> {
    let caller = AdmittedKey::admit(request).await?;
    Ok(LimitApi.echo(caller).await?.into_response())
}

async fn forward_auth(request: &Request, deny: Option<Deny>) -> Result<Response, ApiError> {
    let caller = GatewayCaller::admit(request).await?;
    let answer = LimitApi.forward_auth(caller, request, Query(deny)).await?;
    Ok(answer.into_response())
}

async fn check(request: Request) -> Result<impl IntoResponse> {
    let (request, mut body) = request.split();
    let caller = ServiceCaller::admit(&request).await?;
    let body = Json::<Check>::from_request(&request, &mut body, ExtractParamOptions::default());
    Ok(LimitApi.check(caller, &request, body.await?).await?)
}
