//! The number of replicas, and this replica's slot among them.
//!
//! A job counts the replicas by their rows in PostgreSQL, so that a count is available when the shared counters are
//! not. This module keeps the last count and decides how long to trust it.
//!
//! **The shares of all replicas together never exceed the limit**, although each replica uses its own count, which may
//! be outdated. A replica uses a count for only [`BELIEVED`] after the count began, and only if the replica itself has
//! been counted for [`SETTLED`], which is longer. So every count in use includes every replica that takes a share: the
//! count is at least the number of these replicas, and a replica's rank is at least its position among them. A replica
//! that stops is still counted for [`FORGOTTEN`], which is longer than it can continue to take a share.

use std::{
    num::NonZeroU64,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;

use crate::clock::Monotonic;

/// How long a count is trusted.
pub const BELIEVED: Duration = Duration::from_secs(7);
/// How long a replica is counted after its last heartbeat. Must exceed [`BELIEVED`], so that a replica that can no
/// longer send heartbeats is counted as long as it may take a share.
pub const FORGOTTEN: Duration = Duration::from_secs(10);
/// How long a replica is remembered after its last heartbeat. Replicas that are starting take a remembered replica into
/// account, because its share may have allowed requests during an outage of the shared counters.
pub const REMEMBERED: Duration = Duration::from_secs(60);
/// How long a replica must have been counted before it takes a share. By then, no replica trusts a count that does not
/// include the new replica.
pub const SETTLED: Duration = Duration::from_secs(8);
/// How often replicas are counted.
pub const COUNTED_EVERY: Duration = Duration::from_secs(1);

const _: () = assert!(
    BELIEVED.as_millis() < SETTLED.as_millis() && BELIEVED.as_millis() < FORGOTTEN.as_millis(),
    "a replica that is not counted by all others must not take a share"
);

/// Blocks are sized for at most this many replicas.
const REPLICAS_MAX: u64 = 1000;

/// A replica's position among all replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicaSlot {
    /// The rank, starting at zero.
    pub rank: u64,
    pub of: NonZeroU64,
}

#[derive(Debug, Clone, Copy)]
struct Counted {
    slot: ReplicaSlot,
    /// Monotonic times: `joined` is the end of the first count that included this replica, `since` is the end of the
    /// first count with this slot, and `confirmed` is the start of the latest count.
    joined: Monotonic,
    since: Monotonic,
    confirmed: Monotonic,
}

/// The last count of replicas. See the module documentation.
#[derive(Debug)]
pub struct Membership {
    counted: Mutex<Option<Counted>>,
    replica_count: AtomicU64,
    /// Before this monotonic time, no other replica has been counted for long enough to take a share. 0 if unknown.
    others_settle_at: AtomicU64,
}

impl Default for Membership {
    fn default() -> Self {
        Self {
            counted: Mutex::new(None),
            replica_count: AtomicU64::new(1),
            others_settle_at: AtomicU64::new(0),
        }
    }
}

impl Membership {
    /// Records that a count at `now` placed this replica in `slot`.
    pub fn confirm(&self, slot: ReplicaSlot, now: Monotonic) {
        self.confirm_count(slot, now, now);
    }

    /// Records a count that placed this replica in `slot`, and when the count began and ended.
    ///
    /// The count's age is measured from its start. The count takes effect at its end: until then, this replica uses the
    /// previous count, and other replicas may not have counted this replica yet.
    pub fn confirm_count(&self, slot: ReplicaSlot, began: Monotonic, ended: Monotonic) {
        let mut counted = self.counted.lock();
        *counted = Some(match *counted {
            Some(before) if ended.saturating_since(before.confirmed) < BELIEVED.into() => Counted {
                since: if before.slot == slot {
                    before.since
                } else {
                    ended
                },
                slot,
                confirmed: began,
                ..before
            },
            // This is the first count, or the first count after other replicas may have stopped counting this replica.
            _ => Counted {
                slot,
                joined: ended,
                since: ended,
                confirmed: began,
            },
        });
        self.replica_count
            .store(slot.of.get().min(REPLICAS_MAX), Ordering::Relaxed);
    }

