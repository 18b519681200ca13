//! The store of many replicas: buckets that all share, tokens taken from them ahead of need, and what is done
//! without them.
//!
//! Owns when the shared counters are asked and when not. Calendar quotas are blocks from the ledger, as in
//! the memory store, cut so that all replicas together hold one block. Knows no Redis: the counters are a
//! trait ([`SharedCounters`]), which a script in Redis keeps, and in the simulation a model of it.
//!
//! ```text
//! lease in hand ─ spend, no I/O
//! none          ─ key is busy: one flight for all that wait, sized by the key's pace, ahead of need
//!               ─ key is slow, strict, or leases are off: one call a request
//! counters away ─ share | open | closed
//! ```
//!
//! **What is promised.** In any window of `T` seconds, at most `burst + rate * (T + ttl)` over all replicas,
//! and `burst + rate * T` where every request is decided by the counters ([`lease`] has the reason).
//! Calendar quotas exactly: a token of theirs is counted in the ledger before it is spent.
//!
//! **When the counters are away** ([`health`] tells when), a replica serves by the plan's choice. `Share`: a
//! bucket of its own of `burst / replicas` and `rate / replicas`, which starts *empty* when the outage does. All
//! shares together are one bucket that starts empty, so that with what was taken before it they stay within
//! the envelope. `Open`: all of the rate here, whatever the others do. `Closed`: nothing.
//!
//! **When they come back**, what was sold without them is not in them, and they may have lost what was. So
//! after a loss, or after an outage in which nobody was answered, they *begin anew*: at one instant by their own
//! clock, a little in the future, with every bucket empty; until it everybody serves as in an outage. A
//! replica that was alone in its outage just returns.
//!
//! **What is not promised.** While `k` of `n` replicas are cut off and the others are not, `Share` sells
//! up to `k/n` of the rate beside the counters: at most `burst + rate * (1 + k/n) * (T + ttl)`. `Closed` sells
//! nothing beside them.

mod counters;
mod health;
mod lease;
mod roster;
mod script;

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::{Arc, Weak},
    time::Duration,
};

use async_trait::async_trait;
use quota_common::{
    id::{ApiKeyId, TenantId},
    plan::OnRedisFailure,
};
use tokio::{runtime::Handle, sync::oneshot, time};

pub(super) use self::lease::Lease;
pub use self::{
    counters::{
        BucketName, BucketState, CounterError, CounterMicros, SharedCounters, TakeCall, TakeReply,
    },
    roster::{COUNTED_EVERY, FORGOTTEN, Place, Roster},
    script::RedisCounters,
};
use self::{health::Partition, lease::Unspent};
use super::{
    blocks::QuotaLedger,
    cell::{CellState, Denial, Lacking, Unasked},
    cells::{CellSettings, Cells},
    decision::{Decision, Outcome, PolicyState},
    policy::{Policies, Policy},
    store::{Drained, KeyCell, LimitStore, LimiterError},
};
use crate::{
    clock::{Clock, UnixNanos},
    telemetry::metrics::Metrics,
};

/// How often counters that are away are probed, and counters that are there are asked whether they are.
const PROBE_EVERY: Duration = Duration::from_millis(500);
const BEAT_EVERY: Duration = Duration::from_millis(250);
/// How long a probe may take: longer than a request waits, so that counters that are slow at first are found.
const PROBE_DEADLINE: Duration = Duration::from_millis(250);
/// Nanoseconds for which an unused partition is still asked.
const IN_USE: u64 = 10_000_000_000;
/// After how long a call is given up. Until then a late answer is still worth having.
const CALL_DEADLINE: Duration = Duration::from_secs(1);

/// The wait that is told where none is known.
const A_SECOND: NonZeroU64 = NonZeroU64::new(1_000_000_000).unwrap();

/// How a shared store is set up.
#[derive(Debug, Clone)]
pub struct SharedSettings {
    /// How long tokens that were taken ahead may be spent. Zero: none are.
    pub lease_ttl: Duration,
    /// How long a request waits for the counters.
    pub deadline: Duration,
    /// What is done without them, where a plan says nothing else.
    pub on_failure: OnRedisFailure,
    pub cells: CellSettings,
}

