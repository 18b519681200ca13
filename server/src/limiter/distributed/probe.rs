//! Counters that are watched without a request: those in use for a sign of life, those that are away for their
//! return.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::time;

use super::{StoreCore, breaker::SILENCE, nanos};
use crate::limiter::rate::counters::{BucketName, BucketState, CounterMicros, TakeCall};

/// How often counters that are away are probed.
pub(super) const PROBE_EVERY: Duration = Duration::from_millis(250);
/// After how long without an answer counters are asked whether they are there; and how often when a call has failed,
/// so that all replicas give them up within the same half second.
const HEARTBEAT_EVERY: Duration = Duration::from_millis(250);
const SUSPECT_EVERY: Duration = Duration::from_millis(50);
/// How long the answer to a probe is waited for, at least. Only one as quick as a request needs it has the counters
/// come back: with slow ones every request would wait in vain, and each return would empty all buckets.
const PROBE_DEADLINE: Duration = Duration::from_millis(250);
/// Nanoseconds for which an unused partition is still asked.
const IN_USE: u64 = 10_000_000_000;

impl StoreCore {
    /// Nanoseconds after which all other replicas have noticed an outage that one has noticed, or the one has returned.
    ///
    /// A replica that is asked for nothing makes its next call after [`HEARTBEAT_EVERY`] and gives up at the fifth failure,
    /// four times [`SUSPECT_EVERY`] later. An outage that ends just before is over for the first replica with its next
    /// probe. Each of these calls may take a deadline, and whoever gives up first has waited for one too.
    pub(super) fn noticed_by_all(&self) -> u64 {
        let until_noticed = HEARTBEAT_EVERY + 4 * SUSPECT_EVERY + PROBE_EVERY;
        nanos(until_noticed.saturating_sub(SILENCE) + 4 * self.settings.deadline)
    }
}

/// A call that takes nothing and concerns nobody.
fn heartbeat_call(partition: u16, inner: &StoreCore) -> TakeCall {
    let of = &inner.partitions[usize::from(partition)];
    TakeCall {
        partition,
        bucket: BucketName::Heartbeat,
        emission: 1,
        tau: 1,
        version: 0,
        need: 0,
        waiting: 0,
        want: 0,
        back: 0,
        back_taken_at: 0,
        back_generation: 0,
        lease: 0,
        last_heard: of.last_heard(),
        away_since: of.away_since(inner.is_alone()),
        promised: 0,
    }
}

async fn send_heartbeat(inner: Arc<StoreCore>, number: u16) {
    let partition = &inner.partitions[usize::from(number)];
    let used_at = partition.used_at();
    inner.ask(heartbeat_call(number, &inner)).await;
    // A beat is no use.
    partition.used(used_at);
}

/// Asks the counters in use whether they are there, where no request has found out lately; and so that others who
/// return see that somebody was answered.
pub(super) async fn send_heartbeats(inner: Weak<StoreCore>) {
    let mut ticks = time::interval(SUSPECT_EVERY);
    ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(inner) = inner.upgrade() else {
            return;
        };
        let now = inner.clock.monotonic();
        for (number, partition) in (0..).zip(&inner.partitions) {
            let in_use = now.saturating_sub(partition.used_at()) < IN_USE;
            let due = partition.is_suspect()
                || now.saturating_sub(partition.heartbeat_sent_at()) >= nanos(HEARTBEAT_EVERY);
            if (in_use || inner.partitions.len() == 1) && due && !partition.is_away() {
                partition.heartbeat_sent(now);
                tokio::spawn(send_heartbeat(Arc::clone(&inner), number));
            }
        }
    }
}

/// Probes counters that are away until they grant again.
pub(super) async fn probe_until_recovered(
    inner: Weak<StoreCore>,
    number: u16,
    first: Duration,
    promised: CounterMicros,
) {
    let (mut wait, mut promise) = (first, promised);
    loop {
        time::sleep(wait).await;
        let Some(inner) = inner.upgrade() else {
            return;
        };
        let partition = &inner.partitions[usize::from(number)];
        inner.metrics.counter_calls.inc();
        // A promise is for one moment: an answer that comes too late, or never, has this replica serve on.
        let promised = std::mem::take(&mut promise);
        let call = TakeCall {
            promised,
            ..heartbeat_call(number, &inner)
        };
        let asked_at = inner.clock.monotonic();
        if promised > 0 {
            partition.paused_until(asked_at + nanos(inner.settings.deadline));
        }
        let patience = PROBE_DEADLINE.max(inner.settings.deadline);
        let answer = time::timeout(patience, inner.counters.take(call)).await;
        let now = inner.clock.monotonic();
        let in_time = now - asked_at <= nanos(inner.settings.deadline);
        // Not all at once.
        wait = PROBE_EVERY.saturating_sub(Duration::from_nanos(now % 50_000_000));
        if let Ok(Ok(reply)) = answer {
            match reply.state {
                BucketState::Initializing { wait: left } => {
                    wait = Duration::from_micros(left);
                    promise = reply.at + left;
                    partition.is_initializing(asked_at + left * 1000, now);
                }
                BucketState::Active { .. } if in_time => {
                    partition.returned(reply.at, now);
                    inner.metrics.counters_away.dec();
                    tracing::info!(partition = number, "the shared counters are back");
                    // Others that return see at once that this replica is answered.
                    send_heartbeat(inner, number).await;
                    return;
                }
                BucketState::Active { .. } => {}
            }
        }
    }
}
