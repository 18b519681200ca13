//! The operator's limits on how many resources a tenant may create.

use quota_common::ProblemCode;

use super::problem::ApiError;
use crate::{
    config::Config,
    db::TenantTx,
    repo::allowance::{self, Resource},
};

/// Rejects a creation that would exceed the tenant's limit. Call before the insert, in its transaction.
pub async fn one_more(config: &Config, tx: &mut TenantTx, what: Resource) -> Result<(), ApiError> {
    let limits = config.allowances;
    let (limit, name) = match what {
        Resource::Plans => (limits.plans, "plans"),
        Resource::ApiKeys => (limits.api_keys, "API keys"),
        Resource::ServiceTokens => (limits.service_tokens, "service tokens"),
    };
    if allowance::count(tx, what).await? < limit {
        return Ok(());
    }
    Err(ApiError::new(
        ProblemCode::LimitReached,
        format!(
            "Your organization has reached its limit of {limit} {name}. Delete some, or ask the operator for a higher limit."
        ),
    ))
}
