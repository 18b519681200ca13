//! Kills servers, Redis, and PostgreSQL under load with `kill -9`. Then checks, by request ID, that no request that got
//! a decision is missing from the usage log, and that no request is recorded twice.
//!
//! Three replicas share one data directory, so that each can adopt usage directories that another replica has left
//! behind. A seed determines which process is killed, and when.

mod load;

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::Args;
use fastrand::Rng;
use futures_util::{TryStreamExt as _, pin_mut};
use nix::sys::signal::Signal;
use quota_testkit::redis::{RedisServer, free_port};
use tempfile::TempDir;
use tokio_postgres::Client;

use self::load::{Fate, Load};
use crate::{
    postgres::Postgres,
    replica::Replica,
    replicas::tenant::{Plan, Tenant},
};

const REPLICAS: usize = 3;
const SHIPPED_WITHIN: Duration = Duration::from_secs(120);

#[derive(Args)]
pub(crate) struct Options {
    /// The `quota` binary, a release build
    quota: PathBuf,
    /// The directory of `initdb` and `postgres`
    #[arg(long)]
    programs: PathBuf,
    /// The number of kills
    #[arg(default_value_t = 300)]
    kills: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Connections from the load to each replica
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// Time between a response and the next request on a connection, in milliseconds
    #[arg(long, default_value_t = 20)]
    pause: u64,
    /// Before each kill, wait until this many requests are in flight
    #[arg(long, default_value_t = 20)]
    in_flight: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Server(usize),
    Redis,
    Postgres,
}

fn replica(quota: &Path, data: &Path, database: &str, redis: &str) -> Replica {
    let addr = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let settings = vec![
        ("QUOTA_METRICS_LISTEN", "off".into()),
        ("QUOTA_DATA_DIR", data.display().to_string()),
        ("DATABASE_URL", database.into()),
        ("REDIS_URL", redis.into()),
        ("QUOTA_AUTH_RPM", "0".into()),
        ("QUOTA_ADMIN_RPM", "0".into()),
        // A short interval, so that kills interrupt batches.
        ("QUOTA_USAGE_SHIP_EVERY", "20ms".into()),
        ("RUST_LOG", "info,quota_server::access=off".into()),
    ];
    let log = data.join(format!("log-{}", addr.port()));
    Replica::new(quota, addr, log, settings)
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(storm(options))
}

#[derive(Default)]
struct Kills {
    by_victim: BTreeMap<&'static str, u32>,
    /// The number of servers that were killed before the usage log contained all of their decisions.
    before_commit: u32,
    in_flight: Vec<u64>,
}

