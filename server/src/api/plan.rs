//! `/admin/plans`.

use poem::Result;
use poem_openapi::{
    OpenApi,
    param::{Header, Path, Query},
};
use quota_common::{
    Page, PlanId, ProblemCode,
    audit::AuditAction,
    page::PlanOrder,
    plan::{Billing, CreatePlan, OnRedisFailure, Plan, UpdatePlan},
};
use uuid::Uuid;

use super::{
    Tag, allowance,
    change::{Edit, read},
    creation::create,
    fill_time,
    idempotency::IdempotencyGuard,
    json::{Created, Json, NoContent},
    page::{self, PageSize},
    problem::{ApiError, OrNotFound},
    tenant_rights::{ManagingTenant, ReadingTenant},
};
use crate::{
    db::{DbError, TenantTx},
    repo::{
        Order, SortBy,
        invalidation::Target,
        plan::{self, NewPlan, PlanChange, PlanWithKeys},
    },
    state::AppState,
};

pub struct PlanApi {
    pub state: AppState,
}

impl From<PlanWithKeys> for Plan {
    fn from(PlanWithKeys { plan, key_count }: PlanWithKeys) -> Self {
        let quota = |stored: Option<i64>| stored.and_then(|quota| u64::try_from(quota).ok());
        Self {
            id: PlanId(plan.id),
            name: plan.name,
            default_rpm: u32::try_from(plan.default_rpm).unwrap_or(0),
            burst: u32::try_from(plan.burst).unwrap_or(0),
            daily_quota: quota(plan.daily_quota),
            monthly_quota: quota(plan.monthly_quota),
            strict: plan.strict,
            on_redis_failure: plan
                .on_redis_failure
                .as_deref()
                .and_then(OnRedisFailure::of),
            billing: Billing::of(&plan.billing).unwrap_or_default(),
            key_count,
            created_at: plan.created_at.into(),
            updated_at: plan.updated_at.into(),
        }
    }
}

fn order(sort: PlanOrder) -> Order {
    let (by, descending) = match sort {
        PlanOrder::Newest => (SortBy::CreatedAt, true),
        PlanOrder::Oldest => (SortBy::CreatedAt, false),
        PlanOrder::Name => (SortBy::Name, false),
        PlanOrder::NameReversed => (SortBy::Name, true),
    };
    Order { by, descending }
}

fn name_taken(error: DbError) -> ApiError {
    let name_taken = || {
        ApiError::new(
            ProblemCode::NameTaken,
            "A plan with this name already exists.",
        )
    };
    ApiError::on_constraint(error, &[("plans_name_key", name_taken)])
}

fn in_use(key_count: u64) -> ApiError {
    let detail = match key_count {
        1 => "1 key uses this plan. Move or delete the key first.".to_owned(),
        count => format!("{count} keys use this plan. Move or delete the keys first."),
    };
    ApiError::new(ProblemCode::PlanInUse, detail)
}

