//! The generic cell rate algorithm (ITU-T I.371, virtual scheduling): a token bucket in one integer.
//!
//! The state is the *theoretical arrival time* (TAT), in nanoseconds since the Unix epoch: when the bucket
//! will be full again. A bucket of `burst` tokens that refills every `interval` nanoseconds holds
//! `(now + burst·interval − max(TAT, now)) / interval` tokens.
//!
//! **Promise.** With a clock that does not jump forward, any stretch of `T` nanoseconds admits at most
//! `burst + T / interval` tokens. `interval` is rounded up, so this is never more than `burst + rate·T`, and
//! at most one part in `6·10¹⁰ / rpm` less. A clock that stands still admits at most what is in the bucket. A
//! clock that jumps back finds a TAT further ahead than an empty bucket could be; it is taken for an empty
//! one, so the key refills from there instead of being locked out until the old time comes again.

use std::num::NonZeroU32;

use crate::clock::UnixNanos;

const MINUTE: u64 = 60_000_000_000;

/// The parameters of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gcra {
    /// Nanoseconds from one token to the next.
    interval: u64,
    burst: u32,
}

/// Whether a bucket holds what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// It does; the TAT to store when it is taken.
    Now(u64),
    /// It will, after so many nanoseconds.
    After(u64),
    /// It never will: more was asked for than the bucket can hold.
    Never,
}

impl Gcra {
    pub fn new(rpm: NonZeroU32, burst: NonZeroU32) -> Self {
        Self {
            interval: MINUTE.div_ceil(u64::from(rpm.get())),
            burst: burst.get(),
        }
    }

    /// How long an empty bucket takes to fill, in nanoseconds. At most 60 s · 60,000,000, or 114 years.
    const fn capacity(self) -> u64 {
        self.interval * self.burst as u64
    }

    /// The stored TAT as of now: never before now, never beyond an empty bucket.
    const fn base(self, tat: u64, now: UnixNanos) -> u64 {
        let empty = now.0.saturating_add(self.capacity());
        if tat < now.0 {
            now.0
        } else if tat > empty {
            empty
        } else {
            tat
        }
    }

    /// The TAT to keep when nothing is taken: one that no clock that ran forward could have left is taken for
    /// that of an empty bucket.
    pub fn clamped(self, tat: u64, now: UnixNanos) -> u64 {
        tat.min(now.0.saturating_add(self.capacity()))
    }

    /// Whether `cost` tokens are there.
    pub fn fit(self, tat: u64, now: UnixNanos, cost: u32) -> Fit {
        if cost > self.burst {
            return Fit::Never;
        }
        let after = self
            .base(tat, now)
            .saturating_add(self.interval * u64::from(cost));
        let full = now.0.saturating_add(self.capacity());
        if after <= full {
            Fit::Now(after)
        } else {
            Fit::After(after - full)
        }
    }

    /// Whole tokens in the bucket.
    pub fn remaining(self, tat: u64, now: UnixNanos) -> u64 {
        (now.0.saturating_add(self.capacity()) - self.base(tat, now)) / self.interval
    }

    /// When the bucket is full again.
    pub const fn full_at(self, tat: u64, now: UnixNanos) -> UnixNanos {
        UnixNanos(self.base(tat, now))
    }

    /// The TAT under `self` of a bucket that was kept under `old`: as many tokens stay spent, so that a change
    /// of the rate hands out none anew. What the new bucket cannot hold is not there.
    pub fn converted(self, old: Self, tat: u64, now: UnixNanos) -> u64 {
        if self == old {
            return tat;
        }
        let ahead = u128::from(old.base(tat, now) - now.0);
        let spent = (ahead * u128::from(self.interval)).div_ceil(u128::from(old.interval));
        let spent = u64::try_from(spent)
            .unwrap_or(u64::MAX)
            .min(self.capacity());
        now.0.saturating_add(spent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gcra(rpm: u32, burst: u32) -> Gcra {
        Gcra::new(
            NonZeroU32::new(rpm).unwrap(),
            NonZeroU32::new(burst).unwrap(),
        )
    }

    const T0: UnixNanos = UnixNanos::from_secs(1_785_738_360);

    #[test]
    fn a_rested_bucket_holds_its_burst_and_no_more() {
        let bucket = gcra(60, 3);
        let mut tat = 0;
        for left in [2, 1, 0] {
            let Fit::Now(next) = bucket.fit(tat, T0, 1) else {
                panic!("refused with {left} left")
            };
            tat = next;
            assert_eq!(bucket.remaining(tat, T0), left);
        }
        assert_eq!(bucket.fit(tat, T0, 1), Fit::After(1_000_000_000));
    }

    #[test]
    fn the_wait_that_is_told_is_exact_to_the_nanosecond() {
        let bucket = gcra(700, 5);
        let Fit::Now(tat) = bucket.fit(0, T0, 5) else {
            panic!("a rested bucket refuses")
        };
        for cost in 1..=5 {
            let Fit::After(wait) = bucket.fit(tat, T0, cost) else {
                panic!("an empty bucket admits")
            };
            assert!(matches!(
                bucket.fit(tat, UnixNanos(T0.0 + wait - 1), cost),
                Fit::After(1)
            ));
            assert!(matches!(
                bucket.fit(tat, UnixNanos(T0.0 + wait), cost),
                Fit::Now(_)
            ));
        }
    }

    #[test]
    fn more_than_the_bucket_can_hold_never_fits() {
        assert_eq!(gcra(60, 3).fit(0, T0, 4), Fit::Never);
    }

    #[test]
    fn the_interval_is_rounded_up_so_that_no_minute_admits_more_than_sold() {
        for rpm in [1, 7, 59, 60, 61, 700, 59_999_999, 60_000_000] {
            let interval = u128::from(gcra(rpm, 1).interval);
            assert!(interval * u128::from(rpm) >= u128::from(MINUTE), "{rpm}");
        }
    }

    #[test]
    fn a_clock_that_jumped_back_finds_an_empty_bucket_and_refills_it() {
        let bucket = gcra(60, 3);
        let Fit::Now(tat) = bucket.fit(0, T0, 1) else {
            panic!()
        };
        let earlier = UnixNanos(T0.0 - 3_600_000_000_000);
        assert_eq!(bucket.remaining(tat, earlier), 0);
        assert_eq!(bucket.fit(tat, earlier, 1), Fit::After(1_000_000_000));
    }

    #[test]
    fn a_change_of_rate_keeps_what_was_spent() {
        let (slow, fast) = (gcra(60, 10), gcra(600, 20));
        let Fit::Now(tat) = slow.fit(0, T0, 4) else {
            panic!()
        };
        assert_eq!(fast.remaining(fast.converted(slow, tat, T0), T0), 16);
        let small = gcra(60, 2);
        assert_eq!(small.remaining(small.converted(slow, tat, T0), T0), 0);
    }
}
