//! Looks up secrets in PostgreSQL by their hash. Lookups are batched, limited, and fair.
//!
//! Anyone can invent keys with a valid checksum, and each of these keys requires a lookup. Therefore, lookups have
//! their own database connections. Keys and tokens in this replica's cache are *known*. Lookups of unknown keys and
//! tokens leave at least one of these connections for reloading known ones. Lookups of tokens use at most two
//! connections, and lookups of unknown tokens at most one. Lookups that arrive while all connections are busy share the
//! next statement, so a few connections are enough for thousands of lookups per second.
//!
//! The number of concurrent lookups of unknown secrets is limited. Beyond the limit, each caller still gets an equal
//! share, and callers take turns in every batch. Therefore, a flood mostly affects the caller that causes the flood.
//! Lookups of keys and lookups of service tokens are counted and batched separately, and take turns using the
//! connections for unknown secrets.

mod queue;

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use parking_lot::Mutex;
use quota_common::{ServiceTokenId, TenantId};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::timeout,
};

use crate::{
    cache::{Freshness, Unconfirmed},
    config::Config,
    db::{self, Db, DbError, Lane},
    repo::{api_key, api_key::KeyFacts, service_token},
    secret_text::Hash,
    spans,
    telemetry::metrics::Metrics,
};

pub use self::queue::LookupCaller;
use self::queue::{Queue, Waiting};

/// The maximum number of lookups per statement.
const BATCH: usize = 200;

/// Batched lookups of API keys and service tokens. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Lookups {
    /// Lookups of keys. The result contains the key's data and the number of the newest invalidation at the time
    /// when the data was read.
    pub keys: Batches<(KeyFacts, i64)>,
    pub tokens: Batches<(TenantId, ServiceTokenId)>,
}

impl Lookups {
    pub fn new(
        db: &Db,
        config: &Config,
        freshness: &Arc<Freshness>,
        metrics: &Arc<Metrics>,
    ) -> Self {
        let db = db.on(Lane::Lookups);
        let connections = db.lanes().lookups;
        let for_unknown = Arc::new(Semaphore::new(for_unknown(connections)));
        let settings = |workers| Settings {
            limit: config.key_lookups,
            wait: config.database.wait,
            workers,
            for_unknown: for_unknown.clone(),
            freshness: freshness.clone(),
            metrics: metrics.clone(),
        };
        let (for_keys, for_tokens) = (db.clone(), db);
        Self {
            keys: Batches::new(settings(connections), move |hashes| {
                keys(for_keys.clone(), hashes).boxed()
            }),
            // Two connections are enough, because there are few tokens, and they are rarely looked up.
            tokens: Batches::new(settings(2), move |hashes| {
                tokens(for_tokens.clone(), hashes).boxed()
            }),
        }
    }
}

type Answers<V> = HashMap<Vec<u8>, V>;

async fn keys(db: Db, hashes: Vec<Hash>) -> Result<Answers<(KeyFacts, i64)>, DbError> {
    let query = async {
        let mut tx = db.system().await?;
        let found = api_key::facts(&mut tx, &slices(&hashes)).await?;
        tx.commit().await?;
        Ok(found)
    };
    let found = db.within_limit(query).await?.into_iter();
    Ok(found.map(|it| (it.hash, (it.facts, it.as_of))).collect())
}

async fn tokens(db: Db, hashes: Vec<Hash>) -> Result<Answers<(TenantId, ServiceTokenId)>, DbError> {
    let query = async {
        let mut tx = db.system().await?;
        let found = service_token::owners(&mut tx, &slices(&hashes)).await?;
        tx.commit().await?;
        Ok(found)
    };
    let found = db.within_limit(query).await?.into_iter();
    Ok(found
        .map(|(hash, tenant, id)| (hash, (tenant.into(), id.into())))
        .collect())
}

fn slices(hashes: &[Hash]) -> Vec<&[u8]> {
    hashes.iter().map(Hash::as_slice).collect()
}

struct Settings {
    /// The number of concurrent lookups of unknown secrets beyond which each caller is limited to its share. At most
    /// twice this number are permitted in total.
    limit: usize,
    /// How long a lookup waits for its batch to start.
    wait: Duration,
    /// The maximum number of concurrent batches. All but one of these batches may contain unknown secrets. If the
    /// maximum is one, that batch may contain them.
    workers: usize,
    /// The database connections that unknown secrets of all kinds may use. Workers get them in the order in which they
    /// request them.
    for_unknown: Arc<Semaphore>,
    freshness: Arc<Freshness>,
    metrics: Arc<Metrics>,
}

/// Returns how many of `connections` may be used for unknown secrets.
fn for_unknown(connections: usize) -> usize {
    connections.saturating_sub(1).max(1)
}

type Query<V> = dyn Fn(Vec<Hash>) -> BoxFuture<'static, Result<Answers<V>, DbError>> + Send + Sync;

/// Lookups of one kind of secret.
pub struct Batches<V>(Arc<BatchState<V>>);

