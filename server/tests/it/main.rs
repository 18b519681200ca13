//! The integration tests.

mod embedded;
