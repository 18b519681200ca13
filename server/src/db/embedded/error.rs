//! Why the embedded PostgreSQL cannot be used, and what to do about it.

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use super::address::NAME;

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
        limit.as_secs(),
        log.display()
    )]
    Slow {
        limit: Duration,
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
    pub(super) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }
}
