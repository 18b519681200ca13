//! A tenant's subscription, its usage on paid plans, and the operator's limits.

use crate::{
    time::Timestamp,
    wire::{response, text_enum},
};

text_enum! {
    /// The state of a tenant's subscription, which determines whether paid plans work. `free`: the tenant has never
    /// subscribed, or the first payment has not succeeded. `past_due`: a payment failed and is being retried. `unpaid`:
    /// a payment failed and is no longer being retried.
    pub enum BillingAccess {
        /// Never subscribed, or the first payment has not succeeded.
        Free = "free",
        /// In a trial.
        Trialing = "trialing",
        /// The subscription is active.
        Active = "active",
        /// A payment failed and is being retried.
        PastDue = "past_due",
        /// A payment failed and is no longer being retried.
        Unpaid = "unpaid",
        /// The subscription has ended.
        Canceled = "canceled",
        /// The subscription is paused.
        Paused = "paused",
    }
}

response! {
    /// Response to `GET /billing`.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct BillingState {
        /// Whether billing is on. If billing is off, plans marked `paid` work like other plans.
        pub enabled: bool,
        pub access: BillingAccess,
        /// Whether API keys on plans marked `paid` currently work.
        pub paid_plans_work: bool,
        /// When keys on plans marked `paid` stop working, or when they stopped. This is when the subscription ends or,
        /// after a failed payment, when the grace period ends. `null` if no end is scheduled.
        pub access_ends_at: Option<Timestamp>,
        /// When the trial ends and the first payment is due.
        pub trial_ends_at: Option<Timestamp>,
        /// The scheduled time of the subscription's cancellation, in the future or the past. `null` if no cancellation
        /// was scheduled.
        pub cancels_at: Option<Timestamp>,
        /// Start of the current billing period.
        pub period_start: Option<Timestamp>,
        /// End of the current billing period. The next payment is due then, unless the subscription is scheduled to be
        /// canceled.
        pub period_end: Option<Timestamp>,
        /// Whether the customer portal is available. The portal becomes available when the tenant first opens Checkout.
        pub has_customer: bool,
        /// When this information was last retrieved from Stripe. While the tenant has a subscription, the information
        /// is retrieved about every 10 minutes. If Stripe cannot be reached, this time is older, and the status may be
        /// outdated.
        pub refreshed_at: Option<Timestamp>,
        /// The price of the current subscription or, without a subscription, of a new one. `null` if the price is
        /// unknown.
        pub price: Option<BillingPrice>,
        /// Usage on plans marked `paid` in the current billing period. `null` without a subscription.
        pub usage: Option<BillingUsage>,
        /// The limits that currently apply to the tenant. They can be lower if the tenant has no valid subscription.
        pub limits: BillingLimits,
        /// Number of plans marked `paid`.
        pub paid_plans: u64,
        /// Number of active, unexpired API keys on plans marked `paid`. While `paid_plans_work` is `false`, requests
        /// with these keys are rejected.
        pub paid_keys: u64,
    }
}

response! {
    /// The price of a subscription.
    #[derive(Debug, Eq)]
    pub struct BillingPrice {
        /// The product's name. `null` if the name is unknown.
        pub name: Option<String>,
        /// Lowercase ISO 4217 currency code, such as `usd`.
        pub currency: String,
        /// Price per month, as a decimal number in the smallest unit of the currency: `2900` is $29.00. `null` if the
        /// price is not a fixed amount.
        pub monthly: Option<String>,
        /// Price per unit of `usage.used`, in addition to the monthly price, in the smallest unit of the currency.
        /// `null` if usage is not charged, or not at a fixed price per unit.
        pub per_request: Option<String>,
    }
}

