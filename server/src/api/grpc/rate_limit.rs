//! `ShouldRateLimit`: whether Envoy may forward a request.
//!
//! Each descriptor requests a check of one API key. Quota reads these entries of a descriptor:
//!
//! | entry | meaning |
//! |---|---|
//! | `api_key` | the key |
//! | `authorization` | the consumer's `Authorization` header, if consumers may send the key as a bearer token |
//! | `endpoint` | the endpoint to record in usage |
//! | `method`, `path` | the endpoint, if there is no entry `endpoint` |
//!
//! Descriptors are checked in order, up to the first one that is not allowed. Tokens that were consumed for the
//! descriptors before it are not returned.
//!
//! By default, Envoy forwards a request if the call fails. Therefore, a call fails only if the gateway is misconfigured
//! or the server cannot make a decision. Any error that a consumer can cause results in [`Code::OverLimit`].

use std::num::NonZeroU32;

use poem::http::HeaderName;
use quota_common::{TenantId, bounds};

use super::message::{
    Code, Descriptor, DescriptorStatus, Duration, Field, HeaderValue, RateLimit, RateLimitRequest,
    RateLimitResponse, Struct, Unit, Value,
};
use crate::{
    api::{
        admitted::{AdmittedKey, DecidedKey},
        credentials::{consumer_key, forwarded_endpoint},
        fields::{Fields, text},
        limit_headers::{self, DECISION, GatewayDecision, HeaderSink},
        problem::ApiError,
        request_context::RequestContext,
    },
    limiter::{Decision, Policy},
};

/// The maximum number of descriptors in a request. Each descriptor is checked separately.
const DESCRIPTORS_MAX: usize = 16;
/// The maximum number of entries in a descriptor. An entry takes much more space in memory than in the message.
const ENTRIES_MAX: usize = 32;
/// The value that Envoy sends for a missing header.
const MISSING: &[u8] = b"-";

/// Decides whether a tenant's gateway may forward a request.
pub(super) async fn should_rate_limit(
    context: &RequestContext,
    tenant: TenantId,
    request: &RateLimitRequest,
) -> Result<RateLimitResponse, ApiError> {
    let count = request.descriptors.len();
    if !(1..=DESCRIPTORS_MAX).contains(&count) {
        let message = format!("must have 1 to {DESCRIPTORS_MAX} items");
        let error = ApiError::invalid("descriptors", message);
        return Ok(not_allowed(context, &error));
    }
    if request
        .descriptors
        .iter()
        .any(|it| it.entries.len() > ENTRIES_MAX)
    {
        let message = format!("must have at most {ENTRIES_MAX} items");
        let error = ApiError::invalid("descriptors.entries", message);
        return Ok(not_allowed(context, &error));
    }
    let mut statuses = Vec::with_capacity(count);
    let mut headers = Headers::default();
    for descriptor in &request.descriptors {
        match check(context, tenant, descriptor, request.hits_addend).await {
            Ok(admitted) => {
                if statuses.is_empty() {
                    limit_headers::write(&mut headers, &admitted.record, &admitted.decision);
                }
                statuses.push(status(Code::Ok, Some(&admitted.decision)));
            }
            Err(error) if error.status_code().is_server_error() => return Err(error),
            Err(error) => return Ok(over_limit(context, &error, statuses, count)),
        }
    }
    Ok(RateLimitResponse {
        overall_code: Code::Ok.into(),
        statuses,
        response_headers_to_add: headers.0,
        raw_body: Vec::new(),
        dynamic_metadata: Some(metadata(GatewayDecision::Allowed)),
    })
}

/// Returns the response to a request that is rejected as a whole.
pub(super) fn not_allowed(context: &RequestContext, error: &ApiError) -> RateLimitResponse {
    over_limit(context, error, Vec::new(), 0)
}

async fn check(
    context: &RequestContext,
    tenant: TenantId,
    descriptor: &Descriptor,
    hits_addend: u32,
) -> Result<AdmittedKey, ApiError> {
    if descriptor.is_negative_hits {
        return Err(ApiError::invalid("is_negative_hits", "is not supported"));
    }
    let hits = descriptor.hits_addend.unwrap_or(hits_addend.into());
    let cost = u32::try_from(hits)
        .ok()
        .filter(|cost| *cost <= bounds::COST_MAX)
        .ok_or_else(|| {
            ApiError::invalid(
                "hits_addend",
                format!("must be at most {}", bounds::COST_MAX),
            )
        })?;
    let cost = NonZeroU32::new(cost).unwrap_or(NonZeroU32::MIN);
    let key = consumer_key(descriptor).ok_or_else(ApiError::key_missing)?;
    let endpoint = endpoint(descriptor);
    let decided = DecidedKey::decide(context, key, cost, Some(tenant), &endpoint);
    decided.await?.require_admitted()
}

/// Returns the response to a request that is not allowed. `statuses` contains the statuses of the descriptors before
/// the one that is not allowed. `count` is the number of all descriptors.
fn over_limit(
    context: &RequestContext,
    error: &ApiError,
    mut statuses: Vec<DescriptorStatus>,
    count: usize,
) -> RateLimitResponse {
    let denied = error.denied.as_ref().map(|denied| &denied.1);
    if count > 0 {
        statuses.push(status(Code::OverLimit, denied));
    }
    // The descriptors that were not checked have the code `Unknown`.
    statuses.resize_with(count, DescriptorStatus::default);
    let decision = GatewayDecision::of_error(error.status_code());
    let mut headers = Headers::default();
    error.write_headers(&mut headers);
    headers.set_static(DECISION, decision.name());
    let mut raw_body = Vec::with_capacity(512);
    error.write_body(
        context.id(),
        &context.state.config.public_url,
        &mut raw_body,
    );
    RateLimitResponse {
        overall_code: Code::OverLimit.into(),
        statuses,
        response_headers_to_add: headers.0,
        raw_body,
        dynamic_metadata: Some(metadata(decision)),
    }
}

