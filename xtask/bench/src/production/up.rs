//! `cargo xtask up`: a production-like deployment for trying out Quota. Until Ctrl-C, replicas and Caddy are restarted
//! if they exit.

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use quota_testkit::{caddy, redis::free_port};
use serde::Deserialize;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::sleep,
};

use super::{Production, Programs, Shape, is_free};
use crate::postgres::Postgres;

/// The default port for HTTPS. If this port is not free, another one is used.
const HTTPS: u16 = 8443;
/// The shortest time between two starts of the same replica.
const BETWEEN_STARTS: Duration = Duration::from_secs(1);

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// The number of replicas
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=25))]
    replicas: u8,
    /// The port for HTTPS. The default is 8443, or another port if 8443 is not free
    #[arg(long)]
    port: Option<u16>,
    /// The directory for all data and logs
    #[arg(long, default_value = ".quota/up")]
    data: PathBuf,
}

/// The fields of `demo.json` that are printed.
#[derive(Deserialize)]
struct Demo {
    email: String,
    password: String,
    key: String,
    service_token: String,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        fs::create_dir_all(&options.data)
            .with_context(|| format!("cannot create {}", options.data.display()))?;
        let lock = File::create(options.data.join("lock"))?;
        lock.try_lock()
            .with_context(|| format!("{} is in use", options.data.display()))?;
        let mut signals = stop_signals()?;
        let mut production = tokio::select! {
            started = start(options) => started?,
            _ = signals.changed() => return Ok(ExitCode::from(130)),
        };
        let supervised = supervise(&mut production, &mut signals).await;
        eprintln!("stopping, which takes a few seconds; press Ctrl-C again to stop immediately");
        tokio::select! {
            stopped = production.stop() => stopped?,
            _ = signals.changed() => return Ok(ExitCode::from(130)),
        }
        supervised.map(|()| ExitCode::SUCCESS)
    })
}

/// Returns a receiver for the number of signals that have asked this process to stop so far.
fn stop_signals() -> Result<watch::Receiver<u32>> {
    let (count, counted) = watch::channel(0);
    let mut signals = [
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
        signal(SignalKind::hangup())?,
    ];
    tokio::spawn(async move {
        let [interrupt, terminate, hangup] = &mut signals;
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            count.send_modify(|it| *it += 1);
        }
    });
    Ok(counted)
}

async fn start(options: &Options) -> Result<Production> {
    let dir = fs::canonicalize(&options.data)?;
    let https = match options.port {
        Some(port) => {
            ensure!(
                is_free(Ipv4Addr::LOCALHOST, port),
                "port {port} is not free"
            );
            port
        }
        None if is_free(Ipv4Addr::LOCALHOST, HTTPS) => HTTPS,
        None => free_port(),
    };
    let caddy = caddy::recent(&options.programs.tools)?;
    let postgres = Postgres::kept(&options.programs.postgres, &dir.join("postgres")).await?;
    let shape = Shape {
        quota: &options.programs.quota,
        caddy: &caddy,
        dir: &dir,
        replicas: options.replicas,
        https,
        with_demo: true,
        directives: "info",
        // With the default timeout, an unoptimized build on a busy machine would often mistake a slow response for an
        // outage of Redis.
        settings: vec![("QUOTA_REDIS_TIMEOUT", "250ms".into())],
    };
    let production = Production::start(&shape, postgres).await?;
    let demo = fs::read(dir.join("data/demo.json")).context("there is no demo")?;
    let demo: Demo = serde_json::from_slice(&demo)?;
    let base = production.caddy.base();
    let certificate = production.caddy.certificate();
    let certificate = certificate.display();
    println!();
    println!(
        "Quota is running: {} replicas behind Caddy.",
        options.replicas
    );
    println!();
    println!("  Console        {base}/console");
    println!("  Sign in        {} {}", demo.email, demo.password);
    println!("  API            {base}/docs");
    println!("  API key        {}", demo.key);
    println!("  Service token  {}", demo.service_token);
    println!("  CA certificate {certificate}");
    println!("  Data and logs  {}", dir.display());
    println!();
    println!("Send more than ten requests in a row:");
    println!();
    println!(
        "  curl --cacert {certificate} -i {base}/v1/echo -H 'X-API-Key: {}'",
        demo.key
    );
    println!();
    for replica in &production.replicas {
        println!(
            "To see a replica restart: kill -9 {} ({})",
            replica.pid().context("the replica does not run")?,
            replica.addr
        );
    }
    println!("To stop: Ctrl-C. The data is kept; delete the directory to start over.");
    Ok(production)
}

/// Restarts replicas and Caddy when they exit. Returns after the first signal, or with an error if PostgreSQL or Redis
/// has exited.
async fn supervise(production: &mut Production, signals: &mut watch::Receiver<u32>) -> Result<()> {
    let mut started = vec![Instant::now(); production.replicas.len()];
    loop {
        tokio::select! {
            _ = signals.changed() => return Ok(()),
            () = sleep(Duration::from_millis(100)) => {}
        }
        for (replica, started) in production.replicas.iter_mut().zip(&mut started) {
            if let Some(status) = replica.ended()?
                && started.elapsed() > BETWEEN_STARTS
            {
                eprintln!(
                    "the replica on {} exited with {status} and is being restarted",
                    replica.addr
                );
                replica.spawn()?;
                *started = Instant::now();
            }
        }
        if !production.caddy.is_running()? {
            eprintln!("Caddy exited and is being restarted");
            sleep(BETWEEN_STARTS).await;
            production.caddy.spawn()?;
        }
        if !production.postgres.is_running()? {
            bail!("PostgreSQL exited; its log is in the data directory");
        }
        if !production.redis.is_running() {
            bail!("Redis ended");
        }
    }
}
