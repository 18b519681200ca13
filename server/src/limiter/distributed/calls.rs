//! Calls to the counters, and what becomes of the tokens they grant.
//!
//! Owns the tasks that make the calls: so a request may be dropped while it waits, a late answer is still used, and no
//! token is left behind. All requests of a key that wait at the same time share one call, which asks for the sum of
//! what they need. A call has a deadline; requests that arrive while one is under way go with the next, so a decision
//! waits for at most two. Only a bucket that fills up within the time of a call has several under way.
//!
//! When a call fails or is late, the requests that it was made for are told so. A late answer's tokens are
//! held like any lease where that is allowed, and returned otherwise.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use quota_common::id::ApiKeyId;
use tokio::{runtime::Handle, sync::oneshot, time};

use super::{StoreCore, breaker::CircuitBreaker, nanos, probe::probe_until_recovered};
use crate::{
    deadline,
    limiter::{
        key::state::KeyState,
        rate::{
            counters::{BucketName, BucketState, CounterMicros, TakeCall, TakeReply},
            lease::{Demand, Lease, Terms, Unspent},
        },
        store::KeyHandle,
    },
};

/// After how long a call is given up. Until then a late answer is still used.
pub(in crate::limiter) const CALL_DEADLINE: Duration = Duration::from_secs(1);

/// How long a denial by the counters may be believed where tokens are leased, in lives of a lease.
pub(in crate::limiter) const DENIED_FOR_LEASES: u64 = 2;

/// How many leases are returned at the same time when the process ends, and how many of these calls may fail.
const RETURNS_AT_ONCE: usize = 256;
const RETURNS_FAILED: u32 = 8;
/// How long returning them may take.
const RETURNED_WITHIN: Duration = Duration::from_secs(4);

/// What became of a request that waited for the counters.
#[derive(Debug)]
pub(in crate::limiter) enum FetchOutcome {
    /// The tokens it needs.
    Granted(GrantGuard),
    /// The counters answered, and had too few tokens for it.
    TooFew,
    /// There was no answer, or none in time.
    Unanswered,
}

/// A request that waits for the counters.
#[derive(Debug)]
pub(in crate::limiter) struct Waiter {
    pub(in crate::limiter) tokens: u64,
    outcome: oneshot::Sender<FetchOutcome>,
}

impl Waiter {
    pub(in crate::limiter) fn new(tokens: u64) -> (Self, oneshot::Receiver<FetchOutcome>) {
        let (outcome, receiver) = oneshot::channel();
        (Self { tokens, outcome }, receiver)
    }

    /// The request was dropped.
    pub(in crate::limiter) fn is_gone(&self) -> bool {
        self.outcome.is_closed()
    }
}

/// The answer to a call.
enum Answer {
    InTime(TakeReply),
    Late(TakeReply),
    Failed,
}

