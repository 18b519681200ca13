//! Remembers when service tokens were last used, and writes these times to PostgreSQL every few seconds. If metering is
//! off, does the same for API keys. Otherwise, a key's last use is written together with its usage.

use std::{collections::HashMap, sync::Arc};

use chrono::{DateTime, Utc};
use parking_lot::Mutex;
use quota_common::{ApiKeyId, ServiceTokenId};
use uuid::Uuid;

use crate::{
    clock::UnixNanos,
    db::{Db, DbError, SystemTx},
    repo::{api_key, service_token},
};

/// The number of maps. Several maps keep requests with different keys from waiting for each other.
const SHARDS: usize = 16;

/// The maximum number of rows per transaction.
const BATCH: usize = 1_000;

type Notes = [Mutex<HashMap<Uuid, UnixNanos>>; SHARDS];

/// Times of last use that have not been saved. Cloning is cheap.
#[derive(Debug, Clone, Default)]
pub struct LastUsed {
    keys: Arc<Notes>,
    tokens: Arc<Notes>,
}

impl LastUsed {
    pub fn key(&self, id: ApiKeyId, now: UnixNanos) {
        note(&self.keys, id.0, now);
    }

    pub fn service_token(&self, id: ServiceTokenId, now: UnixNanos) {
        note(&self.tokens, id.0, now);
    }

    /// Saves all times in batches, each in a short transaction. Keeps times that could not be saved.
    pub async fn flush(&self, db: &Db) -> Result<(), DbError> {
        let keys = flush(db, &self.keys, async |tx, used| {
            api_key::touch(tx, used).await
        })
        .await;
        let tokens = flush(db, &self.tokens, async |tx, used| {
            service_token::touch(tx, used).await
        })
        .await;
        keys.and(tokens)
    }
}

/// Saves times in batches. Stops at the first batch that fails, because the next batch would probably wait just as
/// long.
async fn flush(
    db: &Db,
    notes: &Notes,
    touch: impl AsyncFn(&mut SystemTx, &[(Uuid, DateTime<Utc>)]) -> Result<(), DbError>,
) -> Result<(), DbError> {
    let used = take(notes);
    for (index, batch) in used.chunks(BATCH).enumerate() {
        let written = db.within_limit(async {
            let mut tx = db.system().await?;
            touch(&mut tx, &rows(batch)).await?;
            tx.commit().await
        });
        if let Err(error) = written.await {
            for (id, at) in used.iter().skip(index * BATCH) {
                note(notes, *id, *at);
            }
            return Err(error);
        }
    }
    Ok(())
}

fn note(notes: &Notes, id: Uuid, now: UnixNanos) {
    let mut shard = notes[usize::from(id.as_bytes()[15]) % SHARDS].lock();
    let at = shard.entry(id).or_default();
    *at = now.max(*at);
}

/// Removes and returns all times, sorted by ID.
fn take(notes: &Notes) -> Vec<(Uuid, UnixNanos)> {
    let mut all = notes
        .iter()
        .flat_map(|shard| std::mem::take(&mut *shard.lock()))
        .collect::<Vec<_>>();
    all.sort_unstable();
    all
}

fn rows(notes: &[(Uuid, UnixNanos)]) -> Vec<(Uuid, DateTime<Utc>)> {
    let time =
        |at: UnixNanos| DateTime::from_timestamp_nanos(i64::try_from(at.0).unwrap_or(i64::MAX));
    notes.iter().map(|(id, at)| (*id, time(*at))).collect()
}
