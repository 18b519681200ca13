//! The log line of a denial: which key, which plan, which endpoint, which policy.
//!
//! A client that is denied a thousand times per second must not cause a thousand lines per second. So there are at most
//! a few per second, and the next line says how many were left out.

use std::sync::atomic::{AtomicU64, Ordering};

use super::record::RecordedOutcome;
use crate::keys::KeyRecord;

/// The maximum number of lines per second.
const LINES: u64 = 10;
const SECOND: u64 = 1_000_000_000;

#[derive(Debug, Default)]
pub(super) struct DenialLog {
    /// When the current second began, in monotonic time.
    began: AtomicU64,
    lines: AtomicU64,
    suppressed: AtomicU64,
}

impl DenialLog {
    pub fn log(&self, key: &KeyRecord, endpoint: &str, outcome: RecordedOutcome, now: u64) {
        if !tracing::enabled!(target: "quota_server::denials", tracing::Level::INFO) {
            return;
        }
        let Some(suppressed) = self.admit(now) else {
            return;
        };
        let policy = match outcome {
            RecordedOutcome::Denied(Some(policy)) => policy.name(),
            _ => "reduced_capacity",
        };
        tracing::info!(
            target: "quota_server::denials",
            key = key.prefix,
            tenant = %key.tenant,
            plan = key.plan,
            endpoint,
            policy,
            suppressed,
            "request denied"
        );
    }

    /// Returns whether a line may be written, and how many were left out since the last one.
    fn admit(&self, now: u64) -> Option<u64> {
        let began = self.began.load(Ordering::Relaxed);
        if now.saturating_sub(began) >= SECOND
            && self
                .began
                .compare_exchange(began, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            self.lines.store(0, Ordering::Relaxed);
        }
        if self.lines.fetch_add(1, Ordering::Relaxed) < LINES {
            Some(self.suppressed.swap(0, Ordering::Relaxed))
        } else {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_capped_and_the_next_one_says_how_many_were_left_out() {
        let log = DenialLog::default();
        let lines = (0..1_000).filter_map(|n| log.admit(n)).collect::<Vec<_>>();
        assert_eq!(lines, vec![0; 10]);
        assert_eq!(log.admit(SECOND - 1), None);
        assert_eq!(log.admit(SECOND), Some(991));
        assert_eq!(log.admit(SECOND + 1), Some(0));
    }
}
