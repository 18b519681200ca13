//! Counts the server's replicas by their rows in PostgreSQL, so that each replica knows its share of the limits while
//! the shared counters are unavailable. The first count is made at startup, before the first call to the counters.
//!
//! While PostgreSQL is unreachable, the limiter trusts the last count for a few seconds. After that, this replica has
//! no share.

use tokio::sync::watch;

use super::{every, next};
use crate::{
    db::{self, Lane},
    limiter, repo,
    state::AppState,
};

pub(super) async fn count(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut ticks = every(limiter::COUNTED_EVERY);
    let mut is_failing = false;
    while next(&mut ticks, &mut stopping).await {
        match state.count_replicas().await {
            Ok(count) => {
                state
                    .metrics
                    .replicas
                    .set(i64::try_from(count.get()).unwrap_or(i64::MAX));
                is_failing = false;
            }
            Err(error) => {
                if !std::mem::replace(&mut is_failing, true) {
                    tracing::warn!(error = %db::chain(&error), "cannot count replicas");
                }
            }
        }
    }
    // If this replica stops during an outage, its row is kept, because its share may have allowed requests that the
    // shared counters do not know of. Replicas that start now must take that share into account.
    if state.metrics.counter_partitions_unavailable.get() > 0 {
        return;
    }
    let left = async {
        let mut tx = state.db.on(Lane::Health).system().await?;
        repo::replica::leave(&mut tx, state.replica_id).await?;
        tx.commit().await
    };
    if let Err(error) = left.await {
        tracing::warn!(error = %db::chain(&error), "cannot deregister this replica; other replicas will count it for up to 10 s");
    }
}
