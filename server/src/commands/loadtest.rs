//! `quota loadtest`: sends requests to a running installation at a fixed rate, and compares the number of allowed
//! requests with the limits.
//!
//! The load is open-loop: each request is due at a fixed time, whether or not earlier requests have completed. Latency
//! is measured from that time, so a stalled server does not seem fast.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{IsTerminal as _, Write as _, stderr},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, ensure};
use clap::Args;
use reqwest::{Client, StatusCode, header::HeaderMap};
use tokio::{
    task::JoinSet,
    time::{Instant, interval, sleep_until},
};
use url::Url;

/// A request that takes longer than this counts as failed.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The maximum number of requests in flight. Requests that exceed it are counted but not sent.
const IN_FLIGHT: usize = 10_000;
/// How long another replica may hold tokens: the default of `QUOTA_LEASE_TTL`.
const LEASE_TTL: Duration = Duration::from_millis(100);
const BAR: usize = 50;

#[derive(Args)]
pub struct LoadTest {
    /// The address of a server or of the proxy in front of it, such as https://quota.example.com
    url: Url,
    /// A file with API keys, one per line. Requests use the keys in turn
    #[arg(long, value_name = "FILE")]
    keys: PathBuf,
    /// A file with a service token. If set, the test calls `POST /v1/check` instead of `GET /v1/echo`
    #[arg(long, value_name = "FILE")]
    service_token: Option<PathBuf>,
    /// Requests per second, across all keys
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// Duration in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,
    /// The cost of each check. Requires a service token
    #[arg(long, default_value_t = 1, requires = "service_token", value_parser = clap::value_parser!(u32).range(1..))]
    cost: u32,
    /// A file with the PEM certificate of a certificate authority to trust, such as a local Caddy's
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

/// Returns the non-empty lines of a file.
fn lines(path: &PathBuf) -> anyhow::Result<Vec<String>> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(lines.map(str::to_owned).collect())
}

/// The responses to requests with one key.
#[derive(Debug, Default, Clone)]
struct KeyCount {
    allowed: u64,
    denied: u64,
    /// The rate, in tokens per minute.
    rpm: Option<u64>,
    /// The size of the bucket.
    burst: Option<u64>,
    /// When the first request was sent.
    first: Option<Instant>,
    /// The time of the last response to an allowed request.
    last: Option<Instant>,
}

#[derive(Debug, Default)]
struct Counts {
    keys: Vec<KeyCount>,
    /// The latencies of the requests, in microseconds.
    latencies: Vec<u64>,
    /// The number of requests without a decision, by reason.
    failures: BTreeMap<String, u64>,
    /// Requests that were decided without Redis.
    degraded: u64,
    /// Requests that were due while too many others were in flight.
    unsent: u64,
}

/// The parts of a response that the test needs.
struct Answer {
    allowed: bool,
    degraded: bool,
    rpm: Option<u64>,
    burst: Option<u64>,
}

struct Target {
    client: Client,
    url: Url,
    keys: Vec<String>,
    service_token: Option<String>,
    cost: u32,
}

impl Target {
    async fn send(&self, key: usize) -> Result<Answer, String> {
        let key = &self.keys[key];
        let request = match &self.service_token {
            None => self.client.get(self.url.clone()).header("X-API-Key", key),
            Some(token) => {
                let body = serde_json::json!({"key": key, "cost": self.cost, "endpoint": "quota loadtest"});
                let post = self.client.post(self.url.clone());
                post.header("X-Service-Token", token)
                    .header("Content-Type", "application/json")
                    .body(body.to_string())
            }
        };
        let response = request.send().await.map_err(|error| reason(&error))?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = response.bytes().await.map_err(|error| reason(&error))?;
        match (status, &self.service_token) {
            (StatusCode::OK, None) => Ok(answer(true, &headers)),
            (StatusCode::TOO_MANY_REQUESTS, None) => Ok(answer(false, &headers)),
            (StatusCode::OK, Some(_)) => checked(&body),
            _ => Err(format!("status {}", status.as_u16())),
        }
    }
}