async fn storm(options: &Options) -> Result<ExitCode> {
    let mut postgres = Postgres::start(&options.programs).await?;
    let mut redis = RedisServer::start().await;
    let data = TempDir::new()?;
    let mut replicas = Vec::new();
    for _ in 0..REPLICAS {
        let (database, redis) = (postgres.url(), redis.url());
        let mut replica = replica(&options.quota, data.path(), &database, &redis);
        replica.start().await?;
        replicas.push(replica);
    }
    let tenant = Tenant::register(replicas[0].addr).await?;
    let plan = Plan::new("storm", 60_000_000, 60_000_000);
    let key = tenant.key_on(replicas[0].addr, &plan).await?;
    let key = key.text.to_str()?;
    let loads = replicas
        .iter()
        .map(|replica| Load::new(replica.addr, key, options.connections))
        .collect::<Vec<_>>();
    let pause = Duration::from_millis(options.pause);
    let senders = loads
        .iter()
        .flat_map(|load| (0..options.connections).map(move |n| (load.clone(), n)))
        .map(|(load, connection)| tokio::spawn(load.run(connection, pause)))
        .collect::<Vec<_>>();

    let mut random = Rng::with_seed(options.seed);
    let mut kills = Kills::default();
    let began = Instant::now();
    for number in 0..options.kills {
        tokio::time::sleep(Duration::from_millis(random.u64(200..900))).await;
        // Servers are killed more often than Redis and PostgreSQL, because only servers have records that could be
        // lost.
        let victim = match random.u8(..10) {
            0 | 1 => Victim::Redis,
            2 | 3 => Victim::Postgres,
            _ => Victim::Server(random.usize(..REPLICAS)),
        };
        let in_flight = wait_for_flight(&loads, options.in_flight).await?;
        kills.in_flight.push(in_flight);
        let name = match victim {
            Victim::Server(index) => {
                replicas[index].end(Signal::SIGKILL).await?;
                let client = postgres.connect().await?;
                if is_before_commit(&client, &loads[index]).await? {
                    kills.before_commit += 1;
                }
                replicas[index].start().await?;
                "server"
            }
            Victim::Redis => {
                redis.kill().await;
                tokio::time::sleep(Duration::from_millis(random.u64(..300))).await;
                redis.restart().await;
                "redis"
            }
            Victim::Postgres => {
                postgres.kill().await?;
                tokio::time::sleep(Duration::from_millis(random.u64(..300))).await;
                postgres.restart().await?;
                "postgresql"
            }
        };
        *kills.by_victim.entry(name).or_default() += 1;
        eprintln!(
            "kill {} of {}: {name}, {in_flight} in flight",
            number + 1,
            options.kills
        );
    }
    let took = began.elapsed();
    tokio::time::sleep(Duration::from_millis(500)).await;
    for load in &loads {
        load.stop();
    }
    for sender in senders {
        sender.await??;
    }
    let client = postgres.connect().await?;
    wait_until_shipped(&client, &loads, data.path()).await?;
    for replica in &mut replicas {
        replica.end(Signal::SIGTERM).await?;
    }
    let left = fs::read_dir(data.path().join("usage"))?.count();
    let recount = recount(&client, &loads).await?;
    print(options, &kills, &recount, took, left);
    let is_kept = recount.lost.is_empty()
        && recount.doubled == 0
        && recount.unknown == 0
        && recount.rows_without_answer <= recount.unanswered
        && left == 0;
    Ok(if is_kept {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Waits until at least `wanted` requests are in flight. Fails after 20 seconds. Returns the number of requests in
/// flight.
async fn wait_for_flight(loads: &[Arc<Load>], wanted: u64) -> Result<u64> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let in_flight = loads.iter().map(|load| load.in_flight()).sum();
        if in_flight >= wanted {
            return Ok(in_flight);
        }
        ensure!(
            Instant::now() < deadline,
            "{in_flight} requests are in flight, but {wanted} are required"
        );
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
}

/// Returns whether the usage log lacks the last decision of at least one connection of a load.
async fn is_before_commit(client: &Client, load: &Load) -> Result<bool> {
    let last = load.connections.iter().enumerate();
    let ids = last
        .filter_map(|(connection, sent)| {
            let number = sent.lock().last_decided?;
            Some(load.request_id(connection, number))
        })
        .collect::<Vec<_>>();
    let found = client
        .query_one(
            "SELECT count(*) FROM usage_log \
             WHERE tenant_id = (SELECT id FROM tenants LIMIT 1) AND request_id = ANY($1)",
            &[&ids],
        )
        .await?
        .get::<_, i64>(0);
    Ok(usize::try_from(found)? < ids.len())
}

async fn wait_until_shipped(client: &Client, loads: &[Arc<Load>], data: &Path) -> Result<()> {
    let deadline = Instant::now() + SHIPPED_WITHIN;
    loop {
        let mut missing = 0;
        for load in loads {
            missing += usize::from(is_before_commit(client, load).await?);
        }
        // Each running replica keeps one usage directory.
        let directories = fs::read_dir(data.join("usage"))?.count();
        if missing == 0 && directories <= REPLICAS {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{directories} directories are left after {SHIPPED_WITHIN:?}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[derive(Debug, Default)]
struct Recount {
    sent: u64,
    decided: u64,
    refused: u64,
    unanswered: u64,
    rows: u64,
    lost: Vec<String>,
    doubled: u64,
    /// Rows that do not belong to any request of the load.
    unknown: u64,
    rows_without_answer: u64,
    /// Rows of requests whose response was 503.
    rows_of_refused: u64,
}

async fn recount(client: &Client, loads: &[Arc<Load>]) -> Result<Recount> {
    let mut rows = BTreeMap::new();
    for (load, entry) in loads.iter().enumerate() {
        for (connection, sent) in entry.connections.iter().enumerate() {
            let count = usize::try_from(sent.lock().count)?;
            rows.insert((entry.server.port(), connection), (load, vec![0_u8; count]));
        }
    }
    let mut result = Recount::default();
    let parameters: [&str; 0] = [];
    let stream = client
        .query_raw("SELECT request_id FROM usage_log", parameters)
        .await?;
    pin_mut!(stream);
    while let Some(row) = stream.try_next().await? {
        result.rows += 1;
        let id = row.get::<_, &str>(0);
        let mut parts = id.split('-');
        let mut part = || parts.next()?.parse::<usize>().ok();
        let seen = part()
            .and_then(|port| Some((u16::try_from(port).ok()?, part()?)))
            .and_then(|place| rows.get_mut(&place))
            .and_then(|(_, seen)| seen.get_mut(part()?));
        match seen {
            Some(seen) => *seen += 1,
            None => result.unknown += 1,
        }
    }
    for ((_, connection), (load, seen)) in &rows {
        let sent = loads[*load].connections[*connection].lock();
        for (number, rows) in seen.iter().enumerate() {
            let number = number as u64;
            result.sent += 1;
            result.doubled += u64::from(rows.saturating_sub(1));
            match sent.others.get(&number) {
                None | Some(Fate::Decided) => {
                    result.decided += 1;
                    if *rows == 0 {
                        result
                            .lost
                            .push(loads[*load].request_id(*connection, number));
                    }
                }
                Some(Fate::Refused) => {
                    result.refused += 1;
                    result.rows_of_refused += u64::from(*rows);
                }
                Some(Fate::Unanswered) => {
                    result.unanswered += 1;
                    result.rows_without_answer += u64::from(*rows > 0);
                }
            }
        }
    }
    Ok(result)
}

fn print(options: &Options, kills: &Kills, it: &Recount, took: Duration, left: usize) {
    #[expect(clippy::cast_precision_loss, reason = "fewer requests than 2^52")]
    let rate = it.decided as f64 / took.as_secs_f64();
    let least = kills.in_flight.iter().min().unwrap_or(&0);
    let sum = kills.in_flight.iter().sum::<u64>();
    println!(
        "seed {}, {:.0} s, {rate:.0} decisions/s",
        options.seed,
        took.as_secs_f64()
    );
    println!();
    println!("| | |");
    println!("|---|---:|");
    for (victim, count) in &kills.by_victim {
        println!("| kills of {victim} | {count} |");
    }
    println!(
        "| of servers, between append and COMMIT | {} |",
        kills.before_commit
    );
    println!("| in flight at a kill, at least | {least} |");
    println!("| in flight at all kills | {sum} |");
    println!("| requests sent | {} |", it.sent);
    println!("| decided (200 or 429) | {} |", it.decided);
    println!("| requests that got 503 | {} |", it.refused);
    println!("| requests without a response | {} |", it.unanswered);
    println!("| rows in the usage log | {} |", it.rows);
    println!("| **lost** | {} |", it.lost.len());
    println!("| **doubled** | {} |", it.doubled);
    println!(
        "| rows of requests without a response | {} |",
        it.rows_without_answer
    );
    println!("| rows of requests that got 503 | {} |", it.rows_of_refused);
    println!("| rows of unknown requests | {} |", it.unknown);
    println!("| directories left after a clean stop | {left} |");
    for id in it.lost.iter().take(10) {
        println!("lost: {id}");
    }
}
