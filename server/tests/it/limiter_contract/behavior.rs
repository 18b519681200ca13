//! Tests of the contract of `LimitStore`.

use std::{sync::Arc, time::Duration};

use quota_server::limiter::{LimiterError, Outcome, Policy, PolicySet};

use super::world::{DEADLINE, Key, Plan, START, World, settle};

const SECOND: u64 = 1_000_000_000;
const DAY: Duration = Duration::from_hours(24);

fn set(policies: &[Policy]) -> PolicySet {
    policies.iter().copied().collect()
}

pub(super) async fn idle_key_gets_its_burst_and_then_waits_exactly(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::rate(60, 5);
    for left in (0..5).rev() {
        let decision = key.ask(&plan, 1).await;
        assert!(decision.is_allowed());
        assert_eq!(decision.rate.remaining, left);
        assert_eq!(decision.rate.limit, 5);
        assert_eq!(decision.rate.reset_at.0, START.0 + (5 - left) * SECOND);
    }
    world.advance(Duration::from_millis(300));
    let denied = key.ask(&plan, 1).await;
    assert_eq!(denied.violated(), set(&[Policy::Rpm]));
    assert_eq!(denied.retry_after(), Some(700_000_000));
    assert_eq!(denied.retry_after_secs(), Some(1));

    world.advance(Duration::from_nanos(699_999_999));
    assert!(!key.ask(&plan, 1).await.is_allowed());
    world.advance(Duration::from_nanos(1));
    assert!(key.ask(&plan, 1).await.is_allowed());
}

pub(super) async fn steady_key_gets_its_rate(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::rate(600, 1);
    for _ in 0..1000 {
        assert!(key.ask(&plan, 1).await.is_allowed());
        assert!(!key.ask(&plan, 1).await.is_allowed());
        world.advance(Duration::from_millis(100));
    }
}

pub(super) async fn denial_by_rate_consumes_no_quota(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::rate(60, 2).daily(1000).monthly(10_000);
    assert_eq!(key.admitted(&plan, 50).await, 2);
    let denied = key.ask(&plan, 1).await;
    assert_eq!(denied.violated(), set(&[Policy::Rpm]));
    assert_eq!(denied.daily.unwrap().remaining, 998);
    assert_eq!(denied.monthly.unwrap().remaining, 9998);
}

pub(super) async fn denial_by_quota_consumes_no_rate(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::rate(600, 100).daily(3).monthly(10_000);
    assert_eq!(key.admitted(&plan, 50).await, 3);
    let denied = key.ask(&plan, 1).await;
    assert_eq!(denied.violated(), set(&[Policy::Daily]));
    assert_eq!(denied.rate.remaining, 97);
    assert_eq!(denied.daily.unwrap().remaining, 0);
    assert_eq!(denied.monthly.unwrap().remaining, 9997);
}

pub(super) async fn every_violated_policy_is_named_with_the_longest_wait(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::rate(60, 2).daily(2).monthly(2);
    assert_eq!(key.admitted(&plan, 2).await, 2);
    let denied = key.ask(&plan, 1).await;
    assert_eq!(
        denied.violated(),
        set(&[Policy::Rpm, Policy::Daily, Policy::Monthly])
    );
    // 2026-12-01T00:00:00Z
    let december = 1_796_083_200 * SECOND;
    assert_eq!(denied.retry_after(), Some(december - world.now().0));
    assert_eq!(denied.nearest().policy, Policy::Monthly);

    world.advance(Duration::from_nanos(denied.retry_after().unwrap() - 1));
    assert_eq!(key.ask(&plan, 1).await.retry_after(), Some(1));
    world.advance(Duration::from_nanos(1));
    assert!(key.ask(&plan, 1).await.is_allowed());
}

pub(super) async fn cost_above_a_limit_is_denied_and_consumes_nothing(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::rate(600, 100).daily(50).monthly(5000);
    for (cost, violated) in [
        (101, set(&[Policy::Rpm, Policy::Daily])),
        (51, set(&[Policy::Daily])),
        (
            u32::MAX,
            set(&[Policy::Rpm, Policy::Daily, Policy::Monthly]),
        ),
    ] {
        let denied = key.ask(&plan, cost).await;
        let retry_after = None;
        assert_eq!(
            denied.outcome,
            Outcome::Denied {
                violated,
                retry_after
            }
        );
        assert_eq!(denied.rate.remaining, 100);
        assert_eq!(denied.daily.unwrap().remaining, 50);
    }
    settle().await;
    assert!(key.ask(&plan, 50).await.is_allowed());
}

