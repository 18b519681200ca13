//! Tokens taken ahead: one key's lease on one replica.
//!
//! Owns how many tokens to take at a time, until when they may be spent, and what goes back. Pure: the time
//! is brought, and the store does the asking. Times are nanoseconds of the monotonic clock, but for those of
//! the counters, which are microseconds of theirs.
//!
//! **The guarantee.** A token is spent only after the counters granted it, at most `ttl` later: the life of a
//! lease is counted from when it was *asked for*, which is before it was granted. So what is spent in a window of
//! `T` seconds was granted in the `T + ttl` seconds that end with it, and of those the counters grant at most
//! `burst + rate * (T + ttl)`, to all replicas together. What is given back is credited no further than to
//! where the bucket would stand had it never been taken, so the bound holds for what is spent.

use std::num::{NonZeroU32, NonZeroU64};

use super::{A_SECOND, counters::CounterMicros, roster::Place};
use crate::limiter::gcra::Gcra;

/// Tokens that would expire within so many nanoseconds do not count as stock: the next lease is asked for
/// while they are spent.
const LAST_MOMENT: u64 = 10_000_000;

/// Tokens of one grant.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    tokens: u64,
    /// Not spent from then on.
    expires: u64,
    taken_at: CounterMicros,
}

/// The bucket as the counters last told it.
#[derive(Debug, Clone, Copy, Default)]
struct View {
    /// Nanoseconds until full, at `seen`.
    debt: u64,
    seen: u64,
}

/// This replica's share of a bucket while there are no counters.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::limiter) struct Share {
    since: u64,
    /// The bucket's TAT, by the monotonic clock.
    pub(super) tat: u64,
}