/// Limits that all replicas share.
#[derive(Debug)]
pub struct SharedStore(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cells: Cells,
    counters: Arc<dyn SharedCounters>,
    clock: Arc<dyn Clock>,
    roster: Arc<Roster>,
    metrics: Arc<Metrics>,
    settings: SharedSettings,
    ttl: u64,
    partitions: Box<[Partition]>,
    me: Weak<Inner>,
}

/// What a look at the numbers here leads to.
enum Look {
    Done(Decision),
    /// The quotas have it, the rate is to be asked for.
    Take,
    /// The quotas deny, or cannot be asked for; what the rate says is to be told too.
    Peek,
}

/// What came of asking for tokens.
enum Asked {
    /// What was granted to this request.
    Granted(Hand),
    /// Something has changed here: look again.
    LookAgain,
    /// The bucket has too few, as was noted.
    Denied,
    /// Others were quicker, for as long as a request may wait.
    Late,
    /// There is no answer.
    Away,
}

impl SharedStore {
    /// Starts the tasks that watch the counters; they end with the store.
    pub fn new(
        clock: Arc<dyn Clock>,
        ledger: Arc<dyn QuotaLedger>,
        counters: Arc<dyn SharedCounters>,
        roster: Arc<Roster>,
        metrics: Arc<Metrics>,
        settings: SharedSettings,
    ) -> Arc<Self> {
        let now = clock.monotonic();
        let inner = Arc::new_cyclic(|me| Inner {
            cells: Cells::new(
                Arc::clone(&clock),
                ledger,
                settings.cells.clone(),
                Arc::clone(&roster),
            ),
            partitions: (0..counters.partitions().max(1))
                .map(|_| Partition::new(now))
                .collect(),
            counters,
            clock,
            roster,
            metrics,
            ttl: nanos(settings.lease_ttl),
            settings,
            me: Weak::clone(me),
        });
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(beat(Weak::clone(&inner.me)));
        }
        Arc::new(Self(inner))
    }

    /// Whether some counters are away.
    pub fn is_degraded(&self) -> bool {
        self.0.partitions.iter().any(Partition::is_away)
    }
}

