//! Calls to the counters, and their outcomes.
//!
//! Calls run in separate tasks, so that a waiting request can be canceled, a late response is still used, and no tokens
//! are lost. All waiting requests for a key share one call, which requests all the tokens that these requests need.
//! Requests that arrive during a call get the tokens that the call's own requests do not need, or wait for the next
//! call. The next call starts when the current call ends, is late, or has taken a small fraction of the time that an
//! empty bucket takes to fill ([`Terms::pause`]).
//!
//! If a call fails, its requests are notified. If a call is late, its requests keep waiting. A request waits for at
//! most twice the deadline of a call.
//!
//! Tokens from a late response are used like tokens from a timely response: for requests, and as a lease if the plan
//! allows leases. However, if none of the call's requests is waiting any longer and other tokens are available locally,
//! the tokens are returned.

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
    core::{AfterDeadline, StoreCore},
    probe::{first_probe, probe_until_recovered},
};
use crate::{
    clock::Nanos,
    deadline,
    limiter::{
        key::handle::KeyHandle,
        rate::{
            counters::{BucketName, BucketState, CounterError, CounterMicros, TakeCall, TakeReply},
            terms::Terms,
            waiter::Unspent,
        },
    },
};

/// How long to keep waiting for a call after its deadline, so that tokens from a late response are used or returned.
/// Calls to Redis fail sooner: after this time in total, or after the deadline if that is longer. On exit, each call
/// that returns leases may take this long.
pub(super) const CALL_DEADLINE: Duration = Duration::from_secs(1);

/// How long a denial by the counters is trusted if tokens are leased, as a multiple of the lease TTL.
pub(super) const DENIED_FOR_LEASES: u64 = 2;

/// The maximum number of concurrent calls that return leases on exit.
const RETURNS_AT_ONCE: usize = 256;
/// The number of failed calls after which no more leases are returned.
const RETURNS_FAILED: u32 = 8;
/// How long to keep starting calls that return leases.
const RETURNED_WITHIN: Duration = Duration::from_secs(4);

