//! Tokens that have been granted but not spent. Tokens of the next grant can arrive before those of the previous one
//! are used up, so tokens of up to two grants are held.

use super::waiter::Unspent;
use crate::clock::Monotonic;

/// The unspent tokens of one grant.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    unspent: Unspent,
    expires: Monotonic,
}

impl Slot {
    fn take(&mut self, n: u64) -> Unspent {
        self.unspent.tokens -= n;
        Unspent {
            tokens: n,
            ..self.unspent
        }
    }
}

/// The unspent tokens of up to two grants.
#[derive(Debug, Default)]
pub(super) struct HeldTokens {
    /// The older grant, then the newer one.
    slots: [Slot; 2],
}

impl HeldTokens {
    /// Returns the number of tokens. Call [`take_expired`](Self::take_expired) first.
    pub(super) fn count(&self) -> u64 {
        self.slots.iter().map(|slot| slot.unspent.tokens).sum()
    }

    /// Returns the number of tokens that expire after `time`.
    pub(super) fn count_after(&self, time: Monotonic) -> u64 {
        let lasting = self.slots.iter().filter(|slot| slot.expires > time);
        lasting.map(|slot| slot.unspent.tokens).sum()
    }

    /// Takes `n` tokens, the older ones first, if there are that many.
    pub(super) fn take(&mut self, n: u64) -> Option<Unspent> {
        let [older, newer] = &mut self.slots;
        if older.unspent.tokens + newer.unspent.tokens < n {
            return None;
        }
        let first = n.min(older.unspent.tokens);
        Some(older.take(first).and(newer.take(n - first)))
    }

    pub(super) fn take_all(&mut self) -> Unspent {
        let [older, newer] = std::mem::take(&mut self.slots);
        older.unspent.and(newer.unspent)
    }

    pub(super) fn take_expired(&mut self, now: Monotonic) -> Unspent {
        let mut expired = Unspent::default();
        for slot in &mut self.slots {
            if slot.unspent.tokens > 0 && slot.expires <= now {
                expired = expired.and(std::mem::take(slot).unspent);
            }
        }
        expired
    }

    /// Adds the tokens of a grant. If two earlier grants have tokens left, takes and returns those of the older one.
    pub(super) fn add(&mut self, unspent: Unspent, expires: Monotonic) -> Unspent {
        let mut surplus = Unspent::default();
        if self.slots[1].unspent.tokens > 0 {
            surplus = std::mem::take(&mut self.slots[0]).unspent;
            self.slots.swap(0, 1);
        }
        self.slots[1] = Slot { unspent, expires };
        surplus
    }
}
