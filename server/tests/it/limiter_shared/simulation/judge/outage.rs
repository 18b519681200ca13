//! Checks the decisions that replicas make without Redis: when they make them, and how much they admit.

use quota_common::plan::OnRedisFailure;

use super::{
    super::{
        run::{Answer, Entry},
        scene::{Fault, FaultKind, Key, Plan, Replicas, Scene},
    },
    KNOWN, MS, RECOVERED, SECOND,
};

/// The time from the start of an outage until a replica no longer waits for Redis.
const NOTICED: u64 = 500 * MS;
/// The time from the start of an outage until a replica admits its share.
const SHARED: u64 = 1400 * MS;
/// Returns the times at which each replica got requests for any key in the partition of `key`.
pub(super) fn used(scene: &Scene, key: usize, entries: &[Entry]) -> Vec<Vec<u64>> {
    let mut used = vec![Vec::new(); scene.replica_bounds().1];
    for it in entries {
        if scene.partition(it.key) == scene.partition(key) {
            used[it.replica].push(it.asked);
        }
    }
    used
}

/// How long after a request a replica still counts as using a partition of a cluster.
const IN_USE: u64 = 9 * SECOND;

/// Returns whether the counters may have to start with empty buckets because of `fault`: they lose their state, or no
/// replica that uses them gets a response for too long. While some replicas get responses, or most calls succeed, the
/// counters keep their state.
pub(super) fn may_lose_state(scene: &Scene, fault: &Fault, used: &[Vec<u64>]) -> bool {
    let from = fault.at * MS;
    let has_used = |replica: usize| {
        let mut times = used[replica].iter();
        times.any(|at| *at < from && from < at + IN_USE)
    };
    let uses = |replica: usize| scene.partitions == 1 || has_used(replica);
    let are_all = |replicas: Replicas| {
        scene
            .present(fault)
            .all(|replica| replicas.contains(replica) || !uses(replica))
    };
    match fault.kind {
        FaultKind::Restart
        | FaultKind::FailOver
        | FaultKind::Cut
        | FaultKind::Deaf
        | FaultKind::Stall => true,
        FaultKind::CutSome { replicas, .. } => are_all(replicas),
        FaultKind::Late {
            replicas, percent, ..
        }
        | FaultKind::Lost { replicas, percent } => percent == 100 && are_all(replicas),
        FaultKind::Slow(_) => false,
    }
}

/// How long calls of a replica must fail before the replica may consider the counters unavailable.
const SILENCE: u64 = 200 * MS;

/// Returns whether no response arrives in time for a while, although `fault` affects only a fraction of the calls.
/// Several calls in a row may fail by coincidence. If this happens to every replica, the counters must start with empty
/// buckets.
pub(super) fn is_silent(fault: &Fault, heard: &[u64]) -> bool {
    let is_partial = match fault.kind {
        FaultKind::Late { percent, .. } | FaultKind::Lost { percent, .. } => percent < 100,
        _ => false,
    };
    let (from, until) = (fault.at * MS, fault.end() * MS);
    let mut times: Vec<u64> = heard
        .iter()
        .copied()
        .filter(|at| (from..until).contains(at))
        .collect();
    times.extend([from, until]);
    times.sort_unstable();
    is_partial && times.windows(2).any(|pair| pair[1] - pair[0] >= SILENCE)
}

/// Returns whether `fault` affects calls of a replica.
fn affects(fault: &Fault, replica: usize) -> bool {
    match fault.kind {
        FaultKind::CutSome { replicas, .. }
        | FaultKind::Late { replicas, .. }
        | FaultKind::Lost { replicas, .. } => replicas.contains(replica),
        _ => true,
    }
}

/// Returns whether no response reaches the affected replicas in time during `fault`.
pub(super) fn is_outage(fault: &Fault) -> bool {
    match fault.kind {
        FaultKind::Late { percent, .. } | FaultKind::Lost { percent, .. } => percent == 100,
        FaultKind::Slow(_) => false,
        _ => true,
    }
}

