//! Measures the app's memory and time to first paint, compared with an empty window.
//!
//! Starts the app and the empty window alternately, so that other load affects both equally. Memory is measured after a
//! pause, as the sum of the proportional set sizes (PSS) of all processes, so shared libraries are not counted several
//! times.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use crate::{scan, world::World};

const TIMEOUT: Duration = Duration::from_secs(60);
const SETTLE: Duration = Duration::from_secs(2);

struct Cost {
    ms: f64,
    mib: f64,
}

pub async fn run(app: &Path, blank: &Path, server: &str, rounds: u32) -> Result<()> {
    let world = World::new(true)?;
    let (mut apps, mut blanks) = (Vec::new(), Vec::new());
    // The first round warms caches and is not counted.
    for round in 0..=rounds {
        let of_blank = cost(&world, blank, &[], round).await?;
        let of_app = cost(&world, app, &["--server", server], round).await?;
        if round > 0 {
            blanks.push(of_blank);
            apps.push(of_app);
        }
    }
    println!(
        "| median of {rounds} starts | desktop app | empty window | ratio |\n|---|---|---|---|"
    );
    let row = |what: &str, of: fn(&Cost) -> f64| {
        let (app, blank) = (median(&apps, of), median(&blanks, of));
        println!("| {what} | {app:.0} | {blank:.0} | {:.2} |", app / blank);
    };
    row("resident memory, MiB", |it| it.mib);
    row("first usable paint, ms", |it| it.ms);
    Ok(())
}

async fn cost(world: &World, program: &Path, arguments: &[&str], round: u32) -> Result<Cost> {
    let name = format!("bench-{round}-{}.log", arguments.len());
    let output = world.folder.path().join(&name);
    // The app reports the time in its log, and the empty window on standard output.
    let count_reports = |text: &str| text.matches("first page painted").count();
    let before = count_reports(&world.log());
    let mut command = world.command(program);
    command.args(arguments);
    let started = Instant::now();
    let process = world.start(&command, &name)?;
    let painted = || {
        count_reports(&world.log()) > before
            || count_reports(&fs::read_to_string(&output).unwrap_or_default()) > 0
    };
    while !painted() {
        if started.elapsed() > TIMEOUT {
            bail!(
                "{} did not paint: {}",
                program.display(),
                fs::read_to_string(&output)?
            );
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let ms = started.elapsed().as_secs_f64() * 1000.0;
    tokio::time::sleep(SETTLE).await;
    let mib = scan::process_tree(process.pid().as_raw())
        .into_iter()
        .map(pss)
        .sum::<f64>()
        / 1024.0;
    Ok(Cost { ms, mib })
}

/// Returns the proportional set size of a process in KiB.
fn pss(pid: i32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    text.lines()
        .find_map(|line| {
            line.strip_prefix("Pss:")?
                .trim()
                .strip_suffix(" kB")?
                .trim()
                .parse()
                .ok()
        })
        .unwrap_or_default()
}

fn median(costs: &[Cost], of: fn(&Cost) -> f64) -> f64 {
    let mut values: Vec<f64> = costs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
