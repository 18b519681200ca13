//! API keys in PostgreSQL.

use chrono::{DateTime, Utc};
use diesel::{
    dsl::{now, sql},
    pg::Pg,
    prelude::*,
    sql_types::{Array, BigInt, Bool, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{By, Mark, Order, Rows, SortedSlice, beyond_name, by_name, containing};
use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::{api_keys, plans, tenants},
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
    pub last_used_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
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
}

#[derive(Debug, Default, AsChangeset)]
#[diesel(table_name = api_keys)]
pub struct ApiKeyChange<'a> {
    pub name: Option<&'a str>,
    pub plan_id: Option<Uuid>,
    pub is_active: Option<bool>,
    pub expires_at: Option<Option<DateTime<Utc>>>,
    pub rpm_override: Option<Option<i32>>,
}

/// Which keys a list shows.
#[derive(Debug, Default)]
pub struct Filter<'a> {
    pub plan_id: Option<Uuid>,
    pub is_active: Option<bool>,
    /// Whether they have ended by this time.
    pub is_expired: Option<(bool, DateTime<Utc>)>,
    /// A part of the name, or the beginning of the text.
    pub search: Option<&'a str>,
}

/// All that a decision needs to know of a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyFacts {
    pub tenant_id: Uuid,
    pub id: Uuid,
    pub plan_id: Uuid,
    pub prefix: String,
    pub is_active: bool,
    /// The earlier of the key's own end and, for the text from before a rotation, the end of its grace.
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
    pub time_zone: String,
}

pub async fn insert(tx: &mut TenantTx, key: &NewApiKey<'_>) -> Result<ApiKeyRow, DbError> {
    let query = diesel::insert_into(api_keys::table)
        .values(key)
        .returning(ApiKeyRow::as_returning());
    Ok(query.get_result(&mut **tx).await?)
}

pub async fn list(
    tx: &mut TenantTx,
    filter: &Filter<'_>,
    slice: &SortedSlice,
) -> Result<Rows<ApiKeyRow>, DbError> {
    let tenant = tx.tenant().0;
    let filtered = || {
        let mut query = api_keys::table
            .filter(api_keys::tenant_id.eq(tenant))
            .into_boxed::<Pg>();
        if let Some(plan_id) = filter.plan_id {
            query = query.filter(api_keys::plan_id.eq(plan_id));
        }
        if let Some(is_active) = filter.is_active {
            query = query.filter(api_keys::is_active.eq(is_active));
        }
        match filter.is_expired {
            Some((true, at)) => query = query.filter(api_keys::expires_at.le(at)),
            Some((false, at)) => {
                query = query.filter(
                    api_keys::expires_at
                        .is_null()
                        .or(api_keys::expires_at.gt(at)),
                );
            }
            None => {}
        }
        if let Some(search) = filter.search {
            let pattern = containing(search);
            let prefix = pattern[1..].to_owned();
            query = query.filter(
                api_keys::name
                    .ilike(pattern)
                    .or(api_keys::prefix.like(prefix)),
            );
        }
        query
    };
    let total = filtered().count().get_result(&mut **tx).await?;
    let mut query = filtered()
        .select(ApiKeyRow::as_select())
        .limit(slice.fetch());
    let Order { by, descending } = slice.order;
    query = match (by, descending) {
        (By::Made, true) => query.order(api_keys::id.desc()),
        (By::Made, false) => query.order(api_keys::id.asc()),
        (By::Name, true) => query.order((by_name(true), api_keys::id.desc())),
        (By::Name, false) => query.order((by_name(false), api_keys::id.asc())),
        (By::LastUsed, true) => query.order((
            api_keys::last_used_at.desc().nulls_last(),
            api_keys::id.desc(),
        )),
        (By::LastUsed, false) => query.order((
            api_keys::last_used_at.asc().nulls_first(),
            api_keys::id.asc(),
        )),
    };
    if let Some((mark, id)) = &slice.after {
        let (before, behind) = (api_keys::id.lt(*id), api_keys::id.gt(*id));
        query = match (mark, descending) {
            (Mark::Made, true) => query.filter(before),
            (Mark::Made, false) => query.filter(behind),
            (Mark::Name(name), _) => query.filter(beyond_name(descending, name, *id)),
            (Mark::LastUsed(None), true) => {
                query.filter(api_keys::last_used_at.is_null().and(before))
            }
            (Mark::LastUsed(None), false) => {
                query.filter(api_keys::last_used_at.is_not_null().or(behind))
            }
            (Mark::LastUsed(Some(at)), true) => query.filter(
                api_keys::last_used_at
                    .lt(*at)
                    .or(api_keys::last_used_at.eq(*at).and(before))
                    .or(api_keys::last_used_at.is_null()),
            ),
            (Mark::LastUsed(Some(at)), false) => query.filter(
                api_keys::last_used_at
                    .gt(*at)
                    .or(api_keys::last_used_at.eq(*at).and(behind)),
            ),
        };
    }
    let rows = query.load(&mut **tx).await?;
    Ok(Rows::new(rows, slice.limit, total))
}

