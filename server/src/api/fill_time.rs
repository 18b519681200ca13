//! Limits the time that a key's bucket may take to fill.
//!
//! The shared counters keep a bucket at least until it is full. A fill time of more than 31 days would not be useful,
//! because a month is the longest period of a quota. The maximum is checked when a plan or key is created, when its
//! rate or burst changes, and when a key is moved to another plan. Existing plans and keys that exceed the maximum keep
//! working.

use quota_common::{api_key::ApiKey, bounds::FILL_MINUTES_MAX, number::grouped, plan::Plan};

use super::problem::ApiError;
use crate::{
    db::TenantTx,
    repo::{api_key, plan},
};

fn is_too_long(rpm: u32, burst: u32) -> bool {
    burst > rpm.saturating_mul(FILL_MINUTES_MAX)
}

/// Rejects a plan whose burst takes too long to refill. `field` is the field to name in the error.
pub fn check_plan(plan: &Plan, field: &'static str) -> Result<(), ApiError> {
    let (rpm, burst) = (plan.default_rpm, plan.burst);
    if !is_too_long(rpm, burst) {
        return Ok(());
    }
    Err(if field == "default_rpm" {
        ApiError::invalid(field, lowest_rate_text(burst))
    } else {
        let most = grouped(u64::from(rpm) * u64::from(FILL_MINUTES_MAX));
        let message = format!("must be at most {most} at this rate, to refill within 31 days");
        ApiError::invalid(field, message)
    })
}

/// Rejects a change to a plan if, after the change, the burst of a key with a rate override would take too long to
/// refill.
pub async fn check_keys_of_plan(tx: &mut TenantTx, plan: &Plan) -> Result<(), ApiError> {
    // If the plan's burst equals its rate, the burst of a key with a rate override equals that override.
    if plan.burst == plan.default_rpm {
        return Ok(());
    }
    match api_key::lowest_rate(tx, plan.id.0).await? {
        Some(rate) if is_too_long(rate, plan.burst) => {
            let most = grouped(u64::from(rate) * u64::from(FILL_MINUTES_MAX));
            let message = format!(
                "must be at most {most} to refill within 31 days, because a key on this plan has a rate of {} requests \
                 per minute",
                grouped(rate.into())
            );
            Err(ApiError::invalid("burst", message))
        }
        _ => Ok(()),
    }
}

/// Rejects a key if the plan's burst would take too long to refill at the key's own rate.
pub async fn check_key(tx: &mut TenantTx, key: &ApiKey) -> Result<(), ApiError> {
    let Some(rate) = key.rpm_override else {
        return Ok(());
    };
    let Some((default_rpm, burst)) = plan::rate_of(tx, key.plan_id.0).await? else {
        return Ok(());
    };
    if burst == default_rpm || !is_too_long(rate, burst) {
        return Ok(());
    }
    Err(ApiError::invalid("rpm_override", lowest_rate_text(burst)))
}

fn lowest_rate_text(burst: u32) -> String {
    format!(
        "must be at least {}, to refill the burst of {} within 31 days",
        grouped(burst.div_ceil(FILL_MINUTES_MAX).into()),
        grouped(burst.into())
    )
}
