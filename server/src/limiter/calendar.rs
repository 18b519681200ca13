//! Days and months in a time zone, as stretches of Unix time.
//!
//! A day begins at the first instant of its date in the zone, whatever the clocks there did: a day in which
//! they are put forward has 23 hours, one in which they are put back 25, and where midnight itself is skipped
//! the day begins after the gap. Months begin with their first day. Windows therefore tile the time line.

use std::fmt;

use jiff::{Timestamp, ToSpan, ZonedDateTime, tz::TimeZone};

use super::policy::Policy;
use crate::clock::UnixNanos;

/// A time zone of the IANA database, which is part of the binary.
#[derive(Clone, PartialEq, Eq)]
pub struct Zone(TimeZone);

impl Zone {
    pub fn utc() -> Self {
        Self(TimeZone::UTC)
    }

    /// `None` when the database has no zone of this name.
    pub fn named(name: &str) -> Option<Self> {
        if name == "UTC" {
            Some(Self::utc())
        } else {
            TimeZone::get(name).ok().map(Self)
        }
    }
}

impl fmt::Debug for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.iana_name().unwrap_or("UTC"))
    }
}

/// How long a quota is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Period {
    Day,
    Month,
}

impl Period {
    pub const fn policy(self) -> Policy {
        match self {
            Self::Day => Policy::Daily,
            Self::Month => Policy::Monthly,
        }
    }
}

/// A calendar day or month: from `start` to just before `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub start: UnixNanos,
    pub end: UnixNanos,
}

impl Window {
    pub const fn contains(self, at: UnixNanos) -> bool {
        self.start.0 <= at.0 && at.0 < self.end.0
    }

    /// The window that holds `at`.
    pub fn at(period: Period, zone: &Zone, at: UnixNanos) -> Self {
        let there = timestamp(at).to_zoned_datetime(zone.0.clone());
        let first = match period {
            Period::Day => there.date(),
            Period::Month => there.date().first_of_month(),
        };
        let next = match period {
            Period::Day => first.saturating_add(1.day()),
            Period::Month => first.saturating_add(1.month()),
        };
        Self {
            start: start_of(first, zone),
            end: start_of(next, zone),
        }
    }
}

fn start_of(date: jiff::civil::Date, zone: &Zone) -> UnixNanos {
    // Only dates at the very ends of jiff's range (years -9999 and 9999) have no start.
    let start = date
        .to_zoned_datetime(zone.0.clone())
        .and_then(|day| day.start_of_day());
    start.map_or(UnixNanos(u64::MAX), |start: ZonedDateTime| {
        nanos(start.timestamp())
    })
}

fn timestamp(at: UnixNanos) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(at.0)).unwrap_or(Timestamp::MAX)
}

fn nanos(at: Timestamp) -> UnixNanos {
    UnixNanos(u64::try_from(at.as_nanosecond().max(0)).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> UnixNanos {
        nanos(text.parse().unwrap())
    }

    fn window(period: Period, zone: &str, when: &str) -> (UnixNanos, UnixNanos) {
        let window = Window::at(period, &Zone::named(zone).unwrap(), at(when));
        (window.start, window.end)
    }

    const HOUR: u64 = 3_600_000_000_000;

    #[test]
    fn a_day_has_as_many_hours_as_the_clocks_give_it() {
        let hours = |when| {
            let (start, end) = window(Period::Day, "Europe/Berlin", when);
            (end.0 - start.0) / HOUR
        };
        assert_eq!(hours("2026-03-28T12:00:00Z"), 24);
        assert_eq!(hours("2026-03-29T12:00:00Z"), 23);
        assert_eq!(hours("2026-10-25T12:00:00Z"), 25);
    }

    #[test]
    fn a_day_whose_midnight_is_skipped_begins_after_the_gap() {
        // In Asuncion the clocks went from 2023-10-01 00:00 to 01:00.
        let (start, end) = window(Period::Day, "America/Asuncion", "2023-10-01T12:00:00Z");
        assert_eq!(start, at("2023-10-01T04:00:00Z"));
        assert_eq!((end.0 - start.0) / HOUR, 23);
    }

    #[test]
    fn a_month_is_a_month() {
        for (when, days) in [
            ("2026-02-10T00:00:00Z", 28),
            ("2028-02-10T00:00:00Z", 29),
            ("2026-04-30T23:59:59Z", 30),
        ] {
            let (start, end) = window(Period::Month, "UTC", when);
            assert_eq!((end.0 - start.0) / HOUR / 24, days, "{when}");
        }
        let (start, _) = window(Period::Month, "Pacific/Auckland", "2026-06-30T13:00:00Z");
        assert_eq!(start, at("2026-06-30T12:00:00Z"));
    }

    /// Ten years of every zone in the database, a day and a month at a time.
    #[test]
    fn windows_tile_ten_years_of_every_zone() {
        let (from, to) = (at("2020-01-01T00:00:00Z"), at("2030-01-01T00:00:00Z"));
        let mut seen = 0_u64;
        for (index, name) in jiff::tz::db().available().enumerate() {
            let zone = Zone::named(name.as_str()).expect("the database knows its own names");
            // Days of a fourteenth of the zones each run cover all offsets; months of every zone.
            let periods: &[Period] = if index % 14 == 0 {
                &[Period::Day, Period::Month]
            } else {
                &[Period::Month]
            };
            for period in periods {
                let mut window = Window::at(*period, &zone, from);
                assert!(window.contains(from));
                while window.end < to {
                    let next = Window::at(*period, &zone, window.end);
                    assert_eq!(
                        next.start,
                        window.end,
                        "{} {period:?}: a gap or an overlap",
                        name.as_str()
                    );
                    let before = Window::at(*period, &zone, UnixNanos(window.end.0 - 1));
                    assert_eq!(
                        before,
                        window,
                        "{} {period:?}: the last instant",
                        name.as_str()
                    );
                    let first = timestamp(next.start).to_zoned_datetime(zone.0.clone());
                    let last =
                        timestamp(UnixNanos(next.start.0 - 1)).to_zoned_datetime(zone.0.clone());
                    assert_ne!(
                        first.date(),
                        last.date(),
                        "{}: not the first instant",
                        name.as_str()
                    );
                    if *period == Period::Month {
                        assert_eq!(first.day(), 1, "{}", name.as_str());
                    }
                    window = next;
                    seen += 1;
                }
            }
        }
        assert!(
            seen > 150_000,
            "only {seen} windows: is the database there?"
        );
    }
}
