//! Response times of all servers at the same constant rate. In each round, the rate is 70% of bare poem's capacity,
//! measured at the beginning of the round. Percentiles are calculated for each round, and their medians over the rounds
//! are reported, because the speed of a virtual machine can change within seconds. Requests that were due while a core
//! was not running, or shortly thereafter, are omitted.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    load::{CONNECTIONS, echo},
    polling_load,
    process::{Cores, Server},
    rounds::{keys, median},
    stalls::{StallWatch, Stalls},
};

const WARM_UP: Duration = Duration::from_millis(500);
/// The rate of requests, as a fraction of bare poem's capacity.
const FRACTION: f64 = 0.7;
/// The minimum number of rounds that must remain.
const ROUNDS_MIN: usize = 5;
/// The minimum number of requests per case and round that must remain.
const REQUESTS_MIN: usize = 1000;
/// If more than this fraction of a round's requests are due but unsent at the end of the round, the server did not keep
/// up.
const UNSENT_MAX: f64 = 0.01;

struct Case {
    name: &'static str,
    server: Server,
    request: Vec<u8>,
    status: u16,
}

/// What happened to the requests of one case in one round.
struct Outcome {
    /// The response times of the requests that no stall delayed, in ascending order.
    times: Vec<Duration>,
    /// The response times of the other requests.
    delayed: Vec<Duration>,
    /// The fraction of the requests that were due but unsent at the end. They were sent later.
    unsent: f64,
    /// The fraction of the requests whose usage had been committed when the last response arrived. 0 for bare poem.
    stored: f64,
}

/// A server under the load of a closed loop.
struct Saturated {
    /// Requests per second.
    rate: f64,
    /// The server's CPU time per second. Less than 1 if the load, not the server, is the bottleneck.
    busy: f64,
}

impl Saturated {
    /// Returns the number of requests per second that the server could handle if its core were always busy.
    fn capacity(&self) -> f64 {
        self.rate / self.busy.min(1.0)
    }
}

/// Percentiles in microseconds.
#[derive(Clone, Copy)]
struct Percentiles {
    p50: f64,
    p99: f64,
    /// The median of the rounds' ratios of the 99th percentile to that of bare poem.
    ratio: f64,
    /// The 99th percentile of all requests of all kept rounds combined, including those that stalls delayed.
    p99_combined: f64,
    /// The fraction of the requests in the kept rounds that stalls delayed.
    delayed: f64,
    /// The median of the rounds' fractions of stored usage.
    stored: f64,
}

pub(crate) fn run(quota: &Path, rounds: u32, time: Duration) -> Result<()> {
    let cores = Cores::pick();
    let poem = Server::bare("poem", cores)?;
    let direct = [("QUOTA_DIRECT_RESPONSES", "on".to_owned())];
    let general = [("QUOTA_DIRECT_RESPONSES", "off".to_owned())];
    let mut cases = vec![Case {
        name: "bare poem",
        server: poem,
        request: echo(""),
        status: 200,
    }];
    for (name, settings, status) in [
        ("quota with direct responses, admitted", &direct, 200),
        ("quota with direct responses, denied", &direct, 429),
        ("quota without direct responses, admitted", &general, 200),
        ("quota without direct responses, denied", &general, 429),
    ] {
        let server = Server::quota(quota, "info", cores, settings)?;
        server.turn_off_autovacuum()?;
        let (ample, scant) = keys(&server)?;
        cases.push(Case {
            name,
            server,
            request: echo(if status == 200 { &ample } else { &scant }),
            status,
        });
    }

    for case in &cases {
        polling_load::closed_loop(case.server.addr, WARM_UP, &case.request)?;
        case.server.cpu_when_idle()?;
    }
    let watched = cores.map_or(vec![], |it| vec![it.servers, it.load]);
    let watch = StallWatch::start(&watched)
        .inspect_err(|error| eprintln!("stalls of the machine are not omitted: {error:#}"))
        .ok()
        .filter(|_| !watched.is_empty());
    let mut measured = Vec::new();
    let mut saturations = Vec::new();
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        let poem = saturated(&cases[0], time, watch.as_ref())?;
        // Bare poem starts from an idle core, like the other cases.
        cases[0].server.cpu_when_idle()?;
        let rate = FRACTION * poem.capacity();
        let mut outcomes = Vec::new();
        for case in &cases {
            if case.server.has_database() {
                // In every round, because PostgreSQL starts new processes for new connections.
                case.server.give_database_lowest_priority()?;
            }
            let outcome = measure(case, rate, time, watch.as_ref()).with_context(|| case.name)?;
            // Usage that is stored later must not disturb the next case.
            case.server.cpu_when_idle()?;
            case.server.empty_log()?;
            outcomes.push(outcome);
        }
        // If bare poem did not keep up, the machine was slower for a while, and the round says nothing about the other
        // servers either. If stalls delayed most requests of a case, too few are left for a 99th percentile.
        let is_kept = outcomes[0].unsent <= UNSENT_MAX
            && outcomes.iter().all(|it| it.times.len() >= REQUESTS_MIN);
        if is_kept {
            measured.push(outcomes);
            saturations.push(poem);
        }
    }
    ensure!(
        measured.len() >= ROUNDS_MIN,
        "only {} of {rounds} rounds are usable, and {ROUNDS_MIN} are needed: in the others, bare poem did not keep up, or \
         stalls delayed too many requests",
        measured.len()
    );
    print(
        &cases,
        &percentiles(&measured),
        &saturations,
        rounds,
        time,
        cores,
    );
    if watch.is_none() {
        println!("Stalls of the machine are not omitted.");
    }
    Ok(())
}

