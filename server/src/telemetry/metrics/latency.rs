//! A lock-free histogram.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crate::clock::Nanos;

/// The number of buckets with an upper bound.
const BOUNDED: usize = 24;

/// A histogram whose buckets are atomic counters. The bounds of the buckets double from 1 µs to about 8 s. The last
/// bucket has no bound.
#[derive(Debug, Default)]
pub struct Latency {
    buckets: [AtomicU64; BOUNDED + 1],
    nanos: AtomicU64,
}

impl Latency {
    pub fn observe(&self, Nanos(nanos): Nanos) {
        let micros = nanos.div_ceil(1000).max(1);
        let bucket = (u64::BITS - (micros - 1).leading_zeros()) as usize;
        self.buckets[bucket.min(BOUNDED)].fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(super) fn write(&self, text: &mut String, name: &str, help: &str) {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut total = 0;
        let mut bound = 1e-6;
        let (bounded, longer) = self.buckets.split_at(BOUNDED);
        for bucket in bounded {
            total += bucket.load(Ordering::Relaxed);
            let _ = writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {total}");
            bound *= 2.0;
        }
        for bucket in longer {
            total += bucket.load(Ordering::Relaxed);
        }
        let sum = Duration::from_nanos(self.nanos.load(Ordering::Relaxed)).as_secs_f64();
        let _ = writeln!(
            text,
            "{name}_bucket{{le=\"+Inf\"}} {total}\n{name}_sum {sum}\n{name}_count {total}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::Latency;
    use crate::clock::Nanos;

    #[test]
    fn times_count_up_to_the_first_bound_that_is_not_exceeded() {
        let latency = Latency::default();
        let count = |seconds: f64| {
            let mut text = String::new();
            latency.write(&mut text, "time", "Times");
            let found = text.lines().find_map(|line| {
                let (bound, count) = line.strip_prefix("time_bucket{le=\"")?.split_once("\"} ")?;
                (bound.parse::<f64>().ok()? >= seconds).then(|| count.parse::<u64>().ok())?
            });
            found.unwrap()
        };
        latency.observe(Nanos(1_000));
        latency.observe(Nanos(1_001));
        latency.observe(Nanos(8_388_608_000));
        latency.observe(Nanos(8_388_608_001));
        latency.observe(Nanos(60_000_000_000));
        assert_eq!(count(0.000_001), 1);
        assert_eq!(count(0.000_002), 2);
        assert_eq!(count(4.0), 2);
        assert_eq!(count(8.0), 3, "longer times have no bound");
        assert_eq!(count(f64::INFINITY), 5);
    }
}
