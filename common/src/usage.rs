//! Usage: the number of allowed and denied requests by key, endpoint, and time.

use crate::{
    id::{ApiKeyId, PlanId},
    limit::{LimitState, PolicyName},
    time::Timestamp,
    wire::{response, text_enum},
};

/// The maximum number of buckets for each group in a response.
pub const MAX_BUCKETS: usize = 1000;
/// The maximum number of groups in a response. All other groups are combined as `other`.
pub const MAX_GROUPS: usize = 20;

text_enum! {
    /// The length of the buckets, each of which contains the requests of one hour or day.
    pub enum UsageBucketSize {
        Hour = "hour",
        Day = "day",
    }
}

text_enum! {
    /// How requests are grouped.
    pub enum UsageGroupBy {
        Key = "key",
        Endpoint = "endpoint",
        /// The policy that denied the requests. Allowed requests are not in any group.
        Policy = "policy",
        Plan = "plan",
    }
}

response! {
    /// Requests and their cost. Each request counts once. Its cost is 1 unless the caller sends a different cost.
    #[derive(Debug, Copy, Eq, Default)]
    pub struct UsageCounts {
        /// Number of allowed requests.
        pub allowed: u64,
        /// Number of denied requests.
        pub rejected: u64,
        /// Total cost of the allowed requests, as counted against quotas.
        pub allowed_cost: u64,
        /// Total cost of the denied requests, which are not counted against any limit.
        pub rejected_cost: u64,
    }
}

response! {
    /// Requests in one hour or day, in total or for one group.
    #[derive(Debug, Eq)]
    pub struct UsageBucket {
        /// The start of the bucket. The bucket ends when the next hour or day starts in `time_zone`, or at `to` if that
        /// is earlier.
        pub start: Timestamp,
        /// The key, if grouped by `key`. Otherwise `null`.
        pub key_id: Option<ApiKeyId>,
        /// The endpoint, if grouped by `endpoint` (empty for requests without an endpoint). Otherwise `null`.
        pub endpoint: Option<String>,
        /// The policy that denied the requests, if grouped by `policy`. Otherwise `null`.
        pub policy: Option<String>,
        /// The plan, if grouped by `plan`. Otherwise `null`.
        pub plan_id: Option<PlanId>,
        /// Whether this entry combines all groups that are not listed separately.
        pub other: bool,
        /// Number of allowed requests.
        pub allowed: u64,
        /// Number of denied requests.
        pub rejected: u64,
        /// Total cost of the allowed requests, as counted against quotas.
        pub allowed_cost: u64,
        /// Total cost of the denied requests, which are not counted against any limit.
        pub rejected_cost: u64,
    }
}

response! {
    /// A key, endpoint, policy or plan, with its requests in the whole range.
    #[derive(Debug, Eq)]
    pub struct UsageGroup {
        /// The key, if grouped by `key`. Otherwise `null`.
        pub key_id: Option<ApiKeyId>,
        /// The endpoint, if grouped by `endpoint` (empty for requests without an endpoint). Otherwise `null`.
        pub endpoint: Option<String>,
        /// The policy that denied the requests, if grouped by `policy`: `rpm`, `daily`, `monthly` or `tenant_monthly`;
        /// `reduced_capacity` if limits could not be checked. Otherwise `null`.
        pub policy: Option<String>,
        /// The plan, if grouped by `plan`. Otherwise `null`.
        pub plan_id: Option<PlanId>,
        /// The key's or plan's current name. `null` if the key or plan was deleted, or if the group is not a key or
        /// plan.
        pub name: Option<String>,
        /// Whether this entry combines all groups that are not listed separately.
        pub other: bool,
        /// Number of allowed requests.
        pub allowed: u64,
        /// Number of denied requests.
        pub rejected: u64,
        /// Total cost of the allowed requests, as counted against quotas.
        pub allowed_cost: u64,
        /// Total cost of the denied requests, which are not counted against any limit.
        pub rejected_cost: u64,
        /// Time of the latest request in the range. `null` for `other`. Also `null` if the time is unknown because the
        /// group has later requests on the day (UTC) on which the range ends.
        pub last_seen_at: Option<Timestamp>,
    }
}

response! {
    /// Requests over time.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct Usage {
        /// The start of the range, rounded down to the quarter hour.
        pub from: Timestamp,
        /// The end of the range, exclusive, rounded up to the quarter hour.
        pub to: Timestamp,
        /// The length of each bucket. A day on which the clocks change has 23 to 25 hours.
        pub bucket: UsageBucketSize,
        /// The time zone in which hours and days start.
        pub time_zone: String,
        pub group_by: Option<UsageGroupBy>,
        /// All requests before this time are counted; later requests may be missing. This time is earlier than `to` if
        /// the range includes the present, or if a replica has not stored its usage in the database yet.
        pub complete_until: Timestamp,
        /// All requests in the range that match the filters.
        pub total: UsageCounts,
        /// Without `group_by`, every bucket in the range. With `group_by`, one bucket for each group and each hour or
        /// day in which the group had requests.
        pub buckets: Vec<UsageBucket>,
        /// With `group_by`, the 20 groups with the most requests, and `other` if there are more groups. Otherwise
        /// empty.
        pub groups: Vec<UsageGroup>,
    }
}

