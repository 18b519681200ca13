//! Handles webhooks of Stripe, and reads customers regularly in case one was lost.
//!
//! A webhook that this replica has stored is handled at once, and one of another replica within a second, should that
//! replica not do it. What fails is tried again later; see [`events`](crate::billing::events).

use std::time::Duration;

use tokio::sync::watch;

use super::{every, next};
use crate::{
    billing::events::Round,
    db::{self, DbError},
    state::AppState,
};

/// How often this replica looks for events without being notified.
const EVERY: Duration = Duration::from_secs(1);
/// How often this replica looks for customers that have not been read for a while.
const READ_EVERY: Duration = Duration::from_secs(5);

pub(super) async fn handle_events(state: AppState, mut stopping: watch::Receiver<bool>) {
    let Some(billing) = state.billing.clone() else {
        return;
    };
    let mut ticks = every(EVERY);
    let mut is_reported = false;
    loop {
        let continues = tokio::select! {
            biased;
            continues = next(&mut ticks, &mut stopping) => continues,
            () = state.billing_event.notified() => true,
        };
        if !continues {
            return;
        }
        // Until there are none left.
        while handle_round(&state, billing.handle_due().await, &mut is_reported) {
            if *stopping.borrow() {
                return;
            }
        }
    }
}

pub(super) async fn read_customers(state: AppState, mut stopping: watch::Receiver<bool>) {
    let Some(billing) = state.billing.clone() else {
        return;
    };
    let mut ticks = every(READ_EVERY);
    let mut is_reported = false;
    while next(&mut ticks, &mut stopping).await {
        let round = billing.read_due().await;
        handle_round(&state, round, &mut is_reported);
    }
}

/// Publishes and counts what a round did. Returns whether there may be more to do.
fn handle_round(state: &AppState, round: Result<Round, DbError>, is_reported: &mut bool) -> bool {
    let round = match round {
        Ok(round) => round,
        Err(error) => {
            if !std::mem::replace(is_reported, true) {
                tracing::warn!(error = %db::chain(&error), "cannot handle webhooks of Stripe");
            }
            return false;
        }
    };
    *is_reported = false;
    for invalidation in &round.invalidations {
        state.invalidate(invalidation);
    }
    let count = |n: usize| u64::try_from(n).unwrap_or(0);
    state
        .metrics
        .billing_errors
        .inc_by(count(round.read_errors));
    state
        .metrics
        .billing_events_failed
        .inc_by(count(round.failed));
    round.events > 0
}
