//! Leases: tokens that a replica has taken from a key's bucket in advance.
//!
//! This module decides how many tokens to take, until when they may be spent, which tokens to return, and which
//! requests wait. It does no I/O.
//!
//! **Guarantee.** A token is spent only after the counters have granted it. The token goes to a request that was
//! waiting when the call began, or is spent at most `ttl` after the call began. So the tokens of all requests that
//! arrive and are allowed in a window of `T` seconds were granted within the window, or at most `ttl` before it. In
//! these `T + ttl` seconds, the counters grant at most `burst + rate * (T + ttl)` to all replicas together. Returned
//! tokens do not break this bound, because they never make the bucket fuller than if the tokens had not been taken.
//!
//! **Lease size.** Tokens that requests are waiting for are requested in full. The number of tokens held for later
//! depends on the key's pace on this replica, up to a tenth of the burst. A reserve covers the duration of the next
//! call, so that the lease of a key with a steady pace is renewed just before it expires.

use super::{
    gathering::Gathering,
    gcra::Gcra,
    held_tokens::HeldTokens,
    share::Share,
    terms::Terms,
    waiter::{Unspent, Waiter},
};
use crate::clock::{Monotonic, Nanos};

/// Tokens that expire sooner than this do not count when deciding whether to request the next lease.
const LAST_MOMENT: Nanos = Nanos::from_millis(10);

/// How long a bucket must have been full before its lease is replaced with a new one. Requests do not hold granted
/// tokens for this long, so none are returned to a lease that has been replaced.
const UNUSED: Nanos = Nanos::from_secs(1);

/// Returns how many tokens are left when a lease of this size is renewed.
const fn reserve(size: u64) -> u64 {
    if size < 16 { 1 } else { size / 8 }
}

/// The bucket's state in the counters' last response.
#[derive(Debug, Clone, Copy, Default)]
struct View {
    /// The time from `seen` until the bucket is full.
    debt: Nanos,
    /// When the call began, shortly before the counters read the state.
    seen: Monotonic,
}

/// The tokens that this replica has leased from a key's bucket. See the module documentation.
#[derive(Debug, Default)]
pub(in crate::limiter) struct Lease {
    held: HeldTokens,
    /// The lease size: the number of tokens that requests spend within the lease TTL at the current pace.
    size: u64,
    /// When `size` was last updated. 0 if never.
    sized_at: Monotonic,
    /// The number of tokens that requests have needed since `sized_at`.
    needed: u64,
    /// The number of calls in flight that are not late yet.
    fetching: u32,
    /// When the latest of these calls started.
    began_at: Monotonic,
    /// The number of tokens that these calls request in addition to what requests are waiting for.
    requested_for_later: u64,
    /// The number of calls in flight, including late ones.
    calls: u32,
    /// Requests waiting for the next call.
    waiting: Vec<Waiter>,
    /// The terms of the last request that waited for a call or started one.
    terms: Option<Terms>,
    /// Unspent tokens to return.
    back: Unspent,
    /// Whether a task is returning unspent tokens.
    returning: bool,
    view: Option<View>,
    /// Whether the last call got fewer tokens than it requested, which means that the bucket is nearly empty.
    fell_short: bool,
    /// Until `denied_until`, requests for `denied_tokens` or more tokens are denied without a call, because the
    /// counters had too few.
    denied_until: Monotonic,
    denied_tokens: u64,
    pub(in crate::limiter) gathering: Gathering,
    /// `None` if the share has not been used.
    share: Option<Box<Share>>,
    /// Whether the counters have responded since the plan was last edited.
    is_plan_confirmed: bool,
}

/// The times that a fetch depends on.
#[derive(Debug, Clone, Copy)]
pub(in crate::limiter) struct FetchTimes {
    pub(in crate::limiter) now: Monotonic,
    /// The lease TTL.
    pub(in crate::limiter) ttl: Nanos,
    /// How long a call may take before it is late.
    pub(in crate::limiter) patience: Nanos,
}

