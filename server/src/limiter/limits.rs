//! The limits of one key, with precomputed values for decisions.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    num::NonZeroU64,
    sync::Arc,
};

use quota_common::plan::OnRedisFailure;

use super::{
    policy::RatePolicy,
    quota::calendar::Zone,
    rate::{gcra::Gcra, terms::Terms},
};
use crate::clock::Nanos;

/// A key's policies, from its plan and the key's overrides. Cloning is cheap.
///
/// Created when the key's record is loaded. A store compares fingerprints to detect an edit.
#[derive(Debug, Clone)]
pub struct Policies {
    limits: Arc<Limits>,
    version: u64,
}

/// The part of [`Policies`] that several keys on a plan can share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Limits {
    rate: RatePolicy,
    daily: Option<NonZeroU64>,
    monthly: Option<NonZeroU64>,
    zone: Zone,
    strict: bool,
    on_failure: Option<OnRedisFailure>,
    gcra: Gcra,
    fingerprint: u64,
}

impl Limits {
    pub(super) fn zone(&self) -> &Zone {
        &self.zone
    }

    pub(super) fn gcra(&self) -> Gcra {
        self.gcra
    }

    pub(super) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
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
            limits: Arc::new(Limits {
                rate,
                daily,
                monthly,
                zone,
                strict,
                on_failure: None,
                gcra: Gcra::new(rate),
                fingerprint: hasher.finish(),
            }),
            version: 0,
        }
    }

    /// Sets the fallback setting. `None` means the server's default.
    #[must_use]
    pub fn on_redis_failure(mut self, on_failure: Option<OnRedisFailure>) -> Self {
        let limits = Arc::make_mut(&mut self.limits);
        let mut hasher = DefaultHasher::new();
        (limits.fingerprint, on_failure).hash(&mut hasher);
        limits.fingerprint = hasher.finish();
        limits.on_failure = on_failure;
        self
    }

    /// Returns whether `self` and `other` have the same limits. Their versions may differ.
    pub fn has_same_limits(&self, other: &Self) -> bool {
        self.limits == other.limits
    }

    pub fn on_failure(&self) -> Option<OnRedisFailure> {
        self.limits.on_failure
    }

    pub fn rate(&self) -> RatePolicy {
        self.limits.rate
    }

    pub fn daily(&self) -> Option<NonZeroU64> {
        self.limits.daily
    }

    pub fn monthly(&self) -> Option<NonZeroU64> {
        self.limits.monthly
    }

    pub fn zone(&self) -> &Zone {
        &self.limits.zone
    }

    pub fn strict(&self) -> bool {
        self.limits.strict
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

    pub(super) fn limits(&self) -> &Arc<Limits> {
        &self.limits
    }

    pub(super) fn has_quota(&self) -> bool {
        self.limits.daily.is_some() || self.limits.monthly.is_some()
    }

    pub(super) fn gcra(&self) -> Gcra {
        self.limits.gcra
    }

    /// Returns the parameters for calls to the shared counters, given the lease TTL.
    pub(super) fn terms(&self, ttl: Nanos) -> Terms {
        Terms {
            gcra: self.gcra(),
            version: self.version,
            leased: ttl > Nanos::ZERO && !self.strict(),
        }
    }

    /// Returns a fingerprint. Equal policies have equal fingerprints, and different policies almost always have
    /// different ones.
    pub(super) fn fingerprint(&self) -> u64 {
        self.limits.fingerprint
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
