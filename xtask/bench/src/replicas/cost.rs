//! The cost of sharing limits: calls to Redis, and the cost of a request compared with a single replica that counts in
//! memory.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use quota_testkit::{envelope::Envelope, redis::RedisServer};

use super::{
    Options, keep_log,
    schedule::{Spread, Steady, nanos},
    stage::{Recount, Stage, context, lateness, per_thousand, scripts, share},
    table::Table,
    tenant::{Key, Plan},
};
use crate::{
    load::{CONNECTIONS, Load, Statuses, echo},
    process::{Cores, Server},
    rounds::{keys, median},
};

const COLUMNS: &[&str] = &[
    "what",
    "requests/s",
    "admitted",
    "Redis calls per 1,000",
    "CPU µs per request",
    "CPU, memory = 1",
    "requests/s, memory = 1",
];
const REPLICAS: usize = 3;

pub(crate) async fn run(options: &Options) -> Result<Table> {
    let mut table = Table::new("The cost of sharing", COLUMNS);
    let seconds = Duration::from_secs(if options.quick { 1 } else { 6 });
    let stage = Stage::set(options, REPLICAS, &[]).await?;
    if !options.no_redis {
        // The burst takes one minute to refill.
        let fills = if options.quick { 0 } else { 60 };
        stage.settle(Duration::from_secs(fills)).await?;
    }
    for (rpm, aim) in [(60_000, 46.0), (600_000, 4.0)] {
        steady(options, &stage, rpm, seconds, aim, &mut table).await?;
    }
    saturated(options, &stage, seconds, &mut table).await?;
    stage.end().await?;
    if !options.no_redis {
        next_to_memory(options, &mut table).await?;
    }
    table.notes.push(format!(
        "Redis calls are for {REPLICAS} replicas; Redis itself counts all scripts. The comparison with memory: two \
         servers take turns on one core, with {CONNECTIONS} connections from the other core; medians of short \
         rounds; CPU is that of the server only."
    ));
    Ok(table)
}

/// Measures a load of 0.9 times the limit.
async fn steady(
    options: &Options,
    stage: &Stage,
    rpm: u32,
    time: Duration,
    aim: f64,
    table: &mut Table,
) -> Result<()> {
    let plan = Plan::new(format!("{rpm} a minute"), rpm, rpm);
    let keys = stage.keys_on(std::slice::from_ref(&plan)).await?;
    let load = Steady {
        key: 0,
        from: Duration::ZERO,
        per_second: f64::from(rpm) / 60.0 * 0.9,
        count: 0,
        spread: Spread::Random(1),
    };
    let part = |time| load.lasting(time).arrivals(REPLICAS).collect::<Vec<_>>();
    // Leases must first reach their full size.
    stage.drive(&keys, &part(time / 3)).await?;
    let mut counters = stage.counters().await?;
    let (calls, cpu) = (scripts(&mut counters).await?, stage.fleet.cpu()?);
    let began = std::time::Instant::now();
    let log = stage.drive(&keys, &part(time)).await?;
    let took = began.elapsed();
    let cpu = stage.fleet.cpu()?.saturating_sub(cpu);
    let after = scripts(&mut counters).await?;
    keep_log(options, &format!("cost-{rpm}"), &log)?;
    let decisions = log.iter().filter(|it| it.status != 0).count() as u64;
    let recount = Recount::of(0, &plan, options.lease_ttl(), &log);
    let what = format!("{rpm} a minute, load 0.9");
    if recount.is_over() {
        table.faults.push(context(&what, &recount));
    }
    row(
        table,
        &what,
        took,
        cpu,
        decisions,
        recount.admitted as u64,
        calls.zip(after),
        aim,
    );
    table
        .notes
        .push(format!("At {rpm} per minute: {}", lateness(&log)));
    Ok(())
}

/// Sends as many requests as possible with a key whose bucket is empty, and measures them.
async fn saturated(
    options: &Options,
    stage: &Stage,
    time: Duration,
    table: &mut Table,
) -> Result<()> {
    let plan = Plan::new("saturated", 60_000, 1000);
    let keys = stage.keys_on(std::slice::from_ref(&plan)).await?;
    hammer(stage, &keys, time / 3)?;
    let mut counters = stage.counters().await?;
    let (calls, cpu) = (scripts(&mut counters).await?, stage.fleet.cpu()?);
    let began = std::time::Instant::now();
    let statuses = hammer(stage, &keys, time)?;
    let took = began.elapsed();
    let cpu = stage.fleet.cpu()?.saturating_sub(cpu);
    let after = scripts(&mut counters).await?;
    let of = |status| statuses.get(&status).copied().unwrap_or(0);
    ensure!(
        of(200) + of(429) == statuses.values().sum::<u64>(),
        "unexpected responses: {statuses:?}"
    );
    let envelope = Envelope::new(plan.rpm, plan.burst, options.lease_ttl());
    let allowed = envelope.allows(nanos(took));
    if of(200) > allowed {
        let admitted = of(200);
        let fault = format!("saturated: {admitted} admitted, but only {allowed} are allowed");
        table.faults.push(fault);
    }
    let decisions = of(200) + of(429);
    row(
        table,
        "60,000 a minute, saturated",
        took,
        cpu,
        decisions,
        of(200),
        calls.zip(after),
        0.5,
    );
    Ok(())
}

