//! Leases: tokens that a replica has taken from a key's bucket in advance.
//!
//! Decides how many tokens to take, how long they may be spent, what to return, and which requests wait. Does no I/O.
//!
//! **Guarantee.** A token is spent only after the counters have granted it, and at most `ttl` after it was *requested*.
//! So the tokens spent in a window of `T` seconds were granted within the window or at most `ttl` before it. In these
//! `T + ttl` seconds, the counters grant at most `burst + rate * (T + ttl)` to all replicas together. Returning tokens
//! does not break this bound, because it never makes the bucket fuller than if they had not been taken.
//!
//! **Lease size.** Tokens that requests are waiting for are requested in full. How many tokens are held for later
//! depends on the key's pace on this replica, and is at most a tenth of the burst. A reserve covers the duration of the
//! next call, so that the lease of a key with a steady pace is renewed just before it expires.

use super::{
    counters::CounterMicros,
    gathering::Gathering,
    gcra::Gcra,
    share::Share,
    waiter::{Unspent, Waiter},
};
use crate::clock::{Monotonic, Nanos};

/// Tokens that expire sooner than this do not count when deciding whether to request the next lease.
const LAST_MOMENT: Nanos = Nanos::from_millis(10);

/// The minimum time between the starts of concurrent calls for a key.
const PAUSE_MIN: Nanos = Nanos::from_millis(1);

/// The lease size is at most the burst divided by this number.
const BURST_PER_LEASE: u64 = 10;

/// Returns how many tokens are left when a lease of this size is renewed.
const fn reserve(size: u64) -> u64 {
    if size < 16 { 1 } else { size / 8 }
}

/// The tokens of one grant.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    tokens: u64,
    /// When the tokens expire.
    expires: Monotonic,
    taken_at: CounterMicros,
    generation: u64,
}

/// The bucket's state in the counters' last response.
#[derive(Debug, Clone, Copy, Default)]
struct View {
    /// The time from `seen` until the bucket is full.
    debt: Nanos,
    /// When the call began, shortly before the counters read the state.
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
    /// Returns whether tokens taken under `other` may be spent under `self`.
    pub(in crate::limiter) fn is_like(self, other: Self) -> bool {
        (self.gcra, self.leased) == (other.gcra, other.leased)
    }

    /// Returns how long after the start of a call another one may start while the first is still in flight. Requests
    /// that wait for a call are decided together, and a bucket that fills up in the meantime stops refilling, so the
    /// pause is a small fraction of tau. For a bucket that fills slowly, the pause exceeds the deadline, so its calls
    /// do not overlap.
    pub(in crate::limiter) fn pause(self) -> Nanos {
        Nanos(self.gcra.tau().0 / 64).max(PAUSE_MIN)
    }

    /// Returns the largest lease size under these terms, whatever the key's pace: a tenth of the burst, but at least 1.
    fn max_lease_size(self) -> u64 {
        (self.gcra.tokens(self.gcra.tau()) / BURST_PER_LEASE).max(1)
    }
}

/// The tokens that this replica has leased from a key's bucket. See the module documentation.
#[derive(Debug, Default)]
pub(in crate::limiter) struct Lease {
    /// The older grant, then the newer one.
    slots: [Slot; 2],
    /// The lease size: the number of tokens that requests spend within the lease TTL at the current pace.
    size: u64,
    /// When tokens were last requested. 0 if never.
    asked_at: Monotonic,
    /// The number of tokens that requests have needed since `asked_at`.
    wanted: u64,
    /// The number of calls in flight that are not late yet.
    fetching: u32,
    /// When the latest of these calls started.
    began_at: Monotonic,
    /// The number of tokens that these calls request for later.
    coming: u64,
    /// The number of calls in flight, including late ones.
    calls: u32,
    /// Requests waiting for the next call.
    waiting: Vec<Waiter>,
    /// The terms of the last request that needed a call.
    terms: Option<Terms>,
    /// Unspent tokens to return.
    back: Unspent,
    /// Whether a task is returning unspent tokens.
    returning: bool,
    view: Option<View>,
    /// Whether the last call got fewer tokens than it requested.
    short: bool,
    /// Until `held_until`, requests for `held_for` or more tokens are denied without a call, because the counters had
    /// too few.
    held_until: Monotonic,
    held_for: u64,
    pub(in crate::limiter) gathering: Gathering,
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

/// The times that a fetch depends on.
#[derive(Debug, Clone, Copy)]
pub(in crate::limiter) struct FetchTimes {
    pub(in crate::limiter) now: Monotonic,
    /// The lease TTL.
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
    /// The part of `want` that is for later.
    pub(in crate::limiter) spare: u64,
    pub(in crate::limiter) requests: Vec<Waiter>,
}

impl Lease {
    /// Applies an edit of the plan: marks tokens taken under the old plan to be returned, and forgets the bucket's
    /// state.
    pub(in crate::limiter) fn edited(&mut self) {
        self.surrender_all();
        self.share.is_edited = true;
        self.view = None;
        self.held_until = Monotonic::default();
        self.short = false;
        self.gathering = Gathering::default();
        self.size = 1;
    }

