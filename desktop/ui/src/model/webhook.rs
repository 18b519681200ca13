//! Describes webhooks and their deliveries.

use std::fmt::Write as _;

use quota_common::{
    WebhookDeliveryId,
    bounds::WEBHOOK_URL_MAX,
    webhook::{Webhook, WebhookDelivery, WebhookDeliveryStatus},
};

use super::{
    key::{time_markup, time_or},
    markup::{Markup, element, with_text},
    text::{date_time, number, relative},
};

/// The type of events that are sent when usage reaches one of a quota's thresholds.
const THRESHOLD_REACHED: &str = "quota.threshold_reached";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WebhookStatus {
    Enabled,
    Failing,
    /// Disabled by a user.
    Disabled,
    /// Disabled by the server.
    DisabledByQuota,
}

impl WebhookStatus {
    pub const fn of(webhook: &Webhook) -> Self {
        match (
            webhook.is_active,
            &webhook.disabled_reason,
            &webhook.failing_since,
        ) {
            (false, Some(_), _) => Self::DisabledByQuota,
            (false, None, _) => Self::Disabled,
            (true, _, Some(_)) => Self::Failing,
            (true, _, None) => Self::Enabled,
        }
    }

    fn badge(self) -> Markup {
        let (class, text) = match self {
            Self::Enabled => ("badge on", "Enabled"),
            Self::Failing => ("badge limited", "Failing"),
            Self::Disabled => ("badge", "Disabled"),
            Self::DisabledByQuota => ("badge off", "Disabled by Quota"),
        };
        with_text("span", &[("class", class)], text)
    }
}

fn head(columns: &[&str]) -> Markup {
    let columns: Vec<Markup> = columns
        .iter()
        .map(|name| match *name {
            "" => element(
                "th",
                &[("scope", "col")],
                &[with_text(
                    "span",
                    &[("class", "visually-hidden")],
                    "Actions",
                )],
            ),
            name => with_text("th", &[("scope", "col")], name),
        })
        .collect();
    element("thead", &[], &[element("tr", &[], &columns)])
}

fn table(class: &str, caption: &str, columns: &[&str], rows: Markup) -> Markup {
    let parts = [
        with_text("caption", &[("class", "visually-hidden")], caption),
        head(columns),
        element("tbody", &[], &[rows]),
    ];
    element("table", &[("class", class)], &parts)
}

fn cell(label: &str, content: &[Markup]) -> Markup {
    element("td", &[("data-label", label)], content)
}

fn note(text: &str) -> Markup {
    with_text("span", &[("class", "exact")], text)
}

/// Returns the webhooks as a table. Each name links to the webhook's page.
pub fn webhook_table(webhooks: &[Webhook], now: i64) -> Markup {
    let rows = webhooks
        .iter()
        .map(|it| {
            let name = with_text("span", &[("class", "clamp")], &it.name);
            let href = format!("/console/webhooks/{}", it.id);
            let name = element("a", &[("href", &href)], &[name]);
            let url = with_text("code", &[("class", "url clamp")], &it.url);
            let cells = [
                element("th", &[("scope", "row"), ("dir", "auto")], &[name]),
                cell("URL", &[url]),
                cell("Status", &[status(it, now)]),
                cell("Created", &[time_markup(it.created_at, now)]),
            ];
            element("tr", &[], &cells)
        })
        .collect();
    table(
        "table webhooks",
        "Webhooks, newest first",
        &["Name", "URL", "Status", "Created"],
        rows,
    )
}

/// Returns a status badge with the reason below it.
fn status(it: &Webhook, now: i64) -> Markup {
    let status = WebhookStatus::of(it);
    let reason = match (status, &it.disabled_reason, it.failing_since) {
        (WebhookStatus::DisabledByQuota, Some(reason), _) => reason.clone(),
        (WebhookStatus::Failing, _, Some(since)) => {
            format!(
                "Started failing {}",
                relative(since.inner().timestamp_millis(), now)
            )
        }
        _ => String::new(),
    };
    let mut parts = vec![status.badge()];
    if !reason.is_empty() {
        parts.push(with_text("span", &[("class", "summary")], &reason));
    }
    element("div", &[], &parts)
}

