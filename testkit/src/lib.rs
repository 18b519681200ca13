//! Tools for tests: processes that end with their owner, a Redis that can be killed and frozen, a proxy that fails on
//! demand, a mail server, a recent Caddy, Envoy, and a checker for token bucket promises.
//!
//! This crate does not depend on Quota. Its processes are ended by their PIDs. If something cannot be started, the
//! tools panic with the reason.

pub mod caddy;
pub mod envelope;
pub mod envoy;
mod process;
pub mod proxy;
pub mod redis;
pub mod smtp;
mod wheel;

pub use process::Process;
