//! Calls that take tokens, and the distribution of the granted tokens.

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::{runtime::Handle, time};

use super::{
    calls::{CallOutcome, DENIED_FOR_LEASES},
    core::{AfterDeadline, StoreCore},
};
use crate::{
    clock::{Monotonic, Nanos},
    limiter::{
        key::{handle::KeyHandle, state::KeyState},
        rate::{
            counters::{BucketState, CounterMicros, TakeCall},
            lease::{Demand, FetchTimes, Lease},
            terms::Terms,
            waiter::{FetchOutcome, Grant, Unspent, Waiter},
        },
    },
    spans::{self, Parent},
};

impl StoreCore {
    /// Starts a call for the waiting requests, if one is needed. If `ahead` is set, starts a call even if no requests
    /// are waiting.
    pub(super) fn begin_fetch(&self, handle: &Arc<KeyHandle>, state: &mut KeyState, ahead: bool) {
        let (Ok(runtime), Some(inner)) = (Handle::try_current(), self.me.upgrade()) else {
            // Dropping the waiters notifies their requests that there will be no response.
            state.lease().waiting().clear();
            return;
        };
        if self.breaker(handle).is_open() {
            state.lease().waiting().clear();
            return;
        }
        let asked_at = self.clock.monotonic();
        let lease = state.lease();
        lease.expire(asked_at);
        let times = FetchTimes {
            now: asked_at,
            ttl: self.ttl,
            patience: self.settings.deadline.into(),
        };
        let Some((terms, demand)) = lease.begin_fetch(times, ahead && !self.is_draining()) else {
            return;
        };
        let Demand {
            need,
            waiting,
            want,
            for_later,
            requests,
        } = demand;
        let call = TakeCall {
            need,
            waiting,
            want,
            ..self.build_call(handle, terms, lease.take_unspent())
        };
        let (handle, span) = (Arc::clone(handle), spans::current());
        runtime.spawn(async move {
            // The `LeaseFetch` is created inside the task, because dropping it locks the key. A runtime that has been
            // shut down drops the task immediately, while the key is still locked.
            fetch(LeaseFetch {
                inner,
                handle,
                call,
                terms,
                for_later,
                asked_at,
                requests,
                span,
                active: true,
            })
            .await;
        });
    }

    /// Returns the outcome for a request that got `unspent`. If `unspent` is empty, the request waited only for the
    /// response.
    fn outcome_for(&self, handle: &Arc<KeyHandle>, unspent: Unspent) -> FetchOutcome {
        match self.me.upgrade() {
            Some(core) if unspent.tokens > 0 => {
                let handle = Arc::clone(handle);
                FetchOutcome::Granted(Grant::new(unspent, move |unspent| {
                    handle.state.lock().lease().owe(unspent);
                    begin_return(&core, &handle);
                }))
            }
            _ => FetchOutcome::TooFew,
        }
    }
}

/// Starts to return unspent tokens, unless a call in flight will return them. Tokens that become free at the same time
/// are returned together.
fn begin_return(inner: &Arc<StoreCore>, handle: &Arc<KeyHandle>) {
    if let Ok(runtime) = Handle::try_current()
        && handle.state.lock().lease().begin_return()
    {
        runtime.spawn(return_unspent(Arc::clone(inner), Arc::clone(handle)));
    }
}

async fn return_unspent(inner: Arc<StoreCore>, handle: Arc<KeyHandle>) {
    loop {
        let call = {
            let mut state = handle.state.lock();
            let lease = state.lease();
            match (lease.terms(), lease.take_unspent()) {
                (Some(terms), Some(back)) => inner.build_call(&handle, terms, Some(back)),
                _ => {
                    lease.end_return();
                    return;
                }
            }
        };
        inner.make_call(call, || AfterDeadline::Wait).await;
    }
}

