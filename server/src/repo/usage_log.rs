//! The log of decisions: appends to it and the rollups, and reads it.
//!
//! **Order.** The rows of a tenant are numbered without gaps in the order in which they become visible: [`append`]
//! takes the numbers under a lock on the tenant's row of `usage_tenants` that is held until the commit. So a reader who
//! has seen all rows up to a number has missed none before it, on any replica. Nothing else may insert into the log.
//!
//! **Order of locks.** Tenants, in the order of their IDs; everything else that [`append`] writes belongs to one of them.

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use uuid::Uuid;

use super::usage_endpoint;
use crate::db::{DbError, SystemTx, TenantTx};

/// One decision on a known key. Its time is also the key's last use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRecord {
    pub event_id: Uuid,
    pub tenant_id: Uuid,
    pub key_id: Uuid,
    pub plan_id: Uuid,
    pub at: DateTime<Utc>,
    /// `free` or `paid`.
    pub billing: &'static str,
    /// Empty if the caller named none.
    pub endpoint: String,
    pub was_rejected: bool,
    /// The policy that denied it. `None` if it was admitted, or denied while capacity was reduced.
    pub policy: Option<&'static str>,
    /// Only for rejections.
    pub retry_after_seconds: Option<i32>,
    /// At least 1.
    pub cost: i64,
    pub request_id: String,
}

/// The result of appending records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Appended {
    pub rows: u64,
    /// Rows whose key has too many endpoints: in its rollups they count together, in the log they have their own.
    pub folded: u64,
}

/// The batch and its counts, on this connection alone. Plans depend on their size, so statements on them are never
/// prepared ahead. Sorting a large batch on disk would take longer than the rest. A large batch may take longer than a
/// request may, and waits for others of the same tenants: giving up would only mean doing it again.
const CREATE_BATCH: &str = r#"
SET LOCAL client_min_messages = warning;
SET LOCAL work_mem = '64MB';
SET LOCAL statement_timeout = '30s';
SET LOCAL lock_timeout = '10s';
CREATE TEMP TABLE IF NOT EXISTS usage_batch (
    tenant_id uuid NOT NULL,
    "timestamp" timestamptz NOT NULL,
    event_id uuid NOT NULL,
    key_id uuid NOT NULL,
    plan_id uuid NOT NULL,
    cost bigint NOT NULL,
    retry_after_seconds integer,
    was_rejected boolean NOT NULL,
    billing text NOT NULL,
    policy text,
    endpoint text COLLATE "C" NOT NULL,
    request_id text COLLATE "C" NOT NULL
) ON COMMIT DELETE ROWS;
CREATE TEMP TABLE IF NOT EXISTS usage_batch_counts (
    tenant_id uuid NOT NULL,
    key_id uuid NOT NULL,
    plan_id uuid NOT NULL,
    endpoint text COLLATE "C" NOT NULL,
    start timestamptz NOT NULL,
    policy text COLLATE "C" NOT NULL,
    requests bigint NOT NULL,
    cost bigint NOT NULL,
    first_at timestamptz NOT NULL,
    last_at timestamptz NOT NULL,
    is_of_key boolean NOT NULL,
    is_of_tenant boolean NOT NULL,
    is_stale boolean NOT NULL
) ON COMMIT DELETE ROWS"#;

const FILL_BATCH: &str = r#"
INSERT INTO usage_batch (tenant_id, "timestamp", event_id, key_id, plan_id, cost, retry_after_seconds, was_rejected,
    billing, policy, endpoint, request_id)
SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"#;

/// Locks the tenants and takes numbers for the rows. Statements after it see what others committed before.
const TAKE_NUMBERS: &str = r"
INSERT INTO usage_tenants AS t (tenant_id, last_seq)
SELECT tenant_id, count(*) FROM usage_batch GROUP BY tenant_id ORDER BY tenant_id
ON CONFLICT (tenant_id) DO UPDATE SET last_seq = t.last_seq + excluded.last_seq";

/// Counts the batch by quarter hour, key, plan, endpoint and policy, and notes which endpoints have rollups of their own.
const COUNT_BATCH: &str = r#"
INSERT INTO usage_batch_counts (tenant_id, key_id, plan_id, endpoint, start, policy, requests, cost, first_at, last_at,
    is_of_key, is_of_tenant, is_stale)
