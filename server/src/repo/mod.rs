//! All SQL, one file for each noun.
//!
//! Every function takes the transaction it works in: a [`TenantTx`](crate::db::TenantTx), which carries the
//! tenant and is held to it by row-level security as well, or a [`SystemTx`](crate::db::SystemTx) for what the
//! server does by itself. Rows are not what the API shows. Knows no HTTP. Lists are read newest first, by
//! keyset on the id, which is a UUIDv7 and so sorts by time.

pub mod account;
pub mod api_key;
pub mod audit;
pub mod idempotency;
pub mod plan;
pub mod quota_usage;
pub mod revocation;
pub mod secret;
pub mod service_token;
pub mod session;

use uuid::Uuid;

/// Which part of a list.
#[derive(Debug, Clone, Copy)]
pub struct Slice {
    /// The last id of the page before.
    pub after: Option<Uuid>,
    pub limit: u32,
}

/// Some rows of a list.
#[derive(Debug)]
pub struct Rows<T> {
    pub rows: Vec<T>,
    /// Whether the list goes on.
    pub more: bool,
    /// How many rows all pages have together.
    pub total: u64,
}

impl<T> Rows<T> {
    /// From one row more than the page holds.
    fn new(mut rows: Vec<T>, slice: Slice, total: i64) -> Self {
        let limit = slice.limit as usize;
        let more = rows.len() > limit;
        rows.truncate(limit);
        Self {
            rows,
            more,
            total: u64::try_from(total).unwrap_or(0),
        }
    }
}

impl Slice {
    fn fetch(self) -> i64 {
        i64::from(self.limit) + 1
    }

    /// UUIDs of version 7 are below this one.
    fn before(self) -> Uuid {
        self.after.unwrap_or(Uuid::max())
    }
}

/// A pattern for `ILIKE` that finds `text` anywhere, taken literally.
fn containing(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len() + 2);
    pattern.push('%');
    for c in text.chars() {
        if matches!(c, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern.push('%');
    pattern
}
