//! What was changed lately, as far as this replica knows: decides whether what another replica read from PostgreSQL a
//! while ago is still true.
//!
//! Revocations are numbered in the order of their commits, and a row is read together with the highest number that
//! its reader saw. So a copy with number `n` is true except for revocations above `n`.
//!
//! Two sources, which are not worth the same:
//! - **The poll** reads PostgreSQL, in order and without gaps. It alone moves the floor and the number up to which
//!   everything is known.
//! - **Announcements** are messages of other replicas, and this replica's own commits. They only come sooner. An
//!   announcement makes copies older than it untrue until the poll has caught up; it never hides a number from the
//!   poll, never raises the floor, and takes no room from what was polled.
//!
//! Below the floor nothing is confirmed, since a revocation that was deleted from PostgreSQL may lie there. Nor is a
//! copy with a number higher than PostgreSQL, or a replica that announced it, has shown: no such number was assigned.

use std::collections::{BTreeMap, HashMap};

use parking_lot::Mutex;
use uuid::Uuid;

use crate::repo::revocation::{Revocation, Target};

/// How many polled revocations are remembered. One takes about 150 bytes.
const REMEMBERED: usize = 20_000;
/// How many announcements are remembered until the poll reaches them, which takes it a moment. More are dropped: the
/// poll reads them anyway.
const ANNOUNCED: usize = 4096;

/// See the module.
#[derive(Debug, Default)]
pub struct Recent(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// `None` until PostgreSQL was polled for the first time: then nothing can be confirmed.
    known: Option<Known>,
    polled: BTreeMap<i64, Uuid>,
    /// Numbers above `known.up_to`.
    announced: BTreeMap<i64, Uuid>,
    /// The highest number of each id in either map. Ids are unique over all kinds.
    newest: HashMap<Uuid, i64>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    /// Every revocation above this, up to `up_to`, is in `polled`.
    floor: i64,
    up_to: i64,
}

/// What is changed or ended. For a kind that this version does not know, that is the whole tenant.
fn subject(revocation: &Revocation) -> Uuid {
    match revocation.target {
        None | Some(Target::Tenant) => revocation.tenant,
        Some(
            Target::Plan(id) | Target::ApiKey(id) | Target::ServiceToken(id) | Target::Session(id),
        ) => id,
    }
}

impl Recent {
    /// The first poll: the newest revocations that PostgreSQL still has, in order. Older ones may have been deleted,
    /// so everything below the first of them is unconfirmed.
    pub fn begin(&self, newest: &[Revocation]) {
        let mut state = self.0.lock();
        let floor = newest.first().map_or(0, |first| first.seq - 1);
        state.known.get_or_insert(Known {
            floor,
            up_to: floor,
        });
        drop(state);
        for revocation in newest {
            self.polled(revocation);
        }
    }

    /// PostgreSQL was restored to an earlier state, of which these are the newest revocations, in order. Its numbers
    /// are given out a second time, so copies with any number of the first time are never confirmed again: nothing is
    /// until PostgreSQL has passed the highest number that was known.
    pub fn restart(&self, newest: &[Revocation]) {
        let mut state = self.0.lock();
        let announced = state.announced.last_key_value().map(|(seq, _)| *seq);
        let floor = state.known.map_or(0, |known| {
            known.floor.max(announced.unwrap_or(0).max(known.up_to) + 1)
        });
        *state = State {
            known: Some(Known {
                floor,
                up_to: newest.first().map_or(0, |first| first.seq - 1),
            }),
            ..State::default()
        };
        drop(state);
        for revocation in newest {
            self.polled(revocation);
        }
    }

    /// The poll has read this one, and everything before it. Returns whether it is news.
    pub fn polled(&self, revocation: &Revocation) -> bool {
        let (seq, id) = (revocation.seq, subject(revocation));
        let mut state = self.0.lock();
        let state = &mut *state;
        let Some(known) = &mut state.known else {
            return true;
        };
        if seq <= known.up_to {
            return false;
        }
        known.up_to = seq;
        state.polled.insert(seq, id);
        let newest = state.newest.entry(id).or_default();
        *newest = seq.max(*newest);
        while state.polled.len() > REMEMBERED
            && let Some((seq, id)) = state.polled.pop_first()
        {
            known.floor = known.floor.max(seq);
            if state.newest.get(&id) == Some(&seq) {
                state.newest.remove(&id);
            }
        }
        let later = state.announced.split_off(&(seq + 1));
        let reached = std::mem::replace(&mut state.announced, later);
        let mut is_news = true;
        for (announced, id) in reached {
            is_news &= announced != seq;
            // An announcement that PostgreSQL does not have, such as one from before a restore, ends here.
            if !state.polled.contains_key(&announced) && state.newest.get(&id) == Some(&announced) {
                state.recount(id);
            }
        }
        is_news
    }

