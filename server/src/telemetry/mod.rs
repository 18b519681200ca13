//! What the server tells its operator: logs and metrics.
//!
//! Logs are lines on standard output. Requests are written by [`log::Log::access`], straight into a buffer,
//! since a line for each of them is most of what a busy server logs; everything else goes through `tracing`.
//! Metrics are kept as plain atomics in [`metrics::Metrics`] and written out when asked for. Neither may hold
//! up a request or hold a key, token, password or email.

pub mod log;
pub mod metrics;
pub mod request_id;
