//! Checks quotas, and creates alerts for the thresholds that have been reached.

use std::time::Duration;

use tokio::sync::watch;

use super::{every, stopped};
use crate::{db, state::AppState};

/// How often quotas are checked.
const EVERY: Duration = Duration::from_secs(5);
/// How often quotas are checked if metering is off. Each check then covers all quotas, so it takes longer.
const EVERY_UNMETERED: Duration = Duration::from_secs(30);

pub(super) async fn check(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut ticks = every(if state.metering.is_on() {
        EVERY
    } else {
        EVERY_UNMETERED
    });
    let mut is_reported = false;
    loop {
        // The round can be dropped at any point: an uncommitted transaction is rolled back, and its work is repeated
        // later.
        let has_more = tokio::select! {
            biased;
            () = stopped(&mut stopping) => return,
            has_more = async {
                ticks.tick().await;
                round(&state, &mut is_reported).await
            } => has_more,
        };
        if has_more {
            ticks.reset_immediately();
        }
    }
}

/// Runs one round of checks. Returns whether the next round should start immediately.
async fn round(state: &AppState, is_reported: &mut bool) -> bool {
    match state.alerts.check().await {
        Ok(round) => {
            *is_reported = false;
            state.metrics.quota_alerts.inc_by(round.alerts);
            state.metrics.alert_errors.inc_by(round.errors);
            if round.deliveries > 0 {
                state.webhooks.wake();
            }
            round.has_more && round.errors == 0
        }
        Err(error) => {
            state.metrics.alert_errors.inc();
            if !std::mem::replace(is_reported, true) {
                tracing::warn!(error = %db::chain(&error), "cannot check quotas for alerts");
            }
            false
        }
    }
}
