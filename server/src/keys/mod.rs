//! API keys and service tokens: finds their records by secret, tracks when they were last used, and takes tokens from
//! the quota ledgers.
//!
//! A secret is looked up by its hash: first in memory, then, if it is an API key, in the records that replicas share
//! through Redis, and finally in PostgreSQL. This module does not depend on HTTP. While PostgreSQL is unavailable, keys
//! and tokens in memory keep working for `QUOTA_STALE_GRACE`, and others cannot be looked up. While Redis is
//! unavailable, lookups go to PostgreSQL instead.

pub mod last_used;
pub mod ledger;
pub mod lookups;
pub mod plan;
pub mod record;
pub mod shared;
pub mod tenant_ledger;

pub use self::lookups::LookupCaller;
pub use self::record::{KeyRecord, KeyStore, Rejection, ServiceRecord};