impl StoreCore {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the remainder is below the number of partitions, a u16"
    )]
    fn partition_of(&self, key: ApiKeyId) -> u16 {
        (key.0.as_u128() % self.partitions.len() as u128) as u16
    }

    pub(in crate::limiter) fn partition(&self, handle: &KeyHandle) -> &CircuitBreaker {
        &self.partitions[usize::from(self.partition_of(handle.key))]
    }

    /// A call for a key that takes nothing and returns `back`.
    fn call(&self, handle: &KeyHandle, terms: Terms, back: Option<Unspent>) -> TakeCall {
        let partition = self.partition_of(handle.key);
        let back = back.unwrap_or_default();
        TakeCall {
            partition,
            bucket: BucketName::Key(handle.tenant, handle.key),
            emission: terms.gcra.emission(),
            tau: terms.gcra.tau(),
            version: terms.version,
            need: 0,
            waiting: 0,
            want: 0,
            back: back.tokens,
            back_taken_at: back.taken_at,
            back_generation: back.generation,
            lease: self.ttl / 1000,
            last_heard: self.partitions[usize::from(partition)].last_heard(),
            away_since: self.partitions[usize::from(partition)].never_heard(self.is_alone()),
            promised: 0,
        }
    }

    /// Starts a call for the requests that wait, unless one is under way; with `ahead`, also when none waits.
    pub(in crate::limiter) fn begin_fetch(
        &self,
        handle: &Arc<KeyHandle>,
        state: &mut KeyState,
        ahead: bool,
    ) {
        let (Ok(runtime), Some(inner)) = (Handle::try_current(), self.me.upgrade()) else {
            // Whoever waits hears that there is no answer.
            state.lease().waiting().clear();
            return;
        };
        if self.partition(handle).is_away() {
            state.lease().waiting().clear();
            return;
        }
        let asked_at = self.clock.monotonic();
        let patience = nanos(self.settings.deadline);
        let lease = state.lease();
        lease.expire(asked_at);
        let times = (asked_at, self.ttl, patience);
        let Some((terms, demand)) = lease.begin_fetch(times, ahead && !self.is_draining()) else {
            return;
        };
        let Demand {
            need,
            waiting,
            want,
            requests,
        } = demand;
        let call = TakeCall {
            need,
            waiting,
            want,
            ..self.call(handle, terms, lease.unspent())
        };
        runtime.spawn(fetch(
            inner,
            Arc::clone(handle),
            call,
            terms,
            asked_at,
            requests,
        ));
    }

    /// Makes a call and records its outcome. Runs `on_late` when the deadline passes, and then waits on: what a late
    /// answer grants can be spent by other requests, or returned.
    async fn ask_until(&self, call: TakeCall, on_late: impl FnOnce()) -> Answer {
        let answer = self.answer(call, on_late).await;
        match answer {
            Answer::InTime(TakeReply {
                state: BucketState::Active { granted, .. },
                ..
            })
            | Answer::Late(TakeReply {
                state: BucketState::Active { granted, .. },
                ..
            }) => {
                self.metrics.lease_tokens_taken.inc_by(granted);
                self.metrics.lease_tokens_returned.inc_by(call.back);
            }
            _ => {
                self.metrics.lease_tokens_lost.inc_by(call.back);
            }
        }
        answer
    }

    /// The same where nobody waits.
    pub(in crate::limiter) async fn ask(&self, call: TakeCall) {
        self.ask_until(call, || ()).await;
    }

    /// Returns how many nanoseconds the bucket takes to fill, by the counters. `None` if they do not answer in time.
    pub(in crate::limiter) async fn look_up_debt(
        &self,
        handle: &KeyHandle,
        terms: Terms,
    ) -> Option<u64> {
        if self.partition(handle).is_away() {
            return None;
        }
        match self.ask_until(self.call(handle, terms, None), || ()).await {
            Answer::InTime(TakeReply {
                state: BucketState::Active { debt, .. },
                ..
            }) => Some(debt),
            _ => None,
        }
    }

    async fn answer(&self, call: TakeCall, on_late: impl FnOnce()) -> Answer {
        let partition = &self.partitions[usize::from(call.partition)];
        partition.used(self.clock.monotonic());
        self.metrics.counter_calls.inc();
        let asked_at = self.clock.monotonic();
        let mut answer = self.counters.take(call);
        let (answer, late) = match deadline::within(self.settings.deadline, &mut answer).await {
            Ok(answer) => (answer, false),
            Err(_) => {
                self.failed(call.partition, &"no answer in time");
                on_late();
                match time::timeout(CALL_DEADLINE, answer).await {
                    Ok(answer) => (answer, true),
                    Err(_) => return Answer::Failed,
                }
            }
        };
        let now = self.clock.monotonic();
        match answer {
            Ok(reply) => {
                if !late {
                    partition.succeeded(reply.at, now);
                }
                if let BucketState::Initializing { wait } = reply.state
                    && !partition.is_away()
                    && partition.is_initializing(asked_at + wait * 1000, now)
                {
                    tracing::warn!(
                        partition = call.partition,
                        wait_us = wait,
                        "the shared counters have lost their state; a new epoch begins"
                    );
                    let promised = reply.at + wait;
                    let wait = Duration::from_micros(wait);
                    self.probe_until_recovered(call.partition, wait, promised);
                }
                if late {
                    Answer::Late(reply)
                } else {
                    Answer::InTime(reply)
                }
            }
            Err(error) => {
                if !late {
                    self.failed(call.partition, &error);
                }
                Answer::Failed
            }
        }
    }

    fn failed(&self, partition: u16, error: &dyn std::fmt::Display) {
        self.metrics.counter_errors.inc();
        if self.partitions[usize::from(partition)].failed(self.clock.monotonic()) {
            tracing::warn!(partition, error = %error, "the shared counters are unavailable");
            self.metrics.counter_outages.inc();
            self.probe_until_recovered(partition, super::probe::PROBE_EVERY, 0);
        }
    }

    /// Starts probing a partition that has just been given up.
    fn probe_until_recovered(&self, partition: u16, first: Duration, promised: CounterMicros) {
        self.metrics.counters_away.inc();
        if let Ok(runtime) = Handle::try_current() {
            let me = Weak::clone(&self.me);
            runtime.spawn(probe_until_recovered(me, partition, first, promised));
        }
    }

    /// `unspent` for a request; nothing where it only waited for the answer.
    fn guard(&self, handle: &Arc<KeyHandle>, unspent: Unspent) -> FetchOutcome {
        match self.me.upgrade() {
            Some(inner) if unspent.tokens > 0 => FetchOutcome::Granted(GrantGuard {
                inner,
                handle: Arc::clone(handle),
                unspent,
            }),
            _ => FetchOutcome::TooFew,
        }
    }

    /// Whether no other replica can be selling what the counters do not know of. In a cluster partitions rest, and
    /// that nobody was answered there says nothing.
    pub(in crate::limiter) fn is_alone(&self) -> bool {
        self.partitions.len() > 1 || self.membership.replica_count() == 1
    }

    pub(in crate::limiter) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Returns every token that is held for later, before the process ends. Gives up on counters that do not
    /// answer; what is not returned comes back as buckets refill.
    pub(in crate::limiter) async fn return_leases(&self) {
        self.draining.store(true, Ordering::Release);
        let deadline = time::Instant::now() + RETURNED_WITHIN;
        let failures = AtomicU32::new(0);
        let mut busy = Vec::new();
        for keys in self.keys.by_shard() {
            let mut calls = Vec::new();
            for handle in keys {
                let mut state = handle.state.lock();
                let Some(lease) = &mut state.lease else {
                    continue;
                };
                lease.surrender_all();
                if let (Some(terms), Some(back)) = (lease.terms(), lease.unspent()) {
                    calls.push(self.call(&handle, terms, Some(back)));
                }
                if lease.is_busy() {
                    drop(state);
                    busy.push(handle);
                }
            }
            // Not counted against the counters' health: so many calls at a time may well be late.
            stream::iter(calls)
                .for_each_concurrent(RETURNS_AT_ONCE, async |call| {
                    let gave_up = failures.load(Ordering::Relaxed) >= RETURNS_FAILED;
                    let returned = !gave_up && {
                        self.metrics.counter_calls.inc();
                        let answer = time::timeout(CALL_DEADLINE, self.counters.take(call)).await;
                        matches!(answer, Ok(Ok(_)))
                    };
                    if returned {
                        self.metrics.lease_tokens_returned.inc_by(call.back);
                    } else {
                        failures.fetch_add(1, Ordering::Relaxed);
                        self.metrics.lease_tokens_lost.inc_by(call.back);
                    }
                })
                .await;
            if time::Instant::now() > deadline {
                failures.store(RETURNS_FAILED, Ordering::Relaxed);
            }
        }
        // Calls that were under way return what they were granted by themselves.
        let patience = time::Instant::now() + CALL_DEADLINE + self.settings.deadline;
        let is_busy = |handle: &Arc<KeyHandle>| {
            let mut state = handle.state.lock();
            state.lease().is_busy()
        };
        while busy.iter().any(is_busy) && time::Instant::now() < patience {
            time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Tokens granted to one request. They are returned unless they are [spent](Self::spend).
#[derive(Debug)]
pub(in crate::limiter) struct GrantGuard {
    inner: Arc<StoreCore>,
    handle: Arc<KeyHandle>,
    unspent: Unspent,
}

impl GrantGuard {
    pub(in crate::limiter) fn spend(mut self) {
        self.unspent.tokens = 0;
    }
}

impl Drop for GrantGuard {
    fn drop(&mut self) {
        if self.unspent.tokens > 0 {
            self.handle.state.lock().lease().owe(self.unspent);
            begin_return(&self.inner, &self.handle);
        }
    }
}

/// Starts returning unspent tokens, unless something that is under way will. Many that become free at the same time
/// go back together.
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
            match (lease.terms(), lease.unspent()) {
                (Some(terms), Some(back)) => inner.call(&handle, terms, Some(back)),
                _ => {
                    lease.end_return();
                    return;
                }
            }
        };
        inner.ask(call).await;
    }
}

