//! Tests of calendar quotas with shared counters: a burst takes the tokens it needs in a few calls, and no replica
//! keeps tokens that another replica needs. The tests run in simulated time, on models of the counters and the ledger.

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::Arc,
    time::Duration,
};

use quota_common::plan::OnRedisFailure;
use quota_server::{
    clock::Monotonic,
    limiter::{Membership, Policies, RatePolicy, ReplicaSlot, Zone},
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::bursts::{Far, Replica, admitted};
use crate::limiter_contract::TestLedger;

fn plan(rate: u32, daily: u64, strict: bool) -> Policies {
    let rate = RatePolicy {
        rpm: NonZeroU32::new(rate).unwrap(),
        burst: NonZeroU32::new(rate).unwrap(),
    };
    Policies::new(rate, NonZeroU64::new(daily), None, Zone::utc(), strict)
}

/// Creates `count` replicas, which believe that there are `of` replicas.
fn replicas(far: &Far, ledger: &Arc<TestLedger>, count: u64, of: u64) -> Vec<Replica> {
    (0..count)
        .map(|rank| {
            let membership = Arc::new(Membership::default());
            let of = NonZeroU64::new(of).unwrap();
            membership.confirm(ReplicaSlot { rank, of }, Monotonic::default());
            far.replica_on(Arc::clone(ledger), OnRedisFailure::Share, membership)
        })
        .collect()
}

#[tokio::test(start_paused = true)]
async fn a_burst_takes_its_quota_in_two_calls() {
    for (of, strict) in [(1, false), (1, true), (10, false), (10, true)] {
        let far = Far::new(Duration::from_millis(10));
        let ledger = TestLedger::new();
        ledger.set_delay(Duration::from_millis(10));
        let replica = replicas(&far, &ledger, 1, of).remove(0);
        let policies = plan(600, 1000, strict);
        assert!(replica.admit(&policies, 1).await.is_allowed());
        sleep(Duration::from_secs(1)).await;
        let (calls, takes, used) = (far.calls(), ledger.takes(), ledger.used());
        let taken = replica.metrics.lease_tokens_taken.get();
        let began = Instant::now();
        let served = u64::from(admitted(&replica.at_once(&policies, &[1; 600]).await));
        let what = format!("{of} replicas, strict {strict}");
        assert_eq!(served, 600, "{what}");
        assert!(
            began.elapsed() <= Duration::from_millis(60),
            "{what}: {:?}",
            began.elapsed()
        );
        let (calls, takes) = (far.calls() - calls, ledger.takes() - takes);
        assert!(calls <= 4, "{calls} calls to the counters: {what}");
        assert!(takes <= 3, "{takes} calls to the ledger: {what}");
        let taken = replica.metrics.lease_tokens_taken.get() - taken;
        assert!(taken <= 700, "{taken} tokens of the rate taken: {what}");
        assert!(
            (600 - 10..=600 + 20).contains(&(ledger.used() - used)),
            "{what}"
        );
    }
}

/// If the quota or the rate is exhausted within the burst, exactly the available tokens are spent, and tokens that were
/// taken for denied requests are returned.
#[tokio::test(start_paused = true)]
async fn a_burst_beyond_the_quota_or_the_rate_is_served_exactly() {
    for (rate, daily, strict) in [(500, 300, true), (500, 300, false), (100, 300, true)] {
        let far = Far::new(Duration::from_millis(10));
        let ledger = TestLedger::new();
        ledger.set_delay(Duration::from_millis(10));
        let replica = replicas(&far, &ledger, 1, 10).remove(0);
        let policies = plan(rate, daily, strict);
        let decisions = replica.at_once(&policies, &[1; 400]).await;
        let served = u64::from(admitted(&decisions));
        let sold = u64::from(rate).min(daily);
        assert!((sold..=sold + 1).contains(&served), "{served} of {sold}");
        for (_, decision) in &decisions {
            assert_eq!(decision.is_allowed(), decision.violated().is_empty());
        }
        sleep(Duration::from_millis(500)).await;
        let held = ledger.used() - served;
        assert!(
            held <= 1,
            "{held} tokens of the quota are held for no request"
        );
    }
}

/// Requests that are dropped at any point consume none of the quota.
#[tokio::test(start_paused = true)]
async fn dropped_requests_return_their_quota_tokens() {
    for dropped_after in [0, 5, 12, 18, 22, 28, 35, 45] {
        let far = Far::new(Duration::from_millis(10));
        let ledger = TestLedger::new();
        ledger.set_delay(Duration::from_millis(10));
        let replica = replicas(&far, &ledger, 1, 10).remove(0);
        let policies = plan(600, 300, true);
        let mut requests = JoinSet::new();
        for _ in 0..250 {
            let (it, policies) = (replica.clone(), policies.clone());
            requests.spawn(async move { it.admit(&policies, 1).await });
        }
        sleep(Duration::from_millis(dropped_after)).await;
        requests.abort_all();
        let mut served = 0;
        while let Some(it) = requests.join_next().await {
            served += u64::from(it.is_ok_and(|it| it.is_allowed()));
        }
        sleep(Duration::from_secs(1)).await;
        assert!(ledger.used() <= served + 1, "{} of {served}", ledger.used());
        sleep(Duration::from_mins(1)).await;
        let rest = u64::from(admitted(&replica.at_once(&policies, &[1; 320]).await));
        assert_eq!(served + rest, 300, "after {dropped_after} ms");
    }
}

/// All replicas but one serve a single request and then none. The remaining replica is granted exactly the rest of the
/// quota.
#[tokio::test(start_paused = true)]
async fn blocks_of_idle_replicas_go_to_the_busy_ones() {
    for (of, daily) in [(2, 1000), (2, 10_000), (3, 1000), (3, 10_000)] {
        let far = Far::new(Duration::from_millis(1));
        let ledger = TestLedger::new();
        let all = replicas(&far, &ledger, of, of);
        // Keep the handles, as cached key records do.
        let _handles: Vec<_> = all.iter().map(|it| it.handle(7)).collect();
        let policies = plan(600_000, daily, false);
        let (busy, idle) = all.split_last().unwrap();
        let mut served = 0;
        for it in idle {
            served += u64::from(it.admit(&policies, 1).await.is_allowed());
        }
        assert_eq!(served, of - 1);
        for _ in 0..daily {
            served += u64::from(busy.admit(&policies, 1).await.is_allowed());
            if served + 60 > daily {
                sleep(Duration::from_millis(2)).await;
            }
        }
        assert!(served <= daily);
        for second in 0..60 {
            sleep(Duration::from_secs(1)).await;
            if second % 10 == 0 {
                for it in &all {
                    it.limiter.prune();
                }
            }
            for _ in 0..20 {
                served += u64::from(busy.admit(&policies, 1).await.is_allowed());
                sleep(Duration::from_millis(2)).await;
            }
        }
        assert_eq!(served, daily, "{of} replicas");
        assert_eq!(ledger.used(), daily);
    }
}
