//! The range of a usage request, and its division into buckets.

use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use quota_common::usage::{MAX_BUCKETS, UsageBucketSize};

use crate::{
    api::problem::ApiError,
    clock::UnixNanos,
    limiter::{Policy, Zone, hour_end, window},
    repo::usage::Range,
};

/// The length of an interval in the usage rollup.
pub(in crate::api) const QUARTER: TimeDelta = TimeDelta::minutes(15);
/// The longest range for which the default bucket is an hour. For longer ranges, the default bucket is a day.
const HOURS_UP_TO: TimeDelta = TimeDelta::days(7);

/// The parameters as sent by the caller.
#[derive(Debug)]
pub(super) struct RangeQuery {
    pub(super) from: Option<DateTime<Utc>>,
    pub(super) to: Option<DateTime<Utc>>,
    pub(super) bucket: Option<UsageBucketSize>,
}

/// A range that is divided into hours or days in a time zone.
#[derive(Debug)]
pub(super) struct Buckets {
    pub(super) from: DateTime<Utc>,
    pub(super) to: DateTime<Utc>,
    pub(super) bucket: UsageBucketSize,
    /// The starts of the buckets, in ascending order. The first bucket starts at `from`.
    pub(super) starts: Vec<DateTime<Utc>>,
}

impl Buckets {
    pub(super) fn range(&self) -> Range {
        Range {
            from: self.from,
            to: self.to,
        }
    }
}

pub(in crate::api) fn nanos(at: DateTime<Utc>) -> UnixNanos {
    UnixNanos(
        at.timestamp_nanos_opt()
            .and_then(|nanos| u64::try_from(nanos).ok())
            .unwrap_or_default(),
    )
}

pub(in crate::api) fn time(at: UnixNanos) -> DateTime<Utc> {
    DateTime::from_timestamp_nanos(i64::try_from(at.0).unwrap_or(i64::MAX))
}

pub(in crate::api) fn floor(at: DateTime<Utc>) -> DateTime<Utc> {
    at.duration_trunc(QUARTER).unwrap_or(at)
}

pub(in crate::api) fn ceil(at: DateTime<Utc>) -> DateTime<Utc> {
    let floor = floor(at);
    if floor < at { floor + QUARTER } else { floor }
}

pub(super) fn zone(name: &str) -> Result<Zone, ApiError> {
    Zone::named(name)
        .map_err(|_| ApiError::invalid("tz", "must be an IANA time zone, such as Europe/Berlin"))
}

impl RangeQuery {
    pub(super) fn buckets(self, zone: &Zone, now: DateTime<Utc>) -> Result<Buckets, ApiError> {
        let to = self.to.unwrap_or(now);
        let from = self.from.unwrap_or_else(|| {
            to - match self.bucket {
                Some(UsageBucketSize::Day) => TimeDelta::days(30),
                Some(UsageBucketSize::Hour) | None => TimeDelta::days(1),
            }
        });
        if from >= to {
            let field = if self.from.is_some() { "from" } else { "to" };
            return Err(ApiError::invalid(field, "`from` must be before `to`"));
        }
        let (from, to) = (floor(from), ceil(to));
        let bucket = self.bucket.unwrap_or(if to - from <= HOURS_UP_TO {
            UsageBucketSize::Hour
        } else {
            UsageBucketSize::Day
        });
        let mut starts = vec![from];
        let mut last = from;
        loop {
            last = match bucket {
                UsageBucketSize::Hour => time(hour_end(zone, nanos(last))),
                UsageBucketSize::Day => time(window(Policy::Daily, zone, nanos(last)).end),
            };
            if last >= to {
                break;
            }
            if starts.len() == MAX_BUCKETS {
                let message = format!(
                    "the range has more than {MAX_BUCKETS} buckets: shorten it{}",
                    match bucket {
                        UsageBucketSize::Hour => " or use `bucket=day`",
                        UsageBucketSize::Day => "",
                    }
                );
                return Err(ApiError::invalid("to", message));
            }
            starts.push(last);
        }
        Ok(Buckets {
            from,
            to,
            bucket,
            starts,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().expect("a time")
    }

    fn buckets(
        zone: &str,
        from: &str,
        to: &str,
        bucket: UsageBucketSize,
    ) -> Result<Buckets, ApiError> {
        let query = RangeQuery {
            from: Some(at(from)),
            to: Some(at(to)),
            bucket: Some(bucket),
        };
        query.buckets(
            &Zone::named(zone).expect("a zone"),
            at("2026-11-26T12:00:00Z"),
        )
    }

    #[test]
    fn days_start_at_local_midnight_and_the_first_at_the_start_of_the_range() {
        let it = buckets(
            "Asia/Kathmandu",
            "2026-11-24T10:07:00Z",
            "2026-11-26T00:01:00Z",
            UsageBucketSize::Day,
        );
        let it = it.expect("a valid range");
        let starts = [
            "2026-11-24T10:00:00Z",
            "2026-11-24T18:15:00Z",
            "2026-11-25T18:15:00Z",
        ];
        assert_eq!(it.starts, starts.map(at));
        assert_eq!(
            (it.from, it.to),
            (at("2026-11-24T10:00:00Z"), at("2026-11-26T00:15:00Z"))
        );
    }

    #[test]
    fn a_thousand_buckets_are_accepted_and_no_more() {
        let hours = |to| buckets("UTC", "2026-01-01T00:00:00Z", to, UsageBucketSize::Hour);
        assert_eq!(
            hours("2026-02-11T16:00:00Z")
                .expect("1,000 hours")
                .starts
                .len(),
            1000
        );
        let error = hours("2026-02-11T16:01:00Z").expect_err("1,001 hours");
        assert_eq!(error.errors[0].field, "to");
        // A range of thousands of years is rejected without enumerating all of its buckets.
        let error = buckets(
            "UTC",
            "1970-01-01T00:00:00Z",
            "9999-12-31T00:00:00Z",
            UsageBucketSize::Day,
        );
        assert_eq!(error.expect_err("too long").errors[0].field, "to");
    }

    #[test]
    fn an_empty_range_names_the_field() {
        let error = buckets(
            "UTC",
            "2026-01-02T00:00:00Z",
            "2026-01-02T00:00:00Z",
            UsageBucketSize::Day,
        );
        assert_eq!(error.expect_err("an empty range").errors[0].field, "from");
    }
}
