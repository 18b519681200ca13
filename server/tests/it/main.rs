//! The integration tests.

mod embedded;
mod every_endpoint;
mod flood;
mod layers;
mod limiter_contract;
mod openapi;
mod restarts;
mod routes;
mod support;
mod tenancy;
