//! Emails about alerts. One email covers up to 1,000 of a tenant's alerts that have not been sent yet. Each recipient
//! is sent at most six emails per hour about a tenant, even if many of its keys reach their quotas.
//!
//! One email per recipient is stored in the transaction that marks the alerts as sent. The emails are sent after that
//! transaction. If an attempt fails, the server retries for about a day, unless the error is permanent. A crash can
//! cause an email to be sent twice. Tenants take turns, so that one tenant's emails do not delay other tenants' emails.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use quota_common::{TenantId, number::group_thousands};
use uuid::Uuid;

use super::Alerts;
use crate::{
    db::{self, DbError, SystemTx},
    error_chain::chain,
    mail::{Mail, Mailer},
    repo::{
        alert::AlertRow,
        mail::{self, DueMail, NewMail},
    },
};

/// The maximum number of emails about one tenant that each recipient is sent per hour.
const PER_HOUR: i64 = 6;
/// The maximum number of alerts that one email covers.
const ALERTS_MAX: i64 = 1000;
/// The maximum number of alerts that one email lists.
const LISTED_MAX: usize = 25;
/// The maximum number of recipients per tenant.
const RECIPIENTS_MAX: i64 = 100;
/// The maximum number of tenants per round.
const TENANTS: i64 = 100;
/// The maximum number of emails to send per round.
const BATCH: usize = 20;
/// Seconds until another replica may repeat an attempt. This time is much longer than an
/// [attempt](crate::mail::SEND_MAX) takes, including recording its result.
const LEASE: i32 = 120;
/// The pauses between attempts, in seconds. Their sum is about a day.
const PAUSES: [i64; 7] = [60, 300, 900, 3600, 10_800, 25_200, 46_800];

/// The number of emails with each outcome in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    pub sent: u64,
    /// Emails that will be retried.
    pub postponed: u64,
    pub failed: u64,
}

struct Text {
    subject: String,
    text: String,
    html: String,
}

/// The results of writing emails in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// The number of tenants whose emails could not be stored.
    pub errors: u64,
    /// Whether the combined limit for all tenants was reached.
    pub is_limited: bool,
}

impl Alerts {
    /// Stores emails about alerts that have not been sent. Once `per_hour` emails have been stored within an hour, for
    /// all tenants combined, further alerts wait. If `per_hour` is 0, there is no limit.
    pub async fn write_emails(&self, public_url: &str, per_hour: u32) -> Result<Written, DbError> {
        let tenants = self
            .db
            .in_system(async |tx| mail::tenants_with_alerts(tx, PER_HOUR, TENANTS).await)
            .await?;
        let mut written = Written::default();
        for tenant in tenants.into_iter().map(TenantId) {
            match self.write_email(tenant, public_url, per_hour).await {
                Ok(true) => {}
                Ok(false) => {
                    written.is_limited = true;
                    break;
                }
                Err(error) => {
                    written.errors += 1;
                    tracing::warn!(%tenant, error = %db::chain(&error), "cannot write an email");
                    self.db.probe().await?;
                }
            }
        }
        Ok(written)
    }

    /// Stores one email about a tenant's alerts for each recipient. Returns `false` if the combined limit for all
    /// tenants has been reached.
    async fn write_email(
        &self,
        tenant: TenantId,
        public_url: &str,
        per_hour: u32,
    ) -> Result<bool, DbError> {
        let write = async |tx: &mut SystemTx| {
            if per_hour > 0 && mail::count_of_last_hour(tx).await? >= i64::from(per_hour) {
                return Ok(false);
            }
            write_email(tx, tenant, public_url).await?;
            Ok(true)
        };
        self.db.in_system(write).await
    }

    /// Sends emails that are due. Claims one email at a time, because the lease of a claimed email could expire while
    /// other emails are being sent.
    pub async fn send_emails(&self, mailer: &Mailer) -> Result<Sent, DbError> {
        let mut all = Sent::default();
        for _ in 0..BATCH {
            let after_tenant = *self.last_mailed.lock();
            let due = self
                .db
                .in_system(async |tx| mail::claim(tx, after_tenant, LEASE).await)
                .await?;
            let Some(due) = due else { break };
            *self.last_mailed.lock() = due.tenant_id;
            let sent = mailer.send(&mail_of(&due)).await;
            let (error, retry_after) = match &sent {
                Ok(()) => (None, None),
                Err(error) if error.is_permanent() => (Some(chain(error)), None),
                Err(error) => (Some(chain(error)), pause(due.attempts)),
            };
            let count = match (&error, retry_after) {
                (None, _) => &mut all.sent,
                (Some(_), Some(_)) => &mut all.postponed,
                (Some(_), None) => &mut all.failed,
            };
            *count += 1;
            if let Some(error) = &error {
                // Do not log the recipient.
                tracing::warn!(mail = %due.id, attempts = due.attempts, error, "cannot send an email");
            }
            self.db
                .in_system(async |tx| mail::finish(tx, &due, error.as_deref(), retry_after).await)
                .await?;
        }
        Ok(all)
    }
}

