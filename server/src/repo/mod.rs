//! The SQL for the server's data. Each kind of resource has its own file.
//!
//! Every function takes the transaction that it runs in. A [`TenantTx`](crate::db::TenantTx) belongs to one tenant, and
//! row-level security restricts it to that tenant's rows. A [`SystemTx`] is for the server's own work. Rows have their
//! own structs, separate from the API's types. This module does not depend on HTTP.
//!
//! Lists use keyset pagination. By default, they are sorted by ID, newest first: IDs are UUIDv7, which sort by time.
//! Lists with other sort orders use the ID as a tie-breaker.

/// Defines a function that finds one of the tenant's rows by ID. With `for_update`, the function also locks the row
/// until the transaction ends.
macro_rules! find_by_id {
    ($(#[$doc:meta])* $vis:vis fn $name:ident in $table:ident -> $row:ty $(, $for_update:ident)?) => {
        $(#[$doc])*
        $vis async fn $name(tx: &mut TenantTx, id: Uuid) -> Result<Option<$row>, DbError> {
            let query = $table::table
                .find((tx.tenant().0, id))
                .select(<$row>::as_select())
                $(.$for_update())?;
            Ok(query.first(&mut **tx).await.optional()?)
        }
    };
}

/// Defines a function that updates one of the tenant's rows by ID and returns it.
macro_rules! update_by_id {
    ($(#[$doc:meta])* $vis:vis fn $name:ident in $table:ident, $change:ident -> $row:ty) => {
        $(#[$doc])*
        $vis async fn $name(
            tx: &mut TenantTx,
            id: Uuid,
            change: &$change<'_>,
        ) -> Result<Option<$row>, DbError> {
            let query = diesel::update($table::table.find((tx.tenant().0, id)))
                .set(change)
                .returning(<$row>::as_returning());
            Ok(query.get_result(&mut **tx).await.optional()?)
        }
    };
}

/// Defines a function that deletes one of the tenant's rows by ID and returns its last state.
macro_rules! delete_by_id {
    ($(#[$doc:meta])* $vis:vis fn $name:ident in $table:ident -> $row:ty) => {
        $(#[$doc])*
        $vis async fn $name(tx: &mut TenantTx, id: Uuid) -> Result<Option<$row>, DbError> {
            let query = diesel::delete($table::table.find((tx.tenant().0, id)))
                .returning(<$row>::as_returning());
            Ok(query.get_result(&mut **tx).await.optional()?)
        }
    };
}

pub mod account;
pub mod alert;
pub mod alert_progress;
pub mod allowance;
pub mod api_key;
pub mod api_key_list;
pub mod audit;
pub mod billing;
pub mod billing_event;
pub mod billing_overview;
pub mod billing_usage;
pub mod idempotency;
pub mod invalidation;
pub mod mail;
pub mod paid_access;
pub mod plan;
pub mod quota_standing;
pub mod quota_usage;
pub mod replica;
pub mod secret;
pub mod service_token;
pub mod session;
pub mod stripe_account;
pub mod sweep;
pub mod tenant_quota;
pub mod usage;
pub mod usage_append;
mod usage_array;
pub mod usage_batch;
pub mod usage_check;
pub mod usage_endpoint;
pub mod usage_log;
pub mod usage_partition;
mod usage_request_id;
mod usage_rollup;
mod usage_rows;
pub mod usage_shipper;
pub mod usage_shipping;
pub mod usage_status;
pub mod usage_top;
pub mod webhook;
pub mod webhook_delivery;

use chrono::{DateTime, Utc};
use diesel::{
    dsl::sql,
    expression::{AppearsOnTable, NonAggregate, SqlLiteral},
    pg::Pg,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    result::QueryResult,
    sql_types::{Array, BigInt, Bool, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use quota_common::page::TOTAL_MAX;
use uuid::Uuid;

use crate::db::{DbError, SystemTx};

/// Updates `last_used_at` of many rows in one statement. Never moves it backward. Locks the rows in the order of their
/// IDs, so that replicas that write at the same time do not deadlock.
async fn touch(
    tx: &mut SystemTx,
    table: &'static str,
    used: &[(Uuid, DateTime<Utc>)],
) -> Result<(), DbError> {
    let (ids, times): (Vec<Uuid>, Vec<DateTime<Utc>>) = used.iter().copied().unzip();
    diesel::sql_query(format!(
        "WITH locked AS MATERIALIZED ( \
             SELECT t.id, u.at FROM unnest($1, $2) AS u (id, at) JOIN {table} t ON t.id = u.id \
             WHERE t.last_used_at IS NULL OR t.last_used_at < u.at \
             ORDER BY t.id FOR NO KEY UPDATE OF t \
         ) \
         UPDATE {table} t SET last_used_at = l.at FROM locked l WHERE t.id = l.id"
    ))
    .bind::<Array<SqlUuid>, _>(ids)
    .bind::<Array<Timestamptz>, _>(times)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// A request for a page of a list that is sorted newest first.
#[derive(Debug, Clone, Copy)]
pub struct Slice {
    /// The last ID on the previous page.
    pub after: Option<Uuid>,
    pub limit: u32,
}

/// The value that a list is sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SortBy {
    CreatedAt,
    /// The name, ignoring case.
    Name,
    LastUsed,
}

/// A sort order. Rows with equal values are sorted by ID, so that the order is total.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    pub by: SortBy,
    pub descending: bool,
}

/// The sort value of the last row on a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CursorKey {
    CreatedAt,
    Name(String),
    LastUsed(Option<DateTime<Utc>>),
}

/// A row of a list that can be sorted in several ways.
pub trait Sorted {
    fn id(&self) -> Uuid;
    fn cursor_key(&self, by: SortBy) -> CursorKey;
}

/// A request for a page of a list that can be sorted in several ways. The variant of the cursor key matches the order.
#[derive(Debug, Clone)]
pub struct SortedSlice {
    pub order: Order,
    pub after: Option<(CursorKey, Uuid)>,
    pub limit: u32,
}

impl SortedSlice {
    fn fetch(&self) -> i64 {
        i64::from(self.limit) + 1
    }
}

/// Returns the `ORDER BY` expression for a table's `name` column. Names are compared byte by byte, not by the rules of
/// the database's locale.
fn by_name(descending: bool) -> SqlLiteral<Text> {
    sql(if descending {
        r#"lower(name) COLLATE "C" DESC"#
    } else {
        r#"lower(name) COLLATE "C""#
    })
}

/// Selects the rows that follow this name and ID in the order of [`by_name`].
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

/// The maximum number of rows to count. Counting rows requires reading them.
pub const COUNTED_MAX: i64 = TOTAL_MAX.cast_signed();

#[derive(diesel::QueryableByName)]
struct Counted {
    #[diesel(sql_type = BigInt)]
    total: i64,
}

/// The rows of one page.
#[derive(Debug)]
pub struct Rows<T> {
    pub rows: Vec<T>,
    pub more: bool,
    /// The number of rows on all pages, counted up to [`TOTAL_MAX`].
    pub total: u64,
}

impl<T> Rows<T> {
    /// Creates a page. `rows` must contain one extra row if there is another page.
    fn new(mut rows: Vec<T>, limit: u32, total: i64) -> Self {
        let limit = limit as usize;
        let more = rows.len() > limit;
        rows.truncate(limit);
        Self {
            rows,
            more,
            total: u64::try_from(total).unwrap_or(0).min(TOTAL_MAX),
        }
    }
}

/// Counts the rows of a query up to [`TOTAL_MAX`], so that counting a long list does not read all of it.
#[derive(Debug, QueryId)]
struct UpToTotalMax<Q>(Q);

impl<Q: QueryFragment<Pg>> QueryFragment<Pg> for UpToTotalMax<Q> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("SELECT count(*) FROM (");
        self.0.walk_ast(out.reborrow())?;
        out.push_sql(&format!(" LIMIT {TOTAL_MAX}) AS counted"));
        Ok(())
    }
}

impl<Q> Query for UpToTotalMax<Q> {
    type SqlType = BigInt;
}

impl Slice {
    fn fetch(self) -> i64 {
        i64::from(self.limit) + 1
    }

    /// Returns the exclusive upper bound of IDs on this page. The maximum UUID is greater than any UUIDv7.
    fn before(self) -> Uuid {
        self.after.unwrap_or(Uuid::max())
    }
}

/// Sorts the numbered results of a statement by their numbers, which start at 1 (`WITH ORDINALITY`). A number without a
/// result gets `None`.
fn in_order<T: Clone>(len: usize, numbered: impl Iterator<Item = (i64, T)>) -> Vec<Option<T>> {
    let mut results = vec![None; len];
    for (number, result) in numbered {
        let index = usize::try_from(number - 1).unwrap_or(usize::MAX);
        if let Some(place) = results.get_mut(index) {
            *place = Some(result);
        }
    }
    results
}

/// Returns an `ILIKE` pattern that matches text containing `text` literally.
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