impl<V> Clone for Batches<V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<V> std::fmt::Debug for Batches<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batches").finish_non_exhaustive()
    }
}

struct BatchState<V> {
    settings: Settings,
    query: Box<Query<V>>,
    queue: Mutex<Queue<V>>,
}

/// A permitted lookup. If the secret is not known, the lookup counts toward the limits until it is dropped.
pub struct Lookup<V> {
    batches: Batches<V>,
    /// `None` if the secret is known.
    caller: Option<LookupCaller>,
}

impl<V> Drop for Lookup<V> {
    fn drop(&mut self) {
        let Some(caller) = self.caller else {
            return;
        };
        let mut queue = self.batches.0.queue.lock();
        queue.started_total -= 1;
        if let Some(n) = queue.started.get_mut(&caller) {
            *n -= 1;
            if *n == 0 {
                queue.started.remove(&caller);
            }
        }
    }
}

impl<V: Send + 'static> Batches<V> {
    fn new(
        settings: Settings,
        query: impl Fn(Vec<Hash>) -> BoxFuture<'static, Result<Answers<V>, DbError>>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        Self(Arc::new(BatchState {
            settings,
            query: Box::new(query),
            queue: Mutex::default(),
        }))
    }

    /// Starts a lookup, or rejects it because too many are in progress. `caller` is `None` if the secret is cached on
    /// this replica.
    pub fn begin(&self, caller: Option<LookupCaller>) -> Result<Lookup<V>, Unconfirmed> {
        if let Some(caller) = caller {
            let limit = self.0.settings.limit;
            let mut queue = self.0.queue.lock();
            let own = queue.started.get(&caller).copied().unwrap_or(0);
            let callers = queue.started.len() + usize::from(own == 0);
            let is_within_share = own < (limit / callers).max(1);
            // The lookups of all callers can exceed the limit: each share is at least one lookup, and earlier callers
            // may hold more than their current share. Therefore, the total is limited too.
            let is_allowed = queue.started_total < limit
                || (is_within_share && queue.started_total < limit.saturating_mul(2));
            if !is_allowed {
                drop(queue);
                return Err(self.refused());
            }
            queue.started_total += 1;
            *queue.started.entry(caller).or_default() += 1;
        }
        Ok(Lookup {
            batches: self.clone(),
            caller,
        })
    }

    fn refused(&self) -> Unconfirmed {
        self.0.settings.metrics.lookups_rejected.inc();
        Unconfirmed::TooMany
    }

    fn failed(&self, error: &DbError) -> Unconfirmed {
        let it = &self.0.settings;
        match error {
            DbError::Unavailable(_) => {
                if it.freshness.suspect() {
                    it.metrics.database_suspected.inc();
                }
            }
            error => tracing::error!(error = %db::chain(error), "cannot look up keys or tokens"),
        }
        Unconfirmed::Failed(db::chain(error).into())
    }

    fn enqueue(
        &self,
        caller: Option<LookupCaller>,
        hash: Hash,
        answer: oneshot::Sender<Result<Option<V>, Unconfirmed>>,
    ) -> u64 {
        let mut queue = self.0.queue.lock();
        let id = queue.next_id;
        queue.next_id += 1;
        let waiting = Waiting {
            id,
            hash,
            answer,
            span: spans::current(),
        };
        queue.push(caller, waiting);
        let is_missing = queue.workers < self.0.settings.workers
            && (caller.is_none() || (!queue.is_waiting && self.may_take_unknown(&queue)));
        queue.workers += usize::from(is_missing);
        drop(queue);
        if is_missing {
            tokio::spawn(work(Worker {
                batches: self.clone(),
                slot: None,
                has_ended: false,
            }));
        }
        id
    }

    fn may_take_unknown(&self, queue: &Queue<V>) -> bool {
        queue.on_unknown < for_unknown(self.0.settings.workers)
    }
}

impl<V: Send + 'static> Lookup<V> {
    /// Waits for a batch for up to `QUOTA_DATABASE_WAIT`, and then for the result.
    pub async fn find(&self, hash: Hash) -> Result<Option<V>, Unconfirmed> {
        let it = &self.batches;
        let (sender, mut answer) = oneshot::channel();
        let id = it.enqueue(self.caller, hash, sender);
        let answered = match timeout(it.0.settings.wait, &mut answer).await {
            Ok(answered) => answered,
            Err(_) if it.0.queue.lock().remove(self.caller, id) => {
                return Err(if self.caller.is_some() {
                    it.refused()
                } else {
                    it.failed(&DbError::Unavailable(
                        "no connection became available".into(),
                    ))
                });
            }
            // The batch is in progress and has its own deadline.
            Err(_) => answer.await,
        };
        answered.unwrap_or_else(|_| Err(Unconfirmed::Failed("the lookup was canceled".into())))
    }
}

struct Worker<V: Send + 'static> {
    batches: Batches<V>,
    /// The permit to use a connection for unknown secrets, if the worker has waited for one.
    slot: Option<OwnedSemaphorePermit>,
    has_ended: bool,
}

