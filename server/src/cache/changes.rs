//! Determines which cached rows have changed since they were loaded, without a list of the cached rows of a plan or a
//! tenant.
//!
//! A row belongs to up to three owners: its tenant, its plan, and the key itself. For each owner, a slot contains the
//! generation of the owner's last change. A row has changed if one of its owners has changed in a later generation than
//! the one in which the row was loaded. Therefore, an edit to a plan takes the same time no matter how many keys are on
//! the plan, and no memory per key is needed.
//!
//! Owners share slots. If two owners have the same slot, a change to one of them also invalidates the rows of the
//! other, which costs one unnecessary load per row. A change is never missed.

use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

/// The number of slots for plans, and also for tenants.
const FEW: usize = 1 << 14;
/// The number of slots for keys. Changes to keys are more frequent.
const MANY: usize = 1 << 17;

/// An owner of cached rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    Tenant(Uuid),
    Plan(Uuid),
    Key(Uuid),
}

/// The generation of each owner's last change. See the module documentation.
#[derive(Debug)]
pub struct Changes {
    tenants: Slots<FEW>,
    plans: Slots<FEW>,
    keys: Slots<MANY>,
}

impl Default for Changes {
    fn default() -> Self {
        Self {
            tenants: Slots::new(),
            plans: Slots::new(),
            keys: Slots::new(),
        }
    }
}

impl Changes {
    pub(super) fn add(&self, owner: Owner, generation: u64) {
        let slot = match owner {
            Owner::Tenant(id) => self.tenants.of(id),
            Owner::Plan(id) => self.plans.of(id),
            Owner::Key(id) => self.keys.of(id),
        };
        slot.fetch_max(generation, Ordering::AcqRel);
    }

    /// Returns whether any of these owners has changed in a later generation than `generation`.
    #[inline]
    pub fn any_after(&self, generation: u64, tenant: Uuid, plan: Uuid, key: Uuid) -> bool {
        let is_later = |slot: &AtomicU64| slot.load(Ordering::Acquire) > generation;
        is_later(self.tenants.of(tenant))
            || is_later(self.plans.of(plan))
            || is_later(self.keys.of(key))
    }
}

/// `N` slots. `N` is a power of two.
#[derive(Debug)]
struct Slots<const N: usize>(Box<[AtomicU64]>);

impl<const N: usize> Slots<N> {
    fn new() -> Self {
        const { assert!(N.is_power_of_two()) };
        Self((0..N).map(|_| AtomicU64::new(0)).collect())
    }

    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the remainder is below the number of slots"
    )]
    fn of(&self, id: Uuid) -> &AtomicU64 {
        // IDs end with random bits.
        let (_, random) = id.as_u64_pair();
        &self.0[(random % N as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TENANT: Uuid = Uuid::from_u128(1);
    const PLAN: Uuid = Uuid::from_u128(2);
    const KEY: Uuid = Uuid::from_u128(3);

    /// Returns whether a change to `owner` in `generation` invalidates a row that was loaded in `loaded_in`.
    fn is_changed(owner: Owner, generation: u64, loaded_in: u64) -> bool {
        let changes = Changes::default();
        changes.add(owner, generation);
        changes.any_after(loaded_in, TENANT, PLAN, KEY)
    }

    #[test]
    fn a_change_affects_what_was_loaded_before_it() {
        for owner in [Owner::Tenant(TENANT), Owner::Plan(PLAN), Owner::Key(KEY)] {
            assert!(is_changed(owner, 7, 6), "{owner:?}");
            assert!(!is_changed(owner, 7, 7), "{owner:?}");
            assert!(!is_changed(owner, 7, 8), "{owner:?}");
        }
    }

    #[test]
    fn a_change_does_not_affect_other_owners() {
        let other = Uuid::from_u128(4);
        for owner in [
            Owner::Tenant(other),
            Owner::Plan(other),
            Owner::Key(other),
            // IDs of different kinds do not share slots.
            Owner::Tenant(KEY),
            Owner::Plan(TENANT),
            Owner::Key(PLAN),
        ] {
            assert!(!is_changed(owner, 7, 6), "{owner:?}");
        }
    }

    #[test]
    fn an_older_change_does_not_replace_a_newer_one() {
        let changes = Changes::default();
        changes.add(Owner::Plan(PLAN), 7);
        changes.add(Owner::Plan(PLAN), 5);
        assert!(changes.any_after(6, TENANT, PLAN, KEY));
    }
}