    /// Returns the number of replicas in the last count, limited to a range from 1 to `REPLICAS_MAX`. Before the first
    /// count, returns 1.
    #[inline]
    pub fn replica_count(&self) -> u64 {
        self.replica_count.load(Ordering::Relaxed)
    }

    /// Records that at some time after `asked`, the oldest other replica had been counted for `age`. `None` means that
    /// there are no other replicas.
    pub fn note_oldest_other(&self, age: Option<Duration>, asked: Monotonic) {
        let settles_at = match age {
            Some(age) => asked.saturating_add(SETTLED.saturating_sub(age).into()),
            None => asked.saturating_add(SETTLED.into()),
        };
        // 0 would mean that the time is unknown.
        let settles_at = settles_at.0.max(1);
        self.others_settle_at.store(settles_at, Ordering::Relaxed);
    }

    /// Returns whether another replica may be taking a share at `now`, or may have taken one recently. Before the first
    /// count, returns `true`.
    pub(super) fn others_may_act(&self, now: Monotonic) -> bool {
        match self.others_settle_at.load(Ordering::Relaxed) {
            0 => self.counted.lock().is_none_or(|it| it.slot.of.get() > 1),
            settles_at => now.0 >= settles_at,
        }
    }

    /// Returns this replica's slot and the time at which it got that slot. `None` while the replica must not take a
    /// share.
    pub(super) fn slot(&self, now: Monotonic) -> Option<(ReplicaSlot, Monotonic)> {
        let counted = (*self.counted.lock())?;
        let settled = now.saturating_since(counted.joined) >= SETTLED.into();
        let believed = now.saturating_since(counted.confirmed) < BELIEVED.into();
        (settled && believed).then_some((counted.slot, counted.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Nanos;

    const SECOND: u64 = 1_000_000_000;

    fn at(nanos: u64) -> Monotonic {
        Monotonic(nanos)
    }

    fn slot(rank: u64, of: u64) -> ReplicaSlot {
        ReplicaSlot {
            rank,
            of: NonZeroU64::new(of).unwrap(),
        }
    }

    #[test]
    fn slot_is_used_when_settled_and_while_confirmed() {
        let membership = Membership::default();
        assert_eq!(membership.replica_count(), 1);
        assert_eq!(membership.slot(at(0)), None);
        for second in 1..9 {
            membership.confirm(slot(1, 2), at(second * SECOND));
            assert_eq!(
                membership.slot(at(second * SECOND)),
                None,
                "other replicas may not have counted this replica yet"
            );
        }
        assert_eq!(membership.replica_count(), 2);
        membership.confirm(slot(1, 2), at(9 * SECOND));
        assert_eq!(
            membership.slot(at(9 * SECOND)),
            Some((slot(1, 2), at(SECOND)))
        );
        assert!(membership.slot(at(15 * SECOND)).is_some());
        assert_eq!(
            membership.slot(at(16 * SECOND)),
            None,
            "the slot is no longer confirmed"
        );
        // After this gap, the replica must settle again.
        for second in 17..25 {
            membership.confirm(slot(1, 2), at(second * SECOND));
            assert_eq!(membership.slot(at(second * SECOND)), None);
        }
        membership.confirm(slot(1, 2), at(25 * SECOND));
        assert!(membership.slot(at(25 * SECOND)).is_some());
    }

    #[test]
    fn new_slot_counts_from_the_end_of_its_count() {
        let membership = Membership::default();
        for second in 0..10 {
            membership.confirm(slot(1, 3), at(second * SECOND));
        }
        membership.confirm_count(slot(0, 2), at(10 * SECOND), at(11 * SECOND));
        assert_eq!(
            membership.slot(at(11 * SECOND)),
            Some((slot(0, 2), at(11 * SECOND)))
        );
        assert!(membership.slot(at(17 * SECOND - 1)).is_some());
        assert_eq!(
            membership.slot(at(17 * SECOND)),
            None,
            "the age of a count is measured from its start"
        );
    }

    #[test]
    fn others_act_once_the_oldest_has_been_counted_for_long() {
        let membership = Membership::default();
        assert!(
            membership.others_may_act(at(0)),
            "the replicas have not been counted yet"
        );
        membership.confirm(slot(0, 1), at(SECOND / 2));
        assert!(
            !membership.others_may_act(at(SECOND / 2)),
            "there is no other replica"
        );
        membership.confirm(slot(1, 2), at(SECOND));
        assert!(
            membership.others_may_act(at(SECOND)),
            "the age of the other replica is unknown"
        );
        membership.note_oldest_other(Some(Duration::from_secs(3)), at(SECOND));
        assert!(!membership.others_may_act(at(6 * SECOND - 1)));
        assert!(membership.others_may_act(at(6 * SECOND)));
        membership.note_oldest_other(Some(Duration::from_secs(60)), at(2 * SECOND));
        assert!(membership.others_may_act(at(2 * SECOND)));
        membership.confirm(slot(0, 1), at(3 * SECOND));
        assert!(
            membership.others_may_act(at(3 * SECOND)),
            "the other replica has stopped, but its share may have admitted requests"
        );
        membership.note_oldest_other(None, at(4 * SECOND));
        assert!(!membership.others_may_act(at(5 * SECOND)));
    }

    /// Replicas start, stop, lose their connection to PostgreSQL, and get slow responses. The replicas count each other
    /// as they would in the database, and the test continuously checks the sum of their shares of a burst.
    #[test]
    fn shares_of_all_replicas_never_exceed_the_whole() {
        const TICK: u64 = SECOND / 10;
        struct Replica {
            id: u32,
            membership: Membership,
            seen: Option<u64>,
            next_count: u64,
            /// A count in progress: its beginning, its end and its result.
            counting: Option<(u64, u64, ReplicaSlot)>,
            cut_until: u64,
            stops: u64,
        }
        let (mut acted, mut together) = (0, 0);
        for seed in 0..300 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let burst = rng.u64(1..20);
            let mut replicas: Vec<Replica> = Vec::new();
            let mut ids: Vec<u32> = (0..200).collect();
            rng.shuffle(&mut ids);
            for now in (0..60 * SECOND).step_by(usize::try_from(TICK).unwrap()) {
                if replicas.is_empty() || (replicas.len() < 5 && rng.u8(..100) < 2) {
                    replicas.push(Replica {
                        id: ids.pop().unwrap(),
                        membership: Membership::default(),
                        seen: None,
                        next_count: now,
                        counting: None,
                        cut_until: 0,
                        stops: now + rng.u64(5..60) * SECOND,
                    });
                }
                for i in 0..replicas.len() {
                    if rng.u16(..1000) < 4 {
                        replicas[i].cut_until = now + rng.u64(1..20) * SECOND;
                    }
                    if let Some((began, ended, slot)) = replicas[i].counting
                        && ended <= now
                    {
                        replicas[i]
                            .membership
                            .confirm_count(slot, at(began), at(now));
                        replicas[i].counting = None;
                        replicas[i].next_count = began + SECOND;
                    }
                    let it = &replicas[i];
                    if it.counting.is_none() && it.next_count <= now && it.cut_until <= now {
                        let id = it.id;
                        replicas[i].seen = Some(now);
                        let is_counted = |it: &&Replica| {
                            it.seen
                                .is_some_and(|seen| Nanos(now - seen) < FORGOTTEN.into())
                        };
                        let counted: Vec<_> = replicas.iter().filter(is_counted).collect();
                        let slot = slot(
                            counted.iter().filter(|it| it.id < id).count() as u64,
                            counted.len() as u64,
                        );
                        let takes = rng.u64(..3) * rng.u64(..8) * TICK;
                        replicas[i].counting = Some((now, now + takes, slot));
                    }
                }
                // A replica that stops abandons a count in progress.
                replicas.retain(|it| it.stops > now);
                let acting: Vec<ReplicaSlot> = replicas
                    .iter()
                    .filter_map(|it| it.membership.slot(at(now)).map(|(slot, _)| slot))
                    .collect();
                let share = |slot: &ReplicaSlot| {
                    burst / slot.of.get() + u64::from(slot.rank < burst % slot.of.get())
                };
                let sum: u64 = acting.iter().map(share).sum();
                assert!(sum <= burst, "seed {seed}: {acting:?} of {burst}");
                acted += u64::from(!acting.is_empty());
                together += u64::from(acting.len() > 1 && sum == burst);
            }
        }
        assert!(acted > 10_000 && together > 10_000, "{acted}, {together}");
    }
}
