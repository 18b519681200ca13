//! Tests and measures the desktop app from outside.
//!
//! Called by `cargo xtask` with the compiled app and the address of a server. The app runs in a real but private
//! environment: its own display, session bus, keychain and home directory, which are removed at the end.

mod alerts;
mod app;
mod bench;
mod journey;
mod keychain;
mod notifications;
mod scan;
mod world;
mod x11;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Register, create a plan and a key, use up its limit, delete everything; search for leaked tokens
    Journey {
        app: PathBuf,
        server: String,
        /// Save a screenshot of each page in this folder
        screenshots: Option<PathBuf>,
    },
    /// Start the app, create an account on a server and quit
    Start { app: PathBuf, server: String },
    /// Measure memory and time to first paint, compared with an empty window
    Bench {
        app: PathBuf,
        blank: PathBuf,
        server: String,
        #[arg(long, default_value_t = 5)]
        rounds: u32,
    },
    /// Print the refresh token stored in the keychain for a server
    Token { server: String },
    /// Refresh the session with a server TIMES times, as a second instance of the app would
    Refresh {
        server: String,
        lock: PathBuf,
        times: u32,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Cli::parse().task).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(task: Task) -> Result<()> {
    match task {
        Task::Journey {
            app,
            server,
            screenshots,
        } => journey::run(&app, &server, screenshots.as_deref()).await,
        Task::Start { app, server } => journey::start(&app, &server).await,
        Task::Bench {
            app,
            blank,
            server,
            rounds,
        } => bench::run(&app, &blank, &server, rounds).await,
        Task::Token { server } => keychain::print(&server),
        Task::Refresh {
            server,
            lock,
            times,
        } => keychain::refresh(&server, lock, times).await,
    }
}
