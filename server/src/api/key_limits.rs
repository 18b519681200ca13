//! `/admin/api-keys/{key_id}/limits` and `/burn-down`: the state of a key's limits, now and over time.
//!
//! This module combines several sources. For rates, the shared counters contain the usage of all replicas. For quotas,
//! this replica's limiter has counted its own decisions up to now, and the rollups contain the decisions of all
//! replicas up to about a second ago.

use chrono::{DateTime, TimeDelta, Utc};
use poem::Result;
use poem_openapi::{
    Enum, OpenApi,
    param::{Path, Query},
};
use quota_common::{
    ApiKeyId, Timestamp,
    limit::LimitState,
    usage::{BurnDown, BurnDownPoint, KeyLimits},
};

use super::{
    Tag,
    change::read_turn,
    json::Json,
    problem::{ApiError, OrNotFound},
    tenant_rights::{ReadingTenant, UsageTenant},
    usage::{
        policy_name,
        range::{nanos, time},
        tenant_zone, times,
    },
};
use crate::{
    db::TenantTx,
    keys::KeyRecord,
    limiter::{Policy, PolicyState, QuotaWindow, window},
    repo::{
        api_key,
        usage::{self, Filter},
        usage_status,
    },
    state::AppState,
};

pub struct KeyLimitsApi {
    pub state: AppState,
}

/// A daily or monthly quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Enum)]
#[oai(rename_all = "snake_case")]
pub enum QuotaPolicy {
    Daily,
    Monthly,
}

impl QuotaPolicy {
    const fn policy(self) -> Policy {
        match self {
            Self::Daily => Policy::Daily,
            Self::Monthly => Policy::Monthly,
        }
    }
}

/// A key's quota in the current window.
#[derive(Debug, Clone, Copy)]
struct Quota {
    limit: u64,
    start: DateTime<Utc>,
    end: DateTime<Utc>,
}

impl KeyLimitsApi {
    /// Returns the key's record, with the limits that apply to its requests.
    async fn key(&self, tx: &mut TenantTx, id: ApiKeyId) -> Result<KeyRecord, ApiError> {
        let facts = api_key::facts_of(tx, id.0).await.or_not_found()?;
        self.state.keys.described(facts).map_err(ApiError::from)
    }

    /// Returns the current window of a key's quota. Uses the ledger, or the calendar if the ledger has no window.
    async fn quota(
        &self,
        tx: &mut TenantTx,
        record: &KeyRecord,
        policy: Policy,
        now: DateTime<Utc>,
    ) -> Result<Option<Quota>, ApiError> {
        let limit = match policy {
            Policy::Rpm | Policy::TenantMonthly => None,
            Policy::Daily => record.policies.daily(),
            Policy::Monthly => record.policies.monthly(),
        };
        let Some(limit) = limit else {
            return Ok(None);
        };
        let stated = usage_status::quotas_of(tx, record.id().0).await?;
        if let Some(row) = stated.into_iter().find(|row| row.policy == policy.name()) {
            return Ok(Some(Quota {
                limit: u64::try_from(row.quota).unwrap_or(0),
                start: row.window_start,
                end: row.window_end,
            }));
        }
        let zone = tenant_zone(tx).await?;
        let calendar = QuotaWindow::whole(window(policy, &zone, nanos(now)));
        Ok(Some(Quota {
            limit: limit.get(),
            start: time(calendar.span.start),
            end: time(calendar.span.end),
        }))
    }

    /// Returns the total cost of the key's allowed requests in each interval. Each interval ends at the next element of
    /// `starts`, and the last one ends at `to`.
    async fn spent(
        tx: &mut TenantTx,
        key: ApiKeyId,
        starts: &[DateTime<Utc>],
        to: DateTime<Utc>,
    ) -> Result<Vec<u64>, ApiError> {
        let filter = Filter {
            key: Some(key.0),
            ..Filter::default()
        };
        let mut spent = vec![0; starts.len()];
        for row in usage::series(tx, &filter, None, starts, to).await? {
            if let Some(spent) = spent.get_mut(row.bucket) {
                *spent += row.counts.allowed_cost;
            }
        }
        Ok(spent)
    }
}

