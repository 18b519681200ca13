//! Tokens that one replica has taken from a key's bucket ahead of need: its lease.
//!
//! Owns how many tokens to take at a time, how long they may be spent, what goes back, and which requests wait for
//! more. Does no I/O. Times are nanoseconds of the monotonic clock, except [`CounterMicros`], which are microseconds of
//! the counters' clock.
//!
//! **The guarantee.** A token is spent only after the counters granted it, and at most `ttl` after it was *requested*,
//! which is before it was granted. So what is spent in a window of `T` seconds was granted in the `T + ttl` seconds
//! that end with the window, and in those the counters grant at most `burst + rate * (T + ttl)` to all replicas
//! together. Returned tokens are credited no further than to where the bucket would be had they never been taken, so
//! the bound holds for what is spent.
//!
//! **How much.** What requests wait for right now is requested in full. What is held for later follows the key's pace
//! on this replica, up to a tenth of the burst.

use std::num::{NonZeroU32, NonZeroU64};

use super::{counters::CounterMicros, gcra::Gcra};
use crate::limiter::{
    distributed::{A_SECOND, calls::Waiter},
    membership::ReplicaSlot,
    policy::Policies,
};

/// Nanoseconds. Tokens that expire sooner do not count as stock: the next lease is requested while they are spent.
const LAST_MOMENT: u64 = 10_000_000;

/// Nanoseconds. Calls for one key that are under way at the same time begin at least so far apart.
const PAUSE_MIN: u64 = 1_000_000;

/// Tokens of one grant.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    tokens: u64,
    /// They must not be spent from then on.
    expires: u64,
    taken_at: CounterMicros,
    generation: u64,
}

/// The bucket as the counters last described it.
#[derive(Debug, Clone, Copy, Default)]
struct View {
    /// Nanoseconds until full, at `seen`.
    debt: u64,
    /// When the call began: no later than the counters answered it.
    seen: u64,
}

/// This replica's share of a bucket while the counters are unavailable.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::limiter) struct Share {
    since: u64,
    /// The share's TAT, on the monotonic clock.
    pub(in crate::limiter) tat: u64,
    /// Nanoseconds per token of the share, and from empty to full.
    price: u64,
    tau: u64,
    /// When the share was last used.
    used_at: u64,
    /// The plan was edited since the share was last used, or since the counters were last seen.
    is_edited: bool,
}

impl Share {
    /// Takes `cost` from this replica's share of the bucket, which was empty at `since`. All shares together are one
    /// bucket: each replica holds as many of the `burst` tokens, and gets as much of the rate, as its place entitles
    /// it to.
    pub(in crate::limiter) fn take(
        &mut self,
        gcra: Gcra,
        slot: ReplicaSlot,
        since: u64,
        cost: NonZeroU32,
        now: u64,
    ) -> Result<(), NonZeroU64> {
        let burst = gcra.tau() / gcra.emission();
        let mine = burst / slot.of.get() + u64::from(slot.rank < burst % slot.of.get());
        self.follow(gcra.tau().div_ceil(mine.max(1)), gcra.tau(), since, now);
        if mine < u64::from(cost.get()) {
            return Err(A_SECOND);
        }
        let price = self.price.saturating_mul(u64::from(cost.get()));
        let next = self.tat.max(now).saturating_add(price);
        match NonZeroU64::new(next.saturating_sub(now.saturating_add(gcra.tau()))) {
            None => {
                self.tat = next;
                Ok(())
            }
            Some(wait) => Err(wait),
        }
    }

