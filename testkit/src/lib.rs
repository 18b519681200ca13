//! Tools for tests: processes that end with their owner, a Redis that can be killed and frozen, a proxy that fails on
//! demand, a mail server, gateways, and a checker for token bucket promises.
//!
//! Does not depend on Quota. The processes that it starts are ended by their PIDs. Panics with the reason if something
//! cannot be started.

pub mod caddy;
pub mod envelope;
pub mod envoy;
pub mod gateways;
mod process;
pub mod proxy;
pub mod redis;
pub mod smtp;
pub mod traefik;
mod wheel;

pub use process::Process;
