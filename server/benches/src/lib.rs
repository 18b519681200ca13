//! The operations that a decision consists of, on a real server with PostgreSQL.

mod support;
mod world;

pub use self::{
    support::migrate,
    world::{Operation, World},
};
