//! `quota loadtest`: sends requests to a running installation at a fixed rate, and compares the number of allowed
//! requests with the limits.
//!
//! The load is open-loop: each request is due at a fixed time, whether or not earlier requests have completed. Latency
//! is measured from that time, so a stalled server does not seem fast.

mod counts;
mod summary;
mod target;

use std::{
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
use tokio::{
    task::JoinSet,
    time::{Instant, interval, sleep_until},
};
use url::Url;

use self::{
    counts::{Counts, KeyCount, MAX_IN_FLIGHT},
    summary::summary,
    target::Target,
};

#[derive(Args)]
pub struct LoadTest {
    /// The address of a server or of the proxy in front of it, such as `https://quota.example.com`
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

/// Runs the test and prints the result.
///
/// # Errors
///
/// Fails if a file cannot be read, if there are no keys, or if no request resulted in a decision.
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
    let target = Arc::new(Target::new(
        test.url.clone(),
        keys,
        service_token,
        test.cost,
        test.ca.as_deref(),
    )?);
    let counts = Arc::new(Mutex::new(Counts {
        keys: vec![KeyCount::default(); target.key_count()],
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
        if requests.len() >= MAX_IN_FLIGHT {
            counts
                .lock()
                .map_err(|_| anyhow::anyhow!("a request panicked"))?
                .unsent += 1;
            continue;
        }
        let key = usize::try_from(number % target.key_count() as u64)?;
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
