//! Sends reports until Stripe has received them.

use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta};
use futures_util::{StreamExt, stream};
use quota_common::TenantId;
use uuid::Uuid;

use crate::{
    billing::{Billing, BillingError, setup::METER_EVENT},
    error_chain::chain,
    repo::billing_usage::{self, DueReport, Unbilled},
    stripe::StripeError,
};

/// The number of customers whose reports are sent concurrently. No more customers are claimed at a time, because the
/// claims of waiting customers could expire.
const CONCURRENT: usize = 8;
/// How many times customers are claimed per round.
const CLAIMS: usize = 4;
/// How long one customer's reports are sent per claim.
const TURN: Duration = Duration::from_secs(20);
/// How long, in seconds, to rely on Stripe recognizing an identifier. Stripe guarantees a day.
const RECOGNIZED: i64 = 20 * 60 * 60;
/// The maximum age of usage that is sent, in seconds. One hour less than Stripe accepts.
const OLDEST: i64 = (35 * 24 - 1) * 60 * 60;

/// The result of one round of sending.
#[derive(Debug, Default)]
pub struct Sent {
    /// The number of reports that Stripe has received, or that will not be charged.
    pub finished: u64,
    /// The number of times that sending a customer's reports failed.
    pub errors: u64,
}

impl Billing {
    /// Sends reports that are due. Reports of different customers are sent concurrently, and reports of the same
    /// customer one after another.
    pub async fn send_usage(&self) -> Result<Sent, BillingError> {
        self.verify_account().await?;
        let mut sent = Sent::default();
        for _ in 0..CLAIMS {
            let owner = Uuid::now_v7();
            let limit = i64::try_from(CONCURRENT).unwrap_or(1);
            let tenants = self
                .db
                .in_system(async |tx| billing_usage::claim_senders(tx, owner, limit).await)
                .await?;
            if tenants.is_empty() {
                break;
            }
            let senders = tenants.into_iter().map(async |tenant| {
                let result = self.send_usage_of(tenant, owner).await;
                (tenant, result)
            });
            let mut senders = stream::iter(senders).buffer_unordered(CONCURRENT);
            while let Some((tenant, result)) = senders.next().await {
                match result {
                    Ok(finished) => sent.finished += finished,
                    Err(error) => {
                        sent.errors += 1;
                        tracing::warn!(%tenant, error = %chain(&error), "cannot report usage to Stripe, retrying later");
                    }
                }
                self.db
                    .in_system(async |tx| billing_usage::release_sender(tx, tenant, owner).await)
                    .await?;
            }
        }
        Ok(sent)
    }

    /// Sends a tenant's reports for up to about [`TURN`], while `owner` holds the claim. Returns the number of finished
    /// reports. A claim lasts longer than sending one report can take.
    async fn send_usage_of(&self, tenant: TenantId, owner: Uuid) -> Result<u64, BillingError> {
        let began = Instant::now();
        let mut finished = 0;
        while began.elapsed() < TURN {
            // Commit before calling Stripe, to record that the report may have been sent.
            let report = self
                .db
                .in_system(async |tx| billing_usage::begin_attempt(tx, tenant, owner).await)
                .await?;
            let Some(report) = report else {
                break;
            };
            let unbilled = self.send(tenant, &report).await?;
            if let Some(reason) = unbilled {
                tracing::error!(
                    %tenant, start = %report.start, value = report.value, reason = reason.name(),
                    "usage will not be charged"
                );
            }
            self.db
                .in_system(async |tx| billing_usage::finish(tx, tenant, &report, unbilled).await)
                .await?;
            finished += 1;
        }
        Ok(finished)
    }

    /// Sends a report. If the report will not be charged, returns the reason.
    async fn send(
        &self,
        tenant: TenantId,
        report: &DueReport,
    ) -> Result<Option<Unbilled>, BillingError> {
        let is_recognized = report.sent_ago.is_none_or(|ago| ago < RECOGNIZED);
        if !is_recognized {
            match self.has_arrived(tenant, report).await? {
                Some(true) => return Ok(None),
                Some(false) => {
                    self.db
                        .in_system(async |tx| {
                            billing_usage::restart_attempts(tx, tenant, report).await
                        })
                        .await?;
                }
                None => return Ok(Some(Unbilled::Unclear)),
            }
        }
        if let Some(too_late) = self.too_late(report).await? {
            // If the report were sent now, Stripe would not charge its usage. An earlier attempt may have arrived in
            // time.
            let may_have_arrived = is_recognized && report.sent_ago.is_some();
            let arrived = if may_have_arrived {
                self.has_arrived(tenant, report).await?
            } else {
                Some(false)
            };
            return Ok(match arrived {
                Some(true) => None,
                Some(false) => Some(too_late),
                None => Some(Unbilled::Unclear),
            });
        }
        let start = report.start.timestamp();
        let identifier = format!("{tenant}-{start}-{}", report.revision);
        let sent = self
            .stripe
            .use_meter(
                METER_EVENT,
                &report.customer_id,
                report.value,
                &identifier,
                start,
            )
            .await;
        match sent {
            Ok(()) => Ok(None),
            // An earlier attempt has already arrived.
            Err(StripeError::Rejected { message, .. })
                if message.contains("already exists with identifier") =>
            {
                Ok(None)
            }
            Err(
                StripeError::Rejected {
                    status: 400,
                    message,
                }
                | StripeError::Missing { message, .. },
            ) => {
                tracing::error!(%tenant, message, "Stripe rejected a usage report");
                Ok(Some(Unbilled::Rejected))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the reason why Stripe would not charge the report if it arrived now, or `None` if Stripe would charge
    /// it.
    async fn too_late(&self, report: &DueReport) -> Result<Option<Unbilled>, BillingError> {
        if report.age > OLDEST {
            return Ok(Some(Unbilled::TooOld));
        }
        if report.is_of_earlier_period
            && let Some(subscription) = &report.subscription_id
            && !self.has_draft_invoice(subscription).await?
        {
            return Ok(Some(Unbilled::Finalized));
        }
        Ok(None)
    }

    /// Returns whether usage from an earlier period of the subscription will still be charged. Returns `false` if the
    /// subscription no longer exists.
    async fn has_draft_invoice(&self, subscription: &str) -> Result<bool, StripeError> {
        match self.stripe.has_draft_invoice(subscription).await {
            Err(error) if error.is_not_found() => Ok(false),
            found => found,
        }
    }

    /// Returns whether Stripe has counted a report, according to the total of the report's hour in Stripe. Returns
    /// `None` if the total matches neither case.
    async fn has_arrived(
        &self,
        tenant: TenantId,
        report: &DueReport,
    ) -> Result<Option<bool>, BillingError> {
        let seconds = report.start.timestamp();
        let from = DateTime::from_timestamp(seconds - seconds.rem_euclid(3600), 0);
        let from = from.unwrap_or(report.start);
        let until = from + TimeDelta::hours(1);
        let counted = self.counted(&report.customer_id, from, until).await?;
        let sent = self
            .db
            .in_system(async |tx| billing_usage::reported(tx, tenant, from, until, true).await)
            .await?;
        Ok(if counted >= sent + report.value {
            Some(true)
        } else if counted == sent {
            Some(false)
        } else {
            None
        })
    }
}
