//! Derives access from Stripe subscriptions. Does not use a clock, the database or the network.
//!
//! A tenant's [`Account`] contains the last observation of its subscriptions. An [`Observation`] contains all
//! subscriptions that Stripe returned for the customer in one read, and the number of that read. Events only cause
//! reads, so their order, number and contents do not matter. A read that is older than the last applied one is
//! discarded. [`Account::access`] determines whether plans marked `paid` work:
//!
//! | Stripe's status | access | plans marked `paid` |
//! |---|---|---|
//! | no subscription, `incomplete`, `incomplete_expired` | [`Free`](Access::Free) | do not work |
//! | `trialing` | [`Trialing`](Access::Trialing) | work until a scheduled cancellation, if any |
//! | `active` | [`Active`](Access::Active) | work until a scheduled cancellation, if any |
//! | `past_due` | [`PastDue`](Access::PastDue) | work until the grace period after the unpaid invoice ends, or a scheduled cancellation if that is earlier |
//! | `unpaid` | [`Unpaid`](Access::Unpaid) | do not work |
//! | `canceled` | [`Canceled`](Access::Canceled) | do not work |
//! | `paused` | [`Paused`](Access::Paused) | do not work |
//!
//! `incomplete` is a subscription whose first payment has not succeeded. `paused` is a trial that ended without a
//! payment method, or a subscription paused by the operator. Pausing only the collection of payments leaves a
//! subscription `active`. See <https://docs.stripe.com/billing/subscriptions/overview>.
//!
//! If a customer has several subscriptions, the one whose access lasts the longest counts, so plans work as long as any
//! of the subscriptions allows it. If the access of several subscriptions lasts equally long, the status decides, in
//! the order `active`, `trialing`, `past_due`, `unpaid`, `paused`, `canceled`, and then any other status. If the status
//! is also equal, the newest subscription counts.

use std::cmp::Reverse;

/// Seconds since the Unix epoch, as in the Stripe API.
pub type Seconds = i64;

/// The status of a Stripe subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    Incomplete,
    IncompleteExpired,
    Trialing,
    Active,
    PastDue,
    Unpaid,
    Canceled,
    Paused,
}

impl Status {
    pub const ALL: [Self; 8] = [
        Self::Incomplete,
        Self::IncompleteExpired,
        Self::Trialing,
        Self::Active,
        Self::PastDue,
        Self::Unpaid,
        Self::Canceled,
        Self::Paused,
    ];

    /// Returns the status's name in the Stripe API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Incomplete => "incomplete",
            Self::IncompleteExpired => "incomplete_expired",
            Self::Trialing => "trialing",
            Self::Active => "active",
            Self::PastDue => "past_due",
            Self::Unpaid => "unpaid",
            Self::Canceled => "canceled",
            Self::Paused => "paused",
        }
    }

    /// Returns the status with this name, or `None` if this version of Quota does not support the status. The caller
    /// then keeps the last known access, because neither granting nor revoking access would be safe.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.name() == name)
    }

    /// Returns whether the subscription has ended permanently. If so, the customer can start a new one.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::IncompleteExpired | Self::Canceled)
    }
}

/// The fields of a subscription that Quota uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    pub id: String,
    pub status: Status,
    pub created: Seconds,
    pub trial_end: Option<Seconds>,
    /// When the subscription will be, or was, canceled.
    pub cancel_at: Option<Seconds>,
    /// When the oldest unpaid invoice that is due was finalized. Read only while the status is `past_due`.
    pub unpaid_since: Option<Seconds>,
}

/// All subscriptions of a customer, as returned by one read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observation {
    /// The number of the read. Numbers are assigned before reads start, and increase.
    pub read: u64,
    /// When the read started.
    pub at: Seconds,
    pub subscriptions: Vec<Subscription>,
}

/// The effect of a tenant's subscriptions on plans marked `paid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The tenant has never subscribed, or the first payment of its subscription has not succeeded.
    Free,
    Trialing {
        /// When the trial ends and the first payment is due.
        trial_end: Option<Seconds>,
        /// When access ends because the subscription will be canceled.
        ends: Option<Seconds>,
    },
    Active {
        /// When access ends because the subscription will be canceled.
        ends: Option<Seconds>,
    },
    /// A payment failed, and Stripe is retrying it.
    PastDue {
        /// When access ends unless the invoice is paid first.
        grace_ends: Seconds,
    },
    /// Stripe has stopped trying to collect the payment.
    Unpaid,
    Canceled,
    Paused,
}

