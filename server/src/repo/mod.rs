//! All SQL, one file for each noun.
//!
//! Every function takes the transaction it works in: a [`TenantTx`](crate::db::TenantTx), which carries the
//! tenant and is held to it by row-level security as well, or a [`SystemTx`](crate::db::SystemTx) for what the
//! server does by itself. Rows are not what the API shows. Knows no HTTP. Lists are read newest first, by
//! keyset on the id, which is a UUIDv7 and so sorts by time; some can be read in another order, by keyset on what
//! that order is by and the id.

pub mod account;
pub mod allowance;
pub mod api_key;
pub mod audit;
pub mod idempotency;
pub mod plan;
pub mod quota_usage;
pub mod replica;
pub mod revocation;
pub mod secret;
pub mod service_token;
pub mod session;
pub mod sweep;

use chrono::{DateTime, Utc};
use diesel::{
    dsl::sql,
    expression::{AppearsOnTable, NonAggregate, SqlLiteral},
    pg::Pg,
    query_builder::QueryFragment,
    sql_types::{Bool, Text, Uuid as SqlUuid},
};
use uuid::Uuid;

/// Which part of a list.
#[derive(Debug, Clone, Copy)]
pub struct Slice {
    /// The last id of the page before.
    pub after: Option<Uuid>,
    pub limit: u32,
}

/// What a list is ordered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    Made,
    /// Without regard to case.
    Name,
    LastUsed,
}

/// In which order a list is read. The id settles what is equal, so that each row has one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    pub by: By,
    pub descending: bool,
}

/// What the last row of a page was ordered by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mark {
    Made,
    Name(String),
    LastUsed(Option<DateTime<Utc>>),
}

/// Which part of a list that can be read in several orders. The mark is by what the order is by.
#[derive(Debug, Clone)]
pub struct SortedSlice {
    pub order: Order,
    pub after: Option<(Mark, Uuid)>,
    pub limit: u32,
}

impl SortedSlice {
    fn fetch(&self) -> i64 {
        i64::from(self.limit) + 1
    }
}

/// For `ORDER BY`, of a table with a `name`: the same on every server, whatever its locale.
fn by_name(descending: bool) -> SqlLiteral<Text> {
    sql(if descending {
        r#"lower(name) COLLATE "C" DESC"#
    } else {
        r#"lower(name) COLLATE "C""#
    })
}

/// The rows that come after this name and id in that order.
fn beyond_name<T>(
    descending: bool,
    name: &str,
    id: Uuid,
) -> impl AppearsOnTable<T, SqlType = Bool> + NonAggregate + QueryFragment<Pg> + Send {
    sql::<Bool>(if descending {
        r#"(lower(name) COLLATE "C", id) < (lower("#
    } else {
        r#"(lower(name) COLLATE "C", id) > (lower("#
    })
    .bind::<Text, _>(name.to_owned())
    .sql(r#") COLLATE "C", "#)
    .bind::<SqlUuid, _>(id)
    .sql(")")
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
    fn new(mut rows: Vec<T>, limit: u32, total: i64) -> Self {
        let limit = limit as usize;
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
