//! Simulates calendar quotas in the scenes of the parent module, with one ledger that all replicas share. After the
//! scene, requests are sent for another 40 s.
//!
//! **Upper bound.** No more than the quota is admitted, with every fallback setting, whatever happens to replicas and
//! to Redis.
//!
//! **Lower bound.** If a quota still denies requests in the end, all of its tokens have been spent, except those that a
//! replica had when it crashed: at most a block (one hundredth of the quota, or one token), and the tokens for the
//! requests that the replica was deciding. Before the end, a quota does not deny requests while more tokens are left
//! than replicas may hold. Replicas may hold their blocks, and the tokens for requests that are eventually denied. A
//! replica that has found the quota exhausted calls the ledger again within [`ASKS_AGAIN`]. No request fails because it
//! waits for the ledger, which always responds within 20 ms.

use std::{
    num::NonZeroU64,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use fastrand::Rng;
use parking_lot::Mutex;

use super::{
    each_seed, number, paused,
    plants::Plant,
    run::{Answer, Entry, Log, play},
    scene::{Change, Request, Scene},
};

const SEEDS: u64 = 150;
const MS: u64 = 1_000_000;
const ASKS_AGAIN: u64 = 9_000 * MS;
/// The maximum time from the end of a request until its unused tokens are back in the ledger.
const RETURNED: u64 = 200 * MS;
/// How long requests are sent after the scene, and the interval between them, in milliseconds.
const LAST_PHASE: u64 = 40_000;
const LAST_EVERY: usize = 200;
/// How long after the scene all replicas know the state of the ledger again, in milliseconds.
const SETTLED: u64 = 25_000;

/// Returns the scene of a seed, and the time at which the requests after the scene begin. The scene's quotas cover part
/// of the load, or more than the whole load.
fn with_quotas(seed: u64) -> (Scene, u64) {
    let mut scene = Scene::of(seed);
    let mut rng = Rng::with_seed(seed ^ 0x9_0BED);
    // PostgreSQL does not fail in these scenes, because replicas could not reach the ledger without it.
    let changes = &mut scene.changes;
    changes.retain(|(_, it)| !matches!(it, Change::StopCounting(_)));
    scene.ledger_delay = [0, 1, 5, 20][rng.usize(..4)];
    let only_quotas_deny = rng.bool();
    let faults_end = scene.faults.iter().map(super::scene::Fault::end).max();
    let from = scene.length.max(faults_end.unwrap_or(0)) + 3000;
    for number in 0..scene.keys.len() {
        if only_quotas_deny {
            for plan in &mut scene.keys[number].plans {
                (plan.rpm, plan.burst) = (60_000, 600);
            }
        }
        let own = scene.load.0.iter().filter(|it| it.key == number);
        let asked: u64 = own.map(|it| u64::from(it.cost)).sum();
        let mut some = || NonZeroU64::new((asked * rng.u64(2..120) / 100).max(5));
        let quotas = [some(), some()];
        let kept = rng.usize(..3);
        for (place, quota) in quotas.into_iter().enumerate() {
            // Set both quotas, or only one.
            if kept != place {
                scene.keys[number].quotas[place] = quota;
            }
        }
        let at_one = rng.bool().then(|| rng.usize(..1000));
        for at in (from..from + LAST_PHASE).step_by(LAST_EVERY) {
            scene.load.0.push(Request {
                at,
                key: number,
                cost: 1,
                pick: at_one.unwrap_or_else(|| rng.usize(..1000)),
            });
        }
    }
    scene.load.0.sort_by_key(|request| request.at);
    (scene, from)
}

fn cost(it: &Entry) -> u64 {
    u64::from(it.cost)
}

/// Returns which guarantee one key's responses break, if any, and whether one of the key's quotas was exhausted in the
/// end.
fn broken(scene: &Scene, from: u64, key: usize, log: &Log) -> (Option<String>, bool) {
    let of_key = log.entries.iter().filter(|it| it.key == key);
    let entries: Vec<Entry> = of_key.copied().collect();
    let admitted = || entries.iter().filter(|it| it.answer == Answer::Admitted);
    let served: u64 = admitted().map(cost).sum();
    let crashes: Vec<(u64, usize)> = scene
        .changes
        .iter()
        .filter_map(|(at, it)| match it {
            Change::Crash(replica) => Some((at * MS, *replica)),
            _ => None,
        })
        .collect();
    let fails = |it: &&Entry| it.answer == Answer::Unavailable && !it.degraded;
    if let Some(failed) = entries.iter().find(fails) {
        return (
            Some(format!(
                "failed although the ledger is available: {failed:?}"
            )),
            false,
        );
    }
    let mut is_exhausted = false;
    for (place, quota) in scene.keys[key].quotas.iter().enumerate() {
        let Some(quota) = quota.map(NonZeroU64::get) else {
            continue;
        };
        if served > quota {
            return (
                Some(format!("{served} admitted of a quota of {quota}")),
                true,
            );
        }
        let (least, all) = scene.replica_bounds();
        let holders = (all + crashes.len()) as u64;
        let held = (quota / 100 * holders).div_ceil(least as u64) + holders;
        for it in entries.iter().filter(|it| it.denied_by[place]) {
            let used: u64 = admitted()
                .filter(|other| other.asked <= it.answered)
                .map(cost)
                .sum();
            let since = it.asked.saturating_sub(ASKS_AGAIN);
            let waiting: u64 = entries
                .iter()
                .filter(|other| other.answer != Answer::Admitted)
                .filter(|other| other.asked <= it.answered && since <= other.answered)
                .map(cost)
                .sum();
            if used + held + waiting < quota {
                let text = format!(
                    "denied with {used} of {quota} used, {held} held and {waiting} requested: {it:?}"
                );
                return (Some(text), true);
            }
        }
        let mut last = entries
            .iter()
            .filter(|it| it.asked >= (from + SETTLED) * MS);
        if last.all(|it| it.denied_by[place]) {
            is_exhausted = true;
            let stranded = crashes.iter().map(|(at, replica)| {
                let deciding = entries.iter().filter(|it| {
                    it.replica == *replica && it.asked <= *at && *at <= it.answered + RETURNED
                });
                (quota / 100).max(1) + deciding.map(cost).sum::<u64>()
            });
            let stranded: u64 = stranded.sum();
            if served + stranded < quota {
                let text = format!(
                    "{served} admitted of a quota of {quota} in the end, {stranded} may be stranded"
                );
                return (Some(text), true);
            }
        }
    }
    (None, is_exhausted)
}

/// Returns the result of a seed: a broken guarantee, if there is one, and how many keys had an exhausted quota in the
/// end.
fn broken_in(seed: u64, plant: Plant) -> (Option<String>, u64) {
    let (scene, from) = with_quotas(seed);
    let log = paused(play(&scene, plant));
    let mut exhausted = 0;
    for key in 0..scene.keys.len() {
        let (text, is_exhausted) = broken(&scene, from, key, &log);
        exhausted += u64::from(is_exhausted);
        if let Some(text) = text {
            let load = scene.keys[key].load;
            let text = format!("seed {seed}, key {key} ({load}): {text}\n{scene:?}");
            return (Some(text), exhausted);
        }
    }
    (None, exhausted)
}

#[test]
fn quotas_are_served_in_full_and_never_exceeded() {
    let seeds = match number("QUOTA_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = number("QUOTA_FIRST_SEED").unwrap_or(0);
            first..first + number("QUOTA_SEEDS").unwrap_or(SEEDS)
        }
    };
    let is_single = seeds.end - seeds.start == 1;
    let exhausted = AtomicU64::new(0);
    let failed = Mutex::new(Vec::new());
    each_seed(seeds, |seed| {
        let (broken, some) = broken_in(seed, Plant::Nothing);
        exhausted.fetch_add(some, Ordering::Relaxed);
        failed.lock().extend(broken);
        true
    });
    let (failed, exhausted) = (failed.into_inner(), exhausted.into_inner());
    println!(
        "{exhausted} quotas exhausted, {} seeds failed",
        failed.len()
    );
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    assert!(exhausted > 50 || is_single, "{exhausted} quotas exhausted");
}

#[test]
fn planted_defects_of_quotas_are_found() {
    for (plant, text) in [
        (Plant::OwnLedgers, "admitted of a quota of"),
        (Plant::HalfQuotas, "denied with"),
        (Plant::HalfQuotas, "in the end"),
        (Plant::ReturnsNoQuota, "in the end"),
    ] {
        let found = AtomicBool::new(false);
        each_seed(0..60, |seed| {
            let (broken, _) = broken_in(seed, plant);
            let is_it = broken.is_some_and(|it| it.contains(text));
            found.fetch_or(is_it, Ordering::Relaxed);
            !found.load(Ordering::Relaxed)
        });
        assert!(found.into_inner(), "{plant:?} is not found: {text}");
    }
}
