//! Learning what other replicas have changed: by the poll, on which all relies, and by their messages, which are
//! only faster.

use std::{pin::pin, time::Duration};

use tokio::{sync::watch, time::timeout};

use super::{every, next};
use crate::{
    db::{self, Db, DbError, Lane},
    redis::Event,
    repo::revocation::{self, Revocation},
    revocations::Recent,
    state::AppState,
};

/// How long after one poll the next begins: less than the 250 ms within which a change is to be noticed, by what
/// the poll itself takes, on a busy machine too. Believed for five times as long.
const POLL: Duration = Duration::from_millis(150);

/// A poll without an answer for this long means that PostgreSQL may be unreachable. Polls take milliseconds; entries
/// are believed for 750 ms after one.
const SUSPECT_AFTER: Duration = Duration::from_millis(750);

/// Forgets from the caches what other replicas have changed. It is what makes the caches true for longer than
/// a second, so a poll that fails is no more than a warning: without it entries are loaded again.
pub(super) async fn poll(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut ticks = every(POLL);
    let db = state.db.on(Lane::Health);
    let mut last = None;
    let mut away = false;
    while next(&mut ticks, &mut stopping).await {
        let began = state.freshness.now();
        state.metrics.revocation_polls.inc();
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
                if std::mem::take(&mut away) {
                    tracing::info!("revocations are polled again");
                }
            }
            Err(error) => {
                suspect(&state);
                state.metrics.revocation_poll_errors.inc();
                if !std::mem::replace(&mut away, true) {
                    tracing::warn!(error = %db::chain(&error), "revocations cannot be polled");
                }
            }
        }
    }
}

/// Caches serve what they have from now on, without waiting for PostgreSQL.
fn suspect(state: &AppState) {
    if state.freshness.suspect() {
        state.metrics.database_suspected.inc();
    }
}

async fn poll_once(state: &AppState, db: &Db, last: &mut Option<i64>) -> Result<(), DbError> {
    let mut tx = db.system().await?;
    let Some(mut seq) = *last else {
        // What was loaded before this poll may be older than what it reads, if an earlier one failed; what others
        // cached is held against what is noted here.
        let newest = revocation::newest(&mut tx).await?;
        tx.commit().await?;
        state.recent.begin(&newest);
        state.forget(&newest);
        *last = Some(newest.last().map_or(0, |it| it.seq));
        return Ok(());
    };
    let highest = revocation::highest(&mut tx).await?;
    if highest < seq {
        let newest = revocation::newest(&mut tx).await?;
        tx.commit().await?;
        tracing::warn!(
            polled = seq,
            highest,
            "PostgreSQL was restored to an earlier state: everything cached is forgotten"
        );
        state.recent.restart(&newest);
        state.forget_all();
        *last = Some(newest.last().map_or(0, |it| it.seq));
        return Ok(());
    }
    loop {
        let batch = revocation::since(&mut tx, seq).await?;
        apply(state, &batch, Recent::polled);
        if let Some(newest) = batch.last() {
            seq = newest.seq;
            *last = Some(seq);
        }
        if batch.len() < usize::from(revocation::BATCH) {
            return tx.commit().await;
        }
    }
}

/// Noted first, then forgotten: a load that begins in between knows what was changed.
fn apply(state: &AppState, revocations: &[Revocation], note: fn(&Recent, &Revocation) -> bool) {
    if revocations.is_empty() {
        return;
    }
    let now = state.clock.now();
    for it in revocations {
        if note(&state.recent, it) {
            let at = it.at.timestamp_nanos_opt().unwrap_or_default();
            let lag = now.0.saturating_sub(u64::try_from(at).unwrap_or_default());
            state.metrics.revocation_lag_seconds.observe(lag);
        }
    }
    state.forget(revocations);
}

/// A message that says nothing new does nothing: it may be one that somebody sends again and again.
fn apply_announced(state: &AppState, revocation: &Revocation) {
    if state.recent.announced(revocation) {
        apply(state, std::slice::from_ref(revocation), |_, _| true);
    }
}

/// Takes the others' messages as they come.
pub(super) async fn listen(state: AppState, mut stopping: watch::Receiver<bool>) {
    let Some(mut messages) = state.announcer.listen() else {
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
            Event::Subscribed => tracing::debug!("revocations are told"),
            Event::Lost => {
                state.metrics.revocation_messages_lost.inc();
            }
            Event::Message(message) => {
                if let Some(revocation) = state.announcer.read(&message, state.clock.now()) {
                    state.metrics.revocations_received.inc();
                    apply_announced(&state, &revocation);
                } else {
                    state.metrics.revocations_unreadable.inc();
                }
            }
        }
    }
}
