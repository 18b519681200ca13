//! Logs, metrics and traces for the operator.
//!
//! Logs are lines on standard output. [`log::Log::access`] formats access log lines directly into a buffer, because
//! most of the lines that a busy server logs are access log lines. Everything else goes through `tracing`. Metrics are
//! atomics in [`metrics::Metrics`], which are formatted for each scrape. [`traces::Traces`] sends the
//! [spans](crate::spans) of some requests to a collector. Logs, metrics and traces must not delay requests, and must
//! not contain keys, tokens, passwords or email addresses.

pub mod log;
pub mod metrics;
pub mod request_id;
pub mod traces;
