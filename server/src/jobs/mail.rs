//! Writes and sends emails about alerts.

use std::time::Duration;

use super::every;
use crate::{db, state::AppState};

/// How often this replica looks for emails to write and send.
const EVERY: Duration = Duration::from_secs(5);

pub(super) async fn send(state: AppState) {
    let mut ticks = every(EVERY);
    let (mut is_reported, mut was_limited) = (false, false);
    let config = &state.config;
    loop {
        ticks.tick().await;
        let written = state
            .alerts
            .write_emails(&config.public_url, config.alert_emails_per_hour);
        let written = written.await;
        if let Ok(written) = &written {
            if written.is_limited && !was_limited {
                tracing::warn!(
                    limit = config.alert_emails_per_hour,
                    "the limit QUOTA_ALERT_EMAILS_PER_HOUR has been reached, so emails about alerts are delayed"
                );
            }
            was_limited = written.is_limited;
        }
        // Send stored emails even if no new emails could be written.
        let sent = state.alerts.send_emails(&state.mailer).await;
        if let Ok(sent) = &sent {
            state.metrics.mails_sent.inc_by(sent.sent);
            state.metrics.mail_attempts_failed.inc_by(sent.postponed);
            state.metrics.mails_failed.inc_by(sent.failed);
        }
        match written.and_then(|written| sent.map(|_| written.errors)) {
            Ok(errors) => {
                is_reported = false;
                state.metrics.mail_errors.inc_by(errors);
            }
            Err(error) => {
                state.metrics.mail_errors.inc();
                if !std::mem::replace(&mut is_reported, true) {
                    tracing::warn!(error = %db::chain(&error), "cannot send emails");
                }
            }
        }
    }
}
