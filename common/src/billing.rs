//! The subscription of a tenant.

use crate::{
    time::Timestamp,
    wire::{response, text_enum},
};

text_enum! {
    /// The access that a tenant's subscription provides.
    pub enum BillingAccess {
        /// Never subscribed, or the first payment has not succeeded.
        Free = "free",
        /// In a trial.
        Trialing = "trialing",
        /// Subscribed.
        Active = "active",
        /// A payment failed and is being retried.
        PastDue = "past_due",
        /// A payment failed and is no longer retried.
        Unpaid = "unpaid",
        /// The subscription has ended.
        Canceled = "canceled",
        /// The subscription is paused.
        Paused = "paused",
    }
}

response! {
    /// Response of `GET /billing`.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct BillingState {
        /// Whether billing is set up on this server. If not, plans marked `paid` work like other plans.
        pub enabled: bool,
        pub access: BillingAccess,
        /// Whether API keys on plans marked `paid` currently work.
        pub paid_plans_work: bool,
        /// When keys on paid plans stop working: the date of a cancellation, or the end of the grace period after a
        /// failed payment. `null` if no end is known.
        pub access_ends_at: Option<Timestamp>,
        /// When the trial ends and the first payment is due.
        pub trial_ends_at: Option<Timestamp>,
        /// Start of the current billing period.
        pub period_start: Option<Timestamp>,
        /// End of the current billing period, when the next payment is due.
        pub period_end: Option<Timestamp>,
        /// Whether the customer portal is available. It is available once the organization has started a subscription.
        pub has_customer: bool,
        /// When this information was last retrieved from Stripe.
        pub refreshed_at: Option<Timestamp>,
    }
}

response! {
    /// A Stripe Checkout page.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct CheckoutPage {
        /// Open this page in a browser. It redirects back to the console.
        pub url: String,
        /// When the page expires.
        pub expires_at: Timestamp,
    }
}

response! {
    /// The Stripe customer portal.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct PortalPage {
        /// Open this page in a browser promptly. It expires within minutes.
        pub url: String,
    }
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
