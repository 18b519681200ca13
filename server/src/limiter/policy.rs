//! What limits a key: its rate with a burst, and its quotas by the day and by the month.
//!
//! Owns the names of the policies and their numbers. Knows nothing of what has been spent, of keys, plans
//! or the wire. Depends on nothing that can be down.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    num::{NonZeroU32, NonZeroU64},
};

use quota_common::plan::OnRedisFailure;

use super::{quota::calendar::Zone, rate::gcra::Gcra};

/// A policy by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Policy {
    /// The sustained rate with its burst.
    Rpm = 0,
    /// The quota of the calendar day.
    Daily = 1,
    /// The quota of the calendar month.
    Monthly = 2,
}

impl Policy {
    pub const ALL: [Self; 3] = [Self::Rpm, Self::Daily, Self::Monthly];

    /// The name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rpm => "rpm",
            Self::Daily => "daily",
            Self::Monthly => "monthly",
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// Some of the three policies.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PolicySet(u8);

impl PolicySet {
    pub const EMPTY: Self = Self(0);

    #[must_use]
    pub const fn with(self, policy: Policy) -> Self {
        Self(self.0 | policy.bit())
    }

    pub const fn contains(self, policy: Policy) -> bool {
        self.0 & policy.bit() != 0
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// In the order of [`Policy::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Policy> {
        Policy::ALL.into_iter().filter(move |p| self.contains(*p))
    }
}

impl FromIterator<Policy> for PolicySet {
    fn from_iter<I: IntoIterator<Item = Policy>>(policies: I) -> Self {
        policies.into_iter().fold(Self::EMPTY, Self::with)
    }
}

impl std::fmt::Debug for PolicySet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// A token bucket: `burst` tokens at most, `rpm` new ones a minute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RatePolicy {
    pub rpm: NonZeroU32,
    pub burst: NonZeroU32,
}

/// Every policy of one key, as its plan and its own overrides give them.
///
/// Made once when a key's record is loaded: it carries the numbers that a decision needs worked out, and a
/// fingerprint by which the store notices in one comparison that a plan was edited.
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
    /// `daily` and `monthly` are quotas of requests a calendar day and month in `zone`. `strict` asks that
    /// every request be decided by the store itself and none from tokens taken ahead.
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
            // Zero is the fingerprint of a handle that has not seen any policies yet.
            fingerprint: hasher.finish().max(1),
        }
    }

    /// What to do while the shared store is away; `None`: as the server is set.
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

    /// With a number that grows with each edit, by which counters that are asked by replicas of different
    /// knowledge keep to the newest.
    #[must_use]
    pub fn with_version(mut self, version: u64) -> Self {
        self.version = version;
        self
    }

    /// Zero: not known.
    pub fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn gcra(&self) -> Gcra {
        self.gcra
    }

    /// Equal for equal policies; differs, for all practical purposes, when any number does.
    pub(super) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(rpm: u32, burst: u32) -> RatePolicy {
        RatePolicy {
            rpm: NonZeroU32::new(rpm).unwrap(),
            burst: NonZeroU32::new(burst).unwrap(),
        }
    }

    #[test]
    fn a_set_holds_what_was_put_in() {
        for bits in 0..8u8 {
            let chosen: Vec<_> = Policy::ALL
                .into_iter()
                .filter(|p| bits & p.bit() != 0)
                .collect();
            let set: PolicySet = chosen.iter().copied().collect();
            assert_eq!(set.iter().collect::<Vec<_>>(), chosen);
            assert_eq!(set.is_empty(), chosen.is_empty());
        }
    }

    #[test]
    fn every_number_shows_in_the_fingerprint() {
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