/// What to request from the counters.
#[derive(Debug)]
pub(in crate::limiter) struct Demand {
    /// See [`TakeCall::need`](super::counters::TakeCall::need).
    pub(in crate::limiter) need: u64,
    /// See [`TakeCall::waiting`](super::counters::TakeCall::waiting).
    pub(in crate::limiter) waiting: u64,
    /// See [`TakeCall::want`](super::counters::TakeCall::want).
    pub(in crate::limiter) want: u64,
    /// The part of `want` that no request is waiting for.
    pub(in crate::limiter) for_later: u64,
    pub(in crate::limiter) requests: Vec<Waiter>,
}

impl Lease {
    /// Creates the lease of a key. `is_plan_confirmed` is the [value](Self::is_plan_confirmed) of an earlier lease that
    /// was dropped because it was unused, or `false` if the plan has been edited since.
    pub(in crate::limiter) fn new(is_plan_confirmed: bool) -> Self {
        Self {
            is_plan_confirmed,
            ..Self::default()
        }
    }

    /// Returns whether the counters have responded since the plan was last edited.
    pub(in crate::limiter) fn is_plan_confirmed(&self) -> bool {
        self.is_plan_confirmed
    }

    /// Returns this replica's share of the bucket, for use while the counters are unavailable.
    pub(in crate::limiter) fn share(&mut self) -> &mut Share {
        let new = || Box::new(Share::new(!self.is_plan_confirmed));
        self.share.get_or_insert_with(new)
    }

    /// Starts over after an edit to the plan: marks tokens taken under the old plan to be returned, and forgets the
    /// bucket's state.
    pub(in crate::limiter) fn reset_after_edit(&mut self) {
        self.surrender_all();
        self.is_plan_confirmed = false;
        if let Some(share) = &mut self.share {
            share.is_edited = true;
        }
        self.view = None;
        self.denied_until = Monotonic::default();
        self.fell_short = false;
        self.gathering = Gathering::default();
        self.size = 1;
    }

    /// Marks all held tokens to be returned.
    pub(in crate::limiter) fn surrender_all(&mut self) {
        let held = self.held.take_all();
        self.owe(held);
    }

    /// Returns whether the lease can be dropped if its key is no longer in use: it has no tokens, its share is full,
    /// and no calls are in flight except late ones.
    pub(in crate::limiter) fn is_forgettable(&self, now: Monotonic) -> bool {
        self.share.as_ref().is_none_or(|share| share.tat <= now)
            && self.fetching == 0
            && !self.returning
            && self.back.tokens == 0
            && self.held.count() == 0
    }

    /// Returns whether the lease can be replaced with a [new](Self::new) one while its key is in use. The new lease
    /// must behave the same way, and no call or request may refer to this lease.
    pub(in crate::limiter) fn is_like_new(&self, now: Monotonic) -> bool {
        let view = self.view.unwrap_or_default();
        let is_full = view.seen.saturating_add(view.debt).saturating_add(UNUSED) <= now;
        self.is_forgettable(now)
            && self.share.is_none()
            && self.calls == 0
            && self.waiting.is_empty()
            && self.denied_until <= now
            && is_full
    }

    /// Marks tokens to be returned.
    pub(in crate::limiter) fn owe(&mut self, unspent: Unspent) {
        self.back = self.back.and(unspent);
        // Without leases, the counters decide every request, and may allow requests once these tokens are returned. So
        // requests are no longer denied without a call.
        if self.terms.is_some_and(|terms| !terms.leased) && unspent.tokens > 0 {
            self.denied_until = Monotonic::default();
        }
    }

    /// Returns whether tokens need to be returned.
    pub(in crate::limiter) fn owes(&self) -> bool {
        self.back.tokens > 0
    }

    /// Marks expired tokens to be returned.
    pub(in crate::limiter) fn expire(&mut self, now: Monotonic) {
        let expired = self.held.take_expired(now);
        if expired.tokens > 0 {
            self.owe(expired);
        }
    }

