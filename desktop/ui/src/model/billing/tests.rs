use serde_json::{Value, json};

use super::*;

/// 26 Nov 2026, 15:00 UTC.
const NOW: i64 = 1_795_705_200_000;

fn state(changes: Value) -> BillingState {
    let mut state = json!({
        "enabled": true, "access": "active", "paid_plans_work": true, "access_ends_at": null,
        "trial_ends_at": null, "cancels_at": null, "period_start": "2026-11-20T12:00:00Z",
        "period_end": "2026-12-20T12:00:00Z", "has_customer": true, "refreshed_at": "2026-11-26T14:55:00Z",
        "price": {"name": "Pro", "currency": "usd", "monthly": "2900", "per_request": "0.05"},
        "usage": {
            "used": 40_000, "projected": 62_000, "charge": 2000, "projected_total": 6000,
            "reported_until": "2026-11-26T14:00:00Z", "not_charged": 0, "last_error": null,
        },
        "limits": {
            "plans": {"used": 3, "maximum": null}, "api_keys": {"used": 12, "maximum": null},
            "requests": {"used": 61_500, "maximum": null}, "requests_reset_at": "2026-12-01T00:00:00Z",
            "free_plan_rpm": null, "free_plan_quota": null,
        },
        "paid_plans": 1, "paid_keys": 4,
    });
    let Value::Object(changes) = changes else {
        panic!("not an object");
    };
    for (name, value) in changes {
        state[name] = value;
    }
    serde_json::from_value(state).expect("a state")
}

