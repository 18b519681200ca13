//! `quota usage`.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Subcommand;
use quota_server::{
    config::{Config, Settings},
    db::{self, Db},
    metering,
    telemetry::log::Log,
    usage_report::{self, Forgotten},
};
use uuid::Uuid;

use super::{apply_migrations, with_database};

#[derive(Subcommand)]
pub enum UsageCommand {
    /// Recover the usage that a replica left behind, and write it to PostgreSQL. Use this for a replica that will not
    /// return; a replica that starts with the same QUOTA_DATA_DIR ships this usage automatically. Nothing is counted
    /// twice, even if you run the command repeatedly or while the replica is running
    Replay {
        #[command(flatten)]
        settings: Box<Settings>,
        /// A replica's directory in `usage`, or `usage` itself to replay the directories of all replicas
        directory: PathBuf,
    },
    /// Stop waiting for the usage of a replica whose disk is lost. Usage is then considered complete without it
    Forget {
        #[command(flatten)]
        settings: Box<Settings>,
        /// The directory's ID, as shown by `quota usage`
        directory_id: Uuid,
    },
}

pub async fn report(config: Config, hours: u16, top: u16) -> anyhow::Result<()> {
    with_database(&config, async |url| {
        let db = Db::new(url, &config.database);
        match usage_report::report(&db, hours, top).await {
            Ok(report) => print!("{report}"),
            Err(error) => anyhow::bail!("cannot read usage: {}", db::chain(&error)),
        }
        Ok(())
    })
    .await
}

/// Deletes the report about a lost usage directory, unless the report is recent.
pub async fn forget(config: Config, directory: Uuid) -> anyhow::Result<()> {
    with_database(&config, async |url| {
        let db = Db::new(url, &config.database);
        match usage_report::forget(&db, directory).await {
            Ok(Forgotten::Removed(report)) => {
                print!("{}", usage_report::table(&report));
                println!("\nNo longer waiting for this usage.");
                Ok(())
            }
            Ok(Forgotten::Recent(report)) => anyhow::bail!(
                "the replica on {} reported {} s ago, so it is running: stop it, and try again after a minute",
                report.host,
                report.seconds_since_report
            ),
            Ok(Forgotten::Unknown) => anyhow::bail!(
                "there is no report for {directory}; `quota usage` shows the directories"
            ),
            Err(error) => anyhow::bail!("cannot remove the report: {}", db::chain(&error)),
        }
    })
    .await
}

pub async fn replay(config: Config, _log: Log, directory: PathBuf) -> anyhow::Result<()> {
    let directories = metering::directories(&directory)
        .with_context(|| format!("cannot read {}", directory.display()))?;
    anyhow::ensure!(
        !directories.is_empty(),
        "{} is not a usage directory",
        directory.display()
    );
    with_database(&config, async |url| {
        apply_migrations(url).await?;
        let db = Db::new(url, &config.database);
        for directory in directories {
            let replayed = replay_patiently(&config, &db, &directory).await?;
            let rest = if replayed.is_owned {
                "; the process that is using this directory will write the rest"
            } else {
                ""
            };
            println!(
                "{}: {} records written{rest}",
                directory.display(),
                replayed.records
            );
        }
        Ok(())
    })
    .await
}

/// Replays a directory. Retries for up to 30 s if PostgreSQL is unavailable or a lock times out: the directory's owner
/// or another replay may hold the cursor for longer than the lock timeout.
async fn replay_patiently(
    config: &Config,
    db: &Db,
    directory: &Path,
) -> anyhow::Result<metering::Replayed> {
    let patience = Instant::now() + Duration::from_secs(30);
    loop {
        match metering::replay(config, db, directory).await {
            Ok(replayed) => return Ok(replayed),
            Err(metering::ShipError::Database(db::DbError::Unavailable(error)))
                if Instant::now() < patience =>
            {
                tracing::warn!(error = %db::chain(error.as_ref()), "cannot write usage to PostgreSQL, retrying");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => anyhow::bail!("{}", db::chain(&error)),
        }
    }
}