    /// Another replica, or this one, has committed a revocation. Returns whether it is news: what was polled or
    /// announced before is not, so a message that is sent again does nothing.
    pub fn announced(&self, revocation: &Revocation) -> bool {
        let (seq, id) = (revocation.seq, subject(revocation));
        let mut state = self.0.lock();
        let state = &mut *state;
        if state.known.is_some_and(|known| seq <= known.up_to) || state.announced.contains_key(&seq)
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

    /// Whether none of these was changed after number `as_of`, as far as is known.
    pub fn unchanged(&self, ids: &[Uuid], as_of: i64) -> bool {
        let state = self.0.lock();
        let Some(known) = state.known else {
            return false;
        };
        let highest = state
            .announced
            .last_key_value()
            .map_or(known.up_to, |(seq, _)| *seq);
        (known.floor..=highest).contains(&as_of)
            && ids
                .iter()
                .all(|id| state.newest.get(id).is_none_or(|seq| *seq <= as_of))
    }
}

impl State {
    /// Looks for the highest number of an id again. Slow, and rare.
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

    fn revocation(seq: i64, target: Target) -> Revocation {
        Revocation {
            seq,
            tenant: Uuid::from_u128(1),
            target: Some(target),
            at: DateTime::UNIX_EPOCH,
        }
    }

    fn key(n: u128) -> Uuid {
        Uuid::from_u128(1000 + n)
    }

    fn of_key(seq: i64, n: u128) -> Revocation {
        revocation(seq, Target::ApiKey(key(n)))
    }

    #[test]
    fn a_copy_is_true_until_something_of_it_is_changed() {
        let recent = Recent::default();
        let (tenant, plan, key) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        let all = [tenant, plan, key];
        assert!(!recent.unchanged(&all, 100), "nothing is known yet");
        recent.begin(&[of_key(4, 0)]);
        assert!(recent.unchanged(&all, 4));
        assert!(recent.unchanged(&all, 3));
        assert!(!recent.unchanged(&all, 2), "older than what is known");
        assert!(!recent.unchanged(&all, 5), "not assigned yet");
        for (seq, target) in [
            (5, Target::Tenant),
            (6, Target::Plan(plan)),
            (7, Target::ApiKey(key)),
        ] {
            assert!(recent.unchanged(&all, seq - 1));
            assert!(recent.polled(&revocation(seq, target)));
            assert!(!recent.polled(&revocation(seq, target)), "read twice");
            assert!(!recent.unchanged(&all, seq - 1));
            assert!(recent.unchanged(&all, seq));
        }
        recent.polled(&of_key(8, 9));
        assert!(recent.unchanged(&all, 7), "another's change");
    }

    #[test]
    fn an_announcement_is_in_force_until_the_poll_confirms_it() {
        let recent = Recent::default();
        recent.begin(&[]);
        assert!(recent.announced(&of_key(2, 1)));
        assert!(!recent.announced(&of_key(2, 1)), "sent twice");
        assert!(!recent.unchanged(&[key(1)], 1));
        assert!(recent.unchanged(&[key(1)], 2), "read after the change");
        assert!(recent.unchanged(&[key(2)], 1));
        assert!(!recent.unchanged(&[key(2)], 3), "nobody has shown 3");
        // One that arrives after a later one.
        assert!(recent.announced(&of_key(1, 2)));
        assert!(!recent.unchanged(&[key(2)], 0));
        assert!(!recent.polled(&of_key(1, 2)) && !recent.polled(&of_key(2, 1)));
        assert!(!recent.announced(&of_key(2, 1)), "polled already");
        assert!(!recent.unchanged(&[key(1)], 1));
        assert!(recent.unchanged(&[key(1)], 2));
    }

    /// Whoever could announce future numbers would hide the real revocations with those numbers.
    #[test]
    fn no_announcement_hides_a_number_from_the_poll_or_raises_the_floor() {
        let recent = Recent::default();
        recent.begin(&[of_key(1, 0)]);
        for seq in 2..=i64::try_from(3 * ANNOUNCED).unwrap() {
            recent.announced(&of_key(seq, 77));
        }
        assert!(recent.unchanged(&[key(1)], 1), "the floor is where it was");
        recent.polled(&of_key(2, 1));
        assert!(!recent.unchanged(&[key(1)], 1));
        assert!(recent.unchanged(&[key(1)], 2));
    }

    #[test]
    fn an_announcement_that_postgres_does_not_have_ends_with_the_poll() {
        let recent = Recent::default();
        recent.begin(&[of_key(1, 5)]);
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
    fn after_a_restore_no_copy_from_before_it_is_confirmed() {
        let recent = Recent::default();
        recent.begin(&[of_key(17, 0), of_key(18, 0), of_key(19, 0), of_key(20, 0)]);
        recent.announced(&of_key(23, 0));
        assert!(recent.unchanged(&[key(1)], 23));
        recent.restart(&[of_key(17, 0), of_key(18, 0)]);
        for as_of in 16..=25 {
            assert!(!recent.unchanged(&[key(1)], as_of), "{as_of}");
        }
        for seq in 19..=25 {
            assert!(recent.polled(&of_key(seq, 2)), "{seq} is given out again");
            assert!(!recent.unchanged(&[key(1)], 23), "a number from before");
        }
        assert!(recent.unchanged(&[key(1)], 24));
        assert!(!recent.unchanged(&[key(2)], 24), "changed with number 25");
        assert!(recent.unchanged(&[key(2)], 25));
    }

    #[test]
    fn what_is_forgotten_raises_the_floor() {
        let recent = Recent::default();
        recent.begin(&[]);
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
