//! Sends all requests of an idle key's full burst to one replica at the same time, for several round-trip times to
//! Redis.

use std::time::Duration;

use anyhow::{Result, ensure};
use quota_testkit::{
    proxy::{Fault, FaultProxy, Upstream},
    redis::RedisServer,
};

use super::{
    Options, keep_log,
    late::Found,
    schedule::at_once,
    stage::{Recount, Stage, context, lateness, millis, percent, quantile, slack},
    table::Table,
    tenant::Plan,
};

const COLUMNS: &[&str] = &[
    "round trip to Redis, ms",
    "a minute",
    "burst",
    "plan",
    "rounds",
    "sent",
    "admitted",
    "excess, tokens",
    "served",
    "5xx",
    "p99, ms",
];
const LIMITS: [(u32, u32); 2] = [(600, 600), (60, 60)];

/// How long the slowest bucket takes to fill.
const FILLED: Duration = Duration::from_secs(60);
/// The maximum number of times to wait until the buckets are full.
const REFILLS: u32 = 10;

pub(crate) async fn run(options: &Options) -> Result<Table> {
    let mut table = Table::new("Cold bursts", COLUMNS);
    ensure!(!options.no_redis, "this table requires Redis");
    let (round_trips, rounds): (&[u64], _) = if options.quick {
        (&[0, 5], 1)
    } else {
        (&[0, 1, 5, 10, 20], 3)
    };
    let redis = RedisServer::start().await;
    let proxy = FaultProxy::start_apart(Upstream::Tcp(redis.addr())).await;
    let urls = vec![format!("redis://{}/0", proxy.addr())];
    let stage = Stage::around(options, 1, urls, None, &[]).await?;
    stage.settle(FILLED).await?;
    let (mut late, mut seen, mut refills) = (Vec::new(), stage.outages().await?, REFILLS);
    for round_trip in round_trips {
        proxy.set(match round_trip {
            0 => Fault::Pass,
            ms => Fault::Late(Duration::from_millis(*ms)),
        });
        for (rpm, burst) in LIMITS {
            for strict in [false, true] {
                let (mut found, mut took) = (Found::default(), Vec::new());
                for round in 0..rounds {
                    // After an outage, buckets start empty, but each burst needs a full bucket.
                    let outages = stage.outages().await?;
                    if std::mem::replace(&mut seen, outages) != outages {
                        if refills == 0 {
                            table.notes.push(
                                "Outages of Redis prevented full buckets too often: the machine is too busy."
                                    .to_owned(),
                            );
                            break;
                        }
                        refills -= 1;
                        stage.settle(FILLED).await?;
                        seen = stage.outages().await?;
                    }
                    let kind = if strict { "strict" } else { "leases" };
                    let plan = Plan {
                        strict,
                        ..Plan::new(format!("{rpm} {kind} {round_trip} {round}"), rpm, burst)
                    };
                    let keys = stage.keys_on(std::slice::from_ref(&plan)).await?;
                    let load = at_once(0, Duration::from_secs(1), 0, burst);
                    let log = stage.drive_ready(&keys, &load, burst as usize).await?;
                    keep_log(
                        options,
                        &format!("cold-{round_trip}-{rpm}-{kind}-{round}"),
                        &log,
                    )?;
                    let recount = Recount::of(0, &plan, slack(&plan, options.lease_ttl()), &log);
                    if recount.is_over() {
                        table.faults.push(context(&plan.name, &recount));
                    }
                    if recount.is_short() {
                        let (served, possible) = (recount.tokens, recount.possible());
                        table.faults.push(format!(
                            "{round_trip} ms to Redis, {rpm} per minute, {kind}: only {served} of {possible} were served"
                        ));
                    }
                    found.add(&recount);
                    took.extend(log.iter().map(super::drive::Attempt::took));
                    late.extend(log);
                }
                table.row(vec![
                    round_trip.to_string(),
                    rpm.to_string(),
                    burst.to_string(),
                    if strict { "strict" } else { "leases" }.to_owned(),
                    rounds.to_string(),
                    found.sent.to_string(),
                    found.admitted.to_string(),
                    format!("{:+.3}", found.excess),
                    percent(found.served()),
                    found.failed.to_string(),
                    millis(quantile(took, 0.99)),
                ]);
            }
        }
    }
    stage.end().await?;
    table.notes.push(format!(
        "One replica, a new key each round, all requests at the same time, each on a separate connection that was \
         opened before. {}",
        lateness(&late),
    ));
    Ok(table)
}
