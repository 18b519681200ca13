//! Appends decisions to the log and to every rollup.
//!
//! A [batch](super::usage_batch) is sorted and counted before its transaction starts, so PostgreSQL has to write only
//! one row for each decision, and one for each changed row of a rollup.
//!
//! **Lock order.** Tenants are locked in order of ID. Every other row that [`append`] writes belongs to a locked
//! tenant.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use uuid::Uuid;

use super::{
    usage::{ENDPOINTS_OF_KEY, ENDPOINTS_OF_TENANT},
    usage_batch::UsageBatch,
    usage_endpoint::{self, Endpoint},
    usage_rollup::{EndpointOf, Rank, RowKey, Sums},
    usage_rows::LogRows,
};
use crate::db::{DbError, SystemTx};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Appended {
    pub rows: u64,
    /// The number of records whose endpoint is not in their key's list of endpoints, because the list is full. Rollups
    /// combine these endpoints. The log keeps their names.
    pub folded: u64,
}

/// Longer than the timeouts of requests: a batch may be large, and has to wait for other batches of the same tenants.
/// With shorter timeouts, the batch would only have to start over.
const TIMEOUTS: &str = "SET LOCAL statement_timeout = '30s'; SET LOCAL lock_timeout = '10s'";

/// The maximum number of rows per statement, except for the log. Encoding more rows would block a request-serving
/// thread for several milliseconds.
const CHUNK: usize = 1_000;

/// Locks the tenants and assigns numbers to the rows. Later statements see everything that was committed before the
/// locks were acquired.
const TAKE_NUMBERS: &str = "\
    INSERT INTO usage_tenants AS t (tenant_id, last_seq) SELECT unnest($1), unnest($2) \
    ON CONFLICT (tenant_id) DO UPDATE SET last_seq = t.last_seq + excluded.last_seq \
    RETURNING tenant_id, last_seq";

/// Inserts rows into the log. Each row gets the columns of its group, and its place among the rows determines its
/// number.
const ADD_ROWS: &str = "\
    INSERT INTO usage_log (tenant_id, seq, \"timestamp\", event_id, key_id, plan_id, cost, retry_after_seconds, \
        was_rejected, billing, policy, endpoint, request_id, request_id_has_time) \
    SELECT g.tenant_id, g.numbered_before + r.place, r.at, r.event_id, g.key_id, g.plan_id, r.cost, \
        r.retry_after_seconds, g.was_rejected, g.billing, g.policy, g.endpoint, r.request_id, g.request_id_has_time \
    FROM unnest($1, $2, $3, $4, $5, $6) WITH ORDINALITY \
        AS r (group_place, at, event_id, cost, retry_after_seconds, request_id, place) \
    JOIN unnest($7, $8, $9, $10, $11, $12, $13, $14, $15) WITH ORDINALITY \
        AS g (tenant_id, numbered_before, key_id, plan_id, was_rejected, billing, policy, endpoint, \
            request_id_has_time, place) \
        ON g.place = r.group_place";

/// Updates the `last_used_at` of a key at most once per second, so that busy keys do not cause many writes. Skips keys
/// that another transaction has locked, because recording usage must not wait. The next use of such a key updates its
/// `last_used_at`.
const TOUCH_KEYS: &str = "\
    UPDATE api_keys k SET last_used_at = u.at \
    FROM ( \
        SELECT k.tenant_id, k.id, b.at \
        FROM unnest($1, $2, $3) AS b (tenant_id, key_id, at) \
        JOIN api_keys k ON k.tenant_id = b.tenant_id AND k.id = b.key_id \
        WHERE k.last_used_at IS NULL OR k.last_used_at < b.at - interval '1 second' \
        FOR NO KEY UPDATE OF k SKIP LOCKED \
    ) u \
    WHERE k.tenant_id = u.tenant_id AND k.id = u.id";

const ADD_CHARGED: &str = "\
    INSERT INTO billing_usage AS u (tenant_id, start, cost) SELECT unnest($1), unnest($2), unnest($3) \
    ON CONFLICT (tenant_id, start) DO UPDATE SET cost = u.cost + excluded.cost";

const ADD_QUARTERS: &str = "\
    INSERT INTO usage_quarters AS u (tenant_id, endpoint, key_id, plan_id, start, policy, requests, cost) \
    SELECT unnest($1), unnest($2), unnest($3), unnest($4), unnest($5), unnest($6), unnest($7), unnest($8) \
    ON CONFLICT (tenant_id, endpoint, key_id, plan_id, start, policy) DO UPDATE \
    SET requests = u.requests + excluded.requests, cost = u.cost + excluded.cost";

const ADD_DAYS: &str = "\
    INSERT INTO usage_days AS u (tenant_id, endpoint, key_id, plan_id, start, policy, requests, cost, last_at) \
    SELECT unnest($1), unnest($2), unnest($3), unnest($4), unnest($5), unnest($6), unnest($7), unnest($8), unnest($9) \
    ON CONFLICT (tenant_id, endpoint, key_id, plan_id, start, policy) DO UPDATE \
    SET requests = u.requests + excluded.requests, cost = u.cost + excluded.cost, \
        last_at = greatest(u.last_at, excluded.last_at)";

