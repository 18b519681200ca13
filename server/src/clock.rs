//! Clocks, which are passed as dependencies so that tests can control them.
//!
//! [`Clock::now`] is calendar time, which jumps when an operator or NTP sets the clock. [`Clock::monotonic`] measures
//! durations and never goes backward. The buckets and quotas of keys use calendar time, in nanoseconds since the Unix
//! epoch. Deadlines and the ages of cache entries use monotonic time. [`Clock::moment`] returns the current time on both.

use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{self, Duration},
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

/// A point in time, on the calendar clock and on the monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    pub calendar: UnixNanos,
    pub monotonic: Monotonic,
}

/// A source of time.
pub trait Clock: Debug + Send + Sync + 'static {
    /// Returns calendar time. Calendar time may stand still or go backward.
    fn now(&self) -> UnixNanos;

    /// Returns the time since an arbitrary point in time that is fixed for this process. Monotonic time never goes
    /// backward.
    fn monotonic(&self) -> Monotonic;

    /// Returns the current time on both clocks.
    fn moment(&self) -> Moment {
        Moment {
            calendar: self.now(),
            monotonic: self.monotonic(),
        }
    }

    /// Converts an instant to the time on both clocks. The instant must have just been read from the operating system's
    /// monotonic clock. Clocks for tests ignore it and return their current time.
    fn moment_of(&self, _just_read: time::Instant) -> Moment {
        self.moment()
    }
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

/// How often the system clock checks whether the calendar clock has been set, in nanoseconds.
const CHECK_EVERY: u64 = 1_000_000;
/// The largest error of the offset, in nanoseconds, that is not corrected. It allows for rounding, and for the time between
/// two readings.
const TOLERANCE: i64 = 1_000;

/// The clocks of the operating system.
///
/// On Linux, NTP changes the speed of the calendar clock and of the monotonic clock together. So unless the calendar clock
/// is set, or the machine is suspended, the difference between them is constant. Therefore, calendar time is calculated
/// from monotonic time, and one reading is enough for both. The difference is checked again by the first reading of
/// calendar time that is at least a millisecond after the last check. Calendar time can be calculated from 1970 to 2262.
#[derive(Debug)]
pub struct SystemClock {
    /// The operating system's monotonic clock when this clock was created.
    start: time::Instant,
    /// Calendar time minus monotonic time, in nanoseconds.
    offset: AtomicI64,
    /// The monotonic time at which the offset is checked again.
    check_at: AtomicU64,
}

impl SystemClock {
    pub fn new() -> Self {
        // The calendar clock is read first, so that calculated times are not ahead of it.
        let now = calendar_time();
        Self {
            start: time::Instant::now(),
            offset: AtomicI64::new(offset_at(now, Monotonic(0))),
            check_at: AtomicU64::new(0),
        }
    }

    #[inline]
    fn moment_at(&self, monotonic: Monotonic) -> Moment {
        if monotonic.0 >= self.check_at.load(Ordering::Relaxed) {
            self.check(monotonic);
        }
        let offset = self.offset.load(Ordering::Relaxed);
        Moment {
            calendar: UnixNanos(monotonic.0.saturating_add_signed(offset)),
            monotonic,
        }
    }

    #[cold]
    fn check(&self, at: Monotonic) {
        let next = at.0.saturating_add(CHECK_EVERY);
        self.check_at.store(next, Ordering::Relaxed);
        self.check_with(|| (self.monotonic(), calendar_time(), self.monotonic()));
    }

