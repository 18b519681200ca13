//! Requests at a steady rate, and the outcome of each.
//!
//! Half of the requests are `POST /v1/check`, and half are `GET /v1/echo`. Half of the requests use a key whose limit
//! they exceed, and half use a key whose limit is too high to reach.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use quota_testkit::envelope::{Envelope, Span};
use reqwest::Client;
use serde_json::{Value, json};
use tokio::{task::JoinSet, time};

/// Requests per second.
const RATE: u32 = 180;
/// The limited key's rate per minute, and its burst. Half of the requests use this key, and these requests must exceed
/// the key's rate.
pub const RPM: u32 = 3000;
pub const BURST: u32 = 50;
/// The default `QUOTA_LEASE_TTL`, plus one microsecond for each end of a window. A microsecond is the resolution of
/// Redis's clock.
const SLACK: Duration = Duration::from_nanos(100_002_000);
/// The smallest acceptable number of allowed requests, as a percentage of what one exact bucket would have allowed.
const SERVED: u64 = 90;

/// Where to send requests, and with which credentials.
#[derive(Debug, Clone)]
pub struct Target {
    pub client: Client,
    pub base: String,
    pub limited: String,
    /// A key with so high a limit that every request is allowed.
    pub ample: String,
    pub service_token: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Allowed,
    Denied,
    /// Any response other than a decision, or no response.
    Failed(String),
}

#[derive(Debug)]
pub struct Attempt {
    number: u64,
    pub request_id: String,
    pub sent: Instant,
    pub answered: Instant,
    pub outcome: Outcome,
    /// Whether the request was decided without Redis.
    is_degraded: bool,
}

/// A load that continues until it is stopped.
#[derive(Debug)]
pub struct Load {
    name: String,
    began: Instant,
    running: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Vec<Attempt>>,
}

impl Load {
    /// Starts a load. Its name must be unique, because it is a part of the request IDs.
    pub fn start(name: &str, target: Target) -> Self {
        let running = Arc::new(AtomicBool::new(true));
        let going = Arc::clone(&running);
        let prefix = name.replace(' ', "-");
        let task = tokio::spawn(async move {
            let attempts = Arc::new(Mutex::new(Vec::new()));
            let mut ticks = time::interval(Duration::from_secs(1) / RATE);
            let mut requests = JoinSet::new();
            let mut number = 0;
            while going.load(Ordering::Relaxed) {
                ticks.tick().await;
                let (target, attempts) = (target.clone(), Arc::clone(&attempts));
                let request_id = format!("{prefix}-{number}");
                requests.spawn(async move {
                    let sent = Instant::now();
                    let (outcome, is_degraded) = match send(&target, number, &request_id).await {
                        Ok((true, is_degraded)) => (Outcome::Allowed, is_degraded),
                        Ok((false, is_degraded)) => (Outcome::Denied, is_degraded),
                        Err(failure) => (Outcome::Failed(failure), false),
                    };
                    let attempt = Attempt {
                        number,
                        request_id,
                        sent,
                        answered: Instant::now(),
                        outcome,
                        is_degraded,
                    };
                    attempts.lock().expect("nothing panics").push(attempt);
                });
                number += 1;
                while requests.try_join_next().is_some() {}
            }
            while requests.join_next().await.is_some() {}
            std::mem::take(&mut *attempts.lock().expect("nothing panics"))
        });
        Self {
            name: name.to_owned(),
            began: Instant::now(),
            running,
            task,
        }
    }

    pub async fn stop(self) -> Result<Results> {
        self.running.store(false, Ordering::Relaxed);
        Ok(Results {
            attempts: self.task.await?,
            name: self.name,
            began: self.began,
        })
    }
}

/// All requests of a load.
pub struct Results {
    pub name: String,
    began: Instant,
    pub attempts: Vec<Attempt>,
}

impl Results {
    /// Returns the number of allowed requests that used the ample key and for which `counts` returns `true`.
    pub fn allowed_with_ample(&self, counts: impl Fn(&Attempt) -> bool) -> usize {
        let ample = self.attempts.iter().filter(|it| !is_limited(it.number));
        let allowed = ample.filter(|it| it.outcome == Outcome::Allowed);
        allowed.filter(|it| counts(it)).count()
    }

