//! Tracks how far tenants' usage has been checked for alerts, and finds what remains to be checked.

use diesel::{
    OptionalExtension, QueryableByName, sql_query,
    sql_types::{BigInt, Nullable, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use quota_common::TenantId;
use uuid::Uuid;

use crate::db::{DbError, SystemTx};

/// Returns up to `limit` tenants with usage that has not been checked yet, in random order.
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

/// Returns tenants with a plan that has a quota, and tenants that have used part of a tenant quota, in random order.
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

/// How far a tenant's usage has been checked.
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
pub async fn lock(tx: &mut SystemTx, tenant: TenantId) -> Result<Option<Progress>, DbError> {
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
    // The last position is read after locking. Otherwise, it could be lower than the position up to which another
    // replica has checked in the meantime.
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

pub async fn set(
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
        // The query is not restricted by time, because replicas can ship records long after the requests. The index on
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
