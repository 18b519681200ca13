//! `/admin/stats`: the statistics on the home page.

use chrono::{DateTime, TimeDelta, Utc};
use poem::Result;
use poem_openapi::OpenApi;
use quota_common::{
    ApiKeyId,
    limit::PolicyName,
    usage::{Attention, AttentionKind, QuotaStatus, Stats},
};

use super::{
    Tag,
    change::read_turn,
    json::Json,
    problem::ApiError,
    tenant_rights::UsageTenant,
    usage::{
        dense,
        range::{self, nanos, time},
        sum, tenant_zone, times,
    },
};
use crate::{
    limiter::{Policy, Zone, window},
    repo::{
        usage::{self, Counts, Filter},
        usage_status::{self, QuotaRow, Standing},
    },
    state::AppState,
};

pub struct StatsApi {
    pub state: AppState,
}

/// Yesterday, up to the same time of day as now, for comparison.
struct Yesterday {
    start: DateTime<Utc>,
    /// The start of yesterday's quarter hour that contains the current time of day.
    quarter: DateTime<Utc>,
    /// The fraction of this quarter hour that had passed by the current time of day.
    part: f64,
}

impl Yesterday {
    fn new(zone: &Zone, now: DateTime<Utc>, today: DateTime<Utc>) -> Self {
        let start = time(
            window(
                Policy::Daily,
                zone,
                nanos(today - TimeDelta::nanoseconds(1)),
            )
            .start,
        );
        // Today may be longer than yesterday, so limit the time to the end of yesterday.
        let at = zone.day_before(nanos(now)).map_or(today, time).min(today);
        let quarter = range::floor(at).max(start);
        let part = (at - quarter).as_seconds_f64() / range::QUARTER.as_seconds_f64();
        Self {
            start,
            quarter,
            part,
        }
    }
}

/// Returns the given fraction of a count, rounded to an integer.
fn part_of(count: u64, part: f64) -> u64 {
    // The count for a quarter hour is far below 2^52, so `f64` represents it exactly.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count of requests times at most 1"
    )]
    let part = (count as f64 * part).round() as u64;
    part
}

impl From<QuotaRow> for QuotaStatus {
    fn from(row: QuotaRow) -> Self {
        Self {
            key_id: ApiKeyId(row.key_id),
            key_name: row.key_name,
            policy: if row.policy == "daily" {
                PolicyName::Daily
            } else {
                PolicyName::Monthly
            },
            used: u64::try_from(row.used).unwrap_or(0),
            limit: u64::try_from(row.quota).unwrap_or(0),
            reset_at: row.window_end.into(),
        }
    }
}

/// A quota needs attention if at least this percentage of it is used.
const ATTENTION_PERCENT: i64 = 80;

fn attention(quotas: Vec<QuotaRow>, standings: Vec<Standing>) -> Vec<Attention> {
    let by_quota = quotas
        .into_iter()
        .filter(|it| {
            i128::from(it.used) * 100 >= i128::from(it.quota) * i128::from(ATTENTION_PERCENT)
        })
        .map(|row| {
            let it = QuotaStatus::from(row);
            Attention {
                kind: AttentionKind::Quota,
                key_id: it.key_id,
                key_name: it.key_name,
                at: it.reset_at,
                policy: Some(it.policy),
                used: Some(it.used),
                limit: Some(it.limit),
            }
        });
    let others = standings.into_iter().filter_map(|row| {
        let kind = match row.kind.as_str() {
            "expiring" => AttentionKind::Expiring,
            "grace_ending" => AttentionKind::GraceEnding,
            "idle" => AttentionKind::Idle,
            _ => return None,
        };
        Some(Attention {
            kind,
            key_id: ApiKeyId(row.key_id),
            key_name: row.key_name,
            at: row.at.into(),
            policy: None,
            used: None,
            limit: None,
        })
    });
    by_quota.chain(others).collect()
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::Usage")]
impl StatsApi {
    /// Get statistics
    ///
    /// Returns the number of keys and plans, today's requests, the quota that is closest to being used up, and the keys
    /// that need attention.
    #[oai(path = "/stats", method = "get", operation_id = "get_stats")]
    async fn stats(&self, caller: UsageTenant) -> Result<Json<Stats>, ApiError> {
        let _turn = read_turn(&self.state, &caller).await?;
        let times = times(&self.state).await?;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let zone = tenant_zone(&mut tx).await?;
        let today = time(window(Policy::Daily, &zone, nanos(times.now)).start);
        let yesterday = Yesterday::new(&zone, times.now, today);
        let filter = Filter::default();
        let now = range::ceil(times.now + TimeDelta::seconds(1));
        let of_today = usage::series(&mut tx, &filter, None, &[today], now).await?;
        let starts = [yesterday.start, yesterday.quarter];
        let (starts, to) = (&starts[..], (yesterday.quarter + range::QUARTER).min(today));
        let of_yesterday = usage::series(&mut tx, &filter, None, starts, to).await?;
        let numbers = usage_status::numbers(&mut tx).await?;
        let mut quotas = usage_status::quotas(&mut tx, self.state.metering.is_on()).await?;
        let standings = usage_status::standings(&mut tx).await?;
        tx.commit().await?;

        let of_today = sum(&dense(&of_today, 1));
        let [before, last] = dense(&of_yesterday, 2)[..] else {
            return Err(ApiError::internal("expected two buckets"));
        };
        let compared = |counts: fn(&Counts) -> u64| {
            counts(&before) + part_of(counts(&last), yesterday.part.clamp(0.0, 1.0))
        };
        let closest = (!quotas.is_empty()).then(|| quotas[0].clone().into());
        quotas.truncate(20);
        Ok(Json(Stats {
            total_keys: numbers.total_keys(),
            active_keys: numbers.active_keys(),
            unused_keys: numbers.unused_keys(),
            total_plans: numbers.total_plans(),
            requests_today: of_today.allowed + of_today.rejected,
            rejected_today: of_today.rejected,
            requests_yesterday: compared(|it| it.allowed + it.rejected),
            rejected_yesterday: compared(|it| it.rejected),
            today: today.into(),
            time_zone: zone.name().to_owned(),
            complete_until: times.complete_until.into(),
            closest_to_limit: closest,
            attention: attention(quotas, standings),
        }))
    }
}