fn stalls_since_last_call(watch: Option<&StallWatch>) -> Stalls {
    watch.map(StallWatch::take).unwrap_or_default()
}

/// Runs a closed loop. Times do not include stalls.
fn saturated(case: &Case, time: Duration, watch: Option<&StallWatch>) -> Result<Saturated> {
    stalls_since_last_call(watch);
    let (began, cpu) = (Instant::now(), case.server.cpu()?);
    let statuses = polling_load::closed_loop(case.server.addr, time, &case.request)?;
    let stalled = stalls_since_last_call(watch).total();
    let total = u32::try_from(statuses.values().sum::<u64>())?;
    let cpu = case.server.cpu()?.saturating_sub(cpu);
    let running = began.elapsed().saturating_sub(stalled);
    ensure!(!running.is_zero(), "the machine was stalled");
    Ok(Saturated {
        rate: f64::from(total) / running.as_secs_f64(),
        busy: cpu.div_duration_f64(running),
    })
}

/// Sends requests to a case's server at this rate for one round, and returns the outcome. Fails if more than 1% of the
/// responses have an unexpected status.
fn measure(case: &Case, rate: f64, time: Duration, watch: Option<&StallWatch>) -> Result<Outcome> {
    const STORED: &str = "quota_usage_records_shipped_total";
    let stored = case.server.metric(STORED)?;
    stalls_since_last_call(watch);
    let responses = polling_load::open_loop(case.server.addr, rate, time, &case.request)?;
    let stalls = stalls_since_last_call(watch);
    let stored = case.server.metric(STORED)? - stored;
    let total = responses.times.len();
    let expected = responses.statuses.get(&case.status).copied().unwrap_or(0);
    let others = responses.statuses.values().sum::<u64>() - expected;
    // At one request per minute, a few requests are still allowed.
    ensure!(
        total > 0 && usize::try_from(others)? * 100 <= total,
        "unexpected responses: {:?}",
        responses.statuses
    );
    let (mut times, mut delayed) = (Vec::with_capacity(total), Vec::new());
    for (due, time) in responses.times {
        if stalls.delayed(due) {
            delayed.push(time);
        } else {
            times.push(time);
        }
    }
    times.sort_unstable();
    #[expect(clippy::cast_precision_loss, reason = "fewer requests than 2^52")]
    let of_total = |number: u64| number as f64 / total as f64;
    Ok(Outcome {
        times,
        delayed,
        unsent: of_total(responses.unsent),
        stored: of_total(stored),
    })
}

/// Returns a percentile of times in ascending order, in microseconds.
fn percentile(times: &[Duration], percent: usize) -> f64 {
    let index = (times.len() * percent).div_ceil(100).max(1) - 1;
    times[index].as_secs_f64() * 1e6
}

/// Returns the percentiles of each case. A round has the outcomes of all cases, and bare poem comes first.
fn percentiles(rounds: &[Vec<Outcome>]) -> Vec<Percentiles> {
    let p99 = |it: &Outcome| percentile(&it.times, 99);
    (0..rounds[0].len())
        .map(|case| {
            let outcomes = || rounds.iter().map(|round| &round[case]);
            let all = outcomes().flat_map(|it| it.times.iter().chain(&it.delayed));
            let mut combined: Vec<_> = all.copied().collect();
            combined.sort_unstable();
            let delayed = outcomes().map(|it| it.delayed.len()).sum::<usize>();
            let ratios = rounds.iter().map(|it| p99(&it[case]) / p99(&it[0]));
            Percentiles {
                p50: median(outcomes().map(|it| percentile(&it.times, 50))),
                p99: median(outcomes().map(p99)),
                ratio: median(ratios),
                p99_combined: percentile(&combined, 99),
                #[expect(clippy::cast_precision_loss, reason = "fewer requests than 2^52")]
                delayed: delayed as f64 / combined.len() as f64,
                stored: median(outcomes().map(|it| it.stored)),
            }
        })
        .collect()
}

