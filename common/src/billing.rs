//! The subscription of a tenant.

use serde::{Deserialize, Serialize};

use crate::time::Timestamp;

/// What a tenant's subscription gives access to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(
    feature = "openapi",
    derive(poem_openapi::Enum),
    oai(rename_all = "snake_case")
)]
pub enum BillingAccess {
    /// Never subscribed, or the first payment has not succeeded.
    Free,
    /// In a trial.
    Trialing,
    /// Subscribed.
    Active,
    /// A payment failed and is tried again.
    PastDue,
    /// A payment failed and is no longer tried.
    Unpaid,
    /// The subscription has ended.
    Canceled,
    /// The subscription is paused.
    Paused,
}

impl BillingAccess {
    pub const ALL: [Self; 7] = [
        Self::Free,
        Self::Trialing,
        Self::Active,
        Self::PastDue,
        Self::Unpaid,
        Self::Canceled,
        Self::Paused,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Trialing => "trialing",
            Self::Active => "active",
            Self::PastDue => "past_due",
            Self::Unpaid => "unpaid",
            Self::Canceled => "canceled",
            Self::Paused => "paused",
        }
    }
}

/// Response of `GET /billing`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct BillingState {
    /// Whether this server has billing. If not, plans marked `paid` work like others.
    pub enabled: bool,
    pub access: BillingAccess,
    /// Whether API keys on plans marked `paid` work now.
    pub paid_plans_work: bool,
    /// When they stop working: the date of a cancellation, or the end of the grace period after a failed payment.
    /// `null` if no end is known.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub access_ends_at: Option<Timestamp>,
    /// When the trial ends and the first payment is due.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub trial_ends_at: Option<Timestamp>,
    /// Start of the current billing period.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub period_start: Option<Timestamp>,
    /// End of the current billing period, when the next payment is due.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub period_end: Option<Timestamp>,
    /// Whether the customer portal is available: the organization has started a subscription before.
    pub has_customer: bool,
    /// When this was last read from Stripe.
    #[cfg_attr(feature = "openapi", oai(nullable))]
    pub refreshed_at: Option<Timestamp>,
}

/// A Checkout page at Stripe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct CheckoutPage {
    /// Open this page in a browser. It returns to the console.
    pub url: String,
    /// When the page expires.
    pub expires_at: Timestamp,
}

/// The customer portal at Stripe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(poem_openapi::Object), oai(example))]
pub struct PortalPage {
    /// Open this page in a browser soon. It expires within minutes.
    pub url: String,
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::{BillingAccess, BillingState, CheckoutPage, PortalPage};
    use crate::id::example;

    impl Example for BillingState {
        fn example() -> Self {
            Self {
                enabled: true,
                access: BillingAccess::Active,
                paid_plans_work: true,
                access_ends_at: None,
                trial_ends_at: None,
                period_start: Some(example::at()),
                period_end: Some(example::at()),
                has_customer: true,
                refreshed_at: Some(example::at()),
            }
        }
    }

    impl Example for CheckoutPage {
        fn example() -> Self {
            Self {
                url: "https://checkout.stripe.com/c/pay/cs_test_a1".into(),
                expires_at: example::at(),
            }
        }
    }

    impl Example for PortalPage {
        fn example() -> Self {
            Self {
                url: "https://billing.stripe.com/p/session/test_a1".into(),
            }
        }
    }
}
