//! PostgreSQL: connection pools, transactions with their role, and migrations.
//!
//! A replica's connections are divided into lanes ([`Lane`]), each with its own pool, so that a flood of one kind of
//! work never makes another wait for a connection.
//!
//! The server signs in with the role in `DATABASE_URL` and uses one of two others: `quota_app`, which row-level
//! security restricts to the tenant of the transaction, and `quota_system`, for work that is not on behalf of a tenant
//! (sign-in, lookups by secret, sweeps). A transaction that is dropped, even in the middle of a query, is rolled back
//! before its connection is used again.
//!
//! While PostgreSQL is unreachable, everything here fails with [`DbError::Unavailable`] within a few seconds.

mod connect;
pub mod embedded;
mod error;
mod inspect;
mod migrate;
mod plaintext;
mod pool;
mod tx;

pub use self::{
    error::DbError,
    inspect::{ServerInfo, inspect},
    migrate::{MigrateError, migrate, revert_all, versions},
    plaintext::plaintext_host,
    pool::{Db, Lane, Lanes},
    tx::{SystemTx, TenantTx},
};
pub use crate::error_chain::chain;
