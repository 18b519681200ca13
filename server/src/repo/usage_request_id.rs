//! Request IDs that contain the time of their request.
//!
//! Quota's own request IDs are UUIDs of version 7. Rows that are stored together are mostly from the same time, so a
//! small index on the time is enough to find their rows. Only the rows of other request IDs have entries in an index on
//! request IDs.

use std::ops::RangeInclusive;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

/// How much the time in a request ID and the time of the decision may differ. The request may have waited, and the
/// clocks of the server and of PostgreSQL may differ.
///
/// Never reduce this: rows in the log depend on it.
const DIFFERENCE_MAX: TimeDelta = TimeDelta::seconds(1);

/// Returns the time in a request ID, if the ID is a UUID of version 7.
fn time_of(request_id: &str) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp_millis(millis_of(request_id)?)
}

/// Returns the first 48 bits of a UUID of version 7: the time in milliseconds since the Unix epoch.
fn millis_of(request_id: &str) -> Option<i64> {
    let id = Uuid::try_parse(request_id).ok()?;
    let (first, _) = id.as_u64_pair();
    (id.get_version_num() == 7).then(|| i64::try_from(first >> 16).ok())?
}

/// Returns whether a request ID contains the time of the decision, `at`.
pub(super) fn has_time(request_id: &str, at: DateTime<Utc>) -> bool {
    // This runs for each row, so it compares integers instead of dates, which is faster.
    let difference_max = DIFFERENCE_MAX.num_microseconds();
    millis_of(request_id)
        .zip(difference_max)
        .is_some_and(|(millis, max)| {
            at.timestamp_micros().abs_diff(millis * 1000) <= max.unsigned_abs()
        })
}

/// Returns when decisions can have been made whose time is in this request ID. Returns `None` if no time is in the ID.
pub(super) fn times(request_id: &str) -> Option<RangeInclusive<DateTime<Utc>>> {
    let time = time_of(request_id)?;
    Some(time - DIFFERENCE_MAX..=time + DIFFERENCE_MAX)
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::{has_time, time_of};

    /// The example in RFC 9562, appendix A.6.
    const ID: &str = "017f22e2-79b0-7cc3-98c4-dc0c0c07398f";

    #[test]
    fn only_a_uuid_of_version_7_has_a_time() {
        let time = DateTime::parse_from_rfc3339("2022-02-22T14:22:22-05:00").expect("a time");
        assert_eq!(time_of(ID), Some(time.to_utc()));
        assert_eq!(time_of(&ID.to_uppercase()), Some(time.to_utc()));
        for other in [
            "",
            "r1",
            "019ab4e1-7c00-4000-8000-000000000001",
            "019ab4e1-7c00-1000-8000-000000000001",
            "019ab4e1-7c00-7000-8000-00000000000",
            "019ab4e1-7c00-7000-8000-0000000000011",
        ] {
            assert_eq!(time_of(other), None, "{other}");
        }
    }

    #[test]
    fn the_time_in_a_request_id_differs_by_at_most_a_second() {
        let time = time_of(ID).expect("a time");
        for (difference, wanted) in [
            (TimeDelta::zero(), true),
            (TimeDelta::seconds(1), true),
            (TimeDelta::seconds(-1), true),
            (TimeDelta::milliseconds(1001), false),
            (TimeDelta::milliseconds(-1001), false),
            (TimeDelta::days(400), false),
        ] {
            assert_eq!(has_time(ID, time + difference), wanted, "{difference}");
        }
        assert!(!has_time("r1", time));
        let latest = "ffffffff-ffff-7fff-bfff-ffffffffffff";
        assert!(!has_time(latest, time));
        assert!(!has_time(latest, DateTime::UNIX_EPOCH));
    }
}