fn text(markup: &Markup) -> String {
    let markup = markup.to_string();
    let mut out = String::new();
    for part in markup.split('<') {
        out.push_str(part.split_once('>').map_or(part, |(_, text)| text));
        out.push(' ');
    }
    out.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn shown(changes: Value) -> String {
    text(&subscription(&state(changes), NOW))
}

#[test]
fn active_subscription_shows_its_price_and_renewal() {
    assert_eq!(
        shown(json!({})),
        "Subscription Active Plan Pro Price $29.00 per month + $0.50 per 1,000 requests Renews 20 Dec 2026, 12:00 UTC"
    );
    assert!(!is_action_needed(&state(json!({}))));
}

#[test]
fn failed_payment_names_the_date_and_the_keys() {
    let end = json!({"access": "past_due", "access_ends_at": "2026-12-03T12:00:00Z"});
    let failed = shown(end.clone());
    assert!(failed.starts_with(
        "Your last payment failed. Update your card by 3 Dec 2026, 12:00 UTC, or requests that use one of your 4 keys on paid plans will be rejected (402). Subscription Past due"
    ), "{failed}");
    let labels: Vec<_> = buttons(&state(end)).iter().map(|it| it.label).collect();
    assert_eq!(labels, ["Update card"]);
    let over = shown(
        json!({"access": "past_due", "paid_plans_work": false, "access_ends_at": "2026-11-25T12:00:00Z"}),
    );
    assert!(over.starts_with(
        "Your last payment failed. Until the invoice is paid, requests that use one of your 4 keys on paid plans are rejected (402). Update your card."
    ), "{over}");
}

#[test]
fn unpaid_subscription_asks_for_payment_of_the_invoice() {
    let unpaid = json!({"access": "unpaid", "paid_plans_work": false});
    let shown = shown(unpaid.clone());
    assert!(shown.starts_with(
        "Your last payment failed, and won't be retried. Until you pay the open invoice in Stripe, requests that use one of your 4 keys on paid plans are rejected (402). Subscription Unpaid"
    ), "{shown}");
    let buttons = buttons(&state(unpaid));
    assert_eq!(buttons.len(), 1);
    assert_eq!(buttons[0].label, "Pay invoice");
    assert_eq!(buttons[0].page, BillingPage::Portal);
}

#[test]
fn ending_subscription_says_when() {
    let at = "2026-12-20T12:00:00Z";
    let ending = shown(json!({"cancels_at": at, "access_ends_at": at}));
    assert!(ending.starts_with("Your subscription ends on 20 Dec 2026, 12:00 UTC. After that, requests that use one of your 4 keys on paid plans will be rejected (402)."), "{ending}");
    assert!(
        ending.contains("Canceling") && ending.ends_with("Ends 20 Dec 2026, 12:00 UTC"),
        "{ending}"
    );
    let ended = json!({"access": "canceled", "paid_plans_work": false, "cancels_at": "2026-11-25T12:00:00Z"});
    assert!(shown(ended.clone()).starts_with(
        "Your subscription has ended, so requests that use one of your 4 keys on paid plans are rejected (402). No subscription Canceled"
    ));
    assert_eq!(buttons(&state(ended))[0].label, "Subscribe again");
}

#[test]
fn only_a_subscription_in_good_standing_renews() {
    let period_end = "2026-12-20T12:00:00Z";
    let trial_end = "2026-12-01T12:00:00Z";
    for (access, cancels_at, expected) in [
        ("active", None, Some("Renews 20 Dec 2026")),
        ("trialing", None, Some("First payment 1 Dec 2026")),
        ("active", Some(period_end), Some("Ends 20 Dec 2026")),
        ("trialing", Some(trial_end), Some("Ends 1 Dec 2026")),
        ("past_due", Some(period_end), Some("Ends 20 Dec 2026")),
        ("past_due", None, None),
        ("unpaid", None, None),
        ("paused", None, None),
    ] {
        let text = shown(json!({
            "access": access, "cancels_at": cancels_at, "access_ends_at": cancels_at, "period_end": period_end,
            "trial_ends_at": if access == "trialing" { Some(trial_end) } else { None },
        }));
        let dates = ["Renews", "First payment", "Ends", "Ended"];
        let shown: Vec<_> = dates.iter().filter(|it| text.contains(**it)).collect();
        match expected {
            Some(expected) => assert!(
                text.contains(expected) && shown.len() == 1,
                "{access}: {text}"
            ),
            None => assert!(shown.is_empty(), "{access}: {text}"),
        }
    }
}

#[test]
fn free_organization_is_offered_an_upgrade() {
    let free = json!({
        "access": "free", "paid_plans_work": false, "has_customer": false, "period_start": null, "period_end": null,
        "refreshed_at": null, "usage": null, "paid_keys": 1,
    });
    assert_eq!(
        shown(free.clone()),
        "Until you subscribe, requests that use your key on a paid plan are rejected (402). No subscription Free Available plan Pro Price $29.00 per month + $0.50 per 1,000 requests"
    );
    assert!(is_action_needed(&state(free.clone())));
    assert_eq!(buttons(&state(free)).len(), 1);
}

#[test]
fn old_data_says_that_stripe_is_unreachable() {
    let fresh = shown(json!({"refreshed_at": "2026-11-26T14:35:00Z"}));
    assert!(!fresh.contains("reached"), "{fresh}");
    let old = shown(json!({"refreshed_at": "2026-11-26T13:00:00Z"}));
    assert!(
        old.starts_with("Can't reach Stripe. Last updated 2 hours ago"),
        "{old}"
    );
}

#[test]
fn usage_shows_charge_projection_and_reporting() {
    let state = state(json!({}));
    let mut of_period = state.usage.clone().expect("usage");
    assert_eq!(
        text(&usage(&of_period, &state)),
        "Usage so far $20.00 40,000 requests on paid plans \
         Projected charge $60.00 at this pace, 62,000 requests; before taxes and discounts \
         Period 20 Nov 2026, 12:00 UTC to 20 Dec 2026, 12:00 UTC \
         Reported to Stripe Up to 26 Nov 2026, 14:00 UTC every hour"
    );
    let rejected = BillingState {
        paid_plans_work: false,
        ..state.clone()
    };
    assert!(!text(&usage(&of_period, &rejected)).contains("Projected"));
    of_period.not_charged = 7;
    assert!(text(&usage(&of_period, &state)).ends_with(
        "7 requests in this period couldn't be reported to Stripe and won't be charged."
    ));
    of_period.charge = None;
    of_period.projected_total = None;
    let tiered = text(&usage(&of_period, &state));
    assert!(
        tiered.starts_with(
            "Usage so far 40,000 requests on paid plans; charged at a variable price Period"
        ),
        "{tiered}"
    );
    of_period.reported_until = None;
    let flat = text(&usage(&of_period, &state));
    assert!(
        flat.starts_with("Usage so far 40,000 requests on paid plans; not charged Period"),
        "{flat}"
    );
}

#[test]
fn only_limits_that_exist_are_shown() {
    let mut state = state(json!({}));
    assert_eq!(limits(&state, NOW), Markup::default());
    state.limits.requests.maximum = Some(100_000);
    state.limits.free_plan_rpm = Some(60);
    state.limits.free_plan_quota = Some(10_000);
    assert_eq!(
        text(&limits(&state, NOW)),
        "Requests this month 61,500 of 100,000 used Resets in 4 days \
         Plans not marked Paid are limited to 60 requests per minute, 10,000 requests per day and 10,000 requests per month."
    );
    state.enabled = false;
    let off = text(&limits(&state, NOW));
    assert!(
        off.ends_with(
            "Plans are limited to 60 requests per minute, 10,000 requests per day and 10,000 requests per month."
        ),
        "{off}"
    );
}

#[test]
fn keys_of_paid_plans_work_only_with_access() {
    let none = state(json!({"access": "free", "paid_plans_work": false}));
    assert_eq!(
        paid_warning(&none, 4, true).as_deref(),
        Some(
            "Until your organization subscribes, requests that use one of your 4 keys on paid plans are rejected (402)."
        )
    );
    assert_eq!(
        paid_warning(&none, 1, false).as_deref(),
        Some(
            "Until your organization subscribes, requests that use the key on this plan will be rejected (402)."
        )
    );
    assert_eq!(paid_warning(&none, 0, true), None);
    assert_eq!(paid_warning(&state(json!({})), 4, true), None);
}
