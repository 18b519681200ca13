//! Writes and sends emails about alerts.

use std::time::Duration;

use super::every;
use crate::{db, state::AppState};

/// How often this replica looks for emails to write and send.
const EVERY: Duration = Duration::from_secs(5);

pub(super) async fn send(state: AppState) {
    let mut ticks = every(EVERY);
    let mut is_reported = false;
    loop {
        ticks.tick().await;
        let written = state.alerts.write_emails(&state.config.public_url).await;
        // Emails are sent even if none could be written.
        let sent = state.alerts.send_emails(&state.mailer).await;
        if let Ok(sent) = &sent {
            state.metrics.mails_sent.inc_by(sent.sent);
            state.metrics.mail_attempts_failed.inc_by(sent.postponed);
            state.metrics.mails_failed.inc_by(sent.failed);
        }
        match written.and_then(|errors| sent.map(|_| errors)) {
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
