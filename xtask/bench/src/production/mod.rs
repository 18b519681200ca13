//! A production-like deployment on one machine, without containers: PostgreSQL, Redis, several replicas, and Caddy with
//! TLS in front of them, all on loopback.
//!
//! Replicas listen on the same port of different loopback addresses, so that Caddy finds them as it does in production:
//! as the addresses of one name.

mod caddy;
mod load;
mod memory;
mod names;
mod network;
pub(crate) mod restarts;
pub(crate) mod slow_clients;
pub(crate) mod up;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use futures_util::future::try_join_all;
use nix::sys::signal::Signal;
use quota_testkit::redis::{RedisServer, free_port};

use self::{caddy::Caddy, names::NameServer};
use crate::{
    postgres::{Postgres, random_password},
    replica::Replica,
};

/// How long replicas accept requests after SIGTERM, as in the production compose file.
const DRAIN_DELAY: &str = "2s";

struct Production {
    // Fields are dropped in this order.
    caddy: Caddy,
    _names: NameServer,
    replicas: Vec<Replica>,
    redis: RedisServer,
    postgres: Postgres,
}

/// The programs to start.
#[derive(Args)]
struct Programs {
    /// The `quota` binary
    quota: PathBuf,
    /// The directory of `initdb` and `postgres`
    #[arg(long = "programs", value_name = "PROGRAMS")]
    postgres: PathBuf,
    /// The directory to which Caddy is downloaded if no recent version is installed
    #[arg(long)]
    tools: PathBuf,
}

/// What to start.
struct Shape<'a> {
    quota: &'a Path,
    caddy: &'a Path,
    /// The directory for usage, logs, and Caddy's certificate authority.
    dir: &'a Path,
    replicas: u8,
    https: u16,
    with_demo: bool,
    /// Log directives.
    directives: &'a str,
    /// Additional environment variables of the replicas.
    settings: Vec<(&'static str, String)>,
}

impl Production {
    /// Starts everything, and waits until Quota responds through Caddy.
    async fn start(shape: &Shape<'_>, postgres: Postgres) -> Result<Self> {
        let data = shape.dir.join("data");
        fs::create_dir_all(&data)?;
        let data = fs::canonicalize(data)?;
        let password = random_password()?;
        let redis = RedisServer::start_with(&[
            "--maxmemory-policy",
            "noeviction",
            "--requirepass",
            &password,
        ])
        .await;
        let addresses: Vec<Ipv4Addr> = (0..shape.replicas)
            .map(|index| Ipv4Addr::new(127, 0, 0, 2 + index))
            .collect();
        let port = common_port(&addresses)?;
        let metrics_port = common_port(&addresses)?;
        let mut replicas = Vec::new();
        for (index, address) in addresses.iter().enumerate() {
            let mut settings = vec![
                ("QUOTA_METRICS_LISTEN", format!("{address}:{metrics_port}")),
                (
                    "QUOTA_PUBLIC_URL",
                    format!("https://localhost:{}", shape.https),
                ),
                ("QUOTA_DATA_DIR", data.display().to_string()),
                ("DATABASE_URL", postgres.url()),
                ("REDIS_URL", redis.url()),
                ("QUOTA_TRUSTED_PROXIES", "127.0.0.1/32".into()),
                ("QUOTA_REPLICAS", shape.replicas.to_string()),
                ("QUOTA_DRAIN_DELAY", DRAIN_DELAY.into()),
                ("RUST_LOG", shape.directives.into()),
            ];
            settings.extend(shape.settings.iter().cloned());
            let log = shape.dir.join(format!("quota-{}.log", index + 1));
            let addr = SocketAddr::from((*address, port));
            let mut replica = Replica::new(shape.quota, addr, log, settings);
            // The first replica applies the migrations and creates the demo.
            if index == 0 && shape.with_demo {
                replica = replica.with_demo();
            }
            replica.spawn()?;
            if index == 0 {
                replica.ready().await?;
            }
            replicas.push(replica);
        }
        for replica in &mut replicas {
            replica.ready().await?;
        }
        let names = NameServer::start(addresses).await?;
        let caddy = Caddy::start(&caddy::Settings {
            program: shape.caddy,
            dir: &shape.dir.join("caddy"),
            port: shape.https,
            upstream_port: port,
            names: names.addr,
        })
        .await?;
        Ok(Self {
            caddy,
            _names: names,
            replicas,
            redis,
            postgres,
        })
    }

    /// Stops everything cleanly.
    async fn stop(mut self) -> Result<()> {
        self.caddy.stop().await?;
        self.stop_replicas().await?;
        self.postgres.stop().await
    }

    async fn stop_replicas(&mut self) -> Result<()> {
        let ending = self.replicas.iter_mut().map(|it| it.end(Signal::SIGTERM));
        try_join_all(ending).await.map(drop)
    }
}

/// Returns a port that is free on all of these addresses.
fn common_port(addresses: &[Ipv4Addr]) -> Result<u16> {
    for _ in 0..20 {
        let port = free_port();
        if addresses.iter().all(|it| is_free(*it, port)) {
            return Ok(port);
        }
    }
    ensure!(
        is_free(Ipv4Addr::new(127, 0, 0, 2), 0),
        "this system has no loopback address 127.0.0.2"
    );
    None.context("no port is free on all loopback addresses")
}

fn is_free(address: Ipv4Addr, port: u16) -> bool {
    TcpListener::bind((address, port)).is_ok()
}
