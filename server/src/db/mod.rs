//! PostgreSQL: the pools, transactions with their role, migrations, names of constraints.
//!
//! The connections of a replica are divided into lanes ([`Lane`]), each with a pool of its own, so that a flood of
//! one kind of work never makes another wait for a connection.
//!
//! The server signs in with whatever role `DATABASE_URL` names and works as one of two others: `quota_app`,
//! which row-level security binds to the one tenant of the transaction, and `quota_system`, for what no
//! tenant asked for (sign-in, look-ups by secret, sweeps). A transaction that is dropped, also because its
//! caller went away in the middle of a query, is rolled back before its connection serves again.
//!
//! When PostgreSQL is away, everything here fails with [`DbError::Unavailable`] within a few seconds.

pub mod embedded;

use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
    time::Duration,
};

use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel_async::{
    AsyncMigrationHarness, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection,
    pooled_connection::{
        AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod,
        deadpool::{Object, Pool},
    },
};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};
use futures_util::{FutureExt, future::BoxFuture};
use quota_common::TenantId;
use secrecy::{ExposeSecret, SecretString};

use crate::config::DatabaseSettings;

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("../migrations");

/// Only one replica migrates at a time; the others wait for it.
const MIGRATION_LOCK: i64 = 7_226_420;

/// How long a transaction may rest between two statements.
const IDLE_IN_TRANSACTION: Duration = Duration::from_secs(5);
/// How long a connection may rest before it is asked whether it still stands, how long between two such questions,
/// and how many may stay without an answer.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(5), 3);
/// A connection on which sent bytes are not acknowledged for this long is ended by the kernel.
const UNACKNOWLEDGED: Duration = Duration::from_secs(5);
/// How long taking back a transaction may take.
const ROLLBACK: Duration = Duration::from_secs(2);
/// How long the first answer on a pooled connection may take. A PostgreSQL that hangs takes every byte and says
/// nothing, which no timeout of TCP's or its own ends.
const FIRST_ANSWER: Duration = Duration::from_secs(2);

/// A query failed.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// PostgreSQL is away, stopping, or too slow to answer, or the transaction lost to another one (a lock timeout,
    /// a deadlock, a serialization failure): the same request may succeed when it is sent again.
    #[error("PostgreSQL is unavailable")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A named constraint refused the change.
    #[error("constraint {0}")]
    Constraint(String),
    #[error("the query failed")]
    Query(#[source] DieselError),
}

impl From<DieselError> for DbError {
    fn from(error: DieselError) -> Self {
        if let DieselError::DatabaseError(kind, info) = &error {
            if let Some(name) = info.constraint_name() {
                return Self::Constraint(name.to_owned());
            }
            // diesel tells these apart by their text alone. One in another language is an error of ours instead.
            let message = info.message();
            let away = [
                "statement timeout",
                "lock timeout",
                "deadlock detected",
                "terminating connection",
                "the database system is",
                "connection closed",
                // The row's partition was created after the statement had looked for it.
                "violates partition constraint",
            ]
            .iter()
            .any(|part| message.contains(part));
            if matches!(
                kind,
                DatabaseErrorKind::ClosedConnection
                    | DatabaseErrorKind::UnableToSendCommand
                    | DatabaseErrorKind::SerializationFailure
            ) || away
            {
                return Self::Unavailable(Box::new(error));
            }
        }
        Self::Query(error)
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<deadpool::managed::PoolError<E>>
    for DbError
{
    fn from(error: deadpool::managed::PoolError<E>) -> Self {
        Self::Unavailable(Box::new(error))
    }
}

/// What a connection is used for. Each lane has a pool of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Management, sign-in and background work that may wait.
    Requests,
    /// Look-ups of API keys and service tokens, which strangers can cause.
    Lookups,
    /// The quota ledger.
    Ledger,
    /// What the health of the whole depends on: the poll for invalidations, counting replicas, readiness.
    Health,
}

/// How many connections each lane has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lanes {
    pub requests: usize,
    pub lookups: usize,
    pub ledger: usize,
    pub health: usize,
}

