//! Descriptions of audit events.

use quota_common::audit::AuditEvent;
use serde_json::{Map, Value};

use super::{
    key::time_markup,
    markup::{Markup, element, with_text},
    text::{capitalized, date_time, number, quoted},
};

/// Returns the label of an action, such as `api_key.rotate`.
pub fn action_label(action: &str) -> String {
    match action {
        "session.begin" => "Signed in",
        "session.end" => "Signed out",
        "session.reuse_detected" => "Session revoked: refresh token reused",
        "user.register" => "Account created",
        "user.update" => "Profile updated",
        "user.change_password" => "Password changed",
        "user.reset_password" => "Password reset",
        "tenant.update" => "Organization updated",
        "tenant.update_alerts" => "Alert settings updated",
        "webhook.rotate_secret" => "Webhook secret rotated",
        _ => {
            let (noun, verb) = action.split_once('.').unwrap_or((action, ""));
            let noun = capitalized(&noun.replace('_', " ")).replace("Api ", "API ");
            return format!("{noun} {verb}d");
        }
    }
    .to_owned()
}

/// A changed field of a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldChange {
    pub label: String,
    /// `None` if the resource was created.
    pub before: Option<String>,
    /// `None` if the resource was deleted.
    pub after: Option<String>,
}

/// Returns the fields that an event changed. `plan_name` returns a plan's name by its ID.
pub fn field_changes(
    event: &AuditEvent,
    plan_name: &dyn Fn(&str) -> Option<String>,
) -> Vec<FieldChange> {
    let none = Map::new();
    let fields = |value: &Option<Value>| value.as_ref().and_then(Value::as_object).cloned();
    let (before, after) = (fields(&event.before), fields(&event.after));
    let names = before.as_ref().unwrap_or(&none).keys();
    let added = after.as_ref().unwrap_or(&none).keys();
    let added = added.filter(|name| before.as_ref().is_none_or(|it| !it.contains_key(*name)));
    let text = |fields: &Option<Map<String, Value>>, name: &str| {
        Some(value_text(name, fields.as_ref()?.get(name)?, plan_name))
    };
    names
        .chain(added)
        // The event has its own ID and time.
        .filter(|name| !matches!(name.as_str(), "id" | "created_at" | "updated_at"))
        .map(|name| FieldChange {
            label: field_label(name),
            before: text(&before, name),
            after: text(&after, name),
        })
        .collect()
}

/// Sums up an event in one line, such as `Rate 600 → 300/min`. Returns an empty string if the action's name is enough.
pub fn summary(event: &AuditEvent, plan_name: &dyn Fn(&str) -> Option<String>) -> String {
    let object = |value: &Option<Value>| value.as_ref().and_then(Value::as_object).cloned();
    let is_webhook = event.target_type == "webhook";
    match (object(&event.before), object(&event.after)) {
        (Some(before), Some(after)) => {
            let parts: Vec<String> = after
                .iter()
                .filter_map(|(name, value)| {
                    change(name, before.get(name), value, is_webhook, plan_name)
                })
                .collect();
            capitalized(&parts.join(", "))
        }
        (None, Some(after)) => {
            let known = [
                "default_rpm",
                "daily_quota",
                "monthly_quota",
                "plan_id",
                "rpm_override",
                "expires_at",
            ];
            let parts: Vec<String> = known
                .iter()
                .filter_map(|name| Some((name, after.get(*name).filter(|it| !it.is_null())?)))
                .map(|(name, value)| {
                    let value = value_text(name, value, plan_name);
                    match *name {
                        "default_rpm" => value,
                        "daily_quota" => format!("{value} per day"),
                        "monthly_quota" => format!("{value} per month"),
                        name => format!("{} {value}", field_label(name).to_ascii_lowercase()),
                    }
                })
                .collect();
            capitalized(&parts.join(", "))
        }
        _ => String::new(),
    }
}