/// A call that takes tokens. When the call ends in any way, its requests are notified and the next call may begin.
struct LeaseFetch {
    inner: Arc<StoreCore>,
    handle: Arc<KeyHandle>,
    call: TakeCall,
    terms: Terms,
    /// The number of tokens that the call requests in addition to what requests are waiting for.
    for_later: u64,
    asked_at: Monotonic,
    requests: Vec<Waiter>,
    /// The span of the request that started the call, if the request is traced.
    span: Option<Parent>,
    /// Whether the call has neither ended nor become late. While the call is active, the next call has to wait for
    /// [`Terms::pause`].
    active: bool,
}

impl Drop for LeaseFetch {
    fn drop(&mut self) {
        self.requests.clear();
        self.allow_next_call();
        self.handle.state.lock().lease().end_call();
    }
}

impl LeaseFetch {
    /// Allows the next call, because this call has failed or is late, and starts the next call if requests are waiting.
    /// If this call is late, its requests keep waiting for the response until they time out.
    fn allow_next_call(&mut self) {
        if std::mem::take(&mut self.active) {
            let mut state = self.handle.state.lock();
            state.lease().end_fetch(self.for_later);
            self.inner.begin_fetch(&self.handle, &mut state, false);
        }
    }

    /// Distributes granted tokens: first to the requests that the call was made for, then to requests that have arrived
    /// since. The remaining tokens are held for later if the plan allows leases. If the response is late and none of
    /// the call's requests is waiting any longer, the tokens are not distributed but returned, unless no other tokens
    /// are available locally. Returns whether any tokens are held.
    fn distribute(&mut self, at: CounterMicros, bucket: BucketState) -> bool {
        let BucketState::Active {
            granted,
            debt,
            generation,
        } = bucket
        else {
            return false;
        };
        let grant = Unspent {
            tokens: granted,
            taken_at: at,
            generation,
        };
        let mut outcomes = Vec::with_capacity(self.requests.len());
        let mut state = self.handle.state.lock();
        let now = self.inner.clock.monotonic();
        let lease = state.lease();
        lease.expire(now);
        // A newer call may already have ended. Its response must not be overwritten with an older one.
        if lease.seen_at() <= self.asked_at {
            lease.record_debt(debt, self.asked_at);
        }
        let is_awaited = self.requests.iter().any(|waiter| !waiter.is_gone());
        if self.active || is_awaited || lease.available() == 0 {
            let expires = self.asked_at.saturating_add(self.inner.ttl);
            lease.add(grant, expires);
        } else {
            lease.owe(grant);
        }
        let mut refused = None::<u64>;
        for waiter in self.requests.drain(..) {
            if waiter.is_gone() {
                continue;
            }
            let outcome = match lease.set_aside(waiter.tokens) {
                Some(unspent) => self.inner.outcome_for(&self.handle, unspent),
                None => {
                    refused = Some(refused.unwrap_or(u64::MAX).min(waiter.tokens));
                    FetchOutcome::TooFew
                }
            };
            outcomes.push((waiter, outcome));
        }
        // Tokens taken under an older plan are used only for the requests of this call.
        let same = lease.terms().is_some_and(|now| now.is_like(self.terms));
        lease.expire(now);
        if !same || !self.terms.leased || self.inner.is_draining() {
            lease.surrender_all();
        }
        if same && !self.inner.is_draining() {
            if self.active {
                lease.record_grant(granted, self.call.want);
                self.deny_while_low(lease, grant, debt, refused);
            }
            for waiter in std::mem::take(lease.waiting()) {
                if waiter.tokens == 0 {
                    lease.waiting().push(waiter);
                } else if let Some(unspent) = lease.set_aside(waiter.tokens) {
                    outcomes.push((waiter, self.inner.outcome_for(&self.handle, unspent)));
                } else if lease.denied_until(waiter.tokens, now).is_some() {
                    outcomes.push((waiter, FetchOutcome::TooFew));
                } else {
                    lease.waiting().push(waiter);
                }
            }
            lease.trim();
        }
        let left = lease.available() > 0;
        if std::mem::take(&mut self.active) {
            lease.end_fetch(self.for_later);
            self.inner.begin_fetch(&self.handle, &mut state, false);
        }
        // Sending to a canceled request returns its tokens, which takes the lock, so the lock is released first.
        drop(state);
        for (waiter, outcome) in outcomes {
            let _ = waiter.outcome.send(outcome);
        }
        left
    }

