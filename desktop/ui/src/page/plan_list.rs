//! Loads all plans, and looks up plans by ID.

use leptos::prelude::*;
use quota_common::{
    PlanId,
    call::PageOf,
    page::{MAX_LIMIT, PlanOrder},
    plan::Plan,
};

use crate::{
    api,
    component::{Loader, load, request_id},
};

/// Loads all pages of the list of plans.
pub fn load_plans() -> Loader<Vec<Plan>> {
    load(|| async {
        let mut plans = Vec::new();
        let mut cursor = None;
        loop {
            let page = PageOf {
                limit: Some(MAX_LIMIT),
                cursor,
            };
            let page = api::list_plans(Some(PlanOrder::Name), page).await?;
            plans.extend(page.items);
            cursor = page.next_cursor;
            if cursor.is_none() {
                return Ok(plans);
            }
        }
    })
}

/// Returns a plan if it has been loaded.
pub fn find_plan(plans: Loader<Vec<Plan>>, id: PlanId) -> Option<Plan> {
    plans
        .with(|plans| plans.iter().find(|plan| plan.id == id).cloned())
        .flatten()
}

/// Returns the name of a plan, or an ellipsis until the plan has been loaded.
pub fn plan_name(plans: Loader<Vec<Plan>>, id: PlanId) -> String {
    find_plan(plans, id).map_or_else(|| "…".to_owned(), |plan| plan.name)
}

/// Shown when plan names are missing because plans could not be loaded.
#[component]
pub fn PlansError(plans: Loader<Vec<Plan>>) -> impl IntoView {
    move || {
        let error = plans.error()?;
        let id = error.request_id().map(str::to_owned);
        Some(view! {
            <div class="alert" role="alert">
                <p><strong>"Couldn't load plans."</strong> " " {error.message()}</p>
                {request_id(id)}
                <button type="button" class="button small" on:click=move |_| plans.reload()>"Retry"</button>
            </div>
        })
    }
}
