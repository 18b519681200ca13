//! Rate limits: token buckets, leases, and the protocol of the shared counters.

pub(super) mod counters;
pub(super) mod gathering;
pub(super) mod gcra;
pub(super) mod lease;
pub(super) mod share;
pub(super) mod waiter;
