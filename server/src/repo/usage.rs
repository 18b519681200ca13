//! Reads the usage rollups.
//!
//! A row of a rollup is for one key or all keys, and for one plan or all plans. It is for one endpoint, all endpoints,
//! or all endpoints that are not counted separately. The migration that creates the rollups describes the rows. A query
//! selects only the rows for the combination it needs, so it does not have to sum rows of other combinations. To rank
//! groups over a long range, a query reads the daily rollup for whole UTC days and the 15-minute rollup for the rest of
//! the range.
//!
//! All SQL is assembled from constant parts. Values from callers are always bound as parameters.

use std::fmt::Write as _;

use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use diesel::{
    prelude::*,
    sql_types::{Array, BigInt, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::db::{DbError, TenantTx};

/// The maximum number of endpoints of a key that have their own rollups.
pub const ENDPOINTS_OF_KEY: i64 = 256;
/// The maximum number of endpoints of a tenant that have their own rollups, across all keys.
pub const ENDPOINTS_OF_TENANT: i64 = 4096;

/// The nil UUID, which stands for all keys or all plans.
const ALL: &str = "'00000000-0000-0000-0000-000000000000'";
/// The endpoint of rows that cover all endpoints.
const ALL_ENDPOINTS: &str = r"E'\x01'";

/// Selects the requests to count.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    pub key: Option<Uuid>,
    pub plan: Option<Uuid>,
    pub endpoint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupBy {
    Key,
    Endpoint,
    /// The policy that denied the requests. Allowed requests are not in any group.
    Policy,
    Plan,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    pub allowed: u64,
    pub rejected: u64,
    pub allowed_cost: u64,
    pub rejected_cost: u64,
}

impl Counts {
    pub fn is_zero(&self) -> bool {
        self.allowed == 0 && self.rejected == 0
    }

    pub fn add(&mut self, other: &Self) {
        self.allowed += other.allowed;
        self.rejected += other.rejected;
        self.allowed_cost += other.allowed_cost;
        self.rejected_cost += other.rejected_cost;
    }

    #[must_use]
    pub fn only_rejected(&self) -> Self {
        Self {
            allowed: 0,
            allowed_cost: 0,
            ..*self
        }
    }

    /// Subtracts `other`, whose requests are included in these counts.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        Self {
            allowed: self.allowed.saturating_sub(other.allowed),
            rejected: self.rejected.saturating_sub(other.rejected),
            allowed_cost: self.allowed_cost.saturating_sub(other.allowed_cost),
            rejected_cost: self.rejected_cost.saturating_sub(other.rejected_cost),
        }
    }
}

/// The counts of one group in one bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The key's or plan's ID, the endpoint, or the policy. `None` if the counts are not grouped.
    pub group: Option<String>,
    pub bucket: usize,
    pub counts: Counts,
}

/// A group and its counts in the whole range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranked {
    pub group: String,
    pub counts: Counts,
}

/// A time range with an exclusive end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub from: DateTime<Utc>,
    pub to: DateTime<Utc>,
}

impl Range {
    /// Returns the whole UTC days within the range. If there are none, returns an empty range at the end of this range.
    fn whole_days(self) -> Self {
        let day = TimeDelta::days(1);
        let floor = |at: DateTime<Utc>| at.duration_trunc(day).unwrap_or(at);
        let to = floor(self.to);
        let from = floor(self.from);
        let from = if from < self.from { from + day } else { from };
        if from < to {
            Self { from, to }
        } else {
            Self {
                from: self.to,
                to: self.to,
            }
        }
    }
}