async fn write_email(tx: &mut SystemTx, tenant: TenantId, public_url: &str) -> Result<(), DbError> {
    let alerts = mail::lock_alerts(tx, tenant, ALERTS_MAX).await?;
    if alerts.is_empty() {
        return Ok(());
    }
    let recipients = mail::recipients(tx, tenant, RECIPIENTS_MAX).await?;
    if let Some(first) = recipients.first() {
        let Text {
            subject,
            text,
            html,
        } = described(&alerts, &first.tenant, public_url);
        let mails: Vec<_> = recipients
            .iter()
            .map(|recipient| NewMail {
                tenant_id: tenant.0,
                id: Uuid::now_v7(),
                recipient: &recipient.email,
                subject: &subject,
                text_body: &text,
                html_body: &html,
            })
            .collect();
        mail::insert_all(tx, &mails).await?;
    }
    let ids: Vec<Uuid> = alerts.iter().map(|it| it.id).collect();
    mail::alerts_are_sent(tx, tenant, &ids).await?;
    Ok(())
}

fn pause(attempts: i32) -> Option<i64> {
    let index = usize::try_from(attempts - 1).unwrap_or(0);
    PAUSES.get(index).copied()
}

fn mail_of(due: &DueMail) -> Mail<'_> {
    Mail {
        id: due.id,
        recipient: &due.recipient,
        subject: &due.subject,
        text: &due.text_body,
        html: &due.html_body,
    }
}

fn time(at: DateTime<Utc>) -> String {
    at.format("%-d %b %Y, %H:%M UTC").to_string()
}

fn owner(alert: &AlertRow) -> String {
    match &alert.key_name {
        Some(name) => format!("API key \"{}\"", unlinked(name)),
        None => "Your organization".to_owned(),
    }
}

fn quota(alert: &AlertRow) -> &'static str {
    if alert.policy == "daily" {
        "daily quota"
    } else {
        "monthly quota"
    }
}

/// Returns a line of text that describes an alert.
fn line(alert: &AlertRow) -> String {
    let state = if alert.threshold >= 100 {
        "has used up its".to_owned()
    } else {
        format!("has used {}% of its", alert.threshold)
    };
    format!(
        "{} {state} {} ({} of {} requests). The quota {} on {}.",
        owner(alert),
        quota(alert),
        group_thousands(&alert.used.to_string()),
        group_thousands(&alert.quota.to_string()),
        // Usage can be recorded after its day or month has ended.
        if alert.window_end > alert.created_at {
            "resets"
        } else {
            "was reset"
        },
        time(alert.window_end)
    )
}

/// Composes an email about one or more alerts.
fn described(alerts: &[AlertRow], tenant: &str, public_url: &str) -> Text {
    let tenant = unlinked(tenant);
    let base = public_url.trim_end_matches('/');
    let subject = match alerts {
        [alert] if alert.threshold >= 100 => {
            format!("{} has used up its {}", owner(alert), quota(alert))
        }
        [alert] => format!(
            "{} has used {}% of its {}",
            owner(alert),
            alert.threshold,
            quota(alert)
        ),
        alerts => format!("{} quota alerts for {tenant}", alerts.len()),
    };
    let link = match alerts {
        [alert] if !alert.key_id.is_nil() => format!("{base}/console/api-keys/{}", alert.key_id),
        _ => format!("{base}/console/usage"),
    };
    let mut text = String::new();
    let mut items = String::new();
    for alert in alerts.iter().take(LISTED_MAX) {
        let line = line(alert);
        let _ = writeln!(text, "- {line}");
        let _ = write!(items, "<li>{}</li>", escaped(&line));
    }
    let mut more = String::new();
    if alerts.len() > LISTED_MAX {
        more = format!("And {} more.", alerts.len() - LISTED_MAX);
        let _ = writeln!(text, "{more}");
    }
    let note = format!(
        "You're receiving this email because of your role in {tenant} on {base}. Owners and admins can change who receives alerts."
    );
    let _ = write!(text, "\nDetails: {link}\n\n{note}\n");
    let html = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"format-detection\" \
         content=\"telephone=no,date=no,address=no,email=no,url=no\"></head><body style=\"font-family:sans-serif;line-height:1.5\"><ul>{items}</ul>\
         <p>{}</p><p><a href=\"{}\">Show details</a></p><p style=\"color:#666\">{}</p></body></html>",
        escaped(&more),
        escaped(&link),
        escaped(&note)
    );
    Text {
        subject,
        text,
        html,
    }
}

