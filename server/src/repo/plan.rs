use std::collections::HashMap;

use chrono::{DateTime, Utc};
use diesel::{
    dsl::{count_star, exists},
    pg::Pg,
    prelude::*,
    select,
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use super::{CursorKey, Order, Rows, SortBy, Sorted, SortedSlice, beyond_name, by_name};
use crate::{
    db::{DbError, TenantTx},
    schema::{api_keys, plans},
};

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = plans, check_for_backend(Pg))]
pub struct PlanRow {
    pub id: Uuid,
    pub name: String,
    pub default_rpm: i32,
    pub burst: i32,
    pub daily_quota: Option<i64>,
    pub monthly_quota: Option<i64>,
    pub strict: bool,
    pub on_redis_failure: Option<String>,
    pub billing: String,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

#[derive(Debug, Clone)]
pub struct PlanWithKeys {
    pub plan: PlanRow,
    pub key_count: u64,
}

impl Sorted for PlanWithKeys {
    fn id(&self) -> Uuid {
        self.plan.id
    }

    fn cursor_key(&self, by: SortBy) -> CursorKey {
        match by {
            SortBy::Name => CursorKey::Name(self.plan.name.clone()),
            SortBy::CreatedAt | SortBy::LastUsed => CursorKey::CreatedAt,
        }
    }
}

#[derive(Debug, Insertable)]
#[diesel(table_name = plans)]
pub struct NewPlan<'a> {
    pub tenant_id: Uuid,
    pub id: Uuid,
    pub name: &'a str,
    pub default_rpm: i32,
    pub burst: i32,
    pub daily_quota: Option<i64>,
    pub monthly_quota: Option<i64>,
    pub strict: bool,
    pub on_redis_failure: Option<&'a str>,
    pub billing: &'a str,
}

#[derive(Debug, Default, AsChangeset)]
#[diesel(table_name = plans)]
pub struct PlanChange<'a> {
    pub name: Option<&'a str>,
    pub default_rpm: Option<i32>,
    pub burst: Option<i32>,
    pub daily_quota: Option<Option<i64>>,
    pub monthly_quota: Option<Option<i64>>,
    pub strict: Option<bool>,
    pub on_redis_failure: Option<Option<String>>,
    pub billing: Option<&'a str>,
}

/// Inserts a plan. Fails with `plans_name_key` if the name is already in use.
pub async fn insert(tx: &mut TenantTx, plan: &NewPlan<'_>) -> Result<PlanRow, DbError> {
    let query = diesel::insert_into(plans::table)
        .values(plan)
        .returning(PlanRow::as_returning());
    Ok(query.get_result(&mut **tx).await?)
}

/// Lists the tenant's plans. Plans do not have a time of last use, so sorting them by last use sorts them by creation
/// time.
pub async fn list(tx: &mut TenantTx, slice: &SortedSlice) -> Result<Rows<PlanWithKeys>, DbError> {
    let tenant = tx.tenant().0;
    let total = plans::table
        .filter(plans::tenant_id.eq(tenant))
        .count()
        .get_result(&mut **tx)
        .await?;
    let mut query = plans::table
        .filter(plans::tenant_id.eq(tenant))
        .select(PlanRow::as_select())
        .limit(slice.fetch())
        .into_boxed::<Pg>();
    let Order { by, descending } = slice.order;
    query = match (by, descending) {
        (SortBy::Name, true) => query.order((by_name(true), plans::id.desc())),
        (SortBy::Name, false) => query.order((by_name(false), plans::id.asc())),
        (SortBy::CreatedAt | SortBy::LastUsed, true) => query.order(plans::id.desc()),
        (SortBy::CreatedAt | SortBy::LastUsed, false) => query.order(plans::id.asc()),
    };
    if let Some((cursor_key, id)) = &slice.after {
        query = match (cursor_key, descending) {
            (CursorKey::Name(name), _) => query.filter(beyond_name(descending, name, *id)),
            (_, true) => query.filter(plans::id.lt(*id)),
            (_, false) => query.filter(plans::id.gt(*id)),
        };
    }
    let plans: Vec<PlanRow> = query.load(&mut **tx).await?;
    let counts = key_counts(tx, &plans.iter().map(|plan| plan.id).collect::<Vec<_>>()).await?;
    let rows = plans.into_iter().map(|plan| PlanWithKeys {
        key_count: counts.get(&plan.id).copied().unwrap_or(0),
        plan,
    });
    Ok(Rows::new(rows.collect(), slice.limit, total))
}