/// Returns the number of webhooks with each status, such as `3 enabled, 1 failing`.
pub fn webhook_counts(webhooks: &[Webhook]) -> String {
    let counts: Vec<String> = [
        (WebhookStatus::Enabled, "enabled"),
        (WebhookStatus::Failing, "failing"),
        (WebhookStatus::DisabledByQuota, "disabled by Quota"),
        (WebhookStatus::Disabled, "disabled"),
    ]
    .into_iter()
    .filter_map(|(status, text)| {
        let with_status = webhooks.iter().filter(|it| WebhookStatus::of(it) == status);
        match with_status.count() as u64 {
            0 => None,
            n => Some(format!("{} {text}", number(n))),
        }
    })
    .collect();
    if counts.is_empty() {
        "None".to_owned()
    } else {
        counts.join(", ")
    }
}

/// Returns a row of a definition list.
fn detail(label: &str, content: &[Markup]) -> Markup {
    let parts = [with_text("dt", &[], label), element("dd", &[], content)];
    element("div", &[], &parts)
}

/// Describes a problem and what to do about it. Empty if the webhook works.
fn notice(it: &Webhook, now: i64) -> Markup {
    let text = match (WebhookStatus::of(it), &it.disabled_reason, it.failing_since) {
        (WebhookStatus::DisabledByQuota, Some(reason), _) => format!(
            "Quota disabled this webhook. {reason} Events are not being sent. Fix the endpoint, then enable the webhook again."
        ),
        (WebhookStatus::Failing, _, Some(since)) => format!(
            "Deliveries started failing {}. Quota disables a webhook if all attempts fail for 3 days.",
            relative(since.inner().timestamp_millis(), now)
        ),
        _ => return Markup::default(),
    };
    let class = if it.is_active { "alert warn" } else { "alert" };
    with_text("p", &[("class", class)], &text)
}

pub fn webhook_details(it: &Webhook, now: i64) -> Markup {
    let url = with_text("code", &[("class", "url")], &it.url);
    let mut rows = vec![
        detail("URL", &[url]),
        detail("Status", &[WebhookStatus::of(it).badge()]),
        detail("Created", &[time_markup(it.created_at, now)]),
        detail("Last edited", &[time_markup(it.updated_at, now)]),
    ];
    if let Some(at) = previous_secret_expiry(it, now) {
        rows.push(detail(
            "Previous secret",
            &[Markup::text("Expires "), time_markup(at, now)],
        ));
    }
    [
        notice(it, now),
        element("dl", &[("class", "details")], &rows),
    ]
    .into_iter()
    .collect()
}

/// Returns the time at which the server stops signing requests with the previous secret, or `None` if it has already
/// stopped.
pub fn previous_secret_expiry(it: &Webhook, now: i64) -> Option<quota_common::Timestamp> {
    it.previous_secret_expires_at
        .filter(|at| at.inner().timestamp_millis() > now)
}

/// Checks the format of a URL. The server also checks the host.
pub fn check_url(text: &str) -> Result<(), &'static str> {
    let text = text.trim();
    let rest = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"));
    match rest {
        _ if text.len() > WEBHOOK_URL_MAX => Err("Must be at most 2,000 characters"),
        Some(rest) if !rest.is_empty() && rest.bytes().all(|it| it.is_ascii_graphic()) => Ok(()),
        Some(_) => Err("Enter a complete URL without spaces or non-ASCII characters"),
        None => Err("Must start with https://"),
    }
}

pub fn event_label(kind: &str) -> &str {
    match kind {
        THRESHOLD_REACHED => "Quota threshold reached",
        "webhook.test" => "Test event",
        other => other,
    }
}

const fn delivery_badge(status: WebhookDeliveryStatus) -> (&'static str, &'static str) {
    match status {
        WebhookDeliveryStatus::Pending => ("badge limited", "Pending"),
        WebhookDeliveryStatus::Delivered => ("badge on", "Delivered"),
        WebhookDeliveryStatus::Failed => ("badge off", "Failed"),
    }
}

