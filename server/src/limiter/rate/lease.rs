//! Leases: tokens that a replica has taken from a key's bucket in advance.
//!
//! Decides how many tokens to take, how long they may be spent, what to return, and which requests wait. Does no I/O.
//!
//! **The guarantee.** A token is spent only after the counters granted it, and at most `ttl` after it was *requested*,
//! which is before it was granted. So tokens spent in a window of `T` seconds were granted in the `T + ttl` seconds
//! that end with the window, in which the counters grant at most `burst + rate * (T + ttl)` to all replicas together.
//! Returning tokens leaves the bucket no fuller than if they had never been taken, so the bound also applies to spent
//! tokens.
//!
//! **How much.** The tokens that waiting requests need are requested in full. The number of tokens held for later
//! follows the key's pace on this replica, up to a tenth of the burst. It includes a reserve for the time of the next
//! call, so that a steady key is renewed just before its lease expires.

use super::{
    counters::CounterMicros,
    gcra::Gcra,
    share::Share,
    waiter::{Unspent, Waiter},
};
use crate::clock::{Monotonic, Nanos};

/// In nanoseconds. Tokens that expire sooner do not count as available, so the next lease is requested while they are
/// being spent.
const LAST_MOMENT: Nanos = Nanos::from_millis(10);

/// The minimum time, in nanoseconds, between the starts of concurrent calls for a key.
const PAUSE_MIN: Nanos = Nanos::from_millis(1);

/// A replica holds at most the burst divided by this number for later.
const BURST_PER_LEASE: u64 = 10;

/// When no more than this many tokens are left of a lease of `size`, the next one is requested.
const fn reserve(size: u64) -> u64 {
    if size < 16 { 1 } else { size / 8 }
}

/// The tokens of one grant.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    tokens: u64,
    /// When they expire.
    expires: Monotonic,
    taken_at: CounterMicros,
    generation: u64,
}

/// The state of the bucket in the last response of the counters.
#[derive(Debug, Clone, Copy, Default)]
struct View {
    /// Nanoseconds until the bucket was full, at `seen`.
    debt: Nanos,
    /// When the call began, which is before the counters read the state.
    seen: Monotonic,
}

/// The plan's parameters in a call to the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::limiter) struct Terms {
    pub(in crate::limiter) gcra: Gcra,
    pub(in crate::limiter) version: u64,
    /// Whether tokens may be held for later. If not, the counters decide every request.
    pub(in crate::limiter) leased: bool,
}

impl Terms {
    /// Returns whether tokens taken under the other terms may be spent under these.
    pub(in crate::limiter) fn is_like(self, other: Self) -> bool {
        (self.gcra, self.leased) == (other.gcra, other.leased)
    }

    /// Returns the time after which another call may start before the previous one has ended. Requests that wait
    /// for a call are decided together, and a bucket that becomes full meanwhile stops refilling, so this is a small
    /// part of the time in which it fills. Calls to a bucket that fills slowly never overlap.
    pub(in crate::limiter) fn pause(self) -> Nanos {
        Nanos(self.gcra.tau().0 / 64).max(PAUSE_MIN)
    }

    /// Returns the maximum number of tokens to hold for later: a tenth of the burst.
    fn largest_lease(self) -> u64 {
        (self.gcra.tokens(self.gcra.tau()) / BURST_PER_LEASE).max(1)
    }
}

/// See the module documentation.
#[derive(Debug, Default)]
pub(in crate::limiter) struct Lease {
    /// The older grant, then the newer one.
    slots: [Slot; 2],
    /// The target number of tokens for the next grant.
    size: u64,
    /// When tokens were last requested (0 for never), and how many have been wanted since.
    asked_at: Monotonic,
    wanted: u64,
    /// The number of calls in flight that are not late yet, and when the latest of them started.
    fetching: u32,
    began_at: Monotonic,
    /// Tokens that these calls request in addition to those that their requests need.
    coming: u64,
    /// The number of calls in flight, including late ones.
    calls: u32,
    /// Requests waiting for the next call.
    waiting: Vec<Waiter>,
    /// The terms of the last request that needed a call.
    terms: Option<Terms>,
    /// Unspent tokens to return.
    back: Unspent,
    /// Whether a task is returning those tokens.
    returning: bool,
    view: Option<View>,
    /// Whether the last call got fewer tokens than it wanted.
    short: bool,
    /// The counters had fewer than `held_for` tokens. That many are not requested again until `held_until`.
    held_until: Monotonic,
    held_for: u64,
    pub(in crate::limiter) share: Share,
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

/// The times of a fetch.
#[derive(Debug, Clone, Copy)]
pub(in crate::limiter) struct FetchTimes {
    pub(in crate::limiter) now: Monotonic,
    /// How long the tokens may be spent.
    pub(in crate::limiter) ttl: Nanos,
    /// How long requests wait for the response.
    pub(in crate::limiter) patience: Nanos,
}

/// What to request from the counters.
#[derive(Debug)]
pub(in crate::limiter) struct Demand {
    pub(in crate::limiter) need: u64,
    pub(in crate::limiter) waiting: u64,
    pub(in crate::limiter) want: u64,
    /// The part of `want` that no request in `requests` needs.
    pub(in crate::limiter) spare: u64,
    pub(in crate::limiter) requests: Vec<Waiter>,
}

impl Lease {
    /// Applies an edit of the plan: tokens taken under the old one are returned, and the state of the bucket is
    /// unknown.
    pub(in crate::limiter) fn edited(&mut self) {
        self.surrender_all();
        self.share.is_edited = true;
        self.view = None;
        self.held_until = Monotonic::default();
        self.short = false;
        self.size = 1;
    }

