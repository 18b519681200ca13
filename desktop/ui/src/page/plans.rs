//! Plans: what keys may do.

use leptos::{ev::SubmitEvent, prelude::*, task::spawn_local};
use quota_common::{
    page::PlanOrder,
    plan::{Billing, CreatePlan, OnRedisFailure, Plan, UpdatePlan},
};

use crate::{
    api::{self, Failure},
    app::session,
    component::{
        Alert, Confirm, Empty, Field, Head, Loader, Modal, Pager, SelectField, Shape, Shown,
        SortHead, SortSelect, Toasts, focus_soon, held, load_page, open_when_asked,
    },
    model::{
        form::{optional_number, optional_rate, plan_changes, rate},
        text::{self, count},
    },
    route::route,
};

type PlanPage = quota_common::Page<Plan>;

/// What can be typed of a plan.
#[derive(Clone, Copy)]
struct Form {
    name: RwSignal<String>,
    rpm: RwSignal<String>,
    burst: RwSignal<String>,
    daily: RwSignal<String>,
    monthly: RwSignal<String>,
    strict: RwSignal<bool>,
    /// By its name; empty: as the server is set.
    on_redis_failure: RwSignal<String>,
    busy: RwSignal<bool>,
    /// Of a field, by this page or by the server.
    wrong: RwSignal<Vec<(&'static str, String)>>,
    failure: RwSignal<Option<Failure>>,
}

impl Form {
    fn new(plan: Option<&Plan>) -> Self {
        let text = |n: Option<u64>| RwSignal::new(n.map(|n| n.to_string()).unwrap_or_default());
        Self {
            name: RwSignal::new(plan.map(|it| it.name.clone()).unwrap_or_default()),
            rpm: RwSignal::new(
                plan.map_or_else(|| "60".to_owned(), |it| it.default_rpm.to_string()),
            ),
            // One that is the rate follows it, as one that is not named.
            burst: text(
                plan.filter(|it| it.burst != it.default_rpm)
                    .map(|it| it.burst.into()),
            ),
            daily: text(plan.and_then(|it| it.daily_quota)),
            monthly: text(plan.and_then(|it| it.monthly_quota)),
            strict: RwSignal::new(plan.is_some_and(|it| it.strict)),
            on_redis_failure: RwSignal::new(
                plan.and_then(|it| it.on_redis_failure)
                    .map(|it| it.name().to_owned())
                    .unwrap_or_default(),
            ),
            busy: RwSignal::new(false),
            wrong: RwSignal::new(Vec::new()),
            failure: RwSignal::new(None),
        }
    }

    /// What is typed, or nothing when some of it cannot be read; that is then said.
    fn read(self) -> Option<CreatePlan> {
        let mut wrong = Vec::new();
        let mut take =
            |field: &'static str, error: &'static str| wrong.push((field, error.to_owned()));
        let default_rpm = rate(&self.rpm.get_untracked())
            .map_err(|error| take("default_rpm", error))
            .unwrap_or_default();
        let burst = optional_rate(&self.burst.get_untracked())
            .map_err(|error| take("burst", error))
            .unwrap_or_default();
        let daily_quota = optional_number(&self.daily.get_untracked())
            .map_err(|error| take("daily_quota", error))
            .unwrap_or_default();
        let monthly_quota = optional_number(&self.monthly.get_untracked())
            .map_err(|error| take("monthly_quota", error))
            .unwrap_or_default();
        let fine = wrong.is_empty();
        self.wrong.set(wrong);
        self.failure.set(None);
        fine.then(|| CreatePlan {
            name: self.name.get_untracked().into(),
            default_rpm: default_rpm.into(),
            burst: burst.map(Into::into),
            daily_quota: daily_quota.map(Into::into),
            monthly_quota: monthly_quota.map(Into::into),
            strict: Some(self.strict.get_untracked()),
            on_redis_failure: OnRedisFailure::named(&self.on_redis_failure.get_untracked()),
            billing: None,
        })
    }

    fn of(self, field: &'static str) -> Signal<Option<String>> {
        Signal::derive(move || {
            let own = self.wrong.with(|wrong| {
                wrong
                    .iter()
                    .find(|(it, _)| *it == field)
                    .map(|(_, text)| text.clone())
            });
            own.or_else(|| self.failure.get()?.of_field(field))
        })
    }

