//! The cost of recording usage: compares a server that records usage with one that does not, in the same run.

use std::{path::Path, time::Duration};

use anyhow::{Result, bail};
use tempfile::TempDir;

use crate::{
    load::{CONNECTIONS, Load, echo},
    process::{Cores, Server},
    rounds::{keys, median},
};

const WARM_UP: Duration = Duration::from_millis(500);
const APPENDS: u32 = 1_000_000;

pub(crate) fn run(quota: &Path, rounds: u32, time: Duration) -> Result<()> {
    append()?;
    let cores = Cores::pick();
    let server = |settings: &[(&str, String)]| {
        let server = Server::quota(quota, "info,quota_server::access=off", cores, settings)?;
        let (key, _) = keys(&server)?;
        anyhow::Ok((server, echo(&key)))
    };
    let cases = [
        ("off", server(&[("QUOTA_METERING", "off".into())])?),
        // The shipper's interval is longer than the measurement.
        (
            "on, shipper paused",
            server(&[("QUOTA_USAGE_SHIP_EVERY", "60s".into())])?,
        ),
        ("on", server(&[])?),
    ];
    let load = Load::new()?;
    let round = |(server, request): &(Server, Vec<u8>), time| {
        let before = server.cpu()?;
        let statuses = load.put(server.addr, time, request)?;
        let cpu = server.cpu()?.saturating_sub(before);
        let total = statuses.values().sum::<u64>();
        if total == 0 || statuses.get(&200) != Some(&total) {
            bail!("unexpected responses: {statuses:?}");
        }
        #[expect(clippy::cast_precision_loss, reason = "fewer requests than 2^52")]
        let total = total as f64;
        Ok((total / time.as_secs_f64(), cpu.as_secs_f64() * 1e6 / total))
    };
    for (_, case) in &cases {
        round(case, WARM_UP)?;
    }
    let mut measured = vec![Vec::new(); cases.len()];
    for _ in 0..rounds {
        for ((_, case), figures) in cases.iter().zip(&mut measured) {
            figures.push(round(case, time)?);
        }
    }
    println!("| metering | requests/s | CPU µs per request | CPU, off = 1 |");
    println!("|---|---:|---:|---:|");
    for ((name, _), figures) in cases.iter().zip(&measured) {
        let per_second = median(figures.iter().map(|it| it.0));
        let micros = median(figures.iter().map(|it| it.1));
        let pairs = figures.iter().zip(&measured[0]);
        let ratio = median(pairs.map(|(it, off)| it.1 / off.1));
        println!("| {name} | {per_second:.0} | {micros:.2} | {ratio:.3} |");
    }
    println!();
    println!(
        "`GET /v1/echo` without access log; medians of {rounds} rounds of {} ms, with the cases taking turns; {CONNECTIONS} \
         connections. Target: at most 1.05 with the shipper paused, 1.15 with it running.",
        time.as_millis()
    );
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
