//! What replicas must forget from their caches, in the order of commits.

use diesel::{
    dsl::{IntervalDsl, max, now},
    prelude::*,
    sql_types::Timestamptz,
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
    const fn name(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Plan(_) => "plan",
            Self::ApiKey(_) => "api_key",
            Self::ServiceToken(_) => "service_token",
            Self::Session(_) => "session",
        }
    }

    const fn id(self, tenant: Uuid) -> Uuid {
        match self {
            Self::Tenant => tenant,
            Self::Plan(id) | Self::ApiKey(id) | Self::ServiceToken(id) | Self::Session(id) => id,
        }
    }

    fn read(name: &str, id: Uuid) -> Option<Self> {
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
}

/// To be the last thing in a transaction: it waits for the transactions that also revoke to end.
pub async fn insert(tx: &mut TenantTx, target: Target) -> Result<(), DbError> {
    let tenant = tx.tenant().0;
    diesel::insert_into(revocations::table)
        .values(values(tenant, target))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// The same for what the server does by itself.
pub async fn insert_system(tx: &mut SystemTx, tenant: Uuid, target: Target) -> Result<(), DbError> {
    diesel::insert_into(revocations::table)
        .values(values(tenant, target))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

type Values = (
    diesel::dsl::Eq<revocations::tenant_id, Uuid>,
    diesel::dsl::Eq<revocations::target_type, &'static str>,
    diesel::dsl::Eq<revocations::target_id, Uuid>,
);

fn values(tenant: Uuid, target: Target) -> Values {
    (
        revocations::tenant_id.eq(tenant),
        revocations::target_type.eq(target.name()),
        revocations::target_id.eq(target.id(tenant)),
    )
}

/// The newest one's number; 0 when there is none.
pub async fn newest(tx: &mut SystemTx) -> Result<i64, DbError> {
    let newest = revocations::table
        .select(max(revocations::seq))
        .get_result::<Option<i64>>(&mut **tx)
        .await?;
    Ok(newest.unwrap_or(0))
}

/// What came after number `seq`, in order.
pub async fn since(tx: &mut SystemTx, seq: i64) -> Result<Vec<Revocation>, DbError> {
    let rows = revocations::table
        .filter(revocations::seq.gt(seq))
        .order(revocations::seq.asc())
        .limit(10_000)
        .select((
            revocations::seq,
            revocations::tenant_id,
            revocations::target_type,
            revocations::target_id,
        ))
        .load::<(i64, Uuid, String, Uuid)>(&mut **tx)
        .await?;
    let revocation = |(seq, tenant, name, id): (i64, Uuid, String, Uuid)| Revocation {
        seq,
        tenant,
        target: Target::read(&name, id),
    };
    Ok(rows.into_iter().map(revocation).collect())
}

/// Forgets those that every replica has seen long ago.
pub async fn sweep(tx: &mut SystemTx) -> Result<usize, DbError> {
    Ok(diesel::delete(
        revocations::table.filter(revocations::at.lt(now.into_sql::<Timestamptz>() - 1.day())),
    )
    .execute(&mut **tx)
    .await?)
}
