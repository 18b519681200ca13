//! Determines which cached rows have changed since they were loaded, without a list of the cached rows of a plan or a
//! tenant.
//!
//! An API key has three owners: its tenant, its plan, and the key itself. A service token or a session has two: its
//! tenant, and the token or session itself. For each owner, a slot contains the generation of the owner's last change. A
//! row has changed if one of its owners has changed in a later generation than the one in which the row was loaded.
//! Therefore, an edit to a plan takes the same time no matter how many keys are on the plan, and no memory per row is
//! needed.
//!
//! Owners share slots. If two owners have the same slot, a change to one of them also invalidates the rows of the
//! other, which costs one unnecessary load per row. A change is never missed.

use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

/// The number of slots for each kind of owner except keys.
const FEW: usize = 1 << 14;
/// The number of slots for keys. Changes to keys are more frequent.
const MANY: usize = 1 << 17;

/// An owner of cached rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    Tenant(Uuid),
    Plan(Uuid),
    Key(Uuid),
    ServiceToken(Uuid),
    Session(Uuid),
}

impl Owner {
    /// Returns whether API keys belong to owners of this kind.
    pub(super) const fn has_keys(self) -> bool {
        match self {
            Self::Tenant(_) | Self::Plan(_) | Self::Key(_) => true,
            Self::ServiceToken(_) | Self::Session(_) => false,
        }
    }
}

/// The generation of each owner's last change. See the module documentation.
#[derive(Debug)]
pub struct Changes {
    tenants: Slots<FEW>,
    plans: Slots<FEW>,
    keys: Slots<MANY>,
    service_tokens: Slots<FEW>,
    sessions: Slots<FEW>,
}

impl Default for Changes {
    fn default() -> Self {
        Self {
            tenants: Slots::new(),
            plans: Slots::new(),
            keys: Slots::new(),
            service_tokens: Slots::new(),
            sessions: Slots::new(),
        }
    }
}

impl Changes {
    pub(super) fn add(&self, owner: Owner, generation: u64) {
        self.slot(owner).fetch_max(generation, Ordering::AcqRel);
    }

    /// Returns whether this owner has changed in a later generation than `generation`.
    #[inline]
    pub fn has_changed_after(&self, generation: u64, owner: Owner) -> bool {
        self.slot(owner).load(Ordering::Acquire) > generation
    }

    /// Returns whether any of these owners has changed in a later generation than `generation`.
    #[inline]
    pub fn any_after(&self, generation: u64, tenant: Uuid, plan: Uuid, key: Uuid) -> bool {
        self.has_changed_after(generation, Owner::Tenant(tenant))
            || self.has_changed_after(generation, Owner::Plan(plan))
            || self.has_changed_after(generation, Owner::Key(key))
    }

    #[inline]
    fn slot(&self, owner: Owner) -> &AtomicU64 {
        match owner {
            Owner::Tenant(id) => self.tenants.of(id),
            Owner::Plan(id) => self.plans.of(id),
            Owner::Key(id) => self.keys.of(id),
            Owner::ServiceToken(id) => self.service_tokens.of(id),
            Owner::Session(id) => self.sessions.of(id),
        }
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
            // Owners of different kinds do not share slots.
            Owner::ServiceToken(KEY),
            Owner::Session(KEY),
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