fn limit_state(state: PolicyState) -> LimitState {
    LimitState {
        policy: policy_name(state.policy),
        limit: state.limit,
        remaining: state.remaining,
        reset_at: time(state.reset_at).into(),
    }
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::ApiKeys")]
impl KeyLimitsApi {
    /// Get an API key's limits
    ///
    /// Returns how much of each of the key's limits remains, and when each limit resets. Consumes nothing. With several
    /// replicas, requests from the last second may not be counted against the quotas yet.
    #[oai(
        path = "/api-keys/:key_id/limits",
        method = "get",
        operation_id = "get_api_key_limits"
    )]
    async fn limits(
        &self,
        caller: ReadingTenant,
        key_id: Path<ApiKeyId>,
    ) -> Result<Json<KeyLimits>, ApiError> {
        let _turn = read_turn(&self.state, &caller).await?;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let record = self.key(&mut tx, key_id.0).await?;
        tx.commit().await?;
        // `inspect` may wait for the shared counters, so do not hold a PostgreSQL connection during the call.
        let limiter = &self.state.limiter;
        let decision = limiter.inspect(&record.handle, &record.policies).await;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let now = time(decision.at);
        let mut limits = Vec::new();
        for state in decision.states() {
            let mut limit = limit_state(state);
            if let Some(quota) = self.quota(&mut tx, &record, state.policy, now).await? {
                // Other replicas may have counted usage in this window, even if this replica has not.
                let spent = Self::spent(&mut tx, key_id.0, &[quota.start], quota.end).await?;
                limit.limit = quota.limit;
                limit.remaining = limit
                    .remaining
                    .min(quota.limit.saturating_sub(spent.iter().sum()));
                limit.reset_at = quota.end.into();
            }
            limits.push(limit);
        }
        tx.commit().await?;
        let rate = record.policies.rate();
        Ok(Json(KeyLimits {
            key_id: record.id(),
            plan_id: record.plan.id,
            plan: record.plan.name.clone(),
            rpm: rate.rpm.get(),
            burst: rate.burst.get(),
            limits,
            at: now.into(),
        }))
    }

    /// Get a quota burn-down
    ///
    /// Returns how a key's daily or monthly quota has been used so far, compared with an even pace, and when it will be
    /// used up at the current pace.
    #[oai(
        path = "/api-keys/:key_id/burn-down",
        method = "get",
        operation_id = "get_burn_down"
    )]
    async fn burn_down(
        &self,
        caller: UsageTenant,
        key_id: Path<ApiKeyId>,
        /// The quota to return. The key's plan must have this quota. Default: `daily` if the plan has a daily quota,
        /// otherwise `monthly`.
        policy: Query<Option<QuotaPolicy>>,
    ) -> Result<Json<BurnDown>, ApiError> {
        let _turn = read_turn(&self.state, &caller).await?;
        let times = times(&self.state).await?;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let record = self.key(&mut tx, key_id.0).await?;
        let policy = policy.0.map_or_else(
            || match record.policies.daily() {
                None if record.policies.monthly().is_some() => Policy::Monthly,
                _ => Policy::Daily,
            },
            QuotaPolicy::policy,
        );
        let quota = self.quota(&mut tx, &record, policy, times.now).await?;
        let quota = quota.ok_or_else(|| {
            let message = format!("the key's plan has no {} quota", policy.name());
            ApiError::invalid("policy", message)
        })?;
        let until = times.complete_until.clamp(quota.start, quota.end);
        let starts = steps(quota, until);
        let spent = Self::spent(&mut tx, key_id.0, &starts, quota.end).await?;
        tx.commit().await?;
        Ok(Json(burn_down(
            &record, policy, quota, until, &starts, &spent,
        )))
    }
}

