use quota_common::{
    Timestamp,
    api_key::{ApiKey, ApiKeyStatus},
    plan::Plan,
};

use super::{
    limits::EffectiveLimits,
    markup::{Markup, element, with_text},
    text::{date_time, number, relative},
};

/// Returns a relative time with the exact time as a tooltip. The relative time is updated while the page is open.
pub fn time_markup(at: Timestamp, now: i64) -> Markup {
    let millis = at.inner().timestamp_millis();
    with_text(
        "time",
        &[("datetime", &at.to_string()), ("title", &date_time(millis))],
        &relative(millis, now),
    )
}

pub fn time_or(at: Option<Timestamp>, missing: &str, now: i64) -> Markup {
    at.map_or_else(
        || with_text("span", &[("class", "muted")], missing),
        |at| time_markup(at, now),
    )
}

fn row(label: &str, content: &[Markup]) -> Markup {
    let parts = [with_text("dt", &[], label), element("dd", &[], content)];
    element("div", &[], &parts)
}

pub fn status_badge(key: &ApiKey, now: i64) -> Markup {
    let (class, status) = match key.status(now) {
        ApiKeyStatus::Inactive => ("badge", "Inactive"),
        ApiKeyStatus::Expired => ("badge off", "Expired"),
        ApiKeyStatus::Active => ("badge on", "Active"),
    };
    with_text("span", &[("class", class)], status)
}

/// Returns the key's plan, times, and metadata.
pub fn key_details(key: &ApiKey, plan: Option<&Plan>, now: i64) -> Markup {
    let plan_name = plan.map_or("…", |plan| &plan.name);
    let mut rows = vec![
        row(
            "Key",
            &[with_text("code", &[], &format!("{}…", key.prefix))],
        ),
        text_row("Plan", plan_name),
        row("Created", &[time_markup(key.created_at, now)]),
        row("Last used", &[time_or(key.last_used_at, "Never used", now)]),
        row("Expires", &[time_or(key.expires_at, "Never", now)]),
    ];
    let previous = key.previous_expires_at;
    if let Some(at) = previous.filter(|at| at.inner().timestamp_millis() > now) {
        rows.push(row(
            "Previous secret",
            &[Markup::text("Expires "), time_markup(at, now)],
        ));
    }
    if let Some(external_id) = &key.external_id {
        rows.push(text_row("External ID", external_id));
    }
    let mut all = element("dl", &[("class", "details")], &rows);
    // The metadata is shown separately from Quota's own fields, because tenants can choose any names.
    if !key.metadata.is_empty() {
        let rows: Vec<_> = key
            .metadata
            .iter()
            .map(|(name, value)| text_row(name, value))
            .collect();
        let class = [("class", "details metadata")];
        all.push(element("dl", &class, &rows));
    }
    all
}

/// Returns a row for text that a user entered.
fn text_row(label: &str, text: &str) -> Markup {
    let class = [("class", "clamp"), ("dir", "auto")];
    row(label, &[with_text("span", &class, text)])
}

/// Returns the rate, the burst, and the quotas that apply to the key.
pub fn limit_details(key: &ApiKey, plan: &Plan, time_zone: &str) -> Markup {
    let limits = EffectiveLimits::new(plan, key);
    let source = match key.rpm_override {
        Some(_) => format!("Override (plan: {}/min)", number(plan.default_rpm.into())),
        None => "From the plan".to_owned(),
    };
    let quota = |label: &str, quota: Option<u64>, reset: &str| {
        let (value, note) = match quota {
            Some(quota) => (number(quota), format!("Resets {reset} ({time_zone})")),
            None => ("Unlimited".to_owned(), String::new()),
        };
        limit_row(label, &value, &note)
    };
    let rows = [
        limit_row(
            "Rate limit",
            &format!("{}/min", number(limits.rate.into())),
            &source,
        ),
        limit_row(
            "Burst",
            &number(limits.burst.into()),
            "Requests allowed immediately for an idle key",
        ),
        quota("Daily quota", limits.daily_quota, "at midnight"),
        quota("Monthly quota", limits.monthly_quota, "on the 1st"),
    ];
    element("dl", &[("class", "details limits")], &rows)
}

fn limit_row(label: &str, value: &str, note: &str) -> Markup {
    let content = [
        with_text("strong", &[], value),
        Markup::text(" "),
        with_text("span", &[("class", "muted small-text")], note),
    ];
    row(label, &content)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const AT: &str = "2026-08-03T06:26:00.000Z";
    const ID: &str = "019ab4e1-7c00-7000-8000-0000000000b1";
    const NOW: i64 = 1_785_738_420_000;

    fn key(active: bool, expires_at: Option<&str>) -> ApiKey {
        serde_json::from_value(json!({
            "id": ID, "name": "App", "plan_id": ID, "prefix": "qk_12345678", "is_active": active, "expires_at": expires_at,
            "rpm_override": null, "external_id": "crm<7>", "metadata": {"region": "eu & us"}, "last_used_at": null, "previous_expires_at": null, "created_at": AT, "updated_at": AT,
        }))
        .expect("a key")
    }

    #[test]
    fn status_says_whether_the_key_can_be_used() {
        let text = |key: &ApiKey| status_badge(key, NOW).to_string();
        assert!(text(&key(true, None)).contains(">Active<"));
        assert!(text(&key(true, Some(AT))).contains(">Expired<"));
        assert!(text(&key(false, Some(AT))).contains(">Inactive<"));
        assert!(text(&key(true, Some("2027-01-01T00:00:00Z"))).contains(">Active<"));
    }

    #[test]
    fn details_name_the_plan_and_its_limits() {
        let before = key_details(&key(true, None), None, NOW).to_string();
        assert!(before.contains(">…<"), "{before}");
        assert!(
            before.contains(">1 minute ago<") && before.contains(">Never used<"),
            "{before}"
        );
        let plan: Plan = serde_json::from_value(json!({
            "id": ID, "name": "<Pro>", "default_rpm": 600, "burst": 600, "daily_quota": 1000, "monthly_quota": null,
            "strict": false, "on_redis_failure": null, "billing": "free", "key_count": 1, "created_at": AT, "updated_at": AT,
        }))
        .expect("a plan");
        let after = key_details(&key(true, None), Some(&plan), NOW).to_string();
        assert!(after.contains("&lt;Pro&gt;"), "{after}");
        let limits = limit_details(&key(true, None), &plan, "UTC").to_string();
        for text in ["600/min", "Resets at midnight (UTC)", "Unlimited"] {
            assert!(limits.contains(text), "{text} is not in {limits}");
        }
    }
}
