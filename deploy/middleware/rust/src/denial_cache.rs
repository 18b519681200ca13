//! Recent denials.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use quick_cache::sync::Cache;

use crate::decision::{Code, Decision};

/// How long a denial is remembered. Quota rounds waits up to whole seconds, so if Quota reports a wait of two seconds,
/// the actual wait is longer than this time.
const KEPT: Duration = Duration::from_secs(1);

/// Denials by key. Allowed requests are never cached.
pub(crate) struct DenialCache {
    denials: Cache<String, Arc<Denial>>,
}

struct Denial {
    /// The cost of the denied request. A request with a lower cost may be allowed.
    cost: u32,
    until: Instant,
    decision: Decision,
}

/// Does not show the keys, which are secrets.
impl fmt::Debug for DenialCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DenialCache")
            .field("len", &self.denials.len())
            .finish_non_exhaustive()
    }
}

impl DenialCache {
    pub(crate) fn new(keys: usize) -> Self {
        Self {
            denials: Cache::new(keys),
        }
    }

    /// Returns a denial of `key` that still applies to a request with the given `cost`.
    pub(crate) fn get(&self, key: &str, cost: u32, now: Instant) -> Option<Decision> {
        let denial = self.denials.get(key)?;
        if now >= denial.until {
            self.denials.remove(key);
            return None;
        }
        (cost >= denial.cost).then(|| denial.decision.clone())
    }

    /// Remembers a denial by a rate limit or quota, unless the request might be allowed within a second. `asked_at` is
    /// the time at which the check was sent.
    pub(crate) fn insert(&self, key: &str, cost: u32, asked_at: Instant, decision: &Decision) {
        let is_long = decision.retry_after.is_none_or(|secs| secs >= 2);
        if decision.code != Code::QuotaExceeded || !is_long {
            return;
        }
        let denial = Denial {
            cost,
            until: asked_at + KEPT,
            decision: decision.clone(),
        };
        self.denials.insert(key.to_owned(), Arc::new(denial));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied(code: Code, retry_after: Option<u64>) -> Decision {
        Decision {
            retry_after,
            ..Decision::local(code)
        }
    }

    #[test]
    fn denial_is_remembered_for_a_second_after_the_check_was_sent() {
        let cache = DenialCache::new(10);
        let began = Instant::now();
        cache.insert("k", 1, began, &denied(Code::QuotaExceeded, Some(60)));
        let at = |millis| cache.get("k", 1, began + Duration::from_millis(millis));
        assert_eq!(at(0).and_then(|it| it.retry_after), Some(60));
        assert!(at(999).is_some());
        assert_eq!(at(1000), None);
        assert_eq!(at(0), None, "the denial has been removed");
    }

    #[test]
    fn denial_applies_to_requests_that_cost_as_much() {
        let cache = DenialCache::new(10);
        let now = Instant::now();
        cache.insert("k", 5, now, &denied(Code::QuotaExceeded, None));
        assert_eq!(cache.get("k", 4, now), None);
        assert!(cache.get("k", 5, now).is_some());
        assert!(cache.get("k", 6, now).is_some());
        assert_eq!(cache.get("other", 5, now), None);
    }

    #[test]
    fn only_long_denials_by_limits_are_remembered() {
        let cache = DenialCache::new(10);
        let now = Instant::now();
        for decision in [
            denied(Code::Allowed, None),
            denied(Code::QuotaExceeded, Some(1)),
            denied(Code::ReducedCapacity, Some(60)),
            denied(Code::UnknownKey, None),
            denied(Code::PaymentRequired, None),
            denied(Code::Other, Some(60)),
        ] {
            cache.insert("k", 1, now, &decision);
            assert_eq!(cache.get("k", 1, now), None, "{decision:?}");
        }
        cache.insert("k", 1, now, &denied(Code::QuotaExceeded, Some(2)));
        assert!(cache.get("k", 1, now).is_some());
    }

    #[test]
    fn number_of_denials_is_bounded() {
        let cache = DenialCache::new(100);
        let now = Instant::now();
        for key in 0..10_000 {
            let decision = denied(Code::QuotaExceeded, None);
            cache.insert(&key.to_string(), 1, now, &decision);
        }
        let len = cache.denials.len();
        assert!((1..=100).contains(&len), "{len}");
    }
}
