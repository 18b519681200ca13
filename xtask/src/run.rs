//! `cargo xtask run`: builds and starts a server with demo data from a fresh clone.

use std::{env, ffi::OsString, os::unix::process::CommandExt as _, process::ExitCode};

use anyhow::{Context as _, Result};

use crate::{cargo, console, machine, say};

/// Builds and starts the server. With `--billing`, the server uses a stand-in for Stripe, whose pages can be used in a
/// browser.
pub(crate) fn run(arguments: &[OsString]) -> Result<ExitCode> {
    let with_billing = arguments.iter().any(|it| it == "--billing");
    let arguments = arguments.iter().filter(|it| *it != "--billing");
    machine::install(&[machine::POSTGRES])?;
    console::build()?;
    say("building the server (a first build takes a few minutes)");
    // Uses `exec`, as `cargo run` does, so that the server receives the signals and its exit code is returned.
    let mut command = cargo();
    if env::var_os("QUOTA_LOG_FORMAT").is_none() {
        // Text is easier to read in a terminal.
        command.env("QUOTA_LOG_FORMAT", "text");
    }
    if with_billing {
        command.args([
            "run",
            "--quiet",
            "--package",
            "quota-fake-stripe",
            "--",
            "cargo",
        ]);
    }
    let error = command
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
