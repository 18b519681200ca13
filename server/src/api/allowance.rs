//! The operator's limits on what tenants can create.
//!
//! Every tenant has a maximum number of plans, API keys, service tokens, and webhooks. For plans and API keys, the
//! operator can set lower limits for tenants without a valid subscription. The operator can also limit the rates and
//! quotas of all plans that are not marked `paid`, whether or not the tenant has a subscription. If billing is off,
//! there are no subscriptions, and the limits on rates and quotas apply to all plans.

use quota_common::{
    FieldError, ProblemCode,
    api_key::ApiKey,
    plan::{Billing, Plan},
};

use super::problem::ApiError;
use crate::{
    config::Config,
    db::{DbError, TenantTx},
    repo::{
        allowance::{self, Resource},
        api_key, paid_access, plan,
    },
};

/// Rejects the creation of a resource if the tenant already has the maximum number of resources of its type. Must be
/// called in the transaction that inserts the resource, before the insert.
pub async fn one_more(config: &Config, tx: &mut TenantTx, what: Resource) -> Result<(), ApiError> {
    let (all, free) = (config.allowances, config.free_tier);
    let (limit, free, name) = match what {
        Resource::Plans => (all.plans, free.plans, "plans"),
        Resource::ApiKeys => (all.api_keys, free.api_keys, "API keys"),
        Resource::ServiceTokens => (all.service_tokens, None, "service tokens"),
        Resource::Webhooks => (all.webhooks, None, "webhooks"),
    };
    let count = allowance::count(tx, what).await?;
    let has_billing = config.stripe.is_some();
    if let Some(free) = free.filter(|free| *free < limit && *free <= count)
        && !(has_billing && paid_access::is_current(tx).await?)
    {
        let way_out = if has_billing {
            "Subscribe, or delete some."
        } else {
            "Delete some, or ask the operator for a higher limit."
        };
        let tier = if has_billing {
            " without a subscription"
        } else {
            ""
        };
        return Err(ApiError::new(
            ProblemCode::LimitReached,
            format!("Your organization has reached its limit of {free} {name}{tier}. {way_out}"),
        ));
    }
    if count < limit {
        return Ok(());
    }
    Err(ApiError::new(
        ProblemCode::LimitReached,
        format!(
            "Your organization has reached its limit of {limit} {name}. Delete some, or ask the operator for a higher limit."
        ),
    ))
}

/// A plan's `billing` before and after a change that removes the `paid` mark.
const UNMARKED: (Billing, Billing) = (Billing::Paid, Billing::Free);

/// Returns whether the limits for free plans apply to a plan.
fn is_limited(config: &Config, billing: Billing) -> bool {
    config.stripe.is_none() || billing == Billing::Free
}

fn at_most(config: &Config, maximum: u64) -> String {
    if config.stripe.is_some() {
        format!("must be at most {maximum}, unless the plan is marked paid")
    } else {
        format!("must be at most {maximum} on this server")
    }
}

/// If free plans have a maximum rate, makes changes to the tenant's plans and keys wait for each other. Without this
/// lock, a plan could become free while one of its keys gets a higher rate. Must be the first call in the transaction.
pub async fn lock_rates(config: &Config, tx: &mut TenantTx) -> Result<(), DbError> {
    match config.free_tier.rpm {
        Some(_) => allowance::lock(tx).await,
        None => Ok(()),
    }
}

/// Rejects a plan that exceeds the limits for free plans, if these limits apply to it. `before` is the plan before a
/// change: if the limits already applied to it, values that exceed them can be kept or lowered, unless the change
/// removes the `paid` mark. Otherwise, a mark could be removed while billing is off, and the plan would remain above the
/// limits after billing is turned on again.
pub fn check_plan(config: &Config, plan: &Plan, before: Option<&Plan>) -> Result<(), ApiError> {
    if !is_limited(config, plan.billing) {
        return Ok(());
    }
    let before = before.filter(|before| {
        is_limited(config, before.billing) && (before.billing, plan.billing) != UNMARKED
    });
    let free = config.free_tier;
    let quota = free.requests_per_month.map(Into::into);
    let limits = [
        (
            "default_rpm",
            Some(plan.default_rpm.into()),
            before.map(|it| it.default_rpm.into()),
            free.rpm.map(u64::from),
        ),
        (
            "burst",
            Some(plan.burst.into()),
            before.map(|it| it.burst.into()),
            free.rpm.map(u64::from),
        ),
        (
            "daily_quota",
            plan.daily_quota,
            before.and_then(|it| it.daily_quota),
            quota,
        ),
        (
            "monthly_quota",
            plan.monthly_quota,
            before.and_then(|it| it.monthly_quota),
            quota,
        ),
    ];
    let errors: Vec<FieldError> = limits
        .into_iter()
        .filter_map(|(field, value, before, maximum)| {
            let maximum = maximum?;
            let is_raised = value > Some(maximum.max(before.unwrap_or(0)));
            if !is_raised {
                return None;
            }
            Some(FieldError {
                field: field.into(),
                message: at_most(config, maximum),
            })
        })
        .collect();
    if errors.is_empty() {
        Ok(())
    } else {
        Err(ApiError::invalid_fields(errors))
    }
}

/// Rejects a change that removes a plan's `paid` mark if one of its keys has a higher rate than the limits for free
/// plans allow.
pub async fn check_rates_of_keys(
    config: &Config,
    tx: &mut TenantTx,
    plan: &Plan,
    before: &Plan,
) -> Result<(), ApiError> {
    let Some(maximum) = config.free_tier.rpm else {
        return Ok(());
    };
    if (before.billing, plan.billing) != UNMARKED {
        return Ok(());
    }
    match api_key::highest_rate(tx, plan.id.0).await? {
        Some(rate) if rate > i64::from(maximum) => Err(ApiError::invalid(
            "billing",
            format!(
                "must be paid, because a key on this plan has a rate of {rate} requests per minute, and free plans may \
                 have at most {maximum}"
            ),
        )),
        _ => Ok(()),
    }
}

/// Rejects a key if the maximum rate of free plans applies to its plan and the key's rate override exceeds this
/// maximum. `before` is the key before a change: if its plan stays the same, such a rate can be lowered.
pub async fn check_key(
    config: &Config,
    tx: &mut TenantTx,
    key: &ApiKey,
    before: Option<&ApiKey>,
) -> Result<(), ApiError> {
    let (Some(maximum), Some(rate)) = (config.free_tier.rpm, key.rpm_override) else {
        return Ok(());
    };
    let before = before
        .filter(|before| before.plan_id == key.plan_id)
        .and_then(|before| before.rpm_override);
    if rate <= maximum.max(before.unwrap_or(0)) {
        return Ok(());
    }
    let billing = plan::billing_of(tx, key.plan_id.0).await?;
    let billing = billing.and_then(|it| Billing::of(&it)).unwrap_or_default();
    if is_limited(config, billing) {
        let message = at_most(config, maximum.into());
        return Err(ApiError::invalid("rpm_override", message));
    }
    Ok(())
}
