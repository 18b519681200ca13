//! What a key is held to: a rate with a burst, and calendar quotas.

use std::num::{NonZeroU32, NonZeroU64};

use super::{
    calendar::{Period, Zone},
    gcra::Gcra,
};

/// One of the policies of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Policy {
    /// The sustained rate with its burst.
    Rpm,
    /// The quota of the calendar day.
    Daily,
    /// The quota of the calendar month.
    Monthly,
}

impl Policy {
    /// How many there are; [`Policy::index`] is below it.
    pub const COUNT: usize = 3;
    pub const ALL: [Self; Self::COUNT] = [Self::Rpm, Self::Daily, Self::Monthly];

    pub const fn index(self) -> usize {
        self as usize
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rpm => "rpm",
            Self::Daily => "daily",
            Self::Monthly => "monthly",
        }
    }
}

/// A set of policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PolicySet(u8);

impl PolicySet {
    pub const EMPTY: Self = Self(0);

    #[must_use]
    pub const fn with(self, policy: Policy) -> Self {
        Self(self.0 | 1 << policy.index())
    }

    pub const fn contains(self, policy: Policy) -> bool {
        self.0 & (1 << policy.index()) != 0
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn iter(self) -> impl Iterator<Item = Policy> {
        Policy::ALL
            .into_iter()
            .filter(move |policy| self.contains(*policy))
    }
}

/// Everything a key is held to. Kept in the key's cached record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policies {
    /// Sustained requests a minute.
    pub rpm: NonZeroU32,
    /// Requests that a rested key may send at once.
    pub burst: NonZeroU32,
    /// Requests in a calendar day.
    pub daily: Option<NonZeroU64>,
    /// Requests in a calendar month.
    pub monthly: Option<NonZeroU64>,
    /// Where days and months begin.
    pub zone: Zone,
    /// Every request is decided on the shared counters, without leases. Without replicas there are none, and
    /// it changes nothing.
    pub strict: bool,
    pub(super) gcra: Gcra,
}

impl Policies {
    pub fn new(rpm: NonZeroU32, burst: NonZeroU32) -> Self {
        Self {
            rpm,
            burst,
            daily: None,
            monthly: None,
            zone: Zone::utc(),
            strict: false,
            gcra: Gcra::new(rpm, burst),
        }
    }

    #[must_use]
    pub fn with_daily(self, daily: Option<NonZeroU64>) -> Self {
        Self { daily, ..self }
    }

    #[must_use]
    pub fn with_monthly(self, monthly: Option<NonZeroU64>) -> Self {
        Self { monthly, ..self }
    }

    #[must_use]
    pub fn with_zone(self, zone: Zone) -> Self {
        Self { zone, ..self }
    }

    #[must_use]
    pub fn with_strict(self, strict: bool) -> Self {
        Self { strict, ..self }
    }

    /// The calendar quotas that are set.
    pub(super) fn quotas(&self) -> impl Iterator<Item = (Period, u64)> {
        [(Period::Day, self.daily), (Period::Month, self.monthly)]
            .into_iter()
            .filter_map(|(period, limit)| limit.map(|limit| (period, limit.get())))
    }

    /// The quota of `policy`: the burst of the rate, the number of requests of the others.
    pub fn limit(&self, policy: Policy) -> Option<u64> {
        match policy {
            Policy::Rpm => Some(u64::from(self.burst.get())),
            Policy::Daily => self.daily.map(NonZeroU64::get),
            Policy::Monthly => self.monthly.map(NonZeroU64::get),
        }
    }
}
