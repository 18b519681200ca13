//! Decisions, as Quota reports them.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;

/// The reason why a request was allowed or denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Code {
    Allowed,
    /// The request would exceed a rate limit or quota.
    QuotaExceeded,
    /// Quota cannot check the limits right now.
    ReducedCapacity,
    /// The tenant has no such key.
    UnknownKey,
    InactiveKey,
    ExpiredKey,
    /// The key is on a paid plan, and its tenant has no valid subscription.
    PaymentRequired,
    /// Quota could not be reached, and the layer passes on requests in that case. Nothing is known about the key.
    #[serde(skip)]
    Unchecked,
    /// A denial reason that is unknown to this version of the crate.
    #[serde(other)]
    Other,
}

/// The state of one limit after the decision.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct LimitState {
    /// `rpm`, `daily`, `monthly` or `tenant_monthly`.
    pub policy: String,
    /// The maximum: the burst for `rpm`, otherwise the quota.
    pub limit: u64,
    /// Number of requests left.
    pub remaining: u64,
    /// When `remaining` reaches `limit` again (RFC 3339).
    pub reset_at: String,
}

/// Quota's decision on a request. It is stored in the extensions of each request that is passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Decision {
    pub code: Code,
    pub key_id: Option<String>,
    /// Name of the key's plan.
    pub plan: Option<String>,
    pub limits: Vec<LimitState>,
    /// Seconds to wait before retrying, rounded up. `None` if the request was allowed, or if waiting does not help.
    pub retry_after: Option<u64>,
    /// The headers to add to the response.
    pub headers: HeaderMap,
    /// The ID of the decision in Quota's log.
    pub request_id: Option<HeaderValue>,
}

impl Decision {
    /// Returns a decision that Quota did not make: only `code` is set.
    pub(crate) fn local(code: Code) -> Self {
        Self {
            code,
            key_id: None,
            plan: None,
            limits: Vec::new(),
            retry_after: None,
            headers: HeaderMap::new(),
            request_id: None,
        }
    }
}

/// The response of the check API.
#[derive(Deserialize)]
pub(crate) struct CheckResponse {
    allowed: bool,
    code: Code,
    key_id: Option<String>,
    plan: Option<String>,
    limits: Vec<LimitState>,
    retry_after: Option<u64>,
    headers: BTreeMap<String, String>,
}

impl CheckResponse {
    /// Returns the decision, or `None` if the response is not valid: for example, if `allowed` and `code` contradict
    /// each other.
    pub(crate) fn into_decision(self, request_id: Option<HeaderValue>) -> Option<Decision> {
        if self.allowed != (self.code == Code::Allowed) {
            return None;
        }
        let mut headers = HeaderMap::with_capacity(self.headers.len());
        for (name, value) in self.headers {
            let name = HeaderName::try_from(name).ok()?;
            headers.insert(name, HeaderValue::try_from(value).ok()?);
        }
        Some(Decision {
            code: self.code,
            key_id: self.key_id,
            plan: self.plan,
            limits: self.limits,
            retry_after: self.retry_after,
            headers,
            request_id,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Option<Decision> {
        serde_json::from_str::<CheckResponse>(json)
            .ok()?
            .into_decision(None)
    }

    #[test]
    fn answer_may_have_new_fields_codes_and_policies() {
        let decision = read(
            r#"{"allowed": false, "code": "new_reason", "key_id": null, "plan": null, "retry_after": null,
                "limits": [{"policy": "weekly", "limit": 7, "remaining": 0, "reset_at": "2026-11-27T00:00:00Z",
                            "new": 1}],
                "headers": {"X-New": "1"}, "new": {}}"#,
        )
        .expect("a decision");
        assert_eq!(decision.code, Code::Other);
        assert_eq!(decision.limits[0].policy, "weekly");
        assert_eq!(decision.headers["x-new"], "1");
    }

    #[test]
    fn only_a_complete_answer_is_a_decision() {
        const COMPLETE: &str = r#"{"allowed": true, "code": "allowed", "key_id": "1", "plan": "Starter", "limits": [],
                                   "retry_after": null, "headers": {}}"#;
        assert_eq!(read(COMPLETE).map(|it| it.code), Some(Code::Allowed));
        for (from, to) in [
            (r#""allowed": true,"#, ""),
            (r#""allowed": true"#, r#""allowed": 1"#),
            (r#""allowed": true"#, r#""allowed": false"#),
            (r#""code": "allowed""#, r#""code": "quota_exceeded""#),
            (r#""code": "allowed""#, r#""code": "unchecked""#),
            (r#""code": "allowed","#, ""),
            (r#""limits": [],"#, ""),
            (r#""headers": {}"#, r#""headers": {"a\nb": "1"}"#),
            (r#""headers": {}"#, r#""headers": {"a": "1\n2"}"#),
            ("}", ""),
        ] {
            let json = COMPLETE.replace(from, to);
            assert_ne!(json, COMPLETE);
            assert_eq!(read(&json), None, "{json}");
        }
    }
}