impl Filter {
    /// Returns a condition that selects the rows for this filter. If rows are grouped by a column, selects the rows for
    /// the column's individual values. Parameters: `$2` key, `$3` plan, `$4` endpoint.
    fn condition(&self, group: Option<GroupBy>) -> String {
        let mut sql = String::from("u.tenant_id = $1");
        let has_key = self.key.is_some() || group == Some(GroupBy::Key);
        let _ = match (self.key, group) {
            (Some(_), _) => write!(sql, " AND u.key_id = $2"),
            (None, Some(GroupBy::Key)) => write!(sql, " AND u.key_id <> {ALL}"),
            (None, _) => write!(sql, " AND u.key_id = {ALL}"),
        };
        let _ = match (&self.endpoint, group) {
            (Some(_), _) => write!(sql, " AND u.endpoint = $4"),
            // The caller selects the endpoints, by a join with the list of endpoints or by their names.
            (None, Some(GroupBy::Endpoint)) => Ok(()),
            (None, _) => write!(sql, " AND u.endpoint = {ALL_ENDPOINTS}"),
        };
        let _ = match (self.plan, group) {
            (Some(_), _) => write!(sql, " AND u.plan_id = $3"),
            // Each row of a key is for one plan: no row combines a key's requests on all plans.
            _ if has_key => Ok(()),
            (None, Some(GroupBy::Plan)) => write!(sql, " AND u.plan_id <> {ALL}"),
            (None, _) => write!(sql, " AND u.plan_id = {ALL}"),
        };
        if group == Some(GroupBy::Policy) {
            sql.push_str(" AND u.policy <> ''");
        }
        sql
    }

    /// Returns the `FROM` clause for the rollup `table`, aliased as `u`. In the rollup's primary key, the endpoint
    /// comes right after the tenant, so a query that groups by endpoint joins the list of endpoints to find the rows of
    /// each endpoint.
    fn source(&self, table: &str, group: Option<GroupBy>) -> String {
        if group == Some(GroupBy::Endpoint) && self.endpoint.is_none() {
            let key = if self.key.is_some() { "$2" } else { ALL };
            format!(
                "(SELECT endpoint FROM usage_endpoints WHERE tenant_id = $1 AND key_id = {key}) e \
                 JOIN {table} u ON u.endpoint = e.endpoint"
            )
        } else {
            format!("{table} u")
        }
    }
}

/// Returns the SQL expression that rows are grouped by, with the type `text`.
const fn group_value(group: Option<GroupBy>) -> &'static str {
    match group {
        None => "NULL::text",
        Some(GroupBy::Key) => "u.key_id::text",
        Some(GroupBy::Endpoint) => "u.endpoint",
        Some(GroupBy::Policy) => "u.policy",
        Some(GroupBy::Plan) => "u.plan_id::text",
    }
}

const SUMS: &str = "coalesce(sum(u.requests) FILTER (WHERE u.policy = ''), 0)::bigint AS allowed, \
     coalesce(sum(u.requests) FILTER (WHERE u.policy <> ''), 0)::bigint AS rejected, \
     coalesce(sum(u.cost) FILTER (WHERE u.policy = ''), 0)::bigint AS allowed_cost, \
     coalesce(sum(u.cost) FILTER (WHERE u.policy <> ''), 0)::bigint AS rejected_cost";

#[derive(QueryableByName)]
struct CountsRow {
    #[diesel(sql_type = Nullable<Text>)]
    grouped: Option<String>,
    #[diesel(sql_type = Integer)]
    bucket: i32,
    #[diesel(sql_type = BigInt)]
    allowed: i64,
    #[diesel(sql_type = BigInt)]
    rejected: i64,
    #[diesel(sql_type = BigInt)]
    allowed_cost: i64,
    #[diesel(sql_type = BigInt)]
    rejected_cost: i64,
}

fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

impl CountsRow {
    fn counts(&self) -> Counts {
        Counts {
            allowed: count(self.allowed),
            rejected: count(self.rejected),
            allowed_cost: count(self.allowed_cost),
            rejected_cost: count(self.rejected_cost),
        }
    }
}

/// Returns the SQL statement for [`series`].
fn series_sql(filter: &Filter, group: Option<GroupBy>) -> String {
    let chosen = match group {
        None => "",
        // The cast to the column's type allows PostgreSQL to use an index.
        Some(GroupBy::Key) => " AND u.key_id = ANY($8::uuid[])",
        Some(GroupBy::Endpoint) => " AND u.endpoint = ANY($8)",
        Some(GroupBy::Policy) => " AND u.policy = ANY($8)",
        Some(GroupBy::Plan) => " AND u.plan_id = ANY($8::uuid[])",
    };
    format!(
        "SELECT {value} AS grouped, width_bucket(u.start, $7) AS bucket, {SUMS} \
         FROM usage_quarters u \
         WHERE {condition}{chosen} AND u.start >= $5 AND u.start < $6 \
         GROUP BY 1, 2 ORDER BY 2, 1",
        value = group_value(group),
        condition = filter.condition(group),
    )
}

