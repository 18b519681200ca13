//! Tests of the local store, and of the denial cache in front of a remote store, in addition to the tests of the
//! contract.

use std::{sync::Arc, time::Duration};

use quota_server::limiter::{
    Decision, KeyTableSettings, LedgerConnections, LedgerError, LimitStore, Limiter, LimiterError,
    LocalStore, QuotaWindow, ReturnBatch, TakeRequest, Taken,
};
use tokio::{task::JoinSet, time::sleep};

use super::{
    ledger::TestLedger,
    world::{self, DEADLINE, Far, Key, ONE, Plan, memory_store, settle},
};

#[tokio::test]
async fn number_of_keys_is_limited_and_idle_ones_make_room() {
    let world = world::memory();
    let settings = KeyTableSettings {
        max_keys: 640,
        ..KeyTableSettings::default()
    };
    let store = LocalStore::new(
        Arc::new(world.clock.clone()),
        Arc::clone(&world.ledger) as _,
        settings,
    );
    let limiter = Limiter::new(Arc::clone(&store) as _, Arc::new(world.clock.clone()));
    let policies = Plan::rate(60, 10).policies();
    let (mut refused, mut asked) = (0, 0);
    for n in 0..5000u128 {
        let tenant = quota_common::id::TenantId(uuid::Uuid::from_u128(1));
        let id = quota_common::id::ApiKeyId(uuid::Uuid::from_u128(n));
        match limiter.handle(tenant, id) {
            Ok(handle) => {
                asked += 1;
                limiter.try_admit(&handle, &policies, ONE).unwrap();
            }
            Err(error) => {
                assert!(matches!(error, LimiterError::TooManyKeys));
                refused += 1;
            }
        }
    }
    assert_eq!(store.len(), asked);
    assert!(asked <= 640 && refused > 0);
    // A second later, each bucket is full again and no handle is in use.
    world.advance(Duration::from_secs(1));
    Key::number(&limiter, 10_000);
    for n in 10_001..10_100 {
        Key::number(&limiter, n);
    }
    assert!(store.len() <= 640);
    assert_eq!(limiter.prune(), 0);
    assert!(store.is_empty());
}

#[tokio::test]
async fn request_canceled_while_it_waits_loses_no_tokens() {
    let world = world::memory();
    let key = Key::of(&world.start());
    let plan = Plan::any_rate().daily(1000);
    world.ledger.set_delay(DEADLINE / 4);
    for _ in 0..5 {
        let ask = key.ask(&plan, 500);
        assert!(tokio::time::timeout(DEADLINE / 20, ask).await.is_err());
    }
    world.ledger.set_delay(Duration::ZERO);
    tokio::time::sleep(DEADLINE).await;
    // Of the tokens that were fetched for these requests, those in excess of a block are returned with the next
    // decision.
    assert!(key.ask(&plan, 1).await.is_allowed());
    settle().await;
    assert!(world.ledger.used() <= 11, "{}", world.ledger.used());
    assert_eq!(key.admitted(&plan, 2000).await, 999);
}

#[tokio::test]
async fn steady_stream_never_waits_for_the_ledger() {
    let world = world::memory();
    let key = Key::of(&world.start());
    let policies = Plan::any_rate().daily(100_000).policies();
    key.ask(&Plan::any_rate().daily(100_000), 1).await;
    for n in 0..50_000 {
        assert!(
            key.limiter.try_admit(&key.handle, &policies, ONE).is_some(),
            "request {n} would wait"
        );
        if n % 100 == 0 {
            settle().await;
        }
    }
    let asked = world.ledger.takes();
    assert!(asked < 50_000 / 700, "{asked} blocks of 1000");
}

/// Two tables share the only connection to a slow ledger. Requests that arrive while one of the tables waits for the
/// connection are served together.
#[tokio::test(start_paused = true)]
async fn requests_that_arrive_during_the_wait_for_a_connection_share_a_call() {
    let world = world::memory();
    let settings = KeyTableSettings {
        connections: LedgerConnections::new(1),
        ..KeyTableSettings::default()
    };
    let table = || {
        let clock = Arc::new(world.clock.clone());
        let store = LocalStore::new(
            clock.clone(),
            Arc::clone(&world.ledger) as _,
            settings.clone(),
        );
        Limiter::new(store, clock)
    };
    let (busy, waiting) = (table(), table());
    world.ledger.set_delay(Duration::from_millis(100));
    let mut requests = JoinSet::new();
    let mut send = |limiter: &Limiter, n| {
        let key = Key::number(limiter, n);
        requests.spawn(async move { key.ask(&Plan::any_rate().daily(1000), 1).await });
    };
    send(&busy, 0);
    for n in 1..=20 {
        sleep(Duration::from_millis(2)).await;
        send(&waiting, n);
    }
    let decisions = requests.join_all().await;
    assert!(decisions.iter().all(Decision::is_allowed));
    assert_eq!(world.ledger.calls(), (2, 1));
    tokio::join!(busy.drain(), waiting.drain());
    assert_eq!(world.ledger.used(), 21);
}

