//! Upgrades, restarts and kills replicas one after another, under load through Caddy. No request may fail, no usage may
//! be lost or recorded twice, and a key's rate limit must hold throughout.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    ops::RangeInclusive,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::Result;
use clap::Args;
use futures_util::{TryStreamExt as _, pin_mut};
use nix::sys::signal::Signal;
use quota_testkit::{
    caddy,
    envelope::{Envelope, Span},
    redis::free_port,
};
use tokio::time::sleep;

use super::{
    Production, Programs, Shape,
    load::{Attempt, Load, Outcome, Target},
};
use crate::{
    postgres::Postgres,
    replica::Replica,
    replicas::tenant::{Plan, Tenant},
};

/// The limited key's rate per minute, and its burst. Half of the requests use this key, and these requests must exceed
/// the key's rate.
const RPM: u32 = 6000;
const BURST: u32 = 100;
/// The default `QUOTA_LEASE_TTL`, plus one microsecond for each end of a window. A microsecond is the resolution of
/// Redis's clock.
const SLACK: Duration = Duration::from_nanos(100_002_000);
/// The smallest acceptable number of allowed requests, as a percentage of what one exact bucket would have allowed.
const SERVED: u64 = 90;
/// The pause between two restarts.
const PAUSE: Duration = Duration::from_secs(1);
const SHIPPED_WITHIN: Duration = Duration::from_secs(30);

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// The number of restarts with SIGTERM
    #[arg(default_value_t = 20)]
    restarts: u32,
    /// The number of kills with SIGKILL, after the restarts
    #[arg(long, default_value_t = 4)]
    kills: u32,
    /// Start with this binary, and upgrade all replicas first
    #[arg(long)]
    from: Option<PathBuf>,
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=25))]
    replicas: u8,
    /// Requests per second
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=5000))]
    rate: u32,
    /// `QUOTA_REDIS_TIMEOUT`, such as `500ms`. On a busy machine, Redis may not respond within the default time, which
    /// counts as an outage
    #[arg(long)]
    redis_timeout: Option<String>,
}

/// What was done to the replicas.
#[derive(Default)]
struct Events {
    /// The time and the description of each event.
    log: Vec<(u64, String)>,
    upgrades: u32,
    restarts: u32,
    longest_exit: Duration,
    /// The time range of each kill.
    kills: Vec<RangeInclusive<u64>>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    // Dropping the future stops everything that was started, even on Ctrl-C.
    runtime.block_on(async {
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            done = restarts(options) => done,
            _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(130)),
            _ = terminate.recv() => Ok(ExitCode::from(143)),
        }
    })
}