/// Binds the tenant, the [`Filter`], and a range to `$1` through `$6`.
macro_rules! bind {
    ($sql:expr, $tx:expr, $filter:expr, $from:expr, $to:expr) => {
        diesel::sql_query($sql)
            .bind::<SqlUuid, _>($tx.tenant().0)
            .bind::<Nullable<SqlUuid>, _>($filter.key)
            .bind::<Nullable<SqlUuid>, _>($filter.plan)
            .bind::<Nullable<Text>, _>($filter.endpoint.as_deref())
            .bind::<Timestamptz, _>($from)
            .bind::<Timestamptz, _>($to)
    };
}

macro_rules! bind_series {
    ($sql:expr, $tx:expr, $filter:expr, $values:expr, $starts:expr, $to:expr) => {{
        let from = $starts.first().copied().unwrap_or($to);
        bind!($sql, $tx, $filter, from, $to)
            .bind::<Array<Timestamptz>, _>($starts)
            .bind::<Array<Text>, _>($values)
    }};
}

/// Counts requests by bucket and, if `groups` is set, also by these groups. `starts` contains the start of each bucket
/// in ascending order; the last bucket ends at `to`. Omits buckets without requests.
pub async fn series(
    tx: &mut TenantTx,
    filter: &Filter,
    groups: Option<(GroupBy, &[String])>,
    starts: &[DateTime<Utc>],
    to: DateTime<Utc>,
) -> Result<Vec<Row>, DbError> {
    let sql = series_sql(filter, groups.map(|(group, _)| group));
    let values: Vec<&str> = groups
        .into_iter()
        .flat_map(|(_, values)| values.iter().map(String::as_str))
        .collect();
    let query = bind_series!(sql, tx, filter, values, starts, to);
    let rows = query.load::<CountsRow>(&mut **tx).await?;
    Ok(rows
        .into_iter()
        .map(|row| Row {
            counts: row.counts(),
            bucket: usize::try_from(row.bucket - 1).unwrap_or(0),
            group: row.grouped,
        })
        .collect())
}

/// Executes the statement of [`series`] without groups, and returns PostgreSQL's query plan. Used for measurements.
pub async fn explain_series(
    tx: &mut TenantTx,
    filter: &Filter,
    starts: &[DateTime<Utc>],
    to: DateTime<Utc>,
) -> Result<Vec<String>, DbError> {
    #[derive(QueryableByName)]
    struct Line {
        #[diesel(sql_type = Text, column_name = "QUERY PLAN")]
        line: String,
    }
    let sql = format!(
        "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {}",
        series_sql(filter, None)
    );
    let query = bind_series!(sql, tx, filter, Vec::<&str>::new(), starts, to);
    let lines = query.load::<Line>(&mut **tx).await?;
    Ok(lines.into_iter().map(|it| it.line).collect())
}

/// Returns the groups with the most requests in the range, largest first.
pub async fn ranked(
    tx: &mut TenantTx,
    filter: &Filter,
    group: GroupBy,
    range: Range,
    limit: usize,
) -> Result<Vec<Ranked>, DbError> {
    let days = range.whole_days();
    let part = |table: &str, span: &str| {
        format!(
            "SELECT {value} AS grouped, u.policy, u.requests, u.cost FROM {source} WHERE {condition} AND {span}",
            value = group_value(Some(group)),
            source = filter.source(table, Some(group)),
            condition = filter.condition(Some(group)),
        )
    };
    // `[$5, $6)` is the range, and `[$7, $8)` contains the whole days in it.
    let sql = format!(
        "SELECT grouped, 0 AS bucket, {SUMS} FROM ({} UNION ALL {} UNION ALL {}) u \
         GROUP BY 1 ORDER BY sum(u.requests) DESC, 1 LIMIT $9",
        part("usage_days", "u.start >= $7 AND u.start < $8"),
        part("usage_quarters", "u.start >= $5 AND u.start < $7"),
        part("usage_quarters", "u.start >= $8 AND u.start < $6"),
    );
    let rows = bind!(sql, tx, filter, range.from, range.to)
        .bind::<Timestamptz, _>(days.from)
        .bind::<Timestamptz, _>(days.to)
        .bind::<BigInt, _>(i64::try_from(limit).unwrap_or(i64::MAX))
        .load::<CountsRow>(&mut **tx)
        .await?;
    Ok(rows
        .into_iter()
        .filter_map(|row| {
            Some(Ranked {
                counts: row.counts(),
                group: row.grouped?,
            })
        })
        .collect())
}