impl<V: Send + 'static> Drop for Worker<V> {
    fn drop(&mut self) {
        if !self.has_ended {
            self.batches.0.queue.lock().workers -= 1;
        }
    }
}

enum Step<V: Send + 'static> {
    Run(Batch<V>),
    /// Only unknown secrets are left, and they have to wait for a connection.
    Wait,
    End,
}

impl<V: Send + 'static> Worker<V> {
    /// Returns the next batch, with known secrets first. If there is nothing to look up now, ends the worker.
    fn next(&mut self) -> Step<V> {
        let batches = self.batches.clone();
        let mut queue = batches.0.queue.lock();
        let known = queue.known.len().min(BATCH);
        let mut list = queue.known.drain(..known).collect::<Vec<_>>();
        let mut slot = self.slot.take();
        let mut has_unknown = false;
        if list.len() < BATCH && !queue.turns.is_empty() && batches.may_take_unknown(&queue) {
            slot = slot.or_else(|| {
                batches
                    .0
                    .settings
                    .for_unknown
                    .clone()
                    .try_acquire_owned()
                    .ok()
            });
            while slot.is_some()
                && list.len() < BATCH
                && let Some(next) = queue.next_unknown()
            {
                list.push(next);
                has_unknown = true;
            }
        }
        if list.is_empty() {
            // The worker must end while the lock is held, so that the next lookup starts a new worker.
            queue.workers -= 1;
            self.has_ended = true;
            if queue.turns.is_empty() || queue.is_waiting || !batches.may_take_unknown(&queue) {
                return Step::End;
            }
            queue.is_waiting = true;
            return Step::Wait;
        }
        queue.on_unknown += usize::from(has_unknown);
        drop(queue);
        Step::Run(Batch {
            batches,
            list,
            slot: slot.filter(|_| has_unknown),
        })
    }

    /// Waits for a connection for unknown secrets. While the worker waits, it does not count toward the maximum number
    /// of workers, so that known secrets can still be looked up. Returns `None` if there are enough other workers now.
    async fn wait(batches: Batches<V>) -> Option<Self> {
        let slot = batches.0.settings.for_unknown.clone().acquire_owned().await;
        let mut queue = batches.0.queue.lock();
        queue.is_waiting = false;
        if queue.workers == batches.0.settings.workers {
            return None;
        }
        queue.workers += 1;
        drop(queue);
        Some(Self {
            batches,
            slot: slot.ok(),
            has_ended: false,
        })
    }
}

/// The lookups of one statement. If the batch is dropped because of a panic or together with the runtime, its lookups
/// fail.
struct Batch<V: Send + 'static> {
    batches: Batches<V>,
    list: Vec<Waiting<V>>,
    /// The permit to use a connection for unknown secrets, if the batch contains any.
    slot: Option<OwnedSemaphorePermit>,
}

impl<V: Send + 'static> Batch<V> {
    async fn run(mut self) {
        let hashes = self.list.iter().map(|it| it.hash).collect();
        // A statement can belong to only one trace, so the first traced lookup in the batch is used.
        let span = self.list.iter().find_map(|it| it.span.clone());
        let answers = spans::within(span, (self.batches.0.query)(hashes)).await;
        let mut answers = answers.map_err(|error| self.batches.failed(&error));
        for waiting in self.list.drain(..) {
            let answer = match &mut answers {
                Ok(found) => Ok(found.remove(waiting.hash.as_slice())),
                Err(error) => Err(error.clone()),
            };
            // The caller may have been dropped.
            let _ = waiting.answer.send(answer);
        }
    }
}

impl<V: Send + 'static> Drop for Batch<V> {
    fn drop(&mut self) {
        if self.slot.is_some() {
            self.batches.0.queue.lock().on_unknown -= 1;
        }
    }
}

async fn work<V: Send + 'static>(mut worker: Worker<V>) {
    loop {
        match worker.next() {
            Step::Run(batch) => batch.run().await,
            Step::Wait => match Worker::wait(worker.batches.clone()).await {
                Some(next) => worker = next,
                None => return,
            },
            Step::End => return,
        }
    }
}

#[cfg(test)]
impl<V: Send + 'static> Batches<V> {
    /// Creates lookups that find secrets with a function instead of a database.
    pub(super) fn of(find: impl Fn(&Hash) -> Option<V> + Send + Sync + 'static) -> Self {
        let clock = Arc::new(crate::clock::SystemClock::new());
        let settings = Settings {
            limit: 1000,
            wait: Duration::from_secs(5),
            workers: 2,
            for_unknown: Arc::new(Semaphore::new(1)),
            freshness: Arc::new(Freshness::new(clock)),
            metrics: Arc::default(),
        };
        Self::new(settings, move |hashes: Vec<Hash>| {
            let found = hashes
                .iter()
                .filter_map(|it| Some((it.to_vec(), find(it)?)));
            let found = found.collect();
            async move { Ok(found) }.boxed()
        })
    }
}

#[cfg(test)]
mod tests;
