//! The time of events: PostgreSQL's, carried on by the monotonic clock.
//!
//! Replicas whose clocks differ record times that agree. While PostgreSQL is unreachable the last measurement is used.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::UnixNanos;

/// A measurement that took longer is too inexact.
const LONGEST: u64 = 1_000_000_000;

/// See the module.
#[derive(Debug)]
pub struct EventClock {
    /// What the monotonic clock lacks to Unix time, modulo 2^64.
    offset: AtomicU64,
}

impl EventClock {
    /// By the machine's own clock, until it is measured.
    pub fn new(now: UnixNanos, monotonic: u64) -> Self {
        Self {
            offset: AtomicU64::new(now.0.wrapping_sub(monotonic)),
        }
    }

    /// The time of an event at `monotonic`.
    #[inline]
    pub fn at(&self, monotonic: u64) -> UnixNanos {
        UnixNanos(monotonic.wrapping_add(self.offset.load(Ordering::Relaxed)))
    }

    /// Notes that PostgreSQL read `now` at some moment between `asked` and `answered` of the monotonic clock. Returns
    /// whether that is exact enough to be used.
    pub fn measured(&self, now: UnixNanos, asked: u64, answered: u64) -> bool {
        let took = answered.saturating_sub(asked);
        let is_exact = took <= LONGEST;
        if is_exact {
            let middle = asked + took / 2;
            self.offset
                .store(now.0.wrapping_sub(middle), Ordering::Relaxed);
        }
        is_exact
    }
}