impl Share {
    /// Takes `cost` from this replica's share of the bucket, empty at `since`. All shares together are one
    /// bucket: of `burst` tokens each replica holds as many, and gets as much of the rate, as its place gives it.
    pub(super) fn take(
        &mut self,
        gcra: Gcra,
        place: Place,
        since: u64,
        cost: NonZeroU32,
        now: u64,
    ) -> Result<(), NonZeroU64> {
        if self.since != since {
            self.since = since;
            self.tat = since.saturating_add(gcra.tau());
        }
        let burst = gcra.tau() / gcra.emission();
        let mine = burst / place.of.get() + u64::from(place.rank < burst % place.of.get());
        if mine < u64::from(cost.get()) {
            return Err(A_SECOND);
        }
        let price = gcra
            .tau()
            .div_ceil(mine)
            .saturating_mul(u64::from(cost.get()));
        let next = self.tat.max(now).saturating_add(price);
        match NonZeroU64::new(next.saturating_sub(now.saturating_add(gcra.tau()))) {
            None => {
                self.tat = next;
                Ok(())
            }
            Some(wait) => Err(wait),
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(in crate::limiter) struct Lease {
    /// The older grant and the newer one.
    slots: [Slot; 2],
    /// How many tokens the next grant should have.
    size: u64,
    /// When the last were asked for, and how many were wanted since.
    asked_at: u64,
    wanted: u64,
    flying: bool,
    /// How many flights brought no answer.
    failures: u64,
    /// Unspent tokens, to be given back, and when the earliest was taken.
    back: u64,
    back_taken_at: CounterMicros,
    view: Option<View>,
    /// The counters had less than `held_for` tokens; they are not asked again before then.
    held_until: u64,
    held_for: u64,
    pub(super) share: Share,
}

/// Tokens that were not spent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unspent {
    pub(super) tokens: u64,
    pub(super) taken_at: CounterMicros,
}

impl Lease {
    /// The plan was edited: what was taken under the old one goes back, what is known is forgotten.
    pub(in crate::limiter) fn edited(&mut self) {
        self.surrender_all();
        self.view = None;
        self.held_until = 0;
        self.size = 1;
    }

    /// All that is in hand is to go back.
    pub(super) fn surrender_all(&mut self) {
        for i in 0..self.slots.len() {
            self.surrender(i);
        }
    }

    /// Nobody could tell it from a new one.
    pub(in crate::limiter) fn is_forgettable(&self, now: u64) -> bool {
        self.share.tat <= now
            && !self.flying
            && self.back == 0
            && self.slots.iter().all(|slot| slot.tokens == 0)
    }

    fn surrender(&mut self, slot: usize) {
        let slot = std::mem::take(&mut self.slots[slot]);
        self.owe(slot.tokens, slot.taken_at);
    }

    /// Tokens that nobody will spend.
    pub(super) fn owe(&mut self, tokens: u64, taken_at: CounterMicros) {
        if tokens == 0 {
            return;
        }
        self.back_taken_at = if self.back == 0 {
            taken_at
        } else {
            self.back_taken_at.min(taken_at)
        };
        self.back += tokens;
    }

    /// Takes out of the lease what has expired.
    pub(super) fn expire(&mut self, now: u64) {
        for i in 0..self.slots.len() {
            if self.slots[i].tokens > 0 && self.slots[i].expires <= now {
                self.surrender(i);
            }
        }
    }

    /// Spends `n` tokens, or none. The lease holds none that [expired](Self::expire).
    pub(super) fn spend(&mut self, n: u64) -> bool {
        let [older, newer] = &mut self.slots;
        if older.tokens + newer.tokens < n {
            return false;
        }
        let first = n.min(older.tokens);
        older.tokens -= first;
        newer.tokens -= n - first;
        self.wanted += n;
        true
    }

    /// The tokens in hand.
    pub(super) fn in_hand(&self) -> u64 {
        self.slots.iter().map(|slot| slot.tokens).sum()
    }

    /// How many tokens to have at a time, most: a tenth of the burst.
    pub(super) fn largest(gcra: Gcra) -> u64 {
        (gcra.tau() / gcra.emission() / 10).max(1)
    }

    /// Notes that a request of `n` tokens found too few, and tells how many to take at a time: as many as are
    /// spent in the life of a lease at the pace since the last time, at most twice as many as then, at least
    /// half. One means that each request is decided by the counters.
    pub(super) fn pace(&mut self, now: u64, ttl: u64, largest: u64) -> u64 {
        let elapsed = now.saturating_sub(self.asked_at).max(1);
        if elapsed >= 4 * ttl {
            self.size = 1;
        } else {
            let pace = u128::from(self.wanted) * u128::from(ttl) / u128::from(elapsed);
            let pace = u64::try_from(pace).unwrap_or(u64::MAX);
            let size = self.size.max(1);
            self.size = pace.clamp(size / 2, size * 2);
        }
        self.size = self.size.clamp(1, largest);
        self.asked_at = now;
        self.wanted = 0;
        self.size
    }

    /// A request of `n` tokens found none here, and waits for the counters.
    pub(super) fn count(&mut self, n: u64) {
        self.wanted += n;
    }

    /// Whether to ask for the next lease although this one is not spent yet.
    pub(super) fn is_low(&self, now: u64) -> bool {
        if self.size < 2 || self.flying || now < self.held_until {
            return false;
        }
        let lasting: u64 = self
            .slots
            .iter()
            .filter(|slot| slot.expires > now + LAST_MOMENT)
            .map(|slot| slot.tokens)
            .sum();
        lasting <= (self.size / 8).max(1)
    }

    pub(super) fn is_flying(&self) -> bool {
        self.flying
    }

    pub(super) fn take_off(&mut self) {
        self.flying = true;
    }

    /// How many flights brought no answer so far.
    pub(super) fn failures(&self) -> u64 {
        self.failures
    }

    /// The flight is over, with an answer or without.
    pub(super) fn land(&mut self, answered: bool) {
        self.flying = false;
        self.failures += u64::from(!answered);
    }

    /// What is to be given back with the next call.
    pub(super) fn unspent(&mut self) -> Option<Unspent> {
        let tokens = std::mem::take(&mut self.back);
        (tokens > 0).then_some(Unspent {
            tokens,
            taken_at: self.back_taken_at,
        })
    }

    /// `tokens` were granted at `taken_at`, to be spent before `expires`.
    pub(super) fn stock(&mut self, tokens: u64, taken_at: CounterMicros, expires: u64) {
        if self.slots[1].tokens > 0 {
            self.surrender(0);
            self.slots.swap(0, 1);
        }
        self.slots[1] = Slot {
            tokens,
            expires,
            taken_at,
        };
    }

    /// The bucket was so far from full at `seen`.
    pub(super) fn saw(&mut self, debt: u64, seen: u64) {
        self.view = Some(View { debt, seen });
    }

    /// When the counters last told of the bucket; 0 for never.
    pub(super) fn seen_at(&self) -> u64 {
        self.view.map_or(0, |view| view.seen)
    }

    /// Too few for `n` until then.
    pub(super) fn hold(&mut self, n: u64, until: u64) {
        self.held_until = until;
        self.held_for = n;
    }

    /// Until when requests of `n` are refused without asking.
    pub(super) fn held(&self, n: u64, now: u64) -> Option<u64> {
        (now < self.held_until && n >= self.held_for).then_some(self.held_until)
    }

    /// Nanoseconds until the bucket is full, as far as is known here. Tokens in hand count as in the bucket.
    pub(super) fn debt(&self, gcra: Gcra, now: u64) -> u64 {
        let view = self.view.unwrap_or_default();
        let debt = view.debt.saturating_sub(now.saturating_sub(view.seen));
        debt.saturating_sub(self.in_hand().saturating_mul(gcra.emission()))
            .min(gcra.tau())
    }
}
