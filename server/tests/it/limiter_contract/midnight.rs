//! Tests with many keys: at midnight, and when the limiter stops.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use quota_server::limiter::Limiter;

use super::world::{self, Key, ONE, Plan, World, memory_store};

/// The maximum number of concurrent ledger calls: well below the size of a connection pool.
const AT_ONCE: u64 = 6;
const KEYS: u64 = 3000;

/// Waits for the background work of thousands of keys to complete.
async fn settle_all() {
    for _ in 0..2000 {
        tokio::task::yield_now().await;
    }
}

fn keys(limiter: &Limiter) -> Vec<Key> {
    (0..KEYS)
        .map(|n| Key::number(limiter, u128::from(n)))
        .collect()
}

fn both() -> Plan {
    Plan::any_rate().daily(1000).monthly(30_000)
}

/// Sends one request per key, and advances from 10:00 to 23:49.
async fn spend_the_day(world: &World, keys: &[Key]) {
    for key in keys {
        assert!(key.ask(&both(), 1).await.is_allowed());
    }
    settle_all().await;
    world.advance(Duration::from_mins(13 * 60 + 49));
}

/// Advances to just before midnight, and prunes every ten seconds. Returns the maximum number of blocks taken within
/// ten seconds.
async fn approach_midnight(world: &World, limiter: &Limiter) -> u64 {
    let mut most = 0;
    for _ in 0..65 {
        world.advance(Duration::from_secs(10));
        let before = world.ledger.takes();
        limiter.prune();
        settle_all().await;
        most = most.max(world.ledger.takes() - before);
    }
    world.advance(Duration::from_nanos(9_999_999_999));
    most
}

#[tokio::test]
async fn no_request_waits_at_midnight_and_the_next_day_is_served_in_full() {
    let world = world::memory();
    let limiter = world.start();
    let keys = keys(&limiter);
    spend_the_day(&world, &keys).await;
    let (calls, _) = world.ledger.calls();
    let most = approach_midnight(&world, &limiter).await;
    let ahead = world.ledger.calls().0 - calls;
    assert!(
        ahead >= 60,
        "{ahead} calls fetched blocks of the next day for {KEYS} keys"
    );
    assert!(
        most < KEYS / 10,
        "{most} blocks for {KEYS} keys in ten seconds"
    );
    let (_, at_once) = world.ledger.calls();
    assert!(at_once <= AT_ONCE, "{at_once} calls at once");

    world.advance(Duration::from_nanos(1));
    let policies = both().policies();
    for key in &keys {
        let decision = limiter.try_admit(&key.handle, &policies, ONE);
        let decision = decision.expect("the first block of the day was prefetched");
        assert!(decision.is_allowed());
        assert_eq!(decision.daily.unwrap().remaining, 999);
    }
    settle_all().await;
    let (_, at_once) = world.ledger.calls();
    assert!(at_once <= AT_ONCE, "{at_once} calls at once");
    // Exactly the quota of the new day is available.
    for key in keys.iter().step_by(500) {
        assert_eq!(key.admitted(&both(), 1100).await, 999);
    }
    let (spent_keys, all) = (keys.iter().step_by(500).count() as u64, KEYS);
    assert_eq!(limiter.drain().await.lost, 0);
    let admitted = 2 * all + 999 * spent_keys;
    assert_eq!(world.ledger.used(), 2 * admitted);
}

#[tokio::test]
async fn stop_just_before_midnight_returns_the_blocks_of_both_days() {
    let world = world::memory();
    let limiter = world.start();
    let keys = keys(&limiter);
    spend_the_day(&world, &keys).await;
    approach_midnight(&world, &limiter).await;
    let (all, block) = (KEYS, 10);
    assert!(
        world.ledger.used() >= all * (300 + 2 * block),
        "no second block is held"
    );
    assert_eq!(limiter.drain().await.lost, 0);
    assert_eq!(world.ledger.used(), 2 * all);
}