    /// Marks all held tokens to be returned.
    pub(in crate::limiter) fn surrender_all(&mut self) {
        for i in 0..self.slots.len() {
            self.surrender(i);
        }
    }

    /// Returns whether a new lease would behave the same way.
    pub(in crate::limiter) fn is_forgettable(&self, now: Monotonic) -> bool {
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
        // Without leases, returned tokens are a reason to call the counters again.
        if self.terms.is_some_and(|terms| !terms.leased) && unspent.tokens > 0 {
            self.held_until = Monotonic::default();
        }
    }

    /// Returns whether tokens need to be returned.
    pub(in crate::limiter) fn owes(&self) -> bool {
        self.back.tokens > 0
    }

    /// Marks expired tokens to be returned.
    pub(in crate::limiter) fn expire(&mut self, now: Monotonic) {
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

    /// Sets aside `n` tokens for a request, if there are enough.
    pub(in crate::limiter) fn set_apart(&mut self, n: u64) -> Option<Unspent> {
        let [older, newer] = &mut self.slots;
        if older.tokens + newer.tokens < n {
            return None;
        }
        let first = n.min(older.tokens);
        Some(older.take(first).and(newer.take(n - first)))
    }

    /// Marks tokens beyond the size of a lease to be returned: those granted to canceled requests.
    pub(in crate::limiter) fn trim(&mut self) {
        let most = match self.terms {
            Some(terms) if self.size >= 2 => self.to_hold(terms),
            _ => 0,
        };
        if let Some(excess) = self.available().checked_sub(most)
            && let Some(unspent) = self.set_apart(excess)
        {
            self.owe(unspent);
        }
    }

    /// Returns the number of tokens available locally.
    pub(in crate::limiter) fn available(&self) -> u64 {
        self.slots.iter().map(|slot| slot.tokens).sum()
    }

    /// Returns the number of tokens still available after `time`.
    fn lasting(&self, time: Monotonic) -> u64 {
        let lasting = self.slots.iter().filter(|slot| slot.expires > time);
        lasting.map(|slot| slot.tokens).sum()
    }

    /// Returns the maximum number of tokens to hold for later.
    fn to_hold(&self, terms: Terms) -> u64 {
        (self.size + reserve(self.size)).min(terms.largest_lease())
    }

    /// Returns the size of the next lease: the number of tokens spent within the lease TTL at the current pace, but at
    /// most twice the previous size. If the pace is lower than before, the mean of both: if fewer requests than usual
    /// have arrived by chance, the next lease must not be used up early. A result of one means that the counters decide
    /// each request.
    fn pace(&mut self, now: Monotonic, ttl: Nanos, largest: u64) -> u64 {
        let elapsed = now.saturating_since(self.asked_at).0.max(1);
        if self.asked_at == Monotonic::default() || elapsed >= 4 * ttl.0 {
            self.size = 1;
        } else {
            let pace = u128::from(self.wanted) * u128::from(ttl.0) / u128::from(elapsed);
            let pace = u64::try_from(pace).unwrap_or(u64::MAX);
            let size = self.size.max(1);
            self.size = if pace < size {
                pace.midpoint(size)
            } else {
                pace.min(size * 2)
            };
        }
        self.size = self.size.clamp(1, largest);
        self.asked_at = now.max(Monotonic(1));
        self.wanted = 0;
        self.size
    }

    /// Adds a request that found too few tokens and waits for the counters. A cost of zero waits only for their
    /// response.
    pub(in crate::limiter) fn wait(&mut self, waiter: Waiter) {
        self.wanted += waiter.tokens;
        self.waiting.push(waiter);
    }

    /// Uses these terms for calls from now on.
    pub(in crate::limiter) fn adopt(&mut self, terms: Terms) {
        self.terms = Some(terms);
    }

    pub(in crate::limiter) fn terms(&self) -> Option<Terms> {
        self.terms
    }

    /// Returns the requests that wait for a call that has not begun.
    pub(in crate::limiter) fn waiting(&mut self) -> &mut Vec<Waiter> {
        &mut self.waiting
    }

    /// Returns whether to request the next lease before the current one is spent.
    pub(in crate::limiter) fn is_low(&self, now: Monotonic) -> bool {
        if self.size < 2 || self.fetching > 0 || now < self.held_until {
            return false;
        }
        self.lasting(now.saturating_add(LAST_MOMENT)) <= reserve(self.size)
    }

    /// Begins a call for all waiting requests and, if `ahead`, for tokens for later. Returns `None` if there is nothing
    /// to request, or if the calls in flight suffice: the latest started less than a [pause](Terms::pause) ago, or they
    /// request enough tokens. Local tokens count toward a request only if they do not expire before its `patience`
    /// ends.
    pub(in crate::limiter) fn begin_fetch(
        &mut self,
        FetchTimes { now, ttl, patience }: FetchTimes,
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
        let asked: u64 = self.waiting.iter().map(|waiter| waiter.tokens).sum();
        if self.fetching > 0 && 0 < asked && asked <= self.coming {
            return None;
        }
        let size = if terms.leased {
            self.pace(now, ttl, terms.largest_lease())
        } else {
            1
        };
        let requests = std::mem::take(&mut self.waiting);
        let smallest = requests
            .iter()
            .map(|waiter| waiter.tokens)
            .filter(|n| *n > 0)
            .min();
        let (need, waiting) = match smallest {
            Some(n) => (
                n.saturating_sub(self.lasting(now.saturating_add(patience)))
                    .max(1),
                asked,
            ),
            None => (u64::from(ahead), u64::from(ahead)),
        };
        let for_later = if waiting > 0 && size >= 2 {
            self.to_hold(terms)
                .saturating_sub(self.available() + self.coming)
        } else {
            0
        };
        let waiting = if self.short {
            waiting.max(for_later)
        } else {
            waiting
        };
        let want = waiting.max(for_later);
        let spare = want.saturating_sub(asked);
        self.fetching += 1;
        self.began_at = now;
        self.coming += spare;
        self.calls += 1;
        Some((
            terms,
            Demand {
                need,
                waiting,
                want,
                spare,
                requests,
            },
        ))
    }

    /// Records that the call that requested this many `spare` tokens got a response, failed or is late. Another one may
    /// begin.
    pub(in crate::limiter) fn end_fetch(&mut self, spare: u64) {
        self.fetching = self.fetching.saturating_sub(1);
        self.coming = self.coming.saturating_sub(spare);
    }

    /// Records that the call has ended.
    pub(in crate::limiter) fn end_call(&mut self) {
        self.calls = self.calls.saturating_sub(1);
    }

    /// Returns whether a call is in flight that may get or return tokens.
    pub(in crate::limiter) fn is_busy(&self) -> bool {
        self.calls > 0 || self.returning
    }

    /// Takes the tokens that are to be returned.
    pub(in crate::limiter) fn unspent(&mut self) -> Option<Unspent> {
        let back = std::mem::take(&mut self.back);
        (back.tokens > 0).then_some(back)
    }

    /// Returns whether to start a task that returns tokens: there are some, and no call in flight will return them.
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

    /// Adds `granted`, to be spent before `expires`.
    pub(in crate::limiter) fn stock(&mut self, granted: Unspent, expires: Monotonic) {
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

    /// Records that the bucket was `debt` nanoseconds from full, in the response to a call that began at `seen`.
    pub(in crate::limiter) fn saw(&mut self, debt: Nanos, seen: Monotonic) {
        self.view = Some(View { debt, seen });
        self.share.is_edited = false;
    }

    /// Returns when the call began whose response last described the bucket; 0 for never.
    pub(in crate::limiter) fn seen_at(&self) -> Monotonic {
        self.view.unwrap_or_default().seen
    }

    /// Records that a call got `granted` of the tokens it wanted. If it got fewer, the bucket is nearly empty, and the
    /// next call requests all remaining tokens as if requests were waiting for them: the last tokens must not be left
    /// unused while requests are denied, or be fetched one by one.
    pub(in crate::limiter) fn served(&mut self, granted: u64, wanted: u64) {
        if wanted > 0 {
            self.short = granted < wanted;
        }
    }

    /// Records that there are too few tokens for a request of `n` until the given time.
    pub(in crate::limiter) fn hold(&mut self, n: u64, until: Monotonic) {
        self.held_until = until;
        self.held_for = n;
    }

    /// Returns the time until which requests of `n` are denied without a call.
    pub(in crate::limiter) fn held(&self, n: u64, now: Monotonic) -> Option<Monotonic> {
        (now < self.held_until && n >= self.held_for).then_some(self.held_until)
    }

    /// Returns the nanoseconds until the bucket is full, according to the last response. Local tokens count as if they
    /// were in the bucket.
    pub(in crate::limiter) fn debt(&self, gcra: Gcra, now: Monotonic) -> Nanos {
        let view = self.view.unwrap_or_default();
        let debt = view.debt.saturating_sub(now.saturating_since(view.seen));
        debt.saturating_sub(gcra.emission().saturating_mul(self.available()))
            .min(gcra.tau())
    }
}
