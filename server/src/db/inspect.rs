//! Reads the properties of a database for `quota doctor` and for a check at startup.

use diesel_async::{AsyncPgConnection, RunQueryDsl};
use secrecy::{ExposeSecret, SecretString};

use super::{
    connect::{connect, session},
    migrate::{MigrateError, versions},
};
use crate::config::DatabaseSettings;

/// The minimum number of connections left for other programs, such as an operator's session, a backup or a migration.
const LEFT_TO_OTHERS: usize = 10;

/// Properties of a PostgreSQL server and of Quota's database on it.
#[derive(Debug)]
pub struct ServerInfo {
    pub version: String,
    pub max_connections: usize,
    /// The number of connections reserved for superusers and, as of PostgreSQL 16, for roles chosen by the operator.
    pub reserved_connections: usize,
    /// The number of this binary's migrations that have been applied.
    pub applied: usize,
    /// The number of migrations in this binary.
    pub known: usize,
}

impl ServerInfo {
    /// Returns the maximum number of connections that all replicas together may use.
    pub fn available(&self) -> usize {
        self.max_connections
            .saturating_sub(LEFT_TO_OTHERS.max(self.reserved_connections))
    }
}

#[derive(diesel::QueryableByName)]
struct Text {
    #[diesel(sql_type = diesel::sql_types::Text)]
    text: String,
}

/// Runs a query whose rows have one column named `text`.
async fn texts(conn: &mut AsyncPgConnection, query: &str) -> Result<Vec<String>, MigrateError> {
    let rows = diesel::sql_query(query)
        .load::<Text>(conn)
        .await
        .map_err(|error| MigrateError::Failed(Box::new(error)))?;
    Ok(rows.into_iter().map(|row| row.text).collect())
}

/// Reads the server's version and limits, and counts the migrations that have been applied.
pub async fn inspect(url: &SecretString) -> Result<ServerInfo, MigrateError> {
    let settings = DatabaseSettings::default();
    let mut conn = connect(
        url.expose_secret(),
        session(&settings),
        settings.connect_timeout,
    )
    .await?;
    let server = texts(
        &mut conn,
        "SELECT unnest(ARRAY[ \
             current_setting('server_version'), \
             current_setting('max_connections'), \
             (current_setting('superuser_reserved_connections')::int \
                 + coalesce(current_setting('reserved_connections', true), '0')::int)::text \
         ]) AS text",
    )
    .await?;
    let [version, max_connections, reserved_connections] =
        <[String; 3]>::try_from(server).unwrap_or_default();
    let has_migrations = texts(
        &mut conn,
        "SELECT t::text AS text FROM to_regclass('__diesel_schema_migrations') t \
         WHERE t IS NOT NULL",
    )
    .await?;
    let known = versions();
    let applied = if has_migrations.is_empty() {
        0
    } else {
        let query = "SELECT version AS text FROM __diesel_schema_migrations";
        let applied = texts(&mut conn, query).await?;
        known.iter().filter(|it| applied.contains(it)).count()
    };
    Ok(ServerInfo {
        version,
        max_connections: max_connections.parse().unwrap_or(0),
        reserved_connections: reserved_connections.parse().unwrap_or(0),
        applied,
        known: known.len(),
    })
}
