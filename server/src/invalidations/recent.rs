//! The recent changes that this replica knows of. They determine whether a copy of a record, which another replica has
//! read from PostgreSQL earlier, is still current.
//!
//! Changes are numbered in commit order. A copy contains the highest number that had been assigned when the copy was
//! read. Therefore, only changes with higher numbers can make the copy outdated.
//!
//! There are two sources of changes, with different levels of trust:
//! - **Polled** changes come from PostgreSQL, in order and without gaps. Only polled changes raise the numbers `floor`
//!   and `up_to`, between which all changes are known.
//! - **Announced** changes are messages from other replicas, and this replica's own commits. The only benefit of
//!   announcements is that they arrive earlier. Until the poll has caught up, an announcement makes older copies
//!   outdated. An announcement never causes the poll to skip a number, raises the floor, or displaces a polled change.
//!
//! A copy with a number below the floor is never confirmed, because this replica may not know of all later changes. A
//! copy with a number higher than all polled and announced changes is not confirmed either, because this replica does
//! not know of a change with that number.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use parking_lot::Mutex;
use uuid::Uuid;

use crate::repo::invalidation::{Invalidation, Target};

/// The maximum number of polled changes in memory. Each takes about 150 bytes.
const REMEMBERED: usize = 20_000;
/// The maximum number of announced changes in memory that the poll has not reached. Further announcements are not
/// stored, because the poll will find these changes.
const ANNOUNCED: usize = 4096;

/// The recent changes that this replica knows of. See the module documentation.
#[derive(Debug, Default)]
pub struct Recent(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// `None` before the first poll. Until then, no copy can be confirmed.
    range: Option<PolledRange>,
    /// Identifies the database history in which the numbers were assigned. A restore or failover begins another
    /// history.
    history: Option<Arc<str>>,
    polled: BTreeMap<i64, Uuid>,
    /// Announced changes with numbers above `range.up_to`.
    announced: BTreeMap<i64, Uuid>,
    /// For each ID, the highest number of its changes in either map. IDs are unique across all kinds of resources.
    newest: HashMap<Uuid, i64>,
}

#[derive(Debug, Clone, Copy)]
struct PolledRange {
    /// All changes with numbers above this number, up to `up_to`, are known.
    floor: i64,
    /// All changes with numbers above `floor`, up to this number, are known.
    up_to: i64,
}

/// Returns the ID of the changed resource. If the kind is unknown to this version, returns the tenant's ID.
fn subject(invalidation: &Invalidation) -> Uuid {
    match invalidation.target {
        None | Some(Target::Tenant) => invalidation.tenant,
        Some(
            Target::Plan(id) | Target::ApiKey(id) | Target::ServiceToken(id) | Target::Session(id),
        ) => id,
    }
}

impl Recent {
    /// Records the first poll: the newest changes that PostgreSQL has, in ascending order. Older changes may have been
    /// deleted, so the floor is just below the first change in `newest`.
    pub fn begin(&self, newest: &[Invalidation], history: &str) {
        let mut state = self.0.lock();
        state.history = Some(history.into());
        let floor = newest.first().map_or(0, |first| first.seq - 1);
        state.range.get_or_insert(PolledRange {
            floor,
            up_to: floor,
        });
        drop(state);
        for invalidation in newest {
            self.polled(invalidation);
        }
    }

    /// Starts over after PostgreSQL was restored to an earlier state or failed over. `newest` contains the newest
    /// changes in that state, in ascending order. Numbers may be assigned a second time, so no copy is confirmed until
    /// the database has passed the highest known number.
    pub fn restart(&self, newest: &[Invalidation], history: &str) {
        let mut state = self.0.lock();
        let announced = state.announced.last_key_value().map(|(seq, _)| *seq);
        let floor = state.range.map_or(0, |range| {
            range.floor.max(announced.unwrap_or(0).max(range.up_to) + 1)
        });
        *state = State {
            range: Some(PolledRange {
                floor,
                up_to: newest.first().map_or(0, |first| first.seq - 1),
            }),
            history: Some(history.into()),
            ..State::default()
        };
        drop(state);
        for invalidation in newest {
            self.polled(invalidation);
        }
    }

    /// Returns the database history as of the last poll.
    pub fn history(&self) -> Option<Arc<str>> {
        self.0.lock().history.clone()
    }

