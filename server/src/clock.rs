//! Time as a dependency.
//!
//! [`Clock::now`] is calendar time, which jumps when an operator or NTP sets the clock. [`Clock::monotonic`] measures
//! durations and never goes backward. Limits in memory use the former, as nanoseconds since the Unix epoch; deadlines
//! and the ages of cache entries use the latter.

use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use governor::nanos::Nanos;

/// Nanoseconds since the Unix epoch (1970-01-01T00:00:00Z), up to the year 2554.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct UnixNanos(pub u64);

impl UnixNanos {
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs * 1_000_000_000)
    }

    /// Returns whole seconds, rounded down.
    pub const fn secs(self) -> u64 {
        self.0 / 1_000_000_000
    }

    /// Returns whole seconds, rounded up: the first full second that is not before `self`.
    pub const fn secs_ceil(self) -> u64 {
        self.0.div_ceil(1_000_000_000)
    }

    pub const fn saturating_add(self, nanos: u64) -> Self {
        Self(self.0.saturating_add(nanos))
    }

    /// Returns nanoseconds since `earlier`, or zero if `earlier` is later.
    pub const fn saturating_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Returns a duration in nanoseconds, at most 584 years.
pub fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A source of time.
pub trait Clock: Debug + Send + Sync + 'static {
    /// Returns calendar time. It may stand still or go backward.
    fn now(&self) -> UnixNanos;

    /// Returns nanoseconds since an arbitrary start in this process. Never goes backward.
    fn monotonic(&self) -> u64;
}

/// A [`Clock`] for the `governor` crate, which uses monotonic time.
#[derive(Debug, Clone)]
pub struct GovernorClock(pub Arc<dyn Clock>);

impl governor::clock::Clock for GovernorClock {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Nanos::new(self.0.monotonic())
    }
}

/// The clocks of the operating system.
#[derive(Debug, Clone)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    #[expect(
        clippy::disallowed_methods,
        reason = "the only place that reads the system clock"
    )]
    fn now(&self) -> UnixNanos {
        // A time before 1970 is returned as 1970, and one after 2554 as the last representable time.
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        UnixNanos(nanos(since))
    }

    fn monotonic(&self) -> u64 {
        nanos(self.start.elapsed())
    }
}

/// A clock that moves only on request, for tests. Clones share their time.
#[derive(Debug, Clone)]
pub struct TestClock {
    time: Arc<TestTime>,
}

#[derive(Debug)]
struct TestTime {
    now: AtomicU64,
    monotonic: AtomicU64,
}

impl TestClock {
    pub fn at(now: UnixNanos) -> Self {
        Self {
            time: Arc::new(TestTime {
                now: AtomicU64::new(now.0),
                monotonic: AtomicU64::new(0),
            }),
        }
    }

    /// Moves both clocks forward.
    pub fn advance(&self, by: Duration) {
        self.time.now.fetch_add(nanos(by), Ordering::SeqCst);
        self.time.monotonic.fetch_add(nanos(by), Ordering::SeqCst);
    }

    /// Sets only calendar time, forward or backward, as NTP or an operator may.
    pub fn set_now(&self, now: UnixNanos) {
        self.time.now.store(now.0, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> UnixNanos {
        UnixNanos(self.time.now.load(Ordering::SeqCst))
    }

    fn monotonic(&self) -> u64 {
        self.time.monotonic.load(Ordering::SeqCst)
    }
}