    fn rest(self) -> Signal<Option<String>> {
        Signal::derive(move || {
            let failure = self.failure.get()?;
            (!failure.names_fields()).then(|| failure.text())
        })
    }
}

const ON_REDIS_FAILURE: [(&str, &str); 4] = [
    ("", "What the operator has set"),
    ("share", "Limit on: each server admits its share"),
    ("open", "Let every request through"),
    ("closed", "Refuse every request with 503"),
];

/// What the fields of a form are known by in the page.
type Ids = [&'static str; 6];

const NEW: Ids = [
    "name",
    "default_rpm",
    "burst",
    "daily_quota",
    "monthly_quota",
    "on_redis_failure",
];
/// A new plan can be made while one is being edited.
const EDITED: Ids = [
    "edit_name",
    "edit_default_rpm",
    "edit_burst",
    "edit_daily_quota",
    "edit_monthly_quota",
    "edit_on_redis_failure",
];

#[component]
fn PlanFields(form: Form, ids: Ids) -> impl IntoView {
    let [name, default_rpm, burst, daily, monthly, on_redis_failure] = ids;
    let is_advanced =
        form.strict.get_untracked() || !form.on_redis_failure.with_untracked(String::is_empty);
    view! {
        <Alert text=form.rest()/>
        <Field id=name label="Name" value=form.name required=true error=form.of("name")/>
        <div class="pair">
            <Field id=default_rpm label="Requests a minute" value=form.rpm required=true numeric=true error=form.of("default_rpm")/>
            <Field id=burst label="Burst" value=form.burst numeric=true hint="At once, after a rest. Empty: the rate." error=form.of("burst")/>
        </div>
        <div class="pair">
            <Field id=daily label="A day" value=form.daily numeric=true hint="Empty: no limit." error=form.of("daily_quota")/>
            <Field id=monthly label="A month" value=form.monthly numeric=true hint="Empty: no limit." error=form.of("monthly_quota")/>
        </div>
        <details class="advanced" open=is_advanced>
            <summary>"Advanced"</summary>
            <label class="check">
                <input type="checkbox" name="strict" bind:checked=form.strict/>
                <span>"Strict: never a request above the limit, and each takes a little longer"</span>
            </label>
            <SelectField
                id=on_redis_failure
                label="When requests cannot be counted"
                value=form.on_redis_failure
                options=ON_REDIS_FAILURE.map(|(value, text)| (value.to_owned(), text.to_owned())).to_vec()
                hint="Only where several servers count together, while they cannot reach their counter."
                error=form.of("on_redis_failure")
            />
        </details>
    }
}

#[component]
pub fn Plans() -> impl IntoView {
    let query = route().query;
    let toasts = expect_context::<Toasts>();
    let loader: Loader<PlanPage> = load_page(move |page| {
        let sort = query.with(|query| query.get("sort"));
        api::list_plans(sort.and_then(|sort| PlanOrder::of(&sort)), page)
    });
    let creating = RwSignal::new(false);
    open_when_asked(creating);
    let may = move || {
        session()
            .me
            .get()
            .is_some_and(|me| me.tenant.role.may_manage())
    };
    let editing = RwSignal::new(None::<Plan>);
    let deleting = RwSignal::new(None::<Plan>);
    view! {
        <Head title="Plans" about="A plan says how fast a key may go, and how much it gets a day and a month.">
            {move || may().then(|| view! { <button class="button first" on:click=move |_| creating.set(true)>"New plan"</button> })}
        </Head>
        <Shown
            loader
            show=move |page| {
                if page.items.is_empty() {
                    return view! {
                        <Empty shape=Shape::Plans title="No plans yet" about="A key belongs to a plan. Make one to begin with, such as 60 requests a minute.">
                            <button class="button first" on:click=move |_| creating.set(true)>"Make the first plan"</button>
                        </Empty>
                    }
                        .into_any();
                }
                let shown = page.items.len();
                let rows = page
                    .items
                    .into_iter()
                    .map(|plan| view! { <PlanRow plan editing deleting may=may() loader/> })
                    .collect_view();
                view! {
                    {(page.total > 1)
                        .then(|| {
                            view! {
                                <div class="filters narrow">
                                    <SortSelect options=&[("", "Newest first"), ("created_at", "Oldest first"), ("name", "Name"), ("-name", "Name, Z to A")]/>
                                </div>
                            }
                        })}
                    <table class="table">
                        <caption class="unseen">"Plans"</caption>
                        <thead>
                            <tr>
                                <SortHead name="Name" up="name" down="-name" up_first=true/>
                                <th scope="col" class="num">"A minute"</th>
                                <th scope="col" class="num">"Burst"</th>
                                <th scope="col" class="num">"A day"</th>
                                <th scope="col" class="num">"A month"</th>
                                <th scope="col" class="num">"Keys"</th>
                                <th scope="col"><span class="unseen">"Actions"</span></th>
                            </tr>
                        </thead>
                        <tbody>{rows}</tbody>
                    </table>
                    <Pager total=page.total shown next=page.next_cursor/>
                }
                    .into_any()
            }
        />
        <CreateDialog open=creating done=Callback::new(move |plan: Plan| {
            toasts.say(format!("The plan {} is made.", text::named(&plan.name)));
            loader.reload();
        })/>
        <DeleteDialog plan=deleting done=Callback::new(move |plan: Plan| {
            toasts.say(format!("The plan {} is deleted.", text::named(&plan.name)));
            loader.reload();
        })/>
    }
}

#[component]
fn PlanRow(
    plan: Plan,
    editing: RwSignal<Option<Plan>>,
    deleting: RwSignal<Option<Plan>>,
    may: bool,
    loader: Loader<PlanPage>,
) -> impl IntoView {
    let plan = StoredValue::new(plan);
    let is_edited = Memo::new(move |_| {
        editing.with(|it| it.as_ref().map(|it| it.id)) == Some(plan.with_value(|it| it.id))
    });
    let quota = |n: Option<u64>| n.map_or_else(|| "no limit".to_owned(), text::number);
    move || {
        let it = plan.get_value();
        if is_edited.get() {
            return view! {
                <tr class="editing">
                    <td colspan="7"><EditForm plan=it editing loader/></td>
                </tr>
            }
            .into_any();
        }
        view! {
            <tr>
                <th scope="row" dir="auto">
                    <span class="clamp">{it.name.clone()}</span>
                    {it.strict.then(|| view! { <span class="badge">"strict"</span> })}
                    {(it.billing == Billing::Paid).then(|| view! { <span class="badge">"paid"</span> })}
                </th>
                <td class="num" data-label="A minute">{text::number(it.default_rpm.into())}</td>
                <td class="num" data-label="Burst">{text::number(it.burst.into())}</td>
                <td class="num" data-label="A day">{quota(it.daily_quota)}</td>
                <td class="num" data-label="A month">{quota(it.monthly_quota)}</td>
                <td class="num" data-label="Keys">
                    <a href=format!("/console/api-keys?plan_id={}", it.id) aria-label=format!("{} on {}", count(it.key_count, "key", "keys"), it.name)>
                        {text::number(it.key_count)}
                    </a>
                </td>
                <td class="row-actions">
                    {may
                        .then(|| {
                            view! {
                                <button class="button small" data-keep=format!("edit-{}", it.id) aria-label=format!("Edit {}", it.name) on:click=move |_| editing.set(Some(plan.get_value()))>"Edit"</button>
                                <button class="button small" aria-label=format!("Delete {}", it.name) on:click=move |_| deleting.set(Some(plan.get_value()))>"Delete"</button>
                            }
                        })}
                </td>
            </tr>
        }
            .into_any()
    }
}

#[component]
fn EditForm(
    plan: Plan,
    editing: RwSignal<Option<Plan>>,
    loader: Loader<PlanPage>,
) -> impl IntoView {
    let form = Form::new(Some(&plan));
    let was = form.read();
    let toasts = expect_context::<Toasts>();
    let touched = match plan.key_count {
        0 => "No key is on this plan.".to_owned(),
        n => format!(
            "This touches {}, within a second. What they have used stays used.",
            count(n, "key", "keys")
        ),
    };
    let id = plan.id;
    focus_soon("#edit-plan input");
    let close = move || {
        editing.set(None);
        focus_soon(format!("[data-keep=\"edit-{id}\"]"));
    };
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        let (Some(was), Some(typed)) = (&was, form.read()) else {
            return;
        };
        let body = plan_changes(was, typed);
        if body == UpdatePlan::default() {
            return close();
        }
        form.busy.set(true);
        spawn_local(async move {
            match api::update_plan(id, body).await {
                Ok(plan) => {
                    toasts.say(format!("The plan {} is changed.", text::named(&plan.name)));
                    close();
                    loader.reload();
                }
                Err(failure) => {
                    form.failure.set(Some(failure));
                    form.busy.set(false);
                }
            }
        });
    };
    view! {
        <form class="inline-form" id="edit-plan" aria-label=format!("Edit {}", plan.name) on:submit=submit>
            <PlanFields form ids=EDITED/>
            <p class="quiet">{touched}</p>
            <div class="actions">
                <button class="button first" aria-disabled=held(form.busy)>"Save"</button>
                <button type="button" class="button" on:click=move |_| close()>"Cancel"</button>
            </div>
        </form>
    }
}

#[component]
fn CreateDialog(open: RwSignal<bool>, done: Callback<Plan>) -> impl IntoView {
    view! {
        <Modal open title="New plan">
            <CreateForm open done/>
        </Modal>
    }
}

#[component]
fn CreateForm(open: RwSignal<bool>, done: Callback<Plan>) -> impl IntoView {
    let form = Form::new(None);
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        let Some(body) = form.read() else { return };
        form.busy.set(true);
        spawn_local(async move {
            match api::create_plan(body).await {
                Ok(plan) => {
                    // The page may be another by now.
                    let _ = done.try_run(plan);
                    open.set(false);
                }
                Err(failure) => form.failure.set(Some(failure)),
            }
            let _ = form.busy.try_set(false);
        });
    };
    view! {
        <form on:submit=submit>
            <PlanFields form ids=NEW/>
            <div class="actions end">
                <button type="button" class="button" on:click=move |_| open.set(false)>"Cancel"</button>
                <button class="button first" aria-disabled=held(form.busy)>"Make plan"</button>
            </div>
        </form>
    }
}

