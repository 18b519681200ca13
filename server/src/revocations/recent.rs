//! What was changed lately, as far as this replica knows: so that it can tell whether what another replica read
//! from PostgreSQL a while ago is still true.
//!
//! Revocations have numbers in the order of their commits, and a row is read together with the highest number
//! that its reader saw. So a copy with number `n` is true but for revocations above `n`; all of those up to the
//! last poll are here, back to a floor. Below the floor nothing is told to be true.

use std::collections::{BTreeMap, HashMap};

use parking_lot::Mutex;
use uuid::Uuid;

use crate::repo::revocation::{Revocation, Target};

/// How many are remembered. One takes about 150 bytes.
const KEPT: usize = 20_000;

/// See the module.
#[derive(Debug, Default)]
pub struct Recent(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// `None` until PostgreSQL was asked for the first time: then nothing can be told.
    floor: Option<i64>,
    all: BTreeMap<i64, Uuid>,
    /// The highest number of each that was changed. Ids are unique over all kinds.
    newest: HashMap<Uuid, i64>,
}

impl Recent {
    /// Every revocation above `floor` so far has been noted.
    pub fn complete_above(&self, floor: i64) {
        let mut known = self.0.lock();
        known.floor = Some(known.floor.map_or(floor, |old| old.max(floor)));
    }

    /// Whether it is the first time that this is told.
    pub fn note(&self, revocation: &Revocation) -> bool {
        let about = match revocation.target {
            None | Some(Target::Tenant) => revocation.tenant,
            Some(
                Target::Plan(id)
                | Target::ApiKey(id)
                | Target::ServiceToken(id)
                | Target::Session(id),
            ) => id,
        };
        let mut known = self.0.lock();
        if known.floor.is_some_and(|floor| revocation.seq <= floor)
            || known.all.insert(revocation.seq, about).is_some()
        {
            return false;
        }
        let newest = known.newest.entry(about).or_default();
        *newest = revocation.seq.max(*newest);
        while known.all.len() > KEPT
            && let Some((seq, about)) = known.all.pop_first()
        {
            known.floor = known.floor.map(|floor| floor.max(seq));
            if known.newest.get(&about) == Some(&seq) {
                known.newest.remove(&about);
            }
        }
        true
    }

    /// Whether none of these was changed after number `as_of`, as far as is known.
    pub fn unchanged(&self, about: &[Uuid], as_of: i64) -> bool {
        let known = self.0.lock();
        known.floor.is_some_and(|floor| as_of >= floor)
            && about
                .iter()
                .all(|id| known.newest.get(id).is_none_or(|seq| *seq <= as_of))
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

    #[test]
    fn a_copy_is_true_until_something_of_it_is_changed() {
        let recent = Recent::default();
        let (tenant, plan, key) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        let all = [tenant, plan, key];
        assert!(!recent.unchanged(&all, 100), "nothing is known yet");
        recent.complete_above(4);
        assert!(recent.unchanged(&all, 4));
        assert!(!recent.unchanged(&all, 3), "older than what is known");
        for (seq, target) in [
            (5, Target::Tenant),
            (6, Target::Plan(plan)),
            (7, Target::ApiKey(key)),
        ] {
            assert!(recent.unchanged(&all, seq - 1));
            assert!(recent.note(&revocation(seq, target)));
            assert!(!recent.note(&revocation(seq, target)), "told twice");
            assert!(!recent.unchanged(&all, seq - 1));
            assert!(recent.unchanged(&all, seq));
        }
        recent.note(&revocation(8, Target::ApiKey(Uuid::from_u128(9))));
        assert!(recent.unchanged(&all, 7), "another's change");
        // One that arrives after a newer one.
        recent.note(&revocation(10, Target::Plan(plan)));
        recent.note(&revocation(9, Target::Plan(plan)));
        assert!(!recent.unchanged(&all, 9));
        assert!(recent.unchanged(&all, 10));
    }

    #[test]
    fn what_is_forgotten_raises_the_floor() {
        let recent = Recent::default();
        recent.complete_above(0);
        let id = |n: usize| Uuid::from_u128(n as u128);
        for n in 1..=KEPT + 10 {
            let seq = i64::try_from(n).unwrap();
            recent.note(&revocation(seq, Target::ApiKey(id(n))));
        }
        assert!(!recent.unchanged(&[id(1)], 9));
        assert!(recent.unchanged(&[id(1)], 10));
        let known = recent.0.lock();
        assert_eq!((known.all.len(), known.newest.len()), (KEPT, KEPT));
    }
}
