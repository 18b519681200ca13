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

use std::{
    cmp::Reverse,
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{
        DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use aws_lc_rs::digest;
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Gid, Pid, Uid, User, chown, geteuid},
};
use tokio::{
    process::{Child, ChildStdin, Command},
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

/// The role and the database that the server works with.
const NAME: &str = "quota";

/// Names the socket's file (`.s.PGSQL.5432`), nothing else: no TCP port is opened.
const PORT: &str = "5432";

/// The longest path of a socket that every supported system takes (Linux: 107 bytes, macOS and BSD: 103).
const SOCKET_PATH_LIMIT: usize = 103;

/// Where a cluster lives that root may not keep in its data directory.
const FALLBACK_HOME: &str = "/var/lib/quota";

/// Recovery after a crash replays at most about a `max_wal_size` of log.
const START_LIMIT: Duration = Duration::from_mins(2);
/// A fast shutdown ends sessions and writes a checkpoint.
const FAST_STOP_LIMIT: Duration = Duration::from_secs(20);
const HARD_STOP_LIMIT: Duration = Duration::from_secs(5);

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// After this long alive, a death is news and not part of a series.
const SETTLED: Duration = Duration::from_mins(1);

/// The log is put aside at a start when it is longer than this.
const LOG_LIMIT: u64 = 10 * 1024 * 1024;

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

/// Runs "$@", ends it (fast shutdown) when standard input ends, and exits as it did. Background jobs of
/// a shell have no standard input, hence descriptor 3, and ignore SIGINT until they set it themselves,
/// hence more than one.
const GUARD: &str = r#"
exec 3<&0 </dev/null
"$@" 3<&- &
child=$!
{ cd /; read -r _ <&3; while kill -INT "$child"; do sleep 1; done; } 2>/dev/null >/dev/null &
reader=$!
exec 3<&-
wait "$child"
code=$?
{ kill "$reader"; wait "$reader"; } 2>/dev/null
exit "$code"
"#;

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

/// The guard and the end of its pipe. They are kept apart because waiting for a [`Child`] closes its
/// standard input, which would end it.
#[derive(Debug)]
struct Guarded {
    child: Child,
    pipe: Option<ChildStdin>,
    /// Where in the log its own words begin.
    log_begin: u64,
}

/// The files of a cluster and the user that they belong to.
#[derive(Debug)]
struct Place {
    /// PostgreSQL's data directory.
    cluster: PathBuf,
    user: RunAs,
}

/// `None`: as whoever we are, because that is not root.
type RunAs = Option<User>;

impl Place {
    async fn choose(data_dir: &Path) -> Result<Self, EmbeddedError> {
        let here = data_dir.join("postgres");
        if let Some(place) = Self::existing(&here)? {
            place.check_reach(&place.cluster).await?;
            return Ok(place);
        }
        if !geteuid().is_root() {
            return Ok(Self {
                cluster: here,
                user: None,
            });
        }
        let fallback_home = Path::new(FALLBACK_HOME).join(short_name(data_dir));
        let fallback = fallback_home.join("postgres");
        if let Some(place) = Self::existing(&fallback)? {
            tracing::info!(cluster = %fallback.display(), "the database is kept outside the data directory");
            return Ok(place);
        }
        let user = unprivileged_user()?;
        let place = Self {
            cluster: here,
            user: Some(user),
        };
        if place.check_reach(data_dir).await.is_ok() {
            return Ok(place);
        }
        // /root is 0700 on most machines; a checkout below it must work all the same.
        make_dir(Path::new(FALLBACK_HOME), 0o755)?;
        make_dir(&fallback_home, 0o711)?;
        tracing::warn!(
            data_dir = %data_dir.display(),
            user = place.user_name(),
            cluster = %fallback.display(),
            "PostgreSQL's user may not enter the data directory: the database is kept outside it"
        );
        let place = Self {
            cluster: fallback,
            ..place
        };
        place.check_reach(&fallback_home).await?;
        Ok(place)
    }

    /// The cluster at `path` with its owner, or `None` when nothing is there.
    fn existing(path: &Path) -> Result<Option<Self>, EmbeddedError> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(EmbeddedError::file("cannot look at", path)(error)),
        };
        let owner = Uid::from_raw(metadata.uid());
        let me = geteuid();
        let named = User::from_uid(owner).ok().flatten();
        let user = if owner == me && !me.is_root() {
            None
        } else if me.is_root() && !owner.is_root() {
            Some(named.unwrap_or_else(|| nameless(owner, Gid::from_raw(metadata.gid()))))
        } else {
            return Err(EmbeddedError::ForeignOwner {
                cluster: path.to_owned(),
                owner: named.map_or_else(|| owner.to_string(), |user| user.name),
            });
        };
        Ok(Some(Self {
            cluster: path.to_owned(),
            user,
        }))
    }

    fn version(&self) -> Result<Option<String>, EmbeddedError> {
        let path = self.cluster.join("PG_VERSION");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.cluster.exists() => {
                Ok(None)
            }
            Err(error) => Err(EmbeddedError::file("cannot read", &path)(error)),
        }
    }

    fn user_name(&self) -> &str {
        self.user.as_ref().map_or("", |user| user.name.as_str())
    }

    /// Lets the system say whether the database's user gets into `dir`, as mode bits alone do not tell.
    async fn check_reach(&self, dir: &Path) -> Result<(), EmbeddedError> {
        let Some(user) = &self.user else {
            return Ok(());
        };
        let sh = Path::new("/bin/sh");
        let status = Command::new(sh)
            .args(["-c", "cd \"$1\"", "sh"])
            .arg(dir)
            .current_dir("/")
            .uid(user.uid.as_raw())
            .gid(user.gid.as_raw())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .await
            .map_err(|source| EmbeddedError::Run {
                program: sh.to_owned(),
                source,
            })?;
        if status.success() {
            return Ok(());
        }
        Err(EmbeddedError::Unreachable {
            path: dir.to_owned(),
            user: user.name.clone(),
        })
    }

    /// Gives `path` to the database's user.
    fn give(&self, path: &Path) -> Result<(), EmbeddedError> {
        let Some(user) = &self.user else {
            return Ok(());
        };
        chown(path, Some(user.uid), Some(user.gid))
            .map_err(|errno| EmbeddedError::file("cannot change the owner of", path)(errno.into()))
    }

    /// A command that runs under the guard, as the database's user.
    fn guarded(&self, program: &Path) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", GUARD, "quota-postgres-guard"])
            .arg(program)
            // Secrets in our environment are none of its business, nor are our PG* variables meant for it.
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C")
            // The terminal's Ctrl-C is for us: we finish what is in flight, and only then end PostgreSQL.
            .process_group(0)
            .stdin(Stdio::piped());
        if let Some(user) = &self.user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        command
    }
}