response! {
    /// Statistics on the tenant's keys, plans and requests.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct Stats {
        pub total_keys: u64,
        /// Number of keys that are active and have not expired.
        pub active_keys: u64,
        /// Number of keys that have never been used.
        pub unused_keys: u64,
        pub total_plans: u64,
        /// Number of requests today, both allowed and denied.
        pub requests_today: u64,
        /// Number of requests denied today.
        pub rejected_today: u64,
        /// Number of requests yesterday, up to the current time of day. Usage is counted in 15-minute intervals, so the
        /// last interval is prorated.
        pub requests_yesterday: u64,
        /// Number of requests denied yesterday, up to the current time of day.
        pub rejected_yesterday: u64,
        /// When the current day started.
        pub today: Timestamp,
        /// The tenant's time zone, which determines when days start.
        pub time_zone: String,
        /// All requests before this time are counted.
        pub complete_until: Timestamp,
        /// The quota that is closest to being used up, among those of active, unexpired keys. `null` if none of these
        /// quotas has been used.
        pub closest_to_limit: Option<QuotaStatus>,
        /// Keys that need attention, at most 20 for each `kind`. Within a kind, the most urgent come first. A key that
        /// needs attention for several reasons is listed several times.
        pub attention: Vec<Attention>,
    }
}

response! {
    /// Usage of a key's quota.
    #[derive(Debug, Eq)]
    pub struct QuotaStatus {
        pub key_id: ApiKeyId,
        pub key_name: String,
        pub policy: PolicyName,
        /// Total cost of the requests allowed so far. If the server does not record usage, this includes the part of
        /// the quota that replicas have reserved for later requests.
        pub used: u64,
        pub limit: u64,
        /// When the day or month ends.
        pub reset_at: Timestamp,
    }
}

text_enum! {
    /// Why a key needs attention. `quota`: at least 80% of a quota is used. `expiring`: the key expires within 7 days.
    /// `grace_ending`: the previous secret expires within 24 hours. `idle`: the key is active and has not been used for
    /// 30 days.
    pub enum AttentionKind {
        /// At least 80% of a quota is used. `at` is when the quota resets.
        Quota = "quota",
        /// The key expires within 7 days. `at` is when it expires.
        Expiring = "expiring",
        /// A rotated key's previous secret expires within 24 hours. `at` is when it expires.
        GraceEnding = "grace_ending",
        /// The key is active and has not been used for 30 days. `at` is the time of the key's last use or, if the key
        /// has never been used, of its creation.
        Idle = "idle",
    }
}

response! {
    /// A key that needs attention.
    #[derive(Debug, Eq)]
    pub struct Attention {
        pub kind: AttentionKind,
        pub key_id: ApiKeyId,
        pub key_name: String,
        /// When the quota resets, or when the key or the previous secret expires. If `kind` is `idle`, when the key was
        /// last used, or when it was created if it has never been used.
        pub at: Timestamp,
        /// The quota's policy, if `kind` is `quota`; otherwise `null`.
        pub policy: Option<PolicyName>,
        /// The amount used, if `kind` is `quota`; otherwise `null`.
        pub used: Option<u64>,
        /// The quota, if `kind` is `quota`; otherwise `null`.
        pub limit: Option<u64>,
    }
}

response! {
    /// A key's current limits.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct KeyLimits {
        pub key_id: ApiKeyId,
        pub plan_id: PlanId,
        /// Name of the key's plan.
        pub plan: String,
        /// Sustained requests per minute: the key's override or the plan's rate.
        pub rpm: u32,
        /// Maximum burst: the number of requests that are allowed immediately for an idle key.
        pub burst: u32,
        /// The state of each limit.
        pub limits: Vec<LimitState>,
        /// When this snapshot was taken.
        pub at: Timestamp,
    }
}

response! {
    /// A point in a burn-down.
    #[derive(Debug, Eq)]
    pub struct BurnDownPoint {
        pub at: Timestamp,
        /// How much of the quota remained at that time.
        pub remaining: u64,
        /// How much of the quota would remain at that time if it were used at an even pace over the whole day or month.
        pub ideal_remaining: u64,
    }
}

