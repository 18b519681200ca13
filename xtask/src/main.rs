//! `cargo xtask`: every chore of this project, in Rust, with no other tool needed first.
//!
//! Few dependencies, and none on the server: a chore begins before the server is built.

#![expect(
    clippy::disallowed_methods,
    reason = "a chore has no `Config` and no `Clock`: it reads the environment and the time as it is"
)]

mod advisories;
mod bench;
mod check;
mod console;
mod containers;
mod dependencies;
mod desktop;
mod generate;
mod journey;
mod links;
mod machine;
mod postgres;
mod run;
mod schema;
mod system;
mod test;

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Quota's chores")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Build the server and run it with a private PostgreSQL and demo data in ./.quota
    Run {
        /// More arguments for `quota serve`, after `--`
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Run all tests, or those that the arguments pick
    Test {
        /// Filters and options for the test runner (nextest where it is installed, else `cargo test`)
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Measure what a request costs, next to a bare poem and a bare hyper server; prints a table.
    /// `bench replicas` measures what holds over several replicas on one Redis, `bench simulation`
    /// plays the limiter in simulated time (`bench simulation 20000`: so many seeds), `bench desktop`
    /// measures the desktop app's memory and start next to an empty window, `bench usage` how fast usage is appended and
    /// read at 10 million rows (`bench usage 1000000`: so many), `bench crash 300` kills servers, Redis and PostgreSQL so
    /// often under load and recounts the usage, `bench metering` measures what recording usage costs
    Bench {
        /// Options for the measurement: `--rounds N`, `--millis N`; after `replicas` its own, such as
        /// `--only faults`; `--help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Build the console for the browser; the next build of the server embeds it
    Console,
    /// Build the desktop app and start it on the running server
    Desktop {
        /// Arguments for the app, after `--`: `--server ADDRESS`
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Build the desktop app and pack it as .deb and .rpm
    Bundle,
    /// Build all and go through the console in Chromium and in the desktop app; QUOTA_SCREENSHOTS=FOLDER keeps pictures of every page
    Journey,
    /// Build all and take the pictures of the README and the landing page anew
    Pictures,
    /// Build the container image `quota:local`
    Image,
    /// Build the image, run the production compose file with Caddy, PostgreSQL and Redis, and test it under load
    Containers {
        /// Options: `--binary FILE` puts that binary into the image in place of compiling one inside
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Check formatting, lints, documentation, unused dependencies, links and generated files
    Check,
    /// Write all generated files: server/src/schema.rs, openapi.json, .env.example
    Generate,
}

fn main() -> ExitCode {
    let done = match Cli::parse().chore {
        Chore::Run { arguments } => run::run(&arguments),
        Chore::Test { arguments } => test::test(&arguments),
        Chore::Bench { arguments } => bench::bench(&arguments),
        Chore::Console => console::build().map(|()| ExitCode::SUCCESS),
        Chore::Desktop { arguments } => desktop::start(&arguments),
        Chore::Bundle => desktop::bundle().map(|()| ExitCode::SUCCESS),
        Chore::Journey => journey::alone(),
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

/// The workspace's root.
fn root() -> PathBuf {
    let own = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    own.parent().map(Path::to_owned).unwrap_or(own)
}

/// Where cargo builds.
fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |it| root().join(it))
}

/// The cargo that started us, in the workspace's root.
fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Says on standard error what is done.
fn say(what: &str) {
    eprintln!("xtask: {what}");
}

/// Runs a command to its end; an error names it.
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

/// What a command prints; an error names it and what it printed on standard error.
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
    String::from_utf8(output.stdout).with_context(|| format!("`{text}` printed no UTF-8"))
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
