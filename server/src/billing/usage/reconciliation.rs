//! Compares reports with the totals in Stripe.

use chrono::{Days, NaiveTime, TimeDelta};

use crate::{
    billing::{Billing, BillingError},
    db::SystemTx,
    repo::billing_usage,
};

/// The result of comparing reports with Stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reconciled {
    /// The sum over all customers of the absolute difference between reports and the total in Stripe.
    pub difference: i64,
    /// Usage that should have been charged but will not be.
    pub lost: i64,
    /// The age in seconds of the oldest report that Stripe has not received.
    pub oldest_pending: i64,
    /// When the comparison was made, in seconds since the Unix epoch.
    pub at: i64,
}

impl Billing {
    /// Compares yesterday's reports (UTC) with the totals in Stripe.
    pub async fn reconcile_usage(&self) -> Result<Reconciled, BillingError> {
        self.verify_account().await?;
        let read = async |tx: &mut SystemTx| {
            let uncharged = billing_usage::uncharged(tx).await?;
            let yesterday = uncharged.now.date_naive() - Days::new(1);
            let day = yesterday.and_time(NaiveTime::MIN).and_utc();
            let sent = billing_usage::sent_of_day(tx, day).await?;
            Ok((uncharged, yesterday, day, sent))
        };
        let (uncharged, yesterday, day, sent) = self.db.in_system(read).await?;
        let mut difference = 0;
        for it in sent {
            let until = day + TimeDelta::days(1);
            let counted = match self.counted(&it.customer_id, day, until).await {
                // Without a metered price, no usage is sent, and Stripe has no total.
                Err(BillingError::NoMeter) if it.sent == 0 => 0,
                counted => counted?,
            };
            if counted != it.sent {
                difference += (counted - it.sent).abs();
                tracing::error!(
                    tenant = %it.tenant_id, day = %yesterday, sent = it.sent, counted,
                    "the total in Stripe differs from the reported usage"
                );
            }
        }
        Ok(Reconciled {
            difference,
            lost: uncharged.lost,
            oldest_pending: uncharged.oldest_pending,
            at: uncharged.now.timestamp(),
        })
    }
}
