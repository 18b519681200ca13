//! The embedded PostgreSQL: a private server in the data directory, used if `DATABASE_URL` is not set.
//!
//! This module owns the cluster's files, the server process and its restarts. It provides a URL, and does not depend on
//! tables, migrations or pools.
//!
//! * `initdb` creates the cluster at the first startup, in a temporary directory that is renamed when it is complete.
//! * PostgreSQL listens only on a Unix socket, in a directory that only its user can access.
//! * PostgreSQL stops when this process exits for any reason. It runs under a small shell script, the guard, which
//!   reads from a pipe whose other end only this process holds. When this process exits, even after `kill -9`, the read
//!   ends, and the guard requests a fast shutdown. (`PR_SET_PDEATHSIG` would require `unsafe`, is reset when a process
//!   changes its user, and fires when the *thread* that forked exits.)
//! * If PostgreSQL crashes, it is restarted, with backoff. Until PostgreSQL runs again, connections fail as with any
//!   database that is down.
//! * If this process runs as root, PostgreSQL runs as the `postgres` user, or as `nobody` if there is no such user,
//!   because PostgreSQL refuses to run as root.
mod binaries;
mod cluster;
mod place;

use std::{
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
    process::ExitStatus,
};

use tokio::{sync::watch, task::JoinHandle};

use self::{
    binaries::{initdb, installed_binaries, matching},
    cluster::{Cluster, START_LIMIT, rotate},
    place::{Place, lock, make_data_dir, socket_dir},
};

/// The role and the database that the server uses.
const NAME: &str = "quota";

/// The port, which is used only in the name of the socket file (`.s.PGSQL.5432`). PostgreSQL does not listen on a TCP
/// port.
const PORT: &str = "5432";

/// The cluster's settings. The settings are passed on the command line, so that they come from this version of Quota,
/// not from the version that created the cluster.
const SETTINGS: &[(&str, &str)] = &[
    ("listen_addresses", ""),
    ("unix_socket_permissions", "0700"),
    ("max_connections", "50"),
    ("shared_buffers", "64MB"),
    ("fsync", "on"),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    ("log_destination", "stderr"),
    ("logging_collector", "off"),
    ("log_checkpoints", "off"),
    ("log_line_prefix", "%m [%p] "),
];

#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    #[error(
        "PostgreSQL is not installed: install it (Debian and Ubuntu: `apt-get install postgresql`), or set \
         DATABASE_URL to use another server"
    )]
    NotInstalled,
    #[error(
        "the database in {} was created by PostgreSQL {wanted}, but this machine has {}: install that \
         version (Debian and Ubuntu: `apt-get install postgresql-{wanted}`), or upgrade the data with \
         pg_upgrade",
        cluster.display(),
        found.join(", ")
    )]
    WrongVersion {
        cluster: PathBuf,
        wanted: String,
        found: Vec<String>,
    },
    #[error(
        "cannot create the data directory {} for the private PostgreSQL: set DATABASE_URL to use your own PostgreSQL server, or QUOTA_DATA_DIR to a writable directory",
        path.display()
    )]
    NoDataDir {
        path: PathBuf,
        source: Box<EmbeddedError>,
    },
    #[error(
        "another server is using the data directory {}: stop that server first, or set QUOTA_DATA_DIR",
        .0.display()
    )]
    InUse(PathBuf),
    #[error(
        "the database in {} belongs to the user {owner}: start the server as that user or as root, or set QUOTA_DATA_DIR",
        cluster.display()
    )]
    ForeignOwner { cluster: PathBuf, owner: String },
    #[error("PostgreSQL cannot run as root, and this machine has no user named postgres or nobody")]
    NoUser,
    #[error(
        "PostgreSQL has to run as the user {user}, which cannot access {}: grant access (chmod o+x on it and its \
         parent directories), or set QUOTA_DATA_DIR",
        path.display()
    )]
    Unreachable { path: PathBuf, user: String },
    #[error(
        "{} is not a private directory of the user that PostgreSQL runs as: remove it, or set QUOTA_DATA_DIR to a \
         shorter path",
        .0.display()
    )]
    UnsafeSocketDirectory(PathBuf),
    #[error("{what} {}", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot run {}", program.display())]
    Run {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("initdb failed ({status}): {output}")]
    Initdb { status: ExitStatus, output: String },
    #[error("PostgreSQL exited at startup ({status}); the last lines of {}:\n{tail}", log.display())]
    Ended {
        status: ExitStatus,
        log: PathBuf,
        tail: String,
    },
    #[error(
        "PostgreSQL did not accept connections within {} seconds; see {}",
        START_LIMIT.as_secs(),
        log.display()
    )]
    Slow {
        log: PathBuf,
        #[source]
        source: tokio_postgres::Error,
    },
    #[error("an earlier PostgreSQL (PID {pid}) is still using {} and has not exited", cluster.display())]
    Orphan { pid: i32, cluster: PathBuf },
    #[error("cannot create the database {NAME}")]
    CreateDatabase(#[source] tokio_postgres::Error),
}

