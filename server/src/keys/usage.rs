//! When keys and service tokens were last used: noted in memory, written every few seconds.

use std::{collections::HashMap, sync::Arc};

use chrono::{DateTime, Utc};
use parking_lot::Mutex;
use quota_common::{ApiKeyId, ServiceTokenId};
use uuid::Uuid;

use crate::{
    clock::UnixNanos,
    db::{Db, DbError},
    repo::{api_key, service_token},
};

/// How many maps the notes are spread over, so that requests of different keys do not wait for one another.
const SHARDS: usize = 16;

type Notes = [Mutex<HashMap<Uuid, UnixNanos>>; SHARDS];

/// Cheap to clone.
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

    /// Writes what was noted. What cannot be written is noted again.
    pub async fn flush(&self, db: &Db) -> Result<(), DbError> {
        let (keys, tokens) = (take(&self.keys), take(&self.tokens));
        if keys.is_empty() && tokens.is_empty() {
            return Ok(());
        }
        let written = async {
            let mut tx = db.system().await?;
            if !keys.is_empty() {
                api_key::touch(&mut tx, &rows(&keys)).await?;
            }
            if !tokens.is_empty() {
                service_token::touch(&mut tx, &rows(&tokens)).await?;
            }
            tx.commit().await
        };
        let written = db.within_limit(written).await;
        if written.is_err() {
            for (id, at) in keys {
                note(&self.keys, id, at);
            }
            for (id, at) in tokens {
                note(&self.tokens, id, at);
            }
        }
        written
    }
}

fn note(notes: &Notes, id: Uuid, now: UnixNanos) {
    let mut shard = notes[usize::from(id.as_bytes()[15]) % SHARDS].lock();
    let at = shard.entry(id).or_default();
    *at = now.max(*at);
}

/// In the order of ids, so that two replicas that write at once do not wait for each other in a circle.
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