async fn restarts(options: &Options) -> Result<ExitCode> {
    let caddy = caddy::recent(&options.programs.tools)?;
    let dir = tempfile::Builder::new()
        .prefix("quota-restarts-")
        .tempdir_in("/tmp")?;
    let postgres = Postgres::start(&options.programs.postgres).await?;
    let shape = Shape {
        quota: options.from.as_ref().unwrap_or(&options.programs.quota),
        caddy: &caddy,
        dir: dir.path(),
        replicas: options.replicas,
        https: free_port(),
        with_demo: false,
        directives: "info,quota_server::access=off,quota_server::denials=off",
        settings: options
            .redis_timeout
            .iter()
            .map(|it| ("QUOTA_REDIS_TIMEOUT", it.clone()))
            .collect(),
    };
    let mut production = Production::start(&shape, postgres).await?;
    let target = target(&production).await?;
    let load = Load::start(target, options.rate);
    let done = disturb(options, &mut production, &load).await;
    let attempts = load.stop().await?;
    let events = done?;
    production.stop_replicas().await?;
    let left = fs::read_dir(dir.path().join("data/usage"))?.count();
    let warnings: Vec<String> = production
        .replicas
        .iter()
        .flat_map(Replica::warnings)
        .collect();
    let usage = Usage::recount(&production.postgres, &attempts, &events).await?;
    production.stop().await?;
    let is_good = report(options, &attempts, &events, &usage, left);
    if !is_good {
        for line in warnings.iter().take(20) {
            println!("log: {line}");
        }
    }
    Ok(if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Creates the keys and the service token.
async fn target(production: &Production) -> Result<Target> {
    let server = production.replicas[0].addr;
    let tenant = Tenant::register(server).await?;
    let limited = tenant
        .key_on(server, &Plan::new("limited", RPM, BURST))
        .await?;
    let ample = Plan::new("ample", 60_000_000, 60_000_000);
    let ample = tenant.key_on(server, &ample).await?;
    let service_token = tenant.service_token(server).await?;
    Ok(Target {
        client: production.caddy.client()?,
        base: production.caddy.base(),
        limited: limited.text.to_str()?.to_owned(),
        ample: ample.text.to_str()?.to_owned(),
        service_token: service_token.to_str()?.to_owned(),
    })
}

/// Upgrades, restarts and kills the replicas in turn.
async fn disturb(options: &Options, production: &mut Production, load: &Load) -> Result<Events> {
    let mut events = Events::default();
    sleep(3 * PAUSE).await;
    if options.from.is_some() {
        for index in 0..production.replicas.len() {
            production.replicas[index]
                .quota
                .clone_from(&options.programs.quota);
            events
                .end(production, load, index, Signal::SIGTERM, "upgrade")
                .await?;
            events.upgrades += 1;
        }
    }
    let mut turns = (0..production.replicas.len()).cycle();
    for index in turns.by_ref().take(usize::try_from(options.restarts)?) {
        events
            .end(production, load, index, Signal::SIGTERM, "restart")
            .await?;
        events.restarts += 1;
    }
    for index in turns.take(usize::try_from(options.kills)?) {
        events
            .end(production, load, index, Signal::SIGKILL, "kill")
            .await?;
    }
    sleep(2 * PAUSE).await;
    Ok(events)
}

impl Events {
    /// Stops or kills a replica, starts it again, and waits a little.
    async fn end(
        &mut self,
        production: &mut Production,
        load: &Load,
        index: usize,
        signal: Signal,
        what: &str,
    ) -> Result<()> {
        let replica = &mut production.replicas[index];
        let began = load.now();
        let took = replica.end(signal).await?;
        if signal == Signal::SIGKILL {
            self.kills.push(began..=load.now());
        } else {
            self.longest_exit = self.longest_exit.max(took);
        }
        replica.start().await?;
        let text = format!(
            "{what} of replica {index}: exited in {:.2} s, ready in {:.2} s",
            took.as_secs_f64(),
            Duration::from_nanos(load.now() - began)
                .saturating_sub(took)
                .as_secs_f64()
        );
        eprintln!("{:7.1} s: {text}", seconds(began));
        self.log.push((began, text));
        sleep(PAUSE).await;
        Ok(())
    }
}

/// The result of comparing the usage log with the responses.
#[derive(Debug, Default)]
struct Usage {
    rows: u64,
    /// The IDs of requests whose decisions are missing from the log.
    lost: Vec<String>,
    /// Records that are in the log more than once.
    doubled: u64,
    /// Requests that were decided more than once although they were not in flight during a kill.
    repeated: Vec<String>,
    /// Requests that were in flight during a kill and were decided more than once.
    repeated_after_kill: u64,
    /// Requests whose response differs from their record.
    different: u64,
}

/// What the usage log contains about one request.
struct Recorded {
    rows: u64,
    records: u64,
    /// Whether one of the decisions was to allow the request.
    is_allowed: bool,
}

impl Usage {
    async fn recount(postgres: &Postgres, attempts: &[Attempt], events: &Events) -> Result<Self> {
        let client = postgres.connect().await?;
        let deadline = tokio::time::Instant::now() + SHIPPED_WITHIN;
        loop {
            let usage = Self::read(&client, attempts, events).await?;
            if usage.lost.is_empty() || tokio::time::Instant::now() > deadline {
                return Ok(usage);
            }
            sleep(PAUSE).await;
        }
    }

    async fn read(
        client: &tokio_postgres::Client,
        attempts: &[Attempt],
        events: &Events,
    ) -> Result<Self> {
        let sql = "SELECT request_id, count(*), count(DISTINCT event_id), bool_or(NOT was_rejected) \
                   FROM usage_log GROUP BY request_id";
        let parameters: [&str; 0] = [];
        let stream = client.query_raw(sql, parameters).await?;
        pin_mut!(stream);
        let mut log = HashMap::new();
        let mut usage = Self::default();
        while let Some(row) = stream.try_next().await? {
            let recorded = Recorded {
                rows: u64::try_from(row.get::<_, i64>(1))?,
                records: u64::try_from(row.get::<_, i64>(2))?,
                is_allowed: row.get(3),
            };
            usage.rows += recorded.rows;
            usage.doubled += recorded.rows - recorded.records;
            log.insert(row.get::<_, String>(0), recorded);
        }
        for attempt in attempts {
            let id = attempt.request_id();
            let is_allowed = match attempt.outcome {
                Outcome::Allowed => true,
                Outcome::Denied => false,
                Outcome::Failed(_) => continue,
            };
            let Some(recorded) = log.get(&id) else {
                usage.lost.push(id);
                continue;
            };
            let was_in_flight = |kill: &RangeInclusive<u64>| {
                attempt.sent <= *kill.end() && *kill.start() <= attempt.answered
            };
            if recorded.records > 1 {
                if events.kills.iter().any(was_in_flight) {
                    usage.repeated_after_kill += 1;
                } else {
                    usage.repeated.push(id);
                }
            } else {
                usage.different += u64::from(recorded.is_allowed != is_allowed);
            }
        }
        Ok(usage)
    }
}

/// Prints the results. Returns whether all requirements are met.
fn report(
    options: &Options,
    attempts: &[Attempt],
    events: &Events,
    usage: &Usage,
    left: usize,
) -> bool {
    let failures: Vec<_> = attempts
        .iter()
        .filter_map(|it| match &it.outcome {
            Outcome::Failed(failure) => Some((it, failure)),
            _ => None,
        })
        .collect();
    let slowest = attempts.iter().map(|it| it.answered - it.sent).max();
    let degraded = attempts.iter().filter(|it| it.is_degraded).count();
    let limited: Vec<&Attempt> = attempts.iter().filter(|it| it.is_limited()).collect();
    let admitted: Vec<Span> = limited
        .iter()
        .filter(|it| it.outcome == Outcome::Allowed)
        .map(|it| it.span())
        .collect();
    let worst = Envelope::new(RPM, BURST, SLACK).worst(&admitted);
    let excess = worst.map_or(0.0, |it| it.excess.max(0.0));
    let requests = limited.iter().map(|it| (it.sent, 1)).collect();
    let exact = Envelope::new(RPM, BURST, Duration::ZERO).exact(requests);
    let served = 100 * admitted.len() as u64 / exact.max(1);

    println!(
        "{} replicas behind Caddy, {} requests/s, half of them POST",
        options.replicas, options.rate
    );
    println!();
    println!("| | |");
    println!("|---|---:|");
    println!("| replicas upgraded | {} |", events.upgrades);
    println!("| restarts with SIGTERM | {} |", events.restarts);
    println!("| kills with SIGKILL | {} |", events.kills.len());
    println!("| requests | {} |", attempts.len());
    println!("| **failed** | {} |", failures.len());
    println!(
        "| slowest response | {:.2} s |",
        seconds(slowest.unwrap_or(0))
    );
    println!(
        "| longest exit after SIGTERM | {:.2} s |",
        events.longest_exit.as_secs_f64()
    );
    println!("| rows in the usage log | {} |", usage.rows);
    println!("| **lost** | {} |", usage.lost.len());
    println!("| **recorded twice** | {} |", usage.doubled);
    println!(
        "| **decided twice without a kill** | {} |",
        usage.repeated.len()
    );
    println!(
        "| decided again because the replica was killed | {} |",
        usage.repeated_after_kill
    );
    println!("| **recorded differently** | {} |", usage.different);
    println!("| **directories with usage left after the stop** | {left} |");
    println!("| decided without Redis | {degraded} |");
    println!("| requests with the limited key | {} |", limited.len());
    println!("| allowed | {} |", admitted.len());
    println!("| **above the limit** | {excess:.1} |");
    println!("| **allowed, compared with one exact bucket** | {served}% |");
    print_failures(&failures, events);
    for id in usage.lost.iter().take(10) {
        println!("lost: {id}");
    }
    for id in usage.repeated.iter().take(10) {
        println!("decided twice: {id}");
    }
    failures.is_empty()
        && usage.lost.is_empty()
        && usage.doubled == 0
        && usage.repeated.is_empty()
        && usage.different == 0
        && left == 0
        && excess <= 0.0
        && served >= SERVED
}

/// Prints how many requests failed for each reason, with a few examples.
fn print_failures(failures: &[(&Attempt, &String)], events: &Events) {
    const EXAMPLES: usize = 3;
    let mut by_reason: BTreeMap<String, Vec<&(&Attempt, &String)>> = BTreeMap::new();
    for failed in failures {
        by_reason.entry(reason(failed.1)).or_default().push(failed);
    }
    for (reason, failed) in by_reason {
        println!("failed: {} × {reason}", failed.len());
        for (attempt, failure) in failed.iter().take(EXAMPLES) {
            let event = events.log.iter().rev().find(|it| it.0 <= attempt.sent);
            println!(
                "  {} at {:.1} s, after {:.2} s ({}): {failure}",
                attempt.request_id(),
                seconds(attempt.sent),
                seconds(attempt.answered - attempt.sent),
                event.map_or("before the first restart", |it| &it.1)
            );
        }
    }
}

/// Returns a failure without the parts that differ between requests.
fn reason(failure: &str) -> String {
    let (text, body) = failure
        .find('{')
        .map_or((failure, ""), |at| failure.split_at(at));
    let problem = serde_json::from_str::<serde_json::Value>(body).unwrap_or_default();
    let name = problem["title"].as_str().or(problem["code"].as_str());
    format!("{text}{}", name.unwrap_or_default())
}

#[expect(clippy::cast_precision_loss, reason = "less than 2^52 nanoseconds")]
fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}
