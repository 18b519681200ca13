//! The behavior of several replicas, measured from outside: replicas in separate processes, real PostgreSQL and Redis,
//! an open-loop load, and a recount of allowed requests from the client's log.
//!
//! Uses only what is available to an operator: settings, HTTP, signals, PostgreSQL and Redis. If a limit is exceeded or
//! another requirement is not met, the table lists a fault and the run fails. Every process and load that the benchmark
//! starts is limited in number and duration, uses only the loopback interface, and stops when the benchmark exits.

mod bursts;
mod changes;
mod cold;
mod cost;
pub(crate) mod counters;
mod drain;
pub(crate) mod drive;
mod faults;
pub(crate) mod fleet;
mod late;
mod limits;
mod quota;
mod schedule;
pub(crate) mod stage;
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
    /// The `quota` binary, a release build
    quota: PathBuf,
    /// Another binary to measure instead, such as an earlier version
    #[arg(long)]
    server: Option<PathBuf>,
    /// A PostgreSQL server to create databases on, with a role that may do so: postgres://user@host/postgres
    #[arg(long)]
    postgres: String,
    /// The tables to produce, separated by commas
    #[arg(long, value_delimiter = ',', default_values_t = Only::ALL)]
    only: Vec<Only>,
    /// The faults to cause, separated by commas; all by default
    #[arg(long, value_delimiter = ',')]
    fault: Vec<faults::Kind>,
    /// The numbers of replicas in the table of limits, separated by commas
    #[arg(long, value_delimiter = ',', default_values_t = [1, 3, 5, 9])]
    replicas: Vec<usize>,
    /// Smaller loads and fewer cells, to check that everything works
    #[arg(long)]
    quick: bool,
    /// Run replicas without Redis. Each replica then has its own limits, and the tables must show the excess
    #[arg(long)]
    no_redis: bool,
    /// The lease TTL, in milliseconds
    #[arg(long, default_value_t = 100)]
    lease_ttl: u64,
    /// The number of keys that are in use when the replicas stop, for the table `drain`
    #[arg(long, default_value_t = 100_000)]
    keys: usize,
    /// How many of these keys are first used per second
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
    /// Requests allowed in excess of the envelope, by number of replicas, load and plan
    Limits,
    /// A daily quota, across a restart
    Daily,
    /// Worst-case bursts for leases
    Bursts,
    /// Requests that cost 1 to 5
    Weighted,
    /// An idle key's full burst, by the round-trip time to Redis
    Cold,
    /// Redis responds late to one replica
    Late,
    /// Redis freezes for less than a second
    Stalls,
    /// Redis killed, frozen, failed over or cut off
    Faults,
    /// A clean stop with many keys in use
    Drain,
    /// How long a change takes to reach every replica
    Changes,
    /// Calls to Redis, and the cost compared with a single replica that counts in memory
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
    /// Returns the binary to measure.
    fn binary(&self) -> PathBuf {
        self.server.as_ref().unwrap_or(&self.quota).clone()
    }

    fn lease_ttl(&self) -> Duration {
        Duration::from_millis(self.lease_ttl)
    }
}

/// Prints each table when it is ready. Dropping the future stops everything that was started, even on Ctrl-C.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if let Some(dir) = &options.log {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
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
    // Read at the start, because the table of costs pins this process to one core.
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

/// Returns the machine's load average over a minute.
pub(crate) fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}

/// Writes the requests of one load, one per line, if requested.
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
