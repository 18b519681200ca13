//! The list of plans, and the dialogs to create, edit, and delete a plan.

use leptos::prelude::*;
use quota_common::{
    Page,
    billing::BillingState,
    page::PlanOrder,
    plan::{Billing, Plan, UpdatePlan},
};

use super::{
    create_button::{CreateButton, can_create},
    plan_form::{PlanFields, PlanForm},
};
use crate::{
    api,
    component::{
        Async, Confirm, Confirmation, DialogForm, EmptyState, Loader, Menu, MenuItem, Modal,
        PageHeader, Pager, Shape, SortHead, SortSelect, Toasts, copy_and_report, load, load_page,
        open_from_query,
    },
    model::{
        billing::paid_warning,
        form::plan_changes,
        text::{self, count},
    },
    reactive::effect,
    route::route,
    session::session,
};

#[component]
pub fn Plans() -> impl IntoView {
    let query = route().query;
    let session = session();
    let toasts = expect_context::<Toasts>();
    let loader: Loader<Page<Plan>> = load_page(move |page| {
        let sort = query.with(|query| query.get("sort"));
        api::list_plans(sort.and_then(|sort| PlanOrder::of(&sort)), page)
    });
    let creating = RwSignal::new(false);
    open_from_query(creating, can_create());
    // The plan that is being duplicated, if any. The new plan starts with its settings.
    let template = RwSignal::new(None::<Plan>);
    effect(move || {
        if !creating.get() {
            template.set(None);
        }
    });
    let billing = session.can_bill().then(|| load(api::billing));
    let paid_note = move || {
        let text = warning(billing, None)?;
        Some(
            view! { <p class="alert warn">{text} " " <a href="/console/billing">"View billing"</a></p> },
        )
    };
    let editing = RwSignal::new(None::<Plan>);
    let deleting = RwSignal::new(None::<Plan>);
    let report = move |what: &'static str| {
        Callback::new(move |plan: Plan| {
            toasts.succeed(format!("Plan {} {what}", text::quoted(&plan.name)));
            loader.reload();
        })
    };
    let duplicate = Callback::new(move |plan: Plan| {
        template.set(Some(plan));
        creating.set(true);
    });
    view! {
        <PageHeader title="Plans" about="Rate limits and quotas for the keys on each plan.">
            <CreateButton open=creating label="Create plan"/>
        </PageHeader>
        <div role="status">{paid_note}</div>
        <Async
            loader
            what="plans"
            show=move |page| {
                if page.items.is_empty() {
                    return view! {
                        <EmptyState shape=Shape::Plans title="No plans yet" about="Each API key needs a plan. Start with a simple one: 60 requests per minute.">
                            <CreateButton open=creating label="Create your first plan"/>
                        </EmptyState>
                    }
                        .into_any();
                }
                let shown = page.items.len();
                let can_manage = session.can_manage();
                let rows = page
                    .items
                    .into_iter()
                    .map(|plan| view! { <PlanRow plan editing deleting duplicate can_manage/> })
                    .collect_view();
                view! {
                    {(page.total > 1)
                        .then(|| view! { <div class="filters narrow"><SortSelect/></div> })}
                    <table class="table">
                        <caption class="visually-hidden">"Plans"</caption>
                        <thead>
                            <tr>
                                <SortHead name="Name" ascending="name" descending="-name" ascending_first=true/>
                                <th scope="col" class="num">"Req/min"</th>
                                <th scope="col" class="num">"Burst"</th>
                                <th scope="col" class="num">"Daily quota"</th>
                                <th scope="col" class="num">"Monthly quota"</th>
                                <th scope="col" class="num">"Keys"</th>
                                <th scope="col"><span class="visually-hidden">"Actions"</span></th>
                            </tr>
                        </thead>
                        <tbody>{rows}</tbody>
                    </table>
                    <Pager total=page.total shown next=page.next_cursor/>
                }
                    .into_any()
            }
        />
        <Modal open=creating panel=true title="Create plan">
            <CreateForm open=creating template on_created=report("created")/>
        </Modal>
        <EditPanel editing billing on_updated=report("updated")/>
        <DeleteDialog plan=deleting on_deleted=report("deleted")/>
    }
}

/// Returns a warning if paid plans do not work. `keys` is the number of keys on one plan; `None` means all keys on paid
/// plans.
fn warning(billing: Option<Loader<BillingState>>, keys: Option<u64>) -> Option<String> {
    billing?
        .with(|it| paid_warning(it, keys.unwrap_or(it.paid_keys), keys.is_none()))
        .flatten()
}

