//! How well a limit holds with two instances of a server under a saturating load. If the instances share a Redis, also
//! how well it holds at the end of a fixed window, while Redis responds late, and while Redis is killed and restarted.

use std::time::Duration;

use anyhow::Result;
use futures_util::future::try_join_all;
use quota_testkit::proxy::Fault;
use tokio::{
    runtime::Runtime,
    time::{Instant, sleep, sleep_until},
};

use super::{
    LIMIT, Options,
    drive::{Attempt, Plan, drive},
    pair::{KINDS, Kind, Pair},
    revocation,
    windows::{Rule, count, latencies, length, quantile, worst_window},
};
use crate::process::Cores;

/// Connections to each instance.
const CONNECTIONS: usize = 8;

/// How long to wait at the start. In a new Redis, Quota's first epoch starts a little in the future, with empty
/// buckets.
const SETTLED: Duration = Duration::from_secs(7);

/// The length of a fixed window, which starts with the first request.
pub(super) const WINDOW: Duration = Duration::from_secs(60);
/// The load around the end of a window: how long it lasts before and after the end, and its rate.
pub(super) const AROUND_EDGE: Duration = Duration::from_secs(5);
pub(super) const EDGE_PER_SECOND: u32 = 250;
/// The length of the windows in which allowed requests are counted.
pub(crate) const ANY: Duration = Duration::from_secs(10);

pub(crate) const LATE: Duration = Duration::from_millis(50);
/// Time for the servers to notice that Redis is available again, or that it responds late.
const NOTICED: Duration = Duration::from_millis(1500);

/// When Redis is killed and restarted, and when the load ends.
pub(super) const KILLED: Duration = Duration::from_millis(3000);
pub(super) const RESTARTED: Duration = Duration::from_millis(6500);
pub(super) const ENDED: Duration = Duration::from_millis(10_500);
/// Only requests that were sent at least this long after the kill count as part of the outage.
const AFTER_KILL: Duration = Duration::from_millis(250);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Counted {
    /// The number of requests that the server's rule allows.
    pub(crate) bound: u64,
    pub(crate) allowed: u64,
    pub(crate) failed: u64,
    pub(crate) per_second: f64,
    pub(crate) p99_millis: f64,
    /// Whether any request was denied. If not, the load was too low to reach the limit.
    pub(crate) is_saturated: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Mode {
    /// Requests are allowed without a limit.
    Open,
    /// Requests fail, although their limit is not reached.
    Closed,
    /// Limits still hold.
    Limits,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Outage {
    pub(crate) mode: Mode,
    /// The fractions of requests that were allowed and denied during the outage, for a key whose limit is not reached.
    /// The other requests failed.
    pub(crate) ample: [f64; 2],
    /// The number of requests that were allowed during the whole load, for a key whose limit is reached before the
    /// outage.
    pub(crate) allowed: u64,
    /// The number of these requests that the server's rule allows.
    pub(crate) bound: u64,
}

pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) is_shared: bool,
    pub(crate) rule: Rule,
    pub(crate) saturated: Counted,
    /// The maximum number of requests allowed in any 10 seconds near the end of a fixed window.
    pub(crate) edge: Option<u64>,
    pub(crate) late: Option<Counted>,
    pub(crate) outage: Option<Outage>,
}

pub(crate) struct Accuracy {
    pub(crate) rows: Vec<Row>,
    /// How long each key was still allowed on one replica after its revocation on the other replica.
    pub(crate) revocation: Option<Vec<Duration>>,
    pub(crate) missing: Vec<String>,
}

