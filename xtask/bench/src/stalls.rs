//! Finds out when a virtual machine's cores were not running. While a core is stalled, nothing on it makes progress, so
//! response times in this time say nothing about a server.
//!
//! On each core, a thread with real-time priority sleeps and wakes up at short intervals. The kernel prefers it to all
//! other threads, so if it wakes up late, its core was not running.

use std::{
    ops::Range,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::gettid;
use parking_lot::Mutex;

use crate::process::stay_on;

const INTERVAL: Duration = Duration::from_micros(500);
/// A thread that wakes up this late was stalled.
const LATE: Duration = Duration::from_micros(500);
/// After a stall, requests that were due during the stall are sent, and others have to wait for them. If 70% of the
/// time is needed for the requests that become due, the delay is caught up with after 7/3 of the stall's length.
const CATCHING_UP: u32 = 3;

/// Watches cores until it is dropped.
pub(crate) struct StallWatch {
    is_over: Arc<AtomicBool>,
    stalls: Arc<Mutex<Vec<Range<Instant>>>>,
    threads: Vec<JoinHandle<()>>,
}

impl StallWatch {
    /// Starts watching. Fails if this user may not use real-time priorities.
    pub(crate) fn start(cores: &[usize]) -> Result<Self> {
        let mut watch = Self {
            is_over: Arc::default(),
            stalls: Arc::default(),
            threads: Vec::new(),
        };
        for core in cores.iter().copied() {
            let (is_over, stalls) = (watch.is_over.clone(), watch.stalls.clone());
            let (send, started) = mpsc::channel();
            watch.threads.push(std::thread::spawn(move || {
                let result = stay_on(core).and_then(|()| have_priority());
                let has_started = result.is_ok();
                if send.send(result).is_err() || !has_started {
                    return;
                }
                while !is_over.load(Ordering::Relaxed) {
                    let from = Instant::now();
                    std::thread::sleep(INTERVAL);
                    let until = Instant::now();
                    if until - from > INTERVAL + LATE {
                        stalls.lock().push(from..until);
                    }
                }
            }));
            started.recv().context("a thread has exited")??;
        }
        Ok(watch)
    }

    /// Returns the stalls since this function was last called, in no particular order.
    pub(crate) fn take(&self) -> Stalls {
        Stalls(std::mem::take(&mut *self.stalls.lock()))
    }
}

impl Drop for StallWatch {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Gives the calling thread real-time priority.
fn have_priority() -> Result<()> {
    let output = Command::new("chrt")
        .args(["--fifo", "--pid", "50", &gettid().to_string()])
        .output()
        .context("cannot run chrt (from util-linux)")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "chrt failed: {error}");
    Ok(())
}

#[derive(Debug, Default)]
pub(crate) struct Stalls(Vec<Range<Instant>>);

impl Stalls {
    /// Returns whether a stall delayed a request that was due at this time, or may have delayed it.
    pub(crate) fn delayed(&self, due: Instant) -> bool {
        self.0.iter().any(|stall| {
            let length = stall.end - stall.start;
            (stall.start..stall.end + length * CATCHING_UP).contains(&due)
        })
    }

    /// Returns how long the cores were stalled. If both were stalled at the same time, the time counts twice.
    pub(crate) fn total(&self) -> Duration {
        self.0.iter().map(|stall| stall.end - stall.start).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Stalls;

    #[test]
    fn requests_are_delayed_during_a_stall_and_three_times_as_long_after_it() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let stalls = Stalls(vec![at(10)..at(14), at(30)..at(31)]);
        let delayed: Vec<_> = (0..50).filter(|it| stalls.delayed(at(*it))).collect();
        assert_eq!(
            delayed,
            [(10..26), (30..34)]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
        );
        assert_eq!(stalls.total(), Duration::from_millis(5));
        assert!(!Stalls::default().delayed(start));
    }
}