#[component]
fn DeleteDialog(plan: RwSignal<Option<Plan>>, done: Callback<Plan>) -> impl IntoView {
    let open = RwSignal::new(false);
    let busy = RwSignal::new(false);
    let failure = RwSignal::new(None::<String>);
    let blocked = RwSignal::new(false);
    Effect::new(move |_| {
        if let Some(plan) = plan.get() {
            failure.set(None);
            if plan.key_count > 0 {
                blocked.set(true);
            } else {
                open.set(true);
            }
        }
    });
    Effect::new(move |_| {
        if !open.get() && !blocked.get() {
            plan.set(None);
        }
    });
    let name = move || plan.get().map(|it| it.name).unwrap_or_default();
    let run = Callback::new(move |()| {
        let Some(it) = plan.get_untracked() else {
            return;
        };
        busy.set(true);
        spawn_local(async move {
            match api::delete_plan(it.id).await {
                Ok(()) => {
                    open.set(false);
                    let _ = done.try_run(it);
                }
                Err(refused) => failure.set(Some(refused.text())),
            }
            busy.set(false);
        });
    });
    view! {
        <Confirm
            open
            title=Signal::derive(move || format!("Delete the plan {}?", text::named(&name())))
            breaks="No key is on it. Plans that are deleted do not come back."
            action="Delete plan"
            busy
            failure
            run
        />
        <Modal open=blocked title="This plan is in use">
            <p>
                {move || {
                    plan.get()
                        .map(|it| format!("{} on it. Move or delete them first: without a plan they would open nothing.", if it.key_count == 1 { "1 key is".to_owned() } else { format!("{} keys are", text::number(it.key_count)) }))
                }}
            </p>
            <div class="actions end">
                <button class="button" on:click=move |_| blocked.set(false)>"Close"</button>
                <a class="button first" href=move || plan.get().map(|it| format!("/console/api-keys?plan_id={}", it.id))>"Show its keys"</a>
            </div>
        </Modal>
    }
}
