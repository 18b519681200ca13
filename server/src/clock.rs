//! The time, as an argument.
//!
//! Two readings, because they answer two questions: [`Clock::now`] is what the calendar says (and may
//! jump, when an operator or NTP sets it), [`Clock::monotonic`] is how long something took (and never
//! goes back). Limits are kept on [`Clock::now`] as nanoseconds since the Unix epoch; ages of cache
//! entries and deadlines on [`Clock::monotonic`].

use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Nanoseconds since the Unix epoch (1970-01-01T00:00:00Z). Reaches to the year 2554.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct UnixNanos(pub u64);

impl UnixNanos {
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs * 1_000_000_000)
    }

    /// Whole seconds, rounded down.
    pub const fn secs(self) -> u64 {
        self.0 / 1_000_000_000
    }

    /// Whole seconds, rounded up: the first full second at which `self` has passed.
    pub const fn secs_ceil(self) -> u64 {
        self.0.div_ceil(1_000_000_000)
    }

    pub const fn saturating_add(self, nanos: u64) -> Self {
        Self(self.0.saturating_add(nanos))
    }

    /// Nanoseconds from `earlier` to `self`; zero when `earlier` is later.
    pub const fn saturating_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Where the time comes from.
pub trait Clock: Debug + Send + Sync + 'static {
    /// The calendar's time. May stand still or jump back.
    fn now(&self) -> UnixNanos;

    /// Nanoseconds since an arbitrary start in this process. Never goes back.
    fn monotonic(&self) -> u64;
}

/// The machine's own clocks.
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
        reason = "this is the one place that reads the machine's clock"
    )]
    fn now(&self) -> UnixNanos {
        // A machine set to before 1970 reads as 1970; one after 2554 is not ours to worry about.
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        UnixNanos(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    fn monotonic(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A clock that moves only when told to, for tests. Clones share the same hands.
#[derive(Debug, Clone)]
pub struct TestClock {
    hands: Arc<Hands>,
}

#[derive(Debug)]
struct Hands {
    now: AtomicU64,
    monotonic: AtomicU64,
}

impl TestClock {
    pub fn at(now: UnixNanos) -> Self {
        Self {
            hands: Arc::new(Hands {
                now: AtomicU64::new(now.0),
                monotonic: AtomicU64::new(0),
            }),
        }
    }

    /// Moves both hands forward.
    pub fn advance(&self, by: Duration) {
        let nanos = u64::try_from(by.as_nanos()).expect("a test advances by less than 584 years");
        self.hands.now.fetch_add(nanos, Ordering::SeqCst);
        self.hands.monotonic.fetch_add(nanos, Ordering::SeqCst);
    }

    /// Sets the calendar's hand alone, also back: what NTP or an operator may do.
    pub fn set_now(&self, now: UnixNanos) {
        self.hands.now.store(now.0, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> UnixNanos {
        UnixNanos(self.hands.now.load(Ordering::SeqCst))
    }

    fn monotonic(&self) -> u64 {
        self.hands.monotonic.load(Ordering::SeqCst)
    }
}
