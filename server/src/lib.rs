//! Quota's server: API keys, plans, rate limits and quotas on your own machines.

pub mod clock;
pub mod db;