fn change(
    name: &str,
    before: Option<&Value>,
    after: &Value,
    is_webhook: bool,
    plan_name: &dyn Fn(&str) -> Option<String>,
) -> Option<String> {
    let text = |value: &Value| value_text(name, value, plan_name);
    Some(match (name, after) {
        ("previous_expires_at", Value::Null) => "previous key revoked".to_owned(),
        ("previous_expires_at", at) => format!("previous key works until {}", text(at)),
        ("previous_secret_expires_at", Value::Null) => "previous secret revoked".to_owned(),
        ("previous_secret_expires_at", at) => {
            format!("previous secret works until {}", text(at))
        }
        ("prefix", _) => format!("now {}…", text(after)),
        ("is_active", Value::Bool(active)) => match (is_webhook, active) {
            (false, true) => "activated",
            (false, false) => "deactivated",
            (true, true) => "enabled",
            (true, false) => "disabled",
        }
        .to_owned(),
        ("key_count" | "last_used_at", _) => return None,
        ("metadata", _) => "metadata changed".to_owned(),
        ("name", _) => format!(
            "Renamed from {}",
            quoted(&before.map(text).unwrap_or_default())
        ),
        _ => {
            let (before, after) = (before.map(text).unwrap_or_default(), text(after));
            // Write the unit only once.
            let before = match after.strip_suffix(|c: char| c.is_ascii_alphabetic()) {
                Some(_) if after.ends_with("/min") => before.trim_end_matches("/min").to_owned(),
                _ => before,
            };
            format!("{} {before} → {after}", field_label(name))
        }
    })
}

fn field_label(name: &str) -> String {
    match name {
        "default_rpm" => "Rate".to_owned(),
        "rpm_override" => "Rate override".to_owned(),
        "plan_id" => "Plan".to_owned(),
        "is_active" => "Active".to_owned(),
        "expires_at" => "Expires".to_owned(),
        "previous_expires_at" => "Previous key expires".to_owned(),
        "previous_secret_expires_at" => "Previous secret expires".to_owned(),
        "url" => "URL".to_owned(),
        "email_roles" => "Email recipients".to_owned(),
        "prefix" => "Key".to_owned(),
        "on_redis_failure" => "If Redis is unavailable".to_owned(),
        "external_id" => "External ID".to_owned(),
        "key_count" => "Keys".to_owned(),
        "last_used_at" => "Last used".to_owned(),
        "sessions_ended" => "Sessions revoked".to_owned(),
        "tenant_name" => "Organization".to_owned(),
        other => capitalized(&other.replace('_', " ")),
    }
}

fn value_text(name: &str, value: &Value, plan_name: &dyn Fn(&str) -> Option<String>) -> String {
    match value {
        Value::Null => match name {
            "daily_quota" | "monthly_quota" => "unlimited",
            "expires_at" | "last_used_at" => "never",
            "on_redis_failure" => "server default",
            _ => "none",
        }
        .to_owned(),
        Value::Bool(on) => if *on { "on" } else { "off" }.to_owned(),
        Value::Number(n) if n.is_u64() => {
            let text = number(n.as_u64().unwrap_or_default());
            if matches!(name, "default_rpm" | "rpm_override") {
                format!("{text}/min")
            } else {
                text
            }
        }
        Value::String(id) if name == "plan_id" => {
            plan_name(id).unwrap_or_else(|| "(deleted)".to_owned())
        }
        Value::String(at) if name.ends_with("_at") => {
            at.parse::<quota_common::Timestamp>().map_or_else(
                |_| at.clone(),
                |at| date_time(at.inner().timestamp_millis()),
            )
        }
        Value::String(text) => text.clone(),
        Value::Object(entries) if entries.is_empty() => "none".to_owned(),
        Value::Array(items) if name == "email_roles" => {
            let roles: Vec<_> = items.iter().filter_map(Value::as_str).collect();
            roles.join(", ")
        }
        other => compact(other),
    }
}

