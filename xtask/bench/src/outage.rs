//! Stops PostgreSQL under load. Every request must be allowed and recorded exactly once, and the backlog must be
//! shipped within [`AIM`] afterward.
//!
//! There is one server, with its own PostgreSQL. The load consists of requests with many keys to many endpoints, both
//! Zipf-distributed, at a fixed rate: before the outage, while PostgreSQL is stopped, and until the backlog is shipped.
//! Then the rows of the usage log are compared with the client's own count.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use clap::Args;
use fastrand::Rng;
use quota_testkit::{redis::free_port, zipf::Zipf};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

use crate::{
    http1,
    postgres::Postgres,
    process::Server,
    replicas::tenant::{Plan, Tenant, counted},
};

const CONNECTIONS: u32 = 64;
const KEYS: u32 = 1_000;
const ENDPOINTS: u32 = 200;
/// The duration of the load before the outage.
const BEFORE: Duration = Duration::from_secs(20);
/// The maximum time for shipping the backlog.
const AIM: Duration = Duration::from_secs(60);
/// How long the benchmark waits for the backlog before it gives up.
const PATIENCE: Duration = Duration::from_secs(240);
const PHASES: [&str; 3] = ["before", "outage", "after"];

#[derive(Args)]
pub(crate) struct Options {
    /// The `quota` binary, a release build
    quota: PathBuf,
    /// The directory of `initdb` and `postgres`
    #[arg(long)]
    programs: PathBuf,
    /// Requests per second
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(64..))]
    rate: u32,
    /// The length of the outage in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// The state that all connections share.
struct Load {
    server: SocketAddr,
    token: String,
    keys: Vec<String>,
    by_key: Zipf,
    by_endpoint: Zipf,
    /// An index in [`PHASES`].
    phase: AtomicUsize,
    stop: AtomicBool,
}

/// The client's own record.
#[derive(Default)]
struct Account {
    /// Microseconds from sending a request to its response, by phase.
    micros: [Vec<u32>; PHASES.len()],
    allowed: u64,
    /// Requests with any other outcome.
    others: u64,
}

impl Load {
    /// Sends requests one after another, at intervals of `every`, starting at `first`. A late request is sent
    /// immediately.
    async fn run(self: Arc<Self>, seed: u64, first: Instant, every: Duration) -> Result<Account> {
        let mut random = Rng::with_seed(seed);
        let mut stream = TcpStream::connect(self.server).await?;
        stream.set_nodelay(true)?;
        let mut account = Account::default();
        let (mut due, mut bytes) = (first, vec![0; 16 << 10]);
        while !self.stop.load(Ordering::Relaxed) {
            tokio::time::sleep_until(due.into()).await;
            due += every;
            let request = format!(
                "GET /v1/forward-auth HTTP/1.1\r\nHost: quota\r\nX-Service-Token: {}\r\nX-API-Key: {}\r\n\
                 X-Forwarded-Method: GET\r\nX-Forwarded-Uri: /v1/resource/{}\r\n\r\n",
                self.token,
                self.keys[self.by_key.draw(random.f64())],
                self.by_endpoint.draw(random.f64())
            );
            let phase = self.phase.load(Ordering::Relaxed);
            let sent = Instant::now();
            stream.write_all(request.as_bytes()).await?;
            let mut read = 0;
            let status = loop {
                let n = stream.read(&mut bytes[read..]).await?;
                ensure!(n > 0, "the server closed a connection");
                read += n;
                if let Some((status, _)) = http1::answer(&bytes[..read])? {
                    break status;
                }
            };
            let micros = u32::try_from(sent.elapsed().as_micros()).unwrap_or(u32::MAX);
            account.micros[phase].push(micros);
            match status {
                200 => account.allowed += 1,
                _ => account.others += 1,
            }
        }
        Ok(account)
    }
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(outage(options))
}

