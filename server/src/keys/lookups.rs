//! Look-ups in PostgreSQL by the hash of a secret, and how many run at once.
//!
//! Anybody can make up keys with a valid checksum, each of which has to be looked up. So look-ups have connections of
//! their own, those of unknown keys are limited in number, and one of the connections is left for keys that are
//! known and only have to be confirmed.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::{
    cache::{Freshness, Unconfirmed},
    config::Config,
    db::{self, Db, DbError, Lane, SystemTx},
    telemetry::metrics::Metrics,
};

/// See the module. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Lookups {
    db: Db,
    freshness: Arc<Freshness>,
    metrics: Arc<Metrics>,
    wait: Duration,
    /// Look-ups of unknown secrets, from Redis or PostgreSQL, that are under way or wait.
    under_way: Arc<Semaphore>,
    /// Of these, those that use a connection to PostgreSQL.
    connected: Arc<Semaphore>,
}

/// A look-up that may begin.
#[derive(Debug)]
pub struct Lookup {
    lookups: Lookups,
    /// `None`: what is looked up is known.
    under_way: Option<OwnedSemaphorePermit>,
}

/// A transaction of a look-up, with its place among them.
pub struct LookupTx {
    pub tx: SystemTx,
    _connected: Option<OwnedSemaphorePermit>,
}

impl Lookups {
    pub fn new(
        db: &Db,
        config: &Config,
        freshness: &Arc<Freshness>,
        metrics: &Arc<Metrics>,
    ) -> Self {
        let db = db.on(Lane::Lookups);
        let for_unknown = db.lanes().lookups.saturating_sub(1).max(1);
        Self {
            freshness: freshness.clone(),
            metrics: metrics.clone(),
            wait: config.database.wait,
            under_way: Arc::new(Semaphore::new(config.key_lookups)),
            connected: Arc::new(Semaphore::new(for_unknown)),
            db,
        }
    }

    /// Begins a look-up without waiting, or refuses it because too many are under way.
    pub fn begin(&self, is_known: bool) -> Result<Lookup, Unconfirmed> {
        let under_way = if is_known {
            None
        } else {
            let permit = self.under_way.clone().try_acquire_owned();
            Some(permit.map_err(|_| self.refused())?)
        };
        Ok(Lookup {
            lookups: self.clone(),
            under_way,
        })
    }

    fn refused(&self) -> Unconfirmed {
        self.metrics.lookups_refused.inc();
        Unconfirmed::TooMany
    }

    /// Runs a query, and gives it up when PostgreSQL falls silent.
    pub async fn within_limit<T>(
        &self,
        query: impl Future<Output = Result<T, DbError>>,
    ) -> Result<T, Unconfirmed> {
        let answer = self.db.within_limit(query).await;
        answer.map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &DbError) -> Unconfirmed {
        match error {
            DbError::Unavailable(_) => {
                if self.freshness.suspect() {
                    self.metrics.database_suspected.inc();
                }
            }
            error => tracing::error!(error = %db::chain(error), "a key cannot be looked up"),
        }
        Unconfirmed::Failed(db::chain(error).into())
    }
}

impl Lookup {
    /// Waits for a connection, for as long as `QUOTA_DATABASE_WAIT`.
    pub async fn transaction(&self) -> Result<LookupTx, Unconfirmed> {
        let it = &self.lookups;
        let connected = if self.under_way.is_some() {
            match timeout(it.wait, it.connected.clone().acquire_owned()).await {
                Ok(Ok(permit)) => Some(permit),
                Ok(Err(_)) | Err(_) => return Err(it.refused()),
            }
        } else {
            None
        };
        let tx = it.db.system().await.map_err(|error| it.failed(&error))?;
        Ok(LookupTx {
            tx,
            _connected: connected,
        })
    }
}
