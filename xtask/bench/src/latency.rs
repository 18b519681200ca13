//! Response times of all servers at the same constant rate: 70% of the rate at which the plain poem server is
//! saturated.
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
};

const WARM_UP: Duration = Duration::from_millis(500);
/// The rate of requests, as a fraction of the rate at which the plain poem server is saturated.
const FRACTION: f64 = 0.7;
/// The maximum number of requests that may be due but unsent at the end of a round. If there are more, the server did
/// not keep up.
const BACKLOG_MAX: u64 = CONNECTIONS * 50;

struct Case {
    name: &'static str,
    server: Server,
    request: Vec<u8>,
    status: u16,
}

#[derive(Clone, Copy)]
struct Percentiles {
    p50: f64,
    p99: f64,
}

impl Percentiles {
    /// The percentiles of a server that cannot keep up.
    const ENDLESS: Self = Self {
        p50: f64::INFINITY,
        p99: f64::INFINITY,
    };
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
    }
    let rate = FRACTION * saturated(&load, &cases[0], time)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut measured = vec![Vec::new(); cases.len()];
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for (case, figures) in cases.iter().zip(&mut measured) {
            let local = LocalSet::new();
            let times = local
                .block_on(&runtime, open_loop(case, rate, time))
                .with_context(|| case.name)?;
            case.server.empty_log()?;
            figures.push(times.map_or(Percentiles::ENDLESS, percentiles));
        }
    }
    // The plain server cannot keep up if the machine was faster when the rate was measured. Such a round says nothing
    // about the other servers.
    let kept_up: Vec<bool> = measured[0].iter().map(|it| it.p99.is_finite()).collect();
    for figures in &mut measured {
        let mut kept_up = kept_up.iter();
        figures.retain(|_| kept_up.next().is_some_and(|kept_up| *kept_up));
    }
    ensure!(
        measured[0].len() * 2 > kept_up.len(),
        "the plain server could not keep up in at least half of the rounds"
    );
    print(&cases, &measured, rounds, rate, time, cores);
    Ok(())
}

/// Returns the requests per second of a closed loop.
fn saturated(load: &Load, case: &Case, time: Duration) -> Result<f64> {
    let mut rates = Vec::new();
    for _ in 0..5 {
        let began = Instant::now();
        let statuses = load.put(case.server.addr, time, &case.request)?;
        let total = u32::try_from(statuses.values().sum::<u64>())?;
        rates.push(f64::from(total) / began.elapsed().as_secs_f64());
    }
    Ok(median(rates.into_iter()))
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
    fn backlog(&self, now: Instant) -> u64 {
        let elapsed = now.min(self.end).duration_since(self.start).as_nanos();
        let due = elapsed.div_ceil(self.interval.as_nanos());
        u64::try_from(due)
            .unwrap_or(u64::MAX)
            .saturating_sub(u64::from(self.next.get()))
    }
}

/// Sends requests at this rate. Returns their response times, or `None` if the server cannot keep up.
async fn open_loop(case: &Case, rate: f64, time: Duration) -> Result<Option<Vec<Duration>>> {
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
    let backlog = schedule.backlog(Instant::now());
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
    Ok((backlog <= BACKLOG_MAX).then_some(times))
}

/// Sends requests when they are due, or as soon as the response to the previous one has arrived. Returns the response
/// times, and the number of responses whose status is not `expected`.
async fn connection(
    mut stream: TcpStream,
    schedule: Rc<Schedule>,
    request: Vec<u8>,
    expected: u16,
) -> Result<(Vec<Duration>, usize)> {
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
        times.push(due.elapsed());
        others += usize::from(status != expected);
    }
    Ok((times, others))
}

/// Returns the percentiles in microseconds.
fn percentiles(mut times: Vec<Duration>) -> Percentiles {
    times.sort_unstable();
    let at = |percent: usize| {
        let index = (times.len() * percent).div_ceil(100).max(1) - 1;
        times[index].as_secs_f64() * 1e6
    };
    Percentiles {
        p50: at(50),
        p99: at(99),
    }
}

fn print(
    cases: &[Case],
    measured: &[Vec<Percentiles>],
    rounds: u32,
    rate: f64,
    time: Duration,
    cores: Option<Cores>,
) {
    println!("| `GET /v1/echo` | p50 µs | p99 µs | p99, bare poem = 1 |");
    println!("|---|---:|---:|---:|");
    let poem = &measured[0];
    for (case, figures) in cases.iter().zip(measured) {
        // Compare per round, because a disturbance affects both servers.
        let pairs = figures.iter().zip(poem);
        let ratio = median(pairs.map(|(it, poem)| it.p99 / poem.p99));
        if ratio.is_finite() {
            println!(
                "| {} | {:.0} | {:.0} | {ratio:.2} |",
                case.name,
                median(figures.iter().map(|it| it.p50)),
                median(figures.iter().map(|it| it.p99)),
            );
        } else {
            println!("| {} | – | – | – |", case.name);
        }
    }
    println!();
    println!(
        "Medians of {} of {rounds} rounds, those in which bare poem kept up, of {} ms each, with the cases taking \
         turns; {rate:.0} requests/s, which is {:.0}% of what bare poem serves when saturated, on {CONNECTIONS} \
         keep-alive connections. Response times count from the time at which a request is due. {} –: the server \
         could not keep up in at least half of the rounds; `quota` shares its core with its PostgreSQL, to which it writes usage. Target: at most 1.2.",
        poem.len(),
        time.as_millis(),
        FRACTION * 100.0,
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

    use super::{Schedule, percentiles};

    #[test]
    fn percentiles_are_those_of_the_sorted_times() {
        let times = (1..=200).rev().map(Duration::from_micros).collect();
        let it = percentiles(times);
        assert_eq!((it.p50.round(), it.p99.round()), (100.0, 198.0));
        let one = percentiles(vec![Duration::from_micros(7)]);
        assert_eq!((one.p50.round(), one.p99.round()), (7.0, 7.0));
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
        assert_eq!(schedule.backlog(at(25)), 3);
        let due: Vec<_> = std::iter::from_fn(|| schedule.take()).collect();
        assert_eq!(due, [at(0), at(10), at(20), at(30)]);
        assert_eq!(schedule.backlog(at(1000)), 0);
    }
}