/// A call for tokens. However it ends, the requests that it is made for hear of it, and the next call may begin.
struct LeaseFetch {
    inner: Arc<StoreCore>,
    handle: Arc<KeyHandle>,
    call: TakeCall,
    terms: Terms,
    asked_at: u64,
    requests: Vec<Waiter>,
    /// Not late yet: no other call for this key begins.
    active: bool,
}

impl Drop for LeaseFetch {
    fn drop(&mut self) {
        self.give_up();
        self.handle.state.lock().lease().end_call();
    }
}

impl LeaseFetch {
    /// The call has failed or is late: its requests go on without an answer, and the next call may begin.
    fn give_up(&mut self) {
        self.requests.clear();
        if std::mem::take(&mut self.active) {
            let mut state = self.handle.state.lock();
            state.lease().end_fetch();
            self.inner.begin_fetch(&self.handle, &mut state, false);
        }
    }

    /// Distributes what was granted: to the requests that the call was made for, to those that have come since, and
    /// what is left to later ones, where they may have it. Returns whether some is left.
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
        // Newer calls may have been answered before.
        if lease.seen_at() <= self.asked_at {
            lease.saw(debt, self.asked_at);
        }
        if self.active || lease.available() == 0 {
            let expires = self.asked_at.saturating_add(self.inner.ttl);
            lease.stock(grant, expires);
        } else {
            lease.owe(grant);
        }
        let mut refused = None::<u64>;
        for waiter in self.requests.drain(..) {
            if waiter.is_gone() {
                continue;
            }
            let outcome = match lease.set_apart(waiter.tokens) {
                Some(unspent) => self.inner.guard(&self.handle, unspent),
                None => {
                    refused = Some(refused.unwrap_or(u64::MAX).min(waiter.tokens));
                    FetchOutcome::TooFew
                }
            };
            outcomes.push((waiter, outcome));
        }
        // Tokens of an older plan are for the requests that they were taken for, and no others.
        let same = lease.terms().is_some_and(|now| now.is_like(self.terms));
        lease.expire(now);
        if !same || !self.terms.leased || self.inner.is_draining() {
            lease.surrender_all();
        }
        if same && !self.inner.is_draining() {
            if self.active {
                lease.served(granted, self.call.want);
                self.hold(lease, (granted, debt), refused);
            }
            for waiter in std::mem::take(lease.waiting()) {
                if waiter.tokens == 0 {
                    lease.waiting().push(waiter);
                } else if let Some(unspent) = lease.set_apart(waiter.tokens) {
                    outcomes.push((waiter, self.inner.guard(&self.handle, unspent)));
                } else if lease.held(waiter.tokens, now).is_some() {
                    outcomes.push((waiter, FetchOutcome::TooFew));
                } else {
                    lease.waiting().push(waiter);
                }
            }
            lease.trim();
        }
        let left = lease.available() > 0;
        if std::mem::take(&mut self.active) {
            lease.end_fetch();
            self.inner.begin_fetch(&self.handle, &mut state, false);
        }
        // Tokens of a request that is gone are returned, which needs the lock.
        drop(state);
        for (waiter, outcome) in outcomes {
            let _ = waiter.outcome.send(outcome);
        }
        left
    }

    /// When the bucket is short, requests are denied here for a while: until there are enough tokens for them, but not
    /// for long, since other replicas may return some. An empty bucket is left to gather tokens for part of a lease's
    /// life, in which it does not fill up, so that they are not fetched one by one.
    ///
    /// The time runs from when the call began. The counters decided later, but the next call takes as long to reach
    /// them; and a bucket that fills up while an answer travels must not be waited for once more.
    fn hold(&self, lease: &mut Lease, (granted, debt): (u64, u64), refused: Option<u64>) {
        let call = &self.call;
        // The counters may follow another version of the plan, whose debts are not to be measured with this one's.
        let Some(left) = call.tau.checked_sub(debt) else {
            return;
        };
        let gather = if self.terms.leased {
            (self.inner.ttl / 2).min(call.tau / 10)
        } else {
            0
        };
        let n = match refused {
            // What is known to be empty is not asked, unless tokens go back to it.
            _ if !self.terms.leased && left < call.emission && !lease.owes() => 1,
            _ if 0 < granted && granted < call.want && left < call.emission => 1,
            Some(refused) => refused,
            None if granted == 0 && call.want > 0 => call.need,
            None => return,
        };
        let missing = n.saturating_mul(call.emission).saturating_sub(left);
        let longest = if self.terms.leased {
            self.inner.ttl.saturating_mul(DENIED_FOR_LEASES)
        } else {
            u64::MAX
        };
        let until = missing.max(gather).max(1).min(longest);
        lease.hold(n, self.asked_at.saturating_add(until));
    }
}

/// Asks for tokens, and returns in the end what is not spent of them.
async fn fetch(
    inner: Arc<StoreCore>,
    handle: Arc<KeyHandle>,
    call: TakeCall,
    terms: Terms,
    asked_at: u64,
    requests: Vec<Waiter>,
) {
    let mut fetch = LeaseFetch {
        inner: Arc::clone(&inner),
        handle: Arc::clone(&handle),
        call,
        terms,
        asked_at,
        requests,
        active: true,
    };
    let answer = inner.ask_until(call, || fetch.give_up()).await;
    let left = match answer {
        Answer::InTime(reply) | Answer::Late(reply) => fetch.distribute(reply.at, reply.state),
        Answer::Failed => false,
    };
    drop(fetch);
    if left {
        let expires = asked_at.saturating_add(inner.ttl);
        let left = expires.saturating_sub(inner.clock.monotonic());
        time::sleep(Duration::from_nanos(left + 1)).await;
        let now = inner.clock.monotonic();
        handle.state.lock().lease().expire(now);
    }
    begin_return(&inner, &handle);
}
