//! What is remembered of rows in PostgreSQL, and for how long it may be believed.
//!
//! An entry is believed while the poll for revocations is fresh, since then every change so far has been seen
//! and its entry forgotten; or, without the poll, for a second after it was loaded. After that it is loaded
//! again. When PostgreSQL is away an entry is still served for a grace after it was last known to be true,
//! and then refused: what cannot be confirmed is denied, not admitted.
//!
//! Once a load or a poll has failed, PostgreSQL is suspected to be unreachable, for all caches at once: until it answers
//! again, entries within their grace are served without waiting, and only a few are loaded again in the background.
//! So an outage costs the first few requests a wait, not the first request of each key.
//!
//! An entry that a change concerns is emptied, not removed: it is never served again, stale or not, but its key still
//! counts as known, so that loading it again does not compete with look-ups of what strangers make up.
//!
//! A load may also answer what another replica has read: then it tells since when that is known to be true.
//!
//! Loading is single-flight: however many ask for the same thing at once, one query is sent. What does not
//! exist is remembered too, apart and bounded, so that a flood of guesses neither reaches the database twice
//! nor drives out what is in use.

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
use tokio::sync::{Semaphore, watch};

use crate::{clock::Clock, telemetry::metrics::Metrics};

/// How long a loaded entry is believed without the poll.
const TTL: u64 = 1_000_000_000;
/// How long after the last poll all entries are believed. Polls come at least every 250 ms.
const POLL_FRESH: u64 = 750_000_000;

/// Entries of one cache that are loaded in the background at once while PostgreSQL is suspected to be unreachable.
const BACKGROUND_LOADS: usize = 4;

/// When the revocations were last polled, and whether PostgreSQL answers. Shared by all caches.
#[derive(Debug)]
pub struct Freshness {
    clock: Arc<dyn Clock>,
    /// Monotonic time at which the last successful poll *began*, plus one; 0 for never.
    polled_at: AtomicU64,
    /// Counts what was forgotten, so that a load that was under way meanwhile is not kept.
    generation: AtomicU64,
    suspected: watch::Sender<bool>,
}

impl Freshness {
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            polled_at: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            suspected: watch::Sender::new(false),
        }
    }

    /// PostgreSQL may be unreachable. Returns whether this is news.
    pub fn suspect(&self) -> bool {
        self.suspected
            .send_if_modified(|suspected| !std::mem::replace(suspected, true))
    }

    /// PostgreSQL has answered.
    fn reached(&self) {
        self.suspected.send_if_modified(std::mem::take);
    }

    pub fn is_suspect(&self) -> bool {
        *self.suspected.borrow()
    }

    /// Ends when PostgreSQL is suspected to be unreachable.
    async fn suspected(&self) {
        let mut suspected = self.suspected.subscribe();
        // An error would mean that the sender is gone, and it is ours.
        let _ = suspected.wait_for(|suspected| *suspected).await;
    }

    pub fn now(&self) -> u64 {
        self.clock.monotonic()
    }

    /// A poll that began at `began` has seen, and forgotten, everything up to then.
    pub fn polled(&self, began: u64) {
        self.polled_at.fetch_max(began + 1, Ordering::AcqRel);
        self.reached();
    }

    /// When an entry was last known to be true.
    fn confirmed_at(&self, loaded_at: u64) -> u64 {
        loaded_at.max(self.polled_at.load(Ordering::Acquire).saturating_sub(1))
    }

    /// When the last poll began, if that is so lately that it has seen all that counts.
    pub fn polled_lately(&self) -> Option<u64> {
        let polled = self.polled_at.load(Ordering::Acquire).checked_sub(1)?;
        (self.now().saturating_sub(polled) <= POLL_FRESH).then_some(polled)
    }

    fn believes(&self, loaded_at: u64, now: u64) -> bool {
        let polled = self.polled_at.load(Ordering::Acquire);
        (polled > 0 && now.saturating_sub(polled - 1) <= POLL_FRESH)
            || now.saturating_sub(loaded_at) <= TTL
    }
}

