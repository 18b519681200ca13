//! Connection pools, one for each kind of work.

use std::{fmt, sync::Arc, time::Duration};

use diesel::result::Error as DieselError;
use diesel_async::{
    RunQueryDsl,
    pooled_connection::{
        AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod, deadpool::Pool,
    },
};
use quota_common::TenantId;
use secrecy::{ExposeSecret, SecretString};
use tokio::time::timeout;

use super::{
    connect::{ConnectionPool, connect, session},
    error::DbError,
    migrate::versions,
    tx::{FIRST_ANSWER, SystemTx, TenantTx, close_silent},
};
use crate::config::DatabaseSettings;

/// The purpose of a connection. Each lane has its own pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Management, sign-in, and background work that can wait.
    Requests,
    /// Lookups of API keys and service tokens, which unauthenticated clients can trigger.
    Lookups,
    /// The quota ledgers of keys and tenants.
    Ledger,
    /// Shipping usage.
    Shipping,
    /// Work that the health of the whole server depends on: polls for invalidations, heartbeats of replicas,
    /// measurements of PostgreSQL's clock, readiness checks.
    Health,
}

/// The number of connections in each lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lanes {
    pub requests: usize,
    pub lookups: usize,
    pub ledger: usize,
    pub shipping: usize,
    pub health: usize,
}

impl Lanes {
    /// Divides `total` connections among the lanes. `total` must be at least six.
    pub fn divide(total: usize) -> Self {
        let health = if total < 8 { 1 } else { 2 };
        // If there are enough connections, the ledgers get at least two, so that returning tokens does not delay taking
        // tokens.
        let ledger = (total * 3 / 16).max(if total < 8 { 1 } else { 2 });
        // One connection is enough, because batches are written one after another.
        let shipping = 1;
        let lookups = (total / 4).max(2);
        Self {
            requests: total
                .saturating_sub(health + ledger + lookups + shipping)
                .max(1),
            lookups,
            ledger,
            shipping,
            health,
        }
    }
}

impl fmt::Display for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} for requests, {} for key lookups, {} for the quota ledger, {} for usage, {} for invalidations and readiness",
            self.requests, self.lookups, self.ledger, self.shipping, self.health
        )
    }
}

struct Pools {
    requests: ConnectionPool,
    lookups: ConnectionPool,
    ledger: ConnectionPool,
    shipping: ConnectionPool,
    health: ConnectionPool,
}

impl Pools {
    fn all(&self) -> [&ConnectionPool; 5] {
        [
            &self.requests,
            &self.lookups,
            &self.ledger,
            &self.shipping,
            &self.health,
        ]
    }
}

/// A handle that takes connections from one lane's pool. Cloning is cheap.
#[derive(Clone)]
pub struct Db {
    pools: Arc<Pools>,
    lane: Lane,
    lanes: Lanes,
    statement_timeout: Duration,
}

impl fmt::Debug for Db {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Db")
            .field("lane", &self.lane)
            .finish_non_exhaustive()
    }
}

impl Db {
    /// Creates the pools, which connect on first use. The returned handle uses [`Lane::Requests`].
    pub fn new(url: &SecretString, settings: &DatabaseSettings) -> Self {
        let lanes = Lanes::divide(settings.pool);
        let pool = |size| pool(url, settings, size);
        Self {
            pools: Arc::new(Pools {
                requests: pool(lanes.requests),
                lookups: pool(lanes.lookups),
                ledger: pool(lanes.ledger),
                shipping: pool(lanes.shipping),
                health: pool(lanes.health),
            }),
            lane: Lane::Requests,
            lanes,
            statement_timeout: settings.statement_timeout,
        }
    }

    /// Returns a handle that takes connections from the pool of `lane`.
    pub fn on(&self, lane: Lane) -> Self {
        Self {
            lane,
            ..self.clone()
        }
    }

    pub fn lanes(&self) -> Lanes {
        self.lanes
    }

    /// Cancels `work` if it takes longer than the statement timeout plus the time limit for the first response
    /// (`FIRST_ANSWER`). Without this limit, it could take a minute or more before the server detects that a connection
    /// has stopped responding in the middle of a transaction. Meant for background work; requests have a separate
    /// limit.
    pub async fn within_limit<T>(
        &self,
        work: impl Future<Output = Result<T, DbError>>,
    ) -> Result<T, DbError> {
        self.within(self.statement_timeout, work).await
    }

    /// Works like [`within_limit`](Self::within_limit), but with a different time limit.
    pub async fn within<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = Result<T, DbError>>,
    ) -> Result<T, DbError> {
        timeout(limit + FIRST_ANSWER, work)
            .await
            .unwrap_or_else(|_| Err(DbError::Unavailable("PostgreSQL does not respond".into())))
    }

    /// Runs a transaction on behalf of the server itself, with the time limit of [`within_limit`](Self::within_limit).
    pub async fn in_system<T>(
        &self,
        work: impl AsyncFnOnce(&mut SystemTx) -> Result<T, DbError>,
    ) -> Result<T, DbError> {
        // This future is boxed, so that it does not enlarge the futures of the callers.
        let transaction = Box::pin(async {
            let mut tx = self.system().await?;
            let result = work(&mut tx).await?;
            tx.commit().await?;
            Ok(result)
        });
        self.within_limit(transaction).await
    }

    fn pool(&self) -> &ConnectionPool {
        match self.lane {
            Lane::Requests => &self.pools.requests,
            Lane::Lookups => &self.pools.lookups,
            Lane::Ledger => &self.pools.ledger,
            Lane::Shipping => &self.pools.shipping,
            Lane::Health => &self.pools.health,
        }
    }

    /// Begins a transaction that sees and changes only the tenant's rows.
    pub async fn tenant(&self, tenant: TenantId) -> Result<TenantTx, DbError> {
        TenantTx::begin(self.pool(), tenant).await
    }

    /// Begins a transaction on behalf of the server itself, across all tenants.
    pub async fn system(&self) -> Result<SystemTx, DbError> {
        SystemTx::begin(self.pool()).await
    }

    /// Returns an error if PostgreSQL is unreachable. Call this to distinguish an outage from a single failed
    /// transaction, such as one with a statement that took too long.
    pub async fn probe(&self) -> Result<(), DbError> {
        self.system().await?.commit().await
    }

    /// Returns whether every migration in this binary has been applied. Fails if PostgreSQL does not respond.
    pub async fn ready(&self) -> Result<bool, DbError> {
        #[derive(diesel::QueryableByName)]
        struct Applied {
            #[diesel(sql_type = diesel::sql_types::Text)]
            version: String,
        }
        let mut conn = self.pool().get().await?;
        let query = diesel::sql_query("SELECT version FROM __diesel_schema_migrations");
        let Ok(applied) = timeout(FIRST_ANSWER, query.load::<Applied>(&mut conn)).await else {
            return Err(close_silent(conn));
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

    /// Returns the number of open connections across all lanes, and how many of them are in use.
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
        .expect("building fails only without a runtime")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_add_up_to_the_total() {
        for total in 6..=1000 {
            let it = Lanes::divide(total);
            assert_eq!(
                it.requests + it.lookups + it.ledger + it.shipping + it.health,
                total,
                "{it:?}"
            );
            assert!(it.requests >= 1 && it.lookups >= 2 && it.ledger >= 1 && it.health >= 1);
            assert_eq!(it.shipping, 1);
        }
    }
}
