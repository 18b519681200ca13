//! Whether PostgreSQL is ready, remembered for a moment.
//!
//! Anybody may ask for the server's readiness as often as they like. However many ask at once, PostgreSQL is asked
//! once, and not again while the answer is young.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Mutex;

use crate::{
    db::{Db, Lane, chain},
    telemetry::metrics::Metrics,
};

/// For how long an answer is given again.
const REMEMBERED: Duration = Duration::from_millis(250);

#[derive(Debug, Clone)]
pub enum Readiness {
    Ready,
    MigrationsPending,
    /// With the reason.
    Unreachable(Arc<str>),
}

/// See the module.
#[derive(Debug)]
pub struct ReadinessProbe {
    db: Db,
    metrics: Arc<Metrics>,
    /// Held while PostgreSQL is asked.
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