SELECT b.*, k.tenant_id IS NOT NULL, t.tenant_id IS NOT NULL, least(k.seen_on, t.seen_on) < CURRENT_DATE IS TRUE
FROM (
    SELECT tenant_id, key_id, plan_id, endpoint, date_bin('15 minutes', "timestamp", '2000-01-01 00:00:00+00'),
        CASE WHEN was_rejected THEN coalesce(policy, 'reduced_capacity') ELSE '' END,
        count(*), sum(cost)::bigint, min("timestamp"), max("timestamp")
    FROM usage_batch GROUP BY 1, 2, 3, 4, 5, 6
) b
LEFT JOIN usage_endpoints k ON k.tenant_id = b.tenant_id AND k.key_id = b.key_id AND k.endpoint = b.endpoint
LEFT JOIN usage_endpoints t ON t.tenant_id = b.tenant_id
    AND t.key_id = '00000000-0000-0000-0000-000000000000' AND t.endpoint = b.endpoint"#;

const ADD_ROWS: &str = r#"
INSERT INTO usage_log (tenant_id, seq, "timestamp", event_id, key_id, plan_id, cost, retry_after_seconds, was_rejected,
    billing, policy, endpoint, request_id)
SELECT b.tenant_id,
    t.last_seq - count(*) OVER (PARTITION BY b.tenant_id)
        + row_number() OVER (PARTITION BY b.tenant_id ORDER BY b."timestamp", b.event_id),
    b."timestamp", b.event_id, b.key_id, b.plan_id, b.cost, b.retry_after_seconds, b.was_rejected, b.billing, b.policy,
    b.endpoint, b.request_id
FROM usage_batch b JOIN usage_tenants t USING (tenant_id)"#;

/// Moves `last_used_at` forward, at most once per second, so that a busy key causes no more writes than others. Skips
/// keys that are locked by others: their next use is soon enough, and usage does not wait for them.
const TOUCH_KEYS: &str = r"
UPDATE api_keys k SET last_used_at = u.at
FROM (
    SELECT k.tenant_id, k.id, b.at
    FROM (SELECT tenant_id, key_id, max(last_at) AS at FROM usage_batch_counts GROUP BY 1, 2) b
    JOIN api_keys k ON k.tenant_id = b.tenant_id AND k.id = b.key_id
    WHERE k.last_used_at IS NULL OR k.last_used_at < b.at - interval '1 second'
    FOR NO KEY UPDATE OF k SKIP LOCKED
) u
WHERE k.tenant_id = u.tenant_id AND k.id = u.id";

/// `quarters` has the sums over everything that can be asked for. See the migration for what the zero UUID and the
/// control characters stand for.
const ADD_ROLLUPS: &str = r"
WITH counted AS MATERIALIZED (
    SELECT tenant_id, key_id, plan_id, start, policy, requests, cost, last_at,
        CASE WHEN is_of_key THEN endpoint ELSE E'\x02' END AS of_key,
        CASE WHEN is_of_tenant THEN endpoint ELSE E'\x02' END AS of_tenant
    FROM usage_batch_counts
), quarters AS MATERIALIZED (
    SELECT tenant_id,
        CASE WHEN grouping(of_key) = 0 THEN of_key WHEN grouping(of_tenant) = 0 THEN of_tenant ELSE E'\x01' END
            AS endpoint,
        coalesce(key_id, '00000000-0000-0000-0000-000000000000') AS key_id,
        coalesce(plan_id, '00000000-0000-0000-0000-000000000000') AS plan_id,
        start, policy, sum(requests)::bigint AS requests, sum(cost)::bigint AS cost, max(last_at) AS last_at
    FROM counted
    GROUP BY GROUPING SETS (
        (tenant_id, start, policy),
        (tenant_id, plan_id, start, policy),
        (tenant_id, key_id, plan_id, start, policy),
        (tenant_id, of_tenant, start, policy),
        (tenant_id, of_tenant, plan_id, start, policy),
        (tenant_id, of_key, key_id, plan_id, start, policy))
), by_quarter AS (
    INSERT INTO usage_quarters AS u (tenant_id, endpoint, key_id, plan_id, start, policy, requests, cost)
    SELECT tenant_id, endpoint, key_id, plan_id, start, policy, requests, cost FROM quarters
    ORDER BY 1, 2, 3, 4, 5, 6
    ON CONFLICT (tenant_id, endpoint, key_id, plan_id, start, policy) DO UPDATE
    SET requests = u.requests + excluded.requests, cost = u.cost + excluded.cost
), by_day AS (
    INSERT INTO usage_days AS u (tenant_id, endpoint, key_id, plan_id, start, policy, requests, cost, last_at)
    SELECT tenant_id, endpoint, key_id, plan_id, date_bin('1 day', start, '2000-01-01 00:00:00+00'), policy,
        sum(requests), sum(cost), max(last_at)
    FROM quarters GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1, 2, 3, 4, 5, 6
    ON CONFLICT (tenant_id, endpoint, key_id, plan_id, start, policy) DO UPDATE
    SET requests = u.requests + excluded.requests, cost = u.cost + excluded.cost,
        last_at = greatest(u.last_at, excluded.last_at)
)
SELECT coalesce(sum(requests) FILTER (WHERE NOT is_of_key), 0)::bigint AS folded FROM usage_batch_counts";