response! {
    /// Usage on plans marked `paid` in the current billing period, and the charge for it.
    #[derive(Debug, Eq)]
    pub struct BillingUsage {
        /// Total cost of the requests allowed on plans marked `paid` since the period began. A request costs 1 unless
        /// it was checked with a different cost.
        pub used: u64,
        /// The projected value of `used` at the end of the period, at the average pace since the period began.
        pub projected: u64,
        /// The charge for `used`, in the smallest unit of the currency. `null` if usage is not charged, or not at a
        /// fixed price per unit.
        pub charge: Option<u64>,
        /// The sum of the monthly price and the charge for `projected`, before taxes and discounts. `null` if the
        /// monthly price, or the price per unit of usage, is not a fixed amount.
        pub projected_total: Option<u64>,
        /// Stripe has received all usage before this time, except usage that will not be charged. `null` if usage is
        /// not charged.
        pub reported_until: Option<Timestamp>,
        /// Usage in this period that will not be charged, because it could not be reported to Stripe.
        pub not_charged: u64,
        /// The most recent problem with the tenant's usage that Stripe has reported in this period.
        pub last_error: Option<BillingUsageError>,
    }
}

response! {
    /// A problem that Stripe found in reported usage after accepting the report.
    #[derive(Debug, Eq)]
    pub struct BillingUsageError {
        /// Stripe's code for the problem, such as `meter_event_customer_not_found`.
        pub code: String,
        /// When Stripe notified Quota of the problem.
        pub at: Timestamp,
    }
}

response! {
    /// The limits that the operator has set for a tenant.
    #[derive(Debug, Eq)]
    pub struct BillingLimits {
        pub plans: BillingLimit,
        pub api_keys: BillingLimit,
        /// Requests in the current calendar month (UTC), across all API keys. Once the limit is reached, requests are
        /// denied by the `tenant_monthly` policy.
        pub requests: BillingLimit,
        /// When `requests.used` is reset to zero.
        pub requests_reset_at: Timestamp,
        /// The highest rate and the highest burst that a plan can have, unless the plan is marked `paid`. If billing is
        /// off, this limit applies to all plans. `null` for no limit.
        pub free_plan_rpm: Option<u32>,
        /// The highest daily or monthly quota that a plan can have, unless the plan is marked `paid`. If billing is
        /// off, this limit applies to all plans. `null` for no limit.
        pub free_plan_quota: Option<u64>,
    }
}

response! {
    /// A limit and its current use.
    #[derive(Debug, Eq)]
    pub struct BillingLimit {
        pub used: u64,
        /// The limit. `null` for no limit.
        pub maximum: Option<u64>,
    }
}

response! {
    /// A link to a Stripe Checkout page.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct CheckoutPage {
        /// The URL to open in a browser. After checkout, the page redirects to the console.
        pub url: String,
        /// When the page expires.
        pub expires_at: Timestamp,
    }
}

response! {
    /// A link to the Stripe customer portal.
    #[derive(Debug, Eq)]
    #[cfg_attr(feature = "openapi", oai(example))]
    pub struct PortalPage {
        /// The URL to open in a browser. The URL expires within minutes.
        pub url: String,
    }
}

#[cfg(feature = "openapi")]
mod examples {
    use poem_openapi::types::Example;

    use super::{
        BillingAccess, BillingLimit, BillingLimits, BillingPrice, BillingState, BillingUsage,
        CheckoutPage, PortalPage,
    };
    use crate::id::example;

    impl Example for BillingState {
        fn example() -> Self {
            Self {
                enabled: true,
                access: BillingAccess::Active,
                paid_plans_work: true,
                access_ends_at: None,
                trial_ends_at: None,
                cancels_at: None,
                period_start: Some(example::at()),
                period_end: Some(example::at()),
                has_customer: true,
                refreshed_at: Some(example::at()),
                price: Some(BillingPrice {
                    name: Some("Quota".into()),
                    currency: "usd".into(),
                    monthly: Some("2900".into()),
                    per_request: Some("0.05".into()),
                }),
                usage: Some(BillingUsage {
                    used: 40_000,
                    projected: 62_000,
                    charge: Some(2000),
                    projected_total: Some(6000),
                    reported_until: Some(example::at()),
                    not_charged: 0,
                    last_error: None,
                }),
                limits: BillingLimits {
                    plans: BillingLimit {
                        used: 3,
                        maximum: Some(1000),
                    },
                    api_keys: BillingLimit {
                        used: 12,
                        maximum: Some(100_000),
                    },
                    requests: BillingLimit {
                        used: 61_500,
                        maximum: None,
                    },
                    requests_reset_at: example::at(),
                    free_plan_rpm: Some(60),
                    free_plan_quota: Some(10_000),
                },
                paid_plans: 1,
                paid_keys: 4,
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
