//! Logs denials, and limits how many denials of a tenant are recorded while the backlog is long.
//!
//! A client that is denied a thousand times per second must not cause a thousand log lines per second, so only a few
//! lines per second are written. Each line contains the number of lines omitted since the previous line.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
};

use parking_lot::Mutex;
use quota_common::TenantId;

use super::record::RecordedOutcome;
use crate::{
    clock::{Monotonic, Nanos},
    keys::KeyRecord,
};

/// The maximum number of lines per second.
const LINES: u64 = 10;
/// The maximum number of denials per second that are recorded for a tenant while the backlog is long. A record takes
/// about 150 bytes, so a gigabyte holds 18 hours of one tenant's denials at this rate.
const RECORDED: u32 = 100;
const SECOND: Nanos = Nanos::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct DenialLog {
    /// When the current second began, in monotonic time.
    began: AtomicU64,
    /// The number of denials in the current second.
    denials: AtomicU64,
    /// The number of lines omitted in earlier seconds, since the last line was written.
    suppressed: AtomicU64,
}

impl DenialLog {
    pub fn log(&self, key: &KeyRecord, endpoint: &str, outcome: RecordedOutcome, now: Monotonic) {
        let Some(suppressed) = self.admit(now) else {
            return;
        };
        let policy = match outcome {
            RecordedOutcome::Denied(Some(policy)) => policy.name(),
            _ => "reduced_capacity",
        };
        tracing::info!(
            target: "quota_server::denials",
            key = key.prefix.as_str(),
            tenant = %key.tenant(),
            plan = key.plan.name,
            endpoint,
            policy,
            suppressed,
            "request denied"
        );
    }

    /// Returns the number of lines omitted since the last line was written, or `None` if this line must be omitted too.
    fn admit(&self, now: Monotonic) -> Option<u64> {
        let began = self.began.load(Ordering::Relaxed);
        if now.saturating_since(Monotonic(began)) >= SECOND
            && self
                .began
                .compare_exchange(began, now.0, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            let denials = self.denials.swap(0, Ordering::Relaxed);
            let omitted = denials.saturating_sub(LINES);
            self.suppressed.fetch_add(omitted, Ordering::Relaxed);
        }
        // For an omitted line, this is the only atomic read-modify-write operation.
        let is_written = self.denials.fetch_add(1, Ordering::Relaxed) < LINES;
        is_written.then(|| self.suppressed.swap(0, Ordering::Relaxed))
    }
}

/// The number of each tenant's denials in the current second.
#[derive(Debug, Default)]
pub(super) struct DenialBudget(Mutex<Spent>);

#[derive(Debug, Default)]
struct Spent {
    /// The current second, in monotonic time.
    second: u64,
    denials: HashMap<TenantId, u32>,
}

impl Spent {
    fn at(&mut self, now: Monotonic) -> &mut HashMap<TenantId, u32> {
        let second = now.0 / SECOND.0;
        // Threads may see slightly different times, so an earlier second is ignored.
        if second > self.second {
            self.second = second;
            self.denials.clear();
        }
        &mut self.denials
    }
}

impl DenialBudget {
    /// Returns whether the tenant has used up its denials for the second that contains `now`.
    pub fn is_spent(&self, tenant: TenantId, now: Monotonic) -> bool {
        let mut spent = self.0.lock();
        spent.at(now).get(&tenant).is_some_and(|it| *it >= RECORDED)
    }

    pub fn spend(&self, tenant: TenantId, now: Monotonic) {
        let mut spent = self.0.lock();
        let denials = spent.at(now).entry(tenant).or_default();
        *denials = denials.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(nanos: u64) -> Monotonic {
        Monotonic(nanos)
    }

    #[test]
    fn each_tenant_has_its_own_denials_every_second() {
        let budget = DenialBudget::default();
        let tenant = |n| TenantId(uuid::Uuid::from_u128(n));
        for _ in 0..RECORDED {
            assert!(!budget.is_spent(tenant(1), at(SECOND.0)));
            budget.spend(tenant(1), at(SECOND.0));
        }
        assert!(budget.is_spent(tenant(1), at(2 * SECOND.0 - 1)));
        assert!(!budget.is_spent(tenant(2), at(2 * SECOND.0 - 1)));
        assert!(!budget.is_spent(tenant(1), at(2 * SECOND.0)));
    }

    #[test]
    fn lines_are_capped_and_the_next_one_says_how_many_were_left_out() {
        let log = DenialLog::default();
        let lines = (0..1_000)
            .filter_map(|n| log.admit(at(n)))
            .collect::<Vec<_>>();
        assert_eq!(lines, vec![0; 10]);
        assert_eq!(log.admit(at(SECOND.0 - 1)), None);
        assert_eq!(log.admit(at(SECOND.0)), Some(991));
        assert_eq!(log.admit(at(SECOND.0 + 1)), Some(0));
    }
}
