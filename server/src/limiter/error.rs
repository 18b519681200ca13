//! Why no decision was reached.

use std::{error::Error, sync::Arc};

/// Why no decision was reached. The request is not admitted, and its caller may retry.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LimiterError {
    /// The quota ledger failed or was too slow, and no tokens were available locally.
    #[error("the quota ledger is not available")]
    LedgerUnavailable(#[source] Arc<dyn Error + Send + Sync>),
    /// Too many keys are in use at once.
    #[error("the limiter has reached its maximum number of keys")]
    TooManyKeys,
    /// The shared counters are unavailable, and the plan rejects all requests in that case.
    #[error("the shared counters are not available")]
    CountersAway,
    /// The store was drained and takes no more blocks.
    #[error("the limiter is shutting down")]
    Draining,
}
