//! A key's bucket between two answers: what the server said last, and what has refilled since.

/// What an answer's fields say of a bucket.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bucket {
    pub limit: f64,
    /// What was left at `at`.
    pub remaining: f64,
    /// Milliseconds since 1970.
    pub at: f64,
    /// Requests that come back in a second.
    pub per_second: f64,
}

impl Bucket {
    /// From `X-RateLimit-Limit`, `X-RateLimit-Remaining` and `RateLimit-Policy`.
    pub fn read(limit: &str, remaining: &str, policy: &str, at: f64) -> Option<Self> {
        let rpm = policy
            .split(',')
            .map(str::trim)
            .find(|it| it.starts_with("\"rpm\""))?;
        let parameter = |name: &str| {
            rpm.split(';')
                .find_map(|it| it.trim().strip_prefix(name)?.parse::<f64>().ok())
        };
        Some(Self {
            limit: limit.parse().ok()?,
            remaining: remaining.parse().ok()?,
            at,
            per_second: parameter("q=")? / parameter("w=")?,
        })
    }

    pub fn level(&self, now: f64) -> f64 {
        let refilled = (now - self.at).max(0.0) / 1000.0 * self.per_second;
        (self.remaining + refilled).min(self.limit)
    }
}

/// The last while of a bucket, as a line to draw.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    points: Vec<(f64, f64)>,
}

impl History {
    /// What is shown, in milliseconds.
    pub const SPAN: f64 = 30_000.0;

    pub fn add(&mut self, now: f64, share: f64) {
        self.points.push((now, share.clamp(0.0, 1.0)));
        // One point from before what is shown stays, for the line to begin at the edge.
        let old = self
            .points
            .iter()
            .take_while(|(at, _)| *at < now - Self::SPAN)
            .count();
        self.points.drain(..old.saturating_sub(1));
    }

    /// Points of an SVG `polyline`, in a box of this width and height.
    pub fn line(&self, now: f64, width: f64, height: f64) -> String {
        let points = self.points.iter().map(|(at, share)| {
            let x = (1.0 - (now - at) / Self::SPAN).max(0.0) * width;
            let y = (1.0 - share) * height;
            format!("{x:.1},{y:.1}")
        });
        points.collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket() -> Bucket {
        let policy = "\"rpm\";q=60;w=60, \"daily\";q=500;w=86400";
        Bucket::read("10", "4", policy, 1000.0).expect("the fields are whole")
    }

    #[test]
    fn it_fills_as_the_policy_says_and_no_further() {
        assert!((bucket().level(1000.0) - 4.0).abs() < 1e-9);
        assert!((bucket().level(3000.0) - 6.0).abs() < 1e-9);
        assert!((bucket().level(60_000.0) - 10.0).abs() < 1e-9);
        assert!((bucket().level(0.0) - 4.0).abs() < 1e-9);
    }

    #[test]
    fn a_key_without_a_rate_has_no_bucket() {
        assert_eq!(
            Bucket::read("10", "4", "\"daily\";q=500;w=86400", 0.0),
            None
        );
        assert_eq!(Bucket::read("", "4", "\"rpm\";q=60;w=60", 0.0), None);
    }

    #[test]
    fn the_line_ends_now_and_forgets_what_is_past() {
        let mut history = History::default();
        for second in 0..100 {
            history.add(f64::from(second) * 1000.0, 0.5);
        }
        let line = history.line(99_000.0, 300.0, 100.0);
        assert!(
            line.starts_with("0.0,50.0 ") && line.ends_with(" 300.0,50.0"),
            "{line}"
        );
        assert!(line.split(' ').count() <= 32, "{line}");
    }
}
