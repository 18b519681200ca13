//! The generic cell rate algorithm (GCRA), in whole nanoseconds.
//!
//! A token bucket represented by one number: the *theoretical arrival time* (TAT), at which the bucket will be full
//! again. One token is worth one emission interval, and an empty bucket is `burst` intervals from full. Pure functions
//! of the stored number, so that all stores (a handle in memory, a script in Redis) make the same decisions.
//!
//! Two promises. *Never above the limit*: the interval is rounded up, so the rate is `rpm` or slightly less (at most 1
//! in 1,000, and only near 60,000,000 per minute). *No lockout by a clock*: a TAT later than that of an empty bucket
//! can only come from a clock that was ahead, and counts as an empty bucket. So setting a clock back by hours costs a
//! key one refill, not hours.
//!
//! Reference: ITU-T I.371, annex A (virtual scheduling algorithm).

use std::num::{NonZeroU32, NonZeroU64};

use crate::{clock::UnixNanos, limiter::policy::RatePolicy};

const MINUTE: u64 = 60_000_000_000;

/// The maximum distance from full: 73 years. Only extreme bursts reach it. They are capped at it, so that no sum below
/// overflows before the year 2480.
const TAU_MAX: u64 = 1 << 61;

/// The parameters of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gcra {
    /// Nanoseconds in which one token refills, rounded up. At least 1.
    emission: u64,
    /// Nanoseconds from empty to full.
    tau: u64,
}

/// Whether a cost fits into a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It fits. Taking it makes this the new TAT.
    Fits { tat: u64 },
    /// It does not fit now, but will after exactly `wait` nanoseconds if nothing else is taken.
    Wait { wait: NonZeroU64 },
    /// The cost is larger than the bucket.
    NeverFits,
}

impl Gcra {
    /// An empty bucket.
    pub(in crate::limiter) const NONE: Self = Self {
        emission: 1,
        tau: 0,
    };

    pub fn new(rate: RatePolicy) -> Self {
        let emission = MINUTE.div_ceil(u64::from(rate.rpm.get()));
        let tau = emission
            .saturating_mul(u64::from(rate.burst.get()))
            .min(TAU_MAX);
        Self { emission, tau }
    }

    /// Returns nanoseconds per token.
    pub fn emission(self) -> u64 {
        self.emission
    }

    /// Nanoseconds from empty to full.
    pub fn tau(self) -> u64 {
        self.tau
    }

    /// Limits `tat` to that of an empty bucket at `now`. Store the result after every decision, including denials;
    /// otherwise a bucket would not refill while the clock is behind.
    pub fn settled(self, tat: u64, now: UnixNanos) -> u64 {
        tat.min(now.0.saturating_add(self.tau))
    }

    /// Returns whether `cost` tokens may be taken at `now`. `tat` must be [settled](Self::settled).
    pub fn decide(self, tat: u64, now: UnixNanos, cost: NonZeroU32) -> Verdict {
        let price = self.price(cost);
        if price > self.tau {
            return Verdict::NeverFits;
        }
        let next = tat.max(now.0).saturating_add(price);
        match NonZeroU64::new(next.saturating_sub(now.0.saturating_add(self.tau))) {
            None => Verdict::Fits { tat: next },
            Some(wait) => Verdict::Wait { wait },
        }
    }

    /// Returns the whole tokens in the bucket at `now`. `tat` must be [settled](Self::settled).
    pub fn remaining(self, tat: u64, now: UnixNanos) -> u64 {
        self.tau.saturating_sub(tat.saturating_sub(now.0)) / self.emission
    }

    /// Carries usage under `old` over to `self`: as many tokens are missing from the new bucket as from the old one.
    /// Returns the new TAT, and the debt beyond an empty bucket. If the new bucket holds fewer tokens, it is empty, and
    /// the rest is missing once the bucket is enlarged again. `tat` and `beyond` are as of `used_at`, when tokens were
    /// last taken. Since the time of the edit is unknown, the bucket has refilled at the lower of the two rates since
    /// then.
    ///
    /// So the difference to a larger burst is available immediately, minus the usage. A smaller bucket has the same
    /// number of missing tokens, and no request waits for more than one full bucket of the new size. A temporarily
    /// smaller burst gains nothing, and neither does a key that is idle during an edit to a lower rate. Fractions of a
    /// token are rounded against the caller.
    pub fn carry_over(
        self,
        old: Self,
        (tat, beyond): (u64, u64),
        used_at: UnixNanos,
        now: UnixNanos,
    ) -> (u64, u64) {
        let used_at = used_at.min(now);
        let missing = old.settled(tat, used_at).saturating_sub(used_at.0);
        let missing = u128::from(missing) + u128::from(old.beyond(beyond, tat, used_at));
        let refill = u128::from(now.0 - used_at.0);
        let (price, old_price) = (u128::from(self.emission), u128::from(old.emission));
        let missing = (missing * price).div_ceil(old_price);
        let refill = refill.min(refill * price / old_price);
        let missing = u64::try_from(missing).unwrap_or(u64::MAX);
        let refill = u64::try_from(refill).unwrap_or(u64::MAX);
        let within = missing.min(self.tau);
        let beyond = (missing - within).saturating_sub(refill.saturating_sub(within));
        (now.0.saturating_add(within.saturating_sub(refill)), beyond)
    }

