//! Writes the body and headers of a denial. Does not need an [`ApiError`](super::ApiError), because denials are frequent.
//! `ApiError` uses the same functions.

use std::sync::LazyLock;

use poem::http::{StatusCode, header};
use quota_common::{ProblemCode, problem::MEDIA_TYPE};

use super::body::{Start, wire_name};
use crate::{
    api::limit_headers::{self, HeaderSink},
    keys::KeyRecord,
    limiter::{Decision, Policy},
};

/// Every denial has this status, regardless of its problem type.
pub const STATUS: StatusCode = StatusCode::TOO_MANY_REQUESTS;
/// The number of seconds after which to retry if the limiter does not know when the request would be allowed, because
/// the shared counters could not be queried.
const DEFAULT_RETRY_AFTER_SECS: u64 = 1;

/// Returns the problem type of a denial.
pub(super) fn code(decision: &Decision) -> ProblemCode {
    if decision.violated().is_empty() {
        // The shared counters could not be queried, so it is unknown whether a limit has been reached.
        ProblemCode::ReducedCapacity
    } else {
        ProblemCode::QuotaExceeded
    }
}

/// Returns the number of seconds after which to retry, or `None` if the request can never be allowed.
pub(super) fn retry_after_secs(decision: &Decision) -> Option<u64> {
    match code(decision) {
        ProblemCode::ReducedCapacity => Some(
            decision
                .retry_after_secs()
                .unwrap_or(DEFAULT_RETRY_AFTER_SECS),
        ),
        _ => decision.retry_after_secs(),
    }
}

/// Appends the problem's `detail`. It needs no escaping in JSON.
pub(super) fn write_detail(decision: &Decision, out: &mut Vec<u8>) {
    if decision.violated().is_empty() {
        out.extend_from_slice(
            b"Rate limits can't be checked right now. Try again in a few seconds.",
        );
        return;
    }
    let count = decision.violated().iter().count();
    let Some(secs) = decision.retry_after_secs() else {
        if count == 1 {
            out.extend_from_slice(b"This key's ");
            write_names(decision, count, out);
        } else {
            // Some of these may only have been reached.
            out.extend_from_slice(b"At least one of this key's limits (");
            write_names(decision, count, out);
            out.push(b')');
        }
        out.extend_from_slice(b" is lower than the cost of this request.");
        return;
    };
    out.extend_from_slice(b"This key's ");
    write_names(decision, count, out);
    out.extend_from_slice(if count == 1 { &b" has"[..] } else { b" have" });
    out.extend_from_slice(b" been reached. Retry in ");
    out.extend_from_slice(itoa::Buffer::new().format(secs).as_bytes());
    out.extend_from_slice(if secs == 1 {
        &b" second."[..]
    } else {
        b" seconds."
    });
}

/// Appends the names of the `count` violated policies.
fn write_names(decision: &Decision, count: usize, out: &mut Vec<u8>) {
    for (n, policy) in decision.violated().iter().enumerate() {
        let is_last = n + 1 == count;
        out.extend_from_slice(match (n, is_last) {
            (0, _) => b"",
            (1, true) => b" and ",
            (_, true) => b", and ",
            (_, false) => b", ",
        });
        out.extend_from_slice(policy_name(policy).as_bytes());
    }
}

const fn policy_name(policy: Policy) -> &'static str {
    match policy {
        Policy::Rpm => "rate limit",
        Policy::Daily => "daily quota",
        Policy::Monthly => "monthly quota",
        Policy::TenantMonthly => "organization's monthly quota",
    }
}

/// Appends the body of a denial. Request IDs and all other strings need no escaping in JSON.
pub fn write_body(decision: &Decision, request_id: &str, out: &mut Vec<u8>) {
    // The type and title of a denial do not depend on the server's URL.
    static QUOTA_EXCEEDED: LazyLock<Vec<u8>> = LazyLock::new(|| start(ProblemCode::QuotaExceeded));
    static REDUCED_CAPACITY: LazyLock<Vec<u8>> =
        LazyLock::new(|| start(ProblemCode::ReducedCapacity));
    out.extend_from_slice(match code(decision) {
        ProblemCode::ReducedCapacity => &REDUCED_CAPACITY,
        _ => &QUOTA_EXCEEDED,
    });
    out.push(b'"');
    write_detail(decision, out);
    out.extend_from_slice(b"\",\"request_id\":\"");
    out.extend_from_slice(request_id.as_bytes());
    let mut before = &b"\",\"violated-policies\":[\""[..];
    for policy in decision.violated().iter() {
        out.extend_from_slice(before);
        out.extend_from_slice(wire_name(policy).as_str().as_bytes());
        before = b"\",\"";
    }
    out.extend_from_slice(if decision.violated().is_empty() {
        &b"\"}"[..]
    } else {
        b"\"]}"
    });
}

