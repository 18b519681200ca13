//! The cost of recording usage: compares a server that records usage with one that does not, in the same run.

use std::{path::Path, time::Duration};

use anyhow::Result;
use tempfile::TempDir;

use crate::{
    comparison::{Case, compare},
    process::Cores,
};

const APPENDS: u32 = 1_000_000;

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
    Ok(())
}

/// Measures the cost of reserving and filling a record, without anything else.
fn append() -> Result<()> {
    let directory = TempDir::new()?;
    let took = quota_server::metering::measure_append(directory.path(), APPENDS)?;
    println!(
        "One append: {:.0} ns (mean of {APPENDS}, including creating segments). Target: below 500 ns.",
        took.as_secs_f64() * 1e9 / f64::from(APPENDS)
    );
    println!();
    Ok(())
}
