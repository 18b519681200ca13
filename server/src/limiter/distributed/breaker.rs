//! The circuit breaker for a partition of the shared counters.
//!
//! The breaker decides when an outage begins, and records the latest time received from the counters. The store sends
//! the probes, and closes the breaker when one succeeds.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;

use crate::{
    clock::{Monotonic, Nanos},
    limiter::rate::counters::{CounterMicros, NEVER_HEARD},
};

/// The breaker opens after [`FAILURES`] consecutive failures if the last success was at least [`SILENCE`] ago. The
/// second condition is needed because many calls fail at the same time if the process is not scheduled for a moment,
/// even though the counters work.
const FAILURES: u32 = 5;
pub(super) const SILENCE: Duration = Duration::from_millis(200);

/// The breaker also opens if at least [`CALLS`] calls are made within [`SPAN`] and at least half of them fail, provided
/// that the span began at least [`SILENCE`] ago.
const CALLS: u32 = 20;
const SPAN: Nanos = Nanos::from_secs(1);

/// If the time in a timely response is earlier than the latest known time by more than this many microseconds, the
/// counters' clock must have been set back.
const TURNED_BACK: u64 = 1_000_000;

/// The circuit breaker for one partition.
#[derive(Debug)]
pub(super) struct CircuitBreaker {
    is_open: AtomicBool,
    /// The counters' time in the latest timely response.
    last_heard: AtomicU64,
    /// When the latest call other than a heartbeat started.
    used_at: AtomicU64,
    inner: Mutex<BreakerState>,
}

#[derive(Debug, Default)]
struct BreakerState {
    consecutive_failures: u32,
    succeeded_at: Monotonic,
    span_start: Monotonic,
    calls: u32,
    failed: u32,
    /// The arrival time of the response with the time `last_heard`.
    heard_at: Monotonic,
    /// When the latest call started.
    called_at: Monotonic,
    outage: Outage,
}

/// A period in which this replica must not allow requests from its share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pause {
    from: Monotonic,
    until: Monotonic,
}

/// A period during which the counters are unavailable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Outage {
    /// The number of the outage; 0 means that there is no outage.
    pub(super) number: u64,
    pub(super) since: Monotonic,
    /// When the outage began, on the counters' clock.
    counters_since: CounterMicros,
    /// `None` unless the counters have promised a new epoch. The pause lasts from the earliest start of that epoch
    /// until the deadline for the response to the first call in that epoch.
    pause: Option<Pause>,
}

impl Outage {
    /// Returns whether the promised epoch may have started, and this replica may be about to use the counters again.
    /// Any request that it allowed from its share now would be in addition to the requests that the counters allow.
    pub(super) fn is_paused(self, now: Monotonic) -> bool {
        self.pause
            .is_some_and(|pause| pause.from <= now && now < pause.until)
    }
}

impl CircuitBreaker {
    pub(super) fn new(now: Monotonic) -> Self {
        Self {
            is_open: AtomicBool::new(false),
            last_heard: AtomicU64::new(0),
            used_at: AtomicU64::new(now.0),
            inner: Mutex::new(BreakerState {
                succeeded_at: now,
                heard_at: now,
                called_at: now,
                ..BreakerState::default()
            }),
        }
    }

    /// Returns the current outage, if there is one.
    #[inline]
    pub(super) fn outage(&self) -> Option<Outage> {
        if !self.is_open.load(Ordering::Acquire) {
            return None;
        }
        let inner = self.inner.lock();
        self.is_open.load(Ordering::Acquire).then_some(inner.outage)
    }

