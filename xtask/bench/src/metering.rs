//! The cost of recording usage: compares a server that records usage with one that does not, in the same run.

use std::{
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use tokio::runtime::Builder;

use crate::{
    comparison::{Case, compare},
    polling_load,
    process::Cores,
    replicas::tenant::counted,
};

const APPENDS: u32 = 1_000_000;
const STORED_FOR: Duration = Duration::from_secs(5);
const SHIPPED_WITHIN: Duration = Duration::from_secs(120);

pub(crate) fn run(quota: &Path, rounds: u32, time: Duration) -> Result<()> {
    append()?;
    let cores = Cores::pick();
    let case = |name, settings: &[(&str, String)]| Case::start(quota, cores, name, settings);
    let cases = [
        case("off", &[("QUOTA_METERING", "off".into())])?,
        // The interval is longer than the measurement, so nothing is shipped during the measurement.
        case(
            "on, shipper paused",
            &[("QUOTA_USAGE_SHIP_EVERY", "60s".into())],
        )?,
        case("on", &[])?,
    ];
    compare("metering", &cases, rounds, time)?;
    println!("Target: at most 1.05 with the shipper paused, 1.15 with it running.");
    println!();
    store(&cases[2])
}

/// Measures the CPU time that PostgreSQL uses to store usage. The server's own CPU time does not include it.
fn store(case: &Case) -> Result<()> {
    let metrics = case.server.metrics_addr.context("no metrics")?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let shipped = || runtime.block_on(counted(metrics, "quota_usage_records_shipped_total"));
    let wait_until_shipped = || {
        let deadline = Instant::now() + SHIPPED_WITHIN;
        while runtime.block_on(counted(metrics, "quota_usage_backlog_records"))? > 0 {
            ensure!(
                Instant::now() < deadline,
                "usage is still not in PostgreSQL"
            );
            sleep(Duration::from_millis(100));
        }
        // The backlog is counted after each batch, so this also waits for records that were not counted yet.
        sleep(Duration::from_secs(3));
        anyhow::Ok(())
    };
    wait_until_shipped()?;
    let (cpu, before) = (case.server.database_cpu()?, shipped()?);
    let statuses = polling_load::closed_loop(case.server.addr, STORED_FOR, &case.request)?;
    wait_until_shipped()?;
    let cpu = case.server.database_cpu()?.saturating_sub(cpu);
    let records = shipped()? - before;
    ensure!(
        records == statuses.values().sum::<u64>(),
        "{records} records were written, for these requests: {statuses:?}"
    );
    println!(
        "PostgreSQL: {:.1} µs of CPU time per usage record ({records} records, from a load of {:.0} requests/s).",
        cpu.as_secs_f64() * 1e6 / f64::from(u32::try_from(records)?),
        f64::from(u32::try_from(records)?) / STORED_FOR.as_secs_f64(),
    );
    Ok(())
}

/// Measures the cost of reserving and filling a record, without anything else.
fn append() -> Result<()> {
    let directory = TempDir::new()?;
    let took = quota_server::metering::measure_append(directory.path(), APPENDS)?;
    println!(
        "One append: {:.0} ns (mean of {APPENDS}, including preparing segments). Target: below 500 ns.",
        took.as_secs_f64() * 1e9 / f64::from(APPENDS)
    );
    println!();
    Ok(())
}