/// Returns a value as JSON on one line. Does not use serde_json, whose tables for exact fractions would make the
/// download larger.
pub fn compact(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(it) => it.to_string(),
        Value::Number(n) => n.as_i64().map_or_else(
            || fraction(n.as_f64().unwrap_or_default()),
            |n| n.to_string(),
        ),
        Value::String(text) => format!("\"{text}\""),
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(compact).collect();
            format!("[{}]", items.join(","))
        }
        Value::Object(fields) => {
            let fields = fields.iter();
            let fields: Vec<_> = fields
                .map(|(name, value)| format!("\"{name}\":{}", compact(value)))
                .collect();
            format!("{{{}}}", fields.join(","))
        }
    }
}

/// Formats a number with three decimal places.
fn fraction(number: f64) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "saturates, far above any number in an event"
    )]
    let thousandths = (number * 1000.0).round() as i64;
    let sign = if thousandths < 0 { "-" } else { "" };
    let (whole, rest) = (
        thousandths.unsigned_abs() / 1000,
        thousandths.unsigned_abs() % 1000,
    );
    format!("{sign}{whole}.{rest:03}")
}

/// Returns a table with one row per event. Below each row is a hidden row with the details.
pub fn event_table(
    events: &[AuditEvent],
    plan_name: &dyn Fn(&str) -> Option<String>,
    now: i64,
) -> Markup {
    let is_deleted = |id: &str| {
        events
            .iter()
            .any(|it| it.action.ends_with(".delete") && it.target_id.as_deref() == Some(id))
    };
    let rows: Markup = events
        .iter()
        .flat_map(|event| {
            let id = event.target_id.as_deref().unwrap_or_default();
            // For a resource without a page, link to its history.
            let href = match &*event.target_type {
                "api_key" if !is_deleted(id) => format!("/console/api-keys/{id}"),
                "webhook" if !is_deleted(id) => format!("/console/webhooks/{id}"),
                "tenant" if event.action == "tenant.update_alerts" => "/console/alerts".to_owned(),
                "api_key" | "plan" | "service_token" | "webhook" => {
                    format!("/console/audit?target_id={id}")
                }
                _ => String::new(),
            };
            event_rows(event, &href, plan_name, now)
        })
        .collect();
    let head = ["Action", "Resource", "Actor", "IP address", "Time"]
        .map(|name| with_text("th", &[("scope", "col")], name));
    let details = element(
        "th",
        &[("scope", "col")],
        &[with_text(
            "span",
            &[("class", "visually-hidden")],
            "Details",
        )],
    );
    let head = [head.into_iter().collect(), details];
    let parts = [
        with_text(
            "caption",
            &[("class", "visually-hidden")],
            "Events, newest first",
        ),
        element("thead", &[], &[element("tr", &[], &head)]),
        element("tbody", &[], &[rows]),
    ];
    element("table", &[("class", "table events")], &parts)
}

fn event_rows(
    event: &AuditEvent,
    href: &str,
    plan_name: &dyn Fn(&str) -> Option<String>,
    now: i64,
) -> [Markup; 2] {
    let label = action_label(&event.action);
    // Accounts and sessions have no name; the actor identifies them.
    let name = event.target_name.as_deref().unwrap_or("–");
    let changes = field_changes(event, plan_name);
    let row_id = format!("details-{}", event.id);
    let button_label = format!("Details of {label}: {name}");
    let cell = |label: &str, class: &str, content: Markup| {
        element(
            "td",
            &[("data-label", label), ("class", class), ("dir", "auto")],
            &[content],
        )
    };
    let change = [
        Markup::text(&label),
        Markup::text(" "),
        with_text(
            "span",
            &[("class", "summary"), ("dir", "auto")],
            &summary(event, plan_name),
        ),
    ];
    let resource = match href {
        "" => with_text("span", &[("class", "clamp")], name),
        href => with_text("a", &[("class", "clamp"), ("href", href)], name),
    };
    let exact = with_text(
        "span",
        &[("class", "exact")],
        &date_time(event.at.inner().timestamp_millis()),
    );
    let time = element("div", &[], &[time_markup(event.at, now), exact]);
    let button = if changes.is_empty() {
        Markup::default()
    } else {
        with_text(
            "button",
            &[
                ("type", "button"),
                ("class", "button small"),
                ("aria-label", &button_label),
                ("aria-expanded", "false"),
                ("aria-controls", &row_id),
            ],
            "Details",
        )
    };
    let cells = [
        element("th", &[("scope", "row")], &change),
        cell("Resource", "name-cell", resource),
        cell(
            "Actor",
            "actor",
            Markup::text(event.user_email.as_deref().unwrap_or("System")),
        ),
        cell(
            "IP address",
            "",
            with_text("code", &[], event.ip.as_deref().unwrap_or("–")),
        ),
        cell("Time", "", time),
        element("td", &[("class", "row-actions")], &[button]),
    ];
    let details: Markup = changes.iter().map(change_row).collect();
    let details = element("dl", &[("class", "details")], &[details]);
    let details = element("td", &[("colspan", "6")], &[details]);
    [
        element("tr", &[], &cells),
        element(
            "tr",
            &[
                ("id", &row_id),
                ("class", "detail-row"),
                ("hidden", "hidden"),
            ],
            &[details],
        ),
    ]
}

