//! Runs thousands of slow clients with slowhttptest while other clients send requests: directly to a server, and
//! through Caddy to replicas. As a control, the slow clients connect to one server and the other clients to another.
//! The other clients must not wait much longer than without slow clients, and memory must stay bounded.

mod clients;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use quota_testkit::{Process, caddy, redis::free_port};
use reqwest::Certificate;
use tokio::time::sleep;

use clients::{Clients, EVERY, NEW_ONE_IN, Times};

use super::{
    Production, Shape,
    memory::{Memory, Processes},
    network,
};
use crate::{
    postgres::Postgres,
    process::Server,
    replica::Replica,
    replicas::{
        stage::quantile,
        tenant::{Plan, Tenant},
    },
};

const MOST: u32 = 60_000_000;
/// The maximum ratio of the 99th percentile of response times with slow clients to that without them.
const MOST_RATIO: f64 = 2.0;
/// The maximum number of bytes by which a replica's memory may grow.
const MOST_MEMORY: u64 = 64 << 20;

#[derive(Args)]
pub(crate) struct Options {
    /// The `quota` binary, a release build
    quota: PathBuf,
    /// The directory of `initdb` and `postgres`
    #[arg(long)]
    programs: PathBuf,
    /// The directory to which Caddy is downloaded if no recent version is installed
    #[arg(long)]
    tools: PathBuf,
    /// The number of slow connections
    #[arg(default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    connections: u32,
    /// The number of slow connections to open per second
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// The number of rounds per attack. Each round has a part without slow clients and an equally long part with them
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    rounds: u32,
    /// The length of each part of a round, in seconds
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u64).range(5..=120))]
    seconds: u64,
    /// Which of the three attacks to measure
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "headers,body,read"
    )]
    attacks: Vec<Attack>,
    #[arg(long, hide = true)]
    in_own_network: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Attack {
    Headers,
    Body,
    Read,
}

impl Attack {
    fn name(self) -> &'static str {
        match self {
            Self::Headers => "headers",
            Self::Body => "body",
            Self::Read => "read",
        }
    }

    /// Returns the arguments for slowhttptest.
    fn arguments(self, base: &str) -> Vec<String> {
        let (path, arguments): (_, &[&str]) = match self {
            Self::Headers => ("/v1/echo", &["-H", "-i", "1", "-x", "24", "-t", "GET"]),
            Self::Body => (
                "/auth/login",
                &[
                    "-B",
                    "-i",
                    "1",
                    "-s",
                    "8192",
                    "-x",
                    "32",
                    "-t",
                    "POST",
                    "-f",
                    "application/json",
                ],
            ),
            // The largest response that requires no credentials, three times per connection.
            Self::Read => (
                "/openapi.json",
                &[
                    "-X", "-n", "5", "-z", "32", "-w", "512", "-y", "1024", "-k", "3",
                ],
            ),
        };
        let mut arguments: Vec<String> = arguments.iter().map(|it| (*it).to_owned()).collect();
        arguments.extend(["-u".to_owned(), format!("{base}{path}")]);
        arguments
    }
}

/// The servers to which the slow clients and the other clients connect.
struct Target {
    name: &'static str,
    base: String,
    /// The URL for slowhttptest, which tries only the first address of a name.
    attacked: String,
    certificate: Option<Certificate>,
    key: String,
    /// The processes whose memory must not grow much.
    processes: Processes,
    /// Whether this is a control: the slow clients connect to another server, so a ratio above 1 shows only that the
    /// slow clients and the measured server share processors.
    is_control: bool,
}

/// The result of one attack on one target.
struct Outcome {
    target: &'static str,
    is_control: bool,
    attack: Attack,
    without: Times,
    with: Times,
    /// The maximum number of concurrent slow connections, according to slowhttptest.
    connected: u32,
    replica_growth: u64,
    caddy_growth: u64,
}

const DIRECTIVES: &str = "info,quota_server::access=off,quota_server::denials=off";

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if !options.in_own_network {
        // If Caddy has to be downloaded, do so now: the other network namespace has no access to the Internet.
        caddy::recent(&options.tools)?;
        return network::run_again();
    }
    // Unlike the replicas behind Caddy, these servers trust no proxy.
    let alone = Server::quota(&options.quota, DIRECTIVES, None, &[])?;
    let elsewhere = Server::quota(&options.quota, DIRECTIVES, None, &[])?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    // Dropping the future stops everything that was started, even on Ctrl-C.
    runtime.block_on(async {
        tokio::select! {
            done = slow_clients(options, &alone, &elsewhere) => done,
            _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(130)),
        }
    })
}

