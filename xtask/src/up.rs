//! `cargo xtask up`: a production-like deployment on this machine, without containers. See
//! `xtask/bench/src/production`.

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::Command, process::ExitCode};

use anyhow::{Context as _, Result};

use crate::{cargo, console, machine, postgres, say, succeed, target};

pub(crate) fn up(arguments: &[OsString]) -> Result<ExitCode> {
    machine::install(&machine::PRODUCTION)?;
    console::build()?;
    say("building the server (a first build takes a few minutes)");
    succeed(
        cargo()
            .args(["build", "--quiet"])
            .args(["--package", "quota-server", "--bin", "quota"])
            .args(["--package", "quota-bench", "--bin", "quota-bench"]),
    )?;
    let built = target().join("debug");
    // Uses `exec`, so that the new program receives the signals and its exit code is returned.
    let error = Command::new(built.join("quota-bench"))
        .arg("up")
        .arg(built.join("quota"))
        .args(production_arguments()?)
        .args(arguments)
        .exec();
    Err(error).context("cannot run quota-bench")
}

/// Returns the arguments with which `quota-bench` finds the programs of the deployment.
pub(crate) fn production_arguments() -> Result<Vec<OsString>> {
    let programs = postgres::binaries().context("no PostgreSQL is installed")?;
    Ok(vec![
        "--programs".into(),
        programs.into(),
        "--tools".into(),
        target().join("tools").into(),
    ])
}
