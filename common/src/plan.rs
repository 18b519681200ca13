//! Plans: sets of rate limits and quotas, which apply to each key on the plan.

use crate::{
    field::{Burst, Name, Quota, Rpm},
    id::PlanId,
    patch::Patch,
    time::Timestamp,
    wire::{request, response, text_enum, update},
};

text_enum! {
    /// Whether a plan requires a subscription. If billing is on, keys on a `paid` plan work only while the tenant has a
    /// subscription that is active, in its trial, or in the grace period after a failed payment.
    #[derive(Default)]
    pub enum Billing {
        #[default]
        Free = "free",
        Paid = "paid",
    }
}

text_enum! {
    /// Behavior while Redis is unreachable. `share`: each replica enforces its share of the limit. `open`: each replica
    /// enforces the full limit. `closed`: requests are rejected with 503.
    #[derive(PartialOrd, Ord, Default)]
    pub enum OnRedisFailure {
        /// Each replica enforces its share of the limit.
        #[default]
        Share = "share",
        /// Each replica enforces the full limit on its own.
        Open = "open",
        /// Requests are rejected with 503.
        Closed = "closed",
    }
}

response! {
    /// A plan. Its limits apply separately to each of its keys.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct Plan {
        pub id: PlanId,
        /// The plan's name, unique within the tenant.
        pub name: String,
        /// Requests per minute for each key.
        pub default_rpm: u32,
        /// Maximum burst: the number of requests that are allowed immediately for an idle key.
        pub burst: u32,
        /// Requests per key per calendar day, in the tenant's time zone. `null` if unlimited.
        pub daily_quota: Option<u64>,
        /// Requests per key per calendar month, in the tenant's time zone. `null` if unlimited.
        pub monthly_quota: Option<u64>,
        /// Whether every allowed request takes its tokens directly from the shared counters, without a local lease. A
        /// lease is a number of requests that a replica has reserved for a key in advance.
        pub strict: bool,
        /// Behavior while Redis is unreachable. `null` for the server default.
        pub on_redis_failure: Option<OnRedisFailure>,
        pub billing: Billing,
        /// Number of keys on the plan. A plan that still has keys cannot be deleted.
        pub key_count: u64,
        pub created_at: Timestamp,
        pub updated_at: Timestamp,
    }
}

request! {
    /// Request body for creating a plan.
    #[derive(Debug)]
    pub struct CreatePlan {
        /// 1 to 200 characters, unique within the tenant.
        #[garde(dive)]
        pub name: Name,
        /// Requests per minute for each key, 1 to 60,000,000.
        #[garde(dive)]
        pub default_rpm: Rpm,
        /// Maximum burst: the number of requests that are allowed immediately for an idle key, 1 to 60,000,000. A
        /// used-up burst must be fully available again within 31 days, so the burst can be at most 44,640 times the
        /// rate. Default: `default_rpm`.
        #[garde(dive)]
        pub burst: Option<Burst>,
        /// Requests per key per calendar day, in the tenant's time zone. Default: unlimited.
        #[garde(dive)]
        pub daily_quota: Option<Quota>,
        /// Requests per key per calendar month, in the tenant's time zone. Default: unlimited.
        #[garde(dive)]
        pub monthly_quota: Option<Quota>,
        /// Whether every allowed request takes its tokens directly from the shared counters, without a local lease. A
        /// lease is a number of requests that a replica has reserved for a key in advance. Default: false.
        #[garde(skip)]
        pub strict: Option<bool>,
        /// Behavior while Redis is unreachable. If omitted, the server default applies.
        #[garde(skip)]
        pub on_redis_failure: Option<OnRedisFailure>,
        /// Default: `free`.
        #[garde(skip)]
        pub billing: Option<Billing>,
    }
}

update! {
    /// Request body for updating a plan. Omitted fields are unchanged; `null` removes a quota.
    pub struct UpdatePlan {
        /// 1 to 200 characters, unique within the tenant.
        #[garde(dive)]
        pub name: Option<Name>,
        #[garde(dive)]
        pub default_rpm: Option<Rpm>,
        #[garde(dive)]
        pub burst: Option<Burst>,
        /// `null` removes the quota.
        #[garde(dive)]
        pub daily_quota: Patch<Quota>,
        /// `null` removes the quota.
        #[garde(dive)]
        pub monthly_quota: Patch<Quota>,
        #[garde(skip)]
        pub strict: Option<bool>,
        /// `null` restores the server default.
        #[garde(skip)]
        pub on_redis_failure: Patch<OnRedisFailure>,
        #[garde(skip)]
        pub billing: Option<Billing>,
    }
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