/// Returns the innermost cause. It is the same for all requests that fail for the same reason.
fn reason(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return format!("no response within {} s", TIMEOUT.as_secs());
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn answer(allowed: bool, headers: &HeaderMap) -> Answer {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    Answer {
        allowed,
        degraded: headers.contains_key("x-quota-degraded"),
        rpm: text("ratelimit-policy").and_then(rpm),
        burst: text("x-ratelimit-limit").and_then(|limit| limit.parse().ok()),
    }
}

/// Returns the rate from a header such as `"rpm";q=600;w=60, "daily";q=50000;w=86400`.
fn rpm(policies: &str) -> Option<u64> {
    let (_, rest) = policies.split_once("\"rpm\";q=")?;
    rest.split([';', ',']).next()?.trim().parse().ok()
}

fn checked(body: &[u8]) -> Result<Answer, String> {
    let body: serde_json::Value =
        serde_json::from_slice(body).map_err(|_| "the response is not JSON".to_owned())?;
    let headers = &body["headers"];
    let text = |name: &str| headers[name].as_str();
    match (body["allowed"].as_bool(), body["code"].as_str()) {
        (Some(allowed), Some("allowed" | "quota_exceeded" | "reduced_capacity")) => Ok(Answer {
            allowed,
            degraded: !headers["X-Quota-Degraded"].is_null(),
            rpm: text("RateLimit-Policy").and_then(rpm),
            burst: text("X-RateLimit-Limit").and_then(|limit| limit.parse().ok()),
        }),
        (_, code) => Err(format!("code {}", code.unwrap_or("missing"))),
    }
}

/// Runs the test and prints the result.
///
/// # Errors
///
/// Fails if a file cannot be read, or if no request resulted in a decision.
pub async fn run(test: LoadTest) -> anyhow::Result<()> {
    let keys = lines(&test.keys)?;
    ensure!(!keys.is_empty(), "{} contains no keys", test.keys.display());
    let service_token = match &test.service_token {
        None => None,
        Some(path) => {
            let token = lines(path)?.into_iter().next();
            Some(token.with_context(|| format!("{} is empty", path.display()))?)
        }
    };
    let mut client = Client::builder()
        .user_agent("quota-loadtest")
        .timeout(TIMEOUT)
        .redirect(reqwest::redirect::Policy::none());
    if let Some(path) = &test.ca {
        let pem = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        client = client.tls_certs_merge([reqwest::Certificate::from_pem(&pem)?]);
    }
    let mut url = test.url.clone();
    let path = if service_token.is_some() {
        "v1/check"
    } else {
        "v1/echo"
    };
    url.path_segments_mut()
        .ok()
        .context("the URL cannot have a path")?
        .pop_if_empty()
        .extend(path.split('/'));
    let target = Arc::new(Target {
        client: client.build()?,
        url,
        keys,
        service_token,
        cost: test.cost,
    });
    let counts = Arc::new(Mutex::new(Counts {
        keys: vec![KeyCount::default(); target.keys.len()],
        ..Counts::default()
    }));
    let running = Arc::new(AtomicBool::new(true));
    let progress = tokio::spawn(report_progress(
        Arc::clone(&counts),
        Arc::clone(&running),
        u64::from(test.rate) * u64::from(test.seconds),
    ));
    let elapsed = send_all(&test, &target, &counts).await?;
    running.store(false, Ordering::Relaxed);
    progress.await?;
    let counts = counts
        .lock()
        .map_err(|_| anyhow::anyhow!("a request panicked"))?;
    print!("{}", summary(&counts, u64::from(test.cost), elapsed));
    let decided = counts.keys.iter().any(|key| key.allowed + key.denied > 0);
    ensure!(decided, "no request got a decision");
    Ok(())
}

/// Sends each request when it is due. Returns the time until the last response.
async fn send_all(
    test: &LoadTest,
    target: &Arc<Target>,
    counts: &Arc<Mutex<Counts>>,
) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let mut requests = JoinSet::new();
    for number in 0..u64::from(test.rate) * u64::from(test.seconds) {
        let due = began + Duration::from_nanos(number * 1_000_000_000 / u64::from(test.rate));
        sleep_until(due).await;
        while let Some(done) = requests.try_join_next() {
            done?;
        }
        if requests.len() >= IN_FLIGHT {
            counts
                .lock()
                .map_err(|_| anyhow::anyhow!("a request panicked"))?
                .unsent += 1;
            continue;
        }
        let key = usize::try_from(number % target.keys.len() as u64)?;
        let (target, counts) = (Arc::clone(target), Arc::clone(counts));
        requests.spawn(async move {
            let sent = Instant::now();
            let answer = target.send(key).await;
            let ended = Instant::now();
            let micros = u64::try_from((ended - due).as_micros()).unwrap_or(u64::MAX);
            if let Ok(mut counts) = counts.lock() {
                counts.add(key, answer, micros, (sent, ended));
            }
        });
    }
    while let Some(done) = requests.join_next().await {
        done?;
    }
    Ok(began.elapsed())
}

