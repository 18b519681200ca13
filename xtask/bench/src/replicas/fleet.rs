//! Several replicas of `quota` with one database and, optionally, one Redis. They listen on free loopback ports and are
//! killed when their [`Fleet`] is dropped.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use quota_testkit::Process;
use tempfile::TempDir;
use tokio_postgres::NoTls;

use crate::{
    process::{cpu, ready_line, serve},
    replica::tail,
};

const STARTED_WITHIN: Duration = Duration::from_secs(60);
/// How long a server may take to stop after SIGTERM.
const STOPPED_WITHIN: Duration = Duration::from_secs(30);

/// A new database on the given cluster.
pub(crate) struct Database {
    cluster: String,
    name: String,
    pub(crate) url: String,
}

impl Database {
    pub(crate) async fn create(cluster: &str) -> Result<Self> {
        let (base, _) = cluster
            .rsplit_once('/')
            .context("--postgres: the URL must end with a database")?;
        let name = format!(
            "quota_bench_{}_{:08x}",
            std::process::id(),
            fastrand::u32(..)
        );
        let database = Self {
            cluster: cluster.to_owned(),
            url: format!("{base}/{name}"),
            name,
        };
        database
            .execute(&format!("CREATE DATABASE {}", database.name))
            .await?;
        Ok(database)
    }

    pub(crate) async fn remove(self) -> Result<()> {
        self.execute(&format!("DROP DATABASE {} WITH (FORCE)", self.name))
            .await
    }

    async fn execute(&self, sql: &str) -> Result<()> {
        let (client, connection) = tokio_postgres::connect(&self.cluster, NoTls)
            .await
            .context("cannot connect to PostgreSQL")?;
        let connection = tokio::spawn(connection);
        let done = client.batch_execute(sql).await;
        drop(client);
        connection.await??;
        Ok(done?)
    }
}

/// How the replicas are started.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) binary: PathBuf,
    pub(crate) database_url: String,
    /// One URL per replica, or no URLs if the replicas run without Redis.
    pub(crate) redis_urls: Vec<String>,
    /// Additional environment variables.
    pub(crate) settings: Vec<(&'static str, String)>,
}

pub(crate) struct Fleet {
    setup: Setup,
    replicas: Vec<Replica>,
}

struct Replica {
    process: Process,
    addr: SocketAddr,
    metrics: SocketAddr,
    log: PathBuf,
    _data: TempDir,
}

impl Fleet {
    /// Starts the replicas and waits until all are ready.
    pub(crate) async fn start(setup: Setup, count: usize) -> Result<Self> {
        let mut fleet = Self {
            setup,
            replicas: Vec::new(),
        };
        fleet.start_all(count).await?;
        Ok(fleet)
    }

    async fn start_all(&mut self, count: usize) -> Result<()> {
        for index in 0..count {
            self.replicas.push(Replica::spawn(&self.setup, index)?);
            // The first replica applies the migrations.
            if index == 0 || index + 1 == count {
                for replica in &mut self.replicas {
                    replica.ready().await?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn addrs(&self) -> Vec<SocketAddr> {
        self.replicas.iter().map(|it| it.addr).collect()
    }

    pub(crate) fn metrics(&self) -> Vec<SocketAddr> {
        self.replicas.iter().map(|it| it.metrics).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.replicas.len()
    }

    /// Returns the user and system time of all replicas so far.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        self.replicas.iter().map(|it| cpu(it.process.pid())).sum()
    }

    /// Stops all replicas with SIGTERM and waits for them.
    pub(crate) async fn stop(&mut self) -> Result<()> {
        self.stop_within(STOPPED_WITHIN).await
    }

    /// Stops all replicas with SIGTERM. Fails if a replica does not exit in time, or exits with an error.
    pub(crate) async fn stop_within(&mut self, time: Duration) -> Result<()> {
        for replica in &mut self.replicas {
            replica.process.signal(Signal::SIGTERM)?;
        }
        for mut replica in self.replicas.drain(..) {
            let status = replica.process.ends_within(time).await?;
            let status = status.context("a replica did not stop in time")?;
            ensure!(
                status.success(),
                "a replica exited with {status}:\n{}",
                tail(&fs::read_to_string(&replica.log).unwrap_or_default())
            );
        }
        Ok(())
    }

    /// Restarts all replicas.
    pub(crate) async fn restart(&mut self) -> Result<()> {
        let count = self.replicas.len();
        self.stop().await?;
        self.start_all(count).await
    }
}

impl Replica {
    fn spawn(setup: &Setup, index: usize) -> Result<Self> {
        let (mut command, data) = serve(&setup.binary)?;
        let log = data.path().join("log");
        command
            .env("DATABASE_URL", &setup.database_url)
            .env("QUOTA_DATABASE_POOL", "16")
            .env("QUOTA_ADMIN_RPM", "0")
            .env("QUOTA_AUTH_RPM", "0")
            .env("RUST_LOG", "info,quota_server::access=off");
        if let Some(url) = setup.redis_urls.get(index) {
            command.env("REDIS_URL", url);
        }
        for (name, value) in &setup.settings {
            command.env(name, value);
        }
        let process = Process::start(&command, &log)
            .with_context(|| format!("cannot run {}", setup.binary.display()))?;
        // The addresses are known only once the replica is ready.
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        Ok(Self {
            process,
            addr: nowhere,
            metrics: nowhere,
            log,
            _data: data,
        })
    }

    async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + STARTED_WITHIN;
        loop {
            // The log file does not exist until shortly after the server starts.
            let text = fs::read_to_string(&self.log).unwrap_or_default();
            if let Some(line) = ready_line(&text) {
                let address = |name: &str| {
                    let text = line[name]
                        .as_str()
                        .context("there is no address in the log")?;
                    anyhow::Ok(text.parse()?)
                };
                (self.addr, self.metrics) = (address("listen")?, address("metrics_listen")?);
                return Ok(());
            }
            if let Some(status) = self.process.ended()? {
                bail!("quota exited with {status} instead of starting:\n{text}");
            }
            ensure!(
                Instant::now() < deadline,
                "quota was not ready within {STARTED_WITHIN:?}:\n{text}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
