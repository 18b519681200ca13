//! Logs and metrics for the operator.
//!
//! Logs are lines on standard output. [`log::Log::access`] formats the line of a request directly into a buffer,
//! because these are most of the lines that a busy server logs; everything else goes through `tracing`. Metrics are
//! plain atomics in [`metrics::Metrics`], formatted when scraped. Neither may delay a request or contain a key, token,
//! password or email.

pub mod log;
pub mod metrics;
pub mod request_id;