    /// Spends `n` tokens if that many are available. Call [`expire`](Self::expire) first.
    pub(in crate::limiter) fn spend(&mut self, n: u64) -> bool {
        let is_spent = self.held.take(n).is_some();
        if is_spent {
            self.needed = self.needed.saturating_add(n);
        }
        is_spent
    }

    /// Sets aside `n` tokens for a request, if there are enough.
    pub(in crate::limiter) fn set_aside(&mut self, n: u64) -> Option<Unspent> {
        self.held.take(n)
    }

    /// Marks tokens in excess of [`to_hold`](Self::to_hold) to be returned, such as those granted for requests that
    /// have since been canceled. With a lease size of 1, marks all tokens.
    pub(in crate::limiter) fn trim(&mut self) {
        let most = match self.terms {
            Some(terms) if self.size >= 2 => self.to_hold(terms),
            _ => 0,
        };
        if let Some(excess) = self.available().checked_sub(most)
            && let Some(unspent) = self.set_aside(excess)
        {
            self.owe(unspent);
        }
    }

    /// Returns the number of tokens available locally.
    pub(in crate::limiter) fn available(&self) -> u64 {
        self.held.count()
    }

    /// Returns how many tokens to hold at the key's current pace: the lease size plus the [`reserve`], but at most
    /// [`max_lease_size`](Terms::max_lease_size).
    fn to_hold(&self, terms: Terms) -> u64 {
        (self.size + reserve(self.size)).min(terms.max_lease_size())
    }

    /// Updates the lease size and returns it: the number of tokens that requests spend within the lease TTL at the
    /// current pace, but at most twice the previous size. If the pace has dropped, the size is the mean of the previous
    /// and the new value, so that a lease after a random lull does not run out early. If the size has not been updated
    /// for four lease TTLs, it starts over at one. A size of one means that the counters decide each request.
    fn update_size(&mut self, now: Monotonic, ttl: Nanos, max_size: u64) -> u64 {
        let elapsed = now.saturating_since(self.sized_at).0.max(1);
        if self.sized_at == Monotonic::default() || elapsed >= 4 * ttl.0 {
            self.size = 1;
        } else {
            let pace = u128::from(self.needed) * u128::from(ttl.0) / u128::from(elapsed);
            let pace = u64::try_from(pace).unwrap_or(u64::MAX);
            let size = self.size.max(1);
            self.size = if pace < size {
                pace.midpoint(size)
            } else {
                pace.min(size * 2)
            };
        }
        self.size = self.size.clamp(1, max_size);
        self.sized_at = now.max(Monotonic(1));
        self.needed = 0;
        self.size
    }

    /// Adds a request that waits for the counters because too few tokens are available. A request for zero tokens waits
    /// only for a response.
    pub(in crate::limiter) fn wait(&mut self, waiter: Waiter) {
        self.count(waiter.tokens);
        self.waiting.push(waiter);
    }

    /// Records a request that was denied without a call. If the request were not recorded, the next lease would be too
    /// small for the tokens that have accumulated.
    pub(in crate::limiter) fn record_denied(&mut self, n: u64) {
        self.count(n);
    }

    /// Counts the tokens of a request toward the lease size, unless the request needs more than the largest lease. A
    /// lease would not help such a request, and the additional tokens would be missing on other replicas.
    fn count(&mut self, n: u64) {
        if self.terms.is_none_or(|terms| n <= terms.max_lease_size()) {
            self.needed = self.needed.saturating_add(n);
        }
    }

    pub(in crate::limiter) fn set_terms(&mut self, terms: Terms) {
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
        if self.size < 2 || self.fetching > 0 || now < self.denied_until {
            return false;
        }
        self.held.count_after(now.saturating_add(LAST_MOMENT)) <= reserve(self.size)
    }