find_by_id!(
    fn find_row in plans -> PlanRow
);
find_by_id!(
    fn lock_row in plans -> PlanRow, for_update
);

pub async fn find(tx: &mut TenantTx, id: Uuid) -> Result<Option<PlanWithKeys>, DbError> {
    let plan = find_row(tx, id).await?;
    with_keys(tx, plan).await
}

/// Finds a plan, and locks it against changes until the transaction ends.
pub async fn lock(tx: &mut TenantTx, id: Uuid) -> Result<Option<PlanWithKeys>, DbError> {
    let plan = lock_row(tx, id).await?;
    with_keys(tx, plan).await
}

async fn with_keys(
    tx: &mut TenantTx,
    plan: Option<PlanRow>,
) -> Result<Option<PlanWithKeys>, DbError> {
    let Some(plan) = plan else {
        return Ok(None);
    };
    let counts = key_counts(tx, &[plan.id]).await?;
    let key_count = counts.get(&plan.id).copied().unwrap_or(0);
    Ok(Some(PlanWithKeys { plan, key_count }))
}

update_by_id!(
    /// Updates a plan. Fails with `plans_name_key` if the name is already in use.
    pub fn update in plans, PlanChange -> PlanRow
);

/// Returns whether the tenant has any plans.
pub async fn any(tx: &mut TenantTx) -> Result<bool, DbError> {
    let own = plans::table.filter(plans::tenant_id.eq(tx.tenant().0));
    Ok(select(exists(own)).get_result(&mut **tx).await?)
}

pub async fn billing_of(tx: &mut TenantTx, id: Uuid) -> Result<Option<String>, DbError> {
    let billing = plans::table
        .find((tx.tenant().0, id))
        .select(plans::billing)
        .get_result(&mut **tx)
        .await
        .optional()?;
    Ok(billing)
}

/// Returns the rate and the burst of a plan.
pub async fn rate_of(tx: &mut TenantTx, id: Uuid) -> Result<Option<(u32, u32)>, DbError> {
    let rate: Option<(i32, i32)> = plans::table
        .find((tx.tenant().0, id))
        .select((plans::default_rpm, plans::burst))
        .get_result(&mut **tx)
        .await
        .optional()?;
    let positive = |number| u32::try_from(number).unwrap_or(0);
    Ok(rate.map(|(rpm, burst)| (positive(rpm), positive(burst))))
}

/// Deletes a plan. Fails with `api_keys_plan_fkey` if the plan still has keys.
pub async fn delete(tx: &mut TenantTx, id: Uuid) -> Result<bool, DbError> {
    Ok(diesel::delete(plans::table.find((tx.tenant().0, id)))
        .execute(&mut **tx)
        .await?
        == 1)
}

/// Returns the number of keys on each of these plans. Omits plans without keys.
async fn key_counts(tx: &mut TenantTx, ids: &[Uuid]) -> Result<HashMap<Uuid, u64>, DbError> {
    let counts = api_keys::table
        .filter(api_keys::tenant_id.eq(tx.tenant().0))
        .filter(api_keys::plan_id.eq_any(ids))
        .group_by(api_keys::plan_id)
        .select((api_keys::plan_id, count_star()))
        .load::<(Uuid, i64)>(&mut **tx)
        .await?;
    Ok(counts
        .into_iter()
        .map(|(id, count)| (id, u64::try_from(count).unwrap_or(0)))
        .collect())
}
