//! The embedded PostgreSQL: a private server, used if `DATABASE_URL` is not set.
//!
//! This module manages the files of the database cluster, and starts, restarts and stops the server process. It
//! provides a URL, and does not depend on tables, migrations or pools.
//!
//! * `initdb` creates the cluster at the first startup, in a temporary directory that is renamed when it is complete.
//! * PostgreSQL listens only on a Unix socket, in a directory that only the user it runs as can access.
//! * PostgreSQL stops when this process exits for any reason. It runs under a small shell script, the guard, which
//!   reads from a pipe whose other end only this process holds. When this process exits, even after `kill -9`, the pipe
//!   is closed, and the guard requests a fast shutdown. `PR_SET_PDEATHSIG` is not an alternative: it would require
//!   `unsafe`, is reset when a process changes its user, and fires when the *thread* that forked exits.
//! * If PostgreSQL crashes, it is restarted, with backoff. Until it runs again, connection attempts fail, as they do
//!   with any database that is down.
//! * If this process runs as root, PostgreSQL runs as the `postgres` user, or as `nobody` if there is no such user,
//!   because PostgreSQL refuses to run as root.
mod address;
mod binaries;
mod cluster;
mod error;
mod place;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use tokio::{sync::watch, task::JoinHandle};

pub use self::error::EmbeddedError;
use self::{
    address::{NAME, PORT, connect, url},
    binaries::{initdb, installed_binaries, matching},
    cluster::{Cluster, rotate},
    place::{Place, lock, make_data_dir, socket_dir},
};

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

/// A running private PostgreSQL. PostgreSQL stops when this value is dropped or when this process exits.
#[derive(Debug)]
pub struct EmbeddedPostgres {
    socket_dir: PathBuf,
    stop: watch::Sender<bool>,
    supervisor: JoinHandle<()>,
}

impl EmbeddedPostgres {
    /// Starts the cluster for `data_dir`, creating it if necessary, and waits until it accepts connections. The task
    /// that restarts PostgreSQL runs on the current runtime.
    pub async fn start(data_dir: &Path) -> Result<Self, EmbeddedError> {
        Self::start_with(data_dir, &[]).await
    }

    /// Returns whether the cluster for `data_dir` has been created. Fails if it has not been created and PostgreSQL is
    /// not installed.
    pub async fn is_created(data_dir: &Path) -> Result<bool, EmbeddedError> {
        let place = match fs::canonicalize(data_dir) {
            Ok(data_dir) => Place::find(&data_dir)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(EmbeddedError::file("cannot inspect", data_dir)(error)),
        };
        if place.is_none() && installed_binaries().await.is_empty() {
            return Err(EmbeddedError::NotInstalled);
        }
        Ok(place.is_some())
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