    pub(super) fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Acquire)
    }

    pub(super) fn last_heard(&self) -> CounterMicros {
        CounterMicros(self.last_heard.load(Ordering::Relaxed))
    }

    /// Records the start of a call. Each call confirms to the counters that this replica has received the last
    /// response.
    pub(super) fn record_call(&self, now: Monotonic) {
        self.inner.lock().called_at = now;
    }

    /// Returns whether a heartbeat is due: no call has started for `every` or, if the last call failed, for
    /// `if_suspect`.
    pub(super) fn is_heartbeat_due(
        &self,
        now: Monotonic,
        every: Duration,
        if_suspect: Duration,
    ) -> bool {
        let inner = self.inner.lock();
        let every = if inner.consecutive_failures > 0 {
            if_suspect
        } else {
            every
        };
        now.saturating_since(inner.called_at) >= every.into()
    }

    /// Records that the partition is in use at `now`.
    pub(super) fn record_use(&self, now: Monotonic) {
        self.used_at.store(now.0, Ordering::Relaxed);
    }

    pub(super) fn used_at(&self) -> Monotonic {
        Monotonic(self.used_at.load(Ordering::Relaxed))
    }

    /// Records a timely response. `at` is when the counters sent the response, on their clock.
    pub(super) fn record_success(&self, at: CounterMicros, now: Monotonic) {
        let mut inner = self.inner.lock();
        inner.count(now, false);
        inner.consecutive_failures = 0;
        inner.succeeded_at = now;
        self.hear(&mut inner, at, now);
        if self.last_heard() > at.saturating_add(TURNED_BACK) {
            self.last_heard.store(at.0, Ordering::Relaxed);
            inner.heard_at = now;
        }
    }

    /// Records `at`, a time on the counters' clock, unless a newer response has already arrived. If an older time were
    /// recorded, a later outage would seem to have begun too early. The counters could then wrongly conclude that other
    /// replicas got responses during the outage.
    fn hear(&self, inner: &mut BreakerState, at: CounterMicros, now: Monotonic) {
        if at >= self.last_heard() {
            inner.heard_at = now;
            self.last_heard.store(at.0, Ordering::Relaxed);
        }
    }

    /// Records a call that failed or is late. Returns `true` if the failure opens the breaker; the caller must then
    /// start probing.
    pub(super) fn record_failure(&self, now: Monotonic) -> bool {
        let mut inner = self.inner.lock();
        inner.count(now, true);
        inner.consecutive_failures += 1;
        let silent = inner.consecutive_failures >= FAILURES
            && now.saturating_since(inner.succeeded_at) >= SILENCE.into();
        let poor = inner.calls >= CALLS
            && inner.failed * 2 >= inner.calls
            && now.saturating_since(inner.span_start) >= SILENCE.into();
        (silent || poor) && self.open(&mut inner, now)
    }

    /// Opens the breaker if it is closed, because the counters start a new epoch at `start` or slightly later, and
    /// grant no tokens until then. From `start` on, this replica pauses: it allows no requests from its share. Like
    /// [`record_failure`](Self::record_failure), returns `true` if the call opens the breaker.
    pub(super) fn open_for_new_epoch(&self, start: Monotonic, now: Monotonic) -> bool {
        let mut inner = self.inner.lock();
        let is_first = self.open(&mut inner, now);
        inner.outage.pause = Some(Pause {
            from: start,
            until: Monotonic(u64::MAX),
        });
        is_first
    }

    /// Ends the pause at `until`, the deadline for the response to the first call in the promised epoch. After that,
    /// this replica uses its share again.
    pub(super) fn end_pause_at(&self, until: Monotonic) {
        if let Some(pause) = &mut self.inner.lock().outage.pause {
            pause.until = until;
        }
    }

    /// Begins an outage. Returns `false` if the breaker is already open.
    fn open(&self, inner: &mut BreakerState, now: Monotonic) -> bool {
        if self.is_open.swap(true, Ordering::AcqRel) {
            return false;
        }
        let silent = now.saturating_since(inner.heard_at).0 / 1000;
        inner.outage = Outage {
            number: inner.outage.number + 1,
            since: now,
            counters_since: self
                .last_heard()
                .saturating_add(silent)
                .max(NEVER_HEARD.saturating_add(1)),
            pause: None,
        };
        true
    }

    /// Closes the breaker after a timely response. `at` is when the counters sent the response, on their clock.
    pub(super) fn close(&self, at: CounterMicros, now: Monotonic) {
        let mut inner = self.inner.lock();
        self.hear(&mut inner, at, now);
        inner.consecutive_failures = 0;
        inner.succeeded_at = now;
        inner.span_start = now;
        inner.calls = 0;
        inner.failed = 0;
        self.is_open.store(false, Ordering::Release);
    }

    /// Returns [`NEVER_HEARD`] if this replica has never received a response and `others_may_have_outage` is set, which
    /// means that other replicas may have an outage that this replica does not know of. Otherwise, returns zero.
    pub(super) fn never_heard(&self, others_may_have_outage: bool) -> CounterMicros {
        if others_may_have_outage && self.last_heard() == CounterMicros::NONE {
            NEVER_HEARD
        } else {
            CounterMicros::NONE
        }
    }

    /// Returns when the outage began, on the counters' clock. Without an outage, returns the same as
    /// [`never_heard`](Self::never_heard).
    pub(super) fn outage_since(&self, others_may_have_outage: bool) -> CounterMicros {
        let inner = self.inner.lock();
        if !self.is_open.load(Ordering::Acquire) {
            return self.never_heard(others_may_have_outage);
        }
        inner.outage.counters_since
    }
}

