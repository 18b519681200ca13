//! Combines the last read of the tenant's subscriptions with the tenant's usage and the operator's limits. Does not
//! call Stripe, so it works even if Stripe is unreachable.

use chrono::{DateTime, TimeDelta, Utc};
use quota_common::billing::{
    BillingAccess, BillingLimit, BillingLimits, BillingPrice, BillingState, BillingUsage,
    BillingUsageError,
};

use crate::{
    api::{
        admitted::SignedInTenant,
        change::{read, read_turn},
        problem::ApiError,
        usage::{range::nanos, times},
    },
    billing::{
        Billing,
        price::{self, Offer},
    },
    config::Config,
    db::{DbError, TenantTx},
    repo::{
        billing::{self, AccountRow, SubscriptionRow},
        billing_overview::{self, Counts, PeriodUsage},
        paid_access::PaidAccess,
        usage_shipper::Times,
    },
    state::AppState,
};

/// The minimum time over which a projection averages usage, so that a period's first requests do not dominate the
/// result.
const PROJECTED_FROM: TimeDelta = TimeDelta::hours(1);

fn count(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

pub(super) async fn billing_state(
    state: &AppState,
    caller: &SignedInTenant,
) -> Result<BillingState, ApiError> {
    let _turn = read_turn(state, caller).await?;
    let times = times(state).await?;
    let find = async |tx: &mut TenantTx| -> Result<_, DbError> {
        let counts = billing_overview::counts(tx).await?;
        let found = billing::find(tx).await?;
        let period = found.as_ref().and_then(|(_, it)| it.as_ref()?.period_start);
        let usage = match period {
            Some(start) => Some(billing_overview::usage_since(tx, start).await?),
            None => None,
        };
        Ok((counts, found, usage))
    };
    let (counts, found, usage) = read(state, caller, find).await?;
    let found = found.filter(|_| state.billing.is_some());
    let (account, subscription) = match &found {
        Some((account, subscription)) => (Some(account), subscription.as_ref()),
        None => (None, None),
    };
    let access = account.map_or(PaidAccess::NONE, |it| {
        PaidAccess::new(it.has_paid_access, it.paid_access_until)
    });
    let has_access = access.is_current(|| nanos(times.now));
    let offer = match subscription {
        // The price of an ended subscription is no longer relevant.
        Some(it) if it.ended_at.is_none() && it.currency.is_some() => Some(Offer {
            name: it.product_name.clone(),
            currency: it.currency.clone().unwrap_or_default(),
            monthly: it.monthly_price.clone(),
            per_unit: it.usage_price.clone(),
        }),
        _ => state.billing.as_ref().and_then(Billing::offer),
    };
    let subscription = Subscription {
        account,
        row: subscription,
    };
    Ok(BillingState {
        enabled: state.billing.is_some(),
        access: subscription.access(),
        paid_plans_work: has_access || state.billing.is_none(),
        access_ends_at: account.and_then(|it| it.paid_access_until).map(Into::into),
        trial_ends_at: subscription.trial_ends_at().map(Into::into),
        cancels_at: subscription
            .row
            .and_then(|it| it.cancels_at)
            .map(Into::into),
        period_start: subscription
            .row
            .and_then(|it| it.period_start)
            .map(Into::into),
        period_end: subscription
            .row
            .and_then(|it| it.period_end)
            .map(Into::into),
        has_customer: account.is_some_and(|it| it.customer_id.is_some()),
        refreshed_at: account.and_then(|it| it.read_at).map(Into::into),
        usage: subscription
            .row
            .filter(|it| it.ended_at.is_none())
            .zip(usage)
            .map(|(row, usage)| billing_usage(row, usage, times)),
        price: offer.map(|it| BillingPrice {
            name: it.name,
            currency: it.currency,
            monthly: it.monthly,
            per_request: it.per_unit,
        }),
        limits: limits(&state.config, counts, has_access, state.metering.is_on()),
        paid_plans: count(counts.paid_plans),
        paid_keys: count(counts.paid_keys),
    })
}

#[derive(Debug, Clone, Copy)]
struct Subscription<'a> {
    account: Option<&'a AccountRow>,
    row: Option<&'a SubscriptionRow>,
}