impl Counts {
    fn add(
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

    fn totals(&self) -> (u64, u64, u64) {
        let allowed = self.keys.iter().map(|key| key.allowed).sum();
        let denied = self.keys.iter().map(|key| key.denied).sum();
        (allowed, denied, self.failures.values().sum())
    }
}

impl KeyCount {
    /// Returns the maximum number of tokens that the key's rate limit allows during the test: the burst, plus the rate
    /// over the duration of the test and the time for which a replica may hold tokens.
    fn sold(&self) -> Option<f64> {
        let time = self.last?.duration_since(self.first?) + LEASE_TTL;
        let (rpm, burst) = (self.rpm?, self.burst?);
        #[expect(clippy::cast_precision_loss, reason = "limits are far below 2^52")]
        Some(burst as f64 + rpm as f64 / 60.0 * time.as_secs_f64())
    }
}

async fn report_progress(counts: Arc<Mutex<Counts>>, running: Arc<AtomicBool>, all: u64) {
    let mut ticks = interval(Duration::from_secs(1));
    ticks.tick().await;
    let is_terminal = stderr().is_terminal();
    while running.load(Ordering::Relaxed) {
        // Check frequently, so that the wait ends soon after the last response.
        for _ in 0..10 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if !running.load(Ordering::Relaxed) {
                break;
            }
        }
        let Ok((allowed, denied, failed)) = counts.lock().map(|counts| counts.totals()) else {
            return;
        };
        let done = allowed + denied + failed;
        let filled = usize::try_from(done * 30 / all.max(1))
            .unwrap_or(30)
            .min(30);
        let bar = format!("{}{}", "█".repeat(filled), "░".repeat(30 - filled));
        let line =
            format!("{bar} {done} of {all}: {allowed} allowed, {denied} denied, {failed} failed");
        if is_terminal {
            let _ = write!(stderr(), "\r{line}");
        } else {
            let _ = writeln!(stderr(), "{line}");
        }
    }
    if is_terminal {
        let _ = writeln!(stderr());
    }
}

/// Returns the latency in milliseconds that `share` of the requests do not exceed.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the index of a percentile, and a time to print"
)]
fn percentile(sorted: &[u64], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1] as f64 / 1000.0
}