    /// Marks all held tokens to be returned.
    pub(in crate::limiter) fn surrender_all(&mut self) {
        for i in 0..self.slots.len() {
            self.surrender(i);
        }
    }

    /// Returns whether the lease can be dropped because a new one would behave the same way.
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
        // Without leases, the counters decide every request, and may allow one after these tokens are returned.
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

    /// Spends `n` tokens if that many are available. Call [`expire`](Self::expire) first.
    pub(in crate::limiter) fn spend(&mut self, n: u64) -> bool {
        let [older, newer] = &mut self.slots;
        if older.tokens + newer.tokens < n {
            return false;
        }
        let first = n.min(older.tokens);
        older.tokens -= first;
        newer.tokens -= n - first;
        self.wanted = self.wanted.saturating_add(n);
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

    /// Marks tokens in excess of [`to_hold`](Self::to_hold) to be returned. They were granted for requests that have
    /// since been canceled.
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

    /// Returns the number of tokens that expire after `time`.
    fn lasting(&self, time: Monotonic) -> u64 {
        let lasting = self.slots.iter().filter(|slot| slot.expires > time);
        lasting.map(|slot| slot.tokens).sum()
    }

    /// Returns how many tokens to hold at the key's current pace: the lease size plus the [`reserve`], but at most
    /// [`max_lease_size`](Terms::max_lease_size).
    fn to_hold(&self, terms: Terms) -> u64 {
        (self.size + reserve(self.size)).min(terms.max_lease_size())
    }

    /// Updates the lease size and returns it: the number of tokens that requests spend within the lease TTL at the
    /// current pace, but at most twice the previous size. If the pace has dropped, the size is the mean of the previous
    /// and the new value, so that a lease after a random lull does not run out early. A size of one means that the
    /// counters decide each request.
    fn pace(&mut self, now: Monotonic, ttl: Nanos, max_size: u64) -> u64 {
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
        self.size = self.size.clamp(1, max_size);
        self.asked_at = now.max(Monotonic(1));
        self.wanted = 0;
        self.size
    }

    /// Adds a request that waits for the counters because too few tokens are available. With zero tokens, it waits only
    /// for a response.
    pub(in crate::limiter) fn wait(&mut self, waiter: Waiter) {
        self.count(waiter.tokens);
        self.waiting.push(waiter);
    }

    /// Records a request that was denied without a call. Without it, the next lease would be too small for the tokens
    /// that accumulate in the meantime.
    pub(in crate::limiter) fn deny(&mut self, n: u64) {
        self.count(n);
    }

    /// Counts the tokens of a request toward the lease size, unless it needs more than the largest lease. A lease would
    /// not help such a request, and the tokens would be missing elsewhere.
    fn count(&mut self, n: u64) {
        if self.terms.is_none_or(|terms| n <= terms.max_lease_size()) {
            self.wanted = self.wanted.saturating_add(n);
        }
    }

    /// Uses these terms for all later calls.
    pub(in crate::limiter) fn adopt(&mut self, terms: Terms) {
        self.terms = Some(terms);
    }

    pub(in crate::limiter) fn terms(&self) -> Option<Terms> {
        self.terms
    }

    /// Returns the requests that wait for the next call.
    pub(in crate::limiter) fn waiting(&mut self) -> &mut Vec<Waiter> {
        &mut self.waiting
    }

    /// Returns whether it is time to request the next lease.
    pub(in crate::limiter) fn is_low(&self, now: Monotonic) -> bool {
        if self.size < 2 || self.fetching > 0 || now < self.held_until {
            return false;
        }
        self.lasting(now.saturating_add(LAST_MOMENT)) <= reserve(self.size)
    }

    /// Begins a call for all waiting requests. With `ahead`, begins one even if no requests are waiting. Returns `None`
    /// if there is nothing to request, if the latest call started less than a [pause](Terms::pause) ago, or if the
    /// calls in flight request enough tokens. A local token counts toward a request's need only if it does not expire
    /// within `patience`.
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
            self.pace(now, ttl, terms.max_lease_size())
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

    /// Records that a call with this many `spare` tokens has succeeded, failed or become late. Another call may begin.
    pub(in crate::limiter) fn end_fetch(&mut self, spare: u64) {
        self.fetching = self.fetching.saturating_sub(1);
        self.coming = self.coming.saturating_sub(spare);
    }

    /// Records that a call is no longer in flight.
    pub(in crate::limiter) fn end_call(&mut self) {
        self.calls = self.calls.saturating_sub(1);
    }

    /// Returns whether a call is in flight that may get or return tokens.
    pub(in crate::limiter) fn is_busy(&self) -> bool {
        self.calls > 0 || self.returning
    }

    /// Takes the tokens to be returned, if there are any.
    pub(in crate::limiter) fn unspent(&mut self) -> Option<Unspent> {
        let back = std::mem::take(&mut self.back);
        (back.tokens > 0).then_some(back)
    }

    /// Returns whether to start a task that returns unspent tokens, because no call that is in flight or still to come
    /// will return them, or because there are more than a lease contains, which other replicas may need before the next
    /// call. If so, counts the task as started.
    pub(in crate::limiter) fn begin_return(&mut self) -> bool {
        let most = self.terms.map_or(0, |terms| self.to_hold(terms));
        let begins = self.back.tokens > 0
            && !self.returning
            && self.fetching == 0
            && (self.available() == 0 || self.back.tokens > most);
        self.returning |= begins;
        begins
    }

    pub(in crate::limiter) fn end_return(&mut self) {
        self.returning = false;
    }

    /// Adds granted tokens, which expire at `expires`.
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

    /// Records the bucket's debt from the response to a call that began at `seen`.
    pub(in crate::limiter) fn saw(&mut self, debt: Nanos, seen: Monotonic) {
        self.view = Some(View { debt, seen });
        self.share.is_edited = false;
    }

    /// Returns the start of the call whose response was recorded last, or 0 if there was none.
    pub(in crate::limiter) fn seen_at(&self) -> Monotonic {
        self.view.unwrap_or_default().seen
    }

    /// Records that a call was granted `granted` of the `wanted` tokens. If it got fewer than it wanted, the bucket is
    /// nearly empty. The next call then requests tokens for later as if requests were waiting for them, so that the
    /// last tokens are neither left unused while requests are denied nor fetched one by one.
    pub(in crate::limiter) fn served(&mut self, granted: u64, wanted: u64) {
        if wanted > 0 {
            self.short = granted < wanted;
        }
    }

    /// Denies requests for `n` or more tokens without a call until the given time.
    pub(in crate::limiter) fn hold(&mut self, n: u64, until: Monotonic) {
        self.held_until = until;
        self.held_for = n;
    }

    /// If requests for `n` tokens are denied without a call, returns when that ends.
    pub(in crate::limiter) fn held(&self, n: u64, now: Monotonic) -> Option<Monotonic> {
        (now < self.held_until && n >= self.held_for).then_some(self.held_until)
    }

    /// Returns the time until the bucket is full, according to the last response. Local tokens count as if they were in
    /// the bucket.
    pub(in crate::limiter) fn debt(&self, gcra: Gcra, now: Monotonic) -> Nanos {
        let view = self.view.unwrap_or_default();
        let debt = view.debt.saturating_sub(now.saturating_since(view.seen));
        debt.saturating_sub(gcra.emission().saturating_mul(self.available()))
            .min(gcra.tau())
    }
}
