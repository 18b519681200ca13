//! `cargo xtask run`: from a fresh clone to a server with demo data.

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::ExitCode};

use anyhow::{Context as _, Result};

use crate::{cargo, machine, say};

pub(crate) fn run(arguments: &[OsString]) -> Result<ExitCode> {
    machine::install(&[machine::POSTGRES])?;
    say("building the server (a first build takes some minutes)");
    // `exec`, as cargo itself does in turn: the server gets the signals meant for us, and its exit code
    // is ours.
    let error = cargo()
        .args([
            "run",
            "--quiet",
            "--package",
            "quota-server",
            "--bin",
            "quota",
            "--",
            "serve",
            "--demo",
        ])
        .args(arguments)
        .exec();
    Err(error).context("cannot run cargo")
}
