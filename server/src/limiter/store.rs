//! What a store of limits promises, wherever it keeps the numbers.
//!
//! Owns the contract and the handle that a store creates for a key. Knows no store in particular. Without the ledger of
//! calendar quotas, a store returns a [`LimiterError`] once the blocks it holds are spent. Without the shared
//! counters, the plan decides: `closed` is a [`LimiterError`], `share` and `open` still admit, and mark their
//! decisions as degraded.

use std::{error::Error, num::NonZeroU32, sync::Arc};

use async_trait::async_trait;
use parking_lot::Mutex;
use quota_common::id::{ApiKeyId, TenantId};
use tokio::sync::Notify;

use super::{
    decision::Decision, denial_cache::DenialCache, key::state::KeyState, policy::Policies,
};

/// Why no decision was reached. The request is not admitted, and its caller may retry.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LimiterError {
    /// The durable ledger of calendar quotas failed or was too slow, and no tokens were held here.
    #[error("the quota ledger is not available")]
    LedgerUnavailable(#[source] Arc<dyn Error + Send + Sync>),
    /// More keys are in use at once than the store was set up to hold.
    #[error("the limiter holds as many keys as it may")]
    TooManyKeys,
    /// The shared counters are away, and the plan's choice is to admit nothing then.
    #[error("the shared counters are not available")]
    CountersAway,
    /// The store was drained: it takes no more blocks.
    #[error("the limiter is shutting down")]
    Draining,
}

/// The limiter's state of one key. Kept in the key's cached record, so that a decision looks nothing up.
#[derive(Debug)]
pub struct KeyHandle {
    pub(super) tenant: TenantId,
    pub(super) key: ApiKeyId,
    /// What this replica knows by itself, in front of a store that is elsewhere.
    pub(super) denials: DenialCache,
    /// The numbers of this replica.
    pub(super) state: Mutex<KeyState>,
    /// Notified when a call of the ledger for this key has ended.
    pub(super) call_ended: Notify,
}

impl KeyHandle {
    pub(super) fn new(tenant: TenantId, key: ApiKeyId) -> Self {
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

/// What a drain did with the unused tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drained {
    /// Tokens of calendar quotas that the ledger counts as unused again.
    pub given_back: u64,
    /// Tokens whose return the ledger has not confirmed. They stay unserved until their window ends.
    pub lost: u64,
}

/// Where the numbers are kept.
///
/// Every store keeps the same promise, for each key and all its policies together:
///
/// - *Atomic.* The cost is taken from every policy, or from none. A denial consumes nothing.
/// - *Rate.* In any span of `T` seconds of the store's clock, at most `burst + rpm/60 * T` is admitted (with
///   leases, as in so much longer a span as one lives), and
///   no less than the bucket holds is refused. A clock that stands still refills nothing; one that jumps
///   back locks nobody out for longer than the refill of what was asked.
/// - *Quotas.* In any calendar window at most `daily` and `monthly` are admitted, over restarts and crashes.
///   At most one block (a hundredth, and 10,000) of a quota, and what requests were waiting for, is unserved after
///   a crash, none after a drain. No replica keeps a block for long that others need and it does not spend. A
///   change of time zone takes effect when the window ends (at once if nothing of it was used). The next window
///   ends with the first day or month of the new zone, with a quota in proportion; windows never overlap.
/// - *Edits.* A change of policies carries what was consumed over: nobody gets a fresh bucket by it.
/// - *Failure.* What cannot be decided is a [`LimiterError`], never an admission.
#[async_trait]
pub trait LimitStore: std::fmt::Debug + Send + Sync + 'static {
    /// The handle of a key: the same one for as long as anybody holds it or its bucket is not full.
    fn handle(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyHandle>, LimiterError>;

    /// Decides without waiting, or answers `None` if it would have to.
    fn try_take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Option<Decision>;

    /// Decides, waiting for what it must. Dropping the future loses no tokens.
    async fn take(
        &self,
        handle: &Arc<KeyHandle>,
        policies: &Policies,
        cost: NonZeroU32,
    ) -> Result<Decision, LimiterError>;

    /// Where the key stands by what is known here, taking nothing.
    fn peek(&self, handle: &KeyHandle, policies: &Policies) -> Decision;

    /// Where the key stands by what all replicas know of its rate, taking nothing. The same as [`peek`](Self::peek) where
    /// that is known here, and where the counters do not answer in time.
    async fn inspect(&self, handle: &KeyHandle, policies: &Policies) -> Decision {
        self.peek(handle, policies)
    }

    /// Whether a decision is as cheap as a look at this replica's own memory. If so nothing is kept in front
    /// of the store.
    fn is_local(&self) -> bool;

    /// For how many nanoseconds a denial by the rate may be remembered in front of the store; `None`: until the
    /// moment that it names. Shorter where other replicas may return tokens.
    fn denial_memory(&self, _policies: &Policies) -> Option<u64> {
        None
    }

    /// Drops unreferenced keys that cannot be told from new ones, and returns the blocks of other
    /// unreferenced keys so that those can be dropped next time. Where other replicas share the quotas, also returns
    /// the blocks of referenced keys that were not spent from for ten seconds. Fetches the first block of the next
    /// day or month for keys in use. Returns how many keys are left.
    fn prune(&self) -> usize;

    /// Returns all unused tokens and takes nothing more. For the end of the process.
    async fn drain(&self) -> Drained;
}
