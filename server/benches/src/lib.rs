//! The operations that a decision consists of, on a real server with PostgreSQL.

mod support;
mod world;

pub use self::world::{Operation, World};
