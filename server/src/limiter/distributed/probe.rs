//! Sends heartbeats to the shared counters, and probes the counters during an outage.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::time;

use super::core::{AfterDeadline, StoreCore};
use crate::{
    clock::Nanos,
    limiter::rate::counters::{BucketName, BucketState, CounterMicros, TakeCall},
};

/// The maximum interval between probes, and by how much the interval varies.
const PROBE_EVERY: Duration = Duration::from_millis(250);
const PROBE_JITTER: Duration = Duration::from_millis(50);
/// The time from the last call to the next heartbeat: after a successful call, and after a failed call. These intervals
/// are short enough that all replicas detect an outage within half a second. A call for tokens confirms the last
/// response just like a heartbeat. So a replica that renews leases, which takes a call every 90 ms with the default
/// settings, does not send heartbeats.
const HEARTBEAT_EVERY: Duration = Duration::from_millis(110);
const SUSPECT_EVERY: Duration = Duration::from_millis(50);
/// How often to check whether a heartbeat is due.
const TICK: Duration = Duration::from_millis(20);
/// The counters store a confirmation only if it is newer than the stored confirmation by more than this time.
const CONFIRMED_EVERY: Duration = Duration::from_millis(50);
/// The minimum time to wait for the response to a probe. Only a response within the deadline of normal calls ends an
/// outage. If slow counters could end an outage, every request would time out, and each recovery would empty all
/// buckets.
const PROBE_DEADLINE: Duration = Duration::from_millis(250);
/// The minimum time from a loss of state to the new epoch.
const EPOCH_DELAY: Duration = Duration::from_millis(600);
/// The counters postpone an unconfirmed start of an epoch only if they set the start at least this long ago, or at
/// least one deadline ago if that is longer.
const POSTPONED_AFTER: Duration = Duration::from_millis(50);
/// How long an unused partition of a cluster continues to get heartbeats. A single Redis server gets heartbeats even if
/// it is unused.
const IN_USE: Nanos = Nanos::from_secs(10);

/// The maximum time between the starts of two consecutive calls by a replica that gets responses.
const CALL_EVERY: Duration = HEARTBEAT_EVERY.saturating_add(TICK);

/// The delay before the first probe in an outage, if responses are instantaneous.
const FIRST_PROBE: Duration = CONFIRMED_EVERY
    .saturating_add(CALL_EVERY.saturating_mul(2))
    .saturating_add(TICK);

/// See [`StoreCore::max_detection_delay`]. The check omits response times, because they delay the second probe at least
/// as much as the detection.
const _: () = assert!(
    5 * CALL_EVERY.as_millis()
        <= FIRST_PROBE.as_millis() + PROBE_DEADLINE.as_millis() + PROBE_EVERY.as_millis()
            - PROBE_JITTER.as_millis(),
    "an idle replica must detect an outage before the second probe of the replica that detected it first"
);

/// Returns the delay before the first probe in an outage. By then, every replica that still gets responses has
/// confirmed a response that was sent after the outage began and is newer than the stored confirmation by more than
/// [`CONFIRMED_EVERY`]. One call gets this response, and the next call confirms it. Each of these calls starts within
/// [`CALL_EVERY`]. The first response may take up to `deadline`, and so may the second call.
pub(super) fn first_probe(deadline: Duration) -> Duration {
    FIRST_PROBE + 2 * deadline
}

/// Returns the time from a loss of state to the new epoch. All replicas that can reach the counters must learn of the
/// epoch before it starts. A replica that has not learned of the epoch would begin another one when it recovers, which
/// would empty all buckets again.
///
/// A replica whose call failed just before the loss detects the outage within one `deadline`. Its first probe follows
/// after [`first_probe`], and arrives within another `deadline`. A replica that is already probing waits for
/// [`PROBE_DEADLINE`] or one `deadline`, whichever is longer, and then pauses for [`PROBE_EVERY`]. Its next probe
/// arrives within another `deadline`, which must be before the epoch starts, even if the start is no longer postponed.
pub(super) fn epoch_delay(deadline: Duration) -> Duration {
    let next_probe = PROBE_DEADLINE.max(deadline) + PROBE_EVERY + deadline;
    EPOCH_DELAY
        .max(first_probe(deadline) + 2 * deadline)
        .max(next_probe + POSTPONED_AFTER.max(deadline))
}

impl StoreCore {
    /// Returns [`epoch_delay`] in microseconds.
    pub(super) fn epoch_delay(&self) -> u64 {
        Nanos::from(epoch_delay(self.settings.deadline)).0 / 1000
    }

    /// Returns the deadline of calls in microseconds.
    pub(super) fn deadline(&self) -> u64 {
        Nanos::from(self.settings.deadline).0 / 1000
    }

    /// Returns the maximum time from the moment when one replica detects an outage until all other replicas have
    /// detected the outage too, or until the outage has ended for the first replica.
    ///
    /// The first replica may detect the outage as soon as it begins, if it received its last response long before. An
    /// idle replica starts five calls, each within [`CALL_EVERY`], and opens its breaker when the fifth one fails, one
    /// deadline later. The detection comes before the first replica's second probe. So if the idle replica does not
    /// detect the outage, the outage ends before that probe, and the first replica recovers with its second probe at
    /// the latest.
    pub(super) fn max_detection_delay(&self) -> Nanos {
        let deadline = self.settings.deadline;
        let second_probe = first_probe(deadline) + PROBE_DEADLINE.max(deadline) + PROBE_EVERY;
        Nanos::from(second_probe + deadline)
    }
}

