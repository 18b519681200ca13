//! The location of a cluster's files, and the user that PostgreSQL runs as.

use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{
        DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
    },
    path::{Path, PathBuf},
    process::Stdio,
};

use aws_lc_rs::digest;
use nix::unistd::{Gid, Uid, User, chown, geteuid};
use tokio::process::Command;

use super::{address::PORT, error::EmbeddedError};

/// The maximum length of a socket's path that all supported systems allow (Linux: 107 bytes, macOS and BSD: 103).
const SOCKET_PATH_LIMIT: usize = 103;

/// If this process runs as root and the cluster cannot be in the data directory, the cluster is in a subdirectory of
/// this directory.
const FALLBACK_HOME: &str = "/var/lib/quota";

/// Runs "$@", requests a fast shutdown when standard input ends, and exits with the status of "$@". A shell's
/// background jobs have no standard input, so the script uses descriptor 3. Background jobs ignore SIGINT until they
/// install a handler, so the script sends the signal repeatedly.
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

/// A cluster's files, and the user who owns them.
#[derive(Debug)]
pub(super) struct Place {
    /// PostgreSQL's data directory.
    pub(super) cluster: PathBuf,
    pub(super) user: RunAs,
}

/// The user that PostgreSQL runs as. `None` means the current user, which is not root.
pub(super) type RunAs = Option<User>;

impl Place {
    /// Returns the place of the existing cluster, or `None` if no cluster has been created.
    pub(super) fn find(data_dir: &Path) -> Result<Option<Self>, EmbeddedError> {
        if let Some(place) = Self::existing(&data_dir.join("postgres"))? {
            return Ok(Some(place));
        }
        if !geteuid().is_root() {
            return Ok(None);
        }
        Self::existing(&fallback_home(data_dir).join("postgres"))
    }

    /// Returns the place of the existing cluster, or chooses a place for a new cluster.
    pub(super) async fn choose(data_dir: &Path) -> Result<Self, EmbeddedError> {
        let here = data_dir.join("postgres");
        if let Some(place) = Self::find(data_dir)? {
            if place.cluster == here {
                place.check_reach(&place.cluster).await?;
            } else {
                tracing::info!(cluster = %place.cluster.display(), "the data of the private PostgreSQL is outside the data directory");
            }
            return Ok(place);
        }
        if !geteuid().is_root() {
            return Ok(Self {
                cluster: here,
                user: None,
            });
        }
        let fallback_home = fallback_home(data_dir);
        let fallback = fallback_home.join("postgres");
        let user = unprivileged_user()?;
        let place = Self {
            cluster: here,
            user: Some(user),
        };
        if place.check_reach(data_dir).await.is_ok() {
            return Ok(place);
        }
        // `/root` has mode 0700 on most machines, and Quota must also work when it is run from a checkout inside it.
        make_dir(Path::new(FALLBACK_HOME), 0o755)?;
        make_dir(&fallback_home, 0o711)?;
        tracing::warn!(
            data_dir = %data_dir.display(),
            user = place.user_name(),
            cluster = %fallback.display(),
            "the user that PostgreSQL runs as cannot access the data directory, so the data of the private PostgreSQL is in another directory"
        );
        let place = Self {
            cluster: fallback,
            ..place
        };
        place.check_reach(&fallback_home).await?;
        Ok(place)
    }

    /// Returns the cluster at `path` with its owner, or `None` if there is no cluster.
    fn existing(path: &Path) -> Result<Option<Self>, EmbeddedError> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(EmbeddedError::file("cannot inspect", path)(error)),
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

