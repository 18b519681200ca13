//! A key's bucket between two answers: what the server said last, and what has refilled since.

use std::fmt::Write as _;

/// What an answer's fields say of a bucket. In whole numbers: reading and writing others would be a twentieth of
/// what a browser loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    pub limit: u64,
    /// What was left at `at`.
    pub remaining: u64,
    /// Milliseconds since 1970.
    pub at: i64,
    /// `refill` requests come back in `window` seconds.
    pub refill: u64,
    pub window: u64,
}

impl Bucket {
    /// From `X-RateLimit-Limit`, `X-RateLimit-Remaining` and `RateLimit-Policy`.
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

    /// In thousandths of a request.
    pub fn level(&self, now: i64) -> u64 {
        let elapsed = u64::try_from(now - self.at).unwrap_or(0);
        let refilled = elapsed.saturating_mul(self.refill) / self.window;
        let most = self.limit.saturating_mul(1000);
        self.remaining
            .saturating_mul(1000)
            .saturating_add(refilled)
            .min(most)
    }

    /// How full it is, in thousandths.
    pub fn share(&self, now: i64) -> u64 {
        self.level(now) / self.limit
    }

    /// What comes back in a second, to a tenth.
    pub fn pace(&self) -> String {
        let tenths = (self.refill.saturating_mul(10) + self.window / 2) / self.window;
        format!("{}.{}", tenths / 10, tenths % 10)
    }
}

/// The last while of a bucket, as a line to draw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    points: Vec<(i64, u64)>,
}

impl History {
    /// What is shown, in milliseconds.
    pub const SPAN: i64 = 30_000;

    /// `share` is in thousandths.
    pub fn add(&mut self, now: i64, share: u64) {
        self.points.push((now, share.min(1000)));
        // One point from before what is shown stays, for the line to begin at the edge.
        let old = self
            .points
            .iter()
            .take_while(|(at, _)| *at < now - Self::SPAN)
            .count();
        self.points.drain(..old.saturating_sub(1));
    }

    /// Points of an SVG `polyline`, in a box that is this wide and 1000 high.
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
        Bucket::read("10", "4", policy, 1000).expect("the fields are whole")
    }

    #[test]
    fn it_fills_as_the_policy_says_and_no_further() {
        assert_eq!(bucket().level(1000), 4000);
        assert_eq!(bucket().level(3000), 7000);
        assert_eq!(bucket().level(60_000), 10_000);
        assert_eq!(bucket().level(0), 4000);
        assert_eq!(bucket().share(3000), 700);
        assert_eq!(bucket().pace(), "1.5");
    }

    #[test]
    fn a_key_without_a_rate_has_no_bucket() {
        assert_eq!(Bucket::read("10", "4", "\"daily\";q=500;w=86400", 0), None);
        assert_eq!(Bucket::read("", "4", "\"rpm\";q=60;w=60", 0), None);
        assert_eq!(Bucket::read("10", "4", "\"rpm\";q=60;w=0", 0), None);
    }

    #[test]
    fn the_line_ends_now_and_forgets_what_is_past() {
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
