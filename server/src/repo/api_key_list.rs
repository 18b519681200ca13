//! Lists and searches keys.

use chrono::{DateTime, Utc};
use diesel::{pg::Pg, prelude::*};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection as _};
use quota_common::{TenantId, api_key::ApiKeyStatus, page::TOTAL_MAX};
use uuid::Uuid;

use super::{
    CursorKey, Order, Rows, SortBy, SortedSlice, UpToTotalMax, api_key::ApiKeyRow, beyond_name,
    by_name, containing,
};
use crate::{
    db::{DbError, SystemTx, TenantTx},
    schema::api_keys,
};

#[derive(Debug, Default)]
pub struct Filter<'a> {
    pub plan_id: Option<Uuid>,
    pub status: Option<ApiKeyStatus>,
    pub is_active: Option<bool>,
    pub is_expired: Option<bool>,
    /// Keys that expire at or before this time are expired.
    pub now: DateTime<Utc>,
    pub external_id: Option<&'a str>,
    /// Part of the name, or the beginning of the key's prefix or external ID.
    pub search: Option<&'a str>,
}

/// Applies all conditions except the search.
fn filtered<'a>(tenant: Uuid, filter: &Filter<'a>) -> api_keys::BoxedQuery<'a, Pg> {
    let mut query = api_keys::table
        .filter(api_keys::tenant_id.eq(tenant))
        .into_boxed::<Pg>();
    if let Some(plan_id) = filter.plan_id {
        query = query.filter(api_keys::plan_id.eq(plan_id));
    }
    // Must agree with `ApiKey::status`.
    let (is_active, is_expired) = match filter.status {
        Some(ApiKeyStatus::Active) => (Some(true), Some(false)),
        Some(ApiKeyStatus::Expired) => (Some(true), Some(true)),
        Some(ApiKeyStatus::Inactive) => (Some(false), None),
        None => (None, None),
    };
    for is_active in [is_active, filter.is_active].into_iter().flatten() {
        query = query.filter(api_keys::is_active.eq(is_active));
    }
    for is_expired in [is_expired, filter.is_expired].into_iter().flatten() {
        query = if is_expired {
            query.filter(api_keys::expires_at.le(filter.now))
        } else {
            let expires_at = api_keys::expires_at;
            query.filter(expires_at.is_null().or(expires_at.gt(filter.now)))
        };
    }
    if let Some(external_id) = filter.external_id {
        query = query.filter(api_keys::external_id.assume_not_null().eq(external_id));
    }
    query
}

/// Applies all conditions, including the search. If the `pg_trgm` extension is available, there is an index for each
/// condition of the search.
fn searched<'a>(tenant: Uuid, filter: &Filter<'a>) -> api_keys::BoxedQuery<'a, Pg> {
    let query = filtered(tenant, filter);
    let Some(search) = filter.search else {
        return query;
    };
    let pattern = containing(search);
    let beginning = pattern[1..].to_owned();
    let external_id = api_keys::external_id.assume_not_null();
    query.filter(
        api_keys::name
            .ilike(pattern)
            .or(api_keys::prefix.like(beginning.clone()))
            .or(external_id.like(beginning)),
    )
}

/// The result of a search.
#[derive(Debug)]
pub enum Matches {
    /// The IDs of all matching keys.
    Ids(Vec<Uuid>),
    /// More than [`TOTAL_MAX`] keys match.
    Many,
}

/// Finds the keys that match a filter, which must have a search.
///
/// Under row-level security, `LIKE` cannot use an index: `LIKE` is not leakproof, so PostgreSQL must apply the policy
/// to each row first. Therefore, this function bypasses row-level security but returns only IDs. [`list`] reads the
/// rows as the tenant.
pub async fn search(
    tx: &mut SystemTx,
    tenant: TenantId,
    filter: &Filter<'_>,
) -> Result<Matches, DbError> {
    // A generic query plan would not use the indexes, because such a plan has to work for any pattern.
    tx.batch_execute("SET LOCAL plan_cache_mode = force_custom_plan")
        .await?;
    let ids = searched(tenant.0, filter)
        .select(api_keys::id)
        .limit(i64::try_from(TOTAL_MAX).unwrap_or(i64::MAX) + 1)
        .load::<Uuid>(&mut **tx)
        .await?;
    Ok(if ids.len() as u64 > TOTAL_MAX {
        Matches::Many
    } else {
        Matches::Ids(ids)
    })
}

/// Returns a page of the tenant's keys. If the filter has a search, `matches` must be the result of [`search`].
pub async fn list(
    tx: &mut TenantTx,
    filter: &Filter<'_>,
    matches: Option<&Matches>,
    slice: &SortedSlice,
) -> Result<Rows<ApiKeyRow>, DbError> {
    let tenant = tx.tenant().0;
    let query = match matches {
        None => filtered(tenant, filter),
        Some(Matches::Ids(ids)) => filtered(tenant, filter).filter(api_keys::id.eq_any(ids)),
        // With this many matches, scanning finds a full page quickly.
        Some(Matches::Many) => searched(tenant, filter),
    };
    let total = match matches {
        None => {
            let all = filtered(tenant, filter).select(api_keys::id);
            UpToTotalMax(all).get_result(&mut **tx).await?
        }
        Some(Matches::Ids(ids)) => i64::try_from(ids.len()).unwrap_or(i64::MAX),
        Some(Matches::Many) => i64::MAX,
    };
    let mut query = query.select(ApiKeyRow::as_select()).limit(slice.fetch());
    let Order { by, descending } = slice.order;
    query = match (by, descending) {
        (SortBy::CreatedAt, true) => query.order(api_keys::id.desc()),
        (SortBy::CreatedAt, false) => query.order(api_keys::id.asc()),
        (SortBy::Name, true) => query.order((by_name(true), api_keys::id.desc())),
        (SortBy::Name, false) => query.order((by_name(false), api_keys::id.asc())),
        (SortBy::LastUsed, true) => query.order((
            api_keys::last_used_at.desc().nulls_last(),
            api_keys::id.desc(),
        )),
        (SortBy::LastUsed, false) => query.order((
            api_keys::last_used_at.asc().nulls_first(),
            api_keys::id.asc(),
        )),
    };
    if let Some((cursor_key, id)) = &slice.after {
        let (before, behind) = (api_keys::id.lt(*id), api_keys::id.gt(*id));
        query = match (cursor_key, descending) {
            (CursorKey::CreatedAt, true) => query.filter(before),
            (CursorKey::CreatedAt, false) => query.filter(behind),
            (CursorKey::Name(name), _) => query.filter(beyond_name(descending, name, *id)),
            (CursorKey::LastUsed(None), true) => {
                query.filter(api_keys::last_used_at.is_null().and(before))
            }
            (CursorKey::LastUsed(None), false) => {
                query.filter(api_keys::last_used_at.is_not_null().or(behind))
            }
            (CursorKey::LastUsed(Some(at)), true) => query.filter(
                api_keys::last_used_at
                    .lt(*at)
                    .or(api_keys::last_used_at.eq(*at).and(before))
                    .or(api_keys::last_used_at.is_null()),
            ),
            (CursorKey::LastUsed(Some(at)), false) => query.filter(
                api_keys::last_used_at
                    .gt(*at)
                    .or(api_keys::last_used_at.eq(*at).and(behind)),
            ),
        };
    }
    let rows = query.load(&mut **tx).await?;
    Ok(Rows::new(rows, slice.limit, total))
}
