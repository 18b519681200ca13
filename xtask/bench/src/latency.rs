//! Response times of all servers at the same constant rate. In each round, the rate is 70% of the rate at which the plain
//! poem server is saturated. That rate is measured at the beginning and at the end of the round, because the speed of a
//! virtual machine can change, and rounds in which it has changed are omitted. Requests that were due while a core was
//! not running, or shortly thereafter, are omitted too.
//!
//! Each request has a time at which it is due. Response times are measured from that time, so they include the delay of
//! requests that had to wait for a connection because earlier responses were late.

use std::{
    cell::Cell,
    path::Path,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::LocalSet,
};

use crate::{
    http1,
    load::{CONNECTIONS, Load, echo},
    process::{Cores, Server},
    rounds::{keys, median},
    stalls::{StallWatch, Stalls},
};

const WARM_UP: Duration = Duration::from_millis(500);
/// The rate of requests, as a fraction of the rate at which the plain poem server is saturated.
const FRACTION: f64 = 0.7;
/// How much the rate at which the plain poem server is saturated may change during a round, as a fraction of the rate at
/// the beginning.
const CHANGE_MAX: f64 = 0.15;
/// The minimum number of rounds that must remain.
const ROUNDS_MIN: usize = 5;
/// The minimum number of requests per case that must remain.
const REQUESTS_MIN: usize = 10_000;
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
    /// The response times of all requests.
    all: Vec<Duration>,
    /// The response times of the requests that no stall delayed.
    times: Vec<Duration>,
    /// The fraction of the requests that were due but unsent at the end. They were sent later.
    unsent: f64,
}

/// Percentiles in microseconds.
#[derive(Clone, Copy)]
struct Percentiles {
    p50: f64,
    p99: f64,
    /// The 99th percentile, including requests that stalls delayed.
    p99_of_all: f64,
    /// The fraction of the requests that stalls delayed.
    delayed: f64,
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
        server.give_database_lowest_priority()?;
        let (ample, scant) = keys(&server)?;
        cases.push(Case {
            name,
            server,
            request: echo(if status == 200 { &ample } else { &scant }),
            status,
        });
    }

    let load = Load::new()?;
    for case in &cases {
        load.put(case.server.addr, WARM_UP, &case.request)?;
        case.server.cpu_when_idle()?;
    }
    let watched = cores.map_or(vec![], |it| vec![it.servers, it.load]);
    let watch = StallWatch::start(&watched)
        .inspect_err(|error| eprintln!("stalls of the machine are not omitted: {error:#}"))
        .ok()
        .filter(|_| !watched.is_empty());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut measured: Vec<Vec<Outcome>> = cases.iter().map(|_| Vec::new()).collect();
    let mut kept = Vec::new();
    let mut rates = Vec::new();
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        let before = saturated(&load, &cases[0], time, watch.as_ref())?;
        let rate = FRACTION * before;
        rates.push(rate);
        for (case, outcomes) in cases.iter().zip(&mut measured) {
            let local = LocalSet::new();
            let outcome = local
                .block_on(&runtime, open_loop(case, rate, time, watch.as_ref()))
                .with_context(|| case.name)?;
            // Usage that is stored later must not disturb the next case.
            case.server.cpu_when_idle()?;
            case.server.empty_log()?;
            outcomes.push(outcome);
        }
        let after = saturated(&load, &cases[0], time, watch.as_ref())?;
        let is_steady = (after - before).abs() <= CHANGE_MAX * before;
        // If the plain server did not keep up, the machine was slower for a while, and the round says nothing about the
        // other servers either.
        let kept_up = measured[0].last().is_some_and(|it| it.unsent <= UNSENT_MAX);
        kept.push(is_steady && kept_up);
    }
    for outcomes in &mut measured {
        retain(outcomes, &kept);
    }
    retain(&mut rates, &kept);
    ensure!(
        rates.len() >= ROUNDS_MIN,
        "the machine's speed was steady in only {} of {rounds} rounds, and {ROUNDS_MIN} are needed",
        rates.len()
    );
    for (case, outcomes) in cases.iter().zip(&measured) {
        let counted = outcomes.iter().map(|it| it.times.len()).sum::<usize>();
        ensure!(
            counted >= REQUESTS_MIN,
            "{}: stalls of the machine delayed all but {counted} requests",
            case.name
        );
    }
    let measured = measured
        .iter()
        .map(|it| percentiles(it))
        .collect::<Vec<_>>();
    print(&cases, &measured, &rates, rounds, time, cores);
    if watch.is_none() {
        println!("Stalls of the machine are not omitted.");
    }
    Ok(())
}

