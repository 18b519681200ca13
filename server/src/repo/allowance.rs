//! Counts a tenant's resources, to enforce the operator's limits.

use diesel::{prelude::*, sql_query, sql_types};
use diesel_async::RunQueryDsl;

use crate::{
    db::{DbError, TenantTx},
    schema::{api_keys, plans, service_tokens, webhooks},
};

/// A type of resource with a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    Plans,
    ApiKeys,
    ServiceTokens,
    Webhooks,
}

/// Makes the tenant's other transactions wait when they call this function, until this transaction has ended.
pub async fn lock(tx: &mut TenantTx) -> Result<(), DbError> {
    // This is an advisory lock, because locking the tenant's row could cause a deadlock with a change to the tenant.
    sql_query("SELECT pg_advisory_xact_lock(hashtextextended($1::text, 7226422))")
        .bind::<sql_types::Uuid, _>(tx.tenant().0)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Returns the number of the tenant's resources of this type. Must be called in the transaction that inserts a
/// resource, before the insert. Calls [`lock`].
pub async fn count(tx: &mut TenantTx, what: Resource) -> Result<u64, DbError> {
    lock(tx).await?;
    let tenant = tx.tenant().0;
    let count: i64 = match what {
        Resource::Plans => {
            let all = plans::table.filter(plans::tenant_id.eq(tenant));
            all.count().get_result(&mut **tx).await?
        }
        Resource::ApiKeys => {
            let all = api_keys::table.filter(api_keys::tenant_id.eq(tenant));
            all.count().get_result(&mut **tx).await?
        }
        Resource::ServiceTokens => {
            let all = service_tokens::table.filter(service_tokens::tenant_id.eq(tenant));
            all.count().get_result(&mut **tx).await?
        }
        Resource::Webhooks => {
            let all = webhooks::table.filter(webhooks::tenant_id.eq(tenant));
            all.count().get_result(&mut **tx).await?
        }
    };
    Ok(u64::try_from(count).unwrap_or(0))
}
