use chrono::{DateTime, Utc};
use diesel::{
    dsl::{auto_type, now, sql},
    pg::Pg,
    prelude::*,
    sql_types::{BigInt, Bool},
};
use diesel_async::RunQueryDsl;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::{CursorKey, SortBy, Sorted};
use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::{api_keys, billing_accounts, plans, tenants},
};

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = api_keys, check_for_backend(Pg))]
pub struct ApiKeyRow {
    pub id: Uuid,
    pub plan_id: Uuid,
    pub name: String,
    pub prefix: String,
    pub previous_expires_at: Option<DateTime<Utc>>,
    pub is_active: bool,
    pub expires_at: Option<DateTime<Utc>>,
    pub rpm_override: Option<i32>,
    pub external_id: Option<String>,
    pub metadata: Value,
    pub last_used_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

impl Sorted for ApiKeyRow {
    fn id(&self) -> Uuid {
        self.id
    }

    fn cursor_key(&self, by: SortBy) -> CursorKey {
        match by {
            SortBy::CreatedAt => CursorKey::CreatedAt,
            SortBy::Name => CursorKey::Name(self.name.clone()),
            SortBy::LastUsed => CursorKey::LastUsed(self.last_used_at),
        }
    }
}

#[derive(Debug, Insertable)]
#[diesel(table_name = api_keys)]
pub struct NewApiKey<'a> {
    pub tenant_id: Uuid,
    pub id: Uuid,
    pub plan_id: Uuid,
    pub name: &'a str,
    pub prefix: &'a str,
    pub key_hash: &'a [u8],
    pub expires_at: Option<DateTime<Utc>>,
    pub rpm_override: Option<i32>,
    pub external_id: Option<&'a str>,
    pub metadata: Value,
}

#[derive(Debug, Default, AsChangeset)]
#[diesel(table_name = api_keys)]
pub struct ApiKeyChange<'a> {
    pub name: Option<&'a str>,
    pub plan_id: Option<Uuid>,
    pub is_active: Option<bool>,
    pub expires_at: Option<Option<DateTime<Utc>>>,
    pub rpm_override: Option<Option<i32>>,
    pub external_id: Option<Option<String>>,
    pub metadata: Option<Value>,
}

/// The data about a key, its plan, and its tenant that decisions depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyFacts {
    pub tenant_id: Uuid,
    pub id: Uuid,
    pub plan_id: Uuid,
    pub prefix: String,
    pub is_active: bool,
    /// When the key expires. For a previous secret, the end of its grace period if that is earlier.
    pub expires_at: Option<DateTime<Utc>>,
    pub rpm_override: Option<i32>,
    pub plan_name: String,
    pub default_rpm: i32,
    pub burst: i32,
    pub daily_quota: Option<i64>,
    pub monthly_quota: Option<i64>,
    pub strict: bool,
    pub on_redis_failure: Option<String>,
    pub billing: String,
    /// Whether the tenant may use paid plans, until `paid_access_until`.
    pub has_paid_access: bool,
    /// `None` if the access has no known end.
    pub paid_access_until: Option<DateTime<Utc>>,
    pub time_zone: String,
}

/// Inserts a key. Fails with `api_keys_plan_fkey` if the tenant does not have the plan.
pub async fn insert(tx: &mut TenantTx, key: &NewApiKey<'_>) -> Result<ApiKeyRow, DbError> {
    let query = diesel::insert_into(api_keys::table)
        .values(key)
        .returning(ApiKeyRow::as_returning());
    Ok(query.get_result(&mut **tx).await?)
}

/// Returns the highest rate override among the plan's keys.
pub async fn highest_rate(tx: &mut TenantTx, plan: Uuid) -> Result<Option<i64>, DbError> {
    let highest: Option<i32> = api_keys::table
        .filter(api_keys::tenant_id.eq(tx.tenant().0))
        .filter(api_keys::plan_id.eq(plan))
        .select(diesel::dsl::max(api_keys::rpm_override))
        .get_result(&mut **tx)
        .await?;
    Ok(highest.map(Into::into))
}

