//! The terms of a plan under which tokens are taken and held.

use super::gcra::Gcra;
use crate::clock::Nanos;

/// The minimum time between the starts of concurrent calls for a key.
const PAUSE_MIN: Nanos = Nanos::from_millis(1);

/// The lease size is at most the burst divided by this number.
const BURST_DIVISOR: u64 = 10;

/// The plan's parameters in a call to the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::limiter) struct Terms {
    pub(in crate::limiter) gcra: Gcra,
    pub(in crate::limiter) version: u64,
    /// Whether tokens may be held for later. If not, the counters decide every request.
    pub(in crate::limiter) leased: bool,
}

impl Terms {
    /// Returns whether tokens taken under `other` may be spent under `self`.
    pub(in crate::limiter) fn is_like(self, other: Self) -> bool {
        (self.gcra, self.leased) == (other.gcra, other.leased)
    }

    /// Returns the minimum time between the starts of two calls if the first one is still in flight. During the pause,
    /// requests wait for the next call, and the bucket may fill up and stop refilling. Therefore, the pause is only a
    /// small fraction of tau. For a bucket that fills slowly, the pause exceeds the deadline, so its calls do not
    /// overlap.
    pub(in crate::limiter) fn pause(self) -> Nanos {
        Nanos(self.gcra.tau().0 / 64).max(PAUSE_MIN)
    }

    /// Returns the largest lease size under these terms, whatever the key's pace: a tenth of the burst, but at least 1.
    pub(super) fn max_lease_size(self) -> u64 {
        (self.gcra.tokens(self.gcra.tau()) / BURST_DIVISOR).max(1)
    }
}
