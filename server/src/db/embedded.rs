//! The embedded default: a private PostgreSQL in the data directory, for who has not set `DATABASE_URL`.
//!
//! Owns the cluster's files, the server process and its restarts. Must not know tables, migrations or
//! pools: it gives a URL and keeps what is behind it alive.
//!
//! * The cluster is made by `initdb` on the first start, beside its place, and moved there when whole.
//! * It listens on a Unix socket in a directory that only its user may enter, and on no TCP port.
//! * It ends with us, however we end. A small shell, the guard, stands between us and PostgreSQL and
//!   reads from a pipe whose other end is ours alone; when we are gone, `kill -9` included, the read ends
//!   and the guard asks for a fast shutdown. (`PR_SET_PDEATHSIG` would need `unsafe`, is forgotten when
//!   the process changes its user, and fires when the *thread* that forked ends.)
//! * When PostgreSQL dies while we run, it is started again, with growing pauses. Until then connections
//!   are refused, as with any database that is down.
//! * As root, which PostgreSQL refuses to run as, it runs as the user `postgres`, or else `nobody`.
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
    cluster::{Cluster, START_LIMIT, put_aside},
    place::{Place, lock, make_data_dir, socket_dir},
};

/// The role and the database that the server works with.
const NAME: &str = "quota";

/// Names the socket's file (`.s.PGSQL.5432`), nothing else: no TCP port is opened.
const PORT: &str = "5432";

/// What the cluster is run with. Given on the command line, so that they are those of this version of
/// Quota and not of the one that made the cluster.
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
        "no PostgreSQL is installed on this machine: install it (Debian and Ubuntu: `apt-get install \
         postgresql`), or set DATABASE_URL to a server of yours"
    )]
    NotInstalled,
    #[error(
        "the database in {} was made by PostgreSQL {wanted}, and this machine has {}: install that \
         version (Debian and Ubuntu: `apt-get install postgresql-{wanted}`), or move the data with \
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
        "cannot create the data directory {} for the embedded database: set DATABASE_URL to a PostgreSQL \
         server of yours, or QUOTA_DATA_DIR to a directory that can be written",
        path.display()
    )]
    NoDataDir {
        path: PathBuf,
        source: Box<EmbeddedError>,
    },
    #[error(
        "another server is using the data directory {}: stop it first, or set QUOTA_DATA_DIR",
        .0.display()
    )]
    InUse(PathBuf),
    #[error(
        "the database in {} belongs to the user {owner}: start as that user or as root, or set \
         QUOTA_DATA_DIR",
        cluster.display()
    )]
    ForeignOwner { cluster: PathBuf, owner: String },
    #[error(
        "PostgreSQL does not run as root, and this machine has neither the user postgres nor nobody"
    )]
    NoUser,
    #[error(
        "the user {user}, as whom PostgreSQL has to run, may not enter {}: allow it (chmod o+x on it and \
         the directories above), or set QUOTA_DATA_DIR",
        path.display()
    )]
    Unreachable { path: PathBuf, user: String },
    #[error(
        "{} is not a directory that only the user of the database may enter: remove it, or set \
         QUOTA_DATA_DIR to a shorter path",
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
    #[error("PostgreSQL ended while starting ({status}); the end of {}:\n{tail}", log.display())]
    Ended {
        status: ExitStatus,
        log: PathBuf,
        tail: String,
    },
    #[error(
        "PostgreSQL did not take connections within {} seconds; see {}",
        START_LIMIT.as_secs(),
        log.display()
    )]
    Slow {
        log: PathBuf,
        #[source]
        source: tokio_postgres::Error,
    },
    #[error("an earlier PostgreSQL (pid {pid}) still uses {} and does not end", cluster.display())]
    Orphan { pid: i32, cluster: PathBuf },
    #[error("cannot make the database {NAME}")]
    CreateDatabase(#[source] tokio_postgres::Error),
}

impl EmbeddedError {
    fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }
}

/// A running private PostgreSQL. Ends when stopped, dropped, or when this process ends.
#[derive(Debug)]
pub struct EmbeddedPostgres {
    socket_dir: PathBuf,
    stop: watch::Sender<bool>,
    keeper: JoinHandle<()>,
}

impl EmbeddedPostgres {
    /// Starts the cluster in `data_dir`, which is made where missing, and waits until it takes
    /// connections. Belongs to the runtime that it was started on.
    pub async fn start(data_dir: &Path) -> Result<Self, EmbeddedError> {
        Self::start_with(data_dir, &[]).await
    }

    /// As [`start`](Self::start), with PostgreSQL settings in place of ours.
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
        put_aside(&log)?;

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
            keeper: tokio::spawn(cluster.keep(postgres, stopped)),
        })
    }

    /// The database's URL. The host is the socket's directory, percent-encoded, as libpq and
    /// tokio-postgres take it.
    pub fn database_url(&self) -> String {
        url(&self.socket_dir, NAME)
    }

    /// Asks for a fast shutdown and waits for it.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        if let Err(error) = self.keeper.await {
            tracing::error!(%error, "the embedded PostgreSQL was not stopped in order");
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
