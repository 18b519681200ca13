//! The desktop app from the outside: a journey through it, and what it costs.
//!
//! Called by `cargo xtask` with the compiled app and the address of a server. Everything around the app is real and
//! private: a display of its own, a session bus, a keychain, a home. All of it ends with us.

mod app;
mod bench;
mod journey;
mod keychain;
mod scan;
mod world;

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
    /// Sign up, make a plan and a key, run it dry, delete all; look for tokens where none may be
    Journey {
        app: PathBuf,
        server: String,
        /// Keeps a picture of each page
        screenshots: Option<PathBuf>,
    },
    /// Memory and the time to the first page, next to a window with nothing in it
    Bench {
        app: PathBuf,
        blank: PathBuf,
        server: String,
        #[arg(long, default_value_t = 5)]
        rounds: u32,
    },
    /// Print the refresh token that the keychain has for a server
    Token { server: String },
    /// Renew the session with a server so many times, as another process of the app would
    Renew {
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
        Task::Bench {
            app,
            blank,
            server,
            rounds,
        } => bench::run(&app, &blank, &server, rounds).await,
        Task::Token { server } => keychain::print(&server),
        Task::Renew {
            server,
            lock,
            times,
        } => keychain::renew(&server, lock, times).await,
    }
}
