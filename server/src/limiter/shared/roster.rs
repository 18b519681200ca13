//! How many replicas there are, and which of them this one is.
//!
//! Owns the last count that was confirmed and how long it may be believed. Knows not who counts: a job does,
//! in PostgreSQL, so that the count outlives the counters that it is needed without. When the count cannot be
//! confirmed, this replica has no share after [`BELIEVED`], which is before the others stop counting it.

use std::{
    num::NonZeroU64,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;

/// How long a count is believed.
pub const BELIEVED: Duration = Duration::from_secs(7);
/// After how long without a sign the others count a replica no more. Longer than it believes itself counted.
pub const FORGOTTEN: Duration = Duration::from_secs(10);
/// How long a replica is counted before it takes a share: until all others must have counted it.
pub const SETTLED: Duration = Duration::from_secs(3);
/// How often replicas are counted.
pub const COUNTED_EVERY: Duration = Duration::from_secs(1);

/// The most replicas a quota's blocks are cut for.
const SHARERS_MAX: u64 = 1000;

/// This replica's place among all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// From zero.
    pub rank: u64,
    pub of: NonZeroU64,
}

#[derive(Debug, Clone, Copy)]
struct Counted {
    place: Place,
    /// By the monotonic clock: when it was first counted, when this place became its own, when it was last
    /// confirmed.
    joined: u64,
    since: u64,
    confirmed: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Roster {
    counted: Mutex<Option<Counted>>,
    sharers: AtomicU64,
}

impl Default for Roster {
    fn default() -> Self {
        Self {
            counted: Mutex::new(None),
            sharers: AtomicU64::new(1),
        }
    }
}

impl Roster {
    /// A count that began at `now` found this replica at `place`.
    pub fn confirm(&self, place: Place, now: u64) {
        let mut counted = self.counted.lock();
        *counted = Some(match *counted {
            // Not counted for longer than that, it was forgotten meanwhile, and joins anew.
            Some(before) if now.saturating_sub(before.confirmed) < nanos(BELIEVED) => Counted {
                since: if before.place == place {
                    before.since
                } else {
                    now
                },
                place,
                confirmed: now,
                ..before
            },
            _ => Counted {
                place,
                joined: now,
                since: now,
                confirmed: now,
            },
        });
        self.sharers
            .store(place.of.get().min(SHARERS_MAX), Ordering::Relaxed);
    }

    /// How many replicas were counted last. At least 1.
    #[inline]
    pub fn sharers(&self) -> u64 {
        self.sharers.load(Ordering::Relaxed)
    }

    /// This replica's place and since when it has it; `None` while it may not act on one.
    pub(super) fn place(&self, now: u64) -> Option<(Place, u64)> {
        let counted = (*self.counted.lock())?;
        let settled = now.saturating_sub(counted.joined) >= nanos(SETTLED);
        let believed = now.saturating_sub(counted.confirmed) < nanos(BELIEVED);
        (settled && believed).then_some((counted.place, counted.since))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn place(rank: u64, of: u64) -> Place {
        Place {
            rank,
            of: NonZeroU64::new(of).unwrap(),
        }
    }

    #[test]
    fn a_place_is_acted_on_when_settled_and_while_confirmed() {
        let roster = Roster::default();
        assert_eq!(roster.sharers(), 1);
        assert_eq!(roster.place(0), None);
        roster.confirm(place(1, 2), SECOND);
        assert_eq!(roster.sharers(), 2);
        assert_eq!(
            roster.place(2 * SECOND),
            None,
            "the others may not know yet"
        );
        for second in 2..6 {
            roster.confirm(place(1, 2), second * SECOND);
        }
        assert_eq!(roster.place(5 * SECOND), Some((place(1, 2), SECOND)));
        assert!(roster.place(11 * SECOND).is_some());
        assert_eq!(roster.place(12 * SECOND), None, "nobody confirms it");
        // Back after so long, it settles anew.
        roster.confirm(place(1, 2), 13 * SECOND);
        assert_eq!(roster.place(14 * SECOND), None);
        assert!(roster.place(16 * SECOND).is_some());
    }

    #[test]
    fn another_place_is_held_since_it_was_given() {
        let roster = Roster::default();
        for second in 0..10 {
            roster.confirm(place(1, 3), second * SECOND);
        }
        roster.confirm(place(0, 2), 10 * SECOND);
        assert_eq!(roster.place(10 * SECOND), Some((place(0, 2), 10 * SECOND)));
    }
}