/// The maximum number of points in a burn-down, not counting the last one.
const POINTS: i32 = 192;

/// Returns the starts of intervals of equal length. The length is a multiple of a quarter hour. The first interval
/// starts with the window, and all others start before `until`.
fn steps(quota: Quota, until: DateTime<Utc>) -> Vec<DateTime<Utc>> {
    let quarter = TimeDelta::minutes(15);
    let quarters = (quota.end - quota.start).num_minutes() / 15;
    let step = quarter * i32::try_from(quarters.div_euclid(i64::from(POINTS)) + 1).unwrap_or(1);
    let mut starts = vec![quota.start];
    let mut next = quota.start + step;
    while next < until {
        starts.push(next);
        next += step;
    }
    starts
}

/// Returns the quota that would remain at `at` if it were used at an even pace over the whole window.
fn ideal(quota: Quota, at: DateTime<Utc>) -> u64 {
    let whole = u128::try_from((quota.end - quota.start).num_milliseconds())
        .unwrap_or(1)
        .max(1);
    let left = u128::try_from((quota.end - at).num_milliseconds()).unwrap_or(0);
    u64::try_from(u128::from(quota.limit) * left / whole).unwrap_or(quota.limit)
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a projection is an estimate; a quota is below 2^50"
)]
fn burn_down(
    record: &KeyRecord,
    policy: Policy,
    quota: Quota,
    until: DateTime<Utc>,
    starts: &[DateTime<Utc>],
    spent: &[u64],
) -> BurnDown {
    let mut used = 0;
    let mut points: Vec<BurnDownPoint> = Vec::with_capacity(starts.len() + 1);
    let point = |at: DateTime<Utc>, used: u64| BurnDownPoint {
        at: at.into(),
        remaining: quota.limit.saturating_sub(used),
        ideal_remaining: ideal(quota, at),
    };
    for (start, spent) in starts.iter().zip(spent) {
        points.push(point(*start, used));
        used += spent;
    }
    if points
        .last()
        .is_some_and(|last| last.at < Timestamp::from(until))
    {
        points.push(point(until, used));
    }
    let remaining = quota.limit.saturating_sub(used);

    // Measure the pace over the last quarter of the elapsed time, but over at least one hour. If less than one hour has
    // elapsed, measure it over all of the elapsed time. This period is long enough for a stable result and short enough
    // to follow changes.
    let so_far = until - quota.start;
    let recent = (so_far / 4).max(TimeDelta::hours(1)).min(so_far);
    let since = until - recent;
    let before = starts
        .iter()
        .zip(spent)
        .filter(|(start, _)| **start >= since);
    let first = before.clone().map(|(start, _)| *start).next();
    let recently: u64 = before.map(|(_, spent)| spent).sum();
    let hours = first.map_or(0.0, |first| (until - first).as_seconds_f64() / 3600.0);
    let pace = if hours > 0.0 {
        recently as f64 / hours
    } else {
        0.0
    };
    let hours_left = (quota.end - until).as_seconds_f64() / 3600.0;
    let projected = (remaining as f64 - pace * hours_left).max(0.0);
    let used_up_at = if remaining == 0 {
        Some(until)
    } else if pace > 0.0 && remaining as f64 / pace < hours_left {
        let seconds = remaining as f64 / pace * 3600.0;
        Some(until + TimeDelta::seconds(seconds as i64))
    } else {
        None
    };
    BurnDown {
        key_id: record.id(),
        policy: policy_name(policy),
        limit: quota.limit,
        used,
        remaining,
        starts_at: quota.start.into(),
        resets_at: quota.end.into(),
        points,
        pace_per_hour: (pace * 100.0).round() / 100.0,
        used_up_at: used_up_at.map(Into::into),
        projected_remaining: projected as u64,
        complete_until: until.into(),
    }
}