/// Runs a closed-loop load against every replica.
fn hammer(stage: &Stage, keys: &[Key], time: Duration) -> Result<Statuses> {
    let request = echo(keys[0].text.to_str()?);
    thread::scope(|scope| {
        let loads = stage.fleet.addrs().into_iter().map(|addr| {
            let request = &request;
            scope.spawn(move || Load::new()?.put(addr, time, request))
        });
        let mut all = Statuses::new();
        // Start all loops before waiting for the first.
        for load in loads.collect::<Vec<_>>() {
            let statuses = load.join().ok().context("a load ended early")??;
            for (status, count) in statuses {
                *all.entry(status).or_default() += count;
            }
        }
        Ok(all)
    })
}

#[expect(clippy::too_many_arguments, reason = "the cells of a row")]
fn row(
    table: &mut Table,
    what: &str,
    took: Duration,
    cpu: Duration,
    decisions: u64,
    admitted: u64,
    calls: Option<(u64, u64)>,
    aim: f64,
) {
    let (before, after) = calls.unzip();
    if let Some((before, after)) = calls {
        let calls = 1e3 * share(after.saturating_sub(before), decisions);
        if calls > aim {
            let note = format!("Above the target of {aim} calls per 1,000: {what}, {calls:.1}.");
            table.notes.push(note);
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52")]
    let decided = decisions as f64;
    table.row(vec![
        what.to_owned(),
        format!("{:.0}", decided / took.as_secs_f64()),
        admitted.to_string(),
        per_thousand(before, after, decisions),
        format!("{:.1}", cpu.as_secs_f64() * 1e6 / decided),
        "-".to_owned(),
        "-".to_owned(),
    ]);
}

struct Round {
    micros: f64,
    per_second: f64,
}

/// Measures one busy key, with all requests allowed and with all requests denied, alternately on a server with Redis
/// and on a server without Redis.
async fn next_to_memory(options: &Options, table: &mut Table) -> Result<()> {
    let redis = RedisServer::start().await;
    let (rounds, time) = if options.quick { (3, 100) } else { (25, 300) };
    let time = Duration::from_millis(time);
    let cores = Cores::pick();
    let directives = "info,quota_server::access=off";
    let with_redis = [
        ("REDIS_URL", redis.url()),
        ("QUOTA_LEASE_TTL", format!("{}ms", options.lease_ttl)),
    ];
    // Runtimes cannot be nested, so the task runs on another thread.
    let apart = |task: &(dyn Fn() -> Result<Vec<[Round; 2]>> + Sync)| {
        thread::scope(|scope| scope.spawn(task).join().ok().context("the task panicked")?)
    };
    let memory = Server::quota(&options.quota, directives, cores, &[])?;
    let shared = Server::quota(&options.quota, directives, cores, &with_redis)?;
    let (memory_keys, shared_keys) = (keys(&memory)?, keys(&shared)?);
    for (what, memory_key, shared_key) in [
        ("hot key, admitted", &memory_keys.0, &shared_keys.0),
        ("hot key, denied", &memory_keys.1, &shared_keys.1),
    ] {
        let cases = [(&memory, echo(memory_key)), (&shared, echo(shared_key))];
        let measure = |rounds: usize| {
            apart(&|| {
                let load = Load::new()?;
                let mut all = Vec::new();
                for _ in 0..rounds {
                    let one = |(server, request): &(&Server, Vec<u8>)| {
                        let (cpu, began) = (server.cpu()?, std::time::Instant::now());
                        let statuses = load.put(server.addr, time, request)?;
                        let took = began.elapsed();
                        let cpu = server.cpu_when_idle()?.saturating_sub(cpu);
                        let total = statuses.values().sum::<u64>();
                        let right = statuses.keys().all(|it| matches!(it, 200 | 429));
                        ensure!(right && total > 0, "unexpected responses: {statuses:?}");
                        #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52")]
                        let total = total as f64;
                        Ok(Round {
                            micros: cpu.as_secs_f64() * 1e6 / total,
                            per_second: total / took.as_secs_f64(),
                        })
                    };
                    all.push([one(&cases[0])?, one(&cases[1])?]);
                }
                Ok(all)
            })
        };
        measure(2)?;
        let mut all = Vec::new();
        let mut counters = Some(super::counters::Counters::of(&redis.url()).await?);
        let before = scripts(&mut counters).await?;
        for _ in 0..rounds {
            all.extend(measure(1)?);
            // Yield, so that a stop signal is noticed.
            tokio::task::yield_now().await;
        }
        let after = scripts(&mut counters).await?;
        for (name, it) in [("memory", 0), ("Redis", 1)] {
            let of = |value: fn(&Round) -> f64| median(all.iter().map(|round| value(&round[it])));
            let ratio = |value: fn(&Round) -> f64| {
                median(all.iter().map(|round| value(&round[it]) / value(&round[0])))
            };
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a count"
            )]
            let decisions = all
                .iter()
                .map(|round| round[it].per_second * time.as_secs_f64())
                .sum::<f64>() as u64;
            table.row(vec![
                format!("{what}, {name}"),
                format!("{:.0}", of(|it| it.per_second)),
                "-".to_owned(),
                if it == 0 {
                    "-".to_owned()
                } else {
                    per_thousand(before, after, decisions)
                },
                format!("{:.2}", of(|it| it.micros)),
                format!("{:.3}", ratio(|it| it.micros)),
                format!("{:.3}", ratio(|it| it.per_second)),
            ]);
        }
    }
    Ok(())
}