impl EmbeddedError {
    fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }
}

/// A running private PostgreSQL. PostgreSQL stops when this value is dropped or when this process exits.
#[derive(Debug)]
pub struct EmbeddedPostgres {
    socket_dir: PathBuf,
    stop: watch::Sender<bool>,
    supervisor: JoinHandle<()>,
}

impl EmbeddedPostgres {
    /// Starts the cluster in `data_dir`, creating it if necessary, and waits until it accepts connections. Supervision
    /// runs on the current runtime.
    pub async fn start(data_dir: &Path) -> Result<Self, EmbeddedError> {
        Self::start_with(data_dir, &[]).await
    }

    /// Starts the cluster like [`start`](Self::start), with additional PostgreSQL settings.
    pub async fn start_with(
        data_dir: &Path,
        settings: &[(&str, &str)],
    ) -> Result<Self, EmbeddedError> {
        let data_dir = make_data_dir(data_dir)?;
        let lock = lock(&data_dir)?;
        let place = Place::choose(&data_dir).await?;
        let installed = installed_binaries().await;
        let bin = if let Some(version) = place.version()? {
            matching(&installed, &version, &place.cluster)?
        } else {
            let preferred = installed.first().ok_or(EmbeddedError::NotInstalled)?;
            initdb(&preferred.dir, &place).await?;
            preferred.dir.clone()
        };
        let socket_dir = socket_dir(&place)?;
        let log = data_dir.join("postgres.log");
        rotate(&log)?;

        let mut arguments = vec![
            "-D".to_owned(),
            place.cluster.display().to_string(),
            "-k".to_owned(),
            socket_dir.display().to_string(),
            "-p".to_owned(),
            PORT.to_owned(),
        ];
        for (name, value) in SETTINGS.iter().chain(settings) {
            arguments.extend(["-c".to_owned(), format!("{name}={value}")]);
        }
        let cluster = Cluster {
            program: bin.join("postgres"),
            arguments,
            place,
            socket_dir: socket_dir.clone(),
            log,
            _lock: lock,
        };
        let mut postgres = cluster.launch().await?;
        let usable = async {
            cluster.ready(&mut postgres).await?;
            create_database(&socket_dir).await
        };
        if let Err(error) = usable.await {
            cluster.stop(postgres).await;
            return Err(error);
        }
        let (stop, stopped) = watch::channel(false);
        Ok(Self {
            socket_dir,
            stop,
            supervisor: tokio::spawn(cluster.keep(postgres, stopped)),
        })
    }

    /// Returns the database's URL. Its host is the percent-encoded directory of the socket, a form that libpq and
    /// tokio-postgres accept.
    pub fn database_url(&self) -> String {
        url(&self.socket_dir, NAME)
    }

    /// Requests a fast shutdown and waits until PostgreSQL has stopped.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        if let Err(error) = self.supervisor.await {
            tracing::error!(%error, "the private PostgreSQL did not stop cleanly");
        }
    }
}

fn url(socket_dir: &Path, database: &str) -> String {
    let mut url = format!("postgres://{NAME}@");
    for &byte in socket_dir.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            url.push(char::from(byte));
        } else {
            let _ = write!(url, "%{byte:02X}");
        }
    }
    let _ = write!(url, ":{PORT}/{database}");
    url
}

async fn connect(url: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn create_database(socket_dir: &Path) -> Result<(), EmbeddedError> {
    let made = async {
        let client = connect(&url(socket_dir, "postgres")).await?;
        let there = client
            .query_opt("SELECT 1 FROM pg_database WHERE datname = $1", &[&NAME])
            .await?;
        if there.is_none() {
            client
                .batch_execute(&format!("CREATE DATABASE {NAME}"))
                .await?;
        }
        Ok(())
    };
    made.await.map_err(EmbeddedError::CreateDatabase)
}
