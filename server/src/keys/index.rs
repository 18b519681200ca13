//! An index of cached keys by the resources that affect them, so that editing a plan does not require a scan of the
//! whole cache.
//!
//! The index lists the hashes of cached keys by tenant, plan, and key ID. Entries of keys that were evicted or moved to
//! another plan may be outdated, which costs one unnecessary load. A hash is added before its record is cached, and
//! remains while the record is being loaded or is cached. Therefore, no hash is ever missing.

use std::collections::{HashMap, HashSet};

use parking_lot::Mutex;
use uuid::Uuid;

use crate::{invalidations::InvalidationSet, secret_text::Hash};

/// The hashes of cached keys by tenant, plan, and key. See the module documentation.
#[derive(Debug)]
pub struct KeyIndex {
    owners: Mutex<Owners>,
    /// The number of entries above which entries of evicted keys are removed.
    capacity: usize,
}

#[derive(Debug, Default)]
struct Owners {
    /// Hashes by the ID of the tenant, plan, or key. IDs are unique across all three.
    hashes: HashMap<Uuid, HashSet<Hash>>,
    entries: usize,
}

impl KeyIndex {
    /// Creates an index for a cache of at most `keys` keys.
    pub fn new(keys: usize) -> Self {
        Self {
            owners: Mutex::default(),
            // Space for three entries per key, and the same number of outdated entries.
            capacity: keys.saturating_mul(6),
        }
    }

    /// Adds a hash. If there are too many entries, removes all hashes for which `is_needed` returns false. A hash is
    /// needed while its key is cached or being loaded.
    pub fn add(&self, hash: Hash, owners: [Uuid; 3], is_needed: impl Fn(&Hash) -> bool) {
        let mut all = self.owners.lock();
        let all = &mut *all;
        for owner in owners {
            let added = all.hashes.entry(owner).or_default().insert(hash);
            all.entries += usize::from(added);
        }
        if all.entries > self.capacity {
            all.hashes.retain(|_, hashes| {
                hashes.retain(|it| *it == hash || is_needed(it));
                hashes.shrink_to_fit();
                !hashes.is_empty()
            });
            all.entries = all.hashes.values().map(HashSet::len).sum();
        }
    }

    /// Removes and returns the hashes of the keys that invalidations affect.
    pub fn take(&self, gone: &InvalidationSet) -> HashSet<Hash> {
        let mut all = self.owners.lock();
        let mut taken = HashSet::new();
        for owner in gone.owners_of_keys() {
            if let Some(hashes) = all.hashes.remove(owner) {
                all.entries -= hashes.len();
                taken.extend(hashes);
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::repo::invalidation::{Invalidation, Target};

    const TENANT: Uuid = Uuid::from_u128(1);

    fn plan(n: u128) -> Uuid {
        Uuid::from_u128(100 + n)
    }

    fn key(n: u8) -> (Hash, Uuid) {
        ([n; 32], Uuid::from_u128(10_000 + u128::from(n)))
    }

    fn take(index: &KeyIndex, target: Target) -> Vec<u8> {
        let invalidation = Invalidation {
            seq: 1,
            tenant: TENANT,
            target: Some(target),
            at: DateTime::UNIX_EPOCH,
        };
        let taken = index.take(&std::iter::once(&invalidation).collect());
        let mut taken = taken.into_iter().map(|hash| hash[0]).collect::<Vec<_>>();
        taken.sort_unstable();
        taken
    }

    fn filled() -> KeyIndex {
        let index = KeyIndex::new(100);
        for n in 0..6 {
            let (hash, id) = key(n);
            index.add(hash, [TENANT, plan(u128::from(n % 2)), id], |_| true);
        }
        index
    }

    #[test]
    fn change_selects_the_keys_it_affects() {
        assert_eq!(take(&filled(), Target::Plan(plan(0))), [0, 2, 4]);
        assert_eq!(take(&filled(), Target::ApiKey(key(3).1)), [3]);
        assert_eq!(take(&filled(), Target::Tenant), [0, 1, 2, 3, 4, 5]);
        assert_eq!(take(&filled(), Target::Plan(plan(7))), [0_u8; 0]);
        assert_eq!(take(&filled(), Target::Session(TENANT)), [0_u8; 0]);
    }

    #[test]
    fn key_that_is_loaded_again_is_found_again() {
        let index = filled();
        assert_eq!(take(&index, Target::Plan(plan(0))), [0, 2, 4]);
        assert_eq!(take(&index, Target::Plan(plan(0))), [0_u8; 0]);
        let (hash, id) = key(2);
        index.add(hash, [TENANT, plan(0), id], |_| true);
        assert_eq!(take(&index, Target::Plan(plan(0))), [2]);
        // The key was rotated, so both of its secrets are valid for a while.
        index.add([99; 32], [TENANT, plan(1), id], |_| true);
        assert_eq!(take(&index, Target::ApiKey(id)), [2, 99]);
    }

    #[test]
    fn evicted_keys_do_not_fill_the_index() {
        let index = KeyIndex::new(10);
        for n in 0..10_000_u32 {
            let mut hash = [0; 32];
            hash[..4].copy_from_slice(&n.to_be_bytes());
            let is_cached = |it: &Hash| {
                let it = u32::from_be_bytes(it[..4].try_into().unwrap());
                it + 10 > n
            };
            index.add(
                hash,
                [TENANT, plan(1), Uuid::from_u128(u128::from(n) + 1000)],
                is_cached,
            );
        }
        assert!(index.owners.lock().entries <= 60);
        let taken = take(&index, Target::Plan(plan(1)));
        assert!(taken.len() >= 10, "all cached keys are in the index");
    }
}
