//! Deletes expired rows, and clears expired secrets.
//!
//! Each batch is a short transaction. The size of a batch depends on how long the previous batch took, and may be as
//! small as a single row. The kinds of rows take turns, so that a kind whose rows are locked, or slow to delete, does
//! not block the other kinds.

use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::{every, next};
use crate::{
    db::{self, DbError},
    repo::sweep::{self, Expired},
    state::AppState,
};

const EVERY: Duration = Duration::from_mins(10);
/// The maximum number of rows in the first batch.
const FIRST: i64 = 500;
/// The maximum number of rows in any later batch.
const LARGEST: i64 = 5000;
/// If a batch takes more time than this, the next batch is smaller. This time is short enough for transactions that wait
/// for the batch's locks.
const LONG: Duration = Duration::from_millis(400);
/// How long one kind of row is swept before the next kind gets its turn.
const TURN: Duration = Duration::from_secs(1);
/// The pause between batches, which leaves room for other work.
const PAUSE: Duration = Duration::from_millis(5);
/// After this many consecutive failures, a kind of row is skipped until the next sweep.
const GIVE_UP: u32 = 8;

struct Sweep {
    kind: Expired,
    batch: i64,
    failures: u32,
    is_done: bool,
}

pub(super) async fn run(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut sweeps = Expired::ALL.map(|kind| Sweep {
        kind,
        batch: FIRST,
        failures: 0,
        is_done: false,
    });
    let mut ticks = every(EVERY);
    while next(&mut ticks, &mut stopping).await {
        for it in &mut sweeps {
            (it.failures, it.is_done) = (0, false);
        }
        while sweeps.iter().any(|it| !it.is_done) {
            for it in sweeps.iter_mut().filter(|it| !it.is_done) {
                it.take_turn(&state, &stopping).await;
            }
            if *stopping.borrow() {
                return;
            }
        }
    }
}

/// Returns the size of the next batch, given the size and duration of a batch and the statement timeout.
fn next_batch(batch: i64, took: Duration, statement_timeout: Duration) -> i64 {
    let long = LONG.min(statement_timeout / 2);
    if took < long / 4 {
        (batch * 2).min(LARGEST)
    } else if took > long {
        (batch / 2).max(1)
    } else {
        batch
    }
}

impl Sweep {
    async fn take_turn(&mut self, state: &AppState, stopping: &watch::Receiver<bool>) {
        let turn = Instant::now();
        while !self.is_done && turn.elapsed() < TURN && !*stopping.borrow() {
            let began = Instant::now();
            match state.db.within_limit(self.sweep_batch(state)).await {
                Ok(rows) => {
                    let count = u64::try_from(rows).unwrap_or(u64::MAX);
                    state.metrics.swept(self.kind.name(), count);
                    self.failures = 0;
                    self.is_done = i64::try_from(rows).unwrap_or(i64::MAX) < self.batch;
                    let limit = state.config.database.statement_timeout;
                    self.batch = next_batch(self.batch, began.elapsed(), limit);
                }
                Err(error) => {
                    state.metrics.sweep_errors.inc();
                    self.failures += 1;
                    self.batch = (self.batch / 4).max(1);
                    if self.failures >= GIVE_UP {
                        self.is_done = true;
                        tracing::warn!(
                            kind = self.kind.name(),
                            error = %db::chain(&error),
                            "cannot delete expired rows, retrying later"
                        );
                    }
                    // Let the other kinds of rows take their turns first.
                    return;
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn sweep_batch(&self, state: &AppState) -> Result<usize, DbError> {
        let mut tx = state.db.system().await?;
        let rows = sweep::batch(&mut tx, self.kind, self.batch).await?;
        tx.commit().await?;
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_stay_below_the_statement_timeout() {
        for limit in [100, 200, 400, 2000, 60_000].map(Duration::from_millis) {
            let mut batch = 1;
            for _ in 0..50 {
                // Each row takes a millisecond.
                let took = Duration::from_millis(batch.try_into().unwrap());
                assert!(took < limit, "a batch of {batch} with a limit of {limit:?}");
                batch = next_batch(batch, took, limit);
            }
            assert!(batch >= 16, "a batch of {batch} with a limit of {limit:?}");
        }
    }
}