macro_rules! column {
    ($rows:expr, $value:expr) => {
        $rows.iter().map($value).collect::<Vec<_>>()
    };
}

#[derive(QueryableByName)]
struct Seq {
    #[diesel(sql_type = SqlUuid)]
    tenant_id: Uuid,
    #[diesel(sql_type = BigInt)]
    last_seq: i64,
}

/// Appends a batch. Call this only once per transaction, and commit soon, because this function locks the tenants.
/// Large batches take less time per record. Sets the transaction's statement timeout to 30 seconds and its lock timeout
/// to 10 seconds.
pub async fn append(tx: &mut SystemTx, batch: &UsageBatch) -> Result<Appended, DbError> {
    if batch.is_empty() {
        return Ok(Appended::default());
    }
    tx.batch_execute(TIMEOUTS).await?;
    let numbers = take_numbers(tx, batch).await?;
    let folded = add_endpoints(tx, batch).await?;
    for rows in &batch.log {
        add_rows(tx, rows, &numbers).await?;
    }
    touch_keys(tx, batch).await?;
    let changed;
    let rollups = if folded.is_empty() {
        &batch.rollups
    } else {
        changed = batch.rollups_without(&folded);
        &changed
    };
    for rows in rollups.quarters.chunks(CHUNK) {
        add_quarters(tx, batch, rows).await?;
    }
    for rows in rollups.days.chunks(CHUNK) {
        add_days(tx, batch, rows).await?;
    }
    if !batch.charged.is_empty() {
        add_charged(tx, batch).await?;
    }
    Ok(Appended {
        rows: batch.len() as u64,
        folded: u64::try_from(rollups.folded).unwrap_or(0),
    })
}

/// Assigns each record the next position in its tenant's log. For each tenant, returns the difference between a
/// record's position and its place in the batch, which is the same for all of the tenant's records. Places start at 1.
async fn take_numbers(tx: &mut SystemTx, batch: &UsageBatch) -> Result<Vec<i64>, DbError> {
    let taken = diesel::sql_query(TAKE_NUMBERS)
        .bind::<Array<SqlUuid>, _>(column!(batch.tenants, |it| it.0))
        .bind::<Array<BigInt>, _>(column!(batch.tenants, |it| it.1))
        .load::<Seq>(&mut **tx)
        .await?;
    let last = taken
        .into_iter()
        .map(|it| (it.tenant_id, it.last_seq))
        .collect::<HashMap<_, _>>();
    let mut end = 0;
    let numbers = batch.tenants.iter().map(|(tenant, count)| {
        end += count;
        last.get(tenant).copied().unwrap_or(0) - end
    });
    Ok(numbers.collect())
}

/// Updates the lists of endpoints. Returns the endpoints that do not get their own rollups, because the key or the
/// tenant has too many, or because no key in the batch lists the endpoint.
async fn add_endpoints(
    tx: &mut SystemTx,
    batch: &UsageBatch,
) -> Result<HashSet<EndpointOf>, DbError> {
    let endpoint = |(of, first_at): &(EndpointOf, DateTime<Utc>)| Endpoint {
        tenant: of.tenant,
        key: of.key,
        name: &batch.endpoints[of.endpoint],
        first_at: *first_at,
    };
    let mut new = Vec::<&(EndpointOf, DateTime<Utc>)>::new();
    for chunk in batch.named.chunks(CHUNK) {
        let endpoints = chunk.iter().map(endpoint).collect::<Vec<_>>();
        let found = usage_endpoint::find(tx, &endpoints).await?;
        new.extend(found.new.into_iter().filter_map(|it| chunk.get(it)));
        let stale = found.stale.into_iter().filter_map(|it| endpoints.get(it));
        let stale = stale.copied().collect::<Vec<_>>();
        usage_endpoint::mark_seen(tx, &stale).await?;
    }
    if new.is_empty() {
        return Ok(HashSet::new());
    }
    // The endpoints are added in a single step, because they are numbered by the time of their first request.
    let (of_tenants, of_keys) = new
        .into_iter()
        .partition::<Vec<_>, _>(|it| it.0.key.is_nil());
    let endpoints = of_keys.iter().map(endpoint).collect::<Vec<_>>();
    let others = usage_endpoint::add(tx, &endpoints, ENDPOINTS_OF_KEY).await?;
    let mut folded = others
        .into_iter()
        .filter_map(|it| Some(of_keys.get(it)?.0))
        .collect::<HashSet<_>>();
    // Only endpoints that are in a key's list can be in the tenant's list. The tenant's list orders endpoints by their
    // first request with a key that lists the endpoint.
    let mut listed = HashMap::<(Uuid, Rank), DateTime<Utc>>::new();
    for (of, first_at) in &batch.named {
        if !of.key.is_nil() && !folded.contains(of) {
            let first = listed.entry((of.tenant, of.endpoint)).or_insert(*first_at);
            *first = (*first).min(*first_at);
        }
    }
    let (mut candidates, mut endpoints) = (Vec::new(), Vec::new());
    for it in of_tenants {
        match listed.get(&(it.0.tenant, it.0.endpoint)) {
            Some(first_at) => {
                candidates.push(it.0);
                endpoints.push(Endpoint {
                    first_at: *first_at,
                    ..endpoint(&it)
                });
            }
            None => {
                folded.insert(it.0);
            }
        }
    }
    let others = usage_endpoint::add(tx, &endpoints, ENDPOINTS_OF_TENANT).await?;
    folded.extend(others.into_iter().filter_map(|it| candidates.get(it)));
    Ok(folded)
}

