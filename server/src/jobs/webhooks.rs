//! Sends events to webhooks.
//!
//! Deliveries that this replica has stored are sent immediately. Every second, this replica looks for other due
//! deliveries.

use std::{collections::HashMap, time::Duration};

use tokio::{
    sync::watch,
    task::{self, JoinSet},
    time::timeout,
};
use uuid::Uuid;

use super::{every, stopped};
use crate::{
    db::{self, DbError},
    repo::webhook_delivery::DueDelivery,
    state::AppState,
    webhooks::deliver::{FINISH, Outcome},
};

/// How often this replica looks for deliveries without being notified.
const EVERY: Duration = Duration::from_secs(1);
/// The maximum number of attempts in progress on this replica.
const CONCURRENT: usize = 32;
/// How often this replica measures how long deliveries have been overdue.
const MEASURE_EVERY: Duration = Duration::from_secs(30);

pub(super) async fn deliver(state: AppState, mut stopping: watch::Receiver<bool>) {
    let mut worker = Worker {
        state,
        running: JoinSet::new(),
        attempts: HashMap::new(),
        is_reported: false,
        is_reencrypted: false,
    };
    let mut ticks = every(EVERY);
    loop {
        let webhooks = worker.state.webhooks.clone();
        tokio::select! {
            biased;
            () = stopped(&mut stopping) => break,
            Some(ended) = worker.running.join_next_with_id() => match ended {
                Ok((id, outcome)) => worker.ended(id, Some(&outcome)),
                Err(error) => worker.ended(error.id(), None),
            },
            _ = ticks.tick() => {}
            () = webhooks.woken() => {}
        }
        if !worker.is_reencrypted {
            worker.reencrypt().await;
        }
        worker.begin().await;
    }
    // Attempts that do not finish are repeated by another replica, or after the next start.
    let rest = async { while worker.running.join_next().await.is_some() {} };
    let _ = timeout(FINISH, rest).await;
}

struct Worker {
    state: AppState,
    running: JoinSet<Result<Outcome, DbError>>,
    /// The tenant and the webhook of each attempt in progress.
    attempts: HashMap<task::Id, (Uuid, Uuid)>,
    is_reported: bool,
    /// Whether the secrets that were encrypted with the previous `QUOTA_SECRET` have been re-encrypted with the current
    /// one.
    is_reencrypted: bool,
}

impl Worker {
    async fn reencrypt(&mut self) {
        match self.state.webhooks.reencrypt().await {
            Ok(unreadable) => {
                self.is_reencrypted = true;
                let count = i64::try_from(unreadable).unwrap_or(i64::MAX);
                self.state.metrics.webhook_secrets_unreadable.set(count);
                if unreadable > 0 {
                    tracing::error!(
                        webhooks = unreadable,
                        "some webhook signing secrets were encrypted with a QUOTA_SECRET that is not configured; set it as QUOTA_SECRET_PREVIOUS and restart"
                    );
                }
            }
            Err(error) => self.report(&error),
        }
    }

    /// Starts attempts for due deliveries, until `CONCURRENT` attempts are in progress.
    async fn begin(&mut self) {
        loop {
            let room = CONCURRENT.saturating_sub(self.running.len());
            if room == 0 {
                return;
            }
            let running: Vec<_> = self.attempts.values().copied().collect();
            let due = match self.state.webhooks.claim(room, &running).await {
                Ok(due) => due,
                Err(error) => return self.report(&error),
            };
            self.is_reported = false;
            if due.is_empty() {
                return;
            }
            for due in due {
                let owner = (due.tenant_id, due.webhook_id);
                let attempt = self.running.spawn(attempt(self.state.clone(), due));
                self.attempts.insert(attempt.id(), owner);
            }
        }
    }

    /// Handles the end of an attempt. `outcome` is `None` if the attempt panicked; the attempt is then repeated later.
    fn ended(&mut self, attempt: task::Id, outcome: Option<&Result<Outcome, DbError>>) {
        self.attempts.remove(&attempt);
        let metrics = &self.state.metrics;
        let counter = match outcome {
            None => &metrics.webhook_errors,
            Some(Ok(Outcome::Delivered)) => &metrics.webhooks_delivered,
            Some(Ok(Outcome::Postponed)) => &metrics.webhook_attempts_failed,
            Some(Ok(Outcome::Failed)) => &metrics.webhooks_failed,
            Some(Err(error)) => return self.report(error),
        };
        counter.inc();
    }

    fn report(&mut self, error: &DbError) {
        self.state.metrics.webhook_errors.inc();
        if !std::mem::replace(&mut self.is_reported, true) {
            tracing::warn!(error = %db::chain(error), "cannot claim webhook deliveries or record their results");
        }
    }
}

/// Measures how long deliveries have been overdue. Does not depend on the task that sends the deliveries.
pub(super) async fn measure(state: AppState) {
    let mut ticks = every(MEASURE_EVERY);
    loop {
        ticks.tick().await;
        measure_overdue(&state).await;
    }
}

/// Measures how long deliveries have been overdue.
pub async fn measure_overdue(state: &AppState) {
    // A measurement that does not end counts as failed, because its metric would become outdated as well.
    let measured = timeout(MEASURE_EVERY, state.webhooks.overdue_seconds()).await;
    let seconds = measured.ok().and_then(Result::ok);
    state.metrics.webhooks_overdue.set(seconds);
}

async fn attempt(state: AppState, due: DueDelivery) -> Result<Outcome, DbError> {
    state.webhooks.deliver(&due).await
}
