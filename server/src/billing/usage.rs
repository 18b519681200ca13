//! Reports usage to Stripe as meter events.
//!
//! The shipper adds usage to `billing_usage`, which has one row per tenant and hour. When an hour has ended,
//! [`Billing::plan_usage`] converts its new usage to reports. Each report becomes one meter event.
//! [`Billing::send_usage`] sends the reports until Stripe has received them:
//!
//! - A meter event's identifier consists of the report's tenant, start, and revision. Stripe accepts each identifier
//!   only once a day. So for 20 hours, a report whose response was lost is sent again. After that, the hour's total in
//!   Stripe shows whether the report arrived.
//! - Usage that arrives after its hour was planned becomes another revision, which contains only the difference.
//! - If a billing period starts or ends within an hour, the hour is divided at that time, based on the log. The part
//!   before that time is planned as soon as it is complete, and the rest when the hour has ended.
//! - Usage that Stripe would not charge is not sent. It is recorded with the reason.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use chrono::{DateTime, Days, NaiveTime, TimeDelta, Utc};
use futures_util::{StreamExt, stream};
use quota_common::TenantId;
use uuid::Uuid;

use super::{Billing, BillingError, USAGE_PRICE, setup::METER_EVENT};
use crate::{
    db::{DbError, SystemTx},
    error_chain::chain,
    repo::billing_usage::{self, ChargedBy, DueReport, NewReport, OpenHour, Unbilled},
    stripe::StripeError,
};

/// The maximum number of hours planned per round.
const HOURS: i64 = 200;
/// The maximum number of hours planned for one tenant per run.
const ROUNDS: u32 = 1000;
/// The maximum number of times to scan an hour if usage arrives during the scan.
const SCANS: u32 = 3;
/// How long planning an hour may take: several scans of a part of the log, each of which may take minutes.
const PLAN_MAX: Duration = Duration::from_mins(20);
/// The number of customers whose reports are sent concurrently. No more customers are claimed at a time, because the
/// claims of waiting customers would expire.
const CONCURRENT: usize = 8;
/// How many times customers are claimed per round.
const CLAIMS: usize = 4;
/// How long one customer's reports are sent per round.
const TURN: Duration = Duration::from_secs(20);
/// How long, in seconds, to rely on Stripe recognizing an identifier. Stripe guarantees a day.
const RECOGNIZED: i64 = 20 * 60 * 60;
/// The maximum age of usage that is sent, in seconds. One hour less than Stripe accepts.
const OLDEST: i64 = (35 * 24 - 1) * 60 * 60;

const fn hour() -> TimeDelta {
    TimeDelta::hours(1)
}

/// The part of an hour that belongs to one billing period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    start: DateTime<Utc>,
    until: DateTime<Utc>,
}

/// Divides an hour at the given times. Ignores times outside the hour.
fn divide(start: DateTime<Utc>, edges: impl Iterator<Item = DateTime<Utc>>) -> Vec<Span> {
    let end = start + hour();
    let mut bounds: Vec<_> = edges.filter(|edge| start < *edge && *edge < end).collect();
    bounds.extend([start, end]);
    bounds.sort_unstable();
    bounds.dedup();
    let pairs = bounds.windows(2);
    pairs
        .map(|pair| Span {
            start: pair[0],
            until: pair[1],
        })
        .collect()
}

/// Returns the subscription that was active during a span. No subscription may start or end within the span.
fn in_force<'a>(subscriptions: &'a [ChargedBy], span: &Span) -> Option<&'a ChargedBy> {
    let covers = |it: &&ChargedBy| {
        it.started_at <= span.start && it.ended_at.is_none_or(|end| span.until <= end)
    };
    // If there are several, prefer one with a price for usage.
    let mut covering = subscriptions.iter().filter(covers);
    let first = covering.clone().next();
    covering.find(|it| it.is_metered).or(first)
}

