//! Calendar days and months in a time zone, and the quota windows derived from them.
//!
//! This module decides when days and months begin, and what happens to a quota's window when the time zone changes. A
//! day is usually 23 or 25 hours long when clocks change, and begins later than 00:00 if midnight is skipped. A date
//! does not exist if a country skipped it to move across the date line. Computing a window takes about a microsecond,
//! so callers keep the window until it ends. The time zone database is compiled in, so that all replicas use the same
//! rules.

use std::{
    hash::{Hash, Hasher},
    num::NonZeroU32,
};

use jiff::{
    Timestamp,
    civil::{Date, DateTime},
    tz::{AmbiguousOffset, TimeZone},
};

use crate::{
    clock::{Nanos, UnixNanos},
    limiter::policy::Policy,
};

/// An IANA time zone. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Zone(TimeZone);

/// There is no IANA time zone with this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown time zone {0:?}")]
pub struct UnknownZone(pub String);

impl Zone {
    pub fn utc() -> Self {
        Self(TimeZone::UTC)
    }

    /// Returns the zone with an IANA name such as `Europe/Berlin`, ignoring case.
    pub fn named(name: &str) -> Result<Self, UnknownZone> {
        TimeZone::get(name)
            .ok()
            .filter(|zone| zone.iana_name().is_some())
            .map(Self)
            .ok_or_else(|| UnknownZone(name.to_owned()))
    }

    pub fn name(&self) -> &str {
        self.0.iana_name().unwrap_or("UTC")
    }

    /// Returns the same time of day on the previous day, or a later time if the clocks skipped that time.
    pub fn day_before(&self, at: UnixNanos) -> Option<UnixNanos> {
        let at = Timestamp::from_nanosecond(i128::from(at.0)).ok()?;
        let local = self.0.to_datetime(at);
        let before = local.date().yesterday().ok()?.to_datetime(local.time());
        let before = self.0.to_timestamp(before).ok()?.as_nanosecond();
        u64::try_from(before).ok().map(UnixNanos)
    }

    /// Returns the local time with its offset, such as `2026-11-24T10:18:42+01:00`.
    pub fn local(&self, at: UnixNanos) -> String {
        let at = Timestamp::from_nanosecond(i128::from(at.0)).unwrap_or(Timestamp::MAX);
        at.display_with_offset(self.0.to_offset(at)).to_string()
    }
}

impl Default for Zone {
    fn default() -> Self {
        Self::utc()
    }
}

impl PartialEq for Zone {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for Zone {}

impl Hash for Zone {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name().hash(state);
    }
}

/// The time from `start` up to, but not including, `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub start: UnixNanos,
    pub end: UnixNanos,
}

impl Window {
    /// An empty window.
    pub const NONE: Self = Self {
        start: UnixNanos(0),
        end: UnixNanos(0),
    };

    pub fn contains(self, at: UnixNanos) -> bool {
        self.start <= at && at < self.end
    }

    pub const fn length(self) -> Nanos {
        self.end.saturating_since(self.start)
    }
}

/// A window of a calendar quota, with the day or month that it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaWindow {
    pub span: Window,
    /// Length of the full day or month, even if a change of time zone shortened the window.
    pub period: Nanos,
}

impl QuotaWindow {
    /// An empty window.
    pub const NONE: Self = Self {
        span: Window::NONE,
        period: Nanos::ZERO,
    };

    /// Creates the window for a full day or month.
    pub const fn whole(span: Window) -> Self {
        Self {
            span,
            period: span.length(),
        }
    }

    pub const fn is_shortened(self) -> bool {
        self.span.length().0 < self.period.0
    }

    /// Returns the length in seconds if the window was shortened.
    pub fn shortened_to(self) -> Option<NonZeroU32> {
        if !self.is_shortened() {
            return None;
        }
        let seconds = self.span.length().0 / 1_000_000_000;
        NonZeroU32::new(u32::try_from(seconds).unwrap_or(u32::MAX))
    }

    /// Returns the window's quota, given the `limit` for a full day or month. The quota is proportional to the window's
    /// length, rounded up.
    pub fn quota(self, limit: u64) -> u64 {
        if !self.is_shortened() {
            return limit;
        }
        let part = u128::from(limit) * u128::from(self.span.length().0);
        u64::try_from(part.div_ceil(u128::from(self.period.0))).unwrap_or(limit)
    }
}