impl Access {
    /// Returns the name in the API and in the database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Trialing { .. } => "trialing",
            Self::Active { .. } => "active",
            Self::PastDue { .. } => "past_due",
            Self::Unpaid => "unpaid",
            Self::Canceled => "canceled",
            Self::Paused => "paused",
        }
    }

    /// Returns how long plans marked `paid` work.
    pub const fn paid(self) -> Paid {
        match self {
            Self::Trialing { ends, .. } | Self::Active { ends } => match ends {
                Some(end) => Paid::Until(end),
                None => Paid::Always,
            },
            Self::PastDue { grace_ends } => Paid::Until(grace_ends),
            Self::Free | Self::Unpaid | Self::Canceled | Self::Paused => Paid::Never,
        }
    }

    /// Ranks subscriptions whose access lasts equally long. See the module documentation.
    const fn rank(self) -> u8 {
        match self {
            Self::Active { .. } => 6,
            Self::Trialing { .. } => 5,
            Self::PastDue { .. } => 4,
            Self::Unpaid => 3,
            Self::Paused => 2,
            Self::Canceled => 1,
            Self::Free => 0,
        }
    }
}

/// How long plans marked `paid` work if nothing else changes. Ordered from shortest to longest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Paid {
    Never,
    Until(Seconds),
    Always,
}

impl Paid {
    pub const fn at(self, now: Seconds) -> bool {
        match self {
            Self::Never => false,
            Self::Until(end) => now < end,
            Self::Always => true,
        }
    }
}

/// The last observation of a tenant's subscriptions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account {
    last: Option<Observation>,
}

impl Account {
    /// Applies an observation, unless it or a later one has already been applied. Returns whether it was applied.
    pub fn apply(&mut self, observation: Observation) -> bool {
        if self
            .last
            .as_ref()
            .is_some_and(|last| last.read >= observation.read)
        {
            return false;
        }
        self.last = Some(observation);
        true
    }

    /// Returns the subscription that determines access.
    pub fn subscription(&self, grace: Seconds) -> Option<&Subscription> {
        let last = self.last.as_ref()?;
        deciding(&last.subscriptions, last.at, grace)
    }

    /// Returns the tenant's access. `grace` is how long a past-due subscription keeps its access.
    pub fn access(&self, grace: Seconds) -> Access {
        self.last.as_ref().map_or(Access::Free, |last| {
            deciding(&last.subscriptions, last.at, grace).map_or(Access::Free, |subscription| {
                subscription.access(last.at, grace)
            })
        })
    }
}

/// Returns the subscription that determines access. `at` is when the subscriptions were read.
pub fn deciding(
    subscriptions: &[Subscription],
    at: Seconds,
    grace: Seconds,
) -> Option<&Subscription> {
    subscriptions.iter().max_by_key(|subscription| {
        let access = subscription.access(at, grace);
        (
            access.paid(),
            access.rank(),
            subscription.created,
            Reverse(subscription.id.as_str()),
        )
    })
}

impl Subscription {
    /// Returns the access that this subscription alone gives. `at` is when the subscription was read. If Stripe does
    /// not list an unpaid invoice, which can briefly be the case, the grace period starts at `at`.
    pub fn access(&self, at: Seconds, grace: Seconds) -> Access {
        match self.status {
            Status::Incomplete | Status::IncompleteExpired => Access::Free,
            Status::Trialing => Access::Trialing {
                trial_end: self.trial_end,
                ends: self.cancel_at,
            },
            Status::Active => Access::Active {
                ends: self.cancel_at,
            },
            Status::PastDue => {
                let grace_ends = self.unpaid_since.unwrap_or(at).saturating_add(grace);
                Access::PastDue {
                    grace_ends: self.cancel_at.map_or(grace_ends, |end| end.min(grace_ends)),
                }
            }
            Status::Unpaid => Access::Unpaid,
            Status::Canceled => Access::Canceled,
            Status::Paused => Access::Paused,
        }
    }
}

#[cfg(test)]
mod tests;
