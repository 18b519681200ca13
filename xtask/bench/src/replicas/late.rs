//! Redis responds late to one replica only.
//!
//! Redis has run the script that takes tokens, but the response arrives after the replica has stopped waiting, so the
//! replica returns the tokens. By then, the bucket has refilled, and the other replicas have taken all of its tokens.
//! Returned tokens must not be available twice.

use std::time::Duration;

use anyhow::{Result, ensure};
use quota_testkit::{
    proxy::{Fault, FaultProxy, Upstream},
    redis::RedisServer,
};
use tokio::time::{Instant, sleep, sleep_until};

use super::{
    Options,
    drive::{Targets, drive},
    faults::with_share_of_one,
    keep_log,
    schedule::{at_once, together},
    stage::{Recount, Stage, context, lateness, percent, slack},
    table::Table,
    tenant::Plan,
};

const COLUMNS: &[&str] = &[
    "responses late by, ms",
    "plan",
    "rounds",
    "sent",
    "admitted",
    "excess, tokens",
    "served",
    "5xx",
];
const REPLICAS: usize = 3;
const LIMIT: (u32, u32) = (60_000, 200);
/// The time from the start of the delay until the first requests are sent.
const BEFORE: Duration = Duration::from_millis(30);
/// The time for opening all connections.
const CONNECTED: Duration = Duration::from_millis(1000);

fn plans(round: u32, delay: Duration) -> Vec<Plan> {
    let modes = ["closed", "share"].into_iter();
    modes
        .flat_map(|mode| [true, false].map(|strict| (mode, strict)))
        .map(|(mode, strict)| Plan {
            strict,
            on_redis_failure: Some(mode),
            ..Plan::new(
                format!("{} {mode} {} {round}", kind(strict), delay.as_millis()),
                LIMIT.0,
                LIMIT.1,
            )
        })
        .collect()
}

fn kind(strict: bool) -> &'static str {
    if strict { "strict" } else { "leases" }
}

pub(crate) async fn run(options: &Options) -> Result<Table> {
    let mut table = Table::new("Late responses for one of three replicas", COLUMNS);
    ensure!(!options.no_redis, "this table requires Redis");
    let (delays, rounds): (&[u64], _) = if options.quick {
        (&[120], 1)
    } else {
        (&[60, 120, 300], 4)
    };
    let redis = RedisServer::start().await;
    let mut proxies = Vec::new();
    for _ in 0..REPLICAS {
        proxies.push(FaultProxy::start_apart(Upstream::Tcp(redis.addr())).await);
    }
    let url = |proxy: &FaultProxy| format!("redis://{}/0", proxy.addr());
    let urls = proxies.iter().map(url).collect();
    let stage = Stage::around(options, REPLICAS, urls, None, &[]).await?;
    stage.settle(Duration::ZERO).await?;
    let mut all = Vec::new();
    for delay in delays.iter().copied().map(Duration::from_millis) {
        let mut found = vec![Found::default(); plans(0, delay).len()];
        for round in 0..rounds {
            let plans = plans(round, delay);
            let keys = stage.keys_on(&plans).await?;
            let targets = Targets {
                ready: LIMIT.1 as usize + 50,
                ..stage.targets(&keys)
            };
            for (key, plan) in plans.iter().enumerate() {
                let first = CONNECTED + BEFORE;
                let load = together([
                    at_once(key, first, 0, 150),
                    // These requests come after the late responses have arrived and the replica has begun to return
                    // tokens.
                    at_once(
                        key,
                        first + delay + Duration::from_millis(50),
                        1,
                        LIMIT.1 + 50,
                    ),
                    at_once(
                        key,
                        first + delay + Duration::from_millis(75),
                        2,
                        LIMIT.1 + 50,
                    ),
                ]);
                let origin = Instant::now();
                let late = async {
                    sleep_until(origin + CONNECTED).await;
                    proxies[0].set(Fault::Late(delay));
                    sleep_until(origin + first + delay * 2).await;
                    proxies[0].set(Fault::Pass);
                    anyhow::Ok(())
                };
                let (log, ()) = tokio::try_join!(drive(&targets, &load, origin), late)?;
                keep_log(
                    options,
                    &format!("late-{}-{round}-{key}", delay.as_millis()),
                    &log,
                )?;
                let promised = with_share_of_one(plan, REPLICAS);
                let slack = slack(plan, options.lease_ttl());
                let recount = Recount::of(key, &promised, slack, &log);
                if recount.is_over() {
                    table.faults.push(context(&plan.name, &recount));
                }
                found[key].add(&recount);
                all.extend(log);
                // Wait until the replica uses Redis again.
                sleep(Duration::from_millis(1500)).await;
            }
        }
        for (found, plan) in found.iter().zip(plans(0, delay)) {
            table.row(vec![
                delay.as_millis().to_string(),
                format!(
                    "{} {}",
                    kind(plan.strict),
                    plan.on_redis_failure.unwrap_or("share")
                ),
                rounds.to_string(),
                found.sent.to_string(),
                found.admitted.to_string(),
                format!("{:+.3}", found.excess),
                percent(found.served()),
                found.failed.to_string(),
            ]);
        }
    }
    stage.end().await?;
    table.notes.push(format!(
        "{} per minute, burst {}. 150 concurrent requests to the replica whose responses are late, then {} to each of \
         the two others, 50 and 75 ms after the responses arrived. Served is the fraction of what an exact bucket \
         would admit of all requests, including those to the late replica, if it decided them when they were sent or \
         when they were answered, whichever is less. {}",
        LIMIT.0,
        LIMIT.1,
        LIMIT.1 + 50,
        lateness(&all),
    ));
    Ok(table)
}

/// The results of several rounds.
#[derive(Clone)]
pub(crate) struct Found {
    pub(crate) sent: usize,
    pub(crate) admitted: usize,
    pub(crate) failed: usize,
    pub(crate) excess: f64,
    tokens: u64,
    possible: u64,
}

impl Default for Found {
    fn default() -> Self {
        Self {
            sent: 0,
            admitted: 0,
            failed: 0,
            excess: f64::NEG_INFINITY,
            tokens: 0,
            possible: 0,
        }
    }
}

impl Found {
    pub(crate) fn add(&mut self, recount: &Recount) {
        self.sent += recount.sent;
        self.admitted += recount.admitted;
        self.failed += recount.failed + recount.silent;
        self.excess = self.excess.max(recount.excess());
        self.tokens += recount.tokens;
        self.possible += recount.possible();
    }

    pub(crate) fn served(&self) -> f64 {
        super::stage::share(self.tokens, self.possible)
    }
}
