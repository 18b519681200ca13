//! Servers with different settings, compared in the same run.

use std::{path::Path, time::Duration};

use anyhow::{Result, bail};

use crate::{
    load::{CONNECTIONS, echo},
    polling_load,
    process::{Cores, Server},
    rounds::{keys, median},
};

const WARM_UP: Duration = Duration::from_millis(500);

pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) server: Server,
    /// A request that gets a 200 response.
    pub(crate) request: Vec<u8>,
}

impl Case {
    /// Starts a server with additional settings, and creates an API key for the requests.
    pub(crate) fn start(
        quota: &Path,
        cores: Option<Cores>,
        name: &'static str,
        settings: &[(&str, String)],
    ) -> Result<Self> {
        let server = Server::quota(quota, "info,quota_server::access=off", cores, settings)?;
        let (key, _) = keys(&server)?;
        Ok(Self {
            name,
            server,
            request: echo(&key),
        })
    }

    /// Returns the requests per second, and the CPU time per request in microseconds.
    fn round(&self, time: Duration) -> Result<(f64, f64)> {
        let before = self.server.cpu()?;
        let statuses = polling_load::closed_loop(self.server.addr, time, &self.request)?;
        // The server writes usage later. This is a part of the requests' cost, and must not disturb the next case.
        let cpu = self.server.cpu_when_idle()?.saturating_sub(before);
        let total = statuses.values().sum::<u64>();
        if total == 0 || statuses.get(&200) != Some(&total) {
            bail!("{}: unexpected responses: {statuses:?}", self.name);
        }
        #[expect(clippy::cast_precision_loss, reason = "fewer requests than 2^52")]
        let total = total as f64;
        Ok((total / time.as_secs_f64(), cpu.as_secs_f64() * 1e6 / total))
    }
}

/// Measures the cases, which take turns, and prints a table. The first case is the baseline. `subject` is the title of
/// the first column.
pub(crate) fn compare(subject: &str, cases: &[Case], rounds: u32, time: Duration) -> Result<()> {
    for case in cases {
        case.round(WARM_UP)?;
    }
    let mut measured = vec![Vec::new(); cases.len()];
    for _ in 0..rounds {
        for (case, figures) in cases.iter().zip(&mut measured) {
            figures.push(case.round(time)?);
        }
    }
    let baseline = cases.first().map_or("", |case| case.name);
    println!("| {subject} | requests/s | CPU µs per request | CPU, {baseline} = 1 |");
    println!("|---|---:|---:|---:|");
    for (case, figures) in cases.iter().zip(&measured) {
        let per_second = median(figures.iter().map(|it| it.0));
        let micros = median(figures.iter().map(|it| it.1));
        // Compare per round, because a disturbance affects all cases of a round.
        let pairs = figures.iter().zip(&measured[0]);
        let ratio = median(pairs.map(|(it, first)| it.1 / first.1));
        let name = case.name;
        println!("| {name} | {per_second:.0} | {micros:.2} | {ratio:.3} |");
    }
    println!();
    println!(
        "`GET /v1/echo` without access log; medians of {rounds} rounds of {} ms, with the cases taking turns; {CONNECTIONS} \
         connections. CPU is that of the server, including what it does after the load, but not that of PostgreSQL.",
        time.as_millis()
    );
    Ok(())
}
