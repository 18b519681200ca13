//! Converts the usage of completed hours, or of completed parts of hours, to reports.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use quota_common::TenantId;

use crate::{
    billing::{Billing, BillingError},
    db::DbError,
    error_chain::chain,
    repo::billing_usage::{self, ChargedBy, NewReport, OpenHour, Unbilled},
};

/// The maximum number of hours planned per round.
const HOURS: i64 = 200;
/// The maximum number of hours planned for one tenant per run.
const ROUNDS: u32 = 1000;
/// The maximum number of attempts to plan an hour. An attempt fails if usage arrives during its scan.
const SCANS: u32 = 3;
/// The maximum time for one attempt to plan an hour. An attempt may scan several parts of the usage log, and each scan
/// may take minutes.
const PLAN_MAX: Duration = Duration::from_mins(20);

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

impl Billing {
    /// Plans reports for hours, and for parts of hours, that have ended. Returns the number of hours and parts that
    /// were planned.
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

    /// Plans one hour for each of up to [`HOURS`] tenants. `read` contains the tenants that this run has read from
    /// Stripe or failed to plan, and whether their hours can be planned.
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
    /// it. Returns `false` if usage kept arriving, so the hour could not be planned.
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

    /// Works like [`plan_hour`](Self::plan_hour), but scans the log only once. Returns `false` if usage arrived during
    /// the scan.
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
        // The last part of a complete hour gets all remaining usage, including usage that is no longer in the log.
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
        // If the hour is not complete, compare only what was planned: usage after the boundary may arrive at any time,
        // and does not affect the part before it.
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