fn badge_of(it: &WebhookDelivery) -> Markup {
    let (class, text) = delivery_badge(it.status);
    with_text("span", &[("class", class)], text)
}

fn response(it: &WebhookDelivery) -> String {
    it.response_status
        .map_or_else(|| "–".to_owned(), |status| status.to_string())
}

/// Describes the next attempt. While an attempt is in progress, `next_attempt_at` is the time at which the server would
/// repeat the attempt after a crash.
fn next_attempt(it: &WebhookDelivery, now: i64) -> Markup {
    match it.next_attempt_at {
        Some(_) if it.attempts > 0 && it.error.is_none() => Markup::text("Sending…"),
        None => with_text("span", &[("class", "muted")], "–"),
        Some(at) if at.inner().timestamp_millis() <= now => Markup::text("Now"),
        Some(at) => time_markup(at, now),
    }
}

/// Returns the deliveries as a table. The button in each row has the delivery's ID in `data-delivery`.
pub fn delivery_table(deliveries: &[WebhookDelivery], now: i64) -> Markup {
    let rows = deliveries.iter().map(|it| delivery_row(it, now)).collect();
    table(
        "table deliveries",
        "Deliveries, newest first",
        &[
            "Event",
            "Status",
            "Response",
            "Attempts",
            "Next attempt",
            "Created",
            "",
        ],
        rows,
    )
}

fn delivery_row(it: &WebhookDelivery, now: i64) -> Markup {
    let id = it.id.to_string();
    let label = event_label(&it.event_type);
    let created = it.created_at.inner().timestamp_millis();
    let button = with_text(
        "button",
        &[
            ("type", "button"),
            ("class", "button small"),
            ("data-delivery", &id),
            ("data-focus-key", &format!("delivery-{id}")),
            (
                "aria-label",
                &format!("Details: {label}, {}", date_time(created)),
            ),
        ],
        "Details",
    );
    let kind = with_text("code", &[("class", "summary")], &it.event_type);
    let status_only = format!("The endpoint responded with status {}.", response(it));
    let mut response = vec![Markup::text(&response(it))];
    if let Some(error) = it.error.as_ref().filter(|it| **it != status_only) {
        response.push(with_text("span", &[("class", "summary")], error));
    }
    let response = element("div", &[], &response);
    let time = element(
        "div",
        &[],
        &[time_markup(it.created_at, now), note(&date_time(created))],
    );
    let cells = [
        element("th", &[("scope", "row")], &[Markup::text(label), kind]),
        cell("Status", &[badge_of(it)]),
        cell("Response", &[response]),
        cell("Attempts", &[Markup::text(&number(it.attempts.into()))]),
        cell("Next attempt", &[next_attempt(it, now)]),
        cell("Created", &[time]),
        element("td", &[("class", "row-actions")], &[button]),
    ];
    element("tr", &[], &cells)
}

/// Returns everything about a delivery except its payload.
pub fn delivery_details(it: &WebhookDelivery, now: i64) -> Markup {
    let created = it.created_at.inner().timestamp_millis();
    let error = match (&it.error, it.response_status) {
        (Some(error), _) => Markup::text(error),
        (None, None) => with_text("span", &[("class", "muted")], "–"),
        (None, Some(_)) => with_text("span", &[("class", "muted")], "None"),
    };
    let no_attempt = if matches!(it.status, WebhookDeliveryStatus::Pending) {
        "Not sent yet"
    } else {
        "Never"
    };
    let rows = [
        detail("Status", &[badge_of(it)]),
        detail("Response status", &[Markup::text(&response(it))]),
        detail("Error", &[error]),
        detail("Attempts", &[Markup::text(&number(it.attempts.into()))]),
        detail(
            "Last attempt",
            &[time_or(it.last_attempt_at, no_attempt, now)],
        ),
        detail("Next attempt", &[next_attempt(it, now)]),
        detail(
            "Created",
            &[time_markup(it.created_at, now), note(&date_time(created))],
        ),
        detail("Event type", &[with_text("code", &[], &it.event_type)]),
    ];
    element("dl", &[("class", "details")], &rows)
}