/// Charged usage, by hour.
const ADD_CHARGED: &str = r#"
INSERT INTO billing_usage AS u (tenant_id, start, cost)
SELECT tenant_id, date_bin('1 hour', "timestamp", '2000-01-01 00:00:00+00'), sum(cost)::bigint
FROM usage_batch WHERE billing = 'paid' AND NOT was_rejected GROUP BY 1, 2 ORDER BY 1, 2
ON CONFLICT (tenant_id, start) DO UPDATE SET cost = u.cost + excluded.cost"#;

/// Adds the records to the log and to every rollup. A transaction does this once, and commits soon: the tenants are
/// locked until then. A larger batch takes less time for each record. Sets the transaction's timeouts to 30 s for a
/// statement and 10 s for a lock.
pub async fn append(tx: &mut SystemTx, records: &[UsageRecord]) -> Result<Appended, DbError> {
    #[derive(QueryableByName)]
    struct Folded {
        #[diesel(sql_type = BigInt)]
        folded: i64,
    }
    if records.is_empty() {
        return Ok(Appended::default());
    }
    macro_rules! column {
        ($value:expr) => {
            records.iter().map($value).collect::<Vec<_>>()
        };
    }
    tx.batch_execute(CREATE_BATCH).await?;
    let rows = diesel::sql_query(FILL_BATCH)
        .bind::<Array<SqlUuid>, _>(column!(|it| it.tenant_id))
        .bind::<Array<Timestamptz>, _>(column!(|it| it.at))
        .bind::<Array<SqlUuid>, _>(column!(|it| it.event_id))
        .bind::<Array<SqlUuid>, _>(column!(|it| it.key_id))
        .bind::<Array<SqlUuid>, _>(column!(|it| it.plan_id))
        .bind::<Array<BigInt>, _>(column!(|it| it.cost))
        .bind::<Array<Nullable<Integer>>, _>(column!(|it| it.retry_after_seconds))
        .bind::<Array<Bool>, _>(column!(|it| it.was_rejected))
        .bind::<Array<Text>, _>(column!(|it| it.billing))
        .bind::<Array<Nullable<Text>>, _>(column!(|it| it.policy))
        .bind::<Array<Text>, _>(column!(|it| it.endpoint.as_str()))
        .bind::<Array<Text>, _>(column!(|it| it.request_id.as_str()))
        .execute(&mut **tx)
        .await?;
    diesel::sql_query(TAKE_NUMBERS).execute(&mut **tx).await?;
    diesel::sql_query(COUNT_BATCH).execute(&mut **tx).await?;
    usage_endpoint::add(tx).await?;
    usage_endpoint::mark_seen(tx).await?;
    diesel::sql_query(ADD_ROWS).execute(&mut **tx).await?;
    diesel::sql_query(TOUCH_KEYS).execute(&mut **tx).await?;
    if records
        .iter()
        .any(|it| it.billing == "paid" && !it.was_rejected)
    {
        diesel::sql_query(ADD_CHARGED).execute(&mut **tx).await?;
    }
    let folded = diesel::sql_query(ADD_ROLLUPS)
        .get_result::<Folded>(&mut **tx)
        .await?
        .folded;
    Ok(Appended {
        rows: u64::try_from(rows).unwrap_or(u64::MAX),
        folded: u64::try_from(folded).unwrap_or(0),
    })
}

/// Restricts a list of decisions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    pub key: Option<Uuid>,
    pub endpoint: Option<String>,
    pub was_rejected: Option<bool>,
    pub request_id: Option<String>,
}

impl Filter {
    /// Whether rows have to be searched for matches: no index finds exactly the matching ones.
    fn is_searched(&self) -> bool {
        self.endpoint.is_some() || self.was_rejected.is_some()
    }
}

/// The maximum number of rows that one page of a list searches for matches.
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

