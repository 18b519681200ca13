//! Background work.
//!
//! Each job is a loop that ends on request and continues after a failure: failed work is retried in a later iteration.
//! Jobs do not depend on HTTP.

mod alerts;
mod billing;
mod deleted_keys;
mod invalidations;
mod mail;
mod metering;
mod replicas;
mod sweep;
mod usage;
mod webhooks;

use std::time::Duration;

use futures_util::{FutureExt, future::BoxFuture};
use tokio::{
    sync::watch,
    task::{self, JoinSet},
    time::{MissedTickBehavior, interval},
};

pub use self::{billing::measure_uncharged_usage, webhooks::measure_overdue};
use crate::{db, limiter, state::AppState};

/// How often the last-used times of keys and tokens are saved.
const LAST_USED_EVERY: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Jobs {
    stop: watch::Sender<bool>,
    running: JoinSet<()>,
}

impl Jobs {
    pub fn start(state: &AppState) -> Self {
        let (stop, stopping) = watch::channel(false);
        let mut running = JoinSet::new();
        running.spawn(invalidations::poll(state.clone(), stopping.clone()));
        running.spawn(invalidations::listen(state.clone(), stopping.clone()));
        if state.redis.is_some() {
            running.spawn(replicas::count(state.clone(), stopping.clone()));
        }
        running.spawn(prune_repeatedly(state.clone(), stopping.clone()));
        running.spawn(deleted_keys::delete_limits(state.clone(), stopping.clone()));
        running.spawn(write_last_used(state.clone(), stopping.clone()));
        running.spawn(usage::maintain(state.clone(), stopping.clone()));
        running.spawn(usage::compare(state.clone(), stopping.clone()));
        running.spawn(alerts::check(state.clone(), stopping.clone()));
        running.spawn(webhooks::deliver(state.clone(), stopping.clone()));
        let until_stopped = |job| until_stopped(stopping.clone(), job);
        running.spawn(until_stopped(webhooks::measure(state.clone()).boxed()));
        running.spawn(until_stopped(mail::send(state.clone()).boxed()));
        if state.billing.is_some() {
            running.spawn(until_stopped(billing::handle_events(state.clone()).boxed()));
            running.spawn(until_stopped(
                billing::read_customers(state.clone()).boxed(),
            ));
            running.spawn(until_stopped(billing::read_offer(state.clone()).boxed()));
            running.spawn(until_stopped(billing::report_usage(state.clone()).boxed()));
            running.spawn(until_stopped(
                billing::reconcile_usage(state.clone()).boxed(),
            ));
        }
        if state.metering.is_on() {
            running.spawn(metering::ship(state.clone(), stopping.clone()));
            running.spawn(metering::adopt(state.clone(), stopping.clone()));
            running.spawn(metering::prepare(state.clone(), stopping.clone()));
            running.spawn(metering::measure_time(state.clone(), stopping.clone()));
        }
        running.spawn(sweep::run(state.clone(), stopping));
        Self { stop, running }
    }

    /// Stops all jobs and waits for them to end.
    pub async fn stop(mut self) {
        let _ = self.stop.send(true);
        while self.running.join_next().await.is_some() {}
    }
}

/// Waits for the next tick. Returns `false` if the job must end.
async fn next(ticks: &mut tokio::time::Interval, stopping: &mut watch::Receiver<bool>) -> bool {
    tokio::select! {
        biased;
        () = stopped(stopping) => false,
        _ = ticks.tick() => true,
    }
}

/// Runs a job until the server stops, and then drops it, so that stopping does not wait for Stripe or a mail server.
/// The job must be able to continue later from its stored state.
async fn until_stopped(mut stopping: watch::Receiver<bool>, job: BoxFuture<'static, ()>) {
    tokio::select! {
        biased;
        () = stopped(&mut stopping) => {}
        () = job => {}
    }
}

/// Waits until the job has to end.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

fn every(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

async fn prune_repeatedly(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut ticks = every(limiter::PRUNE_EVERY);
    while next(&mut ticks, &mut stopping).await {
        prune(&state).await;
    }
}

/// Drops state in memory that is no longer needed. Runs on a thread of the blocking pool: with a million keys, the search
/// takes long enough to delay the requests on a thread of the runtime.
#[expect(
    clippy::disallowed_methods,
    reason = "one call at a time, which takes one thread of the pool"
)]
pub async fn prune(state: &AppState) {
    let state = state.clone();
    let prune = move || {
        state.auth_guard.prune();
        state.admin_guard.prune();
        state.login_attempts.prune();
        state.registrations.prune();
        state.keys.sweep();
        let keys = state.limiter.prune();
        state
            .metrics
            .limiter_keys
            .set(i64::try_from(keys).unwrap_or(i64::MAX));
    };
    // After a panic, the next call tries again.
    let _ = task::spawn_blocking(prune).await;
}

async fn write_last_used(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut ticks = every(LAST_USED_EVERY);
    loop {
        let continues = next(&mut ticks, &mut stopping).await;
        if let Err(error) = state.last_used.flush(&state.db).await {
            tracing::warn!(error = %db::chain(&error), "cannot save when keys were last used");
        }
        if !continues {
            return;
        }
    }
}
