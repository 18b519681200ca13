//! `cargo xtask image`, `cargo xtask containers`: the image and what is composed of it. See `xtask/containers`.

use std::{ffi::OsString, process::ExitCode};

use anyhow::{Context as _, Result};

use crate::{cargo, machine};

pub(crate) fn run(arguments: &[OsString]) -> Result<ExitCode> {
    machine::install(&[machine::DOCKER, machine::COMPOSE, machine::DEBOOTSTRAP])?;
    let status = cargo()
        .args(["run", "--quiet", "--package", "xtask-containers", "--"])
        .args(arguments)
        .status()
        .context("cannot run cargo")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