    /// Denies requests locally while the bucket has too few tokens. If the plan allows leases, requests are denied only
    /// for a short time, since other replicas may return tokens. If the bucket is empty, this replica makes no calls
    /// for part of the lease TTL, so that tokens accumulate and are not fetched one by one. That pause is too short for
    /// the bucket to fill up.
    ///
    /// The time for which requests are denied is measured from the start of the call. The counters decide a little
    /// later, but the next call takes just as long to reach the counters, so measuring from the response would count
    /// the time in transit twice.
    fn deny_while_low(&self, lease: &mut Lease, grant: Unspent, debt: Nanos, refused: Option<u64>) {
        let (call, ttl) = (&self.call, self.inner.ttl);
        // Without leases, the next request may be allowed after the tokens of a canceled request have been returned.
        if !self.terms.leased && lease.owes() {
            return;
        }
        // A debt above `tau` comes from another version of the plan and cannot be compared.
        let Some(left) = call.tau.0.checked_sub(debt.0).map(Nanos) else {
            return;
        };
        let granted = grant.tokens;
        let gather = if self.terms.leased {
            lease.gathering.pause(self.terms.gcra, ttl, grant, left)
        } else {
            Nanos::ZERO
        };
        let n = match refused {
            // Without leases, the counters are not called while the bucket is known to be empty.
            _ if !self.terms.leased && left < call.emission => 1,
            _ if 0 < granted && granted < call.want && left < call.emission => 1,
            Some(refused) => refused,
            None if granted == 0 && call.want > 0 => call.need,
            None => return,
        };
        let missing = call.emission.saturating_mul(n).saturating_sub(left);
        // If there are enough tokens under this version of the plan, the counters must have used another version.
        if missing == Nanos::ZERO {
            return;
        }
        let longest = if self.terms.leased {
            ttl.saturating_mul(DENIED_FOR_LEASES)
        } else {
            // If a request is canceled on another replica, the bucket may have enough tokens earlier. Even then, no
            // request is denied for longer than the wait that its client was told.
            Nanos::MAX
        };
        let until = missing.max(gather).min(longest);
        lease.deny_until(n, self.asked_at.saturating_add(until));
    }
}

/// Makes the call, distributes its tokens, and finally returns the unspent tokens.
async fn fetch(mut fetch: LeaseFetch) {
    let (inner, handle) = (Arc::clone(&fetch.inner), Arc::clone(&fetch.handle));
    let asked_at = fetch.asked_at;
    let pause = Duration::from(fetch.terms.pause());
    let span = fetch.span.take();
    let answer = {
        let answer = pin!(inner.make_call(fetch.call, || {
            fetch.allow_next_call();
            AfterDeadline::Wait
        }));
        let mut answer = spans::inside(span.as_ref(), answer);
        if pause < inner.settings.deadline {
            match time::timeout(pause, &mut answer).await {
                Ok(answer) => answer,
                Err(_) => {
                    inner.begin_fetch(&handle, &mut handle.state.lock(), false);
                    answer.await
                }
            }
        } else {
            answer.await
        }
    };
    let left = match answer {
        CallOutcome::InTime(reply) | CallOutcome::Late(reply) => {
            fetch.distribute(reply.at, reply.state)
        }
        CallOutcome::Failed => false,
    };
    drop(fetch);
    begin_return(&inner, &handle);
    if left {
        let expires = asked_at.saturating_add(inner.ttl);
        let left = expires.saturating_since(inner.clock.monotonic());
        time::sleep(left.saturating_add(Nanos(1)).into()).await;
        let now = inner.clock.monotonic();
        handle.state.lock().lease().expire(now);
        begin_return(&inner, &handle);
    }
}
