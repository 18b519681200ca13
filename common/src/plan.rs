//! Plans: what a key may do, and how fast.

use garde::Validate;
use serde::{Deserialize, Serialize};

use crate::{
    id::PlanId,
    patch::{Patch, sent},
    time::Timestamp,
};

/// The longest name of a plan, key, service token or tenant, in characters.
pub const NAME_MAX: usize = 200;
/// The highest sustained rate and burst, in requests a minute and requests.
pub const RPM_MAX: u32 = 60_000_000;
/// The highest daily or monthly quota: the largest integer that an RFC 9651 header field can carry.
pub const QUOTA_MAX: u64 = 999_999_999_999_999;

/// Whether a plan's keys need a live subscription of their tenant.
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

/// What happens to requests while Redis, which replicas share their counters by, is away.
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
    /// Each replica admits its share of the limit.
    #[default]
    Share,
    /// All are admitted.
    Open,
    /// All are answered 503.
    Closed,
}

impl OnRedisFailure {
    /// The name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Share => "share",
            Self::Open => "open",
            Self::Closed => "closed",
        }
    }

    /// The one of that name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Share, Self::Open, Self::Closed]
            .into_iter()
            .find(|it| it.name() == name)
    }
}

/// A plan: the limits that its keys share the shape of. Each key has a bucket and quotas of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct Plan {
    pub id: PlanId,
    /// Unique within the tenant.
    pub name: String,
    /// The sustained rate of each key, in requests a minute.
    pub default_rpm: u32,
    /// How many requests a rested key may send at once.
    pub burst: u32,
    /// Requests a key may send in a calendar day of the tenant's time zone.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub daily_quota: Option<u64>,
    /// Requests a key may send in a calendar month of the tenant's time zone.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub monthly_quota: Option<u64>,
    /// Every request is decided on the shared counters, without leases.
    pub strict: bool,
    /// What happens to requests while the counters that replicas share are away; `null`: as the server is set.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub on_redis_failure: Option<OnRedisFailure>,
    pub billing: Billing,
    /// How many keys are on the plan. A plan with keys cannot be deleted.
    pub key_count: u64,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
}

/// What a new plan is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct CreatePlan {
    /// 1 to 200 characters, unique within the tenant.
    #[garde(custom(crate::bounds::name))]
    #[cfg_attr(feature = "openapi", oai(validator(min_length = 1, max_length = 200)))]
    pub name: String,
    /// The sustained rate of each key, in requests a minute: 1 to 60,000,000.
    #[garde(range(min = 1, max = RPM_MAX))]
    #[cfg_attr(
        feature = "openapi",
        oai(validator(minimum(value = "1"), maximum(value = "60000000")))
    )]
    pub default_rpm: u32,
    /// How many requests a rested key may send at once: 1 to 60,000,000. Default: `default_rpm`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(range(min = 1, max = RPM_MAX))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(minimum(value = "1"), maximum(value = "60000000"))
        )
    )]
    pub burst: Option<u32>,
    /// Requests a key may send in a calendar day. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(range(min = 1, max = QUOTA_MAX))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(minimum(value = "1"), maximum(value = "999999999999999"))
        )
    )]
    pub daily_quota: Option<u64>,
    /// Requests a key may send in a calendar month. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(range(min = 1, max = QUOTA_MAX))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(minimum(value = "1"), maximum(value = "999999999999999"))
        )
    )]
    pub monthly_quota: Option<u64>,
    /// Decide every request on the shared counters, without leases. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub strict: Option<bool>,
    /// What happens to requests while the counters that replicas share are away. Default: as the server is set.
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

/// What changes about a plan. A field that is not sent stays as it is; `null` lifts a quota.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Object),
    oai(example, deny_unknown_fields)
)]
pub struct UpdatePlan {
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(inner(custom(crate::bounds::name)))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            skip_serializing_if_is_none,
            validator(min_length = 1, max_length = 200)
        )
    )]
    pub name: Option<String>,
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(range(min = 1, max = RPM_MAX))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            skip_serializing_if_is_none,
            validator(minimum(value = "1"), maximum(value = "60000000"))
        )
    )]
    pub default_rpm: Option<u32>,
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(range(min = 1, max = RPM_MAX))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            skip_serializing_if_is_none,
            validator(minimum(value = "1"), maximum(value = "60000000"))
        )
    )]
    pub burst: Option<u32>,
    /// `null` lifts the quota.
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(inner(inner(range(min = 1, max = QUOTA_MAX))))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(minimum(value = "1"), maximum(value = "999999999999999"))
        )
    )]
    pub daily_quota: Patch<u64>,
    /// `null` lifts the quota.
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(inner(inner(range(min = 1, max = QUOTA_MAX))))]
    #[cfg_attr(
        feature = "openapi",
        oai(
            nullable,
            skip_serializing_if_is_none,
            validator(minimum(value = "1"), maximum(value = "999999999999999"))
        )
    )]
    pub monthly_quota: Patch<u64>,
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(skip_serializing_if_is_none))]
    pub strict: Option<bool>,
    /// `null`: as the server is set.
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
    #[garde(skip)]
    #[cfg_attr(feature = "openapi", oai(nullable, skip_serializing_if_is_none))]
    pub on_redis_failure: Patch<OnRedisFailure>,
    #[serde(
        default,
        deserialize_with = "sent",
        skip_serializing_if = "Option::is_none"
    )]
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
                default_rpm: 600,
                burst: None,
                daily_quota: Some(50_000),
                monthly_quota: Some(1_000_000),
                strict: None,
                on_redis_failure: None,
                billing: None,
            }
        }
    }

    impl Example for UpdatePlan {
        fn example() -> Self {
            Self {
                default_rpm: Some(1200),
                daily_quota: Some(None),
                ..Self::default()
            }
        }
    }
}
