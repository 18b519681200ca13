//! Measurements of the server from outside: what a request costs, and what holds over replicas.
//!
//! What a request costs: Quota next to a bare poem and a bare hyper handler, in the same run.
//!
//! Every server is a process of its own with the same tokio runtime, pinned to one core; the load comes from
//! this process, pinned to another. The rounds are many and short and the servers take turns, so that what else
//! the machine does meets all of them alike. Read the ratios: absolute figures are the machine's.
//! What holds over replicas is in [`replicas`].

mod crash;
mod floor;
mod http1;
mod load;
mod metering;
mod process;
mod replicas;
mod rounds;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "quota-bench")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure `quota` next to the bare servers, and print a table
    Run {
        /// The `quota` binary, built for release
        quota: PathBuf,
        /// How many rounds each case gets
        #[arg(long, default_value_t = 41, value_parser = clap::value_parser!(u32).range(1..=200))]
        rounds: u32,
        /// How long a round is, in milliseconds
        #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(50..=5000))]
        millis: u64,
    },
    /// Measure what recording usage costs, and print a table
    Metering {
        /// The `quota` binary, built for release
        quota: PathBuf,
        /// How many rounds each case gets
        #[arg(long, default_value_t = 41, value_parser = clap::value_parser!(u32).range(1..=60))]
        rounds: u32,
        /// How long a round is, in milliseconds
        #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(50..=300))]
        millis: u64,
    },
    /// Kill servers, Redis and PostgreSQL under load, and recount the usage
    Crash(crash::Options),
    /// Measure what holds over several replicas, and print tables
    Replicas(replicas::Options),
    /// A bare poem handler, on a port of its own
    Poem,
    /// A bare hyper handler, on a port of its own
    Hyper,
}

fn main() -> Result<ExitCode> {
    match Cli::parse().command {
        Command::Run {
            quota,
            rounds,
            millis,
        } => rounds::run(&quota, rounds, std::time::Duration::from_millis(millis))?,
        Command::Metering {
            quota,
            rounds,
            millis,
        } => metering::run(&quota, rounds, std::time::Duration::from_millis(millis))?,
        Command::Crash(options) => return crash::run(&options),
        Command::Replicas(options) => return replicas::run(&options),
        Command::Poem => floor::serve(floor::poem)?,
        Command::Hyper => floor::serve(floor::hyper)?,
    }
    Ok(ExitCode::SUCCESS)
}