/// A load failed. Shared by all who waited for it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Unconfirmed {
    #[error("cannot be confirmed: {0}")]
    Failed(Arc<str>),
    /// Nothing is wrong except that too many loads are under way.
    #[error("too many look-ups are under way")]
    TooMany,
}

/// What a load has found.
#[derive(Debug)]
pub struct Loaded<T> {
    pub value: Option<T>,
    /// Monotonic time at which it is known to have been true; `None`: at the earliest when the load began.
    pub true_at: Option<u64>,
}

impl<T> From<Option<T>> for Loaded<T> {
    fn from(value: Option<T>) -> Self {
        Self {
            value,
            true_at: None,
        }
    }
}

type Load<T> = BoxFuture<'static, Result<Option<Arc<T>>, Unconfirmed>>;
type Loading<T> = Shared<Load<T>>;

/// A load in progress, as those who want the same find it. They keep it going, and so does a task of its own. Once none
/// of them is left, as when the runtime ends, it is canceled.
struct InProgress<T> {
    id: u64,
    loading: WeakShared<Load<T>>,
}

/// Removes a load from those in progress however it ends.
struct LoadGuard<K: Hash + Eq, T> {
    inner: Arc<Inner<K, T>>,
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
    /// `None`: it was changed since, and must be loaded before it is used.
    value: Option<Arc<T>>,
    loaded_at: u64,
}

impl<T> Clone for Entry<T> {
    fn clone(&self) -> Self {
        Self {
            value: self.value.clone(),
            loaded_at: self.loaded_at,
        }
    }
}

