//! Errors of the limiter.

use std::{error::Error, sync::Arc};

/// Why no decision could be made. The request is not allowed, but the client may retry it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LimiterError {
    /// The quota ledger failed or was too slow, and too few tokens were available locally.
    #[error("the quota ledger is not available")]
    LedgerUnavailable(#[source] Arc<dyn Error + Send + Sync>),
    /// Too many keys are in use at the same time.
    #[error("the limiter has reached its maximum number of keys")]
    TooManyKeys,
    /// The shared counters are unavailable, and the plan's fallback setting is `closed`.
    #[error("the shared counters are not available")]
    CountersUnavailable,
    /// The store is draining and no longer fetches blocks.
    #[error("the limiter is shutting down")]
    Draining,
}
