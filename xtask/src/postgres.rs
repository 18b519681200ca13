//! A throwaway PostgreSQL for tests and for reading schemas: fast, not durable, only on a Unix socket, in a temporary
//! directory under /tmp.
//!
//! PostgreSQL stops when this process exits, even after `kill -9`: a small shell script, the guard, runs PostgreSQL and
//! reads from a pipe. Only this process holds the other end of the pipe. When this end is closed, the script stops
//! PostgreSQL and removes the directory. The server's `db::embedded` is similar but durable; this module is separate
//! because tasks run before the server is built.

use std::{
    cmp::Reverse,
    fs,
    os::unix::{
        fs::{DirBuilderExt as _, chown},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};

use crate::{read, succeed, system};

const START_LIMIT: Duration = Duration::from_mins(1);
const USER: &str = "quota";

/// `$1` is the directory to remove at the end; the other arguments are the command. An immediate shutdown is fine,
/// since nothing is kept.
const GUARD: &str = r#"
dir=$1
shift
exec 3<&0 </dev/null
"$@" 3<&- &
child=$!
{ cd /; read -r _ <&3; while kill -QUIT "$child"; do sleep 1; done; } 2>/dev/null >/dev/null &
reader=$!
exec 3<&-
wait "$child"
{ kill "$reader"; wait "$reader"; } 2>/dev/null
exec rm -rf "$dir"
"#;

/// Settings that trade durability, which is not needed here, for speed.
const SETTINGS: &[&str] = &[
    "listen_addresses=",
    "unix_socket_permissions=0700",
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "autovacuum=off",
    "max_connections=400",
    "shared_buffers=128MB",
    "max_wal_size=4GB",
    "log_checkpoints=off",
    "timezone=UTC",
    "log_timezone=UTC",
];

pub(crate) struct Throwaway {
    bin: PathBuf,
    socket_dir: PathBuf,
    guard: Child,
    pipe: Option<ChildStdin>,
}

impl Throwaway {
    pub(crate) fn start() -> Result<Self> {
        let bin = binaries().context("no PostgreSQL is installed")?;
        let user = unprivileged_user()?;
        let dir = temporary_dir()?;
        let cluster = dir.join("cluster");
        let made = (|| {
            fs::DirBuilder::new().mode(0o700).create(&cluster)?;
            if let Some((uid, gid)) = user {
                chown(&dir, Some(uid), Some(gid))?;
                chown(&cluster, Some(uid), Some(gid))?;
            }
            read(
                as_user(Command::new(bin.join("initdb")), user)
                    .arg("-D")
                    .arg(&cluster)
                    .args([
                        "--username",
                        USER,
                        "--auth-local=trust",
                        "--auth-host=reject",
                    ])
                    .args(["--encoding=UTF8", "--no-locale", "--no-sync"])
                    .current_dir(&cluster),
            )
        })();
        if let Err(error) = made {
            let _ = fs::remove_dir_all(&dir);
            return Err(error).context("cannot create a PostgreSQL cluster");
        }

        let log_path = dir.join("log");
        let log = fs::File::create(&log_path)?;
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", GUARD, "quota-throwaway-postgres"])
            .arg(&dir);
        command
            .arg(bin.join("postgres"))
            .arg("-D")
            .arg(&cluster)
            .arg("-k")
            .arg(&cluster);
        for setting in SETTINGS {
            command.args(["-c", setting]);
        }
        let mut guard = as_user(command, user)
            // Ctrl-C in the terminal must not reach PostgreSQL. The guard stops PostgreSQL after this process has
            // exited.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run /bin/sh")?;
        let pipe = guard.stdin.take();
        let mut postgres = Self {
            bin,
            socket_dir: cluster,
            guard,
            pipe,
        };
        let deadline = Instant::now() + START_LIMIT;
        while !postgres.takes_connections() {
            if postgres.guard.try_wait()?.is_some() {
                // The guard has removed the directory with the log, so the error cannot contain the log.
                bail!("the test PostgreSQL exited at startup");
            }
            if Instant::now() > deadline {
                bail!(
                    "the test PostgreSQL does not start: {}",
                    fs::read_to_string(log_path)?
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(postgres)
    }

    /// Returns the URL for connecting to the database `postgres` as the superuser.
    pub(crate) fn url(&self) -> String {
        // The path consists of letters, digits, `-` and `/`.
        let host = self.socket_dir.display().to_string().replace('/', "%2F");
        format!("postgres://{USER}@{host}:5432/postgres")
    }

    /// Runs SQL from a file, stopping at the first error.
    pub(crate) fn apply(&self, file: &Path) -> Result<()> {
        succeed(
            self.psql()
                .arg("--single-transaction")
                .arg("-f")
                .arg(file)
                .stdout(Stdio::null()),
        )
    }

    /// Returns the rows of a query, each a list of columns. NULL is returned as an empty string.
    pub(crate) fn query(&self, sql: &str) -> Result<Vec<Vec<String>>> {
        let text = read(
            self.psql()
                .args(["-At", "-F", "\x1f", "-R", "\x1e", "-c", sql]),
        )?;
        let text = text.strip_suffix('\n').unwrap_or(&text);
        Ok(text
            .split('\x1e')
            .filter(|row| !row.is_empty())
            .map(|row| row.split('\x1f').map(str::to_owned).collect())
            .collect())
    }

    fn psql(&self) -> Command {
        let mut command = Command::new(self.bin.join("psql"));
        command
            .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d"])
            .arg(self.url())
            .env("PGOPTIONS", "-c client_min_messages=warning")
            .stdin(Stdio::null());
        command
    }

    fn takes_connections(&self) -> bool {
        Command::new(self.bin.join("pg_isready"))
            .args(["-q", "-d"])
            .arg(self.url())
            .status()
            .is_ok_and(|status| status.success())
    }
}

impl Drop for Throwaway {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let _ = self.guard.wait();
    }
}

/// Returns the directory of `initdb`, `postgres` and `psql`, as found through `pg_config` or `PATH`. If neither finds
/// it, returns the newest one among the packages of Debian and Red Hat.
pub(crate) fn binaries() -> Option<PathBuf> {
    let mut places = Vec::new();
    if let Ok(dir) = read(Command::new("/bin/sh").args(["-c", "pg_config --bindir"])) {
        places.push(PathBuf::from(dir.trim()));
    }
    if let Some(program) = system::on_path("postgres").and_then(|path| fs::canonicalize(path).ok())
    {
        places.extend(program.parent().map(Path::to_owned));
    }
    let mut packaged: Vec<(u32, PathBuf)> = [("/usr/lib/postgresql", ""), ("/usr", "pgsql-")]
        .into_iter()
        .flat_map(|(parent, prefix)| {
            fs::read_dir(parent)
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(move |entry| {
                    let version = entry
                        .file_name()
                        .to_str()?
                        .strip_prefix(prefix)?
                        .parse()
                        .ok()?;
                    Some((version, entry.path().join("bin")))
                })
        })
        .collect();
    packaged.sort_by_key(|(version, _)| Reverse(*version));
    places.extend(packaged.into_iter().map(|(_, dir)| dir));
    places.into_iter().find(|dir| {
        dir.is_absolute()
            && ["initdb", "postgres", "psql"]
                .iter()
                .all(|program| dir.join(program).is_file())
    })
}

/// Returns the user and group to run PostgreSQL as, since PostgreSQL refuses to run as root.
fn unprivileged_user() -> Result<Option<(u32, u32)>> {
    if !system::is_root() {
        return Ok(None);
    }
    ["postgres", "nobody"]
        .into_iter()
        .find_map(|name| Some((system::id(&["-u", name])?, system::id(&["-g", name])?)))
        .map(Some)
        .context("PostgreSQL does not run as root, and there is no user postgres or nobody")
}

fn as_user(mut command: Command, user: Option<(u32, u32)>) -> Command {
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    if let Some((uid, gid)) = user {
        command.uid(uid).gid(gid);
    }
    command
}

fn temporary_dir() -> Result<PathBuf> {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos();
    // Don't use `env::temp_dir()`: its path may be too long for a socket, or not accessible to the user that PostgreSQL
    // runs as.
    let dir = PathBuf::from(format!("/tmp/quota-test-{}-{nanos}", std::process::id()));
    // Fails if the directory exists, because an existing directory could belong to another user.
    fs::DirBuilder::new()
        .mode(0o711)
        .create(&dir)
        .with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}
