//! Evaluates a log: how many requests were allowed in total and in the worst window, and how many a limit allows.

use std::time::Duration;

use super::drive::Attempt;

/// The rule by which a server limits requests.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Rule {
    /// A token bucket, which is full at the start.
    Bucket { burst: u32, slack: Duration },
    /// A window of a minute. A fixed window starts with the key's first request.
    Window,
}

impl Rule {
    /// Returns how many requests are allowed within `time` of the first request. `limit` is the limit per minute, and
    /// `time` must be less than a minute.
    pub(crate) fn allows(self, limit: u32, time: Duration) -> u64 {
        match self {
            Self::Bucket { burst, slack } => {
                let refilled = (time + slack).as_nanos() * u128::from(limit) / 60_000_000_000;
                u64::from(burst) + u64::try_from(refilled).unwrap_or(u64::MAX)
            }
            Self::Window => u64::from(limit),
        }
    }
}

/// Returns how many requests got this status.
pub(crate) fn count(log: &[Attempt], status: u16) -> u64 {
    log.iter().filter(|it| it.status == status).count() as u64
}

/// Returns the time from the first request to the last response.
pub(crate) fn length(log: &[Attempt]) -> Duration {
    let first = log.iter().map(|it| it.sent).min().unwrap_or(0);
    let last = log.iter().map(|it| it.answered).max().unwrap_or(0);
    Duration::from_nanos(last.saturating_sub(first))
}

/// Returns the largest number of allowed requests in a window of this length. A request counts only if it was both sent
/// and answered in the window, so the result is never too high.
pub(crate) fn worst_window(log: &[Attempt], window: Duration) -> u64 {
    let window = u64::try_from(window.as_nanos()).unwrap_or(u64::MAX);
    let mut allowed: Vec<&Attempt> = log.iter().filter(|it| it.status == 200).collect();
    // In this order, the request that starts a window comes before all requests that were sent later.
    allowed.sort_unstable_by_key(|it| it.sent);
    let mut ends: Vec<u64> = allowed.iter().map(|it| it.answered).collect();
    ends.sort_unstable();
    let mut worst = 0;
    for (earlier, first) in allowed.iter().enumerate() {
        let end = first.sent.saturating_add(window);
        let answered = ends.partition_point(|it| *it <= end);
        // Subtract the requests that were sent before the window. If one of them was answered after the window, it is
        // not included in `answered`, so the result is too low.
        worst = worst.max(answered.saturating_sub(earlier));
    }
    worst as u64
}

/// Returns a quantile in microseconds; 0 if there are no values.
pub(crate) fn quantile(sorted: &[u64], part: f64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index"
    )]
    let index = (sorted.len() as f64 * part).ceil() as usize;
    let found = sorted.get(index.saturating_sub(1)).copied().unwrap_or(0);
    #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52")]
    let found = found as f64;
    found / 1e3
}

/// Returns the latencies of responses in nanoseconds, sorted.
pub(crate) fn latencies(log: &[Attempt]) -> Vec<u64> {
    let answered = log.iter().filter(|it| it.status != 0);
    let mut latencies: Vec<u64> = answered.map(|it| it.answered - it.sent).collect();
    latencies.sort_unstable();
    latencies
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Attempt, Rule, latencies, length, quantile, worst_window};

    const SECOND: u64 = 1_000_000_000;

    fn attempt(sent: u64, answered: u64, status: u16) -> Attempt {
        Attempt {
            sent,
            answered,
            status,
            request: 0,
        }
    }

    /// Returns requests every 10 ms. A fixed window that ends at 5 s allows one hundred of them just before it ends,
    /// and the next window allows one hundred just after it starts.
    fn across_an_edge() -> Vec<Attempt> {
        let request = |n: u64| {
            let sent = n * SECOND / 100;
            let is_allowed = (400..500).contains(&n) || (500..600).contains(&n);
            attempt(sent, sent + 1000, if is_allowed { 200 } else { 429 })
        };
        (0..1000).map(request).collect()
    }

    #[test]
    fn a_window_across_an_edge_contains_both_sides() {
        let log = across_an_edge();
        assert_eq!(worst_window(&log, Duration::from_secs(10)), 200);
        assert_eq!(worst_window(&log, Duration::from_secs(1)), 100);
        assert_eq!(worst_window(&[], Duration::from_secs(1)), 0);
    }

    #[test]
    fn a_request_that_ends_after_the_window_does_not_count() {
        let slow = [
            attempt(0, SECOND / 2, 200),
            attempt(SECOND / 2, SECOND, 200),
            attempt(SECOND / 2, SECOND + 1, 200),
        ];
        assert_eq!(worst_window(&slow, Duration::from_secs(1)), 2);
    }

    #[test]
    fn the_worst_window_is_that_of_a_search_over_all_windows() {
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let log: Vec<Attempt> = (0..40)
                .map(|_| {
                    let sent = rng.u64(0..1000);
                    let status = if rng.bool() { 200 } else { 429 };
                    attempt(sent, sent + rng.u64(0..90), status)
                })
                .collect();
            let inside = |from: u64| {
                log.iter()
                    .filter(|it| it.status == 200 && it.sent >= from && it.answered <= from + 90)
                    .count() as u64
            };
            let expected = (0..1000).map(inside).max().unwrap_or(0);
            assert_eq!(worst_window(&log, Duration::from_nanos(90)), expected);
        }
    }

    #[test]
    fn a_bucket_refills_and_a_window_does_not() {
        let bucket = Rule::Bucket {
            burst: 60,
            slack: Duration::ZERO,
        };
        assert_eq!(bucket.allows(600, Duration::from_millis(999)), 69);
        assert_eq!(bucket.allows(600, Duration::from_secs(1)), 70);
        let leased = Rule::Bucket {
            burst: 60,
            slack: Duration::from_millis(100),
        };
        assert_eq!(leased.allows(600, Duration::from_millis(999)), 70);
        assert_eq!(Rule::Window.allows(600, Duration::from_secs(59)), 600);
    }

    #[test]
    fn quantiles_and_the_length_come_from_responses() {
        let log = [
            attempt(1000, 3000, 200),
            attempt(0, 9_999_000, 0),
            attempt(2000, 3000, 429),
        ];
        assert_eq!(latencies(&log), [1000, 2000]);
        assert_eq!(quantile(&[1000, 2000], 0.5).to_bits(), 1.0_f64.to_bits());
        assert_eq!(quantile(&[1000, 2000], 0.99).to_bits(), 2.0_f64.to_bits());
        assert_eq!(length(&log), Duration::from_nanos(9_999_000));
    }
}
