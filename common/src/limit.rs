//! Rate-limit checks: the types of the check API and the echo endpoint.

use std::collections::BTreeMap;

use crate::{
    field::{Cost, Credential, Endpoint},
    id::ApiKeyId,
    time::Timestamp,
    wire::{request, response, text_enum},
};

request! {
    /// Request body for checking a request.
    pub struct Check {
        /// The consumer's API key.
        #[garde(dive)]
        pub key: Credential,
        /// The number of requests that this request counts as, 1 to 1,000,000. Default: 1.
        #[garde(dive)]
        pub cost: Option<Cost>,
        /// The endpoint being called, such as `GET /orders`. At most 128 characters.
        #[garde(dive)]
        pub endpoint: Option<Endpoint>,
    }
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Check")
            .field("cost", &self.cost)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

text_enum! {
    /// Whether a request was allowed and, if not, why. `allowed`: `cost` was consumed from every limit.
    /// `quota_exceeded`: a rate limit or quota was exceeded. `reduced_capacity`: rate limits can't be checked right
    /// now. `unknown_key`: the tenant has no such key. `inactive_key`: the key is inactive. `expired_key`: the key has
    /// expired. `payment_required`: the key is on a paid plan, and its tenant has no valid subscription.
    pub enum CheckCode {
        /// Allowed; `cost` was consumed from every limit.
        Allowed = "allowed",
        /// Denied by a rate limit or quota; nothing was consumed.
        QuotaExceeded = "quota_exceeded",
        /// Rate limits can't be checked right now; nothing was consumed.
        ReducedCapacity = "reduced_capacity",
        /// The tenant has no such key.
        UnknownKey = "unknown_key",
        /// The key is inactive.
        InactiveKey = "inactive_key",
        /// The key has expired.
        ExpiredKey = "expired_key",
        /// The key is on a paid plan, and its tenant has no valid subscription; nothing was consumed.
        PaymentRequired = "payment_required",
    }
}

text_enum! {
    /// The name of a policy: a limit that applies to a key or a tenant. `rpm`: the key's rate limit. `daily` and
    /// `monthly`: the key's quotas. `tenant_monthly`: the operator's limit on a tenant's requests per calendar month
    /// (UTC).
    pub enum PolicyName {
        /// The rate limit, in requests per minute with a burst.
        Rpm = "rpm",
        /// The quota for the calendar day.
        Daily = "daily",
        /// The quota for the calendar month.
        Monthly = "monthly",
        /// The operator's limit on requests in a calendar month (UTC), across all API keys of a tenant without a
        /// subscription.
        TenantMonthly = "tenant_monthly",
    }
}

response! {
    /// The current state of one limit.
    #[derive(Debug, Eq)]
    pub struct LimitState {
        pub policy: PolicyName,
        /// The maximum number of requests: the burst for `rpm`, otherwise the quota.
        pub limit: u64,
        /// Number of requests that are left now.
        pub remaining: u64,
        /// When `remaining` reaches `limit` again.
        pub reset_at: Timestamp,
    }
}

response! {
    /// The result of a check.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct CheckResult {
        pub allowed: bool,
        pub code: CheckCode,
        /// The key's ID. `null` if the tenant has no such key.
        pub key_id: Option<ApiKeyId>,
        /// Name of the key's plan.
        pub plan: Option<String>,
        pub limits: Vec<LimitState>,
        /// Seconds to wait before retrying, rounded up. `null` if the request was allowed, or if waiting would not
        /// help.
        pub retry_after: Option<u64>,
        /// Headers to pass on to the consumer, whether or not the request was allowed.
        pub headers: BTreeMap<String, String>,
    }
}

response! {
    /// Response to `GET /v1/echo`.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct Echo {
        pub key_id: ApiKeyId,
        /// Name of the key's plan.
        pub plan: String,
        pub time: Timestamp,
    }
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::{Check, CheckCode, CheckResult, Echo, LimitState, PolicyName};
    use crate::id::example;

    impl Example for Check {
        fn example() -> Self {
            Self {
                key: example::KEY_TEXT.into(),
                cost: Some(1.into()),
                endpoint: Some("GET /orders".into()),
            }
        }
    }

    impl Example for CheckResult {
        fn example() -> Self {
            Self {
                allowed: true,
                code: CheckCode::Allowed,
                key_id: Some(example::api_key()),
                plan: Some("Starter".into()),
                limits: vec![LimitState {
                    policy: PolicyName::Rpm,
                    limit: 600,
                    remaining: 412,
                    reset_at: example::at(),
                }],
                retry_after: None,
                headers: [
                    ("X-RateLimit-Limit".to_owned(), "600".to_owned()),
                    ("X-RateLimit-Remaining".to_owned(), "412".to_owned()),
                    ("X-RateLimit-Reset".to_owned(), "1785738360".to_owned()),
                ]
                .into(),
            }
        }
    }

    impl Example for Echo {
        fn example() -> Self {
            Self {
                key_id: example::api_key(),
                plan: "Starter".into(),
                time: example::at(),
            }
        }
    }
}