#[component]
fn PlanRow(
    plan: Plan,
    editing: RwSignal<Option<Plan>>,
    deleting: RwSignal<Option<Plan>>,
    duplicate: Callback<Plan>,
    can_manage: bool,
) -> impl IntoView {
    let quota = |n: Option<u64>| n.map_or_else(|| "Unlimited".to_owned(), text::number);
    let keys = format!("/console/api-keys?plan_id={}", plan.id);
    let (edited, copied, deleted) = (plan.clone(), plan.clone(), plan.clone());
    let toasts = expect_context::<Toasts>();
    let id = plan.id;
    let items = vec![
        MenuItem::open("View keys", keys.clone()),
        MenuItem::run("Duplicate", move || duplicate.run(copied.clone())),
        MenuItem::run("Copy ID", move || {
            copy_and_report(id.to_string(), "Plan ID", toasts);
        }),
        MenuItem::danger("Delete", move || deleting.set(Some(deleted.clone()))),
    ];
    view! {
        <tr>
            <th scope="row" dir="auto">
                <span class="clamp">{plan.name.clone()}</span>
                {plan.strict.then(|| view! { <span class="badge">"Strict"</span> })}
                {(plan.billing == Billing::Paid).then(|| view! { <span class="badge">"Paid"</span> })}
            </th>
            <td class="num" data-label="Req/min">{text::number(plan.default_rpm.into())}</td>
            <td class="num" data-label="Burst">{text::number(plan.burst.into())}</td>
            <td class="num" data-label="Daily quota">{quota(plan.daily_quota)}</td>
            <td class="num" data-label="Monthly quota">{quota(plan.monthly_quota)}</td>
            <td class="num" data-label="Keys">
                <a href=keys aria-label=format!("{} on {}", count(plan.key_count, "key", "keys"), plan.name)>
                    {text::number(plan.key_count)}
                </a>
            </td>
            <td class="row-actions">
                {can_manage
                    .then(|| {
                        view! {
                            <button class="button small" data-focus-key=format!("edit-{}", plan.id) aria-label=format!("Edit {}", plan.name) on:click=move |_| editing.set(Some(edited.clone()))>"Edit"</button>
                            <Menu label=format!("More actions for {}", plan.name) focus_key=format!("more-{}", plan.id) items/>
                        }
                    })}
            </td>
        </tr>
    }
}

#[component]
fn EditPanel(
    editing: RwSignal<Option<Plan>>,
    billing: Option<Loader<BillingState>>,
    on_updated: Callback<Plan>,
) -> impl IntoView {
    let open = RwSignal::new(false);
    effect(move || {
        if editing.with(Option::is_some) {
            open.set(true);
        }
    });
    effect(move || {
        if !open.get() {
            editing.set(None);
        }
    });
    view! {
        <Modal open panel=true title="Edit plan">
            {move || editing.get().map(|plan| view! { <EditForm plan open billing on_updated/> })}
        </Modal>
    }
}

#[component]
fn EditForm(
    plan: Plan,
    open: RwSignal<bool>,
    billing: Option<Loader<BillingState>>,
    on_updated: Callback<Plan>,
) -> impl IntoView {
    let form = PlanForm::new(Some(&plan));
    let before = form.values();
    let effect = match plan.key_count {
        0 => "No keys use this plan.".to_owned(),
        n => format!(
            "Applies to {} within a second. Usage isn't reset.",
            count(n, "key", "keys")
        ),
    };
    let (id, keys) = (plan.id, plan.key_count);
    let paid_note = move || {
        let text = warning(billing, Some(keys)).filter(|_| form.paid.get())?;
        Some(view! { <p class="alert warn">{text}</p> })
    };
    let submit = move || {
        let body = plan_changes(&before, form.values());
        if body == UpdatePlan::default() {
            form.state.busy.set(false);
            return open.set(false);
        }
        form.state.send(api::update_plan(id, body), move |plan| {
            let _ = open.try_set(false);
            let _ = on_updated.try_run(plan);
        });
    };
    view! {
        <DialogForm form=form.state open action="Save changes" submit>
            <PlanFields plan=form/>
            <div role="status">{paid_note}</div>
            <p class="muted">{effect}</p>
        </DialogForm>
    }
}

#[component]
fn CreateForm(
    open: RwSignal<bool>,
    template: RwSignal<Option<Plan>>,
    on_created: Callback<Plan>,
) -> impl IntoView {
    let form = template.with_untracked(|plan| match plan {
        Some(plan) => PlanForm::copy_of(plan),
        None => PlanForm::new(None),
    });
    let submit = move || {
        form.state
            .send(api::create_plan(form.values()), move |plan| {
                let _ = open.try_set(false);
                // The user may have left the page.
                let _ = on_created.try_run(plan);
            });
    };
    view! {
        <DialogForm form=form.state open action="Create plan" submit>
            <PlanFields plan=form/>
        </DialogForm>
    }
}

#[component]
fn DeleteDialog(plan: RwSignal<Option<Plan>>, on_deleted: Callback<Plan>) -> impl IntoView {
    let confirmation = Confirmation::new();
    let in_use = RwSignal::new(false);
    effect(move || {
        if let Some(plan) = plan.get() {
            if plan.key_count > 0 {
                in_use.set(true);
            } else {
                confirmation.ask();
            }
        }
    });
    effect(move || {
        if !confirmation.open.get() && !in_use.get() {
            plan.set(None);
        }
    });
    let name = move || plan.get().map(|it| it.name).unwrap_or_default();
    let run = Callback::new(move |()| {
        if let Some(it) = plan.get_untracked() {
            confirmation.send(api::delete_plan(it.id), move |()| {
                let _ = on_deleted.try_run(it);
            });
        }
    });
    let usage = move || {
        plan.get().map(|it| match it.key_count {
            1 => "1 key uses this plan. Move or delete the key first.".to_owned(),
            n => format!(
                "{} keys use this plan. Move or delete the keys first.",
                text::number(n)
            ),
        })
    };
    view! {
        <Confirm
            confirmation
            title=Signal::derive(move || format!("Delete plan {}?", text::quoted(&name())))
            message="No keys use this plan. This can't be undone."
            action="Delete plan"
            run
        />
        <Modal open=in_use title="This plan is in use">
            <p>{usage}</p>
            <div class="actions end">
                <button class="button" on:click=move |_| in_use.set(false)>"Close"</button>
                <a class="button primary" href=move || plan.get().map(|it| format!("/console/api-keys?plan_id={}", it.id))>"View keys"</a>
            </div>
        </Modal>
    }
}
