//! Estimates the level of a key's token bucket between two responses: the last reported level plus the tokens refilled
//! since then.

use std::fmt::Write as _;

use super::text::number;

/// A bucket as reported by response headers. All fields are integers: floating-point formatting would make the download
/// 5% larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    pub limit: u64,
    /// The number of tokens in the bucket at the time of the report.
    pub remaining: u64,
    /// The time of the report, in milliseconds since the Unix epoch.
    pub at: i64,
    /// `refill` tokens are added every `window` seconds.
    pub refill: u64,
    pub window: u64,
}

impl Bucket {
    /// Parses the values of `X-RateLimit-Limit`, `X-RateLimit-Remaining`, and `RateLimit-Policy`.
    pub fn read(limit: &str, remaining: &str, policy: &str, at: i64) -> Option<Self> {
        let rpm = policy
            .split(',')
            .map(str::trim)
            .find(|it| it.starts_with("\"rpm\""))?;
        let parameter = |name: &str| {
            rpm.split(';')
                .find_map(|it| it.trim().strip_prefix(name)?.parse::<u64>().ok())
                .filter(|n| *n > 0)
        };
        Some(Self {
            limit: limit.parse().ok().filter(|n| *n > 0)?,
            remaining: remaining.parse().ok()?,
            at,
            refill: parameter("q=")?,
            window: parameter("w=")?,
        })
    }

    /// Returns the number of tokens at `now`, in thousandths.
    pub fn level(&self, now: i64) -> u64 {
        let elapsed = u64::try_from(now - self.at).unwrap_or(0);
        let refilled = elapsed.saturating_mul(self.refill) / self.window;
        let most = self.limit.saturating_mul(1000);
        self.remaining
            .saturating_mul(1000)
            .saturating_add(refilled)
            .min(most)
    }

    /// Returns the filled part of the bucket, in thousandths.
    pub fn share(&self, now: i64) -> u64 {
        self.level(now) / self.limit
    }

    /// Returns the number of seconds until the bucket is full.
    pub fn full_in(&self, now: i64) -> u64 {
        let missing = self.limit.saturating_mul(1000) - self.level(now);
        let millis = missing.saturating_mul(self.window).div_ceil(self.refill);
        millis.div_ceil(1000)
    }

    /// Returns the refill rate per second, with at most one decimal place.
    pub fn pace(&self) -> String {
        let tenths = (self.refill.saturating_mul(10) + self.window / 2) / self.window;
        match tenths % 10 {
            0 => number(tenths / 10),
            rest => format!("{}.{rest}", number(tenths / 10)),
        }
    }
}

/// The recent levels of a bucket, for a chart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    points: Vec<(i64, u64)>,
}

impl History {
    /// The time range of the chart, in milliseconds.
    pub const SPAN: i64 = 30_000;

    /// Adds a level. `share` is in thousandths.
    pub fn add(&mut self, now: i64, share: u64) {
        self.points.push((now, share.min(1000)));
        // Keeps one point from before the time range, so that the line starts at the edge.
        let old = self
            .points
            .iter()
            .take_while(|(at, _)| *at < now - Self::SPAN)
            .count();
        self.points.drain(..old.saturating_sub(1));
    }

    /// Returns the points of an SVG `polyline` in a box that is `width` wide and 1000 high.
    pub fn line(&self, now: i64, width: i64) -> String {
        let mut line = String::new();
        for (at, share) in &self.points {
            let x = (width - (now - at) * width / Self::SPAN).max(0);
            let space = if line.is_empty() { "" } else { " " };
            let _ = write!(line, "{space}{x},{}", 1000 - share);
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket() -> Bucket {
        let policy = "\"rpm\";q=90;w=60, \"daily\";q=500;w=86400";
        Bucket::read("10", "4", policy, 1000).expect("valid headers")
    }

    #[test]
    fn bucket_refills_at_the_policy_rate_up_to_its_limit() {
        assert_eq!(bucket().level(1000), 4000);
        assert_eq!(bucket().level(3000), 7000);
        assert_eq!(bucket().level(60_000), 10_000);
        assert_eq!(bucket().level(0), 4000);
        assert_eq!(bucket().share(3000), 700);
        assert_eq!(bucket().pace(), "1.5");
        let fast = Bucket {
            refill: 60_000,
            ..bucket()
        };
        assert_eq!(fast.pace(), "1,000");
    }

    #[test]
    fn bucket_is_full_once_everything_has_refilled() {
        // 6 tokens are missing, and 1.5 are added each second.
        assert_eq!(bucket().full_in(1000), 4);
        assert_eq!(bucket().full_in(3000), 2);
        assert_eq!(bucket().full_in(4999), 1);
        assert_eq!(bucket().full_in(5000), 0);
        assert_eq!(bucket().full_in(60_000), 0);
    }

    #[test]
    fn headers_without_a_rate_policy_have_no_bucket() {
        assert_eq!(Bucket::read("10", "4", "\"daily\";q=500;w=86400", 0), None);
        assert_eq!(Bucket::read("", "4", "\"rpm\";q=60;w=60", 0), None);
        assert_eq!(Bucket::read("10", "4", "\"rpm\";q=60;w=0", 0), None);
    }

    #[test]
    fn line_ends_now_and_drops_old_points() {
        let mut history = History::default();
        for second in 0..100 {
            history.add(second * 1000, 500);
        }
        let line = history.line(99_000, 6000);
        assert!(
            line.starts_with("0,500 ") && line.ends_with(" 6000,500"),
            "{line}"
        );
        assert!(line.split(' ').count() <= 32, "{line}");
    }
}
