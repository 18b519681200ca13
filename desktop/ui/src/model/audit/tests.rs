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
        "Daily quota: 1,000 → unlimited, Rate: 600 → 300/min"
    );
    assert_eq!(
        line(
            "api_key.update",
            json!({"rpm_override": null}),
            json!({"rpm_override": 120})
        ),
        "Rate override: none → 120/min"
    );
    assert_eq!(
        line(
            "api_key.update",
            json!({"plan_id": "gone"}),
            json!({"plan_id": ID})
        ),
        "Plan: (deleted) → Starter"
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
        "Expires: never → 1 Jan 2027, 00:00 UTC"
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
        "Email recipients: owner → owner, billing"
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
    let escaped = json!({"a \"name\"": "C:\\temp"});
    assert_eq!(compact(&escaped), escaped.to_string());
    assert_eq!(compact(&json!([2.5, -0.125])), "[2.500,-0.125]");
}
