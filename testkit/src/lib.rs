//! Tools for tests: processes that are killed when the test's process exits, a Redis that can be killed and frozen, a
//! proxy that fails on demand, a mail server, gateways, a checker for envelopes of token buckets, and Zipf-distributed
//! numbers.
//!
//! This crate does not depend on Quota. The tools kill processes by PID, never by name. The tools for Redis and
//! gateways panic if a program cannot be started.

pub mod caddy;
pub mod envelope;
pub mod envoy;
pub mod gateways;
mod process;
pub mod proxy;
pub mod redis;
pub mod redis_group;
pub mod smtp;
pub mod traefik;
mod wheel;
pub mod zipf;

pub use process::Process;
