//! The desktop app: `cargo xtask desktop` starts it, `cargo xtask bundle` packages it.

use std::{
    env,
    ffi::OsString,
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};

use crate::{cargo, console, machine, read, root, say, succeed};

/// The address of `cargo xtask run`.
const RUNNING: &str = "http://localhost:8080";

/// The programs and libraries required to compile the app.
pub(crate) const NEEDS: [machine::Need; 1] = [machine::WEBKIT];

/// The programs required by its end-to-end test.
pub(crate) const JOURNEY_NEEDS: [machine::Need; 5] = [
    machine::WEBKIT,
    machine::WEBKIT_DRIVER,
    machine::XVFB,
    machine::DBUS,
    machine::KEYRING,
];

/// The crates that use the app's libraries.
const PACKAGES: [&str; 2] = ["quota-desktop", "xtask-desktop"];

/// Arguments that select all other crates.
pub(crate) fn without<'a>(all: &'a str, more: &'a str) -> Vec<&'a str> {
    let mut arguments = vec![all];
    arguments.extend(PACKAGES.iter().flat_map(|it| ["--exclude", *it]));
    arguments.push(more);
    arguments.retain(|it| !it.is_empty());
    arguments
}

/// Arguments that select only these crates.
pub(crate) fn alone(more: &str) -> Vec<&str> {
    let mut arguments: Vec<&str> = PACKAGES.iter().flat_map(|it| ["--package", *it]).collect();
    arguments.push(more);
    arguments.retain(|it| !it.is_empty());
    arguments
}

pub(crate) fn start(arguments: &[OsString]) -> Result<ExitCode> {
    machine::install(&NEEDS)?;
    console::build_for_desktop()?;
    say("building the desktop app (a first build takes a few minutes)");
    let mut command = cargo();
    command.args(["run", "--quiet", "--package", "quota-desktop", "--"]);
    if arguments.is_empty() {
        let running = env::var_os("QUOTA_PUBLIC_URL").unwrap_or_else(|| RUNNING.into());
        command.arg("--server").arg(running);
    }
    let error = command.args(arguments).exec();
    Err(error).context("cannot run cargo")
}

fn build_release(targets: &[&str]) -> Result<()> {
    say("building the desktop app for release (a first build takes a few minutes)");
    let options = ["--quiet", "--release", "--package", "quota-desktop"];
    succeed(cargo().arg("build").args(options).args(targets))
}

pub(crate) fn bundle() -> Result<()> {
    machine::install(&NEEDS)?;
    console::build_for_desktop()?;
    build_release(&[])?;
    let built = console::target_directory()?;
    let out = built.join("bundle");
    std::fs::create_dir_all(&out)?;
    // It is installed along with the C compiler.
    let program = out.join("quota-desktop");
    succeed(
        Command::new("strip")
            .arg("--strip-all")
            .arg("-o")
            .arg(&program)
            .arg(built.join("release/quota-desktop")),
    )?;
    let libc = read(Command::new("getconf").arg("GNU_LIBC_VERSION"))?;
    let libc = libc.trim().trim_start_matches("glibc ");
    succeed(
        cargo()
            .args(["run", "--quiet", "--package", "xtask-bundle", "--"])
            .arg(&program)
            .arg(root().join("desktop/shell"))
            .arg(libc)
            .arg(&out),
    )
}

/// Runs the end-to-end test of the app against a running server. Returns `false` if it failed and has reported why.
pub(crate) fn journey(server: &str) -> Result<bool> {
    console::build_for_desktop()?;
    say("building the desktop app (a first build takes a few minutes)");
    succeed(cargo().args(["build", "--quiet"]).args(alone("--bins")))?;
    say("the journey through the desktop app");
    let built = console::target_directory()?.join("debug");
    let status = Command::new(built.join("xtask-desktop"))
        .arg("journey")
        .arg(built.join("quota-desktop"))
        .arg(server)
        .args(env::var_os("QUOTA_SCREENSHOTS"))
        .status()
        .context("cannot run the journey")?;
    Ok(status.success())
}

/// Measures the cost of the app, compared with an empty window.
pub(crate) fn bench(server: &str, arguments: &[OsString]) -> Result<ExitCode> {
    console::build_for_desktop()?;
    build_release(&["--bin", "quota-desktop", "--example", "blank"])?;
    succeed(cargo().args(["build", "--quiet", "--package", "xtask-desktop"]))?;
    let built = console::target_directory()?;
    let status = Command::new(built.join("debug/xtask-desktop"))
        .arg("bench")
        .arg(built.join("release/quota-desktop"))
        .arg(built.join("release/examples/blank"))
        .arg(server)
        .args(arguments)
        .status()
        .context("cannot run the measurement")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
