use std::{net::Ipv4Addr, sync::atomic::AtomicUsize};

use futures_util::future::join_all;
use tokio::sync::Semaphore;

use super::*;
use crate::{client_guard::ClientNetwork, clock::SystemClock};

/// Lookups in a simulated database, which processes one batch per permit. `statements` contains the number of hashes in
/// each statement.
struct Fixture {
    batches: Batches<u8>,
    permits: Arc<Semaphore>,
    statements: Arc<Mutex<Vec<usize>>>,
}

fn fixture(limit: usize, workers: usize) -> Fixture {
    fixture_on(
        limit,
        workers,
        &Arc::new(Semaphore::new(for_unknown(workers))),
    )
}

/// Works like [`fixture`], but several fixtures can share the connections for unknown secrets.
fn fixture_on(limit: usize, workers: usize, for_unknown: &Arc<Semaphore>) -> Fixture {
    let permits = Arc::new(Semaphore::new(0));
    let statements = Arc::new(Mutex::new(Vec::new()));
    let settings = Settings {
        limit,
        wait: Duration::from_millis(500),
        workers,
        for_unknown: for_unknown.clone(),
        freshness: Arc::new(Freshness::new(Arc::new(SystemClock::new()))),
        metrics: Arc::default(),
    };
    let (of_query, counted) = (permits.clone(), statements.clone());
    let batches = Batches::new(settings, move |hashes: Vec<Hash>| {
        counted.lock().push(hashes.len());
        let permits = of_query.clone();
        async move {
            let permit = permits.acquire().await;
            permit.expect("the semaphore is not closed").forget();
            // Even numbers are existing secrets.
            let found = hashes.iter().filter(|hash| hash[0] % 2 == 0);
            Ok(found.map(|hash| (hash.to_vec(), hash[0])).collect())
        }
        .boxed()
    });
    Fixture {
        batches,
        permits,
        statements,
    }
}

fn from(last: u8) -> LookupCaller {
    LookupCaller {
        tenant: None,
        address: Some(ClientNetwork::address(
            Ipv4Addr::new(192, 0, 2, last).into(),
        )),
    }
}

impl Fixture {
    fn find(
        &self,
        n: u8,
        caller: Option<LookupCaller>,
    ) -> tokio::task::JoinHandle<Result<Option<u8>, Unconfirmed>> {
        let lookup = self.batches.begin(caller);
        tokio::spawn(async move { lookup?.find([n; 32]).await })
    }
}

#[tokio::test(start_paused = true)]
async fn lookups_during_a_statement_share_the_next_one() {
    let it = fixture(1000, 1);
    let first = it.find(0, Some(from(1)));
    tokio::task::yield_now().await;
    let others = (1..=100).map(|n| it.find(n, Some(from(1))));
    let others = others.collect::<Vec<_>>();
    tokio::task::yield_now().await;
    it.permits.add_permits(2);
    assert_eq!(first.await.unwrap().unwrap(), Some(0));
    for (n, found) in (1..=100).zip(join_all(others).await) {
        let expected = (n % 2 == 0).then_some(n);
        assert_eq!(found.unwrap().unwrap(), expected);
    }
    assert_eq!(*it.statements.lock(), [1, 100]);
}

#[tokio::test(start_paused = true)]
async fn one_connection_is_reserved_for_known_secrets() {
    let it = fixture(1000, 3);
    for n in 0..10 {
        it.find(n, Some(from(1)));
        tokio::task::yield_now().await;
    }
    assert_eq!(it.statements.lock().len(), 2);
    it.find(10, None);
    tokio::task::yield_now().await;
    assert_eq!(
        *it.statements.lock(),
        [1, 1, 1],
        "the known secret is looked up separately"
    );
}