response! {
    /// How a quota has been used over the current day or month.
    #[derive(Debug)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct BurnDown {
        pub key_id: ApiKeyId,
        pub policy: PolicyName,
        /// The quota for this day or month.
        pub limit: u64,
        /// Total cost of the requests allowed so far.
        pub used: u64,
        pub remaining: u64,
        /// When the day or month started.
        pub starts_at: Timestamp,
        /// When the day or month ends and the full quota is available again.
        pub resets_at: Timestamp,
        /// Evenly spaced points starting at `starts_at`, and a final point at `complete_until`.
        pub points: Vec<BurnDownPoint>,
        /// The current pace: the average cost per hour over the last quarter of the time since `starts_at` or over the
        /// last hour, whichever is longer.
        pub pace_per_hour: f64,
        /// When the quota will be used up at the current pace. `null` if the quota won't be used up before it resets.
        /// If the quota is already used up, this equals `complete_until`.
        pub used_up_at: Option<Timestamp>,
        /// How much of the quota will remain when it resets, at the current pace.
        pub projected_remaining: u64,
        /// All requests before this time are counted.
        pub complete_until: Timestamp,
    }
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::{
        Attention, AttentionKind, BurnDown, BurnDownPoint, KeyLimits, LimitState, PolicyName,
        QuotaStatus, Stats, Timestamp, Usage, UsageBucket, UsageBucketSize, UsageCounts,
        UsageGroup, UsageGroupBy,
    };
    use crate::id::example;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_unix_secs(1_785_715_200 + seconds).expect("a time in 2026")
    }

    impl Example for Usage {
        fn example() -> Self {
            Self {
                from: at(0),
                to: at(3600),
                bucket: UsageBucketSize::Hour,
                time_zone: "Europe/Berlin".into(),
                group_by: Some(UsageGroupBy::Key),
                complete_until: at(3600),
                total: UsageCounts {
                    allowed: 1204,
                    rejected: 38,
                    allowed_cost: 1204,
                    rejected_cost: 38,
                },
                buckets: vec![UsageBucket {
                    start: at(0),
                    key_id: Some(example::api_key()),
                    endpoint: None,
                    policy: None,
                    plan_id: None,
                    other: false,
                    allowed: 1204,
                    rejected: 38,
                    allowed_cost: 1204,
                    rejected_cost: 38,
                }],
                groups: vec![UsageGroup {
                    key_id: Some(example::api_key()),
                    endpoint: None,
                    policy: None,
                    plan_id: None,
                    name: Some("Mobile app".into()),
                    other: false,
                    allowed: 1204,
                    rejected: 38,
                    allowed_cost: 1204,
                    rejected_cost: 38,
                    last_seen_at: Some(at(3581)),
                }],
            }
        }
    }

    impl Example for Stats {
        fn example() -> Self {
            Self {
                total_keys: 15,
                active_keys: 12,
                unused_keys: 3,
                total_plans: 4,
                requests_today: 18_231,
                rejected_today: 204,
                requests_yesterday: 16_900,
                rejected_yesterday: 180,
                today: at(0),
                time_zone: "Europe/Berlin".into(),
                complete_until: example::at(),
                closest_to_limit: Some(QuotaStatus {
                    key_id: example::api_key(),
                    key_name: "Mobile app".into(),
                    policy: PolicyName::Daily,
                    used: 46_000,
                    limit: 50_000,
                    reset_at: at(86_400),
                }),
                attention: vec![Attention {
                    kind: AttentionKind::Quota,
                    key_id: example::api_key(),
                    key_name: "Mobile app".into(),
                    at: at(86_400),
                    policy: Some(PolicyName::Daily),
                    used: Some(46_000),
                    limit: Some(50_000),
                }],
            }
        }
    }

    impl Example for KeyLimits {
        fn example() -> Self {
            Self {
                key_id: example::api_key(),
                plan_id: example::plan(),
                plan: "Starter".into(),
                rpm: 600,
                burst: 600,
                limits: vec![LimitState {
                    policy: PolicyName::Rpm,
                    limit: 600,
                    remaining: 412,
                    reset_at: example::at(),
                }],
                at: example::at(),
            }
        }
    }

    impl Example for BurnDown {
        fn example() -> Self {
            Self {
                key_id: example::api_key(),
                policy: PolicyName::Daily,
                limit: 50_000,
                used: 20_000,
                remaining: 30_000,
                starts_at: at(0),
                resets_at: at(86_400),
                points: vec![
                    BurnDownPoint {
                        at: at(0),
                        remaining: 50_000,
                        ideal_remaining: 50_000,
                    },
                    BurnDownPoint {
                        at: at(21_600),
                        remaining: 30_000,
                        ideal_remaining: 37_500,
                    },
                ],
                pace_per_hour: 4000.0,
                used_up_at: Some(at(48_600)),
                projected_remaining: 0,
                complete_until: at(21_600),
            }
        }
    }
}
