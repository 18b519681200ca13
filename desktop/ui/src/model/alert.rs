//! Descriptions of quota alerts.

use quota_common::{
    QuotaAlertId,
    alert::{AlertSettings, QuotaAlert},
    auth::Role,
};

use super::{
    burn_down,
    key::time_markup,
    markup::{Markup, element, with_text},
    text::{capitalized, count, date_time, enumerated, number, quoted},
};

fn owner(alert: &QuotaAlert) -> &str {
    match (&alert.key_id, &alert.key_name) {
        (None, _) => "Your organization",
        (Some(_), Some(name)) => name,
        (Some(_), None) => "(unnamed key)",
    }
}

/// Returns the quota's name without its owner, such as `Monthly quota`.
fn quota_name(alert: &QuotaAlert) -> &'static str {
    match alert.key_id {
        Some(_) => burn_down::name(alert.policy),
        None => "Monthly quota",
    }
}

fn threshold_badge(threshold: u32) -> Markup {
    let class = match threshold {
        100.. => "badge off",
        80.. => "badge limited",
        _ => "badge",
    };
    with_text("span", &[("class", class)], &format!("{threshold}%"))
}

/// Returns the alerts as a table. Marks alerts newer than `seen` as new.
pub fn alert_table(alerts: &[QuotaAlert], seen: Option<QuotaAlertId>, now: i64) -> Markup {
    let columns = ["Key", "Quota", "Reached", "Used", "Time", "Reset"];
    let head: Vec<Markup> = columns
        .iter()
        .map(|name| with_text("th", &[("scope", "col")], name))
        .collect();
    let rows: Markup = alerts
        .iter()
        .map(|alert| {
            let is_new = seen.is_some_and(|seen| alert.id > seen);
            alert_row(alert, is_new, now)
        })
        .collect();
    let parts = [
        with_text(
            "caption",
            &[("class", "visually-hidden")],
            "Alerts, newest first",
        ),
        element("thead", &[], &[element("tr", &[], &head)]),
        element("tbody", &[], &[rows]),
    ];
    element("table", &[("class", "table")], &parts)
}

fn alert_row(alert: &QuotaAlert, is_new: bool, now: i64) -> Markup {
    let name = with_text("span", &[("class", "clamp")], owner(alert));
    let name = match alert.key_id {
        Some(id) => element(
            "a",
            &[("href", &format!("/console/api-keys/{id}"))],
            &[name],
        ),
        None => name,
    };
    let new = if is_new {
        with_text("span", &[("class", "badge on")], "New")
    } else {
        Markup::default()
    };
    let exact = with_text(
        "span",
        &[("class", "exact")],
        &date_time(alert.created_at.inner().timestamp_millis()),
    );
    let time = element("div", &[], &[time_markup(alert.created_at, now), exact]);
    let used = format!("{} of {}", number(alert.used), number(alert.limit));
    let cell = |label: &str, content: Markup| element("td", &[("data-label", label)], &[content]);
    let cells = [
        element("th", &[("scope", "row"), ("dir", "auto")], &[name, new]),
        cell("Quota", Markup::text(quota_name(alert))),
        cell("Reached", threshold_badge(alert.threshold)),
        cell("Used", Markup::text(&used)),
        cell("Time", time),
        cell("Reset", time_markup(alert.resets_at, now)),
    ];
    element("tr", &[], &cells)
}

/// Returns the alerts created after `than`.
pub fn newer(alerts: &[QuotaAlert], than: QuotaAlertId) -> impl Iterator<Item = &QuotaAlert> {
    alerts.iter().filter(move |it| it.id > than)
}

/// Returns the alerts to announce, in the given order. Before the first check, `announced` is `None`, and no alert is
/// announced, because the alerts may be from days ago.
pub fn unannounced(
    alerts: &[QuotaAlert],
    announced: Option<QuotaAlertId>,
    seen: QuotaAlertId,
) -> Vec<QuotaAlert> {
    announced.map_or_else(Vec::new, |announced| {
        newer(alerts, announced.max(seen)).cloned().collect()
    })
}

/// Summarizes new alerts in one message. Returns `None` if there are no new alerts.
pub fn announcement(new: &[QuotaAlert]) -> Option<String> {
    // A burst of requests can cross several thresholds of the same quota. Only the highest threshold matters.
    let highest = new.iter().max_by_key(|it| it.threshold)?;
    let is_one_quota = new
        .iter()
        .all(|it| (it.key_id, it.policy) == (highest.key_id, highest.policy));
    if !is_one_quota {
        return Some(count(
            new.len() as u64,
            "new quota alert",
            "new quota alerts",
        ));
    }
    let owner = match highest.key_id {
        Some(_) => quoted(owner(highest)),
        None => owner(highest).to_owned(),
    };
    Some(format!(
        "{owner} has used {}% of its {}",
        highest.threshold,
        quota_name(highest).to_ascii_lowercase()
    ))
}

pub const fn role_members(role: Role) -> &'static str {
    match role {
        Role::Owner => "owners",
        Role::Admin => "admins",
        Role::Developer => "developers",
        Role::Billing => "billing members",
        Role::Viewer => "viewers",
    }
}

/// Returns a warning if emails are turned on but the server cannot send them.
pub fn email_warning(settings: &AlertSettings) -> Option<&'static str> {
    let is_on = settings.email && !settings.email_roles.is_empty();
    (is_on && !settings.can_email).then_some(
        "Emails aren't sent because no mail server is configured. Ask the server's operator to set SMTP_URL.",
    )
}