#[derive(Debug)]
struct Cluster {
    program: PathBuf,
    arguments: Vec<String>,
    place: Place,
    socket_dir: PathBuf,
    log: PathBuf,
    /// Held until PostgreSQL has ended, so that the next server does not meet it half gone.
    _lock: File,
}

impl Cluster {
    /// Runs PostgreSQL, which then takes a while to be [`ready`](Self::ready).
    async fn launch(&self) -> Result<Guarded, EmbeddedError> {
        self.clear_the_way().await?;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&self.log)
            .map_err(EmbeddedError::file("cannot open", &self.log))?;
        let log_begin = log
            .metadata()
            .map_err(EmbeddedError::file("cannot look at", &self.log))?
            .len();
        let stdout = log
            .try_clone()
            .map_err(EmbeddedError::file("cannot open", &self.log))?;
        let mut child = self
            .place
            .guarded(&self.program)
            .args(&self.arguments)
            .current_dir(&self.place.cluster)
            .stdout(stdout)
            .stderr(log)
            .spawn()
            .map_err(|source| EmbeddedError::Run {
                program: self.program.clone(),
                source,
            })?;
        Ok(Guarded {
            pipe: child.stdin.take(),
            child,
            log_begin,
        })
    }

    /// Waits until PostgreSQL takes connections.
    async fn ready(&self, postgres: &mut Guarded) -> Result<(), EmbeddedError> {
        let url = url(&self.socket_dir, "postgres");
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let Err(refused) = connect(&url).await else {
                return Ok(());
            };
            if let Ok(Some(status)) = postgres.child.try_wait() {
                return Err(EmbeddedError::Ended {
                    status,
                    tail: tail(&self.log, postgres.log_begin),
                    log: self.log.clone(),
                });
            }
            if Instant::now() > deadline {
                return Err(EmbeddedError::Slow {
                    log: self.log.clone(),
                    source: refused,
                });
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends what an earlier server left running on this cluster, and waits for it.
    ///
    /// We hold the data directory's lock, so whoever runs here is an orphan. It is known by its working
    /// directory, which PostgreSQL's processes set to their cluster; a process id in a file may by now be
    /// anyone's. Where there is no `/proc`, PostgreSQL's own check of its pid file stands alone.
    async fn clear_the_way(&self) -> Result<(), EmbeddedError> {
        let cluster = fs::canonicalize(&self.place.cluster)
            .map_err(EmbeddedError::file("cannot look at", &self.place.cluster))?;
        let pid_file = cluster.join("postmaster.pid");
        if !running_in(&cluster).is_empty() {
            tracing::info!(cluster = %cluster.display(), "ending what is left of an earlier PostgreSQL");
        }
        if !end_running(&cluster, Signal::SIGINT, FAST_STOP_LIMIT).await {
            end_running(&cluster, Signal::SIGQUIT, HARD_STOP_LIMIT).await;
        }
        if let Some(&pid) = running_in(&cluster).first() {
            return Err(EmbeddedError::Orphan { pid, cluster });
        }
        // PostgreSQL refuses to start when the number in its pid file is some live process of its user's.
        // No process of this cluster is alive, so the file says nothing.
        if Path::new("/proc/self/cwd").exists() && pid_file.exists() {
            fs::remove_file(&pid_file).map_err(EmbeddedError::file("cannot remove", &pid_file))?;
        }
        Ok(())
    }

    /// Keeps PostgreSQL running until told to stop, or until the other end of `stopped` is gone.
    async fn keep(self, mut postgres: Guarded, mut stopped: watch::Receiver<bool>) {
        let mut pause = FIRST_PAUSE;
        loop {
            let since = Instant::now();
            let status = tokio::select! {
                status = postgres.child.wait() => status,
                _ = stopped.changed() => {
                    self.stop(postgres).await;
                    return;
                }
            };
            if since.elapsed() > SETTLED {
                pause = FIRST_PAUSE;
            }
            let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
            tracing::error!(
                status,
                log = %self.log.display(),
                "the embedded PostgreSQL ended by itself; starting it again"
            );
            postgres = loop {
                let paused = async {
                    sleep(pause).await;
                    self.launch().await
                };
                let launched = tokio::select! {
                    launched = paused => launched,
                    _ = stopped.changed() => return,
                };
                pause = (pause * 2).min(LONGEST_PAUSE);
                let error = match launched {
                    Ok(mut postgres) => {
                        let ready = tokio::select! {
                            ready = self.ready(&mut postgres) => ready,
                            _ = stopped.changed() => {
                                self.stop(postgres).await;
                                return;
                            }
                        };
                        match ready {
                            Ok(()) => break postgres,
                            Err(error) => {
                                self.stop(postgres).await;
                                error
                            }
                        }
                    }
                    Err(error) => error,
                };
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the embedded PostgreSQL does not start; trying again"
                );
            };
            tracing::info!("the embedded PostgreSQL runs again");
        }
    }

    /// Fast shutdown, and an immediate one where that takes too long.
    async fn stop(
        &self,
        Guarded {
            mut child, pipe, ..
        }: Guarded,
    ) {
        drop(pipe);
        if timeout(FAST_STOP_LIMIT, child.wait()).await.is_ok() {
            return;
        }
        tracing::warn!("the embedded PostgreSQL takes long to stop; ending it at once");
        if let Ok(cluster) = fs::canonicalize(&self.place.cluster) {
            end_running(&cluster, Signal::SIGQUIT, HARD_STOP_LIMIT).await;
        }
        if timeout(HARD_STOP_LIMIT, child.wait()).await.is_err() {
            tracing::error!("the embedded PostgreSQL did not stop");
        }
    }
}