/// Returns the lowest rate override among the plan's keys.
pub async fn lowest_rate(tx: &mut TenantTx, plan: Uuid) -> Result<Option<u32>, DbError> {
    let lowest: Option<i32> = api_keys::table
        .filter(api_keys::tenant_id.eq(tx.tenant().0))
        .filter(api_keys::plan_id.eq(plan))
        .select(diesel::dsl::min(api_keys::rpm_override))
        .get_result(&mut **tx)
        .await?;
    Ok(lowest.and_then(|rate| u32::try_from(rate).ok()))
}

find_by_id!(
    pub fn find in api_keys -> ApiKeyRow
);

find_by_id!(
    /// Finds a key, and locks it against changes until the transaction ends.
    pub fn lock in api_keys -> ApiKeyRow, for_update
);

update_by_id!(
    /// Updates a key. Fails with `api_keys_plan_fkey` if the tenant does not have the plan.
    pub fn update in api_keys, ApiKeyChange -> ApiKeyRow
);

delete_by_id!(
    /// Deletes a key and its quota usage. Returns the key's last state.
    pub fn delete in api_keys -> ApiKeyRow
);

/// Replaces the key's secret. The old secret works until `previous_expires_at`. If this argument is `None`, the old
/// secret stops working immediately.
pub async fn rotate(
    tx: &mut TenantTx,
    id: Uuid,
    prefix: &str,
    key_hash: &[u8],
    previous_expires_at: Option<DateTime<Utc>>,
) -> Result<Option<ApiKeyRow>, DbError> {
    let key = api_keys::table.find((tx.tenant().0, id));
    let secret = (api_keys::prefix.eq(prefix), api_keys::key_hash.eq(key_hash));
    let row = match previous_expires_at {
        Some(until) => {
            diesel::update(key)
                .set((
                    secret,
                    api_keys::previous_key_hash.eq(api_keys::key_hash.nullable()),
                    api_keys::previous_expires_at.eq(until),
                ))
                .returning(ApiKeyRow::as_returning())
                .get_result(&mut **tx)
                .await
        }
        None => {
            diesel::update(key)
                .set((
                    secret,
                    api_keys::previous_key_hash.eq(None::<Vec<u8>>),
                    api_keys::previous_expires_at.eq(None::<DateTime<Utc>>),
                ))
                .returning(ApiKeyRow::as_returning())
                .get_result(&mut **tx)
                .await
        }
    };
    Ok(row.optional()?)
}

/// The data of a key, and the hash of one of its secrets.
#[derive(Debug)]
pub struct FoundKey {
    pub hash: Vec<u8>,
    pub facts: KeyFacts,
    /// The number of the newest invalidation when the data was read. Only later invalidations can make the data
    /// outdated.
    pub as_of: i64,
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = api_keys, check_for_backend(Pg))]
struct KeyColumns {
    tenant_id: Uuid,
    id: Uuid,
    plan_id: Uuid,
    prefix: String,
    is_active: bool,
    expires_at: Option<DateTime<Utc>>,
    rpm_override: Option<i32>,
    key_hash: Vec<u8>,
    previous_key_hash: Option<Vec<u8>>,
    previous_expires_at: Option<DateTime<Utc>>,
}

impl KeyColumns {
    fn previous_expiry(&self) -> Option<DateTime<Utc>> {
        match (self.expires_at, self.previous_expires_at) {
            (Some(own), Some(grace)) => Some(own.min(grace)),
            (own, grace) => own.or(grace),
        }
    }
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = plans, check_for_backend(Pg))]
struct PlanColumns {
    name: String,
    default_rpm: i32,
    burst: i32,
    daily_quota: Option<i64>,
    monthly_quota: Option<i64>,
    strict: bool,
    on_redis_failure: Option<String>,
    billing: String,
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = billing_accounts, check_for_backend(Pg))]
struct AccessColumns {
    has_paid_access: bool,
    paid_access_until: Option<DateTime<Utc>>,
}

#[derive(Queryable)]
struct FactsRow {
    key: KeyColumns,
    plan: PlanColumns,
    access: Option<AccessColumns>,
    time_zone: String,
    is_in_grace: bool,
    as_of: i64,
}

