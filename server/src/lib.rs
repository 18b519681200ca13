//! Quota's server: API keys, plans, rate limits and quotas on your own machines.

pub mod api;
pub mod auth;
pub mod authenticated;
pub mod cache;
pub mod clock;
pub mod config;
pub mod db;
pub mod deadline;
pub mod demo;
pub mod doctor;
mod error_chain;
pub mod file_limit;
pub mod jobs;
pub mod keys;
pub mod limiter;
pub mod openapi;
pub mod readiness;
pub mod redis;
pub mod repo;
pub mod revocations;
pub mod router;
pub mod schema;
pub mod seal;
pub mod secret_text;
pub mod serve;
pub mod state;
pub mod telemetry;