    /// Returns the debt beyond an empty bucket that is left at `now`. Refill reduces it once the bucket is
    /// full.
    pub fn beyond(self, beyond: u64, tat: u64, now: UnixNanos) -> u64 {
        beyond.saturating_sub(now.0.saturating_sub(tat))
    }

    pub(in crate::limiter) fn price(self, cost: NonZeroU32) -> u64 {
        self.emission.saturating_mul(u64::from(cost.get()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: UnixNanos = UnixNanos(1_790_000_000_000_000_000);

    fn gcra(rpm: u32, burst: u32) -> Gcra {
        Gcra::new(RatePolicy {
            rpm: NonZeroU32::new(rpm).unwrap(),
            burst: NonZeroU32::new(burst).unwrap(),
        })
    }

    fn fits(verdict: Verdict) -> bool {
        matches!(verdict, Verdict::Fits { .. })
    }

    fn cost(n: u32) -> NonZeroU32 {
        NonZeroU32::new(n).unwrap()
    }

    #[test]
    fn full_bucket_gives_exactly_its_burst() {
        let gcra = gcra(60, 10);
        let mut tat = 0;
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
        assert_eq!(gcra.decide(0, NOW, cost(11)), Verdict::NeverFits);
        assert!(fits(gcra.decide(0, NOW, cost(10))));
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
            for tat in [0, NOW.0, u64::MAX] {
                let tat = gcra.settled(tat, NOW);
                assert!(gcra.remaining(tat, NOW) <= u64::from(burst));
                gcra.decide(tat, NOW, cost(1));
                gcra.decide(tat, NOW, cost(u32::MAX));
                Gcra::new(other).carry_over(gcra, (tat, u64::MAX), UnixNanos(0), NOW);
                gcra.carry_over(Gcra::new(other), (tat, u64::MAX), NOW, NOW);
            }
        }
    }

    #[test]
    fn clock_that_was_hours_ahead_locks_nobody_out() {
        let gcra = gcra(60, 10);
        let ahead = NOW.saturating_add(7_200_000_000_000);
        let Verdict::Fits { tat } = gcra.decide(0, ahead, cost(10)) else {
            panic!("a rested bucket is full");
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
    fn a_rest_across_an_edit_refills_at_the_lower_rate() {
        let (fast, slow) = (gcra(6000, 100), gcra(12, 100));
        let drained = NOW.0 + fast.tau();
        let later = NOW.saturating_add(5_000_000_000);
        // The same in both directions: 5 s at 12 per minute.
        let (tat, beyond) = slow.carry_over(fast, (drained, 0), NOW, later);
        assert_eq!((slow.remaining(tat, later), beyond), (1, 0));
        let (tat, beyond) = fast.carry_over(slow, (NOW.0 + slow.tau(), 0), NOW, later);
        assert_eq!((fast.remaining(tat, later), beyond), (1, 0));
    }

    proptest! {
        /// The wait is exact: a nanosecond earlier is too early, and after it the request fits.
        #[test]
        fn wait_is_exact(
            rpm in 1..=60_000_000u32,
            burst in 1..=1_000_000u32,
            debt in any::<u64>(),
            want in 1..=1_000_000u32,
        ) {
            let gcra = gcra(rpm, burst);
            let tat = NOW.0 + debt % (gcra.tau() + 1);
            if let Verdict::Wait { wait } = gcra.decide(tat, NOW, cost(want)) {
                let then = NOW.saturating_add(wait.get());
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
            let tat = NOW.0 + debt % (gcra.tau() + 1);
            let left = u32::try_from(gcra.remaining(tat, NOW)).unwrap();
            prop_assert!(left <= burst);
            if let Some(left) = NonZeroU32::new(left) {
                prop_assert!(fits(gcra.decide(tat, NOW, left)));
            }
            prop_assert!(!fits(gcra.decide(tat, NOW, cost(left + 1))));
        }

        /// An edit never leaves more than the new burst less usage, and changing a plan back and forth never fills the
        /// bucket.
        #[test]
        fn edit_carries_usage_over(
            (rpm_a, rpm_b) in (1..=60_000_000u32, 1..=60_000_000u32),
            (burst_a, burst_b) in (1..=100_000u32, 1..=100_000u32),
            debt in any::<u64>(),
        ) {
            let (a, b) = (gcra(rpm_a, burst_a), gcra(rpm_b, burst_b));
            let tat = NOW.0 + debt % (a.tau() + 1);
            let used = u64::from(burst_a) - a.remaining(tat, NOW);
            let (carried, beyond) = b.carry_over(a, (tat, 0), NOW, NOW);
            prop_assert!(carried <= NOW.0 + b.tau());
            prop_assert_eq!(
                b.remaining(carried, NOW),
                u64::from(burst_b).saturating_sub(used)
            );
            let (back, _) = a.carry_over(b, (carried, beyond), NOW, NOW);
            prop_assert!(back >= tat);
            // At most one token more is missing than before.
            prop_assert!(back <= tat + a.emission());
        }
    }
}
