//! The policies that limit a key: a rate with a burst, quotas per day and month, and its tenant's monthly quota.

use std::num::NonZeroU32;

/// A policy that can limit a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Policy {
    /// The sustained rate with its burst.
    Rpm = 0,
    /// The quota per calendar day.
    Daily = 1,
    /// The quota per calendar month.
    Monthly = 2,
    /// The quota per calendar month (in UTC) that all keys of a tenant share.
    TenantMonthly = 3,
}

impl Policy {
    pub const ALL: [Self; 4] = [Self::Rpm, Self::Daily, Self::Monthly, Self::TenantMonthly];

    /// Returns the policy's name in the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rpm => "rpm",
            Self::Daily => "daily",
            Self::Monthly => "monthly",
            Self::TenantMonthly => "tenant_monthly",
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

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

    /// Returns the policies in the order of [`Policy::ALL`].
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

/// A token bucket: up to `burst` tokens, refilled at `rpm` tokens per minute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RatePolicy {
    pub rpm: NonZeroU32,
    pub burst: NonZeroU32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_contains_what_was_added() {
        for bits in 0..16u8 {
            let chosen: Vec<_> = Policy::ALL
                .into_iter()
                .filter(|p| bits & p.bit() != 0)
                .collect();
            let set: PolicySet = chosen.iter().copied().collect();
            assert_eq!(set.iter().collect::<Vec<_>>(), chosen);
            assert_eq!(set.is_empty(), chosen.is_empty());
        }
    }
}
