//! Calls to the counters, and their outcomes.
//!
//! Calls run in separate tasks, so that a request can be canceled while it waits, a late response is still used, and no
//! tokens are lost. All waiting requests of a key share one call, which requests all the tokens they need. Requests
//! that arrive during a call are decided by the next one. It starts when the first call ends, or sooner if the bucket
//! could fill up in the meantime. Each call has a deadline, and a request waits for at most two calls.
//!
//! If a call fails, its requests are notified. If it is late, they keep waiting for up to two deadlines in total. The
//! remaining tokens of a late response are held like any lease if the plan allows it, and returned otherwise.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use quota_common::id::{ApiKeyId, TenantId};
use tokio::{runtime::Handle, time};

use super::{
    breaker::CircuitBreaker,
    core::StoreCore,
    probe::{first_probe, probe_until_recovered},
};
use crate::{
    clock::Nanos,
    deadline,
    limiter::{
        key::handle::KeyHandle,
        rate::{
            counters::{BucketName, BucketState, CounterError, CounterMicros, TakeCall, TakeReply},
            lease::Terms,
            waiter::Unspent,
        },
    },
};

/// How long until a call is abandoned. Until then, a late response is still used.
pub(super) const CALL_DEADLINE: Duration = Duration::from_secs(1);

/// How long a denial by the counters is trusted if tokens are leased, as a multiple of the lease TTL.
pub(super) const DENIED_FOR_LEASES: u64 = 2;

/// The maximum number of concurrent calls that return leases on exit.
const RETURNS_AT_ONCE: usize = 256;
/// The number of failed calls after which no more leases are returned.
const RETURNS_FAILED: u32 = 8;
/// How long returning leases may take.
const RETURNED_WITHIN: Duration = Duration::from_secs(4);

/// The response to a call.
pub(super) enum Answer {
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

    pub(super) fn partition(&self, handle: &KeyHandle) -> &CircuitBreaker {
        &self.partitions[usize::from(self.partition_of(handle.key))]
    }

    /// Builds a call for a key that takes no tokens and returns `back`.
    pub(super) fn call(&self, handle: &KeyHandle, terms: Terms, back: Option<Unspent>) -> TakeCall {
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
            lease: self.ttl.0 / 1000,
            epoch_delay: self.epoch_delay(),
            deadline: self.deadline(),
            last_heard: self.partitions[usize::from(partition)].last_heard(),
            away_since: self.partitions[usize::from(partition)]
                .never_heard(self.others_may_be_away()),
            promised: CounterMicros::NONE,
        }
    }

    /// Makes a call and records its outcome. If the deadline passes, runs `on_late` and keeps waiting, because tokens
    /// of a late response can still be spent or returned.
    pub(super) async fn ask_until(&self, call: TakeCall, on_late: impl FnOnce()) -> Answer {
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

    /// Makes a call that no request waits for.
    pub(super) async fn ask(&self, call: TakeCall) {
        self.ask_until(call, || ()).await;
    }

    /// Returns the time until the bucket is full, according to the counters. `None` if they do not respond
    /// in time.
    pub(super) async fn look_up_debt(&self, handle: &KeyHandle, terms: Terms) -> Option<Nanos> {
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

    /// Deletes the buckets of deleted keys. This does not affect the breaker, since no request depends on it.
    pub(super) async fn delete_buckets(
        &self,
        keys: &[(TenantId, ApiKeyId)],
    ) -> Result<(), CounterError> {
        let mut partitions = BTreeMap::<u16, Vec<BucketName>>::new();
        for (tenant, key) in keys {
            let buckets = partitions.entry(self.partition_of(*key)).or_default();
            buckets.push(BucketName::Key(*tenant, *key));
        }
        for (partition, buckets) in partitions {
            self.counters.delete(partition, &buckets).await?;
        }
        Ok(())
    }

    async fn answer(&self, call: TakeCall, on_late: impl FnOnce()) -> Answer {
        let partition = &self.partitions[usize::from(call.partition)];
        partition.used(self.clock.monotonic());
        self.metrics.counter_calls.inc();
        let asked_at = self.clock.monotonic();
        partition.called(asked_at);
        let mut answer = self.counters.take(call);
        let (answer, late) = match deadline::within(self.settings.deadline, &mut answer).await {
            Ok(answer) => (answer, false),
            Err(_) => {
                self.failed(call.partition, &"no response in time");
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
                // A late response is not a promise: the epoch may already have started, and other calls may have been
                // granted tokens in it.
                if let BucketState::Initializing { wait: wait_us } = reply.state
                    && !late
                    && let wait = Duration::from_micros(wait_us)
                    && !partition.is_away()
                    && partition.is_initializing(asked_at.saturating_add(wait.into()), now)
                {
                    tracing::warn!(
                        partition = call.partition,
                        wait_us,
                        "the shared counters have lost their state; a new epoch begins"
                    );
                    let promised = reply.at.saturating_add(wait_us);
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
            let first = first_probe(self.settings.deadline);
            self.probe_until_recovered(partition, first, CounterMicros::NONE);
        }
    }

    /// Starts probing a partition whose breaker has just opened.
    fn probe_until_recovered(&self, partition: u16, first: Duration, promised: CounterMicros) {
        self.metrics.counters_away.inc();
        if let Ok(runtime) = Handle::try_current() {
            let me = Weak::clone(&self.me);
            runtime.spawn(probe_until_recovered(me, partition, first, promised));
        }
    }

    /// Returns whether other replicas may have an outage that this replica, which has just started, does not know of.
    /// Always `false` in a cluster: partitions may be idle, so a lack of confirmed responses does not indicate an
    /// outage. Other replicas that have just started do not matter, since they have not used their shares yet.
    pub(super) fn others_may_be_away(&self) -> bool {
        self.partitions.len() == 1 && self.membership.others_may_act(self.clock.monotonic())
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Returns all tokens held for later, before the process exits. Gives up if the counters do not respond; tokens
    /// that are not returned are unavailable until their buckets refill.
    pub(super) async fn return_leases(&self) {
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
            // These calls do not affect the breaker, because with this many concurrent calls, some may be late.
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
        // Calls in flight return their granted tokens themselves.
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
