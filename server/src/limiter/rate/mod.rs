//! The arithmetic of rates: token buckets, tokens taken ahead, and the protocol of shared counters.

pub(super) mod counters;
pub(super) mod gcra;
pub(super) mod lease;