impl Inner {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the remainder is below the number of partitions, a u16"
    )]
    fn partition_of(&self, key: ApiKeyId) -> u16 {
        (key.0.as_u128() % self.partitions.len() as u128) as u16
    }

    fn partition(&self, cell: &KeyCell) -> &Partition {
        &self.partitions[usize::from(self.partition_of(cell.key))]
    }

    fn leases(&self, policies: &Policies) -> bool {
        self.ttl > 0 && !policies.strict()
    }

    /// A call for a key, with what it has to give back.
    fn call(
        &self,
        cell: &KeyCell,
        policies: &Policies,
        (need, want): (u64, u64),
        back: Option<Unspent>,
    ) -> TakeCall {
        let gcra = policies.gcra();
        let partition = self.partition_of(cell.key);
        TakeCall {
            partition,
            bucket: BucketName::Key(cell.tenant, cell.key),
            emission: gcra.emission(),
            tau: gcra.tau(),
            version: policies.version(),
            need,
            want,
            back: back.map_or(0, |back| back.tokens),
            back_taken_at: back.map_or(0, |back| back.taken_at),
            lease: self.ttl / 1000,
            last_heard: self.partitions[usize::from(partition)].last_heard(),
            away_since: 0,
            promised: 0,
        }
    }

    /// Asks the counters, and keeps book of how they answer. An answer that comes too late for the request is
    /// still waited for: what it grants can be spent by the next, or given back.
    async fn ask(&self, call: TakeCall) -> Option<TakeReply> {
        let partition = &self.partitions[usize::from(call.partition)];
        partition.used(self.clock.monotonic());
        self.metrics.counter_calls.inc();
        let mut answer = self.counters.take(call);
        let (answer, late) = match time::timeout(self.settings.deadline, &mut answer).await {
            Ok(answer) => (answer, false),
            Err(_) => {
                self.failed(call.partition, &"no answer in time");
                match time::timeout(CALL_DEADLINE, answer).await {
                    Ok(answer) => (answer, true),
                    Err(_) => return None,
                }
            }
        };
        let now = self.clock.monotonic();
        match answer {
            Ok(reply) => {
                if late {
                    partition.heard(reply.at, now);
                } else {
                    partition.succeeded(reply.at, now);
                }
                match reply.state {
                    BucketState::Beginning { wait } => {
                        if partition.is_beginning(now) {
                            tracing::warn!(
                                partition = call.partition,
                                wait_us = wait,
                                "the shared counters begin anew"
                            );
                            let promised = reply.at + wait;
                            let wait = Duration::from_micros(wait);
                            self.see_to_return(call.partition, wait, promised);
                        }
                    }
                    BucketState::Known { granted, .. } => {
                        self.metrics.lease_tokens_taken.inc_by(granted);
                        self.metrics.lease_tokens_returned.inc_by(call.back);
                    }
                }
                Some(reply)
            }
            Err(error) => {
                if !late {
                    self.failed(call.partition, &error);
                }
                None
            }
        }
    }

    fn failed(&self, partition: u16, error: &dyn std::fmt::Display) {
        self.metrics.counter_errors.inc();
        if self.partitions[usize::from(partition)].failed(self.clock.monotonic()) {
            tracing::warn!(partition, error = %error, "the shared counters are given up for now");
            self.metrics.counter_outages.inc();
            self.see_to_return(partition, PROBE_EVERY, 0);
        }
    }

    fn see_to_return(&self, partition: u16, first: Duration, promised: CounterMicros) {
        if let Ok(runtime) = Handle::try_current() {
            let me = Weak::clone(&self.me);
            runtime.spawn(see_to_return(me, partition, first, promised));
        }
    }

    /// One look at what is here.
    #[inline]
    fn look(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Look, Lacking> {
        let (mut state, now) = self.cells.current(cell, policies);
        let monotonic = self.clock.monotonic();
        let tokens = u64::from(cost.get());
        if !state.quotas_fit(tokens) {
            self.cells.after(cell, &mut state, None);
            return match state.quotas(tokens, now).lacking(false, Unasked::Wait) {
                Some(lacking) => Err(lacking),
                None => Ok(Look::Peek),
            };
        }
        let lease = state.lease();
        lease.expire(monotonic);
        let decision = if lease.spend(tokens) {
            let low = lease.is_low(monotonic);
            let size = if low {
                lease.pace(monotonic, self.ttl, Lease::largest(policies.gcra()))
            } else {
                0
            };
            state.spend_quotas(tokens);
            self.metrics.lease_tokens_spent.inc_by(tokens);
            if low && !self.partition(cell).is_away() {
                self.take_off(cell, &mut state, policies, (1, size));
            }
            decision(&mut state, policies, (now, monotonic), Outcome::Allowed)
        } else if let Some(until) = lease.held(tokens, monotonic)
            && !self.partition(cell).is_away()
        {
            let mut denial = Denial::default();
            denial.add(Policy::Rpm, NonZeroU64::new(until - monotonic));
            let outcome = denial.outcome();
            decision(&mut state, policies, (now, monotonic), outcome)
        } else {
            self.cells.after(cell, &mut state, None);
            let never = policies.gcra().price(cost) > policies.gcra().tau();
            return Ok(if never { Look::Peek } else { Look::Take });
        };
        self.cells.after(cell, &mut state, Some(&decision));
        Ok(Look::Done(decision))
    }

    /// Starts fetching the next lease, of `size` with what is in hand, unless it is being fetched.
    #[cold]
    fn take_off(
        &self,
        cell: &Arc<KeyCell>,
        state: &mut CellState,
        policies: &Policies,
        (need, size): (u64, u64),
    ) {
        let (Ok(runtime), Some(inner)) = (Handle::try_current(), self.me.upgrade()) else {
            return;
        };
        let lease = state.lease();
        if lease.is_flying() || self.cells.is_draining() {
            return;
        }
        let want = size.saturating_sub(lease.in_hand()).max(need);
        let back = lease.unspent();
        lease.take_off();
        let call = self.call(cell, policies, (need, want), back);
        runtime.spawn(fly(inner, Arc::clone(cell), call));
    }

    /// Asks for the rate of one request, by a call of its own or by the flight that all wait for.
    async fn ask_rate(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        deadline: time::Instant,
    ) -> Asked {
        if self.partition(cell).is_away() {
            return Asked::Away;
        }
        if time::Instant::now() >= deadline {
            return Asked::Late;
        }
        let tokens = u64::from(cost.get());
        let landed = {
            let mut landed = Box::pin(cell.taken.notified());
            let mut state = cell.state.lock();
            let monotonic = self.clock.monotonic();
            let lease = state.lease();
            let failures = lease.failures();
            if !self.leases(policies) {
                None
            } else if lease.is_flying() {
                lease.count(tokens);
                landed.as_mut().enable();
                Some((landed, failures))
            } else {
                let size = lease.pace(monotonic, self.ttl, Lease::largest(policies.gcra()));
                if size < 2 || tokens >= size {
                    lease.count(tokens);
                    None
                } else {
                    landed.as_mut().enable();
                    self.take_off(cell, &mut state, policies, (tokens, size));
                    Some((landed, failures))
                }
            }
        };
        if let Some((landed, failures)) = landed {
            return match time::timeout_at(deadline, landed).await {
                // Not again at once what has just failed.
                Ok(()) if cell.state.lock().lease().failures() == failures => Asked::LookAgain,
                _ => Asked::Away,
            };
        }
        let Some((hand, reply)) = self
            .ask_once(cell, policies, (tokens, tokens), deadline)
            .await
        else {
            return Asked::Away;
        };
        match reply.state {
            BucketState::Beginning { .. } => Asked::Away,
            BucketState::Known { granted: 0, .. } => Asked::Denied,
            BucketState::Known { .. } => Asked::Granted(hand),
        }
    }

    /// A call for one request. What it grants is in the hand that comes with the answer, and goes back with it if it is
    /// not spent.
    async fn ask_once(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        (need, want): (u64, u64),
        deadline: time::Instant,
    ) -> Option<(Hand, TakeReply)> {
        let inner = self.me.upgrade()?;
        let back = cell.state.lock().lease().unspent();
        let call = self.call(cell, policies, (need, want), back);
        let (tell, told) = oneshot::channel();
        let cell = Arc::clone(cell);
        // A task of its own: the caller may go away, and the answer must be heard all the same.
        tokio::spawn(async move {
            let Some(reply) = inner.ask(call).await else {
                return;
            };
            let mut granted = 0;
            if let BucketState::Known { debt, granted: n } = reply.state {
                granted = n;
                let mut state = cell.state.lock();
                state.lease().saw(debt, inner.clock.monotonic());
            }
            let hand = Hand {
                inner,
                call,
                granted,
                taken_at: reply.at,
            };
            let _ = tell.send((hand, reply));
        });
        time::timeout_at(deadline, told).await.ok()?.ok()
    }

    /// Spends what was granted to this request, if the quotas still have it.
    fn spend(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        mut hand: Hand,
    ) -> Option<Decision> {
        let (mut state, now) = self.cells.current(cell, policies);
        if !state.spend_quotas(u64::from(cost.get())) {
            drop(state);
            return None;
        }
        hand.granted = 0;
        self.metrics
            .lease_tokens_spent
            .inc_by(u64::from(cost.get()));
        let times = (now, self.clock.monotonic());
        let decision = decision(&mut state, policies, times, Outcome::Allowed);
        self.cells.after(cell, &mut state, Some(&decision));
        Some(decision)
    }

    /// The denial of a request as things are known here, for at least `wait` by the rate; `None` if nothing
    /// denies it.
    fn denial(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
        wait: Option<NonZeroU64>,
    ) -> Option<Decision> {
        let (mut state, now) = self.cells.current(cell, policies);
        let monotonic = self.clock.monotonic();
        let mut denial = state.quotas(u64::from(cost.get()), now).denial;
        let gcra = policies.gcra();
        let debt = state.lease().debt(gcra, monotonic);
        denial.add_rate(gcra.decide(now.0.saturating_add(debt), now, cost));
        if wait.is_some() {
            denial.add(Policy::Rpm, wait);
        }
        if denial.violated.is_empty() {
            return None;
        }
        let outcome = denial.outcome();
        let decision = decision(&mut state, policies, (now, monotonic), outcome);
        self.cells.after(cell, &mut state, Some(&decision));
        Some(decision)
    }

    /// Decides without the counters, by the plan's choice; `None` if the quotas must be looked at again.
    fn without_counters(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Option<Decision>, LimiterError> {
        let on_failure = policies.on_failure().unwrap_or(self.settings.on_failure);
        let outage = self.partition(cell).outage();
        let (mut state, now) = self.cells.current(cell, policies);
        let monotonic = self.clock.monotonic();
        let tokens = u64::from(cost.get());
        if !state.quotas_fit(tokens) {
            return Ok(None);
        }
        let gcra = policies.gcra();
        let (verdict, rate) = match on_failure {
            OnRedisFailure::Closed => return Err(LimiterError::CountersAway),
            OnRedisFailure::Open => (Ok(()), rate(policies, now, 0)),
            OnRedisFailure::Share => {
                let place = self.roster.place(monotonic);
                let share = &mut state.lease().share;
                match (outage, place) {
                    (Some(outage), Some((place, since))) => {
                        let since = outage.since.max(since);
                        let verdict = share.take(gcra, place, since, cost, monotonic);
                        let debt = share.tat.saturating_sub(monotonic);
                        (verdict, rate(policies, now, debt.min(gcra.tau())))
                    }
                    // A call that failed while others do not, or nobody knows how many share: as if the
                    // share had just begun, empty.
                    _ => (Err(A_SECOND), rate(policies, now, gcra.tau())),
                }
            }
        };
        let outcome = match verdict {
            Ok(()) => {
                state.spend_quotas(tokens);
                self.metrics.admitted_degraded.inc();
                Outcome::Allowed
            }
            Err(wait) => {
                let mut denial = Denial::default();
                denial.add(Policy::Rpm, Some(wait));
                denial.outcome()
            }
        };
        let mut decision = state.decision_with(policies, now, outcome, rate);
        decision.degraded = true;
        self.cells.after(cell, &mut state, Some(&decision));
        Ok(Some(decision))
    }

    async fn take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        let deadline = time::Instant::now() + self.settings.deadline;
        let _claim = self.cells.claim(cell, cost);
        loop {
            let look = match self.look(cell, policies, cost) {
                Ok(look) => look,
                Err(_) => {
                    let again = || self.look(cell, policies, cost);
                    match self.cells.fetch(cell, cost, again).await {
                        Ok(look) => look,
                        // Deny if the rate does so anyhow.
                        Err(error) => {
                            self.refresh(cell, policies, deadline).await;
                            return self.denial(cell, policies, cost, None).ok_or(error);
                        }
                    }
                }
            };
            match look {
                Look::Done(decision) => return Ok(decision),
                Look::Peek => {
                    self.refresh(cell, policies, deadline).await;
                    if let Some(decision) = self.denial(cell, policies, cost, None) {
                        return Ok(decision);
                    }
                }
                Look::Take => match self.ask_rate(cell, policies, cost, deadline).await {
                    Asked::LookAgain => {}
                    Asked::Granted(hand) => {
                        if let Some(decision) = self.spend(cell, policies, cost, hand) {
                            return Ok(decision);
                        }
                    }
                    Asked::Denied => {
                        if let Some(decision) = self.denial(cell, policies, cost, None) {
                            return Ok(decision);
                        }
                    }
                    Asked::Late => {
                        let wait = NonZeroU64::new(policies.gcra().price(cost));
                        if let Some(decision) = self.denial(cell, policies, cost, wait) {
                            return Ok(decision);
                        }
                    }
                    Asked::Away => {
                        if let Some(decision) = self.without_counters(cell, policies, cost)? {
                            return Ok(decision);
                        }
                    }
                },
            }
        }
    }

    /// Asks how full the bucket is, and takes nothing.
    async fn refresh(&self, cell: &Arc<KeyCell>, policies: &Policies, deadline: time::Instant) {
        if !self.partition(cell).is_away() {
            self.ask_once(cell, policies, (0, 0), deadline).await;
        }
    }
}

