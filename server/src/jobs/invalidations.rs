//! Finds out about other replicas' changes in two ways: by polling PostgreSQL, which finds every change, and from
//! messages, which arrive earlier but may be lost.

use std::{pin::pin, time::Duration};

use tokio::{sync::watch, time::timeout};

use super::{every, next};
use crate::{
    clock::UnixNanos,
    db::{self, Db, DbError, Lane},
    invalidations::Recent,
    redis::Event,
    repo::invalidation::{self, Invalidation, Position},
    state::AppState,
};

/// The time between polls. A change must be noticed within 250 ms, including the duration of the poll on a busy
/// machine.
const POLL_EVERY: Duration = Duration::from_millis(150);

/// If a poll takes this long, PostgreSQL is suspected to be unreachable. A poll normally takes milliseconds. Each
/// successful poll confirms the cache entries for 750 ms.
const SUSPECT_AFTER: Duration = Duration::from_millis(750);

/// Polls for changes, and drops the cache entries that the changes invalidate. A failed poll does not make the caches
/// incorrect: without a recent poll, an entry is valid only for a second after it was loaded.
pub(super) async fn poll(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut ticks = every(POLL_EVERY);
    let db = state.db.on(Lane::Health);
    let mut last = None;
    let mut is_reported = false;
    while next(&mut ticks, &mut stopping).await {
        let began = state.freshness.now();
        state.metrics.invalidation_polls.inc();
        let polled = {
            let mut polled = pin!(db.within_limit(poll_once(&state, &db, &mut last)));
            match timeout(SUSPECT_AFTER, &mut polled).await {
                Ok(polled) => polled,
                Err(_) => {
                    suspect(&state);
                    polled.await
                }
            }
        };
        match polled {
            Ok(()) => {
                state.freshness.polled(began);
                if std::mem::take(&mut is_reported) {
                    tracing::info!("polling for invalidations succeeds again");
                }
            }
            Err(error) => {
                suspect(&state);
                state.metrics.invalidation_poll_errors.inc();
                if !std::mem::replace(&mut is_reported, true) {
                    tracing::warn!(error = %db::chain(&error), "cannot poll for invalidations");
                }
            }
        }
    }
}

/// Lets caches use their entries without waiting for PostgreSQL.
fn suspect(state: &AppState) {
    if state.freshness.suspect() {
        state.metrics.database_suspected.inc();
    }
}

async fn poll_once(state: &AppState, db: &Db, last: &mut Option<Position>) -> Result<(), DbError> {
    let mut tx = db.system().await?;
    // The position is read before the rows, so that the next poll notices a restore that happens between the two reads.
    let position = invalidation::position(&mut tx).await?;
    let Some(polled) = last else {
        // Earlier polls may have failed, so cached entries may be older than the changes that this poll reads. Drop the
        // entries that these changes invalidate. Records that other replicas have cached in Redis are compared with the
        // changes in `state.recent`.
        let newest = invalidation::newest(&mut tx).await?;
        tx.commit().await?;
        state.recent.begin(&newest, &position.history);
        state.forget(&newest);
        *last = Some(up_to(&newest, position));
        return Ok(());
    };
    if position.highest < polled.highest || position.history != polled.history {
        let newest = invalidation::newest(&mut tx).await?;
        tx.commit().await?;
        tracing::warn!(
            polled = polled.highest,
            highest = position.highest,
            "PostgreSQL was restored or has failed over; all caches were cleared"
        );
        state.recent.restart(&newest, &position.history);
        state.forget_all();
        *last = Some(up_to(&newest, position));
        return Ok(());
    }
    loop {
        let batch = invalidation::since(&mut tx, polled.highest).await?;
        apply(state, &batch, Recent::polled);
        if let Some(newest) = batch.last() {
            polled.highest = newest.seq;
        }
        if batch.len() < usize::from(invalidation::BATCH) {
            return tx.commit().await;
        }
    }
}

/// Returns the position after the changes in `newest`.
fn up_to(newest: &[Invalidation], position: Position) -> Position {
    Position {
        highest: newest.last().map_or(0, |it| it.seq),
        ..position
    }
}

/// Applies changes. Records the changes before dropping cache entries, so that a load that starts between the two steps
/// takes the changes into account.
fn apply(
    state: &AppState,
    invalidations: &[Invalidation],
    note: fn(&Recent, &Invalidation) -> bool,
) {
    if invalidations.is_empty() {
        return;
    }
    let now = state.clock.now();
    for it in invalidations {
        if note(&state.recent, it) {
            let at = it.at.timestamp_nanos_opt().unwrap_or_default();
            let at = UnixNanos(u64::try_from(at).unwrap_or_default());
            let lag = now.saturating_since(at);
            state.metrics.invalidation_lag_seconds.observe(lag);
        }
    }
    state.forget(invalidations);
}

/// Applies a message from another replica. Ignores a message without a new change, because the message may be a replay.
fn apply_announced(state: &AppState, invalidation: &Invalidation) {
    if state.recent.announced(invalidation) {
        apply(state, std::slice::from_ref(invalidation), |_, _| true);
    }
}

/// Applies messages from other replicas as they arrive.
pub(super) async fn listen(state: AppState, mut stopping: watch::Receiver<bool>) {
    let Some(mut messages) = state.publisher.listen() else {
        return;
    };
    let stopped = async {
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    let mut stopped = std::pin::pin!(stopped);
    loop {
        let event = tokio::select! {
            biased;
            () = &mut stopped => return,
            event = messages.next() => event,
        };
        match event {
            Event::Subscribed => tracing::debug!("subscribed to invalidations"),
            Event::Lost => {
                state.metrics.invalidation_messages_lost.inc();
            }
            Event::Message(message) => {
                if let Some(invalidation) = state.publisher.read(&message, state.clock.now()) {
                    state.metrics.invalidations_received.inc();
                    apply_announced(&state, &invalidation);
                } else {
                    state.metrics.invalidations_unreadable.inc();
                }
            }
        }
    }
}
