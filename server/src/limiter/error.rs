//! Why no decision could be made.

use std::{error::Error, sync::Arc};

/// Why no decision could be made. The request is not admitted, and its caller may retry.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LimiterError {
    /// The quota ledger failed or was too slow, and no tokens were available locally.
    #[error("the quota ledger is not available")]
    LedgerUnavailable(#[source] Arc<dyn Error + Send + Sync>),
    /// Too many keys are in use at the same time.
    #[error("the limiter has reached its maximum number of keys")]
    TooManyKeys,
    /// The shared counters are unavailable, and the plan rejects all requests in that case.
    #[error("the shared counters are not available")]
    CountersAway,
    /// The store was drained and does not fetch any more blocks.
    #[error("the limiter is shutting down")]
    Draining,
}