/// The result of comparing reports with Stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reconciled {
    /// The sum over all customers of the absolute difference between reports and the total in Stripe.
    pub difference: i64,
    /// Usage that should have been charged but will not be.
    pub lost: i64,
    /// The age in seconds of the oldest report that Stripe has not received.
    pub oldest_pending: i64,
    /// When the comparison was made, in seconds since 1970.
    pub at: i64,
}

/// The result of one round of sending.
#[derive(Debug, Default)]
pub struct Sent {
    /// The number of reports that were sent or did not have to be sent.
    pub finished: u64,
    /// The number of reports that could not be sent.
    pub errors: u64,
}

impl Billing {
    /// Plans reports for hours that have ended. Returns the number of planned hours.
    pub async fn plan_usage(&self) -> Result<usize, BillingError> {
        let mut read = HashMap::new();
        let mut planned = 0;
        for _ in 0..ROUNDS {
            let round = self.plan_oldest_hours(&mut read).await?;
            planned += round;
            if round == 0 {
                break;
            }
        }
        Ok(planned)
    }

    /// Plans one hour for each tenant. `read` contains the tenants that this run has read from Stripe, and whether
    /// their hours can be planned.
    async fn plan_oldest_hours(
        &self,
        read: &mut HashMap<TenantId, bool>,
    ) -> Result<usize, BillingError> {
        let hours = self
            .db
            .in_system(async |tx| billing_usage::open_hours(tx, HOURS).await)
            .await?;
        let mut planned = 0;
        for OpenHour {
            tenant_id,
            start,
            until,
            is_read,
        } in hours
        {
            let tenant = TenantId(tenant_id);
            if !is_read && !read.contains_key(&tenant) {
                let result = self.read(tenant).await;
                if let Err(error) = &result {
                    tracing::warn!(%tenant, error = %chain(error), "cannot read subscriptions from Stripe");
                }
                read.insert(tenant, result.is_ok());
            }
            // The hour must wait until the boundaries of billing periods are known.
            if read.get(&tenant).copied().unwrap_or(is_read) {
                match self.plan_hour(tenant, start, until).await {
                    Ok(true) => planned += 1,
                    // Usage keeps arriving, so leave the hour to the next run.
                    Ok(false) => {
                        read.insert(tenant, false);
                    }
                    // Continue with other tenants.
                    Err(error) => {
                        tracing::warn!(%tenant, %start, error = %chain(&error), "cannot plan usage reports");
                        read.insert(tenant, false);
                    }
                }
            }
        }
        Ok(planned)
    }

