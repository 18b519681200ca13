//! A daily quota across replicas: never exceeded, and exact to the last request after a clean stop has returned unused
//! blocks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};

use super::{
    Options,
    drive::Attempt,
    keep_log,
    schedule::{Spread, Steady},
    stage::Stage,
    table::Table,
    tenant::{Key, Plan},
};

const COLUMNS: &[&str] = &[
    "replicas",
    "quota",
    "served before the stop",
    "served in total",
    "failed",
];

/// The maximum number of rounds after the restart.
const ROUNDS: usize = 20;

pub(crate) async fn run(options: &Options) -> Result<Table> {
    let mut table = Table::new("A daily quota across replicas", COLUMNS);
    for &replicas in options
        .replicas
        .iter()
        .filter(|it| !options.quick || **it <= 3)
    {
        let day = today()?;
        let quota: u64 = if options.quick { 1000 } else { 5000 };
        let part = usize::try_from(quota * 7 / 10)?;
        let plan = Plan {
            daily: Some(quota),
            ..Plan::new("daily", 6_000_000, 6_000_000)
        };
        let mut stage = Stage::set(options, replicas, &[]).await?;
        if !options.no_redis {
            stage.settle(Duration::ZERO).await?;
        }
        let keys = stage.keys_on(std::slice::from_ref(&plan)).await?;
        // The quota is used in parts, so that several replicas hold blocks when they stop.
        let before = spend(&stage, &keys, part).await?;
        keep_log(options, &format!("daily-{replicas}-before"), &before)?;
        stage.fleet.restart().await?;
        // Continue until all requests are denied, but for at most `ROUNDS` rounds. On a busy machine, some requests may
        // get no decision.
        let mut after = Vec::new();
        for _ in 0..ROUNDS {
            let round = spend(&stage, &keys, part).await?;
            let over = round.iter().all(|it| it.status == 429);
            after.extend(round);
            if over {
                break;
            }
        }
        keep_log(options, &format!("daily-{replicas}-after"), &after)?;
        stage.end().await?;
        ensure!(
            today()? == day,
            "a day ended in between, so the result is invalid: run it again"
        );

        let admitted = |log: &[Attempt]| log.iter().filter(|it| it.admitted()).count() as u64;
        let failed = |log: &[Attempt]| {
            let failed = log.iter().filter(|it| !matches!(it.status, 200 | 429));
            failed.count()
        };
        let total = admitted(&before) + admitted(&after);
        // A request without a response may have been counted.
        let silent = [&before, &after]
            .into_iter()
            .flatten()
            .filter(|it| it.status == 0)
            .count() as u64;
        if total > quota || total + silent < quota {
            table.faults.push(format!(
                "{replicas} replicas: {total} of {quota} were served"
            ));
        }
        table.row(vec![
            replicas.to_string(),
            quota.to_string(),
            admitted(&before).to_string(),
            total.to_string(),
            (failed(&before) + failed(&after)).to_string(),
        ]);
    }
    table.notes.push(
        "Requests for 70% of the quota, a stop of all replicas with SIGTERM, a start, and then rounds of the same number of requests until all requests of a round are denied."
            .to_owned(),
    );
    Ok(table)
}

async fn spend(stage: &Stage, keys: &[Key], count: usize) -> Result<Vec<Attempt>> {
    let load = Steady {
        key: 0,
        from: Duration::ZERO,
        per_second: 1500.0,
        count,
        spread: Spread::Random(7),
    };
    let load: Vec<_> = load.arrivals(stage.fleet.len()).collect();
    stage.drive(keys, &load).await
}

/// Returns the number of the current day in UTC, the tenant's time zone.
#[expect(
    clippy::disallowed_methods,
    reason = "a measurement has no `Clock`: it reads the time directly"
)]
fn today() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() / 86_400)
}