/// Returns whether the first attempt has ended.
pub const fn has_result(it: &WebhookDelivery) -> bool {
    it.error.is_some() || !matches!(it.status, WebhookDeliveryStatus::Pending)
}

/// Returns whether an attempt is in progress or imminent. If so, its result should be loaded soon.
pub fn is_changing(deliveries: &[WebhookDelivery], now: i64) -> bool {
    const SOON_MS: i64 = 10_000;
    /// A time that is longer than any attempt, in milliseconds.
    const ATTEMPT_MS: i64 = 20_000;
    let millis = |at: quota_common::Timestamp| at.inner().timestamp_millis();
    deliveries.iter().any(|it| {
        let is_due = |at| millis(at) < now + SOON_MS;
        let was_sent = |at| millis(at) > now - ATTEMPT_MS;
        it.next_attempt_at.is_some_and(is_due)
            || (it.next_attempt_at.is_some() && it.last_attempt_at.is_some_and(was_sent))
    })
}

/// Returns a string that changes whenever the result of a delivery changes.
pub fn results(deliveries: &[WebhookDelivery]) -> String {
    let mut all = String::new();
    for it in deliveries {
        let _ = write!(all, "{} {} {} ", it.id, it.status, it.attempts);
        all.push_str(it.error.as_deref().unwrap_or_default());
    }
    all
}

pub fn find(deliveries: &[WebhookDelivery], id: WebhookDeliveryId) -> Option<&WebhookDelivery> {
    deliveries.iter().find(|it| it.id == id)
}

/// Describes the result of a test event.
pub fn test_result(it: &WebhookDelivery, now: i64) -> Markup {
    let mut text = match (it.status, it.response_status, &it.error) {
        (WebhookDeliveryStatus::Delivered, Some(status), _) => {
            format!("The endpoint responded with status {status}.")
        }
        (.., Some(error)) => error.clone(),
        (WebhookDeliveryStatus::Delivered, None, None) => {
            "The endpoint accepted the event.".to_owned()
        }
        _ => "The event was not sent.".to_owned(),
    };
    if it.status == WebhookDeliveryStatus::Pending
        && let Some(at) = it.next_attempt_at
    {
        let next = relative(at.inner().timestamp_millis(), now);
        let _ = write!(text, " Next attempt {next}.");
    }
    let (class, badge) = match it.status {
        WebhookDeliveryStatus::Delivered => ("badge on", "Delivered"),
        _ => ("badge off", "Failed"),
    };
    [
        with_text("span", &[("class", class)], badge),
        with_text("span", &[], &text),
    ]
    .into_iter()
    .collect()
}

/// Returns the event types as a definition list.
pub fn event_types() -> Markup {
    let rows = [
        (
            THRESHOLD_REACHED,
            "Sent when 50, 80 or 100% of a daily or monthly quota has been used, at most once per threshold per day or month.",
        ),
        ("webhook.test", "Sent when you test the webhook."),
    ]
    .map(|(kind, about)| {
        let parts = [
            element("dt", &[], &[with_text("code", &[], kind)]),
            with_text("dd", &[], about),
        ];
        element("div", &[], &parts)
    });
    element("dl", &[("class", "details event-types")], &rows)
}

/// A programming language with an example of signature verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Language {
    Python,
    Node,
}

impl Language {
    pub const ALL: [Self; 2] = [Self::Python, Self::Node];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Python => "Python",
            Self::Node => "Node.js",
        }
    }

    /// Returns code that verifies a request with the Standard Webhooks library.
    pub const fn example(self) -> &'static str {
        match self {
            Self::Python => {
                "# pip install standardwebhooks\nimport os\nfrom standardwebhooks.webhooks import Webhook\n\nevent = Webhook(os.environ[\"QUOTA_WEBHOOK_SECRET\"]).verify(body, headers)"
            }
            Self::Node => {
                "// npm install standardwebhooks\nimport { Webhook } from \"standardwebhooks\";\n\nconst event = new Webhook(process.env.QUOTA_WEBHOOK_SECRET).verify(body, headers);"
            }
        }
    }
}

#[cfg(test)]
mod tests;
