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
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::clock::{TestClock, UnixNanos};

    struct Fixture {
        clock: TestClock,
        freshness: Arc<Freshness>,
        cache: Cached<u8, String>,
        loads: Arc<AtomicUsize>,
    }

    fn fixture() -> Fixture {
        let clock = TestClock::at(UnixNanos::from_secs(1_785_738_360));
        let freshness = Arc::new(Freshness::new(Arc::new(clock.clone())));
        let cache = Cached::new(
            1000,
            Duration::from_mins(1),
            freshness.clone(),
            Arc::default(),
        );
        Fixture {
            clock,
            freshness,
            cache,
            loads: Arc::default(),
        }
    }

    impl Fixture {
        async fn get(
            &self,
            found: Result<Option<&'static str>, &'static str>,
        ) -> Result<Option<String>, Unconfirmed> {
            let loads = self.loads.clone();
            let load = move || {
                loads.fetch_add(1, Ordering::SeqCst);
                async move {
                    tokio::task::yield_now().await;
                    found
                        .map(|it| it.map(str::to_owned))
                        .map_err(|it| Unconfirmed::Failed(it.into()))
                }
            };
            Ok(self.cache.get(1, load).await?.map(|value| (*value).clone()))
        }

        fn loads(&self) -> usize {
            self.loads.load(Ordering::SeqCst)
        }
    }

    #[tokio::test]
    async fn many_who_ask_at_once_send_one_query() {
        let it = fixture();
        let all = futures_util::future::join_all((0..50).map(|_| it.get(Ok(Some("a"))))).await;
        assert!(
            all.into_iter()
                .all(|got| got.unwrap().as_deref() == Some("a"))
        );
        assert_eq!(it.loads(), 1);
    }

    #[tokio::test]
    async fn without_the_poll_an_entry_is_believed_for_a_second() {
        let it = fixture();
        it.get(Ok(Some("old"))).await.unwrap();
        it.clock.advance(Duration::from_secs(1));
        assert_eq!(
            it.get(Ok(Some("new"))).await.unwrap().as_deref(),
            Some("old")
        );
        it.clock.advance(Duration::from_millis(1));
        assert_eq!(
            it.get(Ok(Some("new"))).await.unwrap().as_deref(),
            Some("new")
        );
        assert_eq!(it.loads(), 2);
    }

    #[tokio::test]
    async fn with_a_fresh_poll_nothing_is_loaded_again() {
        let it = fixture();
        it.get(Ok(Some("a"))).await.unwrap();
        for _ in 0..100 {
            it.clock.advance(Duration::from_millis(250));
            it.freshness.polled(it.freshness.now());
        }
        it.get(Ok(Some("b"))).await.unwrap();
        assert_eq!(it.loads(), 1);
    }

    #[tokio::test]
    async fn what_does_not_exist_is_remembered_too() {
        let it = fixture();
        for _ in 0..10 {
            assert_eq!(it.get(Ok(None)).await.unwrap(), None);
        }
        assert_eq!(it.loads(), 1);
        it.cache.forget_absent(&1);
        assert_eq!(it.get(Ok(Some("a"))).await.unwrap().as_deref(), Some("a"));
    }

    #[tokio::test]
    async fn what_is_forgotten_is_loaded_again() {
        let it = fixture();
        it.get(Ok(Some("a"))).await.unwrap();
        it.cache.forget(|_, value| value == "other");
        assert_eq!(it.get(Ok(Some("b"))).await.unwrap().as_deref(), Some("a"));
        it.cache.forget(|_, value| value == "a");
        assert_eq!(it.get(Ok(Some("b"))).await.unwrap().as_deref(), Some("b"));
    }

    #[tokio::test]
    async fn a_load_that_was_overtaken_by_a_change_is_not_kept() {
        let it = fixture();
        let cache = it.cache.clone();
        let loads = it.loads.clone();
        let got = it
            .cache
            .get(1, move || {
                let first = loads.fetch_add(1, Ordering::SeqCst) == 0;
                let cache = cache.clone();
                async move {
                    if first {
                        cache.forget(|_, _| true);
                    }
                    Ok(Some(if first { "old" } else { "new" }.to_owned()))
                }
            })
            .await
            .unwrap();
        assert_eq!(got.unwrap().as_str(), "new");
        assert_eq!(it.loads(), 2);
    }

    #[tokio::test]
    async fn what_another_has_read_is_believed_from_when_it_was_known_to_be_true() {
        let it = fixture();
        it.freshness.polled(it.freshness.now());
        let polled = it.freshness.polled_lately();
        it.clock.advance(Duration::from_millis(700));
        assert_eq!(it.freshness.polled_lately(), polled);
        let shared = move || async move {
            Ok(Loaded {
                value: Some("shared".to_owned()),
                true_at: polled,
            })
        };
        it.cache.get(1, shared).await.unwrap();
        // A second after the poll, not after the look-up; and the poll is not fresh any more.
        it.clock.advance(Duration::from_millis(300));
        assert_eq!(it.freshness.polled_lately(), None);
        assert!(it.cache.peek(&1).is_some());
        it.clock.advance(Duration::from_millis(1));
        assert!(it.cache.peek(&1).is_none());
    }

    #[tokio::test]
    async fn what_cannot_be_confirmed_is_served_for_a_grace_and_then_refused() {
        let it = fixture();
        it.get(Ok(Some("a"))).await.unwrap();
        it.clock.advance(Duration::from_mins(1));
        assert_eq!(it.get(Err("away")).await.unwrap().as_deref(), Some("a"));
        it.clock.advance(Duration::from_secs(1));
        assert!(it.get(Err("away")).await.is_err());
        assert_eq!(it.get(Ok(Some("b"))).await.unwrap().as_deref(), Some("b"));
    }

    /// A load that never ends, as when PostgreSQL takes every byte and answers nothing.
    fn hangs() -> impl Fn() -> std::future::Pending<Result<Option<String>, Unconfirmed>> {
        std::future::pending
    }

    #[tokio::test]
    async fn once_postgres_is_suspected_entries_are_served_without_waiting() {
        let it = fixture();
        it.get(Ok(Some("a"))).await.unwrap();
        it.clock.advance(Duration::from_secs(2));
        assert!(it.freshness.suspect());
        assert!(!it.freshness.suspect(), "that is no news");
        // More than are loaded in the background at once.
        for _ in 0..3 * BACKGROUND_LOADS {
            let value = it.cache.get(1, hangs()).await.unwrap();
            assert_eq!(value.unwrap().as_str(), "a");
        }
        it.clock.advance(Duration::from_mins(1));
        let refused = tokio::time::timeout(Duration::from_millis(50), it.cache.get(1, hangs()));
        assert!(refused.await.is_err(), "the grace is over");
    }

    #[tokio::test]
    async fn who_already_waits_is_served_when_the_suspicion_arises() {
        let it = fixture();
        it.get(Ok(Some("a"))).await.unwrap();
        it.clock.advance(Duration::from_secs(2));
        let cache = it.cache.clone();
        let waiting = tokio::spawn(async move { cache.get(1, hangs()).await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        it.freshness.suspect();
        assert_eq!(waiting.await.unwrap().unwrap().unwrap().as_str(), "a");
    }

    #[tokio::test]
    async fn what_was_forgotten_is_not_served_under_suspicion() {
        let it = fixture();
        it.get(Ok(Some("a"))).await.unwrap();
        it.clock.advance(Duration::from_secs(2));
        it.freshness.suspect();
        it.cache.forget(|_, _| true);
        assert!(it.get(Err("away")).await.is_err());
    }

    #[tokio::test]
    async fn what_was_changed_is_known_and_never_served_unconfirmed() {
        let it = fixture();
        it.get(Ok(Some("old"))).await.unwrap();
        it.freshness.polled(it.freshness.now());
        it.cache.forget_these(|| [1]);
        assert!(it.cache.holds(&1), "it is known");
        assert!(it.cache.peek(&1).is_none(), "it is not believed");
        assert!(it.get(Err("away")).await.is_err(), "it is not served stale");
        it.freshness.suspect();
        assert!(it.get(Err("away")).await.is_err(), "nor under suspicion");
        assert!(it.cache.holds(&1), "it is still known");
        assert_eq!(
            it.get(Ok(Some("new"))).await.unwrap().as_deref(),
            Some("new")
        );
        assert!(it.cache.peek(&1).is_some());
    }

    #[tokio::test]
    async fn what_was_deleted_is_known_no_more_once_that_was_looked_up() {
        let it = fixture();
        it.get(Ok(Some("a"))).await.unwrap();
        it.cache.forget(|_, _| true);
        assert!(it.cache.holds(&1));
        assert_eq!(it.get(Ok(None)).await.unwrap(), None);
        assert!(!it.cache.holds(&1));
        assert!(matches!(it.cache.peek(&1), Some(None)));
        // What never was known does not become so by a change.
        it.cache.forget_these(|| [2]);
        assert!(!it.cache.holds(&2));
    }

    #[tokio::test]
    async fn the_background_finds_what_has_changed_and_ends_the_suspicion() {
        let it = fixture();
        it.get(Ok(Some("old"))).await.unwrap();
        it.clock.advance(Duration::from_secs(2));
        it.freshness.suspect();
        let served = it.get(Ok(Some("new"))).await.unwrap();
        assert_eq!(served.as_deref(), Some("old"));
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert!(!it.freshness.is_suspect());
        let served = it.get(Ok(Some("newer"))).await.unwrap();
        assert_eq!(served.as_deref(), Some("new"));
    }

    #[tokio::test]
    async fn panic_in_a_load_fails_it_for_all_who_wait_and_the_next_one_loads_again() {
        let it = fixture();
        let all = (0..3).map(|_| {
            let cache = it.cache.clone();
            tokio::spawn(async move {
                let load = || async {
                    tokio::task::yield_now().await;
                    assert!(std::hint::black_box(false), "a defect");
                    Ok::<_, Unconfirmed>(None)
                };
                cache.get(1, load).await
            })
        });
        let all = futures_util::future::join_all(all);
        let all = tokio::time::timeout(Duration::from_secs(5), all).await;
        for failed in all.expect("nobody waits for ever") {
            let failed = failed.expect("the panic stays in the load");
            assert!(matches!(failed, Err(Unconfirmed::Failed(_))), "{failed:?}");
        }
        assert_eq!(it.get(Ok(Some("a"))).await.unwrap().as_deref(), Some("a"));
        assert!(it.cache.inner.loading.lock().is_empty());
    }

    #[test]
    fn canceled_load_is_begun_again() {
        let runtime = || tokio::runtime::Builder::new_current_thread();
        let it = fixture();
        let first = runtime().enable_all().build().unwrap();
        first.block_on(async {
            let load = it.cache.get(1, hangs());
            let waited = tokio::time::timeout(Duration::from_millis(10), load).await;
            assert!(waited.is_err());
        });
        // Cancels everything that it runs.
        drop(first);
        let second = runtime().enable_all().build().unwrap();
        let loaded = second.block_on(async {
            tokio::time::timeout(Duration::from_secs(5), it.get(Ok(Some("a")))).await
        });
        let loaded = loaded.expect("the canceled load is not waited for");
        assert_eq!(loaded.unwrap().as_deref(), Some("a"));
        assert!(it.cache.inner.loading.lock().is_empty());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn load_that_ends_while_changed_keys_are_determined_is_not_kept() {
        let it = fixture();
        let (begun, has_begun) = std::sync::mpsc::channel();
        let (release, released) = tokio::sync::watch::channel(false);
        let loads = it.loads.clone();
        let cache = it.cache.clone();
        let loading = tokio::spawn(async move {
            let load = move || {
                let first = loads.fetch_add(1, Ordering::SeqCst) == 0;
                let (begun, mut released) = (begun.clone(), released.clone());
                async move {
                    if first {
                        begun.send(()).unwrap();
                        released.wait_for(|it| *it).await.unwrap();
                    }
                    Ok(Some(if first { "old" } else { "new" }.to_owned()))
                }
            };
            cache.get(1, load).await
        });
        let cache = it.cache.clone();
        let forget = tokio::task::spawn_blocking(move || {
            has_begun.recv().unwrap();
            cache.forget_these(|| {
                // The change is not known to concern this key yet, which is only now being cached.
                release.send(true).unwrap();
                while cache.inner.loading.lock().contains_key(&1) {
                    std::thread::yield_now();
                }
                []
            });
        });
        forget.await.unwrap();
        let loaded = loading.await.unwrap().unwrap();
        assert_eq!(loaded.unwrap().as_str(), "new");
        assert_eq!(it.cache.peek(&1).unwrap().unwrap().as_str(), "new");
        assert_eq!(it.loads(), 2);
    }

    #[tokio::test]
    async fn a_poll_ends_the_suspicion() {
        let it = fixture();
        it.freshness.suspect();
        it.freshness.polled(it.freshness.now());
        assert!(!it.freshness.is_suspect());
    }
}
