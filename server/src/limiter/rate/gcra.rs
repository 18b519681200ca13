//! The generic cell rate algorithm (GCRA), in whole nanoseconds.
//!
//! A token bucket is represented by one number, the *theoretical arrival time* (TAT), at which the bucket will be full
//! again. One token is worth one emission interval, and an empty bucket is `burst` intervals from full. All functions
//! depend only on the TAT and their arguments, so a store in memory and a script in Redis make the same decisions.
//!
//! Two properties hold. *Never above the limit*: the emission interval is rounded up, so the rate is `rpm` or slightly
//! less. The difference is largest near 60,000,000 per minute, where it is less than 1 in 1,000. *No lockout when the
//! clock is set back*: a TAT later than that of an empty bucket can only come from a clock that was ahead, so the
//! bucket counts as empty. So if the clock is set back by hours, a key waits at most until its bucket has refilled, not
//! for hours.
//!
//! Reference: ITU-T I.371, annex A (virtual scheduling algorithm).

use std::num::{NonZeroU32, NonZeroU64};

use crate::{
    clock::{Instant, Nanos},
    limiter::policy::RatePolicy,
};

const MINUTE: Nanos = Nanos::from_secs(60);

/// The maximum tau: 73 years. Only extreme bursts exceed this maximum. These bursts are capped, so that no sum in this
/// module overflows before the year 2480.
const TAU_MAX: Nanos = Nanos(1 << 61);

/// The parameters of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gcra {
    /// How long one token takes to refill, rounded up. At least 1 ns.
    emission: Nanos,
    /// How long an empty bucket takes to fill.
    tau: Nanos,
}

/// How many tokens are missing from a bucket. `T` is the clock on which the TAT is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level<T> {
    pub tat: T,
    /// Debt beyond the debt of an empty bucket, left over from a larger burst.
    pub beyond: Nanos,
}

/// Whether a bucket contains enough tokens for a cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict<T> {
    /// The bucket has enough tokens. Taking the tokens results in this TAT.
    Fits { tat: T },
    /// The bucket will have enough tokens after exactly `wait` nanoseconds if no other tokens are taken.
    Wait { wait: NonZeroU64 },
    /// The cost exceeds the burst.
    NeverFits,
}

impl Gcra {
    pub fn new(rate: RatePolicy) -> Self {
        let emission = Nanos(MINUTE.0.div_ceil(u64::from(rate.rpm.get())));
        let tau = emission
            .saturating_mul(u64::from(rate.burst.get()))
            .min(TAU_MAX);
        Self { emission, tau }
    }

    /// Returns the time per token.
    pub fn emission(self) -> Nanos {
        self.emission
    }

    /// Returns the time from empty to full.
    pub fn tau(self) -> Nanos {
        self.tau
    }

    /// Limits `tat` to an empty bucket's TAT at `now`. Store the result after every decision, including denials;
    /// otherwise, a bucket would not refill while the clock is behind.
    pub fn settled<T: Instant>(self, tat: T, now: T) -> T {
        tat.min(now.saturating_add(self.tau))
    }

    /// Decides whether `cost` tokens may be taken at `now`. `tat` must be [settled](Self::settled).
    pub fn decide<T: Instant>(self, tat: T, now: T, cost: NonZeroU32) -> Verdict<T> {
        let price = self.price(cost);
        if price > self.tau {
            return Verdict::NeverFits;
        }
        let next = tat.max(now).saturating_add(price);
        let wait = next.saturating_since(now.saturating_add(self.tau));
        match NonZeroU64::new(wait.0) {
            None => Verdict::Fits { tat: next },
            Some(wait) => Verdict::Wait { wait },
        }
    }

    /// Returns the number of whole tokens in the bucket at `now`. `tat` must be [settled](Self::settled).
    pub fn remaining<T: Instant>(self, tat: T, now: T) -> u64 {
        self.tokens(self.tau.saturating_sub(tat.saturating_since(now)))
    }

    /// Returns the number of whole tokens that refill in `time`.
    pub fn tokens(self, time: Nanos) -> u64 {
        time.0 / self.emission.0
    }

