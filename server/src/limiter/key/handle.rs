//! The handle of a key: its state on this replica.

use std::{
    borrow::Borrow,
    hash::{Hash, Hasher},
    sync::Arc,
};

use parking_lot::Mutex;
use quota_common::id::{ApiKeyId, TenantId};

use super::state::KeyState;

/// A key's ID and its tenant's ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::limiter) struct KeyName {
    pub(in crate::limiter) tenant: TenantId,
    pub(in crate::limiter) key: ApiKeyId,
}

/// The limiter's state for one key. Stored in the key's cached record, so that a decision does not need a lookup.
#[derive(Debug)]
pub struct KeyHandle {
    pub(in crate::limiter) name: KeyName,
    pub(in crate::limiter) state: Mutex<KeyState>,
}

impl KeyHandle {
    pub(in crate::limiter) fn new(name: KeyName) -> Self {
        Self {
            name,
            state: Mutex::new(KeyState::new()),
        }
    }

    pub fn tenant(&self) -> TenantId {
        self.name.tenant
    }

    pub fn key(&self) -> ApiKeyId {
        self.name.key
    }
}

/// A handle that can be found in a set by its name.
#[derive(Debug)]
pub(super) struct NamedHandle(pub(super) Arc<KeyHandle>);

impl Borrow<KeyName> for NamedHandle {
    fn borrow(&self) -> &KeyName {
        &self.0.name
    }
}

impl PartialEq for NamedHandle {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for NamedHandle {}

impl Hash for NamedHandle {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.name.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// There is one handle per cached key, so the size of a handle determines how many keys fit into memory.
    #[test]
    fn a_handle_without_quotas_and_leases_is_small() {
        assert!(size_of::<KeyHandle>() <= 104, "{}", size_of::<KeyHandle>());
    }
}