/// The decision, with the rate as it is known here.
fn decision(
    state: &mut CellState,
    policies: &Policies,
    (now, monotonic): (UnixNanos, u64),
    outcome: Outcome,
) -> Decision {
    let gcra = policies.gcra();
    let debt = state.lease().debt(gcra, monotonic);
    state.decision_with(policies, now, outcome, rate(policies, now, debt))
}

/// The rate as it stands with so many nanoseconds to a full bucket.
fn rate(policies: &Policies, now: UnixNanos, debt: u64) -> PolicyState {
    let gcra = policies.gcra();
    PolicyState {
        policy: Policy::Rpm,
        limit: u64::from(policies.rate().burst.get()),
        remaining: gcra.tau().saturating_sub(debt) / gcra.emission(),
        reset_at: now.saturating_add(debt),
    }
}

/// Tokens granted to one request. What is not spent goes back.
#[derive(Debug)]
struct Hand {
    inner: Arc<Inner>,
    call: TakeCall,
    granted: u64,
    taken_at: CounterMicros,
}

impl Drop for Hand {
    fn drop(&mut self) {
        if self.granted == 0 {
            return;
        }
        let back = Unspent {
            tokens: self.granted,
            taken_at: self.taken_at,
        };
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(give_back(Arc::clone(&self.inner), self.call, back));
        }
    }
}

