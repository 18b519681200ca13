//! The integration tests.

mod admission;
mod console_calls;
mod doctor;
mod embedded;
mod env_example;
mod every_endpoint;
mod flood;
mod gateways;
mod http;
mod layers;
mod limiter_contract;
mod limiter_shared;
mod migrations;
mod openapi;
mod outage;
mod quota_ledger;
mod redis;
mod redis_away;
mod restarts;
mod revocation;
mod routes;
mod shared_records;
mod support;
mod sweep;
mod tenancy;
mod wording;
