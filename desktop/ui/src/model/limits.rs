//! The limits that apply to an API key, and the current use of each limit.

use quota_common::{
    api_key::ApiKey,
    limit::{LimitState, PolicyName},
    plan::Plan,
    usage::KeyLimits,
};

use super::{
    bucket::Bucket,
    burn_down::name,
    markup::Markup,
    meter::Meter,
    text::{countdown, relative},
};

/// The limits of a key's plan. The key's rate override, if any, replaces the plan's rate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EffectiveLimits {
    pub rate: u32,
    pub burst: u32,
    pub daily_quota: Option<u64>,
    pub monthly_quota: Option<u64>,
}

impl EffectiveLimits {
    pub fn new(plan: &Plan, key: &ApiKey) -> Self {
        let rate = key.rpm_override.unwrap_or(plan.default_rpm);
        Self {
            rate,
            // If the plan's burst is equal to its rate, the burst follows the key's rate override.
            burst: if plan.burst == plan.default_rpm {
                rate
            } else {
                plan.burst
            },
            daily_quota: plan.daily_quota,
            monthly_quota: plan.monthly_quota,
        }
    }
}

/// Returns a meter for each limit of a key. Includes the tokens refilled since `loaded_at`. Both times are from the
/// browser's clock, in milliseconds since the Unix epoch.
pub fn limit_meters(it: &KeyLimits, loaded_at: i64, now: i64) -> Markup {
    let meters = it.limits.iter();
    meters
        .map(|limit| match limit.policy {
            PolicyName::Rpm => burst_meter(limit, it.rpm, loaded_at, now),
            _ => quota_meter(limit, now),
        })
        .collect()
}

fn burst_meter(limit: &LimitState, rpm: u32, loaded_at: i64, now: i64) -> Markup {
    let bucket = Bucket {
        limit: limit.limit,
        remaining: limit.remaining,
        at: loaded_at,
        refill: u64::from(rpm.max(1)),
        window: 60,
    };
    let note = match bucket.full_in(now) {
        0 => "None used".to_owned(),
        secs => format!("Full burst available in {}", countdown(secs)),
    };
    let meter = Meter {
        label: "Burst",
        // A request needs a whole token, so a token that has refilled only in part counts as used.
        used: limit.limit.saturating_sub(bucket.level(now) / 1000),
        limit: limit.limit,
        note: &note,
        denied: false,
    };
    meter.markup()
}

fn quota_meter(limit: &LimitState, now: i64) -> Markup {
    let used = limit.limit.saturating_sub(limit.remaining);
    let note = match used {
        0 => "None used".to_owned(),
        _ => {
            let reset = relative(limit.reset_at.inner().timestamp_millis(), now);
            format!("Resets {reset}")
        }
    };
    let meter = Meter {
        label: name(limit.policy),
        used,
        limit: limit.limit,
        note: &note,
        denied: false,
    };
    meter.markup()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const AT: &str = "2026-08-03T06:26:00.000Z";
    const ID: &str = "019ab4e1-7c00-7000-8000-0000000000b1";

    fn limits(burst: u32, rpm_override: Value) -> EffectiveLimits {
        let plan = json!({
            "id": ID, "name": "Starter", "default_rpm": 60, "burst": burst, "daily_quota": 1000, "monthly_quota": null,
            "strict": false, "on_redis_failure": null, "billing": "free", "key_count": 1, "created_at": AT, "updated_at": AT,
        });
        let mut key = json!({
            "id": ID, "name": "App", "plan_id": ID, "prefix": "qk_12345678", "is_active": true, "expires_at": null,
            "last_used_at": null, "previous_expires_at": null, "created_at": AT, "updated_at": AT,
        });
        key["rpm_override"] = rpm_override;
        EffectiveLimits::new(
            &serde_json::from_value(plan).expect("a plan"),
            &serde_json::from_value(key).expect("a key"),
        )
    }

    #[test]
    fn plan_applies_without_an_override() {
        let limits = limits(10, Value::Null);
        assert_eq!((limits.rate, limits.burst), (60, 10));
        assert_eq!(
            (limits.daily_quota, limits.monthly_quota),
            (Some(1000), None)
        );
    }

    #[test]
    fn meters_show_what_is_used_and_the_burst_refills() {
        let limit = |policy: &str, limit: u64, remaining: u64| json!({"policy": policy, "limit": limit, "remaining": remaining, "reset_at": "2026-08-04T00:00:00.000Z"});
        let it: KeyLimits = serde_json::from_value(json!({
            "key_id": ID, "plan_id": ID, "plan": "Starter", "rpm": 60, "burst": 10, "at": AT,
            "limits": [limit("rpm", 10, 2), limit("daily", 1000, 400), limit("monthly", 9000, 9000)],
        }))
        .expect("limits");
        // 3 Aug 2026, 06:26 UTC.
        let loaded = 1_785_738_360_000;
        let now = limit_meters(&it, loaded, loaded).to_string();
        for text in [
            "8 of 10 used",
            "Full burst available in 8 s",
            "600 of 1,000 used",
            "Resets in 17 hours",
            "0 of 9,000 used",
        ] {
            assert!(now.contains(text), "{text} is not in {now}");
        }
        let later = limit_meters(&it, loaded, loaded + 5000).to_string();
        assert!(
            later.contains("3 of 10 used") && later.contains("Full burst available in 3 s"),
            "{later}"
        );
        assert!(later.contains("600 of 1,000 used"), "{later}");
        let full = limit_meters(&it, loaded, loaded + 8000).to_string();
        assert!(full.contains("0 of 10 used"), "{full}");
    }

    #[test]
    fn burst_follows_the_override_only_if_it_equals_the_rate() {
        assert_eq!(limits(60, json!(600)).burst, 600);
        assert_eq!(limits(10, json!(600)).burst, 10);
        assert_eq!(limits(10, json!(600)).rate, 600);
    }
}
