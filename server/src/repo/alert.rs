//! Quota alerts, and the usage that causes them.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_query,
    sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use quota_common::TenantId;
use uuid::Uuid;

use super::{COUNTED_MAX, Counted, Rows, Slice};
use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::quota_alerts,
};

#[derive(Debug, Clone, Queryable, Selectable, QueryableByName)]
#[diesel(table_name = quota_alerts, check_for_backend(diesel::pg::Pg))]
pub struct AlertRow {
    pub id: Uuid,
    /// The nil UUID if the quota applies to the whole tenant.
    pub key_id: Uuid,
    pub key_name: Option<String>,
    pub policy: String,
    pub threshold: i32,
    pub quota: i64,
    pub used: i64,
    pub window_start: DateTime<Utc>,
    pub window_end: DateTime<Utc>,
    pub email_pending: bool,
    pub created_at: DateTime<Utc>,
}

pub async fn list(tx: &mut TenantTx, slice: Slice) -> Result<Rows<AlertRow>, DbError> {
    let tenant = tx.tenant().0;
    let counted: Counted = sql_query(
        "SELECT count(*) AS total FROM (SELECT FROM quota_alerts WHERE tenant_id = $1 LIMIT $2) counted",
    )
    .bind::<SqlUuid, _>(tenant)
    .bind::<BigInt, _>(COUNTED_MAX)
    .get_result(&mut **tx)
    .await?;
    let rows = quota_alerts::table
        .filter(quota_alerts::tenant_id.eq(tenant))
        .filter(quota_alerts::id.lt(slice.before()))
        .order(quota_alerts::id.desc())
        .limit(slice.fetch())
        .select(AlertRow::as_select())
        .load(&mut **tx)
        .await?;
    Ok(Rows::new(rows, slice.limit, counted.total))
}

/// Who receives alerts by email.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct SettingsRow {
    #[diesel(sql_type = Bool)]
    pub alert_email: bool,
    #[diesel(sql_type = Array<Text>)]
    pub alert_email_roles: Vec<String>,
    /// The tenant's name.
    #[diesel(sql_type = Text)]
    pub name: String,
}

/// Returns the tenant's alert settings. If `for_update` is set, locks them until the transaction ends.
pub async fn settings(tx: &mut TenantTx, for_update: bool) -> Result<SettingsRow, DbError> {
    let lock = if for_update { "FOR NO KEY UPDATE" } else { "" };
    let tenant = tx.tenant().0;
    let settings = sql_query(format!(
        "SELECT alert_email, alert_email_roles, name FROM tenants WHERE id = $1 {lock}"
    ))
    .bind::<SqlUuid, _>(tenant);
    Ok(settings.get_result(&mut **tx).await?)
}

pub async fn update_settings(
    tx: &mut TenantTx,
    email: bool,
    roles: &[&str],
) -> Result<(), DbError> {
    let tenant = tx.tenant().0;
    sql_query("UPDATE tenants SET alert_email = $2, alert_email_roles = $3 WHERE id = $1")
        .bind::<SqlUuid, _>(tenant)
        .bind::<Bool, _>(email)
        .bind::<Array<Text>, _>(roles)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

// Quota checks -------------------------------------------------------------------------------------------

/// How long reading the usage of windows may take.
pub const USAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Returns tenants with usage that has not been checked yet, in random order.
pub async fn unchecked_tenants(tx: &mut SystemTx, limit: i64) -> Result<Vec<Uuid>, DbError> {
    #[derive(QueryableByName)]
    struct Unchecked {
        #[diesel(sql_type = SqlUuid)]
        tenant_id: Uuid,
    }
    let tenants: Vec<Unchecked> = sql_query(
        "SELECT u.tenant_id FROM usage_tenants u JOIN tenants t ON t.id = u.tenant_id \
             LEFT JOIN quota_alert_progress p ON p.tenant_id = u.tenant_id \
         WHERE p.seq IS DISTINCT FROM u.last_seq ORDER BY random() LIMIT $1",
    )
    .bind::<BigInt, _>(limit)
    .get_results(&mut **tx)
    .await?;
    Ok(tenants.into_iter().map(|it| it.tenant_id).collect())
}

/// Returns tenants with a plan that has a quota, and tenants with usage of a tenant quota, in random order.
pub async fn tenants_with_quotas(tx: &mut SystemTx) -> Result<Vec<Uuid>, DbError> {
    #[derive(QueryableByName)]
    struct Tenant {
        #[diesel(sql_type = SqlUuid)]
        tenant_id: Uuid,
    }
    let tenants: Vec<Tenant> = sql_query(
        "SELECT tenant_id FROM ( \
             SELECT tenant_id FROM plans WHERE daily_quota IS NOT NULL OR monthly_quota IS NOT NULL \
             UNION SELECT tenant_id FROM tenant_quota_usage \
         ) all_tenants ORDER BY random()",
    )
    .get_results(&mut **tx)
    .await?;
    Ok(tenants.into_iter().map(|it| it.tenant_id).collect())
}

/// The progress of checking a tenant's usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Usage of all keys has been checked up to this position in the log. -1 if no usage has been checked.
    pub seq: i64,
    /// While a check is in progress: the check's target position, and the last key checked.
    pub part: Option<(i64, Uuid)>,
    /// The last position in the log.
    pub last_seq: i64,
}

