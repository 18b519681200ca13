//! Changes that replicas must apply to their caches, in commit order. They are stored in the `revocations` table.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{
    dsl::sql,
    prelude::*,
    sql_types::{BigInt, Bool, Double, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::revocations,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// All resources of the tenant.
    Tenant,
    Plan(Uuid),
    ApiKey(Uuid),
    ServiceToken(Uuid),
    Session(Uuid),
}

impl Target {
    /// Returns the name used in the database and in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Plan(_) => "plan",
            Self::ApiKey(_) => "api_key",
            Self::ServiceToken(_) => "service_token",
            Self::Session(_) => "session",
        }
    }

    pub const fn id(self, tenant: Uuid) -> Uuid {
        match self {
            Self::Tenant => tenant,
            Self::Plan(id) | Self::ApiKey(id) | Self::ServiceToken(id) | Self::Session(id) => id,
        }
    }

    pub fn read(name: &str, id: Uuid) -> Option<Self> {
        Some(match name {
            "tenant" => Self::Tenant,
            "plan" => Self::Plan(id),
            "api_key" => Self::ApiKey(id),
            "service_token" => Self::ServiceToken(id),
            "session" => Self::Session(id),
            // The kind was added in a later version of the server.
            _ => return None,
        })
    }
}

/// A change that makes cached copies outdated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Invalidation {
    pub seq: i64,
    pub tenant: Uuid,
    /// `None` if this version does not know the kind. The change then invalidates all of the tenant's resources.
    pub target: Option<Target>,
    /// When the row was written, shortly before the commit.
    pub at: DateTime<Utc>,
}

/// Inserts an invalidation. Call this last in a transaction: after the insert, all other transactions that insert an
/// invalidation wait until this transaction ends. Publish the returned value after the commit.
pub async fn insert(tx: &mut TenantTx, target: Target) -> Result<Invalidation, DbError> {
    let tenant = tx.tenant().0;
    insert_on(tx, tenant, target).await
}

/// Inserts an invalidation like [`insert`], in a system transaction.
pub async fn insert_system(
    tx: &mut SystemTx,
    tenant: Uuid,
    target: Target,
) -> Result<Invalidation, DbError> {
    insert_on(tx, tenant, target).await
}

async fn insert_on(
    conn: &mut AsyncPgConnection,
    tenant: Uuid,
    target: Target,
) -> Result<Invalidation, DbError> {
    let (seq, at) = diesel::insert_into(revocations::table)
        .values((
            revocations::tenant_id.eq(tenant),
            revocations::target_type.eq(target.name()),
            revocations::target_id.eq(target.id(tenant)),
            // `now()` would return the transaction's start time.
            revocations::at.eq(sql::<Timestamptz>("clock_timestamp()")),
        ))
        .returning((revocations::seq, revocations::at))
        .get_result(conn)
        .await?;
    Ok(Invalidation {
        seq,
        tenant,
        target: Some(target),
        at,
    })
}

type Row = (i64, Uuid, String, Uuid, DateTime<Utc>);

const COLUMNS: (
    revocations::seq,
    revocations::tenant_id,
    revocations::target_type,
    revocations::target_id,
    revocations::at,
) = (
    revocations::seq,
    revocations::tenant_id,
    revocations::target_type,
    revocations::target_id,
    revocations::at,
);

fn invalidation((seq, tenant, name, id, at): Row) -> Invalidation {
    Invalidation {
        seq,
        tenant,
        target: Target::read(&name, id),
        at,
    }
}

/// The maximum number of rows per read.
pub const BATCH: u16 = 10_000;

/// Returns up to [`BATCH`] of the newest rows, in ascending order. All rows except the newest are deleted after a day.
pub async fn newest(tx: &mut SystemTx) -> Result<Vec<Invalidation>, DbError> {
    let rows = revocations::table
        .order(revocations::seq.desc())
        .limit(i64::from(BATCH))
        .select(COLUMNS)
        .load::<Row>(&mut **tx)
        .await?;
    Ok(rows.into_iter().rev().map(invalidation).collect())
}

/// The number of the newest row, and the database history that it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct Position {
    #[diesel(sql_type = BigInt)]
    pub highest: i64,
    /// Identifies the history, which changes when PostgreSQL is restored from a backup or fails over. Numbers from
    /// different histories cannot be compared: the same number may stand for different changes.
    #[diesel(sql_type = Text)]
    pub history: String,
}

/// Returns the current position. The newest row is never deleted, so the number decreases only if PostgreSQL returns to
/// an earlier state.
pub async fn position(tx: &mut SystemTx) -> Result<Position, DbError> {
    let sql =
        "SELECT coalesce(max(seq), 0) AS highest, database_history() AS history FROM revocations";
    Ok(diesel::sql_query(sql).get_result(&mut **tx).await?)
}

/// Returns up to [`BATCH`] rows after number `seq`, in ascending order.
pub async fn since(tx: &mut SystemTx, seq: i64) -> Result<Vec<Invalidation>, DbError> {
    let rows = revocations::table
        .filter(revocations::seq.gt(seq))
        .order(revocations::seq.asc())
        .limit(i64::from(BATCH))
        .select(COLUMNS)
        .load::<Row>(&mut **tx)
        .await?;
    Ok(rows.into_iter().map(invalidation).collect())
}

/// The maximum number of rows per search for deleted keys.
const SEARCHED: i64 = 1000;

/// The result of a search for deleted keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeletedKeys {
    /// The tenant and the ID of each deleted key.
    pub keys: Vec<(Uuid, Uuid)>,
    /// The number of the last row that was searched.
    pub last: i64,
    /// Whether there may be more deleted keys.
    pub has_more: bool,
}

#[derive(QueryableByName)]
struct SearchedRow {
    #[diesel(sql_type = BigInt)]
    seq: i64,
    #[diesel(sql_type = SqlUuid)]
    tenant_id: Uuid,
    #[diesel(sql_type = SqlUuid)]
    target_id: Uuid,
    #[diesel(sql_type = Bool)]
    is_deleted_key: bool,
    #[diesel(sql_type = Bool)]
    is_old: bool,
}

/// Searches the rows after number `seq` that are at least `age` old, and returns the API keys in them that no longer
/// exist. If a key was edited before it was deleted, the key may be returned twice: for the row of the edit, and again
/// for the row of the deletion.
pub async fn deleted_keys(
    tx: &mut SystemTx,
    seq: i64,
    age: Duration,
) -> Result<DeletedKeys, DbError> {
    let sql = "SELECT r.seq, r.tenant_id, r.target_id, \
             r.at < clock_timestamp() - make_interval(secs => $2) AS is_old, \
             r.target_type = 'api_key' AND NOT EXISTS ( \
                 SELECT FROM api_keys k WHERE k.tenant_id = r.tenant_id AND k.id = r.target_id) AS is_deleted_key \
         FROM revocations r WHERE r.seq > $1 ORDER BY r.seq LIMIT $3";
    let rows: Vec<SearchedRow> = diesel::sql_query(sql)
        .bind::<BigInt, _>(seq)
        .bind::<Double, _>(age.as_secs_f64())
        .bind::<BigInt, _>(SEARCHED)
        .load(&mut **tx)
        .await?;
    let old = rows.iter().take_while(|row| row.is_old).count();
    let keys = rows[..old].iter().filter(|row| row.is_deleted_key);
    Ok(DeletedKeys {
        keys: keys.map(|row| (row.tenant_id, row.target_id)).collect(),
        last: rows[..old].last().map_or(seq, |row| row.seq),
        has_more: i64::try_from(old).is_ok_and(|old| old == SEARCHED),
    })
}
