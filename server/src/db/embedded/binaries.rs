//! Finds the PostgreSQL programs on this machine, and creates a cluster with these programs.

use std::{
    cmp::Reverse,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::Stdio,
};

use tokio::process::{Child, Command};

use super::{
    address::NAME,
    error::EmbeddedError,
    place::{Place, make_dir},
};

/// The programs of one PostgreSQL version.
#[derive(Debug, Clone)]
pub(super) struct Binaries {
    pub(super) dir: PathBuf,
    /// The version in the format of a cluster's `PG_VERSION`, such as `15`.
    pub(super) version: String,
}

/// Returns the PostgreSQL servers found through `pg_config`, in `PATH` and in the directories of packages, in order of
/// preference.
pub(super) async fn installed_binaries() -> Vec<Binaries> {
    let mut places = Vec::new();
    // Servers found through `pg_config` and `PATH` are preferred. `pg_config` is also part of the client library, so
    // its directory may not contain a server.
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
        // Example output: postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)
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

/// Returns the trimmed output of a command, or `None` if it fails or prints nothing.
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

pub(super) fn matching(
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

/// Creates the cluster in a temporary directory and renames that directory when it is complete, so that a crash does
/// not leave a broken cluster behind.
pub(super) async fn initdb(bin: &Path, place: &Place) -> Result<(), EmbeddedError> {
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
    tracing::info!(cluster = %place.cluster.display(), "creating the private PostgreSQL");
    let program = bin.join("initdb");
    let child = place
        .guarded(&program)
        .arg("-D")
        .arg(&new)
        .args([
            &format!("--username={NAME}"),
            // No password is needed, because the permissions of the socket's directory restrict access.
            "--auth-local=trust",
            "--auth-host=reject",
            "--encoding=UTF8",
            // Without a locale, text is sorted by its bytes. A locale's sort order may change with the C library, which
            // would corrupt indexes.
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
    fs::rename(&new, &place.cluster)
        .map_err(EmbeddedError::file("cannot create", &place.cluster))?;
    // The rename must survive a power failure, like the files themselves.
    File::open(home)
        .and_then(|dir| dir.sync_all())
        .map_err(EmbeddedError::file("cannot write", home))
}

/// Waits like [`Child::wait_with_output`], but keeps standard input open: closing it would make the guard script stop
/// `initdb`.
async fn wait_with_output(mut child: Child) -> io::Result<std::process::Output> {
    let pipe = child.stdin.take();
    let output = child.wait_with_output().await;
    drop(pipe);
    output
}