pub async fn find(tx: &mut TenantTx, id: Uuid) -> Result<Option<ApiKeyRow>, DbError> {
    let query = api_keys::table
        .find((tx.tenant().0, id))
        .select(ApiKeyRow::as_select());
    Ok(query.first(&mut **tx).await.optional()?)
}

/// Finds it and holds it against other changes until the transaction ends.
pub async fn lock(tx: &mut TenantTx, id: Uuid) -> Result<Option<ApiKeyRow>, DbError> {
    let query = api_keys::table
        .find((tx.tenant().0, id))
        .select(ApiKeyRow::as_select())
        .for_update();
    Ok(query.first(&mut **tx).await.optional()?)
}

pub async fn update(
    tx: &mut TenantTx,
    id: Uuid,
    change: &ApiKeyChange<'_>,
) -> Result<Option<ApiKeyRow>, DbError> {
    let query = diesel::update(api_keys::table.find((tx.tenant().0, id)))
        .set(change)
        .returning(ApiKeyRow::as_returning());
    Ok(query.get_result(&mut **tx).await.optional()?)
}

pub async fn delete(tx: &mut TenantTx, id: Uuid) -> Result<bool, DbError> {
    Ok(diesel::delete(api_keys::table.find((tx.tenant().0, id)))
        .execute(&mut **tx)
        .await?
        == 1)
}

