//! Reads the log of decisions.
//!
//! **Order.** A tenant's rows are numbered without gaps, in the order in which they become visible.
//! [`append`](super::usage_append::append) assigns the numbers after locking the tenant's row in `usage_tenants`, and
//! the lock lasts until the commit. So on every replica, a reader that sees a row also sees all rows with lower
//! numbers. No other code may insert into the log.

use std::ops::RangeInclusive;

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_types::{BigInt, Bool, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use super::usage_request_id;
use crate::db::{DbError, TenantTx};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    pub key: Option<Uuid>,
    pub endpoint: Option<String>,
    pub was_rejected: Option<bool>,
    pub request_id: Option<String>,
}

impl Filter {
    /// Returns whether rows have to be scanned to find matching rows, because no index covers the whole filter.
    fn is_searched(&self) -> bool {
        self.endpoint.is_some() || self.was_rejected.is_some()
    }
}

/// The maximum number of rows that are searched for one page.
pub const SEARCHED_ROWS: i64 = 50_000;

#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct DecisionRow {
    #[diesel(sql_type = BigInt)]
    pub seq: i64,
    #[diesel(sql_type = SqlUuid)]
    pub event_id: Uuid,
    #[diesel(sql_type = Timestamptz)]
    pub timestamp: DateTime<Utc>,
    #[diesel(sql_type = SqlUuid)]
    pub key_id: Uuid,
    /// `None` if the key was deleted.
    #[diesel(sql_type = Nullable<Text>)]
    pub key_name: Option<String>,
    #[diesel(sql_type = SqlUuid)]
    pub plan_id: Uuid,
    #[diesel(sql_type = Text)]
    pub endpoint: String,
    #[diesel(sql_type = Bool)]
    pub was_rejected: bool,
    #[diesel(sql_type = Nullable<Text>)]
    pub policy: Option<String>,
    #[diesel(sql_type = Nullable<Integer>)]
    pub retry_after_seconds: Option<i32>,
    #[diesel(sql_type = BigInt)]
    pub cost: i64,
    #[diesel(sql_type = Text)]
    pub request_id: String,
}

const COLUMNS: &str = r#"l.seq, l.event_id, l."timestamp", l.key_id, k.name AS key_name, l.plan_id, l.endpoint,
    l.was_rejected, l.policy, l.retry_after_seconds, l.cost, l.request_id"#;

/// Returns conditions of a query, if the filter requires them.
fn conditions<const COUNT: usize>(conditions: [(bool, &str); COUNT]) -> String {
    let required = conditions.into_iter().filter(|(is_set, _)| *is_set);
    required
        .flat_map(|(_, condition)| [" AND ", condition])
        .collect()
}

fn key_condition(filter: &Filter) -> String {
    conditions([(filter.key.is_some(), "l.key_id = $3")])
}

/// Returns the conditions of a filter that no index covers.
fn searched_conditions(filter: &Filter) -> String {
    conditions([
        (filter.endpoint.is_some(), "l.endpoint = $4"),
        (filter.was_rejected.is_some(), "l.was_rejected = $5"),
    ])
}

/// Returns a query for the rows before a position that match the filter, apart from [`searched_conditions`]. Its result
/// is called `l`. If there are more than [`SEARCHED_ROWS`], the query may omit the oldest ones, but returns more than
/// that.
///
/// Parameters: `$1` tenant, `$2` position, `$3` key, `$4` endpoint, `$5` whether the request was denied, `$6` request
/// ID, `$7` and `$8` the earliest and the latest time of a decision if the time is in the request ID.
fn indexed_rows(filter: &Filter) -> String {
    let rows = format!(
        "SELECT l.* FROM usage_log l WHERE l.tenant_id = $1 AND l.seq < $2{}",
        key_condition(filter),
    );
    let Some(request_id) = &filter.request_id else {
        return rows;
    };
    let without_time = format!("{rows} AND l.request_id = $6 AND NOT l.request_id_has_time");
    if usage_request_id::times(request_id).is_none() {
        return without_time;
    }
    // PostgreSQL does not read the rows of a union in order. So the number of rows is limited in the first part, for
    // which it uses an index in the order of positions. It must not do so in the second part, which is materialized for
    // this reason, and has only the rows of a short time.
    format!(
        "SELECT l.* FROM ( \
             WITH of_time AS MATERIALIZED ({rows} AND l.request_id = $6 AND l.request_id_has_time \
                 AND l.\"timestamp\" BETWEEN $7 AND $8) \
             ({without_time} ORDER BY l.seq DESC LIMIT {}) UNION ALL SELECT * FROM of_time) l",
        SEARCHED_ROWS + 1,
    )
}