/// Locks a tenant's progress until the transaction ends. Returns `None` if another replica has locked the progress or
/// the tenant no longer exists.
pub async fn lock_progress(
    tx: &mut SystemTx,
    tenant: TenantId,
) -> Result<Option<Progress>, DbError> {
    #[derive(QueryableByName)]
    struct Locked {
        #[diesel(sql_type = BigInt)]
        seq: i64,
        #[diesel(sql_type = Nullable<BigInt>)]
        until_seq: Option<i64>,
        #[diesel(sql_type = Nullable<SqlUuid>)]
        after_key: Option<Uuid>,
    }
    #[derive(QueryableByName)]
    struct Last {
        #[diesel(sql_type = BigInt)]
        last_seq: i64,
    }
    sql_query(
        "INSERT INTO quota_alert_progress (tenant_id, seq) SELECT id, -1 FROM tenants WHERE id = $1 \
         ON CONFLICT ON CONSTRAINT quota_alert_progress_pkey DO NOTHING",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .execute(&mut **tx)
    .await?;
    let locked: Option<Locked> = sql_query(
        "SELECT seq, until_seq, after_key FROM quota_alert_progress WHERE tenant_id = $1 \
         FOR UPDATE SKIP LOCKED",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .get_result(&mut **tx)
    .await
    .optional()?;
    let Some(Locked {
        seq,
        until_seq,
        after_key,
    }) = locked
    else {
        return Ok(None);
    };
    // Read the position after locking, so that it is at least the position that another replica has checked.
    let last: Option<Last> = sql_query("SELECT last_seq FROM usage_tenants WHERE tenant_id = $1")
        .bind::<SqlUuid, _>(tenant.0)
        .get_result(&mut **tx)
        .await
        .optional()?;
    Ok(Some(Progress {
        seq,
        part: until_seq.zip(after_key),
        last_seq: last.map_or(seq, |it| it.last_seq),
    }))
}

pub async fn set_progress(
    tx: &mut SystemTx,
    tenant: TenantId,
    seq: i64,
    part: Option<(i64, Uuid)>,
) -> Result<(), DbError> {
    sql_query(
        "UPDATE quota_alert_progress SET seq = $2, until_seq = $3, after_key = $4 WHERE tenant_id = $1",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<BigInt, _>(seq)
    .bind::<Nullable<BigInt>, _>(part.map(|it| it.0))
    .bind::<Nullable<SqlUuid>, _>(part.map(|it| it.1))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// Keys with records in this part of the usage log.
    Used {
        after: i64,
        until: i64,
    },
    All,
}

/// Returns up to `limit` of a tenant's keys to check. Starts after `after_key`, in order of ID.
pub async fn keys(
    tx: &mut SystemTx,
    tenant: TenantId,
    keys: Keys,
    after_key: Uuid,
    limit: i64,
) -> Result<Vec<Uuid>, DbError> {
    #[derive(QueryableByName)]
    struct Key {
        #[diesel(sql_type = SqlUuid)]
        id: Uuid,
    }
    let found: Vec<Key> = match keys {
        // Do not restrict the query by time, because replicas can ship records long after the requests. The index on
        // positions finds the range in each of the log's daily partitions.
        Keys::Used { after, until } => {
            sql_query(
                "SELECT DISTINCT key_id AS id FROM usage_log \
                 WHERE tenant_id = $1 AND seq > $4 AND seq <= $5 AND key_id > $2 ORDER BY id LIMIT $3",
            )
            .bind::<SqlUuid, _>(tenant.0)
            .bind::<SqlUuid, _>(after_key)
            .bind::<BigInt, _>(limit)
            .bind::<BigInt, _>(after)
            .bind::<BigInt, _>(until)
            .get_results(&mut **tx)
            .await?
        }
        Keys::All => {
            sql_query("SELECT id FROM api_keys WHERE tenant_id = $1 AND id > $2 ORDER BY id LIMIT $3")
                .bind::<SqlUuid, _>(tenant.0)
                .bind::<SqlUuid, _>(after_key)
                .bind::<BigInt, _>(limit)
                .get_results(&mut **tx)
                .await?
        }
    };
    Ok(found.into_iter().map(|it| it.id).collect())
}

/// The usage of a quota in one window.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct QuotaStanding {
    /// The nil UUID if the quota applies to the whole tenant.
    #[diesel(sql_type = SqlUuid)]
    pub key_id: Uuid,
    #[diesel(sql_type = Nullable<Text>)]
    pub key_name: Option<String>,
    #[diesel(sql_type = Text)]
    pub policy: String,
    /// The quota of the window.
    #[diesel(sql_type = BigInt)]
    pub quota: i64,
    /// The number of tokens that replicas have taken, which is at least the number of spent tokens.
    #[diesel(sql_type = BigInt)]
    pub taken: i64,
    /// The cost of allowed requests.
    #[diesel(sql_type = BigInt)]
    pub spent: i64,
    /// Whether this quota denied a request.
    #[diesel(sql_type = Bool)]
    pub has_denials: bool,
    #[diesel(sql_type = Timestamptz)]
    pub window_start: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    pub window_end: DateTime<Utc>,
}

/// How long ago the usage being checked occurred. Usage is recorded late if a replica cannot reach PostgreSQL.
#[derive(Debug, Clone, Default)]
pub struct Lateness {
    /// The time of each key's oldest usage.
    oldest: HashMap<Uuid, DateTime<Utc>>,
    /// Whether the age of the usage is unknown, because reading the time of every record would take too long. If so,
    /// the usage may be up to a day old.
    is_unknown: bool,
}

impl Lateness {
    pub fn unknown() -> Self {
        Self {
            is_unknown: true,
            ..Self::default()
        }
    }

    /// Determines how long ago the usage in this part of the log occurred.
    pub async fn of_records(
        tx: &mut SystemTx,
        tenant: TenantId,
        (after, until): (i64, i64),
    ) -> Result<Self, DbError> {
        #[derive(QueryableByName)]
        struct Oldest {
            #[diesel(sql_type = SqlUuid)]
            key_id: Uuid,
            #[diesel(sql_type = Timestamptz)]
            at: DateTime<Utc>,
        }
        let oldest = sql_query(
            "SELECT key_id, min(\"timestamp\") AS at FROM usage_log \
             WHERE tenant_id = $1 AND seq > $2 AND seq <= $3 GROUP BY key_id",
        )
        .bind::<SqlUuid, _>(tenant.0)
        .bind::<BigInt, _>(after)
        .bind::<BigInt, _>(until);
        let oldest: Vec<Oldest> = oldest.get_results(&mut **tx).await?;
        Ok(Self {
            oldest: oldest.into_iter().map(|it| (it.key_id, it.at)).collect(),
            is_unknown: false,
        })
    }
}

/// Returns these keys' quota windows in which at least `percent` is used, unless an alert already says that the quota
/// is used up. Considers current windows, windows that ended in the last 15 minutes, and windows in which the usage
/// being checked occurred. Omits windows of the last kind if the key or its plan has been edited since, because their
/// quota is unknown. Calculates the quota of a shortened window like [`quota_usage::take`](super::quota_usage::take).
pub async fn standings(
    tx: &mut SystemTx,
    tenant: TenantId,
    keys: &[Uuid],
    percent: i32,
    lateness: &Lateness,
) -> Result<Vec<QuotaStanding>, DbError> {
    // A month's rollups have many rows, so they are read only for the windows that matter.
    let limit = format!(
        "SET LOCAL statement_timeout = {}",
        USAGE_TIMEOUT.as_millis()
    );
    tx.batch_execute(&limit).await?;
    let since: Vec<_> = keys.iter().map(|key| lateness.oldest.get(key)).collect();
    let standings = sql_query(
        r"WITH windows AS MATERIALIZED (
              SELECT k.id AS key_id, k.name AS key_name, v.policy, w.quota, w.used AS taken, w.window_start, w.window_end
              FROM unnest($2, $4) AS checked (key_id, since)
              JOIN api_keys k ON k.tenant_id = $1 AND k.id = checked.key_id
              JOIN plans p ON p.tenant_id = k.tenant_id AND p.id = k.plan_id
              CROSS JOIN LATERAL (VALUES ('daily', p.daily_quota), ('monthly', p.monthly_quota)) v (policy, quota)
              CROSS JOIN LATERAL (
                  SELECT q.used, q.window_start, q.window_end, greatest(1, ceil(v.quota
                      * extract(epoch FROM q.window_end - q.window_start) / q.period_seconds)::bigint) AS quota
                  FROM quota_usage q
                  WHERE q.tenant_id = k.tenant_id AND q.key_id = k.id AND q.policy = v.policy AND q.used > 0
                      AND q.window_start <= now() AND q.window_end > least(now() - interval '15 minutes', checked.since,
                          CASE WHEN $5 THEN now() - interval '1 day' END)
              ) w
              WHERE v.quota IS NOT NULL
                  AND w.used::numeric * 100 >= w.quota::numeric * $3
                  AND (w.window_end > now() - interval '15 minutes'
                      OR (k.updated_at = k.created_at OR k.updated_at < w.window_end)
                      AND (p.updated_at = p.created_at OR p.updated_at < w.window_end))
                  AND NOT EXISTS (
                      SELECT FROM quota_alerts a
                      WHERE a.tenant_id = $1 AND a.key_id = k.id AND a.policy = v.policy AND a.threshold = 100
                          AND a.window_end > w.window_start AND a.window_start < w.window_end)
          )
          SELECT w.*, u.spent, u.has_denials
          FROM windows w
          CROSS JOIN LATERAL (
              SELECT coalesce(sum(u.cost) FILTER (WHERE u.policy = ''), 0)::bigint AS spent,
                  coalesce(bool_or(u.policy = w.policy), false) AS has_denials
              FROM usage_quarters u
              WHERE u.tenant_id = $1 AND u.endpoint = E'\x01' AND u.key_id = w.key_id
                  AND u.start >= w.window_start AND u.start < w.window_end
                  AND u.policy IN ('', w.policy)
          ) u",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Array<SqlUuid>, _>(keys)
    .bind::<Integer, _>(percent)
    .bind::<Array<Nullable<Timestamptz>>, _>(since)
    .bind::<Bool, _>(lateness.is_unknown);
    Ok(standings.get_results(&mut **tx).await?)
}

/// A quota for a calendar month (UTC) that all keys of a tenant share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TenantQuota {
    pub quota: i64,
    /// Whether tenants with access to paid plans are exempt.
    pub is_lifted_by_access: bool,
}

/// Returns the tenant's quota if at least `percent` of it is taken. Unlike the quota's ledger, the rollups also contain
/// requests from when the quota did not apply.
pub async fn tenant_standing(
    tx: &mut SystemTx,
    tenant: TenantId,
    of: TenantQuota,
    percent: i32,
    lateness: &Lateness,
) -> Result<Vec<QuotaStanding>, DbError> {
    let standing = sql_query(
        r"SELECT '00000000-0000-0000-0000-000000000000'::uuid AS key_id, NULL::text AS key_name,
              'tenant_monthly' AS policy, $2 AS quota, w.used AS taken, least(w.used, u.spent) AS spent,
              u.has_denials, w.window_start, w.window_end
          FROM (
              SELECT *, (window_start AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC' AS window_end
              FROM tenant_quota_usage WHERE tenant_id = $1 AND used > 0
          ) w
          CROSS JOIN LATERAL (
              SELECT coalesce(sum(u.cost) FILTER (WHERE u.policy = ''), 0)::bigint AS spent,
                  coalesce(bool_or(u.policy = 'tenant_monthly'), false) AS has_denials
              FROM usage_quarters u
              WHERE u.tenant_id = $1 AND u.endpoint = E'\x01' AND u.key_id = '00000000-0000-0000-0000-000000000000'
                  AND u.plan_id = '00000000-0000-0000-0000-000000000000'
                  AND u.start >= w.window_start AND u.start < w.window_end
          ) u
          WHERE w.window_start <= now() AND w.window_end > least(now() - interval '15 minutes', $5,
                  CASE WHEN $6 THEN now() - interval '1 day' END)
              AND w.used::numeric * 100 >= $2::numeric * $3
              AND NOT ($4 AND EXISTS (SELECT FROM billing_accounts WHERE tenant_id = $1 AND has_paid_access
                  AND (paid_access_until IS NULL OR paid_access_until > now())))",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<BigInt, _>(of.quota)
    .bind::<Integer, _>(percent)
    .bind::<Bool, _>(of.is_lifted_by_access)
    .bind::<Nullable<Timestamptz>, _>(lateness.oldest.values().min())
    .bind::<Bool, _>(lateness.is_unknown);
    Ok(standing.get_results(&mut **tx).await?)
}

/// A threshold that has been reached.
#[derive(Debug, Clone, Copy)]
pub struct NewAlert<'a> {
    pub id: Uuid,
    pub standing: &'a QuotaStanding,
    pub threshold: i32,
    pub used: i64,
}

/// Inserts the alerts that do not exist yet, and returns them. Alerts for the same quota and threshold count as the
/// same alert if their windows overlap.
pub async fn insert_new(
    tx: &mut SystemTx,
    tenant: TenantId,
    alerts: &[NewAlert<'_>],
) -> Result<Vec<AlertRow>, DbError> {
    let column = |of: &dyn Fn(&NewAlert<'_>) -> i64| alerts.iter().map(of).collect::<Vec<_>>();
    let rows = sql_query(
        "INSERT INTO quota_alerts (tenant_id, id, key_id, key_name, policy, threshold, quota, used, window_start, \
             window_end, email_pending) \
         SELECT $1, a.id, a.key_id, a.key_name, a.policy, a.threshold, a.quota, a.used, a.window_start, a.window_end, \
             false \
         FROM unnest($2, $3, $4, $5, $6, $7, $8, $9, $10) \
             AS a (id, key_id, key_name, policy, threshold, quota, used, window_start, window_end) \
         WHERE NOT EXISTS ( \
             SELECT FROM quota_alerts o WHERE o.tenant_id = $1 AND o.key_id = a.key_id AND o.policy = a.policy \
                 AND o.threshold = a.threshold AND o.window_end > a.window_start AND o.window_start < a.window_end) \
         ORDER BY a.id \
         ON CONFLICT ON CONSTRAINT quota_alerts_once DO NOTHING \
         RETURNING id, key_id, key_name, policy, threshold, quota, used, window_start, window_end, email_pending, \
             created_at",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Array<SqlUuid>, _>(alerts.iter().map(|it| it.id).collect::<Vec<_>>())
    .bind::<Array<SqlUuid>, _>(
        alerts
            .iter()
            .map(|it| it.standing.key_id)
            .collect::<Vec<_>>(),
    )
    .bind::<Array<Nullable<Text>>, _>(
        alerts
            .iter()
            .map(|it| it.standing.key_name.as_deref())
            .collect::<Vec<_>>(),
    )
    .bind::<Array<Text>, _>(
        alerts
            .iter()
            .map(|it| it.standing.policy.as_str())
            .collect::<Vec<_>>(),
    )
    .bind::<Array<Integer>, _>(alerts.iter().map(|it| it.threshold).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(column(&|it| it.standing.quota))
    .bind::<Array<BigInt>, _>(column(&|it| it.used))
    .bind::<Array<Timestamptz>, _>(
        alerts
            .iter()
            .map(|it| it.standing.window_start)
            .collect::<Vec<_>>(),
    )
    .bind::<Array<Timestamptz>, _>(
        alerts
            .iter()
            .map(|it| it.standing.window_end)
            .collect::<Vec<_>>(),
    )
    .get_results(&mut **tx)
    .await?;
    Ok(rows)
}

/// Includes alerts in the tenant's next email, if alert emails are on.
pub async fn mark_for_email(
    tx: &mut SystemTx,
    tenant: TenantId,
    alerts: &[Uuid],
) -> Result<(), DbError> {
    sql_query(
        "UPDATE quota_alerts SET email_pending = true WHERE tenant_id = $1 AND id = ANY($2) \
             AND (SELECT alert_email FROM tenants WHERE id = $1)",
    )
    .bind::<SqlUuid, _>(tenant.0)
    .bind::<Array<SqlUuid>, _>(alerts)
    .execute(&mut **tx)
    .await?;
    Ok(())
}