fn change_row(change: &FieldChange) -> Markup {
    let value = match (&change.before, &change.after) {
        (Some(before), Some(after)) => vec![
            with_text("del", &[], before),
            Markup::text(" → "),
            with_text("ins", &[], after),
        ],
        (before, after) => vec![Markup::text(
            after.as_ref().or(before.as_ref()).map_or("", |it| it),
        )],
    };
    let parts = [
        with_text("dt", &[], &change.label),
        element("dd", &[("dir", "auto")], &value),
    ];
    element("div", &[], &parts)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ID: &str = "019ab4e1-7c00-7000-8000-0000000000b1";

    fn event(action: &str, before: Value, after: Value) -> AuditEvent {
        let mut event = json!({
            "id": ID, "at": "2026-08-03T06:26:00.000Z", "user_id": null, "user_email": null, "action": action,
            "target_type": "plan", "target_id": ID, "target_name": "Starter", "ip": null,
        });
        event["before"] = before;
        event["after"] = after;
        serde_json::from_value(event).expect("an event")
    }

    fn plan_name(id: &str) -> Option<String> {
        (id == ID).then(|| "Starter".to_owned())
    }

    fn line(action: &str, before: Value, after: Value) -> String {
        summary(&event(action, before, after), &plan_name)
    }

    #[test]
    fn update_is_summed_up_in_one_line() {
        assert_eq!(
            line(
                "plan.update",
                json!({"default_rpm": 600, "daily_quota": 1000}),
                json!({"default_rpm": 300, "daily_quota": null})
            ),
            "Daily quota 1,000 → unlimited, Rate 600 → 300/min"
        );
        assert_eq!(
            line(
                "api_key.update",
                json!({"rpm_override": null}),
                json!({"rpm_override": 120})
            ),
            "Rate override none → 120/min"
        );
        assert_eq!(
            line(
                "api_key.update",
                json!({"plan_id": "gone"}),
                json!({"plan_id": ID})
            ),
            "Plan (deleted) → Starter"
        );
        assert_eq!(
            line(
                "api_key.update",
                json!({"is_active": true}),
                json!({"is_active": false})
            ),
            "Deactivated"
        );
        assert_eq!(
            line(
                "api_key.update",
                json!({"expires_at": null}),
                json!({"expires_at": "2027-01-01T00:00:00Z"})
            ),
            "Expires never → 1 Jan 2027, 00:00 UTC"
        );
        assert_eq!(
            line(
                "api_key.update",
                json!({"name": "App"}),
                json!({"name": "Mobile"})
            ),
            format!("Renamed from {}", quoted("App"))
        );
    }

    #[test]
    fn creation_names_the_limits() {
        assert_eq!(
            line(
                "plan.create",
                Value::Null,
                json!({"id": ID, "default_rpm": 60, "daily_quota": 5000, "monthly_quota": null})
            ),
            "60/min, 5,000 per day"
        );
        assert_eq!(
            line(
                "api_key.create",
                Value::Null,
                json!({"plan_id": ID, "expires_at": null})
            ),
            "Plan Starter"
        );
        assert_eq!(line("session.begin", Value::Null, Value::Null), "");
    }

    #[test]
    fn creation_has_no_values_before() {
        let created = event(
            "plan.create",
            Value::Null,
            json!({"id": ID, "burst": 10, "strict": true}),
        );
        let fields = field_changes(&created, &plan_name);
        assert_eq!(fields.len(), 2, "{fields:?}");
        assert!(
            fields
                .iter()
                .all(|it| it.before.is_none() && it.after.is_some())
        );
        let created = event("api_key.create", Value::Null, json!({"last_used_at": null}));
        let last_used = &field_changes(&created, &plan_name)[0];
        assert_eq!(
            (&*last_used.label, last_used.after.as_deref()),
            ("Last used", Some("never"))
        );
        let updated = event("plan.update", json!({"burst": 10}), json!({"burst": 20}));
        let burst = FieldChange {
            label: "Burst".into(),
            before: Some("10".into()),
            after: Some("20".into()),
        };
        assert_eq!(field_changes(&updated, &plan_name), [burst]);
    }

    #[test]
    fn resource_leads_to_its_page_or_else_to_its_history() {
        let mut all = [
            event("api_key.delete", json!({"name": "<App>"}), Value::Null),
            event("api_key.create", Value::Null, json!({"name": "<App>"})),
        ];
        for event in &mut all {
            event.target_type = "api_key".to_owned();
            event.target_name = Some("<App>".to_owned());
        }
        let table = |events: &[AuditEvent]| event_table(events, &plan_name, 0).to_string();
        assert!(table(&all[1..]).contains(&format!("href=\"/console/api-keys/{ID}\"")));
        assert!(!table(&all).contains("/console/api-keys/"));
        assert!(table(&all).contains(&format!("href=\"/console/audit?target_id={ID}\"")));
        assert!(table(&all).contains("&lt;App&gt;") && !table(&all).contains("<App>"));
        assert!(!table(&all).contains("<del>"), "neither is a difference");
        let mut webhook = event("webhook.disable", Value::Null, Value::Null);
        webhook.target_type = "webhook".to_owned();
        let page = format!("href=\"/console/webhooks/{ID}\"");
        assert!(table(std::slice::from_ref(&webhook)).contains(&page));
        let mut deletion = webhook.clone();
        deletion.action = "webhook.delete".to_owned();
        assert!(!table(&[deletion, webhook]).contains(&page));
    }

    #[test]
    fn changes_of_webhooks_and_alert_settings_are_in_words() {
        for (is_active, summed_up) in [(true, "Enabled"), (false, "Disabled")] {
            let mut update = event(
                "webhook.update",
                json!({"is_active": !is_active}),
                json!({"is_active": is_active}),
            );
            update.target_type = "webhook".to_owned();
            assert_eq!(summary(&update, &plan_name), summed_up);
        }
        assert_eq!(
            line(
                "webhook.rotate_secret",
                json!({"previous_secret_expires_at": null}),
                json!({"previous_secret_expires_at": "2027-01-01T00:00:00Z"})
            ),
            "Previous secret works until 1 Jan 2027, 00:00 UTC"
        );
        assert_eq!(
            line(
                "tenant.update_alerts",
                json!({"email_roles": ["owner"]}),
                json!({"email_roles": ["owner", "billing"]})
            ),
            "Email recipients owner → owner, billing"
        );
    }

    #[test]
    fn actions_have_labels() {
        assert_eq!(action_label("api_key.rotate"), "API key rotated");
        assert_eq!(
            action_label("service_token.create"),
            "Service token created"
        );
        assert_eq!(action_label("plan.delete"), "Plan deleted");
        for action in quota_common::audit::AuditAction::ALL {
            let label = action_label(action.as_str());
            assert!(
                !label.contains('_') && label.ends_with(['d', 'n', 't']),
                "{label}"
            );
        }
    }

    #[test]
    fn nested_values_are_json() {
        let value = json!({"list": [1, -2, "x", null, true], "empty": {}});
        assert_eq!(compact(&value), value.to_string());
        assert_eq!(compact(&json!([2.5, -0.125])), "[2.500,-0.125]");
    }
}