/// See the module.
pub struct Cached<K, T> {
    inner: Arc<Inner<K, T>>,
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

struct Inner<K, T> {
    present: Cache<K, Entry<T>>,
    absent: Cache<K, u64>,
    loading: Mutex<HashMap<K, InProgress<T>>>,
    next_load: AtomicU64,
    freshness: Arc<Freshness>,
    metrics: Arc<Metrics>,
    grace: u64,
    background: Arc<Semaphore>,
}

impl<K, T> Cached<K, T>
where
    K: Hash + Eq + Copy + Send + Sync + 'static,
    T: Send + Sync + 'static,
{
    pub fn new(
        capacity: usize,
        grace: Duration,
        freshness: Arc<Freshness>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                present: Cache::new(capacity),
                absent: Cache::new((capacity / 4).max(100)),
                loading: Mutex::default(),
                next_load: AtomicU64::new(0),
                freshness,
                metrics,
                grace: u64::try_from(grace.as_nanos()).unwrap_or(u64::MAX),
                background: Arc::new(Semaphore::new(BACKGROUND_LOADS)),
            }),
        }
    }

    /// What is known and may be believed now: `Some(None)` is known not to exist. Without waiting.
    pub fn peek(&self, key: &K) -> Option<Option<Arc<T>>> {
        self.peek_at(key, self.inner.freshness.now())
    }

    /// The same for who has just read the monotonic clock.
    pub fn peek_at(&self, key: &K, now: u64) -> Option<Option<Arc<T>>> {
        let inner = &*self.inner;
        if let Some(entry) = inner.present.get(key)
            && let Some(value) = entry.value
            && inner.freshness.believes(entry.loaded_at, now)
        {
            inner.metrics.key_cache_hits.inc();
            return Some(Some(value));
        }
        if let Some(loaded_at) = inner.absent.get(key)
            && inner.freshness.believes(loaded_at, now)
        {
            inner.metrics.key_cache_negative_hits.inc();
            return Some(None);
        }
        None
    }

    /// What is known, or else what `load` answers.
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
        // Not what was there before: it may have been forgotten meanwhile.
        match self.within_grace(&key) {
            Some(value) => Ok(Some(value)),
            None => loading.await,
        }
    }

    /// Joins the load of this key that is under way, or begins one.
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
        // A panic would poison the shared future, and those who wait for it would not be woken.
        let loading = AssertUnwindSafe(self.clone().load(guard, load))
            .catch_unwind()
            .map(|loaded| loaded.unwrap_or_else(|_| Err(Unconfirmed::Failed("a panic".into()))))
            .boxed()
            .shared();
        if let Some(loading) = loading.downgrade() {
            all.insert(key, InProgress { id, loading });
        }
        drop(all);
        // A task of its own, so that it ends even if its callers go away.
        tokio::spawn(loading.clone());
        loading
    }

    /// Whether this is known to have existed, confirmed or not, changed since or not.
    pub fn holds(&self, key: &K) -> bool {
        self.inner.present.contains_key(key)
    }

    /// Whether this is cached, or being loaded to be cached.
    pub fn holds_or_loads(&self, key: &K) -> bool {
        // In this order: a load caches its result before it leaves the loads in progress.
        let is_loading = self.inner.loading.lock().contains_key(key);
        is_loading || self.holds(key)
    }

    /// What was known last, if it may still be served without being confirmed.
    fn within_grace(&self, key: &K) -> Option<Arc<T>> {
        let inner = &*self.inner;
        let entry = inner.present.get(key)?;
        let value = entry.value?;
        let confirmed_at = inner.freshness.confirmed_at(entry.loaded_at);
        if inner.freshness.now().saturating_sub(confirmed_at) > inner.grace {
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
            let generation = inner.freshness.generation.load(Ordering::Acquire);
            let began = inner.freshness.now();
            let loaded = load().await.map(Into::into);
            let true_at = loaded.as_ref().ok().and_then(|it| it.true_at);
            if true_at.is_none() {
                inner.metrics.key_loads.inc();
            }
            let loaded = loaded.map(|it| it.value.map(Arc::new));
            let is_as_before = || inner.freshness.generation.load(Ordering::Acquire) == generation;
            let mut undisturbed = is_as_before();
            if loaded.is_ok() && true_at.is_none() {
                inner.freshness.reached();
            }
            if let (Ok(value), true) = (&loaded, undisturbed) {
                self.keep(key, value.clone(), true_at.unwrap_or(began));
                // Who forgets from here on finds it in its place; who did before this look may not have.
                undisturbed = is_as_before();
                if !undisturbed {
                    self.empty(key);
                    inner.absent.remove(&key);
                }
            }
            outcome = Some(loaded);
            // Something was forgotten while this was on its way: it may have been this, so look once more.
            if undisturbed || matches!(outcome, Some(Err(_))) {
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

    fn keep(&self, key: K, value: Option<Arc<T>>, loaded_at: u64) {
        if let Some(value) = value {
            self.inner.absent.remove(&key);
            let value = Some(value);
            self.inner.present.insert(key, Entry { value, loaded_at });
        } else {
            self.inner.present.remove(&key);
            self.inner.absent.insert(key, loaded_at);
        }
    }

    /// Empties the entry, if there is one.
    fn empty(&self, key: K) {
        let emptied = Entry {
            value: None,
            loaded_at: 0,
        };
        // An error would mean that there is none.
        let _ = self.inner.present.replace(key, emptied, true);
    }

    /// Has what `gone` says loaded again before it is used, and everything that is being loaded now.
    pub fn forget(&self, gone: impl Fn(&K, &T) -> bool) {
        self.inner
            .freshness
            .generation
            .fetch_add(1, Ordering::AcqRel);
        let changed = self
            .inner
            .present
            .iter()
            .filter(|(key, entry)| entry.value.as_ref().is_some_and(|value| gone(key, value)))
            .map(|(key, _)| key)
            .collect::<Vec<_>>();
        for key in changed {
            self.empty(key);
        }
    }

    /// Has these loaded again before they are used, and everything that is being loaded now. `keys` is called once loads
    /// in progress are bound to be repeated: what is cached later cannot be out of date.
    pub fn forget_these<I: IntoIterator<Item = K>>(&self, keys: impl FnOnce() -> I) {
        self.inner
            .freshness
            .generation
            .fetch_add(1, Ordering::AcqRel);
        for key in keys() {
            self.empty(key);
        }
    }

    /// Forgets that something does not exist.
    pub fn forget_absent(&self, key: &K) {
        self.inner
            .freshness
            .generation
            .fetch_add(1, Ordering::AcqRel);
        self.inner.absent.remove(key);
    }
}

#[cfg(test)]
mod tests;
