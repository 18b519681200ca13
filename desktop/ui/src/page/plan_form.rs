use leptos::prelude::*;
use quota_common::plan::{Billing, CreatePlan, OnRedisFailure, Plan};

use crate::{
    component::{Field, FormState, SelectField},
    model::{
        form::{check_number, check_rate, copy_name, optional_number, optional_rate},
        text::number,
    },
};

#[derive(Clone, Copy)]
pub struct PlanForm {
    pub state: FormState,
    name: RwSignal<String>,
    rate: RwSignal<String>,
    burst: RwSignal<String>,
    daily_quota: RwSignal<String>,
    monthly_quota: RwSignal<String>,
    strict: RwSignal<bool>,
    /// A value of [`OnRedisFailure`] in the API, or an empty string for the server's default.
    on_redis_failure: RwSignal<String>,
    /// Whether the plan's keys require a subscription.
    pub paid: RwSignal<bool>,
}

impl PlanForm {
    /// Returns a form that edits `plan`, or a form for a new plan.
    pub fn new(plan: Option<&Plan>) -> Self {
        let text = |n: Option<u64>| RwSignal::new(n.map(number).unwrap_or_default());
        Self {
            state: FormState::new(),
            name: RwSignal::new(plan.map(|it| it.name.clone()).unwrap_or_default()),
            rate: RwSignal::new(
                plan.map_or_else(|| "60".to_owned(), |it| number(it.default_rpm.into())),
            ),
            // Blank if the burst equals the rate, because the burst then follows changes to the rate, as if it were not
            // set.
            burst: text(
                plan.filter(|it| it.burst != it.default_rpm)
                    .map(|it| it.burst.into()),
            ),
            daily_quota: text(plan.and_then(|it| it.daily_quota)),
            monthly_quota: text(plan.and_then(|it| it.monthly_quota)),
            strict: RwSignal::new(plan.is_some_and(|it| it.strict)),
            on_redis_failure: RwSignal::new(
                plan.and_then(|it| it.on_redis_failure)
                    .map(|it| it.as_str().to_owned())
                    .unwrap_or_default(),
            ),
            paid: RwSignal::new(plan.is_some_and(|it| it.billing == Billing::Paid)),
        }
    }

    /// Returns a form for a new plan with the settings of another plan.
    pub fn copy_of(plan: &Plan) -> Self {
        let form = Self::new(Some(plan));
        form.name.set(copy_name(&plan.name));
        form
    }

    /// Returns the values in the form. Treats invalid numbers as blank; [`FormState::begin`] reports them.
    pub fn values(self) -> CreatePlan {
        let rate = |field: RwSignal<String>| {
            field.with_untracked(|text| optional_rate(text).unwrap_or_default())
        };
        let quota = |field: RwSignal<String>| {
            field.with_untracked(|text| optional_number(text).unwrap_or_default())
        };
        CreatePlan {
            name: self.name.get_untracked().into(),
            default_rpm: rate(self.rate).unwrap_or_default().into(),
            burst: rate(self.burst).map(Into::into),
            daily_quota: quota(self.daily_quota).map(Into::into),
            monthly_quota: quota(self.monthly_quota).map(Into::into),
            strict: Some(self.strict.get_untracked()),
            on_redis_failure: OnRedisFailure::of(&self.on_redis_failure.get_untracked()),
            billing: Some(if self.paid.get_untracked() {
                Billing::Paid
            } else {
                Billing::Free
            }),
        }
    }
}

const ON_REDIS_FAILURE: [(&str, &str); 4] = [
    ("", "Server default"),
    (
        "share",
        "Keep limiting (each replica enforces its share of the limit)",
    ),
    (
        "open",
        "Keep limiting (each replica enforces the full limit)",
    ),
    ("closed", "Reject all (503)"),
];

#[component]
pub fn PlanFields(plan: PlanForm) -> impl IntoView {
    let form = plan.state;
    let is_advanced = plan.strict.get_untracked()
        || plan.paid.get_untracked()
        || !plan.on_redis_failure.with_untracked(String::is_empty);
    let options = ON_REDIS_FAILURE
        .map(|(value, label)| (value.to_owned(), label.to_owned()))
        .to_vec();
    view! {
        <Field form name="name" label="Name" value=plan.name required=true/>
        <div class="pair">
            <Field form name="default_rpm" label="Requests per minute" value=plan.rate required=true numeric=true check=check_rate/>
            <Field form name="burst" label="Burst" value=plan.burst numeric=true check=check_rate hint="Maximum burst. Defaults to the rate."/>
        </div>
        <div class="pair">
            <Field form name="daily_quota" label="Daily quota" value=plan.daily_quota numeric=true check=check_number hint="Leave blank for unlimited."/>
            <Field form name="monthly_quota" label="Monthly quota" value=plan.monthly_quota numeric=true check=check_number hint="Leave blank for unlimited."/>
        </div>
        <details class="advanced" open=is_advanced>
            <summary>"Advanced"</summary>
            <label class="check">
                <input type="checkbox" name="billing" bind:checked=plan.paid/>
                <span>"Paid: if billing is on, keys work only while your organization has a subscription"</span>
            </label>
            <label class="check">
                <input type="checkbox" name="strict" bind:checked=plan.strict/>
                <span>"Strict: take every allowed request from the shared counters (slightly slower)"</span>
            </label>
            <SelectField
                form
                name="on_redis_failure"
                id="on_redis_failure"
                label="If Redis is unavailable"
                value=plan.on_redis_failure
                options
                hint="Applies only if the server uses Redis."
            />
        </details>
    }
}