/// Tokens of a key that is being deleted cannot be returned until the deletion has ended. Requests with other keys do
/// not wait for the deletion.
#[tokio::test(start_paused = true)]
async fn requests_do_not_wait_for_the_returns_of_another_key() {
    let world = world::memory();
    let limiter = world.start();
    let owing = Key::number(&limiter, 1);
    assert!(
        owing
            .ask(&Plan::any_rate().daily(1000), 1)
            .await
            .is_allowed()
    );
    settle().await;
    world.ledger.set_return_delay(Duration::from_secs(5));
    world.ledger.set_delay(Duration::from_millis(10));
    let mut requests = JoinSet::new();
    // A smaller quota has smaller blocks, so key 1 returns the tokens that it holds in excess of such a block.
    for n in 1..=20 {
        let key = Key::number(&limiter, n);
        let daily = if n == 1 { 200 } else { 1000 };
        requests.spawn(async move { key.ask(&Plan::any_rate().daily(daily), 1).await });
    }
    let began = tokio::time::Instant::now();
    let decisions = requests.join_all().await;
    assert!(decisions.iter().all(Decision::is_allowed));
    assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
    limiter.drain().await;
    world.ledger.set_return_delay(Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn tokens_are_returned_if_the_take_of_another_key_panics() {
    let world = world::memory();
    let limiter = world.start();
    let owing = Key::number(&limiter, 1);
    let decision = owing.ask(&Plan::any_rate().daily(1000), 1).await;
    assert!(decision.is_allowed());
    settle().await;
    assert!(world.ledger.used() > 5);
    world.ledger.panic_next();
    let mut requests = JoinSet::new();
    // A smaller quota has smaller blocks, so the first key returns the tokens that it holds in excess of such a block.
    for (n, daily) in [(1, 200), (2, 1000)] {
        let key = Key::number(&limiter, n);
        let plan = Plan::any_rate().daily(daily);
        requests.spawn(async move { key.try_ask(&plan, 1).await.is_ok_and(|it| it.is_allowed()) });
    }
    let allowed = requests.join_all().await;
    let allowed = allowed.into_iter().filter(|it| *it).count() as u64;
    assert!(allowed < 2, "no take panicked");
    assert_eq!(limiter.drain().await.lost, 0);
    assert_eq!(world.ledger.used(), 1 + allowed);
}

#[tokio::test]
async fn nothing_is_held_after_a_drain_with_calls_in_flight() {
    let world = world::memory();
    let limiter = world.start();
    let plan = Plan::any_rate().daily(1000).monthly(100_000);
    for n in 0..50 {
        let key = Key::number(&limiter, n);
        assert_eq!(key.admitted(&plan, 8).await, 8);
    }
    // The eighth request of a key starts a fetch. Fetches that have not completed are slow from now on.
    world.ledger.set_delay(Duration::from_millis(20));
    for n in 0..50 {
        Key::number(&limiter, n).admitted(&plan, 1).await;
    }
    let drained = limiter.drain().await;
    assert!(drained.given_back > 0);
    assert_eq!(drained.lost, 0);
    assert_eq!(world.ledger.used(), 2 * 50 * 9);
}

#[tokio::test]
async fn drain_reports_what_it_could_not_return() {
    let world = world::memory();
    let key = Key::of(&world.start());
    key.ask(&Plan::any_rate().daily(1000), 1).await;
    settle().await;
    world.ledger.set_down(true);
    let drained = key.limiter.drain().await;
    assert_eq!((drained.given_back, drained.lost), (0, 9));
}

#[tokio::test]
async fn remote_store_is_not_asked_about_known_denials() {
    let world = world::far();
    let store = Far::new(memory_store(&world.clock, &world.ledger));
    assert!(!store.is_local());
    let limiter = Limiter::new(Arc::clone(&store) as _, Arc::new(world.clock.clone()));
    let key = Key::of(&limiter);
    let plan = Plan::rate(60, 10).daily(1000);
    assert_eq!(key.admitted(&plan, 1000).await, 10);
    assert!(store.asked() <= 11, "{}", store.asked());
    world.advance(Duration::from_secs(1));
    assert_eq!(key.admitted(&plan, 100).await, 1);
    assert!(store.asked() <= 12);
    // A denial for one cost does not apply to a lower cost.
    world.advance(Duration::from_secs(2));
    assert!(!key.ask(&plan, 5).await.is_allowed());
    assert!(key.ask(&plan, 2).await.is_allowed());
    // The requests above have used 13 of the 20 tokens of this daily quota. Seven more requests exhaust the quota, and
    // further requests are denied until tomorrow.
    let plan = Plan::any_rate().daily(20);
    assert_eq!(key.admitted(&plan, 500).await, 7);
    assert!(store.asked() <= 12 + 11, "{}", store.asked());
    // The denial does not apply to another plan.
    assert!(key.ask(&Plan::any_rate().daily(21), 1).await.is_allowed());
}

/// A replica whose clock is set back keeps denying requests for as long as the bucket takes to refill, not for the time
/// by which the clock was set back.
#[tokio::test]
async fn known_denials_state_the_same_wait_after_the_clock_was_set_back() {
    for burst in [1, 3] {
        let world = world::far();
        let key = Key::of(&world.start());
        let plan = Plan::rate(1, burst);
        let used = u64::from(burst);
        assert_eq!(key.admitted(&plan, burst + 1).await, used);
        let hour_ago = world.now().0 - 3_600_000_000_000;
        world
            .clock
            .set_now(quota_server::clock::UnixNanos(hour_ago));
        world.advance(Duration::from_secs(10));
        let decision = key.ask(&plan, 1).await;
        assert_eq!(decision.retry_after_secs(), Some(50), "{decision:?}");
        assert_eq!(decision.seconds_to_reset(decision.rate), 60 * used - 10);
        // Because of the clock change, the bucket loses at most one refilled token.
        world.advance(Duration::from_secs(50));
        key.ask(&plan, 1).await;
        world.advance(Duration::from_secs(60));
        assert!(key.ask(&plan, 1).await.is_allowed());
    }
}

#[tokio::test]
async fn ledger_that_panics_or_hangs_counts_as_failed() {
    #[derive(Debug)]
    struct Broken(std::sync::atomic::AtomicBool);

    #[async_trait::async_trait]
    impl quota_server::limiter::QuotaLedger for Broken {
        async fn take(&self, requests: &[TakeRequest]) -> Vec<Result<Taken, LedgerError>> {
            assert!(
                self.0.load(std::sync::atomic::Ordering::SeqCst),
                "a ledger that panics"
            );
            let take = |request: &TakeRequest| {
                Ok(Taken {
                    window: QuotaWindow::whole(request.calendar),
                    granted: request.want,
                    used: request.want,
                })
            };
            requests.iter().map(take).collect()
        }

        async fn give_back(&self, _: &ReturnBatch) -> Result<(), LedgerError> {
            Ok(())
        }
    }

    let world = world::memory();
    let ledger = Arc::new(Broken(false.into()));
    let store = LocalStore::new(
        Arc::new(world.clock.clone()),
        Arc::clone(&ledger) as _,
        KeyTableSettings::default(),
    );
    let key = Key::of(&Limiter::new(store, Arc::new(world.clock.clone())));
    let plan = Plan::any_rate().daily(10);
    assert!(matches!(
        key.try_ask(&plan, 1).await,
        Err(LimiterError::LedgerUnavailable(_))
    ));
    ledger.0.store(true, std::sync::atomic::Ordering::SeqCst);
    world.advance(Duration::from_secs(1));
    assert!(key.ask(&plan, 1).await.is_allowed());
}

/// The replicas share only the ledger.
#[tokio::test]
async fn two_replicas_with_one_ledger_share_a_quota() {
    let world = world::memory();
    let ledger = TestLedger::new();
    let plan = Plan::any_rate().daily(1000);
    let replicas: Vec<_> = (0..2)
        .map(|_| {
            let store = memory_store(&world.clock, &ledger);
            Key::of(&Limiter::new(store, Arc::new(world.clock.clone())))
        })
        .collect();
    let mut admitted = 0;
    for round in 0..300 {
        admitted += replicas[round % 2].admitted(&plan, 7).await;
    }
    assert!((990..=1000).contains(&admitted), "{admitted}");
}
