//! Plans: the rate limits and quotas that a group of keys shares.

use garde::Validate;
use serde::{Deserialize, Serialize};

use crate::{
    field::{Burst, Name, Quota, Rpm},
    id::PlanId,
    patch::{Patch, sent, unsent},
    time::Timestamp,
};

/// `paid`: keys on the plan work only while the tenant has an active subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Enum),
    oai(rename_all = "snake_case")
)]
pub enum Billing {
    #[default]
    Free,
    Paid,
}

/// Behavior while Redis is unreachable.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Enum),
    oai(rename_all = "snake_case")
)]
pub enum OnRedisFailure {
    /// Keep limiting: each replica allows its share of the limit.
    #[default]
    Share,
    /// Allow all requests.
    Open,
    /// Reject all requests with 503.
    Closed,
}

impl OnRedisFailure {
    /// Returns the name used in JSON and in the database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Share => "share",
            Self::Open => "open",
            Self::Closed => "closed",
        }
    }

    /// Looks up a variant by its [`name`](Self::name).
    pub fn named(name: &str) -> Option<Self> {
        [Self::Share, Self::Open, Self::Closed]
            .into_iter()
            .find(|it| it.name() == name)
    }
}

/// A plan. Its limits apply to each of its keys separately.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct Plan {
    pub id: PlanId,
    /// Unique within the tenant.
    pub name: String,
    /// Requests per minute for each key.
    pub default_rpm: u32,
    /// Maximum burst: requests an idle key may send immediately.
    pub burst: u32,
    /// Requests per key and calendar day, in the tenant's time zone. `null`: unlimited.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub daily_quota: Option<u64>,
    /// Requests per key and calendar month, in the tenant's time zone. `null`: unlimited.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub monthly_quota: Option<u64>,
    /// Whether every request is checked against the shared counters instead of a local lease.
    pub strict: bool,
    /// Behavior while Redis is unreachable. `null`: the server default.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub on_redis_failure: Option<OnRedisFailure>,
    pub billing: Billing,
    /// Number of keys on the plan. A plan that still has keys cannot be deleted.
    pub key_count: u64,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
}

/// Request body for creating a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct CreatePlan {
    /// 1 to 200 characters, unique within the tenant.
    #[garde(dive)]
    pub name: Name,
    /// Requests per minute for each key, 1 to 60,000,000.
    #[garde(dive)]
    pub default_rpm: Rpm,
    /// Maximum burst: requests an idle key may send immediately, 1 to 60,000,000. Default: `default_rpm`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(dive)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub burst: Option<Burst>,
    /// Requests per key and calendar day, in the tenant's time zone. Default: unlimited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(dive)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub daily_quota: Option<Quota>,
    /// Requests per key and calendar month, in the tenant's time zone. Default: unlimited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(dive)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub monthly_quota: Option<Quota>,
    /// Check every request against the shared counters instead of a local lease. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub strict: Option<bool>,
    /// Behavior while Redis is unreachable. Default: the server default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub on_redis_failure: Option<OnRedisFailure>,
    /// Default: `free`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub billing: Option<Billing>,
}

/// Request body for updating a plan. Omitted fields are unchanged; `null` removes a quota.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct UpdatePlan {
    /// 1 to 200 characters, unique within the tenant.
    #[serde(default, deserialize_with = "sent", skip_serializing_if = "unsent")]
    #[garde(dive)]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub name: Option<Name>,
    #[serde(default, deserialize_with = "sent", skip_serializing_if = "unsent")]
    #[garde(dive)]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub default_rpm: Option<Rpm>,
    #[serde(default, deserialize_with = "sent", skip_serializing_if = "unsent")]
    #[garde(dive)]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub burst: Option<Burst>,
    /// `null` removes the quota.
    #[serde(default, deserialize_with = "sent", skip_serializing_if = "unsent")]
    #[garde(dive)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub daily_quota: Patch<Quota>,
    /// `null` removes the quota.
    #[serde(default, deserialize_with = "sent", skip_serializing_if = "unsent")]
    #[garde(dive)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub monthly_quota: Patch<Quota>,
    #[serde(default, deserialize_with = "sent", skip_serializing_if = "unsent")]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub strict: Option<bool>,
    /// `null` restores the server default.
    #[serde(default, deserialize_with = "sent", skip_serializing_if = "unsent")]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub on_redis_failure: Patch<OnRedisFailure>,
    #[serde(default, deserialize_with = "sent", skip_serializing_if = "unsent")]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub billing: Option<Billing>,
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::{Billing, CreatePlan, Plan, UpdatePlan};
    use crate::id::example;

    impl Example for Plan {
        fn example() -> Self {
            Self {
                id: example::plan(),
                name: "Starter".into(),
                default_rpm: 600,
                burst: 600,
                daily_quota: Some(50_000),
                monthly_quota: Some(1_000_000),
                strict: false,
                on_redis_failure: None,
                billing: Billing::Free,
                key_count: 3,
                created_at: example::at(),
                updated_at: example::at(),
            }
        }
    }

    impl Example for CreatePlan {
        fn example() -> Self {
            Self {
                name: "Starter".into(),
                default_rpm: 600.into(),
                burst: None,
                daily_quota: Some(50_000.into()),
                monthly_quota: Some(1_000_000.into()),
                strict: None,
                on_redis_failure: None,
                billing: None,
            }
        }
    }

    impl Example for UpdatePlan {
        fn example() -> Self {
            Self {
                default_rpm: Some(1200.into()),
                daily_quota: Some(None),
                ..Self::default()
            }
        }
    }
}
