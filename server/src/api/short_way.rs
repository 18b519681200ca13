//! The short way to a decision.
//!
//! Most requests ask for a decision, at one of three fixed paths. They are told by their path alone, in front
//! of the router and of poem-openapi, whose way through nested routes, parsed queries and boxed errors costs
//! more than all the rest of such a request. What answers them is the same code, called in the same order;
//! whatever is not plainly one of the three goes the long way.

use poem::{Endpoint, IntoResponse, Request, Response, Result, http::Method};
use poem_openapi::{ApiExtractor, ExtractParamOptions, param::Query};
use quota_common::limit::Check;

use super::{
    admitted::{AdmittedKey, AdmittedService},
    json::Json,
    limit::LimitApi,
    problem::ApiError,
    request_context::Visit,
};

/// In front of the endpoint that has all paths.
pub struct ShortWay<E>(pub E);

enum Asks {
    Echo,
    Check,
    ForwardAuth { deny: Option<u16> },
}

impl Asks {
    fn of(request: &Request) -> Option<Self> {
        let (method, uri) = (request.method(), request.uri());
        match (uri.path(), uri.query()) {
            ("/v1/echo", None) if method == Method::GET => Some(Self::Echo),
            ("/v1/check", None) if method == Method::POST => Some(Self::Check),
            ("/v1/forward-auth", query) if method == Method::GET => {
                let deny = match query {
                    None => None,
                    Some("deny=403") => Some(403),
                    Some("deny=429") => Some(429),
                    Some(_) => return None,
                };
                Some(Self::ForwardAuth { deny })
            }
            _ => None,
        }
    }
}

impl<E: Endpoint<Output = Response>> Endpoint for ShortWay<E> {
    type Output = Response;

    async fn call(&self, request: Request) -> Result<Response> {
        let answer = match Asks::of(&request) {
            None => return self.0.call(request).await,
            Some(Asks::Echo) => echo(&request).await,
            Some(Asks::ForwardAuth { deny }) => forward_auth(&request, deny).await,
            Some(Asks::Check) => return Ok(check(request).await?.into_response()),
        };
        match answer {
            Ok(response) => Ok(response),
            // Here rather than at the edge: an error is boxed on its way there, and denials are many.
            Err(error) => {
                let visit = Visit::of(&request)?;
                Ok(error.into_response(visit.id(), &visit.state.config.public_url))
            }
        }
    }
}

async fn echo(request: &Request) -> Result<Response, ApiError> {
    let caller = AdmittedKey::admit(request).await?;
    Ok(LimitApi.echo(caller).await?.into_response())
}

async fn forward_auth(request: &Request, deny: Option<u16>) -> Result<Response, ApiError> {
    let caller = AdmittedService::admit(request).await?;
    let answer = LimitApi.forward_auth(caller, request, Query(deny)).await?;
    Ok(answer.into_response())
}

async fn check(request: Request) -> Result<impl IntoResponse> {
    let (request, mut body) = request.split();
    let caller = AdmittedService::admit(&request).await?;
    let body = Json::<Check>::from_request(&request, &mut body, ExtractParamOptions::default());
    Ok(LimitApi.check(caller, &request, body.await?).await?)
}