    /// Prints the results. Checks that no request failed, that the limited key's rate was enforced, and that at
    /// least [`SERVED`] percent of the requests that one exact bucket would have allowed were allowed.
    pub fn check(&self) -> Result<()> {
        let count = |outcome: &Outcome| {
            let attempts = self.attempts.iter();
            attempts.filter(|it| it.outcome == *outcome).count()
        };
        let failures = self.attempts.iter().filter_map(|it| match &it.outcome {
            Outcome::Failed(failure) => Some((it.sent, failure)),
            _ => None,
        });
        let failures: Vec<_> = failures.collect();
        let slowest = self.attempts.iter().map(|it| it.answered - it.sent).max();
        let degraded = self.attempts.iter().filter(|it| it.is_degraded).count();
        let limited = || self.attempts.iter().filter(|it| is_limited(it.number));
        let nanos = |at: Instant| u64::try_from((at - self.began).as_nanos()).unwrap_or(u64::MAX);
        let admitted = limited().filter(|it| it.outcome == Outcome::Allowed);
        let admitted: Vec<_> = admitted
            .map(|it| Span {
                sent: nanos(it.sent),
                answered: nanos(it.answered),
                cost: 1,
            })
            .collect();
        let worst = Envelope::new(RPM, BURST, SLACK).worst(&admitted);
        let excess = worst.map_or(0.0, |it| it.excess.max(0.0));
        let sent = limited().map(|it| (nanos(it.sent), 1)).collect();
        let exact = Envelope::new(RPM, BURST, Duration::ZERO).exact(sent);
        let served = 100 * admitted.len() as u64 / exact.max(1);
        println!(
            "{}: {} sent in {:.0} s, {} allowed, {} denied, {} failed, slowest {:.2} s; limited key: {} allowed, \
             {excess:.1} above its limit, {served}% of what one exact bucket allows; {degraded} decided without Redis",
            self.name,
            self.attempts.len(),
            self.began.elapsed().as_secs_f64(),
            count(&Outcome::Allowed),
            count(&Outcome::Denied),
            failures.len(),
            slowest.unwrap_or_default().as_secs_f64(),
            admitted.len(),
        );
        for (at, failure) in failures.iter().take(10) {
            println!("  at {:.1} s: {failure}", (*at - self.began).as_secs_f64());
        }
        ensure!(failures.is_empty(), "requests failed");
        ensure!(excess <= 0.0, "more was allowed than the limit");
        ensure!(served >= SERVED, "too little was allowed");
        Ok(())
    }
}

fn is_post(number: u64) -> bool {
    number.is_multiple_of(2)
}

/// Returns whether a request uses the key whose limit is exceeded. The key changes after every second request, so that
/// each key is used with both kinds of requests.
fn is_limited(number: u64) -> bool {
    (number / 2).is_multiple_of(2)
}

/// Sends one request. Returns whether the request was allowed, and whether it was decided without Redis.
async fn send(target: &Target, number: u64, request_id: &str) -> Result<(bool, bool), String> {
    let key = if is_limited(number) {
        &target.limited
    } else {
        &target.ample
    };
    let request = if is_post(number) {
        target
            .client
            .post(format!("{}/api/v1/check", target.base))
            .header("x-service-token", &target.service_token)
            .json(&json!({"key": key, "endpoint": "POST /orders"}))
    } else {
        target
            .client
            .get(format!("{}/v1/echo", target.base))
            .header("x-api-key", key)
    };
    let request = request.header("x-request-id", request_id);
    let response = request.send().await.map_err(|error| chain(&error))?;
    let status = response.status().as_u16();
    let is_degraded = response.headers().contains_key("x-quota-degraded");
    let body = response.text().await.map_err(|error| chain(&error))?;
    let content: Value = serde_json::from_str(&body).unwrap_or_default();
    // The check API returns the headers for the consumer in the body.
    let is_degraded = is_degraded || !content["headers"]["X-Quota-Degraded"].is_null();
    let allowed = match (status, is_post(number)) {
        (200, true) => content["allowed"].as_bool(),
        (200, false) => Some(true),
        (429, false) => Some(false),
        _ => None,
    };
    match allowed {
        Some(false) if !is_limited(number) => {
            let why = if is_degraded { " without Redis" } else { "" };
            Err(format!("the ample key was denied{why}: {body}"))
        }
        Some(allowed) => Ok((allowed, is_degraded)),
        None => Err(format!("{status}: {body}")),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
