//! Local times, as formatted by the browser for a time zone.

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalTime {
    pub year: i64,
    pub month: u32,
    pub day: u32,
    pub hour: u32,
    pub minute: u32,
    /// The abbreviated day of the week, such as `Thu`.
    pub weekday: String,
    /// The name of the time zone at that time, such as `CET` or `GMT+9`.
    pub zone: String,
}

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

impl LocalTime {
    /// Parses the output of `Intl.DateTimeFormat("en-GB", …)`, such as `Thu, 26/11/2026, 14:05 CET`.
    pub fn read(text: &str) -> Option<Self> {
        let weekday = text.get(..3)?.to_owned();
        let mut numbers = text
            .split(|c: char| !c.is_ascii_digit())
            .filter(|it| !it.is_empty())
            .map(str::parse::<u32>);
        let mut next = || numbers.next()?.ok();
        let (day, month, year, hour, minute) = (next()?, next()?, next()?, next()?, next()?);
        let (_, zone) = text.rsplit_once(", ")?.1.split_once(' ')?;
        ((1..=12).contains(&month) && hour < 24).then(|| Self {
            year: year.into(),
            month,
            day,
            hour,
            minute,
            weekday,
            zone: zone.to_owned(),
        })
    }

    /// Returns the date, such as `26 Nov`.
    pub fn date(&self) -> String {
        let month = MONTHS.get(self.month as usize - 1).copied();
        format!("{} {}", self.day, month.unwrap_or_default())
    }

    /// Returns the time of day, such as `14:05`.
    pub fn clock(&self) -> String {
        format!("{:02}:{:02}", self.hour, self.minute)
    }

    /// Returns the date and time with seconds, such as `26 Nov, 14:05:09 CET`. `seconds` are the same in every time
    /// zone.
    pub fn to_the_second(&self, seconds: i64) -> String {
        format!(
            "{}, {}:{seconds:02} {}",
            self.date(),
            self.clock(),
            self.zone
        )
    }