    /// Records a polled change. Must be called for changes in ascending order. Returns whether the change is new.
    pub fn polled(&self, invalidation: &Invalidation) -> bool {
        let (seq, id) = (invalidation.seq, subject(invalidation));
        let mut state = self.0.lock();
        let state = &mut *state;
        let Some(range) = &mut state.range else {
            return true;
        };
        if seq <= range.up_to {
            return false;
        }
        range.up_to = seq;
        state.polled.insert(seq, id);
        let newest = state.newest.entry(id).or_default();
        *newest = seq.max(*newest);
        while state.polled.len() > REMEMBERED
            && let Some((seq, id)) = state.polled.pop_first()
        {
            range.floor = range.floor.max(seq);
            if state.newest.get(&id) == Some(&seq) {
                state.newest.remove(&id);
            }
        }
        let later = state.announced.split_off(&(seq + 1));
        let reached = std::mem::replace(&mut state.announced, later);
        let mut is_new = true;
        for (announced, id) in reached {
            is_new &= announced != seq;
            // Discards announcements that PostgreSQL does not confirm, such as those from before a restore.
            if !state.polled.contains_key(&announced) && state.newest.get(&id) == Some(&announced) {
                state.recount(id);
            }
        }
        is_new
    }

    /// Records an announced change. Returns whether the change is new. A change that was already polled, or is already
    /// stored as announced, is not new, so a replayed message has no effect.
    pub fn announced(&self, invalidation: &Invalidation) -> bool {
        let (seq, id) = (invalidation.seq, subject(invalidation));
        let mut state = self.0.lock();
        let state = &mut *state;
        if state.range.is_some_and(|range| seq <= range.up_to) || state.announced.contains_key(&seq)
        {
            return false;
        }
        if state.announced.len() < ANNOUNCED {
            state.announced.insert(seq, id);
            let newest = state.newest.entry(id).or_default();
            *newest = seq.max(*newest);
        }
        true
    }

    /// Returns whether a copy with the number `as_of` is known to be current: none of these IDs has a change with a
    /// higher number.
    pub fn unchanged(&self, ids: &[Uuid], as_of: i64) -> bool {
        let state = self.0.lock();
        let Some(range) = state.range else {
            return false;
        };
        let highest = state
            .announced
            .last_key_value()
            .map_or(range.up_to, |(seq, _)| *seq);
        (range.floor..=highest).contains(&as_of)
            && ids
                .iter()
                .all(|id| state.newest.get(id).is_none_or(|seq| *seq <= as_of))
    }
}