/// Returns the quota window that contains `at`.
///
/// `calendar` is the day or month that contains `at` in the current time zone, and `used` contains the windows with
/// usage. A change of time zone takes effect when the current window ends, so the result is the window with usage that
/// contains `at`, if there is one. Otherwise, the result is the calendar window, shortened so that it does not overlap
/// any window with usage.
pub fn window_at(at: UnixNanos, calendar: Window, used: &[QuotaWindow]) -> QuotaWindow {
    // Two windows can contain `at` if an older version of the server, which did not store the end of windows, counted
    // usage in both windows.
    let current = used.iter().filter(|window| window.span.contains(at));
    if let Some(current) = current.max_by_key(|window| window.span.start) {
        return *current;
    }
    let mut span = calendar;
    for Window { start, end } in used.iter().map(|window| window.span) {
        if end <= at {
            span.start = span.start.max(end);
        } else if at < start {
            span.end = span.end.min(start);
        }
    }
    QuotaWindow {
        span,
        period: calendar.length(),
    }
}

/// Returns the window of a calendar policy that contains `now`, or [`Window::NONE`] for [`Policy::Rpm`].
///
/// Windows have no gaps between them. Each window begins at the first instant with its date and lasts until the next
/// window begins. If clocks are set back across midnight, the old date applies again for a while, but the new window
/// has already begun.
pub fn window(policy: Policy, zone: &Zone, now: UnixNanos) -> Window {
    match policy {
        Policy::Rpm => Window::NONE,
        Policy::Daily => around(zone, now, |date| date, tomorrow),
        Policy::Monthly | Policy::TenantMonthly => {
            around(zone, now, Date::first_of_month, |first| {
                tomorrow(first.last_of_month())
            })
        }
    }
}

/// Returns the end of the clock hour that contains `now`: the next full hour of local time, or the next change in the
/// UTC offset if that is earlier. So a repeated hour counts twice, and a skipped hour does not count.
pub fn hour_end(zone: &Zone, now: UnixNanos) -> UnixNanos {
    const HOUR: i128 = 3_600_000_000_000;
    let nanos = i128::from(now.0);
    let at = Timestamp::from_nanosecond(nanos).unwrap_or(Timestamp::MAX);
    let offset = zone.0.to_offset(at);
    let local = nanos + i128::from(offset.seconds()) * 1_000_000_000;
    let full = nanos - local.rem_euclid(HOUR) + HOUR;
    let change = zone
        .0
        .following(at)
        .find(|transition| transition.offset() != offset)
        .map_or(i128::MAX, |transition| {
            transition.timestamp().as_nanosecond()
        });
    UnixNanos(u64::try_from(full.min(change)).unwrap_or(u64::MAX))
}

fn around(
    zone: &Zone,
    now: UnixNanos,
    first: impl Fn(Date) -> Date,
    next: impl Fn(Date) -> Date,
) -> Window {
    let at = Timestamp::from_nanosecond(i128::from(now.0)).unwrap_or(Timestamp::MAX);
    let mut date = first(zone.0.to_datetime(at).date());
    let mut start = first_instant(&zone.0, date);
    loop {
        let following = next(date);
        let end = first_instant(&zone.0, following);
        // After clocks are set back across midnight, the old date applies again for a while, although the new window
        // has begun. The window of a skipped date is empty.
        if now < end || following == date {
            return Window { start, end };
        }
        (date, start) = (following, end);
    }
}

fn tomorrow(date: Date) -> Date {
    date.tomorrow().unwrap_or(Date::MAX)
}

