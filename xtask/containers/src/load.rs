//! Requests at a steady rate, and their results.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use reqwest::Client;
use serde_json::json;
use tokio::{task::JoinSet, time};

/// Requests per second. Every other request is a POST.
pub const RATE: u32 = 180;

/// The request to send.
#[derive(Debug, Clone)]
pub struct Target {
    pub client: Client,
    pub base: String,
    pub key: String,
    pub service_token: String,
}

/// The results of the requests.
#[derive(Debug, Default)]
pub struct Outcome {
    pub sent: u64,
    pub admitted: u64,
    pub denied: u64,
    /// When and how the other requests failed.
    pub failures: Vec<(Duration, String)>,
    pub slowest: Duration,
}

/// A load that continues until it is stopped.
#[derive(Debug)]
pub struct Load {
    running: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Outcome>,
}

impl Load {
    pub fn start(target: Target) -> Self {
        let running = Arc::new(AtomicBool::new(true));
        let going = Arc::clone(&running);
        let task = tokio::spawn(async move {
            let outcome = Arc::new(Mutex::new(Outcome::default()));
            let began = Instant::now();
            let mut ticks = time::interval(Duration::from_secs(1) / RATE);
            let mut requests = JoinSet::new();
            let mut number = 0_u64;
            while going.load(Ordering::Relaxed) {
                ticks.tick().await;
                number += 1;
                let (target, outcome) = (target.clone(), Arc::clone(&outcome));
                requests.spawn(async move {
                    let sent = Instant::now();
                    let answer = send(&target, number.is_multiple_of(2)).await;
                    let mut outcome = outcome.lock().expect("nothing panics");
                    outcome.sent += 1;
                    outcome.slowest = outcome.slowest.max(sent.elapsed());
                    match answer {
                        Ok(true) => outcome.admitted += 1,
                        Ok(false) => outcome.denied += 1,
                        Err(failure) => outcome.failures.push((began.elapsed(), failure)),
                    }
                });
                while requests.try_join_next().is_some() {}
            }
            while requests.join_next().await.is_some() {}
            std::mem::take(&mut *outcome.lock().expect("nothing panics"))
        });
        Self { running, task }
    }

    pub async fn stop(self) -> Result<Outcome> {
        self.running.store(false, Ordering::Relaxed);
        Ok(self.task.await?)
    }
}

/// Sends one request. Returns whether it was allowed.
async fn send(target: &Target, post: bool) -> Result<bool, String> {
    let request = if post {
        target
            .client
            .post(format!("{}/api/v1/check", target.base))
            .header("x-service-token", &target.service_token)
            .json(&json!({"key": target.key, "endpoint": "POST /orders"}))
    } else {
        target
            .client
            .get(format!("{}/v1/echo", target.base))
            .header("x-api-key", &target.key)
    };
    let response = request.send().await.map_err(|error| chain(&error))?;
    let status = response.status().as_u16();
    let body = response.text().await.map_err(|error| chain(&error))?;
    match (status, post) {
        (200, true) => Ok(body.contains("\"allowed\":true")),
        (200, false) => Ok(true),
        (429, false) => Ok(false),
        _ => Err(format!("{status}: {body}")),
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
