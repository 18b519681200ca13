//! Compares reports with the totals in Stripe, and measures the usage that has not been charged.

use chrono::{DateTime, Days, NaiveTime, TimeDelta, Utc};

use crate::{
    billing::{Billing, BillingError},
    db::{DbError, SystemTx},
    repo::billing_usage::{self, Uncharged},
};

impl Billing {
    /// Measures the usage that has not been charged. Does not call Stripe, so it works even if Stripe is unreachable.
    pub async fn uncharged_usage(&self) -> Result<Uncharged, DbError> {
        let read = async |tx: &mut SystemTx| billing_usage::uncharged(tx).await;
        self.db.in_system(read).await
    }

    /// Compares the reports of the day (UTC) before `now` with the totals in Stripe. Returns the sum over all customers
    /// of the absolute difference.
    pub async fn reconcile_usage(&self, now: DateTime<Utc>) -> Result<i64, BillingError> {
        self.verify_account().await?;
        let yesterday = now.date_naive() - Days::new(1);
        let day = yesterday.and_time(NaiveTime::MIN).and_utc();
        let read = async |tx: &mut SystemTx| billing_usage::sent_of_day(tx, day).await;
        let sent = self.db.in_system(read).await?;
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
        Ok(difference)
    }
}
