//! Requests that cost 1 to 5 tokens, with the check API.

use std::time::Duration;

use anyhow::Result;

use super::{
    Options, keep_log,
    schedule::{Spread, Steady, drained_then, together, with_costs},
    stage::{Recount, Stage, check_book, context, lateness, percent, slack},
    table::Table,
    tenant::Plan,
};

const COLUMNS: &[&str] = &[
    "load",
    "a minute",
    "burst",
    "plan",
    "sent",
    "admitted",
    "tokens admitted",
    "excess, tokens",
    "served",
    "failed",
];
const REPLICAS: usize = 3;
const LIMITS: [(u32, u32); 3] = [(600, 60), (6000, 600), (60_000, 2000)];

pub(crate) async fn run(options: &Options) -> Result<Table> {
    let mut table = Table::new("Requests that cost 1 to 5", COLUMNS);
    let time = Duration::from_secs(if options.quick { 1 } else { 6 });
    let stage = Stage::set(options, REPLICAS, &[]).await?;
    if !options.no_redis {
        stage.settle(Duration::from_secs(6)).await?;
    }
    let mut late = Vec::new();
    for load in [0.9, 2.0] {
        let plans: Vec<Plan> = LIMITS
            .into_iter()
            .flat_map(|(rpm, burst)| {
                [false, true].map(|strict| Plan {
                    strict,
                    ..Plan::new(format!("{rpm} {strict} {load}"), rpm, burst)
                })
            })
            .collect();
        let keys = stage.keys_on(&plans).await?;
        let schedule = together(plans.iter().enumerate().map(|(key, plan)| {
            let steady = Steady {
                key,
                from: Duration::ZERO,
                // The average cost is three.
                per_second: f64::from(plan.rpm) / 60.0 * load / 3.0,
                count: 0,
                spread: Spread::Random(key as u64),
            };
            let arrivals: Vec<_> = if load < 1.0 {
                steady.lasting(time).arrivals(REPLICAS).collect()
            } else {
                let limit = (plan.rpm.div_ceil(3), plan.burst.div_ceil(3));
                let blow = f64::from(plan.burst).clamp(60.0, 2000.0);
                drained_then(steady, REPLICAS, limit, blow, time)
            };
            with_costs(arrivals, key as u64)
        }));
        let granted = stage.granted().await?;
        let log = stage.check(&keys, &schedule).await?;
        let granted = (granted, stage.granted().await?);
        check_book(
            &mut table,
            &format!("load {load}, all plans"),
            granted,
            &log,
        );
        keep_log(options, &format!("weighted-{load}"), &log)?;
        for (key, plan) in plans.iter().enumerate() {
            let recount = Recount::of(key, plan, slack(plan, options.lease_ttl()), &log);
            let kind = if plan.strict { "strict" } else { "leases" };
            let what = format!("load {load}, {} per minute, {kind}", plan.rpm);
            if recount.is_over() {
                table.faults.push(context(&what, &recount));
            }
            if recount.is_short() {
                let (served, possible) = (recount.tokens, recount.possible());
                table.faults.push(format!(
                    "{what}: only {served} tokens of {possible} were served"
                ));
            }
            table.row(vec![
                load.to_string(),
                plan.rpm.to_string(),
                plan.burst.to_string(),
                kind.to_owned(),
                recount.sent.to_string(),
                recount.admitted.to_string(),
                recount.tokens.to_string(),
                format!("{:+.3}", recount.excess()),
                percent(recount.served()),
                (recount.failed + recount.silent).to_string(),
            ]);
        }
        late.extend(log);
    }
    stage.end().await?;
    table.notes.push(format!(
        "{REPLICAS} replicas, `POST /v1/check`. Excess and served are in tokens. {}",
        lateness(&late)
    ));
    Ok(table)
}
