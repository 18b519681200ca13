//! Load generators that use one thread and never sleep: they poll their connections.
//!
//! If a load generator sleeps, the server pays for waking it: the kernel does so while the server sends a response, so the
//! time counts as the server's CPU time. The slower the server is, the more often this happens. In addition, with a timer
//! or an asynchronous runtime, requests would be sent late at tens of thousands of requests per second.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};

use crate::{
    http1,
    load::{CONNECTIONS, Statuses},
};

const RESPONSE_BYTES_MAX: usize = 16 * 1024;
/// The maximum time to wait for the remaining responses after the end of the load.
const FINISHED_WITHIN: Duration = Duration::from_secs(30);

pub(crate) struct Responses {
    /// When each request was due, and the time from then until its response.
    pub(crate) times: Vec<(Instant, Duration)>,
    pub(crate) statuses: Statuses,
    /// How many requests were due but unsent at the end. They were sent later.
    pub(crate) unsent: u64,
}

/// A closed loop: each connection sends the same request again as soon as the response has arrived. It can run several
/// times on the same connections.
pub(crate) struct ClosedLoop<'a> {
    connections: Connections,
    request: &'a [u8],
    /// The number of responses by status, since the last reset.
    statuses: Statuses,
}

impl<'a> ClosedLoop<'a> {
    pub(crate) fn open(server: SocketAddr, request: &'a [u8]) -> Result<Self> {
        Ok(Self {
            connections: Connections::open(server)?,
            request,
            statuses: Statuses::new(),
        })
    }

    /// Closes the connections, and returns the number of responses by status since the last reset.
    pub(crate) fn finish(self) -> Statuses {
        self.statuses
    }

    /// Resets the numbers of responses.
    pub(crate) fn reset(&mut self) {
        self.statuses.clear();
    }

    /// Sends requests for `time`, then waits for the remaining responses.
    pub(crate) fn run(&mut self, time: Duration) -> Result<()> {
        let connections = &mut self.connections;
        let end = Instant::now() + time;
        let mut waiting = connections.all.len();
        for index in 0..waiting {
            connections.send(index, self.request)?;
        }
        while waiting > 0 {
            let now = Instant::now();
            ensure!(
                now < end + FINISHED_WITHIN,
                "not all responses arrived within {FINISHED_WITHIN:?} after the end of the load"
            );
            for event in 0..connections.ready()? {
                let Some((index, status)) = connections.receive(event)? else {
                    continue;
                };
                *self.statuses.entry(status).or_default() += 1;
                if now < end {
                    connections.send(index, self.request)?;
                } else {
                    waiting -= 1;
                }
            }
        }
        Ok(())
    }
}

/// Runs a closed loop for `time`. Returns the number of responses by status.
pub(crate) fn closed_loop(server: SocketAddr, time: Duration, request: &[u8]) -> Result<Statuses> {
    let mut load = ClosedLoop::open(server, request)?;
    load.run(time)?;
    Ok(load.finish())
}

/// Runs an open loop for `time`: sends the same `request` at this rate per second, however late the responses to earlier
/// requests are. Waits for all responses.
///
/// Each request has a time at which it is due. Response times are measured from that time, so they include the delay of
/// requests that had to wait for a connection because earlier responses were late.
pub(crate) fn open_loop(
    server: SocketAddr,
    rate: f64,
    time: Duration,
    request: &[u8],
) -> Result<Responses> {
    let mut connections = Connections::open(server)?;
    let mut free: VecDeque<usize> = (0..connections.all.len()).collect();
    // For each connection, when the request that still needs a response was due.
    let mut outstanding = vec![None; free.len()];
    let mut schedule = Schedule::new(Instant::now(), rate, time);
    let mut responses = Responses {
        times: Vec::with_capacity(schedule.total()),
        statuses: Statuses::new(),
        unsent: 0,
    };
    let mut is_over = false;
    while responses.times.len() < schedule.total() {
        let now = Instant::now();
        if !is_over && now >= schedule.end {
            is_over = true;
            responses.unsent = schedule.unsent();
        }
        ensure!(
            now < schedule.end + FINISHED_WITHIN,
            "not all responses arrived within {FINISHED_WITHIN:?} after the end of the load"
        );
        while let Some(index) = free.front().copied()
            && let Some(due) = schedule.take(now)
        {
            free.pop_front();
            outstanding[index] = Some(due);
            connections.send(index, request)?;
        }
        for event in 0..connections.ready()? {
            let Some((index, status)) = connections.receive(event)? else {
                continue;
            };
            let now = Instant::now();
            let due = outstanding[index]
                .take()
                .context("got more responses than requests")?;
            responses.times.push((due, now - due));
            *responses.statuses.entry(status).or_default() += 1;
            // Many responses may have arrived, and the next request must not wait until all of them have been read.
            if let Some(due) = schedule.take(now) {
                outstanding[index] = Some(due);
                connections.send(index, request)?;
            } else {
                free.push_back(index);
            }
        }
    }
    Ok(responses)
}

struct Connections {
    all: Vec<Connection>,
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Connections {
    fn open(server: SocketAddr) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let (mut all, mut events) = (Vec::new(), Vec::new());
        for index in 0..CONNECTIONS {
            let connection = Connection::open(server)?;
            let event = EpollEvent::new(EpollFlags::EPOLLIN, index);
            epoll.add(&connection.stream, event)?;
            all.push(connection);
            events.push(event);
        }
        Ok(Self { all, epoll, events })
    }

    fn send(&mut self, index: usize, request: &[u8]) -> Result<()> {
        // The send buffer is empty and larger than a request, so this does not fail with `WouldBlock`.
        let sent = self.all[index].stream.write_all(request);
        sent.context("cannot send a request")
    }

