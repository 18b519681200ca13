//! Rate-limit checks: the check API and the echo endpoint.

use std::collections::BTreeMap;

use garde::Validate;
use serde::{Deserialize, Serialize};

use crate::{
    field::{Cost, Credential, Endpoint},
    id::ApiKeyId,
    time::Timestamp,
};

/// Request body for checking a request.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct Check {
    /// The consumer's API key.
    #[garde(dive)]
    pub key: Credential,
    /// How many requests this one counts as, 1 to 1,000,000. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(dive)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub cost: Option<Cost>,
    /// The endpoint being called, such as `GET /orders`. At most 128 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(dive)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub endpoint: Option<Endpoint>,
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Check")
            .field("cost", &self.cost)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

/// Result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Enum),
    oai(rename_all = "snake_case")
)]
pub enum CheckCode {
    /// Allowed; `cost` was consumed from every limit.
    Allowed,
    /// Denied by a rate limit or quota; nothing was consumed.
    QuotaExceeded,
    /// Rate limits can't be checked right now; nothing was consumed.
    ReducedCapacity,
    /// The tenant has no such key.
    UnknownKey,
    /// The key is disabled.
    InactiveKey,
    /// The key has expired.
    ExpiredKey,
    /// The key's plan is paid and the tenant has no active subscription; nothing was consumed.
    PaymentRequired,
}

/// A limit of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Enum),
    oai(rename_all = "snake_case")
)]
pub enum PolicyName {
    /// The rate limit, in requests per minute with a burst.
    Rpm,
    /// The quota for the calendar day.
    Daily,
    /// The quota for the calendar month.
    Monthly,
}

impl PolicyName {
    /// Returns the name as it appears in headers and query strings.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rpm => "rpm",
            Self::Daily => "daily",
            Self::Monthly => "monthly",
        }
    }
}

/// The current state of one limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object))]
pub struct LimitState {
    pub policy: PolicyName,
    /// The burst for `rpm`; the quota for `daily` and `monthly`.
    pub limit: u64,
    /// Requests left now.
    pub remaining: u64,
    /// When `remaining` is back at `limit`.
    pub reset_at: Timestamp,
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct CheckResult {
    pub allowed: bool,
    pub code: CheckCode,
    /// `null` if the tenant has no such key.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub key_id: Option<ApiKeyId>,
    /// Name of the key's plan.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub plan: Option<String>,
    pub limits: Vec<LimitState>,
    /// Seconds until the same request would be allowed, rounded up. `null` if it was allowed or can never be allowed.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub retry_after: Option<u64>,
    /// Headers for the gateway to pass on to the consumer, whether the request was allowed or denied.
    pub headers: BTreeMap<String, String>,
}

/// Response of `GET /v1/echo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct Echo {
    pub key_id: ApiKeyId,
    /// Name of the key's plan.
    pub plan: String,
    pub time: Timestamp,
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
