//! Loads usage for the time range in the URL, and for the last 24 hours.

use quota_common::{
    ApiKeyId, Timestamp,
    call::UsageFilter,
    usage::{Usage, UsageBucket, UsageBucketSize, UsageCounts},
};

use crate::{
    api::{self, CallError, CallResult},
    clock::now,
    component::local_time,
    model::{
        chart::{Bar, Completeness},
        usage::{Range, UsageRequest, pair},
        zoned::{start_of_date, start_of_day, start_of_day_before},
    },
};

const HOUR_MS: i64 = 3_600_000;
const DAY_MS: i64 = 24 * HOUR_MS;

/// Usage in a period, and in the previous period for comparison.
#[derive(Clone, PartialEq)]
pub struct UsageData {
    pub usage: Usage,
    /// The totals of the previous period. The previous period is as long as the part of the current period that had
    /// passed when the data was loaded.
    pub before: UsageCounts,
    /// Usage grouped by key, endpoint, or policy.
    pub groups: Usage,
}

/// Converts milliseconds since the Unix epoch, rounding down to seconds.
pub fn timestamp(millis: i64) -> Option<Timestamp> {
    let millis = u64::try_from(millis).ok()?;
    Timestamp::from_unix_secs(millis / 1000)
}

/// Returns the start and end of the requested time range, in milliseconds since the Unix epoch, and the bucket size.
/// Returns `None` if the dates are invalid.
pub fn period(request: &UsageRequest, zone: &str, now: i64) -> Option<(i64, i64, UsageBucketSize)> {
    let local = |at| local_time(at, zone);
    let (from, to) = match request.range {
        Range::Day => {
            let minutes = local(now)?.minutes();
            let hour = now.div_euclid(60_000) * 60_000 - minutes % 60 * 60_000;
            (hour - 23 * HOUR_MS, hour + HOUR_MS)
        }
        Range::Week => (
            start_of_day_before(now, 6, &local)?,
            start_of_day_before(now, -1, &local)?,
        ),
        Range::Month => (
            start_of_day_before(now, 29, &local)?,
            start_of_day_before(now, -1, &local)?,
        ),
        Range::Custom => {
            let (first, last) = &request.dates;
            let from = start_of_date(first, &local)?;
            // The period includes the last day. A day and a half after the start of a day is always within the next
            // day, even if the clocks change.
            let to = start_of_day(start_of_date(last, &local)? + DAY_MS + DAY_MS / 2, &local)?;
            (from, to)
        }
    };
    let bucket = request
        .bucket
        .unwrap_or(if to - from <= 3 * DAY_MS + HOUR_MS {
            UsageBucketSize::Hour
        } else {
            UsageBucketSize::Day
        });
    (from < to).then_some((from, to, bucket))
}

pub async fn load_usage(request: UsageRequest, zone: String) -> CallResult<Option<UsageData>> {
    let now = now();
    let Some((from, to, bucket)) = period(&request, &zone, now) else {
        return Ok(None);
    };
    let filter = UsageFilter {
        from: timestamp(from),
        to: timestamp(to),
        bucket: Some(bucket),
        tz: Some(zone),
        key_id: request.key_id,
        endpoint: request.endpoint,
        group_by: None,
    };
    let usage = api::usage(filter.clone()).await?;
    let groups = api::usage(UsageFilter {
        group_by: Some(request.group_by),
        ..filter.clone()
    });
    let groups = groups.await?;
    // Only periods of the same length are compared.
    let length = to.min(now) - from;
    let before = api::usage(UsageFilter {
        from: timestamp(from - length),
        to: timestamp(from),
        bucket: Some(UsageBucketSize::Day),
        ..filter
    });
    let before = before.await?.total;
    Ok(Some(UsageData {
        usage,
        before,
        groups,
    }))
}

/// Loads the usage of one key, or of all keys, in the last 24 hours.
pub async fn load_day(key_id: Option<ApiKeyId>, zone: String) -> CallResult<Usage> {
    let request = UsageRequest {
        key_id,
        ..UsageRequest::read(&crate::model::address::Query::default())
    };
    let (from, to, bucket) = period(&request, &zone, now()).ok_or(CallError::Unreadable)?;
    let filter = UsageFilter {
        from: timestamp(from),
        to: timestamp(to),
        bucket: Some(bucket),
        tz: Some(zone),
        key_id,
        ..UsageFilter::default()
    };
    api::usage(filter).await
}

fn counts(bucket: &UsageBucket) -> UsageCounts {
    UsageCounts {
        allowed: bucket.allowed,
        rejected: bucket.rejected,
        allowed_cost: bucket.allowed_cost,
        rejected_cost: bucket.rejected_cost,
    }
}

/// Returns the bars of a chart. Omits hours and days that have not started.
pub fn bars(usage: &Usage, by_cost: bool) -> Vec<Bar> {
    let millis = |at: Timestamp| at.inner().timestamp_millis();
    let (complete, now) = (millis(usage.complete_until), now());
    let zone = &*usage.time_zone;
    let mut ends = usage.buckets.iter().skip(1).map(|it| millis(it.start));
    let mut bars = Vec::with_capacity(usage.buckets.len());
    for bucket in &usage.buckets {
        let (start, end) = (
            millis(bucket.start),
            ends.next().unwrap_or_else(|| millis(usage.to)),
        );
        if start > now {
            break;
        }
        let (Some(from), Some(to)) = (local_time(start, zone), local_time(end, zone)) else {
            continue;
        };
        let pair = pair(&counts(bucket), by_cost);
        let is_empty = pair.total() == 0;
        let (label, time) = match usage.bucket {
            UsageBucketSize::Hour => (from.clock(), from.hours_to(&to)),
            UsageBucketSize::Day => (from.date(), from.whole_day()),
        };
        bars.push(Bar {
            label,
            time,
            allowed: pair.allowed,
            rejected: pair.rejected,
            completeness: if end <= complete {
                Completeness::Complete
            } else if start >= complete && is_empty {
                Completeness::Missing
            } else {
                Completeness::SoFar
            },
        });
    }
    bars
}

/// Returns the hour or day with the most requests, and the number of these requests.
pub fn peak(bars: &[Bar]) -> Option<(String, u64)> {
    let highest = bars.iter().max_by_key(|bar| bar.allowed + bar.rejected)?;
    let total = highest.allowed + highest.rejected;
    (total > 0).then(|| (highest.time.clone(), total))
}
