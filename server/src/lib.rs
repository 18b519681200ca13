//! Quota's server: self-hosted API keys, plans, rate limits and quotas.

#![allow(
    rustdoc::private_intra_doc_links,
    reason = "the documentation is built with private items"
)]

pub mod alerts;
pub mod api;
pub mod auth;
pub mod billing;
pub mod cache;
pub mod client_guard;
pub mod clock;
pub mod config;
pub mod connection_marks;
pub mod db;
pub mod deadline;
pub mod demo;
pub mod doctor;
mod encryption;
mod error_chain;
pub mod file_limit;
pub mod health_check;
pub mod heap;
pub mod invalidations;
pub mod jobs;
mod json_text;
pub mod keys;
pub mod limiter;
pub mod mail;
pub mod metering;
pub mod openapi;
pub mod plain_request;
pub mod readiness;
pub mod redis;
pub mod repo;
pub mod router;
pub mod schema;
pub mod seal;
pub mod secret_text;
pub mod serve;
pub mod spans;
pub mod state;
pub mod stripe;
pub mod subscription;
pub mod telemetry;
pub mod tenant_places;
pub mod tenant_queue;
pub mod tenant_rate;
pub mod usage_report;
pub mod webhooks;
