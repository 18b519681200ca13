//! Compares tables that count the same requests in different ways: the log, the rollups, and the quota ledger.
//!
//! The log and the rollups are written in one transaction, so any difference between them is an error. The ledger
//! counts the tokens that replicas have taken. If the ledger exceeds recorded usage after a window has ended, crashes
//! have stranded tokens: each crash strands at most one block per quota. If recorded usage exceeds the ledger although
//! the quota did not change, requests were allowed without being counted.

use chrono::NaiveDate;
use diesel::{
    prelude::*,
    sql_types::{BigInt, Bool, Date},
};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};

use crate::db::{DbError, SystemTx};

/// The advisory lock that ensures that only one replica compares at a time.
const CHECK_LOCK: i64 = 7_226_424;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Differences {
    /// The log and each level of the rollups count a tenant's requests. This is the difference between the highest and
    /// the lowest of these counts, summed over all tenants.
    pub log_and_rollups: i64,
    /// The cost that is in the ledger but was not recorded.
    pub ledger_excess: i64,
    /// The cost that was recorded but is not in the ledger. Excludes a window if the key or its plan has changed since
    /// an hour before the window started.
    pub rollup_excess: i64,
}

#[derive(QueryableByName)]
struct Flag {
    #[diesel(sql_type = Bool)]
    flag: bool,
}

#[derive(QueryableByName)]
struct Difference {
    #[diesel(sql_type = BigInt)]
    difference: i64,
}

#[derive(QueryableByName)]
struct Excess {
    #[diesel(sql_type = BigInt)]
    ledger: i64,
    #[diesel(sql_type = BigInt)]
    rollups: i64,
}

/// Compares the log with every level of the rollups: the tenant's daily and 15-minute totals, keys, endpoints, plans,
/// endpoints of keys, and endpoints of plans.
const LOG_AND_ROLLUPS: &str = r#"
WITH day AS (SELECT $1::timestamp AT TIME ZONE 'UTC' AS start, ($1 + 1)::timestamp AT TIME ZONE 'UTC' AS until),
levels AS (
    SELECT tenant_id, 'log' AS level, count(*) AS requests FROM usage_log, day
    WHERE "timestamp" >= day.start AND "timestamp" < day.until GROUP BY 1
    UNION ALL
    SELECT tenant_id, CASE
            WHEN key_id <> none AND endpoint <> E'\x01' THEN 'endpoints of keys'
            WHEN key_id <> none THEN 'keys'
            WHEN endpoint <> E'\x01' AND plan_id <> none THEN 'endpoints of plans'
            WHEN endpoint <> E'\x01' THEN 'endpoints'
            WHEN plan_id <> none THEN 'plans'
            ELSE 'days' END,
        sum(requests)::bigint
    FROM usage_days u, day, (SELECT '00000000-0000-0000-0000-000000000000'::uuid AS none) zero
    WHERE u.start = day.start GROUP BY 1, 2
    UNION ALL
    SELECT tenant_id, 'quarters', sum(requests)::bigint FROM usage_quarters u, day
    WHERE u.start >= day.start AND u.start < day.until AND key_id = '00000000-0000-0000-0000-000000000000'
        AND plan_id = '00000000-0000-0000-0000-000000000000' AND endpoint = E'\x01' GROUP BY 1
)
SELECT coalesce(sum(difference), 0)::bigint AS difference FROM (
    -- A missing level counts as 0.
    SELECT max(requests) - CASE WHEN count(*) = 8 THEN min(requests) ELSE 0 END AS difference
    FROM levels GROUP BY tenant_id
) t"#;

/// Compares the ledger with the rollups for windows that ended between 1 and 25 hours ago. By then, replicas have
/// returned unused tokens.
///
/// If a key's plan gains or loses a quota during a window, the ledger rightly counts only part of the key's usage.
/// Therefore, usage that exceeds the ledger is reported only if neither the key nor its plan has changed since an hour
/// before the window started. In that case, every replica knew the quota during the whole window.
const LEDGER_AND_ROLLUPS: &str = r"
SELECT coalesce(sum(greatest(used - spent, 0)), 0)::bigint AS ledger,
    coalesce(sum(greatest(spent - used, 0)) FILTER (WHERE is_unchanged), 0)::bigint AS rollups
FROM (
    SELECT q.used, coalesce((
        SELECT sum(u.cost) FROM usage_quarters u
        WHERE u.tenant_id = q.tenant_id AND u.endpoint = E'\x01' AND u.key_id = q.key_id AND u.policy = ''
            AND u.start >= q.window_start AND u.start < q.window_end
    ), 0)::bigint AS spent,
        (k.updated_at = k.created_at OR k.updated_at < q.window_start - interval '1 hour')
        AND (p.updated_at = p.created_at OR p.updated_at < q.window_start - interval '1 hour') AS is_unchanged
    FROM quota_usage q
    JOIN api_keys k ON k.tenant_id = q.tenant_id AND k.id = q.key_id
    JOIN plans p ON p.tenant_id = k.tenant_id AND p.id = k.plan_id
    WHERE q.window_end <= now() - interval '1 hour' AND q.window_end > now() - interval '25 hours'
) w";

/// Compares the log with the rollups for a UTC day, and recorded usage with the ledger. Returns `None` if another
/// replica is comparing. May take minutes.
pub async fn differences(
    tx: &mut SystemTx,
    day: NaiveDate,
) -> Result<Option<Differences>, DbError> {
    tx.batch_execute("SET LOCAL statement_timeout = '5min'")
        .await?;
    let alone = diesel::sql_query("SELECT pg_try_advisory_xact_lock($1) AS flag")
        .bind::<BigInt, _>(CHECK_LOCK)
        .get_result::<Flag>(&mut **tx)
        .await?;
    if !alone.flag {
        return Ok(None);
    }
    let log = diesel::sql_query(LOG_AND_ROLLUPS)
        .bind::<Date, _>(day)
        .get_result::<Difference>(&mut **tx)
        .await?;
    let ledger = diesel::sql_query(LEDGER_AND_ROLLUPS)
        .get_result::<Excess>(&mut **tx)
        .await?;
    Ok(Some(Differences {
        log_and_rollups: log.difference,
        ledger_excess: ledger.ledger,
        rollup_excess: ledger.rollups,
    }))
}
