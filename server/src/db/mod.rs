//! PostgreSQL: connection pools, transactions with their roles, migrations, and the private PostgreSQL.
//!
//! A replica's connections are divided into lanes ([`Lane`]), each with its own pool, so that a flood of one kind of
//! work does not take the connections that another kind needs.
//!
//! The server connects as the role in `DATABASE_URL`. Each transaction then uses one of two other roles: `quota_app`,
//! which row-level security restricts to the transaction's tenant, or `quota_system`, for work that is not on behalf of
//! a tenant (sign-in, lookups by secret, sweeps). A transaction that is dropped, even in the middle of a query, is
//! rolled back before its connection is used again.
//!
//! While PostgreSQL is unreachable, beginning a transaction fails with [`DbError::Unavailable`] within a few seconds.

mod connect;
pub mod embedded;
mod error;
mod inspect;
mod migrate;
mod plaintext;
mod pool;
mod span;
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