/// Parameters: `$3` key, `$4` endpoint, `$5` whether it was rejected, `$6` request ID.
fn conditions(filter: &Filter, of_index: bool) -> String {
    let indexed = [
        (filter.key.is_some(), " AND l.key_id = $3"),
        (filter.request_id.is_some(), " AND l.request_id = $6"),
    ];
    let others = [
        (filter.endpoint.is_some(), " AND l.endpoint = $4"),
        (filter.was_rejected.is_some(), " AND l.was_rejected = $5"),
    ];
    let chosen = if of_index { indexed } else { others };
    chosen
        .into_iter()
        .filter(|(is_set, _)| *is_set)
        .map(|(_, sql)| sql)
        .collect()
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
    };
}

/// A page of decisions.
#[derive(Debug)]
pub struct Page {
    pub rows: Vec<DecisionRow>,
    /// The next page begins before this number. `None`: this is the last page.
    pub before: Option<i64>,
}

#[derive(QueryableByName)]
struct Seq {
    #[diesel(sql_type = BigInt)]
    seq: i64,
}

/// Lists decisions before the number `before`, the newest first. Looks through at most [`SEARCHED_ROWS`], so a page may
/// be short, or empty, and not the last one.
pub async fn list(
    tx: &mut TenantTx,
    filter: &Filter,
    before: Option<i64>,
    limit: u32,
) -> Result<Page, DbError> {
    let (tenant, before) = (tx.tenant().0, before.unwrap_or(i64::MAX));
    let rows = format!(
        "SELECT l.* FROM usage_log l WHERE l.tenant_id = $1 AND l.seq < $2{} ORDER BY l.seq DESC",
        conditions(filter, true),
    );
    // A materialized query is still run only as far as its rows are asked for.
    let sql = format!(
        "WITH searched AS MATERIALIZED ({rows} LIMIT $8) \
         SELECT {COLUMNS} FROM (SELECT * FROM searched l WHERE true{} ORDER BY l.seq DESC LIMIT $7) l \
         LEFT JOIN api_keys k ON k.tenant_id = $1 AND k.id = l.key_id ORDER BY l.seq DESC",
        conditions(filter, false),
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
    let last = format!("SELECT seq FROM ({rows} OFFSET $7 LIMIT 1) l");
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

/// Returns how many decisions in the log match. `None` if the rollups do not count the endpoint separately, or if more
/// than [`SEARCHED_ROWS`] rows have the request ID, which the API caller chooses.
///
/// Log and rollups are written together, and the log is dropped by whole days, so the rollups of these days count its
/// rows.
pub async fn total(tx: &mut TenantTx, filter: &Filter) -> Result<Option<u64>, DbError> {
    #[derive(QueryableByName)]
    struct Total {
        #[diesel(sql_type = Nullable<BigInt>)]
        total: Option<i64>,
    }
    let tenant = tx.tenant().0;
    let sql = if filter.request_id.is_some() {
        format!(
            "SELECT CASE WHEN count(*) <= $7 THEN count(*) FILTER (WHERE true{}) END AS total \
             FROM (SELECT l.endpoint, l.was_rejected FROM usage_log l \
                 WHERE l.tenant_id = $1 AND l.seq < $2{} LIMIT $7 + 1) l",
            conditions(filter, false),
            conditions(filter, true),
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

/// Returns the last number of the tenant's log; 0 if it is empty.
pub async fn last_seq(tx: &mut TenantTx) -> Result<i64, DbError> {
    let tenant = tx.tenant().0;
    let last = diesel::sql_query("SELECT last_seq AS seq FROM usage_tenants WHERE tenant_id = $1")
        .bind::<SqlUuid, _>(tenant)
        .get_result::<Seq>(&mut **tx)
        .await
        .optional()?;
    Ok(last.map_or(0, |it| it.seq))
}

/// Returns the decisions in a span of numbers, the oldest first: after `after`, up to `last`.
pub async fn between(
    tx: &mut TenantTx,
    filter: &Filter,
    after: i64,
    last: i64,
) -> Result<Vec<DecisionRow>, DbError> {
    let tenant = tx.tenant().0;
    let sql = format!(
        "SELECT {COLUMNS} FROM usage_log l LEFT JOIN api_keys k ON k.tenant_id = $1 AND k.id = l.key_id \
         WHERE l.tenant_id = $1 AND l.seq > $2 AND l.seq <= $7{}{} ORDER BY l.seq",
        conditions(filter, true),
        conditions(filter, false),
    );
    Ok(bind_filter!(sql, tenant, after, filter)
        .bind::<BigInt, _>(last)
        .load(&mut **tx)
        .await?)
}
