//! Logs and metrics.
//!
//! Logs are lines on standard output. Access log lines are written by [`log::Log::access`] directly into a buffer,
//! since they are most of what a busy server logs; everything else goes through `tracing`. Metrics are plain atomics in
//! [`metrics::Metrics`], formatted on request. Neither may delay a request or contain a key, token, password or email.

pub mod log;
pub mod metrics;
pub mod request_id;