async fn give_back(inner: Arc<Inner>, call: TakeCall, back: Unspent) {
    inner
        .ask(TakeCall {
            need: 0,
            want: 0,
            back: back.tokens,
            back_taken_at: back.taken_at,
            ..call
        })
        .await;
}

/// A flight on its way. However it ends, who waits hears of it.
struct Flight {
    cell: Arc<KeyCell>,
    answered: bool,
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.cell.state.lock().lease().land(self.answered);
        self.cell.taken.notify_waiters();
    }
}

/// Fetches a lease, and gives back in the end what is not spent of it.
async fn fly(inner: Arc<Inner>, cell: Arc<KeyCell>, call: TakeCall) {
    let mut flight = Flight {
        cell: Arc::clone(&cell),
        answered: false,
    };
    let asked_at = inner.clock.monotonic();
    let expires = asked_at.saturating_add(inner.ttl);
    let reply = inner.ask(call).await;
    flight.answered = reply.is_some();
    let mut stocked = false;
    if let Some(TakeReply { at, state }) = reply
        && let BucketState::Known { granted, debt } = state
    {
        let now = inner.clock.monotonic();
        let mut state = cell.state.lock();
        let lease = state.lease();
        lease.saw(debt, now);
        if granted > 0 {
            lease.stock(granted, at, expires);
            stocked = true;
        }
        if granted < call.want {
            // Near the limit. The next are asked for when they are there; and not each one as it comes: they are
            // left to gather for a while, in which no bucket fills up.
            let n = if granted > 0 { 1 } else { call.need };
            let missing = debt
                .saturating_add(n.saturating_mul(call.emission))
                .saturating_sub(call.tau);
            let gather = (inner.ttl / 2).min(call.tau / 10);
            lease.hold(n, now + missing.max(gather).max(1));
        }
    }
    drop(flight);
    if !stocked {
        return;
    }
    let left = expires.saturating_sub(inner.clock.monotonic());
    time::sleep(Duration::from_nanos(left + 1)).await;
    let back = {
        let mut state = cell.state.lock();
        let lease = state.lease();
        lease.expire(inner.clock.monotonic());
        // The next flight takes along what is to go back; one comes, if more is in hand.
        if lease.is_flying() || lease.in_hand() > 0 {
            None
        } else {
            lease.unspent()
        }
    };
    if let Some(back) = back {
        give_back(inner, call, back).await;
    }
}

