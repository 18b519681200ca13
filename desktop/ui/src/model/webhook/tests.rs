use quota_common::Timestamp;
use serde_json::{Value, json};

use super::*;

/// One minute after [`AT`].
const NOW: i64 = 1_785_738_420_000;
const AT: &str = "2026-08-03T06:26:00.000Z";
const ID: &str = "019ab4e1-7c00-7000-8000-000000000111";

fn webhook(change: Value) -> Webhook {
    let mut it = json!({
        "id": ID, "name": "<Alerts>", "url": "https://hooks.example.com/quota?a=1&b=2", "is_active": true,
        "disabled_reason": null, "failing_since": null, "previous_secret_expires_at": null, "created_at": AT, "updated_at": AT,
    });
    merge(&mut it, change);
    serde_json::from_value(it).expect("a webhook")
}

fn delivery(change: Value) -> WebhookDelivery {
    let mut it = json!({
        "id": ID, "webhook_id": ID, "event_id": "msg_1", "event_type": "quota.threshold_reached", "status": "pending",
        "attempts": 0, "response_status": null, "error": null, "last_attempt_at": null, "next_attempt_at": AT,
        "payload": {}, "created_at": AT,
    });
    merge(&mut it, change);
    serde_json::from_value(it).expect("a delivery")
}

fn merge(into: &mut Value, change: Value) {
    let Value::Object(change) = change else {
        return;
    };
    for (name, value) in change {
        assert!(into.get(&name).is_some(), "{name}");
        into[name] = value;
    }
}

fn failed() -> WebhookDelivery {
    delivery(json!({
        "attempts": 1, "response_status": 503, "error": "The endpoint responded with status 503.",
        "last_attempt_at": AT, "next_attempt_at": "2026-08-03T07:00:00.000Z",
    }))
}

