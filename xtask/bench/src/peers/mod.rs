//! Compares Quota with other servers that limit requests by API key: the cost of a request, and how well the limit
//! holds with two instances. The result is a document with tables and charts.

mod accuracy;
mod cost;
mod drive;
mod facts;
mod packages;
mod pair;
mod peer;
mod plots;
mod report;
mod revocation;
mod windows;

use std::{fs, path::PathBuf, time::Instant};

use anyhow::{Context as _, Result};
use clap::Args;

use self::peer::Program;
use crate::{process::Cores, replicas::load_average};

/// The limit of the comparison with two instances, per minute.
const LIMIT: u32 = 600;
/// A limit that is never reached, per minute.
const MOST: u32 = 60_000_000;

#[derive(Args)]
pub(crate) struct Options {
    /// The `quota` binary, a release build
    quota: PathBuf,
    /// The URL of a PostgreSQL database whose user may create databases
    #[arg(long)]
    postgres: String,
    /// The `limitador-server` binary. limitador is compared only if this option is set, because no package contains it
    #[arg(long)]
    limitador: Option<PathBuf>,
    /// The directory in which packages are installed
    #[arg(long)]
    tools: PathBuf,
    /// The directory for the document and the charts
    #[arg(long)]
    output: PathBuf,
    /// The number of rounds per server and load
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=200))]
    rounds: u32,
    /// The length of a round in milliseconds
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(50..=5000))]
    millis: u64,
    /// The length of a saturating load on two instances, in seconds
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..=30))]
    seconds: u64,
    /// Measure only the bare handler and the servers whose names contain this text
    #[arg(long)]
    only: Option<String>,
}

impl Options {
    fn includes(&self, name: &str) -> bool {
        let only = self.only.as_deref().unwrap_or_default().to_lowercase();
        name.to_lowercase().contains(&only)
    }

    fn includes_program(&self, name: &str, program: Program) -> bool {
        let is_there = self.limitador.is_some() || !matches!(program, Program::Limitador(_));
        is_there && self.includes(name)
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let began = Instant::now();
    let load_before = load_average();
    fs::create_dir_all(&options.output)
        .with_context(|| format!("cannot create {}", options.output.display()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let cores = Cores::pick();
    let (costs, mut missing) = cost::run(options, &runtime, cores)?;
    let accuracy = accuracy::run(options, &runtime, cores)?;
    missing.extend(accuracy.missing.iter().cloned());
    let machine = format!(
        "{}; load average {load_before} before, {} after; {} s.",
        facts::machine(),
        load_average(),
        began.elapsed().as_secs()
    );
    let report = report::Report {
        options,
        cores,
        machine,
        versions: facts::versions(options),
        costs: &costs,
        accuracy: &accuracy,
        missing: &missing,
    };
    let text = report.markdown();
    fs::write(options.output.join("PEERS.md"), &text)?;
    report.charts()?;
    println!("{text}");
    Ok(())
}
