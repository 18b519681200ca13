//! Requests at a fixed rate through Caddy, and the outcome of each.
//!
//! Half of the requests are `POST /v1/check`, and half are `GET /v1/echo`. Half of the requests use a key whose limit
//! they exceed, and half use a key whose limit is too high to reach. Requests are sent on schedule, whether or not
//! earlier ones have completed, on persistent connections. A request waits only if all connections are in use.

use std::{
    error::Error,
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use parking_lot::Mutex;
use quota_testkit::envelope::Span;
use reqwest::Client;
use serde_json::{Value, json};
use tokio::{
    sync::Semaphore,
    task::{JoinHandle, JoinSet},
    time::{Instant, MissedTickBehavior, interval},
};

/// The maximum number of connections. More concurrent TLS handshakes would only slow down a busy machine.
const CONNECTIONS: usize = 64;

/// Where to send requests, and with which credentials.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) client: Client,
    pub(super) base: String,
    pub(super) limited: String,
    /// A key with so high a limit that every request is allowed.
    pub(super) ample: String,
    pub(super) service_token: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    Allowed,
    Denied,
    /// Any response other than a decision, or no response.
    Failed(String),
}

/// One request. Times are in nanoseconds since the start of the load.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) number: u64,
    pub(super) sent: u64,
    pub(super) answered: u64,
    pub(super) outcome: Outcome,
    /// Whether the request was decided without Redis.
    pub(super) is_degraded: bool,
}

impl Attempt {
    pub(super) fn is_limited(&self) -> bool {
        is_limited(self.number)
    }

    pub(super) fn request_id(&self) -> String {
        request_id(self.number)
    }

    pub(super) fn span(&self) -> Span {
        Span {
            sent: self.sent,
            answered: self.answered,
            cost: 1,
        }
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

fn request_id(number: u64) -> String {
    format!("restarts-{number}")
}

/// A load that continues until it is stopped.
pub(super) struct Load {
    origin: Instant,
    stopped: Arc<AtomicBool>,
    task: JoinHandle<Vec<Attempt>>,
}

impl Load {
    pub(super) fn start(target: Target, rate: u32) -> Self {
        let origin = Instant::now();
        let stopped = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopped);
        let task = tokio::spawn(async move {
            let attempts = Arc::new(Mutex::new(Vec::new()));
            let mut ticks = interval(Duration::from_secs(1) / rate);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            let mut requests = JoinSet::new();
            let connections = Arc::new(Semaphore::new(CONNECTIONS));
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                ticks.tick().await;
                let (target, attempts) = (target.clone(), Arc::clone(&attempts));
                let connections = Arc::clone(&connections);
                requests.spawn(async move {
                    let _connection = connections.acquire().await;
                    let sent = nanos(origin);
                    let (outcome, is_degraded) = match send(&target, number).await {
                        Ok((true, is_degraded)) => (Outcome::Allowed, is_degraded),
                        Ok((false, is_degraded)) => (Outcome::Denied, is_degraded),
                        Err(failure) => (Outcome::Failed(failure), false),
                    };
                    attempts.lock().push(Attempt {
                        number,
                        sent,
                        answered: nanos(origin),
                        outcome,
                        is_degraded,
                    });
                });
                number += 1;
                while requests.try_join_next().is_some() {}
            }
            while requests.join_next().await.is_some() {}
            std::mem::take(&mut *attempts.lock())
        });
        Self {
            origin,
            stopped,
            task,
        }
    }

    /// Returns the nanoseconds since the start.
    pub(super) fn now(&self) -> u64 {
        nanos(self.origin)
    }

    /// Waits for the last responses. Returns all requests, sorted by number.
    pub(super) async fn stop(self) -> Result<Vec<Attempt>> {
        self.stopped.store(true, Ordering::Relaxed);
        let mut attempts = self.task.await?;
        attempts.sort_unstable_by_key(|it| it.number);
        Ok(attempts)
    }
}

fn nanos(origin: Instant) -> u64 {
    u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Sends one request. Returns whether the request was allowed, and whether it was decided without Redis.
async fn send(target: &Target, number: u64) -> Result<(bool, bool), String> {
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
    let request = request.header("x-request-id", request_id(number));
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

/// Returns an error with its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let _ = write!(text, ": {error}");
        source = error.source();
    }
    text
}
