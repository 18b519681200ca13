//! The counters of attempts, and their waits.

use std::time::Duration;

use crate::clock::Monotonic;

/// The maximum wait between two attempts to sign in.
pub(super) const LONGEST: Duration = Duration::from_mins(15);

pub(super) type Name = [u8; 16];

#[derive(Debug, Clone, Copy)]
pub(super) struct Counter {
    pub(super) name: Name,
    /// The number of attempts allowed before a wait is imposed.
    pub(super) free: u32,
    pub(super) forgive: Duration,
    pub(super) waits: Waits,
    pub(super) on_success: OnSuccess,
}

/// How long the waits are once a counter has no free attempts left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waits {
    /// Each wait is twice as long as the previous one, up to [`LONGEST`].
    Doubling,
    /// Each wait lasts until an attempt is forgiven.
    UntilForgiven,
}

/// The effect of a successful attempt on a counter. The counters of an attempt are sorted in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnSuccess {
    /// Clears the counter.
    Clear,
    /// Takes this attempt back.
    TakeBack,
    /// Continues to count the attempt.
    Keep,
}

impl Counter {
    /// Returns the first wait. If waits double, the first one is a minute divided by `free`.
    pub(super) fn first_wait(&self) -> Duration {
        match self.waits {
            Waits::Doubling => Duration::from_mins(1) / self.free.max(1),
            Waits::UntilForgiven => self.forgive,
        }
    }

    pub(super) fn longest_wait(&self) -> Duration {
        match self.waits {
            Waits::Doubling => LONGEST,
            Waits::UntilForgiven => self.forgive,
        }
    }
}

/// Returns the longest wait of any of the counters.
pub(super) fn longest_wait(counters: &[Counter]) -> Duration {
    let waits = counters.iter().map(Counter::longest_wait);
    waits.max().unwrap_or(LONGEST)
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Count {
    pub(super) tries: f64,
    pub(super) at: Monotonic,
    pub(super) until: Monotonic,
    /// The interval at which one attempt is forgiven.
    pub(super) forgive: Duration,
}

impl Count {
    /// Returns the number of attempts that have not been forgiven.
    pub(super) fn left(&self, now: Monotonic) -> f64 {
        let passed = Duration::from(now.saturating_since(self.at));
        (self.tries - passed.as_secs_f64() / self.forgive.as_secs_f64()).max(0.0)
    }

    pub(super) fn is_needed(&self, now: Monotonic) -> bool {
        self.until > now || self.left(now) > 0.0
    }
}