pub(crate) fn run(options: &Options, runtime: &Runtime, cores: Option<Cores>) -> Result<Accuracy> {
    let mut missing = Vec::new();
    let mut pairs = Vec::new();
    for (name, kind) in KINDS {
        let is_included = match kind {
            Kind::Quota { .. } => options.includes(name),
            Kind::Peer { program, .. } => options.includes_program(name, program),
        };
        if !is_included {
            continue;
        }
        match Pair::start(options, runtime, cores, name, kind) {
            Ok(pair) => pairs.push(pair),
            Err(error) => missing.push(format!("{name} was not measured: {error:#}")),
        }
    }
    runtime.block_on(async {
        eprintln!("two instances: the end of a window, which takes 70 s");
        for pair in &pairs {
            begin(pair).await?;
        }
        sleep(SETTLED).await;
        let shared = pairs.iter().filter(|it| it.redis.is_some());
        let edges = try_join_all(shared.map(edge)).await?;
        let mut edges = edges.into_iter();
        let mut rows = Vec::new();
        for pair in &pairs {
            eprintln!("two instances, saturated: {}", pair.name);
            let is_shared = pair.redis.is_some();
            rows.push(Row {
                name: pair.name,
                is_shared,
                rule: pair.kind.rule(),
                saturated: saturated(pair, options).await?,
                edge: if is_shared { edges.next() } else { None },
                late: None,
                outage: None,
            });
        }
        let quota = pairs.iter().find_map(|pair| pair.quota().zip(Some(pair)));
        let revocation = match quota {
            Some((quota, pair)) => {
                eprintln!("revocation");
                Some(revocation::measure(&quota.tenant, &pair.addrs()).await?)
            }
            None => None,
        };
        for (pair, row) in pairs.iter_mut().zip(&mut rows) {
            if !row.is_shared {
                continue;
            }
            // Measure the outage first. Quota treats late responses as another outage, and buckets start empty after an
            // outage.
            eprintln!("Redis killed, then late: {}", pair.name);
            row.outage = Some(outage(pair).await?);
            sleep(NOTICED).await;
            pair.set(Fault::Late(LATE));
            sleep(NOTICED).await;
            row.late = Some(saturated(pair, options).await?);
        }
        for pair in pairs {
            pair.end().await?;
        }
        Ok(Accuracy {
            rows,
            revocation,
            missing,
        })
    })
}

/// Sends a request to each instance.
async fn begin(pair: &Pair) -> Result<()> {
    let plan = Plan {
        servers: pair.addrs(),
        requests: vec![pair.ample().await?],
        connections: 1,
        pace: Some(Duration::from_secs(1)),
        time: Duration::from_millis(500),
    };
    drive(&plan).await?;
    Ok(())
}

async fn saturated(pair: &Pair, options: &Options) -> Result<Counted> {
    let plan = Plan {
        servers: pair.addrs(),
        requests: vec![pair.limited().await?],
        connections: CONNECTIONS,
        pace: None,
        time: Duration::from_secs(options.seconds),
    };
    let log = drive(&plan).await?;
    Ok(evaluate(&log, pair.kind.rule()))
}

fn evaluate(log: &[Attempt], rule: Rule) -> Counted {
    let (allowed, denied) = (count(log, 200), count(log, 429));
    let latencies = latencies(log);
    let took = length(log);
    #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52")]
    let answered = latencies.len() as f64;
    Counted {
        bound: rule.allows(LIMIT, took),
        allowed,
        failed: log.len() as u64 - allowed - denied,
        per_second: answered / took.as_secs_f64(),
        p99_millis: quantile(&latencies, 0.99) / 1e3,
        is_saturated: denied > 0,
    }
}

/// Returns the maximum number of requests allowed in any 10 seconds around the end of a window.
async fn edge(pair: &Pair) -> Result<u64> {
    let request = pair.limited().await?;
    let one = Plan {
        servers: pair.addrs()[..1].to_vec(),
        requests: vec![request],
        connections: 1,
        pace: Some(Duration::from_secs(1)),
        time: Duration::from_millis(500),
    };
    let end = Instant::now() + WINDOW;
    drive(&one).await?;
    sleep_until(end - AROUND_EDGE).await;
    let servers = pair.addrs();
    let connections = u32::try_from(CONNECTIONS * servers.len())?;
    let around = Plan {
        servers,
        connections: CONNECTIONS,
        pace: Some(Duration::from_secs(1) * connections / EDGE_PER_SECOND),
        time: AROUND_EDGE * 2,
        ..one
    };
    Ok(worst_window(&drive(&around).await?, ANY))
}

