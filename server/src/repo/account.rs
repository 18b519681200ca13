use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::{memberships, tenants, users},
};

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = users, check_for_backend(diesel::pg::Pg))]
pub struct UserRow {
    pub id: Uuid,
    pub email: String,
    pub name: String,
    pub created_at: DateTime<Utc>,
}

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = tenants, check_for_backend(diesel::pg::Pg))]
pub struct TenantRow {
    pub id: Uuid,
    pub name: String,
    pub time_zone: String,
}

/// Inserts a user, a tenant, and the user's membership as owner. Fails with `users_email_key` if the email address is
/// already in use.
pub async fn register(
    tx: &mut SystemTx,
    (user_id, tenant_id): (Uuid, Uuid),
    email: &str,
    password_hash: &str,
    tenant_name: &str,
) -> Result<(UserRow, TenantRow), DbError> {
    let user = diesel::insert_into(users::table)
        .values((
            users::id.eq(user_id),
            users::email.eq(email),
            users::password_hash.eq(password_hash),
        ))
        .returning(UserRow::as_returning())
        .get_result(&mut **tx)
        .await?;
    let tenant = diesel::insert_into(tenants::table)
        .values((tenants::id.eq(tenant_id), tenants::name.eq(tenant_name)))
        .returning(TenantRow::as_returning())
        .get_result(&mut **tx)
        .await?;
    diesel::insert_into(memberships::table)
        .values((
            memberships::tenant_id.eq(tenant_id),
            memberships::user_id.eq(user_id),
            memberships::role.eq("owner"),
        ))
        .execute(&mut **tx)
        .await?;
    Ok((user, tenant))
}

#[derive(Debug, Clone, Queryable)]
pub struct LoginRow {
    pub user: UserRow,
    pub password_hash: String,
    pub tenant_id: Uuid,
}

/// Finds a user by email address, with the tenant that the user joined first.
pub async fn for_login(tx: &mut SystemTx, email: &str) -> Result<Option<LoginRow>, DbError> {
    let query = users::table
        .inner_join(memberships::table)
        .filter(users::email.eq(email))
        .order((memberships::created_at.asc(), memberships::tenant_id.asc()))
        .select((
            UserRow::as_select(),
            users::password_hash,
            memberships::tenant_id,
        ));
    Ok(query.first::<LoginRow>(&mut **tx).await.optional()?)
}

#[derive(Debug, Clone, Queryable)]
pub struct MemberRow {
    pub user: UserRow,
    pub tenant: TenantRow,
    pub role: String,
}

pub async fn member(
    tx: &mut SystemTx,
    user: Uuid,
    tenant: Uuid,
) -> Result<Option<MemberRow>, DbError> {
    let query = memberships::table
        .inner_join(users::table)
        .inner_join(tenants::table)
        .filter(memberships::user_id.eq(user))
        .filter(memberships::tenant_id.eq(tenant))
        .select((
            UserRow::as_select(),
            TenantRow::as_select(),
            memberships::role,
        ));
    Ok(query.first::<MemberRow>(&mut **tx).await.optional()?)
}

/// Returns every membership: the user's email address, the tenant's name, and the role.
pub async fn list(tx: &mut SystemTx) -> Result<Vec<(String, String, String)>, DbError> {
    let query = memberships::table
        .inner_join(users::table)
        .inner_join(tenants::table)
        .order((users::email.asc(), tenants::name.asc()))
        .select((users::email, tenants::name, memberships::role));
    Ok(query.load(&mut **tx).await?)
}

pub async fn password_hash(tx: &mut SystemTx, user: Uuid) -> Result<Option<String>, DbError> {
    Ok(users::table
        .find(user)
        .select(users::password_hash)
        .first(&mut **tx)
        .await
        .optional()?)
}

/// Returns whether `hash` is still the user's password hash. Locks the hash until the transaction ends. A transaction
/// that changes the hash waits for this transaction, and then sees the effects of this transaction.
pub async fn hold_password(tx: &mut SystemTx, user: Uuid, hash: &str) -> Result<bool, DbError> {
    let current = users::table
        .find(user)
        .select(users::password_hash)
        .for_share()
        .first::<String>(&mut **tx)
        .await
        .optional()?;
    Ok(current.as_deref() == Some(hash))
}

/// Sets the user's password hash without checking the old one.
pub async fn set_password(tx: &mut SystemTx, user: Uuid, hash: &str) -> Result<(), DbError> {
    diesel::update(users::table.find(user))
        .set((
            users::password_hash.eq(hash),
            users::updated_at.eq(diesel::dsl::now),
        ))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Replaces the user's password hash. Returns `false` if the hash is no longer `old`.
pub async fn replace_password(
    tx: &mut SystemTx,
    user: Uuid,
    old: &str,
    new: &str,
) -> Result<bool, DbError> {
    let unchanged = users::table
        .filter(users::id.eq(user))
        .filter(users::password_hash.eq(old));
    let changed = diesel::update(unchanged)
        .set((
            users::password_hash.eq(new),
            users::updated_at.eq(diesel::dsl::now),
        ))
        .execute(&mut **tx)
        .await?;
    Ok(changed == 1)
}

pub async fn set_user_name(tx: &mut SystemTx, user: Uuid, name: &str) -> Result<(), DbError> {
    diesel::update(users::table.find(user))
        .set((users::name.eq(name), users::updated_at.eq(diesel::dsl::now)))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

pub async fn lock_tenant(tx: &mut TenantTx) -> Result<Option<TenantRow>, DbError> {
    let query = tenants::table
        .find(tx.tenant().0)
        .select(TenantRow::as_select())
        .for_update();
    Ok(query.first(&mut **tx).await.optional()?)
}

#[derive(Debug, AsChangeset)]
#[diesel(table_name = tenants)]
pub struct TenantChange<'a> {
    pub name: Option<&'a str>,
    pub time_zone: Option<&'a str>,
    pub updated_at: DateTime<Utc>,
}

pub async fn update_tenant(
    tx: &mut TenantTx,
    change: &TenantChange<'_>,
) -> Result<TenantRow, DbError> {
    let query = diesel::update(tenants::table.find(tx.tenant().0))
        .set(change)
        .returning(TenantRow::as_returning());
    Ok(query.get_result(&mut **tx).await?)
}

pub async fn time_zone(tx: &mut TenantTx) -> Result<Option<String>, DbError> {
    let tenant = tx.tenant().0;
    Ok(tenants::table
        .find(tenant)
        .select(tenants::time_zone)
        .first(&mut **tx)
        .await
        .optional()?)
}
