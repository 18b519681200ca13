//! Decisions: what the check API is asked and answers, and the endpoint to try a key on.

use std::collections::BTreeMap;

use garde::Validate;
use serde::{Deserialize, Serialize};

use crate::{id::ApiKeyId, time::Timestamp};

/// The longest name of an endpoint, in bytes.
pub const ENDPOINT_MAX: usize = 128;
/// The highest cost of one request.
pub const COST_MAX: u32 = 1_000_000;

/// A question: may this key do this now? Asking takes what it asks for.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct Check {
    /// The text of the consumer's API key.
    #[garde(length(bytes, min = 1, max = 256))]
    #[cfg_attr(feature = "openapi", oai(validator(min_length = 1, max_length = 256)))]
    pub key: String,
    /// How many requests this one counts for, 1 to 1,000,000. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(range(min = 1, max = COST_MAX))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(minimum(value = "1"), maximum(value = "1000000"))
        )
    )]
    pub cost: Option<u32>,
    /// What is asked for, such as `GET /orders`; at most 128 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(inner(custom(crate::bounds::endpoint)))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(min_length = 1, max_length = 128)
        )
    )]
    pub endpoint: Option<String>,
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Check")
            .field("cost", &self.cost)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

/// Why a check was answered as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Enum),
    oai(rename_all = "snake_case")
)]
pub enum CheckCode {
    /// Admitted, and taken from every policy.
    Allowed,
    /// Denied by a rate or a quota; nothing was taken.
    QuotaExceeded,
    /// Denied because limits cannot be checked at the moment. They may not be reached; nothing was taken.
    ReducedCapacity,
    /// No key of the tenant has this text.
    UnknownKey,
    /// The key is switched off.
    InactiveKey,
    /// The key's time has passed.
    ExpiredKey,
    /// The key's plan is paid and the tenant has no live subscription.
    SubscriptionNeeded,
}

/// A policy that limits a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Enum),
    oai(rename_all = "snake_case")
)]
pub enum PolicyName {
    /// The sustained rate with its burst.
    Rpm,
    /// The quota of the calendar day.
    Daily,
    /// The quota of the calendar month.
    Monthly,
}

/// Where one policy stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object))]
pub struct LimitState {
    pub policy: PolicyName,
    /// The burst of `rpm`, the quota of the others.
    pub limit: u64,
    /// How many requests are left now.
    pub remaining: u64,
    /// When all of `limit` is there again.
    pub reset_at: Timestamp,
}

/// The answer to a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct CheckResult {
    pub allowed: bool,
    pub code: CheckCode,
    /// `null` when no key of the tenant has this text.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub key_id: Option<ApiKeyId>,
    /// The name of the key's plan.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub plan: Option<String>,
    pub limits: Vec<LimitState>,
    /// Whole seconds after which the same request would be admitted; `null` when it was, or never will be.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub retry_after: Option<u64>,
    /// The header fields that the gateway hands on to the consumer, also when the request was denied.
    pub headers: BTreeMap<String, String>,
}

/// What `GET /v1/echo` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct Echo {
    pub key_id: ApiKeyId,
    /// The name of the key's plan.
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
                cost: Some(1),
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