#[track_caller]
fn contains(markup: &Markup, parts: &[&str]) {
    let text = markup.to_string();
    for part in parts {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn status_says_who_stopped_deliveries_and_why() {
    let reason = "The endpoint responded with status 410 (Gone).";
    let disabled = json!({"is_active": false, "disabled_reason": reason, "failing_since": AT});
    let all = [
        (json!({}), WebhookStatus::Enabled),
        (json!({"failing_since": AT}), WebhookStatus::Failing),
        (
            json!({"is_active": false, "failing_since": AT}),
            WebhookStatus::Disabled,
        ),
        (disabled.clone(), WebhookStatus::DisabledByQuota),
    ];
    let webhooks: Vec<Webhook> = all.iter().map(|(it, _)| webhook(it.clone())).collect();
    for (it, (_, status)) in webhooks.iter().zip(&all) {
        assert_eq!(WebhookStatus::of(it), *status);
    }
    contains(
        &webhook_table(&webhooks, NOW),
        &[
            "&lt;Alerts&gt;",
            "a=1&amp;b=2",
            &format!("href=\"/console/webhooks/{ID}\""),
            ">Enabled<",
            ">Started failing 1 minute ago<",
            ">Disabled<",
            reason,
        ],
    );
    assert_eq!(
        webhook_counts(&webhooks),
        "1 enabled, 1 failing, 1 disabled by Quota, 1 disabled"
    );
    assert_eq!(webhook_counts(&webhooks[..1]), "1 enabled");
    assert_eq!(webhook_counts(&[]), "None");
    contains(
        &webhook_details(&webhook(disabled), NOW),
        &["class=\"alert\"", "Quota disabled this webhook.", reason],
    );
    contains(
        &webhook_details(&webhooks[1], NOW),
        &["class=\"alert warn\"", "started failing 1 minute ago"],
    );
    let enabled = webhook_details(&webhooks[0], NOW).to_string();
    assert!(!enabled.contains("alert") && !enabled.contains("Previous secret"));
}

#[test]
fn previous_secret_is_shown_until_it_expires() {
    let rotated = |at: &str| webhook(json!({"previous_secret_expires_at": at}));
    let later = "2026-08-04T06:27:00.000Z";
    contains(
        &webhook_details(&rotated(later), NOW),
        &[">Previous secret<", ">in 1 day<"],
    );
    let expiry: Timestamp = later.parse().expect("a time");
    assert_eq!(previous_secret_expiry(&rotated(later), NOW), Some(expiry));
    assert_eq!(previous_secret_expiry(&rotated(AT), NOW), None);
}

#[test]
fn url_is_checked_before_it_is_sent() {
    for url in [
        "https://hooks.example.com",
        " https://hooks.example.com/a?b=c ",
        // Only the server checks the host.
        "http://10.0.0.1/",
    ] {
        assert_eq!(check_url(url), Ok(()), "{url}");
    }
    let longest = format!("https://{}", "a".repeat(WEBHOOK_URL_MAX - 8));
    assert_eq!(check_url(&longest), Ok(()));
    for (url, message) in [
        ("hooks.example.com", "Must start with https://"),
        ("ftp://hooks.example.com", "Must start with https://"),
        (
            "https://",
            "Enter a complete URL without spaces or non-ASCII characters",
        ),
        (
            "https://a b",
            "Enter a complete URL without spaces or non-ASCII characters",
        ),
        (
            "https://ü.example",
            "Enter a complete URL without spaces or non-ASCII characters",
        ),
        (&format!("{longest}a"), "Must be at most 2,000 characters"),
    ] {
        assert_eq!(check_url(url), Err(message), "{url}");
    }
}

#[test]
fn delivery_shows_the_response_and_the_next_attempt() {
    let delivered = delivery(json!({
        "status": "delivered", "attempts": 2, "response_status": 204, "last_attempt_at": AT, "next_attempt_at": null,
    }));
    let unreachable = delivery(json!({
        "status": "failed", "attempts": 10, "error": "Cannot connect to the endpoint: <refused>.", "next_attempt_at": null,
    }));
    contains(
        &delivery_table(&[failed(), delivered.clone(), unreachable.clone()], NOW),
        &[
            ">Quota threshold reached<code class=\"summary\">quota.threshold_reached<",
            ">Pending<",
            ">503<",
            ">in 33 minutes<",
            ">Delivered<",
            ">204<",
            ">Failed<",
            ">–<span class=\"summary\">Cannot connect to the endpoint: &lt;refused&gt;.<",
            &format!("data-delivery=\"{ID}\""),
        ],
    );
    // The row shows the status code, so it omits the error that would repeat the status code.
    let row = delivery_table(&[failed()], NOW).to_string();
    assert!(!row.contains("The endpoint responded"), "{row}");
    contains(
        &delivery_details(&failed(), NOW),
        &[
            ">The endpoint responded with status 503.<",
            ">1 minute ago<",
        ],
    );
    contains(
        &delivery_details(&delivery(json!({})), NOW),
        &[">Not sent yet<", ">Now<"],
    );
    let canceled = delivery(json!({
        "status": "failed", "error": "The webhook was disabled.", "next_attempt_at": null,
    }));
    contains(&delivery_details(&canceled, NOW), &[">Never<"]);
    let sending = delivery(json!({"attempts": 1, "next_attempt_at": "2026-08-03T06:27:30.000Z"}));
    contains(&delivery_details(&sending, NOW), &[">Sending…<"]);
}

#[test]
fn result_of_a_test_is_known_after_its_first_attempt() {
    assert!(!has_result(&delivery(json!({}))));
    let sending = delivery(json!({"attempts": 1}));
    assert!(!has_result(&sending));
    assert!(has_result(&failed()));
    contains(
        &test_result(&failed(), NOW),
        &[
            ">Failed<",
            ">The endpoint responded with status 503. Next attempt in 33 minutes.<",
        ],
    );
    let delivered = delivery(json!({
        "status": "delivered", "attempts": 1, "response_status": 200, "next_attempt_at": null,
    }));
    assert!(has_result(&delivered));
    contains(
        &test_result(&delivered, NOW),
        &[">Delivered<", ">The endpoint responded with status 200.<"],
    );
}

#[test]
fn log_is_reloaded_while_an_attempt_is_expected() {
    let later = "2026-08-03T07:00:00.000Z";
    let at = |seconds: i64| NOW + seconds * 1000;
    assert!(!is_changing(&[], NOW));
    // One delivery is due, and another one is due in 8 seconds.
    assert!(is_changing(&[delivery(json!({}))], NOW));
    let soon = delivery(json!({"next_attempt_at": "2026-08-03T06:27:08.000Z"}));
    assert!(is_changing(&[failed(), soon], NOW));
    // The next attempt is in half an hour, and the last attempt has ended.
    assert!(!is_changing(&[failed()], NOW));
    // The attempt may still be in progress.
    let sent = delivery(
        json!({"attempts": 1, "last_attempt_at": "2026-08-03T06:26:55.000Z", "next_attempt_at": later}),
    );
    assert!(is_changing(std::slice::from_ref(&sent), NOW));
    assert!(!is_changing(&[sent], at(20)));
    let delivered = delivery(json!({
        "status": "delivered", "last_attempt_at": "2026-08-03T06:26:59.000Z", "next_attempt_at": null,
    }));
    assert!(!is_changing(&[delivered], NOW));
}

#[test]
fn unknown_types_of_events_are_shown_by_their_name() {
    assert_eq!(event_label("webhook.test"), "Test event");
    assert_eq!(event_label("key.created"), "key.created");
    contains(&event_types(), &["quota.threshold_reached", "webhook.test"]);
}

#[test]
fn results_differ_when_an_attempt_ends() {
    let sending = || results(&[delivery(json!({"attempts": 1}))]);
    assert_eq!(sending(), sending());
    assert_ne!(sending(), results(&[failed()]));
    let delivered = delivery(json!({"attempts": 1, "status": "delivered"}));
    assert_ne!(sending(), results(&[delivered]));
    assert_eq!(results(&[]), "");
}
