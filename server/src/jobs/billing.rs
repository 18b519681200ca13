//! Processes Stripe webhooks, and regularly reads customers from Stripe in case a webhook was lost. Also reads prices,
//! and reports usage.
//!
//! A replica immediately processes the webhooks that it has stored itself. Every second, each replica also looks for
//! webhooks that other replicas have stored but not processed. Failures are retried later; see
//! [`events`](crate::billing::events).

use std::time::Duration;

use tokio::time::timeout;

use super::every;
use crate::{
    billing::{Billing, events::Round},
    db::{self, DbError},
    repo::billing_usage::Uncharged,
    state::AppState,
    telemetry::metrics::Metrics,
};

/// How often this replica looks for events without being notified.
const EVERY: Duration = Duration::from_secs(1);
/// How often this replica looks for customers that have not been read recently.
const READ_EVERY: Duration = Duration::from_secs(5);
/// How often the prices for new subscriptions are read.
const OFFER_EVERY: Duration = Duration::from_mins(10);
/// How soon a failed attempt to read the prices is retried.
const OFFER_AGAIN: Duration = Duration::from_secs(30);
/// How often usage reports are planned and sent.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// How often reports are compared with the totals in Stripe.
const RECONCILE_EVERY: Duration = Duration::from_hours(1);
/// The time limit for measuring the usage that has not been charged.
const MEASURE_WITHIN: Duration = Duration::from_secs(30);
/// How soon a failed measurement is repeated.
const MEASURE_AGAIN: Duration = Duration::from_mins(1);

pub(super) async fn handle_events(state: AppState) {
    let Some(billing) = state.billing.clone() else {
        return;
    };
    let mut ticks = every(EVERY);
    let mut is_reported = false;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = state.billing_event.notified() => {}
        }
        // Repeat until no events are left or a round fails.
        while handle_round(&state, billing.handle_due().await, &mut is_reported) {}
    }
}

pub(super) async fn read_customers(state: AppState) {
    let Some(billing) = state.billing.clone() else {
        return;
    };
    let mut ticks = every(READ_EVERY);
    let mut is_reported = false;
    loop {
        ticks.tick().await;
        let round = billing.read_due().await;
        let is_other_account = billing.is_other_account();
        let metric = &state.metrics.billing_account_mismatch;
        metric.set(is_other_account.into());
        handle_round(&state, round, &mut is_reported);
    }
}

/// Reads the prices that the console shows for new subscriptions.
pub(super) async fn read_offer(state: AppState) {
    let Some(billing) = state.billing.clone() else {
        return;
    };
    loop {
        let wait = match billing.read_offer().await {
            Ok(()) => OFFER_EVERY,
            Err(error) => {
                tracing::debug!(error = %db::chain(&error), "cannot read prices from Stripe");
                OFFER_AGAIN
            }
        };
        tokio::time::sleep(wait).await;
    }
}

pub(super) async fn report_usage(state: AppState) {
    let Some(billing) = state.billing.clone() else {
        return;
    };
    let mut ticks = every(REPORT_EVERY);
    let mut is_reported = false;
    loop {
        ticks.tick().await;
        let planned = billing.plan_usage().await;
        let sent = billing.send_usage().await;
        match planned.and(sent) {
            Ok(sent) => {
                is_reported = false;
                state.metrics.billing_reports.inc_by(sent.finished);
                state.metrics.billing_errors.inc_by(sent.errors);
            }
            Err(error) => {
                state.metrics.billing_errors.inc();
                if !std::mem::replace(&mut is_reported, true) {
                    tracing::warn!(error = %db::chain(&error), "cannot report usage to Stripe");
                }
            }
        }
    }
}

/// Compares yesterday's reports with the totals in Stripe, and measures the usage that has not been charged.
pub(super) async fn reconcile_usage(state: AppState) {
    let Some(billing) = state.billing.clone() else {
        return;
    };
    let mut ticks = every(RECONCILE_EVERY);
    loop {
        ticks.tick().await;
        let metrics = &state.metrics;
        let Some(uncharged) = measure_uncharged_usage(metrics, &billing).await else {
            ticks.reset_after(MEASURE_AGAIN);
            continue;
        };
        match billing.reconcile_usage(uncharged.now).await {
            Ok(difference) => {
                metrics.billing_usage_difference.set(difference);
                metrics.billing_reconciled_at.set(uncharged.now.timestamp());
            }
            Err(error) => {
                metrics.billing_errors.inc();
                tracing::warn!(error = %db::chain(&error), "cannot compare usage with Stripe");
            }
        }
    }
}

/// Measures the usage that has not been charged. Returns `None` if the measurement failed.
pub async fn measure_uncharged_usage(metrics: &Metrics, billing: &Billing) -> Option<Uncharged> {
    let measured = timeout(MEASURE_WITHIN, billing.uncharged_usage()).await;
    let uncharged = measured.ok().and_then(Result::ok);
    metrics.billing_usage_lost.set(uncharged.map(|it| it.lost));
    metrics
        .billing_usage_oldest
        .set(uncharged.map(|it| it.oldest_pending));
    if uncharged.is_none() {
        metrics.billing_errors.inc();
    }
    uncharged
}

/// Publishes the invalidations of a round, and counts its results. Returns whether there may be more work.
fn handle_round(state: &AppState, round: Result<Round, DbError>, is_reported: &mut bool) -> bool {
    let round = match round {
        Ok(round) => round,
        Err(error) => {
            if !std::mem::replace(is_reported, true) {
                tracing::warn!(error = %db::chain(&error), "cannot process webhooks from Stripe");
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
        .billing_meter_errors
        .inc_by(round.meter_errors);
    state
        .metrics
        .billing_events_failed
        .inc_by(count(round.failed));
    round.events > 0
}