fn metadata(decision: GatewayDecision) -> Struct {
    let value = Value {
        string_value: decision.name().to_owned(),
    };
    Struct {
        fields: vec![Field {
            key: "decision".to_owned(),
            value: Some(value),
        }],
    }
}

/// Returns the status of a descriptor, with the policy that is closest to exhaustion.
fn status(code: Code, decision: Option<&Decision>) -> DescriptorStatus {
    let Some(decision) = decision else {
        return DescriptorStatus {
            code: code.into(),
            ..DescriptorStatus::default()
        };
    };
    let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    let state = decision.nearest();
    let (requests_per_unit, unit) = match state.policy {
        Policy::Rpm => (decision.rpm.get(), Unit::Minute),
        Policy::Daily => (small(state.limit), Unit::Day),
        Policy::Monthly | Policy::TenantMonthly => (small(state.limit), Unit::Month),
    };
    let until_reset = state.reset_at.saturating_since(decision.at).0;
    DescriptorStatus {
        code: code.into(),
        current_limit: Some(RateLimit {
            requests_per_unit,
            unit: unit.into(),
            name: state.policy.name().to_owned(),
        }),
        limit_remaining: small(state.remaining),
        duration_until_reset: Some(Duration {
            seconds: i64::try_from(until_reset / 1_000_000_000).unwrap_or(i64::MAX),
            nanos: i32::try_from(until_reset % 1_000_000_000).unwrap_or_default(),
        }),
    }
}

/// Returns the endpoint to record in usage, without the query, which may contain arbitrary data.
fn endpoint(descriptor: &Descriptor) -> String {
    let endpoint = entries(descriptor, "endpoint").next().and_then(text);
    endpoint.map_or_else(
        || forwarded_endpoint(descriptor),
        |it| it.split(['?', '#']).next().unwrap_or_default().to_owned(),
    )
}

fn entries<'a>(descriptor: &'a Descriptor, key: &str) -> impl DoubleEndedIterator<Item = &'a [u8]> {
    descriptor
        .entries
        .iter()
        .filter(move |entry| entry.key == key)
        .map(|entry| &*entry.value)
        .filter(|value| !value.is_empty() && *value != MISSING)
}

/// The entries that correspond to the headers of a forward-auth request.
impl Fields for Descriptor {
    fn values<'a>(&'a self, name: &str) -> impl DoubleEndedIterator<Item = &'a [u8]> {
        let key = match name {
            "x-api-key" => Some("api_key"),
            "authorization" => Some("authorization"),
            "x-forwarded-method" => Some("method"),
            "x-forwarded-uri" => Some("path"),
            _ => None,
        };
        key.into_iter().flat_map(move |key| entries(self, key))
    }
}

/// The headers that Envoy adds to a response.
#[derive(Default)]
struct Headers(Vec<HeaderValue>);

impl HeaderSink for Headers {
    fn expect(&mut self, headers: usize) {
        self.0.reserve(headers.saturating_sub(self.0.len()));
    }

    fn contains(&self, name: &HeaderName) -> bool {
        self.0.iter().any(|header| header.key == name.as_str())
    }

    fn set(&mut self, name: HeaderName, value: &poem::http::HeaderValue) {
        self.set_text(name, value.as_bytes());
    }

    fn set_static(&mut self, name: HeaderName, value: &'static str) {
        self.set_text(name, value.as_bytes());
    }

    fn set_number(&mut self, name: HeaderName, value: u64) {
        self.set_text(name, itoa::Buffer::new().format(value).as_bytes());
    }

    fn set_text(&mut self, name: HeaderName, value: &[u8]) {
        self.0.push(HeaderValue {
            key: name.as_str().to_owned(),
            value: String::from_utf8_lossy(value).into_owned(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::{super::message::Entry, *};

    fn descriptor(entries: &[(&str, &str)]) -> Descriptor {
        let entries = entries.iter().map(|(key, value)| Entry {
            key: (*key).to_owned(),
            value: value.as_bytes().to_vec(),
        });
        Descriptor {
            entries: entries.collect(),
            ..Descriptor::default()
        }
    }

    #[test]
    fn key_is_read_like_the_headers_of_forward_auth() {
        let key = |entries: &[(&str, &str)]| consumer_key(&descriptor(entries)).map(str::to_owned);
        assert_eq!(key(&[("api_key", "qk_1")]).as_deref(), Some("qk_1"));
        let bearer = ("authorization", "Bearer qk_2");
        assert_eq!(key(&[bearer]).as_deref(), Some("qk_2"));
        for missing in ["", "-"] {
            assert_eq!(key(&[("api_key", missing)]), None);
            assert_eq!(
                key(&[("api_key", missing), bearer]).as_deref(),
                Some("qk_2")
            );
        }
        assert_eq!(key(&[("api_key", "qk_1"), ("api_key", "qk_1")]), None);
        assert_eq!(key(&[("api_key", "qk_1"), bearer]), None);
        assert_eq!(key(&[("x-api-key", "qk_1"), ("", "qk_1")]), None);
    }

    #[test]
    fn endpoint_has_no_query() {
        let of = |entries: &[(&str, &str)]| endpoint(&descriptor(entries));
        assert_eq!(of(&[]), "");
        assert_eq!(of(&[("endpoint", "GET /orders?key=1")]), "GET /orders");
        let split = [("method", "GET"), ("path", "/orders?key=1")];
        assert_eq!(of(&split), "GET /orders");
        assert_eq!(of(&[split[0], split[1], ("endpoint", "orders")]), "orders");
    }
}