async fn outage(pair: &mut Pair) -> Result<Outage> {
    let plan = Plan {
        servers: pair.addrs(),
        requests: vec![pair.limited().await?, pair.ample().await?],
        connections: CONNECTIONS,
        pace: None,
        time: ENDED,
    };
    let rule = pair.kind.rule();
    let faults = async {
        let Some(redis) = &mut pair.redis else { return };
        sleep(KILLED).await;
        redis.kill().await;
        sleep(RESTARTED.saturating_sub(KILLED)).await;
        redis.restart().await;
    };
    let (log, ()) = tokio::join!(drive(&plan), faults);
    Ok(evaluate_outage(&log?, rule))
}

/// Evaluates the log of two keys: request 0 uses a key whose limit is reached, and request 1 uses a key whose limit is
/// not reached.
fn evaluate_outage(log: &[Attempt], rule: Rule) -> Outage {
    let of = |request: u16| log.iter().filter(move |it| it.request == request);
    let limited: Vec<Attempt> = of(0).copied().collect();
    let during = |it: &&Attempt| {
        let sent = Duration::from_nanos(it.sent);
        (KILLED + AFTER_KILL..RESTARTED).contains(&sent)
    };
    let part = |request: u16, status: u16| {
        let sent: Vec<&Attempt> = of(request).filter(during).collect();
        let right = sent.iter().filter(|it| it.status == status).count();
        #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52")]
        let part = right as f64 / sent.len().max(1) as f64;
        part
    };
    let (exhausted, ample) = (part(0, 200), part(1, 200));
    Outage {
        mode: if ample < 0.5 {
            Mode::Closed
        } else if exhausted > 0.5 {
            Mode::Open
        } else {
            Mode::Limits
        },
        ample: [ample, part(1, 429)],
        allowed: count(&limited, 200),
        bound: rule.allows(LIMIT, length(&limited)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Attempt, ENDED, KILLED, Mode, RESTARTED, Rule, evaluate_outage};

    /// Returns a log with one request of each key per millisecond. `during` contains the statuses during the outage.
    /// Before and after the outage, the first key is denied and the second key is allowed.
    fn log(during: [u16; 2]) -> Vec<Attempt> {
        let attempt = |millis: u64, request: u16| {
            let at = Duration::from_millis(millis);
            let is_out = (KILLED..RESTARTED).contains(&at);
            let sent = millis * 1_000_000;
            let normal = [429, 200];
            let statuses = if is_out { during } else { normal };
            Attempt {
                sent,
                answered: sent + 1000,
                status: statuses[usize::from(request)],
                request,
            }
        };
        let length = u64::try_from(ENDED.as_millis()).unwrap();
        (0..length)
            .flat_map(|millis| [attempt(millis, 0), attempt(millis, 1)])
            .collect()
    }

    #[test]
    fn the_mode_during_an_outage_is_recognized() {
        let mode = |during| evaluate_outage(&log(during), Rule::Window).mode;
        assert_eq!(mode([500, 500]), Mode::Closed);
        // A server may still deny keys over their limit from memory, while other requests fail.
        assert_eq!(mode([429, 500]), Mode::Closed);
        assert_eq!(mode([200, 200]), Mode::Open);
        assert_eq!(mode([429, 200]), Mode::Limits);
    }

    #[test]
    fn only_the_limited_key_is_compared_with_the_bound() {
        let outage = evaluate_outage(&log([200, 200]), Rule::Window);
        assert_eq!((outage.allowed, outage.bound), (3500, 600));
        assert_eq!(
            outage.ample.map(f64::to_bits),
            [1.0_f64, 0.0].map(f64::to_bits)
        );
    }
}