/// A call that takes nothing and concerns nobody.
fn beat_call(partition: u16, of: &Partition) -> TakeCall {
    TakeCall {
        partition,
        bucket: BucketName::Beat,
        emission: 1,
        tau: 1,
        version: 0,
        need: 0,
        want: 0,
        back: 0,
        back_taken_at: 0,
        lease: 0,
        last_heard: of.last_heard(),
        away_since: of.away_since(),
        promised: 0,
    }
}

/// Asks the counters in use whether they are there, where no request has found out lately; and so that others who
/// return see that somebody was answered.
async fn beat(inner: Weak<Inner>) {
    let mut ticks = time::interval(BEAT_EVERY);
    ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(inner) = inner.upgrade() else {
            return;
        };
        let now = inner.clock.monotonic();
        for (number, partition) in (0..).zip(&inner.partitions) {
            let in_use = now.saturating_sub(partition.used_at()) < IN_USE;
            let heard = now.saturating_sub(partition.heard_at()) < nanos(BEAT_EVERY);
            if (in_use || inner.partitions.len() == 1) && !heard && !partition.is_away() {
                let (inner, call) = (Arc::clone(&inner), beat_call(number, partition));
                tokio::spawn(async move {
                    let used_at = inner.partitions[usize::from(number)].used_at();
                    inner.ask(call).await;
                    // A beat is no use.
                    inner.partitions[usize::from(number)].used(used_at);
                });
            }
        }
    }
}

