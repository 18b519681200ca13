//! Formats the result of the test as text.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use super::counts::{Counts, MAX_IN_FLIGHT};

/// The length of the longest bar of the histogram, in characters.
const BAR: usize = 50;

/// Returns a percentile of the latencies, in milliseconds. `sorted` is in microseconds. `share` is the percentile as a
/// fraction, such as 0.99.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the index of a percentile, and a time to print"
)]
fn percentile(sorted: &[u64], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1] as f64 / 1000.0
}

#[expect(clippy::cast_precision_loss, reason = "numbers to print")]
pub(super) fn summary(counts: &Counts, cost: u64, elapsed: Duration) -> String {
    let mut text = String::new();
    let (allowed, denied, failed) = counts.totals();
    let sent = allowed + denied + failed;
    let _ = writeln!(
        text,
        "{sent} requests in {:.1} s: {allowed} allowed, {denied} denied, {failed} failed",
        elapsed.as_secs_f64()
    );
    for (reason, count) in &counts.failures {
        let _ = writeln!(text, "  failed {count} times: {reason}");
    }
    if counts.unsent > 0 {
        let _ = writeln!(
            text,
            "  {} requests were not sent, because {MAX_IN_FLIGHT} were in flight",
            counts.unsent
        );
    }
    if counts.degraded > 0 {
        let _ = writeln!(text, "  {} were decided without Redis", counts.degraded);
    }
    let mut latencies = counts.latencies.clone();
    latencies.sort_unstable();
    if !latencies.is_empty() {
        let _ = writeln!(
            text,
            "\nLatency in milliseconds, from the time each request was due:"
        );
        for (name, share) in [
            ("p50", 0.5),
            ("p90", 0.9),
            ("p99", 0.99),
            ("p99.9", 0.999),
            ("max", 1.0),
        ] {
            let _ = writeln!(text, "  {name:<6}{:>10.2}", percentile(&latencies, share));
        }
        text.push('\n');
        text.push_str(&histogram(&latencies));
    }
    let _ = writeln!(
        text,
        "\nTokens used, compared with the maximum that the rate limits allow in this time:"
    );
    for (number, key) in counts.keys.iter().enumerate() {
        let used = key.allowed * cost;
        let number = number + 1;
        let _ = match (key.sold(), key.rpm, key.burst) {
            (Some(sold), Some(rpm), Some(burst)) => {
                let verdict = if used as f64 > sold + 1.0 {
                    "TOO MANY"
                } else {
                    "ok"
                };
                writeln!(
                    text,
                    "  key {number}: {used} of {sold:.0} ({rpm} per minute, burst {burst}), {} denied: {verdict}",
                    key.denied
                )
            }
            _ => writeln!(
                text,
                "  key {number}: {used} allowed, {} denied",
                key.denied
            ),
        };
    }
    text
}

/// Draws one bar for each doubling of the latency.
fn histogram(sorted: &[u64]) -> String {
    let mut buckets = BTreeMap::<u32, usize>::new();
    for micros in sorted {
        *buckets.entry(micros.max(&1).ilog2()).or_default() += 1;
    }
    let (Some((first, _)), Some((last, _)), Some(most)) = (
        buckets.first_key_value(),
        buckets.last_key_value(),
        buckets.values().max(),
    ) else {
        return String::new();
    };
    let mut text = String::new();
    for bucket in *first..=*last {
        let count = buckets.get(&bucket).copied().unwrap_or(0);
        let below = Duration::from_micros(2 << bucket.min(62));
        let bar = "█".repeat((count * BAR).div_ceil(*most));
        let _ = writeln!(
            text,
            "  < {:>9.3} ms {count:>8} {bar}",
            below.as_secs_f64() * 1000.0
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_latencies() {
        let latencies = (1..=1000).map(|it| it * 1000).collect::<Vec<_>>();
        let found = [0.5, 0.99, 0.999, 1.0].map(|share| percentile(&latencies, share));
        assert_eq!(
            found.map(|it| format!("{it:.0}")),
            ["500", "990", "999", "1000"]
        );
        assert_eq!(format!("{:.0}", percentile(&[7000], 0.5)), "7");
    }

    #[test]
    fn every_latency_is_in_one_bar() {
        let text = histogram(&[1, 3, 1000, 1000, 5000]);
        let counts = text
            .lines()
            .filter_map(|line| line.split_whitespace().nth(3));
        let counts = counts.map(|it| it.parse::<usize>().unwrap());
        assert_eq!(counts.sum::<usize>(), 5);
        assert!(text.lines().last().unwrap().contains("8.192 ms"), "{text}");
    }
}
