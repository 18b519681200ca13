//! The counts of a running test.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use super::target::Answer;

/// How long a replica may hold tokens, assuming the default of `QUOTA_LEASE_TTL`.
const LEASE_TTL: Duration = Duration::from_millis(100);

/// The maximum number of requests in flight. Further requests are counted, but not sent.
pub(super) const MAX_IN_FLIGHT: usize = 10_000;

/// The responses to requests with one key.
#[derive(Debug, Default, Clone)]
pub(super) struct KeyCount {
    pub(super) allowed: u64,
    pub(super) denied: u64,
    /// The rate, in tokens per minute.
    pub(super) rpm: Option<u64>,
    /// The size of the bucket.
    pub(super) burst: Option<u64>,
    /// When the first request was sent.
    first: Option<Instant>,
    /// The time of the last response to an allowed request.
    last: Option<Instant>,
}

#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) keys: Vec<KeyCount>,
    /// The latencies of the requests that got a decision, in microseconds.
    pub(super) latencies: Vec<u64>,
    /// The number of requests without a decision, by reason.
    pub(super) failures: BTreeMap<String, u64>,
    /// The number of requests that were decided without Redis.
    pub(super) degraded: u64,
    /// The number of requests that were not sent, because [`MAX_IN_FLIGHT`] others were in flight when they were due.
    pub(super) unsent: u64,
}

impl Counts {
    pub(super) fn add(
        &mut self,
        key: usize,
        answer: Result<Answer, String>,
        micros: u64,
        (sent, ended): (Instant, Instant),
    ) {
        let of_key = &mut self.keys[key];
        of_key.first = Some(of_key.first.map_or(sent, |first| first.min(sent)));
        match answer {
            Ok(answer) => {
                self.latencies.push(micros);
                self.degraded += u64::from(answer.degraded);
                of_key.rpm = answer.rpm.or(of_key.rpm);
                of_key.burst = answer.burst.or(of_key.burst);
                if answer.allowed {
                    of_key.allowed += 1;
                    of_key.last = of_key.last.max(Some(ended));
                } else {
                    of_key.denied += 1;
                }
            }
            Err(reason) => *self.failures.entry(reason).or_default() += 1,
        }
    }

    /// Returns the numbers of allowed, denied, and failed requests.
    pub(super) fn totals(&self) -> (u64, u64, u64) {
        let allowed = self.keys.iter().map(|key| key.allowed).sum();
        let denied = self.keys.iter().map(|key| key.denied).sum();
        (allowed, denied, self.failures.values().sum())
    }
}

impl KeyCount {
    /// Returns the maximum number of tokens that the key's rate limit allows during the test: the burst, plus the
    /// tokens that refill during the test and during the time for which a replica may hold tokens.
    pub(super) fn sold(&self) -> Option<f64> {
        let time = self.last?.duration_since(self.first?) + LEASE_TTL;
        let (rpm, burst) = (self.rpm?, self.burst?);
        #[expect(clippy::cast_precision_loss, reason = "limits are far below 2^52")]
        Some(burst as f64 + rpm as f64 / 60.0 * time.as_secs_f64())
    }
}
