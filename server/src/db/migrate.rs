//! Migrations, which are compiled into the binary.

use diesel_async::{AsyncMigrationHarness, AsyncPgConnection, SimpleAsyncConnection};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};
use secrecy::{ExposeSecret, SecretString};

use super::connect::connect;
use crate::config::DatabaseSettings;

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../migrations");

/// The ID of the advisory lock that allows only one replica to migrate at a time. Other replicas wait for the lock.
const LOCK: i64 = 7_226_420;

/// A migration may take a long time, so there is no statement timeout. But a migration must not wait long for a lock,
/// since later queries on the same table would wait behind it. [`harness`] therefore sets a `lock_timeout` once it
/// holds the advisory lock.
const SESSION: &str = "SET timezone = 'UTC'; SET client_min_messages = 'warning'; \
    SET application_name = 'quota migrate'";

#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    #[error("cannot reach PostgreSQL")]
    Connect(#[from] diesel::ConnectionError),
    #[error("a migration failed")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Returns the versions of all migrations in this binary, oldest first.
pub fn versions() -> Vec<String> {
    use diesel::migration::{Migration, MigrationSource};
    let migrations = MigrationSource::<diesel::pg::Pg>::migrations(&MIGRATIONS).unwrap_or_default();
    let mut versions = migrations
        .iter()
        .map(|it| it.name().version().to_string())
        .collect::<Vec<_>>();
    versions.sort();
    versions
}

/// Applies the pending migrations and returns their versions. Requires tokio's multi-thread runtime.
pub async fn migrate(url: &SecretString) -> Result<Vec<String>, MigrateError> {
    let mut harness = harness(url).await?;
    let applied = harness
        .run_pending_migrations(MIGRATIONS)
        .map_err(MigrateError::Failed)?;
    Ok(applied.iter().map(ToString::to_string).collect())
}

/// Reverts all migrations, newest first. Requires tokio's multi-thread runtime.
pub async fn revert_all(url: &SecretString) -> Result<(), MigrateError> {
    let mut harness = harness(url).await?;
    harness
        .revert_all_migrations(MIGRATIONS)
        .map_err(MigrateError::Failed)?;
    Ok(())
}

async fn harness(
    url: &SecretString,
) -> Result<AsyncMigrationHarness<AsyncPgConnection>, MigrateError> {
    let limit = DatabaseSettings::default().connect_timeout;
    let mut conn = connect(url.expose_secret(), SESSION.into(), limit).await?;
    // The lock is held until the connection closes.
    conn.batch_execute(&format!(
        "SELECT pg_advisory_lock({LOCK}); SET lock_timeout = '5s'"
    ))
    .await
    .map_err(|error| MigrateError::Failed(Box::new(error)))?;
    Ok(AsyncMigrationHarness::new(conn))
}