impl Lanes {
    /// Divides `total` connections, of which there are at least five.
    pub fn divide(total: usize) -> Self {
        let health = if total < 8 { 1 } else { 2 };
        // Two, so that returned tokens never keep a take waiting, unless others had none then.
        let ledger = (total * 3 / 16).max(if total < 7 { 1 } else { 2 });
        let lookups = (total / 4).max(2);
        Self {
            requests: total.saturating_sub(health + ledger + lookups).max(1),
            lookups,
            ledger,
            health,
        }
    }
}

impl std::fmt::Display for Lanes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} for requests, {} for key look-ups, {} for the quota ledger, {} for invalidations and readiness",
            self.requests, self.lookups, self.ledger, self.health
        )
    }
}

type ConnectionPool = Pool<AsyncPgConnection>;

struct Pools {
    requests: ConnectionPool,
    lookups: ConnectionPool,
    ledger: ConnectionPool,
    health: ConnectionPool,
}

impl Pools {
    fn all(&self) -> [&ConnectionPool; 4] {
        [&self.requests, &self.lookups, &self.ledger, &self.health]
    }
}

/// The pools, and the one of them that this handle draws from. Cheap to clone.
#[derive(Clone)]
pub struct Db {
    pools: Arc<Pools>,
    lane: Lane,
    lanes: Lanes,
    statement_timeout: Duration,
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db")
            .field("lane", &self.lane)
            .finish_non_exhaustive()
    }
}

impl Db {
    /// Creates the pools; connects when first used. Draws from [`Lane::Requests`].
    pub fn new(url: &SecretString, settings: &DatabaseSettings) -> Self {
        let lanes = Lanes::divide(settings.pool);
        let pool = |size| pool(url, settings, size);
        Self {
            pools: Arc::new(Pools {
                requests: pool(lanes.requests),
                lookups: pool(lanes.lookups),
                ledger: pool(lanes.ledger),
                health: pool(lanes.health),
            }),
            lane: Lane::Requests,
            lanes,
            statement_timeout: settings.statement_timeout,
        }
    }

    /// The same database by the connections of another lane.
    pub fn on(&self, lane: Lane) -> Self {
        Self {
            lane,
            ..self.clone()
        }
    }

    pub fn lanes(&self) -> Lanes {
        self.lanes
    }

    /// Gives up work that takes longer than PostgreSQL itself lets a statement take. A connection that falls silent
    /// in the middle of a transaction is noticed by nothing else for up to a minute. Requests have a limit of their
    /// own; background work uses this one.
    pub async fn within_limit<T>(
        &self,
        work: impl Future<Output = Result<T, DbError>>,
    ) -> Result<T, DbError> {
        let limit = self.statement_timeout + FIRST_ANSWER;
        tokio::time::timeout(limit, work)
            .await
            .unwrap_or_else(|_| Err(DbError::Unavailable("PostgreSQL does not answer".into())))
    }

    fn pool(&self) -> &ConnectionPool {
        match self.lane {
            Lane::Requests => &self.pools.requests,
            Lane::Lookups => &self.pools.lookups,
            Lane::Ledger => &self.pools.ledger,
            Lane::Health => &self.pools.health,
        }
    }

    /// A transaction that sees and changes only what is `tenant`'s.
    pub async fn tenant(&self, tenant: TenantId) -> Result<TenantTx, DbError> {
        // A UUID has no character that SQL would read as more than itself.
        let begin = format!("BEGIN; SET LOCAL ROLE quota_app; SET LOCAL quota.tenant = '{tenant}'");
        Ok(TenantTx {
            tx: Tx::begin(self.pool(), &begin).await?,
            tenant,
        })
    }

    /// A transaction of the server itself, over all tenants.
    pub async fn system(&self) -> Result<SystemTx, DbError> {
        Ok(SystemTx {
            tx: Tx::begin(self.pool(), "BEGIN; SET LOCAL ROLE quota_system").await?,
        })
    }

