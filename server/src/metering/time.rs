//! The clock for the times of events: PostgreSQL's clock, extrapolated with the monotonic clock.
//!
//! Therefore, replicas whose own clocks differ record consistent times. While PostgreSQL is unreachable, the last
//! measurement is used.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::{Monotonic, Nanos, UnixNanos};

/// A measurement that takes longer is not accurate enough.
const LONGEST: Nanos = Nanos::from_secs(1);

/// A clock that follows PostgreSQL's clock. See the module documentation.
#[derive(Debug)]
pub struct EventClock {
    /// Unix time minus monotonic time, modulo 2^64.
    offset: AtomicU64,
}

impl EventClock {
    /// Creates a clock that follows the machine's clock until the first measurement.
    pub fn new(now: UnixNanos, monotonic: Monotonic) -> Self {
        Self {
            offset: AtomicU64::new(now.0.wrapping_sub(monotonic.0)),
        }
    }

    /// Returns the time of an event at `monotonic`.
    #[inline]
    pub fn at(&self, monotonic: Monotonic) -> UnixNanos {
        UnixNanos(
            monotonic
                .0
                .wrapping_add(self.offset.load(Ordering::Relaxed)),
        )
    }

    /// Records that PostgreSQL's clock was `now` at some point between the monotonic times `asked` and `answered`.
    /// Returns whether the measurement was accurate enough to be used.
    pub fn measured(&self, now: UnixNanos, asked: Monotonic, answered: Monotonic) -> bool {
        let took = answered.saturating_since(asked);
        let is_exact = took <= LONGEST;
        if is_exact {
            let middle = asked.0 + took.0 / 2;
            self.offset
                .store(now.0.wrapping_sub(middle), Ordering::Relaxed);
        }
        is_exact
    }
}
