//! The endpoints that have their own rollups. Each key and each tenant has a list of limited length.
//!
//! Endpoints that are not in a list count as `other`. Clients can choose the path of a request, so one key could fill
//! up the tenant's list. Therefore, an endpoint enters the tenant's list only if it is also in a key's list, which is
//! shorter. An endpoint is removed from the lists when it no longer has rollups.
//!
//! [`find`], [`add`], and [`mark_seen`] are steps of [`usage_append::append`](super::usage_append::append), which locks
//! the tenants.

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_types::{Array, BigInt, Bool, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::db::{DbError, SystemTx};

/// An endpoint in a key's list or, if `key` is the nil UUID, in the tenant's list.
#[derive(Debug, Clone, Copy)]
pub(super) struct Endpoint<'a> {
    pub tenant: Uuid,
    pub key: Uuid,
    pub name: &'a str,
    /// The time of the first request to the endpoint in the batch.
    pub first_at: DateTime<Utc>,
}

/// The indexes of endpoints that require an update of the lists.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The endpoints that are not in the list.
    pub new: Vec<usize>,
    /// The endpoints that are in the list, but not marked as seen today.
    pub stale: Vec<usize>,
}

const FIND: &str = "\
    SELECT n.place, e.seen_on IS NULL AS is_new \
    FROM unnest($1, $2, $3) WITH ORDINALITY AS n (tenant_id, key_id, endpoint, place) \
    LEFT JOIN usage_endpoints e \
        ON e.tenant_id = n.tenant_id AND e.key_id = n.key_id AND e.endpoint = n.endpoint \
    WHERE e.seen_on IS NULL OR e.seen_on < CURRENT_DATE";

/// Adds endpoints up to the limit, oldest first. Returns the positions of the endpoints that did not fit.
const ADD: &str = "\
    WITH new AS MATERIALIZED ( \
        SELECT * FROM unnest($1, $2, $3, $4) WITH ORDINALITY AS n (tenant_id, key_id, endpoint, first_at, place) \
    ), known AS ( \
        SELECT tenant_id, key_id, count(*) AS number FROM usage_endpoints \
        WHERE (tenant_id, key_id) IN (SELECT tenant_id, key_id FROM new) GROUP BY 1, 2 \
    ), numbered AS MATERIALIZED ( \
        SELECT n.tenant_id, n.key_id, n.endpoint, n.place, coalesce(k.number, 0) \
            + row_number() OVER (PARTITION BY n.tenant_id, n.key_id ORDER BY n.first_at, n.endpoint) AS number \
        FROM new n LEFT JOIN known k USING (tenant_id, key_id) \
    ), added AS ( \
        INSERT INTO usage_endpoints (tenant_id, key_id, endpoint) \
        SELECT tenant_id, key_id, endpoint FROM numbered WHERE number <= $5 \
    ) \
    SELECT place FROM numbered WHERE number > $5";

/// Updates each endpoint at most once a day.
const MARK_SEEN: &str = "\
    UPDATE usage_endpoints e SET seen_on = CURRENT_DATE \
    FROM unnest($1, $2, $3) AS b (tenant_id, key_id, endpoint) \
    WHERE e.tenant_id = b.tenant_id AND e.key_id = b.key_id AND e.endpoint = b.endpoint \
        AND e.seen_on < CURRENT_DATE";

#[derive(QueryableByName)]
struct FoundRow {
    /// The position of the endpoint in the parameters, starting at 1.
    #[diesel(sql_type = BigInt)]
    place: i64,
    #[diesel(sql_type = Bool)]
    is_new: bool,
}

#[derive(QueryableByName)]
struct Place {
    /// The position of the endpoint in the parameters, starting at 1.
    #[diesel(sql_type = BigInt)]
    place: i64,
}

fn index(place: i64) -> usize {
    usize::try_from(place - 1).unwrap_or(usize::MAX)
}

macro_rules! bind_endpoints {
    ($sql:expr, $endpoints:expr) => {
        diesel::sql_query($sql)
            .bind::<Array<SqlUuid>, _>($endpoints.iter().map(|it| it.tenant).collect::<Vec<_>>())
            .bind::<Array<SqlUuid>, _>($endpoints.iter().map(|it| it.key).collect::<Vec<_>>())
            .bind::<Array<Text>, _>($endpoints.iter().map(|it| it.name).collect::<Vec<_>>())
    };
}

pub(super) async fn find(tx: &mut SystemTx, endpoints: &[Endpoint<'_>]) -> Result<Found, DbError> {
    let rows = bind_endpoints!(FIND, endpoints)
        .load::<FoundRow>(&mut **tx)
        .await?;
    let mut found = Found::default();
    for row in rows {
        let list = if row.is_new {
            &mut found.new
        } else {
            &mut found.stale
        };
        list.push(index(row.place));
    }
    Ok(found)
}

/// Adds endpoints to each list until the list contains `limit` endpoints. Returns the indexes of the endpoints that did
/// not fit.
pub(super) async fn add(
    tx: &mut SystemTx,
    new: &[Endpoint<'_>],
    limit: i64,
) -> Result<Vec<usize>, DbError> {
    if new.is_empty() {
        return Ok(Vec::new());
    }
    let first_at = new.iter().map(|it| it.first_at).collect::<Vec<_>>();
    let others = bind_endpoints!(ADD, new)
        .bind::<Array<Timestamptz>, _>(first_at)
        .bind::<BigInt, _>(limit)
        .load::<Place>(&mut **tx)
        .await?;
    Ok(others.iter().map(|it| index(it.place)).collect())
}

pub(super) async fn mark_seen(
    tx: &mut SystemTx,
    endpoints: &[Endpoint<'_>],
) -> Result<(), DbError> {
    if !endpoints.is_empty() {
        bind_endpoints!(MARK_SEEN, endpoints)
            .execute(&mut **tx)
            .await?;
    }
    Ok(())
}

/// Removes up to `limit` endpoints that have had no requests for more than `days` days. Returns the number of removed
/// endpoints.
pub async fn forget(tx: &mut SystemTx, days: i64, limit: i64) -> Result<usize, DbError> {
    let forgotten = diesel::sql_query(
        "DELETE FROM usage_endpoints WHERE ctid = ANY(ARRAY( \
             SELECT ctid FROM usage_endpoints WHERE seen_on < CURRENT_DATE - $1::integer \
             ORDER BY seen_on LIMIT $2 FOR UPDATE SKIP LOCKED))",
    )
    .bind::<BigInt, _>(days)
    .bind::<BigInt, _>(limit)
    .execute(&mut **tx)
    .await?;
    Ok(forgotten)
}