impl State {
    /// Recalculates the highest number of an ID. The search is slow, but rarely needed.
    fn recount(&mut self, id: Uuid) {
        let of = |all: &BTreeMap<i64, Uuid>| {
            let mut numbers = all.iter().rev();
            numbers.find(|(_, it)| **it == id).map(|(seq, _)| *seq)
        };
        match of(&self.announced).or_else(|| of(&self.polled)) {
            Some(seq) => self.newest.insert(id, seq),
            None => self.newest.remove(&id),
        };
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn invalidation(seq: i64, target: Target) -> Invalidation {
        Invalidation {
            seq,
            tenant: Uuid::from_u128(1),
            target: Some(target),
            at: DateTime::UNIX_EPOCH,
        }
    }

    fn key(n: u128) -> Uuid {
        Uuid::from_u128(1000 + n)
    }

    fn of_key(seq: i64, n: u128) -> Invalidation {
        invalidation(seq, Target::ApiKey(key(n)))
    }

    #[test]
    fn copy_is_current_until_something_in_it_changes() {
        let recent = Recent::default();
        let (tenant, plan, key) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        let all = [tenant, plan, key];
        assert!(!recent.unchanged(&all, 100), "nothing is known yet");
        recent.begin(&[of_key(4, 0)], "history");
        assert!(recent.unchanged(&all, 4));
        assert!(recent.unchanged(&all, 3));
        assert!(!recent.unchanged(&all, 2), "below the floor");
        assert!(!recent.unchanged(&all, 5), "not assigned yet");
        for (seq, target) in [
            (5, Target::Tenant),
            (6, Target::Plan(plan)),
            (7, Target::ApiKey(key)),
        ] {
            assert!(recent.unchanged(&all, seq - 1));
            assert!(recent.polled(&invalidation(seq, target)));
            assert!(
                !recent.polled(&invalidation(seq, target)),
                "the change was already polled"
            );
            assert!(!recent.unchanged(&all, seq - 1));
            assert!(recent.unchanged(&all, seq));
        }
        recent.polled(&of_key(8, 9));
        assert!(
            recent.unchanged(&all, 7),
            "the change affects another resource"
        );
    }

    #[test]
    fn announcement_counts_until_the_poll_confirms_it() {
        let recent = Recent::default();
        recent.begin(&[], "history");
        assert!(recent.announced(&of_key(2, 1)));
        assert!(
            !recent.announced(&of_key(2, 1)),
            "the change was already announced"
        );
        assert!(!recent.unchanged(&[key(1)], 1));
        assert!(recent.unchanged(&[key(1)], 2), "read after the change");
        assert!(recent.unchanged(&[key(2)], 1));
        assert!(!recent.unchanged(&[key(2)], 3), "3 was never announced");
        // This change has a lower number than the change that was announced before.
        assert!(recent.announced(&of_key(1, 2)));
        assert!(!recent.unchanged(&[key(2)], 0));
        assert!(!recent.polled(&of_key(1, 2)) && !recent.polled(&of_key(2, 1)));
        assert!(
            !recent.announced(&of_key(2, 1)),
            "the change was already polled, so it is not new"
        );
        assert!(!recent.unchanged(&[key(1)], 1));
        assert!(recent.unchanged(&[key(1)], 2));
    }

    /// An attacker who can announce future numbers must not be able to hide the actual changes with these numbers.
    #[test]
    fn announcement_neither_hides_a_number_from_the_poll_nor_raises_the_floor() {
        let recent = Recent::default();
        recent.begin(&[of_key(1, 0)], "history");
        for seq in 2..=i64::try_from(3 * ANNOUNCED).unwrap() {
            recent.announced(&of_key(seq, 77));
        }
        assert!(recent.unchanged(&[key(1)], 1), "the floor has not moved");
        recent.polled(&of_key(2, 1));
        assert!(!recent.unchanged(&[key(1)], 1));
        assert!(recent.unchanged(&[key(1)], 2));
    }

    #[test]
    fn announcement_that_postgres_does_not_confirm_ends_with_the_poll() {
        let recent = Recent::default();
        recent.begin(&[of_key(1, 5)], "history");
        recent.announced(&of_key(2, 5));
        assert!(!recent.unchanged(&[key(5)], 1));
        recent.polled(&of_key(3, 6));
        assert!(
            recent.unchanged(&[key(5)], 1),
            "number 2 was never committed"
        );
        assert!(!recent.unchanged(&[key(5)], 0));
        let state = recent.0.lock();
        assert_eq!((state.announced.len(), state.newest[&key(5)]), (0, 1));
    }

    #[test]
    fn no_copy_from_before_a_restore_is_confirmed_after_it() {
        let recent = Recent::default();
        recent.begin(
            &[of_key(17, 0), of_key(18, 0), of_key(19, 0), of_key(20, 0)],
            "history",
        );
        recent.announced(&of_key(23, 0));
        assert!(recent.unchanged(&[key(1)], 23));
        recent.restart(&[of_key(17, 0), of_key(18, 0)], "history");
        for as_of in 16..=25 {
            assert!(!recent.unchanged(&[key(1)], as_of), "{as_of}");
        }
        for seq in 19..=25 {
            assert!(recent.polled(&of_key(seq, 2)), "{seq} is assigned again");
            assert!(
                !recent.unchanged(&[key(1)], 23),
                "the number was assigned before the restore"
            );
        }
        assert!(recent.unchanged(&[key(1)], 24));
        assert!(!recent.unchanged(&[key(2)], 24), "changed with number 25");
        assert!(recent.unchanged(&[key(2)], 25));
    }

    #[test]
    fn evicted_changes_raise_the_floor() {
        let recent = Recent::default();
        recent.begin(&[], "history");
        for n in 1..=REMEMBERED + 10 {
            let seq = i64::try_from(n).unwrap();
            recent.polled(&of_key(seq, n as u128));
        }
        assert!(!recent.unchanged(&[key(1)], 9));
        assert!(recent.unchanged(&[key(1)], 10));
        let state = recent.0.lock();
        assert_eq!(
            (state.polled.len(), state.newest.len()),
            (REMEMBERED, REMEMBERED)
        );
    }
}
