//! Worst-case bursts for leases: one replica prefetches tokens and goes idle, and then all replicas receive requests at
//! the same time. The idle time varies from 0 to twice the lease TTL.

use std::time::Duration;

use anyhow::Result;

use super::{
    Options, keep_log,
    schedule::{on_off, together},
    stage::{Recount, Stage, check_book, context, lateness, percent, share, slack},
    table::Table,
    tenant::Plan,
};

const COLUMNS: &[&str] = &[
    "plan",
    "burst",
    "envelope",
    "rests",
    "sent",
    "admitted",
    "excess, tokens",
    "served",
    "pause, ms",
];
const REPLICAS: usize = 3;
const CYCLES: usize = 3;

/// The result across all idle times.
#[derive(Clone)]
struct Found {
    sent: usize,
    admitted: usize,
    possible: u64,
    excess: f64,
    at: Duration,
}

impl Default for Found {
    fn default() -> Self {
        Self {
            sent: 0,
            admitted: 0,
            possible: 0,
            excess: f64::NEG_INFINITY,
            at: Duration::ZERO,
        }
    }
}

/// Returns the plans for one idle time. `step` makes their names unique within the tenant.
fn plans(step: u32) -> Vec<Plan> {
    let limits = [(600, 20), (6000, 100), (60_000, 300)];
    let both = limits.into_iter().flat_map(|(rpm, burst)| {
        [false, true].map(|strict| Plan {
            strict,
            ..Plan::new(format!("{rpm}/{burst} {strict} {step}"), rpm, burst)
        })
    });
    both.collect()
}

fn promise(plan: &Plan) -> &'static str {
    if plan.strict { "strict" } else { "leases" }
}

pub(crate) async fn run(options: &Options) -> Result<Table> {
    let mut table = Table::new("Worst-case bursts for leases", COLUMNS);
    let stage = Stage::set(options, REPLICAS, &[]).await?;
    if !options.no_redis {
        stage.settle(Duration::ZERO).await?;
    }
    let steps = if options.quick { 2 } else { 16 };
    let mut late = Vec::new();
    let mut worst = vec![Found::default(); plans(0).len()];
    for step in 0..=steps {
        let phase = options.lease_ttl() * 2 * step / steps;
        let plans = plans(step);
        let keys = stage.keys_on(&plans).await?;
        let loads = plans.iter().enumerate().map(|(key, plan)| {
            let limit = (plan.rpm, plan.burst);
            on_off(key, Duration::ZERO, REPLICAS, limit, phase, CYCLES).0
        });
        let granted = stage.granted().await?;
        let log = stage.drive(&keys, &together(loads)).await?;
        let granted = (granted, stage.granted().await?);
        let all = format!("a pause of {} ms, all plans", phase.as_millis());
        check_book(&mut table, &all, granted, &log);
        keep_log(options, &format!("bursts-{step}"), &log)?;
        for (key, plan) in plans.iter().enumerate() {
            let recount = Recount::of(key, plan, slack(plan, options.lease_ttl()), &log);
            if recount.is_over() {
                let what = format!(
                    "a pause of {} ms, {} per minute, burst {}, {}",
                    phase.as_millis(),
                    plan.rpm,
                    plan.burst,
                    promise(plan)
                );
                table.faults.push(context(&what, &recount));
            }
            let found = &mut worst[key];
            found.sent += recount.sent;
            found.admitted += recount.admitted;
            found.possible += recount.possible();
            if recount.excess() > found.excess {
                (found.excess, found.at) = (recount.excess(), phase);
            }
        }
        late.extend(log);
    }
    stage.end().await?;
    for (found, plan) in worst.iter().zip(plans(0)) {
        table.row(vec![
            plan.rpm.to_string(),
            plan.burst.to_string(),
            promise(&plan).to_owned(),
            (steps + 1).to_string(),
            found.sent.to_string(),
            found.admitted.to_string(),
            format!("{:+.3}", found.excess),
            percent(share(found.admitted as u64, found.possible)),
            format!("{:.1}", found.at.as_secs_f64() * 1e3),
        ]);
    }
    table.notes.push(format!(
        "{REPLICAS} replicas. The envelope of a plan with leases is burst + rate·(T + {} ms), that of a strict \
         plan burst + rate·T. {CYCLES} cycles per cell, each starting with the next replica. {}",
        options.lease_ttl,
        lateness(&late),
    ));
    Ok(table)
}