#[expect(clippy::cast_precision_loss, reason = "numbers to print")]
fn summary(counts: &Counts, cost: u64, elapsed: Duration) -> String {
    let mut text = String::new();
    let (allowed, denied, failed) = counts.totals();
    let sent = allowed + denied + failed;
    let _ = writeln!(
        text,
        "{sent} requests in {:.1} s: {allowed} allowed, {denied} denied, {failed} failed",
        elapsed.as_secs_f64()
    );
    for (reason, count) in &counts.failures {
        let _ = writeln!(text, "  failed {count} times: {reason}");
    }
    if counts.unsent > 0 {
        let _ = writeln!(
            text,
            "  {} requests were not sent, because {IN_FLIGHT} were in flight",
            counts.unsent
        );
    }
    if counts.degraded > 0 {
        let _ = writeln!(text, "  {} were decided without Redis", counts.degraded);
    }
    let mut latencies = counts.latencies.clone();
    latencies.sort_unstable();
    if !latencies.is_empty() {
        let _ = writeln!(
            text,
            "\nLatency in milliseconds, from the time each request was due:"
        );
        for (name, share) in [
            ("p50", 0.5),
            ("p90", 0.9),
            ("p99", 0.99),
            ("p99.9", 0.999),
            ("max", 1.0),
        ] {
            let _ = writeln!(text, "  {name:<6}{:>10.2}", percentile(&latencies, share));
        }
        text.push('\n');
        text.push_str(&histogram(&latencies));
    }
    let _ = writeln!(
        text,
        "\nTokens used, compared with the maximum that the rate limits allow in this time:"
    );
    for (number, key) in counts.keys.iter().enumerate() {
        let used = key.allowed * cost;
        let number = number + 1;
        let _ = match (key.sold(), key.rpm, key.burst) {
            (Some(sold), Some(rpm), Some(burst)) => {
                let verdict = if used as f64 > sold + 1.0 {
                    "TOO MANY"
                } else {
                    "ok"
                };
                writeln!(
                    text,
                    "  key {number}: {used} of {sold:.0} ({rpm} per minute, burst {burst}), {} denied: {verdict}",
                    key.denied
                )
            }
            _ => writeln!(
                text,
                "  key {number}: {used} allowed, {} denied",
                key.denied
            ),
        };
    }
    text
}

/// Draws one bar for each doubling of the latency.
fn histogram(sorted: &[u64]) -> String {
    let mut buckets = BTreeMap::<u32, usize>::new();
    for micros in sorted {
        *buckets.entry(micros.max(&1).ilog2()).or_default() += 1;
    }
    let (Some((first, _)), Some((last, _)), Some(most)) = (
        buckets.first_key_value(),
        buckets.last_key_value(),
        buckets.values().max(),
    ) else {
        return String::new();
    };
    let mut text = String::new();
    for bucket in *first..=*last {
        let count = buckets.get(&bucket).copied().unwrap_or(0);
        let below = Duration::from_micros(2 << bucket.min(62));
        let bar = "█".repeat((count * BAR).div_ceil(*most));
        let _ = writeln!(
            text,
            "  < {:>9.3} ms {count:>8} {bar}",
            below.as_secs_f64() * 1000.0
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_of_the_rate_is_read() {
        assert_eq!(
            rpm("\"rpm\";q=600;w=60, \"daily\";q=50000;w=86400"),
            Some(600)
        );
        assert_eq!(rpm("\"daily\";q=5, \"rpm\";q=7"), Some(7));
        assert_eq!(rpm("\"daily\";q=5"), None);
    }

    #[test]
    fn percentiles_are_of_the_sorted_latencies() {
        let latencies = (1..=1000).map(|it| it * 1000).collect::<Vec<_>>();
        let found = [0.5, 0.99, 0.999, 1.0].map(|share| percentile(&latencies, share));
        assert_eq!(
            found.map(|it| format!("{it:.0}")),
            ["500", "990", "999", "1000"]
        );
        assert_eq!(format!("{:.0}", percentile(&[7000], 0.5)), "7");
    }

    #[test]
    fn every_latency_is_in_one_bar() {
        let text = histogram(&[1, 3, 1000, 1000, 5000]);
        let counts = text
            .lines()
            .filter_map(|line| line.split_whitespace().nth(3));
        let counts = counts.map(|it| it.parse::<usize>().unwrap());
        assert_eq!(counts.sum::<usize>(), 5);
        assert!(text.lines().last().unwrap().contains("8.192 ms"), "{text}");
    }
}