pub(super) async fn cost_is_taken_as_a_whole(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::rate(60, 10).daily(1000);
    let decision = key.ask(&plan, 7).await;
    assert_eq!(decision.rate.remaining, 3);
    assert_eq!(decision.daily.unwrap().remaining, 993);
    let denied = key.ask(&plan, 4).await;
    assert_eq!(denied.retry_after(), Some(SECOND));
    assert!(key.ask(&plan, 3).await.is_allowed());
    // A cost of 900 is more than one block of the quota.
    let plan = Plan::any_rate().daily(1000);
    let decision = key.ask(&plan, 900).await;
    assert!(decision.is_allowed());
    assert_eq!(decision.daily.unwrap().remaining, 90);
}

pub(super) async fn quota_resets_with_the_local_day(world: &World) {
    let key = Key::of(&world.start());
    // 2026-11-24T10:00Z is 19:00 in Tokyo and 02:00 in Los Angeles.
    for (n, zone, hours) in [(1, "Asia/Tokyo", 5), (2, "America/Los_Angeles", 22)] {
        let key = Key::number(&key.limiter, n);
        let plan = Plan::any_rate().daily(3).zone(zone);
        assert_eq!(key.admitted(&plan, 5).await, 3);
        let denied = key.ask(&plan, 1).await;
        let wait = START.0 + hours * 3600 * SECOND - world.now().0;
        assert_eq!(denied.retry_after(), Some(wait), "{zone}");
        world.advance(Duration::from_nanos(wait - 1));
        assert!(!key.ask(&plan, 1).await.is_allowed());
        world.advance(Duration::from_nanos(1));
        assert_eq!(key.admitted(&plan, 5).await, 3);
    }
}

pub(super) async fn quota_resets_with_the_month(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::any_rate().monthly(100);
    let mut admitted = 0;
    // Send twelve requests every half day for six days, until November 30.
    for _ in 0..12 {
        admitted += key.admitted(&plan, 12).await;
        settle().await;
        world.advance(DAY / 2);
    }
    assert_eq!(admitted, 100);
    world.advance(DAY / 2 + Duration::from_hours(2));
    assert_eq!(key.admitted(&plan, 150).await, 100);
}

pub(super) async fn change_of_time_zone_grants_no_new_quota(world: &World) {
    let key = Key::of(&world.start());
    let mut admitted = 0;
    for zone in ["UTC", "Asia/Tokyo", "Pacific/Honolulu", "UTC"] {
        let plan = Plan::any_rate().daily(50).zone(zone);
        admitted += key.admitted(&plan, 60).await;
        let denied = key.ask(&plan, 1).await;
        // The day that began in UTC also ends in UTC.
        assert_eq!(denied.retry_after(), Some(14 * 3600 * SECOND), "{zone}");
    }
    assert_eq!(admitted, 50);
}

pub(super) async fn stopped_clock_refills_nothing(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::rate(60_000_000, 10);
    assert_eq!(key.admitted(&plan, 10_000).await, 10);
}

pub(super) async fn clock_set_back_does_not_lock_keys_out(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::rate(60, 10);
    assert_eq!(key.admitted(&plan, 20).await, 10);
    world
        .clock
        .set_now(quota_server::clock::UnixNanos(START.0 - 7200 * SECOND));
    let denied = key.ask(&plan, 1).await;
    assert_eq!(denied.retry_after(), Some(SECOND));
    world.advance(Duration::from_secs(1));
    assert_eq!(key.admitted(&plan, 20).await, 1);
}

pub(super) async fn larger_burst_is_available_immediately_less_what_was_used(world: &World) {
    let key = Key::of(&world.start());
    assert_eq!(key.admitted(&Plan::rate(60, 10), 4).await, 4);
    let larger = Plan::rate(6000, 100);
    assert_eq!(key.ask(&larger, 1).await.rate.remaining, 95);
    // A cached denial no longer applies once the plan that caused it has changed.
    let key = Key::number(&key.limiter, 8);
    assert_eq!(key.admitted(&Plan::rate(1, 2), 4).await, 2);
    assert_eq!(key.admitted(&Plan::rate(1, 5), 9).await, 3);
}

pub(super) async fn smaller_burst_is_not_a_new_one(world: &World) {
    let key = Key::of(&world.start());
    let (large, small) = (Plan::rate(60, 100), Plan::rate(60, 10));
    assert_eq!(key.admitted(&large, 95).await, 95);
    assert_eq!(key.admitted(&small, 20).await, 0);
    // Raising the burst again grants no new burst either.
    assert_eq!(key.admitted(&large, 200).await, 5);
    assert_eq!(key.admitted(&small, 20).await, 0);
    world.advance(Duration::from_secs(3));
    assert_eq!(key.admitted(&small, 20).await, 3);
}

