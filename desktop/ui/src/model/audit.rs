//! Descriptions of audit events.

use quota_common::audit::AuditEvent;
use serde_json::{Map, Value};

use super::{
    key::time_markup,
    markup::{Markup, element, with_text},
    text::{capitalized, date_time, number, quoted},
};

/// Returns the label for an action such as `api_key.rotate`.
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
    /// `None` if the event contains no old value, for example because the resource was created.
    pub before: Option<String>,
    /// `None` if the event contains no new value, for example because the resource was deleted.
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
        // Omit the resource's ID and times: the event itself identifies the resource and says when it was changed.
        .filter(|name| !matches!(name.as_str(), "id" | "created_at" | "updated_at"))
        .map(|name| FieldChange {
            label: field_label(name),
            before: text(&before, name),
            after: text(&after, name),
        })
        .collect()
}

/// Summarizes an event in one line, such as `Rate 600 → 300/min`. Returns an empty string if the action's name is
/// enough.
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
        ("previous_expires_at" | "previous_secret_expires_at", Value::Null) => {
            "previous secret revoked".to_owned()
        }
        ("previous_expires_at" | "previous_secret_expires_at", at) => {
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
            format!("{}: {before} → {after}", field_label(name))
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
        "previous_expires_at" | "previous_secret_expires_at" => {
            "Previous secret expires".to_owned()
        }
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

/// Formats a value on one line, like JSON but without escaping control characters. Does not use serde_json, whose
/// tables for formatting floating-point numbers would make the download larger.
pub fn compact(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(it) => it.to_string(),
        Value::Number(n) => n.as_i64().map_or_else(
            || fraction(n.as_f64().unwrap_or_default()),
            |n| n.to_string(),
        ),
        Value::String(text) => json_string(text),
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(compact).collect();
            format!("[{}]", items.join(","))
        }
        Value::Object(fields) => {
            let fields = fields.iter();
            let fields: Vec<_> = fields
                .map(|(name, value)| format!("{}:{}", json_string(name), compact(value)))
                .collect();
            format!("{{{}}}", fields.join(","))
        }
    }
}

fn json_string(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
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
            // If a resource has no page, link to its history.
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
    let button_label = format!("Details: {label}, {name}");
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
mod tests;
