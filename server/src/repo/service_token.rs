use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use super::{Rows, Slice};
use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::service_tokens,
};

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = service_tokens, check_for_backend(diesel::pg::Pg))]
pub struct ServiceTokenRow {
    pub id: Uuid,
    pub name: String,
    pub prefix: String,
    pub last_used_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
}

#[derive(Debug, Insertable)]
#[diesel(table_name = service_tokens)]
pub struct NewServiceToken<'a> {
    pub tenant_id: Uuid,
    pub id: Uuid,
    pub name: &'a str,
    pub prefix: &'a str,
    pub token_hash: &'a [u8],
}

pub async fn insert(
    tx: &mut TenantTx,
    token: &NewServiceToken<'_>,
) -> Result<ServiceTokenRow, DbError> {
    let query = diesel::insert_into(service_tokens::table)
        .values(token)
        .returning(ServiceTokenRow::as_returning());
    Ok(query.get_result(&mut **tx).await?)
}

pub async fn list(tx: &mut TenantTx, slice: Slice) -> Result<Rows<ServiceTokenRow>, DbError> {
    let tenant = tx.tenant().0;
    let total = service_tokens::table
        .filter(service_tokens::tenant_id.eq(tenant))
        .count()
        .get_result(&mut **tx)
        .await?;
    let rows = service_tokens::table
        .filter(service_tokens::tenant_id.eq(tenant))
        .filter(service_tokens::id.lt(slice.before()))
        .order(service_tokens::id.desc())
        .limit(slice.fetch())
        .select(ServiceTokenRow::as_select())
        .load(&mut **tx)
        .await?;
    Ok(Rows::new(rows, slice.limit, total))
}

find_by_id!(
    pub fn find in service_tokens -> ServiceTokenRow
);

delete_by_id!(
    /// Deletes a token. Returns its last state.
    pub fn delete in service_tokens -> ServiceTokenRow
);

/// Returns the hash, tenant, and ID of each token with one of these hashes. Searches all tenants.
pub async fn owners(
    tx: &mut SystemTx,
    hashes: &[&[u8]],
) -> Result<Vec<(Vec<u8>, Uuid, Uuid)>, DbError> {
    let query = service_tokens::table
        .filter(service_tokens::token_hash.eq_any(hashes))
        .select((
            service_tokens::token_hash,
            service_tokens::tenant_id,
            service_tokens::id,
        ));
    Ok(query.load(&mut **tx).await?)
}

/// Updates `last_used_at` of many tokens in one statement. Never moves it backward.
pub async fn touch(tx: &mut SystemTx, used: &[(Uuid, DateTime<Utc>)]) -> Result<(), DbError> {
    super::touch(tx, "service_tokens", used).await
}