fn print(
    cases: &[Case],
    measured: &[Percentiles],
    saturations: &[Saturated],
    rounds: u32,
    time: Duration,
    cores: Option<Cores>,
) {
    println!(
        "| `GET /v1/echo` | p50 µs | p99 µs | p99, bare poem = 1 | combined p99 µs | combined, bare poem = 1 | delayed by stalls | usage stored |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|");
    for (case, it) in cases.iter().zip(measured) {
        println!(
            "| {} | {:.0} | {:.0} | {:.2} | {:.0} | {:.2} | {:.1}% | {:.0}% |",
            case.name,
            it.p50,
            it.p99,
            it.ratio,
            it.p99_combined,
            it.p99_combined / measured[0].p99_combined,
            it.delayed * 100.0,
            it.stored * 100.0,
        );
    }
    println!();
    println!(
        "p50 and p99 are medians of {} of {rounds} rounds. They omit requests that were due while a core was not running \
         or while the server was still catching up afterwards. The combined p99 is that of all requests of these rounds. \
         Rounds in which bare poem did not keep up, or in which stalls left too few requests, are omitted. In each round, \
         each case runs for {} ms. Requests are sent on {CONNECTIONS} keep-alive connections, at {:.0}% of bare \
         poem's capacity in the same round (median: {:.0} requests/s). Its capacity is its rate in a closed loop divided by \
         the share of its core that it used (medians: {:.0} requests/s, {:.0}%). Response times count from the time \
         at which a request is due. {} PostgreSQL, to which `quota` writes usage, has the lowest priority, and autovacuum \
         is off. *Usage stored* is the share of a case's usage records that were committed at the end of its load; the rest \
         are committed before the next case starts. Target: at most 1.2.",
        saturations.len(),
        time.as_millis(),
        FRACTION * 100.0,
        FRACTION * median(saturations.iter().map(Saturated::capacity)),
        median(saturations.iter().map(|it| it.rate)),
        100.0 * median(saturations.iter().map(|it| it.busy)),
        match cores {
            Some(Cores { servers, load }) =>
                format!("Servers run on core {servers}, the load on core {load}."),
            None => "Nothing is pinned to a core on this machine, so the figures are less precise."
                .to_owned(),
        }
    );
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Outcome, Saturated, percentiles};

    #[test]
    fn percentiles_are_medians_over_rounds() {
        let outcome = |micros: std::ops::RangeInclusive<u64>| Outcome {
            times: micros.map(Duration::from_micros).collect(),
            delayed: vec![],
            unsent: 0.0,
            stored: 0.0,
        };
        let mut rounds = [
            vec![outcome(1..=100), outcome(101..=200)],
            vec![outcome(1..=50), outcome(901..=1000)],
            vec![outcome(1..=200), outcome(1..=100)],
        ];
        rounds[2][1].delayed = vec![Duration::from_secs(1); 100];
        let rounded: Vec<_> = percentiles(&rounds)
            .iter()
            .map(|it| {
                format!(
                    "{:.0} {:.0} {:.2} {:.0} {:.2}",
                    it.p50, it.p99, it.ratio, it.p99_combined, it.delayed
                )
            })
            .collect();
        // The rounds' 99th percentiles are 99, 50 and 198 for the first case, and 199, 999 and 99 for the second.
        assert_eq!(
            rounded,
            ["50 99 1.00 197 0.00", "150 199 2.01 1000000 0.25"]
        );
    }

    #[test]
    fn capacity_is_the_rate_when_the_core_is_always_busy() {
        let capacity = |rate, busy| Saturated { rate, busy }.capacity().round();
        let is = |rate, busy, expected: f64| (capacity(rate, busy) - expected).abs() < 0.5;
        assert!(is(80_000.0, 0.8, 100_000.0));
        // Measured CPU time can be slightly more than the elapsed time.
        assert!(is(80_000.0, 1.01, 80_000.0));
    }

    #[test]
    fn with_one_request_every_percentile_is_its_time() {
        let it = Outcome {
            times: vec![Duration::from_micros(7)],
            delayed: vec![],
            unsent: 0.0,
            stored: 0.0,
        };
        let it = percentiles(&[vec![it]])[0];
        assert_eq!(
            format!("{:.0} {:.0} {:.0}", it.p50, it.p99, it.ratio),
            "7 7 1"
        );
    }
}