    /// Corrects the offset according to a reading of the calendar clock between two readings of the monotonic clock.
    fn check_with(&self, read: impl FnOnce() -> (Monotonic, UnixNanos, Monotonic)) {
        let offset = self.offset.load(Ordering::Relaxed);
        let (before, now, after) = read();
        if let Some(corrected) = corrected(offset, now, before, after) {
            // If another thread has corrected the offset since, that correction may be more recent than these readings.
            let _ = self.offset.compare_exchange(
                offset,
                corrected,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
    }

    #[inline]
    fn since_start(&self, instant: time::Instant) -> Monotonic {
        let time = instant.saturating_duration_since(self.start);
        // 584 years pass before this overflows.
        let secs = time.as_secs().wrapping_mul(1_000_000_000);
        Monotonic(secs.wrapping_add(u64::from(time.subsec_nanos())))
    }
}

/// Returns the new difference between calendar time and monotonic time if `offset` is no longer right. The calendar clock
/// was `now` at some point between the monotonic times `before` and `after`.
fn corrected(offset: i64, now: UnixNanos, before: Monotonic, after: Monotonic) -> Option<i64> {
    let (lowest, highest) = (offset_at(now, after), offset_at(now, before));
    let is_right =
        (lowest.saturating_sub(TOLERANCE)..=highest.saturating_add(TOLERANCE)).contains(&offset);
    // With the lowest of the possible offsets, no limit is reset too early.
    (!is_right).then_some(lowest)
}

/// Returns calendar time minus monotonic time. Times that are too large are capped.
fn offset_at(now: UnixNanos, monotonic: Monotonic) -> i64 {
    let capped = |nanos| i64::try_from(nanos).unwrap_or(i64::MAX);
    capped(now.0) - capped(monotonic.0)
}

/// Reads the operating system's calendar clock. A time before 1970 becomes a time in the first second of 1970, and a time
/// after 2554 becomes the last time that can be represented.
#[expect(
    clippy::disallowed_methods,
    reason = "the only place that reads the system's calendar clock"
)]
fn calendar_time() -> UnixNanos {
    // Without a time, expired keys would be accepted.
    let time = clock_gettime(ClockId::CLOCK_REALTIME).expect("the operating system has this clock");
    let secs = u64::try_from(time.tv_sec()).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec()).unwrap_or(0);
    UnixNanos(secs.saturating_mul(1_000_000_000).saturating_add(nanos))
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    #[inline]
    fn now(&self) -> UnixNanos {
        self.moment().calendar
    }

    #[inline]
    fn monotonic(&self) -> Monotonic {
        self.since_start(time::Instant::now())
    }

    #[inline]
    fn moment(&self) -> Moment {
        self.moment_at(self.monotonic())
    }

    #[inline]
    fn moment_of(&self, just_read: time::Instant) -> Moment {
        self.moment_at(self.since_start(just_read))
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

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    const MINUTE: u64 = 60_000_000_000;

    /// An offset of this many minutes.
    fn minutes(minutes: i64) -> i64 {
        minutes * 60_000_000_000
    }

    #[test]
    #[expect(
        clippy::disallowed_methods,
        reason = "the clock is compared with another reading"
    )]
    fn calendar_time_follows_the_operating_system() {
        let clock = SystemClock::new();
        let system = || {
            let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            Nanos::from(time.expect("it is after 1970")).0
        };
        let mut closest = u64::MAX;
        for _ in 0..200 {
            let earliest = system();
            let at = clock.moment().calendar.0;
            let latest = system();
            // Skip slow readings: if the process was paused between them, the calculated time may lag by the length of the
            // pause.
            if latest - earliest < 1_000_000 {
                closest = closest.min(at.abs_diff(earliest));
                assert!(at < latest + 2_000, "{earliest} {at} {latest}");
                assert!(at + 1_000_000 > earliest, "{earliest} {at} {latest}");
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        assert!(closest < 20_000, "{closest} ns");
    }

    #[test]
    fn moment_of_an_instant_is_between_earlier_and_later_moments() {
        let clock = SystemClock::new();
        let before = clock.moment();
        let just_read = time::Instant::now();
        let after = clock.moment();
        std::thread::sleep(Duration::from_millis(2));
        let at = clock.moment_of(just_read);
        assert!(before.monotonic <= at.monotonic && at.monotonic <= after.monotonic);
        assert!(before.calendar <= at.calendar && at.calendar <= after.calendar);
    }

    #[test]
    fn offset_changes_only_if_the_calendar_clock_was_set() {
        let (before, after) = (Monotonic(5 * MINUTE), Monotonic(5 * MINUTE + 40));
        let offset = minutes(1_000);
        let reading = |now: u64| corrected(offset, UnixNanos(now), before, after);
        let right = 1_005 * MINUTE;
        for rounded in [0, 40, 1_040] {
            assert_eq!(reading(right + rounded), None);
        }
        assert_eq!(reading(right - 1_000), None);
        assert_eq!(reading(right + 1_041), Some(offset + 1_001));
        assert_eq!(reading(right - 1_001), Some(offset - 1_041));
        assert_eq!(reading(right + MINUTE), Some(minutes(1_001) - 40));
        assert_eq!(reading(right - MINUTE), Some(minutes(999) - 40));
        // Calendar times smaller than the monotonic time, and the smallest and largest times.
        assert_eq!(reading(3 * MINUTE), Some(minutes(-2) - 40));
        assert_eq!(reading(0), Some(minutes(-5) - 40));
        assert_eq!(reading(u64::MAX), Some(i64::MAX - minutes(5) - 40));
    }

    #[test]
    fn slow_reading_does_not_change_a_right_offset() {
        // The process was paused for an hour between the readings.
        let (before, after) = (Monotonic(MINUTE), Monotonic(61 * MINUTE));
        let reading = |minute| {
            let now = UnixNanos(minute * MINUTE);
            corrected(minutes(1_000), now, before, after)
        };
        for minute in [1_001, 1_031, 1_061] {
            assert_eq!(reading(minute), None);
        }
        assert_eq!(reading(1_062), Some(minutes(1_001)));
    }

    #[test]
    fn setting_the_clock_is_noticed_at_the_next_check() {
        for set in [minutes(1), minutes(-1)] {
            let clock = SystemClock::new();
            let right = clock.moment().calendar;
            clock.offset.fetch_add(set, Ordering::Relaxed);
            std::thread::sleep(Duration::from_nanos(2 * CHECK_EVERY));
            let after = clock.moment().calendar;
            assert!(
                after.abs_diff(right) < Nanos(MINUTE / 2),
                "{right:?} {after:?}"
            );
        }
    }

    #[test]
    fn readings_from_before_another_correction_are_not_used() {
        let clock = SystemClock::new();
        let hour = minutes(60);
        let right = clock.offset.load(Ordering::Relaxed);
        let now = UnixNanos(clock.moment().calendar.0 + MINUTE);
        clock.check_with(|| {
            // While this thread is paused between its readings and the correction, the clock is set, and another thread
            // notices it.
            clock.offset.store(right + hour, Ordering::Relaxed);
            (Monotonic(0), now, Monotonic(0))
        });
        assert_eq!(clock.offset.load(Ordering::Relaxed), right + hour);
        // Without that, the same readings are used.
        clock.check_with(|| (Monotonic(0), now, Monotonic(0)));
        assert_eq!(
            clock.offset.load(Ordering::Relaxed),
            offset_at(now, Monotonic(0))
        );
    }

    #[test]
    fn calendar_time_is_never_before_1970() {
        let clock = SystemClock::new();
        clock.check_at.store(u64::MAX, Ordering::Relaxed);
        clock.offset.store(minutes(-1), Ordering::Relaxed);
        assert_eq!(clock.moment().calendar, UnixNanos(0));
    }
}
