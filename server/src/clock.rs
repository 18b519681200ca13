//! Clocks, which are passed as dependencies so that tests can control them.
//!
//! [`Clock::now`] is calendar time, which jumps when an operator or NTP sets the clock. [`Clock::monotonic`] measures
//! durations and never goes backward. The buckets and quotas of keys use calendar time, in nanoseconds since the Unix
//! epoch. Deadlines and the ages of cache entries use monotonic time.

use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use chrono::{DateTime, Utc};
use nix::time::{ClockId, clock_gettime};

/// A length of time in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Nanos(pub u64);

impl Nanos {
    pub const ZERO: Self = Self(0);
    pub const MAX: Self = Self(u64::MAX);

    pub const fn from_secs(secs: u64) -> Self {
        Self(secs * 1_000_000_000)
    }

    pub const fn from_millis(millis: u64) -> Self {
        Self(millis * 1_000_000)
    }

    pub const fn saturating_add(self, more: Self) -> Self {
        Self(self.0.saturating_add(more.0))
    }

    pub const fn saturating_sub(self, less: Self) -> Self {
        Self(self.0.saturating_sub(less.0))
    }

    pub const fn saturating_mul(self, by: u64) -> Self {
        Self(self.0.saturating_mul(by))
    }
}

/// Durations of more than 584 years are capped.
impl From<Duration> for Nanos {
    fn from(duration: Duration) -> Self {
        Self(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
    }
}

impl From<Nanos> for Duration {
    fn from(nanos: Nanos) -> Self {
        Self::from_nanos(nanos.0)
    }
}

/// A point in time. Each clock has its own type of time, so that times from different clocks cannot be mixed up.
pub trait Instant: Copy + Ord {
    #[must_use]
    fn saturating_add(self, time: Nanos) -> Self;

    /// Returns the time since `earlier`, or zero if `earlier` is later.
    fn saturating_since(self, earlier: Self) -> Nanos;
}

macro_rules! instants {
    ($($name:ident),+) => {$(
        impl $name {
            #[inline]
            pub const fn saturating_add(self, time: Nanos) -> Self {
                Self(self.0.saturating_add(time.0))
            }

            /// Returns the time since `earlier`, or zero if `earlier` is later.
            #[inline]
            pub const fn saturating_since(self, earlier: Self) -> Nanos {
                Nanos(self.0.saturating_sub(earlier.0))
            }
        }

        impl Instant for $name {
            #[inline]
            fn saturating_add(self, time: Nanos) -> Self {
                self.saturating_add(time)
            }

            #[inline]
            fn saturating_since(self, earlier: Self) -> Nanos {
                self.saturating_since(earlier)
            }
        }
    )+};
}
instants!(UnixNanos, Monotonic);

/// A time on the monotonic clock: nanoseconds since an arbitrary point in time that is fixed for this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Monotonic(pub u64);

/// Nanoseconds since the Unix epoch (1970-01-01T00:00:00Z), up to the year 2554.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct UnixNanos(pub u64);

impl UnixNanos {
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs * 1_000_000_000)
    }

    /// Returns the whole seconds, rounded down.
    pub const fn secs(self) -> u64 {
        self.0 / 1_000_000_000
    }

    /// Returns the absolute difference between the two times.
    pub const fn abs_diff(self, other: Self) -> Nanos {
        Nanos(self.0.abs_diff(other.0))
    }

    /// Returns the whole seconds, rounded up.
    pub const fn secs_ceil(self) -> u64 {
        self.0.div_ceil(1_000_000_000)
    }
}

impl From<UnixNanos> for DateTime<Utc> {
    fn from(at: UnixNanos) -> Self {
        Self::from_timestamp_nanos(i64::try_from(at.0).unwrap_or(i64::MAX))
    }
}

/// A source of time.
pub trait Clock: Debug + Send + Sync + 'static {
    /// Returns calendar time. Calendar time may stand still or go backward.
    fn now(&self) -> UnixNanos;

    /// Returns the time since an arbitrary point in time that is fixed for this process. Monotonic time never goes
    /// backward.
    fn monotonic(&self) -> Monotonic;
}

/// A [`Clock`] for the `governor` crate, based on monotonic time.
#[derive(Debug, Clone)]
pub struct GovernorClock(pub Arc<dyn Clock>);

impl governor::clock::Clock for GovernorClock {
    type Instant = governor::nanos::Nanos;

    fn now(&self) -> Self::Instant {
        self.0.monotonic().0.into()
    }
}

/// The clocks of the operating system.
#[derive(Debug, Clone)]
pub struct SystemClock {
    /// What the operating system's monotonic clock showed when this clock was created, in nanoseconds.
    start: u64,
}

impl SystemClock {
    pub fn new() -> Self {
        Self {
            start: reading(ClockId::CLOCK_MONOTONIC),
        }
    }
}

/// Reads a clock of the operating system, in nanoseconds. A time before the clock's zero becomes less than a second.
///
/// The clocks are read several times per request. `Instant` and `SystemTime` read the same clocks, but keep seconds and
/// nanoseconds apart, which makes calculations slower.
#[inline]
#[expect(
    clippy::disallowed_methods,
    reason = "the only place that reads the system clock"
)]
fn reading(clock: ClockId) -> u64 {
    // Without a time, expired keys would be accepted.
    let time = clock_gettime(clock).expect("the operating system has this clock");
    let secs = u64::try_from(time.tv_sec()).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec()).unwrap_or(0);
    secs.saturating_mul(1_000_000_000).saturating_add(nanos)
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    #[inline]
    fn now(&self) -> UnixNanos {
        // A time before 1970 becomes a time in the first second of 1970, and a time after 2554 becomes the last time that can be represented.
        UnixNanos(reading(ClockId::CLOCK_REALTIME))
    }

    #[inline]
    fn monotonic(&self) -> Monotonic {
        Monotonic(reading(ClockId::CLOCK_MONOTONIC).saturating_sub(self.start))
    }
}

/// A clock for tests, whose time changes only when a test changes it. Clones share the same time.
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
        let by = Nanos::from(by).0;
        self.time.now.fetch_add(by, Ordering::SeqCst);
        self.time.monotonic.fetch_add(by, Ordering::SeqCst);
    }

    /// Sets only calendar time, forward or backward, as NTP or an operator would.
    pub fn set_now(&self, now: UnixNanos) {
        self.time.now.store(now.0, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> UnixNanos {
        UnixNanos(self.time.now.load(Ordering::SeqCst))
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic(self.time.monotonic.load(Ordering::SeqCst))
    }
}