    /// Begins a call for all waiting requests. With `ahead`, begins a call even if no requests are waiting. Returns
    /// `None` if there is nothing to request, if the latest call in flight started less than a [pause](Terms::pause)
    /// ago, or if the calls in flight request enough tokens. A local token counts toward a request's need only if it
    /// does not expire within `patience`.
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
        let waited_for: u64 = self.waiting.iter().map(|waiter| waiter.tokens).sum();
        if self.fetching > 0 && 0 < waited_for && waited_for <= self.requested_for_later {
            return None;
        }
        let size = if terms.leased {
            self.update_size(now, ttl, terms.max_lease_size())
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
                n.saturating_sub(self.held.count_after(now.saturating_add(patience)))
                    .max(1),
                waited_for,
            ),
            None => (u64::from(ahead), u64::from(ahead)),
        };
        let top_up = if waiting > 0 && size >= 2 {
            self.to_hold(terms)
                .saturating_sub(self.available() + self.requested_for_later)
        } else {
            0
        };
        let waiting = if self.fell_short {
            waiting.max(top_up)
        } else {
            waiting
        };
        let want = waiting.max(top_up);
        let for_later = want.saturating_sub(waited_for);
        self.fetching += 1;
        self.began_at = now;
        self.requested_for_later += for_later;
        self.calls += 1;
        Some((
            terms,
            Demand {
                need,
                waiting,
                want,
                for_later,
                requests,
            },
        ))
    }

    /// Records that a call has succeeded, failed or become late, so that the next one may begin. `for_later` is the
    /// number in the call's [`Demand`].
    pub(in crate::limiter) fn end_fetch(&mut self, for_later: u64) {
        self.fetching = self.fetching.saturating_sub(1);
        self.requested_for_later = self.requested_for_later.saturating_sub(for_later);
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
    pub(in crate::limiter) fn take_unspent(&mut self) -> Option<Unspent> {
        let back = std::mem::take(&mut self.back);
        (back.tokens > 0).then_some(back)
    }

    /// Returns whether to start a task that returns unspent tokens, and if so, counts the task as started. No task is
    /// needed while a call that is not late is in flight. Otherwise, a task is needed if no later call is expected to
    /// return the tokens. It is also needed if there are more tokens than a lease contains, since other replicas may
    /// need them before the next call.
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

    /// Adds granted tokens, which expire at `expires`. If two earlier grants have tokens left, those of the older one
    /// are marked to be returned.
    pub(in crate::limiter) fn add(&mut self, granted: Unspent, expires: Monotonic) {
        let surplus = self.held.add(granted, expires);
        self.owe(surplus);
    }

    /// Records the bucket's debt from the response to a call that began at `seen`.
    pub(in crate::limiter) fn record_debt(&mut self, debt: Nanos, seen: Monotonic) {
        self.view = Some(View { debt, seen });
        self.is_plan_confirmed = true;
        if let Some(share) = &mut self.share {
            share.is_edited = false;
        }
    }

    /// Returns the start of the call whose response was recorded last, or 0 if there was none.
    pub(in crate::limiter) fn seen_at(&self) -> Monotonic {
        self.view.unwrap_or_default().seen
    }

    /// Records that a call for `want` tokens was granted `granted` tokens. If the call got fewer, the bucket is nearly
    /// empty. The next call then requests tokens for later as if requests were waiting for them. Otherwise, the last
    /// tokens would be left unused while requests are denied, or would be fetched one by one.
    pub(in crate::limiter) fn record_grant(&mut self, granted: u64, want: u64) {
        if want > 0 {
            self.fell_short = granted < want;
        }
    }

    /// Denies requests for `n` or more tokens without a call until the given time.
    pub(in crate::limiter) fn deny_until(&mut self, n: u64, until: Monotonic) {
        self.denied_until = until;
        self.denied_tokens = n;
    }

    /// Returns the time at which requests for `n` tokens stop being denied without a call. Returns `None` if they are
    /// not denied now.
    pub(in crate::limiter) fn denied_until(&self, n: u64, now: Monotonic) -> Option<Monotonic> {
        (now < self.denied_until && n >= self.denied_tokens).then_some(self.denied_until)
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
