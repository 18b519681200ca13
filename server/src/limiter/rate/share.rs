//! This replica's share of a bucket while the shared counters are unavailable.

use std::num::{NonZeroU32, NonZeroU64};

use super::gcra::Gcra;
use crate::{
    clock::{Monotonic, Nanos},
    limiter::membership::ReplicaSlot,
};

/// The wait to report if the actual wait is unknown.
const A_SECOND: NonZeroU64 = NonZeroU64::new(1_000_000_000).unwrap();

/// A replica's share of one bucket.
#[derive(Debug, Clone, Copy)]
pub(in crate::limiter) struct Share {
    since: Monotonic,
    /// The share's TAT.
    pub(in crate::limiter) tat: Monotonic,
    /// The share's time per token, and its time from empty to full.
    price: Nanos,
    tau: Nanos,
    /// When the share was last used.
    used_at: Monotonic,
    /// Whether the plan may have been edited since the share was last used or the counters last responded, whichever is
    /// later.
    pub(super) is_edited: bool,
}

impl Share {
    /// Creates a share that has not been used. `is_edited` says whether the plan may have been edited since the
    /// counters' last response.
    pub(super) fn new(is_edited: bool) -> Self {
        Self {
            since: Monotonic::default(),
            tat: Monotonic::default(),
            price: Nanos::ZERO,
            tau: Nanos::ZERO,
            used_at: Monotonic::default(),
            is_edited,
        }
    }

    /// Takes `cost` from the share, which was empty at `since`. The shares of all replicas add up to one bucket: each
    /// replica gets a part of the burst and of the rate according to its slot. If the share has too few tokens, returns
    /// the wait.
    pub(in crate::limiter) fn take(
        &mut self,
        gcra: Gcra,
        slot: ReplicaSlot,
        since: Monotonic,
        cost: NonZeroU32,
        now: Monotonic,
    ) -> Result<(), NonZeroU64> {
        let burst = gcra.tokens(gcra.tau());
        let mine = burst / slot.of.get() + u64::from(slot.rank < burst % slot.of.get());
        let price = Nanos(gcra.tau().0.div_ceil(mine.max(1)));
        self.apply_plan(price, gcra.tau(), since, now);
        if mine < u64::from(cost.get()) {
            return Err(A_SECOND);
        }
        let price = self.price.saturating_mul(u64::from(cost.get()));
        let next = self.tat.max(now).saturating_add(price);
        let wait = next.saturating_since(now.saturating_add(gcra.tau()));
        match NonZeroU64::new(wait.0) {
            None => {
                self.tat = next;
                Ok(())
            }
            Some(wait) => Err(wait),
        }
    }

    /// Applies the current plan and slot. An edit keeps the tokens in the share, up to its new size, and never adds
    /// any. If the burst is raised, the added tokens have to refill first, so that no sequence of edits can fill a
    /// share. Since the time of the edit is unknown, the share counts as having refilled at the lower of the two rates
    /// since its last use. The share does not refill before `since`.
    fn apply_plan(&mut self, price: Nanos, tau: Nanos, since: Monotonic, now: Monotonic) {
        if self.since != since {
            // If the plan may have been edited, it is unknown how much has refilled, so the share is empty now.
            let empty_at = if self.is_edited {
                now.max(since)
            } else {
                since
            };
            self.tat = empty_at.saturating_add(tau);
        } else if (self.price, self.tau) != (price, tau) {
            let filled_to = now.max(since);
            let used_at = self.used_at.clamp(since, filled_to);
            let wide = |time: Nanos| u128::from(time.0);
            let level = self.tau.saturating_sub(self.tat.saturating_since(used_at));
            let level = wide(level) * wide(price) / wide(self.price);
            let refill = wide(filled_to.saturating_since(used_at)) * wide(price);
            let level = level + refill / wide(price.max(self.price));
            let missing = wide(tau).saturating_sub(level);
            let missing = u64::try_from(missing).map_or(tau, Nanos);
            self.tat = filled_to.saturating_add(missing);
        }
        *self = Self {
            since,
            tat: self.tat,
            price,
            tau,
            used_at: now,
            is_edited: false,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limiter::policy::RatePolicy;

    const SECOND: u64 = 1_000_000_000;
    const WHOLE: ReplicaSlot = ReplicaSlot {
        rank: 0,
        of: NonZeroU64::MIN,
    };

    fn plan(rpm: u32, burst: u32) -> Gcra {
        Gcra::new(RatePolicy {
            rpm: NonZeroU32::new(rpm).unwrap(),
            burst: NonZeroU32::new(burst).unwrap(),
        })
    }

    /// Returns an unused share of a bucket whose state the counters have reported under the current plan.
    fn seen() -> Share {
        Share::new(false)
    }

    /// Takes all tokens from the share and returns their number.
    fn drain(share: &mut Share, gcra: Gcra, now: u64) -> u64 {
        let (since, now) = (Monotonic(SECOND), Monotonic(now));
        let mut taken = 0;
        while share.take(gcra, WHOLE, since, NonZeroU32::MIN, now).is_ok() {
            taken += 1;
        }
        taken
    }

    #[test]
    fn no_order_of_edits_fills_a_share() {
        for (rpm, burst) in [
            (600, 200),
            (60, 200),
            (1, 200),
            (6000, 2),
            (60, 1),
            (60_000, 600),
        ] {
            let mut share = seen();
            let (sold, edited) = (plan(6000, 200), plan(rpm, burst));
            assert_eq!(drain(&mut share, sold, 9 * SECOND), 200);
            assert_eq!(drain(&mut share, edited, 9 * SECOND), 0, "{rpm}, {burst}");
            assert_eq!(
                drain(&mut share, sold, 9 * SECOND),
                0,
                "{rpm}, {burst}, and back"
            );
            // The share refills at the current rate.
            assert_eq!(drain(&mut share, sold, 10 * SECOND), 100, "{rpm}, {burst}");
        }
    }

    #[test]
    fn a_share_is_empty_until_it_begins_whatever_is_edited() {
        let mut share = seen();
        let (fast, slow) = (plan(6000, 200), plan(600, 20));
        for gcra in [fast, slow, fast] {
            assert_eq!(drain(&mut share, gcra, SECOND / 2), 0);
        }
        assert_eq!(drain(&mut share, fast, SECOND + SECOND / 10), 10);
        let mut share = seen();
        assert_eq!(drain(&mut share, fast, SECOND / 2), 0);
        // The edit was made at an unknown time between the two calls.
        assert_eq!(drain(&mut share, slow, 2 * SECOND), 10);
    }

    #[test]
    fn a_share_that_the_counters_never_described_starts_with_its_first_request() {
        let mut share = Share::new(true);
        let plan = plan(6000, 200);
        assert_eq!(drain(&mut share, plan, 9 * SECOND), 0);
        assert_eq!(drain(&mut share, plan, 10 * SECOND), 100);
    }

    #[test]
    fn share_keeps_its_tokens_when_the_plan_is_edited() {
        let mut share = seen();
        let full = 9 * SECOND;
        assert!(
            share
                .take(
                    plan(6000, 200),
                    WHOLE,
                    Monotonic(SECOND),
                    NonZeroU32::new(50).unwrap(),
                    Monotonic(full)
                )
                .is_ok()
        );
        assert_eq!(drain(&mut share, plan(6, 200), full), 150);
        // The next token refills at the current, higher rate.
        assert_eq!(drain(&mut share, plan(6000, 200), full), 0);
        assert_eq!(drain(&mut share, plan(6000, 200), full + SECOND / 100), 1);
    }
}