    /// Whether PostgreSQL answers and has every migration that this binary knows.
    pub async fn ready(&self) -> Result<bool, DbError> {
        #[derive(diesel::QueryableByName)]
        struct Applied {
            #[diesel(sql_type = diesel::sql_types::Text)]
            version: String,
        }
        let mut conn = self.pool().get().await?;
        let query = diesel::sql_query("SELECT version FROM __diesel_schema_migrations");
        let Ok(applied) =
            tokio::time::timeout(FIRST_ANSWER, query.load::<Applied>(&mut conn)).await
        else {
            return Err(silent(conn));
        };
        match applied {
            Ok(applied) => Ok(versions()
                .iter()
                .all(|known| applied.iter().any(|row| &row.version == known))),
            Err(DieselError::DatabaseError(_, info))
                if info.message().contains("does not exist") =>
            {
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// How many connections are open, and how many of them are busy, in all lanes.
    pub fn connections(&self) -> (usize, usize) {
        self.pools.all().iter().fold((0, 0), |(open, busy), pool| {
            let status = pool.status();
            let used = status.size.saturating_sub(status.available);
            (open + status.size, busy + used)
        })
    }

    pub fn close(&self) {
        for pool in self.pools.all() {
            pool.close();
        }
    }
}

fn pool(url: &SecretString, settings: &DatabaseSettings, size: usize) -> ConnectionPool {
    let mut manager = ManagerConfig::default();
    let (session, limit) = (session(settings), settings.connect_timeout);
    manager.custom_setup = Box::new(move |url| connect(url, session.clone(), limit));
    manager.recycling_method = RecyclingMethod::Fast;
    let manager = AsyncDieselConnectionManager::new_with_config(url.expose_secret(), manager);
    Pool::builder(manager)
        .max_size(size)
        .wait_timeout(Some(settings.wait))
        .create_timeout(Some(limit))
        .recycle_timeout(Some(limit))
        .runtime(deadpool::Runtime::Tokio1)
        .build()
        .expect("a runtime is given, which is all that building can miss")
}

/// The versions of all migrations in this binary, oldest first.
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

/// What every connection of the pool is set to. Timeouts of the server itself end a query there, where a
/// future that is dropped would leave it running. No statement runs long enough to be worth compiling.
fn session(settings: &DatabaseSettings) -> String {
    format!(
        "SET timezone = 'UTC'; SET jit = off; SET statement_timeout = {}; SET lock_timeout = {}; \
         SET idle_in_transaction_session_timeout = {}; SET application_name = 'quota'",
        settings.statement_timeout.as_millis(),
        settings.lock_timeout.as_millis(),
        IDLE_IN_TRANSACTION.as_millis(),
    )
}

/// A migration may take long, and must not queue behind a long query with everyone behind itself.
const MIGRATION_SESSION: &str = "SET timezone = 'UTC'; SET client_min_messages = 'warning'; \
    SET application_name = 'quota migrate'";

fn connect(
    url: &str,
    session: String,
    limit: Duration,
) -> BoxFuture<'_, diesel::ConnectionResult<AsyncPgConnection>> {
    async move {
        let bad =
            |error: &dyn std::error::Error| diesel::ConnectionError::BadConnection(chain(error));
        let mut config: tokio_postgres::Config =
            url.parse().map_err(|e: tokio_postgres::Error| bad(&e))?;
        config
            .connect_timeout(limit)
            .keepalives_idle(KEEPALIVE.0)
            .keepalives_interval(KEEPALIVE.1)
            .keepalives_retries(KEEPALIVE.2)
            .tcp_user_timeout(UNACKNOWLEDGED);
        let mut conn = if config.get_ssl_mode() == tokio_postgres::config::SslMode::Require {
            let (client, connection) = config.connect(tls()).await.map_err(|e| bad(&e))?;
            AsyncPgConnection::try_from_client_and_connection(client, connection).await?
        } else {
            let (client, connection) = config
                .connect(tokio_postgres::NoTls)
                .await
                .map_err(|e| bad(&e))?;
            AsyncPgConnection::try_from_client_and_connection(client, connection).await?
        };
        conn.batch_execute(&session)
            .await
            .map_err(diesel::ConnectionError::CouldntSetupConfiguration)?;
        Ok(conn)
    }
    .boxed()
}

/// `sslmode=require` means a certificate that the machine's own roots vouch for.
fn tls() -> tokio_postgres_rustls::MakeRustlsConnect {
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let config = rustls::ClientConfig::builder_with_provider(
        rustls::crypto::aws_lc_rs::default_provider().into(),
    )
    .with_safe_default_protocol_versions()
    .expect("the provider has the default versions")
    .with_root_certificates(roots)
    .with_no_client_auth();
    tokio_postgres_rustls::MakeRustlsConnect::new(config)
}

/// An error with its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Applies the pending migrations and answers which these were. Needs tokio's multi-thread runtime.
pub async fn migrate(url: &SecretString) -> Result<Vec<String>, MigrateError> {
    let mut harness = migration_harness(url).await?;
    let applied = harness
        .run_pending_migrations(MIGRATIONS)
        .map_err(MigrateError::Failed)?;
    let applied = applied.iter().map(ToString::to_string).collect();
    Ok(applied)
}

/// What `quota doctor` tells of a database.
#[derive(Debug)]
pub struct Found {
    pub version: String,
    pub max_connections: usize,
    /// Kept for superusers, and from PostgreSQL 16 on for whom the operator reserves them.
    pub reserved_connections: usize,
    pub applied: usize,
    pub known: usize,
}

/// How many connections other programs are left, whatever the replicas do: for an operator who looks, a backup, a
/// migration.
const LEFT_OVER: usize = 10;

impl Found {
    /// How many connections all replicas together may hold.
    pub fn available(&self) -> usize {
        let kept = LEFT_OVER.max(self.reserved_connections);
        self.max_connections.saturating_sub(kept)
    }
}

/// Looks at a database without changing anything.
pub async fn inspect(url: &SecretString) -> Result<Found, MigrateError> {
    #[derive(diesel::QueryableByName)]
    struct Text {
        #[diesel(sql_type = diesel::sql_types::Text)]
        text: String,
    }
    async fn ask(conn: &mut AsyncPgConnection, query: &str) -> Result<Vec<Text>, MigrateError> {
        diesel::sql_query(query)
            .load(conn)
            .await
            .map_err(|error| MigrateError::Failed(Box::new(error)))
    }
    let settings = DatabaseSettings::default();
    let mut conn = connect(
        url.expose_secret(),
        session(&settings),
        settings.connect_timeout,
    )
    .await?;
    let one = |rows: Vec<Text>| {
        rows.into_iter()
            .next()
            .map(|row| row.text)
            .unwrap_or_default()
    };
    let version = one(ask(
        &mut conn,
        "SELECT current_setting('server_version') AS text",
    )
    .await?);
    let max = one(ask(
        &mut conn,
        "SELECT current_setting('max_connections') AS text",
    )
    .await?);
    let reserved = one(ask(
        &mut conn,
        "SELECT (current_setting('superuser_reserved_connections')::int \
            + coalesce(current_setting('reserved_connections', true), '0')::int)::text AS text",
    )
    .await?);
    let is_there = "SELECT to_regclass('__diesel_schema_migrations')::text AS text \
        WHERE to_regclass('__diesel_schema_migrations') IS NOT NULL";
    let applied = if ask(&mut conn, is_there).await?.is_empty() {
        0
    } else {
        let applied = ask(
            &mut conn,
            "SELECT version AS text FROM __diesel_schema_migrations",
        )
        .await?;
        versions()
            .iter()
            .filter(|known| applied.iter().any(|row| row.text == **known))
            .count()
    };
    Ok(Found {
        version,
        max_connections: max.parse().unwrap_or(0),
        reserved_connections: reserved.parse().unwrap_or(0),
        applied,
        known: versions().len(),
    })
}

/// Takes back every migration, newest first.
pub async fn revert_all(url: &SecretString) -> Result<(), MigrateError> {
    let mut harness = migration_harness(url).await?;
    harness
        .revert_all_migrations(MIGRATIONS)
        .map_err(MigrateError::Failed)?;
    Ok(())
}

async fn migration_harness(
    url: &SecretString,
) -> Result<AsyncMigrationHarness<AsyncPgConnection>, MigrateError> {
    let limit = DatabaseSettings::default().connect_timeout;
    let mut conn = connect(url.expose_secret(), MIGRATION_SESSION.into(), limit).await?;
    // Held until the connection closes.
    conn.batch_execute(&format!(
        "SELECT pg_advisory_lock({MIGRATION_LOCK}); SET lock_timeout = '5s'"
    ))
    .await
    .map_err(|error| MigrateError::Failed(Box::new(error)))?;
    Ok(AsyncMigrationHarness::new(conn))
}

#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    #[error("cannot reach PostgreSQL")]
    Connect(#[from] diesel::ConnectionError),
    #[error("a migration failed")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Takes a connection on which nothing comes back out of the pool.
fn silent(conn: Object<AsyncPgConnection>) -> DbError {
    let _ = Object::take(conn);
    DbError::Unavailable("PostgreSQL does not answer".into())
}

/// An open transaction.
struct Tx {
    /// `None` once it has ended.
    conn: Option<Object<AsyncPgConnection>>,
}

impl Tx {
    async fn begin(pool: &Pool<AsyncPgConnection>, statements: &str) -> Result<Self, DbError> {
        let conn = pool.get().await?;
        // From here on a caller that goes away leaves a `Tx`, whose drop rolls back.
        let mut tx = Self { conn: Some(conn) };
        let began = tokio::time::timeout(FIRST_ANSWER, tx.get().batch_execute(statements)).await;
        match (began, tx.conn.take()) {
            (Err(_), Some(conn)) => Err(silent(conn)),
            (began, conn) => {
                tx.conn = conn;
                began.unwrap_or(Ok(()))?;
                Ok(tx)
            }
        }
    }

    fn get(&mut self) -> &mut AsyncPgConnection {
        self.conn
            .as_mut()
            .expect("a transaction that has ended is not handed out")
    }

    async fn commit(mut self) -> Result<(), DbError> {
        self.get().batch_execute("COMMIT").await?;
        self.conn = None;
        Ok(())
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        let Some(mut conn) = self.conn.take() else {
            return;
        };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            let _ = Object::take(conn);
            return;
        };
        runtime.spawn(async move {
            let rollback = tokio::time::timeout(ROLLBACK, conn.batch_execute("ROLLBACK")).await;
            if !matches!(rollback, Ok(Ok(()))) {
                // Closing the connection rolls back as well.
                let _ = Object::take(conn);
            }
        });
    }
}

/// A transaction within one tenant. Dropped without [`TenantTx::commit`] it is rolled back.
pub struct TenantTx {
    tx: Tx,
    tenant: TenantId,
}

impl TenantTx {
    pub const fn tenant(&self) -> TenantId {
        self.tenant
    }

    pub async fn commit(self) -> Result<(), DbError> {
        self.tx.commit().await
    }
}

/// A transaction of the server itself. Dropped without [`SystemTx::commit`] it is rolled back.
pub struct SystemTx {
    tx: Tx,
}

impl SystemTx {
    pub async fn commit(self) -> Result<(), DbError> {
        self.tx.commit().await
    }
}

macro_rules! connection {
    ($($name:ident),+) => {$(
        impl Deref for $name {
            type Target = AsyncPgConnection;

            fn deref(&self) -> &AsyncPgConnection {
                self.tx.conn.as_ref().expect("a transaction that has ended is not handed out")
            }
        }

        impl DerefMut for $name {
            fn deref_mut(&mut self) -> &mut AsyncPgConnection {
                self.tx.get()
            }
        }
    )+};
}
connection!(TenantTx, SystemTx);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_share_out_exactly_what_there_is() {
        for total in 5..=1000 {
            let it = Lanes::divide(total);
            assert_eq!(
                it.requests + it.lookups + it.ledger + it.health,
                total,
                "{it:?}"
            );
            assert!(it.requests >= 1 && it.lookups >= 2 && it.ledger >= 1 && it.health >= 1);
        }
    }
}