/// Describes who receives alerts by email.
pub fn recipients(settings: &AlertSettings) -> String {
    let roles = settings.email_roles.iter();
    let names: Vec<&str> = roles.map(|it| role_members(*it)).collect();
    if names.is_empty() || !settings.email {
        "Off".to_owned()
    } else {
        capitalized(&enumerated(&names))
    }
}

#[cfg(test)]
mod tests {
    use quota_common::limit::PolicyName;
    use serde_json::json;

    use super::*;

    const NOW: i64 = 1_785_738_420_000;

    fn alert(n: u32, key: Option<&str>, policy: PolicyName, threshold: u32) -> QuotaAlert {
        let id = |n: u32| format!("019ab4e1-7c00-7000-8000-{n:012}");
        serde_json::from_value(json!({
            "id": id(n), "threshold": threshold, "policy": policy, "key_id": key.map(|_| id(900)), "key_name": key,
            "limit": 50_000, "used": 40_012, "starts_at": "2026-08-01T00:00:00.000Z",
            "resets_at": "2026-09-01T00:00:00.000Z", "created_at": "2026-08-03T06:26:00.000Z",
        }))
        .expect("an alert")
    }

    #[test]
    fn row_names_the_key_the_quota_and_the_reset() {
        let of_key = alert(2, Some("<App>"), PolicyName::Daily, 80);
        let row = alert_table(std::slice::from_ref(&of_key), Some(of_key.id), NOW).to_string();
        for part in [
            "href=\"/console/api-keys/019ab4e1-7c00-7000-8000-000000000900\"",
            "&lt;App&gt;",
            ">Daily quota<",
            "badge limited\">80%<",
            ">40,012 of 50,000<",
            ">1 minute ago<",
            ">3 Aug 2026, 06:26 UTC<",
            ">in 28 days<",
        ] {
            assert!(row.contains(part), "{part} is not in {row}");
        }
        assert!(!row.contains(">New<"));
        let of_tenant = alert(3, None, PolicyName::TenantMonthly, 100);
        let row = alert_table(&[of_tenant], Some(of_key.id), NOW).to_string();
        for part in [
            ">Your organization<",
            ">Monthly quota<",
            "badge off\">100%<",
            ">New<",
        ] {
            assert!(row.contains(part), "{part} is not in {row}");
        }
        assert!(!row.contains("<a "), "the organization has no page");
    }

    #[test]
    fn announcement_names_the_highest_threshold_of_one_quota() {
        let app = |threshold| alert(1, Some("App"), PolicyName::Daily, threshold);
        assert_eq!(announcement(&[]), None);
        assert_eq!(
            announcement(&[app(100), app(80), app(50)]).as_deref(),
            Some("\"\u{2068}App\u{2069}\" has used 100% of its daily quota")
        );
        let tenant = alert(1, None, PolicyName::TenantMonthly, 50);
        assert_eq!(
            announcement(std::slice::from_ref(&tenant)).as_deref(),
            Some("Your organization has used 50% of its monthly quota")
        );
        assert_eq!(
            announcement(&[app(50), tenant]).as_deref(),
            Some("2 new quota alerts")
        );
    }

    #[test]
    fn alerts_are_announced_once_and_only_if_they_are_new_and_not_seen() {
        let all = [3, 2, 1].map(|n| alert(n, Some("App"), PolicyName::Daily, 50));
        let id = |n: usize| all[3 - n].id;
        let announced = |announced, seen| {
            let new = unannounced(&all, announced, seen);
            new.iter().map(|it| it.id).collect::<Vec<_>>()
        };
        assert_eq!(announced(None, QuotaAlertId::NIL), []);
        assert_eq!(announced(Some(id(1)), QuotaAlertId::NIL), [id(3), id(2)]);
        assert_eq!(announced(Some(id(3)), QuotaAlertId::NIL), []);
        assert_eq!(announced(Some(id(1)), id(2)), [id(3)]);
        assert_eq!(announced(Some(id(2)), id(1)), [id(3)]);
        // There were no alerts at the first check.
        let none = Some(QuotaAlertId::NIL);
        assert_eq!(announced(none, QuotaAlertId::NIL), [id(3), id(2), id(1)]);
    }

    #[test]
    fn recipients_are_listed_unless_email_is_off() {
        let settings = |email, email_roles: &[Role]| {
            recipients(&AlertSettings {
                email,
                email_roles: email_roles.to_vec(),
                can_email: true,
            })
        };
        assert_eq!(settings(true, &[Role::Owner]), "Owners");
        assert_eq!(
            settings(true, &[Role::Owner, Role::Admin]),
            "Owners and admins"
        );
        assert_eq!(
            settings(true, Role::ALL),
            "Owners, admins, developers, billing members and viewers"
        );
        assert_eq!(settings(true, &[]), "Off");
        assert_eq!(settings(false, &[Role::Owner]), "Off");
    }

    #[test]
    fn warning_appears_only_if_emails_should_be_sent() {
        let warns = |email, email_roles: &[Role], can_email| {
            let settings = AlertSettings {
                email,
                email_roles: email_roles.to_vec(),
                can_email,
            };
            email_warning(&settings).is_some()
        };
        assert!(warns(true, &[Role::Owner], false));
        assert!(!warns(true, &[Role::Owner], true));
        assert!(!warns(true, &[], false));
        assert!(!warns(false, &[Role::Owner], false));
    }
}
