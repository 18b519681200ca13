//! The tenants and keys with the most requests on the whole server, for operators.

use diesel::{
    prelude::*,
    sql_types::{BigInt, Integer, Nullable, Text, Uuid as SqlUuid},
};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use uuid::Uuid;

use crate::db::{DbError, SystemTx};

#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct TopCounts {
    #[diesel(sql_type = BigInt)]
    pub allowed: i64,
    #[diesel(sql_type = BigInt)]
    pub rejected: i64,
    /// The cost of allowed requests.
    #[diesel(sql_type = BigInt)]
    pub cost: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct TopTenant {
    #[diesel(sql_type = SqlUuid)]
    pub tenant_id: Uuid,
    /// `None` if the tenant was deleted.
    #[diesel(sql_type = Nullable<Text>)]
    pub name: Option<String>,
    #[diesel(embed)]
    pub counts: TopCounts,
}

#[derive(Debug, Clone, PartialEq, Eq, QueryableByName)]
pub struct TopKey {
    #[diesel(sql_type = SqlUuid)]
    pub tenant_id: Uuid,
    #[diesel(sql_type = SqlUuid)]
    pub key_id: Uuid,
    /// `None` if the key was deleted.
    #[diesel(sql_type = Nullable<Text>)]
    pub prefix: Option<String>,
    #[diesel(embed)]
    pub counts: TopCounts,
}

const SUMS: &str = "coalesce(sum(u.requests) FILTER (WHERE u.policy = ''), 0)::bigint AS allowed, \
     coalesce(sum(u.requests) FILTER (WHERE u.policy <> ''), 0)::bigint AS rejected, \
     coalesce(sum(u.cost) FILTER (WHERE u.policy = ''), 0)::bigint AS cost";

/// Reading the rollups of all tenants may take a while.
const PATIENCE: &str = "SET LOCAL statement_timeout = '1min'";

pub async fn tenants(tx: &mut SystemTx, hours: u16, top: u16) -> Result<Vec<TopTenant>, DbError> {
    tx.batch_execute(PATIENCE).await?;
    Ok(diesel::sql_query(format!(
        "SELECT u.tenant_id, t.name, u.allowed, u.rejected, u.cost FROM ( \
             SELECT u.tenant_id, {SUMS} FROM usage_quarters u \
             WHERE u.endpoint = E'\\x01' AND u.key_id = '00000000-0000-0000-0000-000000000000' \
                 AND u.plan_id = '00000000-0000-0000-0000-000000000000' AND u.start >= now() - $1 * interval '1 hour' \
             GROUP BY 1 ORDER BY sum(u.requests) DESC, 1 LIMIT $2 \
         ) u LEFT JOIN tenants t ON t.id = u.tenant_id ORDER BY u.allowed + u.rejected DESC, 1"
    ))
    .bind::<Integer, _>(i32::from(hours))
    .bind::<BigInt, _>(i64::from(top))
    .load(&mut **tx)
    .await?)
}

pub async fn keys(tx: &mut SystemTx, hours: u16, top: u16) -> Result<Vec<TopKey>, DbError> {
    tx.batch_execute(PATIENCE).await?;
    Ok(diesel::sql_query(format!(
        "SELECT u.tenant_id, u.key_id, k.prefix, u.allowed, u.rejected, u.cost FROM ( \
             SELECT u.tenant_id, u.key_id, {SUMS} FROM usage_quarters u \
             WHERE u.endpoint = E'\\x01' AND u.key_id <> '00000000-0000-0000-0000-000000000000' \
                 AND u.start >= now() - $1 * interval '1 hour' \
             GROUP BY 1, 2 ORDER BY sum(u.requests) DESC, 1, 2 LIMIT $2 \
         ) u LEFT JOIN api_keys k ON k.tenant_id = u.tenant_id AND k.id = u.key_id \
         ORDER BY u.allowed + u.rejected DESC, 1, 2"
    ))
    .bind::<Integer, _>(i32::from(hours))
    .bind::<BigInt, _>(i64::from(top))
    .load(&mut **tx)
    .await?)
}
