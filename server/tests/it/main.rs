//! The integration tests.

mod embedded;
mod limiter_contract;
mod routes;
mod support;
