//! A cache of PostgreSQL rows that tracks how long each entry is valid.
//!
//! Each poll for invalidations invalidates the entries of all rows that have changed since the previous poll.
//! Therefore, an entry is valid while the last poll is recent. Without a recent poll, an entry is valid for a second
//! after it was loaded, and is then reloaded. While PostgreSQL is unavailable, an entry is still used for a grace
//! period after it was last confirmed. After that, lookups fail, because the entry cannot be confirmed.
//!
//! When a load or a poll fails, PostgreSQL is suspected to be unreachable, for all caches. Until PostgreSQL responds
//! again, entries within their grace period are used without waiting, and only a few at a time are reloaded in the
//! background. Therefore, an outage delays only the first few requests, not the first request for each key.
//!
//! A changed entry is not removed. Its row is never used again, but the entry shows that its key exists. Lookups of
//! keys without an entry leave at least one database connection free for reloading entries. [`Changes`] determines
//! which entries have changed.
//!
//! A load may also return a row that another replica has read, with the time at which the row was known to be current.
//!
//! Loads are single-flight: concurrent requests for the same key share one query. The absence of a row is cached as
//! well, in a separate cache of limited size, so that a flood of guesses neither repeats queries nor evicts entries in
//! use.

mod changes;
mod freshness;

use std::{
    collections::HashMap,
    fmt::Debug,
    hash::Hash,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::sync::Semaphore;

pub use self::{
    changes::{Changes, Owner},
    freshness::Freshness,
};
use crate::{
    clock::{Monotonic, Nanos},
    telemetry::metrics::Metrics,
};

/// The maximum number of concurrent background loads per cache while PostgreSQL is suspected to be unreachable.
const BACKGROUND_LOADS: usize = 4;

/// A row that can be cached.
pub trait CachedRow: Send + Sync + 'static {
    /// Returns whether `changes` contains a change to this row in a later generation than `loaded_in`, the generation
    /// in which the row was loaded.
    fn has_changed(&self, changes: &Changes, loaded_in: u64) -> bool;
}

/// Why a load failed. All callers that waited for the load receive the error.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Unconfirmed {
    #[error("cannot be confirmed: {0}")]
    Failed(Arc<str>),
    /// Too many loads are in progress.
    #[error("too many lookups are in progress")]
    TooMany,
}

/// The result of a load.
#[derive(Debug)]
pub struct Loaded<T> {
    pub value: Option<T>,
    /// Monotonic time at which the value was known to be current. `None` means the time at which the load began.
    pub current_at: Option<Monotonic>,
}

impl<T> From<Option<T>> for Loaded<T> {
    fn from(value: Option<T>) -> Self {
        Self {
            value,
            current_at: None,
        }
    }
}

type Load<T> = BoxFuture<'static, Result<Option<Arc<T>>, Unconfirmed>>;
type Loading<T> = Shared<Load<T>>;

/// A load in progress, shared by the callers that need the same key. The callers and a separate task keep the load
/// running. The load is canceled when the callers and the task are all gone, for example when the runtime ends.
struct InProgress<T> {
    id: u64,
    loading: WeakShared<Load<T>>,
}

/// Removes a load from the loads in progress when the load ends, for whatever reason.
struct LoadGuard<K: Hash + Eq, T> {
    inner: Arc<CacheState<K, T>>,
    key: K,
    id: u64,
}

impl<K: Hash + Eq, T> Drop for LoadGuard<K, T> {
    fn drop(&mut self) {
        let mut all = self.inner.loading.lock();
        if all.get(&self.key).is_some_and(|it| it.id == self.id) {
            all.remove(&self.key);
        }
    }
}

struct Entry<T> {
    /// `None` if the row has changed and must be loaded before use.
    value: Option<Arc<T>>,
    loaded_at: Monotonic,
    /// The generation in which the load began.
    loaded_in: u64,
}

impl<T> Clone for Entry<T> {
    fn clone(&self) -> Self {
        Self {
            value: self.value.clone(),
            loaded_at: self.loaded_at,
            loaded_in: self.loaded_in,
        }
    }
}

impl<T: CachedRow> Entry<T> {
    /// Returns the row, unless it has changed since it was loaded.
    #[inline]
    fn unchanged(self, changes: &Changes) -> Option<Arc<T>> {
        self.value
            .filter(|row| !row.has_changed(changes, self.loaded_in))
    }
}

/// A cache of PostgreSQL rows. See the module documentation.
pub struct Cached<K, T> {
    inner: Arc<CacheState<K, T>>,
}

impl<K, T> Clone for Cached<K, T> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
        }
    }
}

impl<K, T> Debug for Cached<K, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cached").finish_non_exhaustive()
    }
}

