//! End-to-end tests of the console, in a browser and in the desktop app, against the real server with its private
//! PostgreSQL.

use std::{
    ffi::OsStr,
    fs,
    path::PathBuf,
    process::{Command, ExitCode, ExitStatus},
};

use anyhow::{Context as _, Result};

use crate::{
    console, desktop, machine,
    postgres::Throwaway,
    root, say, succeed, system,
    test_server::{Redis, Server, build_server, on_server},
};

/// Returns the programs and libraries that the tests require in addition to those of the server.
pub(crate) fn needs() -> Vec<machine::Need> {
    let browser = [
        machine::CHROMIUM,
        machine::NODE,
        machine::NPM,
        machine::REDIS,
    ];
    [&browser[..], &desktop::JOURNEY_NEEDS].concat()
}

/// `cargo xtask journey`: builds the console and the server, and then runs only the end-to-end tests, or only some
/// parts of the tests in the browser.
pub(crate) fn alone(parts: &[String]) -> Result<ExitCode> {
    machine::install(&[&[machine::POSTGRES], &needs()[..]].concat())?;
    console::build()?;
    let has_passed = if parts.is_empty() {
        run()?
    } else {
        install_packages()?;
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let screenshots = std::env::var_os("QUOTA_SCREENSHOTS");
        on_server(|address| browse(address, None, screenshots.as_deref(), &parts))?.success()
    };
    Ok(if has_passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// `cargo xtask pictures`: takes new screenshots for `desktop/pictures`.
pub(crate) fn pictures() -> Result<ExitCode> {
    let needs = [
        machine::POSTGRES,
        machine::CHROMIUM,
        machine::NODE,
        machine::NPM,
    ];
    machine::install(&needs)?;
    console::build()?;
    install_packages()?;
    let folder = root().join("desktop/pictures");
    let status =
        on_server(|address| browse(address, None, Some(folder.as_os_str()), &["pictures"]))?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs the tests. Returns `false` if they failed. The tests themselves report the reason.
pub(crate) fn run() -> Result<bool> {
    install_packages()?;
    build_server()?;
    let server = Server::start(&[])?;
    say("running the end-to-end tests in Chromium");
    let screenshots = std::env::var_os("QUOTA_SCREENSHOTS");
    let screenshots = screenshots.as_deref();
    let status = browse(&server.address, None, screenshots, &[])?;
    // All tests run, even if an earlier one fails.
    let counted = recount(screenshots)?;
    let in_app = desktop::journey(&server.address)?;
    Ok(status.success() && counted && in_app)
}

/// Compares what the console shows with a test client's log of its requests to two replicas. Returns `false` if the
/// test failed.
fn recount(screenshots: Option<&OsStr>) -> Result<bool> {
    let database = Throwaway::start()?;
    let redis = Redis::start()?;
    let shared = [
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", redis.url()),
        (
            "QUOTA_SECRET",
            "only for the end-to-end tests, on loopback".into(),
        ),
    ];
    let first = Server::start(&shared)?;
    let second = Server::start(&shared)?;
    let status = browse(
        &first.address,
        Some(&second.address),
        screenshots,
        &["recount"],
    )?;
    Ok(status.success())
}

/// Runs parts of the journey, or all of it, against a server.
fn browse(
    address: &str,
    second: Option<&str>,
    screenshots: Option<&OsStr>,
    parts: &[&str],
) -> Result<ExitStatus> {
    let chromium = system::on_path("chromium").context("Chromium is not installed")?;
    Command::new("node")
        .current_dir(root().join("desktop/e2e"))
        .envs(second.map(|it| ("SECOND_REPLICA", it)))
        .arg("journey.mjs")
        .arg(chromium)
        .arg(address)
        // The parts follow the folder for screenshots, so without a folder an empty argument takes its place.
        .arg(screenshots.unwrap_or_default())
        .args(parts)
        .status()
        .context("cannot run node")
}

/// Installs the packages that the tests in the browser need, if they are missing or have changed.
fn install_packages() -> Result<()> {
    let folder = root().join("desktop/e2e");
    let lock = folder.join("package-lock.json");
    let installed = folder.join("node_modules/.package-lock.json");
    let modified = |path: &PathBuf| fs::metadata(path).and_then(|it| it.modified()).ok();
    if modified(&installed).is_none_or(|at| Some(at) < modified(&lock)) {
        succeed(Command::new("npm").current_dir(&folder).args([
            "ci",
            "--no-audit",
            "--no-fund",
            "--loglevel=error",
        ]))
        .context("the browser tests need two npm packages")?;
    }
    Ok(())
}