async fn slow_clients(options: &Options, alone: &Server, elsewhere: &Server) -> Result<ExitCode> {
    let caddy = caddy::recent(&options.tools)?;
    let dir = tempfile::Builder::new()
        .prefix("quota-slow-")
        .tempdir_in("/tmp")?;
    let postgres = Postgres::start(&options.programs).await?;
    let shape = Shape {
        quota: &options.quota,
        caddy: &caddy,
        dir: dir.path(),
        replicas: 2,
        https: free_port(),
        with_demo: false,
        directives: DIRECTIVES,
        settings: Vec::new(),
    };
    let production = Production::start(&shape, postgres).await?;
    let pids = production.replicas.iter().filter_map(Replica::pid);
    let base = format!("http://{}", alone.addr);
    let direct = Target {
        name: "directly",
        attacked: base.clone(),
        base,
        certificate: None,
        key: key(alone.addr).await?,
        processes: Processes {
            replicas: vec![alone.pid()?],
            caddy: None,
        },
        is_control: false,
    };
    let control = Target {
        name: "another server",
        attacked: format!("http://{}", elsewhere.addr),
        base: direct.base.clone(),
        certificate: None,
        key: direct.key.clone(),
        processes: Processes {
            replicas: vec![alone.pid()?],
            caddy: None,
        },
        is_control: true,
    };
    let certificate = fs::read(production.caddy.certificate())?;
    let through_caddy = Target {
        name: "through Caddy",
        attacked: format!("https://127.0.0.1:{}", production.caddy.port),
        base: production.caddy.base(),
        certificate: Some(Certificate::from_pem(&certificate)?),
        key: key(production.replicas[0].addr).await?,
        processes: Processes {
            replicas: pids.collect(),
            caddy: production.caddy.pid(),
        },
        is_control: false,
    };

    let mut outcomes = Vec::new();
    for target in [&control, &direct, &through_caddy] {
        for attack in &options.attacks {
            outcomes.push(measure(options, target, *attack, dir.path()).await?);
        }
    }
    production.stop().await?;
    let is_good = report(options, &outcomes);
    Ok(if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Creates a key whose limits are never reached.
async fn key(server: SocketAddr) -> Result<String> {
    let tenant = Tenant::register(server).await?;
    let plan = Plan::new("ample", MOST, MOST);
    let key = tenant.key_on(server, &plan).await?;
    Ok(key.text.to_str()?.to_owned())
}

async fn measure(
    options: &Options,
    target: &Target,
    attack: Attack,
    dir: &Path,
) -> Result<Outcome> {
    let time = Duration::from_secs(options.seconds);
    let mut outcome = Outcome {
        target: target.name,
        is_control: target.is_control,
        attack,
        without: Times::default(),
        with: Times::default(),
        connected: 0,
        replica_growth: 0,
        caddy_growth: 0,
    };
    let clients = Clients::new(&target.base, target.certificate.as_ref(), &target.key)?;
    // Open the persistent connections.
    clients.send_for(Duration::from_secs(2)).await?;
    for round in 0..options.rounds {
        outcome.without.extend(clients.send_for(time).await?);
        let before = Memory::of(&target.processes)?;
        let stop = Arc::new(AtomicBool::new(false));
        let attacking = tokio::spawn(attack_until(
            attack.arguments(&target.attacked),
            options.connections,
            options.rate,
            dir.join(format!("slow-{}-{round}", attack.name())),
            Arc::clone(&stop),
        ));
        // Wait until half of the slow connections should be open, but for at most 5 seconds.
        sleep(Duration::from_secs(
            u64::from(options.connections / options.rate / 2).min(5),
        ))
        .await;
        let watched = Memory::watch(&target.processes, time);
        let (times, most) = tokio::join!(clients.send_for(time), watched);
        outcome.with.extend(times?);
        stop.store(true, Ordering::Relaxed);
        outcome.connected = outcome.connected.max(attacking.await??);
        let most = most?;
        outcome.replica_growth = outcome.replica_growth.max(most.growth(&before));
        outcome.caddy_growth = outcome
            .caddy_growth
            .max(most.caddy.saturating_sub(before.caddy));
        // Wait until the deadlines of the last connections have passed.
        sleep(Duration::from_secs(2)).await;
    }
    eprintln!("{}, slow {}: done", target.name, attack.name());
    Ok(outcome)
}

/// Runs slowhttptest repeatedly until `stop` is set. Returns the maximum number of concurrent connections.
async fn attack_until(
    arguments: Vec<String>,
    connections: u32,
    rate: u32,
    prefix: PathBuf,
    stop: Arc<AtomicBool>,
) -> Result<u32> {
    let mut most = 0;
    for run in 0.. {
        let prefix = prefix.with_extension(run.to_string());
        // Raise the limit on file descriptors, because each connection needs one, and the default is often 1024. Run
        // slowhttptest at a low priority, because it keeps a processor busy. In a real attack, the clients use the
        // processors of other machines.
        let mut command = Command::new("/bin/sh");
        command
            .args([
                "-c",
                "ulimit -n \"$(ulimit -H -n)\"; exec nice -n 19 slowhttptest \"$@\"",
                "sh",
            ])
            .args(&arguments)
            .args(["-c", &connections.to_string(), "-r", &rate.to_string()])
            .args(["-l", "600", "-p", "3", "-v", "1", "-g", "-o"])
            .arg(&prefix);
        let mut process = Process::start(&command, Path::new("/dev/null"))?;
        while process.ended()?.is_none() && !stop.load(Ordering::Relaxed) {
            sleep(Duration::from_millis(50)).await;
        }
        if process.ended()?.is_none() {
            // On SIGINT, slowhttptest writes its statistics.
            process.signal(nix::sys::signal::Signal::SIGINT)?;
            process.ends_within(Duration::from_secs(10)).await?;
        }
        most = most.max(connected(&prefix)?);
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    Ok(most)
}

/// Returns the maximum number of concurrent connections in slowhttptest's statistics.
fn connected(prefix: &Path) -> Result<u32> {
    let mut file = prefix.as_os_str().to_owned();
    file.push(".csv");
    let text = fs::read_to_string(&file).context("slowhttptest wrote no statistics")?;
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header.split(',').position(|it| it.trim() == "Connected");
    let column = column.with_context(|| format!("no connections in {header:?}"))?;
    let cells = lines.filter_map(|line| line.split(',').nth(column)?.trim().parse().ok());
    Ok(cells.max().unwrap_or(0))
}

/// Returns the time, in milliseconds, that 99% of requests did not exceed.
fn p99(times: &[Duration]) -> f64 {
    quantile(times.to_vec(), 0.99).as_secs_f64() * 1e3
}

/// Prints the table. Returns whether all requirements are met.
fn report(options: &Options, outcomes: &[Outcome]) -> bool {
    println!(
        "| {} slow clients | most connections | p99 without, ms | with | ratio | p99 of new connections without, ms | \
         with | ratio | failed | Quota's memory, MiB | Caddy's |",
        options.connections
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    let mut is_good = true;
    for it in outcomes {
        let (kept_without, kept_with) = (p99(&it.without.kept), p99(&it.with.kept));
        let (new_without, new_with) = (p99(&it.without.new), p99(&it.with.new));
        let (kept, new) = (kept_with / kept_without, new_with / new_without);
        println!(
            "| {}, {} | {} | {kept_without:.1} | {kept_with:.1} | {kept:.2} | {new_without:.1} | {new_with:.1} | \
             {new:.2} | {} | +{} | +{} |",
            it.target,
            it.attack.name(),
            it.connected,
            it.with.failed,
            it.replica_growth >> 20,
            it.caddy_growth >> 20,
        );
        is_good &= (it.is_control || kept < MOST_RATIO && new < MOST_RATIO)
            && it.without.failed + it.with.failed == 0
            && it.replica_growth <= MOST_MEMORY;
    }
    println!();
    println!(
        "{} rounds of {} s without and {} s with slow clients, which open {} connections per second and start again when \
         all are closed. The others send {} requests/s, one in {NEW_ONE_IN} on a new connection. Targets: ratios below \
         {MOST_RATIO}, no failures, at most {} MiB more memory in each replica.",
        options.rounds,
        options.seconds,
        options.seconds,
        options.rate,
        1000 / EVERY.as_millis(),
        MOST_MEMORY >> 20,
    );
    is_good
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_connections_are_read_from_the_statistics() {
        let dir = tempfile::tempdir().unwrap();
        let csv = "Seconds,Closed,Pending,Connected,Service Available\n0,0,1,0,1000\n1,0,5,395,1000\n2,300,0,100,0\n";
        fs::write(dir.path().join("slow.0.csv"), csv).unwrap();
        assert_eq!(connected(&dir.path().join("slow.0")).unwrap(), 395);
    }
}
