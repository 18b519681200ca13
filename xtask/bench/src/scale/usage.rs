//! Usage of every key, inserted into the tables in which the server stores usage.

use anyhow::Result;
use tokio_postgres::Client;

/// The number of days with usage, before today.
const DAYS: u32 = 28;

/// Replaces all usage with one request per key, on one of 28 days, to one of 50 endpoints.
pub(super) async fn fill(client: &Client) -> Result<()> {
    client
        .batch_execute(&format!(
            "TRUNCATE usage_log, usage_tenants, usage_quarters, usage_days, usage_endpoints;
             SELECT usage_create_partitions(current_date - {DAYS}, current_date);
             CREATE TEMP TABLE request AS
                 SELECT tenant_id, id AS key_id, plan_id, number, 'GET /v1/resource/' || number % 50 AS endpoint,
                     (current_date - 1 - (number % {DAYS})::integer)::timestamptz
                         + number / {DAYS} % 96 * interval '15 minutes' AS start
                 FROM (SELECT *, row_number() OVER () AS number FROM api_keys) AS k;
             INSERT INTO usage_tenants (tenant_id, last_seq)
                 SELECT tenant_id, max(number) FROM request GROUP BY tenant_id;
             INSERT INTO usage_log (tenant_id, seq, \"timestamp\", event_id, key_id, plan_id, cost, was_rejected,
                     billing, endpoint, request_id)
                 SELECT tenant_id, number, start + interval '1 minute', gen_random_uuid(), key_id, plan_id, 1, false,
                     'free', endpoint, 'request-' || number
                 FROM request;
             INSERT INTO usage_endpoints (tenant_id, key_id, endpoint)
                 SELECT tenant_id, key_id, endpoint FROM request
                 UNION SELECT tenant_id, {ALL}, endpoint FROM request;
             INSERT INTO usage_quarters (tenant_id, endpoint, key_id, plan_id, start, policy, requests, cost)
                 SELECT r.tenant_id, level.endpoint, level.key_id, level.plan_id, r.start, '', count(*), count(*)
                 FROM request AS r CROSS JOIN LATERAL (VALUES
                     (E'\\x01', {ALL}, {ALL}), (E'\\x01', {ALL}, r.plan_id), (E'\\x01', r.key_id, r.plan_id),
                     (r.endpoint, {ALL}, {ALL}), (r.endpoint, {ALL}, r.plan_id), (r.endpoint, r.key_id, r.plan_id)
                 ) AS level (endpoint, key_id, plan_id)
                 GROUP BY 1, 2, 3, 4, 5;
             INSERT INTO usage_days (tenant_id, endpoint, key_id, plan_id, start, policy, requests, cost, last_at)
                 SELECT tenant_id, endpoint, key_id, plan_id, date_trunc('day', start, 'UTC'), policy, sum(requests),
                     sum(cost), max(start)
                 FROM usage_quarters GROUP BY 1, 2, 3, 4, 5, 6;
             DROP TABLE request",
            ALL = "'00000000-0000-0000-0000-000000000000'::uuid"
        ))
        .await?;
    client
        .batch_execute("VACUUM (ANALYZE) usage_log, usage_quarters, usage_days, usage_endpoints")
        .await?;
    Ok(())
}

/// Returns the query parameters of the range that contains all usage.
pub(super) async fn range(client: &Client) -> Result<String> {
    let row = client
        .query_one(
            "SELECT 'from=' || (current_date - $1::text::integer) || 'T00:00:00Z&to=' || current_date || 'T00:00:00Z'",
            &[&DAYS.to_string()],
        )
        .await?;
    Ok(row.get(0))
}