pub(super) async fn lowering_and_raising_the_burst_grants_nothing(world: &World) {
    let key = Key::of(&world.start());
    let (large, small) = (Plan::rate(60, 100), Plan::rate(60, 10));
    assert_eq!(key.admitted(&large, 200).await, 100);
    assert_eq!(key.admitted(&small, 20).await, 0);
    world.advance(Duration::from_secs(4));
    assert_eq!(key.admitted(&large, 200).await, 4);
    // The small bucket is full after ten seconds. The large bucket keeps refilling after that.
    assert_eq!(key.admitted(&small, 20).await, 0);
    world.advance(Duration::from_secs(30));
    assert_eq!(key.admitted(&small, 20).await, 10);
    assert_eq!(key.admitted(&large, 200).await, 20);
    world.advance(Duration::from_secs(100));
    assert_eq!(key.admitted(&large, 200).await, 100);
}

/// If the plan was edited while no requests were sent, the time of the edit is unknown. Therefore, until the first
/// request under the new plan, the bucket refills at the lower of the two rates.
pub(super) async fn idle_time_that_spans_an_edit_refills_at_the_lower_rate(world: &World) {
    let key = Key::of(&world.start());
    let (fast, slow) = (Plan::rate(6000, 100), Plan::rate(60, 100));
    assert_eq!(key.admitted(&fast, 200).await, 100);
    world.advance(Duration::from_secs(5));
    assert_eq!(key.admitted(&slow, 200).await, 5);
    world.advance(Duration::from_secs(5));
    assert_eq!(key.admitted(&fast, 200).await, 5);
    // From the first request on, the plan's rate applies.
    world.advance(Duration::from_millis(500));
    assert_eq!(key.admitted(&fast, 200).await, 50);
    // A smaller bucket also refills from empty, and holds at most its burst.
    world.advance(Duration::from_secs(30));
    assert_eq!(key.admitted(&Plan::rate(60, 10), 200).await, 10);
}

pub(super) async fn raised_quota_applies_immediately(world: &World) {
    let key = Key::of(&world.start());
    assert_eq!(key.admitted(&Plan::any_rate().daily(5), 9).await, 5);
    assert_eq!(key.admitted(&Plan::any_rate().daily(12), 20).await, 7);
    assert_eq!(key.admitted(&Plan::any_rate(), 20).await, 20);
}

pub(super) async fn lowered_quota_is_not_exceeded(world: &World) {
    let key = Key::of(&world.start());
    let high = Plan::any_rate().daily(10_000);
    assert_eq!(key.admitted(&high, 250).await, 250);
    settle().await;
    // The replica holds a block of the high quota. The low quota is exhausted before all tokens of this block are
    // spent.
    let low = Plan::any_rate().daily(260);
    assert_eq!(key.admitted(&low, 100).await, 10);
    settle().await;
    assert_eq!(world.ledger.used(), 260);
    assert_eq!(key.admitted(&Plan::any_rate().daily(100), 50).await, 0);
    assert_eq!(key.admitted(&Plan::any_rate().daily(300), 100).await, 40);
}

pub(super) async fn key_finds_its_handle_again(world: &World) {
    let limiter = world.start();
    let plan = Plan::rate(60, 10).daily(1000);
    let key = Key::of(&limiter);
    assert_eq!(key.admitted(&plan, 8).await, 8);
    assert!(Arc::ptr_eq(&key.handle, &Key::of(&limiter).handle));
    drop(key);
    settle().await;
    // A key is not pruned while tokens are missing from its bucket, or while it holds a block.
    assert_eq!(limiter.prune(), 1);
    assert_eq!(Key::of(&limiter).ask(&plan, 1).await.rate.remaining, 1);
    world.advance(Duration::from_mins(1));
    limiter.prune();
    settle().await;
    assert_eq!(limiter.prune(), 0);
    settle().await;
    assert_eq!(world.ledger.used(), 9, "the block was not returned");
    // A pruned key's usage is in the ledger.
    let decision = Key::of(&limiter).ask(&plan, 1).await;
    assert_eq!(decision.rate.remaining, 9);
    assert_eq!(decision.daily.unwrap().remaining, 990);
}

pub(super) async fn keys_do_not_share(world: &World) {
    let limiter = world.start();
    let plan = Plan::rate(60, 3).daily(5);
    for n in 0..200 {
        let key = Key::number(&limiter, n);
        assert_eq!(key.admitted(&plan, 5).await, 3, "key {n}");
    }
}

