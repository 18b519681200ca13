//! Reads the lock files, and compares the versions in them.

use std::{collections::BTreeSet, fs};

use anyhow::{Context as _, Result, ensure};
use semver::Version;
use toml::{Table, Value};

use crate::root;

/// The lock files of the workspace and of the fuzz target, which is a workspace of its own.
pub(crate) const FILES: [&str; 2] = ["Cargo.lock", "server/fuzz/Cargo.lock"];
/// The crates with which the fuzz target checks the server's parser. The server must use the same versions.
const ORACLE: [&str; 2] = ["httparse", "hyper"];

/// Checks that the fuzz target and the server use the same versions of the crates in [`ORACLE`].
pub(crate) fn check() -> Result<()> {
    let read = |file: &str| locked(&fs::read_to_string(root().join(file))?);
    let [server, fuzz] = [read(FILES[0])?, read(FILES[1])?];
    for package in fuzz.iter().filter(|it| ORACLE.contains(&it.0.as_str())) {
        ensure!(
            server.contains(package),
            "{} has {} {}, which is not the server's version",
            FILES[1],
            package.0,
            package.1
        );
    }
    Ok(())
}

/// Returns the packages of a lock file that come from a registry, with their versions.
pub(crate) fn locked(lock: &str) -> Result<Vec<(String, Version)>> {
    let lock: Table = lock.parse()?;
    let packages = lock
        .get("package")
        .and_then(Value::as_array)
        .context("no packages in Cargo.lock")?;
    let mut locked = BTreeSet::new();
    for package in packages
        .iter()
        .filter(|package| package.get("source").is_some())
    {
        let field = |name: &str| {
            package
                .get(name)
                .and_then(Value::as_str)
                .context("an unrecognized package in Cargo.lock")
        };
        let version = Version::parse(field("version")?)?;
        locked.insert((field("name")?.to_owned(), version));
    }
    Ok(locked.into_iter().collect())
}
