//! The integration tests.

mod embedded;
mod support;
