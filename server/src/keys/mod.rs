//! API keys and service tokens: what is known of each by its text, and when it was last used.
//!
//! Owns the way from a key's text to its record: hash, memory, what replicas share in Redis, database. Knows no
//! HTTP. When PostgreSQL is away, keys that were in use stay in use for `QUOTA_STALE_GRACE`, and others cannot be
//! confirmed. When Redis is away, PostgreSQL is asked instead.

mod index;
pub mod ledger;
pub mod lookups;
pub mod record;
pub mod shared;
pub mod usage;

pub use self::lookups::Source;
pub use self::record::{KeyRecord, KeyStore, LimitFields, Refusal, ServiceRecord};
