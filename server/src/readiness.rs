//! Checks whether PostgreSQL is ready, and caches the result for a short time.
//!
//! Anyone may check readiness, and the number of checks is not limited. Therefore, concurrent checks share one query,
//! and its result is reused for a short time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Mutex;

use crate::{
    db::{Db, Lane, chain},
    telemetry::metrics::Metrics,
};

/// How long a result is reused.
const REMEMBERED: Duration = Duration::from_millis(250);

#[derive(Debug, Clone)]
pub enum Readiness {
    Ready,
    MigrationsPending,
    /// PostgreSQL is unreachable. Contains the reason.
    Unreachable(Arc<str>),
}

/// Checks whether PostgreSQL is ready. Caches the result for a short time.
#[derive(Debug)]
pub struct ReadinessProbe {
    db: Db,
    metrics: Arc<Metrics>,
    /// The cached result. Locked during the query.
    last: Mutex<Option<(Instant, Readiness)>>,
}

impl ReadinessProbe {
    pub fn new(db: &Db, metrics: Arc<Metrics>) -> Self {
        Self {
            db: db.on(Lane::Health),
            metrics,
            last: Mutex::default(),
        }
    }

    pub async fn check(&self) -> Readiness {
        let mut last = self.last.lock().await;
        if let Some((at, readiness)) = &*last
            && at.elapsed() < REMEMBERED
        {
            return readiness.clone();
        }
        self.metrics.readiness_checks.inc();
        let readiness = match self.db.ready().await {
            Ok(true) => Readiness::Ready,
            Ok(false) => Readiness::MigrationsPending,
            Err(error) => Readiness::Unreachable(chain(&error).into()),
        };
        *last = Some((Instant::now(), readiness.clone()));
        readiness
    }
}
