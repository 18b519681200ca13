//! `cargo xtask bench`: what a request costs, next to servers that do nothing. See `xtask/bench`.

use std::{
    env,
    ffi::OsString,
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};

use crate::{cargo, machine, root, say, succeed};

pub(crate) fn bench(arguments: &[OsString]) -> Result<ExitCode> {
    machine::install(&[machine::POSTGRES])?;
    say("building the server and the measurement for release (a first build takes some minutes)");
    succeed(cargo().args([
        "build",
        "--release",
        "--quiet",
        "--package",
        "quota-server",
        "--bin",
        "quota",
        "--package",
        "quota-bench",
        "--bin",
        "quota-bench",
    ]))?;
    let built = target().join("release");
    let mut command = Command::new(built.join("quota-bench"));
    command.arg("run").arg(built.join("quota")).args(arguments);
    let status = command.status().context("cannot run the measurement")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Where cargo builds.
fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |it| root().join(it))
}