/// Inserts invisible spaces around characters that could turn a name into an address. Email programs turn anything that
/// looks like an address into a link, and a tenant can choose key names that appear in other people's emails.
fn unlinked(name: &str) -> String {
    // Domain names may also contain the full stops of other scripts.
    const PARTS_OF_ADDRESSES: [char; 8] =
        ['.', ':', '/', '@', '\\', '\u{3002}', '\u{ff0e}', '\u{ff61}'];
    const ZERO_WIDTH_SPACE: char = '\u{200b}';
    let mut unlinked = String::with_capacity(name.len());
    for c in name.chars() {
        if PARTS_OF_ADDRESSES.contains(&c) {
            unlinked.extend([ZERO_WIDTH_SPACE, c, ZERO_WIDTH_SPACE]);
        } else {
            unlinked.push(c);
        }
    }
    unlinked
}

/// Escapes text for HTML.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alert(name: &str, threshold: i32) -> AlertRow {
        let at = |text: &str| text.parse().unwrap();
        AlertRow {
            id: Uuid::now_v7(),
            key_id: Uuid::from_u128(7),
            key_name: Some(name.to_owned()),
            policy: "daily".into(),
            threshold,
            quota: 50_000,
            used: 40_012,
            window_start: at("2026-11-26T00:00:00Z"),
            window_end: at("2026-11-27T00:00:00Z"),
            email_pending: true,
            created_at: at("2026-11-26T12:00:00Z"),
        }
    }

    #[test]
    fn email_about_one_alert_says_what_happened_and_links_to_the_key() {
        let it = described(
            &[alert("Mobile app", 80)],
            "Acme",
            "https://quota.example.com/",
        );
        assert_eq!(
            it.subject,
            "API key \"Mobile app\" has used 80% of its daily quota"
        );
        let line = "- API key \"Mobile app\" has used 80% of its daily quota (40,012 of 50,000 requests). \
                    The quota resets on 27 Nov 2026, 00:00 UTC.";
        assert!(it.text.contains(line), "{}", it.text);
        let link =
            "https://quota.example.com/console/api-keys/00000000-0000-0000-0000-000000000007";
        assert!(it.text.contains(link) && it.html.contains(link));
        let it = described(
            &[alert("Mobile app", 100)],
            "Acme",
            "https://quota.example.com",
        );
        assert_eq!(
            it.subject,
            "API key \"Mobile app\" has used up its daily quota"
        );
    }

    #[test]
    fn email_about_many_alerts_lists_some_and_counts_the_rest() {
        let alerts = vec![alert("Key", 50); 40];
        let it = described(&alerts, "Acme", "https://quota.example.com");
        assert_eq!(it.subject, "40 quota alerts for Acme");
        assert_eq!(it.text.matches("API key").count(), 25);
        assert_eq!(it.html.matches("<li>").count(), 25);
        assert!(it.text.contains("And 15 more."), "{}", it.text);
    }

    #[test]
    fn names_do_not_become_links() {
        let names = [
            ("evil.example", "evil.example"),
            ("https://evil.example/login", "https:"),
            ("https://evil.example/login", "/evil"),
            ("www.evil.example", "www."),
            ("mail@evil.example", "mail@"),
            ("evil\u{3002}example", "evil\u{3002}"),
            ("localhost:8080/x", "localhost:"),
        ];
        for (name, part) in names {
            let one = [alert(name, 80)];
            let two = [alert(name, 80), alert(name, 80)];
            for alerts in [&one[..], &two[..]] {
                let it = described(alerts, name, "");
                for text in [it.subject, it.text, it.html] {
                    assert!(!text.contains(part), "{text}");
                    let visible = text.replace('\u{200b}', "");
                    assert!(visible.contains(name), "{text}");
                }
            }
        }
    }

    #[test]
    fn names_are_escaped_in_html() {
        let it = described(
            &[alert("<script>&'\"", 50)],
            "<b>Acme</b>",
            "https://quota.example.com",
        );
        assert!(
            !it.html.contains("<script>") && !it.html.contains("<b>"),
            "{}",
            it.html
        );
        assert!(
            it.html.contains("&lt;script&gt;&amp;&#39;&quot;"),
            "{}",
            it.html
        );
    }
}
