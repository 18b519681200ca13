//! What replicas must forget from their caches, in the order of commits.

use chrono::{DateTime, Utc};
use diesel::{
    dsl::{SqlTypeOf, sql},
    expression::SqlLiteral,
    prelude::*,
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::revocations,
};

/// What was changed or ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Everything of a tenant.
    Tenant,
    Plan(Uuid),
    ApiKey(Uuid),
    ServiceToken(Uuid),
    Session(Uuid),
}

impl Target {
    /// The name in the database and on the wire.
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
            // Of a newer version of the server.
            _ => return None,
        })
    }
}

/// Something to forget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revocation {
    pub seq: i64,
    pub tenant: Uuid,
    /// `None` for a kind that this version does not know: forget everything of the tenant.
    pub target: Option<Target>,
    /// When it was written, shortly before the commit.
    pub at: DateTime<Utc>,
}

/// To be the last thing in a transaction: it waits for the transactions that also revoke to end. What it answers
/// is to be told after the commit, not before.
pub async fn insert(tx: &mut TenantTx, target: Target) -> Result<Revocation, DbError> {
    let tenant = tx.tenant().0;
    let (seq, at) = diesel::insert_into(revocations::table)
        .values(values(tenant, target))
        .returning((revocations::seq, revocations::at))
        .get_result(&mut **tx)
        .await?;
    Ok(Revocation {
        seq,
        tenant,
        target: Some(target),
        at,
    })
}

/// The same for what the server does by itself.
pub async fn insert_system(
    tx: &mut SystemTx,
    tenant: Uuid,
    target: Target,
) -> Result<Revocation, DbError> {
    let (seq, at) = diesel::insert_into(revocations::table)
        .values(values(tenant, target))
        .returning((revocations::seq, revocations::at))
        .get_result(&mut **tx)
        .await?;
    Ok(Revocation {
        seq,
        tenant,
        target: Some(target),
        at,
    })
}

type Values = (
    diesel::dsl::Eq<revocations::tenant_id, Uuid>,
    diesel::dsl::Eq<revocations::target_type, &'static str>,
    diesel::dsl::Eq<revocations::target_id, Uuid>,
    diesel::dsl::Eq<revocations::at, SqlLiteral<SqlTypeOf<revocations::at>>>,
);

fn values(tenant: Uuid, target: Target) -> Values {
    (
        revocations::tenant_id.eq(tenant),
        revocations::target_type.eq(target.name()),
        revocations::target_id.eq(target.id(tenant)),
        // now() is when the transaction began.
        revocations::at.eq(sql("clock_timestamp()")),
    )
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

fn revocation((seq, tenant, name, id, at): Row) -> Revocation {
    Revocation {
        seq,
        tenant,
        target: Target::read(&name, id),
        at,
    }
}

/// How many are read at once.
pub const BATCH: u16 = 10_000;

/// The newest ones, in order. Older ones may have been there: they are deleted after a day.
pub async fn newest(tx: &mut SystemTx) -> Result<Vec<Revocation>, DbError> {
    let rows = revocations::table
        .order(revocations::seq.desc())
        .limit(i64::from(BATCH))
        .select(COLUMNS)
        .load::<Row>(&mut **tx)
        .await?;
    Ok(rows.into_iter().rev().map(revocation).collect())
}

/// The highest number. The newest revocation is never deleted, so this falls only when PostgreSQL is restored to an
/// earlier state.
pub async fn highest(tx: &mut SystemTx) -> Result<i64, DbError> {
    let highest = revocations::table
        .select(diesel::dsl::max(revocations::seq))
        .get_result::<Option<i64>>(&mut **tx)
        .await?;
    Ok(highest.unwrap_or(0))
}

/// What came after number `seq`, in order: at most [`BATCH`].
pub async fn since(tx: &mut SystemTx, seq: i64) -> Result<Vec<Revocation>, DbError> {
    let rows = revocations::table
        .filter(revocations::seq.gt(seq))
        .order(revocations::seq.asc())
        .limit(i64::from(BATCH))
        .select(COLUMNS)
        .load::<Row>(&mut **tx)
        .await?;
    Ok(rows.into_iter().map(revocation).collect())
}