/// Returns the error for deleting a plan if a key was added to the plan after its keys were counted.
fn just_used() -> ApiError {
    ApiError::new(
        ProblemCode::PlanInUse,
        "A key was just added to this plan. Move or delete the key first.",
    )
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::Plans")]
impl PlanApi {
    /// List plans
    ///
    /// Returns plans, each with its number of keys, in the order given by `sort` (default: newest first). A cursor is
    /// valid only with the `sort` for which it was issued.
    #[oai(path = "/plans", method = "get", operation_id = "list_plans")]
    async fn list(
        &self,
        caller: ReadingTenant,
        /// Sort field; prefix with `-` for descending. Names are compared case-insensitively. Default:
        /// `-created_at`.
        sort: Query<Option<PlanOrder>>,
        /// Page size, 1–100. Default: 20.
        limit: Query<Option<PageSize>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<Plan>>, ApiError> {
        let order = order(sort.0.unwrap_or_default());
        let slice = page::sorted(order, limit.0, cursor.0.as_deref())?;
        let list = async |tx: &mut TenantTx| plan::list(tx, &slice).await;
        let rows = read(&self.state, &caller, list).await?;
        Ok(Json(page::sorted_page(rows, order)))
    }

    /// Create a plan
    ///
    /// Returns the plan. The plan's limits apply separately to each of its keys.
    #[oai(path = "/plans", method = "post", operation_id = "create_plan")]
    async fn create(
        &self,
        caller: ManagingTenant,
        /// Makes the request safe to retry: repeating it with the same `Idempotency-Key` and body within 24 hours
        /// returns the original response.
        #[oai(name = "Idempotency-Key")]
        idempotency_key: Header<Option<String>>,
        body: Json<CreatePlan>,
    ) -> Result<Created<Plan>, ApiError> {
        let body = body.0;
        let idempotency = IdempotencyGuard::new("create_plan", idempotency_key.0, &body)?;
        let new = NewPlan {
            tenant_id: caller.tenant().0,
            id: Uuid::now_v7(),
            name: body.name.trim(),
            default_rpm: body.default_rpm.into(),
            burst: body.burst.map_or(body.default_rpm.into(), Into::into),
            daily_quota: body.daily_quota.map(Into::into),
            monthly_quota: body.monthly_quota.map(Into::into),
            strict: body.strict.unwrap_or(false),
            on_redis_failure: body.on_redis_failure.map(OnRedisFailure::as_str),
            billing: body.billing.unwrap_or_default().as_str(),
        };
        let insert = async |tx: &mut TenantTx| {
            let plan = plan::insert(tx, &new).await.map_err(name_taken)?;
            let plan = Plan::from(PlanWithKeys { plan, key_count: 0 });
            allowance::check_plan(&self.state.config, &plan, None)?;
            fill_time::check_plan(&plan, "burst")?;
            Ok(plan)
        };
        create(&self.state, &caller, idempotency, insert)
            .await
            .map(Created)
    }

    /// Get a plan
    ///
    /// Returns the plan and the number of keys on it.
    #[oai(path = "/plans/:plan_id", method = "get", operation_id = "get_plan")]
    async fn get(
        &self,
        caller: ReadingTenant,
        plan_id: Path<PlanId>,
    ) -> Result<Json<Plan>, ApiError> {
        let find = async |tx: &mut TenantTx| plan::find(tx, plan_id.0.0).await;
        let plan = read(&self.state, &caller, find).await.or_not_found()?;
        Ok(Json(plan.into()))
    }

    /// Update a plan
    ///
    /// Takes effect on all replicas within one second. Usage is not reset: an update does not grant a new burst or
    /// quota. If the burst equals the rate, changing the rate also changes the burst, unless you send `burst`.
    #[oai(
        path = "/plans/:plan_id",
        method = "patch",
        operation_id = "update_plan"
    )]
    async fn update(
        &self,
        caller: ManagingTenant,
        plan_id: Path<PlanId>,
        body: Json<UpdatePlan>,
    ) -> Result<Json<Plan>, ApiError> {
        let id = plan_id.0.0;
        let body = body.0;
        let config = &self.state.config;
        let mut edit = Edit::begin(&self.state, &caller).await?;
        allowance::lock_rates(config, &mut edit).await?;
        let before = Plan::from(plan::lock(&mut edit, id).await.or_not_found()?);
        if body == UpdatePlan::default() {
            return Ok(Json(before));
        }
        let change = PlanChange {
            name: body.name.as_deref().map(str::trim),
            default_rpm: body.default_rpm.map(Into::into),
            burst: match (body.burst, body.default_rpm) {
                (None, Some(rpm)) if before.burst == before.default_rpm => Some(rpm.into()),
                (burst, _) => burst.map(Into::into),
            },
            daily_quota: body.daily_quota.map(|it| it.map(Into::into)),
            monthly_quota: body.monthly_quota.map(|it| it.map(Into::into)),
            strict: body.strict,
            on_redis_failure: body
                .on_redis_failure
                .map(|it| it.map(|it| it.as_str().to_owned())),
            billing: body.billing.map(Billing::as_str),
        };
        let plan = plan::update(&mut edit, id, &change)
            .await
            .map_err(name_taken)?
            .ok_or_else(ApiError::not_found)?;
        let key_count = before.key_count;
        let after = Plan::from(PlanWithKeys { plan, key_count });
        allowance::check_plan(config, &after, Some(&before))?;
        if (before.default_rpm, before.burst) != (after.default_rpm, after.burst) {
            let field = match change.burst {
                Some(_) => "burst",
                None => "default_rpm",
            };
            fill_time::check_plan(&after, field)?;
            fill_time::check_keys_of_plan(&mut edit, &after).await?;
        }
        allowance::check_rates_of_keys(config, &mut edit, &after, &before).await?;
        edit.updated(AuditAction::PlanUpdate, &before, &after, Target::Plan(id))
            .await?;
        Ok(Json(after))
    }

    /// Delete a plan
    ///
    /// Fails with 409 while keys still use the plan. This cannot be undone.
    #[oai(
        path = "/plans/:plan_id",
        method = "delete",
        operation_id = "delete_plan"
    )]
    async fn delete(
        &self,
        caller: ManagingTenant,
        plan_id: Path<PlanId>,
    ) -> Result<NoContent, ApiError> {
        let id = plan_id.0.0;
        let mut edit = Edit::begin(&self.state, &caller).await?;
        let plan = Plan::from(plan::lock(&mut edit, id).await.or_not_found()?);
        if plan.key_count > 0 {
            return Err(in_use(plan.key_count));
        }
        plan::delete(&mut edit, id).await.map_err(|error| {
            ApiError::on_constraint(error, &[("api_keys_plan_fkey", just_used)])
        })?;
        // A plan without keys is not in any cache, so there is nothing to invalidate.
        edit.deleted(AuditAction::PlanDelete, &plan, None).await?;
        Ok(NoContent)
    }
}
