//! Tools for tests: processes that end with their owner, a Redis that can be killed and frozen, a proxy that fails on
//! demand, and a checker for token bucket promises.
//!
//! Does not depend on Quota. Processes it starts are ended by PID. Panics with the reason if something cannot be
//! started.

pub mod envelope;
mod process;
pub mod proxy;
pub mod redis;

pub use process::Process;