fn times(filter: &Filter) -> Option<RangeInclusive<DateTime<Utc>>> {
    usage_request_id::times(filter.request_id.as_deref()?)
}

macro_rules! bind_filter {
    ($query:expr, $tenant:expr, $seq:expr, $filter:expr) => {
        diesel::sql_query($query)
            .bind::<SqlUuid, _>($tenant)
            .bind::<BigInt, _>($seq)
            .bind::<Nullable<SqlUuid>, _>($filter.key)
            .bind::<Nullable<Text>, _>($filter.endpoint.as_deref())
            .bind::<Nullable<Bool>, _>($filter.was_rejected)
            .bind::<Nullable<Text>, _>($filter.request_id.as_deref())
            .bind::<Nullable<Timestamptz>, _>(times($filter).map(|it| *it.start()))
            .bind::<Nullable<Timestamptz>, _>(times($filter).map(|it| *it.end()))
    };
}

#[derive(Debug)]
pub struct Page {
    pub rows: Vec<DecisionRow>,
    /// The next page starts before this position. `None` on the last page.
    pub before: Option<i64>,
}

#[derive(QueryableByName)]
struct Seq {
    #[diesel(sql_type = BigInt)]
    seq: i64,
}

/// Lists decisions before the position `before`, newest first. Searches at most [`SEARCHED_ROWS`] rows, so any page can
/// have fewer rows than `limit`, or none.
pub async fn list(
    tx: &mut TenantTx,
    filter: &Filter,
    before: Option<i64>,
    limit: u32,
) -> Result<Page, DbError> {
    let (tenant, before) = (tx.tenant().0, before.unwrap_or(i64::MAX));
    let rows = format!("{} ORDER BY l.seq DESC", indexed_rows(filter));
    // PostgreSQL reads only as many rows of a materialized query as are needed.
    let sql = format!(
        "WITH searched AS MATERIALIZED ({rows} LIMIT $10) \
         SELECT {COLUMNS} FROM (SELECT * FROM searched l WHERE true{} ORDER BY l.seq DESC LIMIT $9) l \
         LEFT JOIN api_keys k ON k.tenant_id = $1 AND k.id = l.key_id ORDER BY l.seq DESC",
        searched_conditions(filter),
    );
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let fetched = i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1);
    let mut found = bind_filter!(sql, tenant, before, filter)
        .bind::<BigInt, _>(fetched)
        .bind::<BigInt, _>(SEARCHED_ROWS)
        .load::<DecisionRow>(&mut **tx)
        .await?;
    if found.len() > limit {
        found.truncate(limit);
        let before = found.last().map(|row| row.seq);
        return Ok(Page {
            rows: found,
            before,
        });
    }
    if !filter.is_searched() {
        return Ok(Page {
            rows: found,
            before: None,
        });
    }
    let last = format!("SELECT seq FROM ({rows} OFFSET $9 LIMIT 1) l");
    let last = bind_filter!(last, tenant, before, filter)
        .bind::<BigInt, _>(SEARCHED_ROWS - 1)
        .get_result::<Seq>(&mut **tx)
        .await
        .optional()?;
    Ok(Page {
        rows: found,
        before: last.map(|it| it.seq),
    })
}