pub(super) async fn quotas_survive_a_clean_stop_exactly(world: &World) {
    let plan = Plan::any_rate().daily(1000).monthly(5000);
    let mut admitted = 0;
    for _ in 0..100 {
        let key = Key::of(&world.start());
        admitted += key.admitted(&plan, 17).await;
        let drained = key.limiter.drain().await;
        assert_eq!(drained.lost, 0);
        assert_eq!(world.ledger.used(), 2 * admitted);
        assert!(matches!(
            key.try_ask(&plan, 1).await,
            Err(LimiterError::Draining) | Ok(_)
        ));
    }
    assert_eq!(admitted, 1000);
}

pub(super) async fn quotas_survive_a_crash_except_for_a_block(world: &World) {
    let plan = Plan::any_rate().daily(1000);
    let before = Key::of(&world.start()).admitted(&plan, 333).await;
    assert_eq!(before, 333);
    // The replica exits without returning any tokens.
    let after = Key::of(&world.start()).admitted(&plan, 2000).await;
    assert!(before + after <= 1000);
    assert!(before + after >= 990, "{before} and {after}");
    assert!(world.ledger.largest() <= 10);

    // Each further crash strands at most one block, and no token is spent twice.
    world.advance(DAY);
    let (mut admitted, mut crashes) = (0, 0);
    loop {
        let one = Key::of(&world.start()).admitted(&plan, 37).await;
        admitted += one;
        if one == 0 {
            break;
        }
        crashes += 1;
    }
    assert!(admitted <= 1000);
    assert!(
        admitted >= 1000 - 10 * crashes,
        "{admitted} after {crashes}"
    );
}

pub(super) async fn failed_ledger_admits_nothing_and_does_not_affect_rates(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::rate(600, 100).daily(1000);
    assert_eq!(key.admitted(&plan, 5).await, 5);
    settle().await;
    world.ledger.set_down(true);
    // Tokens held locally are spent. After that, no request is admitted.
    let mut served = 0;
    let error = loop {
        match key.try_ask(&plan, 1).await {
            Ok(decision) => {
                assert!(decision.is_allowed());
                served += 1;
            }
            Err(error) => break error,
        }
        assert!(served < 11, "more than a block was spent");
    };
    assert!(matches!(error, LimiterError::LedgerUnavailable(_)));
    for _ in 0..20 {
        assert!(key.try_ask(&plan, 1).await.is_err());
    }
    let asked = world.ledger.takes();
    assert!(
        asked < 10,
        "a failing ledger was called for each request: {asked}"
    );
    // Neither a decision on a plan without quotas nor a denial by the rate limit needs the ledger.
    let other = Key::number(&key.limiter, 8);
    assert!(other.ask(&Plan::rate(60, 1), 1).await.is_allowed());
    assert!(!other.ask(&Plan::rate(60, 1).daily(9), 1).await.is_allowed());

    world.ledger.set_down(false);
    world.advance(Duration::from_secs(1));
    assert!(key.ask(&plan, 1).await.is_allowed());

    // If the ledger is slow, requests fail as if it were unavailable. Tokens that it grants late are spent by later
    // requests.
    world.advance(DAY);
    world.ledger.set_delay(DEADLINE * 2);
    assert!(matches!(
        key.try_ask(&plan, 1).await,
        Err(LimiterError::LedgerUnavailable(_))
    ));
    tokio::time::sleep(DEADLINE * 2).await;
    let asked = world.ledger.takes();
    assert!(key.ask(&plan, 1).await.is_allowed());
    assert_eq!(world.ledger.takes(), asked);
}

pub(super) async fn tokens_returned_by_others_are_found(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::any_rate().daily(1000);
    // Another replica holds nearly all tokens.
    assert!(key.ask(&plan, 1).await.is_allowed());
    world.ledger.adjust(|used| used + 980);
    assert_eq!(key.admitted(&plan, 50).await, 19);
    let asked = world.ledger.takes();
    assert_eq!(key.admitted(&plan, 1000).await, 0);
    settle().await;
    assert!(
        world.ledger.takes() <= asked + 1,
        "the ledger was called more than once for all denials"
    );

    world.ledger.adjust(|used| used - 100);
    for _ in 0..5 {
        world.advance(Duration::from_secs(1));
        key.admitted(&plan, 1).await;
        settle().await;
    }
    let found = key.admitted(&plan, 200).await;
    assert!((95..=100).contains(&found), "{found}");
}

pub(super) async fn peek_consumes_nothing(world: &World) {
    let key = Key::of(&world.start());
    let plan = Plan::rate(60, 10).daily(100);
    key.ask(&plan, 3).await;
    for _ in 0..100 {
        let seen = key.limiter.peek(&key.handle, &plan.policies());
        assert_eq!(seen.rate.remaining, 7);
        assert_eq!(seen.daily.unwrap().remaining, 97);
    }
}
