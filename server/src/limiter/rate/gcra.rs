//! The generic cell rate algorithm, in whole nanoseconds.
//!
//! A token bucket kept as one number: the *theoretical arrival time* (TAT), the moment at which the bucket
//! will be full again. One token is worth one emission interval; a bucket may be `burst` intervals away from
//! full. Owns that arithmetic and nothing else: pure functions on the stored number, so that whoever stores
//! it (a handle in memory, a script in Redis) decides alike. Depends on nothing.
//!
//! Two promises. *Never more than sold*: the interval is rounded up, so the rate is `rpm` or a little less
//! (at most 1 in 1,000, and that only near 60,000,000 a minute). *No lock-out by a clock*: a TAT later than
//! an empty bucket's can only stem from a clock that was ahead, and is read as an empty bucket's; so a clock
//! set back by hours costs a key one refill and not hours.
//!
//! Reference: ITU-T I.371, annex A (virtual scheduling algorithm).

use std::num::{NonZeroU32, NonZeroU64};

use crate::{clock::UnixNanos, limiter::policy::RatePolicy};

const MINUTE: u64 = 60_000_000_000;

/// The furthest from full that a bucket may be: 73 years. Only bursts beyond anything sold reach it; they
/// are cut to it, so that no sum below overflows before the year 2480.
const TAU_MAX: u64 = 1 << 61;

/// The numbers of one bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gcra {
    /// Nanoseconds a token takes to come back, rounded up. At least 1.
    emission: u64,
    /// Nanoseconds from empty to full.
    tau: u64,
}

/// What a bucket answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// There is enough; taking it makes this the new TAT.
    Fits { tat: u64 },
    /// There is not enough now; there will be after exactly `wait` nanoseconds if nobody takes any.
    Wait { wait: NonZeroU64 },
    /// The cost is above what the bucket can ever hold.
    NeverFits,
}

impl Gcra {
    /// Holds nothing.
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

    /// Nanoseconds per token.
    pub fn emission(self) -> u64 {
        self.emission
    }

    /// Nanoseconds from empty to full.
    pub fn tau(self) -> u64 {
        self.tau
    }

    /// `tat` as it may be believed at `now`: never further from full than an empty bucket. Whoever stores
    /// the TAT stores this after every look, denials included, or a bucket would not begin to refill while
    /// the clock is behind.
    pub fn settled(self, tat: u64, now: UnixNanos) -> u64 {
        tat.min(now.0.saturating_add(self.tau))
    }

    /// Whether `cost` tokens may be taken at `now`. `tat` is [settled](Self::settled).
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

    /// Whole tokens in the bucket at `now`. `tat` is [settled](Self::settled).
    pub fn remaining(self, tat: u64, now: UnixNanos) -> u64 {
        self.tau.saturating_sub(tat.saturating_sub(now.0)) / self.emission
    }

    /// The TAT that carries what was consumed under `old` over to `self`, and what is missing beyond an empty bucket:
    /// as many tokens are missing from the new bucket as were missing from the old one. If it holds fewer, it is empty,
    /// and the rest is missing only once the bucket is made larger again. `tat` and `beyond` are of `used_at`, when
    /// tokens were last taken. Since then the bucket has refilled at the lower of the two rates, since when the plan was
    /// edited is not known.
    ///
    /// So a larger burst is there at once, less what was used; a smaller one starts as empty as it was, and nobody
    /// waits for more than one whole bucket of the new size; a detour over a smaller one gives nothing; and a key that
    /// rests through an edit gains nothing from the higher rate before it. Fractions of a token are rounded against the
    /// caller.
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

    /// What is left at `now` of what was missing beyond an empty bucket: once the bucket is full, refill reduces it.
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
    fn a_rested_bucket_gives_its_burst_at_once_and_not_one_more() {
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
    fn a_cost_above_the_burst_never_fits() {
        let gcra = gcra(600, 10);
        assert_eq!(gcra.decide(0, NOW, cost(11)), Verdict::NeverFits);
        assert!(fits(gcra.decide(0, NOW, cost(10))));
    }

    #[test]
    fn the_extremes_of_rate_and_burst_do_not_overflow() {
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
    fn a_clock_that_was_hours_ahead_locks_nobody_out() {
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
        // The same in whichever direction: 5 s at 12 a minute.
        let (tat, beyond) = slow.carry_over(fast, (drained, 0), NOW, later);
        assert_eq!((slow.remaining(tat, later), beyond), (1, 0));
        let (tat, beyond) = fast.carry_over(slow, (NOW.0 + slow.tau(), 0), NOW, later);
        assert_eq!((fast.remaining(tat, later), beyond), (1, 0));
    }

    proptest! {
        /// The wait is exact: one nanosecond earlier is too early, and after it the request fits.
        #[test]
        fn the_wait_is_exact(
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

        /// `remaining` is what fits: that many, and not one more.
        #[test]
        fn remaining_is_what_fits(
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

        /// An edit never gives more than the new burst less what was used, and a detour over another plan never fills
        /// the bucket.
        #[test]
        fn an_edit_carries_what_was_used(
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
            // At most a token more is missing than was.
            prop_assert!(back <= tat + a.emission());
        }
    }
}
