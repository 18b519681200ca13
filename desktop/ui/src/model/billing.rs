//! Describes an organization's subscription.

use quota_common::{
    Timestamp,
    billing::{BillingAccess, BillingPrice, BillingState, BillingUsage},
    ipc::BillingPage,
};

use super::{
    markup::{Markup, element, with_text},
    meter::Meter,
    money::money,
    text::{count, date_time, enumerated, number, relative},
};

/// The age at which the data counts as outdated. While a tenant is subscribed, the server reads the tenant's
/// subscription more often than this, unless Stripe is unreachable.
const STALE_MS: i64 = 30 * 60 * 1000;

fn millis(at: Timestamp) -> i64 {
    at.inner().timestamp_millis()
}

fn date(at: Timestamp) -> String {
    date_time(millis(at))
}

/// Describes the requests that require a subscription. The result is used as the subject of a sentence.
fn paid_requests(keys: u64) -> String {
    match keys {
        0 => "requests with keys on paid plans".to_owned(),
        1 => "requests that use your key on a paid plan".to_owned(),
        n => format!(
            "requests that use one of your {} keys on paid plans",
            number(n)
        ),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StripeButton {
    pub label: &'static str,
    pub page: BillingPage,
}

const MANAGE: StripeButton = StripeButton {
    label: "Manage in Stripe",
    page: BillingPage::Portal,
};

/// Returns the buttons, most important first.
pub fn buttons(it: &BillingState) -> Vec<StripeButton> {
    let checkout = |label| StripeButton {
        label,
        page: BillingPage::Checkout,
    };
    let portal = |label| StripeButton { label, ..MANAGE };
    match it.access {
        BillingAccess::Free if it.has_customer => vec![checkout("Upgrade"), MANAGE],
        BillingAccess::Free => vec![checkout("Upgrade")],
        BillingAccess::Canceled => vec![checkout("Subscribe again"), MANAGE],
        BillingAccess::PastDue => vec![portal("Update card")],
        BillingAccess::Unpaid => vec![portal("Pay invoice")],
        BillingAccess::Trialing | BillingAccess::Active | BillingAccess::Paused => vec![MANAGE],
    }
}

/// Returns whether the first button is something other than *Manage in Stripe*.
pub fn is_action_needed(it: &BillingState) -> bool {
    buttons(it).first() != Some(&MANAGE)
}

const fn is_subscribed(it: &BillingState) -> bool {
    !matches!(it.access, BillingAccess::Free | BillingAccess::Canceled)
}

/// Returns the notices, most important first, each with its CSS class.
fn notices(it: &BillingState, now: i64) -> Vec<(&'static str, String)> {
    let (danger, warn) = ("alert", "alert warn");
    let requests = paid_requests(it.paid_keys);
    let mut all = Vec::new();
    let ends = it.access_ends_at.filter(|_| it.paid_plans_work).map(date);
    match (it.access, ends) {
        (BillingAccess::PastDue, Some(end)) => all.push((
            danger,
            format!("Your last payment failed. Update your card by {end}, or {requests} will be rejected (402)."),
        )),
        (BillingAccess::PastDue, None) if it.paid_plans_work => all.push((
            danger,
            "Your last payment failed. Update your card to keep your paid plans working.".to_owned(),
        )),
        (BillingAccess::PastDue, _) => all.push((
            danger,
            format!("Your last payment failed. Until the invoice is paid, {requests} are rejected (402). Update your card."),
        )),
        // Stripe no longer charges the card, so a new card alone does not help.
        (BillingAccess::Unpaid, _) => all.push((
            danger,
            format!("Your last payment failed, and won't be retried. Until you pay the open invoice in Stripe, {requests} are rejected (402)."),
        )),
        (BillingAccess::Canceled, _) => all.push((
            warn,
            format!("Your subscription has ended, so {requests} are rejected (402)."),
        )),
        (BillingAccess::Paused, _) => all.push((
            warn,
            format!("Your subscription is paused, so {requests} are rejected (402)."),
        )),
        (BillingAccess::Trialing | BillingAccess::Active, Some(end)) => all.push((
            warn,
            format!("Your subscription ends on {end}. After that, {requests} will be rejected (402)."),
        )),
        (BillingAccess::Free, _) if it.paid_keys > 0 => all.push((
            warn,
            format!("Until you subscribe, {requests} are rejected (402)."),
        )),
        _ => {}
    }
    let read_at = it.refreshed_at.filter(|_| is_subscribed(it));
    if let Some(at) = read_at.map(millis).filter(|at| now - at > STALE_MS) {
        all.push((
            warn,
            format!(
                "Can't reach Stripe. Last updated {}; recent changes may be missing.",
                relative(at, now)
            ),
        ));
    }
    all
}

fn badge(it: &BillingState) -> Markup {
    let (class, text) = match it.access {
        BillingAccess::Free => ("badge", "Free"),
        BillingAccess::Trialing | BillingAccess::Active if it.cancels_at.is_some() => {
            ("badge limited", "Canceling")
        }
        BillingAccess::Trialing => ("badge on", "Trial"),
        BillingAccess::Active => ("badge on", "Active"),
        BillingAccess::PastDue => ("badge off", "Past due"),
        BillingAccess::Unpaid => ("badge off", "Unpaid"),
        BillingAccess::Canceled => ("badge", "Canceled"),
        BillingAccess::Paused => ("badge limited", "Paused"),
    };
    with_text("span", &[("class", class)], text)
}

/// Returns a price such as `$29.00 per month + $0.50 per 1,000 requests`.
fn price_text(price: &BillingPrice) -> Option<String> {
    let monthly = price.monthly.as_deref();
    let monthly = monthly.map(|it| format!("{} per month", money(it, 0, &price.currency)));
    let usage = price.per_request.as_deref();
    let usage = usage.map(|it| format!("{} per 1,000 requests", money(it, 3, &price.currency)));
    match (monthly, usage) {
        (Some(monthly), Some(usage)) => Some(format!("{monthly} + {usage}")),
        (monthly, usage) => monthly.or(usage),
    }
}

fn row(label: &str, value: &str, note: &str) -> Markup {
    let note = if note.is_empty() {
        Markup::default()
    } else {
        with_text("span", &[("class", "muted small-text")], note)
    };
    let value = with_text("strong", &[], value);
    let parts = [
        with_text("dt", &[], label),
        element("dd", &[], &[value, note]),
    ];
    element("div", &[], &parts)
}

fn rows(rows: &[Markup]) -> Markup {
    element("dl", &[("class", "details")], rows)
}

/// Returns the notices, plan, status, price, and renewal date.
pub fn subscription(it: &BillingState, now: i64) -> Markup {
    let mut all: Markup = notices(it, now)
        .into_iter()
        .map(|(class, text)| with_text("p", &[("class", class)], &text))
        .collect();
    let name = it.price.as_ref().and_then(|it| it.name.as_deref());
    let title = if is_subscribed(it) {
        "Subscription"
    } else {
        "No subscription"
    };
    let title = [with_text("h2", &[("id", "subscription")], title), badge(it)];
    all.push(element("div", &[("class", "card-head")], &title));
    let mut facts = Vec::new();
    if let Some(name) = name {
        let label = if is_subscribed(it) {
            "Plan"
        } else {
            "Available plan"
        };
        facts.push(row(label, name, ""));
    }
    if let Some(price) = it.price.as_ref().and_then(price_text) {
        facts.push(row("Price", &price, ""));
    }
    if let Some((label, at)) = next_date(it, now) {
        facts.push(row(label, &date(at), ""));
    }
    all.push(rows(&facts));
    all
}

/// Returns the date of the subscription's end or next change, with a label. Returns `None` if this date is not known,
/// for example because the next change requires a payment.
fn next_date(it: &BillingState, now: i64) -> Option<(&'static str, Timestamp)> {
    if let Some(at) = it.cancels_at {
        let label = if millis(at) > now { "Ends" } else { "Ended" };
        return Some((label, at));
    }
    match it.access {
        BillingAccess::Trialing => it.trial_ends_at.map(|at| ("First payment", at)),
        BillingAccess::Active => it.period_end.map(|at| ("Renews", at)),
        BillingAccess::Free
        | BillingAccess::PastDue
        | BillingAccess::Unpaid
        | BillingAccess::Canceled
        | BillingAccess::Paused => None,
    }
}

/// Returns the charges for the current period.
pub fn usage(it: &BillingUsage, state: &BillingState) -> Markup {
    let currency = state.price.as_ref().map_or("usd", |it| &it.currency);
    let amount = |n: u64| money(&n.to_string(), 0, currency);
    let requests = |n: u64| format!("{} on paid plans", count(n, "request", "requests"));
    let mut facts = Vec::new();
    match it.charge {
        Some(charge) => facts.push(row("Usage so far", &amount(charge), &requests(it.used))),
        None => {
            let note = if it.reported_until.is_some() {
                "requests on paid plans; charged at a variable price"
            } else {
                "requests on paid plans; not charged"
            };
            facts.push(row("Usage so far", &number(it.used), note));
        }
    }
    // A projection would be wrong while requests are rejected.
    if let Some(total) = it.projected_total.filter(|_| state.paid_plans_work) {
        let note = format!(
            "at this pace, {}; before taxes and discounts",
            count(it.projected, "request", "requests")
        );
        facts.push(row("Projected charge", &amount(total), &note));
    }
    if let (Some(start), Some(end)) = (state.period_start, state.period_end) {
        facts.push(row("Period", &date(start), &format!("to {}", date(end))));
    }
    if it.charge.is_some() {
        let reported = it
            .reported_until
            .map_or_else(|| "Not yet".to_owned(), |at| format!("Up to {}", date(at)));
        facts.push(row("Reported to Stripe", &reported, "every hour"));
    }
    let mut all = rows(&facts);
    let mut note = |text: &str| all.push(with_text("p", &[("class", "muted small-text")], text));
    if it.not_charged > 0 {
        note(&format!(
            "{} in this period couldn't be reported to Stripe and won't be charged.",
            count(it.not_charged, "request", "requests")
        ));
    }
    if let Some(error) = &it.last_error {
        note(&format!(
            "On {}, Stripe reported a problem with your usage: {}.",
            date(error.at),
            error.code
        ));
    }
    all
}

/// Returns meters for the operator's limits. Empty if there are no limits.
pub fn limits(state: &BillingState, now: i64) -> Markup {
    let it = &state.limits;
    let resets = format!("Resets {}", relative(millis(it.requests_reset_at), now));
    let meters = [
        ("Requests this month", &it.requests, &*resets),
        ("Plans", &it.plans, ""),
        ("API keys", &it.api_keys, ""),
    ];
    let meters: Vec<Markup> = meters
        .into_iter()
        .filter_map(|(label, limit, note)| {
            let maximum = limit.maximum?;
            let meter = Meter {
                label,
                used: limit.used,
                limit: maximum,
                note,
                denied: false,
            };
            Some(meter.markup())
        })
        .collect();
    let mut all = if meters.is_empty() {
        Markup::default()
    } else {
        element("div", &[("class", "meters wide")], &meters)
    };
    let requests =
        |number: u64, per: &str| format!("{} per {per}", count(number, "request", "requests"));
    let rate = it.free_plan_rpm.map(|n| requests(n.into(), "minute"));
    let quotas = it
        .free_plan_quota
        .map(|n| ["day", "month"].map(|per| requests(n, per)));
    let bounds: Vec<String> = rate
        .into_iter()
        .chain(quotas.into_iter().flatten())
        .collect();
    if !bounds.is_empty() {
        // Without billing, plans marked `paid` work like other plans.
        let plans = if state.enabled {
            "Plans not marked Paid"
        } else {
            "Plans"
        };
        let text = format!("{plans} are limited to {}.", enumerated(&bounds));
        all.push(with_text("p", &[("class", "muted small-text")], &text));
    }
    all
}

/// Returns a warning if keys on a paid plan do not work. If `is_saved` is false, the plan is about to become a paid
/// plan.
pub fn paid_warning(it: &BillingState, keys: u64, is_saved: bool) -> Option<String> {
    (!it.paid_plans_work && keys > 0).then(|| {
        let (requests, verb) = match (is_saved, keys) {
            (true, _) => (paid_requests(keys), "are"),
            (false, 1) => (
                "requests that use the key on this plan".to_owned(),
                "will be",
            ),
            (false, n) => (
                format!(
                    "requests that use one of the {} keys on this plan",
                    number(n)
                ),
                "will be",
            ),
        };
        format!("Until your organization subscribes, {requests} {verb} rejected (402).")
    })
}

#[cfg(test)]
mod tests;
