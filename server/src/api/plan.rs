//! `/admin/plans`.

use poem::Result;
use poem_openapi::{
    OpenApi,
    param::{Header, Path, Query},
};
use quota_common::{
    Page, PlanId, ProblemCode,
    page::PlanOrder,
    plan::{Billing, CreatePlan, OnRedisFailure, Plan, UpdatePlan},
};
use uuid::Uuid;

use super::{
    Tag,
    change::{self, Change},
    idempotency::Once,
    json::{Created, Json, NoContent},
    page,
    problem::ApiError,
    tenant_rights::{ManagingTenant, ReadingTenant},
};
use crate::{
    db::TenantTx,
    repo::{
        By, Mark, Order,
        plan::{self, NewPlan, PlanChange, PlanRow},
        revocation::{self, Target},
    },
    state::AppState,
};

pub struct PlanApi {
    pub state: AppState,
}

fn show(row: PlanRow, key_count: u64) -> Plan {
    Plan {
        id: PlanId(row.id),
        name: row.name,
        default_rpm: u32::try_from(row.default_rpm).unwrap_or(0),
        burst: u32::try_from(row.burst).unwrap_or(0),
        daily_quota: row.daily_quota.and_then(|quota| u64::try_from(quota).ok()),
        monthly_quota: row
            .monthly_quota
            .and_then(|quota| u64::try_from(quota).ok()),
        strict: row.strict,
        on_redis_failure: row
            .on_redis_failure
            .as_deref()
            .and_then(OnRedisFailure::named),
        billing: if row.billing == "paid" {
            Billing::Paid
        } else {
            Billing::Free
        },
        key_count,
        created_at: row.created_at.into(),
        updated_at: row.updated_at.into(),
    }
}

fn order(sort: PlanOrder) -> Order {
    let (by, descending) = match sort {
        PlanOrder::Newest => (By::Made, true),
        PlanOrder::Oldest => (By::Made, false),
        PlanOrder::Name => (By::Name, false),
        PlanOrder::NameReversed => (By::Name, true),
    };
    Order { by, descending }
}

const fn billing_name(billing: Billing) -> &'static str {
    match billing {
        Billing::Free => "free",
        Billing::Paid => "paid",
    }
}

/// The bounds of the fields, which were checked, lie well within these types.
fn rate(n: u32) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

