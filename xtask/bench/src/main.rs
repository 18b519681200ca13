//! Benchmarks that use the server from outside. They measure the cost of a request and the memory of a key, compare
//! Quota with other rate limiters, and test gateways, several replicas, and deployments with outages, crashes, restarts
//! and slow clients.
//!
//! The cost of a request is measured by comparing Quota, and a plain hyper handler, with a plain poem handler in the same
//! run. Each of these servers is a separate process with the same tokio runtime, pinned to one core. The benchmark's
//! own process generates the load, pinned to another core. Each case alternates with the poem handler in short slices of
//! time, so that other load on the machine affects both about equally. Compare ratios: absolute figures depend on the
//! machine.
//!
//! The behavior of several replicas is measured in [`replicas`].

mod comparison;
mod crash;
mod floor;
mod gateways;
mod http1;
mod latency;
mod load;
mod many_keys;
mod memory;
mod metering;
mod outage;
mod peers;
mod polling_load;
mod postgres;
mod process;
mod production;
mod replica;
mod replicas;
mod rounds;
mod scale;
mod stalls;
mod traces;

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
    /// Compare `quota` with the plain servers, and print a table
    Run {
        /// The `quota` binary, a release build
        quota: PathBuf,
        /// The number of rounds per case
        #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..=200))]
        rounds: u32,
        /// The duration of the load on each server in a round, in milliseconds
        #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(50..=5000))]
        millis: u64,
    },
    /// Measure the cost of recording usage, and print a table
    Metering {
        /// The `quota` binary, a release build
        quota: PathBuf,
        /// The number of rounds per case
        #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..=12))]
        rounds: u32,
        /// The length of a round in milliseconds
        #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(50..=300))]
        millis: u64,
    },
    /// Measure response times at a constant rate, and print a table
    Latency {
        /// The `quota` binary, a release build
        quota: PathBuf,
        /// The number of rounds per case
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=200))]
        rounds: u32,
        /// The length of a round in milliseconds
        #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(200..=5000))]
        millis: u64,
    },
    /// Measure the cost of traces, and print a table
    Tracing {
        /// The `quota` binary, a release build
        quota: PathBuf,
        /// The number of rounds per case
        #[arg(long, default_value_t = 41, value_parser = clap::value_parser!(u32).range(1..=200))]
        rounds: u32,
        /// The length of a round in milliseconds
        #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(50..=5000))]
        millis: u64,
    },
    /// Compare gateways that check every request with Quota to plain proxies, and print a table
    Gateways(gateways::Options),
    /// Kill servers, Redis and PostgreSQL under load, and recount the usage
    Crash(crash::Options),
    /// Measure the memory of a cached key, and print a table
    Memory(memory::Options),
    /// Stop PostgreSQL under load, and compare latency and usage
    Outage(outage::Options),
    /// Restart, kill and upgrade replicas behind Caddy under load, and recount requests and usage
    Restarts(production::restarts::Options),
    /// Measure response times and memory while thousands of clients are slow, and print a table
    SlowClients(production::slow_clients::Options),
    /// Run replicas behind Caddy until Ctrl-C
    Up(production::up::Options),
    /// Measure the behavior of several replicas, and print tables
    Replicas(replicas::Options),
    /// Measure what becomes slower with more keys, and print a table
    Scale(scale::Options),
    /// Compare Quota with other rate limiters, and write a document with tables and charts
    Peers(peers::Options),
    /// Run a plain poem handler on a free port
    Poem,
    /// Run a plain hyper handler on a free port
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
        Command::Latency {
            quota,
            rounds,
            millis,
        } => latency::run(&quota, rounds, std::time::Duration::from_millis(millis))?,
        Command::Tracing {
            quota,
            rounds,
            millis,
        } => traces::run(&quota, rounds, std::time::Duration::from_millis(millis))?,
        Command::Gateways(options) => gateways::run(&options)?,
        Command::Crash(options) => return crash::run(&options),
        Command::Memory(options) => return memory::run(&options),
        Command::Outage(options) => return outage::run(&options),
        Command::Restarts(options) => return production::restarts::run(&options),
        Command::SlowClients(options) => return production::slow_clients::run(&options),
        Command::Up(options) => return production::up::run(&options),
        Command::Replicas(options) => return replicas::run(&options),
        Command::Scale(options) => return scale::run(&options),
        Command::Peers(options) => peers::run(&options)?,
        Command::Poem => floor::serve(floor::poem)?,
        Command::Hyper => floor::serve(floor::hyper)?,
    }
    Ok(ExitCode::SUCCESS)
}
