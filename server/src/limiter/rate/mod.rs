//! Rate limits: token buckets, leases, and the protocol of the shared counters.

pub(super) mod counters;
pub(super) mod gathering;
pub(super) mod gcra;
mod held_tokens;
pub(super) mod lease;
pub(super) mod share;
pub(super) mod terms;
pub(super) mod waiter;