impl BreakerState {
    fn count(&mut self, now: Monotonic, failed: bool) {
        if now.saturating_since(self.span_start) >= SPAN {
            self.span_start = now;
            self.calls = 0;
            self.failed = 0;
        }
        self.calls += 1;
        self.failed += u32::from(failed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Monotonic {
        Monotonic(Nanos::from_millis(millis).0)
    }

    #[test]
    fn many_simultaneous_failures_are_a_local_pause() {
        let breaker = CircuitBreaker::new(ms(0));
        for _ in 0..FAILURES + 2 {
            assert!(!breaker.record_failure(ms(100)));
        }
        assert!(breaker.outage().is_none());
        assert!(breaker.record_failure(ms(300)));
        assert!(
            !breaker.record_failure(ms(301)),
            "the breaker opens only once"
        );
        let outage = breaker.outage().unwrap();
        assert_eq!((outage.number, outage.since), (1, ms(300)));
        breaker.close(CounterMicros(1), ms(400));
        assert!(breaker.outage().is_none());
        assert!(!breaker.record_failure(ms(700)));
    }

    #[test]
    fn occasional_success_does_not_keep_it_closed() {
        let breaker = CircuitBreaker::new(ms(0));
        let mut opened = false;
        for call in 0..CALLS {
            if call % 2 == 0 {
                breaker.record_success(CounterMicros(1), ms(u64::from(call) * 20));
            } else {
                opened |= breaker.record_failure(ms(u64::from(call) * 20));
            }
        }
        assert!(opened);
    }

    #[test]
    fn late_response_does_not_turn_time_back() {
        let breaker = CircuitBreaker::new(ms(0));
        breaker.record_success(CounterMicros(5_000_000), ms(100));
        breaker.record_success(CounterMicros(4_700_000), ms(120));
        assert_eq!(breaker.last_heard(), CounterMicros(5_000_000));
        for call in 0..u64::from(FAILURES) {
            breaker.record_failure(ms(200 + call * 50));
        }
        assert_eq!(
            breaker.outage_since(true),
            CounterMicros(5_000_000 + 300_000)
        );
        breaker.close(CounterMicros(900_000), ms(500));
        breaker.record_success(CounterMicros(1_000_000), ms(600));
        assert_eq!(
            breaker.last_heard(),
            CounterMicros(1_000_000),
            "the clock was set back"
        );
    }

    #[test]
    fn outage_is_reported_in_the_counters_time() {
        let breaker = CircuitBreaker::new(ms(0));
        assert_eq!(breaker.outage_since(false), CounterMicros(0));
        assert_eq!(breaker.outage_since(true), NEVER_HEARD);
        breaker.record_success(CounterMicros(5_000_000), ms(100));
        assert_eq!(breaker.outage_since(true), CounterMicros(0));
        for call in 0..u64::from(FAILURES) {
            breaker.record_failure(ms(200 + call * 50));
        }
        assert_eq!(
            breaker.outage_since(true),
            CounterMicros(5_000_000 + 300_000)
        );
        assert!(!breaker.open_for_new_epoch(ms(900), ms(600)));
        assert_eq!(
            breaker.outage_since(true),
            CounterMicros(5_000_000 + 300_000)
        );
    }

    #[test]
    fn nothing_is_allowed_while_the_response_in_a_promised_epoch_is_pending() {
        let breaker = CircuitBreaker::new(ms(0));
        assert!(breaker.open_for_new_epoch(ms(600), ms(10)));
        let is_paused = |millis| breaker.outage().unwrap().is_paused(ms(millis));
        assert!(!is_paused(599) && is_paused(600) && is_paused(5000));
        breaker.end_pause_at(ms(630));
        assert!(is_paused(629) && !is_paused(630));
    }
}