/// Returns the part of the body that is the same for all denials of a type.
fn start(code: ProblemCode) -> Vec<u8> {
    let mut json = Vec::new();
    let start = Start {
        kind: &code.type_uri(""),
        title: code.title(),
        status: STATUS.as_u16(),
    };
    let written = start.write(&mut json);
    debug_assert!(written.is_ok(), "writing to memory does not fail");
    json
}

pub fn write_headers(headers: &mut impl HeaderSink, record: &KeyRecord, decision: &Decision) {
    headers.expect(limit_headers::FIELDS);
    headers.set_static(header::CONTENT_TYPE, MEDIA_TYPE);
    limit_headers::write(headers, record, decision);
    // `limit_headers` has already set `Retry-After` if the limiter knows the wait.
    if decision.retry_after_secs().is_none()
        && let Some(secs) = retry_after_secs(decision)
    {
        headers.set_number(header::RETRY_AFTER, secs);
    }
}

#[cfg(test)]
mod tests {
    use std::num::{NonZeroU32, NonZeroU64};

    use quota_common::Problem;

    use super::*;
    use crate::{
        clock::{Monotonic, UnixNanos},
        limiter::{Outcome, PolicySet, PolicyState},
    };

    fn denied(violated: PolicySet, retry_after: Option<u64>) -> Decision {
        Decision {
            at: UnixNanos(0),
            monotonic: Monotonic(0),
            outcome: Outcome::Denied {
                violated,
                retry_after: retry_after.and_then(NonZeroU64::new),
            },
            rpm: NonZeroU32::MIN,
            rate: PolicyState {
                policy: Policy::Rpm,
                limit: 1,
                remaining: 0,
                reset_at: UnixNanos(1),
                shortened_to: None,
            },
            daily: None,
            monthly: None,
            tenant_monthly: None,
            degraded: violated.is_empty(),
        }
    }

    fn json(decision: &Decision) -> String {
        let mut json = Vec::new();
        write_body(decision, "r-1", &mut json);
        String::from_utf8(json).unwrap()
    }

    #[test]
    fn body_matches_the_serialized_problem() {
        let mut violated = PolicySet::EMPTY;
        let mut names = Vec::new();
        for policy in Policy::ALL {
            violated = violated.with(policy);
            names.push(wire_name(policy));
            let expected = Problem {
                kind: "https://iana.org/assignments/http-problem-types#quota-exceeded".into(),
                title: ProblemCode::QuotaExceeded.title().into(),
                status: 429,
                detail: String::new(),
                request_id: "r-1".into(),
                errors: vec![],
                violated_policies: names.clone(),
            };
            for retry_after in [None, Some(1), Some(59_000_000_001)] {
                let json = json(&denied(violated, retry_after));
                let mut problem = serde_json::from_str::<Problem>(&json).unwrap();
                assert_eq!(json, serde_json::to_string(&problem).unwrap());
                assert!(problem.detail.contains("rate limit"));
                problem.detail.clear();
                assert_eq!(problem, expected);
            }
        }
    }

    #[test]
    fn detail_names_each_violated_policy_and_the_wait() {
        let one = PolicySet::EMPTY.with(Policy::Daily);
        let two = PolicySet::EMPTY.with(Policy::Rpm).with(Policy::Monthly);
        for (violated, retry_after, detail) in [
            (
                one,
                Some(1_000_000_000),
                "This key's daily quota has been reached. Retry in 1 second.",
            ),
            (
                one,
                None,
                "This key's daily quota is lower than the cost of this request.",
            ),
            (
                two,
                Some(1_000_000_001),
                "This key's rate limit and monthly quota have been reached. Retry in 2 seconds.",
            ),
            (
                two.with(Policy::Daily),
                Some(59_000_000_000),
                "This key's rate limit, daily quota, and monthly quota have been reached. Retry in 59 seconds.",
            ),
            (
                two,
                None,
                "At least one of this key's limits (rate limit and monthly quota) is lower than the cost of this request.",
            ),
        ] {
            let mut text = Vec::new();
            write_detail(&denied(violated, retry_after), &mut text);
            assert_eq!(String::from_utf8(text).unwrap(), detail);
        }
    }

    #[test]
    fn without_counters_retry_after_defaults_to_one_second() {
        for (retry_after, secs) in [(None, 1), (Some(5_000_000_000), 5)] {
            let decision = denied(PolicySet::EMPTY, retry_after);
            let problem = serde_json::from_str::<Problem>(&json(&decision)).unwrap();
            assert_eq!(
                problem.kind,
                "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"
            );
            assert_eq!((problem.status, problem.violated_policies), (429, vec![]));
            assert_eq!(retry_after_secs(&decision), Some(secs));
        }
    }
}