/// Returns the first instant whose local date is `date`, or the first instant after `date` if that date was skipped.
fn first_instant(zone: &TimeZone, date: Date) -> UnixNanos {
    let midnight: DateTime = date.at(0, 0, 0, 0);
    let instant = match zone.to_ambiguous_timestamp(midnight).offset() {
        AmbiguousOffset::Unambiguous { offset } | AmbiguousOffset::Fold { before: offset, .. } => {
            offset.to_timestamp(midnight)
        }
        // Midnight was skipped. Interpreted with the offset after the gap, midnight is before the transition, so the
        // next transition is where the new date begins.
        AmbiguousOffset::Gap { after, .. } => after.to_timestamp(midnight).map(|before| {
            zone.following(before)
                .next()
                .map_or(before, |transition| transition.timestamp())
        }),
    };
    // Outside the years that jiff supports, and before 1970, the result is limited to the range of `UnixNanos`.
    let nanos = instant.map_or(i128::MAX, Timestamp::as_nanosecond);
    UnixNanos(u64::try_from(nanos.max(0)).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    const HOUR: u64 = 3_600_000_000_000;

    fn at(text: &str) -> UnixNanos {
        let at: Timestamp = text.parse().unwrap();
        UnixNanos(u64::try_from(at.as_nanosecond()).unwrap())
    }

    fn zone(name: &str) -> Zone {
        Zone::named(name).unwrap()
    }

    fn day(zone_name: &str, now: &str) -> Window {
        window(Policy::Daily, &zone(zone_name), at(now))
    }

    /// Returns the starts of all hours of a day.
    fn hours(zone_name: &str, now: &str) -> Vec<String> {
        let (zone, day) = (zone(zone_name), day(zone_name, now));
        let mut starts = vec![day.start];
        while let Some(end) = starts.last().map(|at| hour_end(&zone, *at))
            && end < day.end
        {
            starts.push(end);
        }
        let text = |at: &UnixNanos| {
            let at = Timestamp::from_nanosecond(i128::from(at.0)).unwrap();
            zone.0.to_datetime(at).time().to_string()
        };
        starts.iter().map(text).collect()
    }

    #[test]
    fn a_day_has_as_many_hours_as_its_clock_shows() {
        assert_eq!(hours("Europe/Berlin", "2026-11-26T12:00:00Z").len(), 24);
        let spring = hours("Europe/Berlin", "2026-03-29T12:00:00Z");
        assert_eq!(spring.len(), 23);
        assert_eq!(spring[1..3], ["01:00:00", "03:00:00"]);
        let autumn = hours("Europe/Berlin", "2026-10-25T12:00:00Z");
        assert_eq!(autumn.len(), 25);
        assert_eq!(autumn[1..4], ["01:00:00", "02:00:00", "02:00:00"]);
        assert_eq!(hours("Asia/Kolkata", "2026-11-26T12:00:00Z").len(), 24);
        assert_eq!(hours("Asia/Kathmandu", "2026-11-26T12:00:00Z").len(), 24);
        // On Lord Howe Island, clocks change by half an hour, so half an hour is repeated or skipped.
        let autumn = hours("Australia/Lord_Howe", "2026-04-05T02:00:00Z");
        assert_eq!(autumn[1..4], ["01:00:00", "01:30:00", "02:00:00"]);
        let spring = hours("Australia/Lord_Howe", "2026-10-04T02:00:00Z");
        assert_eq!(spring[1..4], ["01:00:00", "02:30:00", "03:00:00"]);
    }

    fn month(zone_name: &str, now: &str) -> Window {
        window(Policy::Monthly, &zone(zone_name), at(now))
    }

    #[test]
    fn unknown_zone_is_rejected() {
        for name in ["Europe/Atlantis", "", "../etc/passwd", "+02:00"] {
            assert_eq!(Zone::named(name), Err(UnknownZone(name.to_owned())));
        }
        assert_eq!(zone("europe/berlin"), zone("Europe/Berlin"));
        assert_eq!(Zone::default().name(), "UTC");
    }

    #[test]
    fn day_lasts_23_24_or_25_hours_when_clocks_change() {
        for (now, hours) in [
            ("2026-03-28T12:00Z", 24),
            ("2026-03-29T12:00Z", 23),
            ("2026-10-25T12:00Z", 25),
        ] {
            let window = day("Europe/Berlin", now);
            assert_eq!(window.end.0 - window.start.0, hours * HOUR, "{now}");
        }
    }

    #[test]
    fn months_have_calendar_lengths() {
        for (now, days) in [
            ("2026-01-31T23:59:59Z", 31),
            ("2026-02-01T00:00:00Z", 28),
            ("2028-02-29T12:00:00Z", 29),
            ("2026-04-30T23:59:59.999999999Z", 30),
        ] {
            let window = month("UTC", now);
            assert_eq!(window.end.0 - window.start.0, days * 24 * HOUR, "{now}");
        }
        // In Berlin, March is an hour shorter, because clocks are set forward.
        let march = month("Europe/Berlin", "2026-03-15T00:00Z");
        assert_eq!(march.end.0 - march.start.0, 31 * 24 * HOUR - HOUR);
    }

    #[test]
    fn day_without_midnight_begins_at_its_first_instant() {
        // Beirut: 2026-03-29 00:00 was skipped; the day began at 01:00.
        let window = day("Asia/Beirut", "2026-03-29T12:00Z");
        assert_eq!(window.start, at("2026-03-28T22:00Z"));
        // In Scoresbysund, 00:00 to 01:00 on 2024-03-31 was skipped, because the zone and the season changed at the
        // same time.
        let window = day("America/Scoresbysund", "2024-03-31T12:00Z");
        assert_eq!(window.start, at("2024-03-31T01:00Z"));
    }

    #[test]
    fn day_begins_once_if_midnight_occurs_twice() {
        // St. John's, 2010: At 00:01, clocks went back to 23:01 of the previous day.
        let begins = at("2010-11-07T02:30Z");
        for now in [
            "2010-11-07T02:30Z",
            "2010-11-07T02:31Z",
            "2010-11-07T03:00Z",
            "2010-11-07T12:00Z",
        ] {
            assert_eq!(day("America/St_Johns", now).start, begins, "{now}");
        }
    }

    #[test]
    fn skipped_date_has_no_window() {
        // Samoa skipped December 30, 2011.
        let before = day("Pacific/Apia", "2011-12-30T09:59:59Z");
        let after = day("Pacific/Apia", "2011-12-30T10:00:00Z");
        assert_eq!(before.end, at("2011-12-30T10:00Z"));
        assert_eq!(after.start, before.end);
        assert_eq!(after.end.0 - after.start.0, 24 * HOUR);
    }

    #[test]
    fn limits_of_time_have_windows() {
        for now in [UnixNanos(0), UnixNanos(u64::MAX)] {
            for policy in [Policy::Daily, Policy::Monthly] {
                for name in ["UTC", "Pacific/Kiritimati", "Pacific/Pago_Pago"] {
                    let window = window(policy, &zone(name), now);
                    assert!(window.start <= now && now <= window.end);
                }
            }
        }
    }

    fn zones() -> &'static [String] {
        static ZONES: LazyLock<Vec<String>> = LazyLock::new(|| {
            jiff::tz::db()
                .available()
                .map(|name| name.to_string())
                .filter(|name| Zone::named(name).is_ok())
                .collect()
        });
        &ZONES
    }

    fn local(zone: &Zone, at: UnixNanos) -> DateTime {
        let at = Timestamp::from_nanosecond(i128::from(at.0)).unwrap();
        zone.0.to_datetime(at)
    }

    #[test]
    fn windows_cover_ten_years_of_every_zone() {
        let zones = zones();
        assert!(zones.len() > 400, "only {} zones compiled in", zones.len());
        // Each zone is checked for ten years. These decades start in 50 different years, so every year from 1971 to
        // 2029 is checked for some zones.
        for (i, name) in zones.iter().enumerate() {
            let zone = zone(name);
            let from = Date::new(1971 + i16::try_from(i % 50).unwrap(), 1, 1).unwrap();
            let begin = first_instant(&zone.0, from);
            let until = begin.saturating_add(Nanos(3653 * 24 * HOUR));
            for (policy, longest) in [(Policy::Daily, 50 * HOUR), (Policy::Monthly, 760 * HOUR)] {
                let mut now = begin;
                let mut seen: Option<DateTime> = None;
                while now < until {
                    let window = window(policy, &zone, now);
                    assert_eq!(window.start, now, "{name}: a gap or an overlap");
                    assert!(window.end > window.start && window.end.0 - window.start.0 <= longest);
                    // A window's first instant is on a later day (or in a later month) than the nanosecond before it,
                    // and than the first instant of the previous window. Later instants cannot be checked: if midnight
                    // occurs twice, the old date applies again.
                    let unit = |at: DateTime| match policy {
                        Policy::Monthly => at.date().first_of_month(),
                        _ => at.date(),
                    };
                    let here = local(&zone, window.start);
                    if let Some(previous) = seen {
                        assert!(unit(previous) < unit(here), "{name} {here}");
                        let just_before = local(&zone, UnixNanos(window.start.0 - 1));
                        assert!(unit(just_before) < unit(here), "{name} {here}");
                    }
                    seen = Some(here);
                    now = window.end;
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Looking up any instant in a window returns that window.
        #[test]
        fn every_instant_is_in_its_window(
            index in any::<prop::sample::Index>(),
            now in 0..3_000_000_000_000_000_000u64,
            part in 0.0..1.0f64,
            monthly in any::<bool>(),
        ) {
            let zones = zones();
            let zone = zone(index.get(zones).as_str());
            let policy = if monthly { Policy::Monthly } else { Policy::Daily };
            let here = window(policy, &zone, UnixNanos(now));
            prop_assert!(here.contains(UnixNanos(now)));
            #[expect(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "any instant inside will do"
            )]
            let inside = ((here.end.0 - here.start.0 - 1) as f64 * part) as u64;
            for at in [here.start, here.start.saturating_add(Nanos(inside)), UnixNanos(here.end.0 - 1)] {
                prop_assert_eq!(window(policy, &zone, at), here);
            }
        }
    }
}