    /// Carries usage over from `old` to `self`: as many tokens are missing from the new bucket as from the old bucket.
    /// If more tokens are missing than the new bucket can hold, the new bucket is empty. The excess is kept in
    /// [`Level::beyond`], so that these tokens are still missing if the bucket is enlarged soon afterward. `level` is
    /// as of `used_at`, when tokens were last taken or the limits were last edited. Since the time of the edit is
    /// unknown, the bucket counts as having refilled at the lower of the two rates since `used_at`.
    ///
    /// So when the burst is raised, the added tokens are available immediately, minus any usage that did not fit in the
    /// old bucket. When the burst is lowered, no request waits longer than the new bucket takes to fill. Lowering the
    /// burst temporarily does not add tokens, and neither does an edit to a lower rate while the key is idle. Fractions
    /// of a token are rounded in favor of the limit.
    pub fn carry_over<T: Instant>(
        self,
        old: Self,
        level: Level<T>,
        used_at: T,
        now: T,
    ) -> Level<T> {
        let wide = |time: Nanos| u128::from(time.0);
        let used_at = used_at.min(now);
        let missing = old.settled(level.tat, used_at).saturating_since(used_at);
        let missing = wide(missing) + wide(level.beyond_at(used_at));
        let refill = wide(now.saturating_since(used_at));
        let (price, old_price) = (wide(self.emission), wide(old.emission));
        let missing = (missing * price).div_ceil(old_price);
        let refill = refill.min(refill * price / old_price);
        let missing = Nanos(u64::try_from(missing).unwrap_or(u64::MAX));
        let refill = Nanos(u64::try_from(refill).unwrap_or(u64::MAX));
        let within = missing.min(self.tau);
        let unfilled = missing.saturating_sub(within);
        Level {
            tat: now.saturating_add(within.saturating_sub(refill)),
            beyond: unfilled.saturating_sub(refill.saturating_sub(within)),
        }
    }

    pub(in crate::limiter) fn price(self, cost: NonZeroU32) -> Nanos {
        self.emission.saturating_mul(u64::from(cost.get()))
    }
}

