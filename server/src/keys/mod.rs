//! API keys and service tokens: finding their records by secret, and when they were last used.
//!
//! Looks up a secret by its hash: in memory, then in the records that replicas share through Redis, then in PostgreSQL.
//! Does not depend on HTTP. While PostgreSQL is unavailable, keys in memory keep working for `QUOTA_STALE_GRACE`, and
//! others cannot be confirmed. While Redis is unavailable, PostgreSQL is queried instead.

mod index;
pub mod last_used;
pub mod ledger;
pub mod lookups;
pub mod record;
pub mod shared;
pub mod tenant_ledger;

pub use self::lookups::LookupCaller;
pub use self::record::{KeyRecord, KeyStore, Rejection, ServiceRecord};
