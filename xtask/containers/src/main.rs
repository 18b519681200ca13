//! Builds the image, starts the Compose files, and performs an operator's tasks under load. See [`Part`].

#![expect(
    clippy::disallowed_methods,
    reason = "a task has no `Config`: it reads the environment directly"
)]

mod account;
mod backup;
mod development;
mod disturbances;
mod engine;
mod image;
mod images;
mod load;
mod production;
mod runbook;
mod usage;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Parser, ValueEnum};

use crate::{engine::Engine, image::Image, images::provide, production::Production};

#[derive(Parser)]
#[command(about = "Build the image, run the Compose files, and test them")]
struct Arguments {
    /// Put this binary into the image instead of compiling one inside
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Only build the image `quota:local`
    #[arg(long)]
    image_only: bool,
    /// Run only these parts, separated by commas
    #[arg(long, value_delimiter = ',')]
    only: Vec<Part>,
    /// Upgrade from this commit, which is compiled in debug mode, instead of from another image of this version.
    /// `migration` is the last commit before the newest migration
    #[arg(long)]
    from: Option<String>,
    /// `QUOTA_REDIS_TIMEOUT`, such as `500ms`. On a busy machine, Redis may not respond within the default time, which
    /// counts as an outage
    #[arg(long)]
    redis_timeout: Option<String>,
    /// Where images and stand-ins are kept between runs, if no container engine is already running. The path must be
    /// short, because the engine's socket is in this folder
    #[arg(long, default_value = "/var/tmp/quota-containers")]
    folder: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// `compose.prod.yml`: routes, exact limits, an upgrade, a kill and scaling under load
    Production,
    /// A backup under load, restored on an empty machine
    Backup,
    /// `compose.yml` from a fresh clone
    Development,
    /// The steps of the runbook, on a machine with nothing but Debian
    Runbook,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let has = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    let engine = Engine::start(&arguments.folder)?;
    provide(&engine, &arguments.folder, arguments.binary.is_none())?;
    let built = Image {
        tag: "quota:local",
        source: &root(),
        binary: arguments.binary.as_deref(),
        revision: "local",
    };
    built.build(&engine)?;
    image::check(&engine, &built)?;
    if arguments.image_only {
        return Ok(());
    }
    if has(Part::Production) || has(Part::Backup) {
        let upgrade = image::upgrade(
            &engine,
            &arguments.folder,
            &built,
            arguments.from.as_deref(),
        )?;
        let production = Production::up(&engine, upgrade.from, arguments.redis_timeout.as_deref())?;
        production
            .test(&upgrade, has(Part::Production), has(Part::Backup))
            .await?;
    }
    if has(Part::Development) {
        development::test(&engine, arguments.binary.as_deref()).await?;
    }
    if has(Part::Runbook) {
        runbook::test(&engine)?;
    }
    Ok(())
}