/// Returns the number of matching decisions in the log. Returns `None` if the filter contains an endpoint, but no
/// request ID, and the rollups do not count the endpoint separately. Also returns `None` if more than [`SEARCHED_ROWS`]
/// rows have the same request ID, which is possible because callers can choose request IDs.
///
/// The log and the rollups are written together, and the log is deleted by whole days. Therefore, the rollups of the
/// remaining days count exactly the rows in the log.
pub async fn total(tx: &mut TenantTx, filter: &Filter) -> Result<Option<u64>, DbError> {
    #[derive(QueryableByName)]
    struct Total {
        #[diesel(sql_type = Nullable<BigInt>)]
        total: Option<i64>,
    }
    let tenant = tx.tenant().0;
    let sql = if filter.request_id.is_some() {
        format!(
            "SELECT CASE WHEN count(*) <= $9 THEN count(*) FILTER (WHERE true{}) END AS total \
             FROM (SELECT l.endpoint, l.was_rejected FROM ({}) l LIMIT $9 + 1) l",
            searched_conditions(filter),
            indexed_rows(filter),
        )
    } else {
        let key = if filter.key.is_some() {
            "$3"
        } else {
            "'00000000-0000-0000-0000-000000000000'"
        };
        let plan = if filter.key.is_some() {
            ""
        } else {
            " AND u.plan_id = '00000000-0000-0000-0000-000000000000'"
        };
        let policy = match filter.was_rejected {
            None => "",
            Some(true) => " AND u.policy <> ''",
            Some(false) => " AND u.policy = ''",
        };
        format!(
            "SELECT CASE WHEN $4 IS NULL \
                 OR EXISTS (SELECT FROM usage_endpoints WHERE tenant_id = $1 AND key_id = {key} AND endpoint = $4) \
                 OR NOT EXISTS (SELECT FROM usage_days WHERE tenant_id = $1 AND key_id = {key} \
                     AND endpoint = E'\\x02') \
             THEN (SELECT coalesce(sum(u.requests), 0)::bigint FROM usage_days u WHERE u.tenant_id = $1 \
                 AND u.key_id = {key} AND u.endpoint = coalesce($4, E'\\x01'){plan}{policy} \
                 AND u.start >= coalesce((SELECT min(to_date(right(c.relname, 8), 'YYYYMMDD')) FROM pg_inherits i \
                     JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'usage_log'::regclass \
                     AND c.relname ~ '\\d{{8}}$')::timestamp AT TIME ZONE 'UTC', '-infinity')) \
             END AS total"
        )
    };
    let total = bind_filter!(sql, tenant, i64::MAX, filter)
        .bind::<BigInt, _>(SEARCHED_ROWS)
        .get_result::<Total>(&mut **tx)
        .await?
        .total;
    Ok(total.map(|it| u64::try_from(it).unwrap_or(0)))
}

/// Returns the last number assigned in the tenant's log, or 0 if there is none.
pub async fn last_seq(tx: &mut TenantTx) -> Result<i64, DbError> {
    let tenant = tx.tenant().0;
    let last = diesel::sql_query("SELECT last_seq AS seq FROM usage_tenants WHERE tenant_id = $1")
        .bind::<SqlUuid, _>(tenant)
        .get_result::<Seq>(&mut **tx)
        .await
        .optional()?;
    Ok(last.map_or(0, |it| it.seq))
}

/// Returns the decisions with numbers greater than `after`, up to and including `last`, oldest first.
pub async fn between(
    tx: &mut TenantTx,
    filter: &Filter,
    after: i64,
    last: i64,
) -> Result<Vec<DecisionRow>, DbError> {
    let tenant = tx.tenant().0;
    let sql = format!(
        "SELECT {COLUMNS} FROM usage_log l LEFT JOIN api_keys k ON k.tenant_id = $1 AND k.id = l.key_id \
         WHERE l.tenant_id = $1 AND l.seq > $2 AND l.seq <= $9{}{}{} ORDER BY l.seq",
        key_condition(filter),
        conditions([(filter.request_id.is_some(), "l.request_id = $6")]),
        searched_conditions(filter),
    );
    Ok(bind_filter!(sql, tenant, after, filter)
        .bind::<BigInt, _>(last)
        .load(&mut **tx)
        .await?)
}