impl FactsRow {
    /// Returns one result for each of the key's secrets whose hash is in `hashes`. The previous secret counts too,
    /// until its grace period ends.
    fn found(self, hashes: &[&[u8]]) -> impl Iterator<Item = FoundKey> + use<> {
        let Self { key, plan, .. } = self;
        let is_requested = |hash: &Vec<u8>| hashes.contains(&&**hash);
        let current = Some(key.key_hash.clone()).filter(is_requested);
        let previous = key
            .previous_key_hash
            .clone()
            .filter(|hash| self.is_in_grace && is_requested(hash));
        let secrets = [(current, key.expires_at), (previous, key.previous_expiry())];
        let facts = KeyFacts {
            expires_at: key.expires_at,
            tenant_id: key.tenant_id,
            id: key.id,
            plan_id: key.plan_id,
            prefix: key.prefix,
            is_active: key.is_active,
            rpm_override: key.rpm_override,
            plan_name: plan.name,
            default_rpm: plan.default_rpm,
            burst: plan.burst,
            daily_quota: plan.daily_quota,
            monthly_quota: plan.monthly_quota,
            strict: plan.strict,
            on_redis_failure: plan.on_redis_failure,
            billing: plan.billing,
            has_paid_access: self.access.as_ref().is_some_and(|it| it.has_paid_access),
            paid_access_until: self.access.as_ref().and_then(|it| it.paid_access_until),
            time_zone: self.time_zone,
        };
        secrets.into_iter().filter_map(move |(hash, expires_at)| {
            Some(FoundKey {
                hash: hash?,
                facts: KeyFacts {
                    expires_at,
                    ..facts.clone()
                },
                as_of: self.as_of,
            })
        })
    }
}

/// Returns a query for keys with all the data that decisions depend on.
#[auto_type]
fn with_facts() -> _ {
    let plan = plans::tenant_id
        .eq(api_keys::tenant_id)
        .and(plans::id.eq(api_keys::plan_id));
    let access = billing_accounts::tenant_id.eq(api_keys::tenant_id);
    api_keys::table
        .inner_join(plans::table.on(plan))
        .inner_join(tenants::table.on(tenants::id.eq(api_keys::tenant_id)))
        .left_join(billing_accounts::table.on(access))
}

/// Finds the keys with a secret that has one of these hashes. Previous secrets are found only during their grace
/// period. Searches all tenants, and includes inactive keys. The order of the results is unspecified.
pub async fn facts(tx: &mut SystemTx, hashes: &[&[u8]]) -> Result<Vec<FoundKey>, DbError> {
    // The number of the newest invalidation is selected in the same statement, so that the number and the data come
    // from the same snapshot.
    let as_of = sql::<BigInt>("(SELECT coalesce(max(seq), 0) FROM revocations)");
    let in_grace = sql::<Bool>("coalesce(api_keys.previous_expires_at > now(), false)");
    let rows = with_facts()
        .filter(
            api_keys::key_hash
                .eq_any(hashes)
                .or(api_keys::previous_key_hash
                    .assume_not_null()
                    .eq_any(hashes)
                    .and(api_keys::previous_expires_at.assume_not_null().gt(now))),
        )
        .select((
            KeyColumns::as_select(),
            PlanColumns::as_select(),
            Option::<AccessColumns>::as_select(),
            tenants::time_zone,
            in_grace,
            as_of,
        ))
        .load::<FactsRow>(&mut **tx)
        .await?;
    Ok(rows.into_iter().flat_map(|row| row.found(hashes)).collect())
}

/// Finds one of the tenant's keys by ID, with the same data as [`facts`].
pub async fn facts_of(tx: &mut TenantTx, id: Uuid) -> Result<Option<FoundKey>, DbError> {
    let tenant = tx.tenant().0;
    let as_of = sql::<BigInt>("(SELECT coalesce(max(seq), 0) FROM revocations)");
    let row = with_facts()
        .filter(api_keys::tenant_id.eq(tenant))
        .filter(api_keys::id.eq(id))
        .select((
            KeyColumns::as_select(),
            PlanColumns::as_select(),
            Option::<AccessColumns>::as_select(),
            tenants::time_zone,
            sql::<Bool>("false"),
            as_of,
        ))
        .first::<FactsRow>(&mut **tx)
        .await
        .optional()?;
    Ok(row.and_then(|row| {
        let hash = row.key.key_hash.clone();
        row.found(&[&hash]).next()
    }))
}

/// Updates `last_used_at` of many keys in one statement. Never moves it backward.
pub async fn touch(tx: &mut SystemTx, used: &[(Uuid, DateTime<Utc>)]) -> Result<(), DbError> {
    super::touch(tx, "api_keys", used).await
}
