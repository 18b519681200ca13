//! Counts the replicas in PostgreSQL, so that each knows its share of the limits while the shared counters are
//! unavailable.
//!
//! While PostgreSQL is unreachable, the limiter trusts the last count for a few seconds. After that, this replica has
//! no share.

use tokio::sync::watch;
use uuid::Uuid;

use super::{every, next};
use crate::{
    db::{self, Db, DbError, Lane},
    limiter::{self, ReplicaSlot},
    repo::{self, replica::Seen},
    state::AppState,
};

pub(super) async fn count(state: AppState, mut stopping: watch::Receiver<bool>) {
    let id = Uuid::now_v7();
    let db = state.db.on(Lane::Health);
    let mut ticks = every(limiter::COUNTED_EVERY);
    let mut is_failing = false;
    while next(&mut ticks, &mut stopping).await {
        let began = state.clock.monotonic();
        match db.within_limit(seen(&db, id)).await {
            Ok(Seen {
                rank,
                count,
                oldest_other,
            }) => {
                let ended = state.clock.monotonic();
                let slot = ReplicaSlot { rank, of: count };
                state.membership.note_oldest_other(oldest_other, began);
                state.membership.confirm_count(slot, began, ended);
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
    // During an outage, this replica's row is kept: its share may have admitted requests that the shared counters do
    // not know of, so replicas that start now must know that it existed.
    if state.metrics.counters_away.get() > 0 {
        return;
    }
    let left = async {
        let mut tx = db.system().await?;
        repo::replica::leave(&mut tx, id).await?;
        tx.commit().await
    };
    if let Err(error) = left.await {
        tracing::warn!(error = %db::chain(&error), "cannot deregister this replica; other replicas will count it for up to 10 s");
    }
}

async fn seen(db: &Db, id: Uuid) -> Result<Seen, DbError> {
    let mut tx = db.system().await?;
    let slot = repo::replica::seen(&mut tx, id, limiter::FORGOTTEN, limiter::REMEMBERED).await?;
    tx.commit().await?;
    Ok(slot)
}