    pub(super) fn version(&self) -> Result<Option<String>, EmbeddedError> {
        let path = self.cluster.join("PG_VERSION");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.cluster.exists() => {
                Ok(None)
            }
            Err(error) => Err(EmbeddedError::file("cannot read", &path)(error)),
        }
    }

    pub(super) fn user_name(&self) -> &str {
        self.user.as_ref().map_or("", |user| user.name.as_str())
    }

    /// Checks that the user that PostgreSQL runs as can enter `dir`. Tries it as that user, because the mode bits alone
    /// do not determine access.
    pub(super) async fn check_reach(&self, dir: &Path) -> Result<(), EmbeddedError> {
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

    /// Changes the owner of `path` to the user that PostgreSQL runs as.
    pub(super) fn give(&self, path: &Path) -> Result<(), EmbeddedError> {
        let Some(user) = &self.user else {
            return Ok(());
        };
        chown(path, Some(user.uid), Some(user.gid))
            .map_err(|errno| EmbeddedError::file("cannot change the owner of", path)(errno.into()))
    }

    /// Returns a command that runs `program` under [`GUARD`], as the user that PostgreSQL runs as.
    pub(super) fn guarded(&self, program: &Path) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", GUARD, "quota-postgres-guard"])
            .arg(program)
            // Secrets in the environment must not be passed to PostgreSQL, and the PG* variables are meant for clients.
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C")
            // Ctrl-C in the terminal is meant for this process, which finishes requests in flight before it stops
            // PostgreSQL.
            .process_group(0)
            .stdin(Stdio::piped());
        if let Some(user) = &self.user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        command
    }
}

/// Creates the data directory and returns its canonical path.
pub(super) fn make_data_dir(data_dir: &Path) -> Result<PathBuf, EmbeddedError> {
    // If this process runs as root, PostgreSQL runs as another user, who must be able to reach the cluster's directory
    // inside the data directory.
    let mode = if geteuid().is_root() { 0o711 } else { 0o700 };
    make_dir(data_dir, mode).map_err(|error| EmbeddedError::NoDataDir {
        path: data_dir.to_owned(),
        source: Box::new(error),
    })?;
    fs::canonicalize(data_dir).map_err(EmbeddedError::file("cannot inspect", data_dir))
}

pub(super) fn make_dir(path: &Path, mode: u32) -> Result<(), EmbeddedError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(EmbeddedError::file("cannot create the directory", path))
}

pub(super) fn lock(data_dir: &Path) -> Result<File, EmbeddedError> {
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

/// Returns a user for a UID that has no passwd entry. Container volumes often belong to such users.
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

/// Returns the directory that contains the cluster if the cluster cannot be in `data_dir`.
fn fallback_home(data_dir: &Path) -> PathBuf {
    Path::new(FALLBACK_HOME).join(short_name(data_dir))
}

/// Returns a short name that is derived from a path and unique to that path.
fn short_name(path: &Path) -> String {
    let hash = digest::digest(&digest::SHA256, path.as_os_str().as_encoded_bytes());
    hash.as_ref()[..8]
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// Returns the directory of the socket: the cluster's directory, or a directory with a short path if the cluster's path
/// is too long for a socket.
pub(super) fn socket_dir(place: &Place) -> Result<PathBuf, EmbeddedError> {
    let length = place.cluster.as_os_str().len() + "/.s.PGSQL.".len() + PORT.len();
    if length <= SOCKET_PATH_LIMIT {
        return Ok(place.cluster.clone());
    }
    let dir = Path::new("/tmp").join(format!("quota-{}", short_name(&place.cluster)));
    match fs::DirBuilder::new().mode(0o700).create(&dir) {
        Ok(()) => place.give(&dir)?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(EmbeddedError::file("cannot create the directory", &dir)(
                error,
            ));
        }
    }
    // Any user can create files in /tmp, so an existing directory may not belong to Quota.
    let metadata =
        fs::symlink_metadata(&dir).map_err(EmbeddedError::file("cannot inspect", &dir))?;
    let owner = place.user.as_ref().map_or(geteuid(), |user| user.uid);
    if !metadata.is_dir()
        || metadata.uid() != owner.as_raw()
        || metadata.permissions().mode() & 0o077 != 0
    {
        return Err(EmbeddedError::UnsafeSocketDirectory(dir));
    }
    tracing::info!(
        socket_dir = %dir.display(),
        "the path of the data directory is too long for a socket, so the socket is in another directory"
    );
    Ok(dir)
}
