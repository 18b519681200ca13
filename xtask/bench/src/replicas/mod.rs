//! What holds over several replicas, measured from outside: replicas as processes of their own, real PostgreSQL
//! and Redis, a load in an open loop, and a recount of what was admitted from the client's own log.
//!
//! Knows of the server what an operator knows: its settings, its HTTP, its signals. A promise that was broken is
//! a fault of the table that shows it, and ends the whole with a failure. Everything is bounded in count and
//! time, goes to loopback alone, and ends with this process.

mod bursts;
mod changes;
mod cold;
mod cost;
mod counters;
mod drain;
mod drive;
mod faults;
mod fleet;
mod late;
mod limits;
mod quota;
mod schedule;
mod stage;
mod stalls;
mod table;
pub(crate) mod tenant;
mod weighted;

use std::{fmt::Write as _, fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};

use table::Table;

#[derive(Args)]
pub(crate) struct Options {
    /// The `quota` binary, built for release
    quota: PathBuf,
    /// Another binary to measure in its place, such as an earlier version's
    #[arg(long)]
    server: Option<PathBuf>,
    /// A PostgreSQL to make databases on, as a role that may: postgres://user@host/postgres
    #[arg(long)]
    postgres: String,
    /// Which tables, separated by commas
    #[arg(long, value_delimiter = ',', default_values_t = Only::ALL)]
    only: Vec<Only>,
    /// Which faults, separated by commas; all by default
    #[arg(long, value_delimiter = ',')]
    fault: Vec<faults::Kind>,
    /// How many replicas the table of limits has, separated by commas
    #[arg(long, value_delimiter = ',', default_values_t = [1, 3, 5, 9])]
    replicas: Vec<usize>,
    /// Smaller loads and fewer cells, to see that it works
    #[arg(long)]
    quick: bool,
    /// Replicas that know of no Redis: each has limits of its own, which must show
    #[arg(long)]
    no_redis: bool,
    /// How long a lease may be held, in milliseconds
    #[arg(long, default_value_t = 100)]
    lease_ttl: u64,
    /// How many keys are in use at the clean stop
    #[arg(long, default_value_t = 100_000)]
    keys: usize,
    /// How many of them are first used in a second
    #[arg(long, default_value_t = 400.0)]
    drain_rate: f64,
    /// Also write the tables to this file, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the log of every request to files in this directory
    #[arg(long)]
    log: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Only {
    /// Replicas, loads and plans: what was admitted above the promise
    Limits,
    /// A daily quota, through a stop and a start
    Daily,
    /// Bursts made to hurt leases
    Bursts,
    /// Requests that cost 1 to 5
    Weighted,
    /// The whole burst of a rested key at once, by the time to Redis and back
    Cold,
    /// Answers of Redis that come late for one replica
    Late,
    /// Redis stands still for less than a second
    Stalls,
    /// Redis killed, frozen, failed over, cut off
    Faults,
    /// A clean stop with many keys in use
    Drain,
    /// How long a change takes to be in force everywhere
    Changes,
    /// Round trips, and the cost next to one replica's memory
    Cost,
}

impl Only {
    const ALL: [Self; 11] = [
        Self::Limits,
        Self::Daily,
        Self::Bursts,
        Self::Weighted,
        Self::Cold,
        Self::Late,
        Self::Stalls,
        Self::Faults,
        Self::Drain,
        Self::Changes,
        Self::Cost,
    ];
}

impl std::fmt::Display for Only {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let value = self.to_possible_value().expect("none is skipped");
        f.write_str(value.get_name())
    }
}

impl Options {
    /// The binary to measure.
    fn binary(&self) -> PathBuf {
        self.server.as_ref().unwrap_or(&self.quota).clone()
    }

    fn lease_ttl(&self) -> Duration {
        Duration::from_millis(self.lease_ttl)
    }
}

/// Prints each table when it is there. What was started ends with the future, also on Ctrl-C.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if let Some(dir) = &options.log {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut stop = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            done = all(options) => done,
            _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(130)),
            _ = stop.recv() => Ok(ExitCode::from(143)),
        }
    })
}

async fn all(options: &Options) -> Result<ExitCode> {
    let mut tables = Vec::new();
    // Some of it pins itself to one.
    let cores = std::thread::available_parallelism().map_or(0, Into::into);
    for only in Only::ALL.iter().filter(|it| options.only.contains(it)) {
        eprintln!("{only}");
        let before = load_average();
        let began = std::time::Instant::now();
        let mut table: Table = match only {
            Only::Limits => limits::run(options).await,
            Only::Daily => quota::run(options).await,
            Only::Bursts => bursts::run(options).await,
            Only::Weighted => weighted::run(options).await,
            Only::Cold => cold::run(options).await,
            Only::Late => late::run(options).await,
            Only::Stalls => stalls::run(options).await,
            Only::Faults => faults::run(options).await,
            Only::Drain => drain::run(options).await,
            Only::Changes => changes::run(options).await,
            Only::Cost => cost::run(options).await,
        }
        .with_context(|| format!("the table of {only}"))?;
        table.notes.push(format!(
            "{cores} cores; load average {before} before, {} after; {:.0} s.",
            load_average(),
            began.elapsed().as_secs_f64(),
        ));
        println!("{}", table.markdown());
        tables.push(table);
    }
    if let Some(path) = &options.json {
        let all: Vec<_> = tables.iter().map(Table::json).collect();
        fs::write(path, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let good = tables.iter().all(|table| table.faults.is_empty());
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What else the machine does: the average over a minute.
fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}

/// The requests of one load, a line each, when that was asked for.
fn keep_log(options: &Options, name: &str, attempts: &[drive::Attempt]) -> Result<()> {
    let Some(dir) = &options.log else {
        return Ok(());
    };
    let mut text =
        String::from("key,replica,cost,due_ns,sent_ns,answered_ns,status,retry_after,degraded\n");
    for it in attempts {
        let retry_after = it.retry_after.map(|it| it.to_string()).unwrap_or_default();
        let _ = writeln!(
            text,
            "{},{},{},{},{},{},{},{retry_after},{}",
            it.key, it.replica, it.cost, it.due, it.sent, it.answered, it.status, it.degraded
        );
    }
    let path = dir.join(format!("{name}.csv"));
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}
