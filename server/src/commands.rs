//! The commands of the `quota` binary.

pub mod billing;
pub mod loadtest;
pub mod serve;
pub mod usage;
pub mod user;

use std::time::{Duration, Instant};

use quota_server::{
    config::Config,
    db::{
        self,
        embedded::{EmbeddedError, EmbeddedPostgres},
    },
    doctor::Report,
    telemetry::log::Log,
};
use secrecy::SecretString;

/// Returns the URL of the configured database. If none is configured, starts the private PostgreSQL and returns its
/// URL.
async fn database(config: &Config) -> anyhow::Result<(SecretString, Option<EmbeddedPostgres>)> {
    if let Some(url) = &config.database_url {
        Ok((url.clone(), None))
    } else {
        let embedded = EmbeddedPostgres::start(&config.data_dir).await?;
        Ok((SecretString::from(embedded.database_url()), Some(embedded)))
    }
}

/// Works like [`database`], but does not create the private PostgreSQL. Returns `None` if the private PostgreSQL is
/// needed but does not exist.
async fn existing_database(
    config: &Config,
) -> anyhow::Result<Option<(SecretString, Option<EmbeddedPostgres>)>> {
    if config.database_url.is_none() && !EmbeddedPostgres::is_created(&config.data_dir).await? {
        return Ok(None);
    }
    database(config).await.map(Some)
}

/// Returns whether the error means that another process, such as a running server, uses the private PostgreSQL.
fn is_in_use(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(EmbeddedError::InUse(_)))
}

/// Calls `work` with the URL of the configured database, or of the private PostgreSQL, which then runs during the call.
async fn with_database<T>(
    config: &Config,
    work: impl AsyncFnOnce(&SecretString) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let (url, embedded) = database(config).await?;
    let result = work(&url).await;
    if let Some(embedded) = embedded {
        embedded.stop().await;
    }
    result
}

/// Applies pending migrations. Retries for up to 30 s while the database cannot be reached, for example because it is
/// starting.
async fn apply_migrations(url: &SecretString) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match db::migrate(url).await {
            Ok(applied) => {
                for version in applied {
                    tracing::info!(version, "migration applied");
                }
                return Ok(());
            }
            Err(db::MigrateError::Connect(error)) if Instant::now() < deadline => {
                tracing::warn!(error = %db::chain(&error), "cannot reach PostgreSQL, retrying");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => anyhow::bail!("{}", db::chain(&error)),
        }
    }
}

pub async fn migrate(config: Config, _log: Log) -> anyhow::Result<()> {
    with_database(&config, apply_migrations).await
}

/// Checks the settings and dependencies, and prints the findings. If `DATABASE_URL` is not set and no server is running,
/// starts the private PostgreSQL, but does not create it.
pub async fn doctor(config: Config, _log: Log) -> anyhow::Result<()> {
    let mut report = Report::default();
    report.ok("settings", "valid");
    let is_running = report.addresses(&config).await;
    report.connections(&config);
    report.mail(&config).await;
    let replicas = report.redis(&config).await;
    match existing_database(&config).await {
        Err(error) if is_running && is_in_use(&error) => report.running_server(&config).await,
        Err(error) => report.failure("database", format!("{error:#}")),
        Ok(None) => report.ok(
            "database",
            "PostgreSQL is installed; the server creates its private database at the first startup",
        ),
        Ok(Some((url, embedded))) => {
            report.database(&config, replicas, &url).await;
            if let Some(embedded) = embedded {
                embedded.stop().await;
            }
        }
    }
    print!("{}", report.text);
    match report.failed {
        0 => {}
        1 => anyhow::bail!("1 check failed"),
        failed => anyhow::bail!("{failed} checks failed"),
    }
    Ok(())
}
