//! `POST /v1/check`: the decision on a request that another service has received, and its JSON.
//!
//! The JSON has the format of a [`CheckResult`], but is written without creating one, to avoid allocations in every
//! check.

use std::{num::NonZeroU32, pin::pin, sync::Arc};

use poem::{IntoResponse, Response, http::StatusCode};
use poem_openapi::{
    ApiResponse,
    registry::{MetaResponses, Registry},
};
use quota_common::{
    ApiKeyId, Timestamp,
    limit::{Check, CheckCode, CheckResult, LimitState},
};
use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::{
    api::{
        admitted::{RejectedKey, ServiceCaller, decide},
        json::{self, Json},
        limit_headers,
        problem::{ApiError, wire_name},
        request_context::RequestContext,
    },
    clock::UnixNanos,
    keys::{KeyRecord, Rejection},
    limiter::Decision,
};

pub struct Checked(Result<(Arc<KeyRecord>, Decision), RejectedKey>);

pub async fn check(
    context: &RequestContext,
    caller: &ServiceCaller,
    body: &Check,
) -> Result<Checked, ApiError> {
    let cost = body
        .cost
        .and_then(|cost| NonZeroU32::new(cost.into()))
        .unwrap_or(NonZeroU32::MIN);
    let tenant = Some(caller.token.tenant);
    let endpoint: &str = body.endpoint.as_ref().map_or("", |it| it);
    let decided = pin!(decide(context, &body.key, cost, tenant, endpoint)).await?;
    Ok(Checked(decided))
}

/// The fields of a [`CheckResult`], in the same order.
#[derive(Serialize)]
struct Body<'a> {
    allowed: bool,
    code: CheckCode,
    key_id: Option<ApiKeyId>,
    plan: Option<&'a str>,
    limits: Limits<'a>,
    retry_after: Option<u64>,
    headers: Headers<'a>,
}

struct Limits<'a>(Option<&'a Decision>);

enum Headers<'a> {
    None,
    Decision(&'a KeyRecord, &'a Decision),
    InvalidKey,
}

impl Checked {
    fn body(&self) -> Body<'_> {
        match &self.0 {
            Ok((record, decision)) => Body {
                allowed: decision.is_allowed(),
                code: if decision.is_allowed() {
                    CheckCode::Allowed
                } else if decision.violated().is_empty() {
                    CheckCode::ReducedCapacity
                } else {
                    CheckCode::QuotaExceeded
                },
                key_id: Some(record.id()),
                plan: Some(&record.plan.name),
                limits: Limits(Some(decision)),
                retry_after: decision.retry_after_secs(),
                headers: Headers::Decision(record, decision),
            },
            Err(rejected) => Body {
                allowed: false,
                code: match rejected.rejection {
                    Rejection::Unknown => CheckCode::UnknownKey,
                    Rejection::Inactive => CheckCode::InactiveKey,
                    Rejection::Expired => CheckCode::ExpiredKey,
                    Rejection::PaymentRequired => CheckCode::PaymentRequired,
                },
                key_id: rejected.record.as_ref().map(|record| record.id()),
                plan: rejected.record.as_ref().map(|record| &*record.plan.name),
                limits: Limits(None),
                retry_after: None,
                headers: match rejected.rejection {
                    Rejection::PaymentRequired => Headers::None,
                    Rejection::Unknown | Rejection::Inactive | Rejection::Expired => {
                        Headers::InvalidKey
                    }
                },
            },
        }
    }

    /// Appends the result as JSON.
    pub fn write(&self, out: &mut Vec<u8>) -> serde_json::Result<()> {
        serde_json::to_writer(out, &self.body())
    }
}

impl Serialize for Limits<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let states = self.0.into_iter().flat_map(Decision::states);
        serializer.collect_seq(states.map(|state| LimitState {
            policy: wire_name(state.policy),
            limit: state.limit,
            remaining: state.remaining,
            reset_at: time(state.reset_at),
        }))
    }
}

impl Serialize for Headers<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::None => serializer.serialize_map(Some(0))?.end(),
            Self::Decision(record, decision) => {
                limit_headers::pairs(record, decision).serialize(serializer)
            }
            Self::InvalidKey => serializer.collect_map([(
                "WWW-Authenticate",
                r#"Bearer realm="quota", error="invalid_token""#,
            )]),
        }
    }
}

fn time(at: UnixNanos) -> Timestamp {
    let last =
        || Timestamp::from_unix_secs(253_402_300_799).expect("the last second of 9999 is a time");
    Timestamp::from_unix_secs(at.secs_ceil()).unwrap_or_else(last)
}

impl IntoResponse for Checked {
    fn into_response(self) -> Response {
        json::respond(StatusCode::OK, &self.body())
    }
}

impl ApiResponse for Checked {
    fn meta() -> MetaResponses {
        Json::<CheckResult>::meta()
    }

    fn register(registry: &mut Registry) {
        <Json<CheckResult> as ApiResponse>::register(registry);
    }
}
