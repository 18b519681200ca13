//! A private PostgreSQL that can be killed and restarted.

use std::{
    fs::{self, DirBuilder},
    os::unix::fs::{DirBuilderExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::Signal,
    unistd::{Uid, User},
};
use quota_testkit::{Process, redis::free_port};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

const STARTED_WITHIN: Duration = Duration::from_secs(60);

pub(crate) struct Postgres {
    programs: PathBuf,
    cluster: PathBuf,
    log: PathBuf,
    port: u16,
    running: Option<Process>,
    _dir: TempDir,
}

impl Postgres {
    pub(crate) async fn start(programs: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("quota-crash-")
            .permissions(<fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o711))
            .tempdir_in("/tmp")?;
        let cluster = dir.path().join("cluster");
        DirBuilder::new().mode(0o700).create(&cluster)?;
        if Uid::effective().is_root() {
            let user = unprivileged()?;
            chown(&cluster, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        }
        let mut postgres = Self {
            programs: programs.to_owned(),
            log: dir.path().join("log"),
            cluster,
            port: free_port(),
            running: None,
            _dir: dir,
        };
        let mut initdb = postgres.program("initdb")?;
        initdb
            .arg("-D")
            .arg(&postgres.cluster)
            .args(["--username=quota", "--auth=trust", "--encoding=UTF8"])
            .args(["--no-locale", "--no-sync"])
            .current_dir(&postgres.cluster);
        let made = initdb.output().context("cannot run initdb")?;
        ensure!(
            made.status.success(),
            "initdb: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        postgres.restart().await?;
        Ok(postgres)
    }

    /// Returns a command for one of PostgreSQL's programs, which refuse to run as root.
    fn program(&self, name: &str) -> Result<Command> {
        let program = self.programs.join(name);
        if !Uid::effective().is_root() {
            return Ok(Command::new(program));
        }
        let user = unprivileged()?;
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={}", user.uid))
            .arg(format!("--regid={}", user.gid))
            .arg("--clear-groups")
            .arg(program);
        Ok(command)
    }

    pub(crate) fn url(&self) -> String {
        format!("postgres://quota@127.0.0.1:{}/postgres", self.port)
    }

    pub(crate) async fn connect(&self) -> Result<Client> {
        let (client, connection) = tokio_postgres::connect(&self.url(), NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Kills the postmaster with `kill -9`. The kernel keeps the data it has written, since `fsync` matters only if the
    /// machine fails.
    pub(crate) async fn kill(&mut self) -> Result<()> {
        if let Some(mut process) = self.running.take() {
            process.signal(Signal::SIGKILL)?;
            process.ends_within(Duration::from_secs(10)).await?;
        }
        Ok(())
    }

    pub(crate) async fn restart(&mut self) -> Result<()> {
        let deadline = Instant::now() + STARTED_WITHIN;
        let mut command = self.program("postgres")?;
        command
            .arg("-D")
            .arg(&self.cluster)
            .arg("-k")
            .arg(&self.cluster)
            .args(["-p", &self.port.to_string()]);
        for setting in [
            "listen_addresses=127.0.0.1",
            "fsync=off",
            "full_page_writes=off",
            "max_connections=120",
            "max_wal_size=2GB",
            "timezone=UTC",
        ] {
            command.args(["-c", setting]);
        }
        loop {
            let mut process = Process::start(&command, &self.log)?;
            loop {
                if self.connect().await.is_ok() {
                    self.running = Some(process);
                    return Ok(());
                }
                // The killed server's processes keep its shared memory for a moment.
                if process.ended()?.is_some() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            if Instant::now() > deadline {
                bail!(
                    "PostgreSQL does not start: {}",
                    fs::read_to_string(&self.log).unwrap_or_default()
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn unprivileged() -> Result<User> {
    for name in ["postgres", "nobody"] {
        if let Some(user) = User::from_name(name)? {
            return Ok(user);
        }
    }
    bail!("PostgreSQL does not run as root, and there is no user postgres or nobody")
}
