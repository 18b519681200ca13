use std::sync::atomic::AtomicUsize;

use uuid::Uuid;

use super::*;
use crate::clock::{TestClock, UnixNanos};

const OWNER: Owner = Owner::Key(Uuid::nil());

impl CachedRow for String {
    fn has_changed(&self, changes: &Changes, loaded_in: u64) -> bool {
        let nil = Uuid::nil();
        changes.any_after(loaded_in, nil, nil, nil)
    }
}

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
async fn concurrent_lookups_share_one_query() {
    let it = fixture();
    let all = futures_util::future::join_all((0..50).map(|_| it.get(Ok(Some("a"))))).await;
    assert!(
        all.into_iter()
            .all(|got| got.unwrap().as_deref() == Some("a"))
    );
    assert_eq!(it.loads(), 1);
}

#[tokio::test]
async fn without_the_poll_an_entry_is_valid_for_a_second() {
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
async fn missing_rows_are_cached() {
    let it = fixture();
    for _ in 0..10 {
        assert_eq!(it.get(Ok(None)).await.unwrap(), None);
    }
    assert_eq!(it.loads(), 1);
    it.cache.forget_absent(&1);
    assert_eq!(it.get(Ok(Some("a"))).await.unwrap().as_deref(), Some("a"));
}

#[tokio::test]
async fn invalidated_entries_are_loaded_again() {
    let it = fixture();
    it.get(Ok(Some("a"))).await.unwrap();
    it.cache.forget(2);
    assert_eq!(it.get(Ok(Some("b"))).await.unwrap().as_deref(), Some("a"));
    it.cache.forget(1);
    assert_eq!(it.get(Ok(Some("b"))).await.unwrap().as_deref(), Some("b"));
}

#[tokio::test]
async fn load_overtaken_by_a_change_is_not_kept() {
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
                    cache.forget_all();
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
async fn shared_records_are_valid_from_when_they_were_current() {
    let it = fixture();
    it.freshness.polled(it.freshness.now());
    let polled = it.freshness.polled_lately();
    it.clock.advance(Duration::from_millis(700));
    assert_eq!(it.freshness.polled_lately(), polled);
    let shared = move || async move {
        Ok(Loaded {
            value: Some("shared".to_owned()),
            current_at: polled,
        })
    };
    it.cache.get(1, shared).await.unwrap();
    // The entry is valid for a second after the poll began, not after the lookup.
    it.clock.advance(Duration::from_millis(300));
    assert_eq!(it.freshness.polled_lately(), None);
    assert!(it.cache.peek(&1).is_some());
    it.clock.advance(Duration::from_millis(1));
    assert!(it.cache.peek(&1).is_none());
}

#[tokio::test]
async fn unconfirmed_entries_are_served_for_the_grace_period_only() {
    let it = fixture();
    it.get(Ok(Some("a"))).await.unwrap();
    it.clock.advance(Duration::from_mins(1));
    assert_eq!(
        it.get(Err("unreachable")).await.unwrap().as_deref(),
        Some("a")
    );
    it.clock.advance(Duration::from_secs(1));
    assert!(it.get(Err("unreachable")).await.is_err());
    assert_eq!(it.get(Ok(Some("b"))).await.unwrap().as_deref(), Some("b"));
}

/// Returns a load that never completes, as if PostgreSQL accepted every byte but never responded.
fn hangs() -> impl Fn() -> std::future::Pending<Result<Option<String>, Unconfirmed>> {
    std::future::pending
}

#[tokio::test]
async fn once_postgres_is_suspected_entries_are_served_without_waiting() {
    let it = fixture();
    it.get(Ok(Some("a"))).await.unwrap();
    it.clock.advance(Duration::from_secs(2));
    assert!(it.freshness.suspect());
    assert!(!it.freshness.suspect(), "PostgreSQL is already suspected");
    // Make more calls than the maximum number of concurrent background loads.
    for _ in 0..3 * BACKGROUND_LOADS {
        let value = it.cache.get(1, hangs()).await.unwrap();
        assert_eq!(value.unwrap().as_str(), "a");
    }
    it.clock.advance(Duration::from_mins(1));
    let refused = tokio::time::timeout(Duration::from_millis(50), it.cache.get(1, hangs()));
    assert!(refused.await.is_err(), "the grace period is over");
}

#[tokio::test]
async fn waiting_callers_are_served_when_an_outage_is_suspected() {
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
async fn invalidated_entries_are_not_served_during_an_outage() {
    let it = fixture();
    it.get(Ok(Some("a"))).await.unwrap();
    it.clock.advance(Duration::from_secs(2));
    it.freshness.suspect();
    it.cache.forget_all();
    assert!(it.get(Err("unreachable")).await.is_err());
}

#[tokio::test]
async fn changed_entries_stay_known_and_are_never_served_unconfirmed() {
    let it = fixture();
    it.get(Ok(Some("old"))).await.unwrap();
    it.freshness.polled(it.freshness.now());
    it.freshness.changed([OWNER]);
    assert!(it.cache.holds(&1), "the key is known");
    assert!(it.cache.peek(&1).is_none(), "the entry is not valid");
    assert!(
        it.get(Err("unreachable")).await.is_err(),
        "the stale entry is not served"
    );
    it.freshness.suspect();
    assert!(
        it.get(Err("unreachable")).await.is_err(),
        "the stale entry is not served under suspicion either"
    );
    assert!(it.cache.holds(&1), "the key is still known");
    assert_eq!(
        it.get(Ok(Some("new"))).await.unwrap().as_deref(),
        Some("new")
    );
    assert!(it.cache.peek(&1).is_some());
}

#[tokio::test]
async fn sweep_frees_changed_rows_and_keeps_the_others() {
    let it = fixture();
    it.get(Ok(Some("old"))).await.unwrap();
    it.cache.sweep();
    let row = Arc::downgrade(&it.cache.peek(&1).unwrap().unwrap());
    assert!(row.upgrade().is_some(), "the row has not changed");
    it.freshness.changed([OWNER]);
    // The task of the load has a reference to the row until the task ends.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert!(row.upgrade().is_some());
    it.cache.sweep();
    assert!(row.upgrade().is_none());
    assert!(it.cache.holds(&1), "the key is still known");
    it.get(Ok(Some("new"))).await.unwrap();
    it.cache.sweep();
    assert_eq!(it.cache.peek(&1).unwrap().unwrap().as_str(), "new");
}

#[tokio::test]
async fn sweep_during_a_change_does_not_hide_it_from_the_next_sweep() {
    let it = fixture();
    it.get(Ok(Some("old"))).await.unwrap();
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    let row = Arc::downgrade(&it.cache.peek(&1).unwrap().unwrap());
    let cache = it.cache.clone();
    let owners = std::iter::once_with(move || {
        cache.sweep();
        OWNER
    });
    it.freshness.changed(owners);
    assert!(row.upgrade().is_some(), "the change was not yet recorded");
    it.cache.sweep();
    assert!(row.upgrade().is_none());
}

#[tokio::test]
async fn deleted_entries_are_unknown_after_the_next_lookup() {
    let it = fixture();
    it.get(Ok(Some("a"))).await.unwrap();
    it.cache.forget_all();
    assert!(it.cache.holds(&1));
    assert_eq!(it.get(Ok(None)).await.unwrap(), None);
    assert!(!it.cache.holds(&1));
    assert!(matches!(it.cache.peek(&1), Some(None)));
}

#[tokio::test]
async fn background_loads_find_changes_and_end_the_suspicion() {
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
async fn panic_in_a_load_fails_all_its_waiters_and_no_later_load() {
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
    for failed in all.expect("no caller waits forever") {
        let failed = failed.expect("the panic does not reach the callers");
        assert!(matches!(failed, Err(Unconfirmed::Failed(_))), "{failed:?}");
    }
    assert_eq!(it.get(Ok(Some("a"))).await.unwrap().as_deref(), Some("a"));
    assert!(it.cache.inner.loading.lock().is_empty());
}

#[test]
fn canceled_load_is_started_again() {
    let runtime = || tokio::runtime::Builder::new_current_thread();
    let it = fixture();
    let first = runtime().enable_all().build().unwrap();
    first.block_on(async {
        let load = it.cache.get(1, hangs());
        let waited = tokio::time::timeout(Duration::from_millis(10), load).await;
        assert!(waited.is_err());
    });
    // Dropping the runtime cancels all of its tasks.
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
    let (cache, freshness) = (it.cache.clone(), it.freshness.clone());
    let forget = std::thread::spawn(move || {
        has_begun.recv().unwrap();
        freshness.changed(std::iter::from_fn(|| {
            // The load ends while the changed owners are still being determined.
            release.send(true).unwrap();
            while cache.inner.loading.lock().contains_key(&1) {
                std::thread::yield_now();
            }
            None
        }));
    });
    forget.join().unwrap();
    let loaded = loading.await.unwrap().unwrap();
    assert_eq!(loaded.unwrap().as_str(), "new");
    assert_eq!(it.cache.peek(&1).unwrap().unwrap().as_str(), "new");
    assert_eq!(it.loads(), 2);
}

#[tokio::test]
async fn load_in_progress_is_kept_if_nothing_has_changed() {
    let it = fixture();
    let (freshness, loads) = (it.freshness.clone(), it.loads.clone());
    let load = move || {
        loads.fetch_add(1, Ordering::SeqCst);
        freshness.changed([]);
        async { Ok(Some("a".to_owned())) }
    };
    let loaded = it.cache.get(1, load).await.unwrap();
    assert_eq!(loaded.unwrap().as_str(), "a");
    assert_eq!(it.loads(), 1);
}

#[tokio::test]
async fn poll_ends_the_suspicion() {
    let it = fixture();
    it.freshness.suspect();
    it.freshness.polled(it.freshness.now());
    assert!(!it.freshness.is_suspect());
}
