//! A lock-free histogram.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crate::clock::Nanos;

/// A histogram whose buckets are atomics. The bounds of the buckets double from 1 µs to about 8 s. The last bucket also
/// contains longer times.
#[derive(Debug, Default)]
pub struct Latency {
    buckets: [AtomicU64; 24],
    nanos: AtomicU64,
}

impl Latency {
    pub fn observe(&self, Nanos(nanos): Nanos) {
        let micros = nanos.div_ceil(1000).max(1);
        let bucket = (u64::BITS - (micros - 1).leading_zeros()).min(23) as usize;
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(super) fn write(&self, text: &mut String, name: &str, help: &str) {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut total = 0;
        let mut bound = 1e-6;
        for bucket in &self.buckets {
            total += bucket.load(Ordering::Relaxed);
            let _ = writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {total}");
            bound *= 2.0;
        }
        let sum = Duration::from_nanos(self.nanos.load(Ordering::Relaxed)).as_secs_f64();
        let _ = writeln!(
            text,
            "{name}_bucket{{le=\"+Inf\"}} {total}\n{name}_sum {sum}\n{name}_count {total}"
        );
    }
}