/// Gives the key a new text; the one it has works on until `previous_expires_at`, or ends now.
pub async fn rotate(
    tx: &mut TenantTx,
    id: Uuid,
    prefix: &str,
    key_hash: &[u8],
    previous_expires_at: Option<DateTime<Utc>>,
) -> Result<Option<ApiKeyRow>, DbError> {
    let key = api_keys::table.find((tx.tenant().0, id));
    let texts = (api_keys::prefix.eq(prefix), api_keys::key_hash.eq(key_hash));
    let row = match previous_expires_at {
        Some(until) => {
            diesel::update(key)
                .set((
                    texts,
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
                    texts,
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

/// The facts of a key, by the hash of a secret that opens it.
#[derive(Debug)]
pub struct FoundKey {
    pub hash: Vec<u8>,
    pub facts: KeyFacts,
    /// The number of the newest revocation that was there when it was read: the facts are true but for those above
    /// it.
    pub as_of: i64,
}

/// As [`facts`] selects it: the key, its secrets, its plan, the tenant's time zone, and the newest revocation.
type FactsRow = (
    (
        Uuid,
        Uuid,
        Uuid,
        String,
        bool,
        Option<DateTime<Utc>>,
        Option<i32>,
    ),
    (Vec<u8>, Option<Vec<u8>>, Option<DateTime<Utc>>, bool),
    (
        String,
        i32,
        i32,
        Option<i64>,
        Option<i64>,
        bool,
        Option<String>,
        String,
    ),
    String,
    i64,
);

/// The keys that secrets with these hashes open, active or not, over all tenants, in no order. Those that open
/// nothing are left out.
pub async fn facts(tx: &mut SystemTx, hashes: &[&[u8]]) -> Result<Vec<FoundKey>, DbError> {
    // In the same statement, so that it is of the same snapshot.
    let as_of = sql::<BigInt>("(SELECT coalesce(max(seq), 0) FROM revocations)");
    let in_grace = sql::<Bool>("coalesce(api_keys.previous_expires_at > now(), false)");
    let rows = api_keys::table
        .inner_join(
            plans::table.on(plans::tenant_id
                .eq(api_keys::tenant_id)
                .and(plans::id.eq(api_keys::plan_id))),
        )
        .inner_join(tenants::table.on(tenants::id.eq(api_keys::tenant_id)))
        .filter(
            api_keys::key_hash
                .eq_any(hashes)
                .or(api_keys::previous_key_hash
                    .assume_not_null()
                    .eq_any(hashes)
                    .and(api_keys::previous_expires_at.assume_not_null().gt(now))),
        )
        .select((
            (
                api_keys::tenant_id,
                api_keys::id,
                api_keys::plan_id,
                api_keys::prefix,
                api_keys::is_active,
                api_keys::expires_at,
                api_keys::rpm_override,
            ),
            (
                api_keys::key_hash,
                api_keys::previous_key_hash,
                api_keys::previous_expires_at,
                in_grace,
            ),
            (
                plans::name,
                plans::default_rpm,
                plans::burst,
                plans::daily_quota,
                plans::monthly_quota,
                plans::strict,
                plans::on_redis_failure,
                plans::billing,
            ),
            tenants::time_zone,
            as_of,
        ))
        .load::<FactsRow>(&mut **tx)
        .await?;
    Ok(rows
        .into_iter()
        .flat_map(|row| found_keys(row, hashes))
        .collect())
}

/// One for each secret of the key that was asked for: both secrets of a rotated key may be.
fn found_keys(row: FactsRow, hashes: &[&[u8]]) -> impl Iterator<Item = FoundKey> {
    let (key, (current, previous, grace, is_in_grace), plan, time_zone, as_of) = row;
    let own = key.5;
    let until_grace = match (own, grace) {
        (Some(own), Some(grace)) => Some(own.min(grace)),
        (own, grace) => own.or(grace),
    };
    let is_asked_for = |hash: &Vec<u8>| hashes.contains(&&**hash);
    let previous = previous.filter(|hash| is_in_grace && is_asked_for(hash));
    let current = Some(current).filter(is_asked_for);
    let facts = KeyFacts {
        tenant_id: key.0,
        id: key.1,
        plan_id: key.2,
        prefix: key.3,
        is_active: key.4,
        expires_at: own,
        rpm_override: key.6,
        plan_name: plan.0,
        default_rpm: plan.1,
        burst: plan.2,
        daily_quota: plan.3,
        monthly_quota: plan.4,
        strict: plan.5,
        on_redis_failure: plan.6,
        billing: plan.7,
        time_zone,
    };
    let secrets = [(current, own), (previous, until_grace)].into_iter();
    secrets.filter_map(move |(hash, expires_at)| {
        Some(FoundKey {
            hash: hash?,
            facts: KeyFacts {
                expires_at,
                ..facts.clone()
            },
            as_of,
        })
    })
}

/// Moves `last_used_at` of many keys forward, in one statement.
pub async fn touch(tx: &mut SystemTx, used: &[(Uuid, DateTime<Utc>)]) -> Result<(), DbError> {
    let (ids, times): (Vec<Uuid>, Vec<DateTime<Utc>>) = used.iter().copied().unzip();
    diesel::sql_query(
        "UPDATE api_keys k SET last_used_at = u.at \
         FROM unnest($1, $2) AS u (id, at) \
         WHERE k.id = u.id AND (k.last_used_at IS NULL OR k.last_used_at < u.at)",
    )
    .bind::<Array<SqlUuid>, _>(ids)
    .bind::<Array<Timestamptz>, _>(times)
    .execute(&mut **tx)
    .await?;
    Ok(())
}
