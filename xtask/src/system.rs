//! Information about the machine and the user that the standard library does not provide.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

pub(crate) fn is_root() -> bool {
    id(&["-u"]) == Some(0)
}

/// Returns a user's or group's numeric ID, as printed by `id`.
pub(crate) fn id(arguments: &[&str]) -> Option<u32> {
    let output = Command::new("id")
        .args(arguments)
        .stderr(Stdio::null())
        .output()
        .ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

/// Returns the path of a program, as the shell would find it.
pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let output = Command::new("/bin/sh")
        .args(["-c", "command -v -- \"$1\"", "sh", program])
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    path.is_absolute().then_some(path)
}