/// Returns a description of a decision without Redis that no fault explains, if there is one.
pub(super) fn disconnected(scene: &Scene, entries: &[Entry], used: &[Vec<u64>]) -> Option<String> {
    let is_explained = |it: &Entry| {
        scene.faults.iter().any(|fault| {
            let is_near = fault.at * MS <= it.answered && it.asked <= fault.end() * MS + RECOVERED;
            is_near && (affects(fault, it.replica) || may_lose_state(scene, fault, used))
        })
    };
    let found = entries.iter().find(|it| it.degraded && !is_explained(it))?;
    Some(format!("decided without Redis: {found:?}"))
}

/// Returns the plan of all requests between `from` and `until`, and its number. Returns `None` if the plan was edited
/// in this period or just before it.
fn unedited(key: &Key, from: u64, until: u64) -> Option<(usize, Plan)> {
    let number = key.plans.iter().filter(|it| it.from * MS < until).count() - 1;
    let plan = key.plans[number];
    (number == 0 || plan.from * MS + KNOWN < from).then_some((number, plan))
}

/// Returns a description of an outage in which a replica serves less than the fallback setting allows, if there is one.
pub(super) fn under_in_outage(scene: &Scene, key: &Key, entries: &[Entry]) -> Option<String> {
    scene.faults.iter().find_map(|fault| {
        (0..scene.replicas)
            .filter(|replica| is_outage(fault) && affects(fault, *replica))
            .find_map(|replica| {
                let of_replica: Vec<&Entry> =
                    entries.iter().filter(|it| it.replica == replica).collect();
                let (served, due) = served_in_outage(scene, key, fault, &of_replica)?;
                let dearest = of_replica.iter().map(|it| it.cost).max().unwrap_or(1);
                (served + f64::from(dearest) + 1.0 < 0.99 * due).then(|| {
                    format!("{served} of {due} tokens served by replica {replica} during {fault:?}")
                })
            })
    })
}

/// Returns how many tokens a replica served in an outage, and how many it should have served.
///
/// A request that gets no response from Redis takes its tokens when the replica decides it, not when it is sent. Until
/// then, a full bucket does not refill any further. Therefore, requests are processed in the order of their responses.
fn served_in_outage(
    scene: &Scene,
    key: &Key,
    fault: &Fault,
    entries: &[&Entry],
) -> Option<(f64, f64)> {
    let (begins, ends) = (fault.at * MS, fault.end() * MS);
    let (number, plan) = unedited(key, begins.saturating_sub(SECOND), ends)?;
    let mut entries = entries.to_vec();
    entries.sort_by_key(|it| it.answered);
    let during = |from: u64| {
        let during = move |it: &&&Entry| from <= it.answered && it.answered < ends;
        entries.iter().filter(during)
    };
    let (from, burst, mut level);
    match key.on_failure {
        OnRedisFailure::Closed => return None,
        OnRedisFailure::Open => {
            if key.plans.len() > 1 {
                return None;
            }
            from = begins + NOTICED;
            burst = f64::from(plan.burst);
            level = burst;
            let mut at = 0;
            let before = entries
                .iter()
                .filter(|it| it.answered < from && it.degraded);
            for it in before.filter(|it| it.answer == Answer::Admitted) {
                level = (level + plan.rate() * (it.answered - at) as f64).min(burst);
                level -= f64::from(it.cost);
                at = it.answered;
            }
            level = (level + plan.rate() * (from - at) as f64).min(burst);
        }
        OnRedisFailure::Share => {
            let mut changes = scene.changes.iter();
            if changes.any(|(at, _)| at * MS < ends) {
                return None;
            }
            let is_known = |it: &&Entry| it.plan == number && it.asked < begins && !it.degraded;
            let starts_at = if entries.iter().any(is_known) {
                begins
            } else {
                during(begins + NOTICED).next()?.answered
            };
            from = starts_at.max(begins + SHARED);
            burst = f64::from(plan.burst / scene.replicas as u32);
            level = 0.0;
        }
    }
    let rate = plan.rate() * burst / f64::from(plan.burst);
    let (mut at, mut served, mut due) = (from, 0.0, 0.0);
    for it in during(from) {
        let cost = f64::from(it.cost);
        level = (level + rate * (it.answered - at) as f64).min(burst);
        at = it.answered;
        if it.answer == Answer::None {
            return None;
        }
        if it.answer == Answer::Admitted {
            served += cost;
        }
        if cost <= level {
            level -= cost;
            due += cost;
        }
    }
    Some((served, due))
}
