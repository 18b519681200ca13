//! Reports usage to Stripe as meter events.
//!
//! The shipper adds usage to `billing_usage`, which has one row per tenant and hour. When an hour has ended,
//! [`Billing::plan_usage`] converts its new usage to reports. Each report becomes one meter event.
//! [`Billing::send_usage`] sends the reports until Stripe has received them:
//!
//! - A meter event's identifier consists of the report's tenant, start, and revision. Stripe accepts each identifier
//!   only once within 24 hours. Therefore, a report whose response was lost can be sent again. Quota relies on this for
//!   20 hours. After that, the hour's total in Stripe shows whether the report arrived.
//! - Usage that arrives after its hour was planned becomes another revision, which contains only the difference.
//! - If a billing period starts or ends during an hour, the hour is divided at that time, based on the log. The part
//!   before that time is planned as soon as it is complete, and the part after that time when the hour has ended.
//! - Usage that Stripe would not charge is not sent. It is recorded with the reason.

mod planning;
mod reconciliation;
mod sending;

use chrono::{DateTime, Utc};

pub use self::sending::Sent;
use super::{Billing, BillingError, USAGE_PRICE};

impl Billing {
    /// Returns a customer's total usage from `from` to `until` in Stripe.
    async fn counted(
        &self,
        customer: &str,
        from: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> Result<i64, BillingError> {
        let prices = self.stripe.prices(&[USAGE_PRICE]).await?;
        let meter = prices
            .iter()
            .find_map(|it| it.recurring.as_ref()?.meter.as_deref());
        let meter = meter.ok_or(BillingError::NoMeter)?;
        let (from, until) = (from.timestamp(), until.timestamp());
        Ok(self.stripe.counted(meter, customer, from, until).await?)
    }
}