/// Makes the data directory and gives its real path.
fn make_data_dir(data_dir: &Path) -> Result<PathBuf, EmbeddedError> {
    // Root's PostgreSQL runs as another user, which has to pass through to its own directory.
    let mode = if geteuid().is_root() { 0o711 } else { 0o700 };
    make_dir(data_dir, mode)?;
    fs::canonicalize(data_dir).map_err(EmbeddedError::file("cannot look at", data_dir))
}

fn make_dir(path: &Path, mode: u32) -> Result<(), EmbeddedError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(EmbeddedError::file("cannot make the directory", path))
}

fn lock(data_dir: &Path) -> Result<File, EmbeddedError> {
    let path = data_dir.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path)
        .map_err(EmbeddedError::file("cannot open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(EmbeddedError::InUse(data_dir.to_owned())),
        Err(TryLockError::Error(error)) => Err(EmbeddedError::file("cannot lock", &path)(error)),
    }
}

fn unprivileged_user() -> Result<User, EmbeddedError> {
    ["postgres", "nobody"]
        .into_iter()
        .find_map(|name| User::from_name(name).ok().flatten())
        .ok_or(EmbeddedError::NoUser)
}

/// A user that owns files but is in no list of users, as happens with volumes of containers.
fn nameless(uid: Uid, gid: Gid) -> User {
    User {
        name: uid.to_string(),
        passwd: c"".to_owned(),
        uid,
        gid,
        gecos: c"".to_owned(),
        dir: PathBuf::from("/"),
        shell: PathBuf::from("/bin/sh"),
    }
}