/// How a call ended.
pub(super) enum CallOutcome {
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
        (key.0.as_u128() % self.breakers.len() as u128) as u16
    }

    pub(super) fn breaker(&self, handle: &KeyHandle) -> &CircuitBreaker {
        &self.breakers[usize::from(self.partition_of(handle.name.key))]
    }

    /// Builds a call for a key. The call returns `back`. It takes no tokens unless the caller sets `need`, `waiting`
    /// and `want`.
    pub(super) fn build_call(
        &self,
        handle: &KeyHandle,
        terms: Terms,
        back: Option<Unspent>,
    ) -> TakeCall {
        let partition = self.partition_of(handle.name.key);
        let back = back.unwrap_or_default();
        TakeCall {
            partition,
            bucket: BucketName::Key(handle.name.tenant, handle.name.key),
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
            last_heard: self.breakers[usize::from(partition)].last_heard(),
            outage_since: self.breakers[usize::from(partition)]
                .never_heard(self.others_may_have_outage()),
            promised: CounterMicros::NONE,
        }
    }

    /// Makes a call, and counts the tokens that it takes and returns. If the deadline passes, runs `on_late`, which
    /// decides whether to wait for the late response.
    pub(super) async fn make_call(
        &self,
        call: TakeCall,
        on_late: impl FnOnce() -> AfterDeadline,
    ) -> CallOutcome {
        let outcome = self.call_counters(call, on_late).await;
        match outcome {
            CallOutcome::InTime(TakeReply {
                state: BucketState::Active { granted, .. },
                ..
            })
            | CallOutcome::Late(TakeReply {
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
        outcome
    }

    /// Returns the time until the bucket is full, according to the counters. Returns `None` during an outage, before a
    /// new epoch starts, and if the call fails or is late.
    pub(super) async fn look_up_debt(&self, handle: &KeyHandle, terms: Terms) -> Option<Nanos> {
        if self.breaker(handle).is_open() {
            return None;
        }
        match self
            .make_call(self.build_call(handle, terms, None), || {
                AfterDeadline::GiveUp
            })
            .await
        {
            CallOutcome::InTime(TakeReply {
                state: BucketState::Active { debt, .. },
                ..
            }) => Some(debt),
            _ => None,
        }
    }

    /// Deletes the buckets of deleted keys. The call does not affect the breaker, because no request depends on the
    /// call.
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

    /// Makes a call, and records its outcome in the breaker. If the call reveals an outage, starts probing.
    async fn call_counters(
        &self,
        call: TakeCall,
        on_late: impl FnOnce() -> AfterDeadline,
    ) -> CallOutcome {
        let breaker = &self.breakers[usize::from(call.partition)];
        breaker.record_use(self.clock.monotonic());
        self.metrics.counter_calls.inc();
        let asked_at = self.clock.monotonic();
        breaker.record_call(asked_at);
        let mut call_in_flight = self.counters.take(call);
        let in_time = deadline::within(self.settings.deadline, &mut call_in_flight).await;
        let (result, late) = match in_time {
            Ok(result) => (result, false),
            Err(_) => {
                self.record_failure(call.partition, &"no response in time");
                let late = match on_late() {
                    AfterDeadline::Wait => time::timeout(CALL_DEADLINE, call_in_flight).await.ok(),
                    AfterDeadline::GiveUp => None,
                };
                match late {
                    Some(result) => (result, true),
                    None => return CallOutcome::Failed,
                }
            }
        };
        let now = self.clock.monotonic();
        match result {
            Ok(reply) => {
                if !late {
                    breaker.record_success(reply.at, now);
                }
                // A late response is not a promise: the epoch may already have started, and other calls may have been
                // granted tokens in the new epoch.
                if let BucketState::Initializing { wait: wait_us } = reply.state
                    && !late
                    && let wait = Duration::from_micros(wait_us)
                    && !breaker.is_open()
                    && breaker.open_for_new_epoch(asked_at.saturating_add(wait.into()), now)
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
                    CallOutcome::Late(reply)
                } else {
                    CallOutcome::InTime(reply)
                }
            }
            Err(error) => {
                if !late {
                    self.record_failure(call.partition, &error);
                }
                CallOutcome::Failed
            }
        }
    }

    fn record_failure(&self, partition: u16, error: &dyn std::fmt::Display) {
        self.metrics.counter_errors.inc();
        if self.breakers[usize::from(partition)].record_failure(self.clock.monotonic()) {
            tracing::warn!(partition, error = %error, "the shared counters are unavailable");
            self.metrics.counter_outages.inc();
            let first = first_probe(self.settings.deadline);
            self.probe_until_recovered(partition, first, CounterMicros::NONE);
        }
    }

    /// Starts probing a partition whose breaker has just opened.
    fn probe_until_recovered(&self, partition: u16, first: Duration, promised: CounterMicros) {
        self.metrics.counter_partitions_unavailable.inc();
        if let Ok(runtime) = Handle::try_current() {
            let me = Weak::clone(&self.me);
            runtime.spawn(probe_until_recovered(me, partition, first, promised));
        }
    }

    /// Returns whether other replicas may have an outage that this replica, which has just started, does not know of.
    /// Always returns `false` in a cluster: partitions may be idle, so a lack of confirmed responses does not indicate
    /// an outage. Other replicas that have just started do not matter, since they have not used their shares yet.
    pub(super) fn others_may_have_outage(&self) -> bool {
        self.breakers.len() == 1 && self.membership.others_may_act(self.clock.monotonic())
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Before the process exits, gives all tokens that are held for later back to the counters. Gives up if the counters
    /// do not respond; tokens that are not returned are unavailable until their buckets refill.
    pub(super) async fn return_leases(&self) {
        self.draining.store(true, Ordering::Release);
        let deadline = time::Instant::now() + RETURNED_WITHIN;
        let failures = AtomicU32::new(0);
        let mut busy = Vec::new();
        for keys in self.keys.by_shard() {
            let mut calls = Vec::new();
            for handle in keys {
                let mut state = handle.state.lock();
                let Some(lease) = state.existing_lease() else {
                    continue;
                };
                lease.surrender_all();
                if let (Some(terms), Some(back)) = (lease.terms(), lease.take_unspent()) {
                    calls.push(self.build_call(&handle, terms, Some(back)));
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
                        let result = time::timeout(CALL_DEADLINE, self.counters.take(call)).await;
                        matches!(result, Ok(Ok(_)))
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
        // Calls in flight return the tokens that they get, so wait for these calls.
        let patience = time::Instant::now() + CALL_DEADLINE + self.settings.deadline;
        let is_busy = |handle: &Arc<KeyHandle>| {
            let mut state = handle.state.lock();
            state.existing_lease().is_some_and(|lease| lease.is_busy())
        };
        while busy.iter().any(is_busy) && time::Instant::now() < patience {
            time::sleep(Duration::from_millis(5)).await;
        }
    }
}
