//! `POST /v1/check`: the decision on a request that another service has received, and its JSON.
//!
//! The JSON of a decision has the format of a [`CheckResult`], but is written without creating one and without serde,
//! because serde would take longer than making the decision.

use std::{collections::BTreeMap, num::NonZeroU32, pin::pin, sync::Arc};

use poem::{IntoResponse, Response, http::StatusCode};
use poem_openapi::{
    ApiResponse,
    registry::{MetaResponses, Registry},
};
use quota_common::{
    Timestamp,
    limit::{Check, CheckCode, CheckResult},
};

use crate::{
    api::{
        admitted::{RejectedKey, ServiceCaller, decide},
        json::{self, Json},
        limit_headers,
        problem::{ApiError, wire_name},
        request_context::RequestContext,
    },
    clock::UnixNanos,
    json_text::write_text,
    keys::{KeyRecord, Rejection},
    limiter::Decision,
};

/// A capacity, in bytes, that is enough for most results.
const USUAL: usize = 512;

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

impl Checked {
    /// Appends the result as JSON.
    pub fn write(&self, out: &mut Vec<u8>) -> serde_json::Result<()> {
        match &self.0 {
            Ok((record, decision)) => write_decision(record, decision, out),
            Err(rejected) => serde_json::to_writer(out, &of_rejected(rejected)),
        }
    }
}

/// Appends the [`CheckResult`] of a decision as JSON, with the fields in the order of its declaration.
fn write_decision(
    record: &KeyRecord,
    decision: &Decision,
    out: &mut Vec<u8>,
) -> serde_json::Result<()> {
    let code = if decision.is_allowed() {
        out.extend_from_slice(b"{\"allowed\":true,\"code\":\"");
        CheckCode::Allowed
    } else {
        out.extend_from_slice(b"{\"allowed\":false,\"code\":\"");
        if decision.violated().is_empty() {
            CheckCode::ReducedCapacity
        } else {
            CheckCode::QuotaExceeded
        }
    };
    out.extend_from_slice(code.as_str().as_bytes());
    out.extend_from_slice(b"\",\"key_id\":\"");
    let mut id = [0; 36];
    record.id().0.as_hyphenated().encode_lower(&mut id);
    out.extend_from_slice(&id);
    out.extend_from_slice(b"\",\"plan\":");
    write_text(&record.plan.name, out)?;
    let mut number = itoa::Buffer::new();
    let mut before = &b",\"limits\":[{\"policy\":\""[..];
    for state in decision.states() {
        out.extend_from_slice(before);
        out.extend_from_slice(wire_name(state.policy).as_str().as_bytes());
        out.extend_from_slice(b"\",\"limit\":");
        out.extend_from_slice(number.format(state.limit).as_bytes());
        out.extend_from_slice(b",\"remaining\":");
        out.extend_from_slice(number.format(state.remaining).as_bytes());
        out.extend_from_slice(b",\"reset_at\":\"");
        out.extend_from_slice(&time(state.reset_at).text());
        before = b"\"},{\"policy\":\"";
    }
    out.extend_from_slice(b"\"}],\"retry_after\":");
    match decision.retry_after_secs() {
        Some(secs) => out.extend_from_slice(number.format(secs).as_bytes()),
        None => out.extend_from_slice(b"null"),
    }
    out.extend_from_slice(b",\"headers\":");
    limit_headers::write_json(record, decision, out);
    out.push(b'}');
    Ok(())
}

fn of_rejected(rejected: &RejectedKey) -> CheckResult {
    let record = rejected.record.as_ref();
    CheckResult {
        allowed: false,
        code: match rejected.rejection {
            Rejection::Unknown => CheckCode::UnknownKey,
            Rejection::Inactive => CheckCode::InactiveKey,
            Rejection::Expired => CheckCode::ExpiredKey,
            Rejection::PaymentRequired => CheckCode::PaymentRequired,
        },
        key_id: record.map(|record| record.id()),
        plan: record.map(|record| record.plan.name.clone()),
        limits: Vec::new(),
        retry_after: None,
        headers: match rejected.rejection {
            Rejection::PaymentRequired => BTreeMap::new(),
            Rejection::Unknown | Rejection::Inactive | Rejection::Expired => {
                let challenge = r#"Bearer realm="quota", error="invalid_token""#;
                BTreeMap::from([("WWW-Authenticate".to_owned(), challenge.to_owned())])
            }
        },
    }
}

fn time(at: UnixNanos) -> Timestamp {
    let last =
        || Timestamp::from_unix_secs(253_402_300_799).expect("the last second of 9999 is a time");
    Timestamp::from_unix_secs(at.secs_ceil()).unwrap_or_else(last)
}

impl IntoResponse for Checked {
    fn into_response(self) -> Response {
        let mut body = Vec::with_capacity(USUAL);
        let written = self.write(&mut body);
        json::respond_with(StatusCode::OK, written.map(|()| body))
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
