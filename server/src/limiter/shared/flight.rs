//! Calls to the counters, and what becomes of the tokens they bring.
//!
//! Owns the tasks that make them: so that a request may go away while it waits, that an answer that comes too late
//! is heard all the same, and that no token is left behind. A call that fails is counted against its partition, and
//! who waits for it hears of it.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use quota_common::id::ApiKeyId;
use tokio::{runtime::Handle, time};

use super::{
    Inner,
    counters::{BucketName, BucketState, CounterMicros, TakeCall, TakeReply},
    health::Partition,
    lease::Unspent,
    watch::see_to_return,
};
use crate::{
    deadline,
    limiter::{policy::Policies, store::KeyCell},
};

/// After how long a call is given up. Until then a late answer is still worth having.
pub(super) const CALL_DEADLINE: Duration = Duration::from_secs(1);

impl Inner {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the remainder is below the number of partitions, a u16"
    )]
    fn partition_of(&self, key: ApiKeyId) -> u16 {
        (key.0.as_u128() % self.partitions.len() as u128) as u16
    }

    pub(super) fn partition(&self, cell: &KeyCell) -> &Partition {
        &self.partitions[usize::from(self.partition_of(cell.key))]
    }

    pub(super) fn leases(&self, policies: &Policies) -> bool {
        self.ttl > 0 && !policies.strict()
    }

    /// A call for a key, with what it has to give back.
    pub(super) fn call(
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
    pub(super) async fn ask(&self, call: TakeCall) -> Option<TakeReply> {
        let reply = self.answer(call).await;
        match reply {
            Some(TakeReply {
                state: BucketState::Known { granted, .. },
                ..
            }) => {
                self.metrics.lease_tokens_taken.inc_by(granted);
                self.metrics.lease_tokens_returned.inc_by(call.back);
            }
            _ => {
                self.metrics.lease_tokens_lost.inc_by(call.back);
            }
        }
        reply
    }

    async fn answer(&self, call: TakeCall) -> Option<TakeReply> {
        let partition = &self.partitions[usize::from(call.partition)];
        partition.used(self.clock.monotonic());
        self.metrics.counter_calls.inc();
        let mut answer = self.counters.take(call);
        let (answer, late) = match deadline::within(self.settings.deadline, &mut answer).await {
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
                if let BucketState::Beginning { wait } = reply.state
                    && partition.is_beginning(now)
                {
                    tracing::warn!(
                        partition = call.partition,
                        wait_us = wait,
                        "the shared counters begin anew"
                    );
                    let promised = reply.at + wait;
                    let wait = Duration::from_micros(wait);
                    self.see_to_return(call.partition, wait, promised);
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
            self.see_to_return(partition, super::watch::PROBE_EVERY, 0);
        }
    }

    /// Of a partition that was given up just now.
    fn see_to_return(&self, partition: u16, first: Duration, promised: CounterMicros) {
        self.metrics.counters_away.inc();
        if let Ok(runtime) = Handle::try_current() {
            let me = Weak::clone(&self.me);
            runtime.spawn(see_to_return(me, partition, first, promised));
        }
    }
}

/// Tokens granted to one request. What is not spent goes back.
#[derive(Debug)]
pub(super) struct Hand {
    pub(super) inner: Arc<Inner>,
    pub(super) call: TakeCall,
    pub(super) granted: u64,
    pub(super) taken_at: CounterMicros,
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
pub(super) async fn fly(inner: Arc<Inner>, cell: Arc<KeyCell>, call: TakeCall) {
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
        // Tokens are asked for when they are there; and not each one as it comes: they are left to gather for a
        // while, in which no bucket fills up.
        let gather = (inner.ttl / 2).min(call.tau / 10);
        let left = call.tau.saturating_sub(debt);
        if granted == 0 || (granted < call.want && left <= gather) {
            let n = if granted > 0 { 1 } else { call.need };
            let missing = n.saturating_mul(call.emission).saturating_sub(left);
            lease.hold(n, now + missing.max(gather).max(1));
        }
    }
    drop(flight);
    if stocked {
        let left = expires.saturating_sub(inner.clock.monotonic());
        time::sleep(Duration::from_nanos(left + 1)).await;
    }
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