    /// Returns the value of a date input, such as `2026-11-26`.
    pub fn iso_date(&self) -> String {
        format!("{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }

    /// Returns the minutes since midnight as shown on the clock, ignoring clock changes.
    pub fn minutes(&self) -> i64 {
        i64::from(self.hour) * 60 + i64::from(self.minute)
    }

    /// Formats a time range, such as `Thu 26 Nov, 14:00–15:00 CET`.
    pub fn hours_to(&self, end: &Self) -> String {
        let Self { weekday, zone, .. } = self;
        format!(
            "{weekday} {}, {}–{} {zone}",
            self.date(),
            self.clock(),
            end.clock()
        )
    }

    /// Returns the weekday and date, such as `Thu 26 Nov`.
    pub fn whole_day(&self) -> String {
        format!("{} {}", self.weekday, self.date())
    }

    /// Returns the date and time with the time zone, such as `Thu 26 Nov, 14:20 CET`.
    pub fn in_full(&self) -> String {
        format!(
            "{} {}, {} {}",
            self.weekday,
            self.date(),
            self.clock(),
            self.zone
        )
    }
}

const MINUTE_MS: i64 = 60_000;
const DAY_MINUTES: i64 = 1440;

/// Returns the start of the local day that contains `at`. `local` converts a time to local time. Handles clock changes
/// during the day.
pub fn start_of_day(at: i64, local: &dyn Fn(i64) -> Option<LocalTime>) -> Option<i64> {
    let minute = at.div_euclid(MINUTE_MS) * MINUTE_MS;
    let today = local(minute)?;
    let guess = minute - today.minutes() * MINUTE_MS;
    let there = local(guess)?;
    // If the clocks changed since midnight, the guess is off by the size of the change.
    let off = if there.day == today.day {
        there.minutes()
    } else {
        there.minutes() - DAY_MINUTES
    };
    Some(guess - off * MINUTE_MS)
}

/// Returns the start of the local day that is `days` days before the day that contains `at`.
pub fn start_of_day_before(
    at: i64,
    days: i64,
    local: &dyn Fn(i64) -> Option<LocalTime>,
) -> Option<i64> {
    // Counts from noon, so that days with 23 or 25 hours make no difference.
    let noon = start_of_day(at, local)? + DAY_MINUTES / 2 * MINUTE_MS;
    start_of_day(noon - days * DAY_MINUTES * MINUTE_MS, local)
}

/// Returns the start of a day, such as `2026-11-26`, in a time zone.
pub fn start_of_date(date: &str, local: &dyn Fn(i64) -> Option<LocalTime>) -> Option<i64> {
    let mut parts = date.split('-').map(str::parse::<i64>);
    let mut next = || parts.next()?.ok();
    let (year, month, day) = (next()?, next()?, next()?);
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Noon in UTC is on the same day in most time zones, and at most one day off in other time zones.
    let noon = (days_since_1970(year, month, day) * DAY_MINUTES + DAY_MINUTES / 2) * MINUTE_MS;
    let found = [0, -1, 1].into_iter().find_map(|off| {
        let at = noon + off * DAY_MINUTES * MINUTE_MS;
        (local(at)?.iso_date() == date).then_some(at)
    })?;
    start_of_day(found, local)
}

/// Returns the number of days from 1970-01-01 to a date. The algorithm is from Howard Hinnant, "chrono-Compatible
/// Low-Level Date Algorithms".
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3_600_000;
    const DAY: i64 = 24 * HOUR;

    #[test]
    fn browsers_text_is_read() {
        let at = LocalTime::read("Thu, 26/11/2026, 14:05 CET").expect("a time");
        assert_eq!(at.whole_day(), "Thu 26 Nov");
        assert_eq!(at.in_full(), "Thu 26 Nov, 14:05 CET");
        assert_eq!(at.to_the_second(9), "26 Nov, 14:05:09 CET");
        assert_eq!(at.iso_date(), "2026-11-26");
        let end = LocalTime::read("Thu, 26/11/2026, 15:05 GMT+5:30").expect("a time");
        assert_eq!(end.zone, "GMT+5:30");
        assert_eq!(at.hours_to(&end), "Thu 26 Nov, 14:05–15:05 CET");
        for text in [
            "",
            "Thu",
            "Thu, 26/13/2026, 14:05 CET",
            "Thu, 26/11/2026, 14:05",
        ] {
            assert_eq!(LocalTime::read(text), None, "{text}");
        }
    }

    /// UTC+1 until March 29, 2026, 01:00 UTC, then UTC+2 until October 25, 01:00 UTC, then UTC+1 again.
    fn berlin(at: i64) -> Option<LocalTime> {
        let (spring, autumn) = (1_774_746_000_000, 1_792_890_000_000);
        let hours = if (spring..autumn).contains(&at) { 2 } else { 1 };
        local(at, hours * 60)
    }

    fn local(at: i64, offset_minutes: i64) -> Option<LocalTime> {
        let text = crate::model::text::date_time(at + offset_minutes * MINUTE_MS);
        let (date, clock) = text.split_once(", ")?;
        let mut date = date.split(' ');
        let (day, month, year) = (date.next()?, date.next()?, date.next()?);
        let month = MONTHS.iter().position(|it| *it == month)? + 1;
        LocalTime::read(&format!(
            "Day, {day}/{month}/{year}, {} X",
            clock.trim_end_matches(" UTC")
        ))
    }

    #[test]
    fn days_start_at_midnight_even_when_clocks_change() {
        // March 29, 2026 has 23 hours, and October 25 has 25.
        for (date, start, hours) in [
            ("2026-03-28", 1_774_652_400_000, 24),
            ("2026-03-29", 1_774_738_800_000, 23),
            ("2026-03-30", 1_774_821_600_000, 24),
            ("2026-10-25", 1_792_879_200_000, 25),
            ("2026-10-26", 1_792_969_200_000, 24),
        ] {
            assert_eq!(start_of_date(date, &berlin), Some(start), "{date}");
            for hour in 0..hours {
                let at = start + hour * HOUR + 59 * MINUTE_MS;
                assert_eq!(start_of_day(at, &berlin), Some(start), "{date} +{hour}");
            }
            assert_eq!(
                start_of_day(start + hours * HOUR, &berlin),
                Some(start + hours * HOUR),
                "{date}"
            );
        }
        let monday = 1_774_821_600_000;
        assert_eq!(
            start_of_day_before(monday + HOUR, 1, &berlin),
            Some(1_774_738_800_000)
        );
        assert_eq!(
            start_of_day_before(monday + HOUR, 2, &berlin),
            Some(1_774_652_400_000)
        );
    }

    #[test]
    fn dates_are_found_in_every_zone() {
        for offset in [-720, -210, 0, 330, 765, 840] {
            let zone = |at| local(at, offset);
            let start = start_of_date("2026-11-26", &zone).expect("a day");
            assert_eq!(start, 1_795_651_200_000 - offset * MINUTE_MS, "{offset}");
        }
        let utc = |at| local(at, 0);
        for date in [
            "",
            "2026-11",
            "2026-13-01",
            "2026-02-30",
            "x-y-z",
            "0026-01-01",
        ] {
            assert_eq!(start_of_date(date, &utc), None, "{date}");
        }
        assert_eq!(start_of_date("1970-01-01", &utc), Some(0));
        assert_eq!(start_of_date("2000-02-29", &utc), Some(11_016 * DAY));
    }
}