/// No requests are sent in the minutes before midnight, and the limiter is not pruned. Then, a request for every key
/// arrives at the same time.
#[tokio::test(start_paused = true)]
async fn midnight_without_prefetching_takes_few_calls() {
    let world = world::memory();
    let limiter = world.start();
    let keys = keys(&limiter);
    spend_the_day(&world, &keys).await;
    world.advance(Duration::from_mins(11));
    world.ledger.set_delay(Duration::from_millis(5));
    let (calls, _) = world.ledger.calls();
    let plan = both();
    let decisions = join_all(keys.iter().map(|key| key.try_ask(&plan, 1))).await;
    for decision in decisions {
        assert!(decision.expect("the ledger responds in time").is_allowed());
    }
    let (after, at_once) = world.ledger.calls();
    assert!(at_once <= AT_ONCE, "{at_once} calls at once");
    assert!(after - calls < 100, "{} calls", after - calls);
}

#[tokio::test]
async fn stop_returns_every_block_in_few_calls() {
    let world = world::memory();
    let limiter = world.start();
    for key in &keys(&limiter) {
        assert!(key.ask(&both(), 1).await.is_allowed());
    }
    let (calls, _) = world.ledger.calls();
    let drained = limiter.drain().await;
    assert_eq!(drained.lost, 0);
    assert_eq!(world.ledger.used(), 2 * KEYS);
    let (after, _) = world.ledger.calls();
    assert!(after - calls <= 12, "{} calls", after - calls);
}

/// After a lost response, it is unknown whether the tokens were credited. The same batch is sent again.
#[tokio::test(start_paused = true)]
async fn stop_with_lost_responses_credits_every_token_once() {
    let world = world::memory();
    let limiter = world.start();
    for key in &keys(&limiter) {
        assert!(key.ask(&both(), 1).await.is_allowed());
    }
    world.ledger.lose_answers(4);
    let drained = limiter.drain().await;
    assert_eq!(drained.lost, 0);
    // A key holds 9 daily tokens and 299 monthly tokens.
    assert_eq!(drained.given_back, KEYS * (9 + 299));
    assert_eq!(world.ledger.used(), 2 * KEYS);
}

#[tokio::test(start_paused = true)]
async fn stop_waits_out_a_short_outage() {
    let world = world::memory();
    let limiter = world.start();
    for key in &keys(&limiter) {
        assert!(key.ask(&both(), 1).await.is_allowed());
    }
    world.ledger.set_down(true);
    let ledger = Arc::clone(&world.ledger);
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        ledger.set_down(false);
    });
    assert_eq!(limiter.drain().await.lost, 0);
    assert_eq!(world.ledger.used(), 2 * KEYS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn stop_under_load_leaves_exactly_what_was_admitted() {
    for round in 0..10 {
        let world = world::memory();
        let store = memory_store(&world.clock, &world.ledger);
        let limiter = Limiter::new(store, Arc::new(world.clock.clone()));
        world.ledger.set_delay(Duration::from_millis(round % 4));
        let admitted = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = Vec::new();
        for n in 0..24_u128 {
            let key = Key::number(&limiter, n % 8);
            let (admitted, stop) = (Arc::clone(&admitted), Arc::clone(&stop));
            tasks.push(tokio::spawn(async move {
                let plan = both();
                while !stop.load(Ordering::SeqCst) {
                    if let Ok(decision) = key.try_ask(&plan, 1).await {
                        admitted.fetch_add(u64::from(decision.is_allowed()), Ordering::SeqCst);
                    }
                    tokio::task::yield_now().await;
                }
            }));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(limiter.drain().await.lost, 0);
        let used = world.ledger.used();
        stop.store(true, Ordering::SeqCst);
        for task in tasks {
            task.await.unwrap();
        }
        let admitted = admitted.load(Ordering::SeqCst);
        assert!(admitted > 0);
        assert_eq!(used, 2 * admitted, "round {round}");
        assert_eq!(
            world.ledger.used(),
            used,
            "tokens were taken after the drain"
        );
    }
}

/// Blocks held for unused keys are returned while the server is running, not only when it stops.
#[tokio::test]
async fn blocks_of_evicted_keys_are_returned() {
    let world = world::memory();
    let limiter = world.start();
    for key in keys(&limiter) {
        assert!(key.ask(&both(), 1).await.is_allowed());
    }
    // The keys' buckets are full again, and no cached key record refers to the keys' handles.
    world.advance(Duration::from_secs(1));
    limiter.prune();
    settle_all().await;
    assert_eq!(world.ledger.used(), 2 * KEYS);
    assert_eq!(limiter.prune(), 0);
}
