//! The limits that apply to an API key.

use quota_common::{api_key::ApiKey, plan::Plan};

/// A key's limits: its plan's, with the key's own rate if it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EffectiveLimits {
    /// Requests per minute.
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
            // A burst that equals the plan's rate follows the key's own.
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
    fn burst_follows_the_override_only_if_it_equals_the_rate() {
        assert_eq!(limits(60, json!(600)).burst, 600);
        assert_eq!(limits(10, json!(600)).burst, 10);
        assert_eq!(limits(10, json!(600)).rate, 600);
    }
}