/// Probes counters that are away until they grant again.
async fn see_to_return(inner: Weak<Inner>, number: u16, first: Duration, promised: CounterMicros) {
    let (mut wait, mut promised) = (first, promised);
    loop {
        time::sleep(wait).await;
        let Some(inner) = inner.upgrade() else {
            return;
        };
        let partition = &inner.partitions[usize::from(number)];
        inner.metrics.counter_calls.inc();
        let call = TakeCall {
            promised,
            ..beat_call(number, partition)
        };
        let answer = time::timeout(PROBE_DEADLINE, inner.counters.take(call)).await;
        let now = inner.clock.monotonic();
        // Not all at once.
        wait = PROBE_EVERY.saturating_sub(Duration::from_nanos(now % 50_000_000));
        if let Ok(Ok(reply)) = answer {
            partition.heard(reply.at, now);
            match reply.state {
                BucketState::Beginning { wait: left } => {
                    wait = Duration::from_micros(left);
                    promised = reply.at + left;
                }
                BucketState::Known { .. } => {
                    partition.returned(now);
                    tracing::info!(partition = number, "the shared counters are back");
                    return;
                }
            }
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[async_trait]
impl LimitStore for SharedStore {
    fn cell(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyCell>, LimiterError> {
        self.0.cells.cell(tenant, key)
    }

    #[inline]
    fn try_take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision> {
        match self.0.look(cell, policies, cost) {
            Ok(Look::Done(decision)) => Some(decision),
            Ok(Look::Take) if self.0.partition(cell).is_away() => {
                let on_failure = policies.on_failure().unwrap_or(self.0.settings.on_failure);
                // The gate stands between the others and what they admit.
                if on_failure != OnRedisFailure::Share {
                    return None;
                }
                self.0.without_counters(cell, policies, cost).ok()?
            }
            _ => None,
        }
    }

    async fn take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError> {
        self.0.take(cell, policies, cost).await
    }

    fn peek(&self, cell: &KeyCell, policies: &Policies) -> Decision {
        let (mut state, now) = self.0.cells.current(cell, policies);
        let times = (now, self.0.clock.monotonic());
        decision(&mut state, policies, times, Outcome::Allowed)
    }

    fn is_local(&self) -> bool {
        false
    }

    fn prune(&self) -> usize {
        self.0.cells.prune()
    }

    async fn drain(&self) -> Drained {
        self.0.cells.drain().await
    }
}