/// A short name for a path that no other path has.
fn short_name(path: &Path) -> String {
    let hash = digest::digest(&digest::SHA256, path.as_os_str().as_encoded_bytes());
    hash.as_ref()[..8]
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// Programs of one PostgreSQL version.
#[derive(Debug, Clone)]
struct Binaries {
    dir: PathBuf,
    /// As in a cluster's `PG_VERSION`: `15`.
    version: String,
}

/// Every PostgreSQL server on this machine, the preferred one first.
async fn installed_binaries() -> Vec<Binaries> {
    let mut places = Vec::new();
    // What `pg_config` and the path name is what the machine's owner prefers; `pg_config` alone comes
    // with the client library, too, so it may point at a directory without a server.
    for question in [
        "pg_config --bindir",
        "dirname \"$(readlink -f \"$(command -v postgres)\")\"",
    ] {
        if let Some(answer) = output(Command::new("/bin/sh").args(["-c", question])).await {
            places.push(PathBuf::from(answer));
        }
    }
    let mut packaged: Vec<(u32, PathBuf)> = Vec::new();
    for (parent, prefix) in [("/usr/lib/postgresql", ""), ("/usr", "pgsql-")] {
        for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let version = name
                .to_str()
                .and_then(|name| name.strip_prefix(prefix)?.parse().ok());
            if let Some(version) = version {
                packaged.push((version, entry.path().join("bin")));
            }
        }
    }
    packaged.sort_by_key(|(version, _)| Reverse(*version));
    places.extend(packaged.into_iter().map(|(_, dir)| dir));

    let mut found: Vec<Binaries> = Vec::new();
    for dir in places {
        let known = found.iter().any(|binaries| binaries.dir == dir);
        if known || !dir.is_absolute() || !dir.join("initdb").is_file() {
            continue;
        }
        // postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)
        let Some(text) = output(Command::new(dir.join("postgres")).arg("--version")).await else {
            continue;
        };
        let number = text.split_whitespace().nth(2).unwrap_or_default();
        let version: String = number.chars().take_while(char::is_ascii_digit).collect();
        if !version.is_empty() {
            found.push(Binaries { dir, version });
        }
    }
    found
}

