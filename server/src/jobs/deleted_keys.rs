//! Deletes the limiter state of deleted keys. Without this job, a bucket would remain until it is full, which may take
//! weeks. A tenant could then fill Redis's memory by creating, using and deleting keys.
//!
//! Every replica runs this job, because each has its own limiter state.

use std::time::Duration;

use quota_common::{ApiKeyId, TenantId};
use tokio::sync::watch;

use super::{every, next};
use crate::{
    db::{self, DbError},
    limiter::CounterError,
    repo::invalidation::{self, DeletedKeys},
    state::AppState,
};

const EVERY: Duration = Duration::from_secs(5);
/// The pause between batches, which leaves room for other work.
const PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
enum DeleteError {
    #[error("{}", db::chain(.0))]
    Database(#[from] DbError),
    #[error("{0}")]
    Counters(CounterError),
}

pub(super) async fn delete_limits(state: AppState, mut stopping: watch::Receiver<bool>) {
    // After a key has been deleted, requests in progress and replicas that cannot reach PostgreSQL may still use the
    // key for this long, and create a new bucket for it.
    let age = state.config.stale_grace + state.config.request_timeout;
    let mut ticks = every(EVERY);
    // Invalidations are kept for a day, so a replica that has just started repeats at most one day's deletions.
    let mut last = 0;
    let mut is_failing = false;
    while next(&mut ticks, &mut stopping).await {
        loop {
            match delete_batch(&state, &mut last, age).await {
                Ok(has_more) => {
                    is_failing = false;
                    if !has_more || *stopping.borrow() {
                        break;
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut is_failing, true) {
                        tracing::warn!(error = %error, "cannot delete the limits of deleted keys, retrying");
                    }
                    break;
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Deletes the limiter state of one batch of deleted keys. Returns whether there may be more to delete. After an error,
/// the next call searches the same rows again.
async fn delete_batch(
    state: &AppState,
    last: &mut i64,
    age: Duration,
) -> Result<bool, DeleteError> {
    let search = async {
        let mut tx = state.db.system().await?;
        // The highest position is lower than `last` if PostgreSQL was restored from a backup.
        let highest = invalidation::position(&mut tx).await?.highest;
        let found = invalidation::deleted_keys(&mut tx, (*last).min(highest), age).await?;
        tx.commit().await?;
        Ok::<_, DbError>(found)
    };
    let DeletedKeys {
        keys,
        last: searched,
        has_more,
    } = state.db.within_limit(search).await?;
    let keys: Vec<_> = keys
        .into_iter()
        .map(|(tenant, key)| (TenantId(tenant), ApiKeyId(key)))
        .collect();
    let deleted = state.limiter.delete(&keys).await;
    deleted.map_err(DeleteError::Counters)?;
    *last = searched;
    Ok(has_more)
}