struct CacheState<K, T> {
    present: Cache<K, Entry<T>>,
    absent: Cache<K, Monotonic>,
    loading: Mutex<HashMap<K, InProgress<T>>>,
    next_load: AtomicU64,
    freshness: Arc<Freshness>,
    metrics: Arc<Metrics>,
    grace: Nanos,
    background: Arc<Semaphore>,
    /// The value of [`Freshness::recorded`] at the last sweep.
    swept: AtomicU64,
}

impl<K, T> Cached<K, T>
where
    K: Hash + Eq + Copy + Send + Sync + 'static,
    T: CachedRow,
{
    pub fn new(
        capacity: usize,
        grace: Duration,
        freshness: Arc<Freshness>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            inner: Arc::new(CacheState {
                present: Cache::new(capacity),
                absent: Cache::new((capacity / 4).max(100)),
                loading: Mutex::default(),
                next_load: AtomicU64::new(0),
                freshness,
                metrics,
                grace: grace.into(),
                background: Arc::new(Semaphore::new(BACKGROUND_LOADS)),
                swept: AtomicU64::new(0),
            }),
        }
    }

    /// Returns a key's valid entry, if there is one. `Some(None)` means that the row is known not to exist. Does not
    /// wait.
    pub fn peek(&self, key: &K) -> Option<Option<Arc<T>>> {
        self.peek_at(key, self.inner.freshness.now())
    }

    /// Works like [`peek`](Self::peek), for a caller that has just read the monotonic clock.
    pub fn peek_at(&self, key: &K, now: Monotonic) -> Option<Option<Arc<T>>> {
        let inner = &*self.inner;
        if let Some(entry) = inner.present.get(key)
            && inner.freshness.is_valid(entry.loaded_at, now)
            && let Some(value) = entry.unchanged(inner.freshness.changes())
        {
            inner.metrics.key_cache_hits.inc();
            return Some(Some(value));
        }
        if let Some(loaded_at) = inner.absent.get(key)
            && inner.freshness.is_valid(loaded_at, now)
        {
            inner.metrics.key_cache_negative_hits.inc();
            return Some(None);
        }
        None
    }

    /// Returns a key's valid entry, or loads the entry with `load`. While PostgreSQL is suspected to be unreachable,
    /// and after a load has failed, returns the key's entry instead if the entry is within its grace period.
    pub async fn get<F, Fut, L>(&self, key: K, load: F) -> Result<Option<Arc<T>>, Unconfirmed>
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<L, Unconfirmed>> + Send + 'static,
        L: Into<Loaded<T>> + Send + 'static,
    {
        if let Some(known) = self.peek(&key) {
            return Ok(known);
        }
        let inner = &*self.inner;
        if inner.freshness.is_suspect()
            && let Some(value) = self.within_grace(&key)
        {
            if let Ok(permit) = inner.background.clone().try_acquire_owned() {
                let loading = self.loading(key, load);
                tokio::spawn(async move {
                    let _ = loading.await;
                    drop(permit);
                });
            }
            return Ok(Some(value));
        }
        let loading = self.loading(key, load);
        if !self.holds(&key) {
            return loading.await;
        }
        tokio::select! {
            biased;
            loaded = loading.clone() => return loaded,
            () = inner.freshness.suspected() => {}
        }
        // The entry is read again, since it may have changed during the wait.
        match self.within_grace(&key) {
            Some(value) => Ok(Some(value)),
            None => loading.await,
        }
    }

    /// Joins the load of this key that is in progress, or starts one.
    fn loading<F, Fut, L>(&self, key: K, load: F) -> Loading<T>
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<L, Unconfirmed>> + Send + 'static,
        L: Into<Loaded<T>> + Send + 'static,
    {
        let mut all = self.inner.loading.lock();
        if let Some(loading) = all.get(&key).and_then(|it| it.loading.upgrade()) {
            return loading;
        }
        let id = self.inner.next_load.fetch_add(1, Ordering::Relaxed);
        let guard = LoadGuard {
            inner: self.inner.clone(),
            key,
            id,
        };
        // A panic would poison the shared future without waking its waiters.
        let loading = AssertUnwindSafe(self.clone().load(guard, load))
            .catch_unwind()
            .map(|loaded| loaded.unwrap_or_else(|_| Err(Unconfirmed::Failed("a panic".into()))))
            .boxed()
            .shared();
        if let Some(loading) = loading.downgrade() {
            all.insert(key, InProgress { id, loading });
        }
        drop(all);
        // The load runs in a separate task, so that it completes even if its callers are dropped.
        tokio::spawn(loading.clone());
        loading
    }

    /// Returns whether the cache has an entry for the key, including an entry that is no longer valid or has been
    /// emptied.
    pub fn holds(&self, key: &K) -> bool {
        self.inner.present.contains_key(key)
    }

    /// Returns a key's entry if it may still be used without confirmation.
    fn within_grace(&self, key: &K) -> Option<Arc<T>> {
        let inner = &*self.inner;
        let entry = inner.present.get(key)?;
        let confirmed_at = inner.freshness.confirmed_at(entry.loaded_at);
        let value = entry.unchanged(inner.freshness.changes())?;
        if inner.freshness.now().saturating_since(confirmed_at) > inner.grace {
            return None;
        }
        inner.metrics.key_stale_served.inc();
        Some(value)
    }

    async fn load<F, Fut, L>(
        self,
        guard: LoadGuard<K, T>,
        load: F,
    ) -> Result<Option<Arc<T>>, Unconfirmed>
    where
        F: Fn() -> Fut + Send,
        Fut: Future<Output = Result<L, Unconfirmed>> + Send,
        L: Into<Loaded<T>>,
    {
        let inner = &*self.inner;
        let key = guard.key;
        let mut outcome = None;
        for _ in 0..3 {
            let generation = inner.freshness.generation();
            let began = inner.freshness.now();
            let loaded = load().await.map(Into::into);
            let current_at = loaded.as_ref().ok().and_then(|it| it.current_at);
            if current_at.is_none() {
                inner.metrics.key_loads.inc();
            }
            let loaded = loaded.map(|it| it.value.map(Arc::new));
            let is_unchanged = || inner.freshness.generation() == generation;
            let mut is_current = is_unchanged();
            if loaded.is_ok() && current_at.is_none() {
                inner.freshness.reached();
            }
            if let (Ok(value), true) = (&loaded, is_current) {
                let loaded_at = current_at.unwrap_or(began);
                self.keep(key, value.clone(), loaded_at, generation);
                // An invalidation after the entry was stored finds the entry, but an earlier one may have missed it.
                is_current = is_unchanged();
                if !is_current {
                    self.empty(key);
                    inner.absent.remove(&key);
                }
            }
            outcome = Some(loaded);
            // Repeat a successful load if a key, possibly this one, was invalidated in the meantime.
            if is_current || matches!(outcome, Some(Err(_))) {
                break;
            }
        }
        drop(guard);
        match outcome {
            Some(Err(error)) => self.within_grace(&key).map(Some).ok_or(error),
            Some(loaded) => loaded,
            None => Ok(None),
        }
    }

    fn keep(&self, key: K, value: Option<Arc<T>>, loaded_at: Monotonic, loaded_in: u64) {
        if value.is_some() {
            self.inner.absent.remove(&key);
            let entry = Entry {
                value,
                loaded_at,
                loaded_in,
            };
            self.inner.present.insert(key, entry);
        } else {
            self.inner.present.remove(&key);
            self.inner.absent.insert(key, loaded_at);
        }
    }

    /// Empties a key's entry, if there is one.
    fn empty(&self, key: K) {
        let emptied = Entry {
            value: None,
            loaded_at: Monotonic::default(),
            loaded_in: 0,
        };
        // The call does nothing if there is no entry.
        let _ = self.inner.present.replace(key, emptied, true);
    }

    /// Empties a key's entry, and invalidates all loads in progress.
    pub fn forget(&self, key: K) {
        self.inner.freshness.next_generation();
        self.empty(key);
    }

    /// Empties all entries, forgets which rows do not exist, and invalidates all loads in progress.
    pub fn forget_all(&self) {
        self.inner.freshness.next_generation();
        self.empty_these(|_, entry| entry.value.is_some());
        self.inner.absent.clear();
    }

    /// Frees the rows that have changed and have not been reloaded. Does nothing unless a change has affected API keys
    /// since the last call.
    pub fn sweep(&self) {
        let freshness = &self.inner.freshness;
        let recorded = freshness.recorded();
        if self.inner.swept.swap(recorded, Ordering::Relaxed) != recorded {
            self.empty_these(|_, entry| {
                let row = entry.value.as_ref();
                row.is_some_and(|row| row.has_changed(freshness.changes(), entry.loaded_in))
            });
        }
    }

    fn empty_these(&self, is_gone: impl Fn(&K, &Entry<T>) -> bool) {
        let all = self.inner.present.iter();
        let gone = all.filter(|(key, entry)| is_gone(key, entry));
        let keys = gone.map(|(key, _)| key).collect::<Vec<_>>();
        for key in keys {
            self.empty(key);
        }
    }

    /// Forgets that a key does not exist.
    pub fn forget_absent(&self, key: &K) {
        self.inner.freshness.next_generation();
        self.inner.absent.remove(key);
    }
}

#[cfg(test)]
mod tests;