impl Subscription<'_> {
    fn access(self) -> BillingAccess {
        let stored = self.account.and_then(|it| BillingAccess::of(&it.access));
        stored.unwrap_or(BillingAccess::Free)
    }

    fn trial_ends_at(self) -> Option<DateTime<Utc>> {
        let trial = self.row?.trial_ends_at;
        trial.filter(|_| self.access() == BillingAccess::Trialing)
    }
}

/// Returns the limits and how much of each is used. If the number of requests per month is limited, its usage is the
/// number of tokens that replicas have taken from the quota or, with metering, the cost of the allowed requests if that
/// is lower.
fn limits(config: &Config, counts: Counts, has_access: bool, is_counted: bool) -> BillingLimits {
    let free = config.free_tier;
    let monthly = free.requests_per_month.filter(|_| !has_access);
    let counted = count(counts.counted);
    let requests = match monthly {
        None => counted,
        Some(_) => {
            let taken = counts.taken.map_or(0, count);
            if is_counted {
                taken.min(counted)
            } else {
                taken
            }
        }
    };
    let maximum = |all: u64, free: Option<u64>| {
        let free = free.filter(|_| !has_access);
        Some(free.map_or(all, |free| free.min(all)))
    };
    BillingLimits {
        plans: BillingLimit {
            used: count(counts.plans),
            maximum: maximum(config.allowances.plans, free.plans),
        },
        api_keys: BillingLimit {
            used: count(counts.api_keys),
            maximum: maximum(config.allowances.api_keys, free.api_keys),
        },
        requests: BillingLimit {
            used: requests,
            maximum: monthly.map(Into::into),
        },
        requests_reset_at: counts.month_end.into(),
        free_plan_rpm: free.rpm,
        free_plan_quota: free.requests_per_month.map(Into::into),
    }
}

/// Projects the usage of a whole period from the average pace so far.
fn projected(used: u64, start: DateTime<Utc>, end: DateTime<Utc>, now: DateTime<Utc>) -> u64 {
    let whole = (end - start).num_seconds().max(1);
    let passed = (now - start)
        .max(PROJECTED_FROM)
        .num_seconds()
        .clamp(1, whole);
    let projected = i128::from(used) * i128::from(whole) / i128::from(passed);
    u64::try_from(projected).unwrap_or(u64::MAX)
}

fn billing_usage(row: &SubscriptionRow, usage: PeriodUsage, times: Times) -> BillingUsage {
    let used = count(usage.used);
    let projected = match (row.period_start, row.period_end) {
        (Some(start), Some(end)) => projected(used, start, end, times.now),
        _ => used,
    };
    let per_unit = row.usage_price.as_deref();
    let reported_until = usage
        .unreported_from
        .map_or(times.complete_until, |from| from.min(times.complete_until));
    // If usage is charged at a price that is not a fixed amount per unit, the total is unknown.
    let total = match &row.monthly_price {
        Some(monthly) if per_unit.is_some() || !row.is_metered => {
            price::total(monthly, per_unit, projected)
        }
        _ => None,
    };
    BillingUsage {
        used,
        projected,
        charge: per_unit.and_then(|it| price::charge(it, used)),
        projected_total: total,
        reported_until: row.is_metered.then(|| reported_until.into()),
        not_charged: count(usage.not_charged),
        last_error: usage
            .error_code
            .zip(usage.error_at)
            .map(|(code, at)| BillingUsageError {
                code,
                at: at.into(),
            }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn projection_continues_the_average_pace() {
        let start: DateTime<Utc> = "2026-11-01T00:00:00Z".parse().unwrap();
        let end = start + TimeDelta::days(30);
        let after = |hours| projected(100, start, end, start + TimeDelta::hours(hours));
        assert_eq!(after(15 * 24), 200);
        assert_eq!(after(30 * 24), 100);
        assert_eq!(after(31 * 24), 100, "the period is over");
        assert_eq!(after(1), 72_000);
        assert_eq!(after(0), 72_000, "the projection is finite");
    }
}
