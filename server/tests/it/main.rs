//! The integration tests.

mod embedded;
mod every_endpoint;
mod layers;
mod limiter_contract;
mod openapi;
mod routes;
mod support;
mod tenancy;