fn stalls_since_last_call(watch: Option<&StallWatch>) -> Stalls {
    watch.map(StallWatch::take).unwrap_or_default()
}

/// Removes the values of rounds that are not kept.
fn retain<T>(values: &mut Vec<T>, kept: &[bool]) {
    let mut kept = kept.iter();
    values.retain(|_| kept.next().is_some_and(|is_kept| *is_kept));
}

/// Returns the requests per second of a closed loop, without the time of stalls.
fn saturated(load: &Load, case: &Case, time: Duration, watch: Option<&StallWatch>) -> Result<f64> {
    stalls_since_last_call(watch);
    let began = Instant::now();
    let statuses = load.put(case.server.addr, time, &case.request)?;
    let stalled = stalls_since_last_call(watch).total();
    let total = u32::try_from(statuses.values().sum::<u64>())?;
    let running = began.elapsed().saturating_sub(stalled);
    ensure!(!running.is_zero(), "the machine was stalled");
    Ok(f64::from(total) / running.as_secs_f64())
}

/// The requests that are due during a round.
struct Schedule {
    start: Instant,
    interval: Duration,
    end: Instant,
    next: Cell<u32>,
}

impl Schedule {
    /// Returns the time at which the next request is due, or `None` after the last request.
    fn take(&self) -> Option<Instant> {
        let number = self.next.get();
        let due = self.start + self.interval * number;
        (due < self.end).then(|| {
            self.next.set(number + 1);
            due
        })
    }

    /// Returns the number of requests that are due and have not been taken.
    fn unsent(&self, now: Instant) -> u64 {
        let elapsed = now.min(self.end).duration_since(self.start).as_nanos();
        let due = elapsed.div_ceil(self.interval.as_nanos());
        u64::try_from(due)
            .unwrap_or(u64::MAX)
            .saturating_sub(u64::from(self.next.get()))
    }
}

/// Sends requests at this rate.
async fn open_loop(
    case: &Case,
    rate: f64,
    time: Duration,
    watch: Option<&StallWatch>,
) -> Result<Outcome> {
    stalls_since_last_call(watch);
    let mut streams = Vec::new();
    for _ in 0..CONNECTIONS {
        let stream = TcpStream::connect(case.server.addr).await?;
        stream.set_nodelay(true)?;
        streams.push(stream);
    }
    let start = Instant::now();
    let schedule = Rc::new(Schedule {
        start,
        interval: Duration::from_secs_f64(1.0 / rate),
        end: start + time,
        next: Cell::new(0),
    });
    let connections: Vec<_> = streams
        .into_iter()
        .map(|stream| {
            let (schedule, request) = (schedule.clone(), case.request.clone());
            tokio::task::spawn_local(connection(stream, schedule, request, case.status))
        })
        .collect();
    tokio::time::sleep_until((start + time).into()).await;
    let unsent = schedule.unsent(Instant::now());
    let (mut times, mut others) = (Vec::new(), 0);
    for connection in connections {
        let (of_connection, of_other_status) = connection.await??;
        times.extend(of_connection);
        others += of_other_status;
    }
    // At one request per minute, a few requests are still allowed.
    ensure!(
        !times.is_empty() && others * 100 <= times.len(),
        "unexpected responses: {others}"
    );
    #[expect(clippy::cast_precision_loss, reason = "fewer requests than 2^52")]
    let unsent = unsent as f64 / times.len() as f64;
    let stalls = stalls_since_last_call(watch);
    let all = times.iter().map(|(_, time)| *time).collect();
    times.retain(|(due, _)| !stalls.delayed(*due));
    let times = times.into_iter().map(|(_, time)| time).collect();
    Ok(Outcome { all, times, unsent })
}

/// Sends requests when they are due, or as soon as the response to the previous one has arrived. Returns the response
/// times, and the number of responses whose status is not `expected`.
async fn connection(
    mut stream: TcpStream,
    schedule: Rc<Schedule>,
    request: Vec<u8>,
    expected: u16,
) -> Result<(Vec<(Instant, Duration)>, usize)> {
    let mut bytes = vec![0; 16 * 1024];
    let (mut times, mut others) = (Vec::new(), 0);
    while let Some(due) = schedule.take() {
        // Yield in a loop, because a timer would be up to a millisecond late.
        while Instant::now() < due {
            tokio::task::yield_now().await;
        }
        stream.write_all(&request).await?;
        let mut read = 0;
        let status = loop {
            let length = stream.read(&mut bytes[read..]).await?;
            if length == 0 {
                bail!("the server closed a connection");
            }
            read += length;
            if let Some((status, _)) = http1::answer(&bytes[..read])? {
                break status;
            }
        };
        times.push((due, due.elapsed()));
        others += usize::from(status != expected);
    }
    Ok((times, others))
}