/// Updates the last use of the batch's keys.
async fn touch_keys(tx: &mut SystemTx, batch: &UsageBatch) -> Result<(), DbError> {
    let mut used = HashMap::<(Uuid, Uuid), DateTime<Utc>>::new();
    for (row, sums) in &batch.counts {
        let last = used.entry((row.tenant, row.key)).or_insert(sums.last_at);
        *last = sums.last_at.max(*last);
    }
    let used = used.into_iter().collect::<Vec<_>>();
    for chunk in used.chunks(CHUNK) {
        diesel::sql_query(TOUCH_KEYS)
            .bind::<Array<SqlUuid>, _>(column!(chunk, |it| it.0.0))
            .bind::<Array<SqlUuid>, _>(column!(chunk, |it| it.0.1))
            .bind::<Array<Timestamptz>, _>(column!(chunk, |it| it.1))
            .execute(&mut **tx)
            .await?;
    }
    Ok(())
}

/// Inserts rows into the log. `numbers` is the result of [`take_numbers`].
async fn add_rows(tx: &mut SystemTx, rows: &LogRows, numbers: &[i64]) -> Result<(), DbError> {
    let groups = &rows.groups;
    let offset = i64::try_from(rows.offset).unwrap_or(i64::MAX);
    let numbered_before = column!(groups.tenant_indexes, |it| numbers[*it] + offset);
    diesel::sql_query(ADD_ROWS)
        .bind::<Array<Integer>, _>(&rows.group_place)
        .bind::<Array<Timestamptz>, _>(&rows.at)
        .bind::<Array<SqlUuid>, _>(&rows.event_id)
        .bind::<Array<BigInt>, _>(&rows.cost)
        .bind::<Array<Nullable<Integer>>, _>(&rows.retry_after_seconds)
        .bind::<Array<Text>, _>(&rows.request_id)
        .bind::<Array<SqlUuid>, _>(&groups.tenant)
        .bind::<Array<BigInt>, _>(numbered_before)
        .bind::<Array<SqlUuid>, _>(&groups.key)
        .bind::<Array<SqlUuid>, _>(&groups.plan)
        .bind::<Array<Bool>, _>(&groups.was_rejected)
        .bind::<Array<Text>, _>(&groups.billing)
        .bind::<Array<Nullable<Text>>, _>(&groups.policy)
        .bind::<Array<Text>, _>(&groups.endpoint)
        .bind::<Array<Bool>, _>(&groups.request_id_has_time)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Binds the columns that both rollups have in common.
macro_rules! bind_rollup {
    ($sql:expr, $batch:expr, $rows:expr) => {
        diesel::sql_query($sql)
            .bind::<Array<SqlUuid>, _>(column!($rows, |it| it.0.tenant))
            .bind::<Array<Text>, _>(column!($rows, |it| $batch.endpoints[it.0.endpoint].as_str()))
            .bind::<Array<SqlUuid>, _>(column!($rows, |it| it.0.key))
            .bind::<Array<SqlUuid>, _>(column!($rows, |it| it.0.plan))
            .bind::<Array<Timestamptz>, _>(column!($rows, |it| start(it.0.start)))
            .bind::<Array<Text>, _>(column!($rows, |it| it.0.policy))
            .bind::<Array<BigInt>, _>(column!($rows, |it| it.1.requests))
            .bind::<Array<BigInt>, _>(column!($rows, |it| it.1.cost))
    };
}

async fn add_charged(tx: &mut SystemTx, batch: &UsageBatch) -> Result<(), DbError> {
    diesel::sql_query(ADD_CHARGED)
        .bind::<Array<SqlUuid>, _>(column!(batch.charged, |it| it.tenant))
        .bind::<Array<Timestamptz>, _>(column!(batch.charged, |it| start(it.start)))
        .bind::<Array<BigInt>, _>(column!(batch.charged, |it| it.cost))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

fn start(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(seconds, 0).unwrap_or_default()
}

async fn add_quarters(
    tx: &mut SystemTx,
    batch: &UsageBatch,
    rows: &[(RowKey, Sums)],
) -> Result<(), DbError> {
    bind_rollup!(ADD_QUARTERS, batch, rows)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

async fn add_days(
    tx: &mut SystemTx,
    batch: &UsageBatch,
    rows: &[(RowKey, Sums)],
) -> Result<(), DbError> {
    bind_rollup!(ADD_DAYS, batch, rows)
        .bind::<Array<Timestamptz>, _>(column!(rows, |it| it.1.last_at))
        .execute(&mut **tx)
        .await?;
    Ok(())
}