    /// Brings the share to this plan and place. An edit leaves the tokens that are in it, as far as it holds them now,
    /// and adds none: those of a larger burst come as it refills, so no order of edits fills a share. When the edit was
    /// made is not known, so from the last use on it has refilled at the lower of the two rates. Nothing refills before
    /// `since`.
    fn follow(&mut self, price: u64, tau: u64, since: u64, now: u64) {
        if self.since != since {
            // How it would have filled under the plan before is not known.
            let empty_at = if self.is_edited {
                now.max(since)
            } else {
                since
            };
            self.tat = empty_at.saturating_add(tau);
        } else if (self.price, self.tau) != (price, tau) {
            let filled_to = now.max(since);
            let used_at = self.used_at.clamp(since, filled_to);
            let level = self.tau.saturating_sub(self.tat.saturating_sub(used_at));
            let level = u128::from(level) * u128::from(price) / u128::from(self.price);
            let refill = u128::from(filled_to - used_at) * u128::from(price);
            let level = level + refill / u128::from(price.max(self.price));
            let missing = u128::from(tau).saturating_sub(level);
            let missing = u64::try_from(missing).unwrap_or(tau);
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

/// What a call to the counters says about the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::limiter) struct Terms {
    pub(in crate::limiter) gcra: Gcra,
    pub(in crate::limiter) version: u64,
    /// Whether tokens may be held for later. If not, every request is decided by the counters.
    pub(in crate::limiter) leased: bool,
}

impl Terms {
    pub(in crate::limiter) fn new(policies: &Policies, ttl: u64) -> Self {
        Self {
            gcra: policies.gcra(),
            version: policies.version(),
            leased: ttl > 0 && !policies.strict(),
        }
    }

    /// Whether tokens taken on the other terms may be spent on these.
    pub(in crate::limiter) fn is_like(self, other: Self) -> bool {
        (self.gcra, self.leased) == (other.gcra, other.leased)
    }

    /// Nanoseconds after which a call may follow another that has not been answered: half the time the bucket takes to
    /// fill, or the first token of a small one.
    fn pause(self) -> u64 {
        let refill = (self.gcra.tau() / 2).max(self.gcra.emission());
        refill.max(PAUSE_MIN)
    }

    /// The most tokens to hold for later: a tenth of the burst.
    fn largest_lease(self) -> u64 {
        (self.gcra.tau() / self.gcra.emission() / 10).max(1)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(in crate::limiter) struct Lease {
    /// The older grant and the newer one.
    slots: [Slot; 2],
    /// How many tokens the next grant should have.
    size: u64,
    /// When tokens were last requested, 0 for never; and how many requests have wanted since.
    asked_at: u64,
    wanted: u64,
    /// Calls for tokens under way that are not late yet, and when the latest began.
    fetching: u32,
    began_at: u64,
    /// Calls for tokens under way, late ones included.
    calls: u32,
    /// Requests that the next call is to ask for.
    waiting: Vec<Waiter>,
    /// Of the last request that needed a call.
    terms: Option<Terms>,
    /// Unspent tokens to return.
    back: Unspent,
    /// A task is returning them.
    returning: bool,
    view: Option<View>,
    /// The last call got fewer tokens than it wanted.
    short: bool,
    /// The counters had fewer than `held_for` tokens. They are not asked for that many again until `held_until`.
    held_until: u64,
    held_for: u64,
    pub(in crate::limiter) share: Share,
}

/// Tokens that were not spent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::limiter) struct Unspent {
    pub(in crate::limiter) tokens: u64,
    /// When the oldest was taken.
    pub(in crate::limiter) taken_at: CounterMicros,
    /// The bucket's generation when they were taken; 0, which none has, if they were taken in several.
    pub(in crate::limiter) generation: u64,
}

impl Unspent {
    /// Both together. What was taken in several generations is worth nothing, which is never too much.
    fn and(self, more: Self) -> Self {
        match (self.tokens, more.tokens) {
            (0, _) => more,
            (_, 0) => self,
            _ => Self {
                tokens: self.tokens + more.tokens,
                taken_at: self.taken_at.min(more.taken_at),
                generation: if self.generation == more.generation {
                    self.generation
                } else {
                    0
                },
            },
        }
    }
}

impl Slot {
    fn take(&mut self, n: u64) -> Unspent {
        self.tokens -= n;
        Unspent {
            tokens: n,
            taken_at: self.taken_at,
            generation: self.generation,
        }
    }
}

/// What to ask the counters for.
#[derive(Debug)]
pub(in crate::limiter) struct Demand {
    pub(in crate::limiter) need: u64,
    pub(in crate::limiter) waiting: u64,
    pub(in crate::limiter) want: u64,
    pub(in crate::limiter) requests: Vec<Waiter>,
}

impl Lease {
    /// The plan was edited: tokens taken under the old one are returned, and what is known of the bucket is forgotten.
    pub(in crate::limiter) fn edited(&mut self) {
        self.surrender_all();
        self.share.is_edited = true;
        self.view = None;
        self.held_until = 0;
        self.short = false;
        self.size = 1;
    }

    /// Marks all tokens held here to be returned.
    pub(in crate::limiter) fn surrender_all(&mut self) {
        for i in 0..self.slots.len() {
            self.surrender(i);
        }
    }

    /// Whether a new lease would behave the same.
    pub(in crate::limiter) fn is_forgettable(&self, now: u64) -> bool {
        self.share.tat <= now
            && self.fetching == 0
            && !self.returning
            && self.back.tokens == 0
            && self.slots.iter().all(|slot| slot.tokens == 0)
    }

    fn surrender(&mut self, slot: usize) {
        let mut slot = std::mem::take(&mut self.slots[slot]);
        self.owe(slot.take(slot.tokens));
    }

    /// Marks tokens to be returned.
    pub(in crate::limiter) fn owe(&mut self, unspent: Unspent) {
        self.back = self.back.and(unspent);
        // Where nothing is held, the bucket has no more than came back: it is worth asking again.
        if self.terms.is_some_and(|terms| !terms.leased) && unspent.tokens > 0 {
            self.held_until = 0;
        }
    }

    /// Whether tokens are to be returned.
    pub(in crate::limiter) fn owes(&self) -> bool {
        self.back.tokens > 0
    }

    /// Marks expired tokens to be returned.
    pub(in crate::limiter) fn expire(&mut self, now: u64) {
        for i in 0..self.slots.len() {
            if self.slots[i].tokens > 0 && self.slots[i].expires <= now {
                self.surrender(i);
            }
        }
    }

    /// Spends `n` tokens, or none. Call [`expire`](Self::expire) first.
    pub(in crate::limiter) fn spend(&mut self, n: u64) -> bool {
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

    /// Sets `n` tokens apart for a request, if so many are here.
    pub(in crate::limiter) fn set_apart(&mut self, n: u64) -> Option<Unspent> {
        let [older, newer] = &mut self.slots;
        if older.tokens + newer.tokens < n {
            return None;
        }
        let first = n.min(older.tokens);
        Some(older.take(first).and(newer.take(n - first)))
    }

    /// Marks tokens beyond the size of a lease to be returned: what was granted to requests that are gone.
    pub(in crate::limiter) fn trim(&mut self) {
        let most = if self.size < 2 { 0 } else { self.size };
        if let Some(excess) = self.available().checked_sub(most)
            && let Some(unspent) = self.set_apart(excess)
        {
            self.owe(unspent);
        }
    }

    /// The tokens available here.
    pub(in crate::limiter) fn available(&self) -> u64 {
        self.slots.iter().map(|slot| slot.tokens).sum()
    }

    /// The tokens that are still available after `time`.
    fn lasting(&self, time: u64) -> u64 {
        let lasting = self.slots.iter().filter(|slot| slot.expires > time);
        lasting.map(|slot| slot.tokens).sum()
    }

    /// How many tokens to hold: as many as are spent in the life of a lease at the pace since the last call, at most
    /// twice and at least half as many as then. One means that each request is decided by the counters.
    fn pace(&mut self, now: u64, ttl: u64, largest: u64) -> u64 {
        let elapsed = now.saturating_sub(self.asked_at).max(1);
        if self.asked_at == 0 || elapsed >= 4 * ttl {
            self.size = 1;
        } else {
            let pace = u128::from(self.wanted) * u128::from(ttl) / u128::from(elapsed);
            let pace = u64::try_from(pace).unwrap_or(u64::MAX);
            let size = self.size.max(1);
            self.size = pace.clamp(size / 2, size * 2);
        }
        self.size = self.size.clamp(1, largest);
        self.asked_at = now.max(1);
        self.wanted = 0;
        self.size
    }

    /// A request that found too few tokens here waits for the counters. A cost of zero waits for their answer only.
    pub(in crate::limiter) fn wait(&mut self, waiter: Waiter) {
        self.wanted += waiter.tokens;
        self.waiting.push(waiter);
    }

    /// Calls are made on these terms from now on.
    pub(in crate::limiter) fn adopt(&mut self, terms: Terms) {
        self.terms = Some(terms);
    }

    pub(in crate::limiter) fn terms(&self) -> Option<Terms> {
        self.terms
    }

    /// Requests that wait for a call that has not begun.
    pub(in crate::limiter) fn waiting(&mut self) -> &mut Vec<Waiter> {
        &mut self.waiting
    }

    /// Whether to request the next lease although this one is not spent yet.
    pub(in crate::limiter) fn is_low(&self, now: u64) -> bool {
        if self.size < 2 || self.fetching > 0 || now < self.held_until {
            return false;
        }
        self.lasting(now + LAST_MOMENT) <= (self.size / 8).max(1)
    }

    /// Begins a call for everything that waits, and to have tokens for later if `ahead`. `None` if there is nothing to
    /// ask for, or a call is under way. A bucket that would fill up while that call is waited for, and refill in vain,
    /// is called again before. Tokens here count towards a request only if they last until the `patience` for
    /// the answer is over.
    pub(in crate::limiter) fn begin_fetch(
        &mut self,
        (now, ttl, patience): (u64, u64, u64),
        ahead: bool,
    ) -> Option<(Terms, Demand)> {
        let terms = self.terms?;
        if self.fetching > 0 && now < self.began_at.saturating_add(terms.pause()) {
            return None;
        }
        self.waiting.retain(|waiter| !waiter.is_gone());
        if self.waiting.is_empty() && !ahead {
            return None;
        }
        let size = if terms.leased {
            self.pace(now, ttl, terms.largest_lease())
        } else {
            1
        };
        let requests = std::mem::take(&mut self.waiting);
        let asked: u64 = requests.iter().map(|waiter| waiter.tokens).sum();
        let smallest = requests
            .iter()
            .map(|waiter| waiter.tokens)
            .filter(|n| *n > 0)
            .min();
        let (need, waiting) = match smallest {
            Some(n) => (n.saturating_sub(self.lasting(now + patience)).max(1), asked),
            None => (u64::from(ahead), u64::from(ahead)),
        };
        let for_later = if waiting > 0 && size >= 2 {
            size.saturating_sub(self.available())
        } else {
            0
        };
        let waiting = if self.short {
            waiting.max(for_later)
        } else {
            waiting
        };
        self.fetching += 1;
        self.began_at = now;
        self.calls += 1;
        Some((
            terms,
            Demand {
                need,
                waiting,
                want: waiting.max(for_later),
                requests,
            },
        ))
    }

    /// The call has been answered, has failed, or is late: another one may begin.
    pub(in crate::limiter) fn end_fetch(&mut self) {
        self.fetching = self.fetching.saturating_sub(1);
    }

    /// The call is over.
    pub(in crate::limiter) fn end_call(&mut self) {
        self.calls = self.calls.saturating_sub(1);
    }

    /// Whether a call is under way that may bring tokens or returns some.
    pub(in crate::limiter) fn is_busy(&self) -> bool {
        self.calls > 0 || self.returning
    }

    /// Takes what is to be returned.
    pub(in crate::limiter) fn unspent(&mut self) -> Option<Unspent> {
        let back = std::mem::take(&mut self.back);
        (back.tokens > 0).then_some(back)
    }

    /// Whether a task is to be started that returns tokens: there are some, and nothing that is under way will.
    pub(in crate::limiter) fn begin_return(&mut self) -> bool {
        let begins = self.back.tokens > 0
            && !self.returning
            && self.fetching == 0
            && self.slots.iter().all(|slot| slot.tokens == 0);
        self.returning |= begins;
        begins
    }

    pub(in crate::limiter) fn end_return(&mut self) {
        self.returning = false;
    }

    /// Stocks `granted`, to be spent before `expires`.
    pub(in crate::limiter) fn stock(&mut self, granted: Unspent, expires: u64) {
        if self.slots[1].tokens > 0 {
            self.surrender(0);
            self.slots.swap(0, 1);
        }
        self.slots[1] = Slot {
            tokens: granted.tokens,
            expires,
            taken_at: granted.taken_at,
            generation: granted.generation,
        };
    }

    /// The bucket was `debt` nanoseconds from full in a call that began at `seen`.
    pub(in crate::limiter) fn saw(&mut self, debt: u64, seen: u64) {
        self.view = Some(View { debt, seen });
        self.share.is_edited = false;
    }

    /// When the call began in which the counters last described the bucket; 0 for never.
    pub(in crate::limiter) fn seen_at(&self) -> u64 {
        self.view.map_or(0, |view| view.seen)
    }

    /// A call got `granted` of the tokens that it wanted. When it got fewer, the bucket is nearly empty, and the next call
    /// asks for all that is left as if requests were waiting for it: a few tokens must not stay behind while requests
    /// are denied, nor be fetched one by one.
    pub(in crate::limiter) fn served(&mut self, granted: u64, wanted: u64) {
        if wanted > 0 {
            self.short = granted < wanted;
        }
    }

    /// There are too few tokens for a request of `n` until then.
    pub(in crate::limiter) fn hold(&mut self, n: u64, until: u64) {
        self.held_until = until;
        self.held_for = n;
    }

    /// Until when requests of `n` are denied without a call.
    pub(in crate::limiter) fn held(&self, n: u64, now: u64) -> Option<u64> {
        (now < self.held_until && n >= self.held_for).then_some(self.held_until)
    }

    /// Nanoseconds until the bucket is full, as far as is known here. Tokens held here count as in the bucket.
    pub(in crate::limiter) fn debt(&self, gcra: Gcra, now: u64) -> u64 {
        let view = self.view.unwrap_or_default();
        let debt = view.debt.saturating_sub(now.saturating_sub(view.seen));
        debt.saturating_sub(self.available().saturating_mul(gcra.emission()))
            .min(gcra.tau())
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

    /// The tokens that a share gives at this moment.
    fn drain(share: &mut Share, gcra: Gcra, now: u64) -> u64 {
        let mut taken = 0;
        while share
            .take(gcra, WHOLE, SECOND, NonZeroU32::MIN, now)
            .is_ok()
        {
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
            let mut share = Share::default();
            let (sold, edited) = (plan(6000, 200), plan(rpm, burst));
            assert_eq!(drain(&mut share, sold, 9 * SECOND), 200);
            assert_eq!(drain(&mut share, edited, 9 * SECOND), 0, "{rpm}, {burst}");
            assert_eq!(
                drain(&mut share, sold, 9 * SECOND),
                0,
                "{rpm}, {burst}, and back"
            );
            // It refills at the rate that is in force.
            assert_eq!(drain(&mut share, sold, 10 * SECOND), 100, "{rpm}, {burst}");
        }
    }

    #[test]
    fn a_share_is_empty_until_it_begins_whatever_is_edited() {
        let mut share = Share::default();
        let (fast, slow) = (plan(6000, 200), plan(600, 20));
        for gcra in [fast, slow, fast] {
            assert_eq!(drain(&mut share, gcra, SECOND / 2), 0);
        }
        assert_eq!(drain(&mut share, fast, SECOND + SECOND / 10), 10);
        let mut share = Share::default();
        assert_eq!(drain(&mut share, fast, SECOND / 2), 0);
        // Edited at some time in between.
        assert_eq!(drain(&mut share, slow, 2 * SECOND), 10);
    }

    #[test]
    fn a_share_keeps_its_tokens_when_the_plan_is_edited() {
        let mut share = Share::default();
        let full = 9 * SECOND;
        assert!(
            share
                .take(
                    plan(6000, 200),
                    WHOLE,
                    SECOND,
                    NonZeroU32::new(50).unwrap(),
                    full
                )
                .is_ok()
        );
        assert_eq!(drain(&mut share, plan(6, 200), full), 150);
        // The first token of the higher rate does not wait for one of the lower.
        assert_eq!(drain(&mut share, plan(6000, 200), full), 0);
        assert_eq!(drain(&mut share, plan(6000, 200), full + SECOND / 100), 1);
    }
}
