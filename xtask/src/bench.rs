//! `cargo xtask bench`: what a request costs, next to servers that do nothing; `cargo xtask bench replicas`: what
//! holds over several replicas. See `xtask/bench`. `cargo xtask bench desktop`: what the desktop app costs, next to an
//! empty window. See `xtask/desktop`.

use std::{
    ffi::OsString,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};

use crate::{cargo, desktop, journey, machine, postgres::Throwaway, say, succeed, target};

pub(crate) fn bench(arguments: &[OsString]) -> Result<ExitCode> {
    if let Some((first, rest)) = arguments.split_first()
        && first == "desktop"
    {
        machine::install(&[&[machine::POSTGRES], &desktop::JOURNEY_NEEDS[..]].concat())?;
        return journey::on_server(|server| desktop::bench(server, rest));
    }
    let replicas = arguments.first().is_some_and(|it| it == "replicas");
    machine::install(&[machine::POSTGRES, machine::REDIS])?;
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
    let quota = built.join("quota");
    let database = if replicas {
        let database = Throwaway::start()?;
        command
            .arg("replicas")
            .arg(quota)
            .args(["--postgres", &database.url()])
            .args(&arguments[1..]);
        Some(database)
    } else {
        command.arg("run").arg(quota).args(arguments);
        None
    };
    let status = command.status().context("cannot run the measurement")?;
    drop(database);
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