async fn outage(options: &Options) -> Result<ExitCode> {
    let mut postgres = Postgres::start(&options.programs).await?;
    let metrics = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let settings = [
        ("DATABASE_URL", postgres.url()),
        ("QUOTA_METRICS_LISTEN", metrics.to_string()),
        ("QUOTA_ADMIN_RPM", "0".into()),
        ("QUOTA_AUTH_RPM", "0".into()),
        // The grace period must be longer than the outage; otherwise, decisions would stop.
        ("QUOTA_STALE_GRACE", "5m".into()),
    ];
    let directives = "info,quota_server::access=off";
    let server = Server::quota(&options.quota, directives, None, &settings)?;
    let tenant = Tenant::register(server.addr).await?;
    let token = tenant.service_token(server.addr).await?;
    let plan = Plan::new("outage", 60_000_000, 60_000_000);
    let plan = tenant.plan(server.addr, &plan).await?;
    let mut keys = Vec::new();
    for _ in 0..KEYS {
        let key = tenant.key(server.addr, &plan).await?;
        keys.push(key.text.to_str()?.to_owned());
    }
    let load = Arc::new(Load {
        server: server.addr,
        token: token.to_str()?.to_owned(),
        keys,
        by_key: Zipf::new(KEYS),
        by_endpoint: Zipf::new(ENDPOINTS),
        phase: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
    });
    let step = Duration::from_secs(1) / options.rate;
    let began = Instant::now() + Duration::from_millis(100);
    let mut connections = JoinSet::new();
    for n in 0..CONNECTIONS {
        let run = load.clone();
        connections.spawn(run.run(n.into(), began + step * n, step * CONNECTIONS));
    }
    tokio::time::sleep(BEFORE).await;
    postgres.kill().await?;
    load.phase.store(1, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(options.seconds)).await;
    let backlog = counted(metrics, "quota_usage_backlog_records").await?;
    let before = counted(metrics, "quota_usage_records_shipped_total").await?;
    load.phase.store(2, Ordering::Relaxed);
    postgres.restart().await?;
    let back = Instant::now();
    // Wait until the backlog is at most one second's usage.
    while counted(metrics, "quota_usage_backlog_records").await? > u64::from(options.rate) {
        if back.elapsed() > PATIENCE {
            bail!("the backlog was not shipped within {PATIENCE:?}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let took = back.elapsed();
    let shipped = counted(metrics, "quota_usage_records_shipped_total").await? - before;
    load.stop.store(true, Ordering::Relaxed);
    let mut account = Account::default();
    while let Some(connection) = connections.join_next().await {
        let connection = connection??;
        for (all, part) in account.micros.iter_mut().zip(connection.micros) {
            all.extend(part);
        }
        account.allowed += connection.allowed;
        account.others += connection.others;
    }
    let rows = rows(&postgres, account.allowed).await?;
    print(options, &mut account, backlog, (shipped, took));
    println!("| rows in the usage log | {} |", rows.0);
    println!("| **lost** | {} |", account.allowed.saturating_sub(rows.1));
    println!("| **doubled** | {} |", rows.0 - rows.1);
    println!();
    println!(
        "Load of the machine: {}",
        fs::read_to_string("/proc/loadavg")?.trim()
    );
    let is_kept = rows == (account.allowed, account.allowed) && account.others == 0 && took <= AIM;
    Ok(if is_kept {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Waits until the usage log has at least `wanted` rows, or until [`PATIENCE`] has passed. Returns the number of rows,
/// and the number of different requests in them.
async fn rows(postgres: &Postgres, wanted: u64) -> Result<(u64, u64)> {
    let client = postgres.connect().await?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let sql = "SELECT count(*), count(DISTINCT request_id) FROM usage_log";
        let row = client.query_one(sql, &[]).await?;
        let rows = (
            u64::try_from(row.get::<_, i64>(0))?,
            u64::try_from(row.get::<_, i64>(1))?,
        );
        if rows.0 >= wanted || Instant::now() > deadline {
            return Ok(rows);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn print(options: &Options, account: &mut Account, backlog: u64, (shipped, took): (u64, Duration)) {
    println!(
        "{} requests/s of {KEYS} keys to {ENDPOINTS} endpoints by Zipf; PostgreSQL stopped for {} s",
        options.rate, options.seconds
    );
    println!();
    println!("| decisions | number | p50 µs | p99 µs | p99, before = 1 |");
    println!("|---|---:|---:|---:|---:|");
    let mut first = None;
    for (phase, micros) in PHASES.iter().zip(&mut account.micros) {
        micros.sort_unstable();
        let part = |percent: usize| {
            let at = (micros.len() * percent / 100).min(micros.len().saturating_sub(1));
            micros.get(at).copied().unwrap_or(0)
        };
        let p99 = f64::from(part(99));
        let ratio = p99 / *first.get_or_insert(p99);
        println!(
            "| {phase} | {} | {} | {p99:.0} | {ratio:.2} |",
            micros.len(),
            part(50)
        );
    }
    #[expect(clippy::cast_precision_loss, reason = "fewer records than 2^52")]
    let per_second = shipped as f64 / took.as_secs_f64();
    println!();
    println!("| | |");
    println!("|---|---:|");
    println!("| backlog at the end of the outage | {backlog} |");
    println!("| shipped after | {:.1} s |", took.as_secs_f64());
    println!("| records shipped per second in that time | {per_second:.0} |");
    println!("| allowed | {} |", account.allowed);
    println!("| other responses | {} |", account.others);
}