    /// Returns the number of connections on which something has arrived, without waiting.
    fn ready(&mut self) -> Result<usize> {
        match self.epoll.wait(&mut self.events, EpollTimeout::ZERO) {
            Err(Errno::EINTR) => Ok(0),
            ready => Ok(ready?),
        }
    }

    /// Reads what has arrived on the connection of an event. `event` must be less than the last result of
    /// [`ready`](Self::ready). Returns the connection's index and the response's status once the response is complete.
    fn receive(&mut self, event: usize) -> Result<Option<(usize, u16)>> {
        let index = usize::try_from(self.events[event].data())?;
        let status = self.all[index].receive()?;
        Ok(status.map(|status| (index, status)))
    }
}

struct Connection {
    stream: TcpStream,
    bytes: Vec<u8>,
    read: usize,
}

impl Connection {
    fn open(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(server).context("cannot connect")?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            bytes: vec![0; RESPONSE_BYTES_MAX],
            read: 0,
        })
    }

    /// Reads what has arrived. Returns the status of the response once it is complete.
    fn receive(&mut self) -> Result<Option<u16>> {
        match self.stream.read(&mut self.bytes[self.read..]) {
            Ok(0) => bail!("the server closed a connection, or its response is too long"),
            Ok(length) => self.read += length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let Some((status, length)) = http1::answer(&self.bytes[..self.read])? else {
            return Ok(None);
        };
        ensure!(length == self.read, "got more responses than requests");
        self.read = 0;
        Ok(Some(status))
    }
}

/// The requests that are due from `start` to `end`.
struct Schedule {
    start: Instant,
    interval: Duration,
    end: Instant,
    total: u32,
    taken: u32,
}

impl Schedule {
    fn new(start: Instant, rate: f64, time: Duration) -> Self {
        let interval = Duration::from_secs_f64(1.0 / rate);
        let total = time.as_nanos().div_ceil(interval.as_nanos().max(1));
        Self {
            start,
            interval,
            end: start + time,
            total: u32::try_from(total).unwrap_or(u32::MAX),
            taken: 0,
        }
    }

    const fn total(&self) -> usize {
        self.total as usize
    }

    /// Takes the next request. Returns when it was due, or `None` if none is due yet.
    fn take(&mut self, now: Instant) -> Option<Instant> {
        let due = self.start + self.interval * self.taken;
        (self.taken < self.total && due <= now).then(|| {
            self.taken += 1;
            due
        })
    }

    /// Returns how many requests have not been taken.
    fn unsent(&self) -> u64 {
        u64::from(self.total - self.taken)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{SocketAddr, TcpListener},
        time::{Duration, Instant},
    };

    use super::{ClosedLoop, Schedule, closed_loop, open_loop};

    #[test]
    fn each_request_is_taken_once_and_not_before_it_is_due() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut schedule = Schedule::new(start, 100.0, Duration::from_millis(35));
        assert_eq!(schedule.total(), 4);
        assert_eq!(schedule.take(at(0)), Some(at(0)));
        assert_eq!(schedule.take(at(9)), None);
        assert_eq!(schedule.take(at(25)), Some(at(10)));
        assert_eq!(schedule.unsent(), 2);
        assert_eq!(schedule.take(at(25)), Some(at(20)));
        assert_eq!(schedule.take(at(25)), None);
        assert_eq!(schedule.take(at(1000)), Some(at(30)));
        assert_eq!(schedule.take(at(1000)), None);
        assert_eq!(schedule.unsent(), 0);
    }

    const DELAY: Duration = Duration::from_millis(40);

    /// Starts a server that waits for [`DELAY`] before each response.
    fn slow_server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    let mut bytes = [0; 64];
                    while stream.read(&mut bytes).is_ok_and(|read| read > 0) {
                        std::thread::sleep(DELAY);
                        let response = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n";
                        stream.write_all(response).unwrap();
                        stream.write_all(b"{}").unwrap();
                    }
                });
            }
        });
        server
    }

    #[test]
    fn a_closed_loop_waits_for_each_response() {
        let request = b"GET / HTTP/1.1\r\n\r\n";
        let statuses = closed_loop(slow_server(), DELAY * 5 / 2, request).unwrap();
        // Each of the 32 connections sends up to three requests, and fewer on a busy machine.
        assert_eq!(statuses.keys().copied().collect::<Vec<_>>(), [200]);
        assert!((32..=96).contains(&statuses[&200]), "{statuses:?}");
    }

    #[test]
    fn a_closed_loop_can_run_several_times() {
        let mut load = ClosedLoop::open(slow_server(), b"GET / HTTP/1.1\r\n\r\n").unwrap();
        load.run(Duration::ZERO).unwrap();
        load.reset();
        load.run(Duration::ZERO).unwrap();
        load.run(Duration::ZERO).unwrap();
        // Each run sends one request on each of the 32 connections. The first run is not counted.
        assert_eq!(load.finish(), [(200, 64)].into());
    }

    #[test]
    fn open_loop_measures_response_times_from_when_requests_were_due() {
        // In 200 ms, the 32 connections can carry at most 160 requests.
        let time = Duration::from_millis(200);
        let request = b"GET / HTTP/1.1\r\n\r\n";
        let responses = open_loop(slow_server(), 1600.0, time, request).unwrap();
        assert_eq!(responses.statuses, [(200, 320)].into());
        assert!(responses.unsent >= 160, "{}", responses.unsent);
        let times = responses.times.iter().map(|(_, time)| *time);
        assert!(times.clone().min().unwrap() >= DELAY);
        // The last request is due just before 200 ms, and cannot be sent before 9 others have used its connection.
        assert!(times.max().unwrap() + time >= DELAY * 10);
    }
}
