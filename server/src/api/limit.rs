//! `/v1`: the endpoints that check rate limits. All of them use [`decide`].

mod checked;

use std::{cell::Cell, num::NonZeroU32, pin::pin, sync::Arc};

use poem::{
    IntoResponse, Request, Response, Result,
    http::{HeaderValue, StatusCode, header},
};
use poem_openapi::{
    ApiResponse, Enum, OpenApi,
    param::Query,
    registry::{MetaMediaType, MetaResponse, MetaResponses, Registry},
    types::Type,
};
use quota_common::{
    ApiKeyId, Timestamp,
    limit::{Check, Echo},
};

pub use self::checked::{Checked, check};
use super::{
    Tag,
    admitted::{AdmittedKey, GatewayCaller, ServiceCaller, decide},
    credentials::{consumer_key, forwarded_endpoint},
    fields::Fields,
    json::Json,
    limit_headers::{self, GatewayDecision, HeaderSink},
    problem::{ApiError, challenge},
    request_context::RequestContext,
};
use crate::{
    json_text,
    keys::{KeyRecord, Rejection},
    limiter::Decision,
};

pub struct LimitApi;

/// A response with headers that report the decision on the request.
pub struct WithLimitHeaders<T> {
    admitted: AdmittedKey,
    body: Json<T>,
}

impl<T: serde::Serialize + Send> IntoResponse for WithLimitHeaders<T> {
    fn into_response(self) -> Response {
        let mut response = self.body.into_response();
        limit_headers::write(
            response.headers_mut(),
            &self.admitted.record,
            &self.admitted.decision,
        );
        response
    }
}

impl<T: Type + serde::Serialize + Send> ApiResponse for WithLimitHeaders<T> {
    fn meta() -> MetaResponses {
        let content = vec![MetaMediaType {
            content_type: "application/json",
            schema: T::schema_ref(),
        }];
        MetaResponses {
            responses: vec![MetaResponse {
                description: "Allowed",
                status: Some(200),
                status_range: None,
                content,
                headers: vec![],
            }],
        }
    }

    fn register(registry: &mut Registry) {
        T::register(registry);
    }
}

/// A response that reports a decision only in its status and headers. The body is empty, so that nginx can reuse the
/// connection.
pub struct StatusOnly {
    pub status: StatusCode,
    decision: GatewayDecision,
    /// The key and the limiter's decision, if the limiter was called.
    decided: Option<(Arc<KeyRecord>, Decision)>,
    challenge: Option<HeaderValue>,
}

impl StatusOnly {
    fn new(status: StatusCode, decision: GatewayDecision) -> Self {
        Self {
            status,
            decision,
            decided: None,
            challenge: None,
        }
    }

    fn decided(record: Arc<KeyRecord>, decision: Decision, denied: StatusCode) -> Self {
        let bare = if decision.is_allowed() {
            Self::new(StatusCode::OK, GatewayDecision::Allowed)
        } else {
            Self::new(denied, GatewayDecision::Limited)
        };
        Self {
            decided: Some((record, decision)),
            ..bare
        }
    }

    fn payment_required(denied: StatusCode) -> Self {
        // Gateways that ask for 403, such as nginx, do not accept 402.
        let status = match denied {
            StatusCode::FORBIDDEN => StatusCode::FORBIDDEN,
            _ => StatusCode::PAYMENT_REQUIRED,
        };
        Self::new(status, GatewayDecision::PaymentRequired)
    }

    fn unauthorized(credential_sent: bool) -> Self {
        Self {
            challenge: Some(challenge(credential_sent)),
            ..Self::new(StatusCode::UNAUTHORIZED, GatewayDecision::Unauthorized)
        }
    }

    pub fn write_headers(&self, headers: &mut impl HeaderSink) {
        headers.expect(limit_headers::FIELDS);
        headers.set_number(header::CONTENT_LENGTH, 0);
        headers.set_static(limit_headers::DECISION, self.decision.name());
        if let Some((record, decision)) = &self.decided {
            limit_headers::write(headers, record, decision);
        }
        if let Some(challenge) = &self.challenge {
            headers.set(header::WWW_AUTHENTICATE, challenge);
        }
    }
}

