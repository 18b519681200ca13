//! The handle of a key: its state on this replica.

use parking_lot::Mutex;
use quota_common::id::{ApiKeyId, TenantId};
use tokio::sync::Notify;

use super::state::KeyState;
use crate::limiter::denial_cache::DenialCache;

/// The limiter's state for one key. Stored in the key's cached record, so that a decision does not need a lookup.
#[derive(Debug)]
pub struct KeyHandle {
    pub(in crate::limiter) tenant: TenantId,
    pub(in crate::limiter) key: ApiKeyId,
    /// Used only with a remote store.
    pub(in crate::limiter) denials: DenialCache,
    pub(in crate::limiter) state: Mutex<KeyState>,
    /// Notified when requests that wait for quota tokens should check again: when a ledger call for this key or a
    /// reservation has ended.
    pub(in crate::limiter) call_ended: Notify,
}

impl KeyHandle {
    pub(in crate::limiter) fn new(tenant: TenantId, key: ApiKeyId) -> Self {
        Self {
            tenant,
            key,
            denials: DenialCache::default(),
            state: Mutex::new(KeyState::new()),
            call_ended: Notify::new(),
        }
    }

    pub fn tenant(&self) -> TenantId {
        self.tenant
    }

    pub fn key(&self) -> ApiKeyId {
        self.key
    }
}