    /// Plans the usage of an hour up to `until`, which is the end of the hour or a boundary of a billing period within
    /// it. Returns whether this succeeded.
    async fn plan_hour(
        &self,
        tenant: TenantId,
        start: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> Result<bool, DbError> {
        for _ in 0..SCANS {
            let plan = self.try_plan_hour(tenant, start, until);
            if self.db.within(PLAN_MAX, plan).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns `false` if usage arrived while the log was being scanned.
    async fn try_plan_hour(
        &self,
        tenant: TenantId,
        start: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> Result<bool, DbError> {
        let mut tx = self.db.system().await?;
        let subscriptions = billing_usage::subscriptions(&mut tx, tenant).await?;
        let edges = subscriptions.iter().flat_map(|it| {
            let edges = [
                Some(it.started_at),
                it.ended_at,
                it.period_start,
                it.period_end,
            ];
            edges.into_iter().flatten()
        });
        let is_whole = until == start + hour();
        let mut spans = divide(start, edges);
        spans.retain(|it| it.until <= until);
        // The last part of a complete hour gets the rest of the usage, including usage that is no longer in the log.
        let scanned = spans.len() - usize::from(is_whole);
        let seen = billing_usage::hour(&mut tx, tenant, start, false).await?;
        let mut unreported = Vec::new();
        if scanned > 0 {
            // Scan before locking the row, because the shipper waits for this lock.
            billing_usage::allow_scan(&mut tx).await?;
            for span in &spans[..scanned] {
                let (from, until) = (span.start, span.until);
                let logged = billing_usage::logged(&mut tx, tenant, from, until).await?;
                let reported = billing_usage::reported(&mut tx, tenant, from, until, false).await?;
                unreported.push(logged - reported);
            }
        }
        let locked = billing_usage::hour(&mut tx, tenant, start, true).await?;
        // If the hour is not complete, usage after the boundary may arrive at any time without affecting the part
        // before the boundary.
        if scanned > 0 && (seen.planned != locked.planned || (is_whole && seen != locked)) {
            return Ok(false);
        }
        let mut rest = locked.cost - locked.planned;
        for (n, span) in spans.iter().enumerate() {
            let value = unreported
                .get(n)
                .map_or(rest, |unreported| (*unreported).clamp(0, rest));
            if value == 0 {
                continue;
            }
            rest -= value;
            let subscription = in_force(&subscriptions, span);
            let report = NewReport {
                start: span.start,
                until: span.until,
                subscription: subscription.map(|it| it.id.as_str()),
                value,
                unbilled: match subscription {
                    None => Some(Unbilled::NoSubscription),
                    Some(it) if !it.is_metered => Some(Unbilled::NotMetered),
                    Some(_) => None,
                },
            };
            billing_usage::plan(&mut tx, tenant, start, &report).await?;
        }
        if !is_whole {
            billing_usage::set_divided(&mut tx, tenant, start, until).await?;
        }
        tx.commit().await?;
        Ok(true)
    }

    /// Sends reports that are due: for several customers concurrently, and for each customer one after the other.
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

    /// Sends a tenant's reports while `owner` holds the claim. Sending one report takes less time than a claim lasts.
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
            // Stripe would count another attempt, but not charge it. An earlier attempt may have arrived in time.
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

    /// Returns whether Stripe has counted a report whose identifier it no longer recognizes. Returns `None` if the
    /// total in Stripe matches neither case.
    async fn has_arrived(
        &self,
        tenant: TenantId,
        report: &DueReport,
    ) -> Result<Option<bool>, BillingError> {
        let seconds = report.start.timestamp();
        let from = DateTime::from_timestamp(seconds - seconds.rem_euclid(3600), 0);
        let from = from.unwrap_or(report.start);
        let until = from + hour();
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

    /// Returns a customer's total usage in Stripe.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + seconds, 0).unwrap()
    }

    fn spans(edges: &[i64]) -> Vec<(i64, i64)> {
        let divided = divide(at(0), edges.iter().map(|it| at(*it)));
        let seconds = |it: DateTime<Utc>| it.timestamp() - at(0).timestamp();
        divided
            .iter()
            .map(|it| (seconds(it.start), seconds(it.until)))
            .collect()
    }

    #[test]
    fn hour_is_divided_at_edges_within_it() {
        assert_eq!(spans(&[]), [(0, 3600)]);
        assert_eq!(spans(&[0, 3600, -5, 4000]), [(0, 3600)]);
        assert_eq!(spans(&[100]), [(0, 100), (100, 3600)]);
        assert_eq!(spans(&[3599, 1, 1]), [(0, 1), (1, 3599), (3599, 3600)]);
    }

    #[test]
    fn usage_belongs_to_the_subscription_in_force() {
        let subscription = |id: &str, is_metered, started, ended: Option<i64>| ChargedBy {
            id: id.to_owned(),
            is_metered,
            started_at: at(started),
            ended_at: ended.map(at),
            period_start: None,
            period_end: None,
        };
        let span = |start, until| Span {
            start: at(start),
            until: at(until),
        };
        let all = [
            subscription("first", true, 100, Some(200)),
            subscription("flat", false, 300, None),
            subscription("metered", true, 400, None),
        ];
        let id = |start, until| in_force(&all, &span(start, until)).map(|it| it.id.as_str());
        assert_eq!(id(0, 100), None);
        assert_eq!(id(100, 200), Some("first"));
        assert_eq!(id(200, 300), None);
        assert_eq!(id(300, 400), Some("flat"));
        assert_eq!(id(400, 500), Some("metered"));
    }
}