impl IntoResponse for StatusOnly {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        self.write_headers(response.headers_mut());
        response
    }
}

impl ApiResponse for StatusOnly {
    fn meta() -> MetaResponses {
        let bare = |status, description| MetaResponse {
            description,
            status: Some(status),
            status_range: None,
            content: vec![],
            headers: vec![],
        };
        MetaResponses {
            responses: vec![
                bare(200, "Allowed. The body is empty."),
                bare(
                    402,
                    "The key is on a paid plan, and its tenant has no valid subscription. With `deny=403`, the status is 403 instead. The body is empty.",
                ),
                bare(
                    403,
                    "With `deny=403`: denied, or the key is on a paid plan and its tenant has no valid subscription. The body is empty.",
                ),
                bare(429, "Denied. The body is empty."),
            ],
        }
    }

    fn register(_registry: &mut Registry) {}
}

/// The status code for a denied request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Enum)]
pub enum Deny {
    #[oai(rename = "403")]
    Forbidden,
    #[oai(rename = "429")]
    TooManyRequests,
}

fn echo(caller: &AdmittedKey) -> Result<Echo, ApiError> {
    Ok(Echo {
        key_id: caller.record.id(),
        plan: caller.record.plan.name.clone(),
        time: echo_time(&caller.decision)?,
    })
}

fn echo_time(decision: &Decision) -> Result<Timestamp, ApiError> {
    Timestamp::from_unix_secs(decision.at.secs())
        .ok_or_else(|| ApiError::internal("the clock is past the year 9999"))
}

thread_local! {
    /// The most recently formatted second, and its JSON.
    static LAST_TIME: Cell<(u64, [u8; TIME])> = const { Cell::new((u64::MAX, [b' '; TIME])) };
}

/// The length of a [`Timestamp`] as JSON.
pub const TIME: usize = "\"2026-11-24T09:18:42.000Z\"".len();

/// Returns the `time` of an [`Echo`] as JSON. Each thread caches the most recently formatted second, because it may
/// write thousands of responses in the same second.
pub fn echo_time_json(decision: &Decision) -> Result<[u8; TIME], ApiError> {
    let (last, json) = LAST_TIME.get();
    if last == decision.at.secs() {
        return Ok(json);
    }
    let time = echo_time(decision)?;
    let mut json = [b' '; TIME];
    serde_json::to_writer(&mut json[..], &time).map_err(ApiError::internal)?;
    LAST_TIME.set((decision.at.secs(), json));
    Ok(json)
}

/// Appends the JSON of an [`Echo`]. Formats the JSON without serde, because this function runs for every direct
/// response to `/v1/echo`.
pub fn write_echo(
    key_id: ApiKeyId,
    plan: &str,
    time: &[u8; TIME],
    out: &mut Vec<u8>,
) -> serde_json::Result<()> {
    let mut id = [0; 36];
    key_id.0.as_hyphenated().encode_lower(&mut id);
    out.extend_from_slice(b"{\"key_id\":\"");
    out.extend_from_slice(&id);
    out.extend_from_slice(b"\",\"plan\":");
    json_text::write_text(plan, out)?;
    out.extend_from_slice(b",\"time\":");
    out.extend_from_slice(time);
    out.push(b'}');
    Ok(())
}

/// Decides whether a gateway may forward a request.
pub async fn forward_auth(
    context: &RequestContext,
    caller: &GatewayCaller,
    fields: &impl Fields,
    deny: Option<Deny>,
) -> Result<StatusOnly, ApiError> {
    let denied = match deny {
        None | Some(Deny::TooManyRequests) => StatusCode::TOO_MANY_REQUESTS,
        Some(Deny::Forbidden) => StatusCode::FORBIDDEN,
    };
    let Some(key) = consumer_key(fields) else {
        return Ok(StatusOnly::unauthorized(false));
    };
    let tenant = Some(caller.token.tenant);
    let endpoint = forwarded_endpoint(fields);
    Ok(
        match pin!(decide(context, key, NonZeroU32::MIN, tenant, &endpoint)).await? {
            Ok((record, decision)) => StatusOnly::decided(record, decision, denied),
            Err(refused) if refused.rejection == Rejection::PaymentRequired => {
                StatusOnly::payment_required(denied)
            }
            Err(_) => StatusOnly::unauthorized(true),
        },
    )
}