/// Returns the percentiles of the requests in all rounds.
fn percentiles(rounds: &[Outcome]) -> Percentiles {
    let sorted = |of: fn(&Outcome) -> &[Duration]| {
        let mut times: Vec<_> = rounds.iter().flat_map(of).copied().collect();
        times.sort_unstable();
        times
    };
    let at = |times: &[Duration], percent: usize| {
        let index = (times.len() * percent).div_ceil(100).max(1) - 1;
        times[index].as_secs_f64() * 1e6
    };
    let (all, times) = (sorted(|it| &it.all), sorted(|it| &it.times));
    #[expect(clippy::cast_precision_loss, reason = "fewer requests than 2^52")]
    let delayed = 1.0 - times.len() as f64 / all.len() as f64;
    Percentiles {
        p50: at(&times, 50),
        p99: at(&times, 99),
        p99_of_all: at(&all, 99),
        delayed,
    }
}

fn print(
    cases: &[Case],
    measured: &[Percentiles],
    rates: &[f64],
    rounds: u32,
    time: Duration,
    cores: Option<Cores>,
) {
    println!(
        "| `GET /v1/echo` | p50 µs | p99 µs | p99, bare poem = 1 | delayed by stalls | p99 µs with them |"
    );
    println!("|---|---:|---:|---:|---:|---:|");
    for (case, it) in cases.iter().zip(measured) {
        println!(
            "| {} | {:.0} | {:.0} | {:.2} | {:.1}% | {:.0} |",
            case.name,
            it.p50,
            it.p99,
            it.p99 / measured[0].p99,
            it.delayed * 100.0,
            it.p99_of_all,
        );
    }
    println!();
    println!(
        "Percentiles of the requests in the {} of {rounds} rounds in which the machine's speed was steady, without \
         requests that were due while a core was not running, or before the delay was caught up with. In each round, each case runs for {} ms. Requests are sent on {CONNECTIONS} keep-alive connections, at {:.0}% of the \
         rate at which bare poem was saturated in the same round (median: {:.0} requests/s). Response times count from \
         the time at which a request is due. {} PostgreSQL, to which `quota` writes usage, has the lowest priority. \
         Target: at most 1.2.",
        rates.len(),
        time.as_millis(),
        FRACTION * 100.0,
        median(rates.iter().copied()),
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
    use std::{
        cell::Cell,
        time::{Duration, Instant},
    };

    use super::{Outcome, Schedule, percentiles};

    #[test]
    fn percentiles_are_those_of_all_rounds() {
        let round = |micros: std::ops::RangeInclusive<u64>, delayed: usize| {
            let times: Vec<_> = micros.rev().map(Duration::from_micros).collect();
            let late = std::iter::repeat_n(Duration::from_secs(1), delayed);
            Outcome {
                all: late.chain(times.iter().copied()).collect(),
                times,
                unsent: 0.0,
            }
        };
        let rounded = |rounds: &[Outcome]| {
            let it = percentiles(rounds);
            let percent = it.delayed * 100.0;
            format!(
                "{:.0} {:.0} {:.0} {percent:.0}%",
                it.p50, it.p99, it.p99_of_all
            )
        };
        let whole = [round(1..=200, 0)];
        assert_eq!(rounded(&whole), "100 198 198 0%");
        let parts = [round(101..=200, 50), round(1..=100, 0)];
        assert_eq!(rounded(&parts), "100 198 1000000 20%");
        assert_eq!(rounded(&[round(7..=7, 0)]), "7 7 7 0%");
    }

    #[test]
    fn a_schedule_has_the_requests_of_its_time() {
        let start = Instant::now();
        let schedule = Schedule {
            start,
            interval: Duration::from_millis(10),
            end: start + Duration::from_millis(35),
            next: Cell::new(0),
        };
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(schedule.unsent(at(25)), 3);
        let due: Vec<_> = std::iter::from_fn(|| schedule.take()).collect();
        assert_eq!(due, [at(0), at(10), at(20), at(30)]);
        assert_eq!(schedule.unsent(at(1000)), 0);
    }
}