/// Returns the time of each group's latest request on the UTC days that overlap the range. This time may be after the
/// end of the range.
pub async fn last_seen(
    tx: &mut TenantTx,
    filter: &Filter,
    (group, values): (GroupBy, &[String]),
    range: Range,
) -> Result<Vec<(String, DateTime<Utc>)>, DbError> {
    #[derive(QueryableByName)]
    struct Seen {
        #[diesel(sql_type = Text)]
        grouped: String,
        #[diesel(sql_type = Timestamptz)]
        last_at: DateTime<Utc>,
    }
    let chosen = match group {
        GroupBy::Key => "u.key_id = ANY($7::uuid[])",
        GroupBy::Endpoint => "u.endpoint = ANY($7)",
        GroupBy::Policy => "u.policy = ANY($7)",
        GroupBy::Plan => "u.plan_id = ANY($7::uuid[])",
    };
    let sql = format!(
        "SELECT {value} AS grouped, max(u.last_at) AS last_at FROM usage_days u \
         WHERE {condition} AND {chosen} AND u.start > $5 - interval '1 day' AND u.start < $6 GROUP BY 1",
        value = group_value(Some(group)),
        condition = filter.condition(Some(group)),
    );
    let rows = bind!(sql, tx, filter, range.from, range.to)
        .bind::<Array<Text>, _>(values)
        .load::<Seen>(&mut **tx)
        .await?;
    Ok(rows
        .into_iter()
        .map(|it| (it.grouped, it.last_at))
        .collect())
}

/// Returns the IDs and current names of keys or plans. Omits deleted keys and plans.
pub async fn names(
    tx: &mut TenantTx,
    group: GroupBy,
    ids: &[String],
) -> Result<Vec<(String, String)>, DbError> {
    #[derive(QueryableByName)]
    struct Named {
        #[diesel(sql_type = Text)]
        id: String,
        #[diesel(sql_type = Text)]
        name: String,
    }
    let table = match group {
        GroupBy::Key => "api_keys",
        GroupBy::Plan => "plans",
        GroupBy::Endpoint | GroupBy::Policy => return Ok(Vec::new()),
    };
    let tenant = tx.tenant().0;
    let rows = diesel::sql_query(format!(
        "SELECT id::text AS id, name FROM {table} WHERE tenant_id = $1 AND id = ANY($2::uuid[])"
    ))
    .bind::<SqlUuid, _>(tenant)
    .bind::<Array<Text>, _>(ids)
    .load::<Named>(&mut **tx)
    .await?;
    Ok(rows.into_iter().map(|it| (it.id, it.name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().expect("a time")
    }

    #[test]
    fn whole_days_are_within_the_range() {
        for (from, to, days) in [
            (
                "2026-03-01T00:00:00Z",
                "2026-03-03T00:00:00Z",
                Some(("2026-03-01T00:00:00Z", "2026-03-03T00:00:00Z")),
            ),
            (
                "2026-03-01T00:15:00Z",
                "2026-03-03T00:15:00Z",
                Some(("2026-03-02T00:00:00Z", "2026-03-03T00:00:00Z")),
            ),
            ("2026-03-01T00:15:00Z", "2026-03-02T23:45:00Z", None),
            ("2026-03-01T00:15:00Z", "2026-03-01T00:30:00Z", None),
        ] {
            let range = Range {
                from: at(from),
                to: at(to),
            };
            let whole = range.whole_days();
            match days {
                Some((first, last)) => assert_eq!(
                    whole,
                    Range {
                        from: at(first),
                        to: at(last)
                    }
                ),
                None => assert_eq!((whole.from, whole.to), (range.to, range.to)),
            }
        }
    }
}