#[OpenApi(prefix_path = "/v1", tag = "Tag::RateLimiting")]
impl LimitApi {
    /// Echo (test an API key)
    ///
    /// Consumes one request from the key's limits and returns the same rate-limit headers that your API's consumers
    /// see.
    #[oai(path = "/echo", method = "get", operation_id = "echo")]
    pub async fn echo(&self, caller: AdmittedKey) -> Result<WithLimitHeaders<Echo>, ApiError> {
        let body = Json(echo(&caller)?);
        Ok(WithLimitHeaders {
            admitted: caller,
            body,
        })
    }

    /// Check a request
    ///
    /// Call this from your own services for each request they receive. Returns 200 whether or not the request is
    /// allowed, even if the key is unknown; see `allowed` and `code`. An allowed request consumes `cost` from each of
    /// the key's limits; any other request consumes nothing.
    #[oai(path = "/check", method = "post", operation_id = "check")]
    pub async fn check(
        &self,
        caller: ServiceCaller,
        request: &Request,
        body: Json<Check>,
    ) -> Result<Checked, ApiError> {
        let context = RequestContext::of(request)?;
        check(context, &caller, &body.0).await
    }

    /// Check a request (status only, for gateways)
    ///
    /// Gateways such as Caddy, nginx, HAProxy, Envoy and Traefik call this before they forward a request. Accepts any
    /// method. Send the gateway's service token in exactly one `X-Service-Token` header, and pass on the consumer's
    /// `X-API-Key` or `Authorization: Bearer` header. Every response has an `X-Quota-Decision` header: `allowed`,
    /// `limited`, `unauthorized`, `payment_required` or `unavailable`. Forward a request only if the status is 200 and
    /// the decision is `allowed`.
    #[oai(path = "/forward-auth", method = "get", operation_id = "forward_auth")]
    pub async fn forward_auth(
        &self,
        caller: GatewayCaller,
        request: &Request,
        /// Status code for a denied request: `403` or `429`. Default: `429`. Use `403` for nginx, which accepts only
        /// 2xx, 401 and 403. With `403`, requests that would otherwise get 402 also get 403.
        deny: Query<Option<Deny>>,
    ) -> Result<StatusOnly, ApiError> {
        let context = RequestContext::of(request)?;
        forward_auth(context, &caller, request.headers(), deny.0).await
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::{
        clock::{Monotonic, UnixNanos},
        limiter::{Outcome, Policy, PolicyState},
    };

    fn decision(secs: u64) -> Decision {
        let at = UnixNanos::from_secs(secs);
        Decision {
            at,
            monotonic: Monotonic(0),
            outcome: Outcome::Allowed,
            rpm: NonZeroU32::MIN,
            rate: PolicyState {
                policy: Policy::Rpm,
                limit: 1,
                remaining: 0,
                reset_at: at,
                shortened_to: None,
            },
            daily: None,
            monthly: None,
            tenant_monthly: None,
            degraded: false,
        }
    }

    #[test]
    fn written_echo_is_the_same_json() {
        let key_id = ApiKeyId(Uuid::from_u128(1));
        for (plan, secs) in [("Starter", 0), ("\"odd\" \\ \n ä", 1_785_738_360), ("", 0)] {
            let echo = Echo {
                key_id,
                plan: plan.into(),
                time: echo_time(&decision(secs)).unwrap(),
            };
            let time = echo_time_json(&decision(secs)).unwrap();
            let mut json = Vec::new();
            write_echo(key_id, plan, &time, &mut json).unwrap();
            assert_eq!(json, serde_json::to_vec(&echo).unwrap());
        }
    }
}
