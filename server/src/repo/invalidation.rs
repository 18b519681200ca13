//! Changes that replicas must apply to their caches, in commit order. The table is called `revocations`.

use chrono::{DateTime, Utc};
use diesel::{
    dsl::sql,
    prelude::*,
    sql_types::{BigInt, Text, Timestamptz},
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

/// Inserts an invalidation. Call this last in a transaction, because it waits for all other transactions that have
/// called it. Publish the returned value after the commit.
pub async fn insert(tx: &mut TenantTx, target: Target) -> Result<Invalidation, DbError> {
    let tenant = tx.tenant().0;
    insert_on(tx, tenant, target).await
}

/// Like [`insert`], in a transaction of the server.
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

/// Returns the newest rows, in ascending order. Rows are deleted after a day.
pub async fn newest(tx: &mut SystemTx) -> Result<Vec<Invalidation>, DbError> {
    let rows = revocations::table
        .order(revocations::seq.desc())
        .limit(i64::from(BATCH))
        .select(COLUMNS)
        .load::<Row>(&mut **tx)
        .await?;
    Ok(rows.into_iter().rev().map(invalidation).collect())
}

/// The number of the newest row, and the number's database history.
#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct Position {
    #[diesel(sql_type = BigInt)]
    pub highest: i64,
    /// Changes when PostgreSQL is restored from a backup or fails over. Numbers from different histories cannot be
    /// compared: the same number may stand for different changes.
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
