//! Ships usage, creates segments in advance, and measures PostgreSQL's clock.

use std::time::Duration;

use tokio::{sync::watch, time::timeout};

use super::{every, next, stopped};
use crate::{
    db,
    metering::{Metering, ShipError},
    state::AppState,
};

const PREPARE: Duration = Duration::from_millis(100);
const MEASURE: Duration = Duration::from_secs(10);
/// How long to wait after a failure to ship usage, and how often to ship the usage of stopped replicas.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a stopping server continues to ship usage, including the batch in flight. The remaining records are shipped
/// after the next start, or by a replica that adopts them.
const FINISH: Duration = Duration::from_secs(3);

pub(super) async fn ship(state: AppState, mut stopping: watch::Receiver<bool>) {
    let metering = &state.metering;
    let mut ticks = every(state.config.usage_ship_every);
    let mut outage = Outage::default();
    let mut in_flight = None;
    while next(&mut ticks, &mut stopping).await {
        let mut shipping = Box::pin(metering.ship());
        let shipped = tokio::select! {
            biased;
            shipped = &mut shipping => shipped,
            () = stopped(&mut stopping) => {
                in_flight = Some(shipping);
                break;
            }
        };
        if outage.note(&state, shipped) {
            let _ = timeout(PAUSE, stopped(&mut stopping)).await;
        }
    }
    let finished = async {
        // The remaining usage needs the connection of the batch in flight. If the batch were dropped, the connection
        // would stay busy.
        if let Some(shipping) = in_flight {
            shipping.await?;
        }
        metering.finish().await
    };
    match timeout(FINISH, finished).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(error = %db::chain(&error), "some usage has not been written to PostgreSQL yet; it will be written at the next startup");
        }
        Err(_) => tracing::warn!(
            "some usage has not been written to PostgreSQL yet; it will be written at the next startup"
        ),
    }
}

/// Ships the usage of stopped replicas. Runs separately from [`ship`], so that another replica's long backlog does not
/// delay this replica's records.
pub(super) async fn adopt(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut ticks = every(PAUSE);
    let mut outage = Outage::default();
    while next(&mut ticks, &mut stopping).await {
        let mut shipping = Box::pin(state.metering.ship_adopted());
        let shipped = tokio::select! {
            biased;
            shipped = &mut shipping => shipped,
            () = stopped(&mut stopping) => {
                state.metering.stop_adopting();
                let _ = timeout(FINISH, shipping).await;
                return;
            }
        };
        outage.note(&state, shipped);
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "one call at a time, which takes one thread of the pool"
)]
pub(super) async fn prepare(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut ticks = every(PREPARE);
    while next(&mut ticks, &mut stopping).await {
        if state.metering.wants_preparation() {
            let metering: Metering = state.metering.clone();
            let _ = tokio::task::spawn_blocking(move || metering.prepare()).await;
        }
    }
}

pub(super) async fn measure_time(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut ticks = every(MEASURE);
    while next(&mut ticks, &mut stopping).await {
        if let Err(error) = state.metering.measure_time(&state.db).await {
            tracing::debug!(error = %db::chain(&error), "cannot read PostgreSQL's clock");
        }
    }
}

/// Logs only the first of several consecutive failures.
#[derive(Default)]
struct Outage {
    is_open: bool,
}

impl Outage {
    /// Logs and counts a failure. Returns whether shipping failed.
    fn note(&mut self, state: &AppState, shipped: Result<u64, ShipError>) -> bool {
        match shipped {
            Ok(_) => {
                if std::mem::take(&mut self.is_open) {
                    tracing::info!("usage is being written to PostgreSQL again");
                }
                false
            }
            Err(error) => {
                state.metrics.usage_ship_errors.inc();
                if !std::mem::replace(&mut self.is_open, true) {
                    tracing::warn!(error = %db::chain(&error), "cannot write usage to PostgreSQL; the records are kept on disk");
                }
                true
            }
        }
    }
}
