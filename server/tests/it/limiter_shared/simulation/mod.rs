//! Simulates replicas, counters, and faults between them, in virtual time. All events are derived from a seed.
//!
//! Replicas use the limiter's real store, on tokio's paused clock. The counters are the [model](super::model), in a
//! simulated Redis process that stalls, is killed, or is replaced by a copy that lags behind. The links between
//! replicas and this process delay, lose and cut traffic. Keys have plans that are edited while they are in use.
//! Replicas join, stop and crash. Requests cost 1 to 5 tokens. Admitted requests are recounted from the responses and
//! compared with upper and lower bounds. [`judge`] describes the guarantees.
//!
//! `cargo xtask bench simulation 20000` runs 20,000 seeds on all cores. `every_guarantee_holds_in_every_seed` reads
//! environment variables: `QUOTA_SEEDS=n` sets the number of seeds, `QUOTA_FIRST_SEED=n` sets the first seed, and
//! `QUOTA_SEED=n` runs only that seed and prints its requests.
#![expect(
    clippy::disallowed_methods,
    reason = "only tests read the seed settings"
)]

mod judge;
mod outages;
mod plants;
mod quotas;
mod registry;
mod run;
mod scene;
mod single;
mod world;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use parking_lot::Mutex;

use self::{
    judge::{Guarantee, Violation, judge},
    plants::Plant,
    run::{Log, play},
    scene::Scene,
};

/// The number of seeds in an ordinary test run.
const SEEDS: u64 = 300;
/// The maximum number of failing seeds that are described in full, and the maximum number that are listed.
const SHOWN: usize = 5;
const LISTED: usize = 200;

fn paused<F: Future>(test: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(test)
}

fn simulate(seed: u64, plant: Plant) -> (Scene, Log, Vec<Violation>) {
    let scene = Scene::of(seed);
    let log = paused(play(&scene, plant));
    let violations = judge(&scene, &log);
    (scene, log, violations)
}

