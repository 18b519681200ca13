//! Redis freezes for less than a second, under load above the limit.

use std::time::Duration;

use anyhow::{Result, ensure};
use quota_testkit::redis::RedisServer;
use tokio::time::{Instant, sleep, sleep_until};

use super::{
    Options,
    drive::drive,
    keep_log,
    schedule::{Spread, Steady, drained_then, together},
    stage::{Recount, Stage, context, lateness, millis, percent, quantile, slack},
    table::Table,
    tenant::Plan,
};

const COLUMNS: &[&str] = &[
    "stall, ms",
    "plan",
    "sent",
    "admitted",
    "excess, tokens",
    "served",
    "5xx",
    "p99, ms",
];
const REPLICAS: usize = 3;
const LIMIT: (u32, u32) = (6000, 200);
const STALL_AT: Duration = Duration::from_millis(1500);
const AFTERWARDS: Duration = Duration::from_millis(3000);

fn plans(ms: u64) -> Vec<Plan> {
    let modes = ["share", "closed"].into_iter();
    modes
        .flat_map(|mode| [false, true].map(|strict| (mode, strict)))
        .map(|(mode, strict)| {
            let kind = if strict { "strict" } else { "leases" };
            Plan {
                strict,
                on_redis_failure: Some(mode),
                ..Plan::new(format!("{kind} {mode} {ms}"), LIMIT.0, LIMIT.1)
            }
        })
        .collect()
}

pub(crate) async fn run(options: &Options) -> Result<Table> {
    let mut table = Table::new("Short freezes of Redis", COLUMNS);
    ensure!(!options.no_redis, "this table requires Redis");
    let stalls: &[u64] = if options.quick {
        &[300]
    } else {
        &[50, 100, 200, 300, 450, 600, 750, 900]
    };
    let mut redis = RedisServer::start().await;
    let urls = vec![redis.url(); REPLICAS];
    let stage = Stage::around(options, REPLICAS, urls, None, &[]).await?;
    stage.settle(Duration::ZERO).await?;
    let mut late = Vec::new();
    for ms in stalls {
        let stall = Duration::from_millis(*ms);
        let plans = plans(*ms);
        let keys = stage.keys_on(&plans).await?;
        let rate = f64::from(LIMIT.0) / 60.0;
        let load = together((0..plans.len()).map(|key| {
            let steady = Steady {
                key,
                from: Duration::ZERO,
                per_second: rate * 2.0,
                count: 0,
                spread: Spread::Random(key as u64),
            };
            drained_then(
                steady,
                REPLICAS,
                LIMIT,
                1000.0,
                STALL_AT + stall + AFTERWARDS,
            )
        }));
        let targets = stage.targets(&keys);
        let origin = Instant::now();
        let stalling = async {
            sleep_until(origin + STALL_AT).await;
            redis.stop();
            sleep(stall).await;
            redis.cont();
            anyhow::Ok(())
        };
        let (log, ()) = tokio::try_join!(drive(&targets, &load, origin), stalling)?;
        keep_log(options, &format!("stall-{ms}"), &log)?;
        for (key, plan) in plans.iter().enumerate() {
            let recount = Recount::of(key, plan, slack(plan, options.lease_ttl()), &log);
            let what = format!("a freeze of {ms} ms, {}", plan.name);
            if recount.is_over() {
                table.faults.push(context(&what, &recount));
            }
            if plan.on_redis_failure == Some("share") && recount.failed > 0 {
                table
                    .faults
                    .push(format!("{what}: {} responses with 5xx", recount.failed));
            }
            let own = log.iter().filter(|it| it.key == key);
            let took = own.map(super::drive::Attempt::took).collect();
            table.row(vec![
                ms.to_string(),
                plan.name.rsplit_once(' ').map_or("", |it| it.0).to_owned(),
                recount.sent.to_string(),
                recount.admitted.to_string(),
                format!("{:+.3}", recount.excess()),
                percent(recount.served()),
                recount.failed.to_string(),
                millis(quantile(took, 0.99)),
            ]);
        }
        late.extend(log);
        // Wait, so that this freeze does not affect the next measurement.
        sleep(Duration::from_secs(3)).await;
    }
    stage.end().await?;
    table.notes.push(format!(
        "{REPLICAS} replicas, {} per minute, burst {}; the bucket is emptied first, then twice the rate. Redis is frozen \
         with SIGSTOP. Served is the fraction of what an exact bucket would admit of all requests, including those \
         during the freeze, if it decided them when they were sent or when they were answered, whichever is less. {}",
        LIMIT.0,
        LIMIT.1,
        lateness(&late),
    ));
    Ok(table)
}
