//! Where decisions are taken.

use std::{fmt::Debug, sync::Arc};

use async_trait::async_trait;
use quota_common::{ApiKeyId, TenantId};

use super::{decision::Decision, ledger::LedgerUnavailable, memory::KeyCell, policy::Policies};
use crate::clock::UnixNanos;

/// What a store answers without waiting.
#[derive(Debug)]
pub enum Attempt {
    Decided(Decision),
    /// Something outside this process has to be asked first: call [`LimitStore::take`].
    MustWait,
}

/// Why no decision could be taken. The caller answers 503; nothing was admitted and nothing taken.
#[derive(Debug, thiserror::Error)]
pub enum LimiterError {
    #[error(transparent)]
    Ledger(#[from] LedgerUnavailable),
    /// The ledger did not answer in time.
    #[error("no decision within the deadline")]
    Deadline,
    /// More keys are in use at once than the store was told to hold.
    #[error("the limit store is full")]
    Full,
    /// The server is stopping and gave its blocks back.
    #[error("the limiter is stopped")]
    Stopped,
}

/// Keeps the buckets and quotas of keys and decides on them.
///
/// **The promise of every store.** All policies of a key are decided together, in one step that no other
/// decision on the key comes between: either all of them hold the cost and it is taken from each, or the
/// request is denied and *nothing* is taken. So, with `burst` and `rate` of the key's plan and a clock that
/// does not jump forward:
///
/// - in any stretch of `T` seconds at most `burst + rate·T` is admitted;
/// - in a calendar day or month never more than its quota, whatever crashes and restarts come between;
/// - a denial changes nothing, so no caller can drain a bucket with requests that another limit refuses;
/// - a denial names the time at which the same request would be admitted if none came before it.
///
/// Changing a plan keeps what was spent; it hands out no new burst.
#[async_trait]
pub trait LimitStore: Debug + Send + Sync + 'static {
    /// The cell of a key. The caller keeps it in the key's cached record, so that a decision needs no
    /// look-up; the same key has the same cell as long as anything is spent from it.
    fn cell(&self, tenant: TenantId, key: ApiKeyId) -> Result<Arc<KeyCell>, LimiterError>;

    /// Decides from what is at hand: no I/O, no allocation, no waiting.
    fn try_take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: u32,
        now: UnixNanos,
    ) -> Attempt;

    /// Decides, waiting for what it takes.
    async fn take(
        &self,
        cell: &Arc<KeyCell>,
        policies: &Policies,
        cost: u32,
    ) -> Result<Decision, LimiterError>;

    /// Forgets the cells that say nothing any more, and gives back what idle keys hold of their quotas. Called
    /// every few seconds. Answers how many cells are left.
    async fn prune(&self) -> usize;

    /// Gives back everything in hand. After that nothing is admitted any more.
    async fn drain(&self) -> Result<(), LimiterError>;
}
