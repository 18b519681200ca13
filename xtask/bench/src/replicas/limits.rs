//! Allowed requests with various numbers of replicas, loads, and plans: never above the envelope in any window, and
//! only slightly below it.
//!
//! Each measurement uses one key per plan, in the same processes at the same time. At 0.9 times the limit, buckets
//! start full and everything is allowed. At 1 and 2 times the limit, a burst first empties the bucket, so that any
//! excess over the envelope becomes visible.

use std::time::Duration;

use anyhow::Result;
use quota_testkit::redis::RedisServer;

use super::{
    Options,
    drive::Attempt,
    keep_log,
    schedule::{Spread, Steady, drained_then, together},
    stage::{Recount, Stage, check_book, context, lateness, per_thousand, scripts, share, slack},
    table::Table,
    tenant::Plan,
};

const COLUMNS: &[&str] = &[
    "replicas",
    "load",
    "plan",
    "sent",
    "admitted",
    "excess, tokens",
    "served",
    "failed",
    "Redis calls per 1,000",
    "CPU µs per request",
];
const LOADS: [f64; 3] = [0.9, 1.0, 2.0];
/// The maximum rate of the burst that empties a bucket, in requests per second: as many as this machine can send to
/// replicas that run on the same cores.
const BLOW: f64 = 8000.0;

pub(crate) async fn run(options: &Options) -> Result<Table> {
    let mut table = Table::new("Limits across replicas", COLUMNS);
    let (limits, loads, time): (&[(u32, u32)], &[f64], _) = if options.quick {
        // These buckets fill so slowly that an excess remains visible even if a replica pauses for a few seconds.
        (&[(300, 50), (600, 100)], &[2.0], Duration::from_secs(1))
    } else {
        let limits = &[(60, 60), (600, 600), (60_000, 60_000)];
        (limits, &LOADS, Duration::from_secs(6))
    };
    let mut redis = if options.no_redis {
        None
    } else {
        Some(RedisServer::start().await)
    };
    let mut is_new = redis.is_some();
    let mut late = Vec::new();
    for &replicas in &options.replicas {
        let stage = Stage::on(options, replicas, redis, &[]).await?;
        if std::mem::take(&mut is_new) {
            // How long the slowest bucket takes to fill.
            let fills = if options.quick { 10 } else { 60 };
            stage.settle(Duration::from_secs(fills)).await?;
        }
        for &load in loads {
            let log = cell(options, &stage, load, limits, time, &mut table).await?;
            late.extend(log);
        }
        redis = stage.end().await?;
    }
    table.notes.push(format!(
        "Each plan's burst is its limit per minute, and its buckets are full at first. Excess is the worst of all windows, above burst + rate·(T + \
         {} ms + 2 µs for the resolution of Redis's clock), recounted from when requests were sent and answered; negative means below. Served is \
         the fraction of what one exact bucket would have admitted of the same requests, if it had decided them when they were sent or when \
         they were answered, whichever is less. Redis calls and CPU are the totals of a cell's keys. The admitted \
         requests of a cell are also compared with the tokens that its replicas report as granted. {}",
        options.lease_ttl,
        lateness(&late),
    ));
    Ok(table)
}

async fn cell(
    options: &Options,
    stage: &Stage,
    load: f64,
    limits: &[(u32, u32)],
    time: Duration,
    table: &mut Table,
) -> Result<Vec<Attempt>> {
    let replicas = stage.fleet.len();
    let plans: Vec<Plan> = limits
        .iter()
        .map(|&(rpm, burst)| Plan::new(format!("{rpm} per minute at {load}"), rpm, burst))
        .collect();
    let keys = stage.keys_on(&plans).await?;
    let seed = replicas as u64;
    let schedule = together(plans.iter().enumerate().map(|(key, plan)| {
        let steady = Steady {
            key,
            from: Duration::ZERO,
            per_second: f64::from(plan.rpm) / 60.0 * load,
            count: 0,
            spread: Spread::Random(seed + key as u64),
        };
        if load < 1.0 {
            steady.lasting(time).arrivals(replicas).collect()
        } else {
            let blow = BLOW.min(f64::from(plan.burst) * 4.0);
            drained_then(steady, replicas, (plan.rpm, plan.burst), blow, time)
        }
    }));
    let mut counters = stage.counters().await?;
    let (calls, cpu) = (scripts(&mut counters).await?, stage.fleet.cpu()?);
    let granted = stage.granted().await?;
    let log = stage.drive(&keys, &schedule).await?;
    let granted = (granted, stage.granted().await?);
    let all = format!("{replicas} replicas, load {load}, all plans");
    check_book(table, &all, granted, &log);
    let cpu = stage.fleet.cpu()?.saturating_sub(cpu);
    let decisions = log.iter().filter(|it| it.status != 0).count() as u64;
    let calls = per_thousand(calls, scripts(&mut counters).await?, decisions);
    let micros = share(u64::try_from(cpu.as_micros())?, decisions);
    keep_log(options, &format!("limits-{replicas}-{load}"), &log)?;

    for (key, plan) in plans.iter().enumerate() {
        let recount = Recount::of(key, plan, slack(plan, options.lease_ttl()), &log);
        let what = format!("{replicas} replicas, load {load}, {} per minute", plan.rpm);
        if recount.is_over() {
            table.faults.push(context(&what, &recount));
        }
        if load > 1.0 && recount.is_short() {
            let (served, possible) = (recount.tokens, recount.possible());
            let fault = format!("{what}: only {served} of {possible} were served");
            table.faults.push(fault);
        }
        table.row(vec![
            replicas.to_string(),
            load.to_string(),
            plan.rpm.to_string(),
            recount.sent.to_string(),
            recount.admitted.to_string(),
            format!("{:+.3}", recount.excess()),
            format!("{:.2}%", recount.served() * 100.0),
            (recount.failed + recount.silent).to_string(),
            calls.clone(),
            format!("{micros:.0}"),
        ]);
    }
    Ok(log)
}
