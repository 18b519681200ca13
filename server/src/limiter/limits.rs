//! The limits of one key, with precomputed values for decisions.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    num::NonZeroU64,
};

use quota_common::plan::OnRedisFailure;

use super::{
    policy::RatePolicy,
    quota::calendar::Zone,
    rate::{gcra::Gcra, terms::Terms},
};
use crate::clock::Nanos;

/// A key's policies, from its plan and the key's overrides.
///
/// Created when the key's record is loaded. A store compares fingerprints to detect an edit.
#[derive(Debug, Clone)]
pub struct Policies {
    rate: RatePolicy,
    daily: Option<NonZeroU64>,
    monthly: Option<NonZeroU64>,
    zone: Zone,
    strict: bool,
    on_failure: Option<OnRedisFailure>,
    version: u64,
    gcra: Gcra,
    fingerprint: u64,
}

impl Policies {
    /// Creates policies. `daily` and `monthly` are quotas per calendar day and month in `zone`. If `strict` is set, the
    /// store does not use leases.
    pub fn new(
        rate: RatePolicy,
        daily: Option<NonZeroU64>,
        monthly: Option<NonZeroU64>,
        zone: Zone,
        strict: bool,
    ) -> Self {
        let mut hasher = DefaultHasher::new();
        (rate, daily, monthly, &zone, strict).hash(&mut hasher);
        Self {
            rate,
            daily,
            monthly,
            zone,
            strict,
            on_failure: None,
            version: 0,
            gcra: Gcra::new(rate),
            // Zero means that no policies have been applied to a key's state yet.
            fingerprint: hasher.finish().max(1),
        }
    }

    /// Sets the fallback setting. `None` means the server's default.
    #[must_use]
    pub fn on_redis_failure(mut self, on_failure: Option<OnRedisFailure>) -> Self {
        let mut hasher = DefaultHasher::new();
        (self.fingerprint, on_failure).hash(&mut hasher);
        self.fingerprint = hasher.finish().max(1);
        self.on_failure = on_failure;
        self
    }

    pub fn on_failure(&self) -> Option<OnRedisFailure> {
        self.on_failure
    }

    pub fn rate(&self) -> RatePolicy {
        self.rate
    }

    pub fn daily(&self) -> Option<NonZeroU64> {
        self.daily
    }

    pub fn monthly(&self) -> Option<NonZeroU64> {
        self.monthly
    }

    pub fn zone(&self) -> &Zone {
        &self.zone
    }

    pub fn strict(&self) -> bool {
        self.strict
    }

    /// Sets the plan's version, which increases with each edit. If replicas know different versions, the shared
    /// counters use the newest.
    #[must_use]
    pub fn with_version(mut self, version: u64) -> Self {
        self.version = version;
        self
    }

    /// Returns the plan's version, or zero if the version is unknown.
    pub fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn gcra(&self) -> Gcra {
        self.gcra
    }

    /// Returns the parameters for calls to the shared counters, given the lease TTL.
    pub(super) fn terms(&self, ttl: Nanos) -> Terms {
        Terms {
            gcra: self.gcra,
            version: self.version,
            leased: ttl > Nanos::ZERO && !self.strict,
        }
    }

    /// Returns a fingerprint. Equal policies have equal fingerprints, and different policies almost always have
    /// different ones.
    pub(super) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    fn rate(rpm: u32, burst: u32) -> RatePolicy {
        RatePolicy {
            rpm: NonZeroU32::new(rpm).unwrap(),
            burst: NonZeroU32::new(burst).unwrap(),
        }
    }

    #[test]
    fn fingerprint_depends_on_every_number() {
        let quota = NonZeroU64::new;
        let berlin = || Zone::named("Europe/Berlin").unwrap();
        let all = [
            Policies::new(rate(60, 10), None, None, Zone::utc(), false),
            Policies::new(rate(61, 10), None, None, Zone::utc(), false),
            Policies::new(rate(60, 11), None, None, Zone::utc(), false),
            Policies::new(rate(60, 10), quota(5), None, Zone::utc(), false),
            Policies::new(rate(60, 10), None, quota(5), Zone::utc(), false),
            Policies::new(rate(60, 10), quota(5), None, berlin(), false),
            Policies::new(rate(60, 10), None, None, Zone::utc(), true),
            Policies::new(rate(60, 10), None, None, Zone::utc(), true)
                .on_redis_failure(Some(OnRedisFailure::Share)),
            Policies::new(rate(60, 10), None, None, Zone::utc(), true)
                .on_redis_failure(Some(OnRedisFailure::Open)),
        ];
        for (i, a) in all.iter().enumerate() {
            assert_eq!(a.fingerprint(), a.clone().fingerprint());
            for b in &all[i + 1..] {
                assert_ne!(a.fingerprint(), b.fingerprint());
            }
        }
    }
}