fn described(scene: &Scene, log: &Log, violations: &[Violation]) -> String {
    let mut text = format!("seed {}: {scene:?}\n", scene.seed);
    let admitted = log
        .entries
        .iter()
        .filter(|it| it.answer == run::Answer::Admitted);
    let _ = writeln!(
        text,
        "{} of {} admitted",
        admitted.count(),
        log.entries.len()
    );
    for violation in violations {
        let _ = writeln!(text, "{:?}: {}", violation.guarantee, violation.text);
    }
    let _ = writeln!(text, "to run only this seed: QUOTA_SEED={}", scene.seed);
    text
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Calls `each` with every seed, on all cores. Stops early if `each` returns `false`.
fn each_seed(seeds: std::ops::Range<u64>, each: impl Fn(u64) -> bool + Sync) {
    let (next, over) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, Into::into) {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    if !each(seed) {
                        over.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}

#[test]
fn every_guarantee_holds_in_every_seed() {
    if let Some(seed) = number("QUOTA_SEED") {
        let (scene, log, violations) = simulate(seed, Plant::Nothing);
        for it in &log.entries {
            eprintln!(
                "{:>6} to {:>6} ms key {} plan {} replica {} cost {} {:?}{}",
                it.asked / 1_000_000,
                it.answered / 1_000_000,
                it.key,
                it.plan,
                it.replica,
                it.cost,
                it.answer,
                if it.degraded { " without Redis" } else { "" },
            );
        }
        eprintln!("new epochs: {:?}", log.epochs);
        eprintln!("tokens missed: {:?}", log.missed);
        assert!(
            violations.is_empty(),
            "{}",
            described(&scene, &log, &violations)
        );
        return;
    }
    let first = number("QUOTA_FIRST_SEED").unwrap_or(0);
    let seeds = number("QUOTA_SEEDS").unwrap_or(SEEDS);
    let failed = Mutex::new(BTreeMap::new());
    let (admitted, asked) = (AtomicU64::new(0), AtomicU64::new(0));
    each_seed(first..first + seeds, |seed| {
        let (scene, log, violations) = simulate(seed, Plant::Nothing);
        let served = log
            .entries
            .iter()
            .filter(|it| it.answer == run::Answer::Admitted);
        admitted.fetch_add(served.count() as u64, Ordering::Relaxed);
        asked.fetch_add(log.entries.len() as u64, Ordering::Relaxed);
        if !violations.is_empty() {
            let text = described(&scene, &log, &violations);
            failed.lock().insert(seed, (violations, text));
        }
        true
    });
    let failed = failed.into_inner();
    let (admitted, asked) = (admitted.into_inner(), asked.into_inner());
    println!(
        "{seeds} seeds, {asked} requests, {admitted} admitted, {} seeds failed",
        failed.len()
    );
    let mut by_guarantee = BTreeMap::<String, Vec<u64>>::new();
    for (seed, (violations, _)) in &failed {
        for violation in violations {
            let seeds = by_guarantee
                .entry(format!("{:?}", violation.guarantee))
                .or_default();
            if seeds.last() != Some(seed) {
                seeds.push(*seed);
            }
        }
    }
    for (guarantee, seeds) in &by_guarantee {
        println!("{guarantee}: {} seeds", seeds.len());
    }
    for (seed, (violations, _)) in failed.iter().take(LISTED) {
        for violation in violations {
            println!("seed {seed}: {:?}: {}", violation.guarantee, violation.text);
        }
    }
    let texts: Vec<_> = failed
        .values()
        .take(SHOWN)
        .map(|(_, text)| text.as_str())
        .collect();
    assert!(failed.is_empty(), "{}", texts.join("\n"));
    assert!(
        admitted > seeds * 10,
        "only {admitted} of {asked} were admitted"
    );
}

/// Asserts that every planted error that breaks a guarantee selected by `of` is found.
fn find_planted(of: impl Fn(Guarantee) -> bool) {
    for (plant, guarantee, seeds) in Plant::ALL.iter().filter(|(_, guarantee, _)| of(*guarantee)) {
        let found = AtomicBool::new(false);
        each_seed(0..*seeds, |seed| {
            let (_, _, violations) = simulate(seed, *plant);
            if violations.iter().any(|it| it.guarantee == *guarantee) {
                found.store(true, Ordering::Relaxed);
            }
            !found.load(Ordering::Relaxed)
        });
        assert!(
            found.into_inner(),
            "{plant:?} breaks {guarantee:?} in none of {seeds} seeds"
        );
    }
}

#[test]
fn each_planted_excess_is_found() {
    find_planted(|guarantee| guarantee == Guarantee::Upper);
}

#[test]
fn each_planted_shortfall_is_found() {
    find_planted(|guarantee| guarantee != Guarantee::Upper);
}

/// The judge raises no false alarms: whatever requests a single exact bucket gets, it breaks none of the guarantees
/// below.
#[test]
fn one_exact_bucket_breaks_no_guarantee() {
    each_seed(0..200, |seed| {
        let mut scene = Scene::of(seed);
        // Replicas that know of an edit and replicas that do not know of it yet would switch the shared bucket back and
        // forth between two plans.
        for key in &mut scene.keys {
            key.plans.truncate(1);
        }
        let log = paused(play(&scene, Plant::OneBucket));
        let broken = judge(&scene, &log);
        // No Redis is used, so guarantees about its grants do not apply.
        let counted = [
            Guarantee::Upper,
            Guarantee::Lower,
            Guarantee::Wait,
            Guarantee::Prompt,
        ];
        let broken_by_requests = broken.iter().filter(|it| counted.contains(&it.guarantee));
        let text = || described(&scene, &log, &broken);
        assert_eq!(broken_by_requests.count(), 0, "{}", text());
        true
    });
}

/// A seed that fails must fail again when it is run separately.
#[test]
fn a_seed_plays_the_same_every_time() {
    for seed in 0..20 {
        let entries = || format!("{:?}", simulate(seed, Plant::Nothing).1.entries);
        assert_eq!(entries(), entries(), "seed {seed}");
    }
}
