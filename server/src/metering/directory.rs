//! The directory of a replica's segments, and the lock that shows whether the replica is running.
//!
//! The directories of all replicas are in the `usage` folder of `QUOTA_DATA_DIR`, which replicas may share. A directory
//! belongs to the process that holds the lock on its lock file. The kernel releases the lock when that process exits,
//! for whatever reason.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use uuid::Uuid;

use super::segment::{EXTENSION, UNFINISHED};

/// The folder in `QUOTA_DATA_DIR` that contains the directories of all replicas.
pub const FOLDER: &str = "usage";
const LOCK: &str = "lock";
/// The folder for files that are not shipped but kept for the operator. It is next to the directories of the replicas.
const REJECTED: &str = "rejected";
/// The end of the name of a directory whose segments contain records of version 2. Earlier versions of the server cannot
/// read these records. They ignore such directories, because they expect the name to be only an ID.
const VERSION_2: &str = "-v2";
/// The extension of rejected files that an earlier version of the server left in the directory of their replica.
const EARLIER_EXTENSION: &str = "refused";

/// The minimum age of an unfinished directory before it is deleted. Creating a directory takes milliseconds.
const LEFT: Duration = Duration::from_hours(1);

/// A directory whose lock this process holds.
#[derive(Debug)]
pub(super) struct Directory {
    pub id: Uuid,
    pub path: PathBuf,
    /// The lock is released when this file is closed.
    _lock: File,
}

impl Directory {
    /// Creates a new directory in `root`. If `durable` is set, the directory also survives a machine crash.
    pub fn create(root: &Path, durable: bool) -> io::Result<Self> {
        if !root.exists() {
            folder(root, true)?;
            if durable && let Some(parent) = root.parent() {
                File::open(parent)?.sync_all()?;
            }
        }
        let id = Uuid::now_v7();
        let name = format!("{id}{VERSION_2}");
        let (unfinished, path) = (root.join(format!("{name}.{UNFINISHED}")), root.join(name));
        folder(&unfinished, false)?;
        let locked = (|| {
            let lock = open_lock(&unfinished)?;
            lock.try_lock()?;
            // From here on, other processes can see the directory, which is already locked.
            fs::rename(&unfinished, &path)?;
            if durable {
                File::open(root)?.sync_all()?;
            }
            Ok(lock)
        })();
        match locked {
            Ok(lock) => Ok(Self {
                id,
                path,
                _lock: lock,
            }),
            Err(error) => {
                let _ = fs::remove_dir_all(&unfinished);
                let _ = fs::remove_dir_all(&path);
                Err(error)
            }
        }
    }

    /// Takes over an existing directory. Returns `None` if a running process holds the directory's lock, or if the path
    /// is not an existing replica directory.
    pub fn adopt(path: &Path) -> io::Result<Option<Self>> {
        let Some(id) = id_of(path) else {
            return Ok(None);
        };
        let lock = match open_lock(path) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        Ok(Some(Self {
            id,
            path: path.to_owned(),
            _lock: lock,
        }))
    }

    /// Deletes unfinished files. Only the owner of the directory, which is this process, creates files in it.
    pub fn delete_unfinished(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            if path.extension().is_some_and(|it| it == UNFINISHED) {
                delete(&path)?;
            }
        }
        Ok(())
    }

    /// Deletes the directory, unless it contains more than the lock file. Returns whether the directory was deleted.
    pub fn remove(self) -> io::Result<bool> {
        for entry in fs::read_dir(&self.path)? {
            if entry?.file_name() != LOCK {
                return Ok(false);
            }
        }
        delete(&self.path.join(LOCK))?;
        fs::remove_dir(&self.path)?;
        Ok(true)
    }

    /// Moves files that an earlier version of the server set aside in this directory to the folder for rejected files.
    pub fn move_rejected(&self) -> io::Result<()> {
        for path in paths(&self.path, |path| {
            path.extension().is_some_and(|it| it == EARLIER_EXTENSION)
        })? {
            set_aside(&path)?;
        }
        Ok(())
    }
}

fn open_lock(directory: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(directory.join(LOCK))
}

/// Returns the ID of a replica's directory. Returns `None` if the path is not a replica's directory.
pub(super) fn id_of(path: &Path) -> Option<Uuid> {
    let name = path.file_name()?.to_str()?;
    Uuid::try_parse(name.strip_suffix(VERSION_2).unwrap_or(name)).ok()
}

/// Returns the directories in `root`, oldest first.
pub(super) fn list(root: &Path) -> io::Result<Vec<PathBuf>> {
    paths(root, |path| id_of(path).is_some())
}

/// Deletes directories in `root` whose creation was interrupted by a crash. Such directories do not contain records.
pub(super) fn delete_unfinished(root: &Path) -> io::Result<()> {
    let is_unfinished = |path: &Path| {
        path.extension().is_some_and(|it| it == UNFINISHED)
            && id_of(&path.with_extension("")).is_some()
    };
    for path in paths(root, is_unfinished)? {
        let changed_at = match fs::metadata(&path) {
            Ok(found) => found.modified()?,
            // The directory's owner has just renamed it, or another replica has deleted it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if changed_at.elapsed().is_ok_and(|age| age > LEFT) {
            is_gone(fs::remove_dir_all(&path))?;
        }
    }
    Ok(())
}

/// Returns the segments in a directory, oldest first.
pub(super) fn segments(directory: &Path) -> io::Result<Vec<PathBuf>> {
    paths(directory, |path| {
        path.extension().is_some_and(|it| it == EXTENSION)
    })
}

/// Moves a segment out of its directory, so that the segment is not read again but is kept for the operator.
pub(super) fn set_aside(segment: &Path) -> io::Result<()> {
    let (Some(directory), Some(name)) = (segment.parent(), segment.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let rejected = directory.parent().unwrap_or(directory).join(REJECTED);
    folder(&rejected, true)?;
    // Two directories may contain files with the same name, so the new name begins with the directory's name.
    let mut kept = directory.file_name().unwrap_or_default().to_owned();
    kept.push("-");
    kept.push(name);
    is_gone(fs::rename(segment, rejected.join(kept)))
}

/// Deletes a file, if it exists.
pub(super) fn delete(path: &Path) -> io::Result<()> {
    is_gone(fs::remove_file(path))
}

/// Treats a missing file as success.
fn is_gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn folder(path: &Path, recursive: bool) -> io::Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .recursive(recursive)
        .create(path)
}

fn paths(directory: &Path, is_wanted: impl Fn(&Path) -> bool) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if is_wanted(&path) {
            found.push(path);
        }
    }
    // The names begin with UUIDs of version 7, which sort by time.
    found.sort();
    Ok(found)
}