/// What a command prints, trimmed, or `None` when it fails or prints nothing.
async fn output(command: &mut Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .await
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

fn matching(
    installed: &[Binaries],
    version: &str,
    cluster: &Path,
) -> Result<PathBuf, EmbeddedError> {
    if installed.is_empty() {
        return Err(EmbeddedError::NotInstalled);
    }
    installed
        .iter()
        .find(|binaries| binaries.version == version)
        .map(|binaries| binaries.dir.clone())
        .ok_or_else(|| EmbeddedError::WrongVersion {
            cluster: cluster.to_owned(),
            wanted: version.to_owned(),
            found: installed
                .iter()
                .map(|binaries| binaries.version.clone())
                .collect(),
        })
}

/// Makes the cluster beside its place and moves it there when it is whole, so that a crash in between
/// leaves a leftover and no broken cluster.
async fn initdb(bin: &Path, place: &Place) -> Result<(), EmbeddedError> {
    const LEFTOVER: &str = "postgres.new-";
    let home = place.cluster.parent().unwrap_or(Path::new("/"));
    for entry in fs::read_dir(home).into_iter().flatten().flatten() {
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(LEFTOVER.as_bytes())
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let new = home.join(format!("{LEFTOVER}{}", std::process::id()));
    make_dir(&new, 0o700)?;
    place.give(&new)?;
    tracing::info!(cluster = %place.cluster.display(), "making the database, once");
    let program = bin.join("initdb");
    let child = place
        .guarded(&program)
        .arg("-D")
        .arg(&new)
        .args([
            &format!("--username={NAME}"),
            // The socket's directory is what guards the way in.
            "--auth-local=trust",
            "--auth-host=reject",
            "--encoding=UTF8",
            // The order of bytes never changes; a locale's does, with the C library, under indexes.
            "--no-locale",
            "--data-checksums",
        ])
        .current_dir(&new)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| EmbeddedError::Run {
            program: program.clone(),
            source,
        })?;
    let output = wait_with_output(child)
        .await
        .map_err(|source| EmbeddedError::Run { program, source })?;
    if !output.status.success() {
        let _ = fs::remove_dir_all(&new);
        return Err(EmbeddedError::Initdb {
            status: output.status,
            output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    fs::rename(&new, &place.cluster).map_err(EmbeddedError::file("cannot make", &place.cluster))?;
    // The rename has to outlive a loss of power as the files themselves do.
    File::open(home)
        .and_then(|dir| dir.sync_all())
        .map_err(EmbeddedError::file("cannot write", home))
}

/// [`Child::wait_with_output`] closes standard input first, at which the guard would end its child.
async fn wait_with_output(mut child: Child) -> io::Result<std::process::Output> {
    let pipe = child.stdin.take();
    let output = child.wait_with_output().await;
    drop(pipe);
    output
}

/// The directory of the socket: the cluster's own, or a short one where its path is too long for a socket.
fn socket_dir(place: &Place) -> Result<PathBuf, EmbeddedError> {
    let length = place.cluster.as_os_str().len() + "/.s.PGSQL.".len() + PORT.len();
    if length <= SOCKET_PATH_LIMIT {
        return Ok(place.cluster.clone());
    }
    let dir = Path::new("/tmp").join(format!("quota-{}", short_name(&place.cluster)));
    match fs::DirBuilder::new().mode(0o700).create(&dir) {
        Ok(()) => place.give(&dir)?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(EmbeddedError::file("cannot make the directory", &dir)(
                error,
            ));
        }
    }
    // Anyone may make names in /tmp.
    let metadata =
        fs::symlink_metadata(&dir).map_err(EmbeddedError::file("cannot look at", &dir))?;
    let owner = place.user.as_ref().map_or(geteuid(), |user| user.uid);
    if !metadata.is_dir()
        || metadata.uid() != owner.as_raw()
        || metadata.permissions().mode() & 0o077 != 0
    {
        return Err(EmbeddedError::UnsafeSocketDirectory(dir));
    }
    tracing::info!(
        socket_dir = %dir.display(),
        "the data directory's path is too long for a socket: the socket is kept outside it"
    );
    Ok(dir)
}

/// Puts a long log aside, in place of the one put aside before.
fn put_aside(log: &Path) -> Result<(), EmbeddedError> {
    if fs::metadata(log).is_ok_and(|metadata| metadata.len() > LOG_LIMIT) {
        fs::rename(log, log.with_extension("log.1"))
            .map_err(EmbeddedError::file("cannot rename", log))?;
    }
    Ok(())
}

/// The last lines of the log from `begin` on.
fn tail(log: &Path, begin: u64) -> String {
    const LINES: usize = 10;
    let mut text = Vec::new();
    let read = File::open(log).and_then(|mut file| {
        file.seek(SeekFrom::Start(begin))?;
        file.take(1024 * 1024).read_to_end(&mut text)
    });
    if let Err(error) = read {
        return format!("(unreadable: {error})");
    }
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// The processes whose working directory is `dir`, except ended ones that wait to be reaped. None where
/// there is no `/proc`.
fn running_in(dir: &Path) -> Vec<i32> {
    let own = std::process::id().cast_signed();
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let cwd = fs::read_link(entry.path().join("cwd")).ok()?;
            (pid != own && cwd == dir && is_postgres(&entry.path())).then_some(pid)
        })
        .collect()
}

/// Signals the postmaster of the cluster and waits until all its processes are gone; `false` when they
/// are not. Sessions of a postmaster that died notice by themselves.
async fn end_running(cluster: &Path, signal: Signal, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    let mut signalled = None;
    loop {
        let running = running_in(cluster);
        if running.is_empty() {
            return true;
        }
        // A starting one has yet to write its file.
        let postmaster = fs::read_to_string(cluster.join("postmaster.pid"))
            .ok()
            .and_then(|text| text.lines().next()?.trim().parse::<i32>().ok())
            .filter(|pid| running.contains(pid));
        if let Some(pid) = postmaster.filter(|_| postmaster != signalled) {
            let _ = kill(Pid::from_raw(pid), signal);
            signalled = postmaster;
        }
        if Instant::now() > deadline {
            return false;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// An operator's shell may stand in the directory, too.
fn is_postgres(process: &Path) -> bool {
    fs::read_link(process.join("exe"))
        .is_ok_and(|exe| exe.file_name() == Some(OsStr::new("postgres")))
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
