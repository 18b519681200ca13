//! The endpoints that have their own rollups: a limited list for each key and for each tenant.
//!
//! Endpoints that are not listed count under `other`. A consumer may choose the path of a request, so an endpoint
//! enters the tenant's list only if it is in its key's list: one key cannot fill the tenant's list. An endpoint is
//! removed from the lists when it no longer has rollups.
//!
//! [`add`] and [`mark_seen`] work on the batch of [`usage_log::append`](super::usage_log::append), which holds the locks
//! of its tenants.

use diesel::sql_types::BigInt;
use diesel_async::RunQueryDsl;

use super::usage::{ENDPOINTS_OF_KEY, ENDPOINTS_OF_TENANT};
use crate::db::{DbError, SystemTx};

/// Adds endpoints up to the limits, oldest first.
const ADD_OF_KEY: &str = r"
WITH new AS MATERIALIZED (
    SELECT tenant_id, key_id, endpoint, min(first_at) AS first_at FROM usage_batch_counts WHERE NOT is_of_key
    GROUP BY 1, 2, 3
), known AS (
    SELECT tenant_id, key_id, count(*) AS number FROM usage_endpoints
    WHERE (tenant_id, key_id) IN (SELECT tenant_id, key_id FROM new) GROUP BY 1, 2
), numbered AS (
    SELECT n.tenant_id, n.key_id, n.endpoint, coalesce(k.number, 0)
        + row_number() OVER (PARTITION BY n.tenant_id, n.key_id ORDER BY n.first_at, n.endpoint) AS number
    FROM new n LEFT JOIN known k USING (tenant_id, key_id)
)
INSERT INTO usage_endpoints (tenant_id, key_id, endpoint)
SELECT tenant_id, key_id, endpoint FROM numbered WHERE number <= $1";

const NOTE_OF_KEY: &str = r"
UPDATE usage_batch_counts b SET is_of_key = true FROM usage_endpoints e
WHERE NOT b.is_of_key AND e.tenant_id = b.tenant_id AND e.key_id = b.key_id AND e.endpoint = b.endpoint";

const ADD_OF_TENANT: &str = r"
WITH new AS MATERIALIZED (
    SELECT tenant_id, endpoint, min(first_at) AS first_at FROM usage_batch_counts
    WHERE is_of_key AND NOT is_of_tenant GROUP BY 1, 2
), known AS (
    SELECT tenant_id, count(*) AS number FROM usage_endpoints
    WHERE key_id = '00000000-0000-0000-0000-000000000000' AND tenant_id IN (SELECT tenant_id FROM new) GROUP BY 1
), numbered AS (
    SELECT n.tenant_id, n.endpoint, coalesce(k.number, 0)
        + row_number() OVER (PARTITION BY n.tenant_id ORDER BY n.first_at, n.endpoint) AS number
    FROM new n LEFT JOIN known k USING (tenant_id)
)
INSERT INTO usage_endpoints (tenant_id, key_id, endpoint)
SELECT tenant_id, '00000000-0000-0000-0000-000000000000', endpoint FROM numbered WHERE number <= $1";

const NOTE_OF_TENANT: &str = r"
UPDATE usage_batch_counts b SET is_of_tenant = true FROM usage_endpoints e
WHERE NOT b.is_of_tenant AND e.tenant_id = b.tenant_id AND e.key_id = '00000000-0000-0000-0000-000000000000'
    AND e.endpoint = b.endpoint";

/// At most once a day for each endpoint.
const MARK_SEEN: &str = r"
UPDATE usage_endpoints e SET seen_on = CURRENT_DATE
FROM (SELECT DISTINCT tenant_id, key_id, endpoint FROM usage_batch_counts WHERE is_stale) b
WHERE e.tenant_id = b.tenant_id AND e.key_id IN (b.key_id, '00000000-0000-0000-0000-000000000000')
    AND e.endpoint = b.endpoint AND e.seen_on < CURRENT_DATE";

/// Adds the batch's new endpoints to the lists, up to the limits, and marks the listed ones in the batch.
pub(super) async fn add(tx: &mut SystemTx) -> Result<(), DbError> {
    let of_key = diesel::sql_query(ADD_OF_KEY)
        .bind::<BigInt, _>(ENDPOINTS_OF_KEY)
        .execute(&mut **tx)
        .await?;
    if of_key > 0 {
        diesel::sql_query(NOTE_OF_KEY).execute(&mut **tx).await?;
    }
    let of_tenant = diesel::sql_query(ADD_OF_TENANT)
        .bind::<BigInt, _>(ENDPOINTS_OF_TENANT)
        .execute(&mut **tx)
        .await?;
    if of_tenant > 0 {
        diesel::sql_query(NOTE_OF_TENANT).execute(&mut **tx).await?;
    }
    Ok(())
}

/// Records that the batch's endpoints are in use.
pub(super) async fn mark_seen(tx: &mut SystemTx) -> Result<(), DbError> {
    diesel::sql_query(MARK_SEEN).execute(&mut **tx).await?;
    Ok(())
}

/// Removes up to `limit` endpoints that have had no request for `days`. Returns the number of endpoints removed.
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
