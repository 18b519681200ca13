//! A private PostgreSQL that can be killed and restarted. It listens on a free loopback port.

use std::{
    fmt::Write as _,
    fs::{self, DirBuilder, File},
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, chown},
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

/// Settings of a cluster that is removed at the end.
const THROWAWAY: &[&str] = &["fsync=off", "full_page_writes=off", "max_wal_size=2GB"];
/// The same settings, with statistics about SQL statements.
const THROWAWAY_WITH_STATISTICS: &[&str] = &[
    "fsync=off",
    "full_page_writes=off",
    "max_wal_size=2GB",
    "shared_preload_libraries=pg_stat_statements",
];

pub(crate) struct Postgres {
    programs: PathBuf,
    cluster: PathBuf,
    log: PathBuf,
    port: u16,
    /// The password of the user `quota`. If `None`, every local user may connect.
    password: Option<String>,
    settings: &'static [&'static str],
    running: Option<Process>,
    _dir: Option<TempDir>,
}

impl Postgres {
    /// Starts a new cluster, which is removed when this [`Postgres`] is dropped.
    pub(crate) async fn start(programs: &Path) -> Result<Self> {
        Self::throwaway(programs, THROWAWAY).await
    }

    /// Starts a new cluster. The extension `pg_stat_statements` can be created in the cluster if it is installed on the
    /// machine. The cluster is removed when this [`Postgres`] is dropped.
    pub(crate) async fn start_with_statistics(programs: &Path) -> Result<Self> {
        let library = programs.join("../lib/pg_stat_statements.so");
        let settings = if library.exists() {
            THROWAWAY_WITH_STATISTICS
        } else {
            THROWAWAY
        };
        Self::throwaway(programs, settings).await
    }

    async fn throwaway(programs: &Path, settings: &'static [&'static str]) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("quota-crash-")
            .permissions(<fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o711))
            .tempdir_in("/tmp")?;
        let mut postgres = Self {
            programs: programs.to_owned(),
            log: dir.path().join("log"),
            cluster: dir.path().join("cluster"),
            port: free_port(),
            password: None,
            settings,
            running: None,
            _dir: Some(dir),
        };
        postgres.create(&["--auth=trust", "--no-sync"])?;
        postgres.restart().await?;
        Ok(postgres)
    }

    /// Starts the cluster in `dir`. Creates the cluster if it does not exist, and keeps it at the end.
    pub(crate) async fn kept(programs: &Path, dir: &Path) -> Result<Self> {
        let password_file = dir.join("password");
        let cluster = dir.join("cluster");
        let is_new = !cluster.join("PG_VERSION").exists();
        if is_new {
            make_dir(dir, 0o711)?;
            // An earlier run may have been interrupted.
            let _ = fs::remove_dir_all(&cluster);
            let _ = fs::remove_file(&password_file);
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&password_file)?;
            file.write_all(random_password()?.as_bytes())?;
            give_to_postgres(&password_file)?;
        }
        let mut postgres = Self {
            programs: programs.to_owned(),
            log: dir.join("log"),
            cluster,
            port: free_port(),
            password: Some(fs::read_to_string(&password_file)?),
            settings: &["max_connections=500"],
            running: None,
            _dir: None,
        };
        if is_new {
            let from = format!("--pwfile={}", password_file.display());
            postgres
                .create(&["--auth=scram-sha-256", &from])
                .with_context(|| {
                    format!(
                        "cannot create a database in {}, which the user postgres must be able to access if you are root",
                        dir.display()
                    )
                })?;
        }
        postgres.restart().await?;
        Ok(postgres)
    }

    fn create(&self, options: &[&str]) -> Result<()> {
        make_dir(&self.cluster, 0o700)?;
        give_to_postgres(&self.cluster)?;
        let mut initdb = self.program("initdb")?;
        initdb
            .arg("-D")
            .arg(&self.cluster)
            .args(["--username=quota", "--encoding=UTF8", "--no-locale"])
            .args(options)
            .current_dir("/");
        let made = initdb.output().context("cannot run initdb")?;
        ensure!(
            made.status.success(),
            "initdb: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        Ok(())
    }

    /// Returns a command for one of PostgreSQL's programs. If this process runs as root, the command switches to
    /// another user, because these programs refuse to run as root.
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
        let password = self.password.as_ref().map(|it| format!(":{it}"));
        format!(
            "postgres://quota{}@127.0.0.1:{}/postgres",
            password.unwrap_or_default(),
            self.port
        )
    }

    pub(crate) async fn connect(&self) -> Result<Client> {
        let (client, connection) = tokio_postgres::connect(&self.url(), NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Kills the postmaster with `kill -9`. Data that PostgreSQL has written is not lost even without `fsync`, because
    /// the kernel keeps it.
    pub(crate) async fn kill(&mut self) -> Result<()> {
        if let Some(mut process) = self.running.take() {
            process.signal(Signal::SIGKILL)?;
            process.ends_within(Duration::from_secs(10)).await?;
        }
        Ok(())
    }

    /// Stops the server cleanly: closes its connections, and writes everything to disk.
    pub(crate) async fn stop(&mut self) -> Result<()> {
        if let Some(mut process) = self.running.take() {
            process.signal(Signal::SIGINT)?;
            let ended = process.ends_within(Duration::from_secs(30)).await?;
            ended.context("PostgreSQL did not stop in time")?;
        }
        Ok(())
    }

    pub(crate) fn is_running(&mut self) -> Result<bool> {
        Ok(match &mut self.running {
            Some(process) => process.ended()?.is_none(),
            None => false,
        })
    }

    pub(crate) async fn restart(&mut self) -> Result<()> {
        let deadline = Instant::now() + STARTED_WITHIN;
        let mut command = self.program("postgres")?;
        command
            .arg("-D")
            .arg(&self.cluster)
            .args(["-p", &self.port.to_string()]);
        for setting in [
            "listen_addresses=127.0.0.1",
            // Don't create a Unix socket: its path may be too long.
            "unix_socket_directories=",
            "max_connections=120",
            "timezone=UTC",
        ]
        .iter()
        .chain(self.settings)
        {
            command.args(["-c", setting]);
        }
        loop {
            let mut process = Process::start(&command, &self.log)?;
            loop {
                if self.connect().await.is_ok() {
                    self.running = Some(process);
                    return Ok(());
                }
                // For a moment, the killed server's processes keep its shared memory, so a new server exits at startup.
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

fn make_dir(dir: &Path, mode: u32) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(dir)
        .with_context(|| format!("cannot create {}", dir.display()))
}

/// Changes the owner of a file if PostgreSQL runs as another user.
fn give_to_postgres(path: &Path) -> Result<()> {
    if Uid::effective().is_root() {
        let user = unprivileged()?;
        chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
    }
    Ok(())
}

/// Returns a random password of letters and digits.
pub(crate) fn random_password() -> Result<String> {
    let mut bytes = [0; 24];
    getrandom::fill(&mut bytes)?;
    let mut password = String::new();
    for byte in bytes {
        write!(password, "{byte:02x}")?;
    }
    Ok(password)
}

fn unprivileged() -> Result<User> {
    for name in ["postgres", "nobody"] {
        if let Some(user) = User::from_name(name)? {
            return Ok(user);
        }
    }
    bail!("PostgreSQL does not run as root, and there is no user postgres or nobody")
}