impl<T: Instant> Level<T> {
    /// Returns how much of `beyond` is left at `now`. `beyond` decreases only after the bucket is full.
    pub fn beyond_at(self, now: T) -> Nanos {
        self.beyond.saturating_sub(now.saturating_since(self.tat))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::UnixNanos;

    const NOW: UnixNanos = UnixNanos(1_790_000_000_000_000_000);

    fn gcra(rpm: u32, burst: u32) -> Gcra {
        Gcra::new(RatePolicy {
            rpm: NonZeroU32::new(rpm).unwrap(),
            burst: NonZeroU32::new(burst).unwrap(),
        })
    }

    fn fits(verdict: Verdict<UnixNanos>) -> bool {
        matches!(verdict, Verdict::Fits { .. })
    }

    fn cost(n: u32) -> NonZeroU32 {
        NonZeroU32::new(n).unwrap()
    }

    #[test]
    fn full_bucket_gives_exactly_its_burst() {
        let gcra = gcra(60, 10);
        let mut tat = UnixNanos(0);
        for left in (0..10).rev() {
            let Verdict::Fits { tat: next } = gcra.decide(tat, NOW, cost(1)) else {
                panic!("{left} should be left");
            };
            tat = next;
            assert_eq!(gcra.remaining(tat, NOW), left);
        }
        assert_eq!(
            gcra.decide(tat, NOW, cost(1)),
            Verdict::Wait {
                wait: NonZeroU64::new(1_000_000_000).unwrap()
            }
        );
    }

    #[test]
    fn cost_above_the_burst_never_fits() {
        let gcra = gcra(600, 10);
        assert_eq!(gcra.decide(UnixNanos(0), NOW, cost(11)), Verdict::NeverFits);
        assert!(fits(gcra.decide(UnixNanos(0), NOW, cost(10))));
    }

    #[test]
    fn extremes_of_rate_and_burst_do_not_overflow() {
        let other = RatePolicy {
            rpm: NonZeroU32::new(7).unwrap(),
            burst: NonZeroU32::new(3).unwrap(),
        };
        for (rpm, burst) in [
            (1, 1),
            (1, u32::MAX),
            (u32::MAX, u32::MAX),
            (60_000_000, 60_000_000),
            (u32::MAX, 1),
        ] {
            let gcra = gcra(rpm, burst);
            for tat in [0, NOW.0, u64::MAX].map(UnixNanos) {
                let tat = gcra.settled(tat, NOW);
                assert!(gcra.remaining(tat, NOW) <= u64::from(burst));
                gcra.decide(tat, NOW, cost(1));
                gcra.decide(tat, NOW, cost(u32::MAX));
                let beyond = Nanos::MAX;
                Gcra::new(other).carry_over(gcra, Level { tat, beyond }, UnixNanos(0), NOW);
                gcra.carry_over(Gcra::new(other), Level { tat, beyond }, NOW, NOW);
            }
        }
    }

    #[test]
    fn clock_that_was_hours_ahead_does_not_lock_keys_out() {
        let gcra = gcra(60, 10);
        let ahead = NOW.saturating_add(Nanos::from_secs(7200));
        let Verdict::Fits { tat } = gcra.decide(UnixNanos(0), ahead, cost(10)) else {
            panic!("an idle bucket is full");
        };
        let tat = gcra.settled(tat, NOW);
        assert_eq!(
            gcra.decide(tat, NOW, cost(1)),
            Verdict::Wait {
                wait: NonZeroU64::new(1_000_000_000).unwrap()
            }
        );
    }

    #[test]
    fn idle_time_that_spans_an_edit_refills_at_the_lower_rate() {
        let (fast, slow) = (gcra(6000, 100), gcra(12, 100));
        let drained = |gcra: Gcra| Level {
            tat: NOW.saturating_add(gcra.tau()),
            beyond: Nanos::ZERO,
        };
        let later = NOW.saturating_add(Nanos::from_secs(5));
        // Whether the rate is raised or lowered, one token is refilled in 5 s, as at 12 per minute.
        let Level { tat, beyond } = slow.carry_over(fast, drained(fast), NOW, later);
        assert_eq!((slow.remaining(tat, later), beyond), (1, Nanos::ZERO));
        let Level { tat, beyond } = fast.carry_over(slow, drained(slow), NOW, later);
        assert_eq!((fast.remaining(tat, later), beyond), (1, Nanos::ZERO));
    }

    proptest! {
        /// The wait is exact: the request fits after the wait, and does not fit a nanosecond earlier.
        #[test]
        fn wait_is_exact(
            rpm in 1..=60_000_000u32,
            burst in 1..=1_000_000u32,
            debt in any::<u64>(),
            want in 1..=1_000_000u32,
        ) {
            let gcra = gcra(rpm, burst);
            let tat = NOW.saturating_add(Nanos(debt % (gcra.tau().0 + 1)));
            if let Verdict::Wait { wait } = gcra.decide(tat, NOW, cost(want)) {
                let then = NOW.saturating_add(Nanos(wait.get()));
                prop_assert!(fits(gcra.decide(tat, then, cost(want))));
                let before = UnixNanos(then.0 - 1);
                prop_assert_eq!(
                    gcra.decide(tat, before, cost(want)),
                    Verdict::Wait { wait: NonZeroU64::new(1).unwrap() }
                );
            }
        }

        /// Exactly `remaining` tokens fit.
        #[test]
        fn exactly_the_remaining_tokens_fit(
            rpm in 1..=60_000_000u32,
            burst in 1..=1_000_000u32,
            debt in any::<u64>(),
        ) {
            let gcra = gcra(rpm, burst);
            let tat = NOW.saturating_add(Nanos(debt % (gcra.tau().0 + 1)));
            let left = u32::try_from(gcra.remaining(tat, NOW)).unwrap();
            prop_assert!(left <= burst);
            if let Some(left) = NonZeroU32::new(left) {
                prop_assert!(fits(gcra.decide(tat, NOW, left)));
            }
            prop_assert!(!fits(gcra.decide(tat, NOW, cost(left + 1))));
        }

        /// An edit never leaves more tokens than the new burst minus the usage, and changing a plan back and forth
        /// never adds tokens.
        #[test]
        fn edit_carries_usage_over(
            (rpm_a, rpm_b) in (1..=60_000_000u32, 1..=60_000_000u32),
            (burst_a, burst_b) in (1..=100_000u32, 1..=100_000u32),
            debt in any::<u64>(),
        ) {
            let (a, b) = (gcra(rpm_a, burst_a), gcra(rpm_b, burst_b));
            let tat = NOW.saturating_add(Nanos(debt % (a.tau().0 + 1)));
            let used = u64::from(burst_a) - a.remaining(tat, NOW);
            let level = Level { tat, beyond: Nanos::ZERO };
            let carried = b.carry_over(a, level, NOW, NOW);
            prop_assert!(carried.tat <= NOW.saturating_add(b.tau()));
            prop_assert_eq!(
                b.remaining(carried.tat, NOW),
                u64::from(burst_b).saturating_sub(used)
            );
            let back = a.carry_over(b, carried, NOW, NOW).tat;
            prop_assert!(back >= tat);
            // At most one more token is missing than before.
            prop_assert!(back <= tat.saturating_add(a.emission()));
        }
    }
}
