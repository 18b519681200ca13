//! Compares the usage log with the responses.

use std::{
    collections::HashMap,
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tokio::time::sleep;

use crate::{
    load::{Attempt, Outcome, Results},
    production::Production,
};

const SHIPPED_WITHIN: Duration = Duration::from_secs(60);

/// What the usage log contains about one request.
struct Recorded {
    rows: u64,
    records: u64,
    /// Whether one of the decisions was to allow the request.
    is_allowed: bool,
}

impl Production<'_> {
    /// Checks that the decision about each request is in the usage log exactly once. If a replica was killed under
    /// load, Caddy may have repeated the requests in flight, which were then decided again.
    pub async fn recount(
        &self,
        results: &Results,
        killed: Option<RangeInclusive<Instant>>,
    ) -> Result<()> {
        let all: Vec<&Attempt> = results.attempts.iter().collect();
        let deadline = Instant::now() + SHIPPED_WITHIN;
        let log = loop {
            let log = self.usage_log(&results.name)?;
            if all.iter().all(|it| log.contains_key(&it.request_id)) || Instant::now() > deadline {
                break log;
            }
            sleep(Duration::from_millis(500)).await;
        };
        let mut repeated = 0_u64;
        for attempt in &all {
            let is_allowed = match attempt.outcome {
                Outcome::Allowed => true,
                Outcome::Denied => false,
                Outcome::Failed(_) => continue,
            };
            let id = &attempt.request_id;
            let recorded = log.get(id).with_context(|| format!("{id} is lost"))?;
            ensure!(
                recorded.rows == recorded.records,
                "{id} is recorded more than once"
            );
            if recorded.records > 1 {
                let was_in_flight = killed.as_ref().is_some_and(|kill| {
                    attempt.sent <= *kill.end() && *kill.start() <= attempt.answered
                });
                ensure!(was_in_flight, "{id} was decided more than once");
                repeated += 1;
            } else {
                ensure!(
                    recorded.is_allowed == is_allowed,
                    "{id} is recorded differently"
                );
            }
        }
        println!(
            "  usage: {} of {} requests recorded, 0 lost, {repeated} decided again because the replica was killed",
            log.len(),
            all.len()
        );
        Ok(())
    }

    /// Checks that a restored usage log contains the requests that were answered before the backup, none of them twice.
    pub async fn is_complete_until(&self, results: &Results, backup: Instant) -> Result<()> {
        let is_before = |it: &&Attempt| it.answered < backup;
        let deadline = Instant::now() + SHIPPED_WITHIN;
        let log = loop {
            let log = self.usage_log(&results.name)?;
            let mut before = results.attempts.iter().filter(is_before);
            if before.all(|it| log.contains_key(&it.request_id)) || Instant::now() > deadline {
                break log;
            }
            sleep(Duration::from_millis(500)).await;
        };
        let mut before = 0_u64;
        for attempt in &results.attempts {
            let recorded = log.get(&attempt.request_id);
            if let Some(recorded) = recorded {
                ensure!(
                    recorded.rows == 1,
                    "{} was counted {} times",
                    attempt.request_id,
                    recorded.rows
                );
            }
            if is_before(&attempt) {
                before += 1;
                ensure!(recorded.is_some(), "{} is lost", attempt.request_id);
            }
        }
        println!(
            "  usage: {before} requests were answered before the backup; {} are in the restored log, 0 twice",
            log.len()
        );
        ensure!(before > 0, "nothing was answered before the backup");
        Ok(())
    }

    /// Reads what the usage log contains about the requests of a load.
    fn usage_log(&self, name: &str) -> Result<HashMap<String, Recorded>> {
        let rows = self.query(&format!(
            "SELECT request_id, count(*), count(DISTINCT event_id), bool_or(NOT was_rejected)::int FROM usage_log \
             WHERE starts_with(request_id, '{}-') GROUP BY request_id",
            name.replace(' ', "-")
        ))?;
        let mut log = HashMap::new();
        for row in rows.lines() {
            let mut fields = row.split('|');
            let mut next = || fields.next().context("a row is too short");
            log.insert(
                next()?.to_owned(),
                Recorded {
                    rows: next()?.parse()?,
                    records: next()?.parse()?,
                    is_allowed: next()? == "1",
                },
            );
        }
        Ok(log)
    }
}
