//! What tests and measurements put around the server: processes that end with their owner, a Redis that may be
//! killed and frozen, a proxy that fails on demand.
//!
//! Knows nothing of Quota. What it starts it ends, by process id. Where something cannot be started it panics
//! and says what: whoever uses it has no way on without.

mod process;
pub mod proxy;
pub mod redis;

pub use process::Process;
