//! `cargo xtask`: the tasks of this project, written in Rust.
//!
//! Has few dependencies and does not depend on the server, because tasks run before the server is built.

#![expect(
    clippy::disallowed_methods,
    reason = "a task has no `Config` and no `Clock`: it reads the environment and the time directly"
)]

mod advisories;
mod bench;
mod check;
mod console;
mod containers;
mod deb;
mod dependencies;
mod desktop;
mod fuzz;
mod generate;
mod instructions;
mod journey;
mod links;
mod lock;
mod machine;
mod optimized;
mod postgres;
mod run;
mod schema;
mod system;
mod test;
mod test_server;
mod up;

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Quota's development tasks")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Build the server and run it with a private PostgreSQL and demo data in ./.quota
    Run {
        /// Additional arguments for `quota serve`, after `--`
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Build the server and run a production-like deployment on this machine: two replicas behind Caddy with TLS, a
    /// private PostgreSQL, Redis, and demo data in ./.quota/up
    Up {
        /// Options, such as `--replicas N` and `--port N`; `--help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run all tests, or those that the arguments select
    Test {
        /// Filters and options for the test runner (nextest if it is installed, otherwise `cargo test`)
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Measure the cost of a request, compared with a plain poem server and a plain hyper server. `bench replicas`
    /// measures the behavior of several replicas. `bench simulation 20000` runs the limiter in simulated time with
    /// 20,000 seeds. `bench differential` compares direct responses with those of hyper in a million cases (or `bench
    /// differential 10000`). `bench malformed 100000` sends 100,000 malformed requests. `bench instructions` counts the
    /// instructions of a decision's parts and compares them with the counts in the repository (`bench instructions
    /// --write` writes these counts). `bench desktop` measures the memory and startup time of the desktop app, compared
    /// with an empty window. `bench usage` measures writing and reading usage with 10 million rows (or `bench usage
    /// 1000000`). `bench keys` measures listing and searching 300,000 keys. `bench memory` measures the memory of a
    /// cached key. `bench scale` measures what becomes slower with up to a million keys (or `bench scale 10000`).
    /// `bench crash 300` kills servers, Redis and PostgreSQL 300 times under load and recounts the usage. `bench
    /// restarts 20` restarts replicas behind Caddy 20 times under load and recounts requests and usage. `bench
    /// metering` measures the cost of recording usage. `bench latency` measures response times at a constant rate.
    /// `bench tracing` measures the cost of traces. `bench gateways` compares plain proxies with gateways that check
    /// every request with Quota. `bench peers` compares Quota with other rate limiters and writes `docs/bench`. `bench
    /// slow-clients` measures response times and memory while 2,000 clients are slow. `bench webhooks 2000 10` sends
    /// 2,000 Stripe webhooks per second for 10 s. `bench outage` stops PostgreSQL for a minute under load
    Bench {
        /// Options of the benchmark, such as `--rounds N` and `--millis N`, or `--only faults` after `replicas`;
        /// `--help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Feed random bytes to the parser of plain requests, and compare the results with those of hyper
    Fuzz {
        /// How long to run
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Build the console for the browser; the next build of the server embeds it
    Console,
    /// Build the desktop app and connect it to the running server
    Desktop {
        /// Arguments for the app, after `--`: `--server ADDRESS`
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Build the desktop app and package it as .deb and .rpm
    Bundle {
        /// Afterward, install, start and remove the .deb, and compare its files with those of the .rpm
        #[arg(long)]
        test: bool,
        /// Package an unoptimized build, which compiles faster
        #[arg(long)]
        debug: bool,
    },
    /// Build the server with all optimizations, as the image and the package contain it
    Build {
        /// Link it statically, as in the image
        #[arg(long = "static")]
        is_static: bool,
        /// Copy it to this path
        #[arg(long)]
        output: Option<PathBuf>,
    },
    /// Record the profile with which `build` optimizes the server, in deploy/profile
    Profile,
    /// Package the server as a .deb, with its systemd units
    Deb {
        /// Package this binary instead of compiling one
        #[arg(long)]
        binary: Option<PathBuf>,
        /// Also install, start, upgrade and remove the package in a minimal Debian system; requires root
        #[arg(long)]
        test: bool,
    },
    /// Build everything and run the end-to-end tests in Chromium and in the desktop app; QUOTA_SCREENSHOTS=DIRECTORY
    /// saves a screenshot of every page. `journey walk` saves screenshots of every page and form at six widths instead
    Journey {
        /// Run only these parts of the test in Chromium, such as `tour` or `billing`
        parts: Vec<String>,
    },
    /// Build everything and take new screenshots for the README and the landing page
    Pictures,
    /// Build the container image `quota:local`
    Image,
    /// Build the image and run the production compose file: upgrade, kill and scale its replicas under load, and
    /// restore a backup on an empty machine. Then run the development compose file from a fresh clone, and follow the
    /// runbook on a machine with nothing but Debian
    Containers {
        /// Options, such as `--only production,backup,development,runbook`, `--from migration` to upgrade from the
        /// version before the newest migration, or `--binary FILE` to put that binary into the image instead of
        /// compiling one inside; `--help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Check formatting, lints, lock files, security advisories, documentation, unused dependencies, links,
    /// generated files and instruction counts
    Check,
    /// Write all generated files: server/src/schema.rs, openapi.json, .env.example
    Generate,
}

fn main() -> ExitCode {
    let done = match Cli::parse().chore {
        Chore::Run { arguments } => run::run(&arguments),
        Chore::Up { arguments } => up::up(&arguments),
        Chore::Test { arguments } => test::test(&arguments),
        Chore::Bench { arguments } => bench::bench(&arguments),
        Chore::Fuzz { seconds } => fuzz::run(seconds).map(|()| ExitCode::SUCCESS),
        Chore::Console => console::build().map(|()| ExitCode::SUCCESS),
        Chore::Desktop { arguments } => desktop::start(&arguments),
        Chore::Bundle { test, debug } => desktop::bundle(test, debug).map(|()| ExitCode::SUCCESS),
        Chore::Build { is_static, output } => {
            optimized::build_to(output.as_deref(), is_static).map(|()| ExitCode::SUCCESS)
        }
        Chore::Profile => optimized::record().map(|()| ExitCode::SUCCESS),
        Chore::Deb { binary, test } => deb::deb(binary, test).map(|()| ExitCode::SUCCESS),
        Chore::Journey { parts } => journey::alone(&parts),
        Chore::Pictures => journey::pictures(),
        Chore::Image => containers::run(&["--image-only".into()]),
        Chore::Containers { arguments } => containers::run(&arguments),
        Chore::Check => check::check().map(|()| ExitCode::SUCCESS),
        Chore::Generate => generate::write().map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Returns the workspace's root.
fn root() -> PathBuf {
    let own = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    own.parent().map(Path::to_owned).unwrap_or(own)
}

/// Returns cargo's target directory.
fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |it| root().join(it))
}

/// Returns a command that runs the cargo that started this process, in the workspace's root.
fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Prints a progress message on standard error.
fn say(what: &str) {
    eprintln!("xtask: {what}");
}

/// Runs a command. Errors contain the command.
fn succeed(command: &mut Command) -> Result<()> {
    let text = shown(command);
    let status = command
        .status()
        .with_context(|| format!("cannot run `{text}`"))?;
    if !status.success() {
        bail!("`{text}` failed ({status})");
    }
    Ok(())
}

/// Returns the output of a command. Errors contain the command and its standard error.
fn read(command: &mut Command) -> Result<String> {
    let text = shown(command);
    let output = command
        .output()
        .with_context(|| format!("cannot run `{text}`"))?;
    if !output.status.success() {
        bail!(
            "`{text}` failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("the output of `{text}` is not UTF-8"))
}

fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy()];
    words.extend(
        command
            .get_args()
            .map(|argument| argument.to_string_lossy()),
    );
    if let Some(cargo) = words[0].strip_suffix("/cargo").map(|_| "cargo".into()) {
        words[0] = cargo;
    }
    words.join(" ")
}