fn quota(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn name_taken() -> ApiError {
    ApiError::new(
        ProblemCode::NameTaken,
        "A plan with this name already exists.",
    )
}

async fn key_count(tx: &mut TenantTx, id: Uuid) -> Result<u64, ApiError> {
    Ok(plan::key_counts(tx, &[id])
        .await?
        .get(&id)
        .copied()
        .unwrap_or(0))
}

#[OpenApi(prefix_path = "/admin", tag = "Tag::Plans")]
impl PlanApi {
    /// List plans
    ///
    /// Returns plans newest first, or as `sort` says, each with its number of keys. A cursor is only valid with the
    /// sort it was issued for.
    #[oai(path = "/plans", method = "get", operation_id = "list_plans")]
    async fn list(
        &self,
        caller: ReadingTenant,
        /// Sort field; prefix with `-` for descending. Names are compared case-insensitively. Default:
        /// `-created_at`.
        sort: Query<Option<PlanOrder>>,
        /// Page size, 1–100. Default 20.
        #[oai(validator(minimum(value = "1"), maximum(value = "100")))]
        limit: Query<Option<u32>>,
        /// `next_cursor` from the previous page.
        cursor: Query<Option<String>>,
    ) -> Result<Json<Page<Plan>>, ApiError> {
        let order = order(sort.0.unwrap_or_default());
        let slice = page::sorted(order, limit.0, cursor.0.as_deref())?;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let rows = plan::list(&mut tx, &slice).await?;
        tx.commit().await?;
        let at = |(row, _): &(PlanRow, u64), by| {
            let mark = match by {
                By::Name => Mark::Name(row.name.clone()),
                By::Made | By::LastUsed => Mark::Made,
            };
            (mark, row.id)
        };
        let show = |(row, count)| show(row, count);
        Ok(Json(page::sorted_page(rows, order, at, show)))
    }

    /// Create a plan
    ///
    /// Returns the plan. Keys created on it get these limits.
    #[oai(path = "/plans", method = "post", operation_id = "create_plan")]
    async fn create(
        &self,
        caller: ManagingTenant,
        /// Makes the request safe to retry: the same key and body within 24 hours return the first response again.
        #[oai(name = "Idempotency-Key")]
        idempotency_key: Header<Option<String>>,
        body: Json<CreatePlan>,
    ) -> Result<Created<Plan>, ApiError> {
        let body = body.0;
        let once = Once::new("create_plan", idempotency_key.0, &body)?;
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        if let Some(answer) = once.replay(&mut tx).await? {
            return Ok(Created(answer));
        }
        let new = NewPlan {
            tenant_id: caller.tenant().0,
            id: Uuid::now_v7(),
            name: body.name.trim(),
            default_rpm: rate(body.default_rpm),
            burst: rate(body.burst.unwrap_or(body.default_rpm)),
            daily_quota: body.daily_quota.map(quota),
            monthly_quota: body.monthly_quota.map(quota),
            strict: body.strict.unwrap_or(false),
            on_redis_failure: body.on_redis_failure.map(OnRedisFailure::name),
            billing: billing_name(body.billing.unwrap_or_default()),
        };
        let row = plan::insert(&mut tx, &new)
            .await
            .map_err(|error| ApiError::on_constraint(error, &[("plans_name_key", name_taken)]))?;
        let made = show(row, 0);
        let event = Change {
            action: "plan.create",
            target_type: "plan",
            target: &made.id,
            name: &made.name,
            before: None,
            after: change::whole(&made),
        };
        change::record(&mut tx, &caller, event).await?;
        once.keep(&mut tx, &made).await?;
        tx.commit().await?;
        Ok(Created(made))
    }

    /// Get a plan
    ///
    /// Returns the plan with its number of keys.
    #[oai(path = "/plans/:plan_id", method = "get", operation_id = "get_plan")]
    async fn get(
        &self,
        caller: ReadingTenant,
        plan_id: Path<PlanId>,
    ) -> Result<Json<Plan>, ApiError> {
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let row = plan::find(&mut tx, plan_id.0.0)
            .await?
            .ok_or_else(ApiError::not_found)?;
        let count = key_count(&mut tx, row.id).await?;
        tx.commit().await?;
        Ok(Json(show(row, count)))
    }

    /// Update a plan
    ///
    /// Takes effect on all replicas within one second. Usage isn't reset: an update grants no new burst or quota. If
    /// burst equals the rate, it follows rate changes unless `burst` is sent.
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
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let before = plan::lock(&mut tx, id)
            .await?
            .ok_or_else(ApiError::not_found)?;
        let count = key_count(&mut tx, id).await?;
        let before = show(before, count);
        if body == UpdatePlan::default() {
            return Ok(Json(before));
        }
        let set = PlanChange {
            name: body.name.as_deref().map(str::trim),
            default_rpm: body.default_rpm.map(rate),
            // A burst that is the rate, as a plan has that names none, stays so.
            burst: match (body.burst, body.default_rpm) {
                (None, Some(rpm)) if before.burst == before.default_rpm => Some(rate(rpm)),
                (burst, _) => burst.map(rate),
            },
            daily_quota: body.daily_quota.map(|it| it.map(quota)),
            monthly_quota: body.monthly_quota.map(|it| it.map(quota)),
            strict: body.strict,
            on_redis_failure: body
                .on_redis_failure
                .map(|it| it.map(|it| it.name().to_owned())),
            billing: body.billing.map(billing_name),
        };
        let row = plan::update(&mut tx, id, &set)
            .await
            .map_err(|error| ApiError::on_constraint(error, &[("plans_name_key", name_taken)]))?
            .ok_or_else(ApiError::not_found)?;
        let after = show(row, count);
        let (was, is) = change::difference(&before, &after);
        let event = Change {
            action: "plan.update",
            target_type: "plan",
            target: &after.id,
            name: &after.name,
            before: was,
            after: is,
        };
        change::record(&mut tx, &caller, event).await?;
        let revoked = revocation::insert(&mut tx, Target::Plan(id)).await?;
        tx.commit().await?;
        self.state.revoked(&revoked);
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
        let mut tx = self.state.db.tenant(caller.tenant()).await?;
        let row = plan::lock(&mut tx, id)
            .await?
            .ok_or_else(ApiError::not_found)?;
        let count = key_count(&mut tx, id).await?;
        let in_use = |count: u64| {
            let detail = match count {
                1 => "1 key uses this plan. Move or delete it first.".to_owned(),
                count => format!("{count} keys use this plan. Move or delete them first."),
            };
            ApiError::new(ProblemCode::PlanInUse, detail)
        };
        if count > 0 {
            return Err(in_use(count));
        }
        let before = show(row, 0);
        // A key that was put on it since fails the constraint.
        plan::delete(&mut tx, id).await.map_err(|error| {
            ApiError::on_constraint(
                error,
                &[("api_keys_plan_fkey", || {
                    ApiError::new(
                        ProblemCode::PlanInUse,
                        "A key was just added to this plan. Move or delete it first.",
                    )
                })],
            )
        })?;
        let event = Change {
            action: "plan.delete",
            target_type: "plan",
            target: &before.id,
            name: &before.name,
            before: change::whole(&before),
            after: None,
        };
        change::record(&mut tx, &caller, event).await?;
        tx.commit().await?;
        Ok(NoContent)
    }
}
