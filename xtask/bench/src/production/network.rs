//! Runs a measurement in its own network namespace, with the settings of Caddy's container that affect connections.
//! These settings affect only the measurement.

use std::{
    env, fs,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};
use nix::unistd::Uid;

/// Tells the process that it runs in its own network namespace.
const FLAG: &str = "--in-own-network";
/// The variable that configures the Go runtime.
const GO: &str = "GODEBUG";
const COMPOSE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/compose.prod.yml");

/// Runs this process again, with the same arguments and [`FLAG`], in its own network namespace.
pub(super) fn run_again() -> Result<ExitCode> {
    let compose = fs::read_to_string(COMPOSE).context("cannot read compose.prod.yml")?;
    let setting = setting(&compose).context("compose.prod.yml has no kernel setting")?;
    let go = variable(&compose, GO).context("compose.prod.yml has no setting for Go")?;
    let mut command = Command::new("unshare");
    // Caddy inherits the variable.
    command.arg("--net").env(GO, go);
    if !Uid::effective().is_root() {
        command.args(["--user", "--map-current-user", "--keep-caps"]);
    }
    let status = command
        .args([
            "/bin/sh",
            "-c",
            "PATH=$PATH:/usr/sbin:/sbin; ip link set lo up && echo \"$2\" > \"$1\" && shift 2 && exec \"$@\"",
            "sh",
        ])
        .arg(Path::new("/proc/sys").join(setting.0.replace('.', "/")))
        .arg(setting.1)
        .arg(env::current_exe()?)
        .args(env::args_os().skip(1))
        .arg(FLAG)
        .status()
        .context("cannot run unshare")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Returns the name and value of the kernel setting in a Compose file.
fn setting(compose: &str) -> Option<(&str, &str)> {
    let mut lines = compose.lines().map(str::trim);
    let setting = lines.find_map(|line| line.strip_prefix("sysctls: {")?.strip_suffix('}'))?;
    let (name, value) = setting.split_once(':')?;
    Some((name.trim(), value.trim()))
}

/// Returns the value of an environment variable in a Compose file.
fn variable<'a>(compose: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = compose.lines().map(str::trim);
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compose_file_has_one_kernel_setting() {
        let compose = fs::read_to_string(COMPOSE).unwrap();
        let (name, value) = setting(&compose).unwrap();
        assert_eq!(name, "net.ipv4.tcp_notsent_lowat");
        assert!(value.parse::<u32>().is_ok(), "{value}");
    }

    #[test]
    fn the_compose_file_turns_off_multipath_tcp() {
        let compose = fs::read_to_string(COMPOSE).unwrap();
        assert_eq!(variable(&compose, GO), Some("multipathtcp=0"));
        assert_eq!(variable(&compose, "GODEBUGS"), None);
    }
}