#[tokio::test(start_paused = true)]
async fn unknown_keys_and_tokens_take_turns_and_leave_a_connection_for_known_secrets() {
    let connections = Arc::new(Semaphore::new(1));
    let [keys, tokens] = [(); 2].map(|()| fixture_on(1000, 2, &connections));
    let settle = || tokio::time::sleep(Duration::from_millis(1));
    let statements = || {
        (
            keys.statements.lock().clone(),
            tokens.statements.lock().clone(),
        )
    };
    keys.find(1, Some(from(1)));
    settle().await;
    tokens.find(1, Some(from(1)));
    settle().await;
    keys.find(3, Some(from(1)));
    settle().await;
    assert_eq!(statements(), (vec![1], vec![]));
    keys.find(0, None);
    settle().await;
    assert_eq!(statements(), (vec![1, 1], vec![]));
    keys.permits.add_permits(2);
    settle().await;
    assert_eq!(
        statements(),
        (vec![1, 1], vec![1]),
        "it is the turn of the tokens"
    );
    tokens.permits.add_permits(1);
    settle().await;
    assert_eq!(statements(), (vec![1, 1, 1], vec![1]));
    keys.permits.add_permits(1);
    settle().await;
    for it in [&keys, &tokens] {
        let queue = it.batches.0.queue.lock();
        assert_eq!(
            (queue.workers, queue.on_unknown, queue.is_waiting),
            (0, 0, false)
        );
    }
    assert_eq!(connections.available_permits(), 1);
}

#[tokio::test(start_paused = true)]
async fn flooding_source_is_limited_and_others_keep_their_share() {
    let it = fixture(10, 2);
    let flood = (0..100).map(|n| it.batches.begin(Some(from(n % 2))));
    let flood = flood.collect::<Vec<_>>();
    assert_eq!(flood.iter().filter(|it| it.is_ok()).count(), 10);
    let others = (0..5).map(|_| it.batches.begin(Some(from(9))));
    let others = others.collect::<Vec<_>>();
    // Three callers share the limit of ten, so this caller gets a third, rounded down.
    assert_eq!(others.iter().filter(|it| it.is_ok()).count(), 3);
    assert!(
        it.batches.begin(None).is_ok(),
        "lookups of known secrets are not limited"
    );
    drop((flood, others));
    assert!(it.batches.0.queue.lock().started.is_empty());
    let alone = (0..100).map(|_| it.batches.begin(Some(from(1))));
    let alone = alone.collect::<Vec<_>>();
    assert_eq!(alone.iter().filter(|it| it.is_ok()).count(), 10);
}

#[tokio::test(start_paused = true)]
async fn many_sources_together_are_limited_too() {
    let it = fixture(10, 2);
    let all = (0..200).map(|n| it.batches.begin(Some(from(n))));
    let all = all.collect::<Vec<_>>();
    assert_eq!(all.iter().filter(|it| it.is_ok()).count(), 20);
}

#[tokio::test(start_paused = true)]
async fn sources_take_turns() {
    let it = fixture(1000, 1);
    let _first = it.find(0, Some(from(1)));
    tokio::task::yield_now().await;
    // More than a full batch from one caller, followed by one lookup from another caller.
    let counted = Arc::new(AtomicUsize::new(0));
    for _ in 0..2 * BATCH {
        let (found, counted) = (it.find(2, Some(from(1))), counted.clone());
        tokio::spawn(async move {
            let _ = found.await;
            counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        });
    }
    let other = it.find(4, Some(from(2)));
    tokio::time::sleep(Duration::from_millis(1)).await;
    it.permits.add_permits(2);
    assert_eq!(other.await.unwrap().unwrap(), Some(4));
    assert_eq!(*it.statements.lock(), [1, BATCH, BATCH]);
    let answered = counted.load(std::sync::atomic::Ordering::SeqCst);
    assert!(
        answered < BATCH,
        "{answered} lookups of the first caller came first"
    );
}

#[tokio::test(start_paused = true)]
async fn lookup_that_waits_too_long_for_a_batch_fails() {
    let it = fixture(1000, 1);
    let begun = it.find(0, Some(from(1)));
    tokio::task::yield_now().await;
    let waiting = it.find(2, Some(from(1)));
    let known = it.find(4, None);
    let refused = waiting.await.unwrap();
    assert!(matches!(refused, Err(Unconfirmed::TooMany)), "{refused:?}");
    assert!(matches!(known.await.unwrap(), Err(Unconfirmed::Failed(_))));
    assert!(it.batches.0.settings.freshness.is_suspect());
    // A lookup whose batch is in progress still gets its result.
    it.permits.add_permits(1);
    assert_eq!(begun.await.unwrap().unwrap(), Some(0));
    let queue = it.batches.0.queue.lock();
    assert!(queue.unknown.is_empty() && queue.turns.is_empty() && queue.known.is_empty());
    assert_eq!(queue.started_total, 0);
}