/// Returns a call that takes no tokens and does not affect any key. The call does not report an outage of this replica,
/// even if an outage begins before the call is sent. Only probes report outages, because probes are sent late enough
/// that other replicas could have confirmed a response.
fn heartbeat_call(partition: u16, inner: &StoreCore) -> TakeCall {
    let breaker = &inner.breakers[usize::from(partition)];
    TakeCall {
        partition,
        bucket: BucketName::Heartbeat,
        emission: Nanos(1),
        tau: Nanos(1),
        version: 0,
        need: 0,
        waiting: 0,
        want: 0,
        back: 0,
        back_taken_at: CounterMicros::NONE,
        back_generation: 0,
        lease: 0,
        epoch_delay: inner.epoch_delay(),
        deadline: inner.deadline(),
        last_heard: breaker.last_heard(),
        outage_since: breaker.never_heard(inner.others_may_have_outage()),
        promised: CounterMicros::NONE,
    }
}

async fn send_heartbeat(inner: Arc<StoreCore>, number: u16) {
    let breaker = &inner.breakers[usize::from(number)];
    let used_at = breaker.used_at();
    let call = heartbeat_call(number, &inner);
    inner.make_call(call, || AfterDeadline::Wait).await;
    // A heartbeat does not count as use, so the previous time of use is restored.
    breaker.record_use(used_at);
}

/// Sends heartbeats to a single Redis server, and to the partitions of a cluster that are in use, unless there has been
/// a recent call or the breaker is open. Heartbeats also confirm to the counters that this replica gets responses, so
/// that recovering replicas do not cause a new epoch.
pub(super) async fn send_heartbeats(inner: Weak<StoreCore>) {
    let mut ticks = time::interval(TICK);
    ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(inner) = inner.upgrade() else {
            return;
        };
        let now = inner.clock.monotonic();
        for (number, breaker) in (0..).zip(&inner.breakers) {
            let in_use = now.saturating_since(breaker.used_at()) < IN_USE;
            let due = breaker.is_heartbeat_due(now, HEARTBEAT_EVERY, SUSPECT_EVERY);
            if (in_use || inner.breakers.len() == 1) && due && !breaker.is_open() {
                tokio::spawn(send_heartbeat(Arc::clone(&inner), number));
            }
        }
    }
}

/// Confirms that this replica knows when the promised epoch starts. Without a confirmation, the start may be postponed.
/// The call does not report the outage: a report that arrived late would start another epoch.
fn confirm_promise(inner: Arc<StoreCore>, number: u16, promised: CounterMicros) {
    tokio::spawn(async move {
        let call = TakeCall {
            promised,
            outage_since: CounterMicros::NONE,
            ..heartbeat_call(number, &inner)
        };
        inner.metrics.counter_calls.inc();
        let _ = time::timeout(PROBE_DEADLINE, inner.counters.take(call)).await;
    });
}

/// Probes the counters until they grant tokens again.
pub(super) async fn probe_until_recovered(
    inner: Weak<StoreCore>,
    number: u16,
    first: Duration,
    promised: CounterMicros,
) {
    let (mut wait, mut promise) = (first, promised);
    if promised > CounterMicros::NONE
        && let Some(inner) = inner.upgrade()
    {
        confirm_promise(inner, number, promised);
    }
    loop {
        time::sleep(wait).await;
        let Some(inner) = inner.upgrade() else {
            return;
        };
        let breaker = &inner.breakers[usize::from(number)];
        inner.metrics.counter_calls.inc();
        // A promise is used only once. If the response to this call is late or missing, this replica continues to
        // decide without the counters.
        let promised = std::mem::take(&mut promise);
        let call = TakeCall {
            promised,
            outage_since: breaker.outage_since(inner.others_may_have_outage()),
            ..heartbeat_call(number, &inner)
        };
        let asked_at = inner.clock.monotonic();
        if promised > CounterMicros::NONE {
            breaker.end_pause_at(asked_at.saturating_add(inner.settings.deadline.into()));
        }
        let patience = PROBE_DEADLINE.max(inner.settings.deadline);
        let answer = time::timeout(patience, inner.counters.take(call)).await;
        let now = inner.clock.monotonic();
        let in_time = now.saturating_since(asked_at) <= inner.settings.deadline.into();
        // The jitter prevents all replicas from probing at the same time.
        wait = PROBE_EVERY.saturating_sub(Duration::from_nanos(
            now.0 % u64::from(PROBE_JITTER.subsec_nanos()),
        ));
        if let Ok(Ok(reply)) = answer {
            match reply.state {
                // A late response is not treated as a promise: the response to the first call in the epoch would
                // probably be late too, and this replica would have paused without any benefit. In this case, the
                // counters postpone the epoch.
                BucketState::Initializing { wait: left } if in_time => {
                    wait = Duration::from_micros(left);
                    promise = reply.at.saturating_add(left);
                    breaker.open_for_new_epoch(asked_at.saturating_add(wait.into()), now);
                    confirm_promise(Arc::clone(&inner), number, promise);
                }
                BucketState::Active { .. } if in_time => {
                    breaker.close(reply.at, now);
                    inner.metrics.counter_partitions_unavailable.dec();
                    tracing::info!(
                        partition = number,
                        "the shared counters are available again"
                    );
                    // This heartbeat confirms to the counters that this replica got a response, so that other
                    // recovering replicas do not cause a new epoch.
                    send_heartbeat(inner, number).await;
                    return;
                }
                _ => {}
            }
        }
    }
}
